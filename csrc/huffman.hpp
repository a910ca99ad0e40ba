// The Huffman tables of a JPEG, made ready to say at one look what the next bits are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "bits.hpp"
#include "simd.hpp"

namespace polydpo::jpeg {

// As a file gives it.
struct Table {
    bool given = false;
    std::uint8_t counts[17] = {};  // of codes of each length
    std::uint8_t symbols[256] = {};

    bool operator==(const Table& other) const { return std::memcmp(this, &other, sizeof *this) == 0; }
};

struct Symbol {
    std::uint8_t length;  // of its code; 0: there is none
    std::uint8_t value;
};

// Calls visit(length, code, symbol) for each code of a table, in its order. False: it is none. No code is all ones.
template <class Visit>
bool for_each_code(const Table& table, Visit visit) {
    if (!table.given) return false;
    for (int length = 1, code = 0, count = 0; length <= 16; ++length, code <<= 1) {
        const int codes = table.counts[length];
        if (count + codes > 256 || (codes > 0 && code + codes >= 1 << length)) return false;
        for (int i = 0; i < codes; ++i) visit(length, code++, table.symbols[count++]);
    }
    return true;
}

class Codes {
public:
    bool build(const Table& table) {
        std::fill(std::begin(short_), std::end(short_), Symbol{0, 0});
        std::fill(std::begin(end_), std::end(end_), 0);
        int count = 0;
        return for_each_code(table, [&](int length, int code, std::uint8_t symbol) {
            symbols_[count] = symbol;
            index_[length] = count++ - code;
            end_[length] = code + 1;
            if (length > short_bits) return;
            std::fill_n(short_ + (code << (short_bits - length)), 1 << (short_bits - length),
                        Symbol{static_cast<std::uint8_t>(length), symbol});
        });
    }

    // What the topmost bits begin with.
    POLYDPO_INLINE Symbol look(std::uint64_t bits) const {
        const Symbol symbol = short_[bits >> (64 - short_bits)];
        return __builtin_expect(symbol.length != 0, 1) ? symbol : look_long(bits);
    }

private:
    Symbol look_long(std::uint64_t bits) const {
        for (int length = short_bits + 1; length <= 16; ++length) {
            const int code = static_cast<int>(bits >> (64 - length));
            // Shorter codes are all smaller than what is a prefix of this one, so that the first that fits is right.
            if (code < end_[length]) {
                return {static_cast<std::uint8_t>(length), symbols_[code + index_[length]]};
            }
        }
        return {0, 0};
    }

    static constexpr int short_bits = 9;
    Symbol short_[1 << short_bits];
    int end_[17] = {};    // of each length: past the last code
    int index_[17] = {};  // and what leads from a code to its symbol
    std::uint8_t symbols_[256];
};

// What the next bits say of the first coefficient of a block: by how much it differs from that of the block before.
class Differences {
public:
    static constexpr int bits = 10;

    // From the least significant bit: bits (16), the difference (16). 0: it is not complete.
    std::uint32_t entries[1 << bits];
    Codes codes;

    bool build(const Table& table) {
        if (built_ && table == table_) return true;
        table_ = table;
        std::fill(std::begin(entries), std::end(entries), 0);
        bool within = true;
        const auto enter = [&](int length, int code, std::uint8_t size) {
            within = within && size < 16;
            const int rest = bits - length - size;
            for (int i = 0; rest >= 0 && i < 1 << size; ++i) {
                const auto value = static_cast<std::uint32_t>(extended(i, size));
                std::fill_n(entries + (((code << size) + i) << rest), 1 << rest,
                            value << 16 | static_cast<std::uint32_t>(length + size));
            }
        };
        built_ = for_each_code(table, enter) && within && codes.build(table);
        return built_;
    }

private:
    bool built_ = false;
    Table table_;
};

// What the next bits say of the coefficients of a block but its first: two of them at most, complete with their values.
class Pairs {
public:
    static constexpr int bits = 10;
    static constexpr int end_of_block = 128;  // added to the position: past every other sum

    // From the least significant bit: bits of both, bits of the first (8 each); by how much the first advances the
    // position, by how much both do (8 each); their values (16 each). Where there is no second, it is the first again.
    // 0: neither is complete.
    std::uint64_t entries[1 << bits];
    Codes codes;

    // Values are shifted left by `shift`.
    bool build(const Table& table, bool progressive, int shift) {
        if (built_ && progressive == progressive_ && shift == shift_ && table == table_) return true;
        built_ = make(table, progressive, shift);
        if (built_) {
            table_ = table;
            progressive_ = progressive;
            shift_ = shift;
        }
        return built_;
    }

private:
    struct One {
        std::uint8_t bits = Pairs::bits + 1;  // more than there are: left to the long way
        std::uint8_t advance = 0;
        std::int16_t value = 0;
    };

    bool make(const Table& table, bool progressive, int shift) {
        One ones[1 << bits] = {};
        const bool right = for_each_code(table, [&](int length, int code, std::uint8_t symbol) {
            const int size = symbol & 15, run = symbol >> 4, rest = bits - length - size;
            if (rest < 0 || (size == 0 && (run == 15 || (progressive && run > 0)))) return;
            for (int i = 0; i < 1 << size; ++i) {
                const int value = extended(i, size) * (1 << shift);
                if (!is_coefficient(value)) continue;
                const One one{static_cast<std::uint8_t>(length + size),
                              static_cast<std::uint8_t>(size == 0 ? end_of_block : run + 1),
                              static_cast<std::int16_t>(value)};
                std::fill_n(ones + (((code << size) + i) << rest), 1 << rest, one);
            }
        });
        if (!right || !codes.build(table)) return false;
        for (unsigned i = 0; i < 1u << bits; ++i) {
            const One first = ones[i], next = ones[i << first.bits & ((1u << bits) - 1)];
            const bool both = first.bits + next.bits <= bits && first.advance != end_of_block;
            const One second{static_cast<std::uint8_t>(both ? next.bits : 0),
                             static_cast<std::uint8_t>(both ? next.advance : 0), both ? next.value : first.value};
            const std::uint64_t entry = static_cast<std::uint64_t>(first.bits + second.bits) |
                                        static_cast<std::uint64_t>(first.bits) << 8 |
                                        static_cast<std::uint64_t>(first.advance) << 16 |
                                        static_cast<std::uint64_t>(first.advance + second.advance) << 24 |
                                        static_cast<std::uint64_t>(static_cast<std::uint16_t>(first.value)) << 32 |
                                        static_cast<std::uint64_t>(static_cast<std::uint16_t>(second.value)) << 48;
            entries[i] = first.bits <= bits ? entry : 0;
        }
        return true;
    }

    // What it was built from: most images have the tables of the one before.
    bool built_ = false, progressive_ = false;
    int shift_ = 0;
    Table table_;
};

// What the next bits say where a further bit of known coefficients is read: two symbols at most.
class Refinements {
public:
    static constexpr int bits = 11;

    // In one word, as it is looked up where everything waits for it. From the least significant bit: bits of both
    // symbols (6) and of the first (4); how many unknown coefficients come before the first that becomes known (4), how
    // many in all, with these (5); whether the block ends (1); which of the unknown ones become known and are negative
    // (22), and which become known (22), the uppermost bit being the next unknown one. Where the block ends, its only
    // coefficient is among the next ten, and the lower twelve of the 22 say how many blocks end, this one among them.
    struct Entry {
        std::uint64_t word = ends_only;

        POLYDPO_INLINE int length() const { return static_cast<int>(word & 63); }
        POLYDPO_INLINE int first_length() const { return static_cast<int>(word >> 6 & 15); }
        POLYDPO_INLINE int run() const { return static_cast<int>(word >> 10 & 15); }
        POLYDPO_INLINE int advance() const { return static_cast<int>(word >> 14 & 31); }
        POLYDPO_INLINE bool ends() const { return word & ends_only; }
        POLYDPO_INLINE unsigned ended() const { return static_cast<unsigned>(word >> 20 & 0xfff); }
        POLYDPO_INLINE std::uint64_t negative() const { return word << reach & found(); }
        POLYDPO_INLINE std::uint64_t found() const { return word & ~std::uint64_t{0} << (64 - reach); }
        // Neither is complete, or the first is a run of sixteen that ends at none.
        POLYDPO_INLINE bool is_long() const { return word == ends_only; }
    };
    Entry entries[1 << bits];
    Codes codes;

    bool build(const Table& table) {
        if (built_ && table == table_) return true;
        built_ = make(table);
        table_ = table;
        return built_;
    }

private:
    static constexpr int reach = 22, reach_at_end = 10;
    static constexpr std::uint64_t ends_only = 1u << 19, all_of_ended = 0xfffu << 20, all_of_advance = 31u << 14;

    bool make(const Table& table) {
        Entry ones[1 << bits];
        const bool right = for_each_code(table, [&](int length, int code, std::uint8_t symbol) {
            const int size = symbol & 15, run = symbol >> 4, extra = size == 0 ? run : size;
            const int all = length + extra, rest = bits - all;
            if (size > 1 || (size == 0 && run == 15) || rest < 0) return;
            for (unsigned i = 0; i < 1u << extra; ++i) {
                std::uint64_t word = static_cast<std::uint64_t>(all | all << 6);
                if (size == 0) {
                    word |= ends_only | ((1u << run) + i) << 20;
                } else {
                    const std::uint64_t found = std::uint64_t{1} << 63 >> run;
                    word |=
                        static_cast<std::uint64_t>(run << 10 | (run + 1) << 14) | found | (i == 0 ? found >> reach : 0);
                }
                std::fill_n(ones + (((static_cast<unsigned>(code) << extra) + i) << rest), 1 << rest, Entry{word});
            }
        });
        if (!right || !codes.build(table)) return false;
        for (unsigned i = 0; i < 1u << bits; ++i) {
            const Entry first = ones[i], next = ones[i << first.length() & ((1u << bits) - 1)];
            const bool both = !first.ends() && !next.is_long() && first.length() + next.length() <= bits &&
                              (next.ends() ? first.run() < reach_at_end : first.advance() + next.advance() <= reach);
            entries[i].word = first.word + (both ? behind(next, first.advance()) : 0);
        }
        return true;
    }

    // What a second symbol adds to a first one.
    static std::uint64_t behind(const Entry& entry, int advance) {
        return static_cast<std::uint64_t>(entry.length()) |
               (entry.word & (all_of_advance | ends_only | (entry.ends() ? all_of_ended : 0))) |
               entry.found() >> advance | entry.negative() >> advance >> reach;
    }

    bool built_ = false;
    Table table_;
};

}  // namespace polydpo::jpeg

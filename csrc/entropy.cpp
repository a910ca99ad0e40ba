#include "entropy.hpp"

#ifdef POLYDPO_V3

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include <immintrin.h>

namespace polydpo {
namespace {

// From the order in which coefficients are stored to their places in a block.
constexpr std::uint8_t place[DCTSIZE2] = {
     0,  1,  8, 16,  9,  2,  3, 10, 17, 24, 32, 25, 18, 11,  4,  5,
    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,  6,  7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

// Symbol and what it is followed by take at most 16 + 15 bits.
constexpr int most_bits = 31;
constexpr std::ptrdiff_t most_bytes_of_block = DCTSIZE2 * most_bits / 8 + 1;
constexpr std::ptrdiff_t most_bytes_of_mcu = D_MAX_BLOCKS_IN_MCU * most_bytes_of_block + 8;

// ------------------------------------------------------------------------------------------------- bytes and bits

// The bytes of a scan without what is stuffed between them, a window of them at a time.
class Window {
public:
    // After the header of a scan, or a restart marker. Returns where its bytes are.
    const std::uint8_t* begin(const std::uint8_t* from, const std::uint8_t* end) {
        from_ = from;
        end_ = end;
        limit_ = bytes_;
        at_marker_ = broken_ = false;
        return bytes_;
    }

    // Makes sure that a whole MCU lies between `next` and the limit, or all that is left.
    POLYDPO_INLINE void ensure_mcu(const std::uint8_t*& next) {
        if (limit_ - next < most_bytes_of_mcu && !at_marker_) fill(next);
    }

    // Whether, with `bits` bits before `next` unread, a marker comes next but for the padding of a byte.
    bool finished(const std::uint8_t* next, int bits) {
        if (!at_marker_) fill(next);
        const std::ptrdiff_t unread = (limit_ - next) * 8 + bits;
        return at_marker_ && !broken_ && unread >= 0 && unread < 8;
    }
    bool overrun(const std::uint8_t* next, int bits) const { return (limit_ - next) * 8 + bits < 0; }
    // Of a marker, or where reading goes on.
    const std::uint8_t* from() const { return from_; }
    const std::uint8_t* end() const { return end_; }

private:
    void fill(const std::uint8_t*& next) {
        const std::ptrdiff_t rest = limit_ - next;  // not negative: there is no reading past a limit but at a marker
        std::memmove(bytes_, next, static_cast<std::size_t>(rest));
        std::uint8_t* to = bytes_ + rest;
        while (to < bytes_ + size) {
            const auto most = static_cast<std::size_t>(std::min<std::ptrdiff_t>(bytes_ + size - to, end_ - from_));
            const auto* special = static_cast<const std::uint8_t*>(std::memchr(from_, 0xff, most));
            const std::size_t plain = special != nullptr ? static_cast<std::size_t>(special - from_) : most;
            std::memcpy(to, from_, plain);
            to += plain;
            from_ += plain;
            if (special == nullptr && from_ < end_) break;  // full
            if (end_ - from_ < 2 || from_[1] != 0) {
                at_marker_ = true;
                broken_ = end_ - from_ < 2 || from_[1] == 0xff;  // cut off, or fill bytes
                break;
            }
            *to++ = 0xff;
            from_ += 2;
        }
        next = bytes_;
        limit_ = to;
        std::memset(to, 0, static_cast<std::size_t>(most_bytes_of_mcu) + 8);
    }

    static constexpr std::ptrdiff_t size = 16384;

    const std::uint8_t* from_ = nullptr;
    const std::uint8_t* end_ = nullptr;
    const std::uint8_t* limit_ = bytes_;
    bool at_marker_ = false, broken_ = false;
    std::uint8_t bytes_[size + most_bytes_of_mcu + 16] = {};
};

// The next bits, the first of them uppermost. Beside the `count` that it vouches for, those below may be there already.
struct Bits {
    std::uint64_t bits;
    int count;
    const std::uint8_t* next;

    // 56 at least.
    POLYDPO_INLINE void refill() {
        std::uint64_t word;
        std::memcpy(&word, next, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        bits |= word >> count;
        next += (63 - count) >> 3;
        count |= 56;
    }
    POLYDPO_INLINE void drop(int n) {
        bits <<= n;
        count -= n;
    }
    POLYDPO_INLINE int take(int n) {  // n of 0 to 16
        const int value = static_cast<int>(bits >> 1 >> (63 - n));
        drop(n);
        return value;
    }
};

// A number of `size` bits as JPEG writes it: those that begin with 0 are negative. Without a branch, as nobody could foresee
// it.
POLYDPO_INLINE int extended(int bits, int size) {
    const int least = 1 << size >> 1;  // of the positive ones
    return bits + ((bits - least) >> 31 & (1 - (1 << size)));
}

// ------------------------------------------------------------------------------------------------- tables

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
        built_ = for_each_code(table, [&](int length, int code, std::uint8_t size) {
            within = within && size < 16;
            const int rest = bits - length - size;
            for (int i = 0; rest >= 0 && i < 1 << size; ++i) {
                const auto value = static_cast<std::uint32_t>(extended(i, size));
                std::fill_n(entries + (((code << size) + i) << rest), 1 << rest,
                            value << 16 | static_cast<std::uint32_t>(length + size));
            }
        }) && within && codes.build(table);
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
        JCOEF value = 0;
    };

    bool make(const Table& table, bool progressive, int shift) {
        One ones[1 << bits] = {};
        const bool right = for_each_code(table, [&](int length, int code, std::uint8_t symbol) {
            const int size = symbol & 15, run = symbol >> 4, rest = bits - length - size;
            if (rest < 0 || (size == 0 && (run == 15 || (progressive && run > 0)))) return;
            for (int i = 0; i < 1 << size; ++i) {
                const int value = extended(i, size) * (1 << shift);
                if (value != static_cast<JCOEF>(value)) continue;
                const One one{static_cast<std::uint8_t>(length + size),
                              static_cast<std::uint8_t>(size == 0 ? end_of_block : run + 1), static_cast<JCOEF>(value)};
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
    static constexpr int bits = 10;
    static constexpr std::uint32_t ends = 1u << 31, then_ends = 1 << 17;

    struct Entry {
        // Of a symbol that ends blocks: from the least significant bit, its bits (8); how many blocks end, this one among
        // them (16); and `ends`. Of one or two unknown coefficients that become known: bits of both and of the first (4
        // each); how many unknown ones come before the first (4); how many in all, with these (5); and whether a block
        // ends after the first, in which case there is none other. 0: left to the long way, as are runs of sixteen that
        // end at none.
        std::uint32_t what = 0;
        std::uint32_t found = 0, negative = 0;  // which they are, the uppermost bit being the next unknown one
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
    bool make(const Table& table) {
        Entry ones[1 << bits];
        const bool right = for_each_code(table, [&](int length, int code, std::uint8_t symbol) {
            const unsigned size = symbol & 15, run = symbol >> 4, extra = size == 0 ? run : size;
            const int all = length + static_cast<int>(extra), rest = bits - all;
            if (size > 1 || (size == 0 && run == 15) || rest < 0) return;
            for (unsigned i = 0; i < 1u << extra; ++i) {
                Entry one{static_cast<std::uint32_t>(all)};
                if (size == 0) {
                    one.what |= ends | ((1u << run) + i) << 8;
                } else {
                    one.what |= one.what << 4 | run << 8 | (run + 1) << 12;
                    one.found = 1u << 31 >> run;
                    one.negative = i == 0 ? one.found : 0;
                }
                std::fill_n(ones + (((static_cast<unsigned>(code) << extra) + i) << rest), 1 << rest, one);
            }
        });
        if (!right || !codes.build(table)) return false;
        for (unsigned i = 0; i < 1u << bits; ++i) {
            Entry entry = ones[i];
            const Entry next = ones[i << (entry.what & 15) & ((1u << bits) - 1)];
            const std::uint32_t all = (entry.what & 15) + (next.what & 15);
            if (entry.what != 0 && !(entry.what & ends) && next.what != 0 && all <= bits) {
                if (!(next.what & ends)) {
                    const std::uint32_t advance = entry.what >> 12;
                    entry.what = (entry.what & 0xff0u) | all | (advance + (next.what >> 12)) << 12;
                    entry.found |= next.found >> advance;
                    entry.negative |= next.negative >> advance;
                } else if ((next.what >> 8 & 0xffff) == 1) {
                    entry.what = (entry.what & ~15u) | all | then_ends;
                }
            }
            entries[i] = entry;
        }
        return true;
    }

    bool built_ = false;
    Table table_;
};

// What a scan of further bits changes in a block.
struct Changes {
    std::uint64_t which;     // coefficients whose absolute values grow, those that become known among them
    std::uint64_t negative;  // those that become known as negative ones
};

}  // namespace

// ------------------------------------------------------------------------------------------------- scans

struct EntropyState {
    // A component, in blocks.
    struct Part {
        int across, down;            // of it
        int in_mcu_across, in_mcu_down;
        int stored_across;           // whole MCUs
        std::size_t first;           // number of its first block in what is kept
        int name;
        int dc_table, ac_table;      // of the current scan
        int last_dc;
        std::int8_t bits_missing[DCTSIZE2];  // of each coefficient; -1: nothing of it is known
    };
    // A block of an MCU: its component, where it is in the first MCU of a row, and how far the next MCU's is.
    struct Place {
        int part;
        std::size_t first, step;
    };

    Window window;
    Bits unread{0, 0, nullptr};

    Part parts[3];
    int count;
    bool progressive;
    int mcus_across, mcu_rows, row;  // of the image
    int most_scans, scans;

    // The current scan.
    int in_scan[3];
    int scan_count, from, to, high, low;
    unsigned interval, interval_left, restart;
    unsigned ended;  // blocks that have nothing more in it

    Table tables[2][NUM_HUFF_TBLS];  // DC and AC
    Differences first[NUM_HUFF_TBLS];
    Pairs rest[NUM_HUFF_TBLS];
    Refinements refinements;

    // Of each block of a row of MCUs; or of the image, if it is progressive. `known` has a bit for each coefficient that is
    // not zero, in the order of storage, the first uppermost.
    std::vector<JCOEF> coefficients;
    std::vector<std::uint8_t> last;
    std::vector<std::uint64_t> known;
    std::vector<Changes> changes;  // of each block of a row
};

namespace {

using Part = EntropyState::Part;

constexpr std::uint64_t bit_of(unsigned position) { return std::uint64_t{1} << 63 >> position; }

// Those of the positions from `low` to `high`, both below 64 and low <= high + 1.
POLYDPO_INLINE std::uint64_t bits_of(int low, int high) {
    return low > high ? 0 : ~std::uint64_t{0} >> low & ~std::uint64_t{0} << (63 - high);
}

void go_on_after_restart(EntropyState& state, Bits& in) {
    if (!state.window.finished(in.next, in.count)) throw LibjpegNeeded();
    const std::uint8_t* marker = state.window.from();
    if (marker[1] != JPEG_RST0 + state.restart) throw LibjpegNeeded();
    in = {0, 0, state.window.begin(marker + 2, state.window.end())};
    state.restart = (state.restart + 1) % 8;
    state.interval_left = state.interval;
    state.ended = 0;
    for (Part& part : state.parts) part.last_dc = 0;
}

// Before `mcus`, all of which are no more than the largest MCU. Returns how many of them come before a restart.
POLYDPO_INLINE int prepare(EntropyState& state, Bits& in, int mcus) {
    if (__builtin_expect(state.interval > 0, 0)) {
        if (state.interval_left == 0) go_on_after_restart(state, in);
        mcus = static_cast<int>(std::min(static_cast<unsigned>(mcus), state.interval_left));
        state.interval_left -= static_cast<unsigned>(mcus);
    }
    state.window.ensure_mcu(in.next);
    return mcus;
}

// After them, if all was `right`.
POLYDPO_INLINE void check(const EntropyState& state, const Bits& in, bool right) {
    if (__builtin_expect(!right || state.window.overrun(in.next, in.count), 0)) throw LibjpegNeeded();
}

// A block's first coefficient, which was `last` in the block before. False: there is no such code. Afterwards there are 46
// bits.
POLYDPO_INLINE bool read_first(Bits& in, const Differences& differences, int* last) {
    in.refill();
    if (const std::uint32_t entry = differences.entries[in.bits >> (64 - Differences::bits)];
        __builtin_expect(entry != 0, 1)) {
        in.drop(entry & 255);
        *last += static_cast<int>(entry) >> 16;
    } else {
        const Symbol symbol = differences.codes.look(in.bits);
        if (symbol.length == 0) return false;
        in.drop(symbol.length);
        *last += extended(in.take(symbol.value), symbol.value);
        in.refill();
    }
    return *last == static_cast<JCOEF>(*last);
}

// A block's coefficients after the one at `at`, up to that at `last`; `at` becomes the position of the last one there
// is, or one later. Of progressive images, `known` gets their bits, and `ended` how many further blocks have none. There
// must be 44 bits.
template <bool progressive>
POLYDPO_INLINE bool read_rest(Bits& in, const Pairs& pairs, JCOEFPTR block, unsigned& at, const unsigned last, int shift,
                              std::uint64_t& known, unsigned& ended) {
    const auto put = [&](unsigned position, std::uint64_t value) POLYDPO_INLINE_LAMBDA {
        block[place[position]] = static_cast<JCOEF>(value);
        if (progressive) known |= bit_of(position);
    };
    for (;;) {
        std::uint64_t entry;
#pragma GCC unroll 4
        for (int look = 0; look < 44 / Pairs::bits; ++look) {
            entry = pairs.entries[in.bits >> (64 - Pairs::bits)];
            if (__builtin_expect(entry == 0, 0)) goto long_way;
            const unsigned second = at + (entry >> 24 & 255);
            if (second >= last) goto closing;
            put(at + (entry >> 16 & 255), entry >> 32);
            put(second, entry >> 48);
            at = second;
            in.drop(entry & 255);
        }
        in.refill();
        continue;

    closing: {
        const unsigned first = at + (entry >> 16 & 255), second = at + (entry >> 24 & 255);
        if (first >= last) {
            in.drop(entry >> 8 & 255);
            if (first != last) return first >= Pairs::end_of_block;
            put(first, entry >> 32);
            at = first;
            return true;
        }
        put(first, entry >> 32);
        in.drop(entry & 255);
        at = second == last ? second : first;
        if (second == last) put(second, entry >> 48);
        return second == last || second >= Pairs::end_of_block;
    }

    long_way:
        in.refill();
        const Symbol symbol = pairs.codes.look(in.bits);
        if (symbol.length == 0) return false;
        in.drop(symbol.length);
        const int size = symbol.value & 15, run = symbol.value >> 4;
        if (size == 0 && run < 15) {
            if (progressive) ended = (1u << run) - 1 + static_cast<unsigned>(in.take(run));
            return true;
        }
        at += static_cast<unsigned>(run) + 1;
        if (size > 0) {
            const int value = extended(in.take(size), size) * (1 << shift);
            if (at > last || value != static_cast<JCOEF>(value)) return false;
            put(at, static_cast<std::uint64_t>(value));
            if (at == last) return true;
        } else if (at >= last) {
            return false;
        }
        in.refill();
    }
}

// Where an MCU's blocks are. Of a scan of one component, an MCU is a block.
int places_of(const EntropyState& state, int row, EntropyState::Place* places) {
    if (state.scan_count == 1) {
        const Part& part = state.parts[state.in_scan[0]];
        places[0] = {state.in_scan[0], part.first + static_cast<std::size_t>(row) * part.stored_across, 1};
        return 1;
    }
    int count = 0;
    for (int i = 0; i < state.scan_count; ++i) {
        const Part& part = state.parts[state.in_scan[i]];
        for (int y = 0; y < part.in_mcu_down; ++y) {
            for (int x = 0; x < part.in_mcu_across; ++x) {
                const auto above = static_cast<std::size_t>(row) * part.in_mcu_down + y;
                places[count++] = {state.in_scan[i], part.first + above * part.stored_across + x,
                                   static_cast<std::size_t>(part.in_mcu_across)};
            }
        }
    }
    return count;
}

// Calls read(in, block) for each block of a row, in a scan of one component.
template <class Read>
POLYDPO_V3_INLINE void for_each_block(EntropyState& state, int row, int blocks, Read read) {
    const Part& part = state.parts[state.in_scan[0]];
    std::size_t number = part.first + static_cast<std::size_t>(row) * part.stored_across;
    Bits in = state.unread;
    for (int rest = blocks; rest > 0;) {
        // As many at a time as the window surely holds.
        int count = prepare(state, in, std::min(rest, D_MAX_BLOCKS_IN_MCU));
        rest -= count;
        bool right = true;
        for (; right && count > 0; --count) right = read(in, number++);
        check(state, in, right);
    }
    state.unread = in;
}

// Calls read(in, place, block) for each block of a row of MCUs.
template <class Read>
POLYDPO_V3_INLINE void for_each_block_of_mcus(EntropyState& state, int row, int mcus, Read read) {
    EntropyState::Place places[D_MAX_BLOCKS_IN_MCU];
    const int count = places_of(state, row, places);
    Bits in = state.unread;
    for (int mcu = 0; mcu < mcus; ++mcu) {
        prepare(state, in, 1);
        bool right = true;
        for (int i = 0; right && i < count; ++i) {
            right = read(in, places[i], places[i].first + static_cast<std::size_t>(mcu) * places[i].step);
        }
        check(state, in, right);
    }
    state.unread = in;
}

POLYDPO_V3 void read_sequential(EntropyState& state) {
    std::fill(state.coefficients.begin(), state.coefficients.end(), JCOEF{0});
    JCOEF* const coefficients = state.coefficients.data();
    std::uint8_t* const lasts = state.last.data();
    for_each_block_of_mcus(state, 0, state.mcus_across, [&](Bits& in, const EntropyState::Place& at, std::size_t number)
                                                    POLYDPO_V3_LAMBDA {
        Part& part = state.parts[at.part];
        JCOEF* const block = coefficients + number * DCTSIZE2;
        std::uint64_t known = 0;
        unsigned ended = 0, last = 0;
        if (!read_first(in, state.first[part.dc_table], &part.last_dc)) return false;
        block[0] = static_cast<JCOEF>(part.last_dc);
        const bool right =
            read_rest<false>(in, state.rest[part.ac_table], block, last, DCTSIZE2 - 1, 0, known, ended);
        lasts[number] = static_cast<std::uint8_t>(last);
        return right;
    });
}

POLYDPO_V3 void first_of_dc(EntropyState& state, int row, int mcus) {
    JCOEF* const coefficients = state.coefficients.data();
    const int low = state.low;
    for_each_block_of_mcus(state, row, mcus, [&](Bits& in, const EntropyState::Place& at, std::size_t number)
                                                 POLYDPO_V3_LAMBDA {
        Part& part = state.parts[at.part];
        if (!read_first(in, state.first[part.dc_table], &part.last_dc)) return false;
        const int value = part.last_dc * (1 << low);
        coefficients[number * DCTSIZE2] = static_cast<JCOEF>(value);
        return value == static_cast<JCOEF>(value);
    });
}

POLYDPO_V3 void more_of_dc(EntropyState& state, int row, int mcus) {
    JCOEF* const coefficients = state.coefficients.data();
    const int low = state.low;
    for_each_block_of_mcus(state, row, mcus, [&](Bits& in, const EntropyState::Place&, std::size_t number)
                                                 POLYDPO_V3_LAMBDA {
        in.refill();
        coefficients[number * DCTSIZE2] |= static_cast<JCOEF>(in.take(1) << low);
        return true;
    });
}

POLYDPO_V3 void first_of_ac(EntropyState& state, int row, int blocks) {
    const Pairs& pairs = state.rest[state.parts[state.in_scan[0]].ac_table];
    const unsigned before = static_cast<unsigned>(state.from) - 1, to = static_cast<unsigned>(state.to);
    JCOEF* const coefficients = state.coefficients.data();
    std::uint64_t* const all_known = state.known.data();
    const int low = state.low;
    for_each_block(state, row, blocks, [&](Bits& in, std::size_t number) POLYDPO_V3_LAMBDA {
        if (state.ended > 0) return --state.ended, true;
        std::uint64_t known = all_known[number];
        unsigned at = before;
        in.refill();
        const bool right =
            read_rest<true>(in, pairs, coefficients + number * DCTSIZE2, at, to, low, known, state.ended);
        all_known[number] = known;
        return right;
    });
}

// ------------------------------------------------------------------------------------------------- further bits

struct ByPdep {
    // The lowest bits of `bits`, each to a place of `places`.
    static POLYDPO_V3_INLINE std::uint64_t spread(std::uint64_t bits, std::uint64_t places) {
        return _pdep_u64(bits, places);
    }
    // The uppermost of them but `count`; 0 if there are none so many.
    static POLYDPO_V3_INLINE std::uint64_t find(std::uint64_t places, int count) {
        const int below = __builtin_popcountll(places) - count - 1;
        return below < 0 ? 0 : _pdep_u64(std::uint64_t{1} << below, places);
    }
};

struct ByLoop {
    static POLYDPO_V3_INLINE std::uint64_t spread(std::uint64_t bits, std::uint64_t places) {
        std::uint64_t result = 0;
        for (; places != 0; places &= places - 1, bits >>= 1) result |= bits & 1 ? places & -places : 0;
        return result;
    }
    static POLYDPO_V3_INLINE std::uint64_t find(std::uint64_t places, int count) {
        for (; count > 0 && places != 0; --count) places ^= top(places);
        return places != 0 ? top(places) : 0;
    }

private:
    static POLYDPO_V3_INLINE std::uint64_t top(std::uint64_t places) {
        return bit_of(static_cast<unsigned>(__builtin_clzll(places)));
    }
};

// On AMD's processors before Zen 3 it takes longer than a loop.
bool pdep_is_quick() {
#ifdef POLYDPO_NO_PDEP
    return false;
#else
    return __builtin_cpu_is("intel") || __builtin_cpu_is("znver3") || __builtin_cpu_supports("avx512f");
#endif
}

// What comes next in a block: `free` unknown coefficients, then `known` ones, then unknown ones again, up to `reach` unknown
// ones in all.
struct Ahead {
    int free, known, reach;

    POLYDPO_V3_INLINE Ahead(std::uint64_t unknown, int at) {
        // Where a count is 64 there is nothing left, whatever the shift by it gives.
        const std::uint64_t here = unknown << (at & 63);
        free = leading_ones(here);
        const std::uint64_t then = here << (free & 63);
        known = leading_ones(~then);
        reach = free + leading_ones(then << (known & 63));
    }

private:
    static POLYDPO_V3_INLINE int leading_ones(std::uint64_t bits) { return static_cast<int>(_lzcnt_u64(~bits)); }
};

// Without a branch, as nobody could foresee it.
POLYDPO_INLINE int select(int mask, std::uint32_t where, std::uint32_t elsewhere) {
    return static_cast<int>(elsewhere ^ ((where ^ elsewhere) & static_cast<std::uint32_t>(mask)));
}

// A further bit of the coefficients of a block. Where one becomes known, a symbol says how many unknown ones are passed
// over; the bits of the known ones among them follow it, and are kept until the end of the block.
template <class By>
POLYDPO_V3_INLINE bool refine(Bits& in, const Refinements& symbols, int at, const int last, std::uint64_t& known,
                              Changes& changes, unsigned& ended) {
    const std::uint64_t band = bits_of(at, last), before = known & band, unknown = band & ~before;
    std::uint64_t added = 0, found = 0, negative = 0;
    const auto read_added = [&](int count) POLYDPO_INLINE_LAMBDA {
        if (__builtin_expect(count > in.count, 0)) {
            const int now = in.count;
            added = added << now | in.bits >> 1 >> (63 - now);
            in.drop(now);
            in.refill();
            count -= now;
        }
        added = added << count | in.bits >> 1 >> (63 - count);
        in.drop(count);
    };
    if (ended == 0) {
        Ahead ahead(unknown, at);
        // To the unknown one that follows `run` others, and past it. 0: there is none.
        const auto pass = [&](int run) POLYDPO_V3_LAMBDA {
            const std::uint64_t next = By::find(unknown & ~std::uint64_t{0} >> at, run);
            if (next == 0) return next;
            const int position = __builtin_clzll(next);
            read_added(position - at - run);
            at = position + 1;
            ahead = Ahead(unknown, at);
            return next;
        };
        while (at <= last) {
            in.refill();
            std::uint32_t what = 0;
            std::uint64_t these = 0, signs = 0;
#pragma GCC unroll 5
            for (int look = 0; look < 56 / Refinements::bits; ++look) {
                const Refinements::Entry& entry = symbols.entries[in.bits >> (64 - Refinements::bits)];
                what = entry.what;
                these = std::uint64_t{entry.found} << 32;
                signs = std::uint64_t{entry.negative} << 32;
                if (__builtin_expect(what == 0, 0)) goto long_way;
                if (what & (Refinements::ends | Refinements::then_ends)) goto ending;
                const int advance = what >> 12 & 31;
                // Where nothing known lies between, it is clear at once where they belong; and mostly nothing does.
                if (__builtin_expect(advance > ahead.free, 0)) goto passing;
                in.drop(what & 15);
                found |= these >> at;
                negative |= signs >> at;
                at += advance;
                ahead.free -= advance;
                ahead.reach -= advance;
                if (at > last) goto end;
            }
            continue;

        passing: {
            // The first or the second passes over what is known: mostly over all there is before the next unknown one.
            const int first = what >> 8 & 15, second = -(first < ahead.free);
            const int run = select(second, (what >> 12 & 31) - 1, static_cast<std::uint32_t>(first));
            const int length = select(second, what, what >> 4) & 15;
            const std::uint64_t before_it = these & ~(~std::uint64_t{0} >> ahead.free);
            found |= before_it >> at;
            negative |= (before_it & signs) >> at;
            const std::uint64_t sign = signs << run;
            std::uint64_t next;
            if (__builtin_expect(run < ahead.reach, 1)) {
                in.drop(length);
                read_added(ahead.known);
                at += run + ahead.known;
                next = bit_of(static_cast<unsigned>(at++));
                ahead = Ahead(unknown, at);
            } else {
                if (second) at += first + 1;
                if (at > last) {
                    in.drop(what >> 4 & 15);
                    goto end;
                }
                in.drop(length);
                next = pass(second ? run - first - 1 : run);
                if (next == 0) return false;
            }
            found |= next;
            negative |= sign >> 63 ? next : 0;
            continue;
        }

        ending: {
            if (what & Refinements::ends) {
                in.drop(what & 255);
                ended = what >> 8 & 0xffff;
                goto end;
            }
            const int run = what >> 8 & 15;
            if (run >= ahead.free) {
                what &= ~Refinements::then_ends;
                goto passing;
            }
            found |= these >> at;
            negative |= signs >> at;
            at += run + 1;
            if (at > last) {
                in.drop(what >> 4 & 15);
            } else {
                in.drop(what & 15);
                ended = 1;
            }
            goto end;
        }

        long_way:
            in.refill();
            const Symbol symbol = symbols.codes.look(in.bits);
            const int size = symbol.value & 15, skipped = symbol.value >> 4;
            if (symbol.length == 0 || size > 1) return false;
            in.drop(symbol.length);
            if (size == 0 && skipped < 15) {
                ended = (1u << skipped) + static_cast<unsigned>(in.take(skipped));
                goto end;
            }
            const bool is_negative = size == 1 && in.take(1) == 0;
            const std::uint64_t next = pass(skipped);
            if (next == 0) return false;
            if (size == 1) found |= next;
            if (is_negative) negative |= next;
        }
    }
end:
    if (ended > 0) {
        --ended;
        const std::uint64_t rest = before & bits_of(at, last);
        if (rest != 0) {
            in.refill();
            read_added(__builtin_popcountll(rest));
        }
    }
    known |= found;
    changes = {found | By::spread(added, before), negative};
    return true;
}

// From a mask in the order of storage to words of ones in the order of rows.
struct InRows {
    alignas(32) std::uint8_t byte[DCTSIZE2], bit[DCTSIZE2];  // where to look for each coefficient
};
constexpr InRows make_in_rows() {
    InRows result{};
    for (unsigned position = 0; position < DCTSIZE2; ++position) {
        result.byte[place[position]] = static_cast<std::uint8_t>((63 - position) / 8);
        result.bit[place[position]] = static_cast<std::uint8_t>(1u << (63 - position) % 8);
    }
    return result;
}
constexpr InRows in_rows = make_in_rows();

// Adds 1 << shift to the absolute values.
POLYDPO_V3_INLINE void grow(JCOEFPTR block, const Changes& changes, int shift) {
    const auto load = [](const void* from) POLYDPO_V3_LAMBDA {
        return _mm256_load_si256(static_cast<const __m256i*>(from));
    };
    const __m256i which = _mm256_set1_epi64x(static_cast<std::int64_t>(changes.which));
    const __m256i negative = _mm256_set1_epi64x(static_cast<std::int64_t>(changes.negative));
    const __m256i by = _mm256_set1_epi16(static_cast<short>(1 << shift));
    for (int i = 0; i < DCTSIZE2; i += 32) {
        const __m256i byte = load(in_rows.byte + i), bit = load(in_rows.bit + i);
        const auto bytes = [byte, bit](__m256i mask) POLYDPO_V3_LAMBDA {
            return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(mask, byte), bit), bit);
        };
        const __m256i these = bytes(which), new_ones = bytes(negative);
        const auto half = [block, by](int at, __m128i these, __m128i new_ones) POLYDPO_V3_LAMBDA {
            auto* words = reinterpret_cast<__m256i*>(block + at);
            const __m256i values = _mm256_loadu_si256(words);
            const __m256i below = _mm256_or_si256(_mm256_srai_epi16(values, 15), _mm256_cvtepi8_epi16(new_ones));
            const __m256i more = _mm256_and_si256(_mm256_cvtepi8_epi16(these), by);
            _mm256_storeu_si256(words, _mm256_add_epi16(values, _mm256_sub_epi16(_mm256_xor_si256(more, below), below)));
        };
        half(i, _mm256_castsi256_si128(these), _mm256_castsi256_si128(new_ones));
        half(i + 16, _mm256_extracti128_si256(these, 1), _mm256_extracti128_si256(new_ones, 1));
    }
}

template <class By>
POLYDPO_V3_INLINE void refine_row(EntropyState& state, int row, int blocks) {
    const Refinements& refinements = state.refinements;
    std::uint64_t* const known = state.known.data();
    Changes* const changes = state.changes.data();
    const int from = state.from, to = state.to;
    const Part& part = state.parts[state.in_scan[0]];
    const std::size_t first = part.first + static_cast<std::size_t>(row) * part.stored_across;
    for_each_block(state, row, blocks, [&](Bits& in, std::size_t number) POLYDPO_V3_LAMBDA {
        return refine<By>(in, refinements, from, to, known[number], changes[number - first], state.ended);
    });
    JCOEFPTR block = state.coefficients.data() + first * DCTSIZE2;
    for (int i = 0; i < blocks; ++i, block += DCTSIZE2) {
        if (changes[i].which != 0) grow(block, changes[i], state.low);
    }
}

POLYDPO_V3 void more_of_ac(EntropyState& state, int row, int blocks) { refine_row<ByLoop>(state, row, blocks); }
POLYDPO_V3 void more_of_ac_by_pdep(EntropyState& state, int row, int blocks) { refine_row<ByPdep>(state, row, blocks); }

// ------------------------------------------------------------------------------------------------- markers

// Big-endian, as everything in a JPEG.
int word(const std::uint8_t* at) { return at[0] << 8 | at[1]; }

void need(bool condition) {
    if (!condition) throw LibjpegNeeded();
}

// At the header of a scan.
void begin_scan(EntropyState& state, const std::uint8_t* from, const std::uint8_t* end) {
    need(++state.scans <= state.most_scans);
    const bool dc = state.from == 0, first = state.high == 0;
    if (state.progressive) {
        need(dc ? state.to == 0 : state.scan_count == 1 && state.from <= state.to && state.to < DCTSIZE2);
        need(state.low <= 13 && (first || state.low == state.high - 1));
    } else {
        need(dc && state.to == DCTSIZE2 - 1 && first && state.low == 0 && state.scan_count == state.count);
    }
    for (int i = 0; i < state.scan_count; ++i) {
        Part& part = state.parts[state.in_scan[i]];
        for (int k = 0; k < i; ++k) need(state.in_scan[k] != state.in_scan[i]);
        need(dc || part.bits_missing[0] >= 0);
        for (int k = state.from; k <= state.to; ++k) {
            need(part.bits_missing[k] == (first ? -1 : state.high));
            part.bits_missing[k] = static_cast<std::int8_t>(state.low);
        }
        need(part.dc_table >= 0 && part.dc_table < NUM_HUFF_TBLS && part.ac_table >= 0 && part.ac_table < NUM_HUFF_TBLS);
        if (dc && first) need(state.first[part.dc_table].build(state.tables[0][part.dc_table]));
        if (!state.progressive || (!dc && first)) {
            need(state.rest[part.ac_table].build(state.tables[1][part.ac_table], state.progressive, state.low));
        }
        if (!dc && !first) need(state.refinements.build(state.tables[1][part.ac_table]));
        part.last_dc = 0;
    }
    state.unread = {0, 0, state.window.begin(from, end)};
    state.interval_left = state.interval;
    state.restart = 0;
    state.ended = 0;
}

// After a scan: its remaining bytes are read, and what comes between it and the next. False: the image ends.
bool next_scan(EntropyState& state) {
    need(state.window.finished(state.unread.next, state.unread.count));
    const std::uint8_t *at = state.window.from(), *const end = state.window.end();
    for (;;) {
        need(end - at >= 2 && at[0] == 0xff);
        const int marker = at[1];
        at += 2;
        if (marker == 0xd9) return false;
        need(end - at >= 2 && word(at) >= 2 && word(at) <= end - at);
        const std::uint8_t *body = at + 2, *const after = at + word(at);
        at = after;
        if (marker == 0xc4) {  // tables
            while (body < after) {
                need(after - body > 16 && (body[0] & ~0x13) == 0);
                Table& table = state.tables[body[0] >> 4][body[0] & 3];
                table = Table();
                int symbols = 0;
                for (int length = 1; length <= 16; ++length) symbols += table.counts[length] = body[length];
                body += 17;
                need(symbols <= 256 && symbols <= after - body);
                std::copy_n(body, symbols, table.symbols);
                table.given = true;
                body += symbols;
            }
        } else if (marker == 0xdd) {  // restart interval
            need(after - body == 2);
            state.interval = static_cast<unsigned>(word(body));
        } else if (marker == 0xda) {  // a scan
            need(after - body >= 1 && body[0] >= 1 && body[0] <= state.count && after - body == 2 * body[0] + 4);
            state.scan_count = *body++;
            for (int i = 0; i < state.scan_count; ++i, body += 2) {
                int part = 0;
                while (part < state.count && state.parts[part].name != body[0]) ++part;
                need(part < state.count);
                state.in_scan[i] = part;
                state.parts[part].dc_table = body[1] >> 4;
                state.parts[part].ac_table = body[1] & 15;
            }
            state.from = body[0];
            state.to = body[1];
            state.high = body[2] >> 4;
            state.low = body[2] & 15;
            begin_scan(state, after, end);
            return true;
        } else {
            need((marker & 0xf0) == 0xe0 || marker == 0xfe);  // of applications, or a comment
        }
    }
}

// All scans of a progressive image, whose first begins here.
void read_progressive(EntropyState& state) {
    do {
        const bool dc = state.from == 0, first = state.high == 0;
        const auto read = dc ? (first ? first_of_dc : more_of_dc)
                          : first             ? first_of_ac
                          : pdep_is_quick() ? more_of_ac_by_pdep
                                            : more_of_ac;
        const Part& part = state.parts[state.in_scan[0]];
        const int across = state.scan_count == 1 ? part.across : state.mcus_across;
        const int down = state.scan_count == 1 ? part.down : state.mcu_rows;
        for (int row = 0; row < down; ++row) read(state, row, across);
    } while (next_scan(state));
    for (int i = 0; i < state.count; ++i) {
        for (const int bits : state.parts[i].bits_missing) need(bits == 0);
    }
    std::transform(state.known.begin(), state.known.end(), state.last.begin(), [](std::uint64_t known) {
        return static_cast<std::uint8_t>(known == 0 ? 0 : 63 - __builtin_ctzll(known));
    });
}

std::int64_t divided_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

// Of the image that is grey, an MCU is a block, whatever its sampling factors are.
int samples_across(const jpeg_decompress_struct& info, int part) {
    return info.num_components == 1 ? 1 : info.comp_info[part].h_samp_factor;
}
int samples_down(const jpeg_decompress_struct& info, int part) {
    return info.num_components == 1 ? 1 : info.comp_info[part].v_samp_factor;
}

// Of the thread's last image, with its tables.
thread_local std::unique_ptr<EntropyState> spare;

}  // namespace

bool EntropyDecoder::knows(const jpeg_decompress_struct& info) {
    const int count = info.num_components;
    if (!is_x86_64_v3() || info.arith_code || info.data_precision != 8 || info.err->num_warnings != 0) return false;
    if (count != 1 && count != 3) return false;
    const int h = samples_across(info, 0), v = samples_down(info, 0);
    if (h > 2 || v > h) return false;
    for (int i = 1; i < count; ++i) {
        if (samples_across(info, i) != 1 || samples_down(info, i) != 1) return false;
        for (int k = 0; k < i; ++k) {
            if (info.comp_info[i].component_id == info.comp_info[k].component_id) return false;
        }
    }
    // Lossless images, which libjpeg-turbo 3 decodes, have no such scans.
    return info.progressive_mode || (info.comps_in_scan == count && info.Se == DCTSIZE2 - 1);
}

std::int64_t EntropyDecoder::memory(const jpeg_decompress_struct& info) {
    if (!info.progressive_mode) return 0;
    const std::int64_t h = samples_across(info, 0), v = samples_down(info, 0);
    const std::int64_t mcus = divided_up(info.image_width, DCTSIZE * h) * divided_up(info.image_height, DCTSIZE * v);
    const auto of_block = static_cast<std::int64_t>(sizeof(JBLOCK) + sizeof(std::uint64_t) + sizeof(std::uint8_t));
    return mcus * (h * v + info.num_components - 1) * of_block;
}

EntropyDecoder::EntropyDecoder(const jpeg_decompress_struct& info, int most_scans)
    : state_(spare != nullptr ? std::move(spare) : std::make_unique<EntropyState>()) {
    EntropyState& state = *state_;
    state.count = info.num_components;
    state.progressive = info.progressive_mode;
    const int most_h = samples_across(info, 0), most_v = samples_down(info, 0);
    state.mcus_across = static_cast<int>(divided_up(info.image_width, DCTSIZE * most_h));
    state.mcu_rows = static_cast<int>(divided_up(info.image_height, DCTSIZE * most_v));
    state.row = 0;
    state.scans = 0;
    state.most_scans = most_scans;
    std::size_t blocks = 0;
    for (int i = 0; i < state.count; ++i) {
        Part& part = state.parts[i];
        const int h = samples_across(info, i), v = samples_down(info, i);
        part.across = static_cast<int>(divided_up(std::int64_t{info.image_width} * h, DCTSIZE * most_h));
        part.down = static_cast<int>(divided_up(std::int64_t{info.image_height} * v, DCTSIZE * most_v));
        part.in_mcu_across = h;
        part.in_mcu_down = v;
        part.stored_across = state.mcus_across * h;
        part.first = blocks;
        part.name = info.comp_info[i].component_id;
        std::fill(std::begin(part.bits_missing), std::end(part.bits_missing), std::int8_t{-1});
        blocks += static_cast<std::size_t>(part.stored_across) * v * (state.progressive ? state.mcu_rows : 1);
    }
    // One block more, as a row of blocks may be read two at a time.
    state.coefficients.assign((blocks + 1) * DCTSIZE2, 0);
    state.last.assign(blocks + 1, 0);
    state.known.assign(state.progressive ? blocks : 0, 0);
    state.changes.resize(static_cast<std::size_t>(state.parts[0].stored_across));
    for (int i = 0; i < NUM_HUFF_TBLS; ++i) {
        for (int ac = 0; ac < 2; ++ac) {
            const JHUFF_TBL* given = ac ? info.ac_huff_tbl_ptrs[i] : info.dc_huff_tbl_ptrs[i];
            Table& table = state.tables[ac][i] = Table();
            table.given = given != nullptr;
            if (given == nullptr) continue;
            std::copy_n(given->bits, sizeof table.counts, table.counts);
            std::copy_n(given->huffval, sizeof table.symbols, table.symbols);
            table.counts[0] = 0;
        }
    }
    state.scan_count = info.comps_in_scan;
    for (int i = 0; i < state.scan_count; ++i) {
        const jpeg_component_info& part = *info.cur_comp_info[i];
        state.in_scan[i] = part.component_index;
        state.parts[part.component_index].dc_table = part.dc_tbl_no;
        state.parts[part.component_index].ac_table = part.ac_tbl_no;
    }
    state.from = info.Ss;
    state.to = info.Se;
    state.high = info.Ah;
    state.low = info.Al;
    state.interval = info.restart_interval;
    begin_scan(state, info.src->next_input_byte, info.src->next_input_byte + info.src->bytes_in_buffer);
}

EntropyDecoder::~EntropyDecoder() {
    if (state_->progressive) {
        std::vector<JCOEF>().swap(state_->coefficients);
        std::vector<std::uint64_t>().swap(state_->known);
    }
    spare = std::move(state_);
}

int EntropyDecoder::rows() const { return state_->mcu_rows; }

void EntropyDecoder::read_row() {
    if (!state_->progressive) {
        read_sequential(*state_);
    } else if (state_->row == 0) {
        read_progressive(*state_);
    }
    ++state_->row;
}

void EntropyDecoder::finish() {
    if (!state_->progressive) need(!next_scan(*state_));
}

EntropyDecoder::Row EntropyDecoder::row(int component, int y) const {
    const Part& part = state_->parts[component];
    const int above = state_->progressive ? (state_->row - 1) * part.in_mcu_down : 0;
    const std::size_t number = part.first + static_cast<std::size_t>(above + y) * part.stored_across;
    return {state_->coefficients.data() + number * DCTSIZE2, state_->last.data() + number};
}

int EntropyDecoder::blocks_across(int component) const { return state_->parts[component].stored_across; }

}  // namespace polydpo

#endif

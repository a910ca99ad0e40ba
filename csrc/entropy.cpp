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

// A number of `size` bits as JPEG writes it: those that begin with 0 are negative.
POLYDPO_INLINE int extended(int bits, int size) {
    return size > 0 && bits >> (size - 1) == 0 ? bits - (1 << size) + 1 : bits;
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

// Calls visit(length, code, symbol) for each code of a table, in its order. False: it is none.
template <class Visit>
bool for_each_code(const Table& table, Visit visit) {
    if (!table.given) return false;
    for (int length = 1, code = 0, count = 0; length <= 16; ++length, code <<= 1) {
        const int codes = table.counts[length];
        if (count + codes > 256 || code + codes > 1 << length) return false;
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

// What the next bits say where a further bit of known coefficients is read.
class Refinements {
public:
    static constexpr int bits = 10;
    static constexpr unsigned found = 1 << 14, negative = 1 << 15;

    // From the least significant bit: how many bits (8), unknown coefficients that are passed over (6), whether the next
    // of them becomes known, and whether it is negative. Or, above those 16, how many blocks end, this one among them.
    // 0: it is not complete.
    std::uint32_t entries[1 << bits];
    Codes codes;

    bool build(const Table& table) {
        std::fill(std::begin(entries), std::end(entries), 0);
        for_each_code(table, [&](int length, int code, std::uint8_t symbol) {
            const int size = symbol & 15, run = symbol >> 4;
            const int extra = size == 0 && run < 15 ? run : size, rest = bits - length - extra;
            if (size > 1 || rest < 0) return;
            for (unsigned i = 0; i < 1u << extra; ++i) {
                unsigned entry = static_cast<unsigned>(length + extra);
                if (size == 1) entry |= static_cast<unsigned>(run) << 8 | found | (i == 0 ? negative : 0);
                if (size == 0 && run == 15) entry |= 15 << 8;
                if (size == 0 && run < 15) entry |= ((1u << run) + i) << 16;
                std::fill_n(entries + (((static_cast<unsigned>(code) << extra) + i) << rest), 1 << rest, entry);
            }
        });
        return codes.build(table);
    }
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
    Codes first[NUM_HUFF_TBLS];
    Pairs rest[NUM_HUFF_TBLS];
    Refinements refinements;

    // Of each block of a row of MCUs; or of the image, if it is progressive. `known` has a bit for each coefficient that is
    // not zero, in the order of storage, the first uppermost.
    std::vector<JCOEF> coefficients;
    std::vector<std::uint8_t> last;
    std::vector<std::uint64_t> known;
    std::vector<std::uint64_t> grown;  // of each block of a row: the coefficients whose further bit is 1
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

// Before an MCU.
POLYDPO_INLINE void prepare(EntropyState& state, Bits& in) {
    if (__builtin_expect(state.interval > 0, 0)) {
        if (state.interval_left == 0) go_on_after_restart(state, in);
        --state.interval_left;
    }
    state.window.ensure_mcu(in.next);
}

// After it, if all was `right`.
POLYDPO_INLINE void check(const EntropyState& state, const Bits& in, bool right) {
    if (__builtin_expect(!right || state.window.overrun(in.next, in.count), 0)) throw LibjpegNeeded();
}

// The difference of a block's first coefficient to that of the block before. False: there is no such code.
POLYDPO_INLINE bool read_difference(Bits& in, const Codes& codes, int* last) {
    in.refill();
    const Symbol symbol = codes.look(in.bits);
    if (symbol.length == 0 || symbol.value > 15) return false;
    in.drop(symbol.length);
    *last += extended(in.take(symbol.value), symbol.value);
    return *last == static_cast<JCOEF>(*last);
}

// A block's coefficients after the one at `at`, up to that at `last`; `at` becomes the position of the last one there
// is, or one later. Of progressive images, `known` gets their bits, and `ended` how many further blocks have none.
template <bool progressive>
POLYDPO_INLINE bool read_rest(Bits& in, const Pairs& pairs, JCOEFPTR block, unsigned& at, const unsigned last, int shift,
                              std::uint64_t& known, unsigned& ended) {
    const auto put = [&](unsigned position, std::uint64_t value) POLYDPO_INLINE_LAMBDA {
        block[place[position]] = static_cast<JCOEF>(value);
        if (progressive) known |= bit_of(position);
    };
    for (;;) {
        in.refill();
#pragma GCC unroll 5
        for (int look = 0; look < 56 / Pairs::bits; ++look) {
            const std::uint64_t entry = pairs.entries[in.bits >> (64 - Pairs::bits)];
            if (__builtin_expect(entry == 0, 0)) goto long_way;
            const unsigned first = at + (entry >> 16 & 255);
            if (first >= last) {
                in.drop(entry >> 8 & 255);
                if (first != last) return first >= Pairs::end_of_block;
                put(first, entry >> 32);
                at = first;
                return true;
            }
            put(first, entry >> 32);
            at += entry >> 24 & 255;
            if (at >= last) {
                in.drop(entry & 255);
                if (at == last) return put(at, entry >> 48), true;
                const bool end = at >= Pairs::end_of_block;
                at = first;
                return end;
            }
            put(at, entry >> 48);
            in.drop(entry & 255);
        }
        continue;

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

// Calls read(in, place, block) for each block of a row of MCUs.
template <class Read>
POLYDPO_V3_INLINE void for_each_block(EntropyState& state, int row, int mcus, Read read) {
    EntropyState::Place places[D_MAX_BLOCKS_IN_MCU];
    const int count = places_of(state, row, places);
    Bits in = state.unread;
    for (int mcu = 0; mcu < mcus; ++mcu) {
        prepare(state, in);
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
    for_each_block(state, 0, state.mcus_across, [&](Bits& in, const EntropyState::Place& at, std::size_t number)
                                                    POLYDPO_V3_LAMBDA {
        Part& part = state.parts[at.part];
        JCOEF* const block = coefficients + number * DCTSIZE2;
        std::uint64_t known = 0;
        unsigned ended = 0, last = 0;
        if (!read_difference(in, state.first[part.dc_table], &part.last_dc)) return false;
        block[0] = static_cast<JCOEF>(part.last_dc);
        const bool right =
            read_rest<false>(in, state.rest[part.ac_table], block, last, DCTSIZE2 - 1, 0, known, ended);
        lasts[number] = static_cast<std::uint8_t>(last);
        return right;
    });
}

POLYDPO_V3 void first_of_dc(EntropyState& state, int row, int mcus) {
    for_each_block(state, row, mcus, [&](Bits& in, const EntropyState::Place& at, std::size_t number)
                                         POLYDPO_V3_LAMBDA {
        Part& part = state.parts[at.part];
        if (!read_difference(in, state.first[part.dc_table], &part.last_dc)) return false;
        const int value = part.last_dc * (1 << state.low);
        state.coefficients[number * DCTSIZE2] = static_cast<JCOEF>(value);
        return value == static_cast<JCOEF>(value);
    });
}

POLYDPO_V3 void more_of_dc(EntropyState& state, int row, int mcus) {
    for_each_block(state, row, mcus, [&](Bits& in, const EntropyState::Place&, std::size_t number) POLYDPO_V3_LAMBDA {
        in.refill();
        state.coefficients[number * DCTSIZE2] |= static_cast<JCOEF>(in.take(1) << state.low);
        return true;
    });
}

POLYDPO_V3 void first_of_ac(EntropyState& state, int row, int mcus) {
    const Pairs& pairs = state.rest[state.parts[state.in_scan[0]].ac_table];
    const unsigned before = static_cast<unsigned>(state.from) - 1, to = static_cast<unsigned>(state.to);
    for_each_block(state, row, mcus, [&](Bits& in, const EntropyState::Place&, std::size_t number) POLYDPO_V3_LAMBDA {
        if (state.ended > 0) return --state.ended, true;
        std::uint64_t known = state.known[number];
        unsigned at = before;
        const bool right = read_rest<true>(in, pairs, state.coefficients.data() + number * DCTSIZE2, at, to, state.low,
                                           known, state.ended);
        state.known[number] = known;
        return right;
    });
}

// ------------------------------------------------------------------------------------------------- further bits

// The unknown coefficients of a block, passed over one after the other.
class UnknownByPdep {
public:
    POLYDPO_V3_INLINE explicit UnknownByPdep(std::uint64_t bits) : bits_(bits), left_(__builtin_popcountll(bits)) {}
    // The bit of the one after `run` others; 0 if there are none so many.
    POLYDPO_V3_INLINE std::uint64_t find(int run) {
        left_ -= run + 1;
        return left_ < 0 ? 0 : _pdep_u64(std::uint64_t{1} << left_, bits_);
    }

private:
    std::uint64_t bits_;
    int left_;
};

class UnknownByLoop {
public:
    POLYDPO_V3_INLINE explicit UnknownByLoop(std::uint64_t bits) : bits_(bits) {}
    POLYDPO_V3_INLINE std::uint64_t find(int run) {
        for (; run > 0 && bits_ != 0; --run) bits_ ^= top();
        const std::uint64_t found = bits_ != 0 ? top() : 0;
        bits_ ^= found;
        return found;
    }

private:
    POLYDPO_V3_INLINE std::uint64_t top() const { return bit_of(static_cast<unsigned>(__builtin_clzll(bits_))); }
    std::uint64_t bits_;
};

struct ByPdep {
    using Unknown = UnknownByPdep;
    // The lowest bits of `bits`, each to a place of `places`.
    static POLYDPO_V3_INLINE std::uint64_t spread(std::uint64_t bits, std::uint64_t places) {
        return _pdep_u64(bits, places);
    }
};

struct ByLoop {
    using Unknown = UnknownByLoop;
    static POLYDPO_V3_INLINE std::uint64_t spread(std::uint64_t bits, std::uint64_t places) {
        std::uint64_t result = 0;
        for (; places != 0; places &= places - 1, bits >>= 1) result |= bits & 1 ? places & -places : 0;
        return result;
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

// A further bit of the coefficients of a block. Where one becomes known, a symbol says how many unknown ones are passed
// over; the bits of the known ones among them follow it, and are kept until the end of the block. `grown` gets those that
// are 1.
template <class By>
POLYDPO_V3_INLINE bool refine(Bits& in, const Refinements& symbols, JCOEFPTR block, int at, const int last, int shift,
                              std::uint64_t& known, std::uint64_t& grown, unsigned& ended) {
    const std::uint64_t band = bits_of(at, last), before = known & band;
    std::uint64_t added = 0;
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
        typename By::Unknown unknown(~before & band);
        while (at <= last) {
            in.refill();
            unsigned entry = symbols.entries[in.bits >> (64 - Refinements::bits)];
            if (__builtin_expect(entry == 0, 0)) {
                const Symbol symbol = symbols.codes.look(in.bits);
                const int size = symbol.value & 15, run = symbol.value >> 4;
                if (symbol.length == 0 || size > 1) return false;
                in.drop(symbol.length);
                if (size == 0 && run < 15) {
                    ended = (1u << run) + static_cast<unsigned>(in.take(run));
                    break;
                }
                entry = static_cast<unsigned>(run) << 8;
                if (size == 1) entry |= Refinements::found | (in.take(1) == 0 ? Refinements::negative : 0);
            } else {
                in.drop(entry & 255);
                if (entry >> 16 > 0) {
                    ended = entry >> 16;
                    break;
                }
            }
            const int run = static_cast<int>(entry >> 8 & 63);
            const std::uint64_t found = unknown.find(run);
            if (__builtin_expect(found == 0, 0)) return false;
            const int position = __builtin_clzll(found);
            // Mostly none: a branch lets the next symbol be looked up before it is known where this one belongs.
            if (const int passed = position - at - run; __builtin_expect(passed > 0, 0)) read_added(passed);
            if (__builtin_expect(entry & Refinements::found, 1)) {
                block[place[position]] = static_cast<JCOEF>((entry & Refinements::negative ? -1 : 1) * (1 << shift));
                known |= found;
            }
            at = position + 1;
        }
    }
    if (ended > 0) {
        in.refill();
        read_added(__builtin_popcountll(before & bits_of(at, last)));
        --ended;
    }
    grown = By::spread(added, before);
    return true;
}

// What each byte of `grown` says of the coefficients in the order of rows.
constexpr std::array<std::array<std::uint64_t, 256>, 8> make_in_rows() {
    std::array<std::array<std::uint64_t, 256>, 8> result{};
    for (unsigned byte = 0; byte < 8; ++byte) {
        for (unsigned value = 0; value < 256; ++value) {
            for (unsigned bit = 0; bit < 8; ++bit) {
                if (value >> bit & 1) result[byte][value] |= std::uint64_t{1} << place[63 - 8 * byte - bit];
            }
        }
    }
    return result;
}
constexpr auto in_rows = make_in_rows();

// Adds 1 << shift to the absolute values.
POLYDPO_V3_INLINE void grow(JCOEFPTR block, std::uint64_t grown, int shift) {
    std::uint64_t which = 0;
    for (unsigned byte = 0; byte < 8; ++byte) which |= in_rows[byte][grown >> 8 * byte & 255];
    const __m256i bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    const __m128i count = _mm_cvtsi32_si128(shift);
    for (int i = 0; i < DCTSIZE2; i += 16) {
        auto* at = reinterpret_cast<__m256i*>(block + i);
        const __m256i values = _mm256_loadu_si256(at);
        const __m256i mine = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(which >> i)), bits);
        const __m256i less = _mm256_sign_epi16(_mm256_cmpeq_epi16(mine, bits), values);
        _mm256_storeu_si256(at, _mm256_sub_epi16(values, _mm256_sll_epi16(less, count)));
    }
}

template <class By>
POLYDPO_V3_INLINE void refine_row(EntropyState& state, int row, int blocks) {
    std::size_t first = 0;
    for_each_block(state, row, blocks, [&](Bits& in, const EntropyState::Place& at, std::size_t number)
                                           POLYDPO_V3_LAMBDA {
        first = at.first;
        return refine<By>(in, state.refinements, state.coefficients.data() + number * DCTSIZE2, state.from, state.to,
                          state.low, state.known[number], state.grown[number - first], state.ended);
    });
    // Afterwards, as what has just been written in words is slow to read in vectors.
    JCOEFPTR block = state.coefficients.data() + first * DCTSIZE2;
    for (int i = 0; i < blocks; ++i, block += DCTSIZE2) {
        if (state.grown[i] != 0) grow(block, state.grown[i], state.low);
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
    state.grown.resize(static_cast<std::size_t>(state.parts[0].stored_across));
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

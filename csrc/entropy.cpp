#include "entropy.hpp"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "simd.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(POLYDPO_NO_PDEP)
#define POLYDPO_PDEP __attribute__((target("bmi,bmi2,popcnt")))
#endif

// What a decompressor's `entropy` points at begins so in every libjpeg since its version 6b of 1998; which is why
// only these two are touched, and only in libjpeg-turbo, of which versions 2.0 to 3.2 were tried.
struct jpeg_entropy_decoder {
    void (*start_pass)(j_decompress_ptr info);
    boolean (*decode_mcu)(j_decompress_ptr info, JBLOCKROW* blocks);
};

#if defined(LIBJPEG_TURBO_VERSION_NUMBER) && LIBJPEG_TURBO_VERSION_NUMBER < 4000000
#define POLYDPO_KNOWN_LIBJPEG 1
#else
#define POLYDPO_KNOWN_LIBJPEG 0
#endif

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
    // After the header of a scan, or a restart marker.
    void begin(const std::uint8_t* from, const std::uint8_t* end) {
        from_ = from;
        end_ = end;
        next = limit_ = bytes_;
        at_marker_ = broken_ = false;
    }

    // Makes sure that a whole MCU lies before the limit, or all that is left.
    POLYDPO_INLINE void ensure_mcu() {
        if (limit_ - next < most_bytes_of_mcu && !at_marker_) fill();
    }

    void fill() {
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

    // Whether, with `bits` bits before `next` unread, a marker comes next but for the padding of a byte.
    bool finished(int bits) {
        if (!at_marker_) fill();
        const std::ptrdiff_t unread = (limit_ - next) * 8 + bits;
        return at_marker_ && !broken_ && unread >= 0 && unread < 8;
    }
    bool overrun(int bits) const { return (limit_ - next) * 8 + bits < 0; }
    // Of a marker, or where reading goes on.
    const std::uint8_t* from() const { return from_; }
    const std::uint8_t* end() const { return end_; }

    const std::uint8_t* next = bytes_;

private:
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

struct Symbol {
    std::uint8_t length;  // of its code; 0: there is none
    std::uint8_t value;
};

// Calls visit(length, code, symbol) for each code of a table, in its order. False: it is none.
template <class Visit>
bool for_each_code(const JHUFF_TBL* table, Visit visit) {
    if (table == nullptr) return false;
    for (int length = 1, code = 0, count = 0; length <= 16; ++length, code <<= 1) {
        const int codes = table->bits[length];
        if (count + codes > 256 || code + codes > 1 << length) return false;
        for (int i = 0; i < codes; ++i) visit(length, code++, table->huffval[count++]);
    }
    return true;
}

class Codes {
public:
    bool build(const JHUFF_TBL* table) {
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
    bool build(const JHUFF_TBL* table, bool progressive, int shift) {
        if (table != nullptr && built_ && progressive == progressive_ && shift == shift_ && same(*table)) return true;
        built_ = make(table, progressive, shift);
        if (built_) {
            std::memcpy(counts_, table->bits, sizeof counts_);
            std::memcpy(symbols_, table->huffval, sizeof symbols_);
            progressive_ = progressive;
            shift_ = shift;
        }
        return built_;
    }

    // For bits of known coefficients the codes are enough.
    bool build_codes(const JHUFF_TBL* table) {
        built_ = false;
        return codes.build(table);
    }

private:
    struct One {
        std::uint8_t bits = Pairs::bits + 1;  // more than there are: left to the long way
        std::uint8_t advance = 0;
        JCOEF value = 0;
    };

    bool same(const JHUFF_TBL& table) const {
        return std::memcmp(counts_, table.bits, sizeof counts_) == 0 &&
               std::memcmp(symbols_, table.huffval, sizeof symbols_) == 0;
    }

    bool make(const JHUFF_TBL* table, bool progressive, int shift) {
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
    UINT8 counts_[17], symbols_[256];
};

}  // namespace

// ------------------------------------------------------------------------------------------------- scans

struct EntropyState {
    Window window;
    Bits unread{0, 0, nullptr};  // between two MCUs; its `next` is the window's

    struct Part {
        const Codes* first;
        const Pairs* rest;
        int* last;
    };
    Part parts[D_MAX_BLOCKS_IN_MCU];
    int last[MAX_COMPS_IN_SCAN];  // first coefficient of the component's last block
    Codes first[NUM_HUFF_TBLS];
    Pairs rest[NUM_HUFF_TBLS];
    int blocks, from, to, shift;
    std::int64_t mcus_left;
    unsigned interval, interval_left, restart;

    // Of progressive images: how many blocks have nothing more in this scan, and of each block a bit for each
    // coefficient that is not zero, in the order of storage.
    unsigned ended = 0;
    std::vector<std::uint64_t> known;
    std::size_t known_of[MAX_COMPONENTS] = {};
    std::uint64_t* known_next = nullptr;

    JBLOCK skipped;
    void (*libjpegs_start_pass)(j_decompress_ptr) = nullptr;
    bool given_up = false;
};

namespace {

EntropyState& state_of(j_decompress_ptr info) { return *static_cast<EntropyState*>(info->client_data); }

[[noreturn]] void give_up(j_decompress_ptr info) {
    state_of(info).given_up = true;
    info->err->error_exit(reinterpret_cast<j_common_ptr>(info));
    __builtin_unreachable();
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

// A block's coefficients after the one at `at`, up to that at `last`. Of progressive images, `known` gets their bits,
// and `ended` how many further blocks have none.
template <bool progressive>
POLYDPO_INLINE bool read_rest(Bits& in, const Pairs& pairs, JCOEFPTR block, unsigned at, const unsigned last, int shift,
                              std::uint64_t& known, unsigned& ended) {
    const auto put = [&](unsigned position, std::uint64_t value) POLYDPO_INLINE_LAMBDA {
        block[place[position]] = static_cast<JCOEF>(value);
        if (progressive) known |= std::uint64_t{1} << position;
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
                if (first == last) put(first, entry >> 32);
                return first == last || first >= Pairs::end_of_block;
            }
            put(first, entry >> 32);
            at += entry >> 24 & 255;
            if (at >= last) {
                in.drop(entry & 255);
                if (at == last) put(at, entry >> 48);
                return at == last || at >= Pairs::end_of_block;
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
        at += static_cast<unsigned>(run) + 1;
        if (size > 0) {
            const int value = extended(in.take(size), size) * (1 << shift);
            if (at > last || value != static_cast<JCOEF>(value)) return false;
            put(at, static_cast<std::uint64_t>(value));
            if (at == last) return true;
        } else if (run == 15) {
            if (at >= last) return false;
        } else {
            if (progressive) ended = (1u << run) - 1 + static_cast<unsigned>(in.take(run));
            return true;
        }
    }
}

// The positions from `low` to `high`, both below 64; none if high < low.
POLYDPO_INLINE std::uint64_t positions(int low, int high) {
    return high < low ? 0 : ~std::uint64_t{0} << low & ~std::uint64_t{0} >> (63 - high);
}

// The bit of `bits` that has `n` others below it; 0 if there are none so many.
struct SelectByLoop {
    static POLYDPO_INLINE std::uint64_t select(std::uint64_t bits, int n) {
        for (; n > 0; --n) bits &= bits - 1;
        return bits & -bits;
    }
};

#ifdef POLYDPO_PDEP
struct SelectByPdep {
    static POLYDPO_INLINE std::uint64_t select(std::uint64_t bits, int n) {
        std::uint64_t bit;  // written so because an intrinsic is not inlined into templates
        asm("pdep %2, %1, %0" : "=r"(bit) : "r"(std::uint64_t{1} << n), "r"(bits));
        return bit;
    }
};

// On AMD's processors before Zen 3 it takes longer than a loop.
bool pdep_is_quick() {
    if (!__builtin_cpu_supports("bmi") || !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("popcnt")) return false;
    return __builtin_cpu_is("intel") || __builtin_cpu_is("znver3") || __builtin_cpu_supports("avx512f");
}
#endif

// A further bit of the coefficients of a block. Where one becomes known, a symbol says how many unknown ones are passed
// over; the bits of the known ones among them follow it, and are kept until the end of the block.
template <class Select>
POLYDPO_INLINE bool refine_rest(Bits& in, const Codes& codes, JCOEFPTR block, int at, const int last, int shift,
                                std::uint64_t& known, unsigned& ended) {
    const std::uint64_t before = known & positions(at, last);
    std::uint64_t unknown = ~before & positions(at, last), added = 0;
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
    while (ended == 0 && at <= last) {
        in.refill();
        const Symbol symbol = codes.look(in.bits);
        if (symbol.length == 0) return false;
        in.drop(symbol.length);
        const int size = symbol.value & 15, run = symbol.value >> 4;
        if (size == 0 && run < 15) {
            ended = (1u << run) + static_cast<unsigned>(in.take(run));
            break;
        }
        const int value = in.take(size) * 2 - 1;
        const std::uint64_t found = Select::select(unknown, run);
        if (size > 1 || found == 0) return false;
        const int position = __builtin_ctzll(found);
        // Mostly none: a branch lets the next symbol be looked up before it is known where this one belongs.
        if (const int passed = position - at - run; __builtin_expect(passed > 0, 0)) read_added(passed);
        if (size > 0) {
            block[place[position]] = static_cast<JCOEF>(value * (1 << shift));
            known |= found;
        }
        unknown &= ~(found | (found - 1));
        at = position + 1;
    }
    if (ended > 0) {
        in.refill();
        read_added(__builtin_popcountll(before & positions(at, last)));
        --ended;
    }
    std::uint64_t which = before;
    for (int i = __builtin_popcountll(before) - 1; i >= 0; --i, which &= which - 1) {
        JCOEF& coefficient = block[place[__builtin_ctzll(which)]];
        const int sign = coefficient >> 15 | 1;
        const int add = static_cast<int>(added >> i & 1) & ~(coefficient >> shift);
        coefficient = static_cast<JCOEF>(coefficient + sign * (add << shift));
    }
    return true;
}

void go_on_after_restart(EntropyState& state, j_decompress_ptr info) {
    if (!state.window.finished(state.unread.count)) give_up(info);
    const std::uint8_t* marker = state.window.from();
    if (marker[1] != JPEG_RST0 + state.restart) give_up(info);
    state.window.begin(marker + 2, state.window.end());
    state.unread = {0, 0, nullptr};
    state.restart = (state.restart + 1) % 8;
    state.interval_left = state.interval;
    state.ended = 0;
    std::fill(std::begin(state.last), std::end(state.last), 0);
}

void hand_back(EntropyState& state, j_decompress_ptr info) {
    if (!state.window.finished(state.unread.count)) give_up(info);
    const std::uint8_t* marker = state.window.from();
    if (marker[1] >= JPEG_RST0 && marker[1] < JPEG_RST0 + 8) give_up(info);
    info->src->next_input_byte = marker;
    info->src->bytes_in_buffer = static_cast<std::size_t>(state.window.end() - marker);
}

// What all kinds of scans have in common around an MCU: `read(state, in)` reads it.
template <class Read>
POLYDPO_INLINE boolean decode_mcu(j_decompress_ptr info, Read read) {
    EntropyState& state = state_of(info);
    if (state.mcus_left <= 0) give_up(info);
    if (state.interval > 0 && state.interval_left == 0) go_on_after_restart(state, info);
    state.window.ensure_mcu();
    Bits in{state.unread.bits, state.unread.count, state.window.next};
    const bool right = read(state, in);
    state.window.next = in.next;
    state.unread = in;
    if (!right || state.window.overrun(in.count)) give_up(info);
    --state.interval_left;
    if (--state.mcus_left == 0) hand_back(state, info);
    return TRUE;
}

POLYDPO_CLONES boolean sequential(j_decompress_ptr info, JBLOCKROW* blocks) {
    return decode_mcu(info, [blocks](EntropyState& state, Bits& in) POLYDPO_INLINE_LAMBDA {
        std::uint64_t known = 0;
        unsigned ended = 0;
        for (int i = 0; i < state.blocks; ++i) {
            const EntropyState::Part& part = state.parts[i];
            JCOEFPTR block = blocks != nullptr ? *blocks[i] : state.skipped;
            if (!read_difference(in, *part.first, part.last)) return false;
            block[0] = static_cast<JCOEF>(*part.last);
            if (!read_rest<false>(in, *part.rest, block, 0, DCTSIZE2 - 1, 0, known, ended)) return false;
        }
        return true;
    });
}

POLYDPO_CLONES boolean first_of_dc(j_decompress_ptr info, JBLOCKROW* blocks) {
    return decode_mcu(info, [blocks](EntropyState& state, Bits& in) POLYDPO_INLINE_LAMBDA {
        for (int i = 0; i < state.blocks; ++i) {
            const EntropyState::Part& part = state.parts[i];
            if (!read_difference(in, *part.first, part.last)) return false;
            const int value = *part.last * (1 << state.shift);
            if (value != static_cast<JCOEF>(value)) return false;
            (*blocks[i])[0] = static_cast<JCOEF>(value);
        }
        return true;
    });
}

POLYDPO_CLONES boolean more_of_dc(j_decompress_ptr info, JBLOCKROW* blocks) {
    static_assert(D_MAX_BLOCKS_IN_MCU <= 56, "one refill is enough for a bit of each");
    return decode_mcu(info, [blocks](EntropyState& state, Bits& in) POLYDPO_INLINE_LAMBDA {
        in.refill();
        for (int i = 0; i < state.blocks; ++i) (*blocks[i])[0] |= static_cast<JCOEF>(in.take(1) << state.shift);
        return true;
    });
}

// A block of a component's other coefficients. `read(known)` does it, with what is known in a register.
template <class Read>
POLYDPO_INLINE bool with_known(EntropyState& state, Read read) {
    std::uint64_t known = *state.known_next;
    const bool right = read(known);
    *state.known_next++ = known;
    return right;
}

POLYDPO_CLONES boolean first_of_ac(j_decompress_ptr info, JBLOCKROW* blocks) {
    return decode_mcu(info, [blocks](EntropyState& state, Bits& in) POLYDPO_INLINE_LAMBDA {
        return with_known(state, [&](std::uint64_t& known) POLYDPO_INLINE_LAMBDA {
            if (state.ended > 0) return --state.ended, true;
            return read_rest<true>(in, *state.parts[0].rest, *blocks[0], static_cast<unsigned>(state.from) - 1,
                                   static_cast<unsigned>(state.to), state.shift, known, state.ended);
        });
    });
}

template <class Select>
POLYDPO_INLINE boolean refine_mcu(j_decompress_ptr info, JBLOCKROW* blocks) {
    return decode_mcu(info, [blocks](EntropyState& state, Bits& in) POLYDPO_INLINE_LAMBDA {
        return with_known(state, [&](std::uint64_t& known) POLYDPO_INLINE_LAMBDA {
            return refine_rest<Select>(in, state.parts[0].rest->codes, *blocks[0], state.from, state.to, state.shift,
                                       known, state.ended);
        });
    });
}

POLYDPO_CLONES boolean more_of_ac(j_decompress_ptr info, JBLOCKROW* blocks) {
    return refine_mcu<SelectByLoop>(info, blocks);
}

#ifdef POLYDPO_PDEP
POLYDPO_PDEP boolean more_of_ac_by_pdep(j_decompress_ptr info, JBLOCKROW* blocks) {
    return refine_mcu<SelectByPdep>(info, blocks);
}
#endif

std::int64_t blocks_of(const jpeg_component_info& part) {
    return static_cast<std::int64_t>(part.width_in_blocks) * part.height_in_blocks;
}

// After libjpeg's own start, which has examined the scan's parameters and tables.
void start(j_decompress_ptr info) {
    EntropyState& state = state_of(info);
    const bool progressive = info->progressive_mode, first = info->Ah == 0, dc = info->Ss == 0;
    if (info->err->num_warnings != 0) give_up(info);
    state.window.begin(info->src->next_input_byte, info->src->next_input_byte + info->src->bytes_in_buffer);
    state.unread = {0, 0, nullptr};
    state.mcus_left = static_cast<std::int64_t>(info->MCUs_per_row) * info->MCU_rows_in_scan;
    state.interval = state.interval_left = info->restart_interval;
    state.restart = 0;
    state.ended = 0;
    state.blocks = info->blocks_in_MCU;
    state.from = info->Ss;
    state.to = info->Se;
    state.shift = info->Al;
    for (int i = 0; i < info->comps_in_scan; ++i) {
        const jpeg_component_info& part = *info->cur_comp_info[i];
        const int of_first = part.dc_tbl_no, of_rest = part.ac_tbl_no;
        state.last[i] = 0;
        if (of_first < 0 || of_first >= NUM_HUFF_TBLS || of_rest < 0 || of_rest >= NUM_HUFF_TBLS) give_up(info);
        Pairs& rest = state.rest[of_rest];
        const JHUFF_TBL* table = info->ac_huff_tbl_ptrs[of_rest];
        bool built = true;
        if (dc && first) built = state.first[of_first].build(info->dc_huff_tbl_ptrs[of_first]);
        if (dc && !progressive) built = built && rest.build(table, progressive, 0);
        if (!dc) {
            built = first ? rest.build(table, progressive, state.shift) : rest.build_codes(table);
            if (info->comps_in_scan != 1 || state.blocks != 1 || state.mcus_left != blocks_of(part)) give_up(info);
            state.known_next = state.known.data() + state.known_of[part.component_index];
        }
        if (!built) give_up(info);
    }
    for (int i = 0; i < state.blocks; ++i) {
        const int in_scan = info->MCU_membership[i];
        const jpeg_component_info& part = *info->cur_comp_info[in_scan];
        state.parts[i] = {&state.first[part.dc_tbl_no], &state.rest[part.ac_tbl_no], &state.last[in_scan]};
    }
    info->entropy->decode_mcu = !progressive ? sequential
                                : dc         ? (first ? first_of_dc : more_of_dc)
                                             : (first ? first_of_ac : more_of_ac);
#ifdef POLYDPO_PDEP
    if (!dc && !first && pdep_is_quick()) info->entropy->decode_mcu = more_of_ac_by_pdep;
#endif
}

void start_pass(j_decompress_ptr info) {
    state_of(info).libjpegs_start_pass(info);
    start(info);
}

}  // namespace

// Of the thread's last image, with its tables.
static thread_local std::unique_ptr<EntropyState> spare;

EntropyDecoder::EntropyDecoder() : state_(spare != nullptr ? std::move(spare) : std::make_unique<EntropyState>()) {
    state_->given_up = false;
}
EntropyDecoder::~EntropyDecoder() {
    std::vector<std::uint64_t>().swap(state_->known);
    spare = std::move(state_);
}
bool EntropyDecoder::given_up() const { return state_->given_up; }

bool EntropyDecoder::knows(j_decompress_ptr info) {
    if (!POLYDPO_KNOWN_LIBJPEG || info->arith_code || info->data_precision != 8 || info->err->num_warnings != 0) {
        return false;
    }
    if (info->progressive_mode) return true;
    // Lossless images, which libjpeg-turbo 3 decodes, have no such scans.
    const bool whole = info->Ss == 0 && info->Se == DCTSIZE2 - 1 && info->Ah == 0 && info->Al == 0;
    return whole && !jpeg_has_multiple_scans(info);
}

std::int64_t EntropyDecoder::memory(j_decompress_ptr info) {
    std::int64_t blocks = 0;
    for (int i = 0; i < info->num_components; ++i) blocks += blocks_of(info->comp_info[i]);
    return info->progressive_mode ? blocks * static_cast<std::int64_t>(sizeof(std::uint64_t)) : 0;
}

void EntropyDecoder::install(j_decompress_ptr info) {
    if (info->progressive_mode) {
        std::int64_t blocks = 0;
        for (int i = 0; i < info->num_components; ++i) {
            state_->known_of[i] = static_cast<std::size_t>(blocks);
            blocks += blocks_of(info->comp_info[i]);
        }
        state_->known.assign(static_cast<std::size_t>(blocks), 0);
    }
    info->client_data = state_.get();
    state_->libjpegs_start_pass = info->entropy->start_pass;
    info->entropy->start_pass = start_pass;
    start(info);
}

}  // namespace polydpo

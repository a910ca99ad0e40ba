// A progressive JPEG's scans of further bits: what they say of a block, and what that makes of it.
#pragma once

#include "simd.hpp"

#ifdef POLYDPO_V3

#include <cstdint>

#include <immintrin.h>

#include "bits.hpp"
#include "coefficients.hpp"
#include "huffman.hpp"

namespace polydpo::jpeg {

// What is known of a block of a progressive image, beside the coefficients that its first scans gave. Those of further
// bits are kept as masks, two of them at most, until the block is made whole.
struct alignas(32) Further {
    static constexpr int bits = 2;

    std::uint64_t known = 0;         // coefficients that are not zero
    std::uint64_t negative = 0;      // of them
    std::uint64_t grown[bits] = {};  // coefficients whose absolute values are greater by 1, and by 2

    // A coefficient of a first scan: its bit, and its value in the lowest sixteen.
    POLYDPO_INLINE void add(std::uint64_t bit, std::uint64_t value) {
        known |= bit;
        negative |= bit & static_cast<std::uint64_t>(static_cast<std::int64_t>(value << 48) >> 63);
    }
};

// Two ways to the same: with the instruction PDEP and without it.
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

// On AMD's processors before Zen 3 the instruction PDEP takes longer than a loop.
inline bool pdep_is_quick() {
#ifdef POLYDPO_NO_PDEP
    return false;
#else
    return __builtin_cpu_is("intel") || __builtin_cpu_is("znver3") || __builtin_cpu_supports("avx512f");
#endif
}

// What comes next in a block: unknown coefficients up to the position `stop`, then `known` ones, then `further` unknown
// ones.
struct Ahead {
    int stop, known, further;

    POLYDPO_V3_INLINE Ahead(std::uint64_t unknown, int at) {
        // Where a count is 64 there is nothing left, whatever the shift by it gives.
        const std::uint64_t here = unknown << (at & 63);
        const int free = leading_ones(here);
        const std::uint64_t then = here << (free & 63);
        stop = at + free;
        known = leading_ones(~then);
        further = leading_ones(then << (known & 63));
    }

private:
    static POLYDPO_V3_INLINE int leading_ones(std::uint64_t bits) { return static_cast<int>(_lzcnt_u64(~bits)); }
};

// Without a branch, as nobody could foresee it.
POLYDPO_INLINE int select(int mask, int where, int elsewhere) { return elsewhere ^ ((where ^ elsewhere) & mask); }

// A further bit of the coefficients of a block. Where one becomes known, a symbol says how many unknown ones are passed
// over; the bits of the known ones among them follow it, and are kept until the end of the block. `at` and `last`: the
// first and the last position of the scan; `grown`: coefficients whose absolute values grow, those that become known
// among them; `ended`: blocks, from this one on, of which only known coefficients get bits. False: there is no such
// code, or there are too few unknown coefficients.
template <class By>
POLYDPO_V3_INLINE bool refine(Bits& in, const Refinements& symbols, int at, const int last, Further& block,
                              std::uint64_t& grown, unsigned& ended) {
    const std::uint64_t band = bits_of(at, last), before = block.known & band, unknown = band & ~before;
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
        // After the last position nothing fits before `stop` any more, so that the next look leads to the end.
        for (;;) {
            in.refill();
            Refinements::Entry entry;
#pragma GCC unroll 5
            for (int look = 0; look < 56 / Refinements::bits; ++look) {
                entry = symbols.entries[in.bits >> (64 - Refinements::bits)];
                if (entry.ends()) goto ending;
                // Where nothing known lies between, it is clear at once where they belong; and mostly nothing does.
                const int next = at + entry.advance();
                if (__builtin_expect(next > ahead.stop, 0)) goto passing;
                in.drop(entry.length());
                found |= entry.found() >> at;
                negative |= entry.negative() >> at;
                at = next;
            }
            continue;

        ending: {
            if (at > last) goto end;
            if (entry.is_long()) goto long_way;
            // One or none becomes known before.
            const int next = at + entry.advance();
            if (__builtin_expect(next > ahead.stop, 0)) goto passing;
            found |= entry.found() >> at;
            negative |= entry.negative() >> at;
            at = next;
            if (__builtin_expect(at > last, 0)) {
                in.drop(entry.first_length());
            } else {
                in.drop(entry.length());
                ended = entry.ended();
            }
            goto end;
        }

        passing: {
            if (at > last) goto end;
            // The first or the second passes over what is known: mostly over all there is before the next unknown one.
            const int free = ahead.stop - at, second = -(entry.run() < free);
            const int run = select(second, entry.advance() - 1, entry.run());
            const int length = select(second, entry.length(), entry.first_length());
            const std::uint64_t before_it = ~(~std::uint64_t{0} >> free);
            found |= (entry.found() & before_it) >> at;
            negative |= (entry.negative() & before_it) >> at;
            const bool is_negative = entry.negative() << run >> 63;
            std::uint64_t next;
            if (__builtin_expect(run < free + ahead.further, 1)) {
                in.drop(length);
                read_added(ahead.known);
                at += run + ahead.known;
                next = bit_of(static_cast<unsigned>(at++));
                ahead = Ahead(unknown, at);
            } else {
                if (second) at += entry.run() + 1;
                if (at > last) {
                    in.drop(entry.first_length());
                    goto end;
                }
                in.drop(length);
                next = pass(second ? run - entry.run() - 1 : run);
                if (next == 0) return false;
            }
            found |= next;
            negative |= is_negative ? next : 0;
            continue;
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
    block.known |= found;
    block.negative |= negative;
    grown = found | By::spread(added, before);
    return true;
}

// From a mask in the order of storage to words of ones in the order of rows.
struct InRows {
    alignas(32) std::uint8_t byte[block_size], bit[block_size];  // where to look for each coefficient
};
constexpr InRows make_in_rows() {
    InRows result{};
    for (unsigned position = 0; position < block_size; ++position) {
        result.byte[place[position]] = static_cast<std::uint8_t>((63 - position) / 8);
        result.bit[place[position]] = static_cast<std::uint8_t>(1u << (63 - position) % 8);
    }
    return result;
}
constexpr InRows in_rows = make_in_rows();

// Adds 1 << shift to the absolute values of `grown`.
inline void grow(Block& block, std::uint64_t grown, std::uint64_t negative, int shift) {
    for (; grown != 0; grown &= grown - 1) {
        const auto position = static_cast<unsigned>(63 - __builtin_ctzll(grown));
        block.values[place[position]] +=
            static_cast<std::int16_t>(negative & bit_of(position) ? -(1 << shift) : 1 << shift);
    }
}

// Blocks with all their bits, from the coefficients of their first scans; and of each the position of its last
// coefficient.
POLYDPO_V3 inline void make_whole(const Block* blocks, const Further* further, int count, Block* whole,
                                  std::uint8_t* last) {
    for (int i = 0; i < count; ++i, ++further) {
        const std::int16_t* from = blocks[i].values;
        std::int16_t* to = whole[i].values;
        last[i] = static_cast<std::uint8_t>(further->known == 0 ? 0 : 63 - __builtin_ctzll(further->known));
        const auto everywhere = [](std::uint64_t mask) POLYDPO_V3_LAMBDA {
            const auto bits = static_cast<std::int64_t>(mask);
            return _mm256_set1_epi64x(bits);
        };
        const __m256i ones = everywhere(further->grown[0]), twos = everywhere(further->grown[1]);
        const __m256i negative = everywhere(further->negative);
        for (int at = 0; at < block_size; at += 32, from += 32, to += 32) {
            const __m256i byte = _mm256_load_si256(reinterpret_cast<const __m256i*>(in_rows.byte + at));
            const __m256i bit = _mm256_load_si256(reinterpret_cast<const __m256i*>(in_rows.bit + at));
            const auto bytes = [byte, bit](__m256i mask) POLYDPO_V3_LAMBDA {  // -1 or 0
                return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(mask, byte), bit), bit);
            };
            const __m256i two = bytes(twos), below = bytes(negative);
            const __m256i less = _mm256_add_epi8(_mm256_add_epi8(two, two), bytes(ones));  // minus what they grow by
            const __m256i more = _mm256_sub_epi8(_mm256_xor_si256(less, below), below);    // minus that, with its sign
            const auto half = [from, to](int at, __m128i more) POLYDPO_V3_LAMBDA {
                const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + at));
                _mm256_store_si256(reinterpret_cast<__m256i*>(to + at),
                                   _mm256_sub_epi16(values, _mm256_cvtepi8_epi16(more)));
            };
            half(0, _mm256_castsi256_si128(more));
            half(16, _mm256_extracti128_si256(more, 1));
        }
    }
}

}  // namespace polydpo::jpeg

#endif

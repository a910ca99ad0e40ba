#include "idct.hpp"

#ifdef POLYDPO_V3

#include <immintrin.h>

namespace polydpo {
namespace {

// Of two blocks side by side: a vector's lower half is of one, its upper half of the other. A row of words, or words to
// their sums of products in two vectors of 32 bits.
using Row = __m256i;
struct Wide {
    __m256i low, high;
};

POLYDPO_V3_INLINE Wide operator+(Wide a, Wide b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
POLYDPO_V3_INLINE Wide operator-(Wide a, Wide b) {
    return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}

// a * of_a + b * of_b
POLYDPO_V3_INLINE Wide products(Row a, Row b, int of_a, int of_b) {
    const Row factors = _mm256_set1_epi32((of_a & 0xffff) | of_b * 65536);
    return {_mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), factors),
            _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), factors)};
}

// a * 8192 + more
POLYDPO_V3_INLINE Wide whole(Row a, int more) {
    const __m256i zero = _mm256_setzero_si256(), added = _mm256_set1_epi32(more);
    return {_mm256_add_epi32(_mm256_srai_epi32(_mm256_unpacklo_epi16(zero, a), 3), added),
            _mm256_add_epi32(_mm256_srai_epi32(_mm256_unpackhi_epi16(zero, a), 3), added)};
}

template <int shift>
POLYDPO_V3_INLINE Row narrow(Wide a) {
    return _mm256_packs_epi32(_mm256_srai_epi32(a.low, shift), _mm256_srai_epi32(a.high, shift));
}

// round(x * 2^13)
constexpr int k0_298 = 2446, k0_390 = 3196, k0_541 = 4433, k0_765 = 6270, k0_899 = 7373, k1_175 = 9633, k1_501 = 12299,
              k1_847 = 15137, k1_961 = 16069, k2_053 = 16819, k2_562 = 20995, k3_072 = 25172;

// One-dimensional, of the first four rows (the others are zero) or of all eight.
template <int shift, int rows>
POLYDPO_V3_INLINE void transform(Row (&r)[8]) {
    constexpr int half = 1 << (shift - 1);
    Wide e0, e1, e2, e3, o0, o1, o2, o3;
    if constexpr (rows == 8) {
        const Wide sum = whole(_mm256_add_epi16(r[0], r[4]), half);
        const Wide difference = whole(_mm256_sub_epi16(r[0], r[4]), half);
        const Wide t2 = products(r[2], r[6], k0_541, k0_541 - k1_847);
        const Wide t3 = products(r[2], r[6], k0_541 + k0_765, k0_541);
        e0 = sum + t3;
        e1 = difference + t2;
        e2 = difference - t2;
        e3 = sum - t3;
        const Row z3 = _mm256_add_epi16(r[7], r[3]), z4 = _mm256_add_epi16(r[5], r[1]);
        const Wide z03 = products(z3, z4, k1_175 - k1_961, k1_175), z12 = products(z3, z4, k1_175, k1_175 - k0_390);
        o0 = products(r[7], r[1], k0_298 - k0_899, -k0_899) + z03;
        o1 = products(r[5], r[3], k2_053 - k2_562, -k2_562) + z12;
        o2 = products(r[5], r[3], -k2_562, k3_072 - k2_562) + z03;
        o3 = products(r[7], r[1], -k0_899, k1_501 - k0_899) + z12;
    } else {
        const Row zero = _mm256_setzero_si256();
        const Wide sum = whole(r[0], half);
        const Wide t2 = products(r[2], zero, k0_541, 0), t3 = products(r[2], zero, k0_541 + k0_765, 0);
        e0 = sum + t3;
        e1 = sum + t2;
        e2 = sum - t2;
        e3 = sum - t3;
        o0 = products(r[3], r[1], k1_175 - k1_961, k1_175 - k0_899);
        o1 = products(r[3], r[1], k1_175 - k2_562, k1_175 - k0_390);
        o2 = products(r[3], r[1], k3_072 - k2_562 + k1_175 - k1_961, k1_175);
        o3 = products(r[3], r[1], k1_175, k1_501 - k0_899 + k1_175 - k0_390);
    }
    r[0] = narrow<shift>(e0 + o3);
    r[7] = narrow<shift>(e0 - o3);
    r[1] = narrow<shift>(e1 + o2);
    r[6] = narrow<shift>(e1 - o2);
    r[2] = narrow<shift>(e2 + o1);
    r[5] = narrow<shift>(e2 - o1);
    r[3] = narrow<shift>(e3 + o0);
    r[4] = narrow<shift>(e3 - o0);
}

// Rows become columns, of which the first four or all are wanted.
template <int columns>
POLYDPO_V3_INLINE void transpose(Row (&r)[8]) {
    const Row a0 = _mm256_unpacklo_epi16(r[0], r[1]), a1 = _mm256_unpacklo_epi16(r[2], r[3]);
    const Row a2 = _mm256_unpacklo_epi16(r[4], r[5]), a3 = _mm256_unpacklo_epi16(r[6], r[7]);
    const Row b0 = _mm256_unpackhi_epi16(r[0], r[1]), b1 = _mm256_unpackhi_epi16(r[2], r[3]);
    const Row b2 = _mm256_unpackhi_epi16(r[4], r[5]), b3 = _mm256_unpackhi_epi16(r[6], r[7]);
    const auto four = [](Row c0, Row c1, Row c2, Row c3, Row* to) POLYDPO_V3_LAMBDA {
        const Row d0 = _mm256_unpacklo_epi32(c0, c1), d1 = _mm256_unpacklo_epi32(c2, c3);
        const Row e0 = _mm256_unpackhi_epi32(c0, c1), e1 = _mm256_unpackhi_epi32(c2, c3);
        to[0] = _mm256_unpacklo_epi64(d0, d1);
        to[1] = _mm256_unpackhi_epi64(d0, d1);
        to[2] = _mm256_unpacklo_epi64(e0, e1);
        to[3] = _mm256_unpackhi_epi64(e0, e1);
    };
    four(a0, a1, a2, a3, r);
    if constexpr (columns == 8) four(b0, b1, b2, b3, r + 4);
}

// Columns of samples about zero to rows of bytes, sixteen of both blocks.
POLYDPO_V3_INLINE void store(const Row (&c)[8], std::uint8_t* to, std::ptrdiff_t stride) {
    const Row c04 = _mm256_packs_epi16(c[0], c[4]), c15 = _mm256_packs_epi16(c[1], c[5]);
    const Row c26 = _mm256_packs_epi16(c[2], c[6]), c37 = _mm256_packs_epi16(c[3], c[7]);
    const Row c01 = _mm256_unpacklo_epi8(c04, c15), c45 = _mm256_unpackhi_epi8(c04, c15);
    const Row c23 = _mm256_unpacklo_epi8(c26, c37), c67 = _mm256_unpackhi_epi8(c26, c37);
    const Row upper_left = _mm256_unpacklo_epi16(c01, c23), lower_left = _mm256_unpackhi_epi16(c01, c23);
    const Row upper_right = _mm256_unpacklo_epi16(c45, c67), lower_right = _mm256_unpackhi_epi16(c45, c67);
    const Row rows[4] = {_mm256_unpacklo_epi32(upper_left, upper_right), _mm256_unpackhi_epi32(upper_left, upper_right),
                         _mm256_unpacklo_epi32(lower_left, lower_right),
                         _mm256_unpackhi_epi32(lower_left, lower_right)};
    for (const Row& two : rows) {
        // One row of both blocks in either half.
        const Row sorted = _mm256_permute4x64_epi64(_mm256_add_epi8(two, _mm256_set1_epi8(-128)), 0xd8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(sorted));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + stride), _mm256_extracti128_si256(sorted, 1));
        to += 2 * stride;
    }
}

// A row of two blocks, times its quantisation.
POLYDPO_V3_INLINE Row load(const std::int16_t* coefficients, const std::uint16_t* steps, int row) {
    const auto at = [row](const auto* from) POLYDPO_V3_LAMBDA {
        const auto* rows = reinterpret_cast<const __m128i*>(from);
        return _mm_loadu_si128(rows + row);
    };
    const Row both = _mm256_inserti128_si256(_mm256_castsi128_si256(at(coefficients)), at(coefficients + 64), 1);
    return _mm256_mullo_epi16(both, _mm256_broadcastsi128_si256(at(steps)));
}

template <int rows>
POLYDPO_V3_INLINE void two_blocks(const std::int16_t* coefficients, const std::uint16_t* steps, std::uint8_t* to,
                                  std::ptrdiff_t stride) {
    Row r[8];
    for (int i = 0; i < rows; ++i) r[i] = load(coefficients, steps, i);
    // Where only the first row has coefficients, libjpeg-turbo multiplies them by four in words, which may overflow.
    const Row far = _mm256_and_si256(_mm256_add_epi16(r[0], _mm256_set1_epi16(0x2000)), _mm256_set1_epi16(-0x4000));
    if (__builtin_expect(!_mm256_testz_si256(far, far), 0)) {
        Row others = _mm256_setzero_si256();
        for (int half = 0; half < 2; ++half) {
            __m128i any = _mm_setzero_si128();
            for (int i = 1; i < 8; ++i) {
                const auto* row = reinterpret_cast<const __m128i*>(coefficients + 64 * half) + i;
                any = _mm_or_si128(any, _mm_loadu_si128(row));
            }
            const __m128i all = _mm_set1_epi8(_mm_testz_si128(any, any) ? 0 : -1);
            others = half ? _mm256_inserti128_si256(others, all, 1) : _mm256_castsi128_si256(all);
        }
        r[0] = _mm256_blendv_epi8(_mm256_srai_epi16(_mm256_slli_epi16(r[0], 2), 2), r[0], others);
    }
    transform<11, rows>(r);
    transpose<rows>(r);
    transform<18, rows>(r);
    store(r, to, stride);
}

// Of two blocks with nothing but their first coefficient.
POLYDPO_V3_INLINE void two_even_blocks(const std::int16_t* coefficients, int step, std::uint8_t* to,
                                       std::ptrdiff_t stride) {
    const auto sample = [step](int coefficient) POLYDPO_V3_LAMBDA {
        const int scaled = static_cast<std::int16_t>(4 * static_cast<std::int16_t>(coefficient * step));
        const int value = ((scaled + 16) >> 5) + 128;
        return static_cast<char>(value < 0 ? 0 : value > 255 ? 255 : value);
    };
    const __m128i row =
        _mm_unpacklo_epi64(_mm_set1_epi8(sample(coefficients[0])), _mm_set1_epi8(sample(coefficients[64])));
    for (int i = 0; i < 8; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * stride), row);
}

}  // namespace

POLYDPO_V3 void inverse_dct(const std::int16_t* coefficients, const std::uint8_t* last, int count,
                            const std::uint16_t* steps, std::uint8_t* to, std::ptrdiff_t stride) {
    for (int i = 0; i < count; i += 2, coefficients += 128, to += 16) {
        const int most = last[i] > last[i + 1] ? last[i] : last[i + 1];
        if (most == 0) {
            two_even_blocks(coefficients, steps[0], to, stride);
        } else if (most < 10) {  // in the upper left quarter
            two_blocks<4>(coefficients, steps, to, stride);
        } else {
            two_blocks<8>(coefficients, steps, to, stride);
        }
    }
}

}  // namespace polydpo

#endif

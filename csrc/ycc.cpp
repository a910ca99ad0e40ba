#include "ycc.hpp"

#ifdef POLYDPO_V3

#include <immintrin.h>

namespace polydpo {
namespace {

POLYDPO_V3_INLINE __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
POLYDPO_V3_INLINE void store(void* to, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
POLYDPO_V3_INLINE __m256i words(const std::uint8_t* from) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
POLYDPO_V3_INLINE __m256i words(const std::uint16_t* from) { return load(from); }

// Sixteen samples to 32: (3 of it + the one before + `down`) >> shift, and (3 of it + the one after + `up`) >> shift.
template <int shift, int down, int up, class Sample>
POLYDPO_V3_INLINE void spread(const Sample* from, std::uint8_t* to) {
    const __m256i here = words(from), thrice = _mm256_add_epi16(here, _mm256_add_epi16(here, here));
    const __m256i left = _mm256_add_epi16(_mm256_add_epi16(thrice, _mm256_set1_epi16(down)), words(from - 1));
    const __m256i right = _mm256_add_epi16(_mm256_add_epi16(thrice, _mm256_set1_epi16(up)), words(from + 1));
    // One byte of either in each word.
    const __m256i upper = _mm256_slli_epi16(_mm256_srli_epi16(right, shift), 8);
    store(to, _mm256_or_si256(_mm256_srli_epi16(left, shift), upper));
}

// Sixteen pixels: what is to be added to Y.
struct Added {
    __m256i red, green, blue;
};

// 1.402 Cr; -0.34414 Cb - 0.71414 Cr; 1.772 Cb; the factors to 16 bits, the results rounded half up.
POLYDPO_V3_INLINE Added added(const std::uint8_t* blue, const std::uint8_t* red) {
    const __m256i grey = _mm256_set1_epi16(128), one = _mm256_set1_epi16(1);
    const __m256i cb = _mm256_sub_epi16(words(blue), grey), cr = _mm256_sub_epi16(words(red), grey);
    const __m256i cb2 = _mm256_add_epi16(cb, cb), cr2 = _mm256_add_epi16(cr, cr);
    const auto part = [one](__m256i twice, int factor) POLYDPO_V3_LAMBDA {
        const __m256i product = _mm256_mulhi_epi16(twice, _mm256_set1_epi16(static_cast<short>(factor)));
        return _mm256_srai_epi16(_mm256_add_epi16(product, one), 1);
    };
    const __m256i factors = _mm256_set1_epi32((-22554 & 0xffff) | 18734 << 16), half = _mm256_set1_epi32(32768);
    const auto both = [factors, half](__m256i chroma) POLYDPO_V3_LAMBDA {
        return _mm256_srai_epi32(_mm256_add_epi32(_mm256_madd_epi16(chroma, factors), half), 16);
    };
    const __m256i green = _mm256_packs_epi32(both(_mm256_unpacklo_epi16(cb, cr)), both(_mm256_unpackhi_epi16(cb, cr)));
    return {_mm256_add_epi16(part(cr2, 26345), cr), _mm256_sub_epi16(green, cr),
            _mm256_add_epi16(part(cb2, -14942), cb2)};
}

POLYDPO_V3_INLINE __m256i pack(__m256i first, __m256i second) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xd8);
}

}  // namespace

POLYDPO_V3 void double_between(const std::uint8_t* near, const std::uint8_t* far, int count, std::uint16_t* room,
                               std::uint8_t* to) {
    const __m256i parts = _mm256_set1_epi16(0x0103);  // three of one, one of the other
    for (int x = -1; x <= count; x += 16) {
        const auto at = [x](const std::uint8_t* row) POLYDPO_V3_LAMBDA {
            return _mm256_permute4x64_epi64(
                _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + x))), 0x50);
        };
        const __m256i pairs = _mm256_unpacklo_epi8(at(near), at(far));
        store(room + 1 + x, _mm256_maddubs_epi16(pairs, parts));
    }
    for (int x = 0; x < count; x += 16) spread<4, 8, 7>(room + 1 + x, to + 2 * x);
}

POLYDPO_V3 void double_across(const std::uint8_t* from, int count, std::uint8_t* to) {
    for (int x = 0; x < count; x += 16) spread<2, 1, 2>(from + x, to + 2 * x);
}

POLYDPO_V3 void ycc_to_rgb(const std::uint8_t* y, const std::uint8_t* cb, const std::uint8_t* cr, int width,
                           std::uint8_t* red, std::uint8_t* green, std::uint8_t* blue) {
    for (int x = 0; x < width; x += 32) {
        const Added first = added(cb + x, cr + x), second = added(cb + x + 16, cr + x + 16);
        const __m256i y0 = words(y + x), y1 = words(y + x + 16);
        store(red + x, pack(_mm256_add_epi16(y0, first.red), _mm256_add_epi16(y1, second.red)));
        store(green + x, pack(_mm256_add_epi16(y0, first.green), _mm256_add_epi16(y1, second.green)));
        store(blue + x, pack(_mm256_add_epi16(y0, first.blue), _mm256_add_epi16(y1, second.blue)));
    }
}

}  // namespace polydpo

#endif

// The floating dtypes of the library as numbers to compute with, in vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace polydpo {

enum class Float : int { bfloat16 = 0, float16 = 1, float32 = 2, float64 = 3 };

constexpr std::size_t size_of(Float dtype) { return dtype == Float::float64 ? 8 : dtype == Float::float32 ? 4 : 2; }

POLYDPO_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

// 64 bytes of numbers as one value; narrower machines split it. The functions below take any width.
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));

template <class To, class From = To>
POLYDPO_INLINE To reinterpret(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class To>
POLYDPO_INLINE To read(const void* from) {
    To to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// Rounded to nearest even, in the high half. A NaN stays one if its low half is 0, so that nothing is carried: of those
// that arithmetic makes, and of those that it hands on from bfloat16.
template <class Words, class Floats>
POLYDPO_INLINE Words narrow_to_bfloat16(const Floats& values) {
    const Words b = reinterpret<Words>(values);
    return b + 0x7fff + (b >> 16 & 1);
}

template <class Floats, class Words>
POLYDPO_INLINE Floats widen_float16(const Words& halves) {
    const Words magnitude = (halves & 0x7fff) << 13;
    // The exponent is rebiased by a multiplication, which normalises subnormals too.
    const Words finite = reinterpret<Words>(reinterpret<Floats>(magnitude) * 0x1p112f);
    const Words either = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
    return reinterpret<Floats>(either | (halves & 0x8000) << 16);
}

template <class Words, class Floats>
POLYDPO_INLINE Words narrow_to_float16(const Floats& values) {
    const Words b = reinterpret<Words>(values), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
    // Normal halves: rebias the exponent, round by carrying into it.
    const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Subnormal halves: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
    const Words subnormal = reinterpret<Words>(reinterpret<Floats>(magnitude) + 0.5f) - 0x3f000000;
    Words half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : half;  // 65520 and more round to infinity
    half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
    return sign | half;
}

}  // namespace polydpo

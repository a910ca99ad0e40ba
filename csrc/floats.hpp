// The floating dtypes of the library as numbers to compute with.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace polydpo {

POLYDPO_INLINE std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

POLYDPO_INLINE float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Storage types. get() is exact, set() rounds to nearest even; without branches, so that loops vectorise.
struct Bfloat16 {
    std::uint16_t bits;
    POLYDPO_INLINE float get() const { return float_of(static_cast<std::uint32_t>(bits) << 16); }
    static POLYDPO_INLINE Bfloat16 set(float value) {
        const std::uint32_t b = bits_of(value);
        const std::uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
        // Rounding could carry a NaN into the exponent: keep its sign, make it quiet.
        const std::uint32_t nan = b >> 16 | 0x40;
        return {static_cast<std::uint16_t>((b & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
    }
};

struct Float16 {
    std::uint16_t bits;
    POLYDPO_INLINE float get() const {
        const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fff) << 13;
        // The exponent is rebiased by a multiplication, which normalises subnormals too.
        const std::uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
        const std::uint32_t special = magnitude | 0x7f800000;
        return float_of((magnitude >= 0x0f800000 ? special : finite) | static_cast<std::uint32_t>(bits & 0x8000) << 16);
    }
    static POLYDPO_INLINE Float16 set(float value) {
        const std::uint32_t b = bits_of(value), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
        // Normal halves: rebias the exponent, round by carrying into it.
        const std::uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
        // Subnormal halves: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
        const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        std::uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
        half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more round to infinity
        half = magnitude > 0x7f800000 ? 0x7e00 : half;
        return {static_cast<std::uint16_t>(sign | half)};
    }
};

struct Float32 {
    float value;
    POLYDPO_INLINE float get() const { return value; }
    static POLYDPO_INLINE Float32 set(float value) { return {value}; }
};

struct Float64 {
    double value;
    POLYDPO_INLINE double get() const { return value; }
    static POLYDPO_INLINE Float64 set(double value) { return {value}; }
};

}  // namespace polydpo

// The floating dtypes of the library as numbers to compute with.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

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

// 64 bytes of numbers as one value; narrower machines split it.
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));

template <class To, class From>
POLYDPO_INLINE To reinterpret(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// get and set of the types above for a block of numbers at a time: two vectors, of which the first holds the even and
// the second the odd elements for bfloat16. That takes one shift or mask each, where widening in order takes three
// instructions; for what is done element by element or summed up, the order is nothing.
template <class Vector>
struct Block {
    static constexpr int size = 2 * sizeof(Vector) / sizeof(Vector{}[0]);
    Vector even, odd;
};

// One vector at a time: a block that is copied as a whole goes through memory.
template <class Vector, class T>
POLYDPO_INLINE Block<Vector> load_in_order(const T* from) {
    Block<Vector> block;
    std::memcpy(&block.even, from, sizeof(Vector));
    std::memcpy(&block.odd, from + sizeof(Vector) / sizeof(T), sizeof(Vector));
    return block;
}

template <class Vector, class T>
POLYDPO_INLINE void store_in_order(T* to, const Block<Vector>& block) {
    std::memcpy(to, &block.even, sizeof(Vector));
    std::memcpy(to + sizeof(Vector) / sizeof(T), &block.odd, sizeof(Vector));
}

POLYDPO_INLINE Block<Floats> load(const Float32* from) { return load_in_order<Floats>(from); }

POLYDPO_INLINE Block<Doubles> load(const Float64* from) { return load_in_order<Doubles>(from); }

POLYDPO_INLINE Block<Floats> load(const Bfloat16* from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    return {reinterpret<Floats>(pairs << 16), reinterpret<Floats>(pairs & 0xffff0000)};
}

// Of elements that meet those of dtype Other: bfloat16 in its order where the others keep theirs.
template <class Other, class T>
POLYDPO_INLINE auto load_beside(const T* from) {
    if constexpr (std::is_same_v<T, Bfloat16> && !std::is_same_v<Other, Bfloat16>) {
        typedef std::uint16_t Halves __attribute__((vector_size(32)));
        Halves even, odd;
        std::memcpy(&even, from, sizeof even);
        std::memcpy(&odd, from + 16, sizeof odd);
        return Block<Floats>{reinterpret<Floats>(__builtin_convertvector(even, Words) << 16),
                             reinterpret<Floats>(__builtin_convertvector(odd, Words) << 16)};
    } else {
        return load(from);
    }
}

POLYDPO_INLINE void store(Float32* to, const Block<Floats>& block) { store_in_order(to, block); }

POLYDPO_INLINE void store(Float64* to, const Block<Doubles>& block) { store_in_order(to, block); }

// Rounded to nearest even, in the high half. A NaN stays one if its low half is 0, so that nothing is carried: of those
// that arithmetic makes, and of those that it hands on from bfloat16.
POLYDPO_INLINE Words narrow_to_bfloat16(Floats values) {
    const Words b = reinterpret<Words>(values);
    return b + 0x7fff + (b >> 16 & 1);
}

POLYDPO_INLINE void store(Bfloat16* to, const Block<Floats>& block) {
    const Words pairs = narrow_to_bfloat16(block.even) >> 16 | (narrow_to_bfloat16(block.odd) & 0xffff0000);
    std::memcpy(to, &pairs, sizeof pairs);
}

POLYDPO_INLINE Words narrow_to_float16(Floats values) {
    const Words b = reinterpret<Words>(values), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
    const Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const Words subnormal = reinterpret<Words>(reinterpret<Floats>(magnitude) + 0.5f) - 0x3f000000;
    Words half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? Words{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
    return sign | half;
}

}  // namespace polydpo

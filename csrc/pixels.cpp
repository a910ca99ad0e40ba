#include "pixels.hpp"

#include <algorithm>
#include <cstring>

#include "simd.hpp"

namespace polydpo {
namespace {

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

POLYDPO_INLINE std::uint16_t to_bfloat16(float value) {  // finite values
    const std::uint32_t bits = bits_of(value);
    return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

POLYDPO_INLINE std::uint16_t to_float16(float value) {  // finite values below 65504
    const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    // Normal halves: rebias the exponent, round by carrying into it.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Subnormal halves: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return static_cast<std::uint16_t>(sign | (magnitude < (113u << 23) ? subnormal : normal));
}

struct ToUint8 {
    using Type = std::uint8_t;
    static POLYDPO_INLINE Type from(std::uint32_t v) { return static_cast<Type>(v); }
    static POLYDPO_INLINE Type from(float v) { return static_cast<Type>(static_cast<int>(v + 0.5f)); }
};

template <class T, T (*convert)(float)>
struct ToFloating {
    using Type = T;
    static POLYDPO_INLINE Type from(std::uint32_t v) {
        return convert(static_cast<float>(2 * static_cast<std::int32_t>(v) - 255) * (1.0f / 255.0f));
    }
    static POLYDPO_INLINE Type from(float v) { return convert((2.0f * v - 255.0f) * (1.0f / 255.0f)); }
};

POLYDPO_INLINE float identity(float value) { return value; }

template <class To>
POLYDPO_INLINE void store(const std::uint8_t* rgbx, int width, void* to, std::size_t plane) {
    auto* __restrict r = static_cast<typename To::Type*>(to);
    auto* __restrict g = r + plane;
    auto* __restrict b = g + plane;
    for (int x = 0; x < width; ++x) {
        std::uint32_t pixel;
        std::memcpy(&pixel, rgbx + 4 * static_cast<std::size_t>(x), 4);  // little endian: R is the low byte
        r[x] = To::from(pixel & 255u);
        g[x] = To::from(pixel >> 8 & 255u);
        b[x] = To::from(pixel >> 16 & 255u);
    }
}

template <class To>
POLYDPO_INLINE void store(const float* rgbx, int width, void* to, std::size_t plane) {
    auto* __restrict r = static_cast<typename To::Type*>(to);
    auto* __restrict g = r + plane;
    auto* __restrict b = g + plane;
    for (int x = 0; x < width; ++x) {
        const float* pixel = rgbx + 4 * static_cast<std::size_t>(x);
        r[x] = To::from(std::min(std::max(pixel[0], 0.0f), 255.0f));
        g[x] = To::from(std::min(std::max(pixel[1], 0.0f), 255.0f));
        b[x] = To::from(std::min(std::max(pixel[2], 0.0f), 255.0f));
    }
}

template <class Pixel>
POLYDPO_INLINE void dispatch(const Pixel* rgbx, int width, Dtype dtype, void* to, std::size_t plane) {
    switch (dtype) {
        case Dtype::uint8: return store<ToUint8>(rgbx, width, to, plane);
        case Dtype::bfloat16: return store<ToFloating<std::uint16_t, to_bfloat16>>(rgbx, width, to, plane);
        case Dtype::float16: return store<ToFloating<std::uint16_t, to_float16>>(rgbx, width, to, plane);
        case Dtype::float32: return store<ToFloating<float, identity>>(rgbx, width, to, plane);
    }
}

}  // namespace

POLYDPO_CLONES void store_row(const std::uint8_t* rgbx, int width, Dtype dtype, void* to, std::size_t plane) {
    dispatch(rgbx, width, dtype, to, plane);
}

POLYDPO_CLONES void store_row(const float* rgbx, int width, Dtype dtype, void* to, std::size_t plane) {
    dispatch(rgbx, width, dtype, to, plane);
}

}  // namespace polydpo

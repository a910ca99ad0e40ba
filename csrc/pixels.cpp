#include "pixels.hpp"

#include <algorithm>
#include <cstring>

#include "floats.hpp"
#include "simd.hpp"

namespace polydpo {
namespace {

struct ToUint8 {
    using Type = std::uint8_t;
    static POLYDPO_INLINE Type from(std::uint32_t v) { return static_cast<Type>(v); }
    static POLYDPO_INLINE Type from(float v) { return static_cast<Type>(static_cast<int>(v + 0.5f)); }
};

template <class Float>
struct ToFloating {
    using Type = Float;
    static POLYDPO_INLINE Type from(std::uint32_t v) {
        return Float::set(static_cast<float>(2 * static_cast<std::int32_t>(v) - 255) * (1.0f / 255.0f));
    }
    static POLYDPO_INLINE Type from(float v) { return Float::set((2.0f * v - 255.0f) * (1.0f / 255.0f)); }
};

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
        case Dtype::bfloat16: return store<ToFloating<Bfloat16>>(rgbx, width, to, plane);
        case Dtype::float16: return store<ToFloating<Float16>>(rgbx, width, to, plane);
        case Dtype::float32: return store<ToFloating<Float32>>(rgbx, width, to, plane);
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

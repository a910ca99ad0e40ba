#include "pixels.hpp"

#include <algorithm>
#include <cstring>

#include "floats.hpp"
#include "simd.hpp"

namespace polydpo {
namespace {

constexpr int block = 64;  // pixels at a time, in simple loops that vectorise

// The channels of n pixels, apart. Little endian: R is the low byte.
POLYDPO_INLINE void split(const std::uint8_t* rgbx, int n, float (*channels)[block]) {
    std::uint32_t pixels[block];
    std::memcpy(pixels, rgbx, 4 * static_cast<std::size_t>(n));
    for (int c = 0; c < 3; ++c) {
        for (int i = 0; i < n; ++i) channels[c][i] = static_cast<float>(static_cast<int>(pixels[i] >> 8 * c & 255u));
    }
}

POLYDPO_INLINE void split(const float* rgbx, int n, float (*channels)[block]) {
    for (int c = 0; c < 3; ++c) {
        for (int i = 0; i < n; ++i) channels[c][i] = std::min(std::max(rgbx[4 * i + c], 0.0f), 255.0f);
    }
}

// Levels of one channel to elements of the output.
struct ToUint8 {
    using Type = std::uint8_t;
    static POLYDPO_INLINE void convert(const float* levels, int n, float, float, Type* __restrict to) {
        for (int i = 0; i < n; ++i) to[i] = static_cast<Type>(static_cast<int>(levels[i] + 0.5f));
    }
};

struct ToFloat32 {
    using Type = float;
    static POLYDPO_INLINE void convert(const float* levels, int n, float offset, float scale, Type* __restrict to) {
        for (int i = 0; i < n; ++i) to[i] = (levels[i] - offset) * scale;
    }
};

// Finite numbers only: Bfloat16::set without its care for NaN.
struct ToBfloat16 {
    using Type = std::uint16_t;
    static POLYDPO_INLINE void convert(const float* levels, int n, float offset, float scale, Type* __restrict to) {
        for (int i = 0; i < n; ++i) {
            const std::uint32_t bits = bits_of((levels[i] - offset) * scale);
            to[i] = static_cast<Type>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
};

struct ToFloat16 {
    using Type = std::uint16_t;
    static POLYDPO_INLINE void convert(const float* levels, int n, float offset, float scale, Type* __restrict to) {
        std::uint32_t words[block];
        for (int i = 0; i < block; i += 16) {
            Floats values;
            std::memcpy(&values, levels + i, sizeof values);
            const Words narrowed = narrow_to_float16((values - offset) * scale);
            std::memcpy(words + i, &narrowed, sizeof narrowed);
        }
        for (int i = 0; i < n; ++i) to[i] = static_cast<Type>(words[i]);
    }
};

template <class To, class Channel>
POLYDPO_INLINE void store_block(const Channel* rgbx, int n, const Normalisation& normal, typename To::Type* to,
                                std::size_t plane) {
    float channels[3][block];
    split(rgbx, n, channels);
    for (int c = 0; c < 3; ++c) To::convert(channels[c], n, normal.offset[c], normal.scale[c], to + c * plane);
}

template <class To, class Channel>
POLYDPO_INLINE void store(const Channel* rgbx, int width, const Normalisation& normal, void* to, std::size_t plane) {
    auto* out = static_cast<typename To::Type*>(to);
    int x = 0;
    for (; x + block <= width; x += block) store_block<To>(rgbx + 4 * x, block, normal, out + x, plane);
    if (x < width) store_block<To>(rgbx + 4 * x, width - x, normal, out + x, plane);
}

template <class Pixel>
POLYDPO_INLINE void dispatch(const Pixel* rgbx, int width, Dtype dtype, const Normalisation& normal, void* to,
                             std::size_t plane) {
    switch (dtype) {
        case Dtype::uint8: return store<ToUint8>(rgbx, width, normal, to, plane);
        case Dtype::bfloat16: return store<ToBfloat16>(rgbx, width, normal, to, plane);
        case Dtype::float16: return store<ToFloat16>(rgbx, width, normal, to, plane);
        case Dtype::float32: return store<ToFloat32>(rgbx, width, normal, to, plane);
    }
}

}  // namespace

POLYDPO_CLONES void store_row(const std::uint8_t* rgbx, int width, Dtype dtype, const Normalisation& normal, void* to,
                              std::size_t plane) {
    dispatch(rgbx, width, dtype, normal, to, plane);
}

POLYDPO_CLONES void store_row(const float* rgbx, int width, Dtype dtype, const Normalisation& normal, void* to,
                              std::size_t plane) {
    dispatch(rgbx, width, dtype, normal, to, plane);
}

}  // namespace polydpo

// The finishing step: rows of pixels to normalised planes of the output's dtype.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polydpo {

enum class Dtype : int { uint8 = 0, bfloat16 = 1, float16 = 2, float32 = 3 };

inline std::size_t size_of(Dtype dtype) { return dtype == Dtype::uint8 ? 1 : dtype == Dtype::float32 ? 4 : 2; }

// (v - offset) * scale of each channel, for floating dtypes.
struct Normalisation {
    float offset[3], scale[3];
};

// A row of pixels with its channels apart: R, G, B.
struct Levels {
    const std::uint8_t* channels[3];
    Levels operator+(int columns) const {
        return {{channels[0] + columns, channels[1] + columns, channels[2] + columns}};
    }
};

// Stores rows of pixels as three planes: normalised, computed in float32, rounded to nearest even in 16 bits; uint8 is
// the level itself, rounded half up. `to` is where the row begins in the first plane, and `plane` the distance to the
// next in elements.
class Finish {
public:
    // past_caches: what is stored is more than the caches hold, and had better not go through them. The rows of its
    // planes go past them where they begin at multiples of 64 bytes, for dtypes of 16 bits, on processors with AVX-512
    // VBMI; then settle() must be called before anybody else is told of them.
    Finish(Dtype dtype, const Normalisation& normal, bool past_caches = false);
    void settle() const;

    Dtype dtype() const { return dtype_; }
    // RGBX bytes, as the decoder gives them.
    void store(const std::uint8_t* rgbx, int width, void* to, std::size_t plane) const;
    void store(const Levels& levels, int width, void* to, std::size_t plane) const;
    // RGBX floats in 0..255, as the resampler gives them; values outside are clamped.
    void store(const float* rgbx, int width, void* to, std::size_t plane) const;

private:
    template <class Pixels>
    void store_levels(Pixels pixels, int width, void* to, std::size_t plane) const;

    Dtype dtype_;
    Normalisation normal_;
    bool past_caches_, by_table_ = false;
    alignas(64) std::uint8_t table_[3][2][256];  // of a channel's levels: the low and the high bytes of their elements
};

}  // namespace polydpo

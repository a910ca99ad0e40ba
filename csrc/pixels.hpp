// The finishing step: rows of pixels to normalised planes of the output's dtype.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polydpo {

enum class Dtype : int { uint8 = 0, bfloat16 = 1, float16 = 2, float32 = 3 };

inline std::size_t size_of(Dtype dtype) {
    return dtype == Dtype::uint8 ? 1 : dtype == Dtype::float32 ? 4 : 2;
}

// (v - offset) * scale of each channel, for floating dtypes.
struct Normalisation {
    float offset[3], scale[3];
};

// Stores `width` pixels of one row as three planes: normalised, computed in float32, rounded to nearest even in 16 bits;
// uint8 is v itself, rounded half up. `to` is where the row begins in the first plane, and `plane` the distance to the
// next in elements.
//
// RGBX bytes, as the decoder gives them.
void store_row(const std::uint8_t* rgbx, int width, Dtype dtype, const Normalisation& normal, void* to,
               std::size_t plane);
// RGBX floats in 0..255, as the resampler gives them; values outside are clamped.
void store_row(const float* rgbx, int width, Dtype dtype, const Normalisation& normal, void* to, std::size_t plane);

}  // namespace polydpo

// Samples of Y, Cb and Cr to levels of R, G and B, as JFIF and libjpeg define them.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace polydpo {

#ifdef POLYDPO_V3
// Rows are computed in whole vectors: this much after a row is written, and after one from which it is made is read.
constexpr int ycc_margin = 64;

// Twice as many samples as the `count` of a row between two others, near it and far from it; or of a row alone.
// Triangle filters, rounded up and down in turn as libjpeg's "fancy" upsampling does. A sample before the first and one
// after the last are read, which at the edges of the image are to be the same as those. `room`: count + ycc_margin
// words.
void double_between(const std::uint8_t* near, const std::uint8_t* far, int count, std::uint16_t* room,
                    std::uint8_t* to);
void double_across(const std::uint8_t* from, int count, std::uint8_t* to);

void ycc_to_rgb(const std::uint8_t* y, const std::uint8_t* cb, const std::uint8_t* cr, int width, std::uint8_t* red,
                std::uint8_t* green, std::uint8_t* blue);
#endif

}  // namespace polydpo

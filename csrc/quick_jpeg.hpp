// JPEG by our own decoder: Huffman codes, inverse DCT, chroma and colours.
#pragma once

#include <memory>

#include "entropy.hpp"
#include "jpeg.hpp"

namespace polydpo {

// Whether our own decoder can be tried: it knows what nearly all images are.
bool is_quick_jpeg(const JpegHeader& header, const Limits& limits);

// Only where that is so. It throws LibjpegNeeded, now or later, where the image is to be decoded again, from its
// beginning, by libjpeg alone. The pixels are those of libjpeg, bit for bit.
std::unique_ptr<LevelsReader> quick_jpeg_reader(std::unique_ptr<JpegHeader> header, const Limits& limits);

}  // namespace polydpo

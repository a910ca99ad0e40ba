// A batch of preference pairs: bytes in, normalised planes out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "geometry.hpp"
#include "pixels.hpp"
#include "reader.hpp"
#include "resample.hpp"

namespace polydpo {

// A compressed image; or, with a size, RGBX pixels that somebody else has decoded, and their EXIF orientation.
struct Image {
    const std::uint8_t* data;
    std::size_t bytes;
    Size raw{0, 0};
    int orientation = 1;
};

struct Options {
    Size output;
    Resize resize;
    Interpolation interpolation;
    bool planes;  // as stored, YCbCr 4:2:0 in bytes, instead of pixels
    Dtype dtype;
    Normalisation normal;
    Colour background;  // under transparent pixels, and around contained images
    bool apply_orientation, strict;
    Limits limits;
    int threads;
    JpegDecoder jpeg = JpegDecoder::either;
};

struct Decoded {
    Size original{0, 0};  // oriented
    int top = 0, left = 0;
    std::string error;   // empty: decoded
    std::string damage;  // with this wrong, though strict mode is off; empty: with nothing
};

// One image, whose reader has just been made, into its (3, H, W) of the output, with planes `plane` elements apart.
void render(Reader& reader, const Draw& draw, const Options& options, const Finish& finish, void* sample,
            std::size_t plane, Decoded& result);

// Decodes every image into its place of `out`, (images.size(), 3, H, W), or (images.size(), H * 3/2, W) of planes;
// image i with draws[i % draws.size()]. Where one fails, its place and that of the other image with its draw are
// zeroed. `stop` is asked now and then on the calling thread: true leaves the rest undone.
std::vector<Decoded> decode_batch(const std::vector<Image>& images, const std::vector<Draw>& draws,
                                  const Options& options, void* out, const std::function<bool()>& stop);

}  // namespace polydpo

// A batch of preference pairs: bytes in, normalised planes out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "geometry.hpp"
#include "jpeg.hpp"
#include "pixels.hpp"

namespace polydpo {

struct Bytes {
    const std::uint8_t* data;
    std::size_t size;
};

struct Options {
    Size output;
    Resize resize;
    Dtype dtype;
    bool strict;
    Limits limits;
    int threads;
};

struct Decoded {
    Size original{0, 0};
    int top = 0, left = 0;
    std::string error;  // empty: decoded
};

// Decodes every image into its place of `out`, (images.size(), 3, H, W). The place of one that fails is zeroed.
std::vector<Decoded> decode_batch(const std::vector<Bytes>& images, const Options& options, void* out);

}  // namespace polydpo

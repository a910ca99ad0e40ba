// Antialiased resampling of an image that arrives row by row.
#pragma once

#include <cstdint>
#include <vector>

#include "geometry.hpp"

namespace polydpo {

// The weights of one axis: output i is the sum of weights[i * taps + k] * input[first[i] + k], k < count[i].
struct Filter {
    std::vector<int> first, count;
    std::vector<float> weights;
    int taps = 0;
};

// The triangle (bilinear) filter, widened by the scale when it shrinks, as Pillow and torchvision define it, for the
// outputs [offset, offset + length) of an axis resized from `source` to `resized`.
Filter triangle_filter(int source, int resized, int offset, int length);

// Takes the rows of an RGBX image from top to bottom and gives the rows of the resized crop.
class Resampler {
public:
    Resampler(Size source, const Geometry& geometry, Size output);

    // Where to write the next row of the source (4 * width bytes); rows stay valid while they are needed.
    std::uint8_t* next_row();
    // Says that it is written. Then `while (ready()) use(take())` gives what it completes: rows of RGBX floats.
    void commit() { ++rows_in_; }
    bool ready() const;
    const float* take();

private:
    std::uint8_t* ring_row(int row) { return ring_.data() + static_cast<std::size_t>(row % ring_rows_) * stride_; }

    Filter across_, down_;
    int width_, ring_rows_, rows_in_ = 0, rows_out_ = 0;
    std::size_t stride_;
    std::vector<std::uint8_t> ring_;
    std::vector<float> blended_, resized_;
    std::vector<const std::uint8_t*> taps_;
};

}  // namespace polydpo

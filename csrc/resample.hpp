// Antialiased resampling of an image that arrives row by row.
#pragma once

#include <cstdint>
#include <vector>

#include "geometry.hpp"
#include "reader.hpp"

namespace polydpo {

enum class Interpolation : int { bilinear = 0, bicubic = 1 };

// The weights of one axis: output i is the sum of weights[i * taps + k] * input[first[i] + k], k < count[i].
struct Filter {
    std::vector<int> first, count;
    std::vector<float> weights;
    int taps = 0;
};

// The triangle (bilinear) or Catmull-Rom (bicubic, a = -1/2) filter, widened by the scale when it shrinks, as Pillow
// and torchvision define it, for the outputs [offset, offset + length) of an axis resized from `source` to `resized`.
Filter make_filter(Interpolation kind, int source, int resized, int offset, int length);

// Takes the rows of an RGBX image from top to bottom and gives the rows of a crop of the resized image: across, then
// down, or the other way around. Across first is in integers, to 1/32 of a level, but where very many pixels become
// one; all else is in float32. What comes of the first of both is clamped to 0..255, as Pillow's bytes are, so that
// their order matters where weights are negative.
class Resampler {
public:
    // source: as stored, as the geometry's part is that counts here.
    Resampler(Size source, const Geometry& geometry, Interpolation kind);

    // The part of the image that the crop needs.
    Region wanted() const;
    // Bytes that one would take.
    static std::int64_t memory(Size source, const Geometry& geometry, Interpolation kind);
    // Which part will come: the rows of that, at least its columns.
    void begin(const Region& given);
    // Where to write the next row of it (4 * width bytes).
    std::uint8_t* next_row() { return row_.data(); }
    // Says that it is written. Then `while (ready()) use(take())` gives what it completes: rows of RGBX floats.
    void commit();
    bool ready() const;
    const float* take();

private:
    float* ring_row(int row) { return ring_.data() + static_cast<std::size_t>(row % ring_rows_) * (length_ + apart); }

    // Floats of a row of so many pixels, with what is there for the sake of whole vectors.
    static constexpr std::size_t padded(int width) { return (4 * static_cast<std::size_t>(width) + 63) / 64 * 64; }
    // Between rows, lest those of a power of two all lie at the same place of a cache.
    static constexpr std::size_t apart = 80;

    Filter across_, down_;
    int width_, ring_rows_, rows_in_ = 0, rows_out_ = 0;
    int given_ = 0;  // columns that come
    bool down_first_;
    int quads_;                               // of taps across
    std::vector<std::int16_t> quad_weights_;  // across_.weights, four taps at a time
    float unit_;                              // of which they are multiples, a power of two
    std::size_t length_;                      // of a row in the ring
    Row row_;
    std::vector<float> ring_, summed_, resized_, floats_;
    std::vector<const float*> taps_;
};

}  // namespace polydpo

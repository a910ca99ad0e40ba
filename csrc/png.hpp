// PNG: a decoder of our own, on libdeflate. The whole image is inflated at once, which is what makes libdeflate fast;
// the rows are unfiltered and expanded one at a time, in the caches.
//
// Samples are taken as they are stored: gAMA, cHRM, iCCP, sRGB and sBIT are ignored, as Pillow and torchvision do. Of
// an animated PNG the default image is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "reader.hpp"

namespace polydpo {

bool is_png(const std::uint8_t* data, std::size_t size);

// How the samples of an unfiltered row become RGBX pixels.
struct PngFormat {
    int channels, depth;
    bool indexed;              // into `table`: a palette, or grey of at most 8 bits
    std::uint32_t table[256];  // RGBX
    bool keyed;                // one colour, `key`, is transparent (RGB, and grey of 16 bits)
    std::uint32_t key[3];
    Colour background;  // what shows where the image is transparent
};

class PngReader : public Reader {
public:
    PngReader(const std::uint8_t* data, std::size_t size, const Limits& limits, bool strict, Colour background);

    Size size() const override { return {height_, width_}; }
    int orientation() const override { return orientation_; }
    Region start(const Region& wanted) override;
    void read_row(std::uint8_t* rgbx) override;
    void finish() override;
    std::string damage() const override { return damage_; }

private:
    // The image, or one of the seven that Adam7 makes of it: the pixels (left + i * across, top + j * down).
    struct Pass {
        int left, top, across, down, width, height;
        std::size_t row_bytes;  // without the filter's
    };

    void read_header(const std::uint8_t* header);
    void plan_passes();
    void read_chunks(std::int64_t most);
    // In strict mode an error; else what is remembered.
    void object(const std::string& what);
    void prepare_colours();
    void inflate();
    void check_filters(int rows) const;
    const std::uint8_t* next_row(const Pass& pass);
    void join_passes();

    const std::uint8_t* data_;
    std::size_t size_;
    bool strict_;
    int width_ = 0, height_ = 0, orientation_ = 1;
    int colour_type_ = 0;
    bool interlaced_ = false;
    bool check_indices_ = false;  // the palette is too short for some
    PngFormat format_{};
    std::vector<std::uint8_t> palette_, transparency_;

    Pass passes_[7];
    int pass_count_ = 0;
    std::int64_t inflated_bytes_ = 0;
    std::size_t pixel_bytes_ = 0;  // at least 1: the distance to the byte that a filter takes for the left one

    std::size_t first_idat_ = 0, idat_count_ = 0, idat_bytes_ = 0;
    bool cut_ = false;  // the file ends early, which is let pass
    std::string damage_;

    std::unique_ptr<std::uint8_t[]> inflated_;
    std::vector<std::uint8_t> no_row_;  // zeros: what stands above the first row
    std::uint8_t* next_ = nullptr;      // the next row, from its filter byte on
    const std::uint8_t* above_ = nullptr;
    int row_ = 0;
    std::unique_ptr<std::uint8_t[]> joined_;  // RGBX, of an interlaced image
};

}  // namespace polydpo

// A video frame's planes in the form of a decoded image.
#pragma once

#include <vector>

#include "pixels.hpp"
#include "reader.hpp"

namespace polydpo {

enum class Matrix : int { bt601 = 0, bt709 = 1, bt2020 = 2, fcc = 3, smpte240m = 4, rgb = 5 };

// Where the samples of subsampled chroma lie, by the numbers of H.264 and HEVC (chroma_sample_loc_type).
enum class Siting : int { left = 0, centre = 1, top_left = 2, top = 3, bottom_left = 4, bottom = 5 };

// Y, Cb, Cr, or G, B, R; rows of bytes, or of 16-bit words where the depth is above 8.
struct Frame {
    const std::uint8_t* planes[3];
    std::ptrdiff_t strides[3];  // from row to row in bytes
    Size size;
    int depth;             // bits, 8 to 12
    int shift_x, shift_y;  // of the chroma planes' size: 1 is half
    bool full_range;
    Matrix matrix;
    int orientation;  // as in EXIF
    Size shown;       // with square pixels
    Siting siting = Siting::left;
};

// Of a matrix and a range, as integers; `most` is the largest sample.
template <class Number>
struct Coefficients {
    Number most, luma, red, green_blue, green_red, blue, red_offset, green_offset, blue_offset;
};

// Converts row by row, in integers: each level is within 0.53 of its exact value, and within 0.51 where chroma has all
// columns or samples have more than 8 bits. Chroma is interpolated linearly.
class FrameReader : public LevelsReader {
public:
    explicit FrameReader(const Frame& frame);
    Size size() const override { return frame_.size; }
    Size shown() const override { return frame_.shown; }
    int orientation() const override { return frame_.orientation; }
    Region start(const Region& wanted) override;
    Levels read_levels() override;
    void finish() override {}
    void read_planes(const Region& crop, std::uint8_t* planes) override;

private:
    int width() const override { return region_.width; }
    Levels read_rgb(int row);
    void read_chroma(int row);

    Frame frame_;
    Coefficients<int> coefficients_;
    Coefficients<std::uint16_t> words_;  // the same, for arithmetic in 16 bits
    Region region_{};
    int columns_ = 0, row_ = 0;              // of chroma in the region; the next one
    std::vector<std::uint16_t> chroma_[2];   // four times Cb and Cr between two rows
    std::vector<std::uint16_t> between_[2];  // where they lie between the columns: sixteen times, of every column
    std::vector<std::uint8_t> levels_[3];
};

}  // namespace polydpo

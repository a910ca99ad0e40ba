// Pixels that somebody else has decoded, in the same form as the formats that are decoded here.
#pragma once

#include <cstring>

#include "reader.hpp"

namespace polydpo {

class RawReader : public Reader {
public:
    // RGBX bytes, 4 * width * height of them; alpha has been composited.
    RawReader(const std::uint8_t* rgbx, Size size, int orientation)
        : rgbx_(rgbx), size_(size), orientation_(orientation) {}

    Size size() const override { return size_; }
    int orientation() const override { return orientation_; }
    Region start(const Region& wanted) override {
        region_ = wanted;
        return wanted;
    }
    void read_row(std::uint8_t* rgbx) override {
        const std::size_t at = static_cast<std::size_t>(region_.top + row_++) * size_.width + region_.left;
        std::memcpy(rgbx, rgbx_ + 4 * at, 4 * static_cast<std::size_t>(region_.width));
    }
    void finish() override {}

private:
    const std::uint8_t* rgbx_;
    Size size_;
    int orientation_;
    Region region_{};
    int row_ = 0;
};

}  // namespace polydpo

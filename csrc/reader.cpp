#include "reader.hpp"

#include <cstring>

#include "simd.hpp"

namespace polydpo {
namespace {

POLYDPO_CLONES void interleave(const std::uint8_t* red, const std::uint8_t* green, const std::uint8_t* blue, int width,
                               std::uint8_t* rgbx) {
    for (int x = 0; x < width; ++x) {
        const std::uint32_t pixel = static_cast<std::uint32_t>(red[x]) | static_cast<std::uint32_t>(green[x]) << 8 |
                                    static_cast<std::uint32_t>(blue[x]) << 16;
        std::memcpy(rgbx + 4 * static_cast<std::size_t>(x), &pixel, 4);
    }
}

}  // namespace

void LevelsReader::read_row(std::uint8_t* rgbx) {
    const Levels row = read_levels();
    interleave(row.channels[0], row.channels[1], row.channels[2], width(), rgbx);
}

}  // namespace polydpo

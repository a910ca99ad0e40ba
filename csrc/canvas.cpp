#include "canvas.hpp"

#include <cstring>

namespace polydpo {
namespace {

// One pixel of four channels.
template <std::size_t bytes>
struct Pixel {
    char data[bytes];
};

template <class Channel>
const Channel* reverse(const Channel* rgbx, int count, std::vector<char>& room) {
    room.resize(4 * sizeof(Channel) * static_cast<std::size_t>(count));
    const auto* in = reinterpret_cast<const Pixel<4 * sizeof(Channel)>*>(rgbx);
    auto* out = reinterpret_cast<Pixel<4 * sizeof(Channel)>*>(room.data());
    for (int i = 0; i < count; ++i) out[i] = in[count - 1 - i];
    return reinterpret_cast<const Channel*>(out);
}

// Words of eight bytes, which every processor turns around at once.
void reverse_bytes(const std::uint8_t* from, int count, std::uint8_t* to) {
    int i = 0;
    for (; i + 8 <= count; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, from + count - 8 - i, 8);
        word = __builtin_bswap64(word);
        std::memcpy(to + i, &word, 8);
    }
    for (; i < count; ++i) to[i] = from[count - 1 - i];
}

Levels reverse(const Levels& levels, int count, std::vector<char>& room) {
    room.resize(3 * static_cast<std::size_t>(count));
    auto* out = reinterpret_cast<std::uint8_t*>(room.data());
    Levels result{};
    for (int c = 0; c < 3; ++c, out += count) {
        reverse_bytes(levels.channels[c], count, out);
        result.channels[c] = out;
    }
    return result;
}

// A row becomes a column: from[i] goes to[i * stride].
template <class Element>
void scatter(const char* from, int count, char* to, std::size_t stride) {
    for (int i = 0; i < count; ++i) {
        std::memcpy(to + static_cast<std::size_t>(i) * stride * sizeof(Element), from + i * sizeof(Element),
                    sizeof(Element));
    }
}

}  // namespace

Canvas::Canvas(void* sample, std::size_t plane, Size output, const Finish& finish, const Geometry& geometry)
    : sample_(static_cast<char*>(sample)), output_(output), finish_(finish), geometry_(geometry), plane_(plane) {}

char* Canvas::at(int y, int x) const {
    return sample_ + (static_cast<std::size_t>(y) * output_.width + x) * size_of(finish_.dtype());
}

void Canvas::pad(Colour background) {
    const Region& inner = geometry_.inner;
    if (inner.height == output_.height && inner.width == output_.width) return;
    std::vector<std::uint8_t> pixels(4 * static_cast<std::size_t>(output_.width));
    for (std::size_t i = 0; i < pixels.size(); i += 4) {
        pixels[i] = background.r;
        pixels[i + 1] = background.g;
        pixels[i + 2] = background.b;
    }
    for (int y = 0; y < output_.height; ++y) {
        finish_.store(pixels.data(), output_.width, at(y, 0), plane_);
    }
}

template <class Pixels>
void Canvas::put(int row, const Pixels& as_stored) {
    const Region& crop = geometry_.crop;
    const Region& inner = geometry_.inner;
    const Pixels pixels = geometry_.col_reversed ? reverse(as_stored, crop.width, reversed_) : as_stored;
    const int to = geometry_.row_reversed ? crop.height - 1 - row : row;
    if (!geometry_.transposed) {
        return finish_.store(pixels, crop.width, at(inner.top + to, inner.left), plane_);
    }
    const std::size_t size = size_of(finish_.dtype()), count = static_cast<std::size_t>(crop.width);
    turned_.resize(3 * count * size);
    finish_.store(pixels, crop.width, turned_.data(), count);
    for (int c = 0; c < 3; ++c) {
        const char* from = turned_.data() + c * count * size;
        char* column = at(inner.top, inner.left + to) + c * plane_ * size;
        if (size == 1) scatter<std::uint8_t>(from, crop.width, column, output_.width);
        if (size == 2) scatter<std::uint16_t>(from, crop.width, column, output_.width);
        if (size == 4) scatter<std::uint32_t>(from, crop.width, column, output_.width);
    }
}

template void Canvas::put(int, const std::uint8_t* const&);
template void Canvas::put(int, const float* const&);
template void Canvas::put(int, const Levels&);

}  // namespace polydpo

#include "canvas.hpp"

#include <cstring>

namespace polydpo {
namespace {

// One pixel of four channels.
template <std::size_t bytes>
struct Pixel {
    char data[bytes];
};

template <std::size_t bytes>
void reverse(const void* from, int count, void* to) {
    const auto* in = static_cast<const Pixel<bytes>*>(from);
    auto* out = static_cast<Pixel<bytes>*>(to);
    for (int i = 0; i < count; ++i) out[i] = in[count - 1 - i];
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
    : sample_(static_cast<char*>(sample)),
      output_(output),
      finish_(finish),
      geometry_(geometry),
      plane_(plane) {}

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

template <class Channel>
void Canvas::put(int row, const Channel* rgbx) {
    const Region& crop = geometry_.crop;
    const Region& inner = geometry_.inner;
    const void* pixels = rgbx;
    if (geometry_.col_reversed) {
        reversed_.resize(4 * sizeof(Channel) * static_cast<std::size_t>(crop.width));
        reverse<4 * sizeof(Channel)>(rgbx, crop.width, reversed_.data());
        pixels = reversed_.data();
    }
    const int to = geometry_.row_reversed ? crop.height - 1 - row : row;
    if (!geometry_.transposed) {
        return finish_.store(static_cast<const Channel*>(pixels), crop.width, at(inner.top + to, inner.left), plane_);
    }
    const std::size_t size = size_of(finish_.dtype()), count = static_cast<std::size_t>(crop.width);
    turned_.resize(3 * count * size);
    finish_.store(static_cast<const Channel*>(pixels), crop.width, turned_.data(), count);
    for (int c = 0; c < 3; ++c) {
        const char* from = turned_.data() + c * count * size;
        char* column = at(inner.top, inner.left + to) + c * plane_ * size;
        if (size == 1) scatter<std::uint8_t>(from, crop.width, column, output_.width);
        if (size == 2) scatter<std::uint16_t>(from, crop.width, column, output_.width);
        if (size == 4) scatter<std::uint32_t>(from, crop.width, column, output_.width);
    }
}

template void Canvas::put(int, const std::uint8_t*);
template void Canvas::put(int, const float*);

}  // namespace polydpo

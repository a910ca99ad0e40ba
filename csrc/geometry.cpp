#include "geometry.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "error.hpp"

namespace polydpo {
namespace {

int half_to_even(int twice) {
    const int half = twice / 2;
    return twice % 2 ? half + half % 2 : half;
}

// Of a very long image, only the crop is ever computed; but its place must be a number that an int holds.
int side(std::int64_t length) {
    if (length > std::numeric_limits<int>::max()) {
        throw DecodeError("it would be " + std::to_string(length) + " pixels long after the resize");
    }
    return static_cast<int>(length);
}

Size resized_to(Size source, Size output, Resize resize) {
    const std::int64_t h = source.height, w = source.width, H = output.height, W = output.width;
    const auto width = [&] { return side(w * H / h); };
    const auto height = [&] { return side(h * W / w); };
    switch (resize) {
        case Resize::cover:
            if (H * w >= W * h) return {output.height, std::max(output.width, width())};
            return {std::max(output.height, height()), output.width};
        case Resize::contain:
            if (H * w <= W * h) return {output.height, std::max(1, width())};
            return {std::max(1, height()), output.width};
        case Resize::stretch: return output;
        case Resize::none: break;
    }
    if (h < H || w < W) {
        throw DecodeError("it is " + std::to_string(h) + " x " + std::to_string(w) + ", smaller than the crop of " +
                          std::to_string(H) + " x " + std::to_string(W) + ", and resize is None");
    }
    return source;
}

// The part of one axis that is used, and whether against its direction.
struct Span {
    int start, count;
    bool reversed;
};

Span mirrored(const Span& span, int length) { return {length - span.start - span.count, span.count, !span.reversed}; }

// places: of the corner, 0 ... places. A multiple of step.
int corner(int places, bool centre, std::uint32_t drawn, int step) {
    if (centre) return half_to_even(places) / step * step;
    const auto choices = static_cast<std::uint64_t>(places / step) + 1;
    return step * static_cast<int>(drawn * choices >> 32);
}

}  // namespace

Geometry plan(Size source, int orientation, Size output, Resize resize, const Draw& draw, int step) {
    Geometry result{};
    result.transposed = orientation >= 5;
    const Size oriented = result.transposed ? Size{source.width, source.height} : source;
    const Size resized = result.resized = resized_to(oriented, output, resize);
    const std::int64_t rows_lost = oriented.height - std::int64_t{resized.height};
    const std::int64_t columns_lost = oriented.width - std::int64_t{resized.width};
    result.down_first = (rows_lost > 0 && rows_lost > 2 * columns_lost) != result.transposed;
    const int height = std::min(resized.height, output.height), width = std::min(resized.width, output.width);
    result.inner = {(output.height - height) / 2, (output.width - width) / 2, height, width};
    result.top = corner(resized.height - height, draw.centre, draw.top, step);
    result.left = corner(resized.width - width, draw.centre, draw.left, step);

    Span rows{result.top, height, false}, cols{result.left, width, false};
    if (draw.flipped) cols = mirrored(cols, resized.width);
    if (result.transposed) std::swap(rows, cols);
    result.stored = result.transposed ? Size{resized.width, resized.height} : resized;
    // From the stored image to the oriented one: mirror these axes, then transpose.
    if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) {
        rows = mirrored(rows, result.stored.height);
    }
    if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) {
        cols = mirrored(cols, result.stored.width);
    }
    result.crop = {rows.start, cols.start, rows.count, cols.count};
    result.row_reversed = rows.reversed;
    result.col_reversed = cols.reversed;
    return result;
}

}  // namespace polydpo

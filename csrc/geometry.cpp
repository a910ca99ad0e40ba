#include "geometry.hpp"

#include <algorithm>
#include <string>

#include "error.hpp"

namespace polydpo {
namespace {

int half_to_even(int twice) {
    const int half = twice / 2;
    return twice % 2 ? half + half % 2 : half;
}

}  // namespace

Geometry plan_centre(Size source, Size output, Resize resize) {
    Size resized = source;
    if (resize == Resize::cover) {
        const std::int64_t h = source.height, w = source.width, H = output.height, W = output.width;
        // Sides of 65,500 at most, times 16,384: an int holds them, and only the crop is ever computed.
        if (H * w >= W * h) {
            resized = {output.height, static_cast<int>(std::max(W, w * H / h))};
        } else {
            resized = {static_cast<int>(std::max(H, h * W / w)), output.width};
        }
    } else if (source.height < output.height || source.width < output.width) {
        throw DecodeError("it is " + std::to_string(source.height) + " x " + std::to_string(source.width) +
                          ", smaller than the crop of " + std::to_string(output.height) + " x " +
                          std::to_string(output.width) + ", and resize is None");
    }
    return {resized, half_to_even(resized.height - output.height), half_to_even(resized.width - output.width)};
}

}  // namespace polydpo

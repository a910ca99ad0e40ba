// Where an output pixel comes from: orient, resize to a whole number of pixels, mirror, crop. Integers only, so that
// any other decoder given the same numbers cuts the same pixels.
#pragma once

#include <cstdint>

namespace polydpo {

enum class Resize : int { none = 0, cover = 1, contain = 2, stretch = 3 };

struct Size {
    int height, width;
};

// A rectangle of an image.
struct Region {
    int top, left, height, width;
};

// What was drawn for a pair; both arms use the same.
struct Draw {
    bool centre;              // the crop; else the numbers below choose its corner
    std::uint32_t top, left;  // uniform: corner = floor(number * places / 2^32)
    bool flipped;
};

// All about one image's way into the output.
struct Geometry {
    Size resized;   // of the whole oriented image
    int top, left;  // corner of the crop in the resized and mirrored image; 0 where it is padded
    Region inner;   // what the image covers of the output; the rest is padding ("contain")

    // The same seen from the image as stored, so that its rows can be used in the order in which they are decoded.
    Size stored;                      // of the resized image
    Region crop;                      // in it
    bool transposed;                  // rows of the crop are columns of the output
    bool row_reversed, col_reversed;  // the first row (column) of the crop is the last one of the output
    bool down_first;                  // the order of a resize whose two passes are not exchangeable
};

// The geometry of an image of `source` (as stored, EXIF orientation 1 to 8) for an output; throws DecodeError if it
// does not fit.
// cover: the smaller scale that covers the output, the other side rounded down (as torchvision's Resize).
// contain: the larger scale that fits into the output, the other side rounded down; padded on both sides.
// stretch: each side to that of the output. none: as it is.
// A resize goes across first in the oriented image, unless that loses over twice as many rows as columns (as Pillow
// 13's). A centred corner is rounded half to even (as torchvision's CenterCrop). Corners are multiples of `step`.
Geometry plan(Size source, int orientation, Size output, Resize resize, const Draw& draw, int step = 1);

}  // namespace polydpo

// Where an output pixel comes from: resize to a whole number of pixels, then crop. Integers only, so that any other
// decoder given the same numbers cuts the same pixels.
#pragma once

#include <cstdint>

namespace polydpo {

enum class Resize : int { none = 0, cover = 1 };

struct Size {
    int height, width;
};

struct Geometry {
    Size resized;   // of the whole image, before the crop
    int top, left;  // corner of the crop, in the resized image
};

// The geometry of a centre crop of `output` from an image of `source`; throws DecodeError if it does not fit.
// cover: the smaller scale that covers the output, the other side rounded down (as torchvision's Resize); the
// corner is rounded half to even (as its CenterCrop).
Geometry plan_centre(Size source, Size output, Resize resize);

}  // namespace polydpo

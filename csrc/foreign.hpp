// What somebody else's decoder has to be told, so that it cuts the pixels that ours would.
#pragma once

#include <optional>

#include "decode.hpp"
#include "geometry.hpp"

namespace polydpo {

struct ForeignPlan {
    Size source;  // as stored
    Geometry geometry;
};

// For a JPEG that every decoder understands alike, and that seems whole: Huffman coded, 8 bits, grey or YCbCr 4:4:4,
// 4:2:2 or 4:2:0, within the limits, with all its markers in place up to the end of the image, those of restarts too.
// Only the markers are read: the coded data between them may be damaged. Nothing for any other image, which our decoder
// takes or refuses.
std::optional<ForeignPlan> foreign_plan(const Image& image, const Draw& draw, Size output, Resize resize,
                                        Interpolation interpolation, bool apply_orientation, const Limits& limits);

}  // namespace polydpo

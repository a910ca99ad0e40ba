// The one EXIF tag that changes how an image is read; JPEG and PNG carry it in the same form.
#pragma once

#include <cstddef>
#include <cstdint>

namespace polydpo {

// The orientation, 1 to 8, that a TIFF header ("II*" or "MM*") and its first directory tell, with "Exif\0\0" before
// them or not; 1 where they tell none or are damaged in any way.
int exif_orientation(const std::uint8_t* tiff, std::size_t size);

// Of EXIF in hexadecimal digits after three lines, as ImageMagick put it into texts of PNGs before they had a chunk for
// it.
int raw_profile_orientation(const std::uint8_t* text, std::size_t size);

}  // namespace polydpo

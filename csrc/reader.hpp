// What every format's decoder looks like from outside: a header, then rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "geometry.hpp"

namespace polydpo {

// What is refused before anything is allocated for it.
struct Limits {
    std::int64_t pixels;   // height times width
    std::int64_t bytes;    // of the compressed image
    std::int64_t decoded;  // bytes of memory that a decoder may take for one image beside its rows
    int scans;             // of a progressive JPEG: each costs a pass over all coefficients
};

struct Colour {
    std::uint8_t r, g, b;
};

// A rectangle of the image as it is stored, before its orientation is applied.
struct Region {
    int top, left, height, width;
};

// Throws DecodeError where the bytes are damaged or ask for more than the limits allow. In strict mode every warning of
// a decoder (corrupt or missing data, bytes after the end) is an error too. The bytes must outlive the reader.
class Reader {
public:
    virtual ~Reader() = default;

    // Of the image as stored; known after construction, which reads the header only.
    virtual Size size() const = 0;
    // EXIF: 1 (as stored) to 8.
    virtual int orientation() const = 0;
    // Prepares to read the rows of `wanted`. Returns what read_row will give: the same rows, and at least its columns.
    virtual Region start(const Region& wanted) = 0;
    // The next row of that region as RGBX bytes (X is anything), 4 * width of them.
    virtual void read_row(std::uint8_t* rgbx) = 0;
    // After the last row. In strict mode what follows the region is examined too.
    virtual void finish() = 0;
};

}  // namespace polydpo

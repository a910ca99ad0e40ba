// What every format's decoder looks like from outside: a header, then rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "geometry.hpp"
#include "pixels.hpp"

namespace polydpo {

// What is refused before anything is allocated for it.
struct Limits {
    std::int64_t pixels;           // height times width
    std::int64_t bytes;            // of the compressed image
    std::int64_t decoded;          // bytes of memory that a decoder may take for one image beside its rows
    int scans;                     // of a progressive JPEG: each costs a pass over all coefficients
    std::int64_t chunk = 1 << 23;  // bytes of one of a PNG's that holds no pixels
};

// Who decodes JPEGs: our own decoder, and libjpeg whatever it does not know; or, to compare them, one alone. The pixels
// and the errors are the same.
enum class JpegDecoder { either, libjpeg, own };

struct Colour {
    std::uint8_t r, g, b;
};

// Throws DecodeError where the bytes are damaged or ask for more than the limits allow. In strict mode every warning of
// a decoder (corrupt, missing or misplaced data) is an error too; what follows the end of an image is not looked at.
// The bytes must outlive the reader.
class Reader {
public:
    virtual ~Reader() = default;

    // Of the image as stored; known after construction, which reads the header only.
    virtual Size size() const = 0;
    // As it is to be shown, not turned yet: another where pixels are not square.
    virtual Size shown() const { return size(); }
    // EXIF: 1 (as stored) to 8.
    virtual int orientation() const = 0;
    // Prepares to read the rows of `wanted`, a part of the image as stored. Returns what read_row will give: the same
    // rows, and at least its columns.
    virtual Region start(const Region& wanted) = 0;
    // The next row of that region as RGBX bytes (X is anything), 4 * width of them.
    virtual void read_row(std::uint8_t* rgbx) = 0;
    // After the last row. In strict mode what follows the region is examined too.
    virtual void finish() = 0;
    // What was wrong so far, though strict mode is off; empty: nothing.
    virtual std::string damage() const { return {}; }
};

// A reader of what is stored as Y, Cb and Cr.
class PlanesReader : public Reader {
public:
    // Instead of start to finish: the planes as they are stored, for 4:2:0 of 8 bits only. The part `crop`, all even,
    // as Y, then Cb and Cr of half the sides.
    virtual void read_planes(const Region& crop, std::uint8_t* planes) = 0;
};

// A reader whose rows can be had with their channels apart.
class LevelsReader : public PlanesReader {
public:
    void read_row(std::uint8_t* rgbx) final;
    // Instead of read_row: the next row, until the next call.
    virtual Levels read_levels() = 0;

protected:
    // Of the rows.
    virtual int width() const = 0;
};

// Room for a row of RGBX bytes. Off the 32-byte boundaries on purpose: libjpeg-turbo writes rows that lie on them past
// the caches, and the next step would wait for memory.
class Row {
public:
    explicit Row(int width = 0) : bytes_(4 * static_cast<std::size_t>(width) + 80) {}
    std::uint8_t* data() {
        return bytes_.data() + 16 + (64 - reinterpret_cast<std::uintptr_t>(bytes_.data()) % 64) % 64;
    }

private:
    std::vector<std::uint8_t> bytes_;
};

}  // namespace polydpo

// The scans of a JPEG: its Huffman codes to the coefficients of its blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <memory>

#include <jpeglib.h>

#include "simd.hpp"

namespace polydpo {

// Thrown where an image is to be decoded from its beginning by libjpeg alone.
struct LibjpegNeeded {};

#ifdef POLYDPO_V3
struct EntropyState;

// Baseline and progressive images, of which a header has been read by libjpeg: grey, or of three components, the first
// with as many samples as there are pixels and the others with as many or half of them in either direction or only
// across.
//
// Only what is as it should be is decoded here. At anything else (a code that there is not, bytes missing or left over,
// a marker out of its turn, an image without its last bits) LibjpegNeeded is thrown, so that the warnings, errors and
// repairs are always libjpeg's.
class EntropyDecoder {
public:
    static bool knows(const jpeg_decompress_struct& info);
    // Bytes that are kept of the whole image.
    static std::int64_t memory(const jpeg_decompress_struct& info);

    // The source must hold all bytes and outlive this.
    EntropyDecoder(const jpeg_decompress_struct& info, int most_scans);
    ~EntropyDecoder();

    // In MCUs.
    int rows() const;
    // Reads the next row of MCUs: of a progressive image, the first time, everything.
    void read_row();
    // After the last row: everything up to the end of the image.
    void finish();

    // Of `count` blocks from the one at `left` on, in row y of those in the row of MCUs that has been read; the last
    // MCU has some outside the image. Valid until the next call. A block more may be read.
    struct Row {
        const JCOEF* coefficients;  // of a block in the order of rows, block after block
        const std::uint8_t* last;   // of each block; coefficients that come later, as they are stored, are zeros
    };
    Row row(int component, int y, int left, int count);

private:
    std::unique_ptr<EntropyState> state_;
};
#endif

}  // namespace polydpo

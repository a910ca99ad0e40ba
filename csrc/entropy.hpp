// The Huffman codes of JPEG, decoded in place of libjpeg-turbo's own decoder, which takes most of its time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <memory>

#include <jpeglib.h>

namespace polydpo {

struct EntropyState;

// Two coefficients are had from one look into a table, and in the later passes of a progressive image all the bits of a
// block's known coefficients at once. Everything else stays libjpeg's: headers, coefficients to pixels, cropping,
// markers between scans.
//
// Only what is as it should be is decoded here. At anything else (a code that there is not, bytes missing or left
// over, a marker out of its turn) this gives up: it calls the error exit, with given_up() true, and the image is to
// be decoded again by libjpeg alone, whose warnings, errors and repairs are thereby the only ones.
//
// The samples are those of libjpeg, bit for bit.
class EntropyDecoder {
public:
    EntropyDecoder();
    ~EntropyDecoder();

    // Whether it knows the scans of an image whose header has been read.
    static bool knows(j_decompress_ptr info);

    // Takes the place of libjpeg's. After jpeg_start_decompress(), before anything is decoded: so progressive images
    // are to be started in buffered-image mode. The source must hold all bytes; client_data is taken.
    void install(j_decompress_ptr info);

    // What installing allocates.
    static std::int64_t memory(j_decompress_ptr info);

    bool given_up() const;

private:
    std::unique_ptr<EntropyState> state_;
};

}  // namespace polydpo

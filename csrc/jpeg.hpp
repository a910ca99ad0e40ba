// JPEG through libjpeg-turbo: header, then one row at a time.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <string>

#include <jpeglib.h>

#include "geometry.hpp"

namespace polydpo {

// What is refused before anything is allocated for it.
struct Limits {
    std::int64_t pixels;  // height times width
    std::int64_t bytes;   // of the compressed image
    int scans;            // of a progressive image: each costs a pass over all coefficients
};

bool is_jpeg(const std::uint8_t* data, std::size_t size);

// libjpeg leaves through longjmp where something is wrong. Every call into it is made by guarded(), which holds the
// setjmp and turns the jump into a DecodeError, so that no C++ frame with a destructor is ever jumped over.
class JpegReader {
public:
    // Reads the header. In strict mode every later warning of the decoder (corrupt or missing data) throws too.
    // `data` must outlive the reader.
    JpegReader(const std::uint8_t* data, std::size_t size, const Limits& limits, bool strict);
    ~JpegReader();
    JpegReader(const JpegReader&) = delete;
    JpegReader& operator=(const JpegReader&) = delete;

    Size size() const { return {static_cast<int>(info_.image_height), static_cast<int>(info_.image_width)}; }
    void start();
    // The next row, from top to bottom, as RGBX: 4 * width bytes.
    void read_row(std::uint8_t* rgbx);
    // After the last row: reads to the end of the image, so that damage there is seen as well.
    void finish();

private:
    struct ErrorManager : jpeg_error_mgr {
        std::jmp_buf escape;
        char message[JMSG_LENGTH_MAX];
        bool strict;
    };
    struct Progress : jpeg_progress_mgr {
        int scans;
    };

    template <class Call>
    void guarded(Call call);
    [[noreturn]] static void on_error(j_common_ptr info);
    static void on_message(j_common_ptr info, int level);
    static void on_progress(j_common_ptr info);

    jpeg_decompress_struct info_{};
    ErrorManager error_{};
    Progress progress_{};
};

}  // namespace polydpo

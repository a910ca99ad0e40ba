// JPEG through libjpeg-turbo: header, then one row at a time.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <memory>
#include <vector>

#include <jpeglib.h>

#include "reader.hpp"

namespace polydpo {

bool is_jpeg(const std::uint8_t* data, std::size_t size);

// A JPEG whose header has been read and which is within the limits.
//
// libjpeg leaves through longjmp where something is wrong. Every call into it is made by guarded(), which holds the
// setjmp and turns the jump into a DecodeError, so that no C++ frame with a destructor is ever jumped over.
class JpegHeader {
public:
    JpegHeader(const std::uint8_t* data, std::size_t size, const Limits& limits, bool strict);
    ~JpegHeader();
    JpegHeader(const JpegHeader&) = delete;
    JpegHeader& operator=(const JpegHeader&) = delete;

    Size size() const { return {static_cast<int>(info.image_height), static_cast<int>(info.image_width)}; }
    // EXIF: 1 to 8.
    int orientation() const;
    bool is_yuv420() const;
    bool strict() const { return error_.strict; }
    // libjpeg's first warning.
    std::string damage() const { return error_.warning; }

    template <class Call>
    void guarded(Call call);

    jpeg_decompress_struct info{};

private:
    struct ErrorManager : jpeg_error_mgr {
        std::jmp_buf escape;
        char message[JMSG_LENGTH_MAX];
        char warning[JMSG_LENGTH_MAX];
        bool strict;
    };
    struct Progress : jpeg_progress_mgr {
        int scans;
    };

    void check(const Limits& limits);
    [[noreturn]] static void on_error(j_common_ptr info);
    static void on_message(j_common_ptr info, int level);
    static void on_progress(j_common_ptr info);

    const std::uint8_t* data_;
    std::size_t size_;
    ErrorManager error_{};
    Progress progress_{};
};

// Decodes whatever libjpeg can.
class JpegReader : public PlanesReader {
public:
    explicit JpegReader(std::unique_ptr<JpegHeader> header);

    Size size() const override { return header_->size(); }
    int orientation() const override { return header_->orientation(); }
    Region start(const Region& wanted) override;
    void read_row(std::uint8_t* rgbx) override;
    void finish() override;
    std::string damage() const override { return header_->damage(); }
    void read_planes(const Region& crop, std::uint8_t* planes) override;

private:
    void skip(int rows);

    std::unique_ptr<JpegHeader> header_;
    jpeg_decompress_struct& info_;
    bool cmyk_;
    bool partly_;                        // whether libjpeg may be asked for a part of the image
    std::vector<std::uint8_t> dropped_;  // a row that nobody wants
};

}  // namespace polydpo

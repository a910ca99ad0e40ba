// JPEG through libjpeg-turbo: header, then one row at a time.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>  // jpeglib.h needs FILE
#include <memory>
#include <string>
#include <vector>

#include <jpeglib.h>

#include "entropy.hpp"
#include "reader.hpp"

namespace polydpo {

bool is_jpeg(const std::uint8_t* data, std::size_t size);

// Thrown where an image is to be decoded again, from its beginning, by libjpeg alone.
struct LibjpegNeeded {};

// libjpeg leaves through longjmp where something is wrong. Every call into it is made by guarded(), which holds the
// setjmp and turns the jump into a DecodeError, so that no C++ frame with a destructor is ever jumped over.
class JpegReader : public PlanesReader {
public:
    // Throws LibjpegNeeded later if `entropy` is either, and already here if it is own; never if it is libjpeg.
    JpegReader(const std::uint8_t* data, std::size_t size, const Limits& limits, bool strict, Entropy entropy);
    ~JpegReader() override;
    JpegReader(const JpegReader&) = delete;
    JpegReader& operator=(const JpegReader&) = delete;

    Size size() const override { return {static_cast<int>(info_.image_height), static_cast<int>(info_.image_width)}; }
    int orientation() const override { return orientation_; }
    Region start(const Region& wanted) override;
    void read_row(std::uint8_t* rgbx) override;
    void finish() override;
    void read_planes(const Region& crop, std::uint8_t* planes) override;

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
    void choose_entropy(Entropy entropy, const Limits& limits);
    int orientation_in_markers() const;
    void begin();
    void skip(int rows);
    void end();
    [[noreturn]] static void on_error(j_common_ptr info);
    static void on_message(j_common_ptr info, int level);
    static void on_progress(j_common_ptr info);

    jpeg_decompress_struct info_{};
    ErrorManager error_{};
    Progress progress_{};
    std::unique_ptr<EntropyDecoder> entropy_;  // none: libjpeg's
    int orientation_ = 1;
    bool cmyk_ = false;
    bool partly_ = false;  // whether libjpeg may be asked for a part of the image
    std::vector<std::uint8_t> dropped_;  // a row that nobody wants
};

}  // namespace polydpo

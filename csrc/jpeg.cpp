#include "jpeg.hpp"

#include "error.hpp"

namespace polydpo {

bool is_jpeg(const std::uint8_t* data, std::size_t size) {
    return size >= 3 && data[0] == 0xff && data[1] == 0xd8 && data[2] == 0xff;
}

template <class Call>
void JpegReader::guarded(Call call) {
    if (setjmp(error_.escape)) throw DecodeError(error_.message);
    call();
}

void JpegReader::on_error(j_common_ptr info) {
    auto* error = static_cast<ErrorManager*>(info->err);
    error->format_message(info, error->message);
    std::longjmp(error->escape, 1);
}

void JpegReader::on_message(j_common_ptr info, int level) {
    auto* error = static_cast<ErrorManager*>(info->err);
    if (level >= 0) return;  // a trace, not a warning
    ++error->num_warnings;
    if (error->strict) on_error(info);
}

void JpegReader::on_progress(j_common_ptr info) {
    auto* decoder = reinterpret_cast<j_decompress_ptr>(info);
    auto* error = static_cast<ErrorManager*>(info->err);
    const int limit = static_cast<Progress*>(info->progress)->scans;
    if (decoder->input_scan_number > limit) {
        std::snprintf(error->message, sizeof error->message, "it has more than %d scans (limits.scans)", limit);
        std::longjmp(error->escape, 1);
    }
}

JpegReader::JpegReader(const std::uint8_t* data, std::size_t size, const Limits& limits, bool strict) {
    info_.err = jpeg_std_error(&error_);
    error_.error_exit = on_error;
    error_.emit_message = on_message;
    error_.strict = strict;
    try {
        guarded([&] {
            jpeg_create_decompress(&info_);
            jpeg_mem_src(&info_, data, static_cast<unsigned long>(size));
            jpeg_read_header(&info_, TRUE);
        });
        const std::int64_t pixels = static_cast<std::int64_t>(info_.image_height) * info_.image_width;
        if (pixels > limits.pixels) {
            throw DecodeError("it has " + std::to_string(pixels) + " pixels, more than " +
                              std::to_string(limits.pixels) + " (limits.pixels)");
        }
        if (info_.jpeg_color_space == JCS_CMYK || info_.jpeg_color_space == JCS_YCCK) {
            throw DecodeError("it is a CMYK JPEG, which is not supported yet");
        }
    } catch (...) {
        jpeg_destroy_decompress(&info_);  // the destructor will not run
        throw;
    }
    progress_.progress_monitor = on_progress;
    progress_.scans = limits.scans;
    info_.progress = &progress_;
    info_.out_color_space = JCS_EXT_RGBX;
}

JpegReader::~JpegReader() { jpeg_destroy_decompress(&info_); }

void JpegReader::start() {
    guarded([this] { jpeg_start_decompress(&info_); });
}

void JpegReader::read_row(std::uint8_t* rgbx) {
    JSAMPROW row = rgbx;
    guarded([this, &row] { jpeg_read_scanlines(&info_, &row, 1); });
}

void JpegReader::finish() {
    guarded([this] { jpeg_finish_decompress(&info_); });
}

}  // namespace polydpo

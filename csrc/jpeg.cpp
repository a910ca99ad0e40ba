#include "jpeg.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "error.hpp"
#include "exif.hpp"

namespace polydpo {
namespace {

// Inks as Adobe stores them, inverted: 255 is none. What is left of the light after the ink and black.
void to_rgb(std::uint8_t* pixels, int width) {
    for (int x = 0; x < width; ++x, pixels += 4) {
        const unsigned black = pixels[3];
        for (int c = 0; c < 3; ++c) pixels[c] = static_cast<std::uint8_t>((pixels[c] * black + 127) / 255);
    }
}

// Whether the image is sampled as nearly all are: colour as finely as brightness, or at half of it. With other
// samplings libjpeg-turbo 2.1.5, asked to skip rows, gives wrong ones afterwards or does not come back.
bool usual(const jpeg_decompress_struct& info) {
    for (int i = 0; i < info.num_components; ++i) {
        const jpeg_component_info& part = info.comp_info[i];
        const bool whole = part.h_samp_factor == info.max_h_samp_factor && part.v_samp_factor == info.max_v_samp_factor;
        if (!(whole && (i == 0 || i == 3)) && (part.h_samp_factor != 1 || part.v_samp_factor != 1)) return false;
    }
    return info.max_h_samp_factor <= 2 && info.max_v_samp_factor <= 2;
}

}  // namespace

bool is_jpeg(const std::uint8_t* data, std::size_t size) {
    return size >= 3 && data[0] == 0xff && data[1] == 0xd8 && data[2] == 0xff;
}

template <class Call>
void JpegHeader::guarded(Call call) {
    if (setjmp(error_.escape)) throw DecodeError(error_.message);
    call();
}

void JpegHeader::on_error(j_common_ptr info) {
    auto* error = static_cast<ErrorManager*>(info->err);
    error->format_message(info, error->message);
    std::longjmp(error->escape, 1);
}

void JpegHeader::on_message(j_common_ptr info, int level) {
    auto* error = static_cast<ErrorManager*>(info->err);
    if (level >= 0) return;  // a trace, not a warning
    if (error->strict) on_error(info);
    if (error->num_warnings++ == 0) error->format_message(info, error->warning);
}

void JpegHeader::on_progress(j_common_ptr info) {
    auto* decoder = reinterpret_cast<j_decompress_ptr>(info);
    auto* error = static_cast<ErrorManager*>(info->err);
    const int limit = static_cast<Progress*>(info->progress)->scans;
    if (decoder->input_scan_number > limit) {
        std::snprintf(error->message, sizeof error->message, "it has more than %d scans (limits.scans)", limit);
        std::longjmp(error->escape, 1);
    }
}

JpegHeader::JpegHeader(const std::uint8_t* data, std::size_t size, const Limits& limits, bool strict)
    : data_(data), size_(size) {
    info.err = jpeg_std_error(&error_);
    error_.error_exit = on_error;
    error_.emit_message = on_message;
    error_.strict = strict;
    try {
        guarded([&] {
            jpeg_create_decompress(&info);
            jpeg_mem_src(&info, data, static_cast<unsigned long>(size));
            jpeg_read_header(&info, TRUE);
        });
        check(limits);
    } catch (...) {
        jpeg_destroy_decompress(&info);  // the destructor will not run
        throw;
    }
    progress_.progress_monitor = on_progress;
    progress_.scans = limits.scans;
    info.progress = &progress_;
}

JpegHeader::~JpegHeader() { jpeg_destroy_decompress(&info); }

// Where there are several scans, the coefficients of the whole image are kept.
void JpegHeader::check(const Limits& limits) {
    const std::int64_t pixels = static_cast<std::int64_t>(info.image_height) * info.image_width;
    if (pixels > limits.pixels) {
        throw DecodeError("it has " + std::to_string(pixels) + " pixels, more than " + std::to_string(limits.pixels) +
                          " (limits.pixels)");
    }
    std::int64_t bytes = 0;
    for (int i = 0; i < info.num_components && jpeg_has_multiple_scans(&info); ++i) {
        const jpeg_component_info& part = info.comp_info[i];
        bytes += static_cast<std::int64_t>(part.width_in_blocks) * part.height_in_blocks *
                 static_cast<std::int64_t>(sizeof(JBLOCK));
    }
    if (bytes > limits.decoded) {
        throw DecodeError("it takes " + std::to_string(bytes) + " bytes to decode, more than " +
                          std::to_string(limits.decoded) + " (limits.decoded)");
    }
}

// Not by jpeg_save_markers, which walks past all markers that are kept for each new one: half a megabyte of empty ones
// would take a quarter of a minute.
int JpegHeader::orientation() const {
    static constexpr char name[6] = {'E', 'x', 'i', 'f', 0, 0};
    const std::uint8_t *at = data_ + 2, *const end = data_ + size_;
    while (end - at >= 4) {
        const int marker = at[1];
        if (at[0] != 0xff || marker == 0 || marker == 0xff) {  // fill bytes, or what libjpeg has warned of
            ++at;
        } else if (marker == 1 || (marker & 0xf8) == JPEG_RST0) {  // without a length
            at += 2;
        } else {
            const std::ptrdiff_t length = std::max(at[2] << 8 | at[3], 2);
            if (marker == 0xda || length > end - at - 2) return 1;  // a scan
            const std::uint8_t* body = at + 4;
            const auto size = static_cast<std::size_t>(length - 2);
            if (marker == JPEG_APP0 + 1 && size > sizeof name && std::memcmp(body, name, sizeof name) == 0) {
                return exif_orientation(body, size);
            }
            at += 2 + length;
        }
    }
    return 1;
}

bool JpegHeader::is_yuv420() const {
    const auto samples = [this](int part, int count) {
        return info.comp_info[part].h_samp_factor == count && info.comp_info[part].v_samp_factor == count;
    };
    return info.jpeg_color_space == JCS_YCbCr && samples(0, 2) && samples(1, 1) && samples(2, 1);
}

JpegReader::JpegReader(std::unique_ptr<JpegHeader> header)
    : header_(std::move(header)),
      info_(header_->info),
      cmyk_(info_.jpeg_color_space == JCS_CMYK || info_.jpeg_color_space == JCS_YCCK),
      partly_(usual(info_)) {
    info_.out_color_space = cmyk_ ? JCS_CMYK : JCS_EXT_RGBX;
    // libjpeg-turbo's quick way through baseline scans takes codes that do not exist for zeros, without a warning. With
    // a restart interval, even one that is never reached, it goes the other way, which warns: 2 to 6% slower. Scans
    // that end at coefficient 0 are progressive, which have no quick way, or lossless, whose restarts libjpeg-turbo 3
    // wants at the ends of rows.
    if (info_.restart_interval == 0 && info_.Se > 0) info_.restart_interval = std::numeric_limits<unsigned>::max();
}

Region JpegReader::start(const Region& wanted) {
    Region given{wanted.top, 0, wanted.height, static_cast<int>(info_.image_width)};
    dropped_.resize(4 * static_cast<std::size_t>(info_.image_width));
    header_->guarded([&] {
        jpeg_start_decompress(&info_);
        // The upsampling of chroma looks at its neighbours, and the smoothing of a progressive image without its last
        // bits at two blocks: three on each side give both the ones that they have in the whole image.
        const int margin = 3 * info_.max_h_samp_factor * DCTSIZE;
        const int left = std::max(0, wanted.left - margin);
        const int right = std::min(given.width, wanted.left + wanted.width + margin);
        if (partly_ && right - left < given.width) {
            auto x = static_cast<JDIMENSION>(left), width = static_cast<JDIMENSION>(right - left);
            jpeg_crop_scanline(&info_, &x, &width);
            given.left = static_cast<int>(x);
            given.width = static_cast<int>(width);
        }
        skip(wanted.top);
    });
    return given;
}

// Only inside guarded().
void JpegReader::skip(int rows) {
    if (rows <= 0) return;
    if (partly_) {
        jpeg_skip_scanlines(&info_, static_cast<JDIMENSION>(rows));
        return;
    }
    JSAMPROW row = dropped_.data();
    for (; rows > 0; --rows) jpeg_read_scanlines(&info_, &row, 1);
}

void JpegReader::read_row(std::uint8_t* rgbx) {
    JSAMPROW row = rgbx;
    header_->guarded([this, &row] { jpeg_read_scanlines(&info_, &row, 1); });
    if (cmyk_) to_rgb(rgbx, static_cast<int>(info_.output_width));
}

void JpegReader::finish() {
    const int rest = static_cast<int>(info_.output_height - info_.output_scanline);
    if (rest > 0 && !header_->strict()) return;
    JSAMPROW to = dropped_.data();
    header_->guarded([&] {
        // To skip to the very end would not look at what is there; to read the last row takes all before it.
        skip(rest - 1);
        if (rest > 0) jpeg_read_scanlines(&info_, &to, 1);
        jpeg_finish_decompress(&info_);
    });
}

void JpegReader::read_planes(const Region& crop, std::uint8_t* planes) {
    if (!header_->is_yuv420()) throw DecodeError("it is not stored as YCbCr 4:2:0");
    constexpr int rows = 2 * DCTSIZE;  // of Y that libjpeg gives at a time
    std::vector<std::uint8_t> buffers[3];
    std::vector<JSAMPROW> pointers[3];
    JSAMPARRAY arrays[3];
    std::uint8_t* to[3] = {planes, planes + static_cast<std::size_t>(crop.height) * crop.width, nullptr};
    to[2] = to[1] + static_cast<std::size_t>(crop.height / 2) * (crop.width / 2);
    for (int part = 0; part < 3; ++part) {
        const int half = part > 0 ? 2 : 1;
        // Whole blocks are written, and a whole group of them.
        const std::size_t width = (static_cast<std::size_t>(info_.image_width) / rows + 1) * rows / half;
        buffers[part].resize(width * (rows / half));
        for (int y = 0; y < rows / half; ++y) pointers[part].push_back(buffers[part].data() + width * y);
        arrays[part] = pointers[part].data();
    }
    info_.raw_data_out = TRUE;
    info_.out_color_space = JCS_YCbCr;
    header_->guarded([this] { jpeg_start_decompress(&info_); });
    while (info_.output_scanline < info_.output_height) {
        const int first = static_cast<int>(info_.output_scanline);
        header_->guarded([&] { jpeg_read_raw_data(&info_, arrays, rows); });
        for (int part = 0; part < 3; ++part) {
            const int half = part > 0 ? 2 : 1;
            const int width = crop.width / half, top = crop.top / half, end = (crop.top + crop.height) / half;
            for (int y = 0; y < rows / half; ++y) {
                const int row = first / half + y;
                if (row < top || row >= end) continue;
                std::memcpy(to[part], pointers[part][y] + crop.left / half, static_cast<std::size_t>(width));
                to[part] += width;
            }
        }
    }
    header_->guarded([this] { jpeg_finish_decompress(&info_); });
}

}  // namespace polydpo

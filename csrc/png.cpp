#include "png.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include <libdeflate.h>

#include "error.hpp"
#include "exif.hpp"
#include "simd.hpp"

namespace polydpo {
namespace {

#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
constexpr bool checksums = false;  // a fuzzer would never get past them
#else
constexpr bool checksums = true;
#endif

constexpr int max_side = 1000000;
// After the inflated rows: whole words are loaded across their end, and the last match of too long a stream (at most
// 258 bytes) may begin within them.
constexpr std::size_t slack = 320;

constexpr std::uint32_t name_of(const char (&name)[5]) {
    return std::uint32_t{static_cast<unsigned char>(name[0])} << 24 | static_cast<unsigned char>(name[1]) << 16 |
           static_cast<unsigned char>(name[2]) << 8 | static_cast<unsigned char>(name[3]);
}

inline std::uint32_t big16(const std::uint8_t* p) { return std::uint32_t{p[0]} << 8 | p[1]; }
inline std::uint32_t big32(const std::uint8_t* p) { return big16(p) << 16 | big16(p + 2); }

inline std::uint32_t rgbx(std::uint32_t r, std::uint32_t g, std::uint32_t b) { return r | g << 8 | b << 16; }
inline std::uint32_t rgbx(Colour colour) { return rgbx(colour.r, colour.g, colour.b); }

// ---- Filters: `row` holds what was stored and gets what was meant; `above` is the row above it, done. ----

typedef std::uint8_t Bytes8 __attribute__((vector_size(8)));
typedef std::uint8_t Bytes16 __attribute__((vector_size(16)));
typedef std::int16_t Pixel __attribute__((vector_size(16)));  // its bytes, as words

constexpr std::size_t word_of(std::size_t bytes) { return bytes <= 2 ? bytes : bytes <= 4 ? 4 : 8; }

template <std::size_t bytes>
POLYDPO_INLINE Pixel load(const std::uint8_t* from) {
    Bytes8 pixel = {};
    std::memcpy(&pixel, from, word_of(bytes));
    return __builtin_convertvector(pixel, Pixel);
}

template <int filter>
POLYDPO_INLINE Pixel guess(Pixel left, Pixel up, Pixel corner) {
    if (filter == 1) return left;
    if (filter == 3) return (left + up) >> 1;
    // Paeth: the one of the three that is nearest to left + up - corner. This form of it (Fabian Giesen's) is a short
    // way from `left` to the result, and that way is what each pixel waits for.
    const Pixel bound = (3 * corner - up) - left;
    const Pixel low = left < up ? left : up, high = left < up ? up : left;
    const Pixel not_low = high > bound, not_high = bound > low;
    return (low & ~not_low) | (high & ~not_high) | (corner & (not_low & not_high));
}

// Pixels of 3 or 6 bytes are loaded and stored as 4 or 8: the next one is loaded before the store runs into it, and
// what follows the row is put back.
template <std::size_t bytes, int filter>
POLYDPO_INLINE void each_pixel(std::uint8_t* row, const std::uint8_t* above, std::size_t size) {
    constexpr std::size_t word = word_of(bytes);
    Pixel left = {}, corner = {}, next = load<bytes>(row);
    std::uint8_t after[8];
    std::memcpy(after, row + size, word - bytes);
    for (std::size_t i = 0; i < size; i += bytes) {
        const Pixel stored = next, up = load<bytes>(above + i);
        next = load<bytes>(row + i + bytes);
        left = (Pixel)((Bytes16)guess<filter>(left, up, corner) + (Bytes16)stored);  // the high bytes stay 0
        corner = up;
        const Bytes8 pixel = __builtin_convertvector(left, Bytes8);
        std::memcpy(row + i, &pixel, word);
    }
    std::memcpy(row + size, after, word - bytes);
}

template <std::size_t bytes>
POLYDPO_INLINE void unfilter_pixels(int filter, std::uint8_t* row, const std::uint8_t* above, std::size_t size) {
    if (filter == 1) return each_pixel<bytes, 1>(row, above, size);
    if (filter == 3) return each_pixel<bytes, 3>(row, above, size);
    return each_pixel<bytes, 4>(row, above, size);
}

// `size` is a multiple of `pixel_bytes`.
POLYDPO_CLONES void unfilter(int filter, std::uint8_t* __restrict row, const std::uint8_t* __restrict above,
                             std::size_t size, std::size_t pixel_bytes) {
    for (std::size_t i = 0; filter == 2 && i < size; ++i) row[i] = static_cast<std::uint8_t>(row[i] + above[i]);
    if (filter == 0 || filter == 2) return;
    switch (pixel_bytes) {
        case 1: return unfilter_pixels<1>(filter, row, above, size);
        case 2: return unfilter_pixels<2>(filter, row, above, size);
        case 3: return unfilter_pixels<3>(filter, row, above, size);
        case 4: return unfilter_pixels<4>(filter, row, above, size);
        case 6: return unfilter_pixels<6>(filter, row, above, size);
        case 8: return unfilter_pixels<8>(filter, row, above, size);
    }
}

// ---- Expansion to RGBX ----

// All of these are exactly rounded; halves do not occur.
POLYDPO_INLINE std::uint32_t to_byte(std::uint32_t sample) { return (sample * 255 + 32895) >> 16; }  // by 257
POLYDPO_INLINE std::uint32_t over(std::uint32_t sample, std::uint32_t alpha, std::uint32_t background) {
    return (sample * alpha + background * (255 - alpha) + 127) / 255;
}
POLYDPO_INLINE std::uint32_t over_wide(std::uint32_t sample, std::uint32_t alpha, std::uint32_t background) {
    constexpr std::uint32_t whole = 65535u * 257;
    return static_cast<std::uint32_t>((std::uint64_t{sample * alpha} + background * 257 * (65535 - alpha) + whole / 2) /
                                      whole);
}

POLYDPO_INLINE int index_at(const std::uint8_t* row, int x, int depth) {
    const std::size_t bit = static_cast<std::size_t>(x) * depth;
    return row[bit >> 3] >> (8 - depth - (bit & 7)) & ((1 << depth) - 1);
}

template <int channels, bool wide>
POLYDPO_INLINE void expand(const PngFormat& format, const std::uint8_t* __restrict row, int width,
                           std::uint8_t* __restrict to) {
    const Colour under = format.background;
    const bool keyed = format.keyed;
    const std::uint32_t key[3] = {format.key[0], format.key[1], format.key[2]};
    for (int x = 0; x < width; ++x, row += channels * (wide ? 2 : 1), to += 4) {
        std::uint32_t s[channels], pixel;
        for (int c = 0; c < channels; ++c) s[c] = wide ? big16(row + 2 * c) : row[c];
        std::uint32_t r = s[0], g = s[channels < 3 ? 0 : 1], b = s[channels < 3 ? 0 : 2];
        const bool clear = keyed && r == key[0] && g == key[1] && b == key[2];
        if (channels % 2 == 0) {
            const std::uint32_t alpha = s[channels - 1];
            r = wide ? over_wide(r, alpha, under.r) : over(r, alpha, under.r);
            g = wide ? over_wide(g, alpha, under.g) : over(g, alpha, under.g);
            b = wide ? over_wide(b, alpha, under.b) : over(b, alpha, under.b);
        } else if (wide) {
            r = to_byte(r), g = to_byte(g), b = to_byte(b);
        }
        pixel = clear ? rgbx(under) : rgbx(r, g, b);
        if (channels == 3 && !wide && !keyed) std::memcpy(&pixel, row, 4);  // X is anything
        std::memcpy(to, &pixel, 4);
    }
}

POLYDPO_CLONES void expand_row(const PngFormat& format, const std::uint8_t* row, int width, std::uint8_t* to) {
    if (format.indexed && format.depth == 8) {
        for (int x = 0; x < width; ++x, to += 4) std::memcpy(to, &format.table[row[x]], 4);
        return;
    }
    if (format.indexed) {
        for (int x = 0; x < width; ++x, to += 4) std::memcpy(to, &format.table[index_at(row, x, format.depth)], 4);
        return;
    }
    switch (format.channels * (format.depth / 8)) {
        case 2:
            return format.depth == 16 ? expand<1, true>(format, row, width, to)
                                      : expand<2, false>(format, row, width, to);
        case 3: return expand<3, false>(format, row, width, to);
        case 4:
            return format.depth == 16 ? expand<2, true>(format, row, width, to)
                                      : expand<4, false>(format, row, width, to);
        case 6: return expand<3, true>(format, row, width, to);
        case 8: return expand<4, true>(format, row, width, to);
    }
}

struct FreeDecompressor {
    void operator()(libdeflate_decompressor* decompressor) const { libdeflate_free_decompressor(decompressor); }
};

libdeflate_result decompress(const std::uint8_t* from, std::size_t size, std::uint8_t* to, std::size_t room,
                             std::size_t* used, std::size_t* made) {
    thread_local std::unique_ptr<libdeflate_decompressor, FreeDecompressor> decompressor;
    if (!decompressor) decompressor.reset(libdeflate_alloc_decompressor());
    if (!decompressor) throw std::bad_alloc();
    if (checksums) return libdeflate_zlib_decompress_ex(decompressor.get(), from, size, to, room, used, made);
    if (size < 6) return LIBDEFLATE_BAD_DATA;
    const auto result = libdeflate_deflate_decompress_ex(decompressor.get(), from + 2, size - 6, to, room, used, made);
    *used += 6;
    return result;
}

constexpr char exif_keyword[] = "Raw profile type exif";  // with the zero at its end

bool is_exif_text(const std::uint8_t* body, std::size_t length) {
    return length >= sizeof exif_keyword && std::memcmp(body, exif_keyword, sizeof exif_keyword) == 0;
}

// Of such a text.
int text_orientation(bool compressed, const std::uint8_t* body, std::size_t length) {
    body += sizeof exif_keyword;
    length -= sizeof exif_keyword;
    if (!compressed) return raw_profile_orientation(body, length);
    if (length == 0 || body[0] != 0) return 1;  // the only method there is
    std::vector<std::uint8_t> text(160 << 10);  // EXIF has at most 64 KB
    std::size_t used = 0, made = 0;
    const auto result = decompress(body + 1, length - 1, text.data(), text.size(), &used, &made);
    return result == LIBDEFLATE_SUCCESS ? raw_profile_orientation(text.data(), made) : 1;
}

}  // namespace

bool is_png(const std::uint8_t* data, std::size_t size) {
    return size >= 8 && std::memcmp(data, "\x89PNG\r\n\x1a\n", 8) == 0;
}

// ---- The file ----

PngReader::PngReader(const std::uint8_t* data, std::size_t size, const Limits& limits, bool strict, Colour background)
    : data_(data), size_(size), strict_(strict) {
    if (!is_png(data, size)) throw DecodeError("it is not a PNG");
    if (size < 33) throw DecodeError("its PNG data end early");
    if (big32(data + 8) != 13 || big32(data + 12) != name_of("IHDR")) throw DecodeError("it has no PNG header");
    format_.background = background;
    read_header(data + 16);
    const std::int64_t pixels = std::int64_t{height_} * width_;
    if (pixels > limits.pixels) {
        throw DecodeError("it has " + std::to_string(pixels) + " pixels, more than " + std::to_string(limits.pixels) +
                          " (limits.pixels)");
    }
    plan_passes();
    read_chunks(limits.chunk);
    const std::int64_t bytes = inflated_bytes_ + (idat_count_ > 1 ? static_cast<std::int64_t>(idat_bytes_) : 0) +
                               (interlaced_ ? 4 * pixels : 0);
    if (bytes > limits.decoded) {
        throw DecodeError("its rows take " + std::to_string(bytes) + " bytes, more than " +
                          std::to_string(limits.decoded) + " (limits.decoded)");
    }
}

void PngReader::read_header(const std::uint8_t* header) {
    const std::uint32_t width = big32(header), height = big32(header + 4);
    if (width == 0 || height == 0) throw DecodeError("it has no pixels");
    if (width > max_side || height > max_side) {
        throw DecodeError("it is " + std::to_string(width) + " pixels wide and " + std::to_string(height) +
                          " high; at most " + std::to_string(max_side) + " are read");
    }
    width_ = static_cast<int>(width);
    height_ = static_cast<int>(height);
    const int depth = header[8];
    colour_type_ = header[9];
    const bool small = depth == 1 || depth == 2 || depth == 4;
    const int types = depth == 8 ? 0b1011101 : depth == 16 ? 0b1010101 : small ? 0b0001001 : 0;  // a bit for each
    if (colour_type_ > 6 || !(types >> colour_type_ & 1)) {
        throw DecodeError("it has colour type " + std::to_string(colour_type_) + " with bit depth " +
                          std::to_string(depth) + ", which PNG does not know");
    }
    if (header[10] != 0 || header[11] != 0 || header[12] > 1) {
        throw DecodeError("it has a compression, filter or interlace method that PNG does not know");
    }
    interlaced_ = header[12] == 1;
    format_.depth = depth;
    format_.channels = (colour_type_ == 2 || colour_type_ == 6 ? 3 : 1) + (colour_type_ >= 4 ? 1 : 0);
    format_.indexed = format_.channels == 1 && depth <= 8;
}

void PngReader::plan_passes() {
    static constexpr int adam7[7][4] = {{0, 0, 8, 8}, {4, 0, 8, 8}, {0, 4, 4, 8}, {2, 0, 4, 4},
                                        {0, 2, 2, 4}, {1, 0, 2, 2}, {0, 1, 1, 2}};
    const int bits = format_.channels * format_.depth;
    pixel_bytes_ = static_cast<std::size_t>(std::max(bits / 8, 1));
    const auto add = [&](int left, int top, int across, int down) {
        if (left >= width_ || top >= height_) return;
        const int width = (width_ - left + across - 1) / across, height = (height_ - top + down - 1) / down;
        const std::int64_t row_bytes = (std::int64_t{width} * bits + 7) / 8;
        passes_[pass_count_++] = {left, top, across, down, width, height, static_cast<std::size_t>(row_bytes)};
        inflated_bytes_ += height * (1 + row_bytes);
    };
    if (!interlaced_) return add(0, 0, 1, 1);
    for (const auto& pass : adam7) add(pass[0], pass[1], pass[2], pass[3]);
}

void PngReader::object(const std::string& what) {
    if (strict_) throw DecodeError(what);
    if (damage_.empty()) damage_ = what;
}

void PngReader::read_chunks(std::int64_t most) {
    bool ended = false, idat_over = false, has_exif = false, has_text = false;
    int in_text = 1;
    std::size_t at = 8;
    while (!ended) {
        const std::size_t left = size_ - at;
        // Read once: the bytes may change under us, and what was checked must be what is used.
        const std::size_t stated = left < 12 ? 0 : big32(data_ + at);
        cut_ = left < 12 || stated > left - 12;
        if (cut_ && (strict_ || left < 8)) break;
        const std::uint8_t* type = data_ + at + 4;
        const std::uint8_t* body = data_ + at + 8;
        const std::size_t length = cut_ ? left - 8 : stated;
        const std::uint32_t name = big32(type);
        for (int i = 0; i < 4; ++i) {
            const int letter = type[i] | 32;
            if (letter < 'a' || letter > 'z') {
                throw DecodeError("its chunk at byte " + std::to_string(at) + " has no name");
            }
        }
        if (cut_ && name != name_of("IDAT")) break;
        if (idat_count_ > 0 && name != name_of("IDAT")) idat_over = true;
        const bool critical = !(type[0] & 32);
        const auto says = [&](const std::string& why) {
            return "its chunk " + std::string(type, type + 4) + " at byte " + std::to_string(at) + why;
        };
        const auto refuse = [&](const std::string& why) { throw DecodeError(says(why)); };
        if (name != name_of("IDAT") && length > static_cast<std::uint64_t>(most)) {
            refuse(" has " + std::to_string(length) + " bytes, more than " + std::to_string(most) + " (limits.chunk)");
        }
        const bool is_text = name == name_of("tEXt") || name == name_of("zTXt");
        const bool used = critical || is_text || name == name_of("tRNS") || name == name_of("eXIf");
        if (checksums && !cut_ && (used || strict_) && libdeflate_crc32(0, type, 4 + length) != big32(body + length)) {
            if (critical) refuse(" has a wrong checksum");
            object(says(" has a wrong checksum"));
            at += 12 + length;
            continue;
        }
        switch (name) {
            case name_of("IHDR"):
                if (at != 8) refuse(" is the second of its kind");
                break;
            case name_of("PLTE"):
                if (length == 0 || length > 768 || length % 3 != 0) refuse(" has a wrong length");
                if (!palette_.empty() || !transparency_.empty() || idat_count_ > 0 || !(colour_type_ & 2)) {
                    object(says(" is out of place"));
                } else {
                    palette_.assign(body, body + length);
                }
                break;
            case name_of("tRNS"): {
                const std::size_t most = colour_type_ == 0 ? 2 : colour_type_ == 2 ? 6 : palette_.size() / 3;
                if (!transparency_.empty() || idat_count_ > 0 || colour_type_ >= 4 || most == 0) {
                    object(says(" is out of place"));
                } else if (length == 0 || length > most || (colour_type_ != 3 && length != most)) {
                    object(says(" has a wrong length"));
                } else {
                    transparency_.assign(body, body + length);
                }
                break;
            }
            case name_of("eXIf"):
                orientation_ = exif_orientation(body, length);
                has_exif = true;
                break;
            case name_of("tEXt"):
            case name_of("zTXt"):
                // One at most: each takes a moment, and a file has room for thousands.
                if (has_text || !is_exif_text(body, length)) break;
                has_text = true;
                in_text = text_orientation(name == name_of("zTXt"), body, length);
                break;
            case name_of("IDAT"):
                if (idat_over) refuse(" does not follow the others");
                if (colour_type_ == 3 && palette_.empty()) throw DecodeError("it has no palette");
                if (idat_count_++ == 0) first_idat_ = at;
                idat_bytes_ += length;
                break;
            case name_of("IEND"):
                if (length != 0) object(says(" has a wrong length"));
                ended = true;
                break;
            default:
                if (critical) refuse(" is of no known kind");
        }
        if (cut_) break;
        at += 12 + length;
    }
    if (!has_exif) orientation_ = in_text;
    if (cut_ && idat_count_ == 0) throw DecodeError("its PNG data end early");
    if (cut_) object("its PNG data end early");
    if (idat_count_ == 0) throw DecodeError("it has no image data");
}

// ---- The rows ----

void PngReader::prepare_colours() {
    const Colour under = format_.background;
    const int depth = format_.depth;
    const std::uint32_t most = (1u << depth) - 1;
    if (colour_type_ != 3 && !transparency_.empty()) {
        format_.keyed = true;
        for (int c = 0; c < 3; ++c) format_.key[c] = big16(&transparency_[colour_type_ == 2 ? 2 * c : 0]) & most;
    }
    if (!format_.indexed) return;
    const std::size_t known = colour_type_ == 3 ? palette_.size() / 3 : most + 1;
    check_indices_ = known <= most;
    for (std::size_t i = 0; i <= most && i < known; ++i) {  // what is beyond a palette stays black
        if (colour_type_ == 3) {
            const std::uint8_t* c = &palette_[3 * i];
            const std::uint32_t alpha = i < transparency_.size() ? transparency_[i] : 255;
            format_.table[i] = rgbx(over(c[0], alpha, under.r), over(c[1], alpha, under.g), over(c[2], alpha, under.b));
        } else {
            const std::uint32_t grey = static_cast<std::uint32_t>(i) * 255 / most;
            format_.table[i] = format_.keyed && i == format_.key[0] ? rgbx(under) : rgbx(grey, grey, grey);
        }
    }
}

void PngReader::inflate() {
    const auto size = static_cast<std::size_t>(inflated_bytes_);
    inflated_.reset(new std::uint8_t[size + slack]);
    const std::uint8_t* from = data_ + first_idat_ + 8;
    std::unique_ptr<std::uint8_t[]> gathered;
    if (idat_count_ > 1) {
        gathered.reset(new std::uint8_t[idat_bytes_]);
        const std::uint8_t* chunk = data_ + first_idat_;
        for (std::size_t i = 0, to = 0; i < idat_count_; ++i) {
            const std::size_t length = std::min(std::size_t{big32(chunk)}, idat_bytes_ - to);  // the last may be cut
            std::memcpy(gathered.get() + to, chunk + 8, length);
            chunk += 12 + length;
            to += length;
        }
        from = gathered.get();
    }
    std::size_t used = 0, made = 0;
    const auto result = decompress(from, idat_bytes_, inflated_.get(), size, &used, &made);
    if (result == LIBDEFLATE_BAD_DATA && !cut_) throw DecodeError("its compressed data are damaged");
    if (result == LIBDEFLATE_SUCCESS && made < size) object("its PNG data end early");
    if (!cut_ && (result != LIBDEFLATE_SUCCESS || used < idat_bytes_)) {
        object("it has more PNG data than its rows take");
    }
    if (result == LIBDEFLATE_SUCCESS) {
        std::memset(inflated_.get() + made, 0, size - made);
    } else {
        // libdeflate does not say how much it had written when it gave up, but does write as it goes.
        std::memset(inflated_.get(), 0, size + slack);
        decompress(from, idat_bytes_, inflated_.get(), size + slack, &used, &made);
    }
}

void PngReader::check_filters(int rows) const {
    const std::uint8_t* row = inflated_.get();
    for (int i = 0; i < pass_count_; ++i) {
        for (int y = 0; y < passes_[i].height && (interlaced_ || y < rows); ++y, row += 1 + passes_[i].row_bytes) {
            if (*row > 4) throw DecodeError("it has a row with filter " + std::to_string(*row) + ", which is unknown");
        }
    }
}

const std::uint8_t* PngReader::next_row(const Pass& pass) {
    std::uint8_t* row = next_ + 1;
    unfilter(*next_, row, above_, pass.row_bytes, pixel_bytes_);
    if (check_indices_) {
        int most = 0;
        for (int x = 0; x < pass.width; ++x) most = std::max(most, index_at(row, x, format_.depth));
        if (3 * static_cast<std::size_t>(most) >= palette_.size()) {
            object("it has a pixel of colour " + std::to_string(most) + " of a palette of " +
                   std::to_string(palette_.size() / 3));
        }
    }
    above_ = row;
    next_ = row + pass.row_bytes;
    ++row_;
    return row;
}

Region PngReader::start(const Region& wanted) {
    prepare_colours();
    inflate();
    check_filters(strict_ ? height_ : wanted.top + wanted.height);
    const Pass& whole = passes_[0];
    no_row_.assign(pixel_bytes_ * static_cast<std::size_t>(width_) + 8, 0);
    next_ = inflated_.get();
    above_ = no_row_.data();
    if (interlaced_) {
        join_passes();
    } else if (!check_indices_) {
        // A row with filter 0 or 1 does not depend on the rows above it.
        int first = wanted.top;
        while (first > 0 && next_[(1 + whole.row_bytes) * static_cast<std::size_t>(first)] > 1) --first;
        next_ += (1 + whole.row_bytes) * static_cast<std::size_t>(first);
        row_ = first;
    }
    while (!interlaced_ && row_ < wanted.top) next_row(whole);
    row_ = wanted.top;
    return {wanted.top, 0, wanted.height, width_};
}

void PngReader::join_passes() {
    joined_.reset(new std::uint8_t[4 * static_cast<std::size_t>(width_) * height_]);
    std::vector<std::uint8_t> pixels(4 * static_cast<std::size_t>(width_));
    for (int i = 0; i < pass_count_; ++i) {
        const Pass& pass = passes_[i];
        above_ = no_row_.data();
        for (int y = 0; y < pass.height; ++y) {
            expand_row(format_, next_row(pass), pass.width, pixels.data());
            const std::size_t row = static_cast<std::size_t>(pass.top) + static_cast<std::size_t>(y) * pass.down;
            std::uint8_t* to = joined_.get() + 4 * (row * width_ + pass.left);
            for (std::size_t x = 0; x < static_cast<std::size_t>(pass.width); ++x) {
                std::memcpy(to + 4 * x * pass.across, &pixels[4 * x], 4);
            }
        }
    }
    inflated_.reset();
}

void PngReader::read_row(std::uint8_t* rgbx) {
    if (!interlaced_) return expand_row(format_, next_row(passes_[0]), width_, rgbx);
    const std::size_t bytes = 4 * static_cast<std::size_t>(width_);
    std::memcpy(rgbx, joined_.get() + bytes * row_++, bytes);
}

void PngReader::finish() {
    if (check_indices_ && !interlaced_) {
        while (row_ < height_) next_row(passes_[0]);
    }
}

}  // namespace polydpo

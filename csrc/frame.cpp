#include "frame.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "error.hpp"
#include "simd.hpp"

namespace polydpo {
namespace {

template <class Value>
POLYDPO_INLINE Value load(const void* from, std::size_t i = 0) {
    Value value;
    std::memcpy(&value, static_cast<const char*>(from) + i * sizeof value, sizeof value);
    return value;
}

// Two rows of a chroma plane to four times the row between them: three parts near, one far; or two of each. Words are
// cut to their depth: no sum overflows, whatever a decoder left there.
template <class Sample, int parts>
POLYDPO_INLINE void blend(const std::uint8_t* near, const std::uint8_t* far, int most, int count,
                          std::uint16_t* __restrict out) {
    if (sizeof(Sample) == 1) most = 255;
    for (int i = 0; i < count; ++i) {
        const int sum = parts * (load<Sample>(near, i) & most) + (4 - parts) * (load<Sample>(far, i) & most);
        out[i] = static_cast<std::uint16_t>(sum);
    }
}

POLYDPO_CLONES void blend_rows(const std::uint8_t* near, const std::uint8_t* far, bool halfway, bool wide, int most,
                               int count, std::uint16_t* out) {
    if (halfway) {
        return wide ? blend<std::uint16_t, 2>(near, far, most, count, out)
                    : blend<std::uint8_t, 2>(near, far, most, count, out);
    }
    wide ? blend<std::uint16_t, 3>(near, far, most, count, out) : blend<std::uint8_t, 3>(near, far, most, count, out);
}

// Chroma that lies between the columns, to four times that of every column of a region, the first of which is even.
// `row` is at the sample of the first two, and has a neighbour on both sides.
POLYDPO_CLONES void spread(const std::uint16_t* row, int columns, std::uint16_t* out) {
    for (int i = 0; i < columns; ++i) {
        out[2 * i] = static_cast<std::uint16_t>(3 * row[i] + row[i - 1]);
        out[2 * i + 1] = static_cast<std::uint16_t>(3 * row[i] + row[i + 1]);
    }
}

// ---------------------------------------------------------------------------- 8 bits, and chroma on the even columns
// What nearly all video is, in words of 16 bits: 1/64 of a level each, less 128 levels. Products are rounded down,
// which the offsets make good on average: a level is within 0.53 of its exact value.

// Eight bits of Y, and eleven of eight times Cb and Cr, up to 16 or just less.
constexpr int y_bits = 7, chroma_bits = 5;
constexpr int lanes = 32;

typedef std::uint16_t Words __attribute__((vector_size(2 * lanes)));
typedef std::int16_t Integers __attribute__((vector_size(2 * lanes)));

POLYDPO_INLINE Words product(Words a, std::uint16_t factor) {
    std::uint16_t words[lanes];
    std::memcpy(words, &a, sizeof a);
    for (std::uint16_t& word : words) {
        word = static_cast<std::uint16_t>(static_cast<std::uint32_t>(word) * factor >> 16);
    }
    return load<Words>(words);
}

POLYDPO_INLINE Words level(Words sum, std::uint16_t offset) {
    std::int16_t values[lanes];
    sum += offset;
    std::memcpy(values, &sum, sizeof sum);
    for (std::int16_t& value : values) {
        value = static_cast<std::int16_t>(value >> 6);
        value = std::max<std::int16_t>(std::min<std::int16_t>(value, 127), -128);
    }
    return load<Words>(values) + static_cast<std::uint16_t>(128);
}

// Little endian: the even column is the low half of a pair.
POLYDPO_INLINE void store_pairs(Words even, Words odd, std::uint8_t* to) {
    const Words pairs = even | odd << 8;
    std::memcpy(to, &pairs, sizeof pairs);
}

// A multiple of 2 * lanes columns. Chroma is four times its samples; between them is their mean.
POLYDPO_CLONES void colour_pairs(const std::uint8_t* luma, const std::uint16_t* cb, const std::uint16_t* cr,
                                 const Coefficients<std::uint16_t>& coefficients, int width, std::uint8_t* red,
                                 std::uint8_t* green, std::uint8_t* blue) {
    const Coefficients<std::uint16_t> k = coefficients;
    for (int x = 0; x < width; x += 2 * lanes, cb += lanes, cr += lanes) {
        const Words pairs = load<Words>(luma + x);
        const Words y0 = product((pairs & 255) << y_bits, k.luma), y1 = product(pairs >> 8 << y_bits, k.luma);
        const Words b = load<Words>(cb), b0 = (b + b) << chroma_bits, b1 = (b + load<Words>(cb + 1)) << chroma_bits;
        const Words r = load<Words>(cr), r0 = (r + r) << chroma_bits, r1 = (r + load<Words>(cr + 1)) << chroma_bits;
        store_pairs(level(y0 + product(r0, k.red), k.red_offset), level(y1 + product(r1, k.red), k.red_offset),
                    red + x);
        const Words g0 = (product(b0, k.green_blue) + product(r0, k.green_red)) >> 1;
        const Words g1 = (product(b1, k.green_blue) + product(r1, k.green_red)) >> 1;
        store_pairs(level(y0 - g0, k.green_offset), level(y1 - g1, k.green_offset), green + x);
        store_pairs(level(y0 + product(b0, k.blue), k.blue_offset), level(y1 + product(b1, k.blue), k.blue_offset),
                    blue + x);
    }
}

// ------------------------------------------------------------------------------------------------- everything else
// In words of 32 bits: 2^-21 of a level each.

constexpr int fraction = 21;

POLYDPO_INLINE std::uint8_t level(int sum) { return static_cast<std::uint8_t>(std::clamp(sum >> fraction, 0, 255)); }

// Where chroma is taken from: its own columns; the even ones, four times its samples either way; or between_.
enum class Columns { all, even, between };

template <class Sample, Columns columns>
POLYDPO_INLINE void colour(const std::uint8_t* luma, const std::uint16_t* cb, const std::uint16_t* cr,
                           const Coefficients<int>& k, int width, std::uint8_t* __restrict red,
                           std::uint8_t* __restrict green, std::uint8_t* __restrict blue) {
    for (int x = 0; x < width; ++x) {
        const int y = (load<Sample>(luma, x) & k.most) * k.luma;
        const int left = columns == Columns::even ? x / 2 : x, right = columns == Columns::even ? (x + 1) / 2 : x;
        const int b = columns == Columns::between ? cb[x] : cb[left] + cb[right];
        const int r = columns == Columns::between ? cr[x] : cr[left] + cr[right];
        red[x] = level(y + r * k.red + k.red_offset);
        green[x] = level(y - b * k.green_blue - r * k.green_red + k.green_offset);
        blue[x] = level(y + b * k.blue + k.blue_offset);
    }
}

template <Columns columns>
POLYDPO_INLINE void colour_in(bool wide, const std::uint8_t* luma, const std::uint16_t* cb, const std::uint16_t* cr,
                              const Coefficients<int>& k, int width, std::uint8_t* red, std::uint8_t* green,
                              std::uint8_t* blue) {
    wide ? colour<std::uint16_t, columns>(luma, cb, cr, k, width, red, green, blue)
         : colour<std::uint8_t, columns>(luma, cb, cr, k, width, red, green, blue);
}

POLYDPO_CLONES void colour_each(const std::uint8_t* luma, const std::uint16_t* cb, const std::uint16_t* cr, bool wide,
                                Columns columns, const Coefficients<int>& coefficients, int width, std::uint8_t* red,
                                std::uint8_t* green, std::uint8_t* blue) {
    const Coefficients<int> k = coefficients;
    switch (columns) {
        case Columns::all: return colour_in<Columns::all>(wide, luma, cb, cr, k, width, red, green, blue);
        case Columns::even: return colour_in<Columns::even>(wide, luma, cb, cr, k, width, red, green, blue);
        case Columns::between: return colour_in<Columns::between>(wide, luma, cb, cr, k, width, red, green, blue);
    }
}

// Samples that are levels already, but for their depth and range.
template <class Sample>
POLYDPO_INLINE void rescale(const std::uint8_t* from, const Coefficients<int>& k, int width,
                            std::uint8_t* __restrict to) {
    for (int x = 0; x < width; ++x) to[x] = level((load<Sample>(from, x) & k.most) * k.luma + k.red_offset);
}

POLYDPO_CLONES void rescale_row(const std::uint8_t* from, bool wide, const Coefficients<int>& coefficients, int width,
                                std::uint8_t* to) {
    const Coefficients<int> k = coefficients;
    wide ? rescale<std::uint16_t>(from, k, width, to) : rescale<std::uint8_t>(from, k, width, to);
}

constexpr std::int64_t large_crop = 1 << 18;  // pixels; of smaller ones a clip may stay in the caches

// Past the caches, which the decoder needs for the frames that others are made from. Nobody may be told of what was
// copied before end_of_copies().
void copy_past_caches(std::uint8_t* to, const std::uint8_t* from, std::size_t bytes) {
#if defined(__SSE2__)
    constexpr std::size_t lane = sizeof(__m128i), line = 4 * lane;
    const std::size_t head = std::min<std::size_t>(bytes, -reinterpret_cast<std::uintptr_t>(to) % lane);
    std::memcpy(to, from, head);
    for (to += head, from += head, bytes -= head; bytes >= line; to += line, from += line, bytes -= line) {
        for (std::size_t i = 0; i < line; i += lane) {
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
        }
    }
#endif
    std::memcpy(to, from, bytes);
}

void end_of_copies() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

bool is_between_columns(const Frame& frame) {
    return frame.shift_x &&
           (frame.siting == Siting::centre || frame.siting == Siting::top || frame.siting == Siting::bottom);
}

bool in_pairs(const Frame& frame) { return frame.depth == 8 && frame.shift_x && !is_between_columns(frame); }

// R = y + red Cr, and so on, in 0..255, of eight times Cb and Cr; or of sixteen times, where they lie between the
// columns. Of RGB, whose last are never looked at, those of a grey pixel.
Coefficients<int> coefficients_of(const Frame& frame) {
    static constexpr double reds[6] = {0.299, 0.2126, 0.2627, 0.30, 0.212, 0.299};
    static constexpr double blues[6] = {0.114, 0.0722, 0.0593, 0.11, 0.087, 0.114};
    const double times = is_between_columns(frame) ? 16 : 8;
    const double kr = reds[static_cast<int>(frame.matrix)], kb = blues[static_cast<int>(frame.matrix)];
    const double unit = 1 << (frame.depth - 8), most = (1 << frame.depth) - 1;
    const double black = frame.full_range ? 0 : 16 * unit, grey = times * 128 * unit;
    const double y = 255 / (frame.full_range ? most : 219 * unit);
    const double c = 255 / (frame.full_range ? most : 224 * unit) / times;
    const double red = 2 * (1 - kr) * c, blue = 2 * (1 - kb) * c;
    const double green_blue = 2 * kb * (1 - kb) / (1 - kr - kb) * c, green_red = 2 * kr * (1 - kr) / (1 - kr - kb) * c;

    const auto integer = [](double x) { return static_cast<int>(std::lround(x)); };
    Coefficients<int> k{};
    k.most = static_cast<int>(most);
    if (!in_pairs(frame)) {
        constexpr double one = 1 << fraction;
        k.luma = integer(y * one);
        k.red = integer(red * one);
        k.green_blue = integer(green_blue * one);
        k.green_red = integer(green_red * one);
        k.blue = integer(blue * one);
        const double start = (0.5 - black * y) * one;
        if (frame.matrix == Matrix::rgb) {
            k.red_offset = integer(start);
            return k;
        }
        k.red_offset = integer(start - grey * k.red);
        k.green_offset = integer(start + grey * (k.green_blue + k.green_red));
        k.blue_offset = integer(start - grey * k.blue);
        return k;
    }
    constexpr double of_y = 64 * (65536 >> y_bits), of_c = 64 * (65536 >> chroma_bits);
    k.luma = integer(y * of_y);
    k.red = integer(red * of_c);
    k.green_blue = integer(2 * green_blue * of_c);  // twice as fine: they are added first
    k.green_red = integer(2 * green_red * of_c);
    k.blue = integer(blue * of_c);
    // Exact for grey, whatever rounding did to the factors; and what products lose on average, less half a part for
    // ties, which are rounded up.
    const double start = (0.5 - 128 + (128 - black) * y) * 64 - 128 * k.luma / of_y * 64;
    const auto at_grey = [&](int factor) { return grey * factor / of_c * 64; };
    k.red_offset = integer(start - at_grey(k.red) + 0.5);
    k.green_offset = integer(start + at_grey(k.green_blue + k.green_red) / 2 - 0.75);
    k.blue_offset = integer(start - at_grey(k.blue) + 0.5);
    return k;
}

}  // namespace

FrameReader::FrameReader(const Frame& frame) : frame_(frame), coefficients_(coefficients_of(frame)) {
    const auto word = [](int value) { return static_cast<std::uint16_t>(value); };
    const Coefficients<int>& k = coefficients_;
    words_ = {word(k.most), word(k.luma),       word(k.red),          word(k.green_blue), word(k.green_red),
              word(k.blue), word(k.red_offset), word(k.green_offset), word(k.blue_offset)};
}

Region FrameReader::start(const Region& wanted) {
    region_ = wanted;
    if (frame_.shift_x && wanted.left % 2) {
        --region_.left;
        ++region_.width;
    }
    columns_ = (region_.width + frame_.shift_x) >> frame_.shift_x;
    // The last columns are computed with others that do not exist, and the first ones may be.
    for (auto& row : chroma_) row.resize(static_cast<std::size_t>(columns_) + 2 + lanes);
    if (is_between_columns(frame_)) {
        for (auto& row : between_) row.resize(2 * static_cast<std::size_t>(columns_));
    }
    for (auto& channel : levels_) channel.resize(static_cast<std::size_t>(region_.width) + 2 * lanes);
    return region_;
}

Levels FrameReader::read_rgb(int y) {
    static constexpr int order[3] = {2, 0, 1};
    const bool wide = frame_.depth > 8;
    Levels result{};
    for (int c = 0; c < 3; ++c) {
        const std::uint8_t* from =
            frame_.planes[order[c]] + y * frame_.strides[order[c]] + (wide ? 2 : 1) * region_.left;
        rescale_row(from, wide, coefficients_, region_.width, levels_[c].data());
        result.channels[c] = levels_[c].data();
    }
    return result;
}

// Four times the chroma of a row of the region, one sample to the left of it and one to the right: the outermost again
// beyond the edges of the frame.
void FrameReader::read_chroma(int y) {
    const bool wide = frame_.depth > 8;
    const int left = region_.left >> frame_.shift_x;
    const int rows = (frame_.size.height + frame_.shift_y) >> frame_.shift_y;
    const int columns = (frame_.size.width + frame_.shift_x) >> frame_.shift_x;
    const int near = y >> frame_.shift_y;
    int far = near;
    bool halfway = false;
    if (frame_.shift_y) {
        const bool odd = y % 2;
        switch (frame_.siting) {
            case Siting::left:
            case Siting::centre: far += odd ? 1 : -1; break;
            case Siting::top_left:
            case Siting::top: far += halfway = odd; break;
            case Siting::bottom_left:
            case Siting::bottom: far -= halfway = !odd; break;
        }
        far = std::clamp(far, 0, rows - 1);
    }
    const int before = left > 0 ? 1 : 0, there = std::min(columns_ + 1, columns - left) + before;
    for (int part = 0; part < 2; ++part) {
        const auto at = [&](int row) {
            return frame_.planes[part + 1] + row * frame_.strides[part + 1] + (wide ? 2 : 1) * (left - before);
        };
        std::uint16_t* row = chroma_[part].data();
        blend_rows(at(near), at(far), halfway, wide, coefficients_.most, there, row + 1 - before);
        if (!before) row[0] = row[1];
        if (there - before == columns_) row[columns_ + 1] = row[columns_];
    }
}

Levels FrameReader::read_levels() {
    const int y = region_.top + row_++;
    if (frame_.matrix == Matrix::rgb) return read_rgb(y);
    read_chroma(y);
    const bool wide = frame_.depth > 8;
    const std::uint8_t* luma = frame_.planes[0] + y * frame_.strides[0] + (wide ? 2 : 1) * region_.left;
    const std::uint16_t *cb = chroma_[0].data() + 1, *cr = chroma_[1].data() + 1;
    std::uint8_t *red = levels_[0].data(), *green = levels_[1].data(), *blue = levels_[2].data();
    if (in_pairs(frame_)) {
        const int rest = region_.width % (2 * lanes), done = region_.width - rest;
        colour_pairs(luma, cb, cr, words_, done, red, green, blue);
        std::uint8_t last[2 * lanes] = {};
        std::memcpy(last, luma + done, static_cast<std::size_t>(rest));
        colour_pairs(last, cb + done / 2, cr + done / 2, words_, rest, red + done, green + done, blue + done);
    } else if (is_between_columns(frame_)) {
        std::uint16_t *all_cb = between_[0].data(), *all_cr = between_[1].data();
        spread(cb, columns_, all_cb);
        spread(cr, columns_, all_cr);
        colour_each(luma, all_cb, all_cr, wide, Columns::between, coefficients_, region_.width, red, green, blue);
    } else {
        const Columns columns = frame_.shift_x ? Columns::even : Columns::all;
        colour_each(luma, cb, cr, wide, columns, coefficients_, region_.width, red, green, blue);
    }
    return {{red, green, blue}};
}

void FrameReader::read_planes(const Region& crop, std::uint8_t* planes) {
    if (frame_.depth != 8 || frame_.shift_x != 1 || frame_.shift_y != 1) {
        throw DecodeError("it is not stored as YCbCr 4:2:0 of 8 bits");
    }
    const bool is_large = std::int64_t{crop.height} * crop.width >= large_crop;
    for (int part = 0; part < 3; ++part) {
        const int shift = part > 0 ? 1 : 0;
        const std::uint8_t* from =
            frame_.planes[part] + (crop.top >> shift) * frame_.strides[part] + (crop.left >> shift);
        const auto width = static_cast<std::size_t>(crop.width >> shift);
        for (int y = 0; y < crop.height >> shift; ++y, from += frame_.strides[part], planes += width) {
            is_large ? copy_past_caches(planes, from, width) : static_cast<void>(std::memcpy(planes, from, width));
        }
    }
    if (is_large) end_of_copies();
}

}  // namespace polydpo

#include "resample.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "simd.hpp"

#ifdef POLYDPO_V3
#include <immintrin.h>
#endif

namespace polydpo {
namespace {

typedef float Floats16 __attribute__((vector_size(64)));
typedef float Floats4 __attribute__((vector_size(16)));

// One row across: four taps, that is four neighbouring pixels, at a time. `weights` has 4 * quads for each output,
// those beyond its taps 0, in units of `unit`. Sums are of integers, and so the same on every processor.
void resample_plainly(const std::uint8_t* in, const int* first, const std::int16_t* weights, int quads, int width,
                      float unit, float* out) {
    for (int x = 0; x < width; ++x, out += 4) {
        const std::uint8_t* from = in + 4 * static_cast<std::ptrdiff_t>(first[x]);
        std::int32_t sums[4] = {};
        for (int k = 0; k < 4 * quads; ++k, from += 4) {
            const int weight = *weights++;
            for (int c = 0; c < 4; ++c) sums[c] += weight * from[c];
        }
        for (int c = 0; c < 4; ++c) out[c] = std::min(std::max(static_cast<float>(sums[c]) * unit, 0.0f), 255.0f);
    }
}

#ifdef POLYDPO_V3
// `known`: quads, if not 0.
template <int known>
POLYDPO_V3_INLINE void resample_row(const std::uint8_t* in, const int* first, const std::int16_t* weights, int quads,
                                    int width, float unit, float* out) {
    if (known > 0) quads = known;
    // Of two pairs of pixels the channels side by side, as pairs are summed.
    const __m128i pairs = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    const __m256i of_pairs = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m128 units = _mm_set1_ps(unit), most = _mm_set1_ps(255);
    for (int x = 0; x < width; ++x, out += 4) {
        const std::uint8_t* from = in + 4 * static_cast<std::ptrdiff_t>(first[x]);
        __m256i sums = _mm256_setzero_si256();
        for (int k = 0; k < quads; ++k, from += 16, weights += 4) {
            std::int64_t four;
            std::memcpy(&four, weights, sizeof four);
            const __m256i these =
                _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps(_mm256_set1_epi64x(four)), of_pairs));
            const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            const __m256i words = _mm256_cvtepu8_epi16(_mm_shuffle_epi8(pixels, pairs));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(words, these));
        }
        const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        const __m128 levels = _mm_mul_ps(_mm_cvtepi32_ps(sum), units);
        _mm_storeu_ps(out, _mm_min_ps(_mm_max_ps(levels, _mm_setzero_ps()), most));
    }
}

POLYDPO_V3 void resample_by_v3(const std::uint8_t* in, const int* first, const std::int16_t* weights, int quads,
                               int width, float unit, float* out) {
    switch (quads) {
        case 1: return resample_row<1>(in, first, weights, 1, width, unit, out);
        case 2: return resample_row<2>(in, first, weights, 2, width, unit, out);
        default: return resample_row<0>(in, first, weights, quads, width, unit, out);
    }
}
#endif

void resample_row(const std::uint8_t* in, const int* first, const std::int16_t* weights, int quads, int width,
                  float unit, float* out) {
#ifdef POLYDPO_V3
    if (is_x86_64_v3()) return resample_by_v3(in, first, weights, quads, width, unit, out);
#endif
    resample_plainly(in, first, weights, quads, width, unit, out);
}

// out[i] = sum over k of weights[k] * rows[k][i]: down. `length` is a multiple of 64, whose sums stay in registers.
POLYDPO_CLONES void blend_rows(const float* const* rows, const float* weights, int count, std::size_t length,
                               float* out) {
    for (std::size_t start = 0; start < length; start += 64) {
        Floats16 sum[4] = {};
        for (int k = 0; k < count; ++k) {
            const float* row = rows[k] + start;
            for (int i = 0; i < 4; ++i) {
                Floats16 values;
                std::memcpy(&values, row + 16 * i, sizeof values);
                sum[i] += weights[k] * values;
            }
        }
        for (int i = 0; i < 4; ++i) std::memcpy(out + start + 16 * i, &sum[i], sizeof sum[i]);
    }
}

void to_floats(const std::uint8_t* bytes, std::size_t count, float* to) {
    for (std::size_t i = 0; i < count; ++i) to[i] = bytes[i];
}

void clamp(std::size_t count, float* levels) {
    for (std::size_t i = 0; i < count; ++i) levels[i] = std::min(std::max(levels[i], 0.0f), 255.0f);
}

// A row across of floats.
void resample_floats(const float* in, const Filter& filter, int width, float* out) {
    const float* weights = filter.weights.data();
    for (int x = 0; x < width; ++x, weights += filter.taps, out += 4) {
        const float* from = in + 4 * static_cast<std::ptrdiff_t>(filter.first[x]);
        Floats4 sum{};
        for (int k = 0; k < filter.count[x]; ++k, from += 4) {
            Floats4 pixel;
            std::memcpy(&pixel, from, sizeof pixel);
            sum += weights[k] * pixel;
        }
        std::memcpy(out, &sum, sizeof sum);
    }
}

// Of a row across, by integers: with more of them what is lost by rounding the weights would add up to over 1/32.
constexpr std::int64_t most_taps = 512;

double triangle(double x) { return std::max(0.0, 1.0 - std::abs(x)); }

double cubic(double x) {
    constexpr double a = -0.5;
    x = std::abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
    return 0;
}

}  // namespace

namespace {

double support_of(Interpolation kind, int source, int resized) {
    return (kind == Interpolation::bicubic ? 2.0 : 1.0) * std::max(static_cast<double>(source) / resized, 1.0);
}

std::int64_t taps_of(double support) { return static_cast<std::int64_t>(std::ceil(support)) * 2 + 1; }

// Bilinear stays within 0..255: its passes are exchangeable, and across is the quicker one to begin with.
bool goes_down_first(const Geometry& geometry, Interpolation kind) {
    return geometry.down_first && kind == Interpolation::bicubic;
}

}  // namespace

std::int64_t Resampler::memory(Size source, const Geometry& geometry, Interpolation kind) {
    const Size resized = geometry.stored;
    const Region& crop = geometry.crop;
    const std::int64_t across = taps_of(support_of(kind, source.width, resized.width));
    const std::int64_t down = taps_of(support_of(kind, source.height, resized.height));
    const std::int64_t weights = crop.width * (across + across + 3) + crop.height * down;
    const std::int64_t length =
        padded(std::max(crop.width, goes_down_first(geometry, kind) ? source.width : 0)) + apart;
    const std::int64_t row = source.width * (across > most_taps ? std::int64_t{5} : 1);
    const std::int64_t rows = length * (std::min<std::int64_t>(down, source.height) + 2) + row + across;
    return static_cast<std::int64_t>(sizeof(float)) * (weights + rows);
}

Filter make_filter(Interpolation kind, int source, int resized, int offset, int length) {
    const double scale = static_cast<double>(source) / resized, wide = std::max(scale, 1.0);
    const double support = support_of(kind, source, resized);
    Filter filter;
    filter.taps = static_cast<int>(taps_of(support));
    filter.first.resize(length);
    filter.count.resize(length);
    filter.weights.assign(static_cast<std::size_t>(length) * filter.taps, 0.0f);
    std::vector<double> weights(filter.taps);
    for (int i = 0; i < length; ++i) {
        const double centre = (offset + i + 0.5) * scale;
        const int first = std::max(0, static_cast<int>(centre - support + 0.5));
        const int end = std::min(source, static_cast<int>(centre + support + 0.5));
        double total = 0;
        for (int k = 0; k < end - first; ++k) {
            const double x = (first + k + 0.5 - centre) / wide;
            weights[k] = kind == Interpolation::bicubic ? cubic(x) : triangle(x);
            total += weights[k];
        }
        filter.first[i] = first;
        filter.count[i] = end - first;
        float* out = filter.weights.data() + static_cast<std::size_t>(i) * filter.taps;
        for (int k = 0; k < end - first; ++k) out[k] = static_cast<float>(weights[k] / total);
    }
    return filter;
}

Resampler::Resampler(Size source, const Geometry& geometry, Interpolation kind)
    : across_(make_filter(kind, source.width, geometry.stored.width, geometry.crop.left, geometry.crop.width)),
      down_(make_filter(kind, source.height, geometry.stored.height, geometry.crop.top, geometry.crop.height)),
      width_(geometry.crop.width),
      ring_rows_(std::min(down_.taps, source.height)),
      down_first_(goes_down_first(geometry, kind)),
      taps_(down_.taps) {
    quads_ = (*std::max_element(across_.count.begin(), across_.count.end()) + 3) / 4;
    quad_weights_.resize(4 * static_cast<std::size_t>(quads_) * width_);
    // The finest unit in which the largest weight has 16 bits, and sums, of negative weights too, have 32.
    const float largest = *std::max_element(across_.weights.begin(), across_.weights.end());
    const int bits = std::min(22, static_cast<int>(std::floor(std::log2(32766 / static_cast<double>(largest)))));
    unit_ = static_cast<float>(std::ldexp(1.0, -bits));
    for (int x = 0; x < width_; ++x) {
        const float* weights = across_.weights.data() + static_cast<std::size_t>(x) * across_.taps;
        std::int16_t* to = quad_weights_.data() + 4 * static_cast<std::size_t>(quads_) * x;
        // What rounding leaves of one goes to the next, so that even colours stay as they are.
        const double total = std::accumulate(weights, weights + across_.count[x], 0.0);
        double sum = 0;
        for (int k = 0, before = 0; k < across_.count[x]; ++k) {
            sum += weights[k];
            const int rounded = static_cast<int>(std::lround(std::ldexp(sum / total, bits)));
            to[k] = static_cast<std::int16_t>(rounded - before);
            before = rounded;
        }
    }
}

Region Resampler::wanted() const {
    const auto end = [](const Filter& filter) {
        int last = 0;
        for (std::size_t i = 0; i < filter.first.size(); ++i) last = std::max(last, filter.first[i] + filter.count[i]);
        return last;
    };
    const int top = down_.first.front(), left = across_.first.front();
    return {top, left, end(down_) - top, end(across_) - left};
}

void Resampler::begin(const Region& given) {
    for (int& first : across_.first) first -= given.left;
    rows_in_ = given.top;
    given_ = given.width;
    row_ = Row(given.width + 4 * quads_);  // what has no weight is read too
    length_ = padded(down_first_ ? given.width : width_);
    ring_.resize(static_cast<std::size_t>(ring_rows_) * (length_ + apart));
    summed_.resize(length_);
    if (down_first_) resized_.resize(padded(width_));
    if (across_.taps > most_taps) floats_.resize(4 * static_cast<std::size_t>(given_));
}

void Resampler::commit() {
    float* const to = ring_row(rows_in_++);
    if (down_first_) {
        to_floats(row_.data(), 4 * static_cast<std::size_t>(given_), to);
    } else if (across_.taps > most_taps) {
        to_floats(row_.data(), 4 * static_cast<std::size_t>(given_), floats_.data());
        resample_floats(floats_.data(), across_, width_, to);
        clamp(4 * static_cast<std::size_t>(width_), to);
    } else {
        resample_row(row_.data(), across_.first.data(), quad_weights_.data(), quads_, width_, unit_, to);
    }
}

bool Resampler::ready() const {
    return rows_out_ < static_cast<int>(down_.first.size()) &&
           rows_in_ >= down_.first[rows_out_] + down_.count[rows_out_];
}

const float* Resampler::take() {
    const int y = rows_out_++, count = down_.count[y];
    for (int k = 0; k < count; ++k) taps_[k] = ring_row(down_.first[y] + k);
    blend_rows(taps_.data(), down_.weights.data() + static_cast<std::size_t>(y) * down_.taps, count, length_,
               summed_.data());
    if (!down_first_) return summed_.data();
    clamp(4 * static_cast<std::size_t>(given_), summed_.data());
    resample_floats(summed_.data(), across_, width_, resized_.data());
    return resized_.data();
}

}  // namespace polydpo

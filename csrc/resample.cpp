#include "resample.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.hpp"

namespace polydpo {
namespace {

typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));  // two pixels
typedef float Floats16 __attribute__((vector_size(64)));

// One row across: four taps, that is four neighbouring pixels, at a time; so many times if `known`. `weights` has
// 4 * quads for each output, those beyond its taps 0.
template <int known>
POLYDPO_INLINE void resample_row(const std::uint8_t* in, const int* first, const float* weights, int quads, int width,
                                 float* out) {
    if (known > 0) quads = known;
    for (int x = 0; x < width; ++x) {
        const std::uint8_t* from = in + 4 * static_cast<std::ptrdiff_t>(first[x]);
        Floats8 sums[2] = {};
        for (int k = 0; k < quads; ++k, from += 16, weights += 4) {
            float values[16];
            for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(static_cast<int>(from[i]));
            Floats8 pixels[2];
            std::memcpy(pixels, values, sizeof pixels);
            const float a = weights[0], b = weights[1], c = weights[2], d = weights[3];
            sums[0] += Floats8{a, a, a, a, b, b, b, b} * pixels[0];
            sums[1] += Floats8{c, c, c, c, d, d, d, d} * pixels[1];
        }
        const Floats8 both = sums[0] + sums[1];
        Floats4 halves[2];
        std::memcpy(halves, &both, sizeof both);
        const Floats4 pixel = halves[0] + halves[1];
        std::memcpy(out + 4 * static_cast<std::size_t>(x), &pixel, sizeof pixel);
    }
    for (int i = 0; i < 4 * width; ++i) out[i] = std::min(std::max(out[i], 0.0f), 255.0f);
}

POLYDPO_CLONES void resample_row(const std::uint8_t* in, const int* first, const float* weights, int quads, int width,
                                 float* out) {
    switch (quads) {
        case 1: return resample_row<1>(in, first, weights, 1, width, out);
        case 2: return resample_row<2>(in, first, weights, 2, width, out);
        default: return resample_row<0>(in, first, weights, quads, width, out);
    }
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

}  // namespace

std::int64_t Resampler::memory(Size source, Size resized, const Region& crop, Interpolation kind) {
    const std::int64_t across = taps_of(support_of(kind, source.width, resized.width));
    const std::int64_t down = taps_of(support_of(kind, source.height, resized.height));
    const std::int64_t weights = crop.width * (across + across + 3) + crop.height * down;
    const std::int64_t length = padded(crop.width) + apart;
    const std::int64_t rows = length * (std::min<std::int64_t>(down, source.height) + 1) + source.width + across;
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

Resampler::Resampler(Size source, Size resized, const Region& crop, Interpolation kind)
    : across_(make_filter(kind, source.width, resized.width, crop.left, crop.width)),
      down_(make_filter(kind, source.height, resized.height, crop.top, crop.height)),
      width_(crop.width),
      ring_rows_(std::min(down_.taps, source.height)),
      length_(padded(crop.width)),
      taps_(down_.taps) {
    quads_ = (*std::max_element(across_.count.begin(), across_.count.end()) + 3) / 4;
    quad_weights_.resize(4 * static_cast<std::size_t>(quads_) * width_);
    for (int x = 0; x < width_; ++x) {
        std::copy_n(across_.weights.data() + static_cast<std::size_t>(x) * across_.taps, across_.count[x],
                    quad_weights_.data() + 4 * static_cast<std::size_t>(quads_) * x);
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
    row_ = Row(given.width + 4 * quads_);  // what has no weight is read too
    ring_.resize(static_cast<std::size_t>(ring_rows_) * (length_ + apart));
    resized_.resize(length_);
}

void Resampler::commit() {
    resample_row(row_.data(), across_.first.data(), quad_weights_.data(), quads_, width_, ring_row(rows_in_));
    ++rows_in_;
}

bool Resampler::ready() const {
    return rows_out_ < static_cast<int>(down_.first.size()) &&
           rows_in_ >= down_.first[rows_out_] + down_.count[rows_out_];
}

const float* Resampler::take() {
    const int y = rows_out_++, count = down_.count[y];
    for (int k = 0; k < count; ++k) taps_[k] = ring_row(down_.first[y] + k);
    blend_rows(taps_.data(), down_.weights.data() + static_cast<std::size_t>(y) * down_.taps, count,
               length_, resized_.data());
    return resized_.data();
}

}  // namespace polydpo

#include "resample.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.hpp"

namespace polydpo {
namespace {

typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));  // four pixels

// One row across: four taps, that is four neighbouring pixels, at a time. `wide` is scratch for the row in floats.
POLYDPO_CLONES void resample_row(const std::uint8_t* in, int in_width, const int* first, const int* count,
                                 const float* weights, int quads, int width, float* wide, float* out) {
    for (int i = 0; i < 4 * in_width; ++i) wide[i] = static_cast<float>(static_cast<int>(in[i]));
    for (int x = 0; x < width; ++x) {
        const float* from = wide + 4 * static_cast<std::ptrdiff_t>(first[x]);
        Floats16 sum = {};
        for (int k = 0; k < (count[x] + 3) / 4; ++k) {
            Floats16 pixels, weight;
            std::memcpy(&pixels, from + 16 * k, sizeof pixels);
            std::memcpy(&weight, weights + 16 * k, sizeof weight);
            sum += weight * pixels;
        }
        weights += 16 * static_cast<std::size_t>(quads);
        Floats8 halves[2];
        std::memcpy(halves, &sum, sizeof sum);
        const Floats8 both = halves[0] + halves[1];
        Floats4 quarters[2];
        std::memcpy(quarters, &both, sizeof both);
        const Floats4 pixel = quarters[0] + quarters[1], low = {}, high = low + 255.0f;
        const Floats4 clamped = pixel < low ? low : pixel > high ? high : pixel;
        std::memcpy(out + 4 * static_cast<std::size_t>(x), &clamped, sizeof clamped);
    }
}

// out[i] = sum over k of weights[k] * rows[k][i]: down.
POLYDPO_CLONES void blend_rows(const float* const* rows, const float* weights, int count, int length, float* out) {
    constexpr int chunk = 64;  // accumulators that stay in registers while all rows are added
    for (int start = 0; start < length; start += chunk) {
        float sum[chunk] = {};
        const int n = std::min(chunk, length - start);
        if (n == chunk) {
            for (int k = 0; k < count; ++k) {
                const float* row = rows[k] + start;
                const float weight = weights[k];
                for (int i = 0; i < chunk; ++i) sum[i] += weight * row[i];
            }
        } else {
            for (int k = 0; k < count; ++k) {
                for (int i = 0; i < n; ++i) sum[i] += weights[k] * rows[k][start + i];
            }
        }
        std::copy(sum, sum + n, out + start);
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
    const std::int64_t weights = crop.width * (across + 4 * (across + 3)) + crop.height * down;
    const std::int64_t rows = 4 * crop.width * (std::min<std::int64_t>(down, source.height) + 1) + 5 * std::int64_t{source.width};
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
      stride_(4 * static_cast<std::size_t>(crop.width)),
      taps_(down_.taps) {
    quads_ = (across_.taps + 3) / 4;
    quad_weights_.resize(16 * static_cast<std::size_t>(quads_) * width_);
    for (int x = 0; x < width_; ++x) {
        float* out = quad_weights_.data() + 16 * static_cast<std::size_t>(quads_) * x;
        for (int k = 0; k < across_.taps; ++k) {
            std::fill_n(out + 4 * k, 4, across_.weights[static_cast<std::size_t>(x) * across_.taps + k]);
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
    row_ = Row(given.width);
    wide_.resize(4 * static_cast<std::size_t>(given.width) + 12);  // the last tap's partners may lie outside
    ring_.resize(static_cast<std::size_t>(ring_rows_) * stride_);
    resized_.resize(stride_);
}

void Resampler::commit() {
    resample_row(row_.data(), row_.width(), across_.first.data(), across_.count.data(), quad_weights_.data(), quads_,
                 width_, wide_.data(), ring_row(rows_in_));
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
               static_cast<int>(stride_), resized_.data());
    return resized_.data();
}

}  // namespace polydpo

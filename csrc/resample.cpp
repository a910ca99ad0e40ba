#include "resample.hpp"

#include <algorithm>
#include <cmath>

#include "simd.hpp"

namespace polydpo {
namespace {

typedef float Pixel __attribute__((vector_size(16), aligned(4), may_alias));  // R, G, B, X

// out[i] = sum over k of weights[k] * rows[k][i]: the vertical pass.
POLYDPO_CLONES void blend_rows(const std::uint8_t* const* rows, const float* weights, int count, int length,
                               float* out) {
    constexpr int chunk = 64;  // accumulators that stay in registers while all rows are added
    for (int start = 0; start < length; start += chunk) {
        float sum[chunk] = {};
        const int n = std::min(chunk, length - start);
        if (n == chunk) {
            for (int k = 0; k < count; ++k) {
                const std::uint8_t* row = rows[k] + start;
                const float weight = weights[k];
                for (int i = 0; i < chunk; ++i) sum[i] += weight * static_cast<float>(row[i]);
            }
        } else {
            for (int k = 0; k < count; ++k) {
                for (int i = 0; i < n; ++i) sum[i] += weights[k] * static_cast<float>(rows[k][start + i]);
            }
        }
        std::copy(sum, sum + n, out + start);
    }
}

// The horizontal pass: one pixel is one vector.
POLYDPO_CLONES void resample_row(const float* in, const int* first, const int* count, const float* weights, int taps,
                                 int width, float* out) {
    for (int x = 0; x < width; ++x) {
        const float* from = in + 4 * static_cast<std::size_t>(first[x]);
        Pixel sum = {};
        for (int k = 0; k < count[x]; ++k) {
            sum += weights[k] * *reinterpret_cast<const Pixel*>(from + 4 * static_cast<std::size_t>(k));
        }
        *reinterpret_cast<Pixel*>(out + 4 * static_cast<std::size_t>(x)) = sum;
        weights += taps;
    }
}

}  // namespace

Filter triangle_filter(int source, int resized, int offset, int length) {
    const double scale = static_cast<double>(source) / resized;
    const double support = std::max(scale, 1.0);
    Filter filter;
    filter.taps = static_cast<int>(std::ceil(support)) * 2 + 1;
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
            weights[k] = std::max(0.0, 1.0 - std::abs((first + k + 0.5 - centre) / support));
            total += weights[k];
        }
        filter.first[i] = first;
        filter.count[i] = end - first;
        float* out = filter.weights.data() + static_cast<std::size_t>(i) * filter.taps;
        for (int k = 0; k < end - first; ++k) out[k] = static_cast<float>(weights[k] / total);
    }
    return filter;
}

Resampler::Resampler(Size source, const Geometry& geometry, Size output)
    : across_(triangle_filter(source.width, geometry.resized.width, geometry.left, output.width)),
      down_(triangle_filter(source.height, geometry.resized.height, geometry.top, output.height)),
      width_(output.width),
      ring_rows_(std::min(down_.taps, source.height)),
      stride_(4 * static_cast<std::size_t>(source.width)),
      ring_(ring_rows_ * stride_),
      blended_(stride_),
      resized_(4 * static_cast<std::size_t>(output.width)),
      taps_(down_.taps) {}

std::uint8_t* Resampler::next_row() { return ring_row(rows_in_); }

bool Resampler::ready() const {
    return rows_out_ < static_cast<int>(down_.first.size()) &&
           rows_in_ >= down_.first[rows_out_] + down_.count[rows_out_];
}

const float* Resampler::take() {
    const int y = rows_out_++, count = down_.count[y];
    for (int k = 0; k < count; ++k) taps_[k] = ring_row(down_.first[y] + k);
    blend_rows(taps_.data(), down_.weights.data() + static_cast<std::size_t>(y) * down_.taps, count,
               static_cast<int>(stride_), blended_.data());
    resample_row(blended_.data(), across_.first.data(), across_.count.data(), across_.weights.data(), across_.taps,
                 width_, resized_.data());
    return resized_.data();
}

}  // namespace polydpo

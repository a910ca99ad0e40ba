// The rest of csrc/ is built with -ffp-contract=off, so that decoded pixels are the same on every processor. The loss
// promises no such thing: a fused multiply-add is faster, and rounds once less.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "loss.hpp"

#include <sys/mman.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "floats.hpp"
#include "pool.hpp"
#include "simd.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(POLYDPO_NO_CLONES)
#define POLYDPO_F16C_BUILD
#include <immintrin.h>
#endif

namespace polydpo {
namespace {

// A sample is cut into splits of this many elements, whatever the batch and the number of threads: a pair's sums are
// the same bit for bit in any company. Within a split, 32 float32 accumulators take turns; they are emptied into
// doubles every `chunk` elements, so that none adds more than 64 terms.
constexpr std::int64_t split_size = 1 << 15;
constexpr int chunk = 2048;

// Threads are not worth waking for less work than this, in elements of one tensor.
constexpr std::int64_t elements_per_thread = 1 << 16;

// A gradient of this size or more goes past the caches to memory. Four times as much passes through them in a step:
// what was written first would be gone before anybody reads it, and would have pushed out something else.
constexpr std::size_t streamed_bytes = 4 << 20;

struct Sums {
    double model = 0, excess = 0;
};

// The same in eight lanes.
struct VectorSums {
    Doubles model = {}, excess = {};

    POLYDPO_INLINE void add_to(Sums& sums) const {
        for (int l = 0; l < 8; ++l) {
            sums.model += model[l];
            sums.excess += excess[l];
        }
    }
};

POLYDPO_INLINE Doubles in_double(const Doubles& values) { return values; }

POLYDPO_INLINE Doubles in_double(const Floats& values) {
    typedef float Half __attribute__((vector_size(32)));
    Half halves[2];
    std::memcpy(halves, &values, sizeof halves);
    return __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
}

// The hardware's prefetchers stop at the end of a page; three streams in turns have many ends.
template <bool once = false>
POLYDPO_INLINE void prefetch(const void* at) {
    constexpr std::ptrdiff_t ahead = 2048;
    constexpr int locality = once ? 0 : 3;
    __builtin_prefetch(static_cast<const char*>(at) + ahead, 0, locality);
    __builtin_prefetch(static_cast<const char*>(at) + ahead + 64, 0, locality);
}

// Stores a multiple of 16 bytes past the caches, at a multiple of 16.
template <std::size_t bytes>
POLYDPO_INLINE void stream(const void* from, void* to) {
#ifdef __SSE2__
    for (std::size_t i = 0; i < bytes / 16; ++i) {
        _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
    }
#else
    std::memcpy(to, from, bytes);
#endif
}

POLYDPO_INLINE void end_of_stream() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// Members, not arrays that a lambda refers to: those the compiler would write to memory at each step.
template <class Vector>
struct Accumulators {
    Vector model_even = {}, model_odd = {}, excess_even = {}, excess_odd = {};

    template <bool has_ref, class P, class R, class T>
    POLYDPO_INLINE void add(const P* pred, const R* ref, const T* target) {
        const Block<Vector> p = load(pred), t = load_beside<P>(target);
        const Vector even = p.even - t.even, odd = p.odd - t.odd;
        model_even += even * even;
        model_odd += odd * odd;
        if (has_ref) {
            const Block<Vector> r = load_beside<P>(ref);
            // (p - t)^2 - (r - t)^2 without the difference of nearly equal numbers.
            const Vector even_step = p.even - r.even, odd_step = p.odd - r.odd;
            excess_even += even_step * (2 * even - even_step);
            excess_odd += odd_step * (2 * odd - odd_step);
        }
    }
};

// Sums of one arm over n <= chunk elements. Vector is what they are added up in.
template <class Vector, bool has_ref, class P, class R, class T>
POLYDPO_INLINE void add_chunk(const P* pred, const R* ref, const T* target, int n, VectorSums& sums) {
    constexpr int size = Block<Vector>::size;
    Accumulators<Vector> found;
    int i = 0;
    for (; i + size <= n; i += size) {
        prefetch(pred + i);
        if (has_ref) prefetch<true>(ref + i);  // the gradient does not need it: leave the cache to the others
        prefetch(target + i);
        found.template add<has_ref>(pred + i, ref + i, target + i);
    }
    if (i < n) {  // zeros add nothing
        P last_pred[size] = {};
        R last_ref[size] = {};
        T last_target[size] = {};
        std::copy(pred + i, pred + n, last_pred);
        std::copy(target + i, target + n, last_target);
        if (has_ref) std::copy(ref + i, ref + n, last_ref);
        found.template add<has_ref>(last_pred, last_ref, last_target);
    }
    sums.model += in_double(found.model_even) + in_double(found.model_odd);
    if (has_ref) sums.excess += in_double(found.excess_even) + in_double(found.excess_odd);
}

// Both arms of [begin, end): add(pred, ref, target, n, sums) takes a chunk, with null where there is no reference. A
// target shared by both arms is read from memory once: they take turns, chunk by chunk. Else one arm after the other,
// which leaves the hardware's prefetchers half the streams to follow.
template <class P, class R, class T, class Add>
POLYDPO_INLINE void add_range(const Arms& pred, const Arms& ref, const Arms& target, std::int64_t pair,
                              std::int64_t begin, std::int64_t end, Sums& win, Sums& lose, Add add) {
    const std::int64_t p = pair * pred.stride, r = pair * ref.stride, t = pair * target.stride;
    const std::int64_t turn = target.win == target.lose ? chunk : end - begin;
    VectorSums sums[2];
    for (std::int64_t from = begin; from < end; from += turn) {
        const std::int64_t to = std::min(from + turn, end);
        for (int arm = 0; arm < 2; ++arm) {
            const auto of = [arm](const Arms& arms) { return arm == 0 ? arms.win : arms.lose; };
            for (std::int64_t at = from; at < to; at += chunk) {
                add(static_cast<const P*>(of(pred)) + p + at,
                    ref.win ? static_cast<const R*>(of(ref)) + r + at : nullptr,
                    static_cast<const T*>(of(target)) + t + at,
                    static_cast<int>(std::min<std::int64_t>(chunk, to - at)),
                    sums[arm]);
            }
        }
    }
    sums[0].add_to(win);
    sums[1].add_to(lose);
}

template <bool streamed, class Vector, class P, class T>
POLYDPO_INLINE void scale_range(const P* pred, const T* target, double scale, std::int64_t n, P* grad) {
    constexpr int size = Block<Vector>::size;
    using Value = std::remove_reference_t<decltype(Vector{}[0])>;
    // Whatever NaN it is: one without a payload, which rounding to bfloat16 would take for digits.
    const Vector factor =
        Vector{} + (std::isnan(scale) ? std::numeric_limits<Value>::quiet_NaN() : static_cast<Value>(scale));
    const auto scaled = [&](const P* pred, const T* target) __attribute__((always_inline)) {
        const Block<Vector> p = load(pred), t = load_beside<P>(target);
        return Block<Vector>{factor * (p.even - t.even), factor * (p.odd - t.odd)};
    };
    std::int64_t i = 0;
    for (; i + size <= n; i += size) {
        prefetch(pred + i);
        prefetch(target + i);
        if (streamed) {
            P block[size];
            store(block, scaled(pred + i, target + i));
            stream<sizeof block>(block, grad + i);
        } else {
            store(grad + i, scaled(pred + i, target + i));
        }
    }
    if (i < n) {
        P last_pred[size] = {}, last_grad[size];
        T last_target[size] = {};
        std::copy(pred + i, pred + n, last_pred);
        std::copy(target + i, target + n, last_target);
        store(last_grad, scaled(last_pred, last_target));
        std::copy(last_grad, last_grad + (n - i), grad + i);
    }
    if (streamed) end_of_stream();
}

#define POLYDPO_RANGE                                                                                            \
    const Arms &pred, const Arms &ref, const Arms &target, std::int64_t pair, std::int64_t begin, std::int64_t end, \
        Sums &win, Sums &lose
using Add = void (*)(POLYDPO_RANGE);
using Scale = void (*)(const void* pred, const void* target, double scale, std::int64_t n, void* grad);

#define POLYDPO_ADD(name, Vector, has_ref, P, R, T)                                                                \
    POLYDPO_CLONES void name(POLYDPO_RANGE) {                                                                      \
        add_range<P, R, T>(pred, ref, target, pair, begin, end, win, lose,                                         \
                           [](const P* p, const R* r, const T* t, int n, VectorSums& sums)                         \
                               __attribute__((always_inline)) { add_chunk<Vector, has_ref>(p, r, t, n, sums); });  \
    }
POLYDPO_ADD(add_bfloat16, Floats, true, Bfloat16, Bfloat16, Bfloat16)
POLYDPO_ADD(add_float32, Floats, true, Float32, Float32, Float32)
POLYDPO_ADD(add_float64, Doubles, true, Float64, Float64, Float64)
POLYDPO_ADD(add_bfloat16_alone, Floats, false, Bfloat16, Bfloat16, Bfloat16)
POLYDPO_ADD(add_float32_alone, Floats, false, Float32, Float32, Float32)
POLYDPO_ADD(add_float64_alone, Doubles, false, Float64, Float64, Float64)
// A policy under autocast, and what is not.
POLYDPO_ADD(add_autocast, Floats, true, Float32, Bfloat16, Bfloat16)
POLYDPO_ADD(add_autocast_ref, Floats, true, Float32, Bfloat16, Float32)
POLYDPO_ADD(add_autocast_target, Floats, true, Float32, Float32, Bfloat16)
POLYDPO_ADD(add_autocast_alone, Floats, false, Float32, Float32, Bfloat16)

#define POLYDPO_SCALE(name, streamed, Vector, P, T)                                                            \
    POLYDPO_CLONES void name(const void* pred, const void* target, double scale, std::int64_t n, void* grad) { \
        scale_range<streamed, Vector>(static_cast<const P*>(pred), static_cast<const T*>(target), scale, n,    \
                                      static_cast<P*>(grad));                                                  \
    }
POLYDPO_SCALE(scale_bfloat16, false, Floats, Bfloat16, Bfloat16)
POLYDPO_SCALE(scale_float32, false, Floats, Float32, Float32)
POLYDPO_SCALE(scale_float64, false, Doubles, Float64, Float64)
POLYDPO_SCALE(scale_autocast, false, Floats, Float32, Bfloat16)
POLYDPO_SCALE(stream_bfloat16, true, Floats, Bfloat16, Bfloat16)
POLYDPO_SCALE(stream_float32, true, Floats, Float32, Float32)
POLYDPO_SCALE(stream_float64, true, Doubles, Float64, Float64)
POLYDPO_SCALE(stream_autocast, true, Floats, Float32, Bfloat16)

// ------------------------------------------------------------------------------------------------------ float16
//
// The processor's own conversions, eight at a time. Results differ from ours only in the payload of a NaN.

#ifdef POLYDPO_F16C_BUILD
#define POLYDPO_F16C __attribute__((target("avx2,fma,f16c")))

const bool has_f16c =
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");

POLYDPO_F16C inline __m256 load_halves(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

POLYDPO_F16C inline __m128i to_halves(__m256 values) { return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT); }

POLYDPO_F16C void halves_to_float32(const void* from, int n, Float32* to) {
    const auto* halves = static_cast<const Float16*>(from);
    int i = 0;
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(&to[i].value, load_halves(halves + i));
    for (; i < n; ++i) to[i].value = halves[i].get();
}

POLYDPO_F16C void float32_to_halves(const Float32* from, int n, void* to) {
    auto* halves = static_cast<Float16*>(to);
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves + i), to_halves(_mm256_loadu_ps(&from[i].value)));
    }
    for (; i < n; ++i) halves[i] = Float16::set(from[i].value);
}

// Sums of one arm over n <= chunk elements, as add_chunk.
POLYDPO_F16C void add_halves_chunk(const Float16* pred, const Float16* ref, const Float16* target, int n,
                                   VectorSums& sums) {
    __m256 model[4] = {}, excess[4] = {};
    Float16 last[3][8] = {};  // zeros add nothing
    const auto* r = ref ? ref : pred;
    for (int i = 0; i < n; i += 32) {
        prefetch(pred + i);
        if (ref) prefetch<true>(ref + i);
        prefetch(target + i);
        for (int k = 0; k < 4; ++k) {
            const int at = i + 8 * k;
            if (at >= n) break;
            const Float16 *p_at = pred + at, *r_at = r + at, *t_at = target + at;
            if (at + 8 > n) {
                const std::size_t left = sizeof(Float16) * static_cast<std::size_t>(n - at);
                std::memcpy(last[0], p_at, left);
                std::memcpy(last[1], r_at, left);
                std::memcpy(last[2], t_at, left);
                p_at = last[0], r_at = last[1], t_at = last[2];
            }
            const __m256 p = load_halves(p_at), difference = _mm256_sub_ps(p, load_halves(t_at));
            model[k] = _mm256_fmadd_ps(difference, difference, model[k]);
            const __m256 step = _mm256_sub_ps(p, load_halves(r_at));
            const __m256 both = _mm256_fmsub_ps(_mm256_set1_ps(2), difference, step);
            excess[k] = _mm256_fmadd_ps(step, both, excess[k]);
        }
    }
    float lanes[2][8];
    for (int k = 0; k < 4; ++k) {
        _mm256_storeu_ps(lanes[0], model[k]);
        _mm256_storeu_ps(lanes[1], excess[k]);
        for (int l = 0; l < 8; ++l) {
            sums.model[l] += static_cast<double>(lanes[0][l]);
            if (ref) sums.excess[l] += static_cast<double>(lanes[1][l]);
        }
    }
}

void add_halves(POLYDPO_RANGE) {
    add_range<Float16, Float16, Float16>(pred, ref, target, pair, begin, end, win, lose, add_halves_chunk);
}

template <bool streamed>
POLYDPO_F16C void scale_halves(const void* pred, const void* target, double scale, std::int64_t n, void* grad) {
    const auto *p = static_cast<const Float16*>(pred), *t = static_cast<const Float16*>(target);
    auto* to = static_cast<Float16*>(grad);
    const auto value = static_cast<float>(scale);
    const __m256 factor = _mm256_set1_ps(value);
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i scaled = to_halves(_mm256_mul_ps(factor, _mm256_sub_ps(load_halves(p + i), load_halves(t + i))));
        if (streamed) {
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), scaled);
        } else {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), scaled);
        }
    }
    for (; i < n; ++i) to[i] = Float16::set(value * (p[i].get() - t[i].get()));
    if (streamed) end_of_stream();
}
#endif

// Null where the processor does not convert.
Add add_float16() {
#ifdef POLYDPO_F16C_BUILD
    if (has_f16c) return add_halves;
#endif
    return nullptr;
}

Scale scale_float16([[maybe_unused]] bool streamed) {
#ifdef POLYDPO_F16C_BUILD
    if (has_f16c) return streamed ? scale_halves<true> : scale_halves<false>;
#endif
    return nullptr;
}

// ------------------------------------------------------------------------------------- through the first-level cache
//
// Mixed dtypes and masks, and float16 where the processor does not convert it: a piece of an arm at a time is converted
// to the dtype that is computed in, and back. Three pieces leave room in a cache of 32 KB for what they are made from.
constexpr int piece = 512;

template <class Wide, class Narrow>
POLYDPO_INLINE void widen_chunk(const void* from, int n, Wide* to) {
    using Value = decltype(to->value);
    for (int i = 0; i < n; ++i) to[i].value = static_cast<Value>(static_cast<const Narrow*>(from)[i].get());
}

template <class Wide, class Narrow>
POLYDPO_INLINE void narrow_chunk(const Wide* from, int n, void* to) {
    for (int i = 0; i < n; ++i) static_cast<Narrow*>(to)[i] = Narrow::set(static_cast<float>(from[i].value));
}

template <class Wide>
POLYDPO_INLINE void clear_chunk(const std::uint8_t* mask, int n, Wide* values) {
    for (int i = 0; i < n; ++i) values[i].value = mask[i] ? values[i].value : 0;
}

#define POLYDPO_CONVERT(dtype, wide, Narrow, Wide)                                \
    POLYDPO_CLONES void dtype##_to_##wide(const void* from, int n, Wide* to) {    \
        widen_chunk<Wide, Narrow>(from, n, to);                                   \
    }                                                                             \
    POLYDPO_CLONES void wide##_to_##dtype(const Wide* from, int n, void* to) {    \
        narrow_chunk<Wide, Narrow>(from, n, to);                                  \
    }
POLYDPO_CONVERT(bfloat16, float32, Bfloat16, Float32)
POLYDPO_CONVERT(float16, float32, Float16, Float32)
POLYDPO_CONVERT(bfloat16, float64, Bfloat16, Float64)
POLYDPO_CONVERT(float16, float64, Float16, Float64)
POLYDPO_CONVERT(float32, float64, Float32, Float64)

#define POLYDPO_CHUNK(wide, Wide, Vector)                                                            \
    POLYDPO_CLONES void clear_##wide(const std::uint8_t* mask, int n, Wide* values) {                \
        clear_chunk(mask, n, values);                                                                \
    }                                                                                                \
    POLYDPO_CLONES void add_##wide##_chunk(const Wide* pred, const Wide* ref, const Wide* target,    \
                                           int n, VectorSums& sums) {                                \
        if (ref) return add_chunk<Vector, true>(pred, ref, target, n, sums);                         \
        add_chunk<Vector, false>(pred, ref, target, n, sums);                                        \
    }
POLYDPO_CHUNK(float32, Float32, Floats)
POLYDPO_CHUNK(float64, Float64, Doubles)

POLYDPO_CLONES int count_kept(const std::uint8_t* mask, int n) {
    int kept = 0;
    for (int i = 0; i < n; ++i) kept += mask[i] != 0;
    return kept;
}

void widen(const void* from, Float dtype, int n, Float32* to) {
#ifdef POLYDPO_F16C_BUILD
    if (dtype == Float::float16 && has_f16c) return halves_to_float32(from, n, to);
#endif
    if (dtype == Float::float32) {
        std::memcpy(to, from, sizeof *to * static_cast<std::size_t>(n));
    } else {
        (dtype == Float::bfloat16 ? bfloat16_to_float32 : float16_to_float32)(from, n, to);
    }
}

void widen(const void* from, Float dtype, int n, Float64* to) {
    switch (dtype) {
        case Float::bfloat16: return bfloat16_to_float64(from, n, to);
        case Float::float16: return float16_to_float64(from, n, to);
        case Float::float32: return float32_to_float64(from, n, to);
        case Float::float64: std::memcpy(to, from, sizeof *to * static_cast<std::size_t>(n));
    }
}

void narrow(const Float32* from, Float dtype, int n, void* to) {
#ifdef POLYDPO_F16C_BUILD
    if (dtype == Float::float16 && has_f16c) return float32_to_halves(from, n, to);
#endif
    if (dtype == Float::float32) {
        std::memcpy(to, from, sizeof *from * static_cast<std::size_t>(n));
    } else {
        (dtype == Float::bfloat16 ? float32_to_bfloat16 : float32_to_float16)(from, n, to);
    }
}

void narrow(const Float64* from, Float dtype, int n, void* to) {
    switch (dtype) {
        case Float::bfloat16: return float64_to_bfloat16(from, n, to);
        case Float::float16: return float64_to_float16(from, n, to);
        case Float::float32: return float64_to_float32(from, n, to);
        case Float::float64: std::memcpy(to, from, sizeof *from * static_cast<std::size_t>(n));
    }
}

std::size_t size_of(Float dtype) { return dtype == Float::float64 ? 8 : dtype == Float::float32 ? 4 : 2; }

template <class Wide>
constexpr Float dtype_of = sizeof(Wide) == 8 ? Float::float64 : Float::float32;

// n elements of an arm as they are computed with, masked ones 0: where they are, or in the buffer.
template <class Wide>
const Wide* widened(const void* arm, Float dtype, std::int64_t at, int n, const std::uint8_t* mask, Wide* buffer) {
    const std::size_t size = size_of(dtype), bytes = size * static_cast<std::size_t>(n);
    const char* from = static_cast<const char*>(arm) + static_cast<std::size_t>(at) * size;
    if (dtype == dtype_of<Wide> && !mask) return reinterpret_cast<const Wide*>(from);
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + bytes + i, 0, 2);  // the next chunk
    widen(from, dtype, n, buffer);
    if (mask) {
        if constexpr (sizeof(Wide) == 8) clear_float64(mask, n, buffer);
        else clear_float32(mask, n, buffer);
    }
    return buffer;
}

template <class Wide>
void add_converted(const Batch& batch, std::int64_t pair, std::int64_t begin, std::int64_t end, Sums& win, Sums& lose,
                   double& elements) {
    alignas(64) Wide pred_buffer[piece], ref_buffer[piece], target_buffer[piece];
    VectorSums sums[2];
    for (std::int64_t at = begin; at < end; at += piece) {
        const int n = static_cast<int>(std::min<std::int64_t>(piece, end - at));
        const std::uint8_t* mask = batch.mask ? batch.mask + pair * batch.mask_stride + at : nullptr;
        if (mask) elements += count_kept(mask, n);
        const Wide* target = nullptr;
        for (int arm = 0; arm < 2; ++arm) {
            const auto of = [&](const Arms& arms, Wide* buffer) {
                return widened(arm == 0 ? arms.win : arms.lose, arms.dtype, pair * arms.stride + at, n, mask, buffer);
            };
            const Wide* pred = of(batch.pred, pred_buffer);
            const Wide* ref = batch.ref.win ? of(batch.ref, ref_buffer) : nullptr;
            if (arm == 0 || batch.target.win != batch.target.lose) target = of(batch.target, target_buffer);
            if constexpr (sizeof(Wide) == 8) add_float64_chunk(pred, ref, target, n, sums[arm]);
            else add_float32_chunk(pred, ref, target, n, sums[arm]);
        }
    }
    sums[0].add_to(win);
    sums[1].add_to(lose);
}

// What reads elements as they are, or null where they must be converted.
Add add_as_they_are(const Batch& batch) {
    if (batch.mask) return nullptr;
    const bool has_ref = batch.ref.win != nullptr;
    const Float pred = batch.pred.dtype, target = batch.target.dtype, ref = has_ref ? batch.ref.dtype : pred;
    if (pred == target && pred == ref) {
        switch (pred) {
            case Float::bfloat16: return has_ref ? add_bfloat16 : add_bfloat16_alone;
            case Float::float32: return has_ref ? add_float32 : add_float32_alone;
            case Float::float64: return has_ref ? add_float64 : add_float64_alone;
            case Float::float16: return add_float16();
        }
    }
    const auto fits = [](Float dtype) { return dtype == Float::float32 || dtype == Float::bfloat16; };
    if (pred != Float::float32 || !fits(target) || !fits(ref)) return nullptr;
    if (!has_ref) return add_autocast_alone;
    return target == Float::float32 ? add_autocast_ref : ref == Float::float32 ? add_autocast_target : add_autocast;
}

void add_split(const Batch& batch, std::int64_t pair, std::int64_t begin, std::int64_t end, Sums& win, Sums& lose,
               double& elements) {
    if (const Add add = add_as_they_are(batch)) {
        return add(batch.pred, batch.ref, batch.target, pair, begin, end, win, lose);
    }
    const auto add = batch.accumulate_in_double ? add_converted<Float64> : add_converted<Float32>;
    add(batch, pair, begin, end, win, lose, elements);
}

// grad = scale (pred - target) for one arm of a split.
template <class Wide>
void scale_converted(const Batch& batch, const void* pred_arm, const void* target_arm, std::int64_t pair,
                     std::int64_t begin, std::int64_t end, double scale, bool streamed, char* grad) {
    alignas(64) Wide pred_buffer[piece], target_buffer[piece];
    alignas(64) char narrowed[piece * sizeof(Wide)];
    const Float dtype = batch.pred.dtype;
    for (std::int64_t at = begin; at < end; at += piece) {
        const int n = static_cast<int>(std::min<std::int64_t>(piece, end - at));
        const std::size_t bytes = size_of(dtype) * static_cast<std::size_t>(n);
        const std::uint8_t* mask = batch.mask ? batch.mask + pair * batch.mask_stride + at : nullptr;
        const Wide* pred = widened<Wide>(pred_arm, dtype, pair * batch.pred.stride + at, n, nullptr, pred_buffer);
        const Wide* target =
            widened<Wide>(target_arm, batch.target.dtype, pair * batch.target.stride + at, n, nullptr, target_buffer);
        if constexpr (sizeof(Wide) == 8) scale_float64(pred, target, scale, n, pred_buffer);
        else scale_float32(pred, target, scale, n, pred_buffer);
        if (mask) {  // no gradient even where what is masked or the scale is NaN
            if constexpr (sizeof(Wide) == 8) clear_float64(mask, n, pred_buffer);
            else clear_float32(mask, n, pred_buffer);
        }
        if (streamed && bytes % 16 == 0) {
            narrow(pred_buffer, dtype, n, narrowed);
            for (std::size_t i = 0; i < bytes; i += 16) stream<16>(narrowed + i, grad + i);
        } else {
            narrow(pred_buffer, dtype, n, grad);
        }
        grad += bytes;
    }
    if (streamed) end_of_stream();
}

Scale scale_as_they_are(const Batch& batch, bool streamed) {
    const Float pred = batch.pred.dtype, target = batch.target.dtype;
    if (batch.mask) return nullptr;
    if (pred == Float::float32 && target == Float::bfloat16) return streamed ? stream_autocast : scale_autocast;
    if (pred != target) return nullptr;
    switch (pred) {
        case Float::bfloat16: return streamed ? stream_bfloat16 : scale_bfloat16;
        case Float::float32: return streamed ? stream_float32 : scale_float32;
        case Float::float64: return streamed ? stream_float64 : scale_float64;
        case Float::float16: return scale_float16(streamed);
    }
    return nullptr;
}

void scale_split(const Batch& batch, const void* pred, const void* target, std::int64_t pair, std::int64_t begin,
                 std::int64_t end, double scale, char* grad) {
    const std::size_t size = size_of(batch.pred.dtype);
    const bool streamed = static_cast<std::size_t>(2 * batch.pairs * batch.numel) * size >= streamed_bytes &&
                          reinterpret_cast<std::uintptr_t>(grad) % 16 == 0;
    const auto from = [&](const void* arm, const Arms& arms) {
        return static_cast<const char*>(arm) +
               static_cast<std::size_t>(pair * arms.stride + begin) * size_of(arms.dtype);
    };
    if (const Scale as_they_are = scale_as_they_are(batch, streamed)) {
        return as_they_are(from(pred, batch.pred), from(target, batch.target), scale, end - begin, grad);
    }
    const auto convert = batch.accumulate_in_double ? scale_converted<Float64> : scale_converted<Float32>;
    convert(batch, pred, target, pair, begin, end, scale, streamed, grad);
}

// A fresh gradient is memory that nobody has touched: at 4 KB a page fault, the faults can cost several times the
// computation. Asks for huge pages where the system gives them on request; elsewhere this does nothing. (Batches of
// pixels do not: on a virtual machine that gives free memory back to its host, huge pages that are taken again seconds
// later cost five times as much as small ones.)
void advise_huge_pages(std::uintptr_t begin, std::uintptr_t end) {
    constexpr std::uintptr_t huge = 1 << 21;
    const std::uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

int threads_for(const Batch& batch) {
    const std::int64_t useful = 2 * batch.pairs * batch.numel / elements_per_thread;
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(batch.threads, useful)));
}

std::int64_t splits_of(const Batch& batch) { return (batch.numel + split_size - 1) / split_size; }

// Calls body(pair, begin, end) for every split of every pair, on PyTorch's threads.
template <class Body>
void for_each_split(const Batch& batch, bool reversed, Body body) {
    const std::int64_t splits = splits_of(batch), all = batch.pairs * splits;
    parallel_for_openmp(static_cast<std::size_t>(all), threads_for(batch), [&](std::size_t index) {
        const std::int64_t at = reversed ? all - 1 - static_cast<std::int64_t>(index) : static_cast<std::int64_t>(index);
        const std::int64_t begin = at % splits * split_size;
        body(at / splits, begin, std::min(begin + split_size, batch.numel));
    });
}

void finish_pair(const Objective& o, std::int64_t i, double scale, double* pair) {
    const double model_w = pair[model_mse_win], model_l = pair[model_mse_lose];
    const double excess_w = pair[excess_win], excess_l = pair[excess_lose], size = pair[elements];
    HeadInputs in;
    in.beta = o.beta ? o.beta[i] : o.beta_value;
    std::copy(o.alphas, o.alphas + 4, in.alpha);
    if (o.alpha) in.alpha[0] = o.alpha[i];
    const double weight = o.weight ? o.weight[i] : 1.0;
    double logit = -0.5 * in.beta * (excess_w - excess_l);
    // An infinite error is no evidence of a preference.
    if (std::isinf(logit)) logit = std::numeric_limits<double>::quiet_NaN();
    in.z = logit - o.margin;
    // Stable sigmoid and softplus of z and -z from e = exp(-|z|) <= 1.
    const double e = std::exp(-std::abs(in.z)), log1p = std::log1p(e);
    const bool positive = in.z >= 0;
    in.p = (positive ? 1.0 : e) / (1.0 + e);
    in.q = (positive ? e : 1.0) / (1.0 + e);
    in.nlp = positive ? log1p : log1p - in.z;
    in.nlq = positive ? log1p + in.z : log1p;
    const LossAndSlope kept = (*o.head)(in);
    LossAndSlope flipped{0.0, 0.0};
    if (o.flip != 0) {
        in.z = -in.z;
        std::swap(in.p, in.q);
        std::swap(in.nlp, in.nlq);
        flipped = (*o.head)(in);
    }
    const double slope = o.keep * kept.slope - o.flip * flipped.slope;
    pair[loss_value] = weight * (o.keep * kept.loss + o.flip * flipped.loss + o.sft_weight * model_w);
    // The metrics, which are not of z but of the logit.
    const double half_beta = 0.5 * in.beta, distance = o.margin == 0 ? e : std::exp(-std::abs(logit));
    pair[implicit_accuracy] = logit > 0 ? 1.0 : logit == 0 ? 0.5 : 0.0;
    pair[reward_win] = -half_beta * excess_w;
    pair[reward_lose] = -half_beta * excess_l;
    pair[reward_margin] = pair[reward_win] - pair[reward_lose];
    pair[logit_mean] = logit;
    pair[p_mean] = (logit >= 0 ? 1.0 : distance) / (1.0 + distance);
    pair[saturated] = std::abs(logit) > 10 ? 1.0 : 0.0;
    pair[false_success] = logit > 0 && excess_w > 0 ? 1.0 : 0.0;
    pair[ref_mse_win] = model_w - excess_w;
    pair[ref_mse_lose] = model_l - excess_l;
    // dL/dpred_w = slope dz/dm_w dm_w/dpred = slope (-beta/2) (2/D) (pred - target), the loser's with +.
    pair[grad_win] = scale * weight / size * (2.0 * o.sft_weight - slope * in.beta);
    pair[grad_lose] = scale * weight / size * slope * in.beta;
}

void finish_batch(const Objective& o, std::int64_t count, const double* pairs, double* total, double* metrics) {
    double sums[1 + metric_count] = {};
    for (std::int64_t i = 0; i < count; ++i, pairs += pair_columns) {
        for (int k = 0; k <= metric_count; ++k) sums[k] += pairs[k];
    }
    const auto n = static_cast<double>(count);
    for (int k = 0; k < metric_count; ++k) metrics[k] = sums[1 + k] / n;
    *total = o.reduction == Objective::mean ? sums[0] / n : sums[0];
}

}  // namespace

void pair_loss(const Batch& batch, const Objective& objective, double* pairs, double* total, double* metrics) {
    const std::int64_t splits = splits_of(batch);
    struct Slot {
        Sums win, lose;
        double elements = 0;
    };
    std::vector<Slot> slots(static_cast<std::size_t>(batch.pairs * splits));
    for_each_split(batch, false, [&](std::int64_t pair, std::int64_t begin, std::int64_t end) {
        Slot& slot = slots[static_cast<std::size_t>(pair * splits + begin / split_size)];
        add_split(batch, pair, begin, end, slot.win, slot.lose, slot.elements);
    });
    const double scale = objective.reduction == Objective::mean ? 1.0 / static_cast<double>(batch.pairs) : 1.0;
    for (std::int64_t i = 0; i < batch.pairs; ++i) {
        Slot sum;
        for (std::int64_t s = 0; s < splits; ++s) {
            const Slot& slot = slots[static_cast<std::size_t>(i * splits + s)];
            sum.win.model += slot.win.model;
            sum.win.excess += slot.win.excess;
            sum.lose.model += slot.lose.model;
            sum.lose.excess += slot.lose.excess;
            sum.elements += slot.elements;
        }
        double* pair = pairs + pair_columns * i;
        const double size = batch.mask ? sum.elements : static_cast<double>(batch.numel);
        pair[model_mse_win] = sum.win.model / size;
        pair[model_mse_lose] = sum.lose.model / size;
        if (batch.ref.win) {
            pair[excess_win] = sum.win.excess / size;
            pair[excess_lose] = sum.lose.excess / size;
        } else {
            pair[excess_win] = pair[model_mse_win] - (objective.ref_error_win ? objective.ref_error_win[i] : 0.0);
            pair[excess_lose] = pair[model_mse_lose] - (objective.ref_error_lose ? objective.ref_error_lose[i] : 0.0);
        }
        pair[elements] = size;
        if (objective.head) finish_pair(objective, i, scale, pair);
    }
    if (objective.head) finish_batch(objective, batch.pairs, pairs, total, metrics);
}

void pair_gradient(const Batch& batch, const double* coefficients, std::int64_t coefficients_stride,
                   const void* grad_loss, bool grad_loss_is_double, std::int64_t grad_loss_stride, void* grad_of_win,
                   void* grad_of_lose, std::int64_t grad_stride) {
    const std::size_t size = size_of(batch.pred.dtype);
    const std::size_t arm = static_cast<std::size_t>((batch.pairs - 1) * grad_stride + batch.numel) * size;
    const auto win_at = reinterpret_cast<std::uintptr_t>(grad_of_win);
    const auto lose_at = reinterpret_cast<std::uintptr_t>(grad_of_lose);
    const auto first = std::min(win_at, lose_at), last = std::max(win_at, lose_at);
    if (last - first <= arm) {  // one tensor of both
        advise_huge_pages(first, last + arm);
    } else {
        advise_huge_pages(first, first + arm);
        advise_huge_pages(last, last + arm);
    }
    // From the last to the first: what the forward pass read last may still be in the cache.
    for_each_split(batch, true, [&](std::int64_t pair, std::int64_t begin, std::int64_t end) {
        const std::int64_t at = pair * grad_loss_stride;
        const double upstream = grad_loss_is_double ? static_cast<const double*>(grad_loss)[at]
                                                    : static_cast<const float*>(grad_loss)[at];
        const double* scales = coefficients + pair * coefficients_stride;
        const std::size_t to = static_cast<std::size_t>(pair * grad_stride + begin) * size;
        scale_split(batch, batch.pred.lose, batch.target.lose, pair, begin, end, upstream * scales[1],
                    static_cast<char*>(grad_of_lose) + to);
        scale_split(batch, batch.pred.win, batch.target.win, pair, begin, end, upstream * scales[0],
                    static_cast<char*>(grad_of_win) + to);
    });
}

}  // namespace polydpo

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

// The head of the loss and the metrics of a pair take as long as the sums of so many elements.
constexpr std::int64_t elements_per_head = 1 << 9;

// A gradient of this size or more goes past the caches to memory. Four times as much passes through them in a step:
// what was written first would be gone before anybody reads it, and would have pushed out something else.
constexpr std::size_t streamed_bytes = 4 << 20;
constexpr std::size_t least_streamed_bytes = 4096;  // of a sample

struct Sums {
    double model = 0, excess = 0;
};

// Of all lanes.
POLYDPO_INLINE double total(const Doubles& lanes) {
    typedef double Four __attribute__((vector_size(32)));
    typedef double Two __attribute__((vector_size(16)));
    Four fours[2];
    std::memcpy(fours, &lanes, sizeof fours);
    fours[0] += fours[1];
    Two twos[2];
    std::memcpy(twos, fours, sizeof twos);
    twos[0] += twos[1];
    return twos[0][0] + twos[0][1];
}

// Sums in eight lanes.
struct VectorSums {
    Doubles model = {}, excess = {};

    POLYDPO_INLINE void add_to(Sums& sums) const {
        sums.model += total(model);
        sums.excess += total(excess);
    }
};

// Of a split of a pair, or of a whole one.
struct PairSums {
    Sums win, lose;
    double elements = 0;  // that count; only kept where there is a mask

    void operator+=(const PairSums& other) {
        win.model += other.win.model;
        win.excess += other.win.excess;
        lose.model += other.lose.model;
        lose.excess += other.lose.excess;
        elements += other.elements;
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

// A mask's bytes, 0 or 1, as bits of the numbers of a block of P; nothing where nothing is masked.
struct NoMask {};

template <bool masked, class P>
POLYDPO_INLINE auto load_mask([[maybe_unused]] const std::uint8_t* mask) {
    if constexpr (!masked) {
        return NoMask{};
    } else {
        typedef std::uint8_t Bytes __attribute__((vector_size(16)));
        typedef std::uint16_t Pairs __attribute__((vector_size(32)));
        Pairs even, odd;
        if constexpr (std::is_same_v<P, Bfloat16>) {
            std::memcpy(&even, mask, sizeof even);
            odd = even >> 8;
            even &= 0xff;
        } else {  // by way of 16 bits: GCC would take the bytes one by one
            Bytes bytes[2];
            std::memcpy(bytes, mask, sizeof bytes);
            even = __builtin_convertvector(bytes[0], Pairs);
            odd = __builtin_convertvector(bytes[1], Pairs);
        }
        // Whatever byte is not 0 keeps, as everywhere else.
        return Block<Words>{reinterpret<Words>(__builtin_convertvector(even, Words) != 0),
                            reinterpret<Words>(__builtin_convertvector(odd, Words) != 0)};
    }
}

template <class Vector>
POLYDPO_INLINE Block<Vector> keep(const Block<Vector>& values, NoMask) {
    return values;
}

// Zeros where masked, whatever was there.
POLYDPO_INLINE Block<Floats> keep(const Block<Floats>& values, const Block<Words>& mask) {
    return {reinterpret<Floats>(reinterpret<Words>(values.even) & mask.even),
            reinterpret<Floats>(reinterpret<Words>(values.odd) & mask.odd)};
}

// Members, not arrays that a lambda refers to: those the compiler would write to memory at each step.
template <class Vector>
struct Accumulators {
    Vector model_even = {}, model_odd = {}, excess_even = {}, excess_odd = {};

    template <bool has_ref, bool masked, class P, class R, class T>
    POLYDPO_INLINE void add(const P* pred, const R* ref, const T* target, const std::uint8_t* mask) {
        const auto m = load_mask<masked, P>(mask);
        const Block<Vector> p = keep(load(pred), m), t = keep(load_beside<P>(target), m);
        const Vector even = p.even - t.even, odd = p.odd - t.odd;
        model_even += even * even;
        model_odd += odd * odd;
        if (has_ref) {
            const Block<Vector> r = keep(load_beside<P>(ref), m);
            // (p - t)^2 - (r - t)^2 without the difference of nearly equal numbers.
            const Vector even_step = p.even - r.even, odd_step = p.odd - r.odd;
            excess_even += even_step * (2 * even - even_step);
            excess_odd += odd_step * (2 * odd - odd_step);
        }
    }
};

// Sums of one arm over n <= chunk elements. Vector is what they are added up in.
template <class Vector, bool has_ref, bool masked = false, class P, class R, class T>
POLYDPO_INLINE void add_chunk(const P* pred, const R* ref, const T* target, int n, VectorSums& sums,
                              const std::uint8_t* mask = nullptr) {
    constexpr int size = Block<Vector>::size;
    Accumulators<Vector> found;
    int i = 0;
    for (; i + size <= n; i += size) {
        prefetch(pred + i);
        if (has_ref) prefetch<true>(ref + i);  // the gradient does not need it: leave the cache to the others
        prefetch(target + i);
        found.template add<has_ref, masked>(pred + i, ref + i, target + i, masked ? mask + i : nullptr);
    }
    if (i < n) {  // zeros add nothing
        P last_pred[size] = {};
        R last_ref[size] = {};
        T last_target[size] = {};
        std::uint8_t last_mask[size] = {};
        std::copy(pred + i, pred + n, last_pred);
        std::copy(target + i, target + n, last_target);
        if (has_ref) std::copy(ref + i, ref + n, last_ref);
        if (masked) std::copy(mask + i, mask + n, last_mask);
        found.template add<has_ref, masked>(last_pred, last_ref, last_target, last_mask);
    }
    sums.model += in_double(found.model_even) + in_double(found.model_odd);
    if (has_ref) sums.excess += in_double(found.excess_even) + in_double(found.excess_odd);
}

// Pairs first ... last - 1, of which each adds what [begin, end) holds to the next of `sums`.
struct Range {
    std::int64_t first, last, begin, end;
};

// Both arms of a range: add(pred, ref, target, n, sums, mask) takes a chunk, with null for what there is not. A target
// shared by both arms is read from memory once: they take turns, chunk by chunk. Else one arm after the other, which
// leaves the hardware's prefetchers half the streams to follow.
template <class P, class R, class T, class Add>
POLYDPO_INLINE void add_range(const Batch& batch, const Range& range, PairSums* sums, Add add) {
    const Arms &pred = batch.pred, &ref = batch.ref, &target = batch.target;
    const std::int64_t turn = target.win == target.lose ? chunk : range.end - range.begin;
    for (std::int64_t pair = range.first; pair < range.last; ++pair, ++sums) {
        const std::int64_t p = pair * pred.stride, r = pair * ref.stride, t = pair * target.stride;
        VectorSums found[2];
        for (std::int64_t from = range.begin; from < range.end; from += turn) {
            const std::int64_t to = std::min(from + turn, range.end);
            for (int arm = 0; arm < 2; ++arm) {
                for (std::int64_t at = from; at < to; at += chunk) {
                    add(static_cast<const P*>(pred.of(arm)) + p + at,
                        ref.win ? static_cast<const R*>(ref.of(arm)) + r + at : nullptr,
                        static_cast<const T*>(target.of(arm)) + t + at,
                        static_cast<int>(std::min<std::int64_t>(chunk, to - at)), found[arm],
                        batch.mask ? batch.mask + pair * batch.mask_stride + at : nullptr);
                }
            }
        }
        found[0].add_to(sums->win);
        found[1].add_to(sums->lose);
    }
}

template <bool streamed, class Vector, bool masked = false, class P, class T>
POLYDPO_INLINE void scale_range(const P* pred, const T* target, [[maybe_unused]] const std::uint8_t* mask, double scale,
                                std::int64_t n, P* grad) {
    constexpr int size = Block<Vector>::size;
    using Value = std::remove_reference_t<decltype(Vector{}[0])>;
    // Whatever NaN it is: one without a payload, which rounding to bfloat16 would take for digits.
    const Vector factor =
        Vector{} + (std::isnan(scale) ? std::numeric_limits<Value>::quiet_NaN() : static_cast<Value>(scale));
    const auto scaled = [&](const P* pred, const T* target, const std::uint8_t* mask) __attribute__((always_inline)) {
        const Block<Vector> p = load(pred), t = load_beside<P>(target);
        // No gradient even where what is masked, or the scale, is NaN.
        return keep(Block<Vector>{factor * (p.even - t.even), factor * (p.odd - t.odd)}, load_mask<masked, P>(mask));
    };
    std::int64_t i = 0;
    for (; i + size <= n; i += size) {
        prefetch(pred + i);
        prefetch(target + i);
        if (streamed) {
            P block[size];
            store(block, scaled(pred + i, target + i, mask + (masked ? i : 0)));
            stream<sizeof block>(block, grad + i);
        } else {
            store(grad + i, scaled(pred + i, target + i, mask + (masked ? i : 0)));
        }
    }
    if (i < n) {
        P last_pred[size] = {}, last_grad[size];
        T last_target[size] = {};
        std::uint8_t last_mask[size] = {};
        std::copy(pred + i, pred + n, last_pred);
        std::copy(target + i, target + n, last_target);
        if (masked) std::copy(mask + i, mask + n, last_mask);
        store(last_grad, scaled(last_pred, last_target, last_mask));
        std::copy(last_grad, last_grad + (n - i), grad + i);
    }
    if (streamed) end_of_stream();
}

using Add = void (*)(const Batch& batch, const Range& range, PairSums* sums);
using Scale = void (*)(const void* pred, const void* target, const std::uint8_t* mask, double scale, std::int64_t n,
                       void* grad);

#define POLYDPO_ADD(name, Vector, has_ref, masked, P, R, T)                                                    \
    POLYDPO_CLONES void name(const Batch& batch, const Range& range, PairSums* sums) {                         \
        add_range<P, R, T>(                                                                                    \
            batch, range, sums,                                                                                \
            [](const P* p, const R* r, const T* t, int n, VectorSums& found, const std::uint8_t* m)            \
                __attribute__((always_inline)) { add_chunk<Vector, has_ref, masked>(p, r, t, n, found, m); }); \
    }
POLYDPO_ADD(add_bfloat16, Floats, true, false, Bfloat16, Bfloat16, Bfloat16)
POLYDPO_ADD(add_float32, Floats, true, false, Float32, Float32, Float32)
POLYDPO_ADD(add_float64, Doubles, true, false, Float64, Float64, Float64)
POLYDPO_ADD(add_bfloat16_alone, Floats, false, false, Bfloat16, Bfloat16, Bfloat16)
POLYDPO_ADD(add_float32_alone, Floats, false, false, Float32, Float32, Float32)
POLYDPO_ADD(add_float64_alone, Doubles, false, false, Float64, Float64, Float64)
// A policy under autocast, and what is not.
POLYDPO_ADD(add_autocast, Floats, true, false, Float32, Bfloat16, Bfloat16)
POLYDPO_ADD(add_autocast_ref, Floats, true, false, Float32, Bfloat16, Float32)
POLYDPO_ADD(add_autocast_target, Floats, true, false, Float32, Float32, Bfloat16)
POLYDPO_ADD(add_autocast_alone, Floats, false, false, Float32, Float32, Bfloat16)
POLYDPO_ADD(add_masked_bfloat16, Floats, true, true, Bfloat16, Bfloat16, Bfloat16)
POLYDPO_ADD(add_masked_float32, Floats, true, true, Float32, Float32, Float32)
POLYDPO_ADD(add_masked_autocast, Floats, true, true, Float32, Bfloat16, Bfloat16)

#define POLYDPO_SCALE(name, streamed, Vector, masked, P, T)                                                            \
    POLYDPO_CLONES void name(const void* pred, const void* target, const std::uint8_t* mask, double scale,             \
                             std::int64_t n, void* grad) {                                                             \
        scale_range<streamed, Vector, masked>(static_cast<const P*>(pred), static_cast<const T*>(target), mask, scale, \
                                              n, static_cast<P*>(grad));                                               \
    }
POLYDPO_SCALE(scale_bfloat16, false, Floats, false, Bfloat16, Bfloat16)
POLYDPO_SCALE(scale_float32, false, Floats, false, Float32, Float32)
POLYDPO_SCALE(scale_float64, false, Doubles, false, Float64, Float64)
POLYDPO_SCALE(scale_autocast, false, Floats, false, Float32, Bfloat16)
POLYDPO_SCALE(stream_bfloat16, true, Floats, false, Bfloat16, Bfloat16)
POLYDPO_SCALE(stream_float32, true, Floats, false, Float32, Float32)
POLYDPO_SCALE(stream_float64, true, Doubles, false, Float64, Float64)
POLYDPO_SCALE(stream_autocast, true, Floats, false, Float32, Bfloat16)
POLYDPO_SCALE(scale_masked_bfloat16, false, Floats, true, Bfloat16, Bfloat16)
POLYDPO_SCALE(scale_masked_float32, false, Floats, true, Float32, Float32)
POLYDPO_SCALE(scale_masked_autocast, false, Floats, true, Float32, Bfloat16)
POLYDPO_SCALE(stream_masked_bfloat16, true, Floats, true, Bfloat16, Bfloat16)
POLYDPO_SCALE(stream_masked_float32, true, Floats, true, Float32, Float32)
POLYDPO_SCALE(stream_masked_autocast, true, Floats, true, Float32, Bfloat16)

// ------------------------------------------------------------------------------------------------------ float16
//
// The processor's own conversions, eight at a time. Results differ from ours only in the payload of a NaN.

#ifdef POLYDPO_F16C_BUILD
#define POLYDPO_F16C __attribute__((target("avx2,fma,f16c")))

const bool has_f16c = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");

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
                                   VectorSums& sums, const std::uint8_t*) {
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

void add_halves(const Batch& batch, const Range& range, PairSums* sums) {
    add_range<Float16, Float16, Float16>(batch, range, sums, add_halves_chunk);
}

template <bool streamed>
POLYDPO_F16C void scale_halves(const void* pred, const void* target, const std::uint8_t*, double scale, std::int64_t n,
                               void* grad) {
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
// Other mixtures of dtypes, masked or not, and float16 where the processor does not convert it: a piece of an arm at a
// time is converted to the dtype that is computed in, and back. Three pieces leave room in a cache of 32 KB for what
// they are made from.
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

#define POLYDPO_CONVERT(dtype, wide, Narrow, Wide)                             \
    POLYDPO_CLONES void dtype##_to_##wide(const void* from, int n, Wide* to) { \
        widen_chunk<Wide, Narrow>(from, n, to);                                \
    }                                                                          \
    POLYDPO_CLONES void wide##_to_##dtype(const Wide* from, int n, void* to) { \
        narrow_chunk<Wide, Narrow>(from, n, to);                               \
    }
POLYDPO_CONVERT(bfloat16, float32, Bfloat16, Float32)
POLYDPO_CONVERT(float16, float32, Float16, Float32)
POLYDPO_CONVERT(bfloat16, float64, Bfloat16, Float64)
POLYDPO_CONVERT(float16, float64, Float16, Float64)
POLYDPO_CONVERT(float32, float64, Float32, Float64)

#define POLYDPO_CHUNK(wide, Wide, Vector)                                                                             \
    POLYDPO_CLONES void clear_##wide(const std::uint8_t* mask, int n, Wide* values) { clear_chunk(mask, n, values); } \
    POLYDPO_CLONES void add_##wide##_chunk(const Wide* pred, const Wide* ref, const Wide* target, int n,              \
                                           VectorSums& sums) {                                                        \
        if (ref) return add_chunk<Vector, true>(pred, ref, target, n, sums);                                          \
        add_chunk<Vector, false>(pred, ref, target, n, sums);                                                         \
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
void add_converted_pair(const Batch& batch, std::int64_t pair, std::int64_t begin, std::int64_t end, PairSums& sums) {
    alignas(64) Wide pred_buffer[piece], ref_buffer[piece], target_buffer[piece];
    VectorSums found[2];
    for (std::int64_t at = begin; at < end; at += piece) {
        const int n = static_cast<int>(std::min<std::int64_t>(piece, end - at));
        const std::uint8_t* mask = batch.mask ? batch.mask + pair * batch.mask_stride + at : nullptr;
        if (mask) sums.elements += count_kept(mask, n);
        const Wide* target = nullptr;
        for (int arm = 0; arm < 2; ++arm) {
            const auto of = [&](const Arms& arms, Wide* buffer) {
                return widened(arms.of(arm), arms.dtype, pair * arms.stride + at, n, mask, buffer);
            };
            const Wide* pred = of(batch.pred, pred_buffer);
            const Wide* ref = batch.ref.win ? of(batch.ref, ref_buffer) : nullptr;
            if (arm == 0 || batch.target.win != batch.target.lose) target = of(batch.target, target_buffer);
            if constexpr (sizeof(Wide) == 8) add_float64_chunk(pred, ref, target, n, found[arm]);
            else add_float32_chunk(pred, ref, target, n, found[arm]);
        }
    }
    found[0].add_to(sums.win);
    found[1].add_to(sums.lose);
}

template <class Wide>
void add_converted(const Batch& batch, const Range& range, PairSums* sums) {
    for (std::int64_t pair = range.first; pair < range.last; ++pair) {
        add_converted_pair<Wide>(batch, pair, range.begin, range.end, *sums++);
    }
}

// Copies of samples that are shorter than a block of any dtype, eight pairs at a time, with zeros behind them. A copy
// that is read at once would not have come as far as the cache, for which a processor waits.
constexpr std::int64_t short_size = 32;

struct ShortSamples {
    static constexpr std::size_t row = short_size * sizeof(double);
    alignas(64) char rows[2][8][row] = {};

    Arms of(const Arms& arms, std::int64_t first, std::int64_t count, std::int64_t numel) {
        const std::size_t size = size_of(arms.dtype), bytes = size * static_cast<std::size_t>(numel);
        const bool shared = arms.win == arms.lose;
        for (int arm = 0; arm < (shared ? 1 : 2); ++arm) {
            const auto* from = static_cast<const char*>(arms.of(arm));
            for (std::int64_t pair = 0; pair < count; ++pair) {
                const char* sample = from + static_cast<std::size_t>((first + pair) * arms.stride) * size;
                copy(sample, bytes, rows[arm][pair]);
            }
        }
        return {rows[0], rows[shared ? 0 : 1], arms.dtype, static_cast<std::int64_t>(row / size)};
    }

    // As memcpy, without the call where it can be.
    static void copy(const char* from, std::size_t bytes, char* to) {
        if (bytes % 16) {
            std::memcpy(to, from, bytes);
        } else {
            for (std::size_t i = 0; i < bytes; i += 16) std::memcpy(to + i, from + i, 16);
        }
    }
};

// What sums the masked samples of the usual dtypes, or null.
Add masked_sums(const Batch& batch) {
    const Float pred = batch.pred.dtype, ref = batch.ref.dtype, target = batch.target.dtype;
    if (!batch.ref.win || ref != target) return nullptr;
    if (pred == target && pred == Float::bfloat16) return add_masked_bfloat16;
    if (pred == target && pred == Float::float32) return add_masked_float32;
    return pred == Float::float32 && target == Float::bfloat16 ? add_masked_autocast : nullptr;
}

// And counts what is not masked.
void add_masked_counted(const Batch& batch, const Range& range, PairSums* sums) {
    masked_sums(batch)(batch, range, sums);
    for (std::int64_t pair = range.first; pair < range.last; ++pair) {
        const std::uint8_t* mask = batch.mask + pair * batch.mask_stride + range.begin;
        sums[pair - range.first].elements += count_kept(mask, static_cast<int>(range.end - range.begin));
    }
}

// What reads elements as they are, or null where they must be converted.
Add add_as_they_are(const Batch& batch) {
    if (batch.mask) return masked_sums(batch) ? add_masked_counted : nullptr;
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

void add_short(const Batch& batch, const Range& range, PairSums* sums) {
    const Add add = add_as_they_are(batch);
    Batch padded = batch;
    ShortSamples pred, ref, target;
    for (std::int64_t first = range.first; first < range.last; first += 8) {
        const std::int64_t count = std::min<std::int64_t>(8, range.last - first);
        padded.pred = pred.of(batch.pred, first, count, batch.numel);
        if (batch.ref.win) padded.ref = ref.of(batch.ref, first, count, batch.numel);
        padded.target = target.of(batch.target, first, count, batch.numel);
        add(padded, {0, count, 0, short_size}, sums + (first - range.first));
    }
}

Add add_of(const Batch& batch) {
    if (const Add add = add_as_they_are(batch)) return batch.numel < short_size && !batch.mask ? add_short : add;
    return batch.accumulate_in_double ? add_converted<Float64> : add_converted<Float32>;
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
        if constexpr (sizeof(Wide) == 8) scale_float64(pred, target, nullptr, scale, n, pred_buffer);
        else scale_float32(pred, target, nullptr, scale, n, pred_buffer);
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
    if (pred == Float::float32 && target == Float::bfloat16) {
        if (batch.mask) return streamed ? stream_masked_autocast : scale_masked_autocast;
        return streamed ? stream_autocast : scale_autocast;
    }
    if (pred != target) return nullptr;
    if (batch.mask) {
        if (pred == Float::bfloat16) return streamed ? stream_masked_bfloat16 : scale_masked_bfloat16;
        if (pred == Float::float32) return streamed ? stream_masked_float32 : scale_masked_float32;
        return nullptr;
    }
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
    // Past the caches, which makes no sense where little is written before the wait at the end.
    const bool streamed = static_cast<std::size_t>(2 * batch.pairs * batch.numel) * size >= streamed_bytes &&
                          static_cast<std::size_t>(end - begin) * size >= least_streamed_bytes &&
                          reinterpret_cast<std::uintptr_t>(grad) % 16 == 0;
    const auto from = [&](const void* arm, const Arms& arms) {
        return static_cast<const char*>(arm) +
               static_cast<std::size_t>(pair * arms.stride + begin) * size_of(arms.dtype);
    };
    if (const Scale as_they_are = scale_as_they_are(batch, streamed)) {
        const std::uint8_t* mask = batch.mask ? batch.mask + pair * batch.mask_stride + begin : nullptr;
        return as_they_are(from(pred, batch.pred), from(target, batch.target), mask, scale, end - begin, grad);
    }
    const auto convert = batch.accumulate_in_double ? scale_converted<Float64> : scale_converted<Float32>;
    convert(batch, pred, target, pair, begin, end, scale, streamed, grad);
}

// Of pairs whose samples are short: scale(pair, arm) is the factor, to(pair, 0, arm) where the gradient goes.
template <class ScaleOf, class To>
void scale_short(const Batch& batch, const Range& range, ScaleOf scale, To to) {
    const std::size_t bytes = size_of(batch.pred.dtype) * static_cast<std::size_t>(batch.numel);
    Batch padded = batch;
    ShortSamples pred, target, grad;
    for (std::int64_t first = range.first; first < range.last; first += 8) {
        const int count = static_cast<int>(std::min<std::int64_t>(8, range.last - first));
        padded.pred = pred.of(batch.pred, first, count, batch.numel);
        padded.target = target.of(batch.target, first, count, batch.numel);
        for (int arm = 0; arm < 2; ++arm) {
            const void *pred_arm = padded.pred.of(arm), *target_arm = padded.target.of(arm);
            for (int i = 0; i < count; ++i) {
                scale_split(padded, pred_arm, target_arm, i, 0, short_size, scale(first + i, arm), grad.rows[arm][i]);
            }
            for (int i = 0; i < count; ++i) ShortSamples::copy(grad.rows[arm][i], bytes, to(first + i, 0, arm));
        }
    }
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
    const std::int64_t useful = batch.pairs * (2 * batch.numel + elements_per_head) / elements_per_thread;
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(batch.threads, useful)));
}

std::int64_t splits_of(const Batch& batch) { return (batch.numel + split_size - 1) / split_size; }

// Pairs of less than a split are taken several at a time, so that neither a thread nor the head of the loss works on
// one alone: a multiple of the head's eight, if there is more than one.
std::int64_t pairs_at_a_time(const Batch& batch) {
    const std::int64_t fit = split_size / (2 * batch.numel + elements_per_head);
    return fit < 8 ? 1 : (fit + 7) / 8 * 8;
}

// Calls body(range) for every split of every pair, or all pairs of less, on PyTorch's threads.
template <class Body>
void for_each_range(const Batch& batch, bool reversed, Body body) {
    const std::int64_t splits = splits_of(batch), together = pairs_at_a_time(batch);
    const std::int64_t all = (batch.pairs + together - 1) / together * splits;
    parallel_for_openmp(static_cast<std::size_t>(all), threads_for(batch), [&](std::size_t index) {
        const auto in_order = static_cast<std::int64_t>(index), at = reversed ? all - 1 - in_order : in_order;
        const std::int64_t first = at / splits * together, begin = at % splits * split_size;
        body(Range{first, std::min(first + together, batch.pairs), begin, std::min(begin + split_size, batch.numel)});
    });
}

// The columns of up to eight pairs, one in each lane.
struct Rows {
    double* at;
    int count;

    POLYDPO_INLINE void set(Column column, const Doubles& values) const {
        for (int l = 0; l < count; ++l) at[pair_columns * l + column] = values[l];
    }
};

// `value` where there are no values of the pairs.
POLYDPO_INLINE Doubles doubles_at(const double* values, std::int64_t first, int count, double value) {
    Doubles found = Doubles{} + value;
    for (int l = 0; values && l < count; ++l) found[l] = values[first + l];
    return found;
}

// From the sums of up to eight pairs, beginning with `first`, to their rows of the table.
POLYDPO_CLONES void finish_pairs(const Batch& batch, const Objective& o, std::int64_t first, int count,
                                 const PairSums* sums, double* table) {
    const Rows rows{table + pair_columns * first, count};
    const Doubles zero = {}, one = zero + 1;
    Doubles model_w = {}, model_l = {}, excess_w = {}, excess_l = {}, size = zero + static_cast<double>(batch.numel);
    for (int l = 0; l < count; ++l) {
        model_w[l] = sums[l].win.model;
        model_l[l] = sums[l].lose.model;
        excess_w[l] = sums[l].win.excess;
        excess_l[l] = sums[l].lose.excess;
        if (batch.mask) size[l] = sums[l].elements;
    }
    model_w /= size;
    model_l /= size;
    excess_w = batch.ref.win ? excess_w / size : model_w - doubles_at(o.ref_error_win, first, count, 0);
    excess_l = batch.ref.win ? excess_l / size : model_l - doubles_at(o.ref_error_lose, first, count, 0);
    rows.set(model_mse_win, model_w);
    rows.set(model_mse_lose, model_l);
    rows.set(excess_win, excess_w);
    rows.set(excess_lose, excess_l);
    rows.set(elements, size);
    if (!o.head) return;

    HeadInputs in;
    in.beta = doubles_at(o.beta, first, count, o.beta_value);
    for (int k = 0; k < 4; ++k) in.alpha[k] = zero + o.alphas[k];
    if (o.alpha) in.alpha[0] = doubles_at(o.alpha, first, count, 0);
    const Doubles weight = doubles_at(o.weight, first, count, 1);
    Doubles logit = -0.5 * in.beta * (excess_w - excess_l);
    // An infinite error is no evidence of a preference: inf - inf is NaN.
    logit += logit - logit;
    in.z = logit - o.margin;
    // Stable sigmoid and softplus of z and -z from e = exp(-|z|) <= 1: 0 from 746 on, which std::exp takes long for.
    const auto decayed = [](double value) { return std::abs(value) > 746 ? 0.0 : std::exp(-std::abs(value)); };
    Doubles e = {}, log1p = {}, distance = {};
    for (int l = 0; l < count; ++l) {
        e[l] = decayed(in.z[l]);
        log1p[l] = std::log1p(e[l]);
        distance[l] = o.margin == 0 ? e[l] : decayed(logit[l]);
    }
    const auto positive = in.z >= 0;
    in.p = (positive ? one : e) / (1 + e);
    in.q = (positive ? e : one) / (1 + e);
    in.nlp = positive ? log1p : log1p - in.z;
    in.nlq = positive ? log1p + in.z : log1p;
    LossAndSlope kept, flipped = {};
    (*o.head)(in, kept);
    if (o.flip != 0) {
        in.z = -in.z;
        std::swap(in.p, in.q);
        std::swap(in.nlp, in.nlq);
        (*o.head)(in, flipped);
    }
    const Doubles slope = o.keep * kept.slope - o.flip * flipped.slope;
    rows.set(loss_value, weight * (o.keep * kept.loss + o.flip * flipped.loss + o.sft_weight * model_w));
    // The metrics, which are not of z but of the logit.
    const Doubles win = -0.5 * in.beta * excess_w, lose = -0.5 * in.beta * excess_l;
    rows.set(implicit_accuracy, logit > 0 ? one : logit == 0 ? zero + 0.5 : zero);
    rows.set(reward_win, win);
    rows.set(reward_lose, lose);
    rows.set(reward_margin, win - lose);
    rows.set(logit_mean, logit);
    rows.set(p_mean, (logit >= 0 ? one : distance) / (1 + distance));
    rows.set(saturated, ((logit > 10) | (logit < -10)) ? one : zero);
    rows.set(false_success, ((logit > 0) & (excess_w > 0)) ? one : zero);
    rows.set(ref_mse_win, model_w - excess_w);
    rows.set(ref_mse_lose, model_l - excess_l);
    // dL/dpred_w = slope dz/dm_w dm_w/dpred = slope (-beta/2) (2/D) (pred - target), the loser's with +.
    const double scale = o.reduction == Objective::mean ? 1.0 / static_cast<double>(batch.pairs) : 1.0;
    const Doubles each = scale * weight / size;
    rows.set(grad_win, each * (2.0 * o.sft_weight - slope * in.beta));
    rows.set(grad_lose, each * slope * in.beta);
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
    const Add add = add_of(batch);
    const auto finish = [&](std::int64_t first, std::int64_t last, const PairSums* sums) {
        for (std::int64_t at = first; at < last; at += 8) {
            const int count = static_cast<int>(std::min<std::int64_t>(8, last - at));
            finish_pairs(batch, objective, at, count, sums + (at - first), pairs);
        }
    };
    if (splits == 1) {
        for_each_range(batch, false, [&](const Range& range) {
            PairSums sums[split_size / elements_per_head + 8];
            add(batch, range, sums);
            finish(range.first, range.last, sums);
        });
    } else {
        std::vector<PairSums> slots(static_cast<std::size_t>(batch.pairs * splits));
        for_each_range(batch, false, [&](const Range& range) {
            add(batch, range, &slots[static_cast<std::size_t>(range.first * splits + range.begin / split_size)]);
        });
        std::vector<PairSums> sums(static_cast<std::size_t>(batch.pairs));
        for (std::size_t at = 0; at < slots.size(); ++at) sums[at / static_cast<std::size_t>(splits)] += slots[at];
        finish(0, batch.pairs, sums.data());
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
    // The product of what comes from above and a pair's coefficient, of its winner (0) or its loser (1).
    const auto scale = [&](std::int64_t pair, int arm) {
        const std::int64_t at = pair * grad_loss_stride;
        const double upstream =
            grad_loss_is_double ? static_cast<const double*>(grad_loss)[at] : static_cast<const float*>(grad_loss)[at];
        return upstream * coefficients[pair * coefficients_stride + arm];
    };
    const auto to = [&](std::int64_t pair, std::int64_t begin, int arm) {
        return static_cast<char*>(arm == 0 ? grad_of_win : grad_of_lose) +
               static_cast<std::size_t>(pair * grad_stride + begin) * size;
    };
    const bool is_short = batch.numel < short_size && !batch.mask && scale_as_they_are(batch, false);
    // From the last to the first: what the forward pass read last may still be in the cache.
    for_each_range(batch, true, [&](const Range& range) {
        if (is_short) return scale_short(batch, range, scale, to);
        for (const int arm : {1, 0}) {
            const void *pred = batch.pred.of(arm), *target = batch.target.of(arm);
            for (std::int64_t pair = range.first; pair < range.last; ++pair) {
                scale_split(batch, pred, target, pair, range.begin, range.end, scale(pair, arm),
                            to(pair, range.begin, arm));
            }
        }
    });
}

}  // namespace polydpo

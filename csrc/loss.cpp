// The rest of csrc/ is built with -ffp-contract=off, so that decoded pixels are the same on every processor. The loss
// promises no such thing: a fused multiply-add is faster, and rounds once less.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")
#endif

#include "loss.hpp"

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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(POLYDPO_NO_CLONES)
#define POLYDPO_LEVELS
#endif

namespace polydpo {
namespace {

// A sample is cut into splits of this many elements, whatever the batch and the number of threads: a pair's sums are
// the same bit for bit in any company.
constexpr std::int64_t split_size = 1 << 15;

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

// The hardware's prefetchers stop at the end of a page; three streams in turns have many ends.
// A block of up to 128 bytes: two lines, unless the compiler knows that it is one.
template <bool once = false>
POLYDPO_INLINE void prefetch(const char* at, std::size_t bytes) {
    constexpr std::size_t ahead = 2048;
    __builtin_prefetch(at + ahead, 0, once ? 0 : 3);
    if (!__builtin_constant_p(bytes <= 64) || bytes > 64) __builtin_prefetch(at + ahead + 64, 0, once ? 0 : 3);
}

// Stores 16 bytes past the caches, at a multiple of 16.
POLYDPO_INLINE void stream(const char* from, char* to) {
#ifdef __SSE2__
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    std::memcpy(to, from, 16);
#endif
}

POLYDPO_INLINE void end_of_stream() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

// ------------------------------------------------------------------------------------------------ blocks of numbers

// The vectors of a level of x86-64, or of any other machine (0): no wider than its registers, for what is wider goes
// through memory.
template <int level_>
struct Vectors {
    static constexpr int level = level_, bytes = level == 4 ? 64 : level == 3 ? 32 : 16;
    typedef float Floats __attribute__((vector_size(bytes)));
    typedef double Doubles __attribute__((vector_size(bytes)));
    typedef std::uint32_t Words __attribute__((vector_size(bytes)));
    typedef std::uint64_t Longs __attribute__((vector_size(bytes)));
    typedef float HalfFloats __attribute__((vector_size(bytes / 2)));
    typedef std::uint16_t Halves __attribute__((vector_size(bytes / 2)));
    typedef std::uint8_t Bytes __attribute__((vector_size(bytes / 4)));
    typedef std::uint8_t HalfBytes __attribute__((vector_size(bytes / 8)));
};

// What a kernel is compiled for: the level, whether it computes in float64, and the order in a block.
template <int level, bool in_double_, bool paired_ = false>
struct Kind : Vectors<level> {
    static constexpr bool in_double = in_double_, paired = paired_;
    using Vector = std::conditional_t<in_double, typename Vectors<level>::Doubles, typename Vectors<level>::Floats>;
    // Elements of a block, and of a chunk, of which no accumulator adds more than 64 terms.
    static constexpr int size = 2 * sizeof(Vector) / (in_double ? 8 : 4), chunk = 64 * size;
};

// Two vectors, in order or, where all are bfloat16 (`paired`), the even and the odd elements. That takes one shift or
// mask each, where widening in order takes three instructions; for what is done element by element or summed up, the
// order is nothing.
template <class Vector>
struct Block {
    Vector even, odd;
};

// 16 or 8 bits to 32, in one instruction where GCC 12 would take several.
template <class V, class Narrow>
POLYDPO_INLINE typename V::Words widen(const Narrow& narrow) {
    typename V::Words words;
    if constexpr (V::level >= 3 && std::is_same_v<Narrow, typename V::Halves>) {
        asm("vpmovzxwd %1, %0" : "=v"(words) : "v"(narrow));
    } else if constexpr (V::level >= 3) {
        asm("vpmovzxbd %1, %0" : "=v"(words) : "v"(narrow));
    } else {
        words = __builtin_convertvector(narrow, typename V::Words);
    }
    return words;
}

// float16 by the processor's own conversions, where the level has them. Results differ only in the payload of a NaN.
template <class V>
POLYDPO_INLINE typename V::Floats load_floats(const char* from, Float dtype) {
    using Floats = typename V::Floats;
    if (dtype == Float::float32) return read<Floats>(from);
    const auto halves = read<typename V::Halves>(from);
    if (dtype == Float::bfloat16) return reinterpret<Floats>(widen<V>(halves) << 16);
    if constexpr (V::level >= 3) {
        Floats values;
        asm("vcvtph2ps %1, %0" : "=v"(values) : "v"(halves));
        return values;
    } else {
        return widen_float16<Floats>(widen<V>(halves));
    }
}

template <class V>
POLYDPO_INLINE void store_floats(char* to, Float dtype, const typename V::Floats& values) {
    using Words = typename V::Words;
    using Halves = typename V::Halves;
    if (dtype == Float::float32) {
        std::memcpy(to, &values, sizeof values);
        return;
    }
    Halves halves;
    if (dtype == Float::bfloat16) {
        // Rounding could carry a NaN of another dtype into the exponent: keep its sign, make it quiet.
        const Words b = reinterpret<Words>(values), nan = b | 0x400000;
        const Words rounded = (b & 0x7fffffff) > 0x7f800000 ? nan : narrow_to_bfloat16<Words>(values);
        halves = __builtin_convertvector(rounded >> 16, Halves);
    } else if constexpr (V::level >= 3) {
        asm("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(values));
    } else {
        halves = __builtin_convertvector(narrow_to_float16<Words>(values), Halves);
    }
    std::memcpy(to, &halves, sizeof halves);
}

template <class K>
POLYDPO_INLINE Block<typename K::Vector> load(const char* from, Float dtype) {
    using Floats = typename K::Floats;
    using Doubles = typename K::Doubles;
    using HalfFloats = typename K::HalfFloats;
    if constexpr (K::paired) {
        const auto pairs = read<typename K::Words>(from);
        return {reinterpret<Floats>(pairs << 16), reinterpret<Floats>(pairs & 0xffff0000)};
    } else if constexpr (!K::in_double) {
        const char* odd = from + (dtype == Float::float32 ? K::bytes : K::bytes / 2);
        return {load_floats<K>(from, dtype), load_floats<K>(odd, dtype)};
    } else {
        if (dtype == Float::float64) return {read<Doubles>(from), read<Doubles>(from + K::bytes)};
        const Floats values = load_floats<K>(from, dtype);
        const auto* halves = reinterpret_cast<const char*>(&values);
        return {__builtin_convertvector(read<HalfFloats>(halves), Doubles),
                __builtin_convertvector(read<HalfFloats>(halves + K::bytes / 2), Doubles)};
    }
}

template <class K>
POLYDPO_INLINE void store(char* to, Float dtype, const Block<typename K::Vector>& block) {
    if constexpr (K::paired) {
        using Words = typename K::Words;
        const Words even = narrow_to_bfloat16<Words>(block.even), odd = narrow_to_bfloat16<Words>(block.odd);
        const Words pairs = even >> 16 | (odd & 0xffff0000);
        std::memcpy(to, &pairs, sizeof pairs);
    } else if constexpr (!K::in_double) {
        store_floats<K>(to, dtype, block.even);
        store_floats<K>(to + (dtype == Float::float32 ? K::bytes : K::bytes / 2), dtype, block.odd);
    } else if (dtype == Float::float64) {
        std::memcpy(to, &block.even, K::bytes);
        std::memcpy(to + K::bytes, &block.odd, K::bytes);
    } else {
        using HalfFloats = typename K::HalfFloats;
        const HalfFloats halves[2] = {__builtin_convertvector(block.even, HalfFloats),
                                      __builtin_convertvector(block.odd, HalfFloats)};
        store_floats<K>(to, dtype, read<typename K::Floats>(halves));
    }
}

// A mask's bytes as bits of the numbers of a block. Whatever byte is not 0 keeps, as everywhere else.
template <class K>
POLYDPO_INLINE auto load_mask(const std::uint8_t* mask) {
    if constexpr (K::in_double) {
        using Longs = typename K::Longs;
        using HalfBytes = typename K::HalfBytes;
        return Block<Longs>{
            reinterpret<Longs>(__builtin_convertvector(read<HalfBytes>(mask), Longs) != 0),
            reinterpret<Longs>(__builtin_convertvector(read<HalfBytes>(mask + sizeof(HalfBytes)), Longs) != 0)};
    } else {
        using Words = typename K::Words;
        using Halves = typename K::Halves;
        using Bytes = typename K::Bytes;
        Words even, odd;
        if constexpr (K::paired) {
            even = widen<K>(Halves(read<Halves>(mask) & 0xff));
            odd = widen<K>(Halves(read<Halves>(mask) >> 8));
        } else {
            even = widen<K>(read<Bytes>(mask));
            odd = widen<K>(read<Bytes>(mask + sizeof(Bytes)));
        }
        return Block<Words>{reinterpret<Words>(even != 0), reinterpret<Words>(odd != 0)};
    }
}

// Zeros where masked, whatever was there.
template <class Vector, class Bits>
POLYDPO_INLINE Block<Vector> keep(const Block<Vector>& values, const Block<Bits>& mask) {
    return {reinterpret<Vector>(reinterpret<Bits>(values.even) & mask.even),
            reinterpret<Vector>(reinterpret<Bits>(values.odd) & mask.odd)};
}

// The elements that are left, with zeros behind them.
template <class K>
struct Last {
    alignas(64) char bytes[2 * sizeof(typename K::Vector)] = {};

    POLYDPO_INLINE Last(const void* from, std::size_t size, std::int64_t begin, std::int64_t end) {
        const auto at = static_cast<std::size_t>(begin), count = static_cast<std::size_t>(end - begin);
        if (count > 0) std::memcpy(bytes, static_cast<const char*>(from) + at * size, count * size);
    }
};

// ----------------------------------------------------------------------------------------------------- the sums

// What a kernel is given; the compiler knows it where `choose` below says so.
struct Given {
    Float pred, ref, target;
    bool has_ref, masked;
};

// Of all lanes.
template <int level>
POLYDPO_INLINE double total(const typename Vectors<level>::Doubles& lanes) {
    if constexpr (level == 0) {
        return lanes[0] + lanes[1];
    } else {
        constexpr int below = level == 4 ? 3 : 0;
        typename Vectors<below>::Doubles halves[2];
        std::memcpy(halves, &lanes, sizeof halves);
        return total<below>(halves[0] + halves[1]);
    }
}

// The sums of chunks, in lanes.
template <class K>
struct VectorSums {
    using Vector = typename K::Vector;
    using Doubles = typename K::Doubles;
    Doubles model = {}, excess = {};

    static POLYDPO_INLINE Doubles in_double(const Vector& values) {
        if constexpr (K::in_double) {
            return values;
        } else {
            using Half = typename K::HalfFloats;
            Half halves[2];
            std::memcpy(halves, &values, sizeof halves);
            return __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
        }
    }

    POLYDPO_INLINE void add_to(Sums& sums) const {
        sums.model += total<K::level>(model);
        sums.excess += total<K::level>(excess);
    }
};

// Members, not arrays that a lambda refers to: those the compiler would write to memory at each step.
template <class K>
struct Accumulators {
    using Vector = typename K::Vector;
    Vector model_even = {}, model_odd = {}, excess_even = {}, excess_odd = {};

    POLYDPO_INLINE void add(const Given& given, const char* pred, const char* ref, const char* target,
                            const std::uint8_t* mask) {
        Block<Vector> p = load<K>(pred, given.pred), t = load<K>(target, given.target);
        if (given.masked) {
            const auto kept = load_mask<K>(mask);
            p = keep(p, kept);
            t = keep(t, kept);
        }
        const Vector even = p.even - t.even, odd = p.odd - t.odd;
        model_even += even * even;
        model_odd += odd * odd;
        if (given.has_ref) {
            Block<Vector> r = load<K>(ref, given.ref);
            if (given.masked) r = keep(r, load_mask<K>(mask));
            // (p - t)^2 - (r - t)^2 without the difference of nearly equal numbers.
            const Vector even_step = p.even - r.even, odd_step = p.odd - r.odd;
            excess_even += even_step * (2 * even - even_step);
            excess_odd += odd_step * (2 * odd - odd_step);
        }
    }
};

// Sums of one arm over n <= K::chunk elements; ref and mask are null where there is none.
template <class K>
POLYDPO_INLINE void add_chunk(const Given& given, const char* pred, const char* ref, const char* target,
                              const std::uint8_t* mask, int n, VectorSums<K>& sums) {
    constexpr int size = K::size;
    Accumulators<K> found;
    int i = 0;
    for (; i + size <= n; i += size) {
        const char* p = pred + i * size_of(given.pred);
        const char* r = given.has_ref ? ref + i * size_of(given.ref) : nullptr;
        const char* t = target + i * size_of(given.target);
        // The gradient does not need the reference: leave the cache to the others.
        prefetch(p, size * size_of(given.pred));
        if (given.has_ref) prefetch<true>(r, size * size_of(given.ref));
        prefetch(t, size * size_of(given.target));
        found.add(given, p, r, t, given.masked ? mask + i : nullptr);
    }
    if (i < n) {  // zeros add nothing
        const Last<K> p(pred, size_of(given.pred), i, n), t(target, size_of(given.target), i, n);
        const Last<K> r(ref, size_of(given.ref), i, given.has_ref ? n : i), m(mask, 1, i, given.masked ? n : i);
        found.add(given, p.bytes, r.bytes, t.bytes, reinterpret_cast<const std::uint8_t*>(m.bytes));
    }
    sums.model += sums.in_double(found.model_even) + sums.in_double(found.model_odd);
    if (given.has_ref) sums.excess += sums.in_double(found.excess_even) + sums.in_double(found.excess_odd);
}

POLYDPO_INLINE int count_kept(const std::uint8_t* mask, std::int64_t n) {
    int kept = 0;
    for (std::int64_t i = 0; i < n; ++i) kept += mask[i] != 0;
    return kept;
}

// Pairs first ... last - 1, of which each adds what [begin, end) holds to the next of `sums`.
struct Range {
    std::int64_t first, last, begin, end;
};

// A target shared by both arms is read from memory once: they take turns, chunk by chunk. Else one arm after the other,
// which leaves the hardware's prefetchers half the streams to follow.
template <class K>
POLYDPO_INLINE void add_range(const Given& given, const Batch& batch, const Range& range, PairSums* sums) {
    const Arms &pred = batch.pred, &ref = batch.ref, &target = batch.target;
    const std::int64_t turn = target.win == target.lose ? K::chunk : range.end - range.begin;
    for (std::int64_t pair = range.first; pair < range.last; ++pair, ++sums) {
        const std::uint8_t* mask = given.masked ? batch.mask + pair * batch.mask_stride : nullptr;
        if (given.masked) sums->elements += count_kept(mask + range.begin, range.end - range.begin);
        VectorSums<K> found[2];
        for (std::int64_t from = range.begin; from < range.end; from += turn) {
            const std::int64_t to = std::min(from + turn, range.end);
            for (int arm = 0; arm < 2; ++arm) {
                for (std::int64_t at = from; at < to; at += K::chunk) {
                    add_chunk<K>(given, pred.from(arm, pair, at, given.pred),
                                 given.has_ref ? ref.from(arm, pair, at, given.ref) : nullptr,
                                 target.from(arm, pair, at, given.target), given.masked ? mask + at : nullptr,
                                 static_cast<int>(std::min<std::int64_t>(K::chunk, to - at)), found[arm]);
                }
            }
        }
        found[0].add_to(sums->win);
        found[1].add_to(sums->lose);
    }
}

// ------------------------------------------------------------------------------------------------------ the gradient

// n elements of an arm's gradient: scale (pred - target), past the caches if it `may_stream`.
struct Piece {
    const char *pred, *target;
    const std::uint8_t* mask;
    double scale;
    std::int64_t n;
    char* grad;
    bool may_stream;
};

template <class K>
POLYDPO_INLINE void scale_piece(const Given& given, const Piece& piece) {
    using Vector = typename K::Vector;
    using Value = std::remove_reference_t<decltype(Vector{}[0])>;
    constexpr int size = K::size;
    const auto [pred, target, mask, scale, n, grad, may_stream] = piece;
    // Whatever NaN it is: one without a payload, which rounding to bfloat16 would take for digits.
    const Vector factor =
        Vector{} + (std::isnan(scale) ? std::numeric_limits<Value>::quiet_NaN() : static_cast<Value>(scale));
    const auto put = [&](char* to, const char* pred, const char* target, const std::uint8_t* mask)
                         POLYDPO_INLINE_LAMBDA {
                             const Block<Vector> p = load<K>(pred, given.pred), t = load<K>(target, given.target);
                             Block<Vector> scaled{factor * (p.even - t.even), factor * (p.odd - t.odd)};
                             // No gradient even where what is masked, or the scale, is NaN.
                             if (given.masked) scaled = keep(scaled, load_mask<K>(mask));
                             store<K>(to, given.pred, scaled);
                         };
    const std::size_t own = size_of(given.pred), other = size_of(given.target);
    // Of a 16-bit gradient, a block of the narrowest vectors of doubles is 8 bytes, and a store takes 16.
    const bool streamed = may_stream && size * own % 16 == 0;
    std::int64_t i = 0;
    for (; i + size <= n; i += size) {
        const auto at = static_cast<std::size_t>(i);
        const char *p = pred + at * own, *t = target + at * other;
        const std::uint8_t* m = given.masked ? mask + at : nullptr;
        if (streamed) {
            char block[2 * sizeof(Vector)];
            put(block, p, t, m);
            for (std::size_t k = 0; k < size * own; k += 16) stream(block + k, grad + at * own + k);
        } else {
            put(grad + at * own, p, t, m);
        }
    }
    if (i < n) {
        const Last<K> p(pred, own, i, n), t(target, other, i, n), m(mask, 1, i, given.masked ? n : i);
        char block[2 * sizeof(Vector)];
        put(block, p.bytes, t.bytes, reinterpret_cast<const std::uint8_t*>(m.bytes));
        std::memcpy(grad + static_cast<std::size_t>(i) * own, block, static_cast<std::size_t>(n - i) * own);
    }
    if (streamed) end_of_stream();
}

// ------------------------------------------------------------------------------------------------ the machine's level

// run(kind, given) with what is usual as constants. One kind does for all the rest: a branch that always goes the same
// way is nothing beside memory.
template <int level, class Run>
POLYDPO_INLINE void choose(const Given& given, bool in_double, Run run) {
    constexpr Float b = Float::bfloat16, h = Float::float16, f = Float::float32;
    const bool same = given.pred == given.ref && given.pred == given.target, plain = given.has_ref && !given.masked;
    if (in_double) return run(Kind<level, true>{}, given);
    if (same && given.pred == b) {
        if (!plain) return run(Kind<level, false, true>{}, Given{b, b, b, given.has_ref, given.masked});
        return run(Kind<level, false, true>{}, Given{b, b, b, true, false});
    }
    if (same && plain && given.pred == h) return run(Kind<level, false>{}, Given{h, h, h, true, false});
    if (same && plain && given.pred == f) return run(Kind<level, false>{}, Given{f, f, f, true, false});
    run(Kind<level, false>{}, given);
}

struct Kernels {
    void (*add)(const Batch& batch, const Range& range, PairSums* sums);
    void (*scale)(const Given& given, bool in_double, const Piece* pieces, int count);
};

template <int level>
POLYDPO_INLINE void add_at_level(const Batch& batch, const Range& range, PairSums* sums) {
    const bool has_ref = batch.ref.win != nullptr;
    const Given given{batch.pred.dtype, has_ref ? batch.ref.dtype : batch.pred.dtype, batch.target.dtype, has_ref,
                      batch.mask != nullptr};
    choose<level>(given, batch.accumulate_in_double, [&](auto kind, const Given& known) POLYDPO_INLINE_LAMBDA {
        add_range<decltype(kind)>(known, batch, range, sums);
    });
}

template <int level>
POLYDPO_INLINE void scale_at_level(const Given& given, bool in_double, const Piece* pieces, int count) {
    choose<level>(given, in_double, [&](auto kind, const Given& known) POLYDPO_INLINE_LAMBDA {
        for (int i = 0; i < count; ++i) scale_piece<decltype(kind)>(known, pieces[i]);
    });
}

#define POLYDPO_KERNELS(name, level, attributes)                                                       \
    attributes void add_##name(const Batch& batch, const Range& range, PairSums* sums) {               \
        add_at_level<level>(batch, range, sums);                                                       \
    }                                                                                                  \
    attributes void scale_##name(const Given& given, bool in_double, const Piece* pieces, int count) { \
        scale_at_level<level>(given, in_double, pieces, count);                                        \
    }                                                                                                  \
    constexpr Kernels name{add_##name, scale_##name};

POLYDPO_KERNELS(baseline, 0, )
#ifdef POLYDPO_LEVELS
POLYDPO_KERNELS(v3, 3, __attribute__((target("arch=x86-64-v3"))))
POLYDPO_KERNELS(v4, 4, __attribute__((target("arch=x86-64-v4"))))
const Kernels& kernels = __builtin_cpu_supports("x86-64-v4") ? v4 : __builtin_cpu_supports("x86-64-v3") ? v3 : baseline;
#else
const Kernels& kernels = baseline;
#endif

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

bool is_short(const Batch& batch) { return batch.numel < short_size && !batch.mask; }

void add_short(const Batch& batch, const Range& range, PairSums* sums) {
    Batch padded = batch;
    ShortSamples pred, ref, target;
    for (std::int64_t first = range.first; first < range.last; first += 8) {
        const std::int64_t count = std::min<std::int64_t>(8, range.last - first);
        padded.pred = pred.of(batch.pred, first, count, batch.numel);
        if (batch.ref.win) padded.ref = ref.of(batch.ref, first, count, batch.numel);
        padded.target = target.of(batch.target, first, count, batch.numel);
        kernels.add(padded, {0, count, 0, short_size}, sums + (first - range.first));
    }
}

Given given_of(const Batch& batch) {
    return {batch.pred.dtype, batch.pred.dtype, batch.target.dtype, true, batch.mask != nullptr};
}

// What [begin, end) of a pair's arm is made from.
Piece piece_of(const Batch& batch, int arm, std::int64_t pair, std::int64_t begin, std::int64_t end, double scale,
               char* grad) {
    const std::size_t size = size_of(batch.pred.dtype);
    // Past the caches, which makes no sense where little is written before the wait at the end.
    const bool streamed = static_cast<std::size_t>(2 * batch.pairs * batch.numel) * size >= streamed_bytes &&
                          static_cast<std::size_t>(end - begin) * size >= least_streamed_bytes &&
                          reinterpret_cast<std::uintptr_t>(grad) % 16 == 0;
    return {batch.pred.from(arm, pair, begin, batch.pred.dtype),
            batch.target.from(arm, pair, begin, batch.target.dtype),
            batch.mask ? batch.mask + pair * batch.mask_stride + begin : nullptr,
            scale,
            end - begin,
            grad,
            streamed};
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
            Piece pieces[8];
            for (int i = 0; i < count; ++i) {
                pieces[i] = piece_of(padded, arm, i, 0, short_size, scale(first + i, arm), grad.rows[arm][i]);
            }
            kernels.scale(given_of(batch), batch.accumulate_in_double, pieces, count);
            for (int i = 0; i < count; ++i) ShortSamples::copy(grad.rows[arm][i], bytes, to(first + i, 0, arm));
        }
    }
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
    const auto add = is_short(batch) ? add_short : kernels.add;
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
    // From the last to the first: what the forward pass read last may still be in the cache.
    for_each_range(batch, true, [&](const Range& range) {
        if (is_short(batch)) return scale_short(batch, range, scale, to);
        for (const int arm : {1, 0}) {
            Piece pieces[8];
            for (std::int64_t at = range.first; at < range.last; at += 8) {
                const int count = static_cast<int>(std::min<std::int64_t>(8, range.last - at));
                for (int i = 0; i < count; ++i) {
                    pieces[i] = piece_of(batch, arm, at + i, range.begin, range.end, scale(at + i, arm),
                                         to(at + i, range.begin, arm));
                }
                kernels.scale(given_of(batch), batch.accumulate_in_double, pieces, count);
            }
        }
    });
}

}  // namespace polydpo

#include "pixels.hpp"

#include <algorithm>
#include <cstring>

#include "floats.hpp"
#include "simd.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(POLYDPO_NO_CLONES)
#define POLYDPO_BYTE_TABLES
#include <immintrin.h>
#endif

namespace polydpo {
namespace {

constexpr int block = 64;  // pixels at a time, in simple loops that vectorise

// The channels of n pixels, apart. Little endian: R is the low byte.
POLYDPO_INLINE void split(const std::uint8_t* rgbx, int n, float (*channels)[block]) {
    std::uint32_t pixels[block];
    std::memcpy(pixels, rgbx, 4 * static_cast<std::size_t>(n));
    for (int c = 0; c < 3; ++c) {
        for (int i = 0; i < n; ++i) channels[c][i] = static_cast<float>(static_cast<int>(pixels[i] >> 8 * c & 255u));
    }
}

POLYDPO_INLINE void split(const float* rgbx, int n, float (*channels)[block]) {
    for (int c = 0; c < 3; ++c) {
        for (int i = 0; i < n; ++i) channels[c][i] = std::min(std::max(rgbx[4 * i + c], 0.0f), 255.0f);
    }
}

POLYDPO_INLINE void split(Levels levels, int n, float (*channels)[block]) {
    for (int c = 0; c < 3; ++c) {
        const std::uint8_t* from = levels.channels[c];
        for (int i = 0; i < n; ++i) channels[c][i] = static_cast<float>(static_cast<int>(from[i]));
    }
}

POLYDPO_INLINE const std::uint8_t* advance(const std::uint8_t* rgbx, int pixels) { return rgbx + 4 * pixels; }
POLYDPO_INLINE const float* advance(const float* rgbx, int pixels) { return rgbx + 4 * pixels; }
POLYDPO_INLINE Levels advance(Levels levels, int pixels) { return levels + pixels; }

// Levels of one channel to elements of the output.
struct ToUint8 {
    using Type = std::uint8_t;
    static POLYDPO_INLINE void convert(const float* levels, int n, float, float, Type* __restrict to) {
        for (int i = 0; i < n; ++i) to[i] = static_cast<Type>(static_cast<int>(levels[i] + 0.5f));
    }
};

struct ToFloat32 {
    using Type = float;
    static POLYDPO_INLINE void convert(const float* levels, int n, float offset, float scale, Type* __restrict to) {
        for (int i = 0; i < n; ++i) to[i] = (levels[i] - offset) * scale;
    }
};

// Finite numbers only: there is no care for NaN.
struct ToBfloat16 {
    using Type = std::uint16_t;
    static POLYDPO_INLINE void convert(const float* levels, int n, float offset, float scale, Type* __restrict to) {
        for (int i = 0; i < n; ++i) {
            const std::uint32_t bits = bits_of((levels[i] - offset) * scale);
            to[i] = static_cast<Type>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
};

struct ToFloat16 {
    using Type = std::uint16_t;
    static POLYDPO_INLINE void convert(const float* levels, int n, float offset, float scale, Type* __restrict to) {
        std::uint32_t words[block];
        for (int i = 0; i < block; i += 16) {
            Floats values;
            std::memcpy(&values, levels + i, sizeof values);
            const Words narrowed = narrow_to_float16<Words>((values - offset) * scale);
            std::memcpy(words + i, &narrowed, sizeof narrowed);
        }
        for (int i = 0; i < n; ++i) to[i] = static_cast<Type>(words[i]);
    }
};

template <class To, class Pixels>
POLYDPO_INLINE void store_block(Pixels pixels, int n, const Normalisation& normal, typename To::Type* to,
                                std::size_t plane) {
    float channels[3][block];
    split(pixels, n, channels);
    for (int c = 0; c < 3; ++c) To::convert(channels[c], n, normal.offset[c], normal.scale[c], to + c * plane);
}

template <class To, class Pixels>
POLYDPO_INLINE void store(Pixels pixels, int width, const Normalisation& normal, void* to, std::size_t plane) {
    auto* out = static_cast<typename To::Type*>(to);
    int x = 0;
    for (; x + block <= width; x += block) store_block<To>(advance(pixels, x), block, normal, out + x, plane);
    if (x < width) store_block<To>(advance(pixels, x), width - x, normal, out + x, plane);
}

template <class Pixels>
POLYDPO_INLINE void dispatch(Pixels pixels, int width, Dtype dtype, const Normalisation& normal, void* to,
                             std::size_t plane) {
    switch (dtype) {
        case Dtype::uint8: return store<ToUint8>(pixels, width, normal, to, plane);
        case Dtype::bfloat16: return store<ToBfloat16>(pixels, width, normal, to, plane);
        case Dtype::float16: return store<ToFloat16>(pixels, width, normal, to, plane);
        case Dtype::float32: return store<ToFloat32>(pixels, width, normal, to, plane);
    }
}

POLYDPO_CLONES void compute_row(const std::uint8_t* rgbx, int width, Dtype dtype, const Normalisation& normal, void* to,
                                std::size_t plane) {
    dispatch(rgbx, width, dtype, normal, to, plane);
}

POLYDPO_CLONES void compute_row(const float* rgbx, int width, Dtype dtype, const Normalisation& normal, void* to,
                                std::size_t plane) {
    dispatch(rgbx, width, dtype, normal, to, plane);
}

POLYDPO_CLONES void compute_row(const Levels& levels, int width, Dtype dtype, const Normalisation& normal, void* to,
                                std::size_t plane) {
    dispatch(levels, width, dtype, normal, to, plane);
}

#ifdef POLYDPO_BYTE_TABLES
#define POLYDPO_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))

// Of 256 levels there are 256 results. Where the processor looks 64 bytes up in a table at once (AVX-512 VBMI), that is
// a third of the work of computing them.
//
// 64 levels to their elements. Two bytes of an element are joined within 16-byte lanes, the lower eight of a lane for
// the first half of the pixels: so lane L has the pixels 8 L to 8 L + 7 of either half.
POLYDPO_VBMI inline void look_up(__m512i levels, const std::uint8_t (*table)[256], std::uint16_t* out,
                                 bool past_caches) {
    const __mmask64 upper = _mm512_movepi8_mask(levels);
    __m512i bytes[2];
    for (int half = 0; half < 2; ++half) {
        const auto* rows = reinterpret_cast<const __m512i*>(table[half]);
        bytes[half] = _mm512_mask_blend_epi8(
            upper, _mm512_permutex2var_epi8(_mm512_load_si512(rows), levels, _mm512_load_si512(rows + 1)),
            _mm512_permutex2var_epi8(_mm512_load_si512(rows + 2), levels, _mm512_load_si512(rows + 3)));
    }
    const __m512i first = _mm512_unpacklo_epi8(bytes[0], bytes[1]), second = _mm512_unpackhi_epi8(bytes[0], bytes[1]);
    if (past_caches) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), first);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + 32), second);
    } else {
        _mm512_storeu_si512(out, first);
        _mm512_storeu_si512(out + 32, second);
    }
}

// Both take the largest multiple of 64 pixels, and return how many that was.
POLYDPO_VBMI int look_row_up(const std::uint8_t* rgbx, int width, const std::uint8_t (*table)[2][256],
                             std::uint16_t* to, std::size_t plane, bool past_caches) {
    alignas(64) std::uint8_t places[64];
    for (int i = 0; i < 64; ++i) places[i] = static_cast<std::uint8_t>(4 * (8 * (i / 16) + i % 8));
    const __m512i first = _mm512_load_si512(places);
    constexpr __mmask64 second_half = 0xff00ff00ff00ff00;
    int x = 0;
    for (; x + 64 <= width; x += 64) {
        const auto* pixels = reinterpret_cast<const __m512i*>(rgbx + 4 * static_cast<std::size_t>(x));
        const __m512i p0 = _mm512_loadu_si512(pixels), p1 = _mm512_loadu_si512(pixels + 1);
        const __m512i p2 = _mm512_loadu_si512(pixels + 2), p3 = _mm512_loadu_si512(pixels + 3);
        for (int c = 0; c < 3; ++c) {
            const __m512i from = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(c)));
            const __m512i levels = _mm512_mask_blend_epi8(second_half, _mm512_permutex2var_epi8(p0, from, p1),
                                                          _mm512_permutex2var_epi8(p2, from, p3));
            look_up(levels, table[c], to + c * plane + x, past_caches);
        }
    }
    return x;
}

POLYDPO_VBMI int look_row_up(const Levels& levels, int width, const std::uint8_t (*table)[2][256], std::uint16_t* to,
                             std::size_t plane, bool past_caches) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    int x = 0;
    for (; x + 64 <= width; x += 64) {
        for (int c = 0; c < 3; ++c) {
            const __m512i row = _mm512_loadu_si512(levels.channels[c] + x);
            look_up(_mm512_permutex2var_epi64(row, order, row), table[c], to + c * plane + x, past_caches);
        }
    }
    return x;
}
#endif

}  // namespace

Finish::Finish(Dtype dtype, const Normalisation& normal, bool past_caches)
    : dtype_(dtype), normal_(normal), past_caches_(past_caches) {
#ifdef POLYDPO_BYTE_TABLES
    by_table_ = size_of(dtype) == 2 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bw");
    if (!by_table_) return;
    std::uint8_t levels[4 * 256];
    for (int v = 0; v < 256; ++v) std::memset(levels + 4 * v, v, 4);
    std::uint16_t elements[3][256];
    compute_row(levels, 256, dtype, normal, elements, 256);
    for (int c = 0; c < 3; ++c) {
        for (int v = 0; v < 256; ++v) {
            table_[c][0][v] = static_cast<std::uint8_t>(elements[c][v]);
            table_[c][1][v] = static_cast<std::uint8_t>(elements[c][v] >> 8);
        }
    }
#endif
}

void Finish::settle() const {
#ifdef POLYDPO_BYTE_TABLES
    if (by_table_ && past_caches_) _mm_sfence();
#endif
}

template <class Pixels>
void Finish::store_levels(Pixels pixels, int width, void* to, std::size_t plane) const {
    int done = 0;
#ifdef POLYDPO_BYTE_TABLES
    if (by_table_) {
        const bool past_caches = past_caches_ && reinterpret_cast<std::uintptr_t>(to) % 64 == 0 && plane % 32 == 0;
        done = look_row_up(pixels, width, table_, static_cast<std::uint16_t*>(to), plane, past_caches);
    }
#endif
    if (done < width) {
        compute_row(advance(pixels, done), width - done, dtype_, normal_,
                    static_cast<char*>(to) + static_cast<std::size_t>(done) * size_of(dtype_), plane);
    }
}

void Finish::store(const std::uint8_t* rgbx, int width, void* to, std::size_t plane) const {
    store_levels(rgbx, width, to, plane);
}

void Finish::store(const Levels& levels, int width, void* to, std::size_t plane) const {
    if (dtype_ != Dtype::uint8) return store_levels(levels, width, to, plane);
    for (int c = 0; c < 3; ++c) {
        std::memcpy(static_cast<char*>(to) + c * plane, levels.channels[c], static_cast<std::size_t>(width));
    }
}

void Finish::store(const float* rgbx, int width, void* to, std::size_t plane) const {
    compute_row(rgbx, width, dtype_, normal_, to, plane);
}

}  // namespace polydpo

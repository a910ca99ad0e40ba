// Function multiversioning: the loader picks the best clone for the machine it runs on.
//
// The clones compute the same bytes: the build forbids contraction to FMA (-ffp-contract=off), so a decoded batch
// does not depend on the processor.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(POLYDPO_NO_CLONES)
#define POLYDPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define POLYDPO_CLONES
#endif
// For code that is written for the instructions of x86-64-v3 and never called where is_x86_64_v3() is false.
#if defined(__x86_64__) && defined(__GNUC__)
#define POLYDPO_V3 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt")))
#define POLYDPO_V3_INLINE inline __attribute__((always_inline, target("avx2,bmi,bmi2,lzcnt,popcnt")))
#define POLYDPO_V3_LAMBDA __attribute__((always_inline, target("avx2,bmi,bmi2,lzcnt,popcnt")))
#endif
#define POLYDPO_INLINE inline __attribute__((always_inline))
#define POLYDPO_INLINE_LAMBDA __attribute__((always_inline))

namespace polydpo {

inline bool is_x86_64_v3() {
#ifdef POLYDPO_V3
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("popcnt");  // and LZCNT, which came with AVX2 or before, and Clang cannot ask for
#else
    return false;
#endif
}

// The level that POLYDPO_CLONES resolves to here: "x86-64-v4", "x86-64-v3" or "baseline".
inline const char* simd_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(POLYDPO_NO_CLONES)
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
    return "baseline";
}

}  // namespace polydpo

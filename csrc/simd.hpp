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
#define POLYDPO_INLINE inline __attribute__((always_inline))
#define POLYDPO_INLINE_LAMBDA __attribute__((always_inline))

namespace polydpo {

// The level that POLYDPO_CLONES resolves to here: "x86-64-v4", "x86-64-v3" or "baseline".
inline const char* simd_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(POLYDPO_NO_CLONES)
    if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
    if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
    return "baseline";
}

}  // namespace polydpo

// Advice to the system about memory that is about to be written for the first time.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace polydpo {

// Fresh memory costs a page fault at every 4 KB, and the faults of a large batch or gradient can cost several times
// its computation. Asks for huge pages where the system gives them on request; elsewhere this does nothing.
inline void advise_huge_pages(std::uintptr_t begin, std::uintptr_t end) {
    constexpr std::uintptr_t huge = 1 << 21;
    const std::uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace polydpo

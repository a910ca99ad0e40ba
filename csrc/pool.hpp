// One thread pool for everything in this library that runs on the CPU.
#pragma once

#include <cstddef>
#include <functional>

namespace polydpo {

// Calls body(0) ... body(count - 1) on at most `threads` threads, the calling one included, and returns when all
// have returned. Indices are handed out in order. Calls from several threads share the workers. Safe after fork:
// a child starts workers of its own. body must not throw.
void parallel_for(std::size_t count, int threads, const std::function<void(std::size_t)>& body);

}  // namespace polydpo

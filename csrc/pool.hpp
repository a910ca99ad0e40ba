// One thread pool for everything in this library that runs on the CPU.
#pragma once

#include <cstddef>
#include <functional>

namespace polydpo {

// Calls body(0) ... body(count - 1) on at most `threads` threads, the calling one included, and returns when all
// have returned. Indices are handed out in order. Calls from several threads share the workers. Safe after fork:
// a child starts workers of its own. body must not throw.
//
// stop, if given, is asked on the calling thread, between two indices, at most twenty times a second. Once it is true
// no index is begun any more; those begun are finished.
void parallel_for(std::size_t count, int threads, const std::function<void(std::size_t)>& body,
                  const std::function<bool()>& stop = nullptr);

// The same on the threads of the OpenMP runtime that PyTorch computes with, if its entry point has been given: they
// are awake between two operators, and would compete for the cores with threads of our own. For work of microseconds
// on the thread that runs PyTorch; not after fork.
void parallel_for_openmp(std::size_t count, int threads, const std::function<void(std::size_t)>& body);

// GOMP_parallel of that runtime (libgomp; LLVM's and Intel's have it too), or null for parallel_for's threads.
using GompParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
void set_openmp(GompParallel entry);

}  // namespace polydpo

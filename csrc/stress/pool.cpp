// For ThreadSanitizer: many threads share the pool, some calls are stopped, all indices run once. scripts/sanitize.sh
#include "../pool.hpp"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

int main() {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; ++caller) {
        callers.emplace_back([caller] {
            for (int round = 0; round < 400; ++round) {
                const std::size_t count = 1 + static_cast<std::size_t>(round * 7 + caller) % 50;
                std::vector<int> ran(count);
                std::atomic<std::size_t> total{0};
                const auto body = [&](std::size_t index) {
                    ++ran[index];
                    ++total;
                };
                polydpo::parallel_for(count, 1 + (round + caller) % 8, body, [] { return false; });
                for (const int times : ran) {
                    if (times != 1 || total != count) {
                        std::puts("an index did not run exactly once");
                        std::exit(1);
                    }
                }
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    std::puts("pool: every index ran once");
}

// The coefficients of a JPEG's block: their order, and masks of them.
#pragma once

#include <cstdint>

namespace polydpo::jpeg {

constexpr int block_size = 64;

// A block's coefficients in the order of rows: two lines of the caches.
struct alignas(64) Block {
    std::int16_t values[block_size];
};

// From the order in which they are stored to the order of rows.
// clang-format off
constexpr std::uint8_t place[block_size] = {
     0,  1,  8, 16,  9,  2,  3, 10, 17, 24, 32, 25, 18, 11,  4,  5,
    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,  6,  7, 14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
// clang-format on

// Whether it is one, and stays one of the same sign when further bits make its absolute value grow.
constexpr bool is_coefficient(int value) { return -32768 < value && value < 32768; }

// Masks are in the order of storage, the first coefficient uppermost.
constexpr std::uint64_t bit_of(unsigned position) { return std::uint64_t{1} << 63 >> position; }

// Those of the positions from `low` to `high`, both below 64 and low <= high + 1.
constexpr std::uint64_t bits_of(int low, int high) {
    return low > high ? 0 : ~std::uint64_t{0} >> low & ~std::uint64_t{0} << (63 - high);
}

}  // namespace polydpo::jpeg

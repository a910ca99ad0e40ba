// The inverse DCT of JPEG.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.hpp"

namespace polydpo {

#ifdef POLYDPO_V3
// `count` blocks side by side to eight rows of samples. `coefficients` has 64 for each block, in the order of rows, and
// `last` the position of the last one that may not be zero, in the order of storage; `steps` are those of their
// quantisation. Where `count` is odd, a block more is read, and its samples written.
//
// The samples are those of libjpeg-turbo's "slow" integer DCT with SIMD, bit for bit, which is the default of
// everybody: Loeffler, Ligtenberg and Moschytz 1989 with 13 bits of constants, two bits more than samples between its
// two passes, and words that overflow where coefficients are none that an encoder makes.
void inverse_dct(const std::int16_t* coefficients, const std::uint8_t* last, int count, const std::uint16_t* steps,
                 std::uint8_t* to, std::ptrdiff_t stride);
#endif

}  // namespace polydpo

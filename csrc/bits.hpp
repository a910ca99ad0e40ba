// The bits of a JPEG's scan.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "coefficients.hpp"
#include "simd.hpp"

namespace polydpo::jpeg {

constexpr int most_blocks_of_mcu = 10;
// Symbol and what it is followed by take at most 16 + 15 bits.
constexpr int most_bits = 31;
constexpr std::ptrdiff_t most_bytes_of_block = block_size * most_bits / 8 + 1;
constexpr std::ptrdiff_t most_bytes_of_mcu = most_blocks_of_mcu * most_bytes_of_block + 8;

// The bytes of a scan without what is stuffed between them, a window of them at a time.
class Window {
public:
    // After the header of a scan, or a restart marker. Returns where its bytes are.
    const std::uint8_t* begin(const std::uint8_t* from, const std::uint8_t* end) {
        from_ = from;
        end_ = end;
        limit_ = bytes_;
        at_marker_ = broken_ = false;
        return bytes_;
    }

    // Makes sure that a whole MCU lies between `next` and the limit, or all that is left.
    POLYDPO_INLINE void ensure_mcu(const std::uint8_t*& next) {
        if (limit_ - next < most_bytes_of_mcu && !at_marker_) fill(next);
    }

    // Whether, with `bits` bits before `next` unread, a marker comes next but for the padding of a byte.
    bool finished(const std::uint8_t* next, int bits) {
        if (!at_marker_) fill(next);
        const std::ptrdiff_t unread = (limit_ - next) * 8 + bits;
        return at_marker_ && !broken_ && unread >= 0 && unread < 8;
    }
    bool overrun(const std::uint8_t* next, int bits) const { return (limit_ - next) * 8 + bits < 0; }
    // Of a marker, or where reading goes on.
    const std::uint8_t* from() const { return from_; }
    const std::uint8_t* end() const { return end_; }

private:
    void fill(const std::uint8_t*& next) {
        const std::ptrdiff_t rest = limit_ - next;  // not negative: there is no reading past a limit but at a marker
        std::memmove(bytes_, next, static_cast<std::size_t>(rest));
        std::uint8_t* to = bytes_ + rest;
        while (to < bytes_ + size) {
            const auto most = static_cast<std::size_t>(std::min<std::ptrdiff_t>(bytes_ + size - to, end_ - from_));
            const auto* special = static_cast<const std::uint8_t*>(std::memchr(from_, 0xff, most));
            const std::size_t plain = special != nullptr ? static_cast<std::size_t>(special - from_) : most;
            std::memcpy(to, from_, plain);
            to += plain;
            from_ += plain;
            if (special == nullptr && from_ < end_) break;  // full
            if (end_ - from_ < 2 || from_[1] != 0) {
                at_marker_ = true;
                broken_ = end_ - from_ < 2 || from_[1] == 0xff;  // cut off, or fill bytes
                break;
            }
            *to++ = 0xff;
            from_ += 2;
        }
        next = bytes_;
        limit_ = to;
        std::memset(to, 0, static_cast<std::size_t>(most_bytes_of_mcu) + 8);
    }

    static constexpr std::ptrdiff_t size = 16384;

    const std::uint8_t* from_ = nullptr;
    const std::uint8_t* end_ = nullptr;
    const std::uint8_t* limit_ = bytes_;
    bool at_marker_ = false, broken_ = false;
    std::uint8_t bytes_[size + most_bytes_of_mcu + 16] = {};
};

// The next bits, the first of them uppermost. Beside the `count` that it vouches for, those below may be there already.
struct Bits {
    std::uint64_t bits;
    int count;
    const std::uint8_t* next;

    // 56 at least.
    POLYDPO_INLINE void refill() {
        std::uint64_t word;
        std::memcpy(&word, next, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        bits |= word >> count;
        next += (63 - count) >> 3;
        count |= 56;
    }
    POLYDPO_INLINE void drop(int n) {
        bits <<= n;
        count -= n;
    }
    POLYDPO_INLINE int take(int n) {  // n of 0 to 16
        const int value = static_cast<int>(bits >> 1 >> (63 - n));
        drop(n);
        return value;
    }
};

// A number of `size` bits as JPEG writes it: those that begin with 0 are negative. Without a branch, as nobody could
// foresee it.
POLYDPO_INLINE int extended(int bits, int size) {
    const int least = 1 << size >> 1;  // of the positive ones
    return bits + ((bits - least) >> 31 & (1 - (1 << size)));
}

}  // namespace polydpo::jpeg

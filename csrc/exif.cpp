#include "exif.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

namespace polydpo {

int exif_orientation(const std::uint8_t* tiff, std::size_t size) {
    // A JPEG's, which also chunks and texts of PNGs may have.
    static constexpr char name[6] = {'E', 'x', 'i', 'f', 0, 0};
    if (size >= sizeof name && std::memcmp(tiff, name, sizeof name) == 0) tiff += sizeof name, size -= sizeof name;
    if (size < 8 || tiff[0] != tiff[1] || (tiff[0] != 'I' && tiff[0] != 'M')) return 1;
    const bool little = tiff[0] == 'I';
    const auto u16 = [&](std::size_t at) -> std::uint32_t {
        return little ? tiff[at] | tiff[at + 1] << 8 : tiff[at] << 8 | tiff[at + 1];
    };
    const auto u32 = [&](std::size_t at) { return little ? u16(at) | u16(at + 2) << 16 : u16(at) << 16 | u16(at + 2); };
    const std::size_t directory = u32(4);
    if (u16(2) != 42 || directory > size - 2) return 1;
    std::size_t entry = directory + 2;
    for (std::uint32_t left = u16(directory); left > 0 && size - entry >= 12; --left, entry += 12) {
        if (u16(entry) != 0x0112) continue;
        const std::uint32_t type = u16(entry + 2);  // 3: SHORT, in the first two of four bytes; 4: LONG, in all
        const std::uint32_t value = type == 3 ? u16(entry + 8) : type == 4 ? u32(entry + 8) : 1;
        return u32(entry + 4) == 1 && value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
    }
    return 1;
}

int raw_profile_orientation(const std::uint8_t* text, std::size_t size) {
    const std::uint8_t *at = text, *const end = text + size;
    for (int line = 0; line < 3; ++line) {
        at = std::find(at, end, '\n');
        if (at == end) return 1;
        ++at;
    }
    std::vector<std::uint8_t> exif;
    int first = -1;
    for (; at < end; ++at) {
        const int letter = *at | 32;
        const int digit = *at >= '0' && *at <= '9'         ? *at - '0'
                          : letter >= 'a' && letter <= 'f' ? letter - 'a' + 10
                                                           : -1;
        if (digit < 0) {
            if (*at == '\n' || *at == ' ') continue;
            return 1;
        }
        if (first >= 0) exif.push_back(static_cast<std::uint8_t>(first << 4 | digit));
        first = first >= 0 ? -1 : digit;
    }
    return first >= 0 ? 1 : exif_orientation(exif.data(), exif.size());
}

}  // namespace polydpo

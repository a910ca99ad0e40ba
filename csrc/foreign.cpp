#include "foreign.hpp"

#include <cstring>
#include <exception>

#include "jpeg.hpp"

namespace polydpo {
namespace {

// The body of a start of frame: precision, height, width, count, then of each component its name, h and v in a byte,
// table.
bool is_common_frame(const std::uint8_t* body, std::size_t length) {
    if (length < 9 || body[0] != 8) return false;
    if (body[5] == 1) return true;
    if (body[5] != 3 || length < 15) return false;
    if (body[6] == 'R' && body[9] == 'G' && body[12] == 'B') return false;
    const int luma = body[7];
    return (luma == 0x11 || luma == 0x21 || luma == 0x22) && body[10] == 0x11 && body[13] == 0x11;
}

std::int64_t blocks(int pixels, int of_each) { return (std::int64_t{pixels} + of_each - 1) / of_each; }

// How many restarts a scan is to have, by its header and that of its frame.
std::int64_t restarts_of(const std::uint8_t* scan, const std::uint8_t* frame, int interval) {
    if (interval == 0) return 0;
    const int height = frame[1] << 8 | frame[2], width = frame[3] << 8 | frame[4];
    const bool grey = frame[5] == 1;
    const int across = grey ? 1 : frame[7] >> 4, down = grey ? 1 : frame[7] & 15;
    // Of luma alone the blocks count, of chroma alone those of its own, smaller size; of several the units they share.
    const bool luma = scan[0] == 1 && scan[1] == frame[6];
    const std::int64_t units =
        luma ? blocks(height, 8) * blocks(width, 8) : blocks(height, 8 * down) * blocks(width, 8 * across);
    return (units - 1) / interval;
}

bool is_common_and_whole(const std::uint8_t* data, std::size_t size, int most_scans) {
    int scans = 0, interval = 0;
    const std::uint8_t* frame = nullptr;
    bool progressive = false;
    const std::uint8_t *at = data + 2, *const end = data + size;
    while (end - at >= 2 && *at == 0xff) {
        while (at < end && *at == 0xff) ++at;
        if (at == end) return false;
        const int marker = *at++;
        if (marker == 0xd9) return scans > 0;
        if (end - at < 2) return false;
        const std::size_t length = std::size_t{at[0]} << 8 | at[1];
        if (length < 2 || length > static_cast<std::size_t>(end - at)) return false;
        const std::uint8_t* body = at + 2;
        at += length;
        if (marker >= 0xc0 && marker <= 0xcf && marker != 0xc4) {  // a frame, or arithmetic coding (0xc8 is none)
            if (marker > 0xc2 || !is_common_frame(body, length - 2)) return false;
            frame = body;
            progressive = marker == 0xc2;
        } else if (marker == 0xdd) {
            if (length < 4) return false;
            interval = body[0] << 8 | body[1];
        } else if (marker == 0xee) {  // Adobe's, whose last byte is the colour transform: 1 is YCbCr
            if (length >= 14 && std::memcmp(body, "Adobe", 5) == 0 && body[11] != 1) return false;
        } else if (marker == 0xda) {
            if (frame == nullptr || ++scans > most_scans || length < 3 || length < 6u + 2 * body[0]) return false;
            const std::uint8_t* const range = body + 1 + 2 * body[0];  // of coefficients, and their bits
            if (!progressive && (range[0] != 0 || range[1] != 63 || range[2] != 0)) return false;
            const std::int64_t restarts = restarts_of(body, frame, interval);
            std::int64_t seen = 0;
            // Up to the next marker: 0xff 0x00 is a byte of data, 0xff 0xd0 to 0xd7 are between data.
            do {
                at = static_cast<const std::uint8_t*>(std::memchr(at, 0xff, static_cast<std::size_t>(end - at)));
                if (at == nullptr || end - at < 2) return false;
                if ((at[1] & 0xf8) == 0xd0) {
                    if (at[1] != (0xd0 | (seen++ & 7))) return false;
                } else if (at[1] != 0) {
                    break;
                }
                at += 2;
            } while (true);
            if (seen != restarts) return false;
        } else if (marker < 0xda && marker != 0xc4) {
            return false;  // reserved, or out of place
        }
    }
    return false;
}

}  // namespace

std::optional<ForeignPlan> foreign_plan(const Image& image, const Draw& draw, Size output, Resize resize,
                                        Interpolation interpolation, bool apply_orientation, const Limits& limits) {
    try {
        if (image.bytes > static_cast<std::size_t>(limits.bytes) || !is_jpeg(image.data, image.bytes)) return {};
        const JpegHeader header(image.data, image.bytes, limits, true);
        if (!is_common_and_whole(image.data, image.bytes, limits.scans)) return {};
        const Size source = header.size();
        const Geometry way = plan(source, apply_orientation ? header.orientation() : 1, output, resize, draw);
        const bool as_it_is = way.stored.height == source.height && way.stored.width == source.width;
        if (!as_it_is && Resampler::memory(source, way, interpolation) > limits.decoded) return {};
        return ForeignPlan{source, way};
    } catch (const std::exception&) {
        return {};  // our decoder says what is wrong
    }
}

}  // namespace polydpo

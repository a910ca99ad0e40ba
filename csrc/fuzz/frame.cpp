// libFuzzer target: decoded frames of any form under any geometry. The first bytes choose the form and the options, and
// the rest are the samples. Planes and output are allocated exactly: reads and writes beyond them are seen. Built by
// scripts/fuzz.sh.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../decode.hpp"
#include "../error.hpp"
#include "../frame.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;

// `count` bytes of the input, again and again.
Bytes repeated(const std::uint8_t* data, std::size_t size, std::size_t start, std::size_t count) {
    Bytes result(count);
    for (std::size_t i = 0; i < count && size > 0; ++i) result[i] = data[(start + i) % size];
    return result;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace polydpo;
    constexpr std::size_t choices = 16;
    if (size < choices) return 0;
    const std::uint8_t* const chosen = data;
    data += choices;
    size -= choices;
    static constexpr int depths[] = {8, 8, 8, 10, 12};
    Frame frame{};
    frame.size = {1 + chosen[0] % 70, 1 + chosen[1] % 70};
    frame.depth = depths[chosen[2] % 5];
    frame.shift_x = chosen[3] & 1;
    frame.shift_y = chosen[3] >> 1 & 1;
    frame.full_range = chosen[3] & 4;
    frame.matrix = static_cast<Matrix>(chosen[3] / 8 % 6);
    if (frame.matrix == Matrix::rgb) frame.shift_x = frame.shift_y = 0;
    frame.siting = static_cast<Siting>(chosen[15] % 6);
    frame.orientation = 1 + chosen[4] % 8;
    // Square pixels mostly.
    frame.shown = chosen[5] % 4 ? frame.size : Size{1 + chosen[5] % 70, frame.size.width};
    Bytes planes[3];
    for (int part = 0; part < 3; ++part) {
        const int width = part ? (frame.size.width + frame.shift_x) >> frame.shift_x : frame.size.width;
        const int height = part ? (frame.size.height + frame.shift_y) >> frame.shift_y : frame.size.height;
        const std::size_t row = static_cast<std::size_t>(width) * (frame.depth > 8 ? 2 : 1);
        const std::size_t stride = row + chosen[6] % 9;
        planes[part] = repeated(data, size, 7u * part, stride * (height - 1) + row);
        frame.planes[part] = planes[part].data();
        frame.strides[part] = static_cast<std::ptrdiff_t>(stride);
    }
    Options options{};
    options.output = {1 + chosen[7] % 70, 1 + chosen[8] % 140};
    options.resize = static_cast<Resize>(chosen[9] % 4);
    options.interpolation = static_cast<Interpolation>(chosen[9] / 4 % 2);
    options.planes = chosen[10] % 8 == 7;
    if (options.planes) options.output = {2 + options.output.height / 2 * 2, 2 + options.output.width / 2 * 2};
    options.dtype = static_cast<Dtype>(chosen[10] % 4);
    options.normal = {{127.5f, 127.5f, 127.5f}, {1 / 127.5f, 1 / 127.5f, 1 / 127.5f}};
    options.background = {255, 0, 7};
    options.apply_orientation = chosen[11] & 1;
    options.limits.decoded = 1 << 24;
    const Draw draw{(chosen[11] & 2) != 0, chosen[12] * 0x01010101u, chosen[13] * 0x01010101u, (chosen[11] & 4) != 0};
    const std::size_t area = static_cast<std::size_t>(options.output.height) * options.output.width;
    // Frames of a clip lie between each other's planes.
    const std::size_t plane = area * (1 + chosen[14] % 2);
    const std::size_t bytes = options.planes ? area * 3 / 2 : (2 * plane + area) * size_of(options.dtype);
    std::vector<char> out(bytes);
    Decoded result;
    try {
        FrameReader reader(frame);
        render(reader, draw, options, Finish(options.dtype, options.normal), out.data(), plane, result);
        // Bytes depend on nothing but the input.
        std::vector<char> again(bytes, 1);
        FrameReader same(frame);
        render(same, draw, options, Finish(options.dtype, options.normal), again.data(), plane, result);
        if (plane == area && std::memcmp(out.data(), again.data(), bytes) != 0) __builtin_trap();
    } catch (const DecodeError&) {
    }
    return 0;
}

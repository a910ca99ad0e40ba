// libFuzzer target: any bytes as an image, under any geometry. Neither may crash, leak or take more than the limits.
// Built by scripts/fuzz.sh. The first eight bytes choose the options.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../decode.hpp"
#include "../foreign.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace polydpo;
    if (size < 8) return 0;
    const std::uint8_t* const chosen = data;
    data += 8;
    size -= 8;
    Options options{};
    options.output = {1 + chosen[0] % 40, 1 + chosen[1] % 40};
    options.resize = static_cast<Resize>(chosen[2] % 4);
    options.interpolation = static_cast<Interpolation>(chosen[2] / 4 % 2);
    options.planes = chosen[3] % 5 == 4;
    if (options.planes) options.output = {2 * options.output.height, 2 * options.output.width};
    options.dtype = static_cast<Dtype>(chosen[3] % 4);
    options.normal = {{127.5f, 127.5f, 127.5f}, {1 / 127.5f, 1 / 127.5f, 1 / 127.5f}};
    options.background = {255, 255, 255};
    options.apply_orientation = chosen[4] & 1;
    options.strict = chosen[4] & 2;
    options.limits = {1 << 16, 1 << 20, 1 << 20, 10};
    options.threads = 1;
    const Draw draw{(chosen[4] & 4) != 0, chosen[5] * 0x01010101u, chosen[6] * 0x01010101u, (chosen[4] & 8) != 0};
    Image image{data, size};
    if (chosen[7] % 16 == 0 && size >= 4) {  // pixels that somebody else has decoded
        image.raw = {1, static_cast<int>(size / 4)};
        image.bytes = size / 4 * 4;
        image.orientation = 1 + chosen[7] / 16 % 8;
    }
    std::vector<char> out(3 * sizeof(float) * static_cast<std::size_t>(options.output.height) * options.output.width);
    foreign_plan(image, draw, options.output, options.resize, options.interpolation, options.apply_orientation,
                 options.limits);
    decode_batch({image}, {draw}, options, out.data(), nullptr);
    return 0;
}

// libFuzzer target: any bytes as a JPEG, decoded with our own decoder and with libjpeg. Unless ours gives
// it up, pixels and errors are the same, whatever the damage. The first eight bytes choose the options, as those of
// decode.cpp.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../decode.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace polydpo;
    if (size < 8) return 0;
    const std::uint8_t* const chosen = data;
    data += 8;
    size -= 8;
    Options options{};
    options.output = {1 + chosen[0] % 40, 1 + chosen[1] % 40};
    options.resize = static_cast<Resize>(chosen[2] % 4);
    options.planes = chosen[3] % 4 == 3;
    if (options.planes) options.output = {2 * options.output.height, 2 * options.output.width};
    options.dtype = Dtype::uint8;
    options.normal = {{0, 0, 0}, {1, 1, 1}};
    options.strict = chosen[4] & 2;
    options.limits = {1 << 16, 1 << 20, 1 << 22, 10};
    options.threads = 1;
    const Draw draw{(chosen[4] & 4) != 0, chosen[5] * 0x01010101u, chosen[6] * 0x01010101u, false};
    std::vector<char> out[2];
    std::vector<Decoded> results[2];
    for (int own = 0; own < 2; ++own) {
        options.jpeg = own ? JpegDecoder::own : JpegDecoder::libjpeg;
        out[own].resize(3 * static_cast<std::size_t>(options.output.height) * options.output.width);
        results[own] = decode_batch({{data, size}}, {draw}, options, out[own].data(), nullptr);
    }
    if (results[1][0].error == "only libjpeg can decode it") return 0;
    if (out[0] != out[1] || results[0][0].error != results[1][0].error) {
        std::fprintf(stderr, "libjpeg: %s\nours: %s\n", results[0][0].error.c_str(), results[1][0].error.c_str());
        std::abort();
    }
    return 0;
}

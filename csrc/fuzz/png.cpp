// libFuzzer target: any bytes as a PNG, strictly or not, all of its rows or some. Built by scripts/fuzz.sh. One of the
// first eight bytes chooses, so that the seeds of decode.cpp serve here too; checksums are not looked at. With
// -DPOLYDPO_FUZZ_MAIN any compiler builds a program that replays the files named on its command line.
#include "../png.hpp"

#include <vector>

#include "../error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < 8) return 0;
    const int choice = data[4] >> 1;                              // its lowest bit is decode.cpp's for strict
    const std::vector<std::uint8_t> file(data + 8, data + size);  // its own allocation: reads beyond it are seen
    try {
        const polydpo::Limits limits{1 << 16, 1 << 20, 1 << 20, 1};
        polydpo::PngReader reader(file.data(), file.size(), limits, choice & 1, {10, 100, 200});
        const polydpo::Size stored = reader.size();
        const int top = choice & 2 ? stored.height / 3 : 0;
        const int height = choice & 4 ? (stored.height - top + 1) / 2 : stored.height - top;
        const polydpo::Region given = reader.start({top, 0, height, stored.width});
        std::vector<std::uint8_t> row(4 * static_cast<std::size_t>(given.width));
        for (int y = 0; y < given.height; ++y) reader.read_row(row.data());
        reader.finish();
        const int orientation = reader.orientation();
        if (orientation < 1 || orientation > 8) __builtin_trap();
    } catch (const polydpo::DecodeError&) {
    }
    return 0;
}

#ifdef POLYDPO_FUZZ_MAIN
#include <fstream>
#include <iterator>

int main(int count, char** names) {
    for (int i = 1; i < count; ++i) {
        std::ifstream stream(names[i], std::ios::binary);
        const std::vector<char> bytes{std::istreambuf_iterator<char>(stream), {}};
        LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    }
}
#endif

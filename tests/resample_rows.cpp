// One row across, by the loop that any processor can run and by that for AVX2: see test_resample.py.
#include "../csrc/resample.cpp"

using namespace polydpo;

// 1 where AVX2 is missing, and nothing was done.
extern "C" int resample_both(const std::uint8_t* in, const int* first, const std::int16_t* weights, int quads, int width,
                             float unit, float* plain, float* quick) {
#ifdef POLYDPO_V3
    if (is_x86_64_v3()) {
        resample_plainly(in, first, weights, quads, width, unit, plain);
        resample_by_v3(in, first, weights, quads, width, unit, quick);
        return 0;
    }
#endif
    return 1;
}

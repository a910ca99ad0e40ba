#!/bin/sh
# The pool under ThreadSanitizer; decoder and CPU loss, through their tests, under AddressSanitizer and UBSan.
set -eu
BIN=${1:?usage: sanitize.sh DIRECTORY_OF_PYTHON}
BUILD=build/sanitize
mkdir -p "$BUILD"

g++ -std=c++17 -g -O1 -fsanitize=thread csrc/pool.cpp csrc/stress/pool.cpp -o "$BUILD/pool" -pthread
"$BUILD/pool"

FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -DPOLYDPO_NO_CLONES -g -O1"
rm -rf "$BUILD/package"
# Some versions of setuptools compile C++ with CFLAGS, others with CXXFLAGS.
CFLAGS="$FLAGS" CXXFLAGS="$FLAGS" LDFLAGS="-fsanitize=address,undefined" \
    "$BIN/python" -m pip install -q --no-deps --no-build-isolation --target "$BUILD/package" .
nm "$BUILD"/package/polydpo_fast/_C*.so | grep -q __asan_report \
    || { echo "sanitize: the extension was built without AddressSanitizer" >&2; exit 1; }
# Python and PyTorch leave things to the end of the process: leaks are libFuzzer's business (scripts/fuzz.sh).
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    PYTHONPATH="$BUILD/package" "$BIN/pytest" -p no:cacheprovider tests/test_decode*.py tests/test_quick_jpeg.py tests/test_resample.py tests/test_clips.py tests/test_frame_store.py \
    tests/test_fast_lane.py tests/test_options.py --timeout=1200

#!/bin/sh
# Runs every libFuzzer target of csrc/fuzz for some seconds each, with AddressSanitizer and UBSan.
set -eu
BIN=${1:?usage: fuzz.sh DIRECTORY_OF_PYTHON [SECONDS]}
SECONDS_EACH=${2:-60}
BUILD=build/fuzz
command -v clang++ >/dev/null || { echo "fuzz: clang++ was not found: apt install clang libclang-rt-14-dev" >&2; exit 1; }
mkdir -p "$BUILD"
"$BIN/python" scripts/fuzz_seeds.py "$BUILD/seeds"
for target in csrc/fuzz/*.cpp; do
    name=$(basename "$target" .cpp)
    # shellcheck disable=SC2046 # lists of words
    clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined \
        -DPOLYDPO_NO_CLONES -DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION -Wno-psabi \
        "$target" $(ls csrc/*.cpp | grep -v bindings.cpp) $(pkg-config --cflags --libs libjpeg libdeflate) \
        -pthread -o "$BUILD/$name"
    mkdir -p "$BUILD/corpus-$name"
    echo "fuzz: $name, $SECONDS_EACH s"
    "$BUILD/$name" "$BUILD/corpus-$name" "$BUILD/seeds" -max_total_time="$SECONDS_EACH" -max_len=65536 -timeout=10 \
        -rss_limit_mb=1024 -artifact_prefix="$BUILD/" -print_final_stats=1 2>"$BUILD/$name.log" \
        || { tail -40 "$BUILD/$name.log"; exit 1; }
    grep -E "stat::(number_of_executed_units|average_exec)" "$BUILD/$name.log"
done

#!/bin/sh
# Runs the drivers under AddressSanitizer and UBSan: one with right arguments and one with hostile
# ones. The first one also under valgrind (which knows no AVX-512: scalar and AVX2 run there) and,
# with a cross compiler and qemu-user, on aarch64.
#
#     ./sanitize.sh [cases]
set -e
cd "$(dirname "$0")"
cases=${1:-300}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
core=../../src/hf_sparse/kernels/cpu/csrc
flags="-std=c++17 -g -I$core"

for cxx in g++ clang++; do
    command -v $cxx >/dev/null || continue
    echo "== $cxx, AddressSanitizer and UndefinedBehaviorSanitizer"
    $cxx $flags -O1 -fsanitize=address,undefined -fno-sanitize-recover=all \
        $core/*.cpp sanitize_driver.cpp -o "$build/sanitized"
    "$build/sanitized" "$cases"
    $cxx $flags -O1 -fsanitize=address,undefined -fno-sanitize-recover=all \
        $core/*.cpp hostile_driver.cpp -o "$build/hostile"
    "$build/hostile" "$((cases * 10))"
    echo "== $cxx -O3"
    $cxx $flags -O3 $core/*.cpp sanitize_driver.cpp -o "$build/fast"
    "$build/fast" "$cases"
done

echo "== torch's operators with hostile arguments, g++, AddressSanitizer and UndefinedBehaviorSanitizer"
g++ $flags -O1 -fPIC -shared -fsanitize=address,undefined -fno-sanitize-recover=all \
    $core/*.cpp -o "$build/_tiles.so"
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 \
    python -W ignore ../helpers/hostile_calls.py "$((cases * 70))" "$build/_tiles.so"

if command -v valgrind >/dev/null; then
    echo "== valgrind"
    g++ $flags -O2 $core/*.cpp sanitize_driver.cpp -o "$build/plain"
    valgrind --quiet --error-exitcode=1 "$build/plain" "$((cases / 10))"
else
    echo "== valgrind: not installed, unrun"
fi

if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
    echo "== aarch64 under qemu"
    aarch64-linux-gnu-g++ $flags -O3 -static $core/*.cpp sanitize_driver.cpp -o "$build/aarch64"
    qemu-aarch64 "$build/aarch64" "$cases"
else
    echo "== aarch64: no cross compiler or no qemu-user, unrun"
fi

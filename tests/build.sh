#!/usr/bin/env bash
# Builds the C++ library in place (tvm_infer/lib), for working on it: seconds after the first time.
# usage: tests/build.sh      (uses the python on PATH; it needs apache-tvm-ffi, cmake and ninja)
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S cmake -B build/dev -G Ninja -DPython_EXECUTABLE="$(command -v python3)" >build_dev.log 2>&1 || { cat build_dev.log; exit 1; }
rm -f build_dev.log
cmake --build build/dev
cmake --install build/dev --prefix tvm_infer >/dev/null

#!/usr/bin/env bash
# Builds the example against the TVM that a Python has installed. What it makes runs without Python.
#   PYTHON=python3.12       the Python whose TVM is linked
#   examples/cpp/build.sh [folder, default build/example]     -> FOLDER/generate, and how to start it
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3} OUT=${1:-../../build/example}
tvm_ffi_root=$("$PYTHON" -m tvm_ffi.config --cmakedir)
tvm_ffi_lib=$("$PYTHON" -m tvm_ffi.config --libdir)
tvm_lib=$("$PYTHON" -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("tvm").origin).parent / "lib")')
cmake -S . -B "$OUT" -Dtvm_ffi_ROOT="$tvm_ffi_root" -DTVM_LIBRARY_DIR="$tvm_lib" -DPython_EXECUTABLE="$(command -v "$PYTHON")" >/dev/null
cmake --build "$OUT" --parallel >/dev/null
echo "LD_LIBRARY_PATH=$tvm_ffi_lib:$tvm_lib $(realpath "$OUT")/generate model.so model.safetensors prompts.txt"

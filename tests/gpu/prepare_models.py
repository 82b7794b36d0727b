"""Compiles the models that test_gpu_model.py runs, where TVM's compiler and nvcc are; a GPU machine then needs TVM's runtime alone.

  python tests/gpu/prepare_models.py DIR      writes DIR/smollm2 and DIR/smollm2_plain_launches (code, not weights: those come
                                              from the GGUF file)

Without a driver (libcuda.so.1) TVM stores CUDA source instead of binaries, and the GPU machine compiles it at load.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

import tvm_infer
from tvm_infer.models import find_smollm2
from tvm_infer.runtime import library

MAX_BATCH, MAX_TOKENS = 16, 512


def compile_smollm2(*, programmatic_launch=True):
    """For CUDA, in bfloat16."""
    return tvm_infer.compile(
        str(find_smollm2()),
        target="cuda",
        max_batch=MAX_BATCH,
        max_tokens=MAX_TOKENS,
        programmatic_launch=programmatic_launch,
    )


def main(out: str) -> None:
    for model, programmatic_launch in (("smollm2", True), ("smollm2_plain_launches", False)):
        executable = compile_smollm2(programmatic_launch=programmatic_launch)
        folder = pathlib.Path(out) / model
        folder.mkdir(parents=True, exist_ok=True)
        for name in (library.LIBRARY, library.MANIFEST, library.REPORT):
            shutil.copy(executable.folder / name, folder / name)
        print(executable.explain())


if __name__ == "__main__":
    main(sys.argv[1])

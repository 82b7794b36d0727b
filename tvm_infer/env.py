"""Every TVM_INFER_* setting, in one table."""

from __future__ import annotations

import os
import pathlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One environment variable: its name, default, and what it does."""

    name: str
    default: str
    meaning: str

    @property
    def value(self) -> str:
        """The value in force."""
        return os.environ.get(self.name, self.default)


SETTINGS = (
    Setting("TVM_INFER_CACHE_DIR", "~/.cache/tvm_infer", "where compiled models and kernels are kept"),
    Setting(
        "TVM_INFER_NUM_THREADS",
        "",
        "threads of the CPU executor; empty: the processors this process may run on",
    ),
    Setting("TVM_INFER_CPU_ISA", "", "avx512, avx2 or portable; empty: the best that this processor has"),
    Setting("TVM_INFER_NVCC", "", "the nvcc to compile kernels with; empty: of CUDA_HOME, PATH or the extra `cuda`"),
    Setting(
        "TVM_INFER_CUBIN_DIR", "", "folder of prebuilt kernels (tvm-infer build --out), looked in before compiling"
    ),
    Setting(
        "TVM_INFER_CXX",
        "",
        "the C++ compiler for the MLC adapter and for attention variants on the CPU; empty: CXX, else g++, c++ or clang++ on PATH",
    ),
    Setting(
        "TVM_INFER_MLC_LIBRARY",
        "",
        "a prebuilt MLC adapter (docs/mlc.md); empty: of the cache, built if it is not there",
    ),
    Setting(
        "TVM_INFER_CUBLASLT",
        "",
        "the libcublasLt.so of products on CUDA; empty: one that is loaded, of a CUDA toolkit, or of the extra `cuda`",
    ),
    Setting(
        "TVM_INFER_MATMUL_TF32", "0", "1: float32 products on CUDA may round their inputs to TF32 (10 bits of mantissa)"
    ),
    Setting(
        "TVM_INFER_MATMUL_GEMV", "1", "0: products of a few rows on CUDA go to cuBLASLt too, not to our own kernel"
    ),
    Setting("TVM_INFER_NVTX", "0", "1: steps are named ranges in NVIDIA's profilers (needs the package nvtx)"),
    Setting("TVM_INFER_PROGRESS", "1", "0: no line on standard error while a kernel is compiled"),
    Setting("TVM_INFER_LINEINFO", "0", "1: kernels carry line numbers for profilers (and paths of their headers)"),
    Setting(
        "TVM_INFER_DEBUG_CHECKS", "0", "1: check every page index before it is used; on CUDA that makes every call wait"
    ),
)


def setting(name: str) -> Setting:
    """The setting called `name`."""
    return next(s for s in SETTINGS if s.name == name)


def cache_dir() -> pathlib.Path:
    """The cache folder, not necessarily existing."""
    return pathlib.Path(setting("TVM_INFER_CACHE_DIR").value).expanduser()

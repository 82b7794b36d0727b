"""Compiling the fake libcuda.so.1, and Python processes that have it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
CUDA_SRC = HERE.parents[1] / "cuda_src"
COMPILER = shutil.which("c++") or shutil.which("g++")
CUDA_HEADERS = [
    p for p in (pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include",) if (p / "cuda.h").exists()
]


def compile_fake(folder: pathlib.Path, *flags: str) -> pathlib.Path:
    """fake_libcuda.cc as libcuda.so.1 in that folder, which is returned."""
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", "-I", str(CUDA_SRC), "-Wl,-soname,libcuda.so.1", *flags]
    subprocess.run([*command, str(HERE / "fake_libcuda.cc"), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


def python(
    arguments: list[str], library: pathlib.Path | str | None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python process whose dynamic loader looks into the folder `library` (or folders) first."""
    paths = [str(library)] if library else []
    env = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join([*paths, os.environ.get("LD_LIBRARY_PATH", "")]),
        **environment,
    }
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)

"""Finds nvcc and runs it: device code only, straight to a cubin.

A CUDA toolkit is not needed: the extra `cuda` installs NVIDIA's packages nvidia-cuda-nvcc, -crt, -runtime and nvidia-nvvm (125 MB),
which land in site-packages/nvidia/cu13 as one tree with bin/nvcc. nvcc itself wants a C++ compiler on PATH, whose preprocessor it uses.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .. import env
from ..errors import ArgumentError, CompileError, MissingDependencyError

INSTALL_HINT = "pip install 'tvm_infer[cuda]' (NVIDIA's own packages, no toolkit needed)"
_KEPT_LINES = 40  # of what a failing nvcc printed, from the end
# Set by users to steer nvcc; they change what it makes, so they are part of a kernel's key.
STEERING_VARIABLES = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


@dataclass(frozen=True)
class Arch:
    """An architecture that kernels are compiled for: nvcc's name of its virtual half, and the first release that knows it."""

    virtual: str
    first_release: tuple[int, int]


ARCHS = {"sm_90a": Arch("compute_90a", (12, 0))}  # 12.0 is also the first with C++20


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that answers. found_by : what led to it. version : all that `nvcc --version` prints."""

    path: str
    found_by: str
    release: tuple[int, int]
    version: str

    def __str__(self) -> str:
        return f"{self.release[0]}.{self.release[1]} ({self.path}, by {self.found_by})"


@dataclass(frozen=True)
class Run:
    """What a run of nvcc printed, and its time: seconds by the clock, and of all its processes together."""

    log: str
    seconds: float
    cpu_seconds: float


def find() -> Nvcc:
    """The nvcc to use: setting TVM_INFER_NVCC, else CUDA_HOME, else PATH, else the packages of the extra `cuda`.

    Raises MissingDependencyError that says what to install; ArgumentError where TVM_INFER_NVCC names something that is no nvcc.
    """
    chosen = env.setting("TVM_INFER_NVCC").value
    if chosen:
        if shutil.which(chosen) is None:
            raise ArgumentError(
                f"setting TVM_INFER_NVCC is {chosen!r}, which is no executable file: name one, or unset it"
            )
        return _ask(chosen, "TVM_INFER_NVCC")
    home = os.environ.get("CUDA_HOME", "")
    packaged = _packaged()
    for path, found_by in (
        (shutil.which("nvcc", path=f"{home}/bin") if home else None, "CUDA_HOME"),
        (shutil.which("nvcc"), "PATH"),
        (str(packaged) if packaged else None, "the package nvidia-cuda-nvcc"),
    ):
        if path:
            return _ask(path, found_by)
    raise MissingDependencyError(
        f"nvcc is needed to compile CUDA kernels and is neither on PATH, nor in CUDA_HOME, nor installed as a package: {INSTALL_HINT}, "
        "or set TVM_INFER_NVCC to one, or bring kernels built elsewhere (`tvm-infer build --out DIR`) and set TVM_INFER_CUBIN_DIR"
    )


def _packaged() -> pathlib.Path | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = sorted(pathlib.Path(folder).glob("cu*/bin/nvcc"))
        if found:
            return found[-1]
    return None


@functools.cache
def _ask(path: str, found_by: str) -> Nvcc:
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise ArgumentError(f"{path} (by {found_by}) does not run: {error}") from error
    release = re.search(r"release (\d+)\.(\d+)", version)
    if release is None:
        raise ArgumentError(f"{path} (by {found_by}) is no nvcc: `--version` printed {version[:200]!r}")
    return Nvcc(path, found_by, (int(release[1]), int(release[2])), version)


def flags(arch: str) -> tuple[str, ...]:
    """nvcc's flags for `arch`, without paths. Raises ArgumentError for an architecture that has no kernels."""
    if arch not in ARCHS:
        raise ArgumentError(f"argument `arch` is {arch!r}; kernels are compiled for {', '.join(ARCHS)}")
    # Line numbers (for profilers) put paths of the headers into the cubin and treble its size: only where asked for.
    lines = ("-lineinfo",) if env.setting("TVM_INFER_LINEINFO").value == "1" else ()
    gencode = f"-gencode=arch={ARCHS[arch].virtual},code={arch}"
    # The C++ compiler only preprocesses here, so that any version of it will do.
    return ("-cubin", gencode, "-std=c++20", "-O3", "-allow-unsupported-compiler", "-Xptxas", "-v", *lines)


def check_release(nvcc: Nvcc, arch: str) -> None:
    """Raises MissingDependencyError where `nvcc` is too old for `arch`."""
    first = ARCHS[arch].first_release
    if nvcc.release < first:
        raise MissingDependencyError(
            f"nvcc {nvcc} is too old: {arch} with C++20 needs {first[0]}.{first[1]} or newer. {INSTALL_HINT} and set TVM_INFER_NVCC "
            "to it, or put a newer one first on PATH"
        )


def compile_cubin(
    nvcc: Nvcc, source: pathlib.Path, cubin: pathlib.Path, arch: str, include_dirs: Sequence[pathlib.Path]
) -> Run:
    """Compile `source` to `cubin`.

    Raises CompileError holding the command and what nvcc printed; MissingDependencyError without a C++ compiler.
    """
    check_release(nvcc, arch)
    includes = [part for folder in include_dirs for part in ("-I", str(folder))]
    command = [nvcc.path, *flags(arch), *includes, source.name, "-o", str(cubin)]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        start = time.perf_counter()
        # In its folder, by its bare name, so that no path of this machine gets into the cubin.
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=source.parent) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        output.seek(0)
        log = output.read()
    if process.returncode != 0:
        raise _failure(nvcc, command, process.returncode, log, source.stem)
    return Run(log, seconds, usage.ru_utime + usage.ru_stime)


def _failure(
    nvcc: Nvcc, command: Sequence[str], code: int, log: str, name: str
) -> CompileError | MissingDependencyError:
    last = "\n".join(log.strip().splitlines()[-_KEPT_LINES:])
    if re.search(r"Failed to preprocess host compiler properties|g\+\+: (not found|No such file)", log):
        return MissingDependencyError(
            f"nvcc {nvcc} needs a C++ compiler on PATH (it preprocesses with it) and found none: install g++. It said:\n{last}"
        )
    return CompileError(f"nvcc could not compile {name} (exit status {code})\n  command: {' '.join(command)}\n{last}")

"""The cuBLASLt behind `tvm_infer.matmul` and `matmul_add` on CUDA devices: found, and opened once.

NVIDIA's library comes with torch, with a CUDA toolkit, or as a package of its own: nvidia-cublas (CUDA 13), nvidia-cublas-cu12.
Programs without Python name it by TVM_INFER_CUBLASLT or leave it to the dynamic loader.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from . import _ffi, env
from .errors import MissingDependencyError

INSTALL_HINT = (
    "pip install 'tvm_infer[cuda]', which brings NVIDIA's package nvidia-cublas "
    "(for drivers before 580: pip install nvidia-cublas-cu12)"
)
_SONAMES = ("libcublasLt.so.13", "libcublasLt.so.12")  # newest first
_FIRST_DRIVER = {"libcublasLt.so.13": 13000}  # CUDA version of the driver that a library needs at least


@dataclass(frozen=True)
class Library:
    """A libcublasLt.so, and what led to it."""

    path: str
    found_by: str

    def __str__(self) -> str:
        return f"{self.path}, by {self.found_by}"


def find() -> Library | None:
    """The library to use: setting TVM_INFER_CUBLASLT, else one that this process has loaded (torch's), else of the CUDA toolkit, else
    of NVIDIA's package; None where there is none. Among a place's libraries the newest that the driver can run."""
    chosen = env.setting("TVM_INFER_CUBLASLT").value
    if chosen:
        return Library(chosen, "TVM_INFER_CUBLASLT")
    loaded = _loaded()
    if loaded is not None:
        return Library(loaded, "this process, which had loaded it")
    driver = _driver_version()
    names = [name for name in _SONAMES if driver is None or driver >= _FIRST_DRIVER.get(name, 0)]
    for folder, found_by in (*_toolkits(), *_packages()):
        for name in names:
            if (folder / name).exists():
                return Library(str(folder / name), found_by)
    return None


def need() -> Library:
    """:func:`find`, or MissingDependencyError that says what to install."""
    found = find()
    if found is None:
        raise MissingDependencyError(
            f"matmul on CUDA devices needs NVIDIA's cuBLASLt, and neither this process, nor a CUDA toolkit, nor a package has a "
            f"{' or '.join(_SONAMES)} that the driver runs: {INSTALL_HINT}; or set TVM_INFER_CUBLASLT to its path"
        )
    return found


def _loaded() -> str | None:
    try:
        maps = pathlib.Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"(/\S*libcublasLt\.so\.1[23]\S*)$", maps, re.MULTILINE)
    return found.group(1) if found else None


def _driver_version() -> int | None:
    """13000 for CUDA 13.0; None without a driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return version.value


def _toolkits() -> Iterator[tuple[pathlib.Path, str]]:
    home, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    if home:
        yield pathlib.Path(home) / "lib64", "CUDA_HOME"
    if nvcc:
        yield pathlib.Path(nvcc).resolve().parents[1] / "lib64", "nvcc on PATH"
    yield pathlib.Path("/usr/local/cuda/lib64"), "/usr/local/cuda"


def _packages() -> Iterator[tuple[pathlib.Path, str]]:
    spec = importlib.util.find_spec("nvidia")  # a namespace of many packages
    for folder in spec.submodule_search_locations or () if spec else ():
        yield pathlib.Path(folder) / "cu13" / "lib", "the package nvidia-cublas"
        yield pathlib.Path(folder) / "cublas" / "lib", "the package nvidia-cublas-cu12"


def path_or_empty() -> str:
    """What C++ asks for at its first product: the path, or "" to leave it to the setting, which C++ reads, or the dynamic loader."""
    found = find()
    return found.path if found and not env.setting("TVM_INFER_CUBLASLT").value else ""


def version_text(version: int) -> str:
    """130100 -> "13.1.0"."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def set_cublas(path: str | os.PathLike[str] | None = None) -> str:
    """Choose the cuBLASLt that matrix products on CUDA devices run on, for this process; before the first of them.

    Parameters
    ----------
    path : a libcublasLt.so of CUDA 12 or 13; None: the one that `find` finds.

    Returns
    -------
    Its version, "13.1.0".

    Raises
    ------
    MissingDependencyError : no path is given and none is found. ArgumentError : the library cannot be opened, is no cuBLASLt, or
    another one is in use already.
    """
    if path is None:
        path = need().path
    return version_text(int(_ffi.func("set_cublas")(os.fspath(path))))


def ensure_cublas() -> None:
    """Open a cuBLASLt unless the process has one already, so that a missing one is told before a model is compiled or run."""
    if not _ffi.func("cublas_path")():
        set_cublas()


def describe() -> str:
    """For `tvm-infer doctor`: version, path and what led to it, or what to install."""
    found = find()
    if found is None:
        return f"not found: {INSTALL_HINT}"
    try:
        get_version = ctypes.CDLL(found.path).cublasLtGetVersion
    except (OSError, AttributeError) as error:
        return f"not usable: {found}: {error}"
    get_version.restype = ctypes.c_size_t
    return f"{version_text(get_version())} ({found})"

"""What this machine has, and for each executor whether it can be used and why not."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import pathlib
import platform
import sys
from dataclasses import dataclass
from typing import Any

from . import __version__, env

_PACKAGES = (
    "apache-tvm",
    "apache-tvm-ffi",
    "numpy",
    "torch",
    "transformers",
    "gguf",
    "scipy-openblas32",
    "matplotlib",
)


@dataclass(frozen=True)
class Executor:
    """One executor: usable, or the reason why not."""

    name: str
    usable: bool
    detail: str


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as the driver describes it."""

    name: str
    compute_capability: tuple[int, int]
    memory_gib: float


def package_versions() -> dict[str, str | None]:
    """Installed versions of what tvm_infer uses; None where absent."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def gpus() -> tuple[str, list[Gpu]]:
    """(driver's CUDA version or why there is none, devices), asked of libcuda alone."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no driver (libcuda.so.1 not found)", []
    status = cuda.cuInit(0)
    if status != 0:
        return f"driver present, but cuInit failed with error {status}", []
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = []
    for index in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
        devices.append(Gpu(name.value.decode(), (major.value, minor.value), memory.value / 2**30))
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}", devices


def nvcc() -> str:
    """Version and path of the nvcc that kernels are compiled with and what led to it, or what to install."""
    from .errors import TvmInferError
    from .jit import nvcc as finder

    try:
        found = finder.find()
        finder.check_release(found, "sm_90a")
    except TvmInferError as error:
        return f"not usable: {error}"
    return str(found)


def cxx() -> str:
    """The C++ compiler for what depends on the installed TVM (our cache under its KV cache builtins), or what to install."""
    from .errors import TvmInferError
    from .jit import cxx as finder

    try:
        return str(finder.find())
    except TvmInferError as error:
        return f"not usable: {error}"


def cublas() -> str:
    """Version and path of the cuBLASLt that products on CUDA run on and what led to it, or what to install."""
    from . import cublas as finder

    return finder.describe()


def cached_kernels() -> str:
    """Kernels compiled before: those in the cache, of this version or another, and the cubins of TVM_INFER_CUBIN_DIR."""
    from .jit import all_names, cubins

    found, prebuilt = cubins.cached_names(), env.setting("TVM_INFER_CUBIN_DIR").value
    cached = [name for name in found if "_v" not in name]
    total = len(all_names())
    named = f": {', '.join(cached)}" if 0 < len(cached) < total else ""
    variants = f"; {len(found) - len(cached)} with variants" if len(found) > len(cached) else ""
    parts = [f"{len(cached)} of {total} in the cache, of any version{named}{variants}"]
    if prebuilt:
        folder = pathlib.Path(prebuilt).expanduser()
        there = f"{len(list(folder.glob('*.cubin')))} cubins" if folder.is_dir() else "no folder"
        parts.append(f"TVM_INFER_CUBIN_DIR {prebuilt}: {there}")
    return "; ".join(parts)


def tvm_features() -> dict[str, str]:
    """What the installed TVM can do on a GPU, by what its libraries hold (its own build flags say more than it ships)."""
    import tvm_ffi

    if importlib.util.find_spec("tvm") is None:
        return {"tvm": "not installed"}
    import tvm

    def has(name: str) -> str:
        return "yes" if tvm_ffi.get_global_func(name, allow_missing=True) is not None else "no"

    return {
        "llvm": "yes" if tvm.runtime.enabled("llvm") else "no",
        "CUDA runtime": "loaded" if tvm.runtime.enabled("cuda") else "not loaded (needs a driver)",
        "cuBLAS": has("tvm.contrib.cublas.matmul"),
        "NCCL": has("runtime.disco.nccl.init_ccl"),
    }


def executors() -> list[Executor]:
    """Every executor of this version, usable or not."""
    from . import _ffi
    from .errors import TvmInferError

    found = []
    try:
        isa, threads = _ffi.func("cpu_info")().split()
        found.append(Executor("cpu", True, f"{isa}, {threads} threads; float32, float16, bfloat16; head_dim 8 to 256"))
    except TvmInferError as error:
        found.append(Executor("cpu", False, str(error)))
    found.append(_cuda_executor())
    return found


def _cuda_executor() -> Executor:
    from . import _ffi
    from .errors import TvmInferError

    name = "cuda sm_90a"
    driver, devices = gpus()
    if not devices:
        return Executor(name, False, driver)
    fitting = [i for i, gpu in enumerate(devices) if gpu.compute_capability == (9, 0)]
    if not fitting:
        have = ", ".join(f"{g.name} (sm_{g.compute_capability[0]}{g.compute_capability[1]})" for g in devices)
        return Executor(name, False, f"needs a device of compute capability 9.0; here: {have}")
    try:
        info = _ffi.func("cuda_info")(fitting[0])  # "sm_90a 132 NVIDIA H200"
    except TvmInferError as error:
        return Executor(name, False, str(error))
    _, sms, device = info.split(" ", 2)
    return Executor(
        name, True, f"{device}, {sms} SMs, {driver}; float16, bfloat16; head_dim 64, 80, 96, 128, 192 and 256"
    )


def report() -> dict[str, Any]:
    """All of it, as plain values."""
    driver, devices = gpus()
    cache = env.cache_dir()
    return {
        "tvm_infer": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": package_versions(),
        "tvm": tvm_features(),
        "driver": driver,
        "gpus": [
            f"{g.name}, sm_{g.compute_capability[0]}{g.compute_capability[1]}, {g.memory_gib:.0f} GiB" for g in devices
        ],
        "nvcc": nvcc(),
        "kernels": cached_kernels(),
        "cuBLASLt": cublas(),
        "C++ compiler": cxx(),
        "cache folder": f"{cache} ({'exists' if cache.exists() else 'not made yet'})",
        "executors": [vars(e) for e in executors()],
        "settings": {s.name: s.value for s in env.SETTINGS},
    }


def print_report() -> None:
    """The report as tables on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    data = report()
    console = Console()
    table = Table(title="tvm-infer doctor", show_header=False, title_justify="left")
    for key, value in data.items():
        if key in ("executors", "settings"):
            continue
        if isinstance(value, dict):
            value = "\n".join(f"{k}: {'not installed' if v is None else v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "\n".join(value) or "none"
        table.add_row(key, escape(str(value)))  # 'tvm_infer[cuda]' is no markup
    console.print(table)
    table = Table(title="executors", title_justify="left")
    for column in ("executor", "usable", "detail"):
        table.add_column(column)
    for executor in data["executors"]:
        table.add_row(executor["name"], "yes" if executor["usable"] else "no", escape(executor["detail"]))
    console.print(table)
    table = Table(title="settings (environment)", title_justify="left")
    for column in ("name", "value", "meaning"):
        table.add_column(column)
    for s in env.SETTINGS:
        table.add_row(s.name, escape(s.value or "(unset)"), escape(s.meaning))
    console.print(table)

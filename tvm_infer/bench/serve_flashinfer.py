"""FlashInfer under TVM's cache: whether it can be had here, and how what it compiles is linked.

TVM has no FlashInfer of its own. Its glue (tvm.relax.backend.cuda.flashinfer) lets the package flashinfer-python generate and compile
kernels, and links the objects into the model's library; its runtime calls them by position. Other releases of FlashInfer than the one
that TVM was written for compile for minutes and then fail, some at the first step only, so they are refused here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import itertools
import pathlib
import shutil
from collections.abc import Iterator

from ..errors import CompileError, MissingDependencyError
from ..jit import nvcc
from .peers import Skipped

# TVM 0.27 passes 19 arguments to the plan of prefill and 15 to that of decode (attn_backend.h, which names this release). Later
# releases have the same bindings at first, but look for their objects under other names than they compile them to (0.6.10 to 0.6.14 at
# least); from 0.6.16 on there is a 20th argument, `uniform_q_len`.
VERSION = "0.6.3"
REQUIREMENT = f"flashinfer-python=={VERSION}"
_HEAD_DIMS = (64, 128, 256)
_KEPT_LINES = 6  # of what a failing build printed, from the end: before them are commands, kilobytes each
_KEPT_CHARS = 400


def require(device: str, head_dim: int) -> None:
    """Raises Skipped that says what is in the way: the device, the model, or what must be installed."""
    if device != "cuda":
        raise Skipped("FlashInfer has kernels for CUDA only; use --device cuda")
    if head_dim not in _HEAD_DIMS:
        raise Skipped(
            f"FlashInfer has kernels for head_dim {', '.join(map(str, _HEAD_DIMS))}; this model's is {head_dim}"
        )
    version = installed_version()
    if version is None:
        raise Skipped(f"the package flashinfer-python is not installed: pip install {REQUIREMENT}")
    if version != VERSION:
        raise Skipped(
            f"flashinfer-python {version} is installed; TVM's cache works with {VERSION} only: pip install {REQUIREMENT}"
        )
    try:
        importlib.import_module("flashinfer.jit")
    except (ImportError, OSError, RuntimeError) as error:  # TVM's glue would call each of these "not installed"
        raise Skipped(
            f"flashinfer-python {version} cannot be imported ({type(error).__name__}: {error}): install it with its dependencies, "
            f"pip install {REQUIREMENT}"
        ) from error
    if shutil.which("ninja") is None:
        raise Skipped(
            "FlashInfer compiles its kernels with ninja, which is not on PATH: pip install ninja, and put the environment's bin folder "
            "on PATH"
        )


def installed_version() -> str | None:
    """Of flashinfer-python, "0.6.3"; None where it is not installed."""
    try:
        return importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def building() -> Iterator[None]:
    """While FlashInfer compiles (minutes the first time; it keeps objects in ~/.cache/flashinfer or FLASHINFER_WORKSPACE_BASE).
    Raises CompileError for a failed build."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "Ninja build failed" not in text:
            raise
        last = [line[:_KEPT_CHARS] for line in text.splitlines() if line.strip()][-_KEPT_LINES:]
        raise CompileError(
            "FlashInfer's kernels do not compile; the last of what was printed:\n" + "\n".join(last)
        ) from error


def link_options(compiler: nvcc.Nvcc) -> list[str]:
    """What the linker needs beside FlashInfer's objects: the CUDA runtime of the compiler that made them, which they call.

    It is the one that TVM has loaded where both are of the same major release. Raises MissingDependencyError where there is none.
    """
    named = pathlib.Path(compiler.path).absolute()
    roots = (named.parents[1], named.resolve().parents[1])  # the toolkit may be links, or only its nvcc
    for root, name in itertools.product(roots, ("lib64", "lib", "targets/x86_64-linux/lib")):
        found = sorted((root / name).glob("libcudart.so*"))
        if found:
            # options come before the objects, and a linker that takes libraries only as needed would leave it out there
            return ["-Wl,--no-as-needed", str(found[0]), f"-Wl,-rpath,{found[0].parent}"]
    raise MissingDependencyError(
        f"FlashInfer's kernels call the CUDA runtime, and nvcc {compiler} has no libcudart.so beside it in {roots[0]}/lib64 or lib: "
        "set CUDA_HOME to a whole toolkit, or pip install nvidia-cuda-runtime"
    )

"""Our CUDA headers: where they lie, and the contents that a kernel's source reaches."""

from __future__ import annotations

import pathlib
import re

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<](tvm_infer/[^">]+)[">]', re.MULTILINE)
_KERNEL_ABI = re.compile(r"kKernelAbi\s*=\s*(\d+)")


def include_dir() -> pathlib.Path:
    """The folder that holds tvm_infer/kernels: of the source tree where this is one, else of the installed package."""
    source_tree = _PACKAGE.parent / "cuda_src"
    return source_tree if (source_tree / "tvm_infer").is_dir() else _PACKAGE / "include"


def reached(source: str, folder: pathlib.Path) -> dict[str, bytes]:
    """Every header of ours that `source` includes, directly or not: name -> contents, empty where there is none."""
    found: dict[str, bytes] = {}
    texts = [source]
    while texts:
        for name in _INCLUDE.findall(texts.pop()):
            if name in found:
                continue
            path = folder / name
            found[name] = path.read_bytes() if path.is_file() else b""
            texts.append(found[name].decode(errors="replace"))
    return dict(sorted(found.items()))


def kernel_abi() -> int:
    """kKernelAbi of the headers: what the kernels and the library must agree on."""
    text = (include_dir() / "tvm_infer" / "cuda" / "params.h").read_text()
    match = _KERNEL_ABI.search(text)
    assert match is not None, "cuda/params.h defines kKernelAbi"
    return int(match[1])

"""The standard variants that the C++ library has compiled already, so that the CPU executor needs no compiler for them.

The library compiles cuda_src/tvm_infer/variant/standard.inc, which this module writes, to be repeated whenever the generated code of a
standard variant changes (a test says so)::

    python -m tvm_infer.variant.prebuilt > cuda_src/tvm_infer/variant/standard.inc
"""

from __future__ import annotations

from .. import _ffi
from .cache_masks import CACHE_MASKS
from .standard import STANDARD
from .variant import Variant

_HEAD = """\
// Generated: `python -m tvm_infer.variant.prebuilt > cuda_src/tvm_infer/variant/standard.inc` writes it anew.
// The structs of the standard variants (tvm_infer/variant/standard.py, cache_masks.py), and V(struct) for each; none of bands alone.
// To be included within a namespace of one instruction set, inside tvm_infer::variant (cpu/standard_variants.h).
"""


def variants() -> dict[str, list[Variant]]:
    """Digest -> the standard variants, and the masks of caches, that share this code. Plain ones have none."""
    found: dict[str, list[Variant]] = {}
    for variant in (*STANDARD.values(), *CACHE_MASKS.values()):
        if not variant.is_plain:
            found.setdefault(variant.digest, []).append(variant)
    return found


def source() -> str:
    """The contents of standard.inc."""
    structs = [f"\n// {', '.join(v.name for v in same)}\n{same[0].source()}" for same in variants().values()]
    names = [f"variant_{digest}" for digest in variants()]
    rows = " \\\n".join(["#define TVM_INFER_STANDARD_VARIANTS(V)", *(f"  V({name})" for name in names)])
    return f"{_HEAD}{''.join(structs)}\n{rows}\n"


def address(variant: Variant) -> int:
    """Of the variant's ``tvm_infer::variant::CpuFunctions`` in the library, for the instruction set that it runs; 0: it has none."""
    return int(_ffi.func("standard_variant")(variant.digest))


if __name__ == "__main__":
    print(source(), end="")

"""The code of the masks that a step of MLC's cache may have: in the library for the CPU, made by the JIT for CUDA."""

from __future__ import annotations

from .. import jit


def mask(name: str, is_cuda: bool) -> list[object]:
    """What the adapter asks for when a step first needs it: [digest, address of the CPU functions or 0].

    MissingDependencyError in a process that has TVM's runtime alone: variants are expressions of its compiler.
    """
    from ..variant import cpu_functions
    from ..variant.cache_masks import CACHE_MASKS

    variant = CACHE_MASKS[str(name)]
    if is_cuda:
        jit.register_variant(variant.digest, variant.source())
        return [variant.digest, 0]
    return [variant.digest, cpu_functions(variant)]

"""The code of what a layer of MLC's cache computes besides softmax(q k) v: in the library for the CPU, made by the JIT for CUDA."""

from __future__ import annotations

from .. import jit


def code(mask: str, turns: bool, rotary_dim: int, interleaved: bool, is_cuda: bool) -> list[object]:
    """What the adapter asks for when it first needs it: [digest, address of the CPU functions or 0].

    mask : "token_tree", "kept_keys", or "" for none. turns : whether queries and keys turn as they are read; rotary_dim (0: all of a
        head) and interleaved then say how. Parameters: those of the mask, then those of the rotation (variant/cache_masks.py).

    MissingDependencyError in a process that has TVM's runtime alone: variants are expressions of its compiler.
    """
    from ..variant import cpu_functions
    from ..variant.cache_masks import cache_variant

    variant = cache_variant(str(mask), rotary_dim or None, bool(interleaved), turns=bool(turns))
    if is_cuda:
        jit.register_variant(variant.digest, variant.source())
        return [variant.digest, 0]
    return [variant.digest, cpu_functions(variant)]

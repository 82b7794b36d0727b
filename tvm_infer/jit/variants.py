"""Generated structs of attention variants, which kernels' sources begin with (cuda_src/tvm_infer/variant/variant.h)."""

from __future__ import annotations

import re

from ..errors import ArgumentError, ExecutorError

# Kernels of other widths do not change queries or keys: their rows are not shared out evenly (attention/change_rows.cuh), and of wide
# heads two warps have the same keys.
_CHANGED = {"queries": (("kHasQuery", "kHasRate"), (64, 128, 256)), "keys": (("kHasKey", "kHasRate"), (64, 128))}
_DIGEST = re.compile(r"[0-9a-f]{16}")
_sources: dict[str, str] = {}


def struct_name(digest: str) -> str:
    """The generated struct's."""
    return f"variant_{digest}"


def is_digest(text: str) -> bool:
    """Whether a text is a variant's digest, of whatever variant."""
    return _DIGEST.fullmatch(text) is not None


def register(digest: str, source: str) -> None:
    """Make kernels of a variant known to this process. source : defines struct_name(digest), ends with a line's end."""
    if not is_digest(digest):
        raise ArgumentError(f"argument `digest` is {digest!r}; it must be 16 hexadecimal digits")
    if _sources.setdefault(digest, source) != source:
        raise ArgumentError(f"argument `source` of variant {digest} is not what was registered under this digest")


def check_kernel(digest: str, head_dim: int, is_scaled: bool = False) -> None:
    """Raise ExecutorError where a variant changes queries or keys in a way that kernels of this head_dim do not have.

    is_scaled : keys and values have 8 bits, and kernels multiply by them as they are.
    """
    source = source_of(digest)
    for what, (constants, head_dims) in _CHANGED.items():
        if not any(f"{constant} = true" in source for constant in constants):
            continue
        if is_scaled:
            raise ExecutorError(
                f"variant {digest} changes {what}, and the call has keys of 8 bits, with which CUDA kernels take variants of logits, "
                "mask and output alone. Change them before the call (tvm_infer.rope_append turns them), keep keys and values in "
                "16 bits, or pass host tensors"
            )
        if head_dim not in head_dims:
            raise ExecutorError(
                f"variant {digest} changes {what}, and the call has head_dim {head_dim}; CUDA kernels that do so are for head_dim "
                f"{', '.join(map(str, head_dims))}. Change them before the call (tvm_infer.rope_append turns them), or pass host "
                "tensors"
            )


def source_of(digest: str) -> str:
    """The struct's source. Raises ArgumentError for a variant that this process does not know."""
    source = _sources.get(digest)
    if source is None:
        known = ", ".join(_sources) or "none yet"
        raise ArgumentError(
            f"there is no variant {digest!r} in this process (there are: {known}); make it with tvm_infer.variant before its kernels "
            "are built, or give their cubins (TVM_INFER_CUBIN_DIR, tvm_infer.jit.load)"
        )
    return source

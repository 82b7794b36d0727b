"""What the pages of a cache hold: the type of their elements, and the scales of those that have some (docs/kv-formats.md)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, DTypeError
from ..kv_dtypes import DTYPES, SCALED_DTYPES, WITHOUT_KERNELS, pairs


def checked_dtype(value: Any, name: str, allowed: tuple[str, ...]) -> str:
    """`value`, a name or torch's dtype, as a name. DTypeError unless it is one of those allowed."""
    found = str(value).removeprefix("torch.")
    if found in allowed:
        return found
    hint = "; 8-bit floats are for keys and values alone: name them by `kv_dtype`" if found in SCALED_DTYPES else ""
    if found in WITHOUT_KERNELS and SCALED_DTYPES[0] in allowed:
        hint = f". No executor has kernels for {found} yet. Queries go with keys and values so: {pairs()}"
    raise DTypeError(f"argument `{name}` is {value!r}; it must be one of {', '.join(allowed)}{hint}")


def checked_kv_dtype(value: Any, dtype: str) -> str:
    """The type of pages beside queries of `dtype`; None: the same."""
    return dtype if value is None else checked_dtype(value, "kv_dtype", (*DTYPES, *SCALED_DTYPES))


def check_pair(dtype: str, kv_dtype: str) -> None:
    """DTypeError unless there is attention of queries of `dtype` to pages of `kv_dtype`."""
    if kv_dtype == dtype or kv_dtype in SCALED_DTYPES:
        return
    raise DTypeError(
        f"argument `kv_dtype` is {kv_dtype!r} and the model's dtype {dtype}; pages are of that or of {' or '.join(SCALED_DTYPES)}"
    )


def are_given(k_scale: Any, v_scale: Any) -> bool:
    """Whether these scales say anything: others than the number 1."""
    return any(not isinstance(scale, (int, float)) or scale != 1 for scale in (k_scale, v_scale))


def check_has_scales(kv_dtype: str) -> None:
    """ArgumentError for scales of pages that have none."""
    if kv_dtype in SCALED_DTYPES:
        return
    raise ArgumentError(
        f"arguments `k_scale`, `v_scale` are for pages of 8 bits; pages of {kv_dtype} have no scale: leave them 1, or take "
        f"kv_dtype={SCALED_DTYPES[0]!r}"
    )


def checked_scales(value: Any, name: str, num_layers: int, num_kv_heads: int) -> np.ndarray:
    """float32 [num_layers, num_kv_heads] of a number, of one a layer, or of one a layer and KV head."""
    try:
        scales = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise DTypeError(f"argument `{name}` is {value!r}; it must be a number or an array of numbers") from None
    shape = (num_layers, num_kv_heads)
    if scales.shape not in ((), shape[:1], shape):
        raise ArgumentError(
            f"argument `{name}` has shape {scales.shape}; it must be a number, [num_layers] = [{num_layers}], or [num_layers, "
            f"num_kv_heads] = [{num_layers}, {num_kv_heads}]"
        )
    wrong = scales[~(np.isfinite(scales) & (scales > 0))]
    if wrong.size:
        raise ArgumentError(f"argument `{name}` has {wrong.flat[0]}; a scale is finite and above 0")
    columns = scales[:, None] if scales.ndim == 1 else scales
    return np.array(np.broadcast_to(columns, shape))

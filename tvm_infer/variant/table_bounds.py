"""Tables that are too short for a batch, found before a launch: what each request's last query reads of its last key.

That pair is in every band, so generated code evaluates the mask for it, and the logit where the mask passes. Matrices that are read
by row and column, packed bits among them (custom_mask, tree_mask, logit_bias), end at this element. What is only read under a condition
is followed as far as the condition is known.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _array, _device
from ..errors import VariantError
from .code import Code, conjuncts
from .numpy_eval import as_kind
from .operations import OPERATIONS
from .parameters import POSITIONS

if TYPE_CHECKING:
    from .bind import BoundVariant
    from .variant import Variant

Unknown = None  # a value that the host does not have


def check(bound: BoundVariant, q_len: np.ndarray, kv_len: np.ndarray, num_qo_heads: int, num_kv_heads: int) -> None:
    """Raise VariantError that names the table, its length and the first request whose last query and key read behind it.

    q_len, kv_len : int [num_requests], queries of the call and keys of each request. Tables on a device are known by their shape alone:
    first bits of packed masks count as 0 then, which none is below.
    """
    active = (q_len > 0) & (kv_len > 0)
    if not active.any():
        return
    last = kv_len.astype(np.int64) - 1
    heads = np.full_like(last, num_qo_heads - 1)
    positions = dict(
        zip(
            POSITIONS,
            (np.arange(len(last)), heads, np.full_like(last, num_kv_heads - 1), last, last, q_len, kv_len),
            strict=True,
        )
    )
    reader = _Reader(bound, positions)
    visible = active if bound.variant.mask is None else reader.read(bound.variant.mask, active)
    if bound.variant.logits is not None and visible is not Unknown:
        reader.read(bound.variant.logits, active & visible)


class _Reader:
    """Follows an expression at one query and key of each request, all requests together. Values are arrays, or Unknown."""

    def __init__(self, bound: BoundVariant, positions: Mapping[str, np.ndarray]) -> None:
        parameters = bound.variant.parameters
        self._name, self._positions = bound.variant.name, positions
        patterns = (p for p in parameters.items() if p[1].is_scalar)
        self._scalars = {
            name: np.uint32(bits).view(p.dtype) for (name, p), bits in zip(patterns, bound.scalars, strict=True)
        }
        self._tables = dict(zip((n for n, p in parameters.items() if not p.is_scalar), bound.tables, strict=True))
        self._contents: dict[str, np.ndarray | None] = {}
        self._variant = bound.variant

    def read(self, code: Code, active: np.ndarray) -> Any:
        """The value of `code`, where `active`: elsewhere anything."""
        return self._value(code, len(code.nodes) - 1, active, {})

    def _value(self, code: Code, at: int, active: np.ndarray, known: dict[tuple[int, bytes], Any]) -> Any:
        key = (at, active.tobytes())
        if key not in known:
            known[key] = self._computed(code, at, active, known)
        return known[key]

    def _computed(self, code: Code, at: int, active: np.ndarray, known: dict[tuple[int, bytes], Any]) -> Any:
        node = code.nodes[at]
        if node.op == "const":
            return as_kind(node.value, node.kind)
        if node.op == "name":
            value = self._positions.get(str(node.value), self._scalars.get(str(node.value)))
            return Unknown if value is None else as_kind(value, node.kind)
        args, reached = [], active
        for number, arg in enumerate(node.args):
            args.append(self._value(code, arg, reached, known))
            reached = _reached(node.op, number, args, active)
        if any(arg is Unknown for arg in args):
            return Unknown
        if node.op == "load":
            return self._load(str(node.value), node.kind, args, active)
        with np.errstate(all="ignore"):
            return OPERATIONS[node.op].numpy(*args)

    def _load(self, name: str, kind: str, indices: list[Any], active: np.ndarray) -> Any:
        table = self._tables[name]
        inside = []
        for axis, index in enumerate(indices):
            size = int(table.shape[axis])
            all_indices = np.broadcast_to(index, active.shape)
            bad = active & ((all_indices < 0) | (all_indices >= size))
            if bad.any():
                self._refuse(name, axis, size, all_indices, int(np.argmax(bad)))
            inside.append(np.clip(all_indices, 0, max(size - 1, 0)))
        if name not in self._contents:
            self._contents[name] = self._content(name, table)
        content = self._contents[name]
        return Unknown if content is None or 0 in content.shape else as_kind(content[tuple(inside)], kind)

    def _content(self, name: str, table: Any) -> np.ndarray | None:
        if _device.cuda_index(table) is None:
            return _array.on_host(table, _array.dtype_name(table))
        if name == "first_bit" and _is_packed_mask(self._variant):
            return np.zeros(tuple(int(n) for n in table.shape), np.int32)
        return None

    def _refuse(self, name: str, axis: int, size: int, indices: np.ndarray, request: int) -> None:
        q_len, kv_len = (int(self._positions[n][request]) for n in ("q_len", "kv_len"))
        raise VariantError(
            f"variant {self._name}: parameter `{name}` has {size} elements in dimension {axis}, and request {request}, of {q_len} "
            f"queries and {kv_len} keys, reads number {int(indices[request])} at its last query and key: pass a table of the whole "
            "batch, in the order of its requests"
        )


def _reached(op: str, number: int, args: list[Any], active: np.ndarray) -> np.ndarray:
    """Where generated code goes on to the operand behind operand `number`."""
    condition = args[0]
    if op not in ("and", "or", "select"):
        return active
    if condition is Unknown:
        return np.zeros_like(active)
    if op == "select":
        return active & (condition if number == 0 else ~condition)
    return active & (condition if op == "and" else ~condition)


@functools.cache
def _is_packed_mask(variant: Variant) -> bool:
    """Whether a condition of the mask is that of custom_mask or tree_mask. A variant is its own key: it does not change."""
    from .standard import custom_mask, tree_mask

    if variant.mask is None:
        return False
    packed = (custom_mask.mask, tree_mask.mask)
    standard = [part for mask in packed if mask is not None for part in conjuncts(mask)]
    return any(part in standard for part in conjuncts(variant.mask))

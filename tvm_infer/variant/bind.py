"""A variant's parameters get their values: numbers become 32-bit patterns, arrays become tensors of packed functions, uncopied."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import _array, _device
from ..errors import ArgumentError, DTypeError, VariantError
from . import table_bounds
from .band import Band, evaluate_band
from .interval import are_small
from .lower import Struct
from .parameters import Parameter
from .variant import Variant


@dataclass(frozen=True, eq=False)
class BoundVariant:
    """A variant with values, as calls take it.

    scalars : their 32-bit patterns, 0 to 2^32 - 1, in the order of their declaration. tables : tensors as packed functions take them,
    in order; "bool" as uint8. band : what the plan must be made for. has_small_logits : with these scalars logits stay within
    [-64, 64].
    """

    variant: Variant
    scalars: list[int]
    tables: list[Any]
    band: Band
    has_small_logits: bool = False

    @property
    def cuda_struct(self) -> Struct:
        """The generated struct that kernels are compiled with: the variant's, or one that says that logits are small (interval.py)."""
        return self.variant._struct_of_small_logits if self.has_small_logits else self.variant._struct

    def check_shapes(self, num_qo_heads: int, num_requests: int, head_dim: int) -> None:
        """Raise VariantError where a table has not an element for each head, channel or pair of channels of the call, or fewer than
        it has requests; and where more channels turn than there are."""
        rotary_dim = self.variant.settings.rotary_dim or head_dim
        if rotary_dim > head_dim or (self.variant.rotates and head_dim % 16):
            raise VariantError(
                f"variant {self.variant.name}: {rotary_dim} channels turn, and the call has head_dim {head_dim}; rotary_dim must be at "
                "most that, a multiple of 16"
            )
        wanted = {
            "per_head": (num_qo_heads, "num_qo_heads"),
            "per_request": (num_requests, "num_requests"),
            "per_channel": (head_dim, "head_dim"),
            "per_pair": (rotary_dim // 2, "rotary_dim / 2"),
        }
        named = [(name, p) for name, p in self.variant.parameters.items() if not p.is_scalar]
        for (name, p), table in zip(named, self.tables, strict=True):
            if p.sort not in wanted:
                continue
            length, least = int(table.shape[0]), wanted[p.sort][0]
            if length < least or (p.sort != "per_request" and length > least):
                count, what = wanted[p.sort]
                raise VariantError(
                    f"variant {self.variant.name}: parameter `{name}` has {int(table.shape[0])} elements; it is {p} and the call has "
                    f"{what} {count}"
                )

    def check_tables(self, q_len: np.ndarray, kv_len: np.ndarray, num_qo_heads: int, num_kv_heads: int) -> None:
        """Raise VariantError where tables that are read by positions are too short for these lengths (table_bounds.py)."""
        table_bounds.check(self, q_len, kv_len, num_qo_heads, num_kv_heads)


def as_bound(x: Any) -> BoundVariant:
    """A bound variant, or a variant without parameters as one, the same at each call. Raises VariantError for anything else."""
    if isinstance(x, BoundVariant):
        return x
    if not isinstance(x, Variant):
        raise VariantError(
            f"argument `variant` is a {type(x).__name__}; it must be a Variant, or what Variant.bind returns"
        )
    if x.parameters:
        raise VariantError(
            f"variant {x.name} is not bound: call `.bind({', '.join(f'{name}=…' for name in x.parameters)})` and pass what it returns"
        )
    return x._alone


def bind(variant: Variant, values: Mapping[str, Any]) -> BoundVariant:
    """See :meth:`Variant.bind`."""
    declared = ", ".join(f"{name}: {p}" for name, p in variant.parameters.items()) or "none"
    for name in values:
        if name not in variant.parameters:
            raise VariantError(f"variant {variant.name} has no parameter `{name}`; it has {declared}")
    missing = [name for name in variant.parameters if name not in values]
    if missing:
        raise VariantError(
            f"variant {variant.name} needs a value for `{missing[0]}` ({variant.parameters[missing[0]]}); its parameters: {declared}"
        )
    numbers: dict[str, int | float] = {}
    tables: list[Any] = []
    first: tuple[str, str] | None = None  # table, where it lies
    for name, p in variant.parameters.items():
        what = f"variant {variant.name}: parameter `{name}`"
        if p.is_scalar:
            numbers[name] = _number(values[name], p, what)
            continue
        table = _table(values[name], name, p, what)
        place = _device.describe(table)
        first = first or (name, place)
        if place != first[1]:
            raise VariantError(f"{what} is {place}, `{first[0]}` is {first[1]}: put all tables on the device of q")
        tables.append(table)
    _check_divisors(variant, numbers)
    band = evaluate_band(variant.bands, numbers, variant.name)
    scalars = [_pattern(x, variant.parameters[name].dtype) for name, x in numbers.items()]
    logits = variant.logits
    return BoundVariant(variant, scalars, tables, band, logits is not None and are_small(logits, numbers))


def _number(x: Any, p: Parameter, what: str) -> int | float:
    """A scalar's value, an int32 or a float32."""
    number = x.item() if isinstance(x, np.generic) else x
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise VariantError(f"{what} is {x!r}; it is {p} and must be a number of Python or numpy")
    if p.dtype == "int32":
        if not isinstance(number, int) or not -(2**31) <= number < 2**31:
            raise VariantError(f"{what} is {x!r}; it is {p} and must be a whole number of -2^31 to 2^31 - 1")
        return number
    try:
        with np.errstate(over="ignore"):
            single = float(np.float32(number))
    except OverflowError:  # an int beyond float64
        single = math.nan
    if math.isnan(single) or (math.isinf(single) and number not in (math.inf, -math.inf)):
        raise VariantError(f"{what} is {x!r}; it is {p} and that is no float32")
    return single


def _pattern(x: int | float, dtype: str) -> int:
    return int(np.array(x, dtype).view(np.uint32))


def _table(x: Any, name: str, p: Parameter, what: str) -> Any:
    try:
        table = _array.as_tensor(x, name)
    except ArgumentError as error:
        raise VariantError(
            f"{what} is a {type(x).__name__}; it is {p} and must be a torch, numpy or TVM tensor"
        ) from error
    dtype = _array.dtype_name(table)
    if dtype != p.dtype and not (p.dtype == "bool" and dtype == "uint8"):
        raise DTypeError(
            f"{what} is {dtype}; it is {p} and must be {p.dtype}{' or uint8' if p.dtype == 'bool' else ''}"
        )
    rank = len(table.shape)
    if rank != p.rank:
        raise VariantError(f"{what} has the shape {tuple(int(n) for n in table.shape)}; it is {p}, of rank {p.rank}")
    if dtype == "bool":
        return _bytes_of(table, what)
    return table


def _bytes_of(table: Any, what: str) -> Any:
    """A tensor of bool seen as uint8."""
    if isinstance(table, np.ndarray):
        return table.view(np.uint8)
    if _array.is_torch(table):
        import torch

        return table.view(torch.uint8)
    raise DTypeError(f"{what} is a bool tensor of {type(table).__module__}: pass uint8, or a torch or numpy array")


def _check_divisors(variant: Variant, numbers: Mapping[str, int | float]) -> None:
    """Scalars that divide must be at least 1: generated code divides without asking."""
    for code in variant.holes.values():
        for node in code.nodes:
            divisor = code.nodes[node.args[1]] if node.op in ("floordiv", "mod") else None
            if divisor is not None and divisor.op == "name" and numbers.get(str(divisor.value), 1) < 1:
                name = str(divisor.value)
                raise VariantError(
                    f"variant {variant.name}: parameter `{name}` is {numbers[name]}; it divides (// or %) and must be at least 1"
                )

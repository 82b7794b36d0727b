"""The parameters of an attention variant that is written: numbers, and tables of a model's weights and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import ir

from tvm_infer.variant import functions
from tvm_infer.variant.expression import Expr, lift
from tvm_infer.variant.layer import Constant, Value, Weight
from tvm_infer.variant.parameters import MAX_RANK, TABLE_KINDS, Parameter, per_head, scalar, tensor
from tvm_infer.variant.table import Table

from .nodes import known_shape, same, static_int
from .printer import format_expr
from .prove import Refusal, input_refusal
from .scalars import free_vars
from .symbolic import Atom, Evaluator

KEEP_VARIANT = (
    'keep this attention with on_unmatched="keep", or export the model without it and give the cache a variant of your own '
    "(PagedKVCache.set_variant)"
)
MAX_CONSTANT_BYTES = 1 << 20  # of an array that goes into the manifest
_WEIGHT_TYPES = [dtype for dtype in TABLE_KINDS if dtype != "bool"]  # bytes are what a bool weight would be read as


class VariantTables:
    """Declares what an expression reads, each once.

    Parameters
    ----------
    h, positions : index variables of heads, and of queries and keys; heads : query heads. inputs : parameters of the function that
        change with every call. seen : for refusals.

    Attributes
    ----------
    parameters, values : of the variant so far. assumptions : about positions and tables. role : what float parameters that come are
        called.
    """

    def __init__(
        self, evaluator: Evaluator, h: Any, positions: Sequence[Any], heads: int, inputs: Sequence[Any], seen: str
    ) -> None:
        self._evaluator = evaluator
        self._h, self._positions, self._heads = h, positions, heads
        self._inputs = inputs
        self._seen = seen
        self._tables: dict[str, Table] = {}
        self._names: dict[Any, str] = {}  # what a parameter is made of -> its name
        self.parameters: dict[str, Parameter] = {}
        self.values: dict[str, Value] = {}
        self.assumptions: list[str] = []
        self.role = "bias"

    def number(self, role: str, number: float) -> str:
        """The name of a scalar parameter."""
        return self._declare((role, number), scalar(), number, role)

    def _declare(self, key: Any, parameter: Parameter, value: Value, role: str) -> str:
        if key not in self._names:
            count = sum(name.rstrip("0123456789_") == role for name in self.parameters)
            self._names[key] = name = role if count == 0 else f"{role}_{count + 1}"
            self.parameters[name], self.values[name] = parameter, value
        return self._names[key]

    def refuse(self, expr: Any, why: str, fix: str = KEEP_VARIANT) -> Refusal:
        """The refusal of a part of the expression."""
        return Refusal(self._seen, f"`{format_expr(expr, self._evaluator)}` {why}", fix)

    def element(self, var: Any, atom: Atom, name: Callable[[str], Expr], integer: Callable[[Any], Expr]) -> Expr:
        """The element of a weight or constant that an atom stands for. name, integer : write variables and indices."""
        value, dtype, shape, index = self._source(var, atom)
        role = self.role if TABLE_KINDS[dtype] == "float32" else "table"
        if len(shape) == 1 and shape[0] == self._heads and same(index[0], self._h):
            parameter = self._declare((value, "per_head"), per_head(dtype), value, role)
            return self._table(parameter)[name("qo_head")]
        parameter = self._declare((value, "tensor"), tensor(len(shape), dtype), value, role)
        places = [self._place(part, size, atom.name, shape, integer) for part, size in zip(index, shape, strict=True)]
        return self._table(parameter)[tuple(places)]

    def _source(self, var: Any, atom: Atom) -> tuple[Value, str, list[int], Sequence[Any]]:
        """(what it is bound to, dtype, shape, index) of the table that an atom is an element of."""
        source = self._evaluator.definition(atom.source)
        if isinstance(source, ir.GenericConst):
            return self._constant(var, atom, source.value.numpy())
        if not isinstance(source, ir.Var):
            why = "is computed by the model, by an operator that is not written out here"
            raise self.refuse(
                var, why, "make it a parameter of the model, or elementwise arithmetic of parameters and positions"
            )
        if any(same(source, parameter) for parameter in self._inputs):
            raise input_refusal(atom, self._seen)
        shape, dtype = known_shape(source) or (), str(source.ty.dtype)
        sizes = [static_int(dim) for dim in shape]
        if dtype not in _WEIGHT_TYPES:
            why = f"is {dtype}; weights that attention variants read are {', '.join(_WEIGHT_TYPES)}"
            raise self.refuse(var, why, "convert the weight")
        if any(size is None for size in sizes) or not 1 <= len(sizes) <= MAX_RANK:
            raise self.refuse(
                var, f"is of a weight of rank {len(sizes)}; tables of attention variants have rank 1 to {MAX_RANK}"
            )
        return Weight(str(source.name)), dtype, [size or 0 for size in sizes], atom.index

    def _constant(self, var: Any, atom: Atom, data: np.ndarray) -> tuple[Value, str, list[int], Sequence[Any]]:
        kept = [axis for axis, size in enumerate(data.shape) if size != 1] or [data.ndim - 1]
        array = self._converted(var, data).reshape([data.shape[axis] for axis in kept])
        if array.ndim > MAX_RANK:
            raise self.refuse(
                var, f"is of a constant of rank {array.ndim}; tables of attention variants have rank 1 to {MAX_RANK}"
            )
        if array.nbytes > MAX_CONSTANT_BYTES:
            why = (
                f"is of a constant of {array.nbytes} bytes; constants of at most {MAX_CONSTANT_BYTES} go into a variant"
            )
            raise self.refuse(var, why, "register it as a parameter of the model, or compute it from positions")
        value = Constant.of(np.ascontiguousarray(array))
        index = [atom.index[axis] for axis in kept]
        return value, value.dtype, list(array.shape), index

    def _converted(self, var: Any, data: np.ndarray) -> np.ndarray:
        if data.dtype == np.bool_:
            return data
        if data.dtype.kind in "iu":
            if data.size and (data.min() < -(2**31) or data.max() >= 2**31):
                raise self.refuse(var, "is of a constant that is no int32")
            return data.astype(np.int32)
        return data.astype(np.float32)

    def _table(self, parameter: str) -> Table:
        if parameter not in self._tables:
            self._tables[parameter] = Table(parameter, self.parameters[parameter])
        return self._tables[parameter]

    def _place(self, index: Any, size: int, name: str, shape: list[int], integer: Callable[[Any], Expr]) -> Expr:
        """An index, held inside the table: expressions are computed for keys that the mask hides, too."""
        if size == 1:
            return lift(0)
        index = self._evaluator.simplify(index)
        bound = self._evaluator.analyzer.const_int_bound(index)
        place = integer(index)
        if int(bound.max_value) >= size:
            place = functions.minimum(place, size - 1)
            if any(same(var, x) for var in free_vars(index) for x in self._positions):
                note = f"positions stay within `{name}` {shape}, whose last entry counts for those beyond"
                if note not in self.assumptions:
                    self.assumptions.append(note)
        return place if int(bound.min_value) >= 0 else functions.maximum(place, 0)

"""What follows a matrix product and can be part of its call: the addition of a matrix of its size, the cast to float32.

A library adds that matrix and writes float32 where it has the sums at hand; a kernel of its own reads and writes them once more, and on
CUDA costs 2 to 3 us for being launched, which is most of what it costs in a decode step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tvm import relax, sym

from .nodes import bindings_of, dtype_of, known_shape, op_name, shape_of, used_vars

_ADD, _CAST, _RESHAPE = "relax.add", "relax.astype", "relax.reshape"
Kind = Literal["add", "cast"]


@dataclass(frozen=True)
class Fold:
    """A reader that becomes part of a product.

    product : the product's variable; passed : it and the reshapes up to the reader, which nothing else reads; addend : what is added,
    of the reader's shape and dtype, for "add".
    """

    kind: Kind
    product: Any
    passed: tuple[Any, ...]
    addend: Any = None


def find_folds(func: relax.Function, products: Collection[Any], *, casts: bool) -> dict[Any, Fold]:
    """The folds of these products (variables), by the variable of the reader. casts : whether the library can write float32.

    A product and its reader stand in one dataflow block: nothing between them has effects, so the product may as well be computed where
    its reader stands. Of a sum of two products one takes in the other.

    NOTE: only casts whose result is returned (logits), which are kernels of their own. Others (a gate's, before its sigmoid) TVM
    computes within the kernel that follows; of a product in float32 that kernel would read, and the product write, twice the bytes.
    """
    reads = _Reads()
    reads.visit_expr(func)
    cast_vars = _returned(func) if casts else set()
    folds: dict[Any, Fold] = {}
    for block in func.body.blocks:
        if not isinstance(block, relax.DataflowBlock):
            continue
        readers = {var: binding for binding in block.bindings for var in used_vars(binding.value)}
        for product in [binding.var for binding in block.bindings if binding.var in products]:
            passed = _passed(product, readers, reads.counts)
            reader = readers.get(passed[-1])
            if reads.counts[passed[-1]] != 1 or reader is None or reader.var in folds:
                continue
            fold = _fold(reader, passed, cast_vars)
            if fold is not None:
                folds[reader.var] = fold
    return folds


@relax.expr_functor.visitor
class _Reads(relax.PyExprVisitor):
    """How often each variable is read, also inside branches and as a result."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def visit_var_(self, op: Any) -> None:
        self.counts[op] += 1

    def visit_dataflow_var_(self, op: Any) -> None:
        self.counts[op] += 1


def _passed(product: Any, readers: dict[Any, Any], counts: Counter[Any]) -> tuple[Any, ...]:
    """The product and what reshapes make of it, as long as nothing else reads it and its columns stay columns."""
    passed = [product]
    while counts[passed[-1]] == 1 and passed[-1] in readers:
        binding = readers[passed[-1]]
        if op_name(binding.value) != _RESHAPE or not _has_columns_of(binding.value, product):
            break
        passed.append(binding.var)
    return tuple(passed)


def _has_columns_of(value: Any, product: Any) -> bool:
    shape = known_shape(value)
    return shape is not None and len(shape) >= 2 and _equal(shape[-1:], shape_of(product)[-1:])


def _returned(func: relax.Function) -> set[Any]:
    """The variables whose elements a function returns, seen through tuples and reshapes."""
    definitions = {binding.var: binding.value for binding in bindings_of(func)}
    found: set[Any] = set()
    pending = used_vars(func.body.body)
    while pending:
        var = pending.pop()
        found.add(var)
        value: Any = definitions.get(var)
        if isinstance(value, relax.Var | relax.Tuple | relax.TupleGetItem) or op_name(value) == _RESHAPE:
            pending += used_vars(value)
    return found


def _fold(reader: Any, passed: Sequence[Any], cast_vars: Collection[Any]) -> Fold | None:
    """How the binding that reads passed[-1] becomes part of the product passed[0], or None. cast_vars : casts that may."""
    product, last, value = passed[0], passed[-1], reader.value
    kind = op_name(value)
    if kind == _CAST and reader.var in cast_vars and dtype_of(value) == "float32" != dtype_of(product):
        return Fold("cast", product, tuple(passed))
    if kind != _ADD:
        return None
    addend = value.args[1] if value.args[0].same_as(last) else value.args[0]
    shape = known_shape(addend)
    if shape is None or dtype_of(addend) != dtype_of(product) or not _equal(shape, shape_of(last)):
        return None
    return Fold("add", product, tuple(passed), addend)


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    analyzer = sym.Analyzer()
    return len(a) == len(b) and all(analyzer.can_prove_equal(x, y) for x, y in zip(a, b, strict=True))

"""DispatchMatmul: matrix products with a matrix on the right go to the packed functions `tvm_infer.matmul` and `linear`.

TVM's own CPU matmuls are 30 to 150 times slower than a BLAS here, and a transposed weight would be transposed again at every step. On
CUDA the library is NVIDIA's cuBLASLt, and a kernel of our own for up to 8 rows: TVM's generated products of many rows reach a fraction
of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import tvm
from tvm import relax

from ..errors import ArgumentError
from . import extern_calls
from .nodes import bindings_of, dtype_of, known_shape, op_name, shape_of, static_int
from .printer import format_expr
from .product_folds import Fold, find_folds
from .report import Location, Reason

_MATMUL, _PERMUTE = "relax.matmul", "relax.permute_dims"


@dataclass(frozen=True)
class Library:
    """What multiplies on a target. dtypes : of both operands, one of them; the result has the same, or float32 where `widens`.

    reads_ahead : whether it matters to say that a matrix is constant (tvm_infer.linear).
    """

    name: str
    dtypes: tuple[str, ...]
    widens: bool
    reads_ahead: bool

    def problem(self, a: Any, b: Any, value: Any) -> tuple[str, str] | None:
        """Why it does not take these data types and what would change that, or None."""
        operands = dtype_of(a), dtype_of(b)
        results = (operands[0], "float32") if self.widens else operands[:1]
        takes = f"{self.name} takes {', '.join(self.dtypes)}"
        for side, dtype in zip(("left", "right"), operands, strict=True):
            if dtype not in self.dtypes:
                return f"the {side} is {dtype}; {takes}", f"cast the model to {self.dtypes[0]}"
        if operands[0] != operands[1]:
            return f"the left is {operands[0]}, the right {operands[1]}; {takes} on both sides", "cast one of them"
        if dtype_of(value) not in results:
            return (
                f"the result is {dtype_of(value)}; {self.name} makes {' or '.join(dict.fromkeys(results))} of {operands[0]}",
                "cast the result afterwards",
            )
        return None


LIBRARIES = {
    "cpu": Library("a BLAS", ("float32",), widens=False, reads_ahead=False),
    "cuda": Library("cuBLASLt", ("float16", "bfloat16", "float32"), widens=True, reads_ahead=True),
}


@dataclass(frozen=True)
class GemvRule:
    """Products of few rows that stay with TVM's own GEMV schedules: a fixed number of rows, at most `max_rows`; 0 leaves none.

    There is no shape known that they do faster than our kernel for few rows (docs/kernels.md). A symbolic number of rows may be large,
    so it is dispatched.
    """

    max_rows: int = 0

    def problem(self, rows: tuple[Any, ...]) -> tuple[str, str] | None:
        """Why a product of `rows` (leading dimensions of its left-hand side) stays with TVM, or None."""
        count = 1
        for dim in rows:
            extent = static_int(dim)
            if extent is None:
                return None
            count *= extent
        if count > self.max_rows:
            return None
        return (
            f"it has {count} row(s), and up to {self.max_rows} stay with TVM's GEMV",
            "lower gemv_max_rows to send it to the library",
        )


@dataclass(frozen=True)
class Dispatched:
    """One product that goes to a packed function: [m, k] x [k, n], where m may be symbolic and leading dimensions count as rows.

    weight : name of the right-hand matrix; transpose_b : it is stored [n, k] and used as it is; folded : what followed it and is now
    part of its call, "add" of a matrix (tvm_infer.matmul_add) or "cast" to float32; is_linear : the matrix is a weight, and the call is
    tvm_infer.linear or linear_add.
    """

    location: Location
    m: str
    k: str
    n: str
    weight: str
    transpose_b: bool
    folded: Literal["", "add", "cast"] = ""
    is_linear: bool = False


@dataclass(frozen=True)
class _Product:
    """A product as it is dispatched. b : as it is stored. is_linear : b is a constant [n, k]."""

    location: Location
    a: Any
    b: Any
    transpose_b: bool
    is_linear: bool
    out_ty: Any

    def call(self, fold: Fold | None = None, out_ty: Any = None) -> Any:
        """The packed call; with a fold, for its reader of type out_ty."""
        out_ty = out_ty or self.out_ty
        addend = fold.addend if fold is not None and fold.kind == "add" else None
        if self.is_linear:
            if addend is not None:
                return extern_calls.linear_add(self.a, self.b, addend, out_ty=out_ty)
            return extern_calls.linear(self.a, self.b, out_ty=out_ty)
        if addend is not None:
            return extern_calls.matmul_add(self.a, self.b, addend, transpose_b=self.transpose_b, out_ty=out_ty)
        return extern_calls.matmul(self.a, self.b, transpose_b=self.transpose_b, out_ty=out_ty)

    def described(self, fold: Fold | None) -> Dispatched:
        *rows, k = shape_of(self.a)
        return Dispatched(
            self.location,
            " * ".join(format_expr(dim) for dim in rows if format_expr(dim) != "1") or "1",
            format_expr(k),
            format_expr(shape_of(self.b)[0 if self.transpose_b else 1]),
            _name(self.b),
            self.transpose_b,
            "" if fold is None else fold.kind,
            self.is_linear,
        )


@dataclass
class MatmulReport:
    """What one run of DispatchMatmul did, over all functions."""

    dispatched: list[Dispatched] = field(default_factory=list)
    left: list[Reason] = field(default_factory=list)
    library: str = ""

    def __str__(self) -> str:
        by = f" ({self.library})" if self.library and self.dispatched else ""
        lines = [f"{len(self.dispatched)} matmul(s) to tvm_infer.matmul, {len(self.left)} left to TVM{by}"]
        linear = sum(item.is_linear for item in self.dispatched)
        if linear:
            lines.append(f"{linear} of them by a weight, which may be read early (tvm_infer.linear)")
        folded = Counter(item.folded for item in self.dispatched)
        if folded["add"]:
            lines.append(f"{folded['add']} of them with the addition that followed (tvm_infer.matmul_add)")
        if folded["cast"]:
            lines.append(f"{folded['cast']} of them with the cast to float32 that followed")
        ends = {"": "", "add": " + [{m}, {n}]", "cast": " to float32"}
        shapes = Counter((d.m, d.k, d.n, d.transpose_b, d.folded) for d in self.dispatched)
        for (m, k, n, transpose_b, kind), count in shapes.items():
            weight = f"[{n}, {k}]^T" if transpose_b else f"[{k}, {n}]"
            lines.append(f"  {count:4d} x  [{m}, {k}] x {weight}{ends[kind].format(m=m, n=n)}")
        lines += [f"left to TVM: {reason}" for reason in self.left]
        return "\n".join(lines)


class DispatchMatmul:
    """Send `R.matmul(a [..., m, k], b [k, n])` to `tvm_infer.matmul`: float32 on the CPU; float16, bfloat16 and float32 on CUDA.

    `b = R.permute_dims(w)` of a matrix w [n, k] (what a linear layer exports to) is folded into the call: w is read as it is stored,
    and the permute goes if nothing else uses it. What is not dispatched (another dtype, a batched right-hand side, vectors) stays as it
    is, with the reason in the report.

    On CUDA, where w is a weight (a parameter behind the function's `num_input`), the call is `tvm_infer.linear`, which may read w
    before the kernels ahead of it are done: weights must not change while the model runs.

    Of a dispatched product whose only reader is `R.add(product, x)` or `R.add(x, product)`, x of its shape and dtype, product and sum
    become one call of `tvm_infer.matmul_add` (`linear_add`); where the only reader is `R.astype(product, "float32")`, on CUDA, and the
    function returns that (logits), the call writes float32. Reshapes between the two that keep the columns are passed over. Both leave
    out a rounding, that of the product to the model's dtype. A bias, which has another shape, stays an addition, which TVM fuses with
    what follows.

    Parameters
    ----------
    target_kind : "cpu" or "cuda": which library multiplies (LIBRARIES).
    gemv_max_rows : products of a fixed number of rows up to this stay with TVM (GemvRule).
    enabled : False leaves the module as it is, and the report says so of every product.
    fold : False leaves additions and casts to kernels of their own.

    Attributes
    ----------
    report : MatmulReport of the last call.

    Raises
    ------
    ArgumentError : another target_kind, a negative gemv_max_rows.
    """

    def __init__(
        self, target_kind: str = "cpu", *, gemv_max_rows: int = 0, enabled: bool = True, fold: bool = True
    ) -> None:
        if target_kind not in LIBRARIES:
            raise ArgumentError(f"argument `target_kind` is {target_kind!r}; it must be one of {', '.join(LIBRARIES)}")
        if gemv_max_rows < 0:
            raise ArgumentError(f"argument `gemv_max_rows` is {gemv_max_rows}; it must be at least 0 (0: dispatch all)")
        self.library, self.gemv = LIBRARIES[target_kind], GemvRule(gemv_max_rows)
        self.enabled, self.fold = enabled, fold
        self.report = MatmulReport()

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged."""
        self.report = MatmulReport(library=self.library.name)
        updated = mod.clone()
        for var, func in mod.functions_items():
            if isinstance(func, relax.Function) and isinstance(func.body, relax.SeqExpr):
                updated.update_func(var, self._rewrite(str(var.name_hint), func))
        return relax.transform.DeadCodeElimination()(updated) if self.enabled else mod

    def _rewrite(self, name: str, func: Any) -> Any:
        products = self._products(name, func)
        folds = find_folds(func, products, casts=self.library.widens) if self.fold else {}
        by_product = {fold.product: fold for fold in folds.values()}
        self.report.dispatched += [product.described(by_product.get(var)) for var, product in products.items()]
        gone = {var for fold in folds.values() for var in fold.passed}
        builder = relax.BlockBuilder()
        blocks = []
        for block in func.body.blocks:
            bindings = []
            for binding in block.bindings:
                var, call = binding.var, None
                if var in gone:
                    continue
                if var in folds:
                    call = products[folds[var].product].call(folds[var], binding.value.ty)
                elif var in products:
                    call = products[var].call()
                bindings.append(binding if call is None else relax.VarBinding(var, builder.normalize(call)))
            is_dataflow = isinstance(block, relax.DataflowBlock)
            blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
        body = relax.SeqExpr(blocks, func.body.body)
        return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs, func.span)

    def _products(self, name: str, func: Any) -> dict[Any, _Product]:
        """The products that are dispatched, by variable; the reasons for the others go to the report."""
        definitions = {binding.var: binding.value for binding in bindings_of(func)}
        constants = _weights(func)
        products = {}
        for var, value in definitions.items():
            if op_name(value) != _MATMUL:
                continue
            location = Location(name, str(var.name), _MATMUL)
            a, b = value.args
            problem = self._problem(a, b, value)
            if problem is not None:
                why, fix = problem
                self.report.left.append(Reason(location, f"{_describe(a)} x {_describe(b)}", why, fix))
                continue
            stored = _transposed(b, definitions)
            b, transposed = (b, False) if stored is None else (stored, True)
            is_linear = self.library.reads_ahead and transposed and b in constants
            products[var] = _Product(location, a, b, transposed, is_linear, value.ty)
        return products

    def _problem(self, a: Any, b: Any, value: Any) -> tuple[str, str] | None:
        """Why a product stays with TVM and what would change that, or None."""
        if not self.enabled:
            return "the dispatch of products is switched off", "pass enabled=True"
        problem = _shape_problem(a, b) or self.library.problem(a, b, value)
        return problem or self.gemv.problem(shape_of(a)[:-1])


def _shape_problem(a: Any, b: Any) -> tuple[str, str] | None:
    """Why a product is none of matrices and what would change that, or None."""
    if known_shape(a) is None or known_shape(b) is None:
        return "the shape of an operand is not known", "give the operand a shape with R.match_cast"
    if len(shape_of(b)) != 2:
        return (
            f"the right-hand side has rank {len(shape_of(b))}; only matrices [k, n] are dispatched",
            "reshape to a product with a matrix if one operand is shared by the batch",
        )
    if len(shape_of(a)) < 2:
        return "the left-hand side is a vector", "give it a row dimension"
    return None


def _transposed(b: Any, definitions: Mapping[Any, Any]) -> Any | None:
    """The matrix [n, k] whose transpose `b` is, or None."""
    value: Any = definitions.get(b)
    if op_name(value) != _PERMUTE or len(shape_of(value)) != 2:
        return None
    axes = value.attrs.axes
    return value.args[0] if axes is None or [int(axis) % 2 for axis in axes] == [1, 0] else None


def _weights(func: Any) -> Mapping[Any, Any]:
    """The parameters that are the same at every call: those behind the `num_input` first ones."""
    num_input = (func.attrs or {}).get("num_input")
    return {} if num_input is None else dict.fromkeys(func.params[int(num_input) :])


def _name(x: Any) -> str:
    return str(x.name) if hasattr(x, "name") else "constant"


def _describe(x: Any) -> str:
    shape = known_shape(x)
    dims = "unknown shape" if shape is None else ", ".join(format_expr(dim) for dim in shape)
    return f"{_name(x)} [{dims}] {dtype_of(x)}"

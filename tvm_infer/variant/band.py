"""The part of a mask that is a band around the diagonal: the planner skips the keys outside it, and kernels need not test it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import VariantError
from .code import Code, conjunction, of_tir, to_tir
from .expression import Expr
from .numpy_eval import evaluate
from .operations import BOOL, INT, OPERATIONS
from .parameters import Parameter

_SWAPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}
_NEGATED = {"LT": "GE", "LE": "GT", "GT": "LE", "GE": "LT", "EQ": "NE", "NE": "EQ"}


class Band(NamedTuple):
    """Keys that a query sees, by position. causal : none after its own. window_left : so many before its own; -1 for all."""

    causal: bool
    window_left: int


class Split(NamedTuple):
    """A mask in two. causal, windows : the band; the windows' widths are integers of constants and scalars, the smallest counts.

    residual : what a kernel has to test besides, None where that is nothing.
    """

    causal: bool
    windows: tuple[Code, ...]
    residual: Code | None


def split(mask: Code | None, parameters: Mapping[str, Parameter]) -> Split:
    """Takes the conjuncts of `mask` apart. One that says kv_pos - q_pos <= 0, or q_pos - kv_pos <= w, however it is written, is a band.

    A conjunct that is stricter than causal (kv_pos < q_pos) makes the band causal and stays.
    """
    if mask is None:
        return Split(False, (), None)
    leaves: dict[str, Any] = {}
    tir = to_tir(mask, parameters, leaves)
    if not {"q_pos", "kv_pos"} <= leaves.keys():
        return Split(False, (), None if _is_true(tir) else mask)
    scalars = {name for name, p in parameters.items() if p.is_scalar and p.dtype == INT}
    causal, windows, rest = False, [], []
    for conjunct in _conjuncts(tir, False):
        found = _recognise(conjunct, leaves["q_pos"], leaves["kv_pos"], scalars)
        causal |= found.causal
        if found.window is not None:
            windows.append(found.window)
        if found.stays and not _is_true(conjunct):
            rest.append(of_tir(conjunct))
    if not causal and not windows:
        return Split(False, (), mask)
    return Split(causal, tuple(dict.fromkeys(windows)), conjunction(rest) if rest else None)


def evaluate_band(parts: Split, scalars: Mapping[str, int | float], variant: str) -> Band:
    """The band for these scalars. Raises VariantError for a window of negative width."""
    narrowest = -1
    for code in parts.windows:
        width = int(evaluate(code, scalars))
        if width < 0:
            given = ", ".join(f"{name}={scalars[name]}" for name in sorted(code.names))
            raise VariantError(
                f"variant {variant}: with {given} a query sees keys at least {-width} after its own position only; the window's width "
                f"comes out as {width} and must be 0 (the query's own key) or more"
            )
        narrowest = width if narrowest < 0 else min(narrowest, width)
    return Band(parts.causal, narrowest)


class _Found(NamedTuple):
    causal: bool = False
    window: Code | None = None
    stays: bool = True


def _is_true(tir: Any) -> bool:
    return type(tir).__name__ == "IntImm" and str(tir.ty) == BOOL and bool(tir.value)


def _conjuncts(tir: Any, negated: bool) -> list[Any]:
    """Conditions whose conjunction is `tir`, or its negation."""
    from tvm import tirx

    name = type(tir).__name__
    if name == "Not":
        return _conjuncts(tir.a, not negated)
    if name == ("Or" if negated else "And"):
        return _conjuncts(tir.a, negated) + _conjuncts(tir.b, negated)
    if name in _NEGATED and negated and str(tir.a.ty) == INT:  # of floats NaN would come out otherwise
        return _conjuncts(getattr(tirx, _NEGATED[name])(tir.a, tir.b), False)
    if negated:
        return [tirx.Not(tir)]
    if name in ("GT", "GE") and _is_extremum(tir.a, "Min", tir.b, "Max"):
        return _conjuncts(getattr(tirx, _SWAPPED[name])(tir.b, tir.a), False)
    if name in ("LT", "LE"):
        # max(a, b) <= c is both a <= c and b <= c; |q_pos - kv_pos| is such a maximum.
        if type(tir.a).__name__ == "Max" and str(tir.a.ty) == INT:
            return [part for x in (tir.a.a, tir.a.b) for part in _conjuncts(type(tir)(x, tir.b), False)]
        if type(tir.b).__name__ == "Min" and str(tir.b.ty) == INT:
            return [part for x in (tir.b.a, tir.b.b) for part in _conjuncts(type(tir)(tir.a, x), False)]
    return [tir]


def _is_extremum(a: Any, of_a: str, b: Any, of_b: str) -> bool:
    return str(a.ty) == INT and (type(a).__name__ == of_a or type(b).__name__ == of_b)


def _recognise(tir: Any, q_pos: Expr, kv_pos: Expr, scalars: set[str]) -> _Found:
    """What a conjunct says of kv_pos - q_pos."""
    from tvm import sym, tirx

    name = type(tir).__name__
    if name not in _SWAPPED or str(tir.a.ty) != INT:
        return _Found()
    low, high = (tir.a, tir.b) if name in ("LT", "LE") else (tir.b, tir.a)
    difference = tirx.Sub(low, high) if name in ("LE", "GE") else tirx.Add(tirx.Sub(low, high), tirx.IntImm(INT, 1))
    # difference <= 0, which is linear: slope * kv_pos - slope * q_pos + base
    analyzer = sym.Analyzer()
    linear = sym.detect_linear_equation(analyzer.simplify(difference), [q_pos.tir, kv_pos.tir])
    coefficients = [analyzer.simplify(x) for x in linear]
    if len(coefficients) != 3 or any(type(x).__name__ != "IntImm" for x in coefficients[:2]):
        return _Found()
    slope = int(coefficients[1].value)
    if slope == 0 or int(coefficients[0].value) != -slope:
        return _Found()
    limit = analyzer.simplify(
        tirx.FloorDiv(tirx.Sub(tirx.IntImm(INT, 0), coefficients[2]), tirx.IntImm(INT, abs(slope)))
    )
    constant = int(limit.value) if type(limit).__name__ == "IntImm" else None
    if slope > 0:  # kv_pos - q_pos <= limit
        return _Found(causal=constant is not None and constant <= 0, stays=constant != 0)
    if constant is not None and constant < 0:
        return _Found()
    width = _integer_of(limit, scalars)
    return _Found(window=width, stays=width is None)


def _integer_of(tir: Any, scalars: set[str]) -> Code | None:
    """The code of an integer of constants and scalars; None for what is none, or what the simplifier turned into foreign operations."""
    try:
        code = of_tir(tir)
    except KeyError:
        return None
    for node in code.nodes:
        kinds = tuple(code.nodes[a].kind for a in node.args)
        if node.op in OPERATIONS and OPERATIONS[node.op].signatures.get(kinds) != node.kind:
            return None
    return code if code.names <= scalars and all(node.op != "load" for node in code.nodes) else None

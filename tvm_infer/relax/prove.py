"""Proofs about the input of a softmax, given as a scalar expression of (head h, query i, key j).

`prove_mask` shows that the expression is `sm_scale * score + constant` wherever a causal (or full) attention sees a key, and -inf
everywhere else, or raises `Refusal` with what stands in the way.

What counts as -inf: minus infinity itself, or a finite number so low that its exponential is 0 beside any visible score. The limit is
-1e9 (float32; bfloat16: what that rounds to) and -6e4 (float16, whose lowest number is -65504); a finite one is an assumption that the
report shows.
Every causal row sees at least its own key (j = i), so a masked score never decides a row's maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm import ir, sym, tirx
from tvm.sym.analyzer import ProofStrength

from .cases import Cases, masked_limit
from .nodes import int_imm, same, static_int
from .printer import format_expr
from .scalars import children, constant_value, free_vars, substitute
from .symbolic import Atom, Evaluator

if TYPE_CHECKING:
    from tvm_infer.variant.layer import LayerVariant


class Refusal(Exception):
    """An attention that cannot be proven: what was seen, why it does not do, what the user can do."""

    def __init__(self, seen: str, why: str, fix: str) -> None:
        super().__init__(why)
        self.seen, self.why, self.fix = seen, why, fix


class NotPlainError(Refusal):
    """A softmax input that is not scale * score under a causal or full mask; it may be a variant (extract.py)."""


class UndecidedError(Exception):
    """A condition that holds for some (i, j) of a region and fails for others, or that depends on data."""

    def __init__(self, condition: Any) -> None:
        super().__init__()
        self.condition = condition


class OpaqueError(Exception):
    """A term that is neither a constant nor a multiple of the score."""

    def __init__(self, term: Any) -> None:
        super().__init__()
        self.term = term


@dataclass(frozen=True)
class _Affine:
    """coefficient * score + constant."""

    coefficient: float
    constant: float


@dataclass(frozen=True)
class MaskProof:
    """The proven meaning of a softmax input: factor on the score, causal or full, what was assumed, and what it does besides."""

    scale: float
    causal: bool
    assumptions: tuple[str, ...] = ()
    variant: LayerVariant | None = None


class Region:
    """A set of (i, j), and what is true of integer conditions on it.

    kind : "all" (every pair), "visible" (j <= i), "hidden" (j > i) or "own" (j = i). The region is also written without a constraint,
    by substitution (visible: i = j + t; hidden: j = i + 1 + t; t >= 0), because the analyzer's rules decide `j - i <= 0` in that form
    without its optional SMT solver.
    """

    def __init__(self, evaluator: Evaluator, kind: str, i: Any, j: Any) -> None:
        self.kind = kind
        self._evaluator = evaluator
        self._constraint = {"visible": j <= i, "hidden": j > i, "own": tirx.EQ(i, j)}.get(kind)
        distance = tirx.Var("t", "int64")
        self._values = {
            "all": {},
            "visible": {i: j + distance},
            "hidden": {j: i + int_imm(1) + distance},
            "own": {j: i},
        }[kind]
        self._analyzer = sym.Analyzer()
        for var in (i, j, distance):
            self._analyzer.bind(var, ir.Range(int_imm(0), int_imm(1 << 31)))

    def decide(self, condition: Any) -> bool | None:
        """Whether an integer condition is always true (True), never true (False), or neither is proven (None)."""
        for var in free_vars(condition):
            if str(var.ty).startswith("int") and not self._analyzer.const_int_bound_is_bound(var):
                bound = self._evaluator.analyzer.const_int_bound(var)
                self._analyzer.update(var, bound)
        plain = self._analyzer.simplify(substitute(condition, self._values))
        number = static_int(plain)
        if number is not None:
            return bool(number)
        with self._constrained() as analyzer:
            if analyzer.can_prove(condition, ProofStrength.SYMBOLIC_BOUND):
                return True
            if analyzer.can_prove(tirx.Not(condition), ProofStrength.SYMBOLIC_BOUND):
                return False
        return None

    @contextmanager
    def _constrained(self) -> Iterator[Any]:
        if self._constraint is None:
            yield self._evaluator.analyzer
        else:
            with self._evaluator.analyzer.constraint_scope(self._constraint):
                yield self._evaluator.analyzer


class Resolver:
    """Reduces a scalar expression to an affine function of the score on one region.

    Parameters
    ----------
    is_score : whether an atom is the score (a finite number).
    assume_full : names of mask parameters that are taken to mask nothing; those met are collected in `assumed`.
    reduction : decides a "reduce" atom (torch's test for rows that are masked entirely), None where it cannot.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        region: Region,
        is_score: Callable[[Any], bool],
        assume_full: Set[str] = frozenset(),
        reduction: Callable[[Atom], float | None] | None = None,
    ) -> None:
        self._evaluator = evaluator
        self._region = region
        self._is_score = is_score
        self._assume_full = assume_full
        self._reduction = reduction
        self.assumed: set[str] = set()

    def affine(self, expr: Any) -> _Affine:
        """The expression as coefficient * score + constant; raises UndecidedError or OpaqueError."""
        constant = constant_value(expr)
        if constant is not None:
            return _Affine(0.0, constant)
        if str(expr.ty) == "bool":
            return _Affine(0.0, float(self.condition(expr)))
        if isinstance(expr, ir.Var):
            return self._variable(expr)
        if str(expr.ty).startswith("int") and _is_index_arithmetic(expr, self._evaluator):
            raise OpaqueError(expr)  # a position: no constant
        if isinstance(expr, tirx.Cast):
            return self.affine(expr.value)
        if isinstance(expr, tirx.Select):
            return self.affine(expr.true_value if self.condition(expr.condition) else expr.false_value)
        if isinstance(expr, tirx.Add | tirx.Sub | tirx.Mul | tirx.Div | tirx.Max | tirx.Min):
            try:
                return self._combine(expr, self.affine(expr.a), self.affine(expr.b))
            except OpaqueError as error:
                raise self._widened(error, expr) from None
        raise OpaqueError(expr)

    def _widened(self, error: OpaqueError, expr: Any) -> OpaqueError:
        """Name the whole product or sum that stands in the way, unless it holds the score or the term is an input."""
        has_score = any(self._is_score(var) for var in free_vars(expr))
        return error if has_score or _input_atom(self._evaluator, error.term) is not None else OpaqueError(expr)

    def _variable(self, var: Any) -> _Affine:
        if self._is_score(var):
            return _Affine(1.0, 0.0)
        atom = self._evaluator.atoms.get(var)
        number = None if atom is None else assumed_number(atom, var, self._assume_full)
        if number is not None and atom is not None:
            self.assumed.add(atom.name)
            return _Affine(0.0, number)
        if atom is not None and atom.kind == "reduce" and self._reduction is not None:
            value = self._reduction(atom)
            if value is not None:
                return _Affine(0.0, value)
        raise OpaqueError(var)

    def _combine(self, expr: Any, a: _Affine, b: _Affine) -> _Affine:
        if isinstance(expr, tirx.Add):
            return _Affine(a.coefficient + b.coefficient, a.constant + b.constant)
        if isinstance(expr, tirx.Sub):
            return _Affine(a.coefficient - b.coefficient, a.constant - b.constant)
        if isinstance(expr, tirx.Mul):
            if a.coefficient and b.coefficient:
                raise OpaqueError(expr)
            factor, value = (b.constant, a) if b.coefficient == 0.0 else (a.constant, b)
            return _scaled(value, factor, expr)
        if isinstance(expr, tirx.Div):
            if b.coefficient or b.constant == 0.0:
                raise OpaqueError(expr)
            return _scaled(a, 1.0 / b.constant, expr)
        if a.coefficient == 0.0 and b.coefficient == 0.0:
            pick = max if isinstance(expr, tirx.Max) else min
            return _Affine(0.0, pick(a.constant, b.constant))
        # max(score, lowest number) keeps the score
        value, bound = (a, b) if b.coefficient == 0.0 else (b, a)
        if isinstance(expr, tirx.Max) and bound.coefficient == 0.0 and bound.constant <= masked_limit(str(expr.ty)):
            return _Affine(0.0, bound.constant) if is_masked(value, str(expr.ty)) else value
        raise OpaqueError(expr)

    def condition(self, expr: Any) -> bool:
        """The truth of a boolean expression on the region; raises UndecidedError where it varies."""
        number = static_int(expr)
        if number is not None:
            return bool(number)
        if isinstance(expr, tirx.Not):
            return not self.condition(expr.a)
        if isinstance(expr, tirx.And | tirx.Or):
            return self._junction(expr)
        if isinstance(expr, tirx.Select):
            return self.condition(expr.true_value if self.condition(expr.condition) else expr.false_value)
        if isinstance(expr, tirx.Cast):
            return self.affine(expr.value).constant != 0.0
        if isinstance(expr, ir.Var):
            return self._mask_entry(expr)
        if isinstance(expr, tirx.LT | tirx.LE | tirx.GT | tirx.GE | tirx.EQ | tirx.NE):
            return self._comparison(expr)
        raise UndecidedError(expr)

    def _junction(self, expr: Any) -> bool:
        """And / or: one operand may be undecided where the other settles it."""
        settles = isinstance(expr, tirx.Or)
        undecided: Exception | None = None
        for operand in (expr.a, expr.b):
            try:
                if self.condition(operand) == settles:
                    return settles
            except (UndecidedError, OpaqueError) as error:
                undecided = error
        if undecided is not None:
            raise undecided
        return not settles

    def _mask_entry(self, var: Any) -> bool:
        """An element of a boolean tensor: data, unless it is named in assume_full."""
        atom = self._evaluator.atoms.get(var)
        if atom is not None and atom.kind == "load" and atom.name in self._assume_full:
            self.assumed.add(atom.name)
            return True
        if atom is not None and atom.kind == "reduce" and self._reduction is not None:
            value = self._reduction(atom)
            if value is not None:
                return value != 0.0
        raise OpaqueError(var)

    def _comparison(self, expr: Any) -> bool:
        if _is_index_arithmetic(expr, self._evaluator):
            decided = self._region.decide(expr)
            if decided is None:
                raise UndecidedError(expr)
            return decided
        a, b = self.affine(expr.a), self.affine(expr.b)
        if a.coefficient == 0.0 and b.coefficient == 0.0:
            return _compare(expr, a.constant, b.constant)
        # a score is finite: it never equals an infinity
        infinite = math.isinf(a.constant) != math.isinf(b.constant)
        if infinite and isinstance(expr, tirx.EQ | tirx.NE):
            return isinstance(expr, tirx.NE)
        if a.constant == b.constant and math.isinf(a.constant) and isinstance(expr, tirx.EQ | tirx.NE):
            return isinstance(expr, tirx.EQ)
        raise UndecidedError(expr)


def _scaled(value: _Affine, factor: float, expr: Any) -> _Affine:
    result = _Affine(value.coefficient * factor, value.constant * factor)
    if math.isnan(result.coefficient) or math.isnan(result.constant):
        raise OpaqueError(expr)  # 0 * inf
    return result


def _compare(expr: Any, a: float, b: float) -> bool:
    if isinstance(expr, tirx.LT):
        return a < b
    if isinstance(expr, tirx.LE):
        return a <= b
    if isinstance(expr, tirx.GT):
        return a > b
    if isinstance(expr, tirx.GE):
        return a >= b
    return a == b if isinstance(expr, tirx.EQ) else a != b


def _is_index_arithmetic(expr: Any, evaluator: Evaluator) -> bool:
    """Whether an expression is made of index variables and integers alone."""
    if not all(str(child.ty).startswith("int") for child in children(expr)):
        return False
    return not any(var in evaluator.atoms for var in free_vars(expr)) and not _has_select(expr)


def _has_select(expr: Any) -> bool:
    return isinstance(expr, tirx.Select) or any(_has_select(child) for child in children(expr))


def assumed_number(atom: Atom, var: Any, assume_full: Set[str]) -> float | None:
    """What an element of a mask input that is assumed to hide nothing stands for, None for other atoms.

    Floating masks are added to the scores, so that 0 hides nothing; integer ones are 1, and conditions true, where a key is kept.
    """
    if atom.kind != "load" or atom.name not in assume_full:
        return None
    return 0.0 if str(var.ty).startswith(("float", "bfloat")) else 1.0


def is_masked(value: _Affine, dtype: str) -> bool:
    """Whether a softmax input contributes nothing: -inf, or a number that swamps any score."""
    return value.constant <= masked_limit(dtype)


def prove_mask(
    evaluator: Evaluator,
    value: Any,
    score: Any,
    i: Any,
    j: Any,
    dtype: str,
    assume_full: Set[str],
    is_input: Callable[[Any], bool] = lambda source: True,
) -> MaskProof:
    """Prove that softmax input `value` is a causal or full attention over `score`, or raise Refusal; NotPlainError where it may be
    another attention. is_input : whether a parameter of the function changes with every call (and is not a weight)."""
    seen = f"softmax input[h, i, j] = {format_expr(value, evaluator)}"

    def resolve(kind: str) -> tuple[_Affine, set[str]]:
        resolver = Resolver(evaluator, Region(evaluator, kind, i, j), lambda var: same(var, score), assume_full)
        return resolver.affine(value), resolver.assumed

    try:
        everywhere, assumed = resolve("all")
    except (UndecidedError, OpaqueError):
        return _prove_causal(evaluator, resolve, seen, dtype, is_input)
    if is_masked(everywhere, dtype):
        raise Refusal(seen, "every key is masked", "check the mask: no query sees any key")
    return MaskProof(_positive(everywhere, seen), causal=False, assumptions=assumed_masks(assumed))


def _prove_causal(
    evaluator: Evaluator,
    resolve: Callable[[str], tuple[_Affine, set[str]]],
    seen: str,
    dtype: str,
    is_input: Callable[[Any], bool],
) -> MaskProof:
    supported = "this pass proves causal (key j <= query i) and full attention"
    try:
        visible, assumed = resolve("visible")
        hidden, assumed_hidden = resolve("hidden")
    except UndecidedError as error:
        condition = format_expr(error.condition, evaluator)
        raise NotPlainError(
            seen,
            f"the mask is neither causal nor full: `{condition}` decides which keys are seen",
            f'{supported}; keep this attention with on_unmatched="keep", or change the mask',
        ) from None
    except OpaqueError as error:
        raise _opaque_refusal(evaluator, error.term, seen, is_input) from None
    if is_masked(visible, dtype):
        raise Refusal(
            seen,
            "a key at or before the query is masked everywhere (a causal query i sees its own key, j = i)",
            f"{supported}; change the mask to j <= i",
        )
    if not is_masked(hidden, dtype):
        limit = masked_limit(dtype)
        raise Refusal(
            seen,
            f"a key after its query gets {_format_affine(hidden)}, which is neither masked nor the same as before it "
            f"(masked means -inf or <= {limit:g})",
            f"{supported}; mask with -inf",
        )
    assumptions = assumed_masks(assumed | assumed_hidden)
    if not math.isinf(hidden.constant):
        assumptions += (f"masked scores get {hidden.constant:g}, taken as -inf",)
    return MaskProof(_positive(visible, seen), causal=True, assumptions=assumptions)


def assumed_masks(names: set[str]) -> tuple[str, ...]:
    return tuple(f"mask input `{name}` masks nothing (assume_full)" for name in sorted(names))


def _positive(value: _Affine, seen: str) -> float:
    if not value.coefficient > 0.0 or math.isinf(value.coefficient):
        raise Refusal(
            seen, f"the factor on the score is {value.coefficient:g}, not positive", "use a positive softmax scale"
        )
    return value.coefficient


def _format_affine(value: _Affine) -> str:
    return f"{value.coefficient:g} * score + {value.constant:g}" if value.coefficient else f"{value.constant:g}"


def _input_atom(evaluator: Evaluator, term: Any) -> Atom | None:
    """The atom of a term that is an element of a function input, None for any other term."""
    atom = evaluator.atoms.get(term) if isinstance(term, ir.Var) else None
    is_input = atom is not None and isinstance(atom.source, ir.Var) and atom.source not in evaluator.definitions
    return atom if is_input and atom is not None and atom.kind == "load" else None


def _opaque_refusal(evaluator: Evaluator, term: Any, seen: str, is_input: Callable[[Any], bool]) -> Refusal:
    """The reason for a term that is no constant and no multiple of the score."""
    shown = format_expr(term, evaluator)
    atom = _input_atom(evaluator, term)
    if atom is not None and is_input(atom.source):
        return input_refusal(atom, seen)
    return NotPlainError(
        seen,
        f"`{shown}` is neither a constant nor a multiple of the score: the softmax input is not scale * score + mask",
        'this attention variant (soft cap, ALiBi, bias, …) is not rewritten; keep it with on_unmatched="keep"',
    )


def input_refusal(atom: Atom, seen: str) -> Refusal:
    """The reason for an element of a function input."""
    return Refusal(
        seen,
        f"the mask depends on the function input `{atom.name}`, so what it hides is not known when compiling",
        f'if `{atom.name}` hides nothing but what the causal mask hides, pass assume_full=["{atom.name}"]; otherwise export '
        "the model without it",
    )


def row_is_never_empty(
    evaluator: Evaluator, atom: Atom, i: Any, j: Any, is_score: Callable[[Any], bool], assume_full: Set[str]
) -> float | None:
    """The value of a max (min) over a row of flags: 1 (0) where the key j = i provably reaches it.

    torch's safe softmax asks "is any score of this row unmasked?". The row of query i has its own key, so the answer needs one
    element. Anything but flags (0 or 1) is left undecided.
    """
    holes = [position for position, part in enumerate(atom.index) if part is None]
    if len(holes) != 1:
        return None
    index = tuple(i if part is None else part for part in atom.index)
    value = evaluator.element(atom.operand, index)
    flag = value.value if isinstance(value, tirx.Cast) else value
    if str(flag.ty) != "bool":
        return None
    resolver = Resolver(evaluator, Region(evaluator, "own", i, j), is_score, assume_full)

    def known(var: Any) -> float | None:
        known_atom = evaluator.atoms.get(var)
        return None if known_atom is None else assumed_number(known_atom, var, assume_full)

    try:
        condition = Cases(evaluator, -math.inf, known).condition(
            flag
        )  # which comparisons with -inf are ones of positions
        reached = float(condition if isinstance(condition, bool) else resolver.condition(condition))
    except (UndecidedError, OpaqueError):
        return None
    return reached if reached == (1.0 if atom.reducer == "max" else 0.0) else None


def resolve_probability(
    evaluator: Evaluator,
    expr: Any,
    probability: Any,
    i: Any,
    j: Any,
    is_score: Callable[[Any], bool],
    assume_full: Set[str],
) -> bool:
    """Whether what enters the second matmul is the softmax itself, once rows that cannot be empty are known not to be."""

    def reduction(atom: Atom) -> float | None:
        return row_is_never_empty(evaluator, atom, i, j, is_score, assume_full)

    resolver = Resolver(
        evaluator, Region(evaluator, "all", i, j), lambda var: same(var, probability), assume_full, reduction
    )
    try:
        return resolver.affine(expr) == _Affine(1.0, 0.0)
    except (UndecidedError, OpaqueError):
        return False

"""Scalar expressions taken apart into cases: under which condition they are which constant, or which other expression.

A mask comes as `where(c, x, -inf)`, as `x + where(c, 0, -inf)`, as `x + (1 - float(c)) * lowest`, nested and combined. Pushing every
operation into the branches of the selections below it leaves a tree of conditions with constants and expressions as leaves, in which
masked parts are leaves at or below a limit. Selections between expressions alone are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, relax, tirx

from .conditions import COMPARISONS, both, either, negation, select
from .nodes import static_int
from .scalars import children, constant_value, free_vars, literal
from .symbolic import Evaluator, TooComplexError

# A mask of more cases than this is none that a kernel should evaluate for every key.
MAX_CASES = 64

_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min, tirx.FloorDiv, tirx.FloorMod)


@dataclass(frozen=True)
class Choice:
    """`yes` where the condition holds, else `no`; one of the leaves below is a constant."""

    condition: Any
    yes: Any
    no: Any


# A float, an expression without constant cases, or a Choice.
Case = Any


def masked_limit(dtype: str) -> float:
    """A score at or below this number counts as masked."""
    # what -1e9 is in bfloat16: -998244352
    return {"float16": -6e4, "bfloat16": -9.98e8}.get(dtype, -1e9)


class Cases:
    """Takes expressions of one evaluator apart.

    Parameters
    ----------
    limit : numbers at or below it are masked. known : the number that an atom stands for (a mask that is assumed full), or None.
    """

    def __init__(self, evaluator: Evaluator, limit: float, known: Callable[[Any], float | None]) -> None:
        self._evaluator = evaluator
        self._limit = limit
        self._known = known
        self._memo: dict[
            int, tuple[Any, Case]
        ] = {}  # by address; the expression keeps its address from being used anew

    # ---- numbers

    def of(self, expr: Any) -> Case:
        """The cases of an expression; of a condition 1 and 0. Raises TooComplexError beyond MAX_CASES."""
        key = int(expr.__chandle__())
        if key not in self._memo:
            self._memo[key] = (expr, self._of(expr))
        return self._memo[key][1]

    def _of(self, expr: Any) -> Case:
        number = constant_value(expr)
        if number is not None:
            return number
        if str(expr.ty) == "bool":
            return self.choice(self.condition(expr), 1.0, 0.0)
        if isinstance(expr, ir.Var):
            known = self._known(expr)
            return expr if known is None else known
        if isinstance(expr, tirx.Cast):
            return self._map(expr, (expr.value,), lambda operands: tirx.Cast(str(expr.ty), operands[0]))
        if isinstance(expr, tirx.Select):
            condition = self.condition(expr.condition)
            return self.choice(condition, self.of(expr.true_value), self.of(expr.false_value))
        if isinstance(expr, _ARITHMETIC):
            return self._map(expr, (expr.a, expr.b), lambda operands: type(expr)(*operands))
        if isinstance(expr, relax.Call):
            return self._map(
                expr, tuple(expr.args), lambda operands: relax.Call(expr.op, operands, expr.attrs, ret_ty=expr.ty)
            )
        return expr

    def _map(self, expr: Any, operands: tuple[Any, ...], rebuild: Callable[[list[Any]], Any]) -> Case:
        """An operation pushed into the cases of its operands."""
        cases = [self.of(operand) for operand in operands]
        if not any(isinstance(case, Choice | float) for case in cases):
            return expr

        def leaf(*values: Any) -> Case:
            return self._applied(expr, operands, values, rebuild)

        return _spread(leaf, cases, lambda condition, yes, no: self.choice(condition, yes, no))

    def _applied(
        self, expr: Any, operands: tuple[Any, ...], values: tuple[Any, ...], rebuild: Callable[[list[Any]], Any]
    ) -> Case:
        """An operation on leaves: folded where they are numbers, dropped where it does nothing, rebuilt otherwise."""
        numbers = [value if isinstance(value, float) else None for value in values]
        if isinstance(expr, tirx.Cast) and numbers[0] is not None:
            return float(math.trunc(numbers[0])) if str(expr.ty).startswith("int") else numbers[0]
        if len(values) == 2 and any(number is not None for number in numbers):
            folded = self._folded(expr, values, numbers)
            if folded is not None:
                return folded
        rebuilt = rebuild(
            [
                literal(value, str(operand.ty)) if isinstance(value, float) else value
                for value, operand in zip(values, operands, strict=True)
            ]
        )
        number = constant_value(rebuilt)
        return rebuilt if number is None else number

    def _folded(self, expr: Any, values: tuple[Any, ...], numbers: list[float | None]) -> Case | None:
        a, b = numbers
        if a is not None and b is not None:
            result = _of_numbers(expr, a, b)
            return None if result is None or math.isnan(result) else result
        (x, y), number = values, a if b is None else b
        assert number is not None
        value, is_left = (y, True) if a is not None else (x, False)
        if isinstance(expr, tirx.Add):  # what is added to a masked score leaves it masked
            return number if self.is_masked(number) else value if number == 0.0 else None
        if isinstance(expr, tirx.Sub) and self.is_masked(number if is_left else -number):
            return number if is_left else -number
        if isinstance(expr, tirx.Sub) and not is_left and number == 0.0:
            return value
        if isinstance(expr, tirx.Mul):
            return value if number == 1.0 else 0.0 if number == 0.0 else None
        if isinstance(expr, tirx.Div) and not is_left and number == 1.0:
            return value
        if isinstance(expr, tirx.Max) and self.is_masked(number):
            return value  # a score is above the lowest number
        if isinstance(expr, tirx.Min) and self.is_masked(-number):
            return value
        return None

    def choice(self, condition: Any, yes: Case, no: Case) -> Case:
        """`yes` or `no`: one of them where the condition is decided or they are equal, a Select where neither has a constant."""
        if isinstance(condition, bool):
            return yes if condition else no
        yes, no = assume(yes, condition, True), assume(no, condition, False)
        if _equal(yes, no):
            return yes
        if isinstance(yes, Choice | float) or isinstance(no, Choice | float):
            result = Choice(condition, yes, no)
            if sum(1 for _ in leaves(result)) > MAX_CASES:
                raise TooComplexError
            return result
        return tirx.Select(condition, yes, no)

    def is_masked(self, number: float) -> bool:
        return number <= self._limit

    # ---- conditions

    def condition(self, expr: Any) -> Any:
        """The condition, decided as far as positions decide it: a bool, or an expression of comparisons with and, or, not."""
        number = static_int(expr)
        if number is not None:
            return bool(number)
        if isinstance(expr, tirx.Not):
            return negation(self.condition(expr.a))
        if isinstance(expr, tirx.And):
            return both(self.condition(expr.a), self.condition(expr.b))
        if isinstance(expr, tirx.Or):
            return either(self.condition(expr.a), self.condition(expr.b))
        if isinstance(expr, tirx.Select):
            return select(self.condition(expr.condition), *map(self.condition, (expr.true_value, expr.false_value)))
        if isinstance(expr, tirx.Cast):
            return _spread(_is_not_0, [self.of(expr.value)], select)
        if isinstance(expr, ir.Var):
            known = self._known(expr)
            return expr if known is None else known != 0.0
        if type(expr) in COMPARISONS:
            return self._comparison(expr)
        return expr

    def _comparison(self, expr: Any) -> Any:
        if _is_positional(expr, self._evaluator):
            return self._decided(expr)
        return _spread(lambda a, b: self._compared(expr, a, b), [self.of(expr.a), self.of(expr.b)], select)

    def _compared(self, expr: Any, a: Any, b: Any) -> Any:
        compare = type(expr)
        if isinstance(a, float) and isinstance(b, float):
            return COMPARISONS[compare](a, b)
        number = a if isinstance(a, float) else b if isinstance(b, float) else None
        if number is not None and math.isinf(number) and compare in (tirx.EQ, tirx.NE):
            return compare is tirx.NE  # a score is finite
        dtype = str(expr.a.ty)
        a, b = (literal(x, dtype) if isinstance(x, float) else x for x in (a, b))
        for side, wrap in ((a, lambda x: compare(x, b)), (b, lambda x: compare(a, x))):
            if isinstance(side, tirx.Select) and _is_positional(side.condition, self._evaluator):  # |i - j| <= w
                parts = [self._compared(expr, *_operands(wrap(part))) for part in (side.true_value, side.false_value)]
                return select(self.condition(side.condition), *parts)
        return self._decided(compare(a, b))

    def _decided(self, expr: Any) -> Any:
        number = static_int(self._evaluator.simplify(expr))
        return expr if number is None else bool(number)

    # ---- masks

    def visible(self, expr: Any) -> Any:
        """The condition under which an expression is not masked: a bool or an expression."""
        return self._visible(self.of(expr))

    def _visible(self, case: Case, sign: float = 1.0) -> Any:
        if isinstance(case, Choice):
            return select(case.condition, self._visible(case.yes, sign), self._visible(case.no, sign))
        return not (isinstance(case, float) and self.is_masked(sign * case))

    def masked_numbers(self, expr: Any) -> list[float]:
        """The numbers that masked parts get."""
        return sorted({x for x in leaves(self.of(expr)) if isinstance(x, float) and self.is_masked(x)})

    def kept(self, expr: Any, sign: float = 1.0) -> Any:
        """An expression that has the same value where it is not masked, without the masks. sign : -1 for what is subtracted."""
        case = self.of(expr)
        if not any(isinstance(x, float) and self.is_masked(sign * x) for x in leaves(case)):
            return expr if _reads_nothing_known(expr, self._known) else as_expression(case, str(expr.ty))
        result = self._kept_operands(expr, sign)
        return as_expression(self._without_masked(case, sign), str(expr.ty)) if result is None else result

    def _kept_operands(self, expr: Any, sign: float) -> Any | None:
        """The same by way of the operands, which keeps the form of the expression; None where it takes the cases."""
        if isinstance(expr, tirx.Select):
            for branch, other in ((expr.true_value, expr.false_value), (expr.false_value, expr.true_value)):
                if self._visible(self.of(branch), sign) is False:
                    return self.kept(other, sign)
        if isinstance(expr, tirx.Cast) and str(expr.value.ty) != "bool":
            return tirx.Cast(str(expr.ty), self.kept(expr.value, sign))
        if isinstance(expr, tirx.Add | tirx.Sub):
            is_sub = isinstance(expr, tirx.Sub)
            a, b = self.kept(expr.a, sign), self.kept(expr.b, -sign if is_sub else sign)
            if constant_value(b) == 0.0:
                return a
            return b if constant_value(a) == 0.0 and not is_sub else type(expr)(a, b)
        if isinstance(expr, tirx.Max) and sign > 0.0:
            for operand, bound in ((expr.a, expr.b), (expr.b, expr.a)):
                number = self.of(bound)
                if isinstance(number, float) and self.is_masked(number):
                    return self.kept(operand)
        return None

    def _without_masked(self, case: Case, sign: float) -> Case:
        if not isinstance(case, Choice):
            return case
        for branch, other in ((case.yes, case.no), (case.no, case.yes)):
            if self._visible(branch, sign) is False:
                return self._without_masked(other, sign)
        yes, no = self._without_masked(case.yes, sign), self._without_masked(case.no, sign)
        return yes if _equal(yes, no) else Choice(case.condition, yes, no)


def _spread(leaf: Callable[..., Any], cases: list[Case], join: Callable[[Any, Any, Any], Any]) -> Any:
    """`leaf` of every combination of leaves, joined under their conditions."""
    for position, case in enumerate(cases):
        if isinstance(case, Choice):
            branches = []
            for holds, value in ((True, case.yes), (False, case.no)):
                known = [assume(other, case.condition, holds) for other in cases]
                known[position] = value
                branches.append(_spread(leaf, known, join))
            return join(case.condition, *branches)
    return leaf(*cases)


def _is_not_0(x: Any) -> Any:
    return x != 0.0 if isinstance(x, float) else tirx.NE(x, literal(0, str(x.ty)))


def _operands(comparison: Any) -> tuple[Any, Any]:
    def number(x: Any) -> Any:
        value = constant_value(x)
        return x if value is None else value

    return number(comparison.a), number(comparison.b)


def _of_numbers(expr: Any, a: float, b: float) -> float | None:
    if isinstance(expr, tirx.Add):
        return a + b
    if isinstance(expr, tirx.Sub):
        return a - b
    if isinstance(expr, tirx.Mul):
        return a * b
    if isinstance(expr, tirx.Max):
        return max(a, b)
    if isinstance(expr, tirx.Min):
        return min(a, b)
    if b == 0.0:
        return None
    if isinstance(expr, tirx.Div):
        return a / b
    return float(a // b) if isinstance(expr, tirx.FloorDiv) else float(a % b)


def leaves(case: Case) -> Any:
    """The numbers and expressions at the ends of a tree."""
    if isinstance(case, Choice):
        yield from leaves(case.yes)
        yield from leaves(case.no)
    else:
        yield case


def as_expression(case: Case, dtype: str) -> Any:
    """A tree as one expression of selections."""
    if isinstance(case, Choice):
        return tirx.Select(case.condition, as_expression(case.yes, dtype), as_expression(case.no, dtype))
    return literal(case, dtype) if isinstance(case, float) else case


def assume(case: Case, condition: Any, holds: bool) -> Case:
    """A tree where a condition is known to hold, or not to."""
    if not isinstance(case, Choice):
        return case
    if tvm_ffi.structural_equal(case.condition, condition):
        return assume(case.yes if holds else case.no, condition, holds)
    yes, no = assume(case.yes, condition, holds), assume(case.no, condition, holds)
    if yes is case.yes and no is case.no:
        return case
    return yes if _equal(yes, no) else Choice(case.condition, yes, no)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, float) and isinstance(b, float) and a == b
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Choice) or isinstance(b, Choice):
        return (
            isinstance(a, Choice)
            and isinstance(b, Choice)
            and _equal(a.condition, b.condition)
            and _equal(a.yes, b.yes)
            and _equal(a.no, b.no)
        )
    return bool(tvm_ffi.structural_equal(a, b))


def _is_positional(expr: Any, evaluator: Evaluator) -> bool:
    """Whether an expression is integer arithmetic on positions and heads: no data, no selections."""
    nodes = children(expr)
    if isinstance(expr, tirx.Select) or not all(str(child.ty).startswith("int") for child in nodes):
        return False
    return all(_is_positional_number(child, evaluator) for child in nodes)


def _is_positional_number(expr: Any, evaluator: Evaluator) -> bool:
    if isinstance(expr, tirx.Select) or not str(expr.ty).startswith("int"):
        return False
    if isinstance(expr, ir.Var):
        return expr not in evaluator.atoms
    return all(_is_positional_number(child, evaluator) for child in children(expr))


def _reads_nothing_known(expr: Any, known: Callable[[Any], float | None]) -> bool:
    return all(known(var) is None for var in free_vars(expr))

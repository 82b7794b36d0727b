"""The attention variant behind a softmax input that is not plain: factor, logits, mask and sink, each proven or refused.

`extract` splits the input into the condition under which a key is not masked (cases.py) and its value there (terms.py), and writes both
as expressions of an attention variant (variant_writer.py). Three things are proven first, with the regions of prove.py: a key after its
query is masked, a query's own key is not, and the value holds nothing but the score, positions, weights and constants.

A softmax does not change where one number is added to all keys of a row, so terms without the key drop out, and a multiple of the key's
position is written as one of the distance. With a sink, which such a number would shift too, only what both have in common drops out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx

from tvm_infer.errors import VariantError
from tvm_infer.variant import functions
from tvm_infer.variant.code import of_tir
from tvm_infer.variant.expression import Expr
from tvm_infer.variant.layer import LayerVariant
from tvm_infer.variant.lower import Settings
from tvm_infer.variant.parameters import MAX_SCALARS, MAX_TABLES
from tvm_infer.variant.variant import Variant

from .cases import Cases, masked_limit
from .conditions import both, conjuncts, either, negation
from .nodes import same
from .printer import format_expr
from .prove import MaskProof, OpaqueError, Refusal, Region, Resolver, UndecidedError, assumed_masks, assumed_number
from .scalars import free_vars, literal, walk
from .symbolic import Evaluator
from .terms import Term, absolute_argument, depends_on, factors, linear, score_factors, tanh_argument, terms
from .variant_tables import KEEP_VARIANT
from .variant_writer import VariantWriter

_NAME = "extracted"
_SAME_FACTOR = 1e-6


@dataclass(frozen=True)
class Input:
    """A softmax input at (h, i, j), and what else enters the softmax.

    score : the atom of q . k in `value`. heads : query heads. dtype : of the softmax. sink : the entry without a key, None without.
    inputs : the function's parameters that change with every call; assume_full : names of masks that hide nothing.
    """

    value: Any
    score: Any
    h: Any
    i: Any
    j: Any
    heads: int
    dtype: str
    sink: Any
    inputs: Sequence[Any]
    assume_full: Set[str]


def extract(evaluator: Evaluator, given: Input) -> MaskProof:
    """The proven meaning of a softmax input, with the variant that it is; raises Refusal."""
    extraction = _Extraction(evaluator, given)
    try:
        return extraction.run()
    except VariantError as error:  # its place is a line of ours
        why = str(error).partition(".py:")[2].partition(": ")[2] or str(error)
        raise Refusal(extraction.seen, f"it is no attention variant: {why}", KEEP_VARIANT) from error


class _Extraction:
    def __init__(self, evaluator: Evaluator, given: Input) -> None:
        self._evaluator = evaluator
        self._given = given
        self._assumed: set[str] = set()
        self._cases = Cases(evaluator, masked_limit(given.dtype), self._known)
        self.seen = f"softmax input[h, i, j] = {format_expr(given.value, evaluator)}"
        if given.sink is not None:
            self.seen += f", with the sink {format_expr(given.sink, evaluator)}"

    def _known(self, var: Any) -> float | None:
        atom = self._evaluator.atoms.get(var)
        number = None if atom is None else assumed_number(atom, var, self._given.assume_full)
        if number is not None and atom is not None:
            self._assumed.add(atom.name)
        return number

    def run(self) -> MaskProof:
        """See :func:`extract`."""
        given, cases = self._given, self._cases
        visible = cases.visible(given.value)
        self._prove_causal(visible)
        mask = self._settled_condition(visible)
        value = self._settled(cases.kept(given.value))
        self._check_numbers(value)
        logits, sink = self._shifted(value)
        scale = self._scale(logits)
        writer = VariantWriter(
            self._evaluator, given.h, given.i, given.j, given.heads, given.score, scale, given.inputs, self.seen
        )
        holes: dict[str, Any] = {}
        if not _is_score_alone(logits, given.score):
            holes["logits"] = self._write_logits(writer, logits, scale)
        q_pos, kv_pos = writer.name("q_pos"), writer.name("kv_pos")
        rest = [writer.condition(part) for part in conjuncts(mask)]
        holes["mask"] = _all([kv_pos <= q_pos, *rest])
        if sink is not None:
            holes["output"] = self._write_sink(writer, sink)
        assumptions = [*assumed_masks(self._assumed), *self._masked_assumptions(), *writer.tables.assumptions]
        variant = None
        if len(holes) > 1 or rest:
            variant = self._variant(writer, holes)
        return MaskProof(scale, causal=True, assumptions=tuple(assumptions), variant=variant)

    # ---- mask

    def _prove_causal(self, visible: Any) -> None:
        """Keys after their query are masked, and every query sees its own: the softmax of a row is one of numbers."""
        if visible is False:
            raise Refusal(self.seen, "every key is masked", "check the mask: no query sees any key")
        if not isinstance(visible, bool) and self._reads_score(visible):
            shown = format_expr(visible, self._evaluator)
            raise Refusal(self.seen, f"the mask `{shown}` depends on the scores, which masks do not see", KEEP_VARIANT)
        for region, wanted, why in (
            ("hidden", False, "a query may see keys after its own, which are not there when tokens come one by one"),
            ("own", True, "it is not proven that a query sees its own key, so a row might see none"),
        ):
            culprit, holds = self._decide(visible, region)
            if holds is not wanted:
                shown = str(culprit) if isinstance(culprit, bool) else format_expr(culprit, self._evaluator)
                raise Refusal(
                    self.seen,
                    f"the mask is neither causal nor full: `{shown}` decides which keys are seen, and {why}",
                    KEEP_VARIANT,
                )

    def _truth(self, condition: Any, region: str) -> bool | None:
        """Whether a condition holds all over a region, nowhere, or neither is proven."""
        return self._decide(condition, region)[1]

    def _decide(self, condition: Any, region: str) -> tuple[Any, bool | None]:
        """(what decides, whether it holds) all over a region; None where neither is proven."""
        if isinstance(condition, bool):
            return condition, condition
        place = Region(self._evaluator, region, self._given.i, self._given.j)
        resolver = Resolver(self._evaluator, place, lambda var: same(var, self._given.score), self._given.assume_full)
        try:
            return condition, resolver.condition(condition)
        except UndecidedError as error:
            return error.condition, None
        except OpaqueError as error:
            return error.term, None

    def _masked_assumptions(self) -> list[str]:
        finite = [x for x in self._cases.masked_numbers(self._given.value) if not math.isinf(x)]
        return [f"masked scores get {finite[-1]:g}, taken as -inf"] if finite else []

    # ---- what is true of the keys that a causal query sees

    def _settled_condition(self, condition: Any) -> Any:
        """A condition where j <= i, decided as far as that decides it."""
        if isinstance(condition, bool):
            return condition
        if isinstance(condition, tirx.Not):
            return negation(self._settled_condition(condition.a))
        if isinstance(condition, tirx.And):
            return both(self._settled_condition(condition.a), self._settled_condition(condition.b))
        if isinstance(condition, tirx.Or):
            return either(self._settled_condition(condition.a), self._settled_condition(condition.b))
        decided = self._truth(condition, "visible")
        return condition if decided is None else decided

    def _settled(self, expr: Any) -> Any:
        """An expression with the branches gone that no visible key takes."""

        def settle(node: Any) -> Any:
            inner = absolute_argument(node)
            if inner is not None:
                number = inner.value if isinstance(inner, tirx.Cast) else inner
                if str(number.ty).startswith("int"):
                    zero = literal(0, str(number.ty))
                    if self._settled_condition(tirx.GE(number, zero)) is True:
                        return inner
                    if self._settled_condition(tirx.LE(number, zero)) is True:
                        return tirx.Mul(inner, literal(-1, str(inner.ty)))
            if not isinstance(node, tirx.Select):
                return node
            condition = self._settled_condition(self._cases.condition(node.condition))
            if isinstance(condition, bool):
                return node.true_value if condition else node.false_value
            return node

        return tvm_ffi.structural_map(expr, settle)

    # ---- logits

    def _check_numbers(self, value: Any) -> None:
        """A number as large as a mask that is left beside the scores would take their digits away, in float32 as ours are."""
        limit = abs(masked_limit(self._given.dtype))

        def visit(node: Any) -> None:
            if isinstance(node, tirx.FloatImm) and not abs(float(node.value)) < limit:
                why = f"the number {float(node.value):g} stays in the scores of keys that are seen"
                raise Refusal(self.seen, why, "mask with torch.where or masked_fill, or add 0 and -inf")

        walk(value, visit)

    def _shifted(self, expr: Any) -> tuple[list[Term], list[Term] | None]:
        """The terms of the logits, and of the sink if there is one, without what all entries of a row have in common."""
        logits = terms(expr)
        if self._given.sink is None:
            return [part for part in logits if self._differs_by_key(part[1])], None
        sink = terms(self._cases.kept(self._given.sink))
        common = [part for part in logits if part[1] is None or not self._differs_by_key(part[1])]
        common = [part for part in common if any(_equal(part, other) for other in sink)]
        return (
            [part for part in logits if not any(_equal(part, other) for other in common)],
            [part for part in sink if not any(_equal(part, other) for other in common)],
        )

    def _differs_by_key(self, part: Any) -> bool:
        return part is not None and depends_on(part, lambda var: self._is_of_key(var) or same(var, self._given.score))

    def _is_of_key(self, var: Any) -> bool:
        atom = self._evaluator.atoms.get(var)
        if atom is None:
            return same(var, self._given.j)
        parts = [part for part in atom.index if part is not None]
        return any(depends_on(part, self._is_of_key) for part in parts)

    def _scale(self, logits: Sequence[Term]) -> float:
        """The factor that goes into the product: of the score itself, or what it comes to inside of a soft cap."""
        score = self._given.score
        found = [factor for factor, part in logits if part is not None and same(part, score)]
        if not found:  # times what differs from head to head, say
            for factor, part in logits:
                constant, parts = (1.0, []) if part is None else factors(part)
                found += [factor * constant] if sum(same(x, score) for x in parts) == 1 else []
        if not found:
            for factor, part in logits:
                inner = None if part is None else tanh_argument(part)
                found += [abs(factor) * x for x in score_factors(inner, score)] if inner is not None else []
        if not found:
            found = [x for _, part in logits if part is not None for x in score_factors(part, score)]
        if not found:
            raise Refusal(self.seen, "the scores drop out of it", "check the model: attention without scores")
        return abs(found[0])

    def _write_logits(self, writer: VariantWriter, logits: Sequence[Term], scale: float) -> Any:
        """The sum of the terms, those with the score first."""
        pieces: list[Expr] = []
        for term in sorted(logits, key=lambda part: not self._reads_score(part[1])):
            reads_score = self._reads_score(term[1])
            piece = self._write_soft_cap(writer, term, scale) if reads_score else self._write_distance(writer, term)
            pieces.append(writer.term(*term) if piece is None else piece)
        return writer.sum(pieces)

    def _reads_score(self, part: Any) -> bool:
        return part is not None and depends_on(part, lambda var: same(var, self._given.score))

    def _write_soft_cap(self, writer: VariantWriter, term: Term, scale: float) -> Expr | None:
        """cap * tanh(value / cap), None for other terms."""
        factor, part = term
        inner = tanh_argument(part)
        parts = [] if inner is None else terms(inner)
        if len(parts) != 1 or parts[0][1] is None or not same(parts[0][1], self._given.score) or factor <= 0.0:
            return None
        if abs(parts[0][0] * factor / scale - 1.0) > _SAME_FACTOR:
            return None
        cap = writer.number(
            "cap", float(f"{factor:.6g}") if abs(float(f"{factor:.6g}") / factor - 1.0) < 2e-7 else factor
        )
        return cap * functions.tanh(writer.name("value") / cap)

    def _write_distance(self, writer: VariantWriter, term: Term) -> Expr | None:
        """slope * (kv_pos - q_pos) for slope * (c * j + anything without the key); None for other terms, and beside a sink."""
        factor, part = term
        if self._given.sink is not None or part is None:
            return None
        constant, parts = factors(part)
        by_key = [x for x in parts if self._differs_by_key(x)]
        slope = linear(by_key[0], self._given.j) if len(by_key) == 1 else None
        if slope is None:
            return None
        q_pos, kv_pos = writer.name("q_pos"), writer.name("kv_pos")
        total = factor * constant * slope
        distance: Any = kv_pos - q_pos
        if total < 0.0:
            total, distance = -total, q_pos - kv_pos
        writer.tables.role = "slopes"
        result: Any = None
        for x in parts:
            if x is not by_key[0]:
                result = writer.floating(x) if result is None else result * writer.floating(x)
        writer.tables.role = "bias"
        if result is None:
            return total * distance if total != 1.0 else functions.cast(distance, "float32")
        return writer.times(total, result * distance)

    def _write_sink(self, writer: VariantWriter, sink: Sequence[Term]) -> Any:
        """What is left of the output where an entry without a value takes part in the softmax."""
        for _, part in sink:
            for var in [] if part is None else free_vars(part):
                if same(var, self._given.i) or same(var, self._given.j) or same(var, self._given.score):
                    raise writer.refuse(
                        part, "makes the sink differ from token to token; only sinks of a head are extracted"
                    )
        writer.tables.role = "sink"
        entry = writer.sum([writer.term(factor, part) for factor, part in sink])
        writer.tables.role = "bias"
        return writer.name("value") * functions.sigmoid(writer.name("lse") - entry)

    def _variant(self, writer: VariantWriter, holes: dict[str, Any]) -> LayerVariant:
        num_scalars = sum(p.is_scalar for p in writer.tables.parameters.values())
        num_tables = len(writer.tables.parameters) - num_scalars
        if num_scalars > MAX_SCALARS or num_tables > MAX_TABLES:
            why = f"it reads {num_tables} weights and constants; an attention variant has at most {MAX_TABLES} tables"
            raise Refusal(self.seen, why, KEEP_VARIANT)
        codes = {hole: of_tir(expr.tir) for hole, expr in holes.items()}
        used = set().union(*(code.names for code in codes.values()))
        parameters = {name: p for name, p in writer.tables.parameters.items() if name in used}
        variant = Variant._of(_NAME, codes, parameters, Settings())
        return LayerVariant(variant, tuple((name, writer.tables.values[name]) for name in parameters))


def _is_score_alone(logits: Sequence[Term], score: Any) -> bool:
    return len(logits) == 1 and logits[0][1] is not None and same(logits[0][1], score) and logits[0][0] > 0.0


def _equal(a: Term, b: Term) -> bool:
    if a[0] != b[0] or (a[1] is None) != (b[1] is None):
        return False
    return a[1] is None or bool(tvm_ffi.structural_equal(a[1], b[1]))


def _all(conditions: Sequence[Expr]) -> Expr:
    result = conditions[0]
    for condition in conditions[1:]:
        result = result & condition
    return result

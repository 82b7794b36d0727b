"""Rotary embedding before the first matmul: whether what enters it is `x * cos(p f) + turned(x) * sin(p f)`, p the token's position.

`lift` looks at one element of q (and k) as an expression of an earlier tensor x, for all elements of a head at once: every
operator is followed with arrays over the head (rotation_terms.py). The result is a rotation where each element is provably one of x
that passes, or the cosine and sine of the position times one and the same constant of its pair. Frequencies are read out of the
program's constants, so that whatever scaled them (llama3, yarn, …) is in them already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .movement import VIEW_RULES
from .nodes import dtype_of, known_shape, op_name, same, static_int, used_vars
from .rotation_terms import NotARotationError, Reader, Term
from .symbolic import Evaluator, TooComplexError, View

__all__ = ["Lifted", "NotARotationError", "Rotation", "lift"]

# what may stand between a projection and the matmul; cosines and sines end the search
_BETWEEN = {
    *VIEW_RULES,
    *(f"relax.{name}" for name in "add subtract multiply divide negative concat astype split".split()),
}
_EXACT = 1e-6  # relative, of factors that a float32 program computes in two ways


@dataclass(frozen=True)
class Rotation:
    """How the pairs of a head turn, as `tvm_infer.rope_append` takes it.

    inv_freq : radians a token of each pair, float32 values; the first 2 * len(inv_freq) elements turn. interleaved : pairs are (2i,
    2i + 1), otherwise (i, i + rotary_dim / 2). magnitude : factor on cosine and sine.
    """

    inv_freq: tuple[float, ...]
    interleaved: bool
    magnitude: float

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that turn."""
        return 2 * len(self.inv_freq)

    def __str__(self) -> str:
        pairs = "interleaved pairs" if self.interleaved else "half-split pairs"
        factor = f", times {self.magnitude:g}" if self.magnitude != 1.0 else ""
        rates = f"{self.inv_freq[0]:.4g} to {self.inv_freq[-1]:.4g} radians a token"
        return f"{pairs} of the first {self.rotary_dim} elements, {rates}{factor}"


@dataclass(frozen=True)
class Turned:
    """An operand before its rotation: `view` is its element (head, token, depth)."""

    view: View
    rotation: Rotation


@dataclass(frozen=True)
class Lifted:
    """q and k before their rotation. q, k : as the matcher takes operands; factor : on their product, beside the rotation's.
    reads_positions : whether position_ids is taken to count the tokens of a sequence."""

    q: Any
    k: Any
    factor: float
    rotation: Rotation
    reads_positions: bool


def lift(
    ev: Evaluator,
    views: tuple[View, View],
    tokens: tuple[Any, Any],
    depth: Any,
    head_dim: int,
    multiple: int,
    as_operand: Callable[[View, Any, str], Any],
) -> Lifted | None:
    """The rotation that both operands of the first matmul went through; None where no cosine or sine takes part.

    views : the elements of q and of k, in their token of `tokens` (index variables; a token's position is its place in the row, as the
    program is written) and `depth`, from 0 to head_dim - 1. multiple : of which head_dim and the elements that turn must be multiples.
    as_operand(view, token, "q" or "k") : the operand that a view is an element of, None for none that a call takes.

    Raises NotARotationError : cosines or sines take part in another way, or in q and k not alike; says how.
    """
    ev.read_positions = False
    turned: list[Turned | None] = []
    operands: list[Any] = []
    for name, view, token in zip("qk", views, tokens, strict=True):
        try:
            found, operand = _turned(ev, view, token, name, depth, head_dim, as_operand)
        except NotARotationError as error:
            raise NotARotationError(f"of {name}: {error}") from None
        turned.append(found)
        operands.append(operand)
    q, k = turned
    if q is None and k is None:
        return None
    if q is None or k is None:
        raise NotARotationError("q alone is turned" if k is None else "k alone is turned")
    a, b = q.rotation, k.rotation
    if a.interleaved != b.interleaved or a.inv_freq != b.inv_freq:
        raise NotARotationError(f"q and k are turned differently: q has {a}, k has {b}")
    extra = a.magnitude / b.magnitude
    if abs(extra - 1.0) > _EXACT and b.rotary_dim != head_dim:
        raise NotARotationError(f"factors on what turns differ, {a.magnitude:g} of q and {b.magnitude:g} of k")
    if head_dim % multiple or b.rotary_dim % multiple:
        raise NotARotationError(
            f"{b.rotary_dim} of {head_dim} elements turn, and kernels of the target take multiples of {multiple}"
        )
    return Lifted(operands[0], operands[1], q.view.factor * k.view.factor * extra, b, ev.read_positions)


def _turned(
    ev: Evaluator,
    view: View,
    token: Any,
    name: str,
    depth: Any,
    head_dim: int,
    as_operand: Callable[[View, Any, str], Any],
) -> tuple[Turned | None, Any]:
    """What an operand of the first matmul was before it was turned, and that as an operand; (None, None) where nothing turns it."""
    candidates, turns = _candidates(ev, view.tensor, head_dim)
    if not turns:
        return None, None
    problem = NotARotationError("no tensor before it has heads of its own", rank=-1)
    for tensor in candidates:
        reader = Reader(ev, tensor, token, depth, head_dim)
        ev.stops = {tensor}
        try:
            rotation = _rotation(reader.terms(ev.element(view.tensor, view.index)), head_dim)
        except NotARotationError as error:
            problem = max(problem, error, key=lambda x: x.rank)  # the first of the most telling ones
            continue
        except TooComplexError:
            continue
        finally:
            ev.stops = set()
        before = View(tensor, reader.place(), view.factor)
        operand = as_operand(before, token, name)
        if operand is not None:
            return Turned(before, rotation), operand
    raise problem


def _candidates(ev: Evaluator, tensor: Any, head_dim: int) -> tuple[list[Any], bool]:
    """Tensors that `tensor` may be a rotation of, those that come first in the program first, and whether a cosine, a sine or
    position_ids was met."""
    found: list[Any] = []
    seen: set[Any] = set()
    turns = False

    def visit(var: Any) -> None:
        nonlocal turns
        var = ev.root(var)
        if var in seen:
            return
        seen.add(var)
        value = ev.definition(var)
        name = op_name(value)
        if name in ("relax.cos", "relax.sin") or same(var, ev.positions):
            turns = True
            return
        if name in _BETWEEN or not name:  # no name: a tuple, or an item of one
            for source in used_vars(value) if value is not var else ():
                visit(source)
        shape = known_shape(var)
        if shape is not None and dtype_of(var) == dtype_of(tensor) and any(static_int(x) == head_dim for x in shape):
            found.append(var)

    visit(tensor)
    return [var for var in found if not same(var, tensor)], turns


def _rotation(terms: list[Term], head_dim: int) -> Rotation:
    """The rotation that a sum of terms over a head is."""
    parts = {trig: _merged([t for t in terms if t.trig == trig], head_dim) for trig in (None, "cos", "sin")}
    plain, cos, sin = parts[None], parts["cos"], parts["sin"]
    element = np.arange(head_dim)
    turning = (cos.factor != 0.0) | (sin.factor != 0.0)
    rotary_dim = int(turning.sum())
    _require(rotary_dim > 0, "nothing of it turns")
    passes = element >= rotary_dim
    which = ", ".join(map(str, element[turning][[0, -1]]))
    _require(not turning[passes].any(), f"elements {which} of a head turn, and others between or before them do not")
    _require(rotary_dim % 2 == 0, f"{rotary_dim} elements of a head turn, an odd number")
    kept = (plain.factor == 1.0) & (plain.source == element)
    _require(bool(kept[passes].all()) and not plain.factor[~passes].any(), "elements that do not turn are changed")
    cos, sin, element = cos.first(rotary_dim), sin.first(rotary_dim), element[:rotary_dim]
    magnitude = float(cos.factor[0])
    equal = np.isclose(cos.factor, magnitude, _EXACT, 0.0) & np.isclose(abs(sin.factor), magnitude, _EXACT, 0.0)
    _require(bool(equal.all()) and magnitude > 0.0, "cosines and sines have different factors")
    _require(np.array_equal(cos.source, element), "a cosine is of another element than its own")
    half = rotary_dim // 2
    partners = {False: (element + half) % rotary_dim, True: element ^ 1}
    interleaved = next((k for k, partner in partners.items() if np.array_equal(sin.source, partner)), None)
    _require(interleaved is not None, "its pairs are neither (i, i + rotary_dim / 2) nor (2i, 2i + 1)")
    assert interleaved is not None
    first = element % 2 == 0 if interleaved else element < half
    _require(_close(cos.freq, sin.freq), "a pair's cosine and sine are of different angles")
    _require(_close(cos.freq[first], cos.freq[~first]), "the two elements of a pair turn by different angles")
    direction = np.sign(sin.factor) * np.where(first, -1.0, 1.0)  # the first of a pair gets minus the sine
    _require(bool((direction == direction[0]).all()), "its pairs do not turn: signs differ")
    inv_freq = (direction[0] * cos.freq[first]).astype(np.float32)
    _require(bool(np.isfinite(inv_freq).all()), "a frequency is not finite")
    return Rotation(tuple(map(float, inv_freq)), interleaved, magnitude)


@dataclass(frozen=True)
class _Part:
    """Of each element of a head: factor, element of x, radians a token; a factor of 0 where there is none."""

    factor: np.ndarray
    source: np.ndarray
    freq: np.ndarray

    def first(self, count: int) -> _Part:
        return _Part(self.factor[:count], self.source[:count], self.freq[:count])


def _merged(terms: list[Term], head_dim: int) -> _Part:
    """Terms of one kind as one, which no two of them share an element of."""
    factor, freq = np.zeros(head_dim), np.zeros(head_dim)
    source = np.full(head_dim, -1)
    for term in terms:
        active = term.factor != 0.0
        if term.source is None or term.of_position:
            raise NotARotationError("something else than x is added to it", rank=1)
        both = active & (factor != 0.0)
        _require(
            bool((source[both] == term.source[both]).all() and (freq[both] == term.freq[both]).all()),
            "an element is mixed of more than a pair",
        )
        factor = factor + term.factor
        source, freq = np.where(active, term.source, source), np.where(active, term.freq, freq)
    return _Part(factor, source, freq)


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the last bits of float64: at position 2^24 an angle is still exact to 2e-5."""
    return bool(np.allclose(a, b, rtol=1e-12, atol=0.0))


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise NotARotationError(why, rank=1)

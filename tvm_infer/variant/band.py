"""The part of a mask that is a band (schedule.Band): the planner skips the keys outside it, and of windows kernels need not test it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..band import Band
from ..errors import VariantError
from .bounds import Bounds, Recogniser, constant_of
from .code import Code, conjunction, of_tir, to_tir
from .conditions import conjuncts, disjuncts, is_true
from .numpy_eval import evaluate
from .parameters import Parameter

__all__ = ["Band", "Split", "evaluate_band", "split"]

_ALL = 2**30  # keys: wider than any request is long, and with a position still within 32 bits


class Split(NamedTuple):
    """A mask in two. Widths, sizes and counts are integers of constants and scalars.

    causal, lefts, rights, chunks : the band; the smallest counts. rights_tested : rights that kernels test, since they may be negative,
    where the band is causal. sinks, lefts_beside, chunks_beside : where there are neither lefts nor chunks, that a key is among the
    first, the largest number counts, or inside these. residual : what a kernel has to test besides, None where that is nothing.
    """

    causal: bool = False
    lefts: tuple[Code, ...] = ()
    rights: tuple[Code, ...] = ()
    rights_tested: tuple[Code, ...] = ()
    chunks: tuple[Code, ...] = ()
    sinks: tuple[Code, ...] = ()
    lefts_beside: tuple[Code, ...] = ()
    chunks_beside: tuple[Code, ...] = ()
    residual: Code | None = None


def split(mask: Code | None, parameters: Mapping[str, Parameter]) -> Split:
    """Takes the conjuncts of `mask` apart. One that bounds the distance of the positions, however it is written, goes to the band.

    Some go there and stay for kernels: that both are in one chunk; that a key is within such a bound or among the first; what is
    stricter than causal (kv_pos < q_pos).
    """
    if mask is None:
        return Split()
    leaves: dict[str, Any] = {}
    tir = to_tir(mask, parameters, leaves)
    if not {"q_pos", "kv_pos"} <= leaves.keys():
        return Split(residual=None if is_true(tir) else mask)
    recogniser = Recogniser(parameters, leaves)
    parts = conjuncts(tir)
    found = [recogniser.of_condition(part) for part in parts]
    branches = [[recogniser.of_all(x) for x in disjuncts(part)] for part in parts]
    causal = any(all(any(_is_causal(bounds) for bounds in branch) for branch in either) for either in branches)

    in_band = [bounds.is_exact and not _is_test(bounds, causal) for bounds in found]
    rest = [of_tir(part) for part, is_band in zip(parts, in_band, strict=True) if not is_band and not is_true(part)]
    banded = [bounds for bounds, is_band in zip(found, in_band, strict=True) if is_band]
    own = Split(causal, _codes(bounds.left for bounds in banded), chunks=_chunks(found, causal))
    if not causal:
        tested = (bounds.right for bounds in found if bounds.hides_own)
        own = own._replace(rights=_codes(bounds.right for bounds in banded), rights_tested=_codes(tested))
    if not own.lefts and not own.chunks:
        beside = next((x for x in (_beside_sinks(either, causal) for either in branches) if x.sinks), Split())
        own = own._replace(sinks=beside.sinks, lefts_beside=beside.lefts_beside, chunks_beside=beside.chunks_beside)
    if own == Split():
        return Split(residual=mask)
    return own._replace(residual=conjunction(rest) if rest else None)


def _is_causal(bounds: Bounds) -> bool:
    width = None if bounds.right is None else constant_of(bounds.right)
    return width is not None and width <= 0


def _is_test(bounds: Bounds, causal: bool) -> bool:
    """Whether a bound is stricter than the band can say, or may be: kernels test it."""
    return bounds.hides_own or (causal and bounds.right is not None and constant_of(bounds.right) is None)


def _codes(codes: Any) -> tuple[Code, ...]:
    return tuple(dict.fromkeys(code for code in codes if code is not None))


def _chunks(found: list[Bounds], causal: bool) -> tuple[Code, ...]:
    """Sizes of chunks that both positions are in, as the conditions together say."""
    ends = {bounds.chunk for bounds in found if bounds.ends_in_chunk}
    return _codes(x.chunk for x in found if x.starts_in_chunk and (causal or x.chunk in ends))


def _beside_sinks(either: list[list[Bounds]], causal: bool) -> Split:
    """Of a disjunction: being among the first keys, or inside a window or a chunk. No sinks where it says anything else."""
    sinks, others = list[Code](), list[list[Bounds]]()
    for branch in either:
        first = [bounds.first for bounds in branch if bounds.first is not None]
        if first:
            sinks.append(first[0])
        else:
            others.append(branch)
    if not sinks or len(others) != 1:
        return Split()
    lefts, chunks = _codes(bounds.left for bounds in others[0]), _chunks(others[0], causal)
    return Split(sinks=tuple(sinks), lefts_beside=lefts, chunks_beside=chunks) if lefts or chunks else Split()


def evaluate_band(parts: Split, scalars: Mapping[str, int | float], variant: str) -> Band:
    """The band for these scalars. Raises VariantError for a window of negative width."""

    def values(codes: tuple[Code, ...]) -> list[int]:
        return [min(int(evaluate(code, scalars)), _ALL) for code in codes]

    for codes, where, hint in (
        (parts.lefts, "after", ""),
        (parts.rights, "before", "; a mask that hides a query's own key says kv_pos <= q_pos besides"),
    ):
        for code, width in zip(codes, values(codes), strict=True):
            if width < 0:
                given = ", ".join(f"{name}={scalars[name]}" for name in sorted(code.names))
                raise VariantError(
                    f"variant {variant}: with {given} a query sees keys at least {-width} {where} its own position only; the window's "
                    f"width comes out as {width} and must be 0 (the query's own key) or more{hint}"
                )
    rights = [*values(parts.rights), *(max(x, 0) for x in values(parts.rights_tested))]
    right = 0 if parts.causal else min(rights, default=-1)
    # Kernels test what is beside sinks themselves: a window that sees nothing does no harm, nor does a chunk that counts as 1.
    left = min(values(parts.lefts) or [max(x, 0) for x in values(parts.lefts_beside)], default=-1)
    chunk = max(1, min(sizes)) if (sizes := values(parts.chunks or parts.chunks_beside)) else 0
    return Band(left, right, max([0, *values(parts.sinks)]), chunk)

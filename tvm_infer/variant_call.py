"""An attention variant on its way into plans and packed functions: what ops.py and planning.py need of tvm_infer.variant."""

from __future__ import annotations

import importlib
from typing import Any

from . import _array, _ffi, jit
from .errors import ArgumentError, PlanMismatchError
from .schedule import Plan

_KEY = "_tvm_infer_prepared"  # in the __dict__ of the variant that was passed: the second call finds everything made


def _package() -> Any:
    """tvm_infer.variant, imported only where a variant is used."""
    return importlib.import_module("tvm_infer.variant")


class Prepared:
    """A bound variant and the objects that packed functions take, by executor.

    bound : tvm_infer.variant.BoundVariant. causal, window_left : its band. plan_band : the same as ``Plan.band`` has it. is_plain :
    the band is all of it, and the kernels without a variant do.
    """

    __slots__ = ("_sizes", "bound", "calls", "causal", "is_plain", "plan_band", "window_left")

    def __init__(self, bound: Any) -> None:
        self.bound = bound
        self.causal, self.window_left = bool(bound.band.causal), int(bound.band.window_left)
        self.plan_band = (self.window_left, 0 if self.causal else -1)
        self.is_plain = bool(bound.variant.is_plain)
        self.calls: dict[bool, Any] = {}
        # (num_qo_heads, num_requests, head_dim) that the tables were last found to fit
        self._sizes: tuple[int, int, int] | None = None

    def __reduce__(self) -> Any:
        return _nothing, ()  # a variant that is pickled or copied deeply is prepared again

    def call(self, is_cuda: bool, num_qo_heads: int, num_requests: int, head_dim: int) -> Any:
        """The VariantCall object for tensors on a cuda device or on the host, where the variant is compiled at first use.

        Its tables are indexed by head and request without a further look: they are checked to have as many.
        """
        sizes = (num_qo_heads, num_requests, head_dim)
        if self._sizes != sizes:
            self.bound.check_shapes(*sizes)
            self._sizes = sizes
        call = self.calls.get(is_cuda)
        if call is None:
            bound = self.bound
            if is_cuda:
                jit.register_variant(bound.variant.digest, bound.variant.source())
            functions = 0 if is_cuda else _package().cpu_functions(bound.variant)
            tables = [_array.as_tensor(x, f"variant.tables[{i}]") for i, x in enumerate(bound.tables)]
            call = _ffi.func("variant_call")(bound.variant.digest, functions, list(bound.scalars), tables)
            self.calls[is_cuda] = call
        return call


def _nothing() -> None:
    return None


def prepare(variant: Any) -> Prepared:
    """`variant`, a BoundVariant or a Variant without parameters, prepared once."""
    kept = getattr(variant, "__dict__", None)
    prepared: Prepared | None = None if kept is None else kept.get(_KEY)
    if prepared is None:
        prepared = Prepared(_package().as_bound(variant))
        if kept is not None:
            kept[_KEY] = prepared
    return prepared


def band(variant: Any, causal: bool | None, window_left: int | None) -> tuple[bool, int]:
    """(causal, window_left) to plan with: those given, else the variant's, else True and -1."""
    if variant is None:
        return (True if causal is None else causal), (-1 if window_left is None else window_left)
    prepared = prepare(variant)
    for name, given, own in (
        ("causal", causal, prepared.causal),
        ("window_left", window_left, prepared.window_left),
    ):
        if given is not None and given != own:
            raise ArgumentError(
                f"argument `{name}` is {given!r}, and `variant` was made with {name}={own!r}; leave `{name}` out, the variant "
                f"says it, or make the variant with {name}={given!r}"
            )
    return prepared.causal, prepared.window_left


def _band_text(band: tuple[int, int]) -> str:
    left, right = band
    return f"causal={right == 0}, window_left={left}"


def check_plan(variant: Any, plan: Plan) -> None:
    """Raise PlanMismatchError unless the plan's band is the variant's: its executors read no key outside the plan's band."""
    prepared = prepare(variant)
    if plan.band != prepared.plan_band:
        own = _band_text(prepared.plan_band)
        raise PlanMismatchError(
            f"argument `plan` was made with {_band_text(plan.band)}, and `variant` {prepared.bound.variant.digest} has {own}; plan "
            f"with tvm_infer.plan(…, variant=variant), which takes them from there, or with {own}"
        )

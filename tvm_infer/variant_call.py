"""An attention variant on its way into plans and packed functions: what ops.py and planning.py need of tvm_infer.variant."""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import numpy as np

from . import _array, _ffi, jit
from .errors import ArgumentError, PlanMismatchError
from .schedule import Band, Plan

_KEY = "_tvm_infer_prepared"  # in the __dict__ of the variant that was passed: the second call finds everything made


def _package() -> Any:
    """tvm_infer.variant, imported only where a variant is used."""
    return importlib.import_module("tvm_infer.variant")


class Prepared:
    """A bound variant and the objects that packed functions take, by executor.

    bound : tvm_infer.variant.BoundVariant. band : of its mask, as ``Plan.band`` has it. is_plain : the band is all of it, and the
    kernels without a variant do.
    """

    __slots__ = (
        "_checked_kernels",
        "_checked_plan",
        "_sizes",
        "band",
        "bound",
        "calls",
        "has_matrices",
        "is_plain",
        "rotates",
    )

    def __init__(self, bound: Any) -> None:
        self.bound = bound
        self.band: Band = bound.band
        self.is_plain = bool(bound.variant.is_plain)
        self.rotates = bool(getattr(bound.variant, "rotates", False))
        # read by positions, so that lengths decide how large they must be
        self.has_matrices = any(p.sort == "tensor" for p in getattr(bound.variant, "parameters", {}).values())
        self.calls: dict[bool, Any] = {}
        # (num_qo_heads, num_requests, head_dim) that the tables were last found to fit
        self._sizes: tuple[int, int, int] | None = None
        self._checked_kernels: set[tuple[int, bool]] = set()  # (head_dim, keys of 8 bits) that CUDA has kernels for
        self._checked_plan: Any = None  # a weak reference to the last plan whose lengths tables were found to hold

    def __reduce__(self) -> Any:
        return _nothing, ()  # a variant that is pickled or copied deeply is prepared again

    def call(
        self, is_cuda: bool, num_qo_heads: int, num_requests: int, head_dim: int, *, is_scaled: bool = False
    ) -> Any:
        """The VariantCall object for tensors on a cuda device or on the host, where the variant is compiled at first use.

        Its tables are indexed by head and request without a further look: they are checked to have as many. is_scaled : keys have 8
        bits. ExecutorError : there are no CUDA kernels that change queries or keys so, which is said before anything is launched.
        """
        sizes = (num_qo_heads, num_requests, head_dim)
        if self._sizes != sizes:
            self.bound.check_shapes(*sizes)
            self._sizes = sizes
        call = self.calls.get(is_cuda)
        if call is None:
            bound, digest, functions = self.bound, self.bound.variant.digest, 0
            if is_cuda:
                digest, source = bound.cuda_struct
                jit.register_variant(digest, source)
            else:
                functions = _package().cpu_functions(bound.variant)
            tables = [_array.as_tensor(x, f"variant.tables[{i}]") for i, x in enumerate(bound.tables)]
            call = _ffi.func("variant_call")(digest, functions, list(bound.scalars), tables)
            self.calls[is_cuda] = call
        if is_cuda and (head_dim, is_scaled) not in self._checked_kernels:
            jit.check_variant(self.bound.cuda_struct[0], head_dim, is_scaled)
            self._checked_kernels.add((head_dim, is_scaled))
        return call

    def check_tables(self, plan: Plan, num_qo_heads: int) -> None:
        """Raise VariantError where tables are too short for the plan's requests; once a plan, so that layers do not pay for it."""
        if not self.has_matrices or (self._checked_plan is not None and self._checked_plan() is plan):
            return
        self.bound.check_tables(np.diff(plan.qo_indptr), plan.kv_len, num_qo_heads, plan.num_kv_heads)
        self._checked_plan = weakref.ref(plan)


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


def band(
    variant: Any,
    causal: bool | None = None,
    window_left: int | None = None,
    window_right: int | None = None,
    num_sink: int | None = None,
    chunk: int | None = None,
) -> Band:
    """The band to plan with: what is given, else the variant's, else causal without a window."""
    sides = {"window_left": window_left, "window_right": window_right, "num_sink": num_sink, "chunk": chunk}
    given = {name: value for name, value in sides.items() if value is not None}
    if variant is None:
        if causal is None:
            causal = window_right is None
        if causal and given.get("window_right", 0) != 0:
            raise ArgumentError(
                f"argument `window_right` is {window_right!r} with causal={causal!r}, which is window_right=0; leave one of them out"
            )
        return Band(**{**given, "window_right": 0} if causal else given)
    own = prepare(variant).band
    if causal is not None:
        given = {"causal": causal, **given}
    for name, value in given.items():
        if value != getattr(own, name):
            raise ArgumentError(
                f"argument `{name}` is {value!r}, and `variant` was made with {name}={getattr(own, name)!r}; leave `{name}` out, the "
                f"variant says it, or make the variant with {name}={value!r}"
            )
    return own


def check_plan(variant: Any, plan: Plan) -> None:
    """Raise PlanMismatchError unless the plan's band is the variant's: its executors read no key outside the plan's band."""
    prepared = prepare(variant)
    if plan.band != prepared.band:
        raise PlanMismatchError(
            f"argument `plan` was made with {plan.band}, and `variant` {prepared.bound.variant.digest} has {prepared.band}; plan "
            f"with tvm_infer.plan(…, variant=variant), which takes them from there, or with {prepared.band}"
        )
    if plan.has_head_lists:
        raise PlanMismatchError(
            f"argument `plan` has a list of keys for each KV head, {plan.num_kv_lists} lists of {plan.num_requests} requests, and the "
            "call a variant, which is told positions in a request: plan with one kv_len for each request"
        )
    if plan.num_shared_works:
        raise PlanMismatchError(
            f"argument `plan` has {plan.num_shared_works} works with rows of several requests (levels), and the call a variant, which "
            "runs without any: plan without levels"
        )


def check_plan_alone(plan: Plan) -> None:
    """Raise PlanMismatchError where the plan needs a variant, and the call has none: nobody would test its sinks or chunks by row."""
    if plan.needs_variant:
        raise PlanMismatchError(
            f"argument `plan` was made with {plan.band}, and the call has no variant: sinks and chunks are tested by a variant's mask. "
            "Pass the variant that the plan was made for, or plan without them"
        )

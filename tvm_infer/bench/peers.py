"""What our attention is measured beside, on either device. A peer says why it cannot run instead of being left out silently."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import ArgumentError
from .timing import Timing
from .workloads import Workload


class Skipped(Exception):
    """A peer cannot run a workload; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A peer, ready to be timed.

    runs : runs[i] computes batch i; nothing that can be done before is in it. output : computes the first batch and returns its result,
    [num_tokens, num_qo_heads, head_dim]. plan : the peer's host-side schedule of a step, where it has one. note : what is odd about it.
    """

    runs: Sequence[Callable[[], object]]
    output: Callable[[], Any]
    plan: Callable[[], object] | None = None
    note: str = ""


class Peer(Protocol):
    """A way to compute a workload. `variants`: its backends, each prepared and timed apart; the fastest is quoted. One that computes
    attention variants and windows has an attribute takes_variants = True, one that reads keys and values of 8 bits takes_float8, one
    whose values may be narrower than keys takes_unequal."""

    def variants(self, workload: Workload) -> Sequence[str]: ...

    def prepare(self, variant: str, workload: Workload, batches: Sequence[Any]) -> Prepared:
        """Raises Skipped. batches : the same values in one or more places (PagedBatch on the CPU, DeviceBatch on CUDA)."""
        ...


# device -> name -> (module, class); modules are loaded when asked for: each needs packages of its own only when it runs
_PEERS = {
    "cpu": {"torch": ("peers_cpu", "Torch"), "tvm-tir": ("peers_cpu", "TvmTir")},
    "cuda": {
        "tvm-tir": ("peers_tvm", "TvmTir"),
        "torch": ("peers_torch", "Torch"),
        "flex": ("peers_torch", "Flex"),
        "flashinfer": ("peers_flashinfer", "FlashInfer"),
    },
}


def known(device: str) -> list[str]:
    """Names of the peers on a device."""
    return list(_PEERS[device])


def peer(name: str, device: str) -> Peer:
    """The peer called `name`."""
    if name not in _PEERS[device]:
        raise ArgumentError(
            f"argument `peers` names {name!r}; on {device} it must be among {', '.join(_PEERS[device])}"
        )
    module, attribute = _PEERS[device][name]
    return getattr(importlib.import_module(f"{__package__}.{module}"), attribute)()  # type: ignore[no-any-return]


def versions() -> dict[str, str | None]:
    """Installed versions of what peers are made of, beside the packages that tvm_infer itself uses; None where absent."""
    found: dict[str, str | None] = {}
    for package in ("triton", "flashinfer-python"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def require(package: str, extra: str = "") -> None:
    """Raise Skipped where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"{package} is not installed{f' (tvm_infer[{extra}])' if extra else ''}")


def _measure_variant(
    prepared: Prepared,
    error_of: Callable[[Any], float],
    tolerance: float,
    time: Callable[[Sequence[Callable[[], object]]], Timing],
) -> dict[str, Any]:
    from .timing import measure

    error = error_of(prepared.output())
    if not error <= tolerance:
        raise Skipped(f"wrong result (relative error {error:.1e}, allowed {tolerance:.0e})")
    timing = time(prepared.runs)
    row: dict[str, Any] = {"us": timing.median, "p10_us": timing.p10, "p90_us": timing.p90, "relative_error": error}
    if prepared.note:
        row["note"] = prepared.note
    if prepared.plan is not None:
        row["plan_us"] = measure(prepared.plan, seconds=0.1).median
    return row


def measure_peer(
    candidate: Peer,
    workload: Workload,
    batches: Sequence[Any],
    *,
    error_of: Callable[[Any], float],
    tolerance: float,
    time: Callable[[Sequence[Callable[[], object]]], Timing],
    ours_us: float,
) -> dict[str, Any]:
    """The peer's fastest variant, checked before it is timed, or {"skipped": why}; all variants under "variants"."""
    if (workload.variant or workload.window >= 0) and not getattr(candidate, "takes_variants", False):
        return {"skipped": "measured on plain causal attention only"}
    if workload.has_lists:
        return {"skipped": "reads the same keys for all KV heads of a request"}
    if workload.kv_dtype and not getattr(candidate, "takes_float8", False):
        return {"skipped": "has no keys and values of 8 bits beside queries of 16"}
    if workload.head_dim_vo and not getattr(candidate, "takes_unequal", False):
        return {"skipped": "keys as wide as values: others not measured"}
    variants: dict[str, dict[str, Any]] = {}
    try:
        names = candidate.variants(workload)
    except Skipped as reason:
        return {"skipped": str(reason)}
    for name in names:
        try:
            prepared = candidate.prepare(name, workload, batches)
            variants[name] = _measure_variant(prepared, error_of, tolerance, time)
        except Skipped as reason:
            variants[name] = {"skipped": str(reason)}
        except Exception as error:  # other people's code: whatever it raises, the others are still measured
            first_line = (str(error).strip().splitlines() or [""])[0]
            variants[name] = {"skipped": f"failed: {type(error).__name__}: {first_line[:200]}"}
    timed = {name: row for name, row in variants.items() if "us" in row}
    if not timed:
        reasons = dict.fromkeys(
            f"{name}: {row['skipped']}" if name else row["skipped"] for name, row in variants.items()
        )
        return {"skipped": "; ".join(reasons), "variants": variants}
    best = min(timed, key=lambda name: timed[name]["us"])
    return {**timed[best], "variant": best, "speedup": timed[best]["us"] / ours_us, "variants": variants}

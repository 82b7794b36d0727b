"""One row of the benchmark on a CUDA device: correctness first, then times, ours and the peers', on rotating inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ceilings import Ceilings
from .cuda_device import CudaDevice
from .inputs import DeviceBatch, device_batch
from .peers import measure_peer, peer
from .planning import time_plan
from .reference import PEER_TOLERANCE, TOLERANCE, Reference, lse_tolerance, reference
from .rows import WrongResult, shape_of, vs_best_peer
from .timing import REST_S
from .workloads import Workload

# Inputs and outputs of all copies: four times the L2 and more, so that each launch reads memory.
ROTATE_BYTES = 256 << 20
MAX_COPIES = 200
MIN_LAUNCHES = 8  # in a graph
# A workload of more FLOP is walked over once a replay: under longer load than that the card lowers its clock.
LONG_FLOPS = 4e11

METHOD = (
    "CUDA graph over launches on rotating copies of q, K/V and o (256 MiB or more together, at most 200 copies), replayed after the "
    f"GPU has been idle for {REST_S} s. us: median replay / launches, GPU time back to back. Results checked against float64 before "
    "and after. bytes: K and V of every request once, q, o. flops: 2 x visible (query, key) pairs x heads x (head_dim + "
    "head_dim_vo). of_ceiling: the longer of bytes / read ceiling and flops / matmul ceiling of this run, over us. plan_us: host time "
    "of planning into a given buffer; upload_us: host time of the plan's copy."
)


def _check(reference_: Reference, batch: DeviceBatch, when: str) -> tuple[float, float]:
    error, lse_error = reference_.error(batch.out), reference_.lse_error(batch.lse)
    limit = TOLERANCE[batch.workload.dtype]
    lse_limit = lse_tolerance(batch.workload)
    if not (error <= limit and lse_error <= lse_limit):
        raise WrongResult(
            f"wrong result {when}: relative error {error:.2e} (allowed {limit:.0e}), LSE off by {lse_error:.2e} "
            f"(allowed {lse_limit:.0e})"
        )
    return error, lse_error


def num_copies(workload: Workload) -> int:
    """Copies of inputs and outputs to rotate through."""
    return min(MAX_COPIES, max(1, -(-ROTATE_BYTES // workload.bytes_moved)))


def _rounds(workload: Workload, copies: int) -> int:
    return max(1, -(-MIN_LAUNCHES // copies)) if workload.flops < LONG_FLOPS else 1


def measure_workload(
    device: CudaDevice, workload: Workload, ceilings: Ceilings, peers: Sequence[str]
) -> dict[str, Any]:
    """One row. Raises WrongResult, and whatever the library raises."""
    plan = device.plan(workload)
    plan_time = time_plan(workload, plan, device.tile_table(workload))
    row = shape_of(workload) | {
        "plan_us": plan_time.median,
        "plan_p90_us": plan_time.p90,
        "upload_us": device.time_upload(plan).median,
        "predicted_us": plan.makespan_us,
        "works": plan.num_works,
        "merges": plan.num_merges,
    }
    if workload.plan_only:
        return row
    return row | _measure_attention(device, workload, plan, ceilings, peers)


def _measure_attention(
    device: CudaDevice, workload: Workload, plan: Any, ceilings: Ceilings, peers: Sequence[str]
) -> dict[str, Any]:
    import torch

    batch = device_batch(workload, device.torch_device)
    expected = reference(batch)
    workspace = torch.full(
        (max(1, plan.num_partial_rows * (workload.width_vo + 1)),), float("nan"), device=device.torch_device
    )
    launch = device.launcher(batch, plan, workspace)
    for _ in range(2):  # the second launch meets what the first left in the plan and the workspace
        batch.poison_outputs()
        launch()
        device.synchronize()
        error, lse_error = _check(expected, batch, "before timing")
    batches = [batch, *(batch.copy() for _ in range(num_copies(workload) - 1))]
    for copy in batches:
        copy.poison_outputs()
    launches = [device.launcher(b, plan, workspace) for b in batches] * _rounds(workload, len(batches))
    timing = device.time(launches)
    for copy in (batches[0], batches[-1]):
        _check(expected, copy, "after timing")
    fastest, bound = ceilings.fastest_us(workload)
    beside = {
        name: measure_peer(
            peer(name, "cuda"),
            workload,
            batches,
            error_of=expected.error,
            tolerance=PEER_TOLERANCE[workload.dtype],
            time=lambda runs: device.time(list(runs) * _rounds(workload, len(runs))),
            ours_us=timing.median,
        )
        for name in peers
    }
    return {
        "us": timing.median,
        "p10_us": timing.p10,
        "p90_us": timing.p90,
        "replays": timing.runs,
        "launches": len(launches),
        "copies": len(batches),
        "bytes": workload.bytes_moved,
        "flops": workload.flops,
        "gb_per_s": workload.bytes_moved / timing.median / 1e3,
        "tflop_per_s": workload.flops / timing.median / 1e6,
        "bound": bound,
        "ceiling_us": fastest,
        "of_ceiling": fastest / timing.median,
        "relative_error": error,
        "lse_error": lse_error,
        "vs_best_peer": vs_best_peer(beside),
        "peers": beside,
    }

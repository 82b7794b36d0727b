"""What a row of the benchmark has on every device: its workload in words, and why it has no figure."""

from __future__ import annotations

from typing import Any

from .shapes import format_lengths
from .workloads import Workload


class WrongResult(Exception):
    """Our own result is wrong: the row has no figure."""


def shape_of(workload: Workload) -> dict[str, Any]:
    """A row's description of its workload."""
    return {
        "workload": workload.name,
        "dtype": workload.dtype,
        "num_qo_heads": workload.num_qo_heads,
        "num_kv_heads": workload.num_kv_heads,
        "head_dim": workload.head_dim,
        "head_dim_vo": workload.head_dim_vo or None,
        "page_size": None if workload.ragged else workload.page_size,
        "kv_layout": "ragged" if workload.ragged else workload.kv_layout,
        "qo_lens": format_lengths(workload.qo_lens),
        "kv_lens": format_lengths(workload.kv_lens),
        "variant": workload.variant or None,
        "window": workload.window if workload.window >= 0 else None,
        "num_sink": workload.num_sink or None,
        "chunk": workload.chunk or None,
        "prefix": workload.prefix or None,
        "kv_dtype": workload.kv_dtype or None,
        "streaming": list(workload.streaming) if sum(workload.streaming) else None,
        "selected": list(workload.selected) if workload.selected[0] else None,
    }


def best_peer(peers: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, its entry) of the fastest of a row's "peers"; None where none was measured."""
    timed = {name: peer for name, peer in peers.items() if "us" in peer}
    return min(timed.items(), key=lambda item: item[1]["us"]) if timed else None


def vs_best_peer(peers: dict[str, Any]) -> float | None:
    """The fastest peer's time over ours; None where no peer was measured."""
    best = best_peer(peers)
    return best[1]["speedup"] if best else None

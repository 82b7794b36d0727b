"""The results of `bench attention` as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_Cell = Callable[[dict[str, Any]], str]


def _figure(key: str, form: str) -> tuple[str, _Cell]:
    return key, lambda row: format(row[key], form)


def _rate(row: dict[str, Any]) -> str:
    if row["bound"] == "read":
        return f"{row['gb_per_s']:.0f} GB/s"
    return f"{row['tflop_per_s']:.0f} TFLOP/s"


# heading, the key that a row needs for the cell to be filled, its text
_CPU = (
    ("µs", *_figure("us", ".0f")),
    ("KV GB/s", *_figure("gb_per_s", ".1f")),
    ("read GB/s", *_figure("read_gb_per_s", ".1f")),
    ("of read", *_figure("of_read_bandwidth", ".0%")),
    ("GFLOP/s", *_figure("gflop_per_s", ".0f")),
    ("error", *_figure("relative_error", ".0e")),
    ("plan µs", *_figure("plan_us", ".1f")),
)
_CUDA = (
    ("µs", *_figure("us", ".1f")),
    ("p10 – p90", "us", lambda row: f"{row['p10_us']:.1f} – {row['p90_us']:.1f}"),
    ("rate", "us", _rate),
    ("of ceiling", "us", lambda row: f"{row['of_ceiling']:.1%} {row['bound']}"),
    ("predicted", *_figure("predicted_us", ".1f")),
    ("error", *_figure("relative_error", ".0e")),
    ("plan µs", *_figure("plan_us", ".1f")),
    ("upload µs", *_figure("upload_us", ".1f")),
)


def _title(results: dict[str, Any]) -> str:
    if results["device"] == "cpu":
        return (
            f"attention on cpu ({results['isa']}, {results['threads']} threads); medians, causal; of read: KV bytes a second against a "
            "plain read of 0.5 GiB by as many threads"
        )
    ceilings = results["ceilings"]
    return (
        f"attention on {results['device_name']} ({results['num_sms']} SMs, driver {results['driver']}, CUDA {results['cuda']}); graph "
        f"replay on rotating inputs, medians, causal\nceilings of this run: read {ceilings['read_gb_per_s']:.0f} GB/s, copy "
        f"{ceilings['copy_gb_per_s']:.0f} GB/s, bf16 matmul {ceilings['matmul_tflop_per_s']:.0f} TFLOP/s"
    )


def _peer_cell(peer: dict[str, Any] | None) -> str:
    if peer is None or "us" not in peer:
        return "–"
    variant = f" {peer['variant']}" if peer.get("variant") else ""
    digits = 1 if peer["us"] < 1000 else 0
    return f"{peer['us']:.{digits}f} ({peer['speedup']:.2f}×){variant}"


def notes(results: dict[str, Any], peers: Sequence[str]) -> list[str]:
    """What is missing from the table and why: failed rows, and peers that were not measured, those with one reason together."""
    lines = [f"FAILED: {row['workload']} {row['dtype']}: {row['failed']}" for row in results["rows"] if "failed" in row]
    measured = [row for row in results["rows"] if "peers" in row]
    for name in peers:
        skipped: dict[str, list[str]] = {}
        for row in measured:
            if "skipped" in row["peers"][name]:
                skipped.setdefault(row["peers"][name]["skipped"], []).append(f"{row['workload']} {row['dtype']}")
        for reason, rows in skipped.items():
            where = "all rows" if len(rows) == len(measured) > 1 else ", ".join(rows)
            lines.append(f"not measured: {name}, {where}: {reason}")
    return lines


def print_table(console: Any, results: dict[str, Any], peers: Sequence[str]) -> None:
    """Print the results, and below them what was not measured."""
    from rich.table import Table

    columns = _CPU if results["device"] == "cpu" else _CUDA
    table = Table(title=_title(results), title_justify="left")
    table.add_column("workload")
    table.add_column("dtype")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for name in peers:
        table.add_column(f"{name} µs (ours is … ×)", justify="right")
    for row in results["rows"]:
        cells = [text(row) if key in row else "–" for _, key, text in columns]
        others = [_peer_cell(row.get("peers", {}).get(name)) for name in peers]
        table.add_row(row["workload"], row["dtype"], *cells, *others, style="red" if "failed" in row else None)
    console.print(table)
    for note in notes(results, peers):
        console.print(note, markup=False)

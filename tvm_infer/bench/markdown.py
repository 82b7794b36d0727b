"""The results of `bench attention` as a Markdown table, for documents: `python -m tvm_infer.bench.markdown out.json`."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from .rows import best_peer

_HEADER = "| work | µs | rate | of ceiling | best peer | its time over ours |\n|---|---|---|---|---|---|"


def _time(us: float) -> str:
    return f"{us:.0f}" if us >= 1000 else f"{us:.1f}"


def _cells(row: dict[str, Any], dtypes: int) -> list[str]:
    name = f"{row['workload']} {row['dtype']}" if dtypes > 1 else row["workload"]
    if "us" not in row:
        plan = f"plan {row['plan_us']:.1f} µs" if "plan_us" in row else ""
        return [name, "failed" if "failed" in row else "–", plan, "", "", ""]
    rate = f"{row['gb_per_s']:,.0f} GB/s" if row["bound"] == "read" else f"{row['tflop_per_s']:.0f} TFLOP/s"
    best = best_peer(row["peers"])
    beside = ["–", ""]
    if best is not None:
        label = " ".join(filter(None, (best[0], best[1].get("variant"))))
        beside = [f"{_time(best[1]['us'])} ({label})", f"{best[1]['speedup']:.2f}"]
    return [name, _time(row["us"]), rate, f"{row['of_ceiling']:.0%} {row['bound']}", *beside]


def table(results: dict[str, Any]) -> str:
    """A line about the run, then a table of its rows. results : of `attention.run` on CUDA, or its JSON."""
    ceilings, versions = results["ceilings"], results["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "flashinfer-python") if versions.get(name))
    head = (
        f"{results['device_name']}, driver {results['driver']}, CUDA {results['cuda']}, {packages}, {results['date'][:10]}; read "
        f"{ceilings['read_gb_per_s']:,.0f} GB/s, copy {ceilings['copy_gb_per_s']:,.0f} GB/s, bf16 matmul "
        f"{ceilings['matmul_tflop_per_s']:.0f} TFLOP/s."
    )
    dtypes = len({row["dtype"] for row in results["rows"]})
    rows = ("| " + " | ".join(_cells(row, dtypes)) + " |" for row in results["rows"])
    return "\n".join((head, "", _HEADER, *rows)) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table(json.loads(pathlib.Path(sys.argv[1]).read_text())))

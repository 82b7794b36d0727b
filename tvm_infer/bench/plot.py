"""The results of `bench attention` as a chart: how close each row comes to the ceiling that binds it, with peers as markers."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError, MissingDependencyError
from .rows import vs_best_peer

_BAR_COLORS = {"read": "#a6c4e0", "matmul": "#b5d9b0"}  # light: markers lie on them
_BAR_LABELS = {"read": "ours, bound by reading memory", "matmul": "ours, bound by matmul"}
_PEER_STYLES = (("o", "#cc3311"), ("D", "#ee9900"), ("^", "#882288"), ("s", "#222222"), ("v", "#0077bb"))
_FASTER, _SLOWER = "#117733", "#cc3311"
# columns right of the axes, in widths of the axes
_TIME_AT, _RATIO_AT = 1.07, 1.19


def require_matplotlib() -> None:
    """Raise MissingDependencyError where there is no matplotlib: before minutes of measuring."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "argument `plot` needs matplotlib, which is not installed: `pip install 'tvm_infer[plot]'`"
        ) from error


def _where(results: dict[str, Any]) -> str:
    if results["device"] == "cpu":
        return f"CPU, {results['isa']}, {results['threads']} threads"
    ceilings = results["ceilings"]
    return (
        f"{results['device_name']}; read {ceilings['read_gb_per_s']:.0f} GB/s, bf16 matmul "
        f"{ceilings['matmul_tflop_per_s']:.0f} TFLOP/s"
    )


def _label(row: dict[str, Any], dtypes: int) -> str:
    return f"{row['workload']} {row['dtype']}" if dtypes > 1 else str(row["workload"])


def _kind(row: dict[str, Any]) -> tuple[str, Any]:
    """Rows of one kind stand together: decode, prefill, …, and the same with other pages."""
    return str(row["workload"]).split()[0], row.get("page_size")


def _write_columns(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Our times, and the best peer's over ours, right of the axes."""
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": "small"}
    ratios = [vs_best_peer(row["peers"]) for row in rows]
    axes.text(_TIME_AT, -0.9, "µs", **place)
    if any(ratio is not None for ratio in ratios):
        axes.text(_RATIO_AT, -0.9, "peer / ours", **place)
    for i, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        digits = 1 if row["us"] < 1000 else 0
        axes.text(_TIME_AT, i, f"{row['us']:.{digits}f}", **place)
        if ratio is not None:
            axes.text(_RATIO_AT, i, f"{ratio:.2f}×", color=_FASTER if ratio >= 1 else _SLOWER, **place)


def save(results: dict[str, Any], path: str) -> Any:
    """Draw the chart of results (as returned by `attention.run`, or read from its JSON) to a file, and return the Figure.

    A peer's share is of the same ceiling: row["ceiling_us"] / its time. Raises ArgumentError for a file that cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if "us" in row]
    figure = Figure(figsize=(10, 1.6 + 0.32 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    positions = list(range(len(rows)))
    for bound, color in _BAR_COLORS.items():
        members = [i for i in positions if rows[i]["bound"] == bound]
        if members:
            shares = [100 * rows[i]["of_ceiling"] for i in members]
            axes.barh(members, shares, height=0.66, color=color, label=_BAR_LABELS[bound], zorder=2)
    _write_columns(axes, rows)
    for i in positions[1:]:
        if _kind(rows[i]) != _kind(rows[i - 1]):
            axes.axhline(i - 0.5, color="#888888", linewidth=0.6, zorder=1)
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    for number, name in enumerate(names):
        timed = [(i, rows[i]["peers"][name]) for i in positions if "us" in rows[i]["peers"].get(name, {})]
        if timed:
            marker, color = _PEER_STYLES[number % len(_PEER_STYLES)]
            shares = [100 * rows[i]["ceiling_us"] / peer["us"] for i, peer in timed]
            axes.scatter(
                shares,
                [i for i, _ in timed],
                marker=marker,
                s=30,
                color=color,
                edgecolors="white",
                linewidths=0.6,
                label=name,
                zorder=3,
            )
    dtypes = len({row["dtype"] for row in rows})
    axes.set_yticks(positions, [_label(row, dtypes) for row in rows], fontsize="small")
    axes.set_ylim(max(len(rows), 1) - 0.45, -0.55)
    axes.axvline(100, color="black", linewidth=0.8, zorder=1)
    axes.set_xlim(left=0)
    axes.set_xlabel("% of the ceiling that binds the row, measured in the same run")
    axes.grid(axis="x", linewidth=0.4, zorder=0)
    figure.suptitle(f"attention on {_where(results)}", fontsize="medium")
    handles = [*axes.containers, *axes.collections]  # ours first
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"argument `plot` is {path!r}, which cannot be written: {error}") from error
    return figure

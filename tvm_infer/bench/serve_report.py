"""The results of `bench serve` for people: a table, and a chart."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentError
from .plot import require_matplotlib

_COLORS = {"tvm_infer": "#117733", "tvm-tir": "#cc3311", "flashinfer": "#882288"}
_PARTS = (("attention", "#4477aa"), ("gemm", "#b5d9b0"), ("other", "#ddcc77"), ("host", "#999999"))


def title(results: dict[str, Any]) -> str:
    """Model, device and what was asked of them."""
    model, cache = results["model"], results["cache"]
    where = results.get("device_name") or f"cpu ({results['isa']}, {results['threads']} threads)"
    heads = f"{model['num_qo_heads']}/{model['num_kv_heads']} heads of {model['head_dim']}"
    return (
        f"{model['name']}, {model['dtype']}, {model['parameters'] / 1e6:.1f} M parameters ({model['weights']}): "
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, {heads}; on {where}\n{results['asked']}\n"
        f"cache: {cache['num_pages']} pages of {cache['page_size']} tokens, at most {cache['max_batch']} sequences and "
        f"{cache['max_tokens']} tokens a step; seed {results['seed']}"
    )


def _ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _breakdown(row: dict[str, Any]) -> list[str]:
    parts = row.get("breakdown")
    if not parts or "skipped" in parts:
        return ["–"] * 4
    return [_ms(parts[name] * 1e3) for name, _ in _PARTS]


def _cells(row: dict[str, Any]) -> list[str]:
    itl = row["itl_ms"]
    rate = "–" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
    if "ttft_ms" not in row:
        return [_ms(itl["median"]), _ms(itl["p99"]), rate, *_breakdown(row)]
    ttft = row["ttft_ms"]
    return [
        _ms(ttft["median"]),
        _ms(ttft["p99"]),
        _ms(itl["median"]),
        _ms(itl["p99"]),
        rate,
        f"{row['mean_decoding']:.1f}",
        *_breakdown(row),
    ]


def notes(results: dict[str, Any]) -> list[str]:
    """What the columns mean, and what is missing from the table and why."""
    lines = [f"{name}: {text}" for name, text in results["backends"].items()]
    lines += [f"method: {line}" for line in results["method"]]
    parts = {row["breakdown"]["method"] for row in results["rows"] if "method" in row.get("breakdown", {})}
    lines += [f"parts: {line}" for line in sorted(parts)]
    for row in results["rows"]:
        where = f" at batch {row['batch']}" if "batch" in row else ""
        if "failed" in row:
            lines.append(f"FAILED: {row['backend']}{where}: {row['failed']}")
        if "skipped" in row:
            lines.append(f"not measured: {row['backend']}: {row['skipped']}")
        if "skipped" in row.get("breakdown", {}):
            lines.append(f"no breakdown: {row['backend']}{where}: {row['breakdown']['skipped']}")
        alone = row.get("breakdown", {}).get("attention_alone")
        if alone:
            inside, warm = row["breakdown"]["attention"], row["breakdown"]["attention_back_to_back"]
            lines.append(
                f"{row['backend']}{where}: attention takes {inside * 1e3:.3f} ms inside a step; in a graph of its own "
                f"{alone * 1e3:.3f} ms with the L2 swept before each layer ({inside / alone:.2f} x), "
                f"{warm * 1e3:.3f} ms back to back ({inside / warm:.2f} x)"
            )
        plain = row.get("plain_step", {})
        if plain.get("graph_seconds"):
            beyond = plain["seconds"] - plain["graph_seconds"]
            lines.append(
                f"{row['backend']}{where}: a step takes {plain['seconds'] * 1e3:.3f} ms, its graph alone "
                f"{plain['graph_seconds'] * 1e3:.3f} ms: {beyond * 1e6:.0f} us for the host"
            )
        if row.get("same_tokens") is not None:
            same, of = row["same_tokens"], row["compared_tokens"]
            lines.append(
                f"{row['backend']}{where}: {same} of {of} tokens as {results['rows'][0]['backend']} chose them"
            )
    return lines


def print_table(console: Any, results: dict[str, Any]) -> None:
    """Print the results, and below them how they came about."""
    from rich.table import Table

    decode_only = results["mode"] == "decode"
    table = Table(title=title(results), title_justify="left")
    table.add_column("backend")
    columns = ["ITL ms", "p99", "tokens/s"]
    if decode_only:
        table.add_column("batch", justify="right")
    else:
        columns = ["TTFT ms", "p99", *columns, "decoding"]
    for heading in [*columns, *(f"{name} ms" for name, _ in _PARTS)]:
        table.add_column(heading, justify="right")
    for row in results["rows"]:
        head = [row["backend"], *([str(row.get("batch", "–"))] if decode_only else [])]
        cells = _cells(row) if "itl_ms" in row else ["–"] * (len(columns) + len(_PARTS))
        table.add_row(*head, *cells, style="red" if "failed" in row else None)
    console.print(table)
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def _bars(axes: Any, rows: list[dict[str, Any]], labels: list[str], key: str, heading: str) -> None:
    positions = range(len(rows))
    values = [row[key]["median"] or 0.0 for row in rows]
    tails = [row[key]["p99"] or 0.0 for row in rows]
    colors = [_COLORS.get(row["backend"], "#444444") for row in rows]
    axes.barh(positions, values, height=0.6, color=colors, zorder=2)
    axes.scatter(tails, positions, marker="|", s=140, color="black", label="p99", zorder=3)
    for position, value in zip(positions, values, strict=True):
        axes.text(value, position, f" {_ms(value)}", va="center", fontsize="small", zorder=4)
    axes.set_yticks(positions, labels, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(heading)
    axes.grid(axis="x", linewidth=0.4, zorder=0)


def _stack(axes: Any, rows: list[dict[str, Any]]) -> None:
    left = [0.0] * len(rows)
    for name, color in _PARTS:
        widths = [row["breakdown"][name] * 1e3 if "host" in row.get("breakdown", {}) else 0.0 for row in rows]
        axes.barh(range(len(rows)), widths, left=left, height=0.6, color=color, label=name, zorder=2)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.invert_yaxis()
    axes.set_xlabel("one decode step, ms")
    axes.grid(axis="x", linewidth=0.4, zorder=0)


def save(results: dict[str, Any], path: str) -> Any:
    """Draw the results (as `serve.run` returns them, or read from their JSON) to a file, and return the Figure. ArgumentError for a
    file that cannot be written."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = [row for row in results["rows"] if "itl_ms" in row]
    labels = [f"{row['backend']} b{row['batch']}" if "batch" in row else row["backend"] for row in rows]
    panels = ["itl_ms"] if results["mode"] == "decode" else ["ttft_ms", "itl_ms"]
    figure = Figure(figsize=(4.5 * (len(panels) + 1), 2.4 + 0.4 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    names = {"ttft_ms": "time to first token, ms (bar: median)", "itl_ms": "between tokens, ms (bar: median)"}
    for panel, key in zip(axes, panels, strict=False):
        _bars(panel, rows, labels, key, names[key])
    _stack(axes[-1], rows)
    figure.suptitle(title(results), fontsize="small")
    handles, texts = axes[-1].get_legend_handles_labels()
    tail, text = axes[0].get_legend_handles_labels()
    figure.legend([*tail, *handles], [*text, *texts], loc="outside lower center", ncols=5, fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"argument `plot` is {path!r}, which cannot be written: {error}") from error
    return figure

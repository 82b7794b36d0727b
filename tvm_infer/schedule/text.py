"""The Plan as a text table: `print(plan)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .plan import Plan

_HEAD, _TAIL = 8, 4  # rows shown of a long table
_BAR = 24  # characters of the longest bar


def _shown(count: int) -> list[int | None]:
    """Row numbers to print; None is the gap."""
    if count <= _HEAD + _TAIL + 1:
        return list(range(count))
    return [*range(_HEAD), None, *range(count - _TAIL, count)]


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Right-aligned columns, the last one left-aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns) - 1)]
    return [
        ("  " + "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]])).rstrip()
        for row in [columns, *rows]
    ]


def _rows(plan: Plan, work: Any) -> str:
    """Whose rows a work has: "r2[0:4]" of one request, "r2+15[64 rows]" of that and 15 more that share the keys."""
    lists = plan.num_kv_heads if plan.has_head_lists else 1
    requests = plan.requests_of(work) if work["merge_tiles"] > 0 else [work["kv_list"] // lists]
    if len(requests) > 1:
        return f"r{requests[0]}+{len(requests) - 1}[{work['num_rows']} rows]"
    token = int(plan.token_order[work["row_begin"] // plan.group_size])
    row = (token - int(plan.qo_indptr[requests[0]])) * plan.group_size + int(work["row_begin"]) % plan.group_size
    return f"r{requests[0]}[{row}:{row + work['num_rows']}]"


def _runs(plan: Plan, cta: int, limit: int = 2) -> str:
    """What a CTA does, e.g. "r0 rows 0-63 h0-7 kv 0-511; r2 …"."""
    begin, end = plan.work_indptr[cta : cta + 2]
    parts = []
    for work in plan.works[begin : min(end, begin + limit)]:
        first, last = int(work["kv_head_begin"]), int(work["kv_head_begin"] + work["num_kv_heads"]) - 1
        heads = f"h{first}" if first == last else f"h{first}-{last}"
        split = "" if work["merge"] < 0 else " part"
        parts.append(f"{_rows(plan, work)} {heads} kv[{work['kv_begin']}:{work['kv_end']}]{split}")
    if end - begin > limit:
        parts.append(f"+{end - begin - limit}")
    return ", ".join(parts)


def plan_table(plan: Plan) -> str:
    """A summary, the CTAs with their load, works and pieces of split rows, and the merges; long tables are elided."""
    mask = {(-1, -1, 0, 0): "full", (-1, 0, 0, 0): "causal"}.get(plan.band, f"band({plan.band})")
    lines = [
        f"Plan of {plan.num_requests} requests, {plan.num_tokens} query tokens, {int(plan.kv_len.sum(dtype=np.int64))} keys; "
        f"{plan.num_kv_heads} KV heads x group of {plan.group_size}, {mask}; {plan.bytes_used} bytes",
    ]
    works, indptr, loads = plan.works, plan.work_indptr, plan.loads()
    longest = max(int(loads.max(initial=0)), 1)
    rows = []
    for cta in _shown(plan.num_ctas):
        if cta is None:
            rows.append(["…", "", "", "", "", ""])
            continue
        mine = works[indptr[cta] : indptr[cta + 1]]
        bar = "#" * round(_BAR * int(loads[cta]) / longest)
        rows.append(
            [
                str(cta),
                f"{loads[cta] / 1e6:.2f}",
                str(len(mine)),
                str(int((mine["merge"] >= 0).sum())),
                bar.ljust(_BAR),
                _runs(plan, cta),
            ]
        )
    lines += _table(["CTA", "load us", "works", "parts", "", "request[packed rows] heads kv[keys]"], rows)
    if plan.num_merges:
        rows = []
        for m in _shown(plan.num_merges):
            if m is None:
                rows.append(["…", "", "", ""])
                continue
            merge = plan.merges[m]
            row, head = int(merge["row_begin"]), int(merge["kv_head_begin"])
            partials = str(int(plan.merge_indptr[m + 1] - plan.merge_indptr[m]))
            rows.append(
                [str(m), f"{row}:{row + merge['num_rows']}", f"{head}:{head + merge['num_kv_heads']}", partials]
            )
        lines += _table(["merge", "packed rows", "heads", "partials"], rows)
    lines.append(
        f"  balance {plan.balance:.3f} (mean {plan.total_cost_us / plan.num_ctas:.2f} us / max {plan.makespan_us:.2f} us), "
        f"{plan.num_works} works, {plan.num_merges} merges, {plan.num_partial_rows} partial rows"
    )
    if plan.num_shared_works:
        flat = int(plan.header["flat_cost"]) / 1e6
        lines.append(
            f"  shared keys: {plan.num_shared_works} works for several requests, {plan.header['num_levels']} level(s); cost "
            f"{plan.total_cost_us:.2f} us, {flat:.2f} us if each request read its own"
        )
    return "\n".join(lines)

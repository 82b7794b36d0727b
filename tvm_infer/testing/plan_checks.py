"""What every plan must hold, checked from its lengths alone: each visible key computed once, each split row merged once."""

from __future__ import annotations

import numpy as np

from ..schedule import Plan


def visible_ranges(plan: Plan, request: int, row_begin: int, num_rows: int) -> list[tuple[int, int]]:
    """Keys [begin, end) that some row of a tile sees: sinks and others, where they lie apart; [(0, 0)] if none. Rows are packed rows
    within the request."""
    qo_len = int(plan.qo_indptr[request + 1] - plan.qo_indptr[request])
    kv_len = int(plan.kv_len[request])
    left, right, num_sink, chunk = plan.band
    first = kv_len - qo_len + row_begin // plan.group_size
    last = kv_len - qo_len + (row_begin + num_rows - 1) // plan.group_size
    limit = min(kv_len, last + right + 1) if right >= 0 else kv_len
    begin, end = max(0, first - left) if left >= 0 else 0, limit
    if chunk > 0:
        begin, end = max(begin, first - first % chunk), min(end, last - last % chunk + chunk)
    sinks = min(num_sink, limit)
    if begin < end and 0 < sinks < begin:
        return [(0, sinks), (begin, end)]
    if sinks > 0:
        begin, end = 0, max(sinks, end)
    return [(begin, end) if begin < end else (0, 0)]


def check_plan(plan: Plan) -> None:
    """Raise AssertionError where a plan is not one.

    Every (packed row, KV head) of the batch has works whose keys follow one another from the first to the last key that the row's tile
    sees, but for the gap behind sinks: each is computed exactly once, and one that no row of the tile sees not at all. Rows with
    several works are in exactly one merge, which lists these works' partials by ascending key; all others write final rows. Partial
    rows are disjoint and within num_partial_rows. CTAs, loads, makespan and offsets agree with each other.
    """
    works, indptr = plan.works, plan.work_indptr
    assert indptr[0] == 0 and indptr[-1] == plan.num_works and (np.diff(indptr) >= 0).all()
    assert plan.bytes_used % 16 == 0 and all(
        int(plan.header[name]) % 16 == 0 and int(plan.header[name]) < plan.bytes_used
        for name in plan.header.dtype.names
        if name.endswith("_offset")
    )
    loads = plan.loads()
    assert loads.max() == plan.header["makespan"] and loads.sum() == plan.header["total_cost"]
    assert (works["num_rows"] > 0).all() and (works["num_kv_heads"] > 0).all()
    assert (works["num_rows"] <= plan.tile_classes["rows"][works["tile_class"]]).all()
    assert (works["kv_head_begin"] >= 0).all()
    assert (works["kv_head_begin"] + works["num_kv_heads"] <= plan.num_kv_heads).all()
    assert ((works["out"] < 0) == (works["merge"] < 0)).all()
    _check_cover(plan)
    _check_merges(plan)


def _check_cover(plan: Plan) -> None:
    """Tiles partition the packed rows; of each tile and head, works partition the visible keys."""
    works = plan.works
    count = works["num_kv_heads"]
    of = np.repeat(np.arange(len(works)), count)  # one entry for each head of each work
    head = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count) + works["kv_head_begin"][of]
    order = np.lexsort((works["kv_begin"][of], head, works["row_begin"][of]))
    of, head = of[order], head[order]
    row, rows = works["row_begin"][of], works["num_rows"][of]
    begin, end = works["kv_begin"][of], works["kv_end"][of]
    starts = np.ones(len(of), bool)  # a new (tile, head) starts here
    starts[1:] = (row[1:] != row[:-1]) | (head[1:] != head[:-1])
    follows = ~starts
    gaps = np.flatnonzero(follows)
    gaps = gaps[begin[gaps] != end[gaps - 1]]
    gaps_of = np.bincount(np.cumsum(starts)[gaps] - 1, minlength=int(starts.sum()))  # by (tile, head)
    assert (rows[follows] == rows[:-1][follows[1:]]).all(), "pieces of a tile have different rows"
    several = np.zeros(len(of), bool)
    several[follows] = True
    several[:-1] |= follows[1:]
    assert (several == (works["merge"][of] >= 0)).all(), "a split row without a merge, or a merge of one partial"
    assert (begin[several] < end[several]).all(), "an empty piece"

    at = np.flatnonzero(starts)
    last = np.append(at[1:], len(of)) - 1
    tiles = at[:: plan.num_kv_heads] if len(at) else at
    assert len(at) == len(tiles) * plan.num_kv_heads, "a head is missing"
    assert (head[at].reshape(-1, plan.num_kv_heads) == np.arange(plan.num_kv_heads)).all(), "a head is missing"
    bounds = np.append(row[tiles], plan.num_tokens * plan.group_size)
    assert (bounds[0] if len(tiles) else 0) == 0 and (np.diff(bounds) == rows[tiles]).all(), (
        "rows are skipped or repeated"
    )
    for t, tile in enumerate(tiles):
        work = works[of[tile]]
        request = int(work["kv_list"])
        first_row = int(plan.qo_indptr[request]) * plan.group_size
        local = int(work["row_begin"]) - first_row
        assert local >= 0 and local + work["num_rows"] <= (
            (plan.qo_indptr[request + 1] - plan.qo_indptr[request]) * plan.group_size
        ), "a tile holds rows of another request"
        expected = visible_ranges(plan, request, local, int(work["num_rows"]))
        heads = slice(t * plan.num_kv_heads, (t + 1) * plan.num_kv_heads)
        assert (begin[at[heads]] == expected[0][0]).all() and (end[last[heads]] == expected[-1][1]).all(), (
            "keys outside the band"
        )
        assert (gaps_of[heads] == len(expected) - 1).all(), "keys are skipped or computed twice"
        inside = gaps[(gaps >= at[heads.start]) & (gaps <= last[heads.stop - 1])] if len(expected) > 1 else gaps[:0]
        assert (end[inside - 1] == expected[0][1]).all() and (begin[inside] == expected[-1][0]).all(), (
            "keys outside the band"
        )
        position = int(plan.kv_len[request] - (plan.qo_indptr[request + 1] - plan.qo_indptr[request]))
        assert work["qo_pos_base"] == position + local // plan.group_size
    assert (works["kv_pos_base"] == 0).all()


def _check_merges(plan: Plan) -> None:
    """Each merge lists the partials of its works by ascending key; partial rows are disjoint."""
    works, slots, indptr = plan.works, plan.merge_slots, plan.merge_indptr
    assert indptr[0] == 0 and indptr[-1] == len(slots) and len(indptr) == plan.num_merges + 1
    parts = np.flatnonzero(works["merge"] >= 0)
    order = parts[np.lexsort((works["kv_begin"][parts], works["merge"][parts]))]
    assert (np.bincount(works["merge"][order], minlength=plan.num_merges) == np.diff(indptr)).all()
    assert (works["out"][order] == slots).all(), "a merge lists other partials than its works write"
    for name in ("row_begin", "num_rows", "kv_head_begin", "num_kv_heads"):
        assert (works[name][order] == plan.merges[name][works["merge"][order]]).all(), (
            "a partial of other rows or heads"
        )
    by_row = order[np.argsort(works["out"][order])]
    size = works["num_rows"][by_row].astype(np.int64) * works["num_kv_heads"][by_row]
    ends = works["out"][by_row] + size
    assert (works["out"][by_row][1:] >= ends[:-1]).all(), "partials overlap"
    assert (ends <= plan.num_partial_rows).all()
    assert plan.num_partial_rows == size.sum()
    merged = {(int(m["row_begin"]), h) for m in plan.merges for h in range(m["kv_head_begin"], sum(m.item()[2:]))}
    assert len(merged) == plan.merges["num_kv_heads"].sum(), "rows are merged twice"

"""What every plan must hold, checked from its lengths alone: each visible key computed once, each split row merged once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..schedule import Plan


def visible_ranges(
    plan: Plan, request: int, row_begin: int, num_rows: int, kv_list: int | None = None
) -> list[tuple[int, int]]:
    """Keys [begin, end) that some row of a tile sees: sinks and others, where they lie apart; [(0, 0)] if none. Rows are packed rows
    within the request; `kv_list` where it is not the request's."""
    qo_len = int(plan.qo_indptr[request + 1] - plan.qo_indptr[request])
    kv_len = int(plan.kv_len[request if kv_list is None else kv_list])
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
    rows are disjoint and within num_partial_rows. CTAs, loads, makespan and offsets agree with each other. A work with rows of several
    requests has keys that all of them see; that they are the same keys only the caller knows (:func:`check_levels`).
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
    assert plan.num_kv_lists in (plan.num_requests, plan.num_requests * plan.num_kv_heads)
    if plan.has_head_lists:
        assert (works["num_kv_heads"] == 1).all(), "a work of several heads, whose keys are not the same"
        assert (works["kv_list"] % plan.num_kv_heads == works["kv_head_begin"]).all(), "keys of another head"
        assert plan.num_shared_works == 0
    assert ((works["out"] < 0) == (works["merge"] < 0)).all()
    assert (works["merge_tiles"][works["merge"] < 0] == 0).all()
    assert (np.sort(plan.token_order) == np.arange(plan.num_tokens)).all(), "tokens are skipped or repeated"
    # What shared rows leave for a last tile may be one request's: by its positions it is a shared work, but for a request at their end.
    shared = sum(_is_shared(plan, work) for work in works)
    merging = int((works["merge_tiles"] > 0).sum())
    assert shared <= plan.num_shared_works <= merging and (shared > 0) == (plan.num_shared_works > 0) == (merging > 0)
    parts = _Parts(plan)
    _check_cover(plan, parts)
    _check_merges(plan, parts)


def check_levels(plan: Plan, levels: Iterable[Iterable[tuple[Any, int]]]) -> None:
    """Raise AssertionError where a plan reads keys for a request that are not the request's, by what `levels` says it shares."""
    groups = [(set(requests), num_keys) for level in levels for requests, num_keys in level]
    for work in plan.works:
        requests = set(plan.requests_of(work).tolist()) | {int(work["kv_list"])}
        assert len(requests) == 1 or any(requests <= group and work["kv_end"] <= keys for group, keys in groups)


def _position(plan: Plan, row: int) -> int:
    """Of a packed row's token in its request."""
    token = int(plan.token_order[row // plan.group_size])
    request = int(np.searchsorted(plan.qo_indptr, token, side="right")) - 1
    return int(plan.kv_len[request] - (plan.qo_indptr[request + 1] - token))


def _is_shared(plan: Plan, work: Any) -> bool:
    """Whether a work's rows are of several requests, or what such rows left for the last tile: then their position is said to be where
    the keys end."""
    if work["merge_tiles"] == 0:
        return False
    return len(plan.requests_of(work)) > 1 or work["qo_pos_base"] < _position(plan, int(work["row_begin"]))


class _Parts:
    """Works taken apart: an entry for each row tile and head, sorted by tile, head and key. Tiles are rows that no work divides."""

    def __init__(self, plan: Plan) -> None:
        works = plan.works
        self.bounds = np.unique(np.append(works["row_begin"], plan.num_tokens * plan.group_size))
        first = np.searchsorted(self.bounds, works["row_begin"])
        last = np.searchsorted(self.bounds, works["row_begin"] + works["num_rows"])
        assert last.max(initial=0) < len(self.bounds), "rows beyond the last"
        assert (self.bounds[last] == works["row_begin"] + works["num_rows"]).all(), "works that overlap in part"
        assert (last - first == np.maximum(works["merge_tiles"], 1)).all(), "a work of other tiles than it merges"
        count = (last - first) * works["num_kv_heads"]
        self.work = np.repeat(np.arange(len(works)), count)
        n = np.arange(len(self.work)) - np.repeat(np.cumsum(count) - count, count)
        self.head_in_work = n % works["num_kv_heads"][self.work]
        self.tile_in_work = n // works["num_kv_heads"][self.work]
        self.head = self.head_in_work + works["kv_head_begin"][self.work]
        self.tile = self.tile_in_work + first[self.work]
        order = np.lexsort((works["kv_begin"][self.work], self.head, self.tile))
        for name in ("work", "head_in_work", "tile_in_work", "head", "tile"):
            setattr(self, name, getattr(self, name)[order])
        self.begin, self.end = works["kv_begin"][self.work], works["kv_end"][self.work]
        self.starts = np.ones(len(self.work), bool)  # a new (tile, head) starts here
        self.starts[1:] = (self.tile[1:] != self.tile[:-1]) | (self.head[1:] != self.head[:-1])
        self.several = ~self.starts  # there are other parts of the same tile and head
        self.several[:-1] |= ~self.starts[1:]


def _check_cover(plan: Plan, parts: _Parts) -> None:
    """Tiles partition the packed rows; of each tile and head, works partition the visible keys."""
    works, begin, end = plan.works, parts.begin, parts.end
    gaps = np.flatnonzero(~parts.starts)
    gaps = gaps[begin[gaps] != end[gaps - 1]]
    gaps_of = np.bincount(np.cumsum(parts.starts)[gaps] - 1, minlength=int(parts.starts.sum()))  # by (tile, head)
    assert (parts.several == (works["merge"][parts.work] >= 0)).all(), (
        "a split row without a merge, or a merge of one partial"
    )
    assert (begin[parts.several] < end[parts.several]).all(), "an empty piece"

    at = np.flatnonzero(parts.starts)
    last = np.append(at[1:], len(parts.work)) - 1
    num_tiles = len(parts.bounds) - 1
    assert parts.bounds[0] == 0 and len(at) == num_tiles * plan.num_kv_heads, "rows are skipped, or a head is missing"
    assert (parts.head[at].reshape(-1, plan.num_kv_heads) == np.arange(plan.num_kv_heads)).all(), "a head is missing"
    for t in range(num_tiles):
        row, num_rows = int(parts.bounds[t]), int(parts.bounds[t + 1] - parts.bounds[t])
        slots = slice(row // plan.group_size, (row + num_rows - 1) // plan.group_size + 1)
        tokens = plan.token_order[slots]
        request = int(np.searchsorted(plan.qo_indptr, tokens[0], side="right")) - 1
        assert (np.diff(tokens) == 1).all() and tokens[-1] < plan.qo_indptr[request + 1], (
            "a tile holds rows of another request"
        )
        local = int(tokens[0] - plan.qo_indptr[request]) * plan.group_size + row % plan.group_size
        for head in range(plan.num_kv_heads) if plan.has_head_lists else [None]:
            _check_tile(plan, parts, (at, last, gaps, gaps_of), t, request, local, num_rows, head)


def _check_tile(
    plan: Plan, parts: _Parts, ends: Any, t: int, request: int, local: int, num_rows: int, head: int | None
) -> None:
    """The keys of a tile's works, from `local` of the request's rows on; of one head, or of all, that see the same (None)."""
    at, last, gaps, gaps_of = ends
    works, begin, end = plan.works, parts.begin, parts.end
    kv_list = request if head is None else request * plan.num_kv_heads + head
    expected = visible_ranges(plan, request, local, num_rows, kv_list)
    first_head, num_heads = (0, plan.num_kv_heads) if head is None else (head, 1)
    heads = slice(t * plan.num_kv_heads + first_head, t * plan.num_kv_heads + first_head + num_heads)
    assert (begin[at[heads]] == expected[0][0]).all() and (end[last[heads]] == expected[-1][1]).all(), (
        "keys outside the band"
    )
    assert (gaps_of[heads] == len(expected) - 1).all(), "keys are skipped or computed twice"
    inside = gaps[(gaps >= at[heads.start]) & (gaps <= last[heads.stop - 1])] if len(expected) > 1 else gaps[:0]
    assert (end[inside - 1] == expected[0][1]).all() and (begin[inside] == expected[-1][0]).all(), (
        "keys outside the band"
    )
    mine = np.unique(parts.work[at[heads.start] : last[heads.stop - 1] + 1])
    position = int(plan.kv_len[kv_list] - (plan.qo_indptr[request + 1] - plan.qo_indptr[request]))
    for work in works[mine]:
        if _is_shared(plan, work):  # all of them see its keys
            most = max(position, 0 if plan.band.window_right >= 0 else plan.kv_len[request])
            assert work["kv_end"] <= work["qo_pos_base"] <= most
        else:
            assert work["kv_list"] == kv_list and work["qo_pos_base"] == position + local // plan.group_size


def _check_merges(plan: Plan, parts: _Parts) -> None:
    """Each merge lists the partials of its rows by ascending key; partial rows are disjoint."""
    works, slots, indptr = plan.works, plan.merge_slots, plan.merge_indptr
    assert indptr[0] == 0 and indptr[-1] == len(slots) and len(indptr) == plan.num_merges + 1
    of = np.flatnonzero(parts.several)
    work = works[parts.work[of]]
    is_shared = work["merge_tiles"] > 0
    index = work["merge"] + np.where(is_shared, parts.tile_in_work[of] * plan.num_kv_heads + parts.head_in_work[of], 0)
    assert (index >= 0).all() and (index < plan.num_merges).all()
    merge = plan.merges[index]
    tile = parts.tile[of]
    assert (merge["row_begin"] == parts.bounds[tile]).all() and (
        merge["num_rows"] == parts.bounds[tile + 1] - parts.bounds[tile]
    ).all(), "a partial of other rows"
    head = parts.head[of] - merge["kv_head_begin"]
    assert (head >= 0).all() and (head < merge["num_kv_heads"]).all(), "a partial of other heads"
    assert (merge["num_kv_heads"] == np.where(is_shared, 1, work["num_kv_heads"])).all(), "a partial of other heads"
    slot = work["out"] + parts.head_in_work[of] * work["num_rows"] + parts.bounds[tile] - work["row_begin"]
    # What a merge finds for each of its heads: its slots, in order.
    order = np.lexsort((parts.begin[of], head, index))
    ends = np.flatnonzero(np.diff(index[order] * np.int64(plan.num_kv_heads) + head[order], append=-1) != 0) + 1
    begins = np.append(0, ends)[:-1]
    assert len(ends) == plan.merges["num_kv_heads"].sum(), "a merge of rows that are not split"
    for b, e in zip(begins.tolist(), ends.tolist(), strict=True):
        m, h = int(index[order[b]]), int(head[order[b]])
        assert (slot[order[b:e]] == slots[indptr[m] : indptr[m + 1]] + h * plan.merges["num_rows"][m]).all() and (
            e - b == indptr[m + 1] - indptr[m]
        ), "a merge lists other partials than its works write"
    partial = np.flatnonzero(works["merge"] >= 0)
    by_row = partial[np.argsort(works["out"][partial])]
    size = works["num_rows"][by_row].astype(np.int64) * works["num_kv_heads"][by_row]
    ends_of = works["out"][by_row] + size
    assert (works["out"][by_row][1:] >= ends_of[:-1]).all(), "partials overlap"
    assert (ends_of <= plan.num_partial_rows).all()
    assert plan.num_partial_rows == size.sum()
    merged = {(int(m["row_begin"]), h) for m in plan.merges for h in range(m["kv_head_begin"], sum(m.item()[2:]))}
    assert len(merged) == plan.merges["num_kv_heads"].sum(), "rows are merged twice"

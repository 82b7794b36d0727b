"""Shared keys in the planner in plain Python: what levels.cc and forest.cc in cuda_src/tvm_infer/schedule do, without checks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..band import Band
    from .reference import Item, TileClass


class Run(NamedTuple):
    """Requests ``order[begin:end]`` have the keys [0, kv_end) in common."""

    begin: int
    end: int
    kv_end: int


def runs_of(levels: Iterable[Iterable[tuple[Any, int]]], num_requests: int) -> tuple[list[int], list[Run]]:
    """An order with the requests of every group side by side, and the groups in it; outer ones first."""
    groups = [([int(r) for r in requests], int(keys)) for level in levels for requests, keys in level]
    # A group stands where its smallest request does.
    places = {r: [min(requests) for requests, _ in groups if r in requests] + [r] for r in range(num_requests)}
    order = sorted(range(num_requests), key=places.__getitem__)
    place = {r: i for i, r in enumerate(order)}
    runs = [
        Run(min(p), max(p) + 1, keys) for p, keys in (([place[r] for r in rs], k) for rs, k in groups) if len(p) > 1
    ]
    return order, sorted(runs, key=lambda run: (run.begin, -run.end, run.kv_end))


@dataclass
class Tile:
    """A row tile of a request, rows as in the plan's row index."""

    item: Item
    kv_len: int
    place: int
    merge: int = -1


@dataclass
class Forest:
    """Items of a plan with shared works, those first; `merge_price` is of merges as of any, one KV head, and `reread_cost` of the
    shared keys that a flat plan's works of the narrowest class read after another has."""

    items: list[Item]
    num_shared: int
    num_levels: int
    tiles: list[tuple[int, int]]  # rows of the tiles that merge: first, number
    order: list[int]
    flat_cost: int
    merge_price: int
    reread_cost: int


def make_forest(
    order: list[int],
    runs: list[Run],
    qo_indptr: Sequence[int],
    kv_len: Sequence[int],
    group: int,
    band: Band,
    classes: list[TileClass],
) -> Forest | None:
    """Items where keys are read once if that pays; None if it does nowhere."""
    from .reference import Item, class_of, make_items

    tiles: list[Tile] = []
    row = 0
    for place, r in enumerate(order):
        qo_len = qo_indptr[r + 1] - qo_indptr[r]
        for item in make_items([0, qo_len], [kv_len[r]], group, band, 0, classes):
            moved = item._replace(kv_list=r, row_begin=item.row_begin + row, tile=len(tiles))
            tiles.append(Tile(moved, kv_len[r], place))
        row += qo_len * group
    within = [[t for t in tiles if run.begin <= t.place < run.end] for run in runs]
    around = [
        [j for j, outer in enumerate(runs[:k]) if outer.end >= run.end > outer.begin] for k, run in enumerate(runs)
    ]

    def most(t: Tile) -> int:
        """Keys of a tile that may be shared: all its request's rows see them, and one is left."""
        return kv_len[t.item.kv_list] - (
            qo_indptr[t.item.kv_list + 1] - qo_indptr[t.item.kv_list] if band.window_right >= 0 else 1
        )

    kv_end = [min([run.kv_end, *(most(t) for t in ts)]) for run, ts in zip(runs, within, strict=True)]

    def pack(ts: list[Tile], max_rows: int) -> list[list[Tile]]:
        """Tiles side by side that fit a tile of so many rows."""
        packed: list[list[Tile]] = []
        for t in ts:
            if packed and sum(x.item.num_rows for x in packed[-1]) + t.item.num_rows <= max_rows:
                packed[-1].append(t)
            else:
                packed.append([t])
        return packed

    def rows_of(ts: list[Tile]) -> int:
        return sum(t.item.num_rows for t in ts)

    def price(t: Tile) -> int:
        return classes[t.item.tile_class].merge_price(t.item.num_rows)

    # Innermost runs first: what reads a run's keys otherwise are the used runs in it and the tiles beside these.
    used: dict[int, list[list[Tile]]] = {}
    reader_cost = [classes[t.item.tile_class].kv for t in tiles]  # of a key, summed up at the first tile of a used run
    for k in reversed(range(len(runs))):
        numbers = [t.item.tile for t in within[k]]
        num_keys = kv_end[k] - (kv_end[around[k][-1]] if around[k] else 0)
        best = sum(reader_cost[n] for n in numbers) * num_keys - sum(map(price, within[k]))
        for max_rows in reversed([c.rows for c in classes]):
            packed = pack(within[k], max_rows)
            shared = [classes[class_of(classes, rows_of(ts))] for ts in packed]
            key_cost = sum(c.kv for c in shared)
            overhead = sum(c.fixed + c.row * rows_of(ts) for c, ts in zip(shared, packed, strict=True))
            if key_cost * num_keys + overhead < best:
                best = key_cost * num_keys + overhead
                used[k] = packed
        for n in numbers if k in used else []:
            key_cost = sum(classes[class_of(classes, rows_of(ts))].kv for ts in used[k])
            reader_cost[n] = key_cost if n == numbers[0] else 0
    if not used:
        return None

    own_begin = {t.item.tile: max([0, *(kv_end[k] for k in used if t in within[k])]) for t in tiles}
    merging = [t for t in tiles if any(t in within[k] for k in used)]
    for n, t in enumerate(merging):
        t.merge = n
    items: list[Item] = []
    for k in sorted(used):
        begin = max([0, *(kv_end[j] for j in around[k] if j in used)])
        for ts in used[k]:
            c, rows = class_of(classes, rows_of(ts)), rows_of(ts)
            overhead, first = classes[c].fixed + classes[c].row * rows, ts[0].item
            keys = (begin, kv_end[k], kv_end[k], overhead, len(items))
            items.append(
                Item(first.kv_list, c, first.row_begin, rows, *keys, merge_tile=ts[0].merge, merge_tiles=len(ts))
            )
    num_shared = len(items)
    reread = sum(own_begin[t.item.tile] for t in merging if t.item.tile_class == 0)
    for k in used:
        if within[k][0].item.tile_class == 0:
            reread -= kv_end[k] - max([0, *(kv_end[j] for j in around[k] if j in used)])
    for t in tiles:
        own = t.item._replace(kv_begin=own_begin[t.item.tile], tile=len(items), merge_tile=t.merge)
        items.append(own._replace(merge_tiles=int(t.merge >= 0)))
    return Forest(
        items,
        num_shared,
        max(sum(t in within[k] for k in used) for t in merging),
        [(t.item.row_begin, t.item.num_rows) for t in merging],
        order,
        sum(t.item.cost(classes[t.item.tile_class]) for t in tiles),
        sum(map(price, merging)),
        max(0, reread) * classes[0].kv,
    )

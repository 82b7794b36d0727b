"""The planner again, in plain Python: what cuda_src/tvm_infer/schedule does, to the byte. For reading and for tests, not for speed.

Section 3.3.1, Algorithm 1 of arXiv 2501.01005, with runs of KV heads and with KV cut only where that shortens the makespan.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..band import Band
from . import plan as fmt
from .reference_forest import Forest, make_forest, runs_of

_CAUSAL = Band(window_right=0)
_RUN_CUTS_PER_CTA = 8  # a run of heads ends at a full CTA only while the CTA has more than target / 2**8 left
_RUNS_PER_TARGET = 4  # under a fixed split size a run of heads costs at most a quarter of the target
_MAX_SLACK_FRACTION = 64  # the target without cuts exceeds the mean load by no more than 1/64
_MIN_GAIN_FRACTION = 128  # cutting must gain 1/128 of the mean load and what a merge costs
_MIN_SHARED_GAIN_FRACTION = 16  # shared works must gain 1/16 of the makespan and what their merges cost


class TileClass(NamedTuple):
    """See plan.h."""

    rows: int
    kv_granule: int
    fixed: int
    row: int
    kv: int

    def merge_price(self, num_rows: int) -> int:
        """What merging the pieces of a work costs; rows beyond 16 cost 60 ns each."""
        return self.fixed // 2 + 60_000 * max(0, num_rows - 16)

    def cost(self, overhead: int, num_keys: int) -> int:
        """Of one work and KV head; its last tile of keys is computed whole."""
        return max(1, overhead + self.kv * -(-num_keys // self.kv_granule) * self.kv_granule)


class SharedMergeCost(NamedTuple):
    """See tile_costs.h."""

    each: int
    once: int
    again: int


class Item(NamedTuple):
    """A row tile with the keys it sees, or a piece of these keys. It stands for all KV heads, which cost the same, or is of one head
    with a list of keys of its own. Rows are of one request, or of several that share the keys."""

    kv_list: int  # the request's, or where each KV head has its own that of `head`
    tile_class: int
    row_begin: int
    num_rows: int
    kv_begin: int
    kv_end: int
    position: int  # of the first row's token
    overhead: int  # cost before the first key
    tile: int  # items of one tile have the same number
    sink: int = 0  # keys [0, sink) are the item's too, in a work apart
    merge_tile: int = (
        -1
    )  # of an item of shared keys, or beside such: its first tile that merges, and how many there are
    merge_tiles: int = 0
    head: int = 0  # its first KV head

    def sink_cost(self, tile_class: TileClass) -> int:
        return tile_class.cost(self.overhead, self.sink) if self.sink else 0

    def cost(self, tile_class: TileClass) -> int:
        return tile_class.cost(self.overhead, self.kv_end - self.kv_begin) + self.sink_cost(tile_class)


class Placed(NamedTuple):
    """A run of KV heads of an item on a CTA: a Work."""

    item: int
    cta: int
    head: int
    num_heads: int
    kv_begin: int
    kv_end: int
    out: int = -1
    merge: int = -1


@dataclass
class Layout:
    """Who computes what."""

    load: list[int]
    placed: list[Placed] = field(default_factory=list)
    merges: list[tuple[int, int, int, int, list[int]]] = field(default_factory=list)  # row, rows, head, heads, slots
    partial_rows: int = 0


def keys_seen(band: Band, first: int, last: int, kv: int) -> list[tuple[int, int]]:
    """Ranges of keys that some of the rows at positions first … last see: (0, 0) if none, else sinks first where they lie apart."""
    begin = 0 if band.window_left < 0 else max(0, first - band.window_left)
    end = kv if band.window_right < 0 else min(kv, last + band.window_right + 1)
    sink = min(band.num_sink, end)
    if band.chunk > 0:
        begin = max(begin, first // band.chunk * band.chunk)
        end = min(end, (last // band.chunk + 1) * band.chunk)
    if begin >= end:  # sees nothing: one work that writes O = 0, LSE = -inf
        return [(0, 0)]
    if sink >= begin:
        return [(0, max(sink, end))]
    return [(0, sink), (begin, end)] if sink > 0 else [(begin, end)]


def cut_at(fixed: int, begin: int, end: int) -> list[tuple[int, int]]:
    """A range of keys, cut at the multiples of a fixed split size."""
    cuts = [k for k in range(0, end, fixed) if begin < k]
    return list(zip([begin, *cuts], [*cuts, end], strict=True))


def class_of(classes: list[TileClass], num_rows: int) -> int:
    """The first class that holds so many rows, else the last."""
    return next((i for i, t in enumerate(classes) if t.rows >= num_rows), len(classes) - 1)


def make_items(
    qo_indptr: Any, kv_len: Any, group: int, band: Band, fixed: int, classes: list[TileClass], lists: int = 1
) -> list[Item]:
    """Row tiles of every request, in order; with a fixed split size, their pieces. Of each of the request's `lists` of keys."""
    items: list[Item] = []
    tile = 0
    for kv_list, kv in enumerate(kv_len):
        r, head = divmod(kv_list, lists)
        qo_len = qo_indptr[r + 1] - qo_indptr[r]
        num_rows = qo_len * group
        c = class_of(classes, num_rows)
        for row in range(0, num_rows, classes[c].rows):
            rows = min(classes[c].rows, num_rows - row)
            first, last = kv - qo_len + row // group, kv - qo_len + (row + rows - 1) // group
            overhead = classes[c].fixed + classes[c].row * rows
            ranges = keys_seen(band, first, last, kv)
            if fixed > 0:
                parts = [(b, e, 0) for keys in ranges for b, e in cut_at(fixed, *keys)]
            else:
                parts = [(*ranges[-1], ranges[0][1] if len(ranges) == 2 else 0)]
            for b, e, sink in parts:
                row_begin = qo_indptr[r] * group + row
                items.append(Item(kv_list, c, row_begin, rows, b, e, first, overhead, tile, sink, head=head))
            tile += 1
    return items


def lay(
    items: list[Item],
    order: list[int],
    classes: list[TileClass],
    heads: int,
    num_ctas: int,
    target: int,
    may_cut: bool,
) -> Layout | None:
    """Lay items onto CTAs, longest first, so that no CTA is loaded much above the target; None if it is too low for cuts."""
    out = Layout([0] * num_ctas)
    costs = [item.cost(classes[item.tile_class]) for item in items]
    filled = [0] * num_ctas  # load, or the target where the CTA takes nothing more
    max_load = target + max(costs, default=0) * heads
    shift = max(0, max_load.bit_length() - 63 + (num_ctas - 1).bit_length())
    first_merge = max((i.merge_tile + i.merge_tiles for i in items if i.merge_tiles), default=0) * heads
    heap = [(0, cta) for cta in range(num_ctas)]  # the least loaded CTA is the only one that ever changes

    def put(i: int, head: int, n: int, parts: list[tuple[int, int, int, int]], cost: int) -> None:
        """Works of a run of heads, (kv_begin, kv_end, out, merge) each, onto the least loaded CTA."""
        cta = heap[0][1]
        out.placed += [Placed(i, cta, head, n, *part) for part in parts]
        out.load[cta] += n * cost
        _, end, out_row, _ = parts[-1]
        is_cut_short = may_cut and out_row >= 0 and end < items[i].kv_end
        filled[cta] = target if is_cut_short else filled[cta] + n * cost
        heapq.heapreplace(heap, (filled[cta] >> shift, cta))

    def partials(
        i: int, head: int, n: int, ranges: list[tuple[int, int]], slots: list[int]
    ) -> list[tuple[int, int, int, int]]:
        """Parts of the next merge, in ascending order of keys; or of the merges of tiles that share keys."""
        tile, parts = items[i].merge_tile, []
        merge = len(out.merges) + first_merge if tile < 0 else tile * heads + head
        for keys in ranges:
            slots.append(out.partial_rows)
            parts.append((*keys, out.partial_rows, merge))
            out.partial_rows += n * items[i].num_rows
        return parts

    def end_merge(i: int, head: int, n: int, slots: list[int]) -> None:
        if items[i].merge_tile < 0:
            out.merges.append((items[i].row_begin, items[i].num_rows, items[i].head + head, n, slots))

    # Tiles cut at a fixed size: all pieces have the same runs of heads, and their partial rows and merges are known beforehand.
    pieces: dict[int, list[int]] = {}
    for i, item in enumerate(items):
        pieces.setdefault(item.tile, []).append(i)
    runs: dict[int, tuple[int, int, int]] = {}
    for tile, members in pieces.items():
        if len(members) == 1:
            continue
        run = min(heads, max(1, target // (_RUNS_PER_TARGET * max(costs[i] for i in members))))
        runs[tile] = (run, len(out.merges), out.partial_rows)
        row, rows = items[members[0]].row_begin, items[members[0]].num_rows
        for head in range(0, heads, run):
            rows_of = [out.partial_rows + (i * heads + head) * rows for i in range(len(members))]
            out.merges.append((row, rows, items[members[0]].head + head, min(run, heads - head), rows_of))
        out.partial_rows += len(members) * heads * rows

    def cut_head(i: int, head: int) -> bool:
        item = items[i]
        tile_class = classes[item.tile_class]
        granule, granule_cost = tile_class.kv_granule, tile_class.kv * tile_class.kv_granule
        sink_cost, sinks = item.sink_cost(tile_class), [(0, item.sink)] if item.sink else []
        begin, is_last = item.kv_begin, False
        slots: list[int] = []
        while not is_last:
            room = target - filled[heap[0][1]] - sink_cost
            end = item.kv_end
            is_last = tile_class.cost(item.overhead, end - begin) <= room
            if not is_last:  # as many granules as fit, leaving at least one for the next piece
                fit = max(0, room - item.overhead) // granule_cost * granule
                end = min(begin + fit, end - granule) // granule * granule
                if end < begin + granule:
                    return False
            cost = tile_class.cost(item.overhead, end - begin) + sink_cost
            put(i, head, 1, partials(i, head, 1, [*sinks, (begin, end)], slots), cost)
            begin, sink_cost, sinks = end, 0, []  # sinks go with the first piece
        end_merge(i, head, 1, slots)
        return True

    for i in order:
        item, cost, head = items[i], costs[i], 0
        if item.tile in runs:
            run, first_merge, first_row = runs[item.tile]
            piece = i - pieces[item.tile][0]
            for h in range(0, heads, run):
                row = first_row + (piece * heads + h) * item.num_rows
                n = min(run, heads - h)
                put(i, h, n, [(item.kv_begin, item.kv_end, row, first_merge + h // run)], cost)
            continue
        while head < heads:
            room = target - filled[heap[0][1]]
            n = heads - head
            if n * cost > room:
                if cost > room and may_cut:
                    if not cut_head(i, head):
                        return None
                    head += 1
                    continue
                # heads that fit, and one on top where none does or where hardly any room is left
                n = room // cost + (room <= target >> _RUN_CUTS_PER_CTA) if cost <= room else 1
            if item.sink or item.merge_tiles:
                of_run: list[int] = []
                ranges = [*([(0, item.sink)] if item.sink else []), (item.kv_begin, item.kv_end)]
                put(i, head, n, partials(i, head, n, ranges, of_run), cost)
                end_merge(i, head, n, of_run)
            else:
                put(i, head, n, [(item.kv_begin, item.kv_end, -1, -1)], cost)
            head += n
    return out


def regular_target(
    items: list[Item], longest: Item, classes: list[TileClass], heads: int, num_ctas: int, mean: int, limit: int
) -> int:
    """The lowest target, in granules of the longest item, at which cutting all heads alike needs one piece a CTA at most."""
    step = classes[longest.tile_class].kv * classes[longest.tile_class].kv_granule

    def is_enough(target: int) -> bool:
        pieces = 0
        for item in items:
            t = classes[item.tile_class]
            if item.cost(t) <= target:
                pieces += 1
                continue
            room, granule_cost = target - item.overhead, t.kv * t.kv_granule
            fit = room // granule_cost * t.kv_granule
            first_fit = (room - item.sink_cost(t)) // granule_cost * t.kv_granule  # beside the sinks
            if first_fit < 1:
                return False
            pieces += 1 - (-(item.kv_end - item.kv_begin - first_fit) // fit)
        return pieces * heads <= num_ctas

    overhead = longest.overhead + longest.sink_cost(classes[longest.tile_class])
    low, high = max(1, -((overhead - mean) // step)), (limit - overhead) // step + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(overhead + middle * step) else (middle + 1, high)
    return min(limit, overhead + low * step)


def choose(
    items: list[Item],
    classes: list[TileClass],
    heads: int,
    num_ctas: int,
    fixed: int,
    is_unaligned: bool,
) -> Layout:
    """The layout without cuts, unless one with cuts is shorter by more than a merge costs.

    is_unaligned : keys may begin between granules: behind a window's begin, or shared ones.
    """
    costs = [item.cost(classes[item.tile_class]) for item in items]
    shift = max(0, max(costs, default=0).bit_length() - 16)  # costs are compared by 16 bits
    order = sorted(range(len(items)), key=lambda i: (-(costs[i] >> shift), i))
    mean = max(1, -(-sum(costs) * heads // num_ctas))
    used = [classes[c] for c in {item.tile_class for item in items}]
    overhead = max((item.overhead + item.sink_cost(classes[item.tile_class]) for item in items), default=0)
    granule = max((t.kv * t.kv_granule for t in used), default=0)
    slack = overhead + granule
    whole = lay(items, order, classes, heads, num_ctas, mean + min(slack, mean // _MAX_SLACK_FRACTION), False)
    assert whole is not None
    # An item that shares keys merges anyway: a piece more costs little.
    prices = [classes[i.tile_class].merge_price(0 if i.merge_tiles else i.num_rows) for i in items]
    min_gain = max(prices, default=0) + mean // _MIN_GAIN_FRACTION
    if fixed != 0 or num_ctas == 1 or max(whole.load) <= mean + min_gain:
        return whole
    enough = mean + overhead + (3 if is_unaligned else 2) * granule
    targets = [mean + slack, enough]
    if len(items) * heads <= 2 * num_ctas:
        targets.append(mean + overhead + granule // 2)
    if len(items) * heads <= num_ctas:
        targets.append(regular_target(items, items[order[0]], classes, heads, num_ctas, mean, enough))
    targets.sort()
    if max(whole.load) <= targets[0] + min_gain:
        return whole
    cut = next(filter(None, (lay(items, order, classes, heads, num_ctas, target, True) for target in targets)))
    return cut if max(cut.load) + min_gain < max(whole.load) else whole


def choose_shared(
    forest: Forest, flat: Layout, classes: list[TileClass], price: SharedMergeCost, heads: int, num_ctas: int
) -> tuple[list[Item], Layout] | None:
    """The layout with shared works, if it is shorter than the flat one by more than its merges cost."""
    layout = choose(forest.items, classes, heads, num_ctas, 0, True)
    merges = -(-(forest.merge_price + price.each * len(forest.tiles)) * heads // num_ctas) + price.once
    saved = -(-(forest.reread_cost // 1000 * (1000 - price.again) * heads) // num_ctas)
    makespan = max(flat.load) - saved
    limit = makespan - makespan // _MIN_SHARED_GAIN_FRACTION - merges
    return (forest.items, layout) if max(layout.load) < limit else None


def tree_merges(forest: Forest, layout: Layout, heads: int) -> list[tuple[int, int, int, int, list[int]]]:
    """Merges of the tiles that share keys: of one head each, partials in the order of items."""
    slots: dict[tuple[int, int], list[int]] = {(t, h): [] for t in range(len(forest.tiles)) for h in range(heads)}
    for w in sorted(layout.placed, key=lambda w: w.item):  # stable: heads and keys of an item ascend
        item = forest.items[w.item]
        for t in range(item.merge_tile, item.merge_tile + item.merge_tiles):
            row = forest.tiles[t][0] - item.row_begin
            for h in range(w.num_heads):
                slots[t, w.head + h].append(w.out + h * item.num_rows + row)
    return [(*forest.tiles[t], h, 1, slots[t, h]) for t, h in slots]


def capture_key(
    num_ctas: int, num_qo_heads: int, num_kv_heads: int, band: Band, fixed: int, classes: list[TileClass]
) -> int:
    """The digest of everything but lengths: splitmix64's finaliser over a running state."""
    mask, key = 2**64 - 1, 0
    scalars = [fmt.PLAN_VERSION, num_ctas, num_qo_heads, num_kv_heads, *band, fixed, len(classes)]
    for value in [*scalars, *(v for t in classes for v in t)]:
        z = (key + 0x9E3779B97F4A7C15 + value) & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        key = z ^ (z >> 31)
    return key


def plan(
    qo_indptr: Any,
    kv_len: Any,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    num_ctas: int,
    tile_table: Any,
    band: Band = _CAUSAL,
    fixed_split_size: int = 0,
    levels: Any = (),
) -> np.ndarray:
    """The plan of a batch as int32 words, exactly its bytes_used. Arguments as in :func:`tvm_infer.plan`; they are not checked.

    tile_table : five integers per class: rows, kv_granule, fixed, row, kv; with levels three more, a SharedMergeCost.
    """
    has_head_lists = np.ndim(kv_len) == 2
    qo_indptr, kv_len = [int(x) for x in qo_indptr], [int(x) for x in np.ravel(kv_len)]
    values = [int(v) for v in tile_table]
    classes = [TileClass(*values[i : i + 5]) for i in range(0, len(values) - 4, 5)]
    group = num_qo_heads // num_kv_heads
    lists, item_heads = (num_kv_heads, 1) if has_head_lists else (1, num_kv_heads)
    items = make_items(qo_indptr, kv_len, group, band, fixed_split_size, classes, lists)
    is_unaligned = band.window_left >= 0 or band.chunk > 0
    layout = choose(items, classes, item_heads, num_ctas, fixed_split_size, is_unaligned)
    order, runs = runs_of(levels, len(qo_indptr) - 1)
    forest = make_forest(order, runs, qo_indptr, kv_len, group, band, classes) if runs else None
    if forest is not None:
        price = SharedMergeCost(*values[5 * len(classes) :])
        shared = choose_shared(forest, layout, classes, price, num_kv_heads, num_ctas)
        forest = forest if shared is not None else None
        items, layout = shared or (items, layout)
    merges = [*(tree_merges(forest, layout, num_kv_heads) if forest is not None else []), *layout.merges]
    tokens = [t for r in order for t in range(qo_indptr[r], qo_indptr[r + 1])] if forest is not None else []
    if tokens == list(range(len(tokens))):
        tokens = []

    # Works of a CTA in the order of items, and of one item in the order they were placed.
    placed = sorted(layout.placed, key=lambda w: (w.cta, w.item))
    works = []
    for w in placed:
        i = items[w.item]
        rows, heads, keys = (
            (i.row_begin, i.num_rows),
            (i.head + w.head, w.num_heads),
            (i.kv_list, w.kv_begin, w.kv_end, i.merge_tiles),
        )
        works.append((*rows, *heads, *keys, i.position, i.tile_class, w.out, w.merge))
    slots = [m[4] for m in merges]
    first = {w.cta: work for w, work in zip(reversed(placed), reversed(works), strict=True)}
    arrays = {
        "first_works": np.array([first.get(c, (0,) * len(fmt.WORK.fields or ())) for c in range(num_ctas)], fmt.WORK),
        "works": np.array(works, fmt.WORK),
        "work_indptr": np.cumsum([0, *np.bincount([w.cta for w in placed], minlength=num_ctas)]).astype(np.int32),
        "merges": np.array([m[:4] for m in merges], fmt.MERGE),
        "merge_indptr": np.cumsum([0, *map(len, slots)]).astype(np.int32),
        "merge_slots": np.array([s for part in slots for s in part], np.int32),
        "qo_indptr": np.array(qo_indptr, np.int32),
        "kv_len": np.array(kv_len, np.int32),
        "token_order": np.array(tokens, np.int32),
        "tile_classes": np.array(classes, fmt.TILE_CLASS),
        "tickets": np.zeros(fmt.NUM_TICKETS + len(merges), np.int32),
    }
    header = np.zeros(1, fmt.HEADER)
    key = capture_key(num_ctas, num_qo_heads, num_kv_heads, band, fixed_split_size, classes)
    values_of = {
        "magic": fmt.PLAN_MAGIC,
        "version": fmt.PLAN_VERSION,
        "capture_key": key,
        "num_ctas": num_ctas,
        "num_requests": len(qo_indptr) - 1,
        "num_tokens": qo_indptr[-1],
        "num_kv_heads": num_kv_heads,
        "group_size": group,
        "num_kv_lists": len(kv_len),
        "num_works": len(works),
        "num_merges": len(merges),
        "num_merge_slots": len(arrays["merge_slots"]),
        "num_partial_rows": layout.partial_rows,
        "num_shared_works": sum(w.item < forest.num_shared for w in placed) if forest is not None else 0,
        "band_left": band.window_left if band.num_sink == 0 else -1,
        "band_right": band.window_right,
        "num_tile_classes": len(classes),
        "window_left": band.window_left,
        "num_sink": band.num_sink,
        "chunk": band.chunk,
        "makespan": max(layout.load),
        "total_cost": sum(layout.load),
        "flat_cost": forest.flat_cost * num_kv_heads if forest is not None else 0,
        "num_levels": forest.num_levels if forest is not None else 0,
        "paced_ctas": len(first) if len(classes) > 1 and all(items[w.item].tile_class == 0 for w in placed) else 0,
    }
    words = bytearray(header.nbytes)
    for name, array in arrays.items():
        if name != "first_works":  # its place is fixed
            values_of[f"{name}_offset"] = len(words) if array.size else 0
        words += array.tobytes() + bytes(-array.nbytes % 16)
    values_of["bytes_used"] = len(words)
    for name, value in values_of.items():
        header[0][name] = value
    words[: header.nbytes] = header.tobytes()
    return np.frombuffer(bytes(words), np.int32)

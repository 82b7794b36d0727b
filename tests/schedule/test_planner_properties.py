"""The planner against what any plan must hold, against the same planner in Python, and against bounds on load and size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer.schedule import Band, reference
from tvm_infer.testing.plan_checks import check_plan, visible_ranges

# rows, kv_granule, fixed, row, kv (picoseconds)
GPU = (64, 64, 1_500_000, 5_000, 15_300, 128, 128, 2_500_000, 10_000, 11_000)
CPU = (16, 16, 400_000, 1_000, 2_000, 64, 32, 900_000, 1_000, 7_000)
TABLES = [GPU, CPU, (1, 1, 0, 0, 1), (5, 3, 17, 2, 100, 7, 2, 0, 3, 9), (1 << 20, 1, 0, 0, 3), (4, 1000, 10, 0, 1)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch and everything else that a plan depends on."""

    qo_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    num_kv_heads: int = 8
    group: int = 4
    num_ctas: int = 132
    causal: bool = True
    window_left: int = -1
    fixed_split_size: int = 0
    tile_table: tuple[int, ...] = GPU
    window_right: int = -1  # where it is not causal
    num_sink: int = 0
    chunk: int = 0

    @property
    def band(self) -> Band:
        return Band(self.window_left, 0 if self.causal else self.window_right, self.num_sink, self.chunk)

    @property
    def indptr(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.qo_len)]).astype(np.int32)

    @property
    def has_end(self) -> bool:
        return self.band.window_right >= 0 or self.chunk > 0

    @property
    def has_begin(self) -> bool:
        return self.window_left >= 0 or self.chunk > 0

    def plan(self, **kwargs) -> tvm_infer.Plan:
        return tvm_infer.plan(
            self.indptr,
            np.array(self.kv_len, np.int32),
            num_qo_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=64,
            **self.band._asdict(),
            num_ctas=self.num_ctas,
            fixed_split_size=self.fixed_split_size,
            tile_table=self.tile_table,
            **kwargs,
        )

    def reference(self) -> np.ndarray:
        return reference.plan(
            self.indptr,
            self.kv_len,
            num_qo_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            num_ctas=self.num_ctas,
            band=self.band,
            fixed_split_size=self.fixed_split_size,
            tile_table=self.tile_table,
        )

    def capacity(self, requests: int = 0, tokens: int = 0, keys: int = 0) -> tvm_infer.ops.WorkspaceSize:
        """For limits above this batch by so much."""
        return tvm_infer.workspace_size(
            num_qo_heads=self.num_kv_heads * self.group,
            num_kv_heads=self.num_kv_heads,
            head_dim=64,
            max_requests=len(self.qo_len) + requests,
            max_tokens=sum(self.qo_len) + tokens,
            max_kv_tokens=sum(self.kv_len) + keys,
            **self.band._asdict(),
            num_ctas=self.num_ctas,
            fixed_split_size=self.fixed_split_size,
            tile_table=self.tile_table,
        )


@st.composite
def cases(draw, max_len=3000, max_requests=40, fixed=(0, 0, 0, -1, 1, 7, 64, 1000)):
    """Batches of decodes, prefills, appends and empty requests, under any settings."""
    causal = draw(st.booleans())
    window_left = draw(st.sampled_from([-1, -1, 0, 5, 100]))
    window_right = draw(st.sampled_from([-1, -1, 1, 9]))
    chunk = draw(st.sampled_from([0, 0, 0, 1, 7, 64, 500]))
    num_sink = draw(st.sampled_from([0, 0, 1, 4, 70])) if window_left >= 0 or chunk else 0
    has_end = causal or window_right >= 0 or chunk > 0
    fixed_split_size = draw(st.sampled_from(fixed))
    longest = draw(st.sampled_from([4, 70, max_len]))
    if 0 < fixed_split_size < 10:
        longest = min(longest, 70)
    lengths = st.integers(0, longest)
    qo_lens = st.one_of(st.just(1), st.just(0), st.integers(0, min(longest, 300)))
    requests = draw(st.lists(st.tuples(qo_lens, lengths), max_size=max_requests))
    qo_len = tuple(q for q, _ in requests)
    return Case(
        qo_len=qo_len,
        kv_len=tuple(q + k if has_end else k for q, k in requests),
        num_kv_heads=draw(st.sampled_from([1, 2, 3, 8])),
        group=draw(st.sampled_from([1, 3, 4, 7])),
        num_ctas=draw(st.sampled_from([1, 2, 3, 7, 16, 132])),
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        num_sink=num_sink,
        chunk=chunk,
        fixed_split_size=fixed_split_size,
        tile_table=draw(st.sampled_from(TABLES)),
    )


# One request of a million tokens (decoded, appended to, prefilled), 4096 requests, and what else should not wait for luck.
EXTREMES = {
    "decode of a million keys": Case((1,), (1_000_000,)),
    "a million tokens prefilled": Case((1_000_000,), (1_000_000,), num_kv_heads=1, group=1),
    "a million keys, window": Case((1, 64), (1_000_000, 1_000_000), window_left=4095),
    "a million keys, window and sinks": Case((1, 64, 3000), (1_000_000, 1_000_000, 5000), window_left=4095, num_sink=4),
    "one request, window and sinks": Case((1,), (1_000_000,), window_left=8191, num_sink=300),
    "sinks that touch the window": Case((1, 1, 1, 40), (104, 105, 106, 140), window_left=100, num_sink=4),
    "sinks before a chunk": Case((1, 300, 1), (8193, 9000, 20), chunk=1024, num_sink=4),
    "sinks at a fixed size": Case((1, 20, 300), (9000, 500, 7000), window_left=600, num_sink=130, fixed_split_size=64),
    "sinks at a fixed size, one piece each": Case((1,), (60,), window_left=3, num_sink=4, fixed_split_size=1000),
    "sinks, never cut": Case((1, 300), (9000, 7000), window_left=600, num_sink=130, fixed_split_size=-1),
    "chunks that are not causal": Case((1, 300), (9000, 7000), chunk=1000, causal=False),
    "windows on both sides": Case((1, 300), (9000, 7000), window_left=100, window_right=50, causal=False),
    "a million keys among short ones": Case((1,) * 300, (1_000_000, *range(1, 300))),
    "a million keys at a fixed size": Case((1, 20), (1_000_000, 500), fixed_split_size=512),
    "4096 requests": Case((1,) * 4096, tuple(range(1, 4097))),
    "4096 requests of mixed lengths": Case(tuple(i % 7 for i in range(4096)), tuple(7 + i * i % 9001 for i in range(4096))),
    "4096 empty requests": Case((0,) * 4096, (5,) * 4096),
    "no request": Case((), ()),
    "one empty request": Case((0,), (0,)),
    "no keys": Case((3, 1), (0, 0), causal=False),
    "no keys for some": Case((3, 1, 200), (0, 5000, 0), causal=False),
    "fewer keys than queries, window": Case((40,), (7,), causal=False, window_left=3),
    "one CTA": Case((1, 300), (4000, 300), num_ctas=1),
    "many CTAs": Case((1, 30), (400, 300), num_ctas=5000),
    "many heads": Case((1, 1, 9), (4000, 100, 3000), num_kv_heads=128, group=1),
    "loads beyond a key of the tournament": Case(
        (1, 1), (2**20, 2**19), num_ctas=3, tile_table=(64, 64, 2**40, 2**30, 2**34), num_kv_heads=3
    ),
}  # fmt: skip


@settings(max_examples=400)
@given(cases())
def test_every_visible_key_is_computed_once_and_every_split_row_merged_once(case):
    check_plan(case.plan())


@pytest.mark.parametrize("case", EXTREMES.values(), ids=EXTREMES)
def test_extremes(case):
    plan = case.plan()
    check_plan(plan)
    assert plan.buffer[: plan.bytes_used // 4].tobytes() == case.reference().tobytes()


@settings(max_examples=300)
@given(cases(max_len=2000, max_requests=25))
def test_cpp_equals_the_reference(case):
    plan = case.plan()
    assert plan.buffer[: plan.bytes_used // 4].tobytes() == case.reference().tobytes()


@pytest.mark.parametrize(
    "band", [{}, {"window_left": 2000, "num_sink": 4}, {"chunk": 3000}], ids=["causal", "sinks", "chunk"]
)
@pytest.mark.parametrize("num_requests", [17, 40, 64, 90, 128])
def test_cpp_equals_the_reference_on_gpu_sized_batches(num_requests, band):
    """Many heads for each CTA: here a layout with cuts starts from what the one without has in common with it."""
    rng = np.random.default_rng(num_requests)
    merges = 0
    for long_queries in (0, 0, 3):
        qo_len = np.ones(num_requests, int)
        qo_len[:long_queries] = rng.integers(2, 400, long_queries)
        kv_len = qo_len + rng.integers(1, 8192, num_requests)
        case = Case(tuple(qo_len.tolist()), tuple(kv_len.tolist()), **band)
        plan = case.plan()
        check_plan(plan)
        assert plan.buffer[: plan.bytes_used // 4].tobytes() == case.reference().tobytes()
        merges += plan.num_merges
    assert merges > 0 or num_requests > (40 if "chunk" in band else 64)


def visible_keys(band, position, key):
    """Whether the query at `position` sees `key`, broadcast: the definition of a band (plan.h, MaskBand)."""
    inside = np.ones(np.broadcast_shapes(position.shape, key.shape), bool)
    if band.window_left >= 0:
        inside &= key >= position - band.window_left
    if band.chunk > 0:
        inside &= key // band.chunk == position // band.chunk
    inside |= key < band.num_sink
    return inside & (key <= position + band.window_right) if band.window_right >= 0 else inside


@settings(max_examples=200)
@given(cases(max_len=70, max_requests=6))
def test_coverage_against_the_mask_itself(case):
    """check_plan trusts visible_ranges; here every (packed row, key, head) is counted against the definition of the band."""
    plan = case.plan()
    works = plan.works
    for r, (qo_len, kv_len) in enumerate(zip(case.qo_len, case.kv_len, strict=True)):
        count = np.zeros((qo_len * case.group, kv_len, case.num_kv_heads), int)
        in_tile = np.zeros_like(count, bool)
        position = kv_len - qo_len + np.arange(qo_len * case.group)[:, None] // case.group
        key = np.arange(kv_len)[None, :]
        visible = visible_keys(case.band, position, key)
        for work in works[works["kv_list"] == r]:
            row = int(work["row_begin"]) - int(plan.qo_indptr[r]) * case.group
            rows, heads = slice(row, row + work["num_rows"]), slice(work["kv_head_begin"], sum(work.item()[2:4]))
            count[rows, work["kv_begin"] : work["kv_end"], heads] += 1
            # A row's tile computes the keys that some row of the tile sees, and no other.
            seen = visible[rows].any(axis=0)
            ranges = visible_ranges(plan, r, row, int(work["num_rows"]))
            np.testing.assert_array_equal(seen, np.isin(key[0], np.concatenate([np.arange(*keys) for keys in ranges])))
            in_tile[rows, :, heads] |= seen[None, :, None]
        assert (count[visible] == 1).all()
        assert (count == in_tile).all()


def _spoil_first_split(field, change):
    def spoil(plan):
        works = plan.works
        works[field][np.flatnonzero(works["merge"] >= 0)[0]] += change

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        _spoil_first_split("kv_begin", 1),
        _spoil_first_split("kv_end", -1),
        _spoil_first_split("kv_head_begin", 1),
        _spoil_first_split("row_begin", 1),
        _spoil_first_split("num_rows", 1),
        _spoil_first_split("out", 1),
        _spoil_first_split("merge", 1),
        _spoil_first_split("kv_list", 1),
        _spoil_first_split("qo_pos_base", 1),
        _spoil_first_split("merge_tiles", 1),
        lambda plan: plan.merge_slots.__setitem__(slice(0, 2), plan.merge_slots[1::-1].copy()),
        lambda plan: plan.merges["row_begin"].__setitem__(0, 1),
        lambda plan: plan.work_indptr.__setitem__(-1, plan.num_works - 1),
        lambda plan: plan.works.__setitem__(0, plan.works[1]),
        lambda plan: plan.works["merge"].__setitem__(np.flatnonzero(plan.works["merge"] < 0)[0], 0),
        lambda plan: plan.works["out"].__setitem__(np.flatnonzero(plan.works["merge"] < 0)[0], 0),
        lambda plan: plan.kv_len.__setitem__(0, 99_000),
    ],
)
def test_the_checks_find_a_wrong_plan(spoil):
    plan = Case((1, 4, 1), (100_000, 4, 30)).plan()
    check_plan(plan)
    spoil(plan)
    with pytest.raises(AssertionError):
        check_plan(plan)


@given(cases(), cases(max_requests=10))
def test_equal_lengths_give_equal_bytes(case, other):
    """Whatever the planner did before, and whatever the buffer held."""
    first = case.plan()
    used = first.bytes_used // 4
    other.plan()
    out = np.full(len(first.buffer), -7, np.int32)
    again = case.plan(out=out, max_partial_rows=first.num_partial_rows)
    assert again.buffer[:used].tobytes() == first.buffer[:used].tobytes()
    assert (out[used:] == -7).all()


@settings(max_examples=200)
@given(cases(), st.integers(0, 5), st.integers(0, 50), st.integers(0, 3000))
@example(EXTREMES["decode of a million keys"], 0, 0, 0)
@example(EXTREMES["a million keys at a fixed size"], 0, 0, 0)
@example(Case((10,), (8,), 1, 1, 1, causal=False, fixed_split_size=7, tile_table=(1, 1, 0, 0, 1)), 15, 6, 8)
def test_capacity_holds_every_batch_within_the_limits(case, requests, tokens, keys):
    capacity = case.capacity(requests, tokens, keys)
    out = np.zeros(capacity.plan_bytes // 4, np.int32)
    plan = case.plan(out=out, max_partial_rows=capacity.partial_rows)
    assert plan.bytes_used <= capacity.plan_bytes and plan.num_partial_rows <= capacity.partial_rows
    assert capacity.plan_bytes % 16 == 0


@pytest.mark.parametrize(
    ("case", "plan_factor", "rows_factor"),
    [
        (Case((1,), (1_000_000,)), 1.05, 1.1),
        (Case((32,), (1_000_000,)), 1.05, 1.1),
        (Case((1,) * 64, tuple(range(100, 8100, 125))), 2.4, None),
        (Case((1,) * 1024, tuple(range(1, 1025))), 2.2, None),
        (Case((2000,), (2000,)), 2.4, None),
        (Case((1,), (100_000,), fixed_split_size=100), 4.0, 1.1),
        (Case((1,) * 10, (300,) * 10, fixed_split_size=-1), 1.2, None),
        (Case((1,) * 512, (3000,) * 512, window_left=1000, num_sink=4), 2.8, 1.7),
        (Case((3000,), (6000,), window_left=1000, num_sink=4), 3.0, 1.4),
        (Case((1,), (100_000,), fixed_split_size=100, window_left=99_000, num_sink=4), 6.0, 1.1),
    ],
)
def test_capacity_is_tight(case, plan_factor, rows_factor):
    """Batches that fill their own limits: no order of magnitude is given away."""
    plan, capacity = case.plan(), case.capacity()
    assert capacity.plan_bytes <= plan_factor * plan.bytes_used
    if rows_factor is not None:
        assert capacity.partial_rows <= rows_factor * plan.num_partial_rows


def test_capacity_grows_with_the_limits_only_as_it_must():
    """Partial rows of automatic splits depend on CTAs and tile rows, not on the batch; without splits there are none."""
    small, large = Case((1,) * 200, (10,) * 200), Case((1,) * 2000, (10_000,) * 2000)
    assert small.capacity().partial_rows == large.capacity().partial_rows == 2 * 132 * 128
    assert dataclasses.replace(small, fixed_split_size=-1).capacity().partial_rows == 0
    assert dataclasses.replace(small, num_ctas=1).capacity().partial_rows == 0
    assert dataclasses.replace(small, fixed_split_size=64).capacity(keys=0).partial_rows > 0


def cost_model(case: Case) -> tuple[int, int, int, int, int]:
    """Mean load without cuts, the dearest head, and over the classes in use: overhead, cost of a granule, price of a merge."""
    classes = [reference.TileClass(*case.tile_table[i : i + 5]) for i in range(0, len(case.tile_table), 5)]
    items = reference.make_items(
        case.indptr.tolist(), case.kv_len, case.group, case.band, case.fixed_split_size, classes
    )
    costs = [item.cost(classes[item.tile_class]) for item in items]
    used = {classes[item.tile_class] for item in items}
    mean = -(-sum(costs) * case.num_kv_heads // case.num_ctas)
    overhead = max((item.overhead + item.sink_cost(classes[item.tile_class]) for item in items), default=0)
    granule = max((t.kv * t.kv_granule for t in used), default=0)
    merge = max((classes[item.tile_class].merge_price(item.num_rows) for item in items), default=0)
    return mean, max(costs, default=0), overhead, granule, merge


@settings(max_examples=400)
@given(cases(fixed=(0,)))
def test_makespan_with_cuts(case):
    """1.25 * max(mean load, largest indivisible tile), and what is true where that is not.

    The bound cannot hold for every batch. C + 1 equal indivisible tiles on C CTAs put two on one CTA: 2 * max(mean, tile). And
    a cut costs: one overhead for each further piece, and the merge. What the planner guarantees is additive. A tile with fewer than
    G = 2 granules (3 with a window, which may begin between granules) cannot be cut, and one is not cut for a gain below the
    price of a merge and 1/128 of the mean. With I = overhead + G granules + merge, the makespan is at most
    mean + I, and 1.2 % for that 1/128 and for targets, which are exceeded by up to 1/256. So 1.25 * max(mean, I) holds where one
    of the two dominates.
    """
    assume(case.num_ctas > 1)
    mean, _, overhead, granule, merge = cost_model(case)
    makespan = int(case.plan().header["makespan"])
    uncut = overhead + (3 if case.has_begin else 2) * granule
    assert makespan <= (mean + uncut) * 257 / 256 + merge + mean / 128 + 2
    indivisible = uncut + merge
    if mean >= 4.3 * indivisible or mean <= 0.23 * indivisible:
        assert makespan <= 1.25 * max(mean, indivisible) + 2


@pytest.mark.parametrize("num_requests", [1, 2, 3, 5, 8, 12, 16, 17, 18, 24, 33, 64, 200])
@pytest.mark.parametrize("longest", [300, 1000, 8192, 100_000])
def test_makespan_of_decode_batches(num_requests, longest):
    """On 132 CTAs, at every ratio of works to CTAs. The bound itself, with tiles of one granule and the mean load without cuts, where a
    CTA has four such tiles to do or requests are many; else the additive one."""
    rng = np.random.default_rng(num_requests * longest)
    for _ in range(20):
        case = Case((1,) * num_requests, tuple(rng.integers(1, longest + 1, num_requests).tolist()))
        mean, _, overhead, granule, merge = cost_model(case)
        makespan = int(case.plan().header["makespan"])
        if mean >= 4 * (overhead + granule) or num_requests >= 64:
            assert makespan <= 1.25 * max(mean, overhead + granule)
        assert makespan <= (mean + overhead + 2 * granule + merge) * 1.012


def test_makespan_of_prefill_batches():
    rng = np.random.default_rng(0)
    for num_requests in (1, 2, 4, 16):
        for _ in range(5):
            lengths = tuple(rng.integers(128, 4097, num_requests).tolist())
            case = Case(lengths, lengths)
            mean, _, overhead, granule, merge = cost_model(case)
            assert case.plan().header["makespan"] <= 1.25 * max(mean, overhead + granule) + merge


@settings(max_examples=200)
@given(cases(fixed=(-1, 7, 64, 1000)))
def test_makespan_without_cuts(case):
    """List scheduling: only the least loaded CTA takes a head beyond the target. Fixed cuts go in runs of a quarter target."""
    mean, longest, overhead, granule, _ = cost_model(case)
    target = mean + min(overhead + granule, mean // 64)
    assert case.plan().header["makespan"] <= target + max(longest, target // 4 if case.fixed_split_size > 0 else 0) + 1


def test_kv_is_cut_only_where_it_shortens_the_plan():
    even = Case((1,) * 1056, (4096,) * 1056).plan()  # 64 heads for each CTA
    assert even.num_merges == 0 and even.balance > 0.999
    many = Case((1,) * 1024, tuple(range(100, 8292, 8))).plan()  # short requests fill what long ones leave
    assert many.num_merges == 0 and many.balance > 0.995
    assert Case((1,), (64,)).plan().num_merges == 0  # a merge would cost more than it gains
    long = Case((1,), (8192,))
    whole = dataclasses.replace(long, fixed_split_size=-1).plan()
    assert whole.num_merges == 0 and whole.num_works == 8  # 8 heads, each on a CTA of its own
    assert long.plan().makespan_us * 10 < whole.makespan_us


def test_sinks_and_the_first_keys_of_a_window_are_on_one_cta():
    """Whoever merges them finds both in its cache. Where sinks and window touch there is neither a second work nor a merge."""
    plan = Case((1,) * 64, (8192,) * 64, window_left=1000, num_sink=4).plan()
    cta = np.repeat(np.arange(plan.num_ctas), np.diff(plan.work_indptr))
    for m in range(plan.num_merges):
        sinks, window = (
            np.flatnonzero(plan.works["out"] == slot)[0] for slot in plan.merge_slots[plan.merge_indptr[m] :][:2]
        )
        assert plan.works[sinks].item()[5:7] == (0, 4) and plan.works[window]["kv_begin"] == 8191 - 1000
        assert cta[sinks] == cta[window]
    touching = Case((1,) * 64, (1005,) * 64, window_left=1000, num_sink=4).plan()
    assert touching.num_merges == 0 and set(touching.works["kv_begin"].tolist()) == {0}


def test_few_long_requests_are_cut_alike():
    """8 heads on 132 CTAs: 16 pieces of 512 keys each."""
    works = Case((1,), (8192,)).plan().works
    assert len(works) == 128
    assert (works["kv_end"] - works["kv_begin"] == 512).all()


@settings(max_examples=100)
@given(cases(fixed=(7, 64, 1000), max_requests=6), cases(fixed=(64,), max_requests=30))
def test_fixed_split_size_makes_a_request_independent_of_its_batch(case, others):
    """The pieces of a request's rows and heads are the same alone and in any batch."""
    assume(case.qo_len)

    def pieces(plan, request):
        works = plan.works[plan.works["kv_list"] == request]
        row0 = int(plan.qo_indptr[request]) * plan.group_size
        return sorted(
            (int(w["row_begin"]) - row0, int(w["num_rows"]), head, int(w["kv_begin"]), int(w["kv_end"]))
            for w in works
            for head in range(w["kv_head_begin"], w["kv_head_begin"] + w["num_kv_heads"])
        )

    batch = dataclasses.replace(
        case,
        qo_len=case.qo_len + (others.qo_len if others.has_end or not case.has_end else ()),
        kv_len=case.kv_len + (others.kv_len if others.has_end or not case.has_end else ()),
    )
    together = batch.plan()
    for r in range(len(case.qo_len)):
        alone = dataclasses.replace(case, qo_len=case.qo_len[r : r + 1], kv_len=case.kv_len[r : r + 1])
        assert pieces(alone.plan(), 0) == pieces(together, r)
    works = together.works
    assert (works["kv_end"] - works["kv_begin"] <= case.fixed_split_size).all()
    inner = works["kv_begin"][works["merge"] >= 0]
    assert all(k % case.fixed_split_size == 0 or case.has_begin for k in inner.tolist())


def test_cuts_are_at_granules():
    lengths = np.array([9000, 5555, 100_000, 7000])
    works = Case((1, 1, 1, 60), tuple(lengths.tolist()), causal=False).plan().works
    parts = works[works["merge"] >= 0]
    granule = np.array([64, 128])[parts["tile_class"]]
    is_last = parts["kv_end"] == lengths[parts["kv_list"]]
    assert len(parts) > 50 and (granule == 128).any()
    assert (parts["kv_begin"] % granule == 0).all()
    assert (parts["kv_end"] % granule == 0)[~is_last].all()
    assert (parts["kv_end"] - parts["kv_begin"] >= granule).all()


def test_capture_key_depends_on_settings_and_not_on_lengths():
    base = Case((1, 1), (100, 5000))
    key = base.plan().capture_key
    assert dataclasses.replace(base, qo_len=(1,), kv_len=(7,)).plan().capture_key == key
    changes = [
        {"num_ctas": 131},
        {"num_kv_heads": 4},
        {"group": 8},
        {"causal": False},
        {"window_left": 10},
        {"window_left": 10, "num_sink": 4},
        {"window_left": 10, "num_sink": 5},
        {"chunk": 10},
        {"causal": False, "window_right": 3},
        {"fixed_split_size": 64},
        {"tile_table": GPU[:5]},
        {"tile_table": (*GPU[:-1], 11_001)},
    ]
    keys = {dataclasses.replace(base, **change).plan().capture_key for change in changes}
    assert len(keys) == len(changes) and key not in keys

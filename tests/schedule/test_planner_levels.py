"""Shared keys in the planner: what plans with levels hold, C++ against the reference, when they are used, bad levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer.errors import ArgumentError
from tvm_infer.schedule import Plan, reference
from tvm_infer.testing.plan_checks import check_levels, check_plan, visible_ranges

H200 = (16, 128, 600_000, 10_000, 13_500, 128, 128, 3_600_000, 0, 14_000, 2_700_000, 9_000_000, 600)
CPU = tuple(tvm_infer.cpu_tile_table("float32", 128))
# Merging is free in the last two: whatever can be shared is.
TABLES = [H200, CPU, (16, 16, 0, 0, 1000, 0, 0, 1000), (4, 8, 0, 0, 3000, 24, 8, 0, 0, 5000, 0, 0, 1000)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch with shared keys."""

    qo_len: tuple[int, ...]
    kv_len: tuple[int, ...]
    levels: tuple
    num_kv_heads: int = 8
    group: int = 4
    num_ctas: int = 132
    causal: bool = True
    tile_table: tuple[int, ...] = H200

    @property
    def indptr(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.qo_len)]).astype(np.int32)

    @property
    def heads(self) -> dict:
        return {"num_qo_heads": self.num_kv_heads * self.group, "num_kv_heads": self.num_kv_heads}

    def plan(self, **kwargs) -> Plan:
        settings = dict(self.heads, head_dim=64, causal=self.causal, num_ctas=self.num_ctas)
        settings |= {"tile_table": self.tile_table, "levels": self.levels, **kwargs}
        return tvm_infer.plan(self.indptr, np.array(self.kv_len, np.int32), **settings)

    def reference(self) -> np.ndarray:
        return reference.plan(
            self.indptr,
            self.kv_len,
            **self.heads,
            num_ctas=self.num_ctas,
            band=reference.Band(window_right=0 if self.causal else -1),
            tile_table=self.tile_table,
            levels=self.levels,
        )

    def check(self) -> Plan:
        """The plan, which holds what plans hold, and is the reference's."""
        plan = self.plan()
        check_plan(plan)
        check_levels(plan, self.levels)
        assert plan.buffer.tobytes() == self.reference().tobytes()
        return plan


@st.composite
def trees(draw, requests, begin, depth, longest):
    """Levels below a group: (groups of each level, keys that each request shares at least)."""
    levels, shared = [], {}
    if depth == 0 or len(requests) == 0:
        return levels, shared
    rest = list(draw(st.permutations(requests)))
    while rest and draw(st.integers(0, 4)) > 0:
        size = draw(st.integers(1, len(rest)))
        members, rest = rest[:size], rest[size:]
        end = begin + draw(st.integers(1, longest))
        below, of_below = draw(trees(members, end, depth - 1, longest))
        shared |= dict.fromkeys(members, end) | of_below
        for level, groups in enumerate([[(members, end)], *below]):
            while len(levels) <= level:
                levels.append([])
            levels[level] += groups
    return levels, shared


@st.composite
def cases(draw, longest=600, max_requests=24, max_depth=4):
    """Forests of any depth over decodes, appends, prefills and empty requests."""
    num_requests = draw(st.integers(0, max_requests))
    levels, shared = draw(trees(range(num_requests), 0, draw(st.integers(0, max_depth)), longest))
    queries = st.one_of(st.just(1), st.just(1), st.just(0), st.integers(0, 70))
    qo_len = tuple(draw(queries) for _ in range(num_requests))
    own = [draw(st.integers(0, longest)) for _ in range(num_requests)]
    return Case(
        qo_len,
        tuple(shared.get(r, 0) + qo_len[r] + own[r] for r in range(num_requests)),
        tuple(map(tuple, levels)),
        num_kv_heads=draw(st.sampled_from([1, 2, 3, 8])),
        group=draw(st.sampled_from([1, 3, 4, 7])),
        num_ctas=draw(st.sampled_from([1, 2, 7, 16, 132])),
        causal=draw(st.booleans()),
        tile_table=draw(st.sampled_from(TABLES)),
    )


def batch(num_requests, shared, own, **kwargs) -> Case:
    """One-token requests that share their first keys, all of them."""
    levels = (((tuple(range(num_requests)), shared),),)
    return Case((1,) * num_requests, (shared + own,) * num_requests, levels, **kwargs)


def deep(num_requests, step, own=100) -> Case:
    """Request r leaves a chain at its r-th fork: as many levels as requests."""
    levels = tuple(((tuple(range(r, num_requests)), (r + 1) * step),) for r in range(num_requests - 1))
    return Case((1,) * num_requests, tuple((r + 1) * step + own for r in range(num_requests)), levels)


EXTREMES = {
    "64 requests of one prompt": batch(64, 8192, 256),
    "the same, 64 heads": batch(64, 8192, 256, group=8),
    "a group of 1 head": batch(300, 8192, 256, group=1),
    "a long prompt of 4": batch(4, 100_000, 50),
    "long answers": batch(20, 5000, 30_000),
    "a million shared keys": batch(40, 1_000_000, 3),
    "nothing of their own": batch(40, 5000, 0, causal=False),
    "a deep chain": deep(24, 700),
    "two trees, and some alone": Case(
        (1, 5, 1, 1, 1, 0, 1, 40, 1, 1),
        tuple(9000 + 300 * r for r in range(10)),
        ((((8, 0, 3, 5), 4000), ((1, 9, 7), 6000)), (((3, 8), 7000), ((9, 1), 8000))),
        tile_table=TABLES[2],
    ),
    "prefills behind a prompt": Case((300, 200, 1, 700), (5000,) * 4, ((((0, 1, 2, 3), 4000),),)),
    "a group of one request": Case((1, 1), (900, 900), ((((0,), 500),),)),
    "a group within a group of the same requests": Case((1,) * 40, (9000,) * 40, (((range(40), 4000),), ((range(40), 8000),))),
    "one CTA": batch(30, 5000, 100, num_ctas=1),
    "many CTAs": batch(30, 50_000, 100, num_ctas=3000),
    "no request": Case((), (), ()),
    "tokens that end in the middle of a tile": Case((1, 2, 3) * 9, (2500,) * 27, (((range(27), 2400),),), group=7),
}  # fmt: skip


@pytest.mark.parametrize("case", EXTREMES.values(), ids=EXTREMES)
def test_extremes(case):
    case.check()


@settings(max_examples=300)
@given(cases())
def test_forests(case):
    case.check()


@settings(max_examples=150)
@given(cases(longest=30, max_requests=8))
def test_every_row_and_key_is_computed_once(case):
    """Counted from the works alone, by request and key: the definition of what levels may change, which is who computes and no more."""
    plan = case.plan()
    count = [
        np.zeros((q * case.group, k, case.num_kv_heads), int) for q, k in zip(case.qo_len, case.kv_len, strict=True)
    ]
    for work in plan.works:
        heads = slice(work["kv_head_begin"], work["kv_head_begin"] + work["num_kv_heads"])
        for row in range(work["row_begin"], work["row_begin"] + work["num_rows"]):
            token = plan.token_order[row // case.group]
            request = int(np.searchsorted(case.indptr, token, side="right")) - 1
            local = int(token - case.indptr[request]) * case.group + row % case.group
            count[request][local, work["kv_begin"] : work["kv_end"], heads] += 1
    for r, counted in enumerate(count):
        for local in range(len(counted)):
            begin, end = visible_ranges(plan, r, local, 1)[0]
            assert (counted[local, begin:end] == 1).all() and (counted <= 1).all()


def shared_keys(plan: Plan) -> int:
    works = plan.works[[len(plan.requests_of(work)) > 1 for work in plan.works]]
    return int(((works["kv_end"] - works["kv_begin"]) * works["num_kv_heads"]).sum())


def test_one_prompt_is_read_once_for_as_many_rows_as_a_tile_has():
    plan = batch(64, 8192, 256).check()
    assert plan.num_shared_works > 0 and plan.header["num_levels"] == 1
    assert shared_keys(plan) == 2 * 8 * 8192  # 256 rows: two tiles of 128
    flat = batch(64, 8192, 256).plan(levels=())
    assert plan.makespan_us < 0.3 * flat.makespan_us
    assert plan.header["flat_cost"] == sum(Case((1,) * 64, (8448,) * 64, (), num_ctas=1).plan().loads())
    assert plan.balance > 0.85


def test_a_tree_reads_each_run_once():
    """8 chats of one system prompt, 8 answers each: the works say what is read for whom."""
    chats = [tuple(range(8 * c, 8 * c + 8)) for c in range(8)]
    levels = ((((*range(64),), 4096),), tuple((chat, 6144) for chat in chats))
    plan = Case((1,) * 64, (6500,) * 64, levels).check()
    assert plan.header["num_levels"] == 2
    assert shared_keys(plan) == 2 * 8 * 4096 + 8 * 8 * 2048
    for work in plan.works:
        requests = set(plan.requests_of(work).tolist())
        if work["kv_begin"] >= 6144:
            assert len(requests) == 1
        elif work["kv_begin"] >= 4096:
            assert requests in [set(chat) for chat in chats]


def test_levels_that_do_not_pay_change_nothing():
    """Two short prompts, or rows that fill tiles anyway: the flat plan, byte for byte."""
    for case in (
        batch(2, 64, 5000),
        batch(3, 128, 128),
        Case((256, 256), (4096, 4096), ((((0, 1), 2048),),)),
        Case((1, 1), (900, 900), ((((0,), 500),),)),
    ):
        plan = case.check()
        assert plan.num_shared_works == 0
        assert plan.buffer.tobytes() == case.plan(levels=()).buffer.tobytes()


def test_order_of_requests_and_tokens():
    """Members of a group stand together where the first of them does; tokens keep their order within a request."""
    case = Case((1, 2, 1, 1), (90000,) * 4, ((((3, 1), 80000),),), num_ctas=4, tile_table=TABLES[2])
    plan = case.check()
    assert plan.num_shared_works > 0
    assert plan.token_order.tolist() == [0, 1, 2, 4, 3]
    beside = Case((1, 2, 1, 1), (90000,) * 4, ((((1, 2), 80000),),), num_ctas=4, tile_table=TABLES[2]).check()
    assert beside.header["token_order_offset"] == 0 and beside.num_shared_works > 0


def test_results_do_not_depend_on_the_order_within_a_group():
    one, other = ((((3, 1, 5), 8000),),), ((((5, 3, 1), 8000),),)
    case = Case((1,) * 6, (9000,) * 6, one)
    assert case.plan().buffer.tobytes() == dataclasses.replace(case, levels=other).plan().buffer.tobytes()


def test_the_capture_key_does_not_say_levels():
    case = batch(64, 8192, 256)
    assert case.plan().capture_key == case.plan(levels=()).capture_key == deep(24, 700).plan().capture_key


@settings(max_examples=150)
@given(cases(), st.integers(0, 3), st.integers(0, 30))
def test_capacity_holds_every_batch_within_the_limits(case, requests, tokens):
    """With room for its levels a plan is what it is with all room."""
    free = case.plan()
    shared = sum(
        q for r, q in enumerate(case.qo_len) if any(r in group for groups in case.levels[:1] for group, _ in groups)
    )
    capacity = tvm_infer.workspace_size(
        **case.heads,
        head_dim=64,
        max_requests=len(case.qo_len) + requests,
        max_tokens=sum(case.qo_len) + tokens,
        causal=case.causal,
        num_ctas=case.num_ctas,
        tile_table=case.tile_table,
        max_levels=len(case.levels),
        max_shared_tokens=shared,
    )
    out = np.zeros(capacity.plan_bytes // 4, np.int32)
    plan = case.plan(out=out, max_partial_rows=capacity.partial_rows)
    assert plan.buffer[: plan.bytes_used // 4].tobytes() == free.buffer.tobytes()


def test_without_room_for_shared_works_a_plan_has_none():
    case = batch(64, 8192, 256)
    plan, flat = case.plan(), case.plan(levels=())
    for words, rows in (
        (plan.bytes_used // 4, plan.num_partial_rows - 1),
        (plan.bytes_used // 4 - 1, plan.num_partial_rows),
    ):
        out = np.zeros(words, np.int32)
        got = case.plan(out=out, max_partial_rows=rows)
        assert got.buffer[: got.bytes_used // 4].tobytes() == flat.buffer.tobytes()
    out = np.zeros(plan.bytes_used // 4, np.int32)
    assert case.plan(out=out, max_partial_rows=plan.num_partial_rows).buffer.tobytes() == plan.buffer.tobytes()


@settings(max_examples=100)
@given(cases())
def test_sharing_does_not_make_a_plan_longer(case):
    flat = int(case.plan(levels=()).header["makespan"])
    assert case.plan().header["makespan"] <= flat


def _spoil(field, change):
    def spoil(plan):
        shared = [i for i, work in enumerate(plan.works) if len(plan.requests_of(work)) > 1]
        plan.works[field][shared[0]] += change

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        *(_spoil(name, 1) for name in ("kv_begin", "row_begin", "num_rows", "merge", "merge_tiles", "out", "kv_head_begin")),
        _spoil("merge_tiles", -1),
        _spoil("kv_end", -1),
        _spoil("qo_pos_base", 5000),
        lambda plan: plan.token_order.__setitem__(slice(0, 2), [1, 0]),
        lambda plan: plan.merge_slots.__setitem__(slice(0, 2), plan.merge_slots[1::-1].copy()),
        lambda plan: plan.merges["kv_head_begin"].__setitem__(0, 1),
        lambda plan: plan.merges["row_begin"].__setitem__(5, 0),
    ],
)  # fmt: skip
def test_the_checks_find_a_wrong_plan(spoil):
    case = Case((1,) * 64, (8500,) * 64, ((((*range(1, 64),), 8192),), (((5, 9, 13, 40), 8300),)))
    plan = case.plan()
    check_plan(plan)
    assert plan.header["token_order_offset"] > 0
    spoil(plan)
    with pytest.raises(AssertionError):
        check_plan(plan)


def test_levels_of_other_keys_are_found():
    plan = batch(64, 8192, 256).plan()
    for levels in ((), ((((*range(63),), 8192),),), ((((*range(64),), 8000),),)):
        with pytest.raises(AssertionError):
            check_levels(plan, levels)


BAD = [
    ([[((0, 1), 5), ((1, 2), 5)]], ["group 1 of level 0", "request 1", "group 0", "once"]),
    ([[((0, 0), 5)]], ["group 0 of level 0", "request 0", "once"]),
    ([[((0, 4), 5)]], ["group 0 of level 0", "request 4", "requests 0 to 3"]),
    ([[((0, -1), 5)]], ["request -1"]),
    ([[((0, 1), 0)]], ["group 0 of level 0", "shares 0 keys", "at least 1"]),
    ([[((0, 1), -3)]], ["shares -3 keys"]),
    ([[((0, 1), 99)]], ["shares 99 keys", "request 0", "has 100 keys", "its 2 new tokens", "at most 98"]),
    ([[((0, 1), 50)], [((0, 1), 50)]], ["group 0 of level 1", "shares 50 keys", "at least 51"]),
    ([[((0, 1), 50)], [((0, 2), 60)]], ["group 0 of level 1", "request 2", "no group of level 0"]),
    ([[((0, 1), 50), ((2, 3), 40)], [((1, 2), 60)]], ["group 0 of level 1", "request 2", "another group of level 0", "request 1"]),
    ([[], [((1, 2), 60)]], ["group 0 of level 1", "no group of level 0"]),
    ([[((0, 1), 50)], [((2, 3), 60)]], ["level 1", "request 2", "no group of level 0"]),
    ([[(0, 1)]], ["group 0 of level 0", "(0, 1)", "pair"]),
    ([[((0, 1.5), 3)]], ["group 0 of level 0", "pair"]),
    ([[((0, 1), 3, 4)]], ["group 0 of level 0", "pair"]),
    ([[((0, 2**40), 3)]], [str(2**40), "32 bits"]),
]  # fmt: skip


@pytest.mark.parametrize(("levels", "words"), BAD)
def test_bad_levels(levels, words):
    case = Case((2, 1, 1, 1), (100,) * 4, ())
    out = np.full(4096, -7, np.int32)
    with pytest.raises(ArgumentError) as error:
        case.plan(levels=levels, out=out, max_partial_rows=1000)
    assert all(word in str(error.value) for word in ["levels", *words]), str(error.value)
    assert (out == -7).all()


@pytest.mark.parametrize(
    "arguments", [{"window_left": 30}, {"window_left": 30, "num_sink": 4}, {"chunk": 64}, {"fixed_split_size": 64}]
)
def test_settings_that_do_not_share(arguments):
    case = Case((1, 1), (100, 100), ((((0, 1), 50),),))
    with pytest.raises(ArgumentError, match=r"levels.*without levels") as error:
        case.plan(**arguments)
    assert next(iter(arguments)) in str(error.value)


def test_what_merges_cost_is_the_tables_word():
    """32 requests of 2048 + 256 keys are shared at the executor's price of merges, and not at four times the price for a plan or for a
    merge; the price is not part of what a graph is captured for."""
    case = batch(32, 2048, 256)
    *classes, each, once, again = H200
    assert case.check().num_shared_works > 0
    for prices in ((each, 4 * once, again), (16 * each, once, again)):
        dear = dataclasses.replace(case, tile_table=(*classes, *prices))
        assert dear.check().num_shared_works == 0
        assert (dear.plan().header["capture_key"] == case.plan().header["capture_key"]).all()
    with pytest.raises(
        ArgumentError, match=r"`levels` with a `tile_table` that does not say what merges of shared keys cost; end"
    ):
        case.plan(tile_table=tuple(classes))


@pytest.mark.parametrize(("again", "is_shared"), [(0, False), (600, False), (1000, True)])
def test_keys_read_again_cost_what_the_table_says(again, is_shared):
    """Without sharing, 16 requests of 2048 + 256 keys read 15 of 16 shared keys from a cache: cheaper than the merges, unless the table
    takes them for keys from memory."""
    case = dataclasses.replace(batch(16, 2048, 256), tile_table=(*H200[:-1], again))
    assert (case.check().num_shared_works > 0) == is_shared


def test_queries_that_are_not_causal_may_share_all_keys():
    case = Case((1, 2), (40000, 40000), ((((0, 1), 40000),),), causal=False, num_ctas=4, tile_table=TABLES[2])
    plan = case.check()
    assert plan.num_shared_works > 0  # all but the last, which each request has for itself
    with pytest.raises(ArgumentError, match=r"shares 40001 keys.*at most 40000"):
        case.plan(levels=[[((0, 1), 40001)]])


def test_bad_lengths_are_named_first():
    with pytest.raises(ArgumentError, match=r"kv_len\[1\] is 1"):
        Case((1, 2), (100, 1), ((((0, 1), 50),),)).plan()


def test_deep_trees_within_few_levels():
    """max_levels bounds what is allocated: a deeper tree needs more room than that, and is planned flat if there is none."""
    case = deep(24, 700)
    assert case.plan().header["num_levels"] > 1
    size = tvm_infer.workspace_size(
        **case.heads, head_dim=64, max_requests=24, max_tokens=24, num_ctas=132, tile_table=H200, max_levels=1
    )
    out = np.zeros(size.plan_bytes // 4, np.int32)
    check_plan(case.plan(out=out, max_partial_rows=size.partial_rows))

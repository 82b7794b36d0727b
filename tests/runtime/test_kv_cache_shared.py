"""Pages that sequences share are found by the step and read once: forks of any depth, against float64 and the cache without it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_infer import _ffi, variant
from tvm_infer.errors import ArgumentError, CacheStateError
from tvm_infer.runtime import PagedKVCache
from tvm_infer.testing import attention_reference, relative_error
from tvm_infer.testing.plan_checks import check_plan

HEADS = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 16}


def make_cache(**kwargs) -> PagedKVCache:
    settings = dict(HEADS, num_layers=1, page_size=4, num_pages=2000, max_batch=64, max_tokens=2048, num_ctas=3)
    cache = PagedKVCache(**settings | kwargs)
    cache.pages(0)[:] = np.nan
    return cache


class Model:
    """A cache, and what its sequences' keys and values are: from a table of random rows by token, so that forks have the same."""

    def __init__(self, cache: PagedKVCache, seed: int = 0) -> None:
        self.cache = cache
        self.rng = np.random.default_rng(seed)
        self.rows: dict[int, list[np.ndarray]] = {}  # of each sequence: [k and v, num_kv_heads, head_dim] of each token

    def add(self, seq_id: int) -> None:
        self.cache.add_sequence(seq_id)
        self.rows[seq_id] = []

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        self.cache.fork_sequence(parent, child, position)
        rows = self.rows[parent]
        self.rows[child] = list(rows if position < 0 else rows[:position])

    def step(self, ids, lengths, causal: bool = True):
        """The plan of a step of random tokens, whose output is right."""
        shape = (sum(lengths), HEADS["num_kv_heads"], HEADS["head_dim"])
        q = self.rng.standard_normal((shape[0], HEADS["num_qo_heads"], shape[2])).astype(np.float32)
        k, v = (self.rng.standard_normal(shape).astype(np.float32) for _ in range(2))
        new = iter(np.stack([k, v], 1))
        for i, n in zip(ids, lengths, strict=True):
            self.rows[i] += [next(new) for _ in range(n)]
        with self.cache.forward(ids, lengths, causal=causal) as step:
            plan = step.plan
            out = step.attention(0, q, k, v)
        check_plan(plan)
        begin = 0
        for i, n in zip(ids, lengths, strict=True):
            keys, values = np.stack(self.rows[i], 1) if self.rows[i] else np.zeros((2, 0, *shape[1:]), np.float32)
            expected, _ = attention_reference(
                q[begin : begin + n], keys, values, sm_scale=HEADS["head_dim"] ** -0.5, causal=causal
            )
            assert relative_error(out[begin : begin + n], expected) < 2e-6
            begin += n
        return plan


def readers(plan):
    """(requests, kv_begin, kv_end) of every shared work, once for all heads."""
    shared = [work for work in plan.works if len(plan.requests_of(work)) > 1]
    return {(tuple(plan.requests_of(w).tolist()), int(w["kv_begin"]), int(w["kv_end"])) for w in shared}


def prompt_and_forks(cache, length, num_forks):
    model = Model(cache)
    model.add(0)
    model.step([0], [length])
    for child in range(1, num_forks):
        model.fork(0, child)
    return model


def test_parallel_generation():
    """n answers of one prompt: its whole pages are read once, also when it ends within a page."""
    model = prompt_and_forks(make_cache(), 1003, 16)
    for _ in range(6):
        plan = model.step(list(range(16)), [1] * 16)
        assert plan.num_shared_works > 0
        assert max(end for _, _, end in readers(plan)) == 1000
        assert plan.header["token_order_offset"] == 0


def test_pages_read_once_where_the_plan_says_so():
    """Each (page, head) that a used run covers is read by as many works as its rows fill tiles: here one."""
    model = prompt_and_forks(make_cache(num_ctas=1), 1000, 16)
    plan = model.step(list(range(16)), [1] * 16)
    tables = [model.cache.page_table(i) for i in range(16)]
    reads = np.zeros((model.cache.num_pages, HEADS["num_kv_heads"]), int)
    for work in plan.works:
        pages = tables[int(work["kv_list"])][work["kv_begin"] // 4 : -(-int(work["kv_end"]) // 4)]
        reads[list(pages), work["kv_head_begin"] : work["kv_head_begin"] + work["num_kv_heads"]] += 1
    used = sorted({page for table in tables for page in table})
    assert (reads[used] == 1).all() and reads.sum() == len(used) * 2


def test_a_tree_of_forks_in_any_order():
    """A prompt, three chats of it, answers of each; then in an order that has no two of a chat side by side."""
    model = Model(make_cache())
    model.add(0)
    model.step([0], [1200])
    for chat in (1, 2, 3):
        model.fork(0, 100 * chat)
        model.step([100 * chat], [404])
        for answer in range(1, 8):
            model.fork(100 * chat, 100 * chat + answer)
    ids = [100 * chat + answer for answer in range(8) for chat in (1, 2, 3)]
    plan = model.step(ids, [1] * 24)
    assert plan.header["num_levels"] == 2
    chats = {tuple(range(chat, 24, 3)) for chat in range(3)}
    outer = [requests for requests, begin, end in readers(plan) if begin < 1200 and end <= 1200]
    assert set().union(*outer) == set(range(24))
    assert {requests for requests, begin, _ in readers(plan) if begin >= 1200} == chats
    assert sorted(plan.token_order.tolist()) == list(range(24)) and plan.token_order.tolist() != list(range(24))
    again = model.step(sorted(ids), [1] * 24)
    assert again.header["token_order_offset"] == 0 and again.num_shared_works > 0


def test_appends_and_decodes_and_strangers():
    model = prompt_and_forks(make_cache(), 1500, 12)
    for alone in (50, 51):
        model.add(alone)
    model.step([50, 51], [300, 40])
    plan = model.step([50, *range(12), 51], [1, 3, 1, 1, 1, 1, 1, 1, 9, 1, 1, 1, 0, 4])
    assert plan.num_shared_works > 0
    assert all(0 not in requests and 13 not in requests for requests, _, _ in readers(plan))


def test_what_is_not_shared_is_not_looked_for():
    model = Model(make_cache())
    for i in range(8):
        model.add(i)
    model.step(list(range(8)), [200] * 8)
    assert model.step(list(range(8)), [1] * 8).num_shared_works == 0


def test_forks_that_go_apart():
    """Owners outside of the step do not count; what is left of one request is read alone."""
    model = prompt_and_forks(make_cache(), 1000, 8)
    assert model.step([3], [1]).num_shared_works == 0
    model.cache.pop(5, 1000 - 12)
    del model.rows[5][12:]
    plan = model.step(list(range(8)), [1] * 8)
    assert all(5 not in requests or end <= 12 for requests, _, end in readers(plan))


def test_it_can_be_switched_off():
    on, off = (prompt_and_forks(make_cache(shared_prefix=flag), 1000, 16) for flag in (True, False))
    assert on.step(list(range(16)), [1] * 16).num_shared_works > 0
    assert off.step(list(range(16)), [1] * 16).num_shared_works == 0
    with on.cache.forward([0], [1]), pytest.raises(CacheStateError, match="end_forward"):
        _ffi.func("kv_cache_set_shared_prefix")(on.cache, 0)


CAP = variant.soft_cap.bind(cap=30.0)
CAP_IN_WINDOW = (variant.soft_cap & variant.sliding_window).bind(cap=30.0, window=99)
BY_REQUEST = variant.Variant(
    "by_length", logits=lambda value, kv_len: value / kv_len, mask=lambda q_pos, kv_pos: kv_pos <= q_pos
)


@pytest.mark.parametrize(
    ("variants", "shares"),
    [
        ([None, CAP], [True, True]),  # of one band, and so of one plan
        ([CAP_IN_WINDOW, CAP], [False, True]),  # Gemma 2's: the windows' plan is flat, the other layers' is not
        ([variant.sliding_window.bind(window=99), None], [False, True]),
        ([CAP, BY_REQUEST], [False, False]),  # one layer that looks at the request is enough for all of its plan
        ([CAP_IN_WINDOW, BY_REQUEST], [False, False]),
    ],
)
def test_layers_share_by_their_bands_and_variants(variants, shares):
    model = prompt_and_forks(make_cache(num_layers=2), 1000, 16)
    ids, ones = list(range(16)), [1] * 16
    for layer, bound in enumerate(variants):
        model.cache.set_variant(bound, layers=[layer])
    with model.cache.forward(ids, ones):
        plans = [model.cache.plan_of(layer) for layer in range(2)]
        assert [plan.num_shared_works > 0 for plan in plans] == shares
        assert plans[0].buffer.tobytes() == model.cache.plan.buffer.tobytes()
        with pytest.raises(ArgumentError, match="`layer` is 2"):
            model.cache.plan_of(2)
    model.cache.set_variant(None)
    with model.cache.forward(ids, ones) as step:
        assert step.plan.num_shared_works > 0


def test_all_keys_without_a_mask():
    model = prompt_and_forks(make_cache(), 1000, 16)
    assert model.step(list(range(16)), [1] * 16, causal=False).num_shared_works > 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_forests(data):
    """Random forks at random positions, then steps of random sequences in random order."""
    model = Model(make_cache(page_size=data.draw(st.sampled_from([1, 4, 16]))), seed=data.draw(st.integers(0, 5)))
    model.add(0)
    model.step([0], [data.draw(st.integers(1, 500))])
    for child in range(1, data.draw(st.integers(2, 14))):
        parent = data.draw(st.sampled_from(sorted(model.rows)))
        model.fork(parent, child, data.draw(st.one_of(st.just(-1), st.integers(0, len(model.rows[parent])))))
        if data.draw(st.booleans()):
            model.step([child], [data.draw(st.integers(0, 60))])
    for _ in range(2):
        ids = data.draw(st.permutations(sorted(model.rows)))[: data.draw(st.integers(1, len(model.rows)))]
        model.step(ids, [data.draw(st.sampled_from([1, 1, 1, 0, 2, 30])) for _ in ids])

"""begin_step against a model in Python, and page tables that are too long: whatever is refused changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_infer import PagedKVCache, errors

MAX_BATCH, MAX_TOKENS, NUM_PAGES, PAGE_SIZE = 3, 9, 8, 4


def make_cache(**changes):
    sizes = {"num_layers": 1, "num_qo_heads": 1, "num_kv_heads": 1, "head_dim": 8, "num_ctas": 2, "num_threads": 1}
    return PagedKVCache(**{**sizes, **changes})


def state(cache):
    return np.asarray(cache._call("debug_state"))


class StepModel:
    """What a step of these arguments gives: an error, or the rows of input_ids, position_ids and logit_rows."""

    def __init__(self):
        self.lengths: dict[int, int] = {}

    def begin(self, ids, appended, num_rows, tokens, logit_rows):
        count = sum(appended)
        rows = count if num_rows is None else num_rows
        if tokens is not None and len(tokens) != count:
            return errors.ArgumentError
        if logit_rows is not None and (len(logit_rows) > rows or any(not 0 <= row < rows for row in logit_rows)):
            return errors.ArgumentError
        if len(ids) > MAX_BATCH or count > MAX_TOKENS:
            return errors.ArgumentError
        for i, seq in enumerate(ids):  # in their order: the first that is wrong names the error
            if seq not in self.lengths:
                return errors.UnknownSequenceError
            if seq in ids[:i]:
                return errors.ArgumentError
        grown = {**self.lengths, **{seq: self.lengths[seq] + n for seq, n in zip(ids, appended, strict=True)}}
        if sum(-(-length // PAGE_SIZE) for length in grown.values()) > NUM_PAGES:
            return errors.OutOfPagesError
        if not count <= rows <= MAX_TOKENS:
            return errors.ArgumentError
        positions = [p for seq, n in zip(ids, appended, strict=True) for p in range(grown[seq] - n, grown[seq])]
        padding = [0] * (rows - count)
        self.grown = grown
        return [*([0] * count if tokens is None else tokens), *padding], [*positions, *padding], logit_rows or []


steps = st.fixed_dictionaries(
    {
        "batch": st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4),
        "extra_rows": st.one_of(st.none(), st.integers(-1, 5)),
        "has_tokens": st.sampled_from([True, True, True, False]),
        "odd_tokens": st.sampled_from([0, 0, 0, 1]),
        "logit_rows": st.one_of(st.none(), st.lists(st.integers(-1, MAX_TOKENS), max_size=4)),
        "cancel": st.booleans(),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=8))
def test_steps_against_the_model(made):
    cache, model, fresh = (
        make_cache(page_size=PAGE_SIZE, num_pages=NUM_PAGES, max_batch=MAX_BATCH, max_tokens=MAX_TOKENS),
        StepModel(),
        100,
    )
    for seq in range(4):  # and no sequence 4
        cache.add_sequence(seq)
        model.lengths[seq] = 0
    for step in made:
        ids, appended = [seq for seq, _ in step["batch"]], [n for _, n in step["batch"]]
        count = sum(appended)
        num_rows = None if step["extra_rows"] is None else max(0, count + step["extra_rows"])
        tokens = list(range(fresh, fresh + count + step["odd_tokens"])) if step["has_tokens"] else None
        expected = model.begin(ids, appended, num_rows, tokens, step["logit_rows"])
        before = state(cache)

        def begin(ids=ids, appended=appended, num_rows=num_rows, tokens=tokens, rows=step["logit_rows"]):
            given = {"token_ids": tokens, "logit_rows": rows}
            arrays = {name: None if x is None else np.array(x, np.int64) for name, x in given.items()}
            cache.begin_step(ids, appended, num_rows=num_rows, **arrays)

        if isinstance(expected, type):
            with pytest.raises(expected):
                begin()
            assert not cache.in_forward and np.array_equal(state(cache), before)
            continue
        begin()
        fresh += count
        rows = count if num_rows is None else num_rows
        views = [np.from_dlpack(x) for x in cache.step_inputs(rows, len(expected[2]))]
        assert [view.reshape(-1).tolist() for view in views] == [list(x) for x in expected]
        assert np.from_dlpack(cache.position_ids).shape == (1, rows) and cache.query_positions.shape == (count,)
        if step["cancel"]:
            cache.cancel_forward()
            assert np.array_equal(state(cache), before)
        else:
            cache.end_forward()
            model.lengths = model.grown
        with pytest.raises(errors.CacheStateError):
            cache.cancel_forward()


def test_a_cancelled_step_leaves_no_padding_behind():
    """The same tokens again, in as many rows: what the cancelled step wrote is written over."""
    cache = make_cache(page_size=4, num_pages=4, max_batch=2, max_tokens=6)
    cache.add_sequence(0)
    cache.begin_step([0], [4], num_rows=6, token_ids=np.arange(1, 5), logit_rows=np.array([3]))
    cache.cancel_forward()
    cache.begin_step([0], [1], num_rows=6, token_ids=np.array([9]))
    ids, positions, _ = (np.from_dlpack(x).tolist() for x in cache.step_inputs(6))
    assert ids == [[9, 0, 0, 0, 0, 0]] and positions == [[0] * 6]
    cache.end_forward()
    assert cache.seq_len(0) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_the_smallest_cache_there_is(size):
    """One sequence of one token at a time, one page: the block's arrays still stand apart."""
    cache = make_cache(page_size=1, num_pages=size, max_batch=1, max_tokens=1)
    cache.add_sequence(5)
    x = np.ones((1, 1, 8), np.float32)
    for position in range(size):
        cache.begin_step([5], [1], token_ids=np.array([7]), logit_rows=np.array([0]))
        views = [np.from_dlpack(v).reshape(-1).tolist() for v in cache.step_inputs(1, 1)]
        assert views == [[7], [position], [0]]
        np.testing.assert_array_equal(
            cache.attention(0, x, x, x * (position + 1)), [[[np.mean(range(1, position + 2))] * 8]]
        )
        cache.end_forward()
    with pytest.raises(errors.OutOfPagesError):
        cache.begin_step([5], [1])
    with pytest.raises(errors.ArgumentError, match="`num_rows` is 2"):
        cache.step_inputs(2)


def test_page_tables_over_the_limit_are_refused_and_nothing_changes():
    """The cache has room for 2^22 entries of page tables: 64 forks that share 65,600 pages of one token have 4,198,400."""
    cache = make_cache(page_size=1, num_pages=65_800, max_batch=64, max_tokens=8192)
    cache.add_sequence(0)
    for length in [8192] * 8 + [64]:
        with cache.forward([0], [length]):
            pass
    for child in range(1, 64):
        cache.fork_sequence(0, child)
    before = state(cache)
    with pytest.raises(errors.WorkspaceError, match=r"64 sequences have 4198464 pages.*4194304 entries") as caught:
        cache.begin_step(range(64), [1] * 64)
    assert "fewer sequences" in str(caught.value) and "page_size" in str(caught.value)
    assert not cache.in_forward and np.array_equal(state(cache), before)
    with pytest.raises(errors.CacheStateError, match="the last one failed"):
        _ = cache.plan  # it stood where the refused step's was made
    # what it advises helps: two steps of fewer sequences
    for half in (range(32), range(32, 64)):
        cache.begin_step(half, [1] * 32, token_ids=np.arange(32))
        assert np.from_dlpack(cache.position_ids).tolist() == [[65_600] * 32]
        cache.end_forward()
    assert cache.num_used_pages == 65_600 + 64

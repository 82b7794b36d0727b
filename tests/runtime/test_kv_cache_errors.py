"""Every error of the cache: its type, what it says, and that it changed nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm_ffi

from tvm_infer import _ffi, errors
from tvm_infer.runtime import PagedKVCache

CREATE = dict(
    num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, num_pages=10, max_batch=3, max_tokens=30
)


def snapshot(cache: PagedKVCache) -> tuple:
    """Everything that an operation could change."""
    contents = [cache.pages(layer).tobytes() for layer in range(cache.num_layers)]
    return tuple(cache._call("debug_state")), contents, cache.plan.buffer.tobytes(), cache.in_forward


def rows(n: int, heads: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, heads, 16)).astype(np.float32)


def step(cache: PagedKVCache, ids: list[int], lengths: list[int]) -> None:
    n = sum(lengths)
    with cache.forward(ids, lengths) as s:
        for layer in range(cache.num_layers):
            s.attention(layer, rows(n, 4), rows(n, 2, layer), rows(n, 2, 9 + layer))


@pytest.fixture
def cache() -> PagedKVCache:
    """Sequences 1 (9 tokens, 3 pages), 2 (a fork of its first 6), 3 (8 tokens, 2 pages), 4 (empty); 5 pages are free."""
    cache = PagedKVCache(**CREATE)
    for layer in range(2):
        cache.pages(layer)[...] = np.nan
    for seq in (1, 3, 4):
        cache.add_sequence(seq)
    step(cache, [1, 3], [9, 8])
    cache.fork_sequence(1, 2, 6)
    assert cache.num_free_pages == 5
    return cache


IDLE = {
    "add known": (lambda c: c.add_sequence(3), errors.UnknownSequenceError, ["`id` is 3", "8 tokens", "another id"]),
    "remove unknown": (
        lambda c: c.remove_sequence(77),
        errors.UnknownSequenceError,
        ["sequence 77", "holds 4 sequences: 1, 2, 3, 4"],
    ),
    "seq_len unknown": (lambda c: c.seq_len(-5), errors.UnknownSequenceError, ["sequence -5"]),
    "page_table unknown": (lambda c: c.page_table(0), errors.UnknownSequenceError, ["sequence 0"]),
    "gather unknown": (lambda c: c.gather(0, 0), errors.UnknownSequenceError, ["sequence 0"]),
    "fork unknown": (lambda c: c.fork_sequence(8, 9), errors.UnknownSequenceError, ["sequence 8"]),
    "fork onto known": (lambda c: c.fork_sequence(1, 3), errors.UnknownSequenceError, ["`child` is 3"]),
    "fork onto itself": (lambda c: c.fork_sequence(1, 1), errors.UnknownSequenceError, ["`child` is 1"]),
    "fork past end": (
        lambda c: c.fork_sequence(1, 9, 10),
        errors.ArgumentError,
        ["`position` is 10", "sequence 1 has 9 tokens", "0 to 9"],
    ),
    "fork negative": (lambda c: c.fork_sequence(1, 9, -2), errors.ArgumentError, ["`position` is -2"]),
    "pop past start": (lambda c: c.pop(3, 9), errors.ArgumentError, ["is 9", "sequence 3 has 8 tokens"]),
    "pop negative": (lambda c: c.pop(3, -1), errors.ArgumentError, ["is -1", "0 to 8"]),
    "pop unknown": (lambda c: c.pop(33, 0), errors.UnknownSequenceError, ["33"]),
    "pop huge": (lambda c: c.pop(3, 2**62), errors.ArgumentError, [str(2**62)]),
    "truncate longer": (
        lambda c: c.truncate(2, 7),
        errors.ArgumentError,
        ["`length` of truncate is 7", "has 6 tokens"],
    ),
    "truncate negative": (lambda c: c.truncate(2, -1), errors.ArgumentError, ["is -1"]),
    "truncate unknown": (lambda c: c.truncate(33, 0), errors.UnknownSequenceError, ["33"]),
    "end without begin": (lambda c: c.end_forward(), errors.CacheStateError, ["begin_forward() first"]),
    "cancel without begin": (lambda c: c.cancel_forward(), errors.CacheStateError, ["begin_forward() first"]),
    "positions without begin": (lambda c: c.query_positions, errors.CacheStateError, ["begin_forward() first"]),
    "position_ids without begin": (lambda c: c.position_ids, errors.CacheStateError, ["begin_forward() first"]),
    "attention without begin": (
        lambda c: c.attention(0, rows(1, 4), rows(1, 2), rows(1, 2)),
        errors.CacheStateError,
        ["begin_forward() first"],
    ),
    "begin unknown": (lambda c: c.begin_forward([1, 6], [1, 1]), errors.UnknownSequenceError, ["sequence 6"]),
    "begin duplicate": (lambda c: c.begin_forward([1, 3, 1], [1, 1, 1]), errors.ArgumentError, ["sequence 1 twice"]),
    "begin negative": (
        lambda c: c.begin_forward([1, 3], [1, -4]),
        errors.ArgumentError,
        ["`append_lengths` is -4 for sequence 3"],
    ),
    "begin lengths differ": (
        lambda c: c.begin_forward([1, 3], [1]),
        errors.ArgumentError,
        ["`append_lengths` has 1 entries and `ids` 2"],
    ),
    "begin max_batch": (
        lambda c: c.begin_forward([1, 2, 3, 4], [1] * 4),
        errors.ArgumentError,
        ["`ids` names 4", "max_batch = 3"],
    ),
    "begin max_tokens": (
        lambda c: c.begin_forward([1, 3], [30, 1]),
        errors.ArgumentError,
        ["31", "max_tokens = 30", "chunks"],
    ),
    "begin overflowing": (
        lambda c: c.begin_forward([1, 3], [2**63 - 1, 2**63 - 1]),
        errors.ArgumentError,
        ["max_tokens = 30"],
    ),
    "begin out of pages": (
        lambda c: c.begin_forward([3, 4], [8, 16]),
        errors.OutOfPagesError,
        # 2 for sequence 3, 4 for sequence 4; sequence 1 alone owns its third page, sequence 3 both of its own
        [
            "needs 6 pages",
            "6 for new tokens, 0 to copy",
            "5 of 10 are free",
            "sequence 3 frees 2 pages",
            "1 frees 1 page",
        ],
    ),
    "begin out of pages, copying": (
        lambda c: c.begin_forward([2, 4], [3, 16]),
        errors.OutOfPagesError,
        ["needs 6 pages", "5 for new tokens, 1 to copy", "5 of 10"],
    ),
    "begin no integers": (lambda c: c.begin_forward([1], [1.5]), errors.DTypeError, ["`append_lengths`", "1.5"]),
    "begin no list": (lambda c: c.begin_forward(1, [1]), errors.DTypeError, ["`ids` is 1", "list of integers"]),
    "id too large": (lambda c: c.add_sequence(2**63), errors.ArgumentError, ["`seq_id`", "64 bits"]),
    "id no integer": (lambda c: c.add_sequence("a"), errors.DTypeError, ["`seq_id`", "'a'"]),
    "bytes_after unknown": (lambda c: c.bytes_after([9], [1]), errors.UnknownSequenceError, ["sequence 9"]),
    "bytes_after duplicate": (lambda c: c.bytes_after([1, 1], [1, 1]), errors.ArgumentError, ["twice"]),
    "bytes_after negative": (lambda c: c.bytes_after([1], [-1]), errors.ArgumentError, ["-1 for sequence 1"]),
    "bytes_after too long": (
        lambda c: c.bytes_after([1], [2**31 - 1]),
        errors.ArgumentError,
        ["at most 2147483647", "has 9 tokens"],
    ),
    "pages layer": (lambda c: c.pages(2), errors.ArgumentError, ["`layer` is 2", "2 layers", "0 to 1"]),
    "pages negative layer": (lambda c: c.pages(-1), errors.ArgumentError, ["`layer` is -1"]),
    "bind zero": (lambda c: c.bind(0), errors.ArgumentError, ["`token` is 0"]),
    "release unbound": (lambda c: c.release(5), errors.CacheStateError, ["executable 5", "serves none"]),
}


@pytest.mark.parametrize("name", IDLE)
def test_between_steps(cache, name):
    action, error, words = IDLE[name]
    before = snapshot(cache)
    with pytest.raises(error) as caught:
        action(cache)
    for word in words:
        assert word in str(caught.value)
    assert snapshot(cache) == before
    step(cache, [1, 2, 3], [1, 1, 1])  # it works on


Q, K = rows(5, 4), rows(5, 2)
STEP = {
    "begin twice": (
        lambda c: c.begin_forward([4], [1]),
        errors.CacheStateError,
        ["begin_forward()", "2 sequences and 5 tokens"],
    ),
    "add": (lambda c: c.add_sequence(9), errors.CacheStateError, ["add()", "end_forward()"]),
    "remove": (lambda c: c.remove_sequence(4), errors.CacheStateError, ["remove()"]),
    "fork": (lambda c: c.fork_sequence(1, 9), errors.CacheStateError, ["fork()"]),
    "pop": (lambda c: c.pop(1, 1), errors.CacheStateError, ["pop()"]),
    "truncate": (lambda c: c.truncate(1, 1), errors.CacheStateError, ["truncate()"]),
    "clear": (lambda c: c.clear(), errors.CacheStateError, ["clear()"]),
    "layer": (lambda c: c.attention(2, Q, K, K), errors.ArgumentError, ["`layer` is 2"]),
    "negative layer": (lambda c: c.attention(-1, Q, K, K), errors.ArgumentError, ["`layer` is -1"]),
    "q tokens": (lambda c: c.attention(0, Q[:4], K, K), errors.PlanMismatchError, ["`q`", "[4, 4, 16]", "5 tokens"]),
    "k tokens": (lambda c: c.attention(0, Q, K[:4], K), errors.PlanMismatchError, ["`k`", "5 tokens"]),
    "v tokens": (lambda c: c.attention(0, Q, K, K[:0]), errors.PlanMismatchError, ["`v`", "[0, 2, 16]"]),
    "out tokens": (lambda c: c.attention(0, Q, K, K, out=Q[1:].copy()), errors.PlanMismatchError, ["`out`"]),
    "q heads": (lambda c: c.attention(0, rows(5, 6), K, K), errors.ArgumentError, ["`q`", "must be 4 (num_qo_heads"]),
    "k heads": (lambda c: c.attention(0, Q, Q, K), errors.ArgumentError, ["`k`", "must be 2 (num_kv_heads"]),
    "head_dim": (
        lambda c: c.attention(0, Q, K, np.zeros((5, 2, 24), "f4")),
        errors.ArgumentError,
        ["`v`", "must be 16"],
    ),
    "rank": (lambda c: c.attention(0, Q[None], K, K), errors.ArgumentError, ["`q`", "rank 4"]),
    "q dtype": (lambda c: c.attention(0, Q.astype("f2"), K, K), errors.DTypeError, ["`q`", "float16", "float32"]),
    "v dtype": (
        lambda c: c.attention(0, Q, K, torch.zeros(5, 2, 16).bfloat16()),
        errors.DTypeError,
        ["`v`", "bfloat16"],
    ),
    "no tensor": (lambda c: c.attention(0, Q, K, [1.0]), errors.ArgumentError, ["`v` is a list"]),
    "not contiguous": (
        lambda c: c.attention(0, Q, K, np.zeros((5, 2, 32), "f4")[:, :, ::2]),
        errors.ArgumentError,
        ["`v` has stride 2"],
    ),
    "full mask": (
        lambda c: c.attention(0, Q, K, K, causal=False),
        errors.PlanMismatchError,
        ["`causal` is 0", "planned the step with causal = 1"],
    ),
    "scale": (lambda c: c.attention(0, Q, K, K, sm_scale=float("nan")), errors.ArgumentError, ["`sm_scale` is nan"]),
}


@pytest.mark.parametrize("name", STEP)
def test_within_a_step(cache, name):
    action, error, words = STEP[name]
    cache.begin_forward([1, 3], [2, 3])
    before = snapshot(cache)
    with pytest.raises(error) as caught:
        action(cache)
    for word in words:
        assert word in str(caught.value)
    assert snapshot(cache) == before
    assert np.isfinite(cache.attention(0, Q, K, K)).all()
    cache.end_forward()
    assert cache.seq_len(1) == 11


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_layers": 0}, errors.ArgumentError, ["`num_layers` is 0"]),
        ({"num_pages": 0}, errors.ArgumentError, ["`num_pages` is 0", "from 1 to"]),
        ({"num_pages": 2**31}, errors.ArgumentError, ["`num_pages`"]),
        ({"num_pages": 2**31 - 1, "page_size": 2**31 - 1}, errors.ArgumentError, ["`num_pages`", "no address"]),
        ({"num_pages": 2**31 - 1, "page_size": 2**16}, errors.ArgumentError, ["the system has no", "fewer pages"]),
        ({"page_size": -4}, errors.ArgumentError, ["`page_size` is -4"]),
        ({"max_batch": 0}, errors.ArgumentError, ["`max_batch` is 0"]),
        ({"max_tokens": 0}, errors.ArgumentError, ["`max_tokens` is 0"]),
        ({"num_ctas": -1}, errors.ArgumentError, ["`num_ctas` is -1"]),
        ({"num_threads": -1}, errors.ArgumentError, ["`num_threads` is -1"]),
        ({"num_qo_heads": 5}, errors.ArgumentError, ["`num_qo_heads` is 5", "num_kv_heads = 2"]),
        ({"head_dim": 20}, errors.ArgumentError, ["`head_dim` is 20", "multiple of 8"]),
        ({"head_dim": 264}, errors.ArgumentError, ["`head_dim` is 264", "256"]),
        ({"dtype": "int8"}, errors.DTypeError, ["'int8'", "bfloat16"]),
        ({"dtype": "float64"}, errors.DTypeError, ["'float64'"]),
        ({"device": "cuda"}, errors.ExecutorError, ["`device`", "cpu"]),
        ({"device": "abacus"}, errors.ExecutorError, ["'abacus'"]),
        ({"num_layers": 1.0}, errors.DTypeError, ["`num_layers` is 1.0"]),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_create_refuses(change, error, words):
    with pytest.raises(error) as caught:
        PagedKVCache(**{**CREATE, **change})
    for word in words:
        assert word in str(caught.value)


def test_packed_functions_check_what_python_would(cache):
    """From C++ or TVM there is no Python class in front."""
    with pytest.raises(errors.DTypeError, match="float64"):
        _ffi.func("kv_cache_create")(1, 1, 1, 8, "float64", 1, 1, 1, 1, 0, 0, tvm_ffi.device("cpu"))
    with pytest.raises(TypeError, match=r"tvm_infer\.PagedKVCache\.v5"):
        _ffi.func("kv_cache_add")(np.zeros(3, np.int32), 1)
    with pytest.raises(TypeError, match=r"tvm_infer\.PagedKVCache\.v5"):
        _ffi.func("kv_cache_add")(None, 1)


def test_a_plan_that_fails_changes_nothing():
    """The pages are there, but 2^24 tokens of 128 query heads are more rows than a plan's 32 bits number."""
    cache = PagedKVCache(
        num_layers=1,
        num_qo_heads=128,
        num_kv_heads=1,
        head_dim=8,
        dtype="float16",
        page_size=1024,
        num_pages=2**14,
        max_batch=2,
        max_tokens=2**24,
    )
    cache.add_sequence(1)
    before = tuple(cache._call("debug_state"))
    with pytest.raises(errors.ArgumentError, match="2147483647"):
        cache.begin_forward([1], [2**24])
    assert tuple(cache._call("debug_state")) == before
    cache.begin_forward([1], [1])


def test_a_body_that_raises_cancels_the_step(cache):
    before = snapshot(cache)
    with pytest.raises(ZeroDivisionError), cache.forward([1, 2], [2, 3]) as s:
        s.attention(0, Q, K, K)
        raise ZeroDivisionError
    assert snapshot(cache)[0] == before[0]
    # what the sequences held, they hold
    fresh = [cache.gather(seq, layer) for seq in (1, 2) for layer in (0, 1)]
    assert all(np.isfinite(x).all() for pair in fresh for x in pair)


def test_a_body_may_cancel_by_itself(cache):
    with pytest.raises(KeyError), cache.forward([1], [2]):
        cache.cancel_forward()
        raise KeyError
    assert cache.seq_len(1) == 9


def test_a_second_executable_is_refused(cache):
    cache.bind(11)
    cache.bind(11)
    with pytest.raises(errors.CacheStateError, match="serves executable 11 and cannot serve executable 12"):
        cache.bind(12)
    with pytest.raises(errors.CacheStateError, match="executable 12 released a cache that serves executable 11"):
        cache.release(12)
    cache.release(11)
    cache.bind(12)


def test_what_frees_pages_does(cache):
    """The error's advice is true: remove() of the sequence that it names makes the step fit."""
    with pytest.raises(errors.OutOfPagesError, match="sequence 3 frees 2 pages"):
        cache.begin_forward([4], [28])
    cache.remove_sequence(3)
    cache.begin_forward([4], [28])


def test_when_all_pages_are_shared_the_error_says_so():
    cache = PagedKVCache(**{**CREATE, "num_pages": 2})
    cache.add_sequence(1)
    step(cache, [1], [8])
    cache.fork_sequence(1, 2)
    with pytest.raises(errors.OutOfPagesError, match="all pages are shared: only removing every fork"):
        cache.begin_forward([2], [1])
    cache.clear()
    cache.add_sequence(3)
    with pytest.raises(errors.OutOfPagesError, match=r"2 of 2 are free.*append fewer tokens"):
        cache.begin_forward([3], [9])

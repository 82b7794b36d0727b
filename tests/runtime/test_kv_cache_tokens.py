"""Pages taken out of the middle of a sequence, tokens put in the place of others: packed functions that caches of others need."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_infer import _ffi, errors, variant
from tvm_infer.runtime import PagedKVCache

LAYERS, HKV, DIM = 3, 2, 16


def make(dtype="float32", **settings):
    defaults = dict(page_size=4, num_pages=32, max_batch=4, max_tokens=64)
    return PagedKVCache(
        num_layers=LAYERS, num_qo_heads=4, num_kv_heads=HKV, head_dim=DIM, dtype=dtype, **{**defaults, **settings}
    )


def fill(cache, seq, n, seed=0):
    """n tokens more; returns [LAYERS, 2, n, HKV, DIM]."""
    kv = np.random.default_rng(seed).standard_normal((LAYERS, 2, n, HKV, DIM)).astype(np.float32)
    with cache.forward([seq], [n]) as step:
        for layer in range(LAYERS):
            step.attention(layer, np.zeros((n, 4, DIM), np.float32), *kv[layer])
    return kv


def contents(cache, seq, start=0):
    return np.stack([np.stack(cache.gather(seq, layer, start)) for layer in range(LAYERS)])


def move(cache, ids, src, dst):
    _ffi.func("kv_cache_move_tokens")(cache, ids, src, dst)


def test_moves_are_made_one_after_the_other():
    cache = make()
    for seq in (5, 7):
        cache.add_sequence(seq)
    a, b = fill(cache, 5, 18), fill(cache, 7, 9, seed=1)
    move(cache, [5, 7, 5, 5, 5], [16, 8, 17, 3, 0], [3, 0, 4, 12, 0])
    a[:, :, 3], a[:, :, 4], b[:, :, 0] = a[:, :, 16], a[:, :, 17], b[:, :, 8]
    a[:, :, 12] = a[:, :, 3]
    assert np.array_equal(contents(cache, 5), a) and np.array_equal(contents(cache, 7), b)
    move(cache, [], [], [])


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 2), (2, 2), (4, 0), (0, 4)])
def test_dropped_pages_leave_no_gap(first, count):
    cache = make()
    cache.add_sequence(1)
    kv = fill(cache, 1, 18)
    cache.fork_sequence(1, 2)
    _ffi.func("kv_cache_drop_pages")(cache, 1, first, count)
    rest = np.concatenate([kv[:, :, : first * 4], kv[:, :, (first + count) * 4 :]], 2)
    assert np.array_equal(contents(cache, 1), rest) and np.array_equal(contents(cache, 2), kv)
    cache.remove_sequence(2)
    assert cache.num_used_pages == 5 - count
    more = fill(cache, 1, 6, seed=2)
    assert np.array_equal(contents(cache, 1), np.concatenate([rest, more], 2))


def test_what_is_refused():
    cache = make()
    cache.add_sequence(1)
    fill(cache, 1, 18)
    drop = _ffi.func("kv_cache_drop_pages")
    for first, count in [(-1, 1), (0, 5), (5, 0), (3, 2), (0, -1)]:
        with pytest.raises(
            errors.ArgumentError, match=f"are {first} and {count}; sequence 1 of 18 tokens has whole pages 0 to 3"
        ):
            drop(cache, 1, first, count)
    for ids, src, dst, message in [
        ([1], [18], [0], "`src` of move_tokens has 18 at entry 0; sequence 1 has positions 0 to 17"),
        ([1, 1], [0, 0], [0, -1], "`dst` of move_tokens has -1 at entry 1"),
        ([1, 1], [0], [0, 0], "`src` has 1 entries and `ids` 2"),
    ]:
        with pytest.raises(errors.ArgumentError, match=message):
            move(cache, ids, src, dst)
    with pytest.raises(errors.UnknownSequenceError):
        move(cache, [2], [0], [0])
    cache.fork_sequence(1, 2)
    with pytest.raises(
        errors.CacheStateError, match=r"`dst` of move_tokens has 3 at entry 0, .* a page that 2 sequences share"
    ):
        move(cache, [2], [9], [3])
    cache.begin_forward([1], [1])
    for call in (lambda: move(cache, [1], [0], [0]), lambda: drop(cache, 1, 0, 1)):
        with pytest.raises(errors.CacheStateError, match="end_forward"):
            call()


def test_behind_a_window():
    cache = make()
    cache.set_variant(variant.sliding_window.bind(window=5))
    cache.add_sequence(1)
    fill(cache, 1, 18)
    fill(cache, 1, 2)
    with pytest.raises(errors.ArgumentError, match=r"`dst` of move_tokens has 11 at entry 0, .* left the window"):
        move(cache, [1], [19], [11])
    with pytest.raises(
        errors.ArgumentError, match=r"a sequence that gave back its pages 0 to 2, which left the window"
    ):
        _ffi.func("kv_cache_drop_pages")(cache, 1, 3, 1)

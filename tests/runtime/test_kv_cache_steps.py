"""begin_step: what a model reads in a step, at addresses that depend on the number of rows alone; padding rows."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_infer import PagedKVCache, errors

LAYERS, QO_HEADS, KV_HEADS, HEAD_DIM, MAX_TOKENS = 2, 4, 2, 16, 40


@pytest.fixture
def cache():
    return PagedKVCache(
        num_layers=LAYERS,
        num_qo_heads=QO_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=4,
        num_pages=64,
        max_batch=8,
        max_tokens=MAX_TOKENS,
    )


def views(cache, num_rows, num_logits=0):
    return [np.from_dlpack(x) for x in cache.step_inputs(num_rows, num_logits)]


def address(array):
    return array.__array_interface__["data"][0]


def qkv(rng, rows):
    q = rng.standard_normal((rows, QO_HEADS, HEAD_DIM), np.float32)
    return q, *rng.standard_normal((2, rows, KV_HEADS, HEAD_DIM), np.float32)


def test_inputs_of_a_step(cache):
    cache.add_sequence(1), cache.add_sequence(2)
    cache.begin_step([1, 2], [3, 2], token_ids=np.arange(10, 15), logit_rows=np.array([4, 2]))
    ids, positions, rows = views(cache, 5, 2)
    assert (
        ids.tolist() == [[10, 11, 12, 13, 14]] and positions.tolist() == [[0, 1, 2, 0, 1]] and rows.tolist() == [4, 2]
    )
    cache.end_forward()
    cache.begin_step([2, 1], [1, 1], num_rows=4, token_ids=np.array([7, 8]))
    ids, positions, _ = views(cache, 4)
    assert ids.tolist() == [[7, 8, 0, 0]] and positions.tolist() == [[2, 3, 0, 0]]
    assert np.from_dlpack(cache.position_ids).tolist() == [[2, 3, 0, 0]] and cache.query_positions.tolist() == [2, 3]
    cache.end_forward()


def test_addresses_depend_on_the_number_of_rows_alone(cache):
    """A captured graph of 4 rows reads what later steps of 4 rows bring, whatever came in between."""
    cache.add_sequence(0)
    before = [address(x) for x in views(cache, 4, 2)]
    kept = views(cache, 4, 2)
    for lengths, rows in (([1], 1), ([MAX_TOKENS - 1], MAX_TOKENS), ([3], 4)):
        cache.begin_step([0], lengths, num_rows=rows, token_ids=np.full(lengths[0], 9), logit_rows=np.array([0]))
        cache.end_forward()
    assert [address(x) for x in views(cache, 4, 2)] == before and len(set(before)) == 3
    assert kept[0].tolist() == [[9, 9, 9, 0]] and kept[1].tolist() == [[40, 41, 42, 0]]
    assert all(a % 128 == 0 for a in before)


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_padding_appends_nothing_and_gives_zero(cache, padding):
    rng = np.random.default_rng(padding)
    other = PagedKVCache(
        num_layers=LAYERS, num_qo_heads=QO_HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, num_pages=32, max_batch=8, max_tokens=40
    )  # fmt: skip
    for seq in (0, 1, 2):
        cache.add_sequence(seq), other.add_sequence(seq)
    for lengths in ([5, 1, 9], [1, 1, 1], [0, 3, 1]):
        tokens = sum(lengths)
        q, k, v = qkv(rng, tokens + padding)
        k[tokens:] = v[tokens:] = q[tokens:] = np.nan
        out = np.full_like(q, np.nan)
        cache.begin_step([0, 1, 2], lengths, num_rows=tokens + padding)
        other.begin_forward([0, 1, 2], lengths)
        for layer in range(LAYERS):
            cache.attention(layer, q, k, v, out=out)
            expected = other.attention(layer, q[:tokens], k[:tokens], v[:tokens])
            np.testing.assert_array_equal(out[:tokens], expected)
            assert not out[tokens:].any()
        cache.end_forward(), other.end_forward()
    for seq in (0, 1, 2):
        for mine, theirs in zip(cache.gather(seq, 1), other.gather(seq, 1), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_forks_of_forks_share_pages_and_attend_alike(cache):
    """Page tables count from the step's first word; a page that several sequences own stands in each one's table."""
    rng = np.random.default_rng(3)
    cache.add_sequence(0)
    with cache.forward([0], [10]) as step:
        for layer in range(LAYERS):
            step.attention(layer, *qkv(rng, 10))
    for child in range(1, 6):
        cache.fork_sequence(child - 1, child, 9 if child % 2 else -1)
    with cache.forward(range(6), [1] * 6) as step:
        q, k, v = qkv(rng, 6)
        o = step.attention(0, q, k, v)
        step.attention(1, q, k, v)
    for seq in range(6):
        keys, values = cache.gather(seq, 0)
        for head in range(QO_HEADS):
            scores = keys[:, head // 2].astype(np.float64) @ q[seq, head] / np.sqrt(HEAD_DIM)
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(o[seq, head], weights @ values[:, head // 2] / weights.sum(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_rows": 2}, errors.ArgumentError, ["`num_rows` is 2", "3 tokens", "max_tokens = 40"]),
        ({"num_rows": 41}, errors.ArgumentError, ["`num_rows` is 41", "40"]),
        ({"num_rows": -1, "logit_rows": np.array([0])}, errors.ArgumentError, ["`num_rows` is -1", "at least 0"]),
        ({"token_ids": np.arange(4)}, errors.ArgumentError, ["`token_ids`", "3"]),
        ({"token_ids": np.arange(3, dtype=np.int32)}, errors.DTypeError, ["`token_ids`", "int32"]),
        ({"token_ids": [1, 2, 3, 4]}, errors.ArgumentError, ["`token_ids`", "3"]),
        ({"token_ids": [1, 2.5, 3]}, errors.DTypeError, ["`token_ids` holds float64", "list of integers"]),
        ({"token_ids": np.zeros((3, 1), np.int64)}, errors.ArgumentError, ["`token_ids`", "rank 2"]),
        ({"logit_rows": np.array([3])}, errors.ArgumentError, ["`logit_rows` has 3 at entry 0", "0 to 2"]),
        ({"logit_rows": np.array([0, -1])}, errors.ArgumentError, ["`logit_rows` has -1 at entry 1"]),
        ({"logit_rows": np.array([0, 1, 2, 2])}, errors.ArgumentError, ["`logit_rows` has 4 entries"]),
    ],
    ids=str,
)
def test_refusals_change_nothing(cache, change, error, words):
    cache.add_sequence(0)
    with pytest.raises(error) as caught:
        cache.begin_step([0], [3], **change)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not cache.in_forward and cache.seq_len(0) == 0 and cache.num_used_pages == 0
    cache.begin_step([0], [3])
    cache.end_forward()


def test_rows_that_were_not_announced(cache):
    cache.add_sequence(0)
    cache.begin_step([0], [3], num_rows=4)
    q, k, v = qkv(np.random.default_rng(0), 3)
    with pytest.raises(errors.PlanMismatchError, match="3 tokens in 4 rows, padding included"):
        cache.attention(0, q, k, v)
    with pytest.raises(errors.ArgumentError, match="`num_rows` is 41"):
        cache.step_inputs(41)

"""Bounds that do not fit the cache are refused before an append writes; buffers of a selection."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tvm_infer
from tvm_infer import _ffi
from tvm_infer.errors import ArgumentError, DTypeError

TABLES = {"kv_page_indptr": np.array([0, 2], np.int32), "kv_page_indices": np.array([1, 0], np.int32)}


def call(kind, q, k, v, cache, bounds):
    plan = tvm_infer.plan([0, 5], [5], num_qo_heads=4, num_kv_heads=2, head_dim=16)
    if kind == "append":
        tvm_infer.append(k, v, cache, qo_indptr=[0, 5], kv_len=[5], page_bounds=bounds, **TABLES)
    elif kind == "append_attention":
        tvm_infer.append_attention(q, k, v, cache, plan, page_bounds=bounds, **TABLES)
    else:
        rope = tvm_infer.RopeConfig(rotary_dim=16)
        tvm_infer.rope_append(q, k, v, cache, rope=rope, plan=plan, out=q, page_bounds=bounds, **TABLES)


@pytest.mark.parametrize("kind", ["append", "append_attention", "rope_append"])
def test_nothing_is_written_where_bounds_do_not_fit(kind):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((5, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    cache, before = np.zeros((2, 2, 2, 4, 16), np.float32), q.copy()
    with pytest.raises(DTypeError, match="`page_bounds` has dtype float16"):
        call(kind, q, k, v, cache, np.zeros((2, 2, 2, 16), np.float16))
    with pytest.raises(ArgumentError, match=re.escape("`page_bounds`")):
        call(kind, q, k, v, cache, np.zeros((3, 2, 2, 16), np.float32))
    assert not cache.any()
    np.testing.assert_array_equal(q, before)
    call(kind, q, k, v, cache, np.zeros((2, 2, 2, 16), np.float32))
    assert cache.any()


def test_least_number_of_pages_is_of_32_bits():
    rng = np.random.default_rng(1)
    q, bounds = rng.random((1, 2, 16)).astype(np.float32), np.zeros((2, 2, 1, 16), np.float32)
    scores = np.full((1, 1, 1), 7, np.float32)
    for least in (-1, 2**31, 2**32):
        with pytest.raises(ArgumentError, match=f"`min_pages` is {least}; it must be from 0 to 2147483647"):
            _ffi.func("page_scores")(q, bounds, np.array([8], np.int32), *TABLES.values(), 4, 0, least, scores)
    assert (scores == 7).all()


def test_a_selection_does_not_write_the_plan_that_it_reads():
    heads = {"num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    plan = tvm_infer.plan([0, 1], [[8]], **heads).buffer
    with pytest.raises(ArgumentError, match="`plan` is the buffer of `planned`"):
        _ffi.func("select_pages")(
            np.zeros((1, 1, 2), np.float32), np.array([8], np.int32), *TABLES.values(), 4, 2, 0, 1, plan, plan,
            np.zeros(2, np.int32),
        )  # fmt: skip

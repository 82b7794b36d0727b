"""A cache whose keys are wider than its values: every operation on pages, against float64."""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import pytest

from tvm_infer import RopeConfig, _ffi
from tvm_infer.errors import ArgumentError
from tvm_infer.runtime import PagedKVCache
from tvm_infer.testing import rope_reference

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_kv_cache_attention import Driver

SIZES = dict(num_layers=2, num_qo_heads=4, num_kv_heads=2, num_pages=8, max_batch=2, max_tokens=64)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("widths", "page_size"), [((192, 128), 16), ((40, 24), 7), ((24, 8), 1)])
def test_steps_forks_and_moves(dtype, widths, page_size):
    d = Driver(dtype=dtype, num_layers=2, head_dim=widths[0], head_dim_vo=widths[1], page_size=page_size, num_pages=300)
    cache = d.cache
    assert (cache.head_dim, cache.head_dim_vo) == widths
    size = np.dtype(d.kind).itemsize
    assert cache.bytes_per_page == 2 * cache.num_kv_heads * page_size * sum(widths) * size
    d.add(1), d.add(2)
    d.step([1, 2], [50, 3])
    d.fork(1, 3)  # shares a last page that both write to: copied
    d.step([3, 1, 2], [1, 1, 20])
    d.step([1], [5], cancel=True)
    _ffi.func("kv_cache_move_tokens")(cache, [2, 2], [20, 21], [3, 7])
    for layer in range(2):
        for of in (d.keys[2][layer], d.values[2][layer]):
            of[[3, 7]] = of[[20, 21]]
    d.check_contents()
    d.fork(2, 4, 9)
    d.step([4, 3], [2, 33], causal=False)
    d.truncate(1, 30)
    d.step([1, 2], [1, 1])
    cache.swap_out(3)
    assert cache.swapped_bytes > 0
    cache.swap_in(3)
    d.check_contents()
    d.step([3, 2], [1, 2])


def test_prefixes_are_found_and_shared_once():
    d = Driver(head_dim=32, head_dim_vo=16, prefix_reuse=True, num_pages=200, num_ctas=2, page_size=16, max_tokens=2000)
    d.add(0)
    d.step([0], [1500])
    for seq in range(1, 8):
        d.fork(0, seq)
    d.step(list(range(8)), [1] * 8)
    assert d.cache.plan.num_shared_works > 0


def test_rotation_of_queries_and_keys():
    """On the host: values are narrower than what turns."""
    rope = RopeConfig(16)
    cache = PagedKVCache(**SIZES, head_dim=32, head_dim_vo=8)
    cache.add_sequence(0)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((9, h, w)).astype(np.float32) for h, w in ((4, 32), (2, 32), (2, 8)))
    rotated, out = np.empty_like(q), np.empty((9, 4, 8), np.float32)
    with cache.forward([0], [9]):
        _ffi.func("attention_with_kv_cache_rope")(
            cache, 1, q, k, v, rope.inv_freq(), 0, rope.magnitude(), 32**-0.5, 1, rotated, out
        )
    keys, values = cache.gather(0, 1)
    np.testing.assert_allclose(keys, rope_reference(k, np.arange(9), rope.inv_freq()), atol=2e-6)
    np.testing.assert_array_equal(values, v)


def test_views_of_pages():
    cache = PagedKVCache(**SIZES, head_dim=32, head_dim_vo=8)
    keys, values = cache.pages(1)
    assert keys.shape == (8, 2, 16, 32) and values.shape == (8, 2, 16, 8)
    assert keys.strides[0] == values.strides[0] == 2 * 16 * 40 * 4  # a page: keys of both heads, then values
    assert "head_dim 32 / 8" in repr(cache)
    equal = PagedKVCache(**SIZES, head_dim=32)
    assert equal.head_dim_vo == 32 and equal.pages(0).shape == (8, 2, 2, 16, 32)
    of_values = np.from_dlpack(_ffi.func("kv_cache_value_pages")(equal, 0))
    equal.pages(0)[3, 1] = 5.0
    assert (of_values[3] == 5.0).all() and of_values.shape == (8, 2, 16, 32)


@pytest.mark.parametrize("head_dim_vo", [0, 12, 40, 264])
def test_widths_that_are_none(head_dim_vo):
    with pytest.raises(
        ArgumentError, match=rf"`head_dim_vo` is {head_dim_vo}; it must be a multiple of 8, from 8 to head_dim = 32"
    ):
        PagedKVCache(**SIZES, head_dim=32, head_dim_vo=head_dim_vo)


def test_what_needs_one_width_says_so():
    cache = PagedKVCache(**SIZES, head_dim=32, head_dim_vo=8)
    cache.set_rope(RopeConfig(0))
    cache.add_sequence(0)
    with (
        cache.forward([0], [3]),
        pytest.raises(ArgumentError, match=r"attention_fused_qkv.*head_dim 32 and head_dim_vo 8"),
    ):
        cache.attention_fused_qkv(0, np.zeros((3, 8, 32), np.float32))
    with pytest.raises(ArgumentError, match=r"head_dim 32 and head_dim_vo 8.*swap the sequence out"):
        cache.export_sequence(0)
    with pytest.raises(ArgumentError, match=r"export_sequence.*head_dim 32 and head_dim_vo 8"):
        _ffi.func("kv_cache_export_pages")(cache, 0)
    other = PagedKVCache(**SIZES, head_dim=32)
    other.add_sequence(0)
    with other.forward([0], [3]):
        pass
    with pytest.raises(ArgumentError, match="of one width"):
        cache.import_sequence(5, other.export_sequence(0))
    q, k = np.zeros((1, 4, 32), np.float32), np.zeros((1, 2, 32), np.float32)
    with cache.forward([0], [1]), pytest.raises(ArgumentError, match=r"`v`.*must be 8 \(head_dim_vo of the cache\)"):
        cache.attention(0, q, k, k)

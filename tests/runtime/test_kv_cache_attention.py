"""Attention through the cache against float64: prefill, append, decode and mixtures, forks, cancelled steps, all array kinds.

Every slot without a token is NaN, so that reading one shows.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_infer import AttentionSpec, _ffi
from tvm_infer.runtime import PagedKVCache
from tvm_infer.testing import attention_reference, relative_error

# ‖o - ref‖ / ‖ref‖; what rounding the output (and, in the kernels, nothing else) to the dtype costs, twice
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
KIND = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Driver:
    """A poisoned cache, the keys and values that each sequence should hold, and the float64 answer of every step."""

    def __init__(self, *, dtype="float32", num_layers=1, seed=0, **settings):
        defaults = dict(
            num_qo_heads=6, num_kv_heads=2, head_dim=16, page_size=4, num_pages=64, max_batch=8, max_tokens=256
        )
        self.cache = PagedKVCache(**{**defaults, **settings}, num_layers=num_layers, dtype=dtype)
        for layer in range(num_layers):
            pages = self.cache.pages(layer)
            for plane in pages if isinstance(pages, tuple) else (pages,):
                plane[...] = np.nan
        self.rng = np.random.default_rng(seed)
        self.kind = KIND[dtype]
        self.tolerance = TOLERANCE[dtype]
        self.keys: dict[int, list] = {}
        self.values: dict[int, list] = {}

    def add(self, seq):
        self.cache.add_sequence(seq)
        c = self.cache
        none = [np.zeros((0, c.num_kv_heads, width), self.kind) for width in (c.head_dim, c.head_dim_vo)]
        self.keys[seq], self.values[seq] = ([x] * c.num_layers for x in none)

    def fork(self, parent, child, position=-1):
        self.cache.fork_sequence(parent, child, position)
        end = None if position == -1 else position
        self.keys[child] = [k[:end] for k in self.keys[parent]]
        self.values[child] = [v[:end] for v in self.values[parent]]

    def truncate(self, seq, length):
        self.cache.truncate(seq, length)
        self.keys[seq] = [k[:length] for k in self.keys[seq]]
        self.values[seq] = [v[:length] for v in self.values[seq]]

    def random(self, n, heads, width=None):
        return self.rng.standard_normal((n, heads, width or self.cache.head_dim)).astype(self.kind)

    def kept(self, plane, layer, x):
        """What the cache keeps of keys (plane 0) or values (1)."""
        return x

    def step(self, ids, lengths, *, causal=True, sm_scale=None, call=None, cancel=False):
        """One step at every layer, compared with float64."""
        c, n = self.cache, sum(lengths)
        scale = c.head_dim**-0.5 if sm_scale is None else sm_scale
        c.begin_forward(ids, lengths, causal=causal)
        for layer in range(c.num_layers):
            q, k = self.random(n, c.num_qo_heads), self.random(n, c.num_kv_heads)
            v = self.random(n, c.num_kv_heads, c.head_dim_vo)
            o = (call or c.attention)(layer, q, k, v, causal=causal, sm_scale=sm_scale)
            row, k, v = 0, self.kept(0, layer, k), self.kept(1, layer, v)
            for seq, length in zip(ids, lengths, strict=True):
                rows = slice(row, row + length)
                row += length
                keys = np.concatenate([self.keys[seq][layer], k[rows]])
                values = np.concatenate([self.values[seq][layer], v[rows]])
                expected, _ = attention_reference(q[rows], keys, values, sm_scale=scale, causal=causal)
                assert relative_error(np.asarray(o)[rows], expected) <= self.tolerance, (seq, layer)
                if not cancel:
                    self.keys[seq][layer], self.values[seq][layer] = keys, values
        c.cancel_forward() if cancel else c.end_forward()
        self.check_contents()

    def check_contents(self):
        assert set(self.cache.sequences) == set(self.keys)
        for seq in self.keys:
            for layer in range(self.cache.num_layers):
                keys, values = self.cache.gather(seq, layer)
                assert np.array_equal(keys, self.keys[seq][layer])
                assert np.array_equal(values, self.values[seq][layer])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads", "head_dim"), [(4, 4, 8), (9, 3, 64), (8, 1, 40)])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_prefill_append_decode_and_mixtures(dtype, num_qo_heads, num_kv_heads, head_dim, page_size):
    d = Driver(
        dtype=dtype,
        num_layers=2,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_pages=400,
    )
    for seq in (10, 20, 30, 40):
        d.add(seq)
    d.step([10, 20, 30], [50, 1, 16])  # prefill
    d.step([30, 10, 20], [1, 1, 1])  # decode, in another order
    d.step([20, 40, 10], [9, 33, 1])  # append, prefill and decode together
    d.step([10, 20, 30, 40], [0, 1, 0, 0])  # most of the batch rests
    d.step([20], [70])
    d.step([40, 20], [1, 1], causal=False)


def test_long_sequences_are_split_and_merged():
    d = Driver(num_pages=1100, num_ctas=8, max_tokens=4096)
    d.add(1)
    d.add(2)
    d.step([1, 2], [1800, 13])
    d.step([1, 2], [1, 1])
    assert d.cache.plan.num_merges > 0
    d.step([2, 1], [1, 5], causal=False)


@pytest.mark.parametrize("position", [0, 1, 4, 6, 8, 9, -1])
def test_forks_that_diverge(position):
    """Both append different tokens, alone and together; each is attention over its own branch."""
    d = Driver(num_layers=2)
    d.add(1)
    d.step([1], [9])
    d.fork(1, 2, position)
    d.step([2], [3])
    d.step([1], [2])
    d.fork(2, 3)
    d.fork(2, 4)
    d.step([4, 2, 3], [1, 2, 1])  # all owners of a partly filled page write in one step
    d.step([3, 1, 2, 4], [1, 1, 5, 1])


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_the_longest_owner_keeps_the_page(order):
    """2 forks 1 within a page and both write in one step, which is cancelled: the page must still hold 1's tokens. If 2, the
    shorter, had kept it, its new token would have overwritten 1's."""
    d = Driver()
    d.add(1)
    d.step([1], [7])
    d.fork(1, 2, 5)
    used = d.cache.num_used_pages
    assert d.cache.pages_after(order, [1, 1]) == used + 1  # one of the two copies
    assert d.cache.bytes_after(order, [1, 1]) == (used + 1) * d.cache.bytes_per_page
    state = d.cache._call("debug_state")
    d.step(order, [1, 1], cancel=True)
    assert tuple(d.cache._call("debug_state")) == tuple(state)
    d.step(order, [1, 1])
    assert d.cache.num_used_pages == used + 1


def test_an_owner_that_rests_makes_the_others_copy():
    d = Driver()
    d.add(1)
    d.step([1], [6])
    d.fork(1, 2)
    d.fork(1, 3)
    used = d.cache.num_used_pages
    assert d.cache.pages_after([1, 2, 3], [1, 1, 1]) == used + 2
    assert d.cache.pages_after([1, 2, 3], [1, 1, 0]) == used + 2
    assert d.cache.pages_after([1, 2, 3], [0, 0, 0]) == used
    d.step([1, 2, 3], [1, 1, 0])
    assert d.cache.num_used_pages == used + 2


def test_a_copy_takes_its_tokens_along_and_nothing_else():
    """2 forks 1 before the end of a page: the tokens of 1 behind the fork stay where they are."""
    d = Driver(num_layers=2)
    d.add(1)
    d.step([1], [8])
    d.fork(1, 2, 5)
    d.step([2], [1])
    for layer in range(2):
        copied = d.cache.pages(layer)[d.cache.page_table(2)[-1]]
        assert np.isfinite(copied[:, :, :2]).all()
        assert np.isnan(copied[:, :, 2:]).all()


def test_pages_are_shared_until_written_and_freed_with_the_last_owner():
    d = Driver()
    d.add(1)
    d.step([1], [16])
    for child in range(2, 7):
        d.fork(1, child)
    assert d.cache.num_used_pages == 4
    assert d.cache.bytes == 4 * d.cache.bytes_per_page
    d.step([1, 2, 3, 4, 5, 6], [1] * 6)  # full pages are never copied
    assert d.cache.num_used_pages == 4 + 6
    for seq in range(1, 6):
        d.cache.remove_sequence(seq)
        del d.keys[seq], d.values[seq]
        d.check_contents()
    assert d.cache.num_used_pages == 5
    d.cache.remove_sequence(6)
    assert d.cache.num_used_pages == d.cache.bytes == len(d.cache) == 0


def test_truncate_and_pop_then_write_again():
    d = Driver()
    d.add(1)
    d.step([1], [11])
    d.fork(1, 2)
    d.truncate(1, 6)
    d.step([1], [3])
    d.truncate(2, 8)
    d.step([2, 1], [1, 1])
    d.cache.pop(1, 10)
    d.keys[1], d.values[1] = [d.keys[1][0][:0]], [d.values[1][0][:0]]
    d.step([1], [5])


def test_a_call_may_be_repeated_within_a_step():
    """TVM runs a captured region twice: the second call stores the same tokens and gives the same bits."""
    d = Driver()
    d.add(1)
    d.step([1], [10])
    q, k, v = d.random(3, 6), d.random(3, 2), d.random(3, 2)
    with d.cache.forward([1], [3]) as step:
        first = step.attention(0, q, k, v)
        pages = d.cache.pages(0).tobytes()
        second = step.attention(0, q, k, v)
        assert first.tobytes() == second.tobytes()
        assert pages == d.cache.pages(0).tobytes()


def test_other_sequences_do_not_change():
    """A step writes the slots of its new tokens and no other byte."""
    d = Driver(num_layers=2)
    for seq in (1, 2, 3):
        d.add(seq)
    d.step([1, 2, 3], [9, 5, 4])
    d.fork(1, 4)
    before = [d.cache.pages(layer).copy() for layer in range(2)]
    d.step([2], [2])
    first, second = d.cache.page_table(2)
    for layer in range(2):
        changed = (before[layer].view(np.int32) != d.cache.pages(layer).view(np.int32)).any(axis=(1, 2, 4))
        assert sorted(zip(*np.nonzero(changed), strict=True)) == [(second, 1), (second, 2)], first


@pytest.mark.parametrize("sm_scale", [None, 0.05, -1.0, 0.0])
def test_scale(sm_scale):
    d = Driver()
    d.add(1)
    d.step([1], [10], sm_scale=sm_scale)


def test_strided_and_offset_inputs():
    """q, k and v cut out of one projection [n, (h_q + 2 h_kv) * d], the output a part of a larger array."""
    d = Driver()
    c = d.cache

    def call(layer, q, k, v, **options):
        n = len(q)
        qkv = np.full((n + 2, 10 * 16 + 3), np.nan, np.float32)
        fused = qkv[1:-1, 3:].reshape(n, 10, 16)  # a view
        fused[:, :6], fused[:, 6:8], fused[:, 8:] = q, k, v
        out = np.full((n + 2, 8, 16), np.nan, np.float32)
        c.attention(layer, fused[:, :6], fused[:, 6:8], fused[:, 8:], out=out[1 : n + 1, 1:7], **options)
        assert (
            np.isnan(out[0]).all()
            and np.isnan(out[-1]).all()
            and np.isnan(out[:, 0]).all()
            and np.isnan(out[:, 7]).all()
        )
        return out[1 : n + 1, 1:7]

    d.add(1)
    d.add(2)
    d.step([1, 2], [7, 12], call=call)
    d.step([2, 1], [1, 1], call=call)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_in_torch_out(dtype):
    d = Driver(dtype=dtype)

    def call(layer, q, k, v, **options):
        tensors = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)) for x in (q, k, v)]
        tensors[0].requires_grad_()
        out = d.cache.attention(layer, *tensors, **options)
        assert isinstance(out, torch.Tensor)
        assert out.dtype == tensors[0].dtype
        given = torch.empty_like(out)
        assert d.cache.attention(layer, *tensors, out=given, **options) is given
        assert torch.equal(given, out)
        return out.detach().float().numpy()

    d.add(1)
    d.step([1], [7], call=call)
    d.step([1], [1], call=call)


def test_tvm_in_tvm_out():
    import tvm

    d = Driver()

    def call(layer, q, k, v, **options):
        out = d.cache.attention(layer, *(tvm.runtime.tensor(x) for x in (q, k, v)), **options)
        assert isinstance(out, tvm.runtime.Tensor)
        return out.numpy()

    d.add(1)
    d.step([1], [7], call=call)


def test_empty_steps():
    d = Driver()
    d.add(1)
    d.step([], [])
    d.step([1], [0])
    d.step([1], [3])
    d.step([1], [0])
    assert d.cache.seq_len(1) == 3


def test_step_view():
    d = Driver()
    for seq in (5, 6, 7):
        d.add(seq)
    d.step([5, 6, 7], [3, 1, 8])
    with d.cache.forward([6, 7, 5], [4, 0, 2]) as step:
        assert step.num_tokens == 6
        assert step.qo_indptr.tolist() == [0, 4, 4, 6]
        assert step.last_rows.tolist() == [3, 5]
        assert step.query_positions.tolist() == [1, 2, 3, 4, 3, 4]
        assert step.query_positions.dtype == np.int64
        ids = np.from_dlpack(step.position_ids)
        assert ids.shape == (1, 6) and ids[0].tolist() == [1, 2, 3, 4, 3, 4]
        assert step.plan.num_tokens == 6 and step.plan.num_requests == 3
        address = ids.ctypes.data
        assert d.cache.in_forward
        assert d.cache.seq_len(6) == 5
        assert "in a step" in repr(d.cache)
    with d.cache.forward([5], [1]) as step:
        again = np.from_dlpack(step.position_ids)
        assert again.ctypes.data == address  # fixed addresses: a captured graph reads the next step's positions


def test_for_spec_handle_and_repr():
    spec = AttentionSpec(num_qo_heads=4, num_kv_heads=2, head_dim=32, dtype="bfloat16", sm_scale=0.1)
    cache = PagedKVCache.for_spec(spec, 3, num_pages=8, max_batch=2, max_tokens=64, num_ctas=5, num_threads=1)
    other = PagedKVCache.from_handle(cache.__tvm_ffi_object__())
    assert other.dtype == "bfloat16" and other.num_ctas == 5 and other.num_threads == 1 and other.max_tokens == 64
    assert cache.pages(2).dtype == ml_dtypes.bfloat16 and cache.pages(2).shape == (8, 2, 2, 16, 32)
    other.add_sequence(4)
    assert 4 in cache and 5 not in cache and cache.sequences == (4,) and len(cache) == 1
    with cache.forward([4], [20]):
        pass
    assert "1 sequences in 2 of 8 pages of 16 tokens, 6 free" in repr(cache)
    assert cache.bytes == 2 * cache.bytes_per_page == 2 * (3 * 2 * 2 * 16 * 32 * 2)
    cache.clear()
    assert bool(cache) and len(cache) == 0
    # packed functions take the Python object as it is
    assert _ffi.func("kv_cache_num_free_pages")(cache) == 8


def test_pages_are_untouched_until_used():
    """A cache of 16 GiB costs nothing before sequences fill it."""
    cache = PagedKVCache(
        num_layers=32, num_qo_heads=1, num_kv_heads=1, head_dim=64, num_pages=2**16, max_batch=1, max_tokens=16
    )
    cache.add_sequence(-(2**63))
    with cache.forward([-(2**63)], [16]) as step:
        one = np.ones((16, 1, 64), np.float32)
        assert np.allclose(step.attention(31, one, one, one), 1.0)
    assert cache.page_table(-(2**63)) == (0,)


@settings(max_examples=60)
@given(st.data())
def test_random_batches(data):
    """Forks and ragged steps of any shape, against float64."""
    group, num_kv_heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    d = Driver(
        num_qo_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=8 * data.draw(st.integers(1, 4)),
        page_size=data.draw(st.integers(1, 9)),
        num_pages=512,
        num_ctas=data.draw(st.integers(1, 9)),
        num_threads=data.draw(st.integers(1, 2)),
        seed=data.draw(st.integers(0, 2**16)),
    )
    d.add(0)
    for _ in range(data.draw(st.integers(1, 5))):
        for _ in range(data.draw(st.integers(0, 2))):
            parent = data.draw(st.sampled_from(sorted(d.keys)))
            d.fork(parent, len(d.keys), data.draw(st.integers(-1, d.cache.seq_len(parent))))
        ids = data.draw(st.lists(st.sampled_from(sorted(d.keys)), unique=True, max_size=6))
        d.step(ids, [data.draw(st.integers(0, 24)) for _ in ids], causal=data.draw(st.booleans()))

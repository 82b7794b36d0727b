"""tvm_infer.plan, attention, ragged_attention, append, append_attention, merge: kinds of arrays, layouts, views, errors."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_infer
from tvm_infer import errors
from tvm_infer.testing import make_paged_batch, merge_reference, relative_error
from tvm_infer.testing.batches import numpy_dtype

TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.2e-2}
QO, KV = [1, 5, 0, 3, 1], [37, 5, 11, 20, 1]


def batch_of(dtype="float32", *, heads=(6, 2), head_dim=40, page_size=5, **kwargs):
    return make_paged_batch(
        QO,
        KV,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        page_size=page_size,
        dtype=dtype,
        **kwargs,
    )


def plan_of(batch, **kwargs):
    kwargs = {"num_ctas": 3, **kwargs}
    return tvm_infer.plan(
        batch.qo_indptr,
        batch.kv_len,
        num_qo_heads=batch.q.shape[1],
        num_kv_heads=batch.kv_cache.shape[2],
        head_dim=batch.q.shape[2],
        **kwargs,
    )


def to_kind(x: np.ndarray, kind: str):
    if kind == "torch":
        torch = pytest.importorskip("torch")
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(x.copy())
    if kind == "tvm":
        import tvm

        return tvm.runtime.tensor(x)
    return x.copy()


def to_numpy(x, like: np.ndarray) -> np.ndarray:
    if hasattr(x, "detach"):
        import torch

        return x.to(torch.float64).numpy()
    return (x.numpy() if hasattr(x, "numpy") else x).astype(np.float64)


@pytest.mark.parametrize("kind", ["numpy", "torch", "tvm"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_on_every_kind_of_array(kind, dtype):
    batch = batch_of(dtype)
    q, cache = to_kind(batch.q, kind), to_kind(batch.kv_cache, kind)
    indptr, indices = to_kind(batch.kv_page_indptr, kind), to_kind(batch.kv_page_indices, kind)
    o, lse = tvm_infer.attention(
        q, cache, plan_of(batch), kv_page_indptr=indptr, kv_page_indices=indices, return_lse=True
    )
    assert type(o) is type(q)
    expected, expected_lse = batch.reference()
    assert relative_error(to_numpy(o, batch.q), expected) < TOLERANCE[dtype]
    assert np.allclose(to_numpy(lse, batch.q), expected_lse, atol=1e-5)


def layouts(batch):
    """The same cache in each form that attention accepts: (kv_cache, kv_layout)."""
    c = batch.kv_cache
    k, v = c[:, 0], c[:, 1]
    nhd = np.ascontiguousarray(c.transpose(0, 1, 3, 2, 4))
    return {
        "combined HND": (c, "HND"),
        "combined NHD": (nhd, "NHD"),
        "separate views": ((k, v), "HND"),
        "separate copies": ((k.copy(), v.copy()), "HND"),
        "separate NHD": (
            (np.ascontiguousarray(k.transpose(0, 2, 1, 3)), np.ascontiguousarray(v.transpose(0, 2, 1, 3))),
            "NHD",
        ),
        "NHD by a permuted view": ((k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)), "NHD"),
    }


@pytest.mark.parametrize("name", list(layouts(batch_of())))
def test_cache_layouts(name):
    batch = batch_of()
    cache, layout = layouts(batch)[name]
    o = tvm_infer.attention(batch.q, cache, plan_of(batch), kv_layout=layout, **batch.tables)
    assert relative_error(o, batch.reference()[0]) < TOLERANCE["float32"]


@pytest.mark.parametrize("name", list(layouts(batch_of())))
def test_append_fills_every_layout(name):
    """Empty the new tokens' slots, append them again, attend."""
    batch = batch_of()
    cache, layout = layouts(batch)[name]
    views = [cache[:, 0], cache[:, 1]] if isinstance(cache, np.ndarray) else list(cache)
    for r, (n, length) in enumerate(zip(QO, KV, strict=True)):
        for j in range(length - n, length):
            page = batch.kv_page_indices[batch.kv_page_indptr[r] + j // batch.page_size]
            for x in views:
                (x if layout == "HND" else x.transpose(0, 2, 1, 3))[page, :, j % batch.page_size] = np.nan
    before = [x.copy() for x in views]
    tvm_infer.append(
        batch.k_new,
        batch.v_new,
        cache,
        qo_indptr=batch.qo_indptr,
        kv_len=batch.kv_len,
        kv_layout=layout,
        **batch.tables,
    )
    changed = sum(int((np.isnan(b) & ~np.isnan(x)).sum()) for b, x in zip(before, views, strict=True))
    assert changed == 2 * batch.k_new.size  # exactly the new slots, nothing else
    for b, x in zip(before, views, strict=True):
        assert np.array_equal(b[~np.isnan(b)], x[~np.isnan(b)])
    o = tvm_infer.attention(batch.q, cache, plan_of(batch), kv_layout=layout, **batch.tables)
    assert relative_error(o, batch.reference()[0]) < TOLERANCE["float32"]


def test_append_attention_is_append_then_attention():
    batch = batch_of()
    blank = batch.kv_cache.copy()
    for r, (n, length) in enumerate(zip(QO, KV, strict=True)):
        for j in range(length - n, length):
            blank[batch.kv_page_indices[batch.kv_page_indptr[r] + j // batch.page_size], :, :, j % batch.page_size] = (
                np.nan
            )
    o, lse = tvm_infer.append_attention(
        batch.q, batch.k_new, batch.v_new, blank, plan_of(batch), return_lse=True, **batch.tables
    )
    expected, expected_lse = batch.reference()
    assert relative_error(o, expected) < TOLERANCE["float32"]
    assert np.allclose(lse, expected_lse, atol=1e-5)
    assert np.array_equal(np.nan_to_num(blank, nan=7.0), np.nan_to_num(batch.kv_cache, nan=7.0))


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_attention(causal):
    batch = batch_of()
    k, v = np.concatenate(batch.keys), np.concatenate(batch.values)
    indptr = np.concatenate([[0], np.cumsum(KV)]).astype(np.int32)
    o, lse = tvm_infer.ragged_attention(batch.q, k, v, plan_of(batch, causal=causal), kv_indptr=indptr, return_lse=True)
    expected, expected_lse = batch.reference(causal=causal)
    assert relative_error(o, expected) < TOLERANCE["float32"]
    assert np.allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_offset_and_strided_views(kind):
    """Every tensor argument is a view into a larger, poisoned one."""
    batch = batch_of()

    def view(x: np.ndarray, fill):
        inner = offset_view(x, fill)
        return pytest.importorskip("torch").from_numpy(inner) if kind == "torch" else inner

    q = view(batch.q, np.nan)
    k, v = view(batch.kv_cache[:, 0], np.nan), view(batch.kv_cache[:, 1], np.nan)
    out, lse_big = (
        view(np.zeros_like(batch.q), 5.0),
        np.full((batch.q.shape[0] + 2, batch.q.shape[1] + 1), 5.0, np.float32),
    )
    plan = plan_of(batch)
    shifted_plan = np.concatenate([np.full(4, 77, np.int32), plan.buffer.view(np.int32).reshape(-1)])[4:]
    shifted_plan = np.ascontiguousarray(shifted_plan) if shifted_plan.ctypes.data % 16 else shifted_plan
    workspace = np.full(plan.num_partial_rows * (batch.q.shape[2] + 1) + 5, np.nan, np.float32)[5:]
    o, lse = tvm_infer.attention(
        q,
        (k, v),
        shifted_plan,
        kv_page_indptr=index_view(batch.kv_page_indptr),
        kv_page_indices=index_view(batch.kv_page_indices),
        out=out,
        lse=lse_big[1:-1, :-1],
        workspace=workspace,
    )
    expected, expected_lse = batch.reference()
    assert relative_error(np.asarray(o), expected) < TOLERANCE["float32"]
    assert np.allclose(np.asarray(lse), expected_lse, atol=1e-5)
    assert (lse_big[0] == 5).all() and (lse_big[-1] == 5).all() and (lse_big[:, -1] == 5).all()


def test_read_only_inputs_are_taken_and_read_only_outputs_refused():
    batch = batch_of()
    for x in (batch.q, batch.kv_cache, batch.kv_page_indptr):
        x.flags.writeable = False
    o = tvm_infer.attention(batch.q, batch.kv_cache, plan_of(batch), **batch.tables)
    assert relative_error(o, batch.reference()[0]) < TOLERANCE["float32"]
    frozen = np.zeros_like(batch.q)
    frozen.flags.writeable = False
    with pytest.raises(errors.ArgumentError, match="`out` is a read-only"):
        tvm_infer.attention(batch.q, batch.kv_cache, plan_of(batch), out=frozen, **batch.tables)


def test_bfloat16_numpy_shares_memory():
    batch = batch_of("bfloat16")
    out = np.zeros_like(batch.q)
    returned = tvm_infer.attention(batch.q, batch.kv_cache, plan_of(batch), out=out, **batch.tables)
    assert returned is out
    assert relative_error(out, batch.reference()[0]) < TOLERANCE["bfloat16"]


def test_empty_batch_does_nothing():
    batch = make_paged_batch([], [], num_qo_heads=4, num_kv_heads=2, head_dim=16)
    plan = plan_of(batch)
    assert plan.num_works == 0
    o = tvm_infer.attention(batch.q, batch.kv_cache, plan, **batch.tables)
    assert o.shape == (0, 4, 16)
    tvm_infer.append(
        batch.k_new, batch.v_new, batch.kv_cache, qo_indptr=batch.qo_indptr, kv_len=batch.kv_len, **batch.tables
    )
    assert np.isnan(batch.kv_cache).all()


def test_lists_serve_as_indices():
    batch = batch_of()
    plan = tvm_infer.plan(batch.qo_indptr.tolist(), KV, num_qo_heads=6, num_kv_heads=2, head_dim=40)
    o = tvm_infer.attention(
        batch.q,
        batch.kv_cache,
        plan,
        kv_page_indptr=batch.kv_page_indptr.tolist(),
        kv_page_indices=batch.kv_page_indices.tolist(),
    )
    assert relative_error(o, batch.reference()[0]) < TOLERANCE["float32"]


def test_rows_that_see_nothing():
    """kv_len 0 without a causal mask: O = 0 and LSE = -inf, and merging treats it as the identity."""
    q = np.ones((2, 2, 8), np.float32)
    cache = np.full((1, 2, 2, 4, 8), np.nan, np.float32)
    plan = tvm_infer.plan([0, 2], [0], num_qo_heads=2, num_kv_heads=2, head_dim=8, causal=False)
    out, lse = np.full_like(q, 9), np.full((2, 2), 9, np.float32)
    tvm_infer.attention(q, cache, plan, kv_page_indptr=[0, 0], kv_page_indices=[], out=out, lse=lse)
    assert (out == 0).all() and np.isneginf(lse).all()
    other, other_lse = np.full_like(q, 3.0), np.full((2, 2), -1.5, np.float32)
    o, merged_lse = tvm_infer.merge(out, lse, other, other_lse)
    assert np.array_equal(o, other) and np.array_equal(merged_lse, other_lse)
    o, merged_lse = tvm_infer.merge(out, lse, out, lse)
    assert (o == 0).all() and np.isneginf(merged_lse).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("in_place", [False, True])
def test_merge(dtype, in_place):
    rng = np.random.default_rng(0)
    kind = numpy_dtype(dtype)
    o_a, o_b = (rng.standard_normal((7, 5, 24)).astype(kind) for _ in range(2))
    lse_a, lse_b = (rng.standard_normal((7, 5)).astype(np.float32) * 20 for _ in range(2))
    lse_a[2], lse_b[3] = -np.inf, -np.inf
    expected, expected_lse = merge_reference(o_a, lse_a, o_b, lse_b)
    out = {"out": o_a, "lse": lse_a} if in_place else {}
    o, lse = tvm_infer.merge(o_a, lse_a, o_b, lse_b, **out)
    assert relative_error(o, expected) < TOLERANCE[dtype]
    assert np.allclose(lse, expected_lse, rtol=1e-6)


def test_merge_on_strided_views():
    rng = np.random.default_rng(1)
    big = rng.standard_normal((9, 12, 16)).astype(np.float32)
    o_a, o_b = big[1:8:2, 0:5], big[1:8:2, 6:11]
    lses = rng.standard_normal((4, 12)).astype(np.float32)
    lse_a, lse_b = lses[:, 0:5], lses[:, 6:11]
    o, lse = tvm_infer.merge(o_a, lse_a, o_b, lse_b)
    expected, expected_lse = merge_reference(o_a, lse_a, o_b, lse_b)
    assert relative_error(o, expected) < 1e-6 and np.allclose(lse, expected_lse)


def test_splitting_a_request_by_hand_and_merging_is_the_whole():
    batch = make_paged_batch([3], [50], num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=10)
    whole, whole_lse = batch.reference()
    parts = []
    for begin, end, causal in ((0, 30, False), (30, 50, True)):
        plan = tvm_infer.plan([0, 3], [end - begin], num_qo_heads=4, num_kv_heads=2, head_dim=16, causal=causal)
        pages = batch.kv_page_indices[begin // 10 : end // 10]
        parts.append(
            tvm_infer.attention(
                batch.q, batch.kv_cache, plan, kv_page_indptr=[0, len(pages)], kv_page_indices=pages, return_lse=True
            )
        )
    (o_a, lse_a), (o_b, lse_b) = parts
    o, lse = tvm_infer.merge(o_a, lse_a, o_b, lse_b)
    assert relative_error(o, whole) < 1e-6 and np.allclose(lse, whole_lse, atol=1e-5)


@pytest.mark.parametrize("fixed", [7, 16])
def test_fixed_split_size_makes_rows_batch_invariant(fixed):
    """A request's rows are the same to the last bit whatever else is in the batch and however many CTAs there are."""
    batch = batch_of()
    together = tvm_infer.attention(
        batch.q, batch.kv_cache, plan_of(batch, fixed_split_size=fixed, num_ctas=5), **batch.tables
    )
    for r in range(len(QO)):
        rows = slice(batch.qo_indptr[r], batch.qo_indptr[r + 1])
        pages = batch.kv_page_indices[batch.kv_page_indptr[r] : batch.kv_page_indptr[r + 1]]
        plan = tvm_infer.plan(
            [0, QO[r]], [KV[r]], num_qo_heads=6, num_kv_heads=2, head_dim=40, fixed_split_size=fixed, num_ctas=2
        )
        alone = tvm_infer.attention(
            batch.q[rows], batch.kv_cache, plan, kv_page_indptr=[0, len(pages)], kv_page_indices=pages
        )
        assert np.array_equal(alone, together[rows])


def offset_view(x: np.ndarray, fill: float = np.nan) -> np.ndarray:
    """`x` inside a larger, poisoned array: an offset, and strides that are not dense; head_dim stays contiguous."""
    big = np.full((x.shape[0] + 3, *[n + 2 for n in x.shape[1:-1]], x.shape[-1]), fill, x.dtype)
    inner = big[(slice(2, 2 + x.shape[0]), *[slice(1, 1 + n) for n in x.shape[1:-1]])]
    inner[...] = x
    assert not inner.flags.c_contiguous
    return inner


def index_view(x: np.ndarray) -> np.ndarray:
    """The same for indices, which must be dense: an offset only."""
    return np.concatenate([np.full(3, -99, np.int32), x, np.full(2, -99, np.int32)])[3 : 3 + len(x)]


def test_views_into_plan_and_ragged_attention():
    batch = batch_of()
    plan = tvm_infer.plan(
        index_view(batch.qo_indptr), index_view(batch.kv_len), num_qo_heads=6, num_kv_heads=2, head_dim=40, num_ctas=3
    )
    out = offset_view(np.zeros_like(batch.q), 5.0)
    tvm_infer.ragged_attention(
        offset_view(batch.q),
        offset_view(np.concatenate(batch.keys)),
        offset_view(np.concatenate(batch.values)),
        plan,
        kv_indptr=index_view(np.concatenate([[0], np.cumsum(KV)]).astype(np.int32)),
        out=out,
    )
    assert relative_error(out, batch.reference()[0]) < TOLERANCE["float32"]
    assert (out.base[:2] == 5).all() and (out.base[:, 0] == 5).all() and (out.base[:, -1] == 5).all()


@pytest.mark.parametrize("together", [False, True], ids=["append", "append_attention"])
def test_views_into_append(together):
    batch = batch_of()
    blank = batch.kv_cache.copy()
    for r, (n, length) in enumerate(zip(QO, KV, strict=True)):
        for j in range(length - n, length):
            blank[batch.kv_page_indices[batch.kv_page_indptr[r] + j // batch.page_size], :, :, j % batch.page_size] = 9
    caches = offset_view(blank[:, 0]), offset_view(blank[:, 1])
    k, v = offset_view(batch.k_new), offset_view(batch.v_new)
    tables = {name: index_view(x) for name, x in batch.tables.items()}
    if together:
        tvm_infer.append_attention(offset_view(batch.q), k, v, caches, plan_of(batch), **tables)
    else:
        indptr, kv_len = index_view(batch.qo_indptr), index_view(batch.kv_len)
        tvm_infer.append(k, v, caches, qo_indptr=indptr, kv_len=kv_len, **tables)
    for cache, plane in zip(caches, (0, 1), strict=True):
        assert np.array_equal(cache, batch.kv_cache[:, plane], equal_nan=True)
        assert np.isnan(cache.base[:2]).all() and np.isnan(cache.base[:, 0]).all()  # nothing beside the view


def test_offset_views_of_tvm_tensors():
    """TVM passes views by byte_offset instead of moving the data pointer."""
    import tvm

    batch = batch_of()
    big = tvm.runtime.tensor(np.concatenate([np.full_like(batch.q[:2], np.nan), batch.q]).reshape(-1))
    q = big._create_view(batch.q.shape, "float32", relative_byte_offset=batch.q[:2].nbytes)
    o = tvm_infer.attention(q, tvm.runtime.tensor(batch.kv_cache), plan_of(batch), **batch.tables)
    assert relative_error(o.numpy(), batch.reference()[0]) < TOLERANCE["float32"]

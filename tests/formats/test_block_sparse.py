"""Block-sparse attention on the CPU executor, against float64 with the matrix as a mask; keys that no block has are NaN."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tvm_infer
from tvm_infer.errors import ArgumentError, PlanMismatchError
from tvm_infer.testing import attention_reference, relative_error

HEADS = dict(num_qo_heads=6, num_kv_heads=2, head_dim=16)


def dense(indptr, indices, rows, columns):
    """bool [queries, keys] of a matrix whose blocks begin at `rows` and `columns`."""
    mask = np.zeros((rows[-1], columns[-1]), bool)
    for i in range(len(rows) - 1):
        for j in indices[indptr[i] : indptr[i + 1]]:
            mask[rows[i] : rows[i + 1], columns[j] : columns[j + 1]] = True
    return mask


def reference(q, k, v, mask, sm_scale):
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for t, seen in enumerate(mask):
        o[t : t + 1], lse[t : t + 1] = attention_reference(
            q[t : t + 1], k[seen], v[seen], sm_scale=sm_scale, causal=False
        )
    return o, lse


def check(plan, mask, rng, *, group=3, dim=16, tolerance=2e-6, dtype=np.float32, **kwargs):
    """Run into poisoned outputs; keys that no query sees are NaN."""
    q = rng.standard_normal((mask.shape[0], 2 * group, dim)).astype(dtype)
    k, v = (rng.standard_normal((mask.shape[1], 2, dim)).astype(dtype) for _ in range(2))
    k[~mask.any(0)] = v[~mask.any(0)] = np.nan
    out, lse = np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)
    result = tvm_infer.block_sparse_attention(q, k, v, plan, out=out, lse=lse, **kwargs)
    assert result[0] is out and result[1] is lse
    expected, expected_lse = reference(q, k, v, mask, kwargs.get("sm_scale") or dim**-0.5)
    assert relative_error(out, expected) < tolerance
    seen = mask.any(1)
    assert np.isneginf(lse[~seen]).all() and not out[~seen].any()
    assert np.abs(lse[seen] - expected_lse[seen]).max(initial=0) < 2e-5
    return q, k, v, out


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_matrix(data):
    """Any block shape, matrix and number of tokens: short last blocks, empty rows, blocks in any order."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    shape = data.draw(st.tuples(st.sampled_from([1, 2, 3, 7, 16]), st.sampled_from([1, 2, 5, 8, 12, 16])))
    num_rows, num_columns = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    num_qo = max(0, num_rows * shape[0] - data.draw(st.integers(0, shape[0] - 1)))
    num_kv = num_columns * shape[1] - data.draw(st.integers(0, shape[1] - 1))
    picked = [rng.permutation(num_columns)[: data.draw(st.integers(0, num_columns))] for _ in range(num_rows)]
    indptr, indices = np.cumsum([0, *map(len, picked)]), np.concatenate([np.zeros(0, int), *picked])
    plan = tvm_infer.plan_block_sparse(
        indptr,
        indices,
        shape,
        num_kv_tokens=num_kv,
        num_qo_tokens=num_qo,
        num_ctas=data.draw(st.sampled_from([1, 3, 8])),
        fixed_split_size=data.draw(st.sampled_from([0, -1, 5])),
        **HEADS,
    )
    rows = np.minimum(np.arange(num_rows + 1) * shape[0], num_qo)
    columns = np.minimum(np.arange(num_columns + 1) * shape[1], num_kv)
    mask = dense(indptr, indices, rows, columns)
    assert plan.density == pytest.approx(mask.mean() if mask.size else 0)
    check(plan, mask, rng)


def test_pages_are_as_large_as_blocks_and_keys_allow():
    def page_size(block, keys, **kwargs):
        return tvm_infer.plan_block_sparse([0, 1], [0], (4, block), num_kv_tokens=keys, **HEADS, **kwargs).page_size

    assert [page_size(64, 640), page_size(64, 650), page_size(48, 99), page_size(1, 99)] == [64, 2, 3, 1]
    assert page_size(64, 640, page_size=16) == 16
    with pytest.raises(ArgumentError, match=r"page_size.* is 48.*64 in common"):
        page_size(64, 640, page_size=48)


def test_blocks_of_variable_size():
    rng = np.random.default_rng(5)
    row_sizes, column_sizes = [3, 1, 20, 4], [8, 24, 4, 40, 12]
    indptr, indices = [0, 2, 2, 5, 6], [4, 1, 0, 3, 2, 3]
    plan = tvm_infer.plan_block_sparse(indptr, indices, (row_sizes, column_sizes), **HEADS)
    assert plan.page_size == 4 and (plan.num_qo_tokens, plan.num_kv_tokens) == (28, 88)
    mask = dense(indptr, indices, np.cumsum([0, *row_sizes]), np.cumsum([0, *column_sizes]))
    check(plan, mask, rng)


def matrices(library, values):
    """The values in BSR form with blocks of 3 x 8, in the ways that a library has."""
    if library == "torch":
        torch = pytest.importorskip("torch")
        return [torch.tensor(values).to_sparse_bsr((3, 8))]
    sparse = pytest.importorskip("scipy.sparse")
    return [sparse.bsr_array(values, blocksize=(3, 8)), sparse.bsr_matrix(values, blocksize=(3, 8))]


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state")
@pytest.mark.parametrize("library", ["torch", "scipy"])
def test_matrices_of_libraries(library):
    rng = np.random.default_rng(1)
    block = rng.random((4, 6)) < 0.4
    block[2] = False
    mask = np.kron(block, np.ones((3, 8), bool))
    # Zeros within blocks are part of the structure, and values mean nothing.
    values = np.where(mask, rng.standard_normal(mask.shape), 0)
    values[0:3][mask[0:3]] *= rng.random(mask[0:3].sum()) < 0.9
    for matrix in matrices(library, values):
        plan = tvm_infer.plan_block_sparse(matrix, **HEADS)
        assert plan.page_size == 8
        check(plan, mask, rng)
        with pytest.raises(
            ArgumentError, match=r"`block_shape` is \(3, 4\), and the matrix has \(3, 8\); leave it out"
        ):
            tvm_infer.plan_block_sparse(matrix, block_shape=(3, 4), **HEADS)


def test_other_forms_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match="a batch of BSR matrices"):
        tvm_infer.plan_block_sparse(torch.ones(2, 6, 8).to_sparse_bsr((3, 8)), **HEADS)
    with pytest.raises(ArgumentError, match=r"a torch.Tensor without `indices`.*tobsr"):
        tvm_infer.plan_block_sparse(torch.ones(6, 8).to_sparse_csr(), **HEADS)


@pytest.mark.parametrize("kind", ["numpy", "torch", "tvm"])
def test_kinds_and_strides(kind):
    """Keys of every library, not contiguous where it has such; the same as pages of a cache, NHD and HND."""
    rng = np.random.default_rng(2)
    indptr, indices = [0, 2, 3], [3, 1, 2]
    plan = tvm_infer.plan_block_sparse(indptr, indices, (5, 8), num_kv_tokens=32, **HEADS)
    mask = dense(indptr, indices, [0, 5, 10], np.arange(5) * 8)
    q, k, v, out = check(plan, mask, rng)
    wide = np.full((32, 3, 2, 20), np.nan, np.float32)
    wide[:, 1, :, :16], wide[:, 2, :, :16] = k, v
    if kind == "numpy":
        arrays = q, wide[:, 1, :, :16], wide[:, 2, :, :16]
    elif kind == "torch":
        torch = pytest.importorskip("torch")
        tensor = torch.from_numpy(wide)
        arrays = torch.from_numpy(q), tensor[:, 1, :, :16], tensor[:, 2, :, :16]
    else:
        tvm = pytest.importorskip("tvm")
        arrays = tuple(tvm.runtime.tensor(x) for x in (q, k, v))
    again = tvm_infer.block_sparse_attention(*arrays, plan)
    assert type(again) is type(arrays[0])
    assert np.from_dlpack(again).tobytes() == out.tobytes()
    if kind != "tvm":
        pages = [x.reshape(4, 8, 2, 16) for x in arrays[1:]]
        nhd = tvm_infer.block_sparse_attention(arrays[0], *pages, plan)
        hnd = tvm_infer.block_sparse_attention(arrays[0], *(x.swapaxes(1, 2) for x in pages), plan, kv_layout="HND")
        assert np.asarray(nhd).tobytes() == np.asarray(hnd).tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(3)
    indptr, indices = [0, 5, 5, 6, 10], [3, 1, 0, 4, 5, 2, 0, 1, 2, 3]
    plan = tvm_infer.plan_block_sparse(
        indptr, indices, (33, 16), num_kv_tokens=96, num_qo_heads=8, num_kv_heads=2, head_dim=64, dtype=dtype
    )
    mask = dense(indptr, indices, np.arange(5) * 33, np.arange(7) * 16)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    check(plan, mask, rng, group=4, dim=64, tolerance=3e-3, dtype=kind, sm_scale=0.2)


GOOD = dict(indptr=[0, 2, 3], indices=[0, 2, 1], block_shape=(4, 8), num_kv_tokens=24)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"indptr": [1, 2, 3]}, "`indptr` starts at 1; it must start at 0"),
        ({"indptr": [0, 2, 1]}, "`indptr` decreases from 2 to 1 at entry 2"),
        ({"indptr": [0, 2, 4]}, "`indptr` ends at 4, but `indices` has 3 entries"),
        ({"indptr": []}, "`indptr` is empty"),
        ({"indptr": [0.0, 2, 3]}, "`indptr` has dtype float64"),
        ({"indices": [0, 3, 1]}, r"block 3 at entry 1 \(block row 0\); blocks must be in \[0, 3\)"),
        ({"indices": [0, 2, -1]}, r"block -1 at entry 2 \(block row 1\)"),
        ({"indices": [2, 2, 1]}, "block 2 twice in block row 0; blocks of a row must not overlap"),
        ({"indices": [[0, 2, 1]]}, "`indices` has dtype int64, rank 2"),
        ({"indices": None}, "list without `indices`"),
        ({"block_shape": 4}, r"`block_shape` is 4; it must be a pair \(B_r, B_c\)"),
        ({"block_shape": (0, 8)}, r"`block_shape\[0\]` is 0; it must be at least 1"),
        ({"block_shape": (4, -8)}, r"`block_shape\[1\]` is -8; it must be at least 1"),
        ({"block_shape": (4, 8.5)}, r"`block_shape\[1\]` is 8.5; it must be a positive integer"),
        ({"block_shape": ([4, 0], 8)}, r"`block_shape\[0\]\[1\]` is 0"),
        ({"block_shape": ([4], 8)}, r"`block_shape\[0\]` has 1 sizes; `indptr` has 2 block rows"),
        ({"block_shape": (4, [8, 8])}, r"`num_kv_tokens` is 24; the sizes of `block_shape\[1\]` make 16"),
        ({"num_kv_tokens": None}, "`num_kv_tokens` is None; say how many"),
        ({"num_kv_tokens": -1}, "`num_kv_tokens` is -1"),
        ({"num_kv_tokens": 2**31}, "`num_kv_tokens` is 2147483648; tokens are numbered by 32 bits"),
        ({"num_qo_tokens": 9}, r"`num_qo_tokens` is 9 with block_shape\[0\] 4, which is 3 block rows; `indptr` has 2"),
        ({"num_qo_tokens": 4}, "`num_qo_tokens` is 4"),
        ({"num_kv_heads": 4}, "multiple of num_kv_heads = 4"),
    ],
)  # fmt: skip
def test_bad_matrices(change, words):
    tvm_infer.plan_block_sparse(**GOOD, **HEADS)
    with pytest.raises(ArgumentError, match=words):
        tvm_infer.plan_block_sparse(**(GOOD | HEADS | change))


def test_bad_tensors():
    plan = tvm_infer.plan_block_sparse(**GOOD, **HEADS)
    q, k = np.zeros((8, 6, 16), np.float32), np.zeros((24, 2, 16), np.float32)
    pages = k.reshape(3, 8, 2, 16)
    run = tvm_infer.block_sparse_attention
    for arguments, kind, words in (
        ((q[:7], k, k, plan), PlanMismatchError, "`q` has 7 tokens, shape (7, 6, 16); the plan was made for 8"),
        ((q, k[:23], k, plan), PlanMismatchError, "`k` has 23 keys"),
        ((q, k, k[:8], plan), PlanMismatchError, "`v` has 8 keys"),
        ((q, k, pages, plan), ArgumentError, "`k` and `v` have ranks 3 and 4"),
        ((q, pages[:, :4], pages, plan), PlanMismatchError, "`k` has pages of 4 keys, and the plan's table is of pages of 8"),
        ((q, pages[:2], pages, plan), PlanMismatchError, "`k` has 2 pages of 8 keys; the plan was made for 24"),
        ((q, k[:, :1], k[:, :1], plan), PlanMismatchError, "1 KV heads"),
        ((q[:, :4], k, k, plan), PlanMismatchError, "`q` has 4 heads"),
        ((q, k[0], k[0], plan), ArgumentError, "`k` has shape (2, 16)"),
        ((q, k, k, plan.plan), ArgumentError, "`plan` is a Plan; it must be a BlockSparsePlan"),
    ):  # fmt: skip
        with pytest.raises(kind, match=re.escape(words)):
            run(*arguments)
    with pytest.raises(ArgumentError, match='`kv_layout` is "NH"'.replace('"', "'")):
        run(q, k, k, plan, kv_layout="NH")

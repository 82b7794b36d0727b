"""Arguments of a wrong type are refused by name, before C++ would refuse them by number."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_infer
from tvm_infer import errors

SHAPE = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64}


def plan(**arguments):
    return tvm_infer.plan([0, 1, 4], [37, 100], **{**SHAPE, **arguments})


@pytest.mark.parametrize("given", [{}, {"out": np.empty(4096, np.int32), "max_partial_rows": 1000}])
@pytest.mark.parametrize(
    ("name", "value"),
    [(n, "8") for n in ("num_qo_heads", "num_kv_heads", "head_dim", "num_ctas", "window_left", "fixed_split_size")]
    + [("num_ctas", 1.5), ("tile_table", 5), ("tile_table", [16.5, 128, 1, 1, 1]), ("max_partial_rows", "8")],
)
def test_plan_names_what_is_no_integer(name, value, given):
    with pytest.raises(errors.ArgumentError, match=f"argument `{name}` is "):
        plan(**{**given, name: value})


@pytest.mark.parametrize("name", ["num_qo_heads", "num_ctas", "fixed_split_size", "max_requests", "max_kv_tokens"])
def test_workspace_size_names_what_is_no_integer(name):
    with pytest.raises(errors.ArgumentError, match=f"argument `{name}` is '8'; it must be an integer"):
        tvm_infer.workspace_size(**{**SHAPE, "max_requests": 4, "max_tokens": 10, name: "8"})


@pytest.mark.parametrize("dtype", [np.float32, None, 3])
def test_a_dtype_is_a_string(dtype):
    with pytest.raises(errors.DTypeError, match=r'argument `dtype` is .*"bfloat16"'):
        plan(dtype=dtype)
    with pytest.raises(errors.DTypeError, match=r'argument `dtype` is .*"bfloat16"'):
        tvm_infer.cuda_tile_table(dtype)


@pytest.mark.parametrize("table", [tvm_infer.cpu_tile_table, tvm_infer.cuda_tile_table])
def test_tile_tables_refuse_a_head_dim_that_is_none(table):
    assert len(table("bfloat16", 128)) % 5 == 3
    with pytest.raises(errors.ArgumentError, match="argument `head_dim` is 0; it must be at least 1"):
        table("bfloat16", 0)


def test_out_is_a_writable_int32_array():
    read_only = np.empty(4096, np.int32)
    read_only.flags.writeable = False
    for out, kind, text in (
        ([0] * 4096, errors.ArgumentError, "a list"),
        (np.empty(4096, np.float32), errors.DTypeError, "dtype float32"),
        (read_only, errors.ArgumentError, "read-only"),
    ):
        with pytest.raises(kind, match=f"argument `out` .*{text}"):
            plan(out=out, max_partial_rows=1000)


def test_attention_and_merge_name_what_is_no_tensor():
    q, cache = np.zeros((4, 8, 64), np.float32), np.zeros((10, 2, 2, 16, 64), np.float32)
    call = {"kv_cache": cache, "plan": plan(), "kv_page_indptr": [0, 3, 10], "kv_page_indices": list(range(10))}
    for bad in (None, [1.0], q[0]):
        with pytest.raises(errors.ArgumentError, match=r"argument `q` .*num_tokens, num_qo_heads, head_dim"):
            tvm_infer.attention(bad, **call)
        with pytest.raises(errors.ArgumentError, match=r"argument `o_a` .*num_rows, num_heads, head_dim"):
            tvm_infer.merge(bad, q[..., 0], q, q[..., 0])
    with pytest.raises(errors.ArgumentError, match="argument `sm_scale` is 'x'"):
        tvm_infer.attention(q, **call, sm_scale="x")


def test_what_users_need_is_exported():
    assert tvm_infer.jit.all_names() and set(tvm_infer.__all__) <= set(dir(tvm_infer))
    assert all(getattr(tvm_infer, name) is not None for name in tvm_infer.__all__)

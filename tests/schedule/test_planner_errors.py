"""What a batch, a buffer or settings must not be: typed errors that name argument, value, limit; nothing is written."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_infer
from tvm_infer.errors import ArgumentError, WorkspaceError

TABLE = (64, 64, 1000, 10, 15)


def plan(qo_indptr=(0, 1, 3), kv_len=(5, 9), **kwargs):
    settings = dict(num_qo_heads=8, num_kv_heads=2, head_dim=64, num_ctas=4, tile_table=TABLE)
    settings.update(kwargs)
    return tvm_infer.plan(np.array(qo_indptr, np.int32), np.array(kv_len, np.int32), **settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"qo_indptr": (1, 2, 3)}, ["qo_indptr[0]", "is 1", "must be 0"]),
        ({"qo_indptr": (0, 4, 3)}, ["qo_indptr[2]", "is 3", "qo_indptr[1] = 4", "not decrease"]),
        ({"kv_len": (5, -2)}, ["kv_len[1]", "is -2", "at least 0"]),
        ({"kv_len": (5, 1)}, ["kv_len[1]", "is 1", "2 query tokens", "kv_len >= qo_len"]),
        ({"num_qo_heads": 7}, ["num_qo_heads", "is 7", "multiple of num_kv_heads = 2"]),
        ({"num_qo_heads": 0}, ["num_qo_heads", "is 0"]),
        ({"num_kv_heads": 0}, ["num_kv_heads", "is 0", "at least 1"]),
        ({"num_ctas": 0}, ["num_ctas", "is 0", "at least 1"]),
        ({"num_ctas": -3}, ["num_ctas", "is -3"]),
        ({"fixed_split_size": -2}, ["fixed_split_size", "is -2", "never split"]),
        ({"window_left": -2}, ["-2", "at least 0"]),
        ({"window_right": -2, "causal": False}, ["`window_right`", "is -2", "at least 0"]),
        ({"window_right": 2, "causal": True}, ["`window_right`", "is 2", "causal=True", "window_right=0"]),
        ({"window_right": 2**31 - 9, "causal": False}, ["window_right", "9 keys", "below 2^31", "-1"]),
        ({"num_sink": -1, "window_left": 3}, ["num_sink", "is -1", "at least 0"]),
        ({"num_sink": 4}, ["num_sink", "is 4", "window_left -1", "give one of them"]),
        ({"chunk": -5}, ["chunk", "is -5", "0 for no chunks"]),
        ({"chunk": 5, "causal": False, "kv_len": (5, 1)}, ["kv_len[1]", "is 1", "chunks", "kv_len >= qo_len"]),
        ({"tile_table": ()}, ["tile_table"]),
        ({"tile_table": (64, 64, 1000, 10)}, ["tile_table", "4 values"]),
        ({"tile_table": (5, 7)}, ["tile_table", "2 values", "5 for each class", "end with 3"]),
        ({"tile_table": (64, 64, 1000, 10, 15, 5, 2**41, 1000)}, ["shared_merge", "once 2199023255552", "2^40"]),
        ({"tile_table": (64, 64, 1000, 10, 15, -1, 5, 1000)}, ["shared_merge", "each -1"]),
        ({"tile_table": (64, 64, 1000, 10, 15, 5, 5, 1001)}, ["shared_merge", "again 1001", "from 0 to 1000"]),
        ({"tile_table": (0, 64, 1000, 10, 15)}, ["tile_table", "0"]),
        ({"tile_table": (64, 0, 1000, 10, 15)}, ["tile_table", "0"]),
        ({"tile_table": (64, 64, 1000, 10, 0)}, ["tile_classes[0]", "kv 0", "at least 1"]),
        ({"tile_table": (64, 64, 2**41, 10, 1)}, ["tile_classes[0]", "2^40"]),
        ({"tile_table": (64, 64, 1000, 10, 15, 64, 64, 1000, 10, 15)}, ["tile_classes[1].rows", "is 64", "ascending"]),
        ({"qo_indptr": (0, 2**30, 2**30 + 1), "kv_len": (2**30, 2**30)}, ["qo_indptr", "4294967300 packed rows"]),
        ({"qo_indptr": (0, 1, 2), "kv_len": (1, 2**31 - 1), "fixed_split_size": 1}, ["tiles", "fixed_split_size"]),
        (
            {"qo_indptr": (0, 1, 4000), "kv_len": (2**31 - 1,) * 2, "tile_table": (64, 64, 1, 1, 2**40)},
            ["cost", "limit"],
        ),
    ],
)
def test_bad_arguments(arguments, words):
    good = plan()
    out = np.full(4096, -7, np.int32)
    with pytest.raises(ArgumentError) as error:
        plan(**arguments, out=out, max_partial_rows=1000)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert (out == -7).all()
    assert plan().buffer.tobytes() == good.buffer.tobytes()  # the planner works on as before


def test_an_error_names_the_first_bad_request():
    with pytest.raises(ArgumentError, match=r"kv_len\[3\] is -1"):
        plan(range(9), (5, 5, 5, -1, 5, 0, 5, -4))


def test_queries_need_no_keys_without_a_causal_band():
    assert plan((0, 4), (1,), causal=False).num_works > 0


def test_plan_buffer_too_small():
    need = plan().bytes_used
    for words, ok in ((need // 4, True), (need // 4 - 1, False), (1, False)):
        out = np.full(words, -7, np.int32)
        if ok:
            assert plan(out=out, max_partial_rows=0).bytes_used == need
            continue
        with pytest.raises(WorkspaceError, match=f"{words * 4} bytes.*takes {need}.*plan_capacity"):
            plan(out=out, max_partial_rows=0)
        assert (out == -7).all()


def test_too_few_partial_rows():
    long = {"qo_indptr": (0, 1), "kv_len": (10_000,)}
    need = plan(**long).num_partial_rows
    assert need > 0
    out = np.full(4096, -7, np.int32)
    with pytest.raises(WorkspaceError, match=f"max_partial_rows is {need - 1}.*{need} partial rows"):
        plan(**long, out=out, max_partial_rows=need - 1)
    assert (out == -7).all()
    assert plan(**long, out=out, max_partial_rows=need).num_partial_rows == need


@pytest.mark.parametrize("name", ["max_requests", "max_tokens", "max_kv_tokens"])
def test_capacity_limits(name):
    limits = {"max_requests": 4, "max_tokens": 8, "max_kv_tokens": 100, name: -1}
    with pytest.raises(ArgumentError, match=f"{name} -1.*at least 0"):
        tvm_infer.workspace_size(
            num_qo_heads=8, num_kv_heads=2, head_dim=64, num_ctas=4, tile_table=TABLE, fixed_split_size=16, **limits
        )

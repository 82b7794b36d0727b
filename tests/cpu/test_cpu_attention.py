"""The CPU executor against float64: dtypes, groups, head sizes, pages, layouts, masks, stages; per instruction set and thread count."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import tvm_infer
from tvm_infer import _ffi
from tvm_infer.testing import make_paged_batch, relative_error

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import matrix_cases as matrix


def run_matrix(*arguments: str, **environment: str) -> list[dict]:
    """matrix_cases.py in a process of its own."""
    script = pathlib.Path(__file__).with_name("matrix_cases.py")
    root = str(pathlib.Path(tvm_infer.__file__).parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_right(result: dict) -> None:
    dtype = result["case"].split("-")[0]
    assert result["error"] <= matrix.TOLERANCE[dtype], result
    assert result["lse_error"] <= 2e-5, result


def available_isas() -> list[str]:
    names = ["portable", "avx2", "avx512"]
    return names[: names.index(_ffi.func("cpu_info")().split()[0]) + 1]


@pytest.mark.parametrize("dtype", matrix.DTYPES)
@pytest.mark.parametrize("group", matrix.GROUPS)
def test_matrix(dtype, group):
    """Every stage, head_dim, page size, mask and layout with automatic splits."""
    for case in matrix.all_cases():
        if (case.dtype, case.group) == (dtype, group):
            assert_right(matrix.check(case))


@pytest.mark.parametrize("dtype", matrix.DTYPES)
def test_matrix_split(dtype):
    """The same with every request cut into tiles of 6 and 37 rows and runs of 48 keys, over 7 CTAs: partials and merges."""
    for case in matrix.all_cases()[::3]:
        if case.dtype == dtype:
            assert_right(matrix.check(case, tile_table=matrix.DEAR_TILES, num_ctas=7, fixed_split_size=48))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    if isa not in available_isas()[:-1]:
        pytest.skip(f"this machine runs {available_isas()[-1]}: {isa} is not below it")
    for result in run_matrix("5", TVM_INFER_CPU_ISA=isa) + run_matrix("23", "split", TVM_INFER_CPU_ISA=isa):
        assert_right(result)


def test_thread_count_changes_no_bit():
    runs = [run_matrix("19", "split", TVM_INFER_NUM_THREADS=str(n)) for n in (1, 2, 3, 5)]
    for others in zip(*runs, strict=True):
        assert_right(others[0])
        assert len({result["digest"] for result in others}) == 1, others


def test_many_threads_at_once_and_again():
    """Callers take turns; whatever runs beside it, a call gives the same bits."""
    from concurrent.futures import ThreadPoolExecutor

    cases = matrix.all_cases()[::29]
    settings = {"tile_table": matrix.DEAR_TILES, "num_ctas": 5}
    expected = [matrix.check(case, **settings)["digest"] for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            assert list(pool.map(lambda case: matrix.check(case, **settings)["digest"], cases)) == expected


def test_a_forked_child_computes():
    """Threads do not survive a fork: the child must start its own rather than wait for its parent's."""
    code = """
import os, sys
import matrix_cases as m
case = m.all_cases()[3]
settings = dict(tile_table=m.DEAR_TILES, num_ctas=5)
digest = m.check(case, **settings)["digest"]
child = os.fork()
if child == 0:
    os._exit(0 if m.check(case, **settings)["digest"] == digest else 1)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
assert m.check(case, **settings)["digest"] == digest
"""
    here = pathlib.Path(__file__).resolve()
    root = str(pathlib.Path(tvm_infer.__file__).parents[1])
    path = os.pathsep.join([str(here.parent), root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TVM_INFER_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_loses_at_most_twice_what_torch_loses(dtype, stage):
    torch = pytest.importorskip("torch")
    case = matrix.Case(dtype, 4, 128, 16, stage, "causal", "HND")
    batch = matrix.make(case)
    ours, _ = matrix.compute(case, batch)
    expected, _ = batch.reference()

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.view(np.uint16).astype(np.int32)).to(torch.int16).view(getattr(torch, dtype))

    plain = np.zeros(expected.shape)
    for r, kv_len in enumerate(batch.kv_len):
        rows = slice(batch.qo_indptr[r], batch.qo_indptr[r + 1])
        q = tensor(batch.q[rows]).transpose(0, 1)
        k, v = (tensor(x[r]).transpose(0, 1).repeat_interleave(4, 0) for x in (batch.keys, batch.values))
        hidden = torch.ones(q.shape[1], int(kv_len)).triu(int(kv_len) - q.shape[1] + 1).bool()
        scores = (q @ k.transpose(1, 2) * batch.sm_scale).masked_fill(hidden, -torch.inf)
        plain[rows] = (scores.softmax(-1) @ v).transpose(0, 1).double().numpy()
    assert relative_error(ours, expected) <= 2 * relative_error(plain, expected)


@pytest.mark.parametrize("scale", [50.0, 1e-3])
def test_large_and_small_scores(scale):
    """Scores of several hundred: one key takes all, and nothing overflows."""
    batch = make_paged_batch([1, 40], [300, 70], num_qo_heads=8, num_kv_heads=2, head_dim=64, sm_scale=scale)
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, num_qo_heads=8, num_kv_heads=2, head_dim=64)
    out, lse = tvm_infer.attention(batch.q, batch.kv_cache, plan, sm_scale=scale, return_lse=True, **batch.tables)
    expected, expected_lse = batch.reference()
    assert relative_error(out, expected) <= 1e-4  # scores of 400 carry 3e-5 of rounding
    assert relative_error(lse, expected_lse) <= 1e-6


def test_one_key_is_its_value():
    """exp2(0) is exactly 1: a row that sees one key returns that value to the last bit."""
    batch = make_paged_batch([1, 30], [1, 30], num_qo_heads=3, num_kv_heads=1, head_dim=40)
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, num_qo_heads=3, num_kv_heads=1, head_dim=40, window_left=0)
    out = tvm_infer.attention(batch.q, batch.kv_cache, plan, **batch.tables)
    values = np.concatenate(batch.values)
    assert np.array_equal(out, np.broadcast_to(values, out.shape))


@pytest.mark.parametrize("split", [0, 40])
def test_many_heads_of_wide_rows(split):
    """Five heads whose running results are too large to be kept for more than two at once."""
    batch = make_paged_batch([30, 1], [100, 70], num_qo_heads=5, num_kv_heads=5, head_dim=256, page_size=3)
    plan = tvm_infer.plan(
        batch.qo_indptr, batch.kv_len, num_qo_heads=5, num_kv_heads=5, head_dim=256, num_ctas=1, fixed_split_size=split
    )
    out, lse = tvm_infer.attention(batch.q, batch.kv_cache, plan, return_lse=True, **batch.tables)
    expected, expected_lse = batch.reference()
    assert relative_error(out, expected) <= 2e-6
    assert relative_error(lse, expected_lse) <= 2e-6


def test_group_of_71():
    """Decode rows beyond a tile: one token's group is cut in the middle."""
    batch = make_paged_batch([1, 3], [90, 3], num_qo_heads=71, num_kv_heads=1, head_dim=64)
    for tiles in (None, matrix.DEAR_TILES):
        plan = tvm_infer.plan(
            batch.qo_indptr, batch.kv_len, num_qo_heads=71, num_kv_heads=1, head_dim=64, tile_table=tiles
        )
        out = tvm_infer.attention(batch.q, batch.kv_cache, plan, **batch.tables)
        assert relative_error(out, batch.reference()[0]) <= 2e-6


@pytest.mark.parametrize("window_left", [-1, 9])
def test_token_order(window_left):
    """Rows in an order of the plan's own, across requests: positions follow the token, not the slot."""
    qo_lens, kv_lens = [20, 30], [60, 30]
    batch = make_paged_batch(qo_lens, kv_lens, num_qo_heads=6, num_kv_heads=2, head_dim=40)
    settings = {"causal": True, "window_left": window_left}
    made = tvm_infer.plan(
        batch.qo_indptr,
        batch.kv_len,
        num_qo_heads=6,
        num_kv_heads=2,
        head_dim=40,
        fixed_split_size=-1,
        tile_table=matrix.DEAR_TILES,
        num_ctas=3,
        **settings,
    )
    order = np.concatenate([np.arange(20)[::-1], 20 + np.roll(np.arange(30), 7)]).astype(np.int32)
    words = made.bytes_used // 4
    buffer = np.zeros(words + 64, np.int32)
    buffer[:words] = made.buffer[:words]
    buffer[words : words + len(order)] = order
    plan = tvm_infer.Plan(buffer)
    plan.header["token_order_offset"] = made.bytes_used
    plan.header["bytes_used"] = buffer.nbytes
    # in the new order a tile's rows see keys that the old cuts left out: let every work see its whole list
    for work in plan.works:
        work["kv_begin"], work["kv_end"] = 0, kv_lens[work["kv_list"]]
    out, lse = tvm_infer.attention(batch.q, batch.kv_cache, plan, return_lse=True, **batch.tables)
    expected, expected_lse = batch.reference(**settings)
    assert relative_error(out, expected) <= 2e-6
    assert relative_error(lse, expected_lse) <= 2e-6


def test_a_nan_that_is_seen_is_shown():
    """Poison in an input is not laundered into numbers."""
    batch = make_paged_batch([1, 20], [40, 20], num_qo_heads=4, num_kv_heads=1, head_dim=64)
    q = batch.q.copy()
    q[0, 1, 3] = np.nan
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, num_qo_heads=4, num_kv_heads=1, head_dim=64)
    out = tvm_infer.attention(q, batch.kv_cache, plan, **batch.tables)
    assert np.isnan(out[0, 1]).all()
    assert np.isfinite(np.delete(out[0], 1, axis=0)).all()
    assert np.isfinite(out[1:]).all()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TVM_INFER_NUM_THREADS", "0"),
        ("TVM_INFER_NUM_THREADS", "two"),
        ("TVM_INFER_NUM_THREADS", "99999999999999999999"),
        ("TVM_INFER_NUM_THREADS", "1025"),
        ("TVM_INFER_CPU_ISA", "avx1024"),
    ],
)
def test_bad_environment_is_a_typed_error(variable, value):
    code = """
import tvm_infer
from tvm_infer import _ffi
try:
    _ffi.func("cpu_info")()
except tvm_infer.errors.ArgumentError as e:
    print(e)
"""
    root = str(pathlib.Path(tvm_infer.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, variable: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert variable in done.stdout
    assert repr(value) in done.stdout

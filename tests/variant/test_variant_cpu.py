"""Variants on the CPU executor against float64: hooks, bands, splits, layouts, instruction sets; what a hook is told, and what not."""

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
import cpu_variants
import variant_cases as cases
from cpu_variants import CENSUS, KINDS, NO_NUMBERS, bind


@pytest.fixture(autouse=True)
def _package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_infer.variant", cpu_variants.package())
    cpu_variants.library()


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("dtype", cases.TOLERANCE)
def test_variants(variant, dtype):
    for case in cases.all_cases():
        if (case.variant, case.dtype) == (variant, dtype):
            cases.assert_right(cases.check(case))


@pytest.mark.parametrize("variant", KINDS)
def test_split_plans(variant):
    """Requests cut into tiles of 6 and 37 rows and runs of 48 keys over 7 CTAs: partials, merges, outputs behind the merge."""
    for i, case in enumerate(cases.all_cases()):
        if case.variant == variant and case.dtype != "float16":
            cases.assert_right(cases.check(case._replace(way=("append", "paged", "ragged")[i % 3]), **cases.SPLIT))


def test_some_rows_see_nothing():
    """The first request of "kept keys" sees no key at all: the cases above would say nothing of empty rows otherwise."""
    found = [cases.check(c, **s) for c in cases.all_cases() if c.variant == "kept keys" for s in ({}, cases.SPLIT)]
    assert all(result["num_empty"] > 0 for result in found)


def available_isas() -> list[str]:
    names = ["portable", "avx2", "avx512"]
    return names[: names.index(_ffi.func("cpu_info")().split()[0]) + 1]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets_read_no_table_beyond_its_keys(isa):
    """Tables that a key's position indexes lie beside memory that cannot be read; a read there ends the process."""
    if isa not in available_isas():
        pytest.skip(f"this machine runs {available_isas()[-1]}: {isa} is not below it")
    script = pathlib.Path(__file__).with_name("variant_cases.py")
    root = str(pathlib.Path(tvm_infer.__file__).parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path, "TVM_INFER_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 2 * len(cases.all_cases())
    for result in results:
        cases.assert_right(result)


def census_tables(batch):
    """What the census counts into: qo_indptr, calls, rows, strays, outputs, lse."""
    tokens, heads = batch.q.shape[:2]
    return [
        batch.qo_indptr,
        np.zeros((tokens, heads, int(batch.kv_len.max())), np.int32),
        np.full((tokens, heads, 4), -1, np.int32),
        np.zeros(1, np.int32),
        np.zeros((tokens, heads, 1), np.int32),
        np.zeros((tokens, heads, 1), np.float32),
    ]


@pytest.mark.parametrize("settings", [{}, cases.SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize(("causal", "window_left"), [(True, -1), (False, -1), (True, 20), (False, 3)])
@pytest.mark.parametrize("name", cases.BATCHES)
def test_each_visible_key_is_shown_once_and_no_other(settings, causal, window_left, name):
    kind = cpu_variants.Kind(CENSUS.digest, causal, window_left)
    batch = make_paged_batch(*cases.BATCHES[name], num_qo_heads=6, num_kv_heads=2, head_dim=24, page_size=7)
    tables = census_tables(batch)
    _, lse = cases.run("paged", batch, bind(kind, tables=tables), **settings)
    _, calls, rows, strays, outputs, hook_lse = tables
    assert strays[0] == 0
    assert (outputs == 24).all()
    np.testing.assert_array_equal(hook_lse[..., 0], lse)
    for b, kv_len in enumerate(batch.kv_len):
        first, last = batch.qo_indptr[b : b + 2]
        for token in range(first, last):
            q_pos = kv_len - (last - token)
            keys = np.arange(calls.shape[2])
            visible = keys < kv_len
            if causal:
                visible &= keys <= q_pos
            if window_left >= 0:
                visible &= keys >= q_pos - window_left
            for head in range(6):
                np.testing.assert_array_equal(calls[token, head], visible)
                assert rows[token, head].tolist() == [head // 3, q_pos, last - first, kv_len]


def test_rows_of_several_requests_in_one_work():
    """As in a shared prefix, for which a plan is edited here: each row is of its own request."""
    batch = make_paged_batch([1, 2], [50, 50], num_qo_heads=6, num_kv_heads=2, head_dim=24)
    bound = bind(cpu_variants.Kind(CENSUS.digest, causal=False), tables=census_tables(batch))
    plan = tvm_infer.plan(
        batch.qo_indptr,
        batch.kv_len,
        num_qo_heads=6,
        num_kv_heads=2,
        head_dim=24,
        num_ctas=1,
        fixed_split_size=-1,
        variant=bound,
    )
    assert plan.num_works == 2
    at = plan.works["kv_list"].tolist().index(0)
    plan.works[0] = plan.works[at]
    plan.works["num_rows"][0], plan.work_indptr[1] = 9, 1
    tvm_infer.attention(batch.q, batch.kv_cache, plan, variant=bound, **batch.tables)
    _, calls, rows, strays, outputs, _ = bound.tables
    assert strays[0] == 0 and (calls == 1).all() and (outputs == 24).all()
    for token, (q_pos, q_len) in enumerate([(49, 1), (48, 2), (49, 2)]):
        for head in range(6):
            assert rows[token, head].tolist() == [head // 3, q_pos, q_len, 50]


@pytest.mark.parametrize("settings", [{}, cases.SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("qo_lens", [[1, 1], [70, 9]])
def test_logits_that_are_no_numbers_stay_in_their_row(settings, qo_lens):
    batch = make_paged_batch(qo_lens, [150, 70], num_qo_heads=8, num_kv_heads=2, head_dim=64)
    out, lse = cases.run("paged", batch, bind(NO_NUMBERS), **settings)
    plain, plain_lse = batch.reference(causal=False)
    good = [0, 4, 5, 6, 7]
    assert relative_error(out[:, good], plain[:, good]) <= 1e-5
    assert relative_error(lse[:, good], plain_lse[:, good]) <= 1e-5
    assert np.isnan(out[:, 1:3]).all() and np.isnan(lse[:, 1:3]).all()
    assert (out[:, 3] == 0).all() and np.isneginf(lse[:, 3]).all()


def test_a_variant_without_hooks_changes_no_bit():
    for settings in ({}, cases.SPLIT):
        batch = make_paged_batch([1, 70], [150, 70], num_qo_heads=8, num_kv_heads=2, head_dim=80, dtype="bfloat16")
        bound = bind(KINDS["no hook"])
        out, lse = cases.run("paged", batch, bound, "bfloat16", **settings)
        plan = tvm_infer.plan(
            batch.qo_indptr,
            batch.kv_len,
            num_qo_heads=8,
            num_kv_heads=2,
            head_dim=80,
            dtype="bfloat16",
            window_left=30,
            **settings,
        )
        plain, plain_lse = tvm_infer.attention(batch.q, batch.kv_cache, plan, return_lse=True, **batch.tables)
        assert out.tobytes() == plain.tobytes() and lse.tobytes() == plain_lse.tobytes()


def test_fixed_splits_make_a_row_independent_of_its_batch():
    """A row's bits are the same alone and beside others: hooks are called per row, in runs that depend on the row alone."""
    kind, scalars = KINDS["everything"], [2.5, 4]
    batch = make_paged_batch([1, 40, 7], [150, 90, 70], num_qo_heads=8, num_kv_heads=2, head_dim=64)
    out, _ = cases.run("paged", batch, bind(kind, scalars), num_ctas=5, fixed_split_size=64)
    alone = make_paged_batch([1], [150], num_qo_heads=8, num_kv_heads=2, head_dim=64)
    alone.q[:], alone.kv_cache = batch.q[:1], batch.kv_cache
    alone.kv_page_indptr, alone.kv_page_indices = batch.kv_page_indptr[:2], batch.kv_page_indices
    single, _ = cases.run("paged", alone, bind(kind, scalars), num_ctas=2, fixed_split_size=64)
    assert single.tobytes() == out[:1].tobytes()


def test_tables_may_be_views():
    """Slices, steps, transposes, byte offsets: the same numbers give the same bits."""
    torch = pytest.importorskip("torch")
    tvm = pytest.importorskip("tvm")
    batch = make_paged_batch([3, 9], [150, 70], num_qo_heads=4, num_kv_heads=2, head_dim=64)
    kind = KINDS["bias"]
    _, (begins, by_key, by_head) = cpu_variants.parameters("bias", batch)
    plain, _ = cases.run("paged", batch, bind(kind, tables=[begins, by_key, by_head]))

    stepped = np.full(3 * by_key.size + 5, np.nan, np.float32)[5::3]
    stepped[:] = by_key
    backward = by_key[::-1].copy()[::-1]
    read_only = by_key.copy()
    read_only.flags.writeable = False
    whole = torch.full((by_key.size + 9,), torch.nan)
    sliced = whole[9:]
    sliced[:] = torch.from_numpy(by_key)
    flat = tvm.runtime.tensor(np.concatenate([np.full(6, np.nan, np.float32), by_key]))
    offset = flat._create_view(by_key.shape, "float32", relative_byte_offset=24)
    transposed = torch.from_numpy(by_head.T.copy()).T
    tables = [(x, by_head) for x in (stepped, backward, read_only, sliced, offset)] + [(by_key, transposed)]
    for keys, heads in tables:
        out, _ = cases.run("paged", batch, bind(kind, tables=[begins, keys, heads]))
        assert out.tobytes() == plain.tobytes()


def test_tables_live_as_long_as_the_call_object():
    """The object keeps the memory of its tables, and reads what is there at the time of a call."""
    batch = make_paged_batch([1], [70], num_qo_heads=4, num_kv_heads=2, head_dim=64)
    slopes = np.zeros(4, np.float32)
    bound = bind(KINDS["alibi"], tables=[slopes])
    flat, _ = cases.run("paged", batch, bound)
    slopes[:] = 0.5
    steep, _ = cases.run("paged", batch, bound)
    expected, _ = cpu_variants.expected(KINDS["alibi"], batch, [], [slopes])
    assert relative_error(steep, expected) <= 1e-5 < relative_error(flat, expected)
    bound.tables.clear()
    del slopes
    again, _ = cases.run("paged", batch, bound)
    assert again.tobytes() == steep.tobytes()

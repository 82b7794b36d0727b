"""The benchmarks run, check before they time, and say what they leave out. No timing is asserted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tvm_infer import errors
from tvm_infer.bench import attention, peers, workloads
from tvm_infer.bench.workloads import Workload
from tvm_infer.testing import relative_error

SMALL = {"num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 16, "page_size": 4}
TINY = (
    Workload("decode", (1, 1), (37, 9), **SMALL),
    Workload("mixed", (5, 1, 3), (5, 20, 11), **SMALL),
    Workload("bf16", (1,), (30,), dtype="bfloat16", **SMALL),
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(workloads.SUITES, "tiny", TINY)
    monkeypatch.setattr(attention, "read_bandwidth", lambda threads: 10.0)


def test_suite_measures_everything_and_says_what_it_leaves_out(tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    results = attention.run(suite="tiny", peers=["torch", "tvm-tir"], json_path=str(path))
    assert json.loads(path.read_text()) == results
    rows = {r["workload"]: r for r in results["rows"]}
    assert set(rows) == {"decode", "mixed", "bf16"}
    for row in rows.values():
        assert row["us"] > 0 and row["plan_us"] > 0 and row["relative_error"] < 3e-2
        assert row["of_read_bandwidth"] == pytest.approx(row["gb_per_s"] / 10.0)
        assert row["peers"]["torch"]["us"] > 0
    assert rows["mixed"]["peers"]["tvm-tir"]["us"] > 0
    assert "bfloat16" in rows["bf16"]["peers"]["tvm-tir"]["skipped"]
    assert "not measured: tvm-tir, bf16 bfloat16" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["torch", "tvm-tir"])
@pytest.mark.parametrize("workload", TINY[:2], ids=lambda w: w.name)
def test_peers_compute_the_workload(name, workload):
    batch = attention._batch(workload)
    _, output = peers.peer(name).prepare(workload, batch)
    assert relative_error(output(), batch.reference()[0]) < 1e-5


def test_a_wrong_peer_is_not_timed(tiny, monkeypatch):
    class Wrong:
        def prepare(self, workload, batch):
            return lambda: None, lambda: np.zeros(batch.q.shape)

    monkeypatch.setitem(peers.PEERS, "wrong", Wrong())
    results = attention.run(suite="tiny", peers=["wrong"], workloads=("decode",))
    assert "wrong result" in results["rows"][0]["peers"]["wrong"]["skipped"]


def test_a_wrong_kernel_is_an_error_not_a_figure(tiny, monkeypatch):
    monkeypatch.setattr(attention.ops, "attention", lambda *a, out, **k: out.fill(0))
    with pytest.raises(AssertionError, match="relative error"):
        attention.run(suite="tiny", peers=[], workloads=("decode",))


def test_batches_above_the_fast_path_hold_the_same_keys():
    """Long workloads are filled by pages; their dense keys and their pages agree."""
    workload = Workload("long", (1, 2), (4100, 7), **SMALL)
    batch = attention._batch(workload)
    for r in range(2):
        for j in (0, 5, workload.kv_lens[r] - 1):
            page = batch.kv_page_indices[batch.kv_page_indptr[r] + j // 4]
            assert np.array_equal(batch.kv_cache[page, 0, :, j % 4], batch.keys[r][j])
            assert np.array_equal(batch.kv_cache[page, 1, :, j % 4], batch.values[r][j])


def test_counts_of_a_workload():
    w = workloads.prefill(1, 4, num_qo_heads=2, num_kv_heads=1, head_dim=8)
    assert w.flops == 4 * (1 + 2 + 3 + 4) * 2 * 8
    assert w.kv_bytes == 2 * 4 * 1 * 8 * 4
    assert w.with_dtype("bfloat16").kv_bytes == w.kv_bytes // 2


def test_read_bandwidth_is_positive_and_bad_arguments_are_refused():
    assert attention.read_bandwidth(1, gib=0.01) > 0.1
    from tvm_infer import _ffi

    with pytest.raises(errors.ArgumentError, match="4 bytes"):
        _ffi.func("cpu_stream_read")(np.zeros(1, np.float32), 1)


def test_device_is_checked():
    with pytest.raises(errors.ArgumentError, match="'cuda'"):
        attention.run(device="cuda")

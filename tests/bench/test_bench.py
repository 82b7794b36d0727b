"""The benchmark of the CPU executor runs, checks before it times, and says what it leaves out. No timing is asserted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tvm_infer import errors
from tvm_infer.bench import attention, inputs, peers, run_cpu, suites, workloads
from tvm_infer.bench.ceilings import read_bandwidth
from tvm_infer.bench.peers import Prepared
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
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite("cpu", TINY))
    monkeypatch.setattr(run_cpu, "read_bandwidth", lambda threads: 10.0)


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
    batch = inputs.host_batch(workload)
    prepared = peers.peer(name, "cpu").prepare("", workload, [batch])
    assert relative_error(prepared.output(), batch.reference()[0]) < 1e-5


def test_layouts_by_flag_compute_the_same(tiny):
    """NHD pages and ragged keys are checked against float64 like the others."""
    for layout in ({"kv_layout": "NHD"}, {"ragged": True}):
        row = run_cpu.measure_workload(Workload("w", (5, 1, 3), (5, 20, 11), **SMALL, **layout), [], 1)
        assert row["us"] > 0 and row["relative_error"] < 1e-5


class FakePeer:
    """A peer whose result is what the test says."""

    def __init__(self, output):
        self._output = output

    def variants(self, workload):
        return ("",)

    def prepare(self, variant, workload, batches):
        return Prepared([lambda: None], lambda: self._output(batches[0]))


def test_a_wrong_peer_is_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(run_cpu, "peer", lambda *_: FakePeer(lambda b: np.zeros(b.q.shape)))
    results = attention.run(suite="tiny", peers=["torch"], workloads=("decode",))
    assert "wrong result" in results["rows"][0]["peers"]["torch"]["skipped"]


def test_a_peer_that_raises_is_said_and_the_rest_goes_on(tiny, monkeypatch):
    monkeypatch.setattr(run_cpu, "peer", lambda *_: FakePeer(lambda b: 1 // 0))
    results = attention.run(suite="tiny", peers=["torch"], workloads=("decode",))
    assert "ZeroDivisionError" in results["rows"][0]["peers"]["torch"]["skipped"]


def test_a_wrong_kernel_fails_its_row_and_has_no_figure(tiny, monkeypatch, capsys):
    real = run_cpu.ops.attention

    def wrong_for_bfloat16(q, *args, out, **kwargs):
        real(q, *args, out=out, **kwargs)
        if q.dtype.name == "bfloat16":
            out.fill(0)

    monkeypatch.setattr(run_cpu.ops, "attention", wrong_for_bfloat16)
    results = attention.run(suite="tiny", peers=[])
    rows = {r["workload"]: r for r in results["rows"]}
    assert "relative error" in rows["bf16"]["failed"] and "us" not in rows["bf16"]
    assert rows["decode"]["us"] > 0 and attention.num_failed(results) == 1
    assert "FAILED: bf16 bfloat16" in capsys.readouterr().out


def test_batches_above_the_fast_path_hold_the_same_keys():
    """Long workloads are filled by pages; their dense keys and their pages agree."""
    workload = Workload("long", (1, 2), (4100, 7), **SMALL)
    batch = inputs.host_batch(workload)
    for r in range(2):
        for j in (0, 5, workload.kv_lens[r] - 1):
            page = batch.kv_page_indices[batch.kv_page_indptr[r] + j // 4]
            assert np.array_equal(batch.kv_cache[page, 0, :, j % 4], batch.keys[r][j])
            assert np.array_equal(batch.kv_cache[page, 1, :, j % 4], batch.values[r][j])


def test_counts_of_a_workload():
    w = workloads.prefill(1, 4, num_qo_heads=2, num_kv_heads=1, head_dim=8)
    assert w.flops == 4 * (1 + 2 + 3 + 4) * 2 * 8
    assert w.kv_bytes == 2 * 4 * 1 * 8 * 4
    assert w.bytes_moved == w.kv_bytes + 2 * 4 * 2 * 8 * 4  # q and o
    assert w.with_dtype("bfloat16").kv_bytes == w.kv_bytes // 2
    append = Workload("append", (3,), (10,), num_qo_heads=1, num_kv_heads=1, head_dim=1)
    assert append.visible_pairs == 8 + 9 + 10


def test_read_bandwidth_is_positive_and_bad_arguments_are_refused():
    assert read_bandwidth(1, gib=0.01) > 0.1
    from tvm_infer import _ffi

    with pytest.raises(errors.ArgumentError, match="4 bytes"):
        _ffi.func("cpu_stream_read")(np.zeros(1, np.float32), 1)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"device": "tpu"}, errors.ArgumentError, "'tpu'"),
        ({"suite": "nonsense"}, errors.ArgumentError, "`suite` is 'nonsense'"),
        ({"workloads": ("decode b9",)}, errors.ArgumentError, "'decode b9'"),
        ({"dtypes": ("int8",)}, errors.ArgumentError, "'int8'"),
        ({"peers": ["flex"]}, errors.ArgumentError, "on cpu it must be among torch, tvm-tir"),
        ({"device": "cuda", "peers": ["triton"]}, errors.ArgumentError, "on cuda it must be among"),
        ({"json_path": "/no/such/folder/x.json"}, errors.ArgumentError, "no folder"),
        ({"plot_path": "/no/such/folder/x.png"}, errors.ArgumentError, "no folder"),
        ({"suite": "cpu", "custom": TINY}, errors.ArgumentError, "`suite` is given together with shapes"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_are_refused_before_anything_is_measured(monkeypatch, arguments, kind, message):
    monkeypatch.setattr(run_cpu, "measure_workload", lambda *_: pytest.fail("measured"))
    with pytest.raises(kind, match=message):
        attention.run(**arguments)

"""The CUDA side of the benchmark on a machine without a GPU: the CPU executor and torch's CPU tensors stand for the device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import _ffi, errors, ops
from tvm_infer.bench import (
    attention,
    ceilings,
    inputs,
    matmul_cuda,
    peers,
    peers_torch,
    planning,
    reference,
    run_cuda,
    suites,
    timing,
)
from tvm_infer.bench.cuda_device import CudaDevice
from tvm_infer.bench.timing import Timing, time_graph
from tvm_infer.bench.workloads import Workload
from tvm_infer.testing.reference import attention_reference

SMALL = {"num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 16, "page_size": 4, "dtype": "bfloat16"}
TINY = (
    Workload("decode", (1, 1), (37, 9), **SMALL),
    Workload("mixed", (40, 1, 3), (40, 20, 11), **SMALL),
    Workload("nhd", (2, 1), (30, 7), kv_layout="NHD", **SMALL),
    Workload("ragged", (2, 1), (30, 7), ragged=True, **SMALL),
    Workload("plan", (1, 1), (37, 9), plan_only=True, **SMALL),
)
US = 2.0
CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
CEILINGS = ceilings.Ceilings(read_gb_per_s=4000.0, copy_gb_per_s=3900.0, matmul_tflop_per_s=800.0)


class HostDevice(CudaDevice):
    """Runs launches once and says that each took 2 µs."""

    torch_device = "cpu"

    def __init__(self):
        self.launched = []

    def describe(self):
        return {"device_name": "fake", "num_sms": 2, "memory_gib": 1.0, "driver": "1.0", "cuda": "13.0"}

    def time(self, launches):
        for launch in launches:
            launch()
        self.launched.append(len(launches))
        return Timing(US, US, US, 15)

    def time_upload(self, plan):
        return Timing(1.0, 1.0, 1.0, 1)

    def ceilings(self):
        return CEILINGS

    def plan(self, workload):
        w = workload
        return ops.plan(
            inputs.indptr(w.qo_lens),
            w.list_lens,
            num_qo_heads=w.num_qo_heads,
            num_kv_heads=w.num_kv_heads,
            head_dim=w.head_dim,
            dtype=w.dtype,
            levels=w.levels,
        )

    def synchronize(self):
        pass

    def release(self):
        pass


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite("cuda", TINY))
    monkeypatch.setattr(run_cuda, "MAX_COPIES", 3)


def test_every_row_has_what_the_json_promises(tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    results = attention.run(suite="tiny", peers=["torch", "flashinfer"], json_path=str(path), cuda_device=HostDevice)
    assert json.loads(path.read_text()) == results
    assert results["device"] == "cuda" and results["device_name"] == "fake" and results["schema"] == 2
    assert results["rest_s"] == timing.REST_S
    assert results["ceilings"] == vars(CEILINGS) and "float64" in results["method"]
    assert results["versions"]["torch"] and results["date"]
    rows = {r["workload"]: r for r in results["rows"]}
    assert list(rows) == ["decode", "mixed", "nhd", "ragged", "plan"] and attention.num_failed(results) == 0
    for w in TINY[:4]:
        row = rows[w.name]
        assert row["us"] == row["p10_us"] == row["p90_us"] == US
        assert row["copies"] == 3 and row["launches"] == 9 and row["replays"] == 15
        assert row["gb_per_s"] == pytest.approx(w.bytes_moved / US / 1e3)
        assert row["tflop_per_s"] == pytest.approx(w.flops / US / 1e6)
        assert row["bound"] == "read" and row["of_ceiling"] == pytest.approx(w.bytes_moved / 4e6 / US)
        assert 0 < row["relative_error"] < 4e-3 and row["lse_error"] < 2e-3
        assert row["plan_us"] > 0 and row["upload_us"] == 1.0
        assert "flashinfer is not installed" in row["peers"]["flashinfer"]["skipped"]
        assert set(row["peers"]["torch"]["variants"]) == {"flash", "cudnn"}
        assert row["vs_best_peer"] == (1.0 if "us" in row["peers"]["torch"] else None)
    assert rows["plan"]["plan_us"] > 0 and "us" not in rows["plan"]
    out = " ".join(capsys.readouterr().out.split())
    assert "read 4000 GB/s" in out and "not measured: flashinfer, all rows" in out


def test_shared_prefixes(monkeypatch):
    """Both plans of a batch give what float64 gives; its requests share the pages of their prefix, which count once."""
    shape = {"num_qo_heads": 8, "num_kv_heads": 2, "dtype": "bfloat16", "prefix": 512}
    shared = Workload("shared", (1,) * 24, (530,) * 24, **shape)
    flat = dataclasses.replace(shared, name="flat", flat=True)
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite("cuda", (shared, flat)))
    monkeypatch.setattr(run_cuda, "MAX_COPIES", 2)
    results = attention.run(suite="tiny", peers=[], cuda_device=HostDevice)
    assert attention.num_failed(results) == 0
    rows = results["rows"]
    assert rows[0]["prefix"] == rows[1]["prefix"] == 512 and rows[0]["bytes"] == rows[1]["bytes"]
    assert rows[0]["works"] != rows[1]["works"]
    assert shared.kv_bytes == (512 + 24 * 18) * 2 * 2 * 128 * 2
    batch = inputs.device_batch(shared, "cpu")
    assert batch.kv.shape[0] == 32 + 24 * 2
    assert len(set(batch.page_indices.tolist())) == 32 + 24 * 2 and all(
        (batch.pages(r)[:32] == batch.pages(0)[:32]).all() for r in range(24)
    )


@pytest.mark.parametrize("kv_len", [528, 112])
def test_streaming_heads(monkeypatch, kv_len):
    """Every other head reads a few pages, or all there are, by the reference as by the plan. Peers are not measured on it."""
    shape = {"num_qo_heads": 8, "num_kv_heads": 4, "dtype": "bfloat16", "streaming": (32, 80)}
    row = Workload("streaming", (1,) * 3, (kv_len,) * 3, **shape)
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite("cuda", (row,)))
    results = attention.run(suite="tiny", peers=["torch"], cuda_device=HostDevice)
    assert attention.num_failed(results) == 0
    (made,) = results["rows"]
    assert (
        made["streaming"] == list(row.streaming) and "same keys for all KV heads" in made["peers"]["torch"]["skipped"]
    )


@pytest.mark.parametrize(("layout", "kv_lens"), [("HND", (528, 100, 513)), ("NHD", (333,))])
def test_selected_pages(monkeypatch, layout, kv_lens):
    """Selection and attention over lists of six pages, against float64 over what a sort of the scores gives."""
    shape = {"num_qo_heads": 8, "num_kv_heads": 4, "dtype": "bfloat16", "kv_layout": layout, "selected": (6, 1, 2)}
    row = Workload("selected", (1,) * len(kv_lens), kv_lens, **shape)
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite("cuda", (row,)))
    monkeypatch.setattr(run_cuda, "MAX_COPIES", 2)
    results = attention.run(suite="tiny", peers=["torch"], cuda_device=HostDevice)
    assert attention.num_failed(results) == 0
    (made,) = results["rows"]
    assert made["selected"] == [6, 1, 2] and "same keys for all KV heads" in made["peers"]["torch"]["skipped"]
    batch = inputs.device_batch(row, "cpu")
    for r, n in enumerate(kv_lens):
        seen = batch.selects(r)
        assert seen[:, :16].all() and seen[:, -17:].all() and seen.shape == (4, n)
        assert seen.sum(1).tolist() == [row.list_lens[r][0]] * 4
    monkeypatch.setattr(inputs.DeviceBatch, "selects", lambda batch, r: ~torch.zeros(4, kv_lens[r], dtype=torch.bool))
    assert attention.num_failed(attention.run(suite="tiny", peers=[], cuda_device=HostDevice)) == 1


def test_formats_come_in_pairs():
    rows = suites.suite("formats").workloads
    assert {row.head_dim for row in rows if not row.prefix} == {64, 80, 96, 128, 192, 256}
    decode, prefill = (row for row in rows if row.head_dim_vo)
    assert (decode.head_dim, decode.head_dim_vo) == (prefill.head_dim, prefill.head_dim_vo) == (192, 128)
    assert decode.kv_bytes == 64 * 2048 * 8 * (192 + 128) * 2
    assert prefill.flops == 2 * (8192 * 8193 // 2) * 32 * (192 + 128)
    dense, streaming, selecting = (row for row in rows if row.kv_lens == (32768,) * 16)
    assert dataclasses.replace(streaming, name=dense.name, streaming=(0, 0)) == dense
    assert streaming.kv_bytes == 2 * 16 * 4 * (32768 + 68 * 16) * 128 * 2 and streaming.flops < 0.52 * dense.flops
    assert dataclasses.replace(selecting, name=dense.name, selected=(0, 0, 0)) == dense
    assert selecting.kv_bytes == 2 * 16 * 8 * 128 * 2 * (2048 + 2048)  # lists of 2048 keys, bounds of 2048 pages
    for row in (row for row in rows if row.prefix and not row.flat):
        assert dataclasses.replace(row, name=f"{row.name} flat", flat=True) in rows
        assert row.levels and row.prefix % row.page_size == 0


@pytest.mark.parametrize("kv_layout", ["HND", "NHD", "ragged"])
def test_keys_wider_than_values(monkeypatch, kv_layout):
    shape = {"num_qo_heads": 4, "num_kv_heads": 2, "dtype": "bfloat16", "head_dim": 24, "head_dim_vo": 16}
    layout = {"ragged": True} if kv_layout == "ragged" else {"kv_layout": kv_layout}
    row = Workload("unequal", (1, 9), (70, 40), **shape, **layout)
    monkeypatch.setitem(suites.SUITES, "tiny", suites.Suite("cuda", (row,)))
    results = attention.run(suite="tiny", peers=["torch", "tvm-tir"], cuda_device=HostDevice)
    assert attention.num_failed(results) == 0
    (made,) = results["rows"]
    assert (made["head_dim"], made["head_dim_vo"]) == (24, 16)
    assert made["peers"]["tvm-tir"]["skipped"] == "keys as wide as values: others not measured"


def test_keys_of_8_bits_stand_for_what_the_reference_sees():
    row = dataclasses.replace(suites.suite("fp8").workloads[1], qo_lens=(1, 3), kv_lens=(40, 17))
    assert row.kv_dtype == "float8_e4m3fn" and row.kv_bytes == 57 * 8 * 128 * 2
    batch = inputs.device_batch(row, "cpu")
    assert str(batch.kv.dtype) == "torch.float8_e4m3fn" and batch.kv_scales == {"k_scale": 1 / 32, "v_scale": 1 / 32}
    k, v = batch.dense(0)
    assert k.shape == (8, 40, 128) and 0.9 < float(k.double().std()) < 1.1 and 0.9 < float(v.double().std()) < 1.1
    first = batch.kv[batch.pages(0)[0], 0, 3, 5].float() / 32
    assert (k[3, 5].float() == first).all()


def test_a_wrong_row_fails_and_the_rest_is_measured(tiny, monkeypatch):
    class Wrong(HostDevice):
        def launcher(self, batch, plan, workspace):
            good = super().launcher(batch, plan, workspace)
            if batch.workload.name != "mixed":
                return good

            def launch():
                good()
                batch.out[-1, 0, 0] += 1

            return launch

    results = attention.run(suite="tiny", peers=[], cuda_device=Wrong)
    failed = {r["workload"]: r["failed"] for r in results["rows"] if "failed" in r}
    assert list(failed) == ["mixed"] and "wrong result before timing" in failed["mixed"]
    assert attention.num_failed(results) == 1


@pytest.mark.parametrize(("at", "when"), [(2, "before"), (3, "after")])
def test_a_launch_that_writes_nothing_is_found(tiny, at, when):
    """The second launch, and one under timing: both leave NaN."""

    class Lazy(HostDevice):
        calls = 0

        def launcher(self, batch, plan, workspace):
            good = super().launcher(batch, plan, workspace)

            def launch():
                Lazy.calls += 1
                if Lazy.calls < at:
                    good()

            return launch

    (row,) = attention.run(suite="tiny", workloads=("decode",), peers=[], cuda_device=Lazy)["rows"]
    assert f"wrong result {when} timing" in row["failed"]


def test_errors_of_the_library_fail_their_row_only(tiny):
    class Refusing(HostDevice):
        def plan(self, workload):
            if workload.ragged:
                raise errors.ExecutorError("no kernel")
            return super().plan(workload)

    rows = attention.run(suite="tiny", peers=[], cuda_device=Refusing)["rows"]
    assert [r["workload"] for r in rows if "failed" in r] == ["ragged"]
    assert rows[3]["failed"] == "ExecutorError: no kernel"


def test_a_device_without_cuda_is_refused_at_once():
    expected = errors.MissingDependencyError if torch.version.cuda is None else errors.ExecutorError
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(expected, match='`device` is "cuda"'):
        attention.run(device="cuda")


def test_without_torch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("tvm_infer.bench.cuda_device.importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.MissingDependencyError, match=r"tvm_infer\[torch\]"):
        CudaDevice()


@pytest.mark.parametrize("workload", TINY[:4], ids=lambda w: w.name)
def test_the_reference_is_attention_in_float64(workload, monkeypatch):
    """Against the package's reference, one KV head at a time; sampled tokens of the long request are those of the whole."""
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 1)
    batch = inputs.device_batch(workload, "cpu")
    expected = reference.reference(batch)
    first, everything = 0, []
    for r, n in enumerate(workload.qo_lens):
        k, v = (x.transpose(0, 1).double().numpy() for x in batch.dense(r))
        q = batch.q[first : first + n].double().numpy()
        everything.append(attention_reference(q, k, v, sm_scale=batch.sm_scale, causal=True, window_left=-1))
        first += n
    o, lse = (np.concatenate(x) for x in zip(*everything, strict=True))
    tokens = expected.tokens.numpy()
    assert len(set(tokens)) == len(tokens) and {0, sum(workload.qo_lens) - 1} <= set(tokens)
    assert np.allclose(expected.o, o[tokens], atol=1e-12) and np.allclose(expected.lse, lse[tokens], atol=1e-12)
    assert expected.error(torch.from_numpy(o)) < 1e-12
    o[0, 0, 0] = math.nan
    assert expected.error(torch.from_numpy(o)) == math.inf
    lse[0, 0] = math.inf
    assert expected.lse_error(torch.from_numpy(lse)) == math.inf


def test_long_requests_are_sampled():
    batch = inputs.device_batch(TINY[1], "cpu")
    tokens = reference.reference(batch).tokens.tolist()
    assert 4 < sum(t < 40 for t in tokens) <= reference.SAMPLED_TOKENS and {0, 1, 38, 39, 40, 41, 42, 43} <= set(tokens)


def test_copies_are_other_memory_with_the_same_values():
    batch = inputs.device_batch(TINY[0], "cpu")
    copy = batch.copy()
    for name in ("q", "kv"):
        one, other = getattr(batch, name), getattr(copy, name)
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    copy.poison_outputs()
    assert copy.out.isnan().all() and copy.lse.isnan().all() and copy.out.data_ptr() != batch.out.data_ptr()


def test_rotation_is_above_the_l2_and_bounded():
    rows = {w.name: run_cuda.num_copies(w) for w in suites.H200}
    assert rows["decode h32/8 b1 kv512"] == 128 and rows["prefill 1x16384"] == 1
    assert all(n * w.bytes_moved >= 256 << 20 or n == 200 for w, n in zip(suites.H200, rows.values(), strict=False))
    assert run_cuda.num_copies(Workload("tiny", (1,), (1,), **SMALL)) == 200


def test_the_ceiling_that_binds():
    decode, prefill = (
        next(w for w in suites.H200 if w.name == n) for n in ("decode h32/8 b64 kv8192", "prefill 1x16384")
    )
    assert CEILINGS.fastest_us(decode) == (pytest.approx(decode.bytes_moved / 4e6), "read")
    assert CEILINGS.fastest_us(prefill) == (pytest.approx(prefill.flops / 8e8), "matmul")


def test_the_read_ceiling_is_checked_and_takes_device_memory_only():
    x = torch.randn(4096).bfloat16()
    words = int(x.view(torch.int32).sum(dtype=torch.int64)) % 2**32
    total = torch.tensor([words - 2**32 if words >= 2**31 else words], dtype=torch.int32)
    ceilings.check_read(x, total)
    with pytest.raises(RuntimeError, match="did not read everything"):
        ceilings.check_read(x, total + 1)
    with pytest.raises(errors.ArgumentError, match="`x` is on device type 1"):
        _ffi.func("read_ceiling")(x, total)


def test_the_copy_ceiling_is_a_kernel_that_reads_and_writes(monkeypatch):
    """Not copy_, which a graph gives to the copy engine."""
    monkeypatch.setattr(ceilings, "_COPY_BYTES", 1 << 12)
    called = []

    class Timer:
        def time(self, launches):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                for launch in launches:
                    launch()
            called.extend(event.name for event in profile.events())
            return Timing(US, US, US, 1)

    assert ceilings._copy_us(Timer(), "cpu") == US
    assert "aten::neg" in called and "aten::copy_" not in called


def test_graph_time_is_per_launch_and_replays_what_was_captured(monkeypatch):
    """torch's graphs, events and synchronisation, with a clock that a replayed launch moves by 3 µs."""
    clock, captured, log = [0.0], [], []

    class Graph:
        def replay(self):
            assert log[0] == f"rest {timing.REST_S}"
            clock[0] += 3.0 * len(captured)
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph):
        assert log == ["launch"] * 3  # warmed up, then waited for, before the capture
        log.clear()
        yield
        captured.extend(log)
        log.clear()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e3  # ms

    for name, fake in (("CUDAGraph", Graph), ("graph", capture), ("Event", Event), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: log.append(f"rest {seconds}"))
    measured = time_graph([lambda: log.append("launch")] * 5, replays=15)
    assert captured == ["launch"] * 5 and log[1:] == ["replay"] * 17
    assert measured == Timing(3.0, 3.0, 3.0, 15)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_the_read_ceiling_compiles_without_spills(tmp_path):
    source, cubin = tmp_path / "read_ceiling.cu", tmp_path / "read_ceiling.cubin"
    source.write_text('#include "tvm_infer/kernels/read_ceiling.cuh"\nTVM_INFER_READ_CEILING(read_ceiling);\n')
    flags = [
        "-cubin",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-std=c++20",
        "-O3",
        "-Xptxas",
        "-v",
        "-I",
        str(CUDA_SRC),
    ]
    log = subprocess.run(
        ["nvcc", *flags, str(source), "-o", str(cubin)], capture_output=True, text=True, check=True
    ).stderr
    assert "0 bytes spill stores" in log and "0 bytes stack frame" in log
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    assert registers <= 64  # two CTAs of 512 threads on an SM
    assert b"read_ceiling_info" in cubin.read_bytes()


def test_planning_is_timed_on_the_executors_table():
    device = HostDevice()
    for workload in (TINY[1], dataclasses.replace(TINY[0], prefix=4)):
        plan, table = device.plan(workload), device.tile_table(workload)
        assert table[:-3] == tuple(n for tile in plan.tile_classes.tolist() for n in tile)
        timing = planning.time_plan(workload, plan, table, calls=40)
        assert timing.runs == 40 and 0 < timing.median < 10_000


def test_groups_of_equal_lengths_cover_the_batch():
    """What the dense peers compute comes back in the order of tokens."""
    workload = Workload("w", (2, 1, 2, 1), (9, 5, 9, 5), **SMALL)
    batch = inputs.device_batch(workload, "cpu")
    groups = peers_torch.dense_groups(batch)
    assert [(g.members, g.qo_len, g.kv_len) for g in groups] == [((0, 2), 2, 9), ((1, 3), 1, 5)]
    assert groups[0].k.shape == (2, 2, 9, 16) and torch.equal(groups[1].v[1], batch.dense(3)[1])
    assert torch.equal(peers_torch.scatter(workload, groups, [g.q for g in groups], batch.q), batch.q)


@pytest.mark.parametrize("workload", [*TINY[:4], Workload("prefill", (9,), (9,), **SMALL)], ids=lambda w: w.name)
def test_sdpa_computes_the_workload(workload):
    """torch's FlashAttention backend exists on the CPU too; history needs the lower-right mask, which has none there."""
    batch = inputs.device_batch(workload, "cpu")
    candidate = peers.peer("torch", "cuda")
    if any(1 < n < m for n, m in zip(workload.qo_lens, workload.kv_lens, strict=True)):
        with pytest.raises(peers.Skipped, match="no causal mask"):
            candidate.prepare("cudnn", workload, [batch])
    else:
        output = candidate.prepare("flash", workload, [batch]).output()
        assert reference.reference(batch).error(output) < 1e-2


def test_peers_say_why_they_do_not_run():
    flex, tvm_tir = peers.peer("flex", "cuda"), peers.peer("tvm-tir", "cuda")
    with pytest.raises(peers.Skipped, match=r"lengths differ|triton is not installed"):
        flex.variants(TINY[0])
    with pytest.raises(peers.Skipped, match='layout "HND" only'):
        tvm_tir.variants(TINY[2])
    with pytest.raises(peers.Skipped, match="not loaded"):
        tvm_tir.variants(TINY[0])
    with pytest.raises(peers.Skipped, match="flashinfer is not installed"):
        peers.peer("flashinfer", "cuda").variants(TINY[0])


def test_tvms_kernels_compile_for_cuda():
    from tvm_infer.bench.peers_tvm import compile_kernel

    for name in ("decode h32/8 b1 kv512", "prefill 1x1024"):
        assert compile_kernel(next(w for w in suites.H200 if w.name == name)) is not None


def test_the_fastest_variant_is_quoted():
    class Two:
        def variants(self, workload):
            return ("slow", "fast", "broken", "wrong")

        def prepare(self, variant, workload, batches):
            if variant == "broken":
                raise ValueError("no\ntraceback")
            return peers.Prepared([variant], lambda: variant, plan=lambda: None, note=variant)

    row = peers.measure_peer(
        Two(),
        TINY[0],
        [None],
        error_of=lambda out: math.inf if out == "wrong" else 0.0,
        tolerance=1e-3,
        time=lambda runs: Timing({"slow": 8.0, "fast": 4.0}[runs[0]], 1.0, 9.0, 15),
        ours_us=2.0,
    )
    assert (row["us"], row["variant"], row["speedup"], row["note"]) == (4.0, "fast", 2.0, "fast")
    assert row["variants"]["broken"] == {"skipped": "failed: ValueError: no"} and row["plan_us"] >= 0
    assert "wrong result" in row["variants"]["wrong"]["skipped"]


def test_the_cuda_side_imports_without_tvm():
    """A GPU machine may have tvm-ffi and torch alone; matplotlib and peers are loaded when they are asked for."""
    code = (
        "import sys; sys.modules['tvm'] = None\n"
        "import tvm_infer.cli, tvm_infer.bench.attention as a, tvm_infer.bench.peers as p\n"
        "from tvm_infer.bench import suites\n"
        "[p.peer(n, 'cuda') for n in p.known('cuda')]\n"
        "print([m for m in ('matplotlib', 'flashinfer', 'tvm.runtime') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class HostProducts(HostDevice):
    def matmul_library(self):
        tvm_infer.set_blas()
        return "a BLAS of the host"


@pytest.fixture
def few_products(monkeypatch):
    monkeypatch.setattr(matmul_cuda, "SHAPES", ((24, 40), (16, 300)))
    monkeypatch.setattr(matmul_cuda, "ROWS", (3, 70))
    monkeypatch.setattr(matmul_cuda, "_ROTATE_BYTES", 12000)
    return HostProducts()


def test_matrix_products(few_products, capsys, tmp_path):
    path = tmp_path / "out.json"
    results = matmul_cuda.run(["torch"], str(path), dtype="float32", device=few_products)
    assert json.loads(path.read_text()) == results and results["library"] == "a BLAS of the host"
    assert [(row["m"], row["k"], row["n"]) for row in results["rows"]] == [
        (3, 24, 40),
        (70, 24, 40),
        (3, 16, 300),
        (70, 16, 300),
    ]
    row = results["rows"][1]
    assert row["tflop_per_s"] == pytest.approx(2 * 70 * 24 * 40 / US / 1e6)
    assert row["gb_per_s"] == pytest.approx(4 * (24 * 40 + 70 * 24 + 70 * 40) / US / 1e3)
    assert row["tvm_infer"]["us"] == row["torch"]["us"] == US and row["tvm_infer"]["relative_error"] < 1e-5
    assert set(few_products.launched) == {8}  # 4 weights of 3840 bytes, 1 of 19200: at least 8 launches
    text = capsys.readouterr().out
    assert "torch takes" in text and "1.00 x" in text and matmul_cuda.failures(results) == []


def test_a_wrong_product_has_no_figure(few_products, monkeypatch, capsys):
    def wrong(a, weight, out):
        return lambda: torch.mm(a, weight.t(), out=out).mul_(1.001)

    monkeypatch.setitem(matmul_cuda._LAUNCHERS, "tvm_infer", wrong)
    results = matmul_cuda.run(["torch"], dtype="float32", device=few_products)
    assert len(matmul_cuda.failures(results)) == 4
    row = results["rows"][0]
    assert "relative error 1.00e-03 (allowed 1e-05)" in row["tvm_infer"]["error"] and "gb_per_s" not in row
    assert "tvm_infer, [3, 24] x [40, 24]^T: WrongResult" in capsys.readouterr().out


def test_a_peer_that_fails_is_told(few_products, monkeypatch):
    def fails(*shape):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(matmul_cuda.matmul_tvm, "kernel", fails)
    results = matmul_cuda.run(["tvm"], dtype="float32", device=few_products)
    assert all(
        row["tvm"] == {"error": "RuntimeError: no compiler"} and "us" in row["tvm_infer"] for row in results["rows"]
    )


def test_unknown_peers_of_products(few_products):
    with pytest.raises(errors.ArgumentError, match=r"\['mkl'\]; on cuda known peers are torch, tvm"):
        matmul_cuda.run(peers=["mkl"], device=few_products)


@pytest.mark.parametrize("m", [1, 4, 64])
def test_tvms_own_products_are_scheduled_for_a_gpu(m):
    """By the rule that is meant, not by the fallback, which leaves each sum to one thread of a flat block."""
    mod, _ = matmul_cuda.matmul_tvm.scheduled(m, 512, 1024, "bfloat16")
    functions = [function.script() for function in mod.functions.values()]
    assert all("blockIdx" in text and "threadIdx.y" in text for text in functions)

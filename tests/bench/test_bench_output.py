"""What `bench attention` prints, writes and draws, and how it ends, from a result made here."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

from tvm_infer import errors
from tvm_infer.bench import attention, markdown, plot, report, rows
from tvm_infer.cli import main


def row(name, us, bound="read", **more):
    return {
        "workload": name,
        "dtype": "bfloat16",
        "us": us,
        "p10_us": us,
        "p90_us": us,
        "gb_per_s": 3000.0,
        "tflop_per_s": 500.0,
        "bound": bound,
        "ceiling_us": 0.8 * us,
        "of_ceiling": 0.8,
        "relative_error": 2e-3,
        "predicted_us": us,
        "plan_us": 9.5,
        "upload_us": 3.0,
        "peers": {
            "torch": {"us": 2 * us, "speedup": 2.0, "variant": "flash"},
            "flex": {"skipped": "lengths differ"},
            "flashinfer": {"skipped": "flashinfer is not installed"},
        },
        **more,
    }


def results():
    return {
        "schema": 2,
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.11.0", "flashinfer-python": None},
        "device": "cuda",
        "device_name": "NVIDIA H200",
        "num_sms": 132,
        "driver": "580.1",
        "cuda": "13.0",
        "ceilings": {"read_gb_per_s": 4550.0, "copy_gb_per_s": 4265.0, "matmul_tflop_per_s": 790.0},
        "rows": [
            row("decode", 12.3),
            row(
                "prefill",
                1234.5,
                "matmul",
                peers={
                    "torch": {"us": 2469.0, "speedup": 2.0, "variant": "cudnn"},
                    "flex": {"us": 3000.0, "speedup": 2.4, "variant": ""},
                    "flashinfer": {"skipped": "flashinfer is not installed"},
                },
            ),
            {"workload": "plan 64 decode", "dtype": "bfloat16", "plan_us": 8.0, "upload_us": 3.0, "predicted_us": 1.0},
            {"workload": "broken", "dtype": "bfloat16", "failed": "WrongResult: relative error [1.0]"},
        ],
    }


PEERS = ["torch", "flex", "flashinfer"]


def table() -> str:
    console = Console(width=220, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_table(console, results(), PEERS)
    return console.export_text()


def test_the_table_has_every_row_and_says_what_is_missing():
    text = table()
    assert "NVIDIA H200 (132 SMs, driver 580.1, CUDA 13.0)" in text and "bf16 matmul 790 TFLOP/s" in text
    for cell in (
        "12.3",
        "3000 GB/s",
        "500 TFLOP/s",
        "80.0% read",
        "24.6 (2.00×) flash",
        "2469 (2.00×) cudnn",
        "plan 64 decode",
    ):
        assert cell in text
    assert "FAILED: broken bfloat16: WrongResult: relative error [1.0]" in text  # no markup is eaten
    assert "not measured: flex, decode bfloat16: lengths differ" in text
    assert "not measured: flashinfer, all rows: flashinfer is not installed" in text


def test_the_plot_shows_rows_and_peers(tmp_path):
    path = tmp_path / "chart.png"
    figure = plot.save(results(), str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["decode", "prefill"]
    assert sorted(bar.get_width() for bar in axes.patches) == pytest.approx([80.0, 80.0])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["ours, bound by reading memory", "ours, bound by matmul", "torch", "flex"]
    torch_points = next(c for c in axes.collections if c.get_label() == "torch").get_offsets()
    assert torch_points[:, 0].tolist() == pytest.approx([40.0, 40.0])  # twice our time: half our share


def test_the_plot_names_the_best_peer_of_each_row(tmp_path):
    (axes,) = plot.save(results(), str(tmp_path / "chart.png")).axes
    assert [text.get_text() for text in axes.texts] == ["µs", "peer / ours", "12.3", "2.00×", "1234", "2.00×"]


def test_the_fastest_of_several_peers():
    peers = {"a": {"us": 8.0, "speedup": 2.0}, "b": {"skipped": "no"}, "c": {"us": 3.0, "speedup": 0.75}}
    assert rows.best_peer(peers) == ("c", peers["c"]) and rows.vs_best_peer(peers) == 0.75
    assert rows.best_peer({"b": {"skipped": "no"}}) is None and rows.vs_best_peer({}) is None


def test_the_markdown_table(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(results()))
    done = subprocess.run(
        [sys.executable, "-m", "tvm_infer.bench.markdown", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == markdown.table(results())
    head, empty, *lines = done.stdout.splitlines()
    assert "torch 2.11.0, 2026-01-02" in head and "copy 4,265 GB/s" in head and empty == ""
    assert len({line.count("|") for line in lines}) == 1
    assert "| decode | 12.3 | 3,000 GB/s | 80% read | 24.6 (torch flash) | 2.00 |" in lines
    assert "| prefill | 1234 | 500 TFLOP/s | 80% matmul | 2469 (torch cudnn) | 2.00 |" in lines
    assert lines[-2:] == ["| plan 64 decode | – | plan 8.0 µs |  |  |  |", "| broken | failed |  |  |  |  |"]


def test_the_plot_of_nothing_and_of_the_cpu(tmp_path):
    cpu = {"device": "cpu", "isa": "avx2", "threads": 2, "rows": [row("decode", 5.0, peers={})]}
    plot.save(cpu, str(tmp_path / "cpu.svg"))
    plot.save({**cpu, "rows": []}, str(tmp_path / "empty.png"))
    with pytest.raises(errors.ArgumentError, match="cannot be written"):
        plot.save(cpu, str(tmp_path / "chart.nonsense"))


def test_no_matplotlib_is_said_before_measuring(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(attention, "_cpu_bench", lambda *_: pytest.fail("measured"))
    with pytest.raises(errors.MissingDependencyError, match=r"tvm_infer\[plot\]"):
        attention.run(plot_path="x.png")


def invoke(*arguments: str):
    return CliRunner().invoke(main, ["bench", "attention", *arguments], catch_exceptions=False)


@pytest.fixture
def canned(monkeypatch):
    """Rows without measuring; returns what was asked for."""
    asked = {"chosen": [], "row": {}}

    def measure(workload):
        asked["chosen"].append(workload)
        return {
            "workload": workload.name,
            "dtype": workload.dtype,
            "peers": {p: {"skipped": "no"} for p in asked["peers"]},
            **asked["row"],
        }

    def bench(peers):
        asked["peers"] = peers
        head = {"device": "cpu", "isa": "avx2", "threads": 2, "method": ""}
        return attention._Bench(head, measure, lambda: None)

    monkeypatch.setattr(attention, "_cpu_bench", bench)
    return asked


def test_json_goes_to_stdout_alone(canned):
    for arguments in (["--json"], ["--json", "-"]):
        result = invoke(*arguments, "--peers", "")
        assert result.exit_code == 0 and canned["peers"] == []
        assert json.loads(result.stdout)["device"] == "cpu" and "attention on cpu" in result.stderr


def test_flags_reach_the_benchmark(canned, tmp_path):
    path = tmp_path / "r.json"
    result = invoke(
        "--kv-lens", "2x64", "--heads", "4/2", "--dtype", "float16", "--dtype", "bfloat16", "--json", str(path)
    )
    assert result.exit_code == 0 and len(json.loads(path.read_text())["rows"]) == 2
    assert [(w.dtype, w.kv_lens, w.num_qo_heads) for w in canned["chosen"]] == [
        ("float16", (64, 64), 4),
        ("bfloat16", (64, 64), 4),
    ]
    assert canned["peers"] == ["torch", "tvm-tir"]


def test_a_failed_row_makes_the_exit_code_1(canned):
    canned["row"] = {"failed": "WrongResult: no"}
    result = invoke("--peers", "", "--kv-lens", "9", "--dtype", "float32")
    assert result.exit_code == 1 and "1 of 1 rows failed" in result.stderr
    assert "FAILED: 1x1@9 h32/8 d128 page16 HND float32: WrongResult: no" in result.stdout


def test_a_run_that_is_cut_off_leaves_its_rows(canned, tmp_path, monkeypatch):
    path, real = tmp_path / "r.json", attention._row

    def interrupted(bench, workload):
        if len(canned["chosen"]) == 2:
            raise KeyboardInterrupt
        return real(bench, workload)

    monkeypatch.setattr(attention, "_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attention.run(peers=[], json_path=str(path))
    assert len(json.loads(path.read_text())["rows"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-lens", "64*2"], "`--kv-lens`"),
        (["--page-size", "16"], "`--page-size` is given without"),
        (["--kv-lens", "64", "--suite", "cpu"], "`suite` is given together"),
        (["--device", "cpu", "--suite", "h200-quick"], "`suite` is 'h200-quick'"),
        (["--device", "cuda", "--suite", "cpu"], "`suite` is 'cpu'"),
        (["--kv-lens", "64", "--workload", "x"], "`workload` is given together"),
    ],
)
def test_bad_flags_are_one_line_and_exit_1(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_suite_implies_the_device():
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        pytest.skip("there is a CUDA device")
    for arguments in (["--suite", "h200"], ["--device", "cuda"], ["--device", "cuda", "--kv-lens", "64"]):
        result = invoke(*arguments)
        assert result.exit_code == 1 and '`device` is "cuda"' in result.stderr

"""The command line: help, doctor, errors as one line."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner

from tvm_infer import __version__, doctor, env
from tvm_infer.cli import main
from tvm_infer.jit import nvcc


def invoke(*arguments: str):
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    "command", [[], ["doctor"], ["bench"], ["bench", "plan"], ["bench", "attention"], ["bench", "matmul"], ["build"]]
)
def test_help(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0 and "Usage:" in result.output


def test_version():
    assert invoke("--version").output.strip().endswith(__version__)


def test_doctor_says_why_an_executor_is_not_usable(monkeypatch):
    monkeypatch.setattr(doctor, "gpus", lambda: ("no driver", []))
    result = invoke("doctor", "--json")
    data = json.loads(result.output)
    by_name = {e["name"]: e for e in data["executors"]}
    assert by_name["cpu"]["usable"] and "threads" in by_name["cpu"]["detail"]
    assert not by_name["cuda sm_90a"]["usable"] and by_name["cuda sm_90a"]["detail"] == "no driver"
    assert data["packages"]["apache-tvm"].startswith("0.27.")
    assert data["tvm"]["cuBLAS"] == "no"  # the wheel ships none
    assert set(data["settings"]) == {s.name for s in env.SETTINGS}


def test_doctor_says_what_compiler_there_is(monkeypatch):
    assert ", by " in doctor.report()["C++ compiler"]
    monkeypatch.setenv("TVM_INFER_CXX", "/no/such/c++")
    described = doctor.report()["C++ compiler"]
    assert described.startswith("not usable") and "/no/such/c++" in described


def test_doctor_prints_what_stands_in_brackets(monkeypatch):
    """The name of an extra is no markup."""
    monkeypatch.setattr(doctor, "cublas", lambda: "not found: pip install 'tvm_infer[cuda]'")
    assert "tvm_infer[cuda]" in invoke("doctor").output.replace("\n", "")


def test_doctor_prints_tables():
    output = invoke("doctor").output
    for word in ("apache-tvm-ffi", "nvcc", "cuBLASLt", "cache folder", "executors", "TVM_INFER_NUM_THREADS"):
        assert word in output


def test_doctor_without_a_driver(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(doctor.ctypes, "CDLL", no_library)
    assert doctor.gpus() == ("no driver (libcuda.so.1 not found)", [])


def test_doctor_with_a_driver_that_fails(monkeypatch):
    class Cuda:
        def cuInit(self, flags):
            return 100

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: Cuda())
    message, devices = doctor.gpus()
    assert "error 100" in message and devices == []
    assert next(e for e in doctor.executors() if e.name != "cpu").detail == message


def test_nvcc_absent(monkeypatch):
    monkeypatch.setattr(nvcc.shutil, "which", lambda *a, **k: None)
    monkeypatch.setattr(nvcc, "_packaged", lambda: None)
    assert doctor.nvcc().startswith("not usable: nvcc is needed")
    assert "pip install 'tvm_infer[cuda]'" in doctor.nvcc()


def test_a_gpu_of_another_architecture_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "gpus", lambda: ("CUDA 13.0", [doctor.Gpu("Some A100", (8, 0), 80.0)]))
    executor = next(e for e in doctor.executors() if e.name != "cpu")
    assert not executor.usable and "9.0" in executor.detail and "Some A100 (sm_80)" in executor.detail


def test_a_hopper_is_usable(monkeypatch):
    from tvm_infer import _ffi

    func = _ffi.func
    monkeypatch.setattr(doctor, "gpus", lambda: ("CUDA 13.0", [doctor.Gpu("NVIDIA H200", (9, 0), 140.0)]))
    monkeypatch.setattr(
        _ffi, "func", lambda name: (lambda i: "sm_90a 132 NVIDIA H200") if name == "cuda_info" else func(name)
    )
    executor = next(e for e in doctor.executors() if e.name != "cpu")
    assert executor.usable and executor.detail.startswith("NVIDIA H200, 132 SMs, CUDA 13.0")


def test_cache_dir_follows_the_setting(monkeypatch, tmp_path):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path / "x"))
    assert env.cache_dir() == tmp_path / "x"
    assert f"{tmp_path / 'x'} (not made yet)" in json.loads(invoke("doctor", "--json").output)["cache folder"]


def test_errors_are_one_line_and_exit_1():
    result = invoke("bench", "attention", "--suite", "nonsense")
    assert result.exit_code == 1
    assert result.stderr.strip().startswith("ArgumentError: argument `suite` is 'nonsense'")
    assert "Traceback" not in result.output + result.stderr


def test_unknown_peer_and_workload_are_named():
    assert "'triton'" in invoke("bench", "attention", "--peers", "triton").stderr
    assert "'decode b9'" in invoke("bench", "attention", "--workload", "decode b9").stderr


def test_bench_matmul_refuses_types_that_the_cpu_has_not():
    result = CliRunner().invoke(main, ["bench", "matmul", "--dtype", "bfloat16"])
    assert result.exit_code == 2 and "--dtype bfloat16 needs --device cuda" in result.output


def test_bench_matmul_on_cuda_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["bench", "matmul", "--device", "cuda"])
    assert result.exit_code == 1 and "torch is not installed" in result.output

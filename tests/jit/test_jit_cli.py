"""`tvm-infer build`."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from tvm_infer.cli import main
from tvm_infer.doctor import cached_kernels
from tvm_infer.jit import all_names

SMALL = ("merge_states_bf16", "merge_states_fp16")


def invoke(*arguments: str):
    return CliRunner(env={"COLUMNS": "160"}).invoke(main, ["build", *arguments], catch_exceptions=False)


def test_list():
    assert invoke("--list").output.split() == list(all_names())


@pytest.mark.needs_nvcc
def test_build_prints_a_table_and_fills_a_folder(own_cache, tmp_path):
    out = tmp_path / "cubins"
    arguments = [part for name in SMALL for part in ("--spec", name)]
    first = invoke(*arguments, "--out", str(out), "--jobs", "2")
    assert first.exit_code == 0
    for name in SMALL:
        row = next(line for line in first.stdout.splitlines() if name in line)
        state, seconds, registers, spilled, _ = re.split(r"\s*│\s*", row)[2:7]
        assert state == "built" and float(seconds) > 0 and 16 <= int(registers) <= 255 and spilled == "0"
        assert (out / f"{name}.sm_90a.cubin").read_bytes().startswith(b"\x7fELF")
        assert f"tvm_infer: compiling {name} for sm_90a" in first.stderr
    second = invoke(*arguments)
    assert second.stdout.count("cached") == 2 and "compiling" not in second.stderr
    assert all(name in cached_kernels() for name in SMALL)


def test_an_unknown_kernel_is_one_line_with_all_names():
    result = invoke("--spec", "attention_bf16_h128_p17")
    assert result.exit_code == 1 and result.stderr.startswith("ArgumentError: argument `name`")
    assert "attention_bf16_h128_p16" in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [(), ("--all", "--spec", SMALL[0])])
def test_which_kernels_must_be_said(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2 and "--list" in result.stderr


@pytest.mark.needs_nvcc
def test_unknown_architecture():
    result = invoke("--spec", SMALL[0], "--arch", "sm_80")
    assert result.exit_code == 1 and "kernels are compiled for sm_90a" in result.stderr

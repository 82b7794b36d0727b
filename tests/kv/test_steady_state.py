"""The bookkeeping core on its own: it links without tvm-ffi, and decoding allocates nothing."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted((REPO / "cuda_src" / "tvm_infer" / "kv").glob("*.cc"))


def test_steady_state_allocates_nothing(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = tmp_path / "steady_state"
    main = pathlib.Path(__file__).with_name("steady_state.cc")
    command = [compiler, "-std=c++20", "-O2", "-I", str(REPO / "cuda_src"), "-o", str(program)]
    subprocess.run([*command, str(main), *map(str, SOURCES)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    allocations, _, total = map(int, done.stdout.split())
    assert allocations == 0, f"{allocations} allocations in two rounds of 64 sequences and 500 steps"
    assert total > 0

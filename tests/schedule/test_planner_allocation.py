"""The planner allocates nothing once it has seen its largest batch: counted in a C++ program around malloc."""

from __future__ import annotations

import pathlib
import platform
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts through glibc's malloc")
def test_no_allocation_in_the_steady_state(tmp_path):
    program = tmp_path / "no_allocation"
    sources = sorted((ROOT / "cuda_src/tvm_infer/schedule").glob("*.cc"))
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "cuda_src"]
    main = pathlib.Path(__file__).with_name("no_allocation.cc")
    subprocess.run(["g++", *flags, "-o", program, main, *sources], check=True)
    growing, steady = map(int, subprocess.run([program], capture_output=True, text=True, check=True).stdout.split())
    assert growing > 10  # the count counts
    assert steady == 0

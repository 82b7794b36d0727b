"""The bookkeeping core on its own: it links without tvm-ffi, and decoding allocates nothing."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted((REPO / "cuda_src" / "tvm_infer" / "kv").glob("*.cc"))


def output_of(name, tmp_path, *arguments):
    """Build and run the program `name`.cc, linked with the core alone."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = tmp_path / name
    main = pathlib.Path(__file__).with_name(f"{name}.cc")
    command = [compiler, "-std=c++20", "-O2", "-I", str(REPO / "cuda_src"), "-o", str(program)]
    subprocess.run([*command, str(main), *map(str, SOURCES)], check=True)
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [[], ["window"], ["prefix"]])
def test_steady_state_allocates_nothing(tmp_path, arguments):
    allocations, _, total = map(int, output_of("steady_state", tmp_path, *arguments).split())
    assert allocations == 0, f"{allocations} allocations in two rounds of 64 sequences and 500 steps"
    assert total > 0


def test_the_block_of_a_step(tmp_path):
    """Every array in its place, at limits from 1 to 2^33, and read back."""
    assert output_of("step_layout", tmp_path) == "ok\n"


def test_windows_with_sinks(tmp_path):
    """Exactly the pages that are seen, at page sizes 1 to 16, windows 0 to 200 and up to 33 sinks."""
    words = output_of("windows", tmp_path).split()
    assert words[0] == "ok" and int(words[1]) > 10000

"""The append and merge kernels' own source, run on the host a warp at a time (emulated/warp.h), against the definition."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
EMULATED = pathlib.Path(__file__).resolve().parent / "emulated"


def run(name: str, tmp_path: pathlib.Path, include: pathlib.Path = CUDA_SRC) -> subprocess.CompletedProcess[str]:
    """Compiles and runs emulated/<name>.cc against kernels in `include`."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = tmp_path / name
    flags = ["-std=c++20", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
    flags += ["-include", str(EMULATED / "warp.h")]
    # the stand-ins for what only a GPU can do come first
    command = [
        compiler,
        *flags,
        "-I",
        str(EMULATED),
        "-I",
        str(include),
        str(EMULATED / f"{name}.cc"),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["append", "merge_states"])
def test_kernel_does_what_its_definition_says(name, tmp_path):
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 60


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("append", "entries[i] <= token", "entries[i] < token"),
        ("append", "position % p.page_size", "(position + 1) % p.page_size"),
        ("append", "check.Stops(-1)", "false"),
        ("merge_states", "max == kNegInf ? 0.f : max", "max"),
        ("merge_states", "weights.a == 0.f ? 0.f : ", ""),
        ("merge_states", "__syncwarp();", ""),
    ],
)
def test_a_wrong_kernel_is_noticed(name, right, wrong, tmp_path):
    include = tmp_path / "include"
    shutil.copytree(CUDA_SRC, include, ignore=shutil.ignore_patterns("*.cc"))
    kernel = include / "tvm_infer" / "kernels" / f"{name}.cuh"
    assert right in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(right, wrong))
    assert run(name, tmp_path, include).returncode != 0

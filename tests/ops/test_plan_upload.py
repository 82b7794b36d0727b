"""Plans on their way to a device (cuda/staging.cc), over a driver that copies as late as it may."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
TEST = pathlib.Path(__file__).resolve().parent / "emulated" / "staging.cc"
SLOTS = 8  # kStagingSlots


def run(staging: pathlib.Path, tmp_path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = tmp_path / "staging"
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += ["-I", str(CUDA_SRC), str(TEST), str(staging), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=120)


def test_no_upload_overwrites_a_copy_under_way(tmp_path):
    done = run(CUDA_SRC / "tvm_infer" / "cuda" / "staging.cc", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == SLOTS


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        (
            "if (is_in_flight_) CheckDriver(",
            "if (false) CheckDriver(",
            "freed under a copy|overwritten under way|use-after-free",
        ),
        ("if (code != kSuccess) driver.cuStreamSynchronize(stream);", "", "nothing guards"),
    ],
    ids=["no wait", "no guard"],
)
def test_a_wrong_ring_is_noticed(right, wrong, what, tmp_path):
    import re

    source = (CUDA_SRC / "tvm_infer" / "cuda" / "staging.cc").read_text()
    assert right in source
    staging = tmp_path / "staging.cc"
    staging.write_text(source.replace(right, wrong))
    done = run(staging, tmp_path)
    assert done.returncode != 0 and re.search(what, done.stderr), done.stderr

"""What a machine without a GPU can hold against the CUDA kernels: they compile, fast, and fit."""

from __future__ import annotations

import pathlib
import re
import resource
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from build_cubins import build

# head_dim -> bytes of values kept across works that may lie in local memory (docs/kernels.md, "Limits today")
SPILLED = {64: 0, 128: 48}


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
@pytest.mark.parametrize("name", ["bf16_128_16", "bf16_64_8", "fp16_128_64"])
def test_kernel_compiles_fast_and_does_not_spill(name, tmp_path):
    before = child_seconds()
    result = build(name, tmp_path, "nvcc")
    assert child_seconds() - before < 5
    assert result["spilled"] <= SPILLED[int(name.split("_")[1])]
    # 384 threads and 65536 registers: at most 168 at entry, or setmaxnreg has nothing to hand around
    assert result["registers"] == 168
    assert (tmp_path / f"{name}.cubin").stat().st_size > 0
    assert b"attention_info" in (tmp_path / f"{name}.cubin").read_bytes()


def test_plan_fields_that_the_harness_reads_are_where_it_reads_them():
    """run_cases.py runs where the library is not installed and reads a plan's words by number."""
    from tvm_infer.schedule.plan import HEADER

    source = (pathlib.Path(__file__).parent / "run_cases.py").read_text()
    words = {name: HEADER.fields[name][1] // 4 for name in ("num_ctas", "num_works", "num_merges", "num_partial_rows")}
    read = {int(n) for n in re.findall(r"plan\[(\d+)\]", source)}
    assert read == set(words.values())
    assert f"header[{HEADER.fields['makespan'][1]}:{HEADER.fields['makespan'][1] + 8}]" in source

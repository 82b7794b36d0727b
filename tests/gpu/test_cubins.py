"""What a machine without a GPU can hold against the CUDA kernels: they compile, fast, and fit."""

from __future__ import annotations

import pathlib
import re
import resource
import shutil
import struct
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from build_cubins import NAMES, build
from cases import bench_cases, check_cases

MAX_SHARED = 232448  # bytes of dynamic shared memory of a CTA: 227 KB
INFO = struct.Struct("4i")  # cuda::KernelInfo: abi, threads, shared_bytes, ctas_per_sm


def child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_case_has_a_kernel():
    assert {c.kernel for c in check_cases()} | {c.kernel for c, _ in bench_cases()} <= set(NAMES)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
@pytest.mark.parametrize("name", NAMES)
def test_kernel_compiles_fast_fits_and_does_not_spill(name, tmp_path):
    before = child_seconds()
    result = build(name, tmp_path, "nvcc")
    assert child_seconds() - before < 5
    assert result["spilled"] == 0
    # 384 threads and 65536 registers: at most 168 at entry, or setmaxnreg has nothing to hand around
    assert result["registers"] == 168
    cubin = (tmp_path / f"{name}.cubin").read_bytes()
    assert f"{name}_info".encode() in cubin
    at = cubin.find(
        INFO.pack(3, 384, 0, 0)[:8]
    )  # NOTE: abi and threads; then come the bytes of shared memory and 1 CTA
    _, _, shared_bytes, ctas_per_sm = INFO.unpack_from(cubin, at)
    assert at > 0
    assert 100_000 < shared_bytes <= MAX_SHARED
    assert ctas_per_sm == 1


def test_plan_fields_that_the_harness_reads_are_where_it_reads_them():
    """run_cases.py runs where the library is not installed and reads a plan's words by number."""
    from tvm_infer.schedule.plan import HEADER

    source = (pathlib.Path(__file__).parent / "run_cases.py").read_text()
    words = {name: HEADER.fields[name][1] // 4 for name in ("num_ctas", "num_works", "num_merges", "num_partial_rows")}
    read = {int(n) for n in re.findall(r"plan\[(\d+)\]", source)}
    assert read == set(words.values())
    assert f"header[{HEADER.fields['makespan'][1]}:{HEADER.fields['makespan'][1] + 8}]" in source


def test_plan_words_that_the_refusals_change_are_where_they_change_them():
    import refusals

    from tvm_infer.schedule.plan import HEADER

    words = {"magic": refusals.MAGIC, "version": refusals.VERSION, "capture_key": refusals.CAPTURE_KEY}
    words |= {"num_ctas": refusals.NUM_CTAS, "num_tokens": refusals.NUM_TOKENS, "tickets_offset": refusals.TICKETS}
    assert words == {name: HEADER.fields[name][1] // 4 for name in words}

"""The append, rope, merge, move, page selection and gemv kernels compile for sm_90a, fast, without spills, and say what they are."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
FLAGS = (
    "-cubin",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-std=c++20",
    "-O3",
    "-Xptxas",
    "-v",
    "--Werror",
    "all-warnings",
)
# name -> (header, what generated source expands, registers that its CTAs per SM leave a thread)
KERNELS = {
    "move_tokens": ("move_tokens", "TVM_INFER_MOVE_TOKENS(move_tokens);", 64),
    "append_b16": ("append", "TVM_INFER_APPEND(append_b16, uint16_t);", 80),
    "append_b16_h192_v128": ("append", "TVM_INFER_APPEND_VO(append_b16_h192_v128, 192, 128);", 80),
    "rope_append_bf16": ("rope_append", "TVM_INFER_ROPE_APPEND(rope_append_bf16, Bf16);", 128),
    "rope_append_fp16": ("rope_append", "TVM_INFER_ROPE_APPEND(rope_append_fp16, Fp16);", 128),
    **{
        f"append_{element}_{kv}": ("append", f"TVM_INFER_APPEND_FLOAT8(append_{element}_{kv}, {types});", 128)
        for element, kv, types in (("bf16", "e4m3", "Bf16, E4m3"), ("fp16", "e5m2", "Fp16, E5m2"))
    },
    **{
        f"rope_append_{element}_{kv}": (
            "rope_append",
            f"TVM_INFER_ROPE_APPEND_FLOAT8(rope_append_{element}_{kv}, {types});",
            128,
        )
        for element, kv, types in (("bf16", "e5m2", "Bf16, E5m2"), ("fp16", "e4m3", "Fp16, E4m3"))
    },
    "page_bounds_bf16": ("page_bounds", "TVM_INFER_PAGE_BOUNDS(page_bounds_bf16, Bf16);", 64),
    "page_bounds_fp16_e4m3": ("page_bounds", "TVM_INFER_PAGE_BOUNDS_FLOAT8(page_bounds_fp16_e4m3, Fp16, E4m3);", 64),
    "page_scores_bf16": ("page_scores", "TVM_INFER_PAGE_SCORES(page_scores_bf16, Bf16);", 128),
    "page_scores_fp16": ("page_scores", "TVM_INFER_PAGE_SCORES(page_scores_fp16, Fp16);", 128),
    "select_pages": ("select_pages", "TVM_INFER_SELECT_PAGES(select_pages);", 64),
    # one CTA of 288 threads, but a thread's registers are counted in eights: 65536 / 288 is 227
    "gemv_bf16": ("gemv", "TVM_INFER_GEMV(gemv_bf16, Bf16);", 224),
    "gemv_fp16": ("gemv", "TVM_INFER_GEMV(gemv_fp16, Fp16);", 224),
    "merge_states_bf16": ("merge_states", "TVM_INFER_MERGE_STATES(merge_states_bf16, Bf16);", 40),
    "merge_states_fp16": ("merge_states", "TVM_INFER_MERGE_STATES(merge_states_fp16, Fp16);", 40),
    "merge_states_fp32": ("merge_states", "TVM_INFER_MERGE_STATES(merge_states_fp32, Fp32);", 40),
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernel_compiles_and_does_not_spill(name, tmp_path):
    header, expansion, max_registers = KERNELS[name]
    source, cubin = tmp_path / f"{name}.cu", tmp_path / f"{name}.cubin"
    source.write_text(f'#include "tvm_infer/kernels/{header}.cuh"\n{expansion}\n')
    log = subprocess.run(
        ["nvcc", *FLAGS, "-I", str(CUDA_SRC), str(source), "-o", str(cubin)], capture_output=True, text=True
    )
    assert log.returncode == 0, log.stderr
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", log.stderr) == [("0", "0")]
    assert int(re.findall(r"Used (\d+) registers", log.stderr)[0]) <= max_registers
    symbols = cubin.read_bytes()
    assert f"\0{name}\0".encode() in symbols and f"\0{name}_info\0".encode() in symbols

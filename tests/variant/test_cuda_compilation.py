"""Generated code compiles for CUDA, in one file for all, with a kernel that calls every function."""

from __future__ import annotations

import subprocess

import pytest

from tvm_infer import variant
from tvm_infer.jit import headers, nvcc
from tvm_infer.variant.cache_masks import CACHE_MASKS

_KERNEL = """
template <typename V>
__device__ float All(const tvm_infer::variant::Args& p, const tvm_infer::variant::Row& row, int kv_pos, float x) {
  if constexpr (V::kHasLogits) x = V::Logits(p, row, kv_pos, x, 0.5f);
  if constexpr (V::kHasMask) x = V::Mask(p, row, kv_pos) ? x : 0.f;
  if constexpr (V::kHasOutput) x = V::Output(p, row, 1.f, x);
  return x;
}
template <typename V>
__global__ void Kernel(tvm_infer::variant::Args p, tvm_infer::variant::Row row, float* x) {
  x[threadIdx.x] = All<V>(p, row, threadIdx.x, x[threadIdx.x]);
}
"""


@pytest.mark.needs_nvcc
def test_all_standard_variants_and_functions(tmp_path):
    every = variant.Variant(
        "every",
        logits=lambda value, q_pos: sum(
            (
                f(value)
                for f in (
                    variant.tanh,
                    variant.exp,
                    variant.exp2,
                    variant.log,
                    variant.log2,
                    variant.sqrt,
                    variant.sigmoid,
                    variant.abs,
                    variant.cos,
                    variant.sin,
                )
            ),
            value / 3 + variant.to_float(variant.to_int(value) // (q_pos - 2) % 5 << 2) + variant.abs(q_pos),
        ),
        mask=lambda q_pos: variant.minimum(q_pos * 0.5, float("inf")) > q_pos + -(2**31),
    )
    structs = {v.digest: v.source() for v in [*variant.STANDARD.values(), *CACHE_MASKS.values(), every]}
    instances = "".join(
        f"template __global__ void Kernel<variant_{digest}>(tvm_infer::variant::Args, tvm_infer::variant::Row, float*);\n"
        for digest in structs
    )
    source = tmp_path / "all.cu"
    source.write_text('#include "tvm_infer/variant/variant.h"\n' + "".join(structs.values()) + _KERNEL + instances)
    command = [
        nvcc.find().path,
        "-std=c++17",
        "-arch=sm_90a",
        "-cubin",
        "-Werror=all-warnings",
        "-allow-unsupported-compiler",
        f"-I{headers.include_dir()}",
        str(source),
        "-o",
        str(tmp_path / "all.cubin"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    cubin = (tmp_path / "all.cubin").read_bytes()
    assert all(f"variant_{digest}".encode() in cubin for digest in structs)

"""Compiles the sm_90a attention kernels that the cases need, one cubin each, and says what the compiler said.

usage: python build_cubins.py OUT_DIR [--nvcc nvcc] [--only bf16_h128_p16]
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import time

CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
INCLUDE = '#include "tvm_infer/kernels/attention_sm90.cuh"\n'
NAMES = [
    f"attention_{dtype}_h{dim}_{keys}"
    for dtype in ("bf16", "fp16")
    for dim in (64, 128)
    for keys in ("p1", "p8", "p16", "p32", "p64", "ragged")
]
FLAGS = ("-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v")


def source_of(name: str) -> str:
    """CUDA source of kernel `name` (attention_<dtype>_h<head_dim>_p<page_size> or ..._ragged)."""
    _, dtype, dim, keys = name.split("_")
    arguments = f"{name}, {dtype.capitalize()}, {dim[1:]}"
    if keys == "ragged":
        return f"{INCLUDE}TVM_INFER_ATTENTION_SM90_RAGGED({arguments});\n"
    return f"{INCLUDE}TVM_INFER_ATTENTION_SM90({arguments}, {keys[1:]});\n"


def build(name: str, out: pathlib.Path, nvcc: str) -> dict[str, float]:
    """Compiles kernel `name`; returns registers, spilled bytes and seconds."""
    source = out / f"{name}.cu"
    source.write_text(source_of(name))
    start = time.perf_counter()
    command = [nvcc, *FLAGS, "-I", str(CUDA_SRC), str(source), "-o", str(out / f"{name}.cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    seconds = time.perf_counter() - start
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    return {"registers": int(re.findall(r"Used (\d+) registers", log)[0]), "spilled": spilled, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if args.only in name:
            r = build(name, args.out, args.nvcc)
            print(
                f"{name:26} {r['registers']:4} registers {r['spilled']:4} bytes spilled {r['seconds']:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

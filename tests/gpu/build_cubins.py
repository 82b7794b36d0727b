"""Compiles the sm_90a attention kernels that the cases need, one cubin each, and says what the compiler said.

usage: python build_cubins.py OUT_DIR [--nvcc nvcc] [--only bf16_128_16]
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import time

from cases import bench_cases, check_cases

CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
SOURCE = (
    '#include "tvm_infer/kernels/attention_sm90.cuh"\nTVM_INFER_ATTENTION_SM90(attention, {element}, {dim}, {page});\n'
)
FLAGS = ("-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++20", "-O3", "-lineinfo", "-Xptxas", "-v")


def build(name: str, out: pathlib.Path, nvcc: str) -> dict[str, float]:
    """Compiles kernel `name` (<dtype>_<head_dim>_<page_size>); returns registers, spilled bytes and seconds."""
    dtype, dim, page = name.split("_")
    source = out / f"{name}.cu"
    source.write_text(SOURCE.format(element={"bf16": "Bf16", "fp16": "Fp16"}[dtype], dim=dim, page=page))
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
    names = sorted({c.kernel for c in check_cases()} | {c.kernel for c, _ in bench_cases()})
    for name in names:
        if args.only in name:
            r = build(name, args.out, args.nvcc)
            print(
                f"{name:14} {r['registers']:4} registers {r['spilled']:4} bytes spilled {r['seconds']:5.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

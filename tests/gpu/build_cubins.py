"""Compiles the attention kernels with line numbers into a folder, for run_cases.py and for profilers, and says what they take.

usage: python build_cubins.py OUT_DIR [--nvcc nvcc] [--only bf16_h128_p16]
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tvm_infer import jit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--nvcc", help="default: as tvm-infer build finds it")
    parser.add_argument("--only", default="", help="kernels with this in their names")
    args = parser.parse_args()
    os.environ["TVM_INFER_LINEINFO"] = "1"
    if args.nvcc:
        os.environ["TVM_INFER_NVCC"] = args.nvcc
    args.out.mkdir(parents=True, exist_ok=True)

    def done(built: jit.Built) -> None:
        shutil.copyfile(built.path, args.out / f"{built.name}.cubin")
        r = built.resources
        print(
            f"{built.name:26} {r.registers:4} registers {r.spill_bytes:4} bytes spilled {r.seconds:5.1f} s", flush=True
        )

    names = [name for name in jit.all_names() if name.startswith("attention_") and args.only in name]
    jit.build(names, done=done)


if __name__ == "__main__":
    main()

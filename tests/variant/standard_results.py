"""Numbers that the CPU functions of each standard variant give. Run as a script, it stores those of the library, of the instruction set
that TVM_INFER_CPU_ISA names, in the file that is its argument.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import numpy as np
from generated import CpuFunctions, element, logits, output
from test_standard import CASES, HEAD_DIM, KV_LEN, rows

from tvm_infer import _ffi, variant
from tvm_infer.variant import prebuilt

CODE_BYTES = 400  # of machine code, from the start: the vector loop is among them


def needs_code() -> dict[str, variant.Variant]:
    return {name: v for name, v in variant.STANDARD.items() if not v.is_plain}


def results(address_of: Callable[[variant.Variant], int]) -> dict[str, np.ndarray]:
    """Name -> logits and outputs, [KV_LEN] each, and queries and keys, [HEAD_DIM] each, of rows."""
    found = {}
    for name, v in needs_code().items():
        rng = np.random.default_rng(3)
        bound, address = v.bind(**CASES[name][0]), address_of(v)
        found[name] = np.array(
            [
                np.concatenate(
                    [
                        logits(address, bound, at, rng.standard_normal(KV_LEN).astype(np.float32) * 4),
                        output(address, bound, at, 0.5, rng.standard_normal(KV_LEN).astype(np.float32)),
                        element(address, bound, at, rng.standard_normal(HEAD_DIM).astype(np.float32)),
                        element(address, bound, at, rng.standard_normal(HEAD_DIM).astype(np.float32), 7),
                    ]
                )
                for at in rows()
            ]
        )
    return found


def code(address: int) -> np.ndarray:
    """The first bytes of the `logits` function."""
    start = CpuFunctions.from_address(address).logits
    assert start is not None
    return np.frombuffer(ctypes.string_at(start, CODE_BYTES), np.uint8)


def main() -> None:
    isa = _ffi.func("cpu_info")().split()[0]
    np.savez(sys.argv[1], isa=isa, code=code(prebuilt.address(variant.soft_cap)), **results(prebuilt.address))


if __name__ == "__main__":
    main()

"""Types that elements of keys and values have, one row each: cuda_src/tvm_infer/element_type.h is the same table for C++.

A row without executors is known, sized and costed, and refused by its name: there are no kernels for it yet.
"""

from __future__ import annotations

from typing import NamedTuple


class KVDType(NamedTuple):
    """A row. suffix : in kernels' names. bits : of an element. scale : what shares one, "head" (a tensor, or a KV head of it), "group"
    (a run of channels of a token's head) or "" where elements are values. executors : that have kernels which read it."""

    name: str
    suffix: str
    bits: int
    scale: str
    executors: tuple[str, ...]

    @property
    def is_scaled(self) -> bool:
        """Whether value = element * scale."""
        return self.scale != ""


TABLE = (
    KVDType("float32", "fp32", 32, "", ("cpu",)),
    KVDType("float16", "fp16", 16, "", ("cpu", "cuda")),
    KVDType("bfloat16", "bf16", 16, "", ("cpu", "cuda")),
    KVDType("float8_e4m3fn", "e4m3", 8, "head", ("cpu", "cuda")),
    KVDType("float8_e5m2", "e5m2", 8, "head", ("cpu", "cuda")),
    KVDType("int8", "int8", 8, "head", ()),
    KVDType("int4", "int4", 4, "group", ()),
)
BY_NAME = {row.name: row for row in TABLE}
DTYPES = tuple(row.name for row in TABLE if not row.is_scaled)  # of queries, new tokens and outputs, too
SCALED_DTYPES = tuple(row.name for row in TABLE if row.is_scaled and row.executors)
WITHOUT_KERNELS = tuple(row.name for row in TABLE if not row.executors)


def pairs() -> str:
    """Which queries go with which keys and values, for messages."""
    rows = (row for row in TABLE if not row.is_scaled)
    return "; ".join(
        f"{row.name} with {', '.join((row.name, *SCALED_DTYPES))} ({', '.join(row.executors)})" for row in rows
    )

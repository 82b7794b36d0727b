"""Variants written by hand (cpu_variants.cc), compiled and bound as tvm_infer.variant does it; their effect in numpy.

The executor and the packed functions are tested with them, not the package that traces and lowers variants.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import mmap
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

import numpy as np

import tvm_infer
from tvm_infer import errors
from tvm_infer.schedule import Band
from tvm_infer.testing import PagedBatch

LIBRARY = "TVM_INFER_TEST_VARIANTS"  # a process that has compiled the library tells those that it starts


@functools.cache
def library() -> ctypes.CDLL:
    """cpu_variants.cc, compiled once."""
    path = os.environ.get(LIBRARY)
    if path is None:
        path = str(pathlib.Path(tempfile.mkdtemp(prefix="tvm_infer_variants")) / "variants.so")
        source = pathlib.Path(__file__).with_name("cpu_variants.cc")
        include = pathlib.Path(tvm_infer.__file__).parent / "include"
        command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, f"-I{include}", str(source), "-o", path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        os.environ[LIBRARY] = path
    return ctypes.CDLL(path)


def address(digest: str) -> int:
    return ctypes.addressof(ctypes.c_int.in_dll(library(), f"variant_{digest}_cpu"))


class Params:
    """A call's parameters as the numpy functions read them."""

    def __init__(self, scalars: list[float | int], tables: list[Any]) -> None:
        self.scalars, self.tables = scalars, [np.asarray(t) for t in tables]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A variant of cpu_variants.cc. The functions take (params, row, kv_pos, value or nothing) in float64, broadcast."""

    digest: str
    causal: bool = True
    window_left: int = -1
    logits: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    output: Callable[..., Any] | None = None

    @property
    def band(self) -> Band:
        return Band(self.window_left, 0 if self.causal else -1)


def _sigmoid(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _by_key(table: np.ndarray, begins: np.ndarray, row: Any, kv_pos: np.ndarray) -> Any:
    return table[begins[row.batch] + kv_pos]


KINDS = {
    "soft cap": Kind("0" * 16, logits=lambda p, row, kv, x: p.scalars[0] * np.tanh(x / p.scalars[0])),
    "alibi": Kind("0" * 15 + "1", logits=lambda p, row, kv, x: x + p.tables[0][row.qo_head] * (kv - row.q_pos)),
    "kept keys": Kind(
        "0" * 15 + "2",
        causal=False,
        mask=lambda p, row, kv: (_by_key(p.tables[1], p.tables[0], row, kv) != 0)
        & ((row.q_pos - kv) % p.scalars[0] != 1),
    ),
    "bias": Kind(
        "0" * 15 + "3",
        window_left=20,
        logits=lambda p, row, kv, x: x * p.tables[2].astype(np.float64)[row.batch, row.qo_head]
        + _by_key(p.tables[1], p.tables[0], row, kv),
    ),
    "sink": Kind(
        "0" * 15 + "4",
        output=lambda p, row, lse, x: x * _sigmoid(lse - p.tables[0].astype(np.float64)[row.qo_head]),
    ),
    "everything": Kind(
        "0" * 15 + "5",
        causal=False,
        window_left=90,
        logits=lambda p, row, kv, x: p.scalars[0] * np.tanh(x) + 0.01 * (kv - row.q_pos + row.kv_head),
        mask=lambda p, row, kv: ((kv + row.batch + row.qo_head) % p.scalars[1] != 0) & (kv < row.kv_len - 2),
        output=lambda p, row, lse, x: x * _sigmoid(lse) + 0.1 * row.batch + 0.001 * (row.q_len + row.q_pos),
    ),
    "no hook": Kind("0" * 15 + "6", window_left=30),
}
CENSUS = Kind("0" * 15 + "7")
NO_NUMBERS = Kind("0" * 15 + "8", causal=False)


def bits(value: float | int) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else value


class StandIn(types.SimpleNamespace):
    """As tvm_infer.variant.Variant."""

    def source(self) -> str:
        return f"struct variant_{self.digest} {{}};\n"


class Bound(types.SimpleNamespace):
    """As tvm_infer.variant.BoundVariant."""

    @property
    def cuda_struct(self) -> tuple[str, str]:
        return self.variant.digest, self.variant.source()

    def check_shapes(self, num_qo_heads: int, num_requests: int, head_dim: int) -> None:
        """ "alibi" alone has a table for each head here."""
        if self.variant.digest == KINDS["alibi"].digest and self.tables[0].shape[0] != num_qo_heads:
            raise errors.ArgumentError(
                f"{self.tables[0].shape[0]} slopes, {num_qo_heads} heads, {num_requests} requests"
            )


def bind(kind: Kind, scalars: list[float | int] = [], tables: list[Any] = []) -> Bound:  # noqa: B006
    variant = StandIn(digest=kind.digest, is_plain=False)
    return Bound(
        variant=variant,
        scalars=[bits(x) for x in scalars],
        tables=list(tables),
        band=kind.band,
    )


def package(compiled: list[str] | None = None) -> types.ModuleType:
    """What stands for tvm_infer.variant in these tests. `compiled`: takes the digests that were asked for."""
    module: Any = types.ModuleType("tvm_infer.variant")
    module.as_bound = lambda x: x

    def cpu_functions(variant: Any) -> int:
        if compiled is not None:
            compiled.append(variant.digest)
        return address(variant.digest)

    module.cpu_functions = cpu_functions
    return module


def guarded(array: np.ndarray, *, before: bool = False) -> np.ndarray:
    """A copy behind whose last byte (before whose first) memory cannot be read."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    _kept.append(memory)
    whole = np.frombuffer(memory, np.uint8)
    forbidden = 0 if before else size
    libc = ctypes.CDLL(None, use_errno=True)
    start = mmap.PAGESIZE if before else size - array.nbytes
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    assert libc.mprotect(ctypes.c_void_p(whole.ctypes.data + forbidden), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return copy


_kept: list[Any] = []


def parameters(name: str, batch: PagedBatch, *, is_guarded: bool = False) -> tuple[list[float | int], list[Any]]:
    """(scalars, tables) for a batch. Guarded: tables that the key's position indexes end, or begin, where memory does."""
    rng = np.random.default_rng(len(name))
    heads, lengths = batch.q.shape[1], batch.kv_len
    begins = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32)
    total = int(lengths.sum())
    if name == "soft cap":
        return [1.5], []
    if name == "alibi":
        return [], [(2.0 ** -np.arange(1, heads + 1)).astype(np.float32)]
    if name == "kept keys":
        keep = (rng.random(total) < 0.6).astype(np.uint8)
        keep[begins[0] : begins[0] + lengths[0]] = 0  # the first request sees nothing
        # of the others the last key is kept, so that a hook that looks behind it finds no 0 there by chance
        keep[-1] = 1
        return [7], [begins, guarded(keep) if is_guarded else keep]
    if name == "bias":
        by_key = rng.standard_normal(total).astype(np.float32)
        by_head = rng.uniform(0.3, 1, (len(lengths), heads)).astype(np.float16)
        return [], [begins, guarded(by_key, before=True) if is_guarded else by_key, by_head]
    if name == "sink":
        import ml_dtypes

        return [], [rng.uniform(2, 7, heads).astype(ml_dtypes.bfloat16)]
    if name == "everything":
        return [2.5, 4], []
    return [], []


def expected(
    kind: Kind, batch: PagedBatch, scalars: list[float | int], tables: list[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(o, lse) in float64."""
    p = Params(scalars, tables)
    o, lse = np.zeros(batch.q.shape), np.full(batch.q.shape[:2], -np.inf)
    for b, kv_len in enumerate(int(n) for n in batch.kv_len):
        first, last = (int(i) for i in batch.qo_indptr[b : b + 2])
        kv = np.arange(kv_len)[None, :]
        q_pos = np.arange(kv_len - (last - first), kv_len)[:, None]
        for h in range(batch.q.shape[1]):
            kv_head = h * batch.keys[b].shape[1] // batch.q.shape[1]
            row = types.SimpleNamespace(
                batch=b, qo_head=h, kv_head=kv_head, q_pos=q_pos, q_len=last - first, kv_len=kv_len
            )
            x = batch.q[first:last, h].astype(np.float64) @ batch.keys[b][:, kv_head].astype(np.float64).T
            x = x * batch.sm_scale
            if kind.logits is not None:
                x = kind.logits(p, row, kv, x)
            visible = np.ones(x.shape, bool)
            if kind.causal:
                visible &= kv <= q_pos
            if kind.window_left >= 0:
                visible &= kv >= q_pos - kind.window_left
            if kind.mask is not None:
                visible &= kind.mask(p, row, kv)
            x = np.where(visible, x, -np.inf)
            highest = x.max(axis=1, keepdims=True, initial=-np.inf)
            weights = np.exp(x - np.where(np.isneginf(highest), 0, highest))
            total = weights.sum(axis=1, keepdims=True)
            with np.errstate(divide="ignore"):
                own_lse = highest + np.log(total)
            own_o = weights @ batch.values[b][:, kv_head].astype(np.float64) / np.where(total == 0, 1, total)
            lse[first:last, h] = own_lse[:, 0]
            if kind.output is not None:
                own_o = kind.output(p, row, own_lse, own_o)
            o[first:last, h] = own_o
    return o, lse


def install() -> None:
    """For scripts: makes package() tvm_infer.variant."""
    sys.modules["tvm_infer.variant"] = package()

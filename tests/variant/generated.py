"""Calls the generated code through ctypes: the structs of cuda_src/tvm_infer/variant, and functions over runs of keys."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

LOG2_E = 1.4426950408889634


class Table(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int32 * 4)]


class Args(ctypes.Structure):
    _fields_ = [("scalars", ctypes.c_uint32 * 16), ("tables", Table * 8)]


class Row(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("batch", "qo_head", "kv_head", "q_pos", "q_len", "kv_len")]


def hook(*numbers_and_pointers: type) -> type:
    """A function of args, row and these."""
    return ctypes.CFUNCTYPE(None, ctypes.POINTER(Args), ctypes.POINTER(Row), *numbers_and_pointers)


LOGITS = hook(ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
OUTPUT = hook(ctypes.c_float, ctypes.c_int32, ctypes.c_void_p)
QUERY = hook(ctypes.c_int32, *[ctypes.c_void_p] * 3)
KEY = hook(ctypes.c_int32, ctypes.c_int32, *[ctypes.c_void_p] * 3)
TURN = hook(ctypes.c_int32, ctypes.c_int32, *[ctypes.c_void_p] * 2)
ABI = 2


class CpuFunctions(ctypes.Structure):
    _fields_ = [
        ("abi", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("logits", "output", "turn", "query", "key")),
        ("rotary_dim", ctypes.c_int32),
        ("has_softmax", ctypes.c_int32),
    ]


class At(NamedTuple):
    """A row: the variables of positions but kv_pos."""

    batch: int
    qo_head: int
    kv_head: int
    q_pos: int
    q_len: int
    kv_len: int


def args_of(bound) -> Args:
    """As the C++ side makes it of the bound tensors."""
    args = Args()
    for i, bits in enumerate(bound.scalars):
        args.scalars[i] = bits
    for i, table in enumerate(bound.tables):
        if isinstance(table, np.ndarray):
            pointer, strides = table.__array_interface__["data"][0], [n // table.itemsize for n in table.strides]
        else:  # of TVM: bfloat16
            pointer, strides = table.data_ptr(), list(table.strides)
        args.tables[i].data = pointer
        for d, stride in enumerate(strides):
            args.tables[i].strides[d] = stride
    return args


def logits(address: int, bound, at: At, scores: np.ndarray) -> np.ndarray:
    """Logits in units of the natural logarithm of keys 0, 1, …; hidden ones -inf."""
    functions = CpuFunctions.from_address(address)
    assert functions.abi == ABI
    result = np.ascontiguousarray(scores, np.float32).copy()
    if functions.logits:
        LOGITS(functions.logits)(args_of(bound), Row(*at), 0, len(result), result.ctypes.data)
        result = result / np.float32(LOG2_E) if functions.has_softmax else result
    return result


def element(address: int, bound, at: At, x: np.ndarray, kv_pos: int | None = None) -> np.ndarray:
    """A head [head_dim] of a query, or of the key at `kv_pos`, as it enters the product."""
    functions = CpuFunctions.from_address(address)
    result = np.ascontiguousarray(x, np.float32).copy()
    pairs = (functions.rotary_dim or len(result)) // 2
    cos, sin = np.full((2, pairs), np.nan, np.float32)
    turn = cos.ctypes.data, sin.ctypes.data
    if functions.turn:
        pos = at.q_pos if kv_pos is None else kv_pos
        TURN(functions.turn)(args_of(bound), Row(*at), pos, pairs, *turn)
    if kv_pos is None and functions.query:
        QUERY(functions.query)(args_of(bound), Row(*at), len(result), *turn, result.ctypes.data)
    if kv_pos is not None and functions.key:
        KEY(functions.key)(args_of(bound), Row(*at), kv_pos, len(result), *turn, result.ctypes.data)
    return result


def output(address: int, bound, at: At, lse: float, o: np.ndarray) -> np.ndarray:
    functions = CpuFunctions.from_address(address)
    result = np.ascontiguousarray(o, np.float32).copy()
    if functions.output:
        OUTPUT(functions.output)(args_of(bound), Row(*at), lse, len(result), result.ctypes.data)
    return result

"""The few driver calls that load and launch a cubin, by ctypes on libcuda, in torch's context."""

from __future__ import annotations

import ctypes
import pathlib
from typing import Any

import torch

_cuda = ctypes.CDLL("libcuda.so.1")
_BFLOAT16, _FLOAT16 = 9, 6  # CUtensorMapDataType
_SWIZZLE_128B, _L2_PROMOTION_128B = 3, 2  # 256 B promotion reads 6 % slower
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_PROGRAMMATIC_SERIALIZATION = 6  # CUlaunchAttributeID


def _check(code: int) -> None:
    if code != 0:
        name = ctypes.c_char_p()
        _cuda.cuGetErrorName(code, ctypes.byref(name))
        raise RuntimeError(f"driver error {code} {(name.value or b'?').decode()}")


class AttentionParams(ctypes.Structure):
    """cuda/params.h's struct of this name."""

    _fields_ = [
        ("plan", ctypes.c_void_p),
        ("kv_indptr", ctypes.c_void_p),
        ("kv_page_indices", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("q_stride_token", ctypes.c_int64),
        ("q_stride_head", ctypes.c_int64),
        ("o", ctypes.c_void_p),
        ("o_stride_token", ctypes.c_int64),
        ("o_stride_head", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("partial_o", ctypes.c_void_p),
        ("partial_lse", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("kv_strides", ctypes.c_int64 * 6),
        ("k_scales", ctypes.c_void_p),
        ("v_scales", ctypes.c_void_p),
        ("k_scale", ctypes.c_float),
        ("v_scale", ctypes.c_float),
        ("expected_plan", ctypes.c_int32 * 8),
        ("sm_scale_log2", ctypes.c_float),
        ("sm_scale", ctypes.c_float),
        ("plan_is_ready", ctypes.c_int32),
    ]


class TensorMap(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 128)]


class KvTensorMaps(ctypes.Structure):
    """attention/params.cuh's struct of this name."""

    _fields_ = [("k_pages", TensorMap), ("v_pages", TensorMap), ("k_panels", TensorMap)]


class _LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class Kernel:
    """A kernel of a cubin; its threads and shared memory come out of the cubin itself."""

    def __init__(self, path: pathlib.Path) -> None:
        name = path.stem
        torch.cuda.current_stream()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._image = path.read_bytes()
        _check(_cuda.cuModuleLoadData(ctypes.byref(self._module), self._image))
        _check(_cuda.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
        info, size, address = (ctypes.c_int32 * 4)(), ctypes.c_size_t(), ctypes.c_uint64()
        _check(
            _cuda.cuModuleGetGlobal_v2(ctypes.byref(address), ctypes.byref(size), self._module, f"{name}_info".encode())
        )
        _check(_cuda.cuMemcpyDtoH_v2(info, address, ctypes.c_size_t(16)))
        self.threads, self.shared_bytes = info[1], info[2]
        _check(_cuda.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, self.shared_bytes))

    def launch(self, grid: int, params: tuple[Any, ...], dependent: bool = False) -> None:
        """On torch's current stream. `dependent`: its prologue may overlap the kernel before it."""
        attribute = _LaunchAttribute(_PROGRAMMATIC_SERIALIZATION, 0)
        attribute.value[0] = 1
        config = _LaunchConfig(
            (grid, 1, 1),
            (self.threads, 1, 1),
            self.shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            1 if dependent else 0,
        )
        pointers = (ctypes.c_void_p * len(params))(*[ctypes.addressof(p) for p in params])
        _check(_cuda.cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None))


def _encode(tensor: torch.Tensor, box: tuple[int, ...]) -> TensorMap:
    """tensor: [num_pages, num_kv_heads, page_size, head_dim] view with any strides."""
    pages, heads, tokens, dim = tensor.shape
    page_stride, head_stride, token_stride, _ = (2 * s for s in tensor.stride())
    raw = (ctypes.c_uint8 * 256)()
    aligned = (ctypes.addressof(raw) + 63) // 64 * 64
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    _check(
        _cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(aligned),
            _BFLOAT16 if tensor.dtype == torch.bfloat16 else _FLOAT16,
            5,
            ctypes.c_void_p(tensor.data_ptr()),
            (u64 * 5)(64, tokens, dim // 64, heads, pages),
            (u64 * 4)(token_stride, 128, head_stride, page_stride),
            (u32 * 5)(*box),
            (u32 * 5)(1, 1, 1, 1, 1),
            0,
            _SWIZZLE_128B,
            _L2_PROMOTION_128B,
            0,
        )
    )
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, 128))


def kv_tensor_maps(k: torch.Tensor, v: torch.Tensor, box_tokens: int) -> KvTensorMaps:
    """k, v: [num_pages, num_kv_heads, page_size, head_dim] views; box_tokens: page_size, or 128 for ragged keys (one page)."""
    tokens, panels = box_tokens, k.shape[3] // 64
    page, panel = (64, tokens, panels, 1, 1), (64, tokens, 1, 1, 1)
    return KvTensorMaps(_encode(k, page), _encode(v, page), _encode(k, panel))

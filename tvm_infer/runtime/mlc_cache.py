"""The paged KV cache that TVM's builtins take: MLC's compiled models run on it as they are (docs/mlc.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .. import _ffi
from ..errors import ArgumentError, DTypeError
from .kv_cache import PagedKVCache, _integer
from .mlc_library import load

_DTYPES = ("float32", "float16", "bfloat16")
_ROPE_MODES = {"none": 0, "normal": 1, "inline": 2}
_ATTN_KINDS = {"mha": 0, "mha_sliding": 3}  # TVM's AttnKind


class MLCPagedKVCache:
    """TVM's `AttentionKVCacheObj` over our pages and kernels.

    Pass it wherever a model compiled by MLC takes a KV cache: to the functions of a Relax VM, and to `vm.builtin.kv_state_*` and
    `vm.builtin.attention_kv_cache_*`, which are called as for TVM's own cache:

    >>> cache = MLCPagedKVCache(max_batch_size=8, max_total_seq_len=4096, prefill_chunk_size=512, num_layers=2,
    ...                         num_qo_heads=8, num_kv_heads=2, head_dim=64)
    >>> tvm.get_global_func("vm.builtin.kv_state_add_sequence")(cache, 0)

    The first one in a process loads the adapter to the installed TVM, which is compiled with g++ if the cache folder has none for
    it yet (5 s). Not thread-safe, as TVM's.

    Parameters
    ----------
    max_batch_size : sequences in one step.
    max_total_seq_len : tokens of all sequences together; the cache has ceil(max_total_seq_len / page_size) + 1 pages, as TVM's.
    prefill_chunk_size : new tokens in one step, all sequences together.
    page_size : tokens a page.
    num_layers, num_qo_heads, num_kv_heads, head_dim : of the model.
    dtype : "float32", "float16" or "bfloat16": of qkv, the pages and the output.
    device : "cpu", "cuda", … or a TVM device.
    rope_mode : "none": q and k are stored and used as they are given; "normal": `attention_with_fused_qkv` rotates both first, and
        keys are stored rotated; "inline": keys are stored as they are given, and all attention rotates q and k as it reads them.
        With support_sliding_window "normal" is "inline", as in TVM.
    rope_scale, rope_theta : factor on positions, base of the frequencies.
    rope_scaling : MLC's dict with a "rope_type" ("llama3", "yarn", "longrope", "gptj", …), or None.
    rope_ext_factors : of "longrope", float32 [rotary_dim], the long factors before the short ones; None for ones. None where
        rotation is inline.
    rotary_dim : elements of a head that turn; None: all. A multiple of 16 where rotation is inline, as is head_dim.
    attn_kinds : "mha" or "mha_sliding" for each layer; None: all "mha".
    layer_sliding_window_size : keys that a token sees in "mha_sliding" layers, its own included.
    support_sliding_window : whether sequences may be given windows by `enable_sliding_window_for_seq`.

    Raises
    ------
    ArgumentError, DTypeError : an argument out of its range; says which way out there is. ExecutorError : no executor for the
    device, dtype or head_dim. MissingDependencyError, CompileError, AbiError : no adapter, see :func:`mlc_library.load`.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_total_seq_len: int,
        prefill_chunk_size: int,
        page_size: int = 16,
        num_layers: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str = "float32",
        device: Any = "cpu",
        rope_mode: str = "none",
        rope_scale: float = 1.0,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_ext_factors: Any = None,
        rotary_dim: int | None = None,
        attn_kinds: Sequence[str] | None = None,
        layer_sliding_window_size: int = 1024,
        support_sliding_window: bool = False,
    ) -> None:
        name = str(dtype).removeprefix("torch.")
        if name not in _DTYPES:
            raise DTypeError(f"argument `dtype` is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        if rope_mode not in _ROPE_MODES:
            raise ArgumentError(f"argument `rope_mode` is {rope_mode!r}; it must be one of {', '.join(_ROPE_MODES)}")
        kinds = ["mha"] if attn_kinds is None else list(attn_kinds)
        if not set(kinds) <= _ATTN_KINDS.keys():
            raise ArgumentError(
                f"argument `attn_kinds` is {attn_kinds!r}; each must be one of {', '.join(_ATTN_KINDS)}"
            )
        load()
        import tvm
        import tvm_ffi

        layers, width = _integer(num_layers, "num_layers"), _integer(head_dim, "head_dim")
        limits = {
            "max_batch_size": max_batch_size,
            "max_total_seq_len": max_total_seq_len,
            "prefill_chunk_size": prefill_chunk_size,
            "page_size": page_size,
        }
        sizes = [_integer(value, key) for key, value in limits.items()]
        windows = [int(bool(support_sliding_window)), _integer(layer_sliding_window_size, "layer_sliding_window_size")]
        no_mla, no_disaggregation = 0, False
        self._handle = _ffi.func("mlc_kv_cache_create")(
            tvm_ffi.Shape((*sizes, *windows)),
            tvm_ffi.Shape((0, layers)),
            layers,
            _integer(num_qo_heads, "num_qo_heads"),
            _integer(num_kv_heads, "num_kv_heads"),
            width,
            width,
            tvm_ffi.Shape(tuple(_ATTN_KINDS[kind] for kind in kinds)),
            no_mla,
            no_mla,
            _ROPE_MODES[rope_mode],
            float(rope_scale),
            float(rope_theta),
            json.dumps(dict(rope_scaling)) if rope_scaling else "",
            rope_ext_factors,
            width if rotary_dim is None else _integer(rotary_dim, "rotary_dim"),
            no_disaggregation,
            tvm.runtime.empty((), name, tvm_ffi.device(device) if isinstance(device, str) else device),
        )

    @classmethod
    def from_handle(cls, handle: Any) -> MLCPagedKVCache:
        """Wrap the object that the packed function `tvm_infer.mlc_kv_cache_create` returned."""
        self = cls.__new__(cls)
        self._handle = handle
        return self

    def __tvm_ffi_object__(self) -> Any:
        return self._handle

    @property
    def inner(self) -> PagedKVCache:
        """The cache that holds the pages: its sizes, sequences, plan. Steps are begun and ended through TVM's builtins only."""
        return PagedKVCache.from_handle(_ffi.func("mlc_kv_cache_inner")(self._handle))

    def debug_set_kv(self, seq_id: int, start: int, k: Any, v: Any) -> None:
        """Overwrite keys and values of a sequence from position `start` on. TVM's builtins have the getter only.

        k, v : [num_layers, length, num_kv_heads, head_dim] of the cache's dtype, contiguous.

        Raises ArgumentError past the sequence's end; CacheStateError where forks share the page.
        """
        _ffi.func("mlc_debug_set_kv")(self._handle, _integer(seq_id, "seq_id"), _integer(start, "start"), k, v)

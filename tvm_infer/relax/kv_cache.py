"""PagedKVCache for models written in TVM's nn.Module frontend: the methods of TVM's class, calls of our packed functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import relax, tirx
from tvm.relax.frontend import nn

from tvm_infer.errors import ModelError
from tvm_infer.rope import RopeConfig

from . import extern_calls
from .cache_creation import ROPE_NONE, CacheArguments

_TVM_CACHE = "tvm.relax.frontend.nn.llm.kv_cache.TIRPagedKVCache"


class PagedKVCache(nn.Object):
    """The paged KV cache as a model sees it; stands for a `runtime.PagedKVCache` that is passed in when the model runs.

    Constructor and methods take what those of TVM's classes take (`tvm.relax.frontend.nn.llm.kv_cache`), so that a model changes its
    import alone. Constructed in a method (`create_paged_kv_cache`), it becomes the call that makes the cache; a parameter of this
    type (`nn.spec.Object(object_type=PagedKVCache)`) is the cache itself. `relax.lift_cache` puts that parameter among those that a
    CUDA graph takes for fixed.

    What TVM's class has and this one refuses with a ModelError: attention in two parts (`self_attention`, `cross_attention`,
    `merge_attn_output_inplace`), layers that share another's keys (`attention_with_shared_kv`), latent attention (`append_mla_kv`).
    One call appends and attends here. Models that need them keep TVM's cache, or take ours under TVM's functions
    (`DispatchKVCacheCreation`).

    Parameters
    ----------
    attn_kind : "mha" for all layers, or a list with an entry for each. max_batch_size, max_total_seq_len, prefill_chunk_size,
        page_size : sizes that may be symbolic: sequences in a step, tokens of all sequences, new tokens of a step, tokens of a page.
        support_sliding_window : 0. layer_partition : [0, num_hidden_layers]. num_hidden_layers, num_attention_heads,
        num_key_value_heads, qk_head_dim, v_head_dim : of the model. rope_mode, rope_scale, rope_theta, rope_scaling, rotary_dim :
        rotary positions, which the cache applies to q and k of fused calls. dtype : of the pages. mla_*, rope_ext_factors,
        enable_disaggregation : none of them. target : not needed: the cache is made on the device of the machine that runs the model.
        Taken so that TVM's call fits.

    Raises
    ------
    ModelError : arguments that this cache does not serve, all of them by name with their values.
    """

    def __init__(
        self,
        attn_kind: str | Sequence[str] | None = None,
        max_batch_size: Any = None,
        max_total_seq_len: Any = None,
        prefill_chunk_size: Any = None,
        page_size: Any = None,
        support_sliding_window: Any = 0,
        layer_partition: Any = None,
        num_hidden_layers: int = 0,
        num_attention_heads: int = 0,
        num_key_value_heads: int = 0,
        qk_head_dim: int = 0,
        v_head_dim: int = 0,
        mla_original_qk_head_dim: int = 0,
        mla_original_v_head_dim: int = 0,
        rope_mode: int = ROPE_NONE,
        rope_scale: float = 1,
        rope_theta: float = 10000,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_ext_factors: Any = None,
        rotary_dim: int | None = None,
        enable_disaggregation: bool = False,
        dtype: str = "float32",
        target: Any = None,
        name: str = "paged_kv_cache",
        *,
        layer_sliding_window_size: int = 1024,
        _expr: Any = None,
        _name: str | None = None,
    ) -> None:
        if _expr is not None:  # a parameter of a method: nn's exporter makes it so
            super().__init__(_expr=_expr, _name=_name or name)
            return
        kinds = (attn_kind,) * num_hidden_layers if isinstance(attn_kind, str) else tuple(attn_kind or ())
        if layer_partition is None:
            layer_partition = (0, num_hidden_layers)
        arguments = CacheArguments(
            attn_kind=kinds,
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            layer_partition=tuple(getattr(layer_partition, "values", layer_partition)),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            qk_head_dim=qk_head_dim,
            v_head_dim=v_head_dim,
            mla_original_qk_head_dim=mla_original_qk_head_dim,
            mla_original_v_head_dim=mla_original_v_head_dim,
            rope_mode=int(rope_mode),
            rope_scale=float(rope_scale),
            rope_theta=float(rope_theta),
            rope_scaling=dict(rope_scaling or {}),
            rope_ext_factors=None if is_absent(rope_ext_factors) else rope_ext_factors,
            rotary_dim=qk_head_dim if rotary_dim is None else rotary_dim,
            enable_disaggregation=bool(enable_disaggregation),
            dtype=str(dtype),
        )
        super().__init__(_expr=creation_call(arguments), _name=name)

    @staticmethod
    def create_generic(
        attn_kind: str | Sequence[str],
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        qk_head_dim: int,
        v_head_dim: int,
        rope_mode: int,
        rope_scale: float,
        rope_theta: float,
        dtype: str,
        mla_original_qk_head_dim: int = 0,
        mla_original_v_head_dim: int = 0,
        rotary_dim: int | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        rope_ext_factors: Sequence[float] | None = None,
        layer_partition: Sequence[int] | None = None,
        enable_disaggregation: bool = False,
        name: str = "paged_kv_cache",
    ) -> PagedKVCache:
        """The cache by MLC's call (`mlc_llm.nn.PagedKVCache.create_generic`), whose order of arguments differs from TVM's."""
        return PagedKVCache(
            attn_kind,
            max_batch_size,
            max_total_seq_len,
            prefill_chunk_size,
            page_size,
            support_sliding_window,
            layer_partition,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            qk_head_dim,
            v_head_dim,
            mla_original_qk_head_dim,
            mla_original_v_head_dim,
            rope_mode,
            rope_scale,
            rope_theta,
            rope_scaling,
            rope_ext_factors,
            rotary_dim,
            enable_disaggregation,
            dtype,
            name=name,
        )

    def attention_with_fused_qkv(self, layer_id: int, qkv: nn.Tensor, num_qo_heads: int, sm_scale: float) -> nn.Tensor:
        """Rotate q and k as the cache says, append k and v to the cache at `layer_id`, attend q to all of its sequence's keys.

        qkv : [b, s, num_qo_heads + 2 * num_kv_heads, head_dim], b * s the tokens of the step. Returns [b, s, num_qo_heads, head_dim].
        """
        b, s, heads, head_dim = qkv._expr.ty.shape
        out_ty = relax.TensorType((b * s, num_qo_heads, head_dim), qkv.dtype)
        out = _emit(
            extern_calls.attention_with_kv_cache_fused_qkv(
                self._expr,
                layer_id,
                qkv.reshape(b * s, heads, head_dim)._expr,
                sm_scale=sm_scale,
                causal=True,
                out_ty=out_ty,
            )
        )
        return out.reshape(b, s, num_qo_heads, head_dim)

    def attention(self, layer_id: int, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, sm_scale: float) -> nn.Tensor:
        """The same for a model that rotates q and k itself (or uses no rotary positions). Not in TVM's class.

        q : [b, s, num_qo_heads, head_dim]; k, v : [b, s, num_kv_heads, head_dim]. Returns as q.
        """
        b, s, num_qo_heads, head_dim = q._expr.ty.shape
        packed = [x.reshape(b * s, x._expr.ty.shape[2], head_dim)._expr for x in (q, k, v)]
        out_ty = relax.TensorType((b * s, num_qo_heads, head_dim), q.dtype)
        call = extern_calls.attention_with_kv_cache(
            self._expr, layer_id, *packed, sm_scale=sm_scale, causal=True, out_ty=out_ty
        )
        return _emit(call).reshape(b, s, num_qo_heads, head_dim)

    def get_query_positions(self, total_length: Any) -> nn.Tensor:
        """int32 [total_length]: the position of every token of the step in its sequence."""
        return _emit(extern_calls.kv_cache_query_positions(self._expr, total_length)).astype("int32")

    def self_attention(self, layer_id: int, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, sm_scale: float) -> Any:
        """Refused: ModelError."""
        raise _refused("self_attention", layer_id)

    def cross_attention(self, layer_id: int, q: nn.Tensor, v_head_dim: int, sm_scale: float) -> Any:
        """Refused: ModelError."""
        raise _refused("cross_attention", layer_id)

    def attention_with_shared_kv(
        self, source_layer_id: int, q: nn.Tensor, current_k: nn.Tensor, current_v: nn.Tensor, sm_scale: float
    ) -> Any:
        """Refused: ModelError."""
        raise _refused("attention_with_shared_kv", source_layer_id)

    def append_mla_kv(self, layer_id: int, kv: nn.Tensor) -> Any:
        """Refused: ModelError."""
        raise _refused("append_mla_kv", layer_id)

    def merge_attn_output_inplace(
        self, o_self_attn: nn.Tensor, lse_self_attn: nn.Tensor, o_cross_attn: nn.Tensor, lse_cross_attn: nn.Tensor
    ) -> Any:
        """Refused: ModelError."""
        raise _refused("merge_attn_output_inplace", None)


def _emit(call: Any) -> nn.Tensor:
    return nn.Tensor(_expr=relax.BlockBuilder.current().emit(call))


def _refused(method: str, layer: int | None) -> ModelError:
    where = "" if layer is None else f" at layer {layer}"
    return ModelError(
        f"PagedKVCache.{method}{where} is not supported: a layer appends and attends in one call here; use "
        f"attention_with_fused_qkv, or keep {_TVM_CACHE} for this model"
    )


def is_absent(value: Any) -> bool:
    """Whether an optional argument is missing: None, or the 0 that stands for it in MLC's calls (Relax has no optional values)."""
    if value is None or (isinstance(value, (int, float)) and value == 0):
        return True
    value = getattr(value, "value", value)
    return isinstance(value, (tirx.IntImm, int)) and int(value) == 0


def rope_of(arguments: CacheArguments) -> RopeConfig | None:
    """The rotary positions of a creation call; None without. Raises ArgumentError for a scaling that RopeConfig does not know."""
    if arguments.rope_mode == ROPE_NONE:
        return None
    return RopeConfig(
        arguments.rotary_dim,
        theta=arguments.rope_theta,
        scale=arguments.rope_scale,
        scaling=arguments.rope_scaling or None,
    )


def check(arguments: CacheArguments) -> None:
    """Raise ModelError with everything that our cache does not serve."""
    problems = arguments.unsupported()
    if problems:
        raise ModelError("this KV cache cannot be made: " + "; ".join(str(p) for p in problems))


def creation_call(arguments: CacheArguments) -> Any:
    """The Relax call that makes our cache."""
    check(arguments)
    page_size = arguments.page_size
    like = relax.BlockBuilder.current().emit(relax.op.zeros((), arguments.dtype))  # says device and data type
    return extern_calls.kv_cache_create_like(
        like,
        num_layers=arguments.num_hidden_layers,
        num_qo_heads=arguments.num_attention_heads,
        num_kv_heads=arguments.num_key_value_heads,
        head_dim=arguments.qk_head_dim,
        page_size=page_size,
        num_pages=tirx.floordiv(arguments.max_total_seq_len + page_size - 1, page_size),
        max_batch=arguments.max_batch_size,
        # a decode step has a token for each sequence, whatever the prefill chunk
        max_tokens=tirx.max(arguments.prefill_chunk_size, arguments.max_batch_size),
        rope=rope_of(arguments),
    )

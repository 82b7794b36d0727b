"""Every packed-call signature that compiled models use, once.

A pass that emits a call and a test that expects one both build it here, so that the C++ binding has one counterpart in Python.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_infer.rope import RopeConfig

    from .cache_creation import CacheArguments

ATTENTION_WITH_KV_CACHE = "tvm_infer.attention_with_kv_cache"
ATTENTION_WITH_KV_CACHE_ROPE = "tvm_infer.attention_with_kv_cache_rope"
ATTENTION_WITH_KV_CACHE_FUSED_QKV = "tvm_infer.attention_with_kv_cache_fused_qkv"
KV_CACHE_CREATE_LIKE = "tvm_infer.kv_cache_create_like"
KV_CACHE_QUERY_POSITIONS = "tvm_infer.kv_cache_query_positions"
MATMUL = "tvm_infer.matmul"
MATMUL_ADD = "tvm_infer.matmul_add"
LINEAR = "tvm_infer.linear"
LINEAR_ADD = "tvm_infer.linear_add"
# Calls on the cache that TVM's own builtins take too; the names do not start with vm.builtin, so that RewriteCUDAGraph captures them
MLC_PREFIX = "tvm_infer.mlc_"
MLC_KV_CACHE_CREATE = "tvm_infer.mlc_kv_cache_create"


def attention_with_kv_cache(
    kv: Any, layer: int, q: Any, k: Any, v: Any, *, sm_scale: float, causal: bool, out_ty: Any
) -> Any:
    """Append k, v of the step's tokens to `kv` at `layer`, then attend q to all of each sequence's keys.

    One call, because call_dps_packed counts as pure and a separate append could be removed.

    q : [num_tokens, num_qo_heads, head_dim]; k, v : [num_tokens, num_kv_heads, head_dim]; out_ty : type of the output, as q,
    as wide as v.
    C++: ffi/kv_cache.cc, arguments (kv, layer, q, k, v, sm_scale, causal, out).
    """
    from tvm import relax

    return relax.call_dps_packed(
        ATTENTION_WITH_KV_CACHE,
        relax.Tuple(
            [
                kv,
                relax.prim_value(layer),
                q,
                k,
                v,
                relax.prim_value(float(sm_scale)),
                relax.prim_value(int(causal)),
            ]
        ),
        out_ty=out_ty,
    )


def attention_with_kv_cache_rope(
    kv: Any,
    layer: int,
    q: Any,
    k: Any,
    v: Any,
    inv_freq: Any,
    *,
    interleaved: bool,
    magnitude: float,
    sm_scale: float,
    causal: bool,
    out_ty: Any,
) -> Any:
    """`attention_with_kv_cache` with rotary embedding of q and k on the way, by the positions that the cache gives its tokens.

    inv_freq : float32 [rotary_dim / 2], a constant: radians a token of each pair; interleaved, magnitude : as of `RopeConfig`. Gives a
    tuple: the rotated queries, which nothing else needs, and the output; both are of out_ty.
    C++: ffi/kv_cache.cc, arguments (kv, layer, q, k, v, inv_freq, interleaved, magnitude, sm_scale, causal, rotated_q, out).
    """
    from tvm import relax

    return relax.call_dps_packed(
        ATTENTION_WITH_KV_CACHE_ROPE,
        relax.Tuple(
            [
                kv,
                relax.prim_value(layer),
                q,
                k,
                v,
                inv_freq,
                relax.prim_value(int(interleaved)),
                relax.prim_value(float(magnitude)),
                relax.prim_value(float(sm_scale)),
                relax.prim_value(int(causal)),
            ]
        ),
        out_ty=[out_ty, out_ty],
    )


def attention_with_kv_cache_fused_qkv(
    kv: Any, layer: int, qkv: Any, *, sm_scale: float, causal: bool, out_ty: Any
) -> Any:
    """The same for queries, keys and values in one tensor, with the cache's rotary positions applied to q and k.

    qkv : [num_tokens, num_qo_heads + 2 * num_kv_heads, head_dim], query heads first, then keys, then values; out_ty : type of the
    output [num_tokens, num_qo_heads, head_dim]. C++: arguments (kv, layer, qkv, sm_scale, causal, out).
    """
    from tvm import relax

    return relax.call_dps_packed(
        ATTENTION_WITH_KV_CACHE_FUSED_QKV,
        relax.Tuple(
            [kv, relax.prim_value(layer), qkv, relax.prim_value(float(sm_scale)), relax.prim_value(int(causal))]
        ),
        out_ty=out_ty,
    )


def kv_cache_create_like(
    like: Any,
    *,
    num_layers: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: Any,
    num_pages: Any,
    max_batch: Any,
    max_tokens: Any,
    rope: RopeConfig | None,
) -> Any:
    """A new cache on the device and with the data type of the tensor `like`; page_size and what follows may be symbolic.

    rope : how fused calls rotate q and k; None: not. C++: ffi/kv_cache_like.cc, arguments (like, Shape of the sizes in this order,
    tuple of frequencies, interleaved, magnitude).
    """
    from tvm import relax

    sizes = [num_layers, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, max_batch, max_tokens]
    inv_freq = [] if rope is None else [float(x) for x in rope.inv_freq()]
    return relax.call_pure_packed(
        KV_CACHE_CREATE_LIKE,
        like,
        relax.ShapeExpr(sizes),
        relax.Tuple([relax.prim_value(x) for x in inv_freq]),
        relax.prim_value(int(rope is not None and rope.interleaved)),
        relax.prim_value(1.0 if rope is None else float(rope.magnitude())),
        ty_args=relax.AnyType(),
    )


def kv_cache_query_positions(kv: Any, num_tokens: Any) -> Any:
    """int64 [num_tokens]: position of every token of the step in its sequence. C++: ffi/kv_cache.cc, arguments (kv)."""
    from tvm import relax

    return relax.call_pure_packed(KV_CACHE_QUERY_POSITIONS, kv, ty_args=relax.TensorType([num_tokens], "int64"))


_ATTN_KINDS = {"mha": 0, "mha_sliding": 3}  # TVM's AttnKind, of what CacheArguments lets through


def mlc_kv_cache_create(arguments: CacheArguments, like: Any) -> Any:
    """A cache for models written against TVM's builtins. like : any tensor of the cache's data type, on its device.

    C++: mlc/library.cc: MLC's own order, with attn_kinds after the widths, and `like` last in place of the data type.
    """
    from tvm import relax
    from tvm.ir import StringImm

    a, value = arguments, relax.prim_value
    sizes = [a.max_batch_size, a.max_total_seq_len, a.prefill_chunk_size, a.page_size, a.support_sliding_window]
    if "mha_sliding" in a.attn_kind:
        sizes.append(a.layer_sliding_window_size)
    kinds = [_ATTN_KINDS[kind] for kind in a.attn_kind]
    return relax.call_pure_packed(
        MLC_KV_CACHE_CREATE,
        relax.ShapeExpr(sizes),
        relax.ShapeExpr(list(a.layer_partition)),
        value(a.num_hidden_layers),
        value(a.num_attention_heads),
        value(a.num_key_value_heads),
        value(a.qk_head_dim),
        value(a.v_head_dim),
        relax.ShapeExpr(kinds),
        value(a.mla_original_qk_head_dim),
        value(a.mla_original_v_head_dim),
        value(a.rope_mode),
        value(float(a.rope_scale)),
        value(float(a.rope_theta)),
        StringImm(json.dumps(dict(a.rope_scaling)) if a.rope_scaling else ""),
        value(0),  # no extension factors
        value(a.rotary_dim),
        value(int(a.enable_disaggregation)),
        like,
        ty_args=relax.AnyType(),
    )


def matmul(a: Any, b: Any, *, transpose_b: bool, out_ty: Any) -> Any:
    """out = a @ b (or a @ b.T), a : [m, k], row-major; b : [k, n] or [n, k].

    C++: ffi/matmul.cc, arguments (a, b, transpose_b, out).
    """
    from tvm import relax

    return relax.call_dps_packed(MATMUL, relax.Tuple([a, b, relax.prim_value(int(transpose_b))]), out_ty=out_ty)


def matmul_add(a: Any, b: Any, c: Any, *, transpose_b: bool, out_ty: Any) -> Any:
    """out = a @ b + c (or a @ b.T + c), a and b as for `matmul`; c : [..., m, n] of out's dtype, its leading dimensions count as rows.

    C++: ffi/matmul.cc, arguments (a, b, transpose_b, c, out).
    """
    from tvm import relax

    return relax.call_dps_packed(MATMUL_ADD, relax.Tuple([a, b, relax.prim_value(int(transpose_b)), c]), out_ty=out_ty)


def linear(x: Any, weight: Any, *, out_ty: Any) -> Any:
    """out = x @ weight.T, x : [..., m, k]; weight : [n, k], constant: on CUDA it may be read before the work ahead is done.

    C++: ffi/matmul.cc, arguments (x, weight, out).
    """
    from tvm import relax

    return relax.call_dps_packed(LINEAR, relax.Tuple([x, weight]), out_ty=out_ty)


def linear_add(x: Any, weight: Any, c: Any, *, out_ty: Any) -> Any:
    """out = x @ weight.T + c, as `linear`; c : [..., m, n] of out's dtype. C++: ffi/matmul.cc, arguments (x, weight, c, out)."""
    from tvm import relax

    return relax.call_dps_packed(LINEAR_ADD, relax.Tuple([x, weight, c]), out_ty=out_ty)

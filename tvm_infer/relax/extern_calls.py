"""Every packed-call signature that compiled models use, once.

A pass that emits a call and a test that expects one both build it here, so that the C++ binding has one counterpart in Python.
"""

from __future__ import annotations

from typing import Any

ATTENTION_WITH_KV_CACHE = "tvm_infer.attention_with_kv_cache"
MATMUL = "tvm_infer.matmul"


def attention_with_kv_cache(
    kv: Any, layer: int, q: Any, k: Any, v: Any, *, sm_scale: float, causal: bool, out_ty: Any
) -> Any:
    """Append k, v of the step's tokens to `kv` at `layer`, then attend q to all of each sequence's keys.

    One call, because call_dps_packed counts as pure and a separate append could be removed.

    q : [num_tokens, num_qo_heads, head_dim]; k, v : [num_tokens, num_kv_heads, head_dim]; out_ty : type of the output, shaped as q.
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


def matmul(a: Any, b: Any, *, transpose_b: bool, out_ty: Any) -> Any:
    """out = a @ b (or a @ b.T), a : [m, k], row-major; b : [k, n] or [n, k].

    C++: ffi/matmul.cc, arguments (a, b, transpose_b, out).
    """
    from tvm import relax

    return relax.call_dps_packed(MATMUL, relax.Tuple([a, b, relax.prim_value(int(transpose_b))]), out_ty=out_ty)

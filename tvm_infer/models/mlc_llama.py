"""A Llama in TVM's nn.Module frontend, in the style of MLC's models: fused QKV and gate/up weights, attention by a cache object.

The cache's class decides whose attention it is: `relax.PagedKVCache` for ours, TVM's classes for the same model on TVM's cache, so that
the two can be compared layer by layer. Functions of the exported module (sizes: b sequences, s tokens, m rows of logits):

    embed(input_ids [s] int32) -> [s, hidden]
    prefill(input_embed [1, s, hidden], kv_cache), decode(input_embed [1, 1, hidden], kv_cache) -> logits [1, 1, vocab], kv_cache
    batch_prefill(input_embeds [1, s, hidden], logit_positions [m] int32, kv_cache) -> logits [1, m, vocab], kv_cache
    batch_decode(input_embeds [b, 1, hidden], kv_cache) -> logits [b, 1, vocab], kv_cache
    create_paged_kv_cache(max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window) -> kv_cache
    main(input_ids [1, s] int64, logit_indices [m] int64, kv_cache) -> logits [1, m, vocab]         a whole step, for tvm_infer.compile

Each takes the weights after its inputs, except the last but one. Logits are float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import StringImm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op
from tvm.relax.frontend.nn.llm import kv_cache as tvm_cache

from .. import errors
from ..relax import PagedKVCache
from .llama import LlamaConfig

Cache = Literal["tvm_infer", "tir", "flashinfer", "generic"]
Rotary = Literal["cache", "model"]

SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_qo_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    max_position=8192,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)


class _FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: nn.Tensor) -> nn.Tensor:
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(op.silu(gate) * up)


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        num_heads = config.num_qo_heads + 2 * config.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, num_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_qo_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, x: nn.Tensor, cache: Any, layer: int, angles: tuple[nn.Tensor, nn.Tensor] | None) -> nn.Tensor:
        c = self.config
        b, s, _ = x.shape
        qkv = op.reshape(self.qkv_proj(x), (b, s, c.num_qo_heads + 2 * c.num_kv_heads, c.head_dim))
        sm_scale = c.head_dim**-0.5
        if angles is None:
            out = cache.attention_with_fused_qkv(layer, qkv, c.num_qo_heads, sm_scale=sm_scale)
        else:
            q, k, v = op.split(qkv, [c.num_qo_heads, c.num_qo_heads + c.num_kv_heads], axis=2)
            out = cache.attention(layer, _rotate(q, *angles), _rotate(k, *angles), v, sm_scale=sm_scale)
        return self.o_proj(op.reshape(out, (b, s, c.num_qo_heads * c.head_dim)))


def _rotate(x: nn.Tensor, cos: nn.Tensor, sin: nn.Tensor) -> nn.Tensor:
    """x : [b, s, heads, head_dim]; cos, sin : float32 [b, s, 1, head_dim / 2]. Pairs (i, i + head_dim / 2), in float32."""
    low, high = op.split(x.astype("float32"), 2, axis=-1)
    return op.concat([low * cos - high * sin, high * cos + low * sin], dim=-1).astype(x.dtype)


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, -1, config.rms_norm_eps, bias=False)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, -1, config.rms_norm_eps, bias=False)
        self.mlp = _FeedForward(config)

    def forward(self, x: nn.Tensor, cache: Any, layer: int, angles: tuple[nn.Tensor, nn.Tensor] | None) -> nn.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, layer, angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Decoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, -1, config.rms_norm_eps, bias=False)


class LlamaForCausalLM(nn.Module):
    """The model. `rotary`: q and k are rotated by the "cache" (MLC's way, fused with the append), or by the "model"'s own operators,
    which needs a cache of ours."""

    def __init__(
        self, config: LlamaConfig, *, cache: Cache = "tvm_infer", target: Any = None, rotary: Rotary = "cache"
    ):
        super().__init__()
        if rotary == "model" and cache != "tvm_infer":
            raise errors.ArgumentError(
                f'rotary is "model" and cache is {cache!r}: only relax.PagedKVCache takes q, k and v apart; use rotary="cache"'
            )
        if cache in ("tir", "flashinfer") and target is None:
            raise errors.ArgumentError(f"cache {cache!r} compiles its kernels: pass `target`")
        self.config, self.cache, self.target, self.rotary = config, cache, target, rotary
        self.dtype = "float32"
        self.model = _Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def to(self, dtype: str | None = None) -> None:
        """The data type of weights and cache."""
        super().to(dtype=dtype)
        self.dtype = dtype or self.dtype

    def _hidden(self, x: nn.Tensor, cache: Any) -> nn.Tensor:
        angles = self._angles(x, cache) if self.rotary == "model" else None
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cache, i, angles)
        return x

    def _angles(self, x: nn.Tensor, cache: Any) -> tuple[nn.Tensor, nn.Tensor]:
        """cos and sin of position * theta ** (-2 i / head_dim), float32 [b, s, 1, head_dim / 2]."""
        c = self.config
        b, s, _ = x.shape
        inv_freq = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim)
        position = op.reshape(cache.get_query_positions(b * s).astype("float32"), (b, s, 1, 1))
        angle = position * nn.Tensor.from_const(inv_freq.astype(np.float32).reshape(1, 1, 1, -1))
        return _cos(angle), _sin(angle)

    def _logits(self, x: nn.Tensor) -> nn.Tensor:
        x = self.model.norm(x)
        tied = self.config.tie_word_embeddings
        logits = op.matmul(x, op.permute_dims(self.model.embed_tokens.weight)) if tied else self.lm_head(x)
        return logits.astype("float32")

    def embed(self, input_ids: nn.Tensor) -> nn.Tensor:
        """Rows of the embedding."""
        return self.model.embed_tokens(input_ids)

    def prefill(self, input_embed: nn.Tensor, kv_cache: Any) -> Any:
        """Logits of the last token of one sequence."""
        x = self._hidden(input_embed, kv_cache)
        last = op.tensor_expr_op(
            lambda t: te.compute((1, 1, t.shape[2]), lambda i, _, k: t[i, t.shape[1] - 1, k], name="last"),
            "last",
            args=[x],
        )
        return self._logits(last), kv_cache

    def decode(self, input_embed: nn.Tensor, kv_cache: Any) -> Any:
        """Logits of one new token of one sequence."""
        return self._logits(self._hidden(input_embed, kv_cache)), kv_cache

    def batch_prefill(self, input_embeds: nn.Tensor, logit_positions: nn.Tensor, kv_cache: Any) -> Any:
        """Logits of some of the tokens of several sequences."""
        x = self._hidden(input_embeds, kv_cache)
        return self._logits(op.take(x, logit_positions, axis=1)), kv_cache

    def batch_decode(self, input_embeds: nn.Tensor, kv_cache: Any) -> Any:
        """Logits of one new token of each sequence."""
        return self._logits(self._hidden(input_embeds, kv_cache)), kv_cache

    def main(self, input_ids: nn.Tensor, logit_indices: nn.Tensor, kv_cache: Any) -> nn.Tensor:
        """A step: tokens of any number of sequences in, logits of chosen rows out."""
        x = self._hidden(self.embed(input_ids), kv_cache)
        return self._logits(op.take(x, logit_indices, axis=1))

    def create_paged_kv_cache(
        self,
        max_batch_size: tirx.Var,
        max_total_seq_len: tirx.Var,
        prefill_chunk_size: tirx.Var,
        page_size: tirx.Var,
        support_sliding_window: tirx.Var,
    ) -> Any:
        """A cache of this model's layers and heads."""
        c = self.config
        sizes = (max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window)
        heads = (c.num_layers, c.num_qo_heads, c.num_kv_heads, c.head_dim, c.head_dim)
        mode = tvm_cache.RopeMode.NORMAL if self.rotary == "cache" else tvm_cache.RopeMode.NONE
        if self.cache == "generic":
            return _mlc_generic(sizes, heads, mode, c.rope_theta, self.dtype)
        if self.cache == "tvm_infer":
            return PagedKVCache.create_generic("mha", *sizes, *heads, mode, 1, c.rope_theta, self.dtype)
        make = {"tir": tvm_cache.TIRPagedKVCache, "flashinfer": tvm_cache.FlashInferPagedKVCache}[self.cache]
        partition, none = relax.ShapeExpr([0, c.num_layers]), relax.prim_value(0)
        cache = make(
            "mha",
            *sizes,
            partition,
            *heads,
            0,
            0,
            mode,
            1,
            int(c.rope_theta),
            {},
            none,
            c.head_dim,
            False,
            self.dtype,
            self.target,
        )
        self.extern_mods = list(cache.extern_mods)
        return cache


def _mlc_generic(sizes: Sequence[Any], heads: Sequence[int], mode: int, theta: float, dtype: str) -> Any:
    """MLC's creation call, which a pass of the compiler replaces: 18 arguments, no kernels named."""
    value = relax.prim_value
    call = relax.call_pure_packed(
        "mlc.create_paged_kv_cache_generic",
        StringImm("mha"),
        relax.ShapeExpr(list(sizes)),
        relax.ShapeExpr([0, heads[0]]),
        *(value(int(x)) for x in heads),
        value(0),
        value(0),
        value(int(mode)),
        value(1),
        value(int(theta)),
        StringImm("{}"),
        value(0),
        value(int(heads[3])),
        value(0),
        StringImm(dtype),
        ty_args=relax.AnyType(),
    )
    return tvm_cache.PagedKVCache(_expr=call, _name="paged_kv_cache")


def _cos(x: nn.Tensor) -> nn.Tensor:
    return nn.Tensor(_expr=relax.BlockBuilder.current().emit(relax.op.cos(x._expr)))


def _sin(x: nn.Tensor) -> nn.Tensor:
    return nn.Tensor(_expr=relax.BlockBuilder.current().emit(relax.op.sin(x._expr)))


@dataclass(frozen=True)
class ExportedLlama:
    """mod : the module; weights : (name, shape, dtype) of its weights, in the order in which functions take them; extern_mods :
    libraries that the cache's kernels come from."""

    mod: Any
    weights: tuple[tuple[str, tuple[int, ...], str], ...]
    extern_mods: tuple[Any, ...] = ()


def export_llama(
    config: LlamaConfig,
    *,
    dtype: str = "float32",
    cache: Cache = "tvm_infer",
    target: Any = None,
    rotary: Rotary = "cache",
    functions: Sequence[str] | None = None,
) -> ExportedLlama:
    """The Relax module of a Llama.

    Parameters
    ----------
    dtype : of weights, activations and cache. cache : "tvm_infer" (relax.PagedKVCache), "tir" or "flashinfer" (TVM's cache with its
        TIR kernels or FlashInfer's; they need `target`), "generic" (MLC's creation call, TVM's attention calls: before
        `DispatchKVCacheCreation`). rotary : see LlamaForCausalLM. functions : names of those to export; default all.
    """
    model = LlamaForCausalLM(config, cache=cache, target=target, rotary=rotary)
    model.to(dtype)
    cache_type = nn.spec.Object(object_type=PagedKVCache if cache == "tvm_infer" else tvm_cache.PagedKVCache)
    hidden = config.hidden_size
    weights, no_weights = ({"param_mode": mode, "effect_mode": "none"} for mode in ("plain", "none"))
    sizes = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
    tensor = nn.spec.Tensor
    known: dict[str, dict[str, Any]] = {
        "embed": {"input_ids": tensor(["seq_len"], "int32"), "$": weights},
        "prefill": {"input_embed": tensor([1, "seq_len", hidden], dtype), "kv_cache": cache_type, "$": weights},
        "decode": {"input_embed": tensor([1, 1, hidden], dtype), "kv_cache": cache_type, "$": weights},
        "batch_prefill": {
            "input_embeds": tensor([1, "seq_len", hidden], dtype),
            "logit_positions": tensor(["num_logits"], "int32"),
            "kv_cache": cache_type,
            "$": weights,
        },
        "batch_decode": {
            "input_embeds": tensor(["batch_size", 1, hidden], dtype),
            "kv_cache": cache_type,
            "$": weights,
        },
        "create_paged_kv_cache": {**dict.fromkeys(sizes, int), "$": no_weights},
        "main": {
            "input_ids": tensor([1, "seq_len"], "int64"),
            "logit_indices": tensor(["num_logits"], "int64"),
            "kv_cache": cache_type,
            "$": weights,
        },
    }
    unknown = [name for name in functions or () if name not in known]
    if unknown:
        raise errors.ArgumentError(f"argument `functions` has {unknown}; the model has {', '.join(known)}")
    chosen = {name: spec for name, spec in known.items() if functions is None or name in functions}
    mod, params = model.export_tvm(nn.spec.ModuleSpec.from_raw(chosen, model))[:2]
    described = tuple((name, tuple(int(d) for d in p.shape), str(p.dtype)) for name, p in params)
    return ExportedLlama(mod, described, tuple(getattr(model, "extern_mods", ())))


def fuse_weights(config: LlamaConfig, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights under this model's names from Hugging Face's (those of a `models.LanguageModel`): q, k, v and gate, up stacked."""
    fused = {name: weights[name] for name in ("model.embed_tokens.weight", "model.norm.weight")}
    if not config.tie_word_embeddings:
        fused["lm_head.weight"] = weights["lm_head.weight"]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj", "mlp.down_proj"):
            fused[f"{layer}{name}.weight"] = weights[f"{layer}{name}.weight"]
        for name, parts in (("self_attn.qkv_proj", ("q", "k", "v")), ("mlp.gate_up_proj", ("gate", "up"))):
            folder = layer + name.split(".")[0]
            stacked = [weights[f"{folder}.{part}_proj.weight"] for part in parts]
            fused[f"{layer}{name}.weight"] = np.concatenate(stacked)
    return fused

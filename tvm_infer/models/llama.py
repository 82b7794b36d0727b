"""What tvm_infer knows of a Llama-like model: its sizes and its weights' names, those of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import errors


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-like decoder. `eos_token_id` ends a text; `max_position` is the context it was trained for."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    max_position: int
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight; matrices are [n, k], applied as x @ w.T."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        qo, kv = self.num_qo_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for i in range(self.num_layers):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "input_layernorm.weight": (hidden,),
                layer + "self_attn.q_proj.weight": (qo, hidden),
                layer + "self_attn.k_proj.weight": (kv, hidden),
                layer + "self_attn.v_proj.weight": (kv, hidden),
                layer + "self_attn.o_proj.weight": (hidden, qo),
                layer + "post_attention_layernorm.weight": (hidden,),
                layer + "mlp.gate_proj.weight": (ffn, hidden),
                layer + "mlp.up_proj.weight": (ffn, hidden),
                layer + "mlp.down_proj.weight": (hidden, ffn),
            }
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_qo_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    max_position=8192,
    tie_word_embeddings=False,
    bos_token_id=128000,
    eos_token_id=128001,
)


def to_hf(config: LlamaConfig, weights: Mapping[str, np.ndarray]) -> Any:
    """A `transformers.LlamaForCausalLM` in evaluation mode that shares the memory of `weights`, and has their type."""
    try:
        import torch
        from transformers import LlamaConfig as HfConfig
        from transformers import LlamaForCausalLM
    except ImportError as e:
        raise errors.MissingDependencyError(
            f"building a transformers model needs torch and transformers ({e}): pip install 'tvm_infer[llm]'"
        ) from e
    sizes: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_qo_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "attn_implementation": "sdpa",
    }
    hf_config = HfConfig(**sizes)
    # On the meta device nothing is allocated or initialised: the weights come in by assignment.
    with torch.device("meta"):
        model = LlamaForCausalLM(hf_config)
    state = {name: _to_torch(torch, array) for name, array in weights.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise errors.ModelError(f"weights are missing: {', '.join(missing[:4])} ({len(missing)} in all)")
    return model.eval()


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    """The same memory; torch does not know numpy's bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)

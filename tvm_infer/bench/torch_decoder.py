"""A Llama-like decoder by torch with random weights, but for its attention, which a caller brings: what is timed is a model's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..models.llama import LlamaConfig


class TorchDecoder:
    """RMS norms, projections, SwiGLU: N(0, 1 / k) for a matrix [n, k], so that activations keep their size; norms of ones."""

    def __init__(self, config: LlamaConfig, device: str, dtype: str) -> None:
        import torch

        self.config, self._place = config, {"device": device, "dtype": getattr(torch, dtype)}
        hidden, ffn = config.hidden_size, config.intermediate_size
        heads = config.num_qo_heads * config.head_dim
        qkv = heads + 2 * config.num_kv_heads * config.head_dim
        shapes = ((qkv, hidden), (hidden, heads), (2 * ffn, hidden), (hidden, ffn))
        self.layers = [tuple(self.weight(*shape) for shape in shapes) for _ in range(config.num_layers)]
        self._norm = torch.ones(hidden, **self._place)

    def weight(self, n: int, k: int, std: float | None = None) -> Any:
        """[n, k], N(0, std²); std: k ** -0.5 if None."""
        import torch

        return torch.empty((n, k), **self._place).normal_(0.0, k**-0.5 if std is None else std)

    def norm(self, x: Any) -> Any:
        """The RMS norm of rows."""
        from torch.nn import functional as f

        return f.rms_norm(x, (self.config.hidden_size,), self._norm, self.config.rms_norm_eps)

    def __call__(self, x: Any, attend: Callable[[int, Any], Any]) -> Any:
        """Rows [rows, hidden] through all layers. attend(layer, qkv [rows, query + 2 * KV heads, head_dim]) -> [rows, query heads,
        head_dim]."""
        from torch.nn import functional as f

        for number, (qkv, out, gate_up, down) in enumerate(self.layers):
            heads = f.linear(self.norm(x), qkv).unflatten(-1, (-1, self.config.head_dim))
            x = x + f.linear(attend(number, heads).flatten(1), out)
            gate, up = f.linear(self.norm(x), gate_up).chunk(2, -1)
            x = x + f.linear(f.silu(gate) * up, down)
        return x

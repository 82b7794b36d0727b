"""Attention variants of the benchmark: how each is bound to random parameters, and what it does in plain torch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .peers import Skipped
from .workloads import Workload

SOFT_CAP = 30.0


class Effect:
    """What a variant does to one request; plain attention unless a method is replaced.

    tokens : int64 [n], index of each query in the request's. keys : int64 [kv_len]. heads : of queries. position : of queries.
    """

    def __init__(self, batch: Any, request: int) -> None:
        self.batch, self.request = batch, request

    def turned(self, x: Any, positions: Any) -> Any:
        """Queries or keys as they enter the product; x : float64 [..., head_dim], positions broadcast with the axes before the last."""
        return x

    def logits(self, scores: Any, heads: Any, position: Any, keys: Any) -> Any:
        """The variant's logits; scores : float64 [n, kv_heads, group, kv_len]."""
        return scores

    def hidden(self, tokens: Any, keys: Any) -> Any:
        """bool [n, kv_len]: what the variant's mask hides, besides what Workload.sees says."""
        import torch

        return torch.zeros((len(tokens), len(keys)), dtype=torch.bool, device=keys.device)

    def output(self, o: Any, lse: Any, heads: Any) -> Any:
        """The variant's output; o : [n, kv_heads, group, head_dim]."""
        return o


class _SoftCap(Effect):
    def logits(self, scores: Any, heads: Any, position: Any, keys: Any) -> Any:
        import torch

        return SOFT_CAP * torch.tanh(scores / SOFT_CAP)


class _Alibi(Effect):
    def logits(self, scores: Any, heads: Any, position: Any, keys: Any) -> Any:
        return scores + self.batch.variant.tables[0].double()[heads] * (keys - position)


class _Sink(Effect):
    def output(self, o: Any, lse: Any, heads: Any) -> Any:
        import torch

        return o * torch.sigmoid(lse - self.batch.variant.tables[0].double()[heads])


class _Rope(Effect):
    def turned(self, x: Any, positions: Any) -> Any:
        import torch

        angle = positions.double()[..., None] * self.batch.variant.tables[0].double()
        cos, sin = angle.cos(), angle.sin()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _Tree(Effect):
    def hidden(self, tokens: Any, keys: Any) -> Any:
        import torch

        n, m = self.batch.workload.qo_lens[self.request], self.batch.workload.kv_lens[self.request]
        seen = torch.ones((n, m), dtype=torch.bool, device=keys.device)
        seen[:, m - n :] = _ancestors(n).to(keys.device)
        return ~seen[tokens]


def _ancestors(num_nodes: int) -> Any:
    """bool [num_nodes, num_nodes]: node i sees node j. A binary tree: i's parent is (i - 1) // 2."""
    import torch

    seen = torch.eye(num_nodes, dtype=torch.bool)
    for node in range(1, num_nodes):
        seen[node] |= seen[(node - 1) // 2]
    return seen


def _slopes(workload: Workload, device: Any) -> Any:
    import torch

    steps = torch.arange(1, workload.num_qo_heads + 1, device=device, dtype=torch.float32)
    return torch.exp2(-8.0 * steps / workload.num_qo_heads)


def _bind_tree(workload: Workload, device: Any) -> Any:
    import numpy as np
    import torch

    from ..variant import causal, tree_mask

    bits = [np.packbits(_ancestors(n).numpy().reshape(-1), bitorder="little") for n in workload.qo_lens]
    first = np.cumsum([0, *(8 * len(b) for b in bits)])[:-1].astype(np.int32)
    return (tree_mask & causal).bind(
        bits=torch.from_numpy(np.concatenate(bits)).to(device), first_bit=torch.from_numpy(first).to(device)
    )


def _bind_soft_cap(workload: Workload, device: Any) -> Any:
    from ..variant import soft_cap

    return soft_cap.bind(cap=SOFT_CAP)


def _bind_alibi(workload: Workload, device: Any) -> Any:
    from ..variant import alibi

    return alibi.bind(slopes=_slopes(workload, device))


def _bind_sink(workload: Workload, device: Any) -> Any:
    from ..variant import attention_sink

    return attention_sink.bind(sink=4.0 * _slopes(workload, device))


def _bind_sinks(workload: Workload, device: Any) -> Any:
    from ..variant import sink_window

    return sink_window.bind(sink=workload.num_sink, window=workload.window)


def _bind_chunks(workload: Workload, device: Any) -> Any:
    from ..variant import chunked_local

    return chunked_local.bind(chunk=workload.chunk)


def _bind_rope(workload: Workload, device: Any) -> Any:
    import torch

    from ..rope import RopeConfig
    from ..variant import rope

    inv_freq = RopeConfig(workload.head_dim, theta=500000.0).inv_freq()
    return rope.bind(inv_freq=torch.from_numpy(inv_freq).to(device), magnitude=1.0)


@dataclass(frozen=True)
class FlexMods:
    """What FlexAttention is given. score : its score_mod. mask : (q_idx, kv_idx) -> bool, besides what Workload.sees says."""

    score: Any = None
    mask: Any = None


def _flex_soft_cap(batch: Any) -> FlexMods:
    import torch

    return FlexMods(score=lambda score, b, h, q, kv: SOFT_CAP * torch.tanh(score / SOFT_CAP))


def _history(batch: Any) -> int:
    """Keys before the first query; of all requests alike, since FlexAttention is given dense batches."""
    return int(batch.workload.kv_lens[0] - batch.workload.qo_lens[0])


def _flex_alibi(batch: Any) -> FlexMods:
    slopes, history = batch.variant.tables[0], _history(batch)
    return FlexMods(score=lambda score, b, h, q, kv: score + slopes[h] * (kv - q - history))


def _flex_tree(batch: Any) -> FlexMods:
    seen, history = _ancestors(batch.workload.qo_lens[0]).to(batch.q.device), _history(batch)
    return FlexMods(mask=lambda q, kv: (kv < history) | seen[q, (kv - history).clamp(min=0)])


@dataclass(frozen=True)
class _Row:
    bind: Callable[[Workload, Any], Any]
    effect: type[Effect]
    flex: Callable[[Any], FlexMods] | None = None


_ROWS = {
    "soft cap": _Row(_bind_soft_cap, _SoftCap, _flex_soft_cap),
    "ALiBi": _Row(_bind_alibi, _Alibi, _flex_alibi),
    "attention sink": _Row(_bind_sink, _Sink),
    "tree mask": _Row(_bind_tree, _Tree, _flex_tree),
    "fused RoPE": _Row(_bind_rope, _Rope),
    # of these the workload says what they hide
    "sinks": _Row(_bind_sinks, Effect, lambda batch: FlexMods()),
    "chunks": _Row(_bind_chunks, Effect, lambda batch: FlexMods()),
}
NAMES = tuple(_ROWS)


def bound(workload: Workload, device: Any) -> Any:
    """The workload's variant with its parameters, tensors on `device`; None for plain attention."""
    return _ROWS[workload.variant].bind(workload, device) if workload.variant else None


def rounds_again(workload: Workload) -> bool:
    """Whether its variant changes queries and keys, which are rounded to their type again."""
    return bool(workload.variant) and _ROWS[workload.variant].effect.turned is not Effect.turned


def effect(batch: Any, request: int) -> Effect | None:
    """What the batch's variant does to a request."""
    name = batch.workload.variant
    return _ROWS[name].effect(batch, request) if name else None


def flex(batch: Any) -> FlexMods:
    """The batch's variant as FlexAttention takes it. Raises Skipped for one that needs more than its logits and mask."""
    name = batch.workload.variant
    if not name:
        return FlexMods()
    make = _ROWS[name].flex
    if make is None:
        raise Skipped("FlexAttention has no hole for the output, nor for queries and keys")
    return make(batch)

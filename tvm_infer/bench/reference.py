"""What a device batch should give, in float64 on the same device, and how far a result is from it.

Every token of short requests, a sample of long ones: the whole of a prefill of 16384 tokens in float64 would take longer than the
benchmark. Work goes by request and by a few KV heads at a time, so that a request of 65536 keys takes a few hundred MB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import variants
from .inputs import DeviceBatch
from .workloads import Workload

SAMPLED_TOKENS = 12  # of a longer request: the first two, the last two, the others at random
_CHUNK_BYTES = 256 << 20  # of float64 keys, values and scores at a time

# ‖o − ref‖ / ‖ref‖ that rounding of inputs' dtype explains, with room; beyond it a kernel is wrong, not fast. Ours is held to what the
# GPU tests hold it to; peers, which may round where we do not, to three times that.
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 1e-5}
PEER_TOLERANCE = {dtype: 3 * limit for dtype, limit in TOLERANCE.items()}
LSE_TOLERANCE = 2e-3  # absolute; natural logarithm
_ROUNDED_LSE_TOLERANCE = 1e-2  # where queries and keys are rounded once more after they were changed


def lse_tolerance(workload: Workload) -> float:
    """What the LSE may be off by."""
    return _ROUNDED_LSE_TOLERANCE if variants.rounds_again(workload) else LSE_TOLERANCE


@dataclass(frozen=True)
class Reference:
    """tokens : int64 [n], which rows of the batch. o : float64 [n, num_qo_heads, head_dim_vo]. lse : float64 [n, num_qo_heads]."""

    tokens: Any
    o: Any
    lse: Any

    def error(self, out: Any) -> float:
        """‖out − o‖ / ‖o‖ over the sampled rows; infinite where any row of `out` is not finite."""
        import torch

        if out.shape[1:] != self.o.shape[1:] or not bool(torch.isfinite(out).all()):
            return math.inf
        return float((out[self.tokens].double() - self.o).norm() / self.o.norm())

    def lse_error(self, lse: Any) -> float:
        """max |lse − reference| over the sampled rows; infinite where any is not finite."""
        import torch

        if not bool(torch.isfinite(lse).all()):
            return math.inf
        return float((lse[self.tokens].double() - self.lse).abs().max())


def _sample(num_tokens: int, device: Any) -> Any:
    import torch

    tokens = torch.arange(num_tokens, device=device)
    if num_tokens <= SAMPLED_TOKENS:
        return tokens
    generator = torch.Generator(device=device).manual_seed(num_tokens)
    some = torch.randint(num_tokens, (SAMPLED_TOKENS - 4,), device=device, generator=generator)
    return torch.unique(torch.cat([tokens[:2], some, tokens[-2:]]))


def _request(batch: DeviceBatch, request: int, tokens: Any, q: Any) -> tuple[Any, Any]:
    """(o, lse) of `tokens` of a request; q: [n, num_qo_heads, head_dim]."""
    import torch

    w = batch.workload
    n, m = w.qo_lens[request], w.kv_lens[request]
    group = w.num_qo_heads // w.num_kv_heads
    k, v = batch.dense(request)
    keys = torch.arange(m, device=q.device)
    position = (tokens + (m - n))[:, None]
    hidden = ~w.sees(position, keys)  # [n, kv_len]
    variant = variants.effect(batch, request)
    q, turn_keys = q.double(), None
    if variant is not None:
        hidden |= variant.hidden(tokens, keys)
        q, turn_keys = variant.turned(q, position), variant.turned
    selected = batch.selects(request) if w.selected[0] else None
    grouped = q.view(len(tokens), w.num_kv_heads, group, w.head_dim)
    heads = max(1, _CHUNK_BYTES // (8 * m * (2 * w.head_dim + 2 * len(tokens) * group)))
    o, lse = [], []
    for h in range(0, w.num_kv_heads, heads):
        part = slice(h, h + heads)
        part_keys = k[part].double() if turn_keys is None else turn_keys(k[part].double(), keys)
        scores = torch.einsum("thgd,hkd->thgk", grouped[:, part], part_keys) * batch.sm_scale
        query_heads = torch.arange(w.num_qo_heads, device=q.device).view(-1, group)[part]
        if variant is not None:
            scores = variant.logits(scores, query_heads[None, :, :, None], position[:, None, None], keys)
        scores.masked_fill_(hidden[:, None, None], -math.inf)
        if sum(w.streaming):
            scores[:, h % 2 :: 2].masked_fill_(~w.streams(keys, m), -math.inf)
        if selected is not None:
            scores.masked_fill_(~selected[None, part, None], -math.inf)
        lse.append(torch.logsumexp(scores, -1))
        o.append(torch.einsum("thgk,hkd->thgd", torch.exp(scores - lse[-1][..., None]), v[part].double()))
        if variant is not None:
            o[-1] = variant.output(o[-1], lse[-1][..., None], query_heads[None, :, :, None])
    shape = (len(tokens), w.num_qo_heads)
    return torch.cat(o, 1).reshape(*shape, w.width_vo), torch.cat(lse, 1).reshape(shape)


def reference(batch: DeviceBatch) -> Reference:
    """The float64 result of the batch's sampled tokens."""
    import torch

    tokens, parts, first = [], [], 0
    for r, num_tokens in enumerate(batch.workload.qo_lens):
        sampled = _sample(num_tokens, batch.q.device)
        parts.append(_request(batch, r, sampled, batch.q[first + sampled]))
        tokens.append(first + sampled)
        first += num_tokens
    return Reference(torch.cat(tokens), torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts]))

"""Small decoders in plain torch, whose attention is written as the models that they are named for write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, WIDTH, HEADS, KV_HEADS, DIM = 67, 40, 4, 2, 16
WINDOW = 6  # keys that a query sees, its own among them

INV_FREQ = torch.tensor([2.0**-k for k in range(DIM // 2)])  # exact in any precision


def repeat_kv(x, group):
    """[1, kv_heads, n, d] -> [1, kv_heads * group, n, d]."""
    _, heads, n, d = x.shape
    return x[:, :, None].expand(1, heads, group, n, d).reshape(1, heads * group, n, d)


def rotate(x, position_ids):
    """Rotary positions of x [1, heads, n, d]."""
    half = x.shape[-1] // 2
    angle = position_ids[0, :, None].to(torch.promote_types(x.dtype, torch.float32)) * INV_FREQ
    cos, sin = (torch.cat([turn] * 2, -1).to(x.dtype) for turn in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Attention(nn.Module):
    """q, k, v of a layer; subclasses say what the scores become. Layers of even number are local, if a model alternates."""

    rotary = True

    def __init__(self, layer):
        super().__init__()
        self.is_local = layer % 2 == 0
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, x, position_ids):
        q, k, v = (
            self.qkv(x).view(1, -1, HEADS + 2 * KV_HEADS, DIM).transpose(1, 2).split([HEADS, KV_HEADS, KV_HEADS], 1)
        )
        if self.rotary:
            q, k = rotate(q, position_ids), rotate(k, position_ids)
        k, v = repeat_kv(k, HEADS // KV_HEADS), repeat_kv(v, HEADS // KV_HEADS)
        o = self.attend(q, k, v, position_ids)
        return self.out(o.transpose(1, 2).reshape(1, -1, HEADS * DIM))


def causal_bias(n, dtype, window=None):
    """[n, n]: the lowest number where a key is hidden, else 0."""
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    if window is not None:
        hidden = hidden | torch.ones(n, n, dtype=torch.bool).tril(-window)
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(n, n, dtype=dtype).masked_fill(hidden, lowest)


class Gemma2(Attention):
    """Scores of query_pre_attn_scalar, capped, with a sliding window in every other layer; additive mask; softmax in float32."""

    def attend(self, q, k, v, position_ids):
        scores = q @ k.transpose(2, 3) * 24**-0.5
        scores = torch.tanh(scores / 5.0) * 5.0
        scores = scores + causal_bias(q.shape[2], q.dtype, WINDOW if self.is_local else None)
        return F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


class Bloom(Attention):
    """ALiBi: slopes (a buffer) times the key's position, before the scores; no other positions."""

    rotary = False

    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("slopes", torch.tensor([2.0 ** (-8.0 / HEADS * (head + 1)) for head in range(HEADS)]))

    def attend(self, q, k, v, position_ids):
        n = q.shape[2]
        alibi = self.slopes[:, None, None] * torch.arange(n)[None, None, :].to(q.dtype)  # [heads, 1, n]
        scores = alibi + (1.0 / math.sqrt(DIM)) * (q @ k.transpose(2, 3))
        hidden = torch.arange(n)[:, None] < torch.arange(n)[None]
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


class MPT(Attention):
    """ALiBi counted from the last key backwards, with slopes that are weights; scores scaled after the sum, and a cast."""

    rotary = False

    def __init__(self, layer):
        super().__init__(layer)
        self.slopes = nn.Parameter(torch.rand(1, HEADS, 1, 1))

    def attend(self, q, k, v, position_ids):
        n = q.shape[2]
        distance = torch.arange(1 - n, 1).view(1, 1, 1, n)
        scores = (q @ k.transpose(2, 3) + distance * self.slopes * 4.0) * 0.25
        return (scores + causal_bias(n, q.dtype)).softmax(-1) @ v


class GptOss(Attention):
    """A learned sink per head that takes part in the softmax, and a sliding window in every other layer."""

    def __init__(self, layer):
        super().__init__(layer)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def attend(self, q, k, v, position_ids):
        scores = q @ k.transpose(2, 3) * DIM**-0.5
        scores = scores + causal_bias(q.shape[2], q.dtype, WINDOW if self.is_local else None)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], -1)
        combined = torch.cat([scores, sinks], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        return F.softmax(combined, dim=-1)[..., :-1] @ v


class Mistral(Attention):
    """A sliding window, by the positions that the model is given."""

    def attend(self, q, k, v, position_ids):
        distance = position_ids[:, None, :, None] - position_ids[:, None, None, :]
        mask = (distance >= 0) & (distance < WINDOW)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Relative(Attention):
    """A learned bias for each head and distance, the same from 7 on."""

    rotary = False

    def __init__(self, layer):
        super().__init__(layer)
        self.bias = nn.Embedding(8, HEADS)

    def attend(self, q, k, v, position_ids):
        positions = torch.arange(q.shape[2])
        distance = torch.clamp(positions[:, None] - positions[None, :], min=0, max=7)
        scores = q @ k.transpose(2, 3) + self.bias(distance).permute(2, 0, 1)[None]
        return (scores + causal_bias(q.shape[2], q.dtype)).softmax(-1) @ v


class Kerple(Attention):
    """A penalty of the logarithm of the distance (arXiv 2205.09921), by weights per head, of hidden keys no number; a mask that is
    subtracted as a large number."""

    rotary = False

    def __init__(self, layer):
        super().__init__(layer)
        self.strength, self.rate = nn.Parameter(torch.rand(HEADS, 1, 1)), nn.Parameter(torch.rand(HEADS, 1, 1))

    def attend(self, q, k, v, position_ids):
        positions = torch.arange(q.shape[2])
        distance = torch.abs(positions[:, None] - positions[None, :]).to(q.dtype)
        bias = -self.strength * torch.log(1.0 + self.rate * distance)
        keep = (positions[None, :] <= positions[:, None]).to(q.dtype)
        return (q @ k.transpose(2, 3) * 0.25 + bias - (1.0 - keep) * 1e9).softmax(-1) @ v


class Chunked(Attention):
    """Attention inside of chunks of 7 positions (Llama 4) in every other layer."""

    def attend(self, q, k, v, position_ids):
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
        mask = (i // 7 == j // 7) & (j <= i) if self.is_local else j <= i
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Blocks(Attention):
    """A table of booleans says which blocks of 4 keys a block of 4 queries sees besides its own."""

    def __init__(self, layer):
        super().__init__(layer)
        self.register_buffer("layout", torch.rand(32, 32, generator=torch.Generator().manual_seed(layer)) < 0.4)

    def attend(self, q, k, v, position_ids):
        block = torch.arange(q.shape[2]) // 4
        chosen = self.layout[block[:, None], block[None, :]] | (block[:, None] == block[None, :])
        scores = (q @ k.transpose(2, 3) * 0.25).masked_fill(~chosen, float("-inf"))
        return (scores + causal_bias(q.shape[2], q.dtype)).softmax(-1) @ v


MODELS = (Gemma2, Bloom, MPT, GptOss, Mistral, Relative, Kerple, Chunked, Blocks)


def norm(x):
    """To a root mean square of 1, computed in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class Decoder(nn.Module):
    """Token embedding, layers of one attention each, a head."""

    def __init__(self, attention, layers=2):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(attention(layer) for layer in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, position_ids):
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = x + layer(norm(x), position_ids)
        return self.head(norm(x))


def decoder(attention, *, seed=0, layers=2):
    """With weights large enough that it matters who attends to whom."""
    torch.manual_seed(seed)
    model = Decoder(attention, layers).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.qkv.weight.mul_(4)
    return model


def exported(model):
    """As a torch.export program of packed tokens."""
    n = torch.export.Dim("n", min=2, max=512)
    inputs = (torch.zeros(1, 7, dtype=torch.int64), torch.arange(7)[None])
    # torch 2.11 guards min(64 n, 128 n) = 64 n otherwise, and finds that not to hold
    return torch.export.export(
        model, inputs, dynamic_shapes=({1: n}, {1: n}), prefer_deferred_runtime_asserts_over_guards=True
    )


def logits64(model, tokens):
    """[len(tokens), VOCABULARY] of the model in float64, alone with one sequence."""
    dtype = torch.get_default_dtype()
    model = model.double()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            return model(ids, torch.arange(len(tokens))[None])[0].numpy()
    finally:
        torch.set_default_dtype(dtype)
        model.float()

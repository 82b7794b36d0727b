"""The variants that models use most, each a few lines: also examples of how to write one.

All but `full`, `two_sided_window`, `custom_mask` and `tree_mask` are causal by themselves. They combine: ``soft_cap & sliding_window``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .expression import Expr
from .functions import maximum, sigmoid, sqrt, tanh, where
from .parameters import Parameter, per_channel, per_head, per_pair, per_request, scalar, tensor
from .table import Table
from .variant import Variant


def _causal(q_pos: Expr, kv_pos: Expr) -> Expr:
    return kv_pos <= q_pos


def _bit(bits: Table, number: Expr) -> Expr:
    """Bit `number` of packed bytes, the lowest of a byte first, as numpy.packbits(bitorder="little") has them."""
    return (bits[number >> 3] >> (number & 7)) & 1 != 0


# Every query sees every key.
full = Variant("full")

# A query sees its own key and those before it.
causal = Variant("causal", mask=_causal)

# Causal, and of the keys before its own the last `window` only (Mistral: window - 1 here is its sliding_window).
sliding_window = Variant(
    "sliding_window",
    mask=lambda q_pos, kv_pos, window: (kv_pos <= q_pos) & (q_pos - kv_pos <= window),
    window=scalar("int32"),
)

# The last `left` keys before a query's own, and the first `right` after it.
two_sided_window = Variant(
    "two_sided_window",
    mask=lambda q_pos, kv_pos, left, right: (q_pos - kv_pos <= left) & (kv_pos - q_pos <= right),
    left=scalar("int32"),
    right=scalar("int32"),
)

# Causal within chunks of `chunk` positions (Llama 4).
chunked_local = Variant(
    "chunked_local",
    mask=lambda q_pos, kv_pos, chunk: (q_pos // chunk == kv_pos // chunk) & (kv_pos <= q_pos),
    chunk=scalar("int32"),
)

# Logits bent into (-cap, cap) (Gemma 2); causal.
soft_cap = Variant("soft_cap", logits=lambda value, cap: cap * tanh(value / cap), mask=_causal, cap=scalar())

# A penalty that grows with the distance, by a slope per head (Press et al., arXiv 2108.12409); causal.
alibi = Variant(
    "alibi",
    logits=lambda value, q_pos, kv_pos, slopes: value + slopes * (kv_pos - q_pos),
    mask=_causal,
    slopes=per_head(),
)

# A learned logit per head that takes part in the softmax and has no value (GPT-OSS): it takes its share of the output; causal.
attention_sink = Variant(
    "attention_sink", output=lambda value, lse, sink: value * sigmoid(lse - sink), mask=_causal, sink=per_head()
)

# The first `sink` keys and the last `window` before a query's own (StreamingLLM, arXiv 2309.17453); causal.
sink_window = Variant(
    "sink_window",
    mask=lambda q_pos, kv_pos, sink, window: ((kv_pos < sink) | (q_pos - kv_pos <= window)) & (kv_pos <= q_pos),
    sink=scalar("int32"),
    window=scalar("int32"),
)

# A bit for every query and key. Request r's matrix [q_len, kv_len] starts at bit first_bit[r] of `bits`; fewer than 2^31 bits.
custom_mask = Variant(
    "custom_mask",
    mask=lambda batch, q_pos, kv_pos, q_len, kv_len, bits, first_bit: _bit(
        bits, first_bit + (q_pos - (kv_len - q_len)) * kv_len + kv_pos
    ),
    bits=tensor(1, "uint8"),
    first_bit=per_request("int32"),
)


def _tree(q_pos: Expr, kv_pos: Expr, q_len: Expr, kv_len: Expr, bits: Table, first_bit: Expr) -> Expr:
    context = kv_len - q_len
    draft = kv_pos - context  # the index in bits must be good for keys of the context too
    return (draft < 0) | _bit(bits, first_bit + (q_pos - context) * q_len + maximum(draft, 0))


# Verification of a tree of draft tokens, the call's queries: all see the keys before them, and of each other what request r's bit
# matrix [q_len, q_len] says (a token's ancestors and itself), which starts at bit first_bit[r] of `bits`.
tree_mask = Variant("tree_mask", mask=_tree, bits=tensor(1, "uint8"), first_bit=per_request("int32"))

# A number for every head, query of the call and key, added to the logit: bias [num_qo_heads, max q_len, max kv_len]; causal.
logit_bias = Variant(
    "logit_bias",
    logits=lambda value, qo_head, q_pos, kv_pos, q_len, kv_len, bias: (
        value + bias[qo_head, q_pos - (kv_len - q_len), kv_pos]
    ),
    mask=_causal,
    bias=tensor(3),
)

# The logistic function in place of the softmax: O = sum of sigmoid(logit + bias) * v (arXiv 2409.04431); causal.
sigmoid_attention = Variant(
    "sigmoid_attention",
    logits=lambda value, bias: sigmoid(value + bias),
    mask=_causal,
    softmax=False,
    bias=scalar(),
)

# Queries and keys over their root mean square, times learned weights (Qwen 3, OLMo 2 by head); causal. Before a rotation.
qk_norm = Variant(
    "qk_norm",
    query=lambda value, mean_square, q_weight, eps: value / sqrt(mean_square + eps) * q_weight,
    key=lambda value, mean_square, k_weight, eps: value / sqrt(mean_square + eps) * k_weight,
    mask=_causal,
    q_weight=per_channel(),
    k_weight=per_channel(),
    eps=scalar(),
)


def rotary(
    rotary_dim: int | None = None,
    interleaved: bool = False,
    *,
    position: Callable[..., Any] | None = None,
    **parameters: Parameter,
) -> Variant:
    """Rotary position embedding (arXiv 2104.09864) of queries and of keys that lie in the cache unturned, as they are read; causal.

    rotary_dim : channels that turn, None for all. interleaved : pairs are neighbours (GPT-J), else half a head apart (Llama).
    position : function of `pos`, a query's or key's position, and others; returns the one that it turns by (Variant's
    `rope_position`); None for its own. parameters : those that `position` reads, declared before the two of every rotation:
    inv_freq, radians a token by pair, and magnitude, what cosine and sine are multiplied by (yarn; 1 otherwise):
    tvm_infer.rope.RopeConfig gives both (inv_freq(), magnitude()).
    """
    declared: dict[str, Any] = {**parameters, "inv_freq": per_pair(), "magnitude": scalar()}
    return Variant(
        "rope_interleaved" if interleaved else "rope",
        query=lambda value, channel, magnitude: (
            value * (magnitude * magnitude)
            if rotary_dim is None
            else where(channel < rotary_dim, magnitude * magnitude, 1) * value
        ),
        rope_rate=lambda inv_freq: inv_freq,
        rope_position=position,
        mask=_causal,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        **declared,
    )


rope = rotary()
rope_interleaved = rotary(interleaved=True)

# Frequencies that follow the sequence's length (longrope: Phi-3): `long` above `limit` tokens, else `short`. A cache of turned keys
# cannot change them; this one can. causal.
rope_by_length = Variant(
    "rope_by_length",
    query=lambda value, magnitude: value * (magnitude * magnitude),
    rope_rate=lambda kv_len, short, long, limit: where(kv_len > limit, long, short),
    mask=_causal,
    short=per_pair(),
    long=per_pair(),
    limit=scalar("int32"),
    magnitude=scalar(),
)

# StreamingLLM as it was published: sinks and a window, turned by their places in what is seen, not in the text. causal.
streaming = sink_window & Variant(
    "rope_of_places",
    rope_rate=lambda inv_freq: inv_freq,
    rope_position=lambda pos, kv_len, sink, window: where(
        pos < sink, pos, pos - maximum(kv_len - 1 - window - sink, 0)
    ),
    inv_freq=per_pair(),
    sink=scalar("int32"),
    window=scalar("int32"),
)

STANDARD = {
    v.name: v
    for v in (
        full,
        causal,
        sliding_window,
        two_sided_window,
        chunked_local,
        soft_cap,
        alibi,
        attention_sink,
        sink_window,
        custom_mask,
        tree_mask,
        logit_bias,
        sigmoid_attention,
        qk_norm,
        rope,
        rope_interleaved,
        rope_by_length,
    )
} | {"streaming": streaming}

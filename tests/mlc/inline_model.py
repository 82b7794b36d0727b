"""The float64 model of a cache whose keys lie unturned: queries and keys turn when attention reads them."""

from __future__ import annotations

import numpy as np
from mlc_model import Driver, attend, attention_kv_cache
from test_mlc_windows import LayerWindows, SequenceWindows


def frequencies(pairs, theta=1e4):
    return theta ** -(np.arange(pairs) / pairs)


def turned(x, positions, inv_freq, interleaved=False, magnitude=1.0):
    """x [n, heads, d], whose row i stands at positions[i]; d may exceed the channels that turn."""
    angles = np.asarray(positions)[:, None, None] * inv_freq
    cos, sin, n = magnitude * np.cos(angles), magnitude * np.sin(angles), 2 * len(inv_freq)
    out = x.copy()
    first, second = (
        (np.s_[..., 0:n:2], np.s_[..., 1:n:2]) if interleaved else (np.s_[..., : n // 2], np.s_[..., n // 2 : n])
    )
    out[first] = x[first] * cos - x[second] * sin
    out[second] = x[second] * cos + x[first] * sin
    return out


class Inline:
    """Mixed into drivers. The history has keys as they came; they stand where they are in it, with the gaps that windows leave closed.

    turn : (x, positions, layer) -> x turned.
    """

    def __init__(self, *args, turn=None, rope_mode="inline", **settings):
        super().__init__(*args, rope_mode=rope_mode, **settings)
        self.turn = turn or (lambda x, positions, layer: turned(x, positions, frequencies(self.d // 2)))

    def whole(self, layer, ids, lengths, q):
        out = np.zeros_like(q)
        for seq, n, (begin, end) in zip(ids, lengths, self.rows(lengths), strict=True):
            k, v = self.history[seq][layer]
            i, j = np.arange(len(k) - n, len(k)), np.arange(len(k))
            q_turned, k_turned = self.turn(q[begin:end], i, layer), self.turn(k, j, layer)
            mask = (j[None] <= i[:, None]) & (j[None] > i[:, None] - self.window(layer))
            out[begin:end], _ = attend(q_turned, k_turned, v, self.scale, mask)
        return out

    def self_attention(self, ids, lengths, q, k, v):
        at = np.concatenate([np.arange(n) for n in lengths])
        return super().self_attention(ids, lengths, self.turn(q, at, 0), self.turn(k, at, 0), v)

    def cross_attention(self, layer, ids, lengths, q):
        o, lse = np.zeros_like(q), np.zeros(q.shape[:2])
        for seq, n, (begin, end) in zip(ids, lengths, self.rows(lengths), strict=True):
            k, v = self.history[seq][layer]
            q_turned = self.turn(q[begin:end], len(k) + np.arange(n), layer)
            k_turned = self.turn(k, np.arange(len(k)), layer)
            o[begin:end], lse[begin:end] = attend(q_turned, k_turned, v, self.scale, np.ones((n, len(k)), bool))
        return o, lse

    def window(self, layer):
        return 10**6


class InlineDriver(Inline, Driver):
    """Without windows."""


class InlineSequenceWindows(Inline, SequenceWindows):
    """In the mode "normal" as well: where sequences may have windows it is the same."""


class InlineLayerWindows(Inline, LayerWindows):
    def window(self, layer):
        return self.windows[layer]


def parts(d, layer, q, k, v):
    """Self and cross attention of a step: (o, lse) of each."""
    n, h_q, dim = q.shape
    pairs = [(d.tvm(np.full((n, h_q, dim), np.nan)), d.tvm(np.full((n, h_q), np.nan), "float32")) for _ in range(2)]
    attention_kv_cache("self_attention", d.cache, layer, d.scale, d.tvm(q), d.tvm(k), d.tvm(v), *pairs[0])
    attention_kv_cache("cross_attention", d.cache, layer, d.scale, d.tvm(q), *pairs[1])
    return pairs

"""Attention and merging in float64, straight from their definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def attention_reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    sm_scale: float,
    causal: bool = True,
    window_left: int = -1,
    logits: Callable[..., np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention of one request in float64.

    Parameters
    ----------
    q : [qo_len, num_qo_heads, head_dim]; the queries are the last qo_len of kv_len positions.
    k, v : [kv_len, num_kv_heads, head_dim]; query head h uses KV head h // (num_qo_heads / num_kv_heads). v, and o, may be narrower.
    logits : of a variant: function of the scores [qo_len, kv_len] of a query head, its number, and the positions of queries
        [qo_len, 1] and keys [1, kv_len]; returns what the softmax is of.

    Returns
    -------
    (o, lse) : float64 [qo_len, num_qo_heads, head_dim] and [qo_len, num_qo_heads], natural logarithm. A row that sees no key has
    o = 0, lse = -inf.
    """
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    qo_len, num_qo_heads, _ = q.shape
    kv_len, num_kv_heads, _ = k.shape
    group = num_qo_heads // num_kv_heads
    position = np.arange(qo_len)[:, None] + (kv_len - qo_len)
    key = np.arange(kv_len)[None, :]
    visible = np.ones((qo_len, kv_len), bool)
    if causal:
        visible &= key <= position
    if window_left >= 0:
        visible &= key >= position - window_left
    o, lse = np.zeros((qo_len, num_qo_heads, v.shape[2])), np.full(q.shape[:2], -np.inf)
    for h in range(num_qo_heads):
        s = q[:, h] @ k[:, h // group].T * sm_scale
        if logits is not None:
            s = logits(s, h, position, key)
        s = np.where(visible, s, -np.inf)
        some = visible.any(axis=1)
        m = s[some].max(axis=1, keepdims=True, initial=-np.inf)
        p = np.exp(s[some] - m)
        total = p.sum(axis=1, keepdims=True)
        o[some, h] = (p / total) @ v[:, h // group]
        lse[some, h] = (m + np.log(total))[:, 0]
    return o, lse


def merge_reference(
    o_a: np.ndarray, lse_a: np.ndarray, o_b: np.ndarray, lse_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(O, LSE) of the union of two disjoint sets of keys, float64. o : [..., head_dim], lse : [...]."""
    o_a, lse_a, o_b, lse_b = (np.asarray(x).astype(np.float64) for x in (o_a, lse_a, o_b, lse_b))
    m = np.maximum(lse_a, lse_b)
    safe = np.where(np.isneginf(m), 0.0, m)
    w_a, w_b = np.exp(lse_a - safe), np.exp(lse_b - safe)
    total = w_a + w_b
    with np.errstate(divide="ignore"):
        lse = np.log(total) + safe
    divisor = np.where(total == 0, 1.0, total)[..., None]
    return (o_a * w_a[..., None] + o_b * w_b[..., None]) / divisor, lse


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual - expected‖ / ‖expected‖ in float64; inf where `actual` holds a NaN, 0 for two empty arrays."""
    actual, expected = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    norm = np.linalg.norm(expected)
    difference = np.linalg.norm(actual - expected)
    return float(difference / norm) if norm > 0 else float(difference)


def rope_reference(
    x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray, *, interleaved: bool = False, magnitude: float = 1.0
) -> np.ndarray:
    """Rotary position embedding in float64 (equation 34 of arXiv 2104.09864).

    x : [num_tokens, num_heads, head_dim]; the first 2 * len(inv_freq) elements of a head turn. positions : [num_tokens].
    """
    out = np.asarray(x).astype(np.float64)
    pairs = len(inv_freq)
    first = np.arange(pairs) * 2 if interleaved else np.arange(pairs)
    second = first + (1 if interleaved else pairs)
    angles = np.asarray(positions, np.float64)[:, None] * np.asarray(inv_freq, np.float64)
    cos, sin = magnitude * np.cos(angles)[:, None], magnitude * np.sin(angles)[:, None]
    a, b = out[..., first], out[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out

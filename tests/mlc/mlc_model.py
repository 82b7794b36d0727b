"""A KV cache and attention in float64 by plain numpy, and a driver that gives TVM's builtins and this model the same calls."""

from __future__ import annotations

import numpy as np
import tvm
import tvm_ffi

from tvm_infer import _ffi
from tvm_infer.runtime import MLCPagedKVCache

# Largest error, relative to the largest value of the reference: float32 accumulates a few hundred products; the others round results.
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
SHAPE = {"num_layers": 2, "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16}
LIMITS = {"max_batch_size": 5, "max_total_seq_len": 160, "prefill_chunk_size": 24, "page_size": 4}


def builtin(name, *args):
    return tvm.get_global_func(f"vm.builtin.{name}")(*args)


def kv_state(name, *args):
    return builtin(f"kv_state_{name}", *args)


def attention_kv_cache(name, *args):
    return builtin(f"attention_kv_cache_{name}", *args)


def shape(values):
    return tvm_ffi.Shape([int(v) for v in values])


def rounded(x, dtype):
    """x as that dtype has it, in float64."""
    return to_numpy(to_tvm(x, dtype))


def to_tvm(x, dtype="float32", device="cpu"):
    return tvm.runtime.tensor(np.asarray(x, numpy_dtype(dtype)), tvm_ffi.device(device))


def numpy_dtype(dtype):
    if dtype != "bfloat16":
        return np.dtype(dtype)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def to_numpy(tensor):
    return tensor.numpy().astype(np.float64)


def attend(q, k, v, scale, mask):
    """q [n, h_q, d], k, v [m, h_kv, d], mask [n, m] -> o [n, h_q, d], lse [n, h_q] in base 2; rows that see nothing: 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.where(mask, np.einsum("nhd,mhd->hnm", q, k) * scale, -np.inf)
    top = np.max(scores, axis=-1, keepdims=True, initial=-1e30)
    p = np.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    o = np.einsum("hnm,mhd->nhd", p / np.where(total == 0, 1, total), v)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0] / np.log(2)
    return o, lse.T


def merged(o_a, lse_a, o_b, lse_b):
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.maximum(lse_a, lse_b)
        safe = np.where(np.isinf(top), 0, top)
        a, b = 2.0 ** (lse_a - safe), 2.0 ** (lse_b - safe)
        total = a + b
        scale = np.where(total == 0, 1, total)
        o = o_a * (a / scale)[..., None] + o_b * (b / scale)[..., None]
        return o, np.log2(total) + safe


def check(actual, expected, dtype, what):
    assert actual.shape == expected.shape, what
    infinite = np.isinf(expected)
    assert (actual[infinite] == expected[infinite]).all(), what
    size = np.abs(expected[~infinite]).max(initial=1e-3)
    error = np.abs(actual[~infinite] - expected[~infinite]).max(initial=0)
    assert error <= TOLERANCE[dtype] * size, f"{what}: off by {error}"  # a NaN fails too


class Driver:
    """Our cache behind TVM's builtins, and beside it the keys and values of every sequence in float64."""

    def __init__(self, dtype="float32", seed=0, device="cpu", **settings):
        self.dtype, self.device = dtype, device
        self.cache = MLCPagedKVCache(dtype=dtype, device=device, **{**SHAPE, **LIMITS, **settings})
        self.layers, self.h_q, self.h_kv, self.d = (
            {**SHAPE, **settings}[k] for k in ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim")
        )
        self.scale = self.d**-0.5
        self.rng = np.random.default_rng(seed)
        self.history: dict[int, np.ndarray] = {}  # id -> [num_layers, 2, length, h_kv, d]
        self._poison()

    def tvm(self, x, dtype=None):
        """x where the cache lies, of its dtype unless told."""
        return to_tvm(x, dtype or self.dtype, self.device)

    def _poison(self):
        """NaN in every slot: a key that no step stored spoils whatever reads it."""
        for layer in range(self.layers):
            pages = _ffi.func("kv_cache_pages")(self.cache.inner, layer)
            pages.copyfrom(np.full(pages.shape, np.nan, numpy_dtype(self.dtype)))

    def random(self, *dims):
        return rounded(self.rng.standard_normal(dims), self.dtype)

    # Sequences

    def length(self, seq):
        return self.history[seq].shape[2]

    def add(self, seq):
        kv_state("add_sequence", self.cache, seq)
        self.history[seq] = np.zeros((self.layers, 2, 0, self.h_kv, self.d))

    def remove(self, seq):
        kv_state("remove_sequence", self.cache, seq)
        del self.history[seq]

    def fork(self, parent, child, position=-1):
        kv_state("fork_sequence", self.cache, parent, child, position)
        end = self.length(parent) if position == -1 else position
        self.history[child] = self.history[parent][:, :, :end].copy()

    def popn(self, seq, n):
        kv_state("popn", self.cache, seq, n)
        self.history[seq] = self.history[seq][:, :, : self.length(seq) - n]

    def clear(self):
        kv_state("clear", self.cache)
        self.history = {}

    # Steps

    def begin(self, ids, lengths):
        kv_state("begin_forward", self.cache, shape(ids), shape(lengths))

    def end(self):
        kv_state("end_forward", self.cache)

    def step(self, ids, lengths, padding=0):
        """Tokens for these sequences at every layer: all are the model's. Padding rows hold NaN, and stay as they are."""
        starts = [self.length(seq) for seq in ids]
        self.begin(ids, lengths)
        expected = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)] or [[]])
        positions = attention_kv_cache("get_query_positions", self.cache)
        assert str(positions.dtype) == "int32"
        assert positions.numpy().tolist() == expected.tolist()
        n = sum(lengths)
        new = [np.empty((self.layers, 2, k, self.h_kv, self.d)) for k in lengths]
        outputs = []
        for layer in range(self.layers):
            qkv = self.random(n, self.h_q + 2 * self.h_kv, self.d)
            o = self.fused(layer, qkv, padding)
            for r, (begin, end) in enumerate(self.rows(lengths)):
                new[r][layer] = np.split(qkv[begin:end, self.h_q :], 2, axis=1)
            outputs.append((qkv[:, : self.h_q], o))
        self.end()
        for seq, kv in zip(ids, new, strict=True):
            self.history[seq] = np.concatenate([self.history[seq], kv], axis=2)
        for layer, (q, o) in enumerate(outputs):
            check(o, self.whole(layer, ids, lengths, q), self.dtype, f"layer {layer} of {ids} + {lengths}")

    def fused(self, layer, qkv, padding=0):
        n = qkv.shape[0]
        padded = np.concatenate([qkv, np.full((padding, *qkv.shape[1:]), np.nan)])
        o = self.tvm(np.full((n + padding, self.h_q, self.d), 7.0))
        attention_kv_cache("attention_with_fused_qkv", self.cache, layer, self.scale, self.tvm(padded), o)
        assert (to_numpy(o)[n:] == 7.0).all()
        return to_numpy(o)[:n]

    @staticmethod
    def rows(lengths):
        ends = np.cumsum(lengths, dtype=int)
        return [(int(e) - n, int(e)) for e, n in zip(ends, lengths, strict=True)]

    def whole(self, layer, ids, lengths, q):
        """Attention of the step's tokens, which the history holds by now, to all of their own sequence up to themselves."""
        out = np.zeros_like(q)
        for seq, n, (begin, end) in zip(ids, lengths, self.rows(lengths), strict=True):
            k, v = self.history[seq][layer]
            mask = np.arange(len(k))[None] <= np.arange(len(k) - n, len(k))[:, None]
            out[begin:end], _ = attend(q[begin:end], k, v, self.scale, mask)
        return out

    def self_attention(self, ids, lengths, q, k, v):
        o, lse = np.zeros_like(q), np.zeros(q.shape[:2])
        for begin, end in self.rows(lengths):
            rows = slice(begin, end)
            o[rows], lse[rows] = attend(q[rows], k[rows], v[rows], self.scale, np.tri(end - begin, dtype=bool))
        return o, lse

    def cross_attention(self, layer, ids, lengths, q):
        """To the sequences as the history has them."""
        o, lse = np.zeros_like(q), np.zeros(q.shape[:2])
        for seq, (begin, end) in zip(ids, self.rows(lengths), strict=True):
            k, v = self.history[seq][layer]
            mask = np.ones((end - begin, len(k)), bool)
            o[begin:end], lse[begin:end] = attend(q[begin:end], k, v, self.scale, mask)
        return o, lse

    # Looking inside

    def check_contents(self):
        """Lengths, free pages and every key and value, read back."""
        assert attention_kv_cache("get_total_sequence_length", self.cache) == sum(map(self.length, self.history))
        assert bool(attention_kv_cache("empty", self.cache)) == (not self.history)
        inner = self.cache.inner
        assert attention_kv_cache("get_num_available_pages", self.cache) == inner.num_free_pages
        assert inner.sequences == tuple(sorted(self.history))
        for seq, kv in self.history.items():
            if kv.shape[2] == 0:
                continue
            k, v = self.get(seq, 0, kv.shape[2])
            assert np.array_equal(k, kv[:, 0]) and np.array_equal(v, kv[:, 1]), f"sequence {seq}"

    def get(self, seq, begin, end):
        dims = (self.layers, end - begin, self.h_kv, self.d)
        k, v = self.tvm(np.zeros(dims)), self.tvm(np.zeros(dims))
        attention_kv_cache("debug_get_kv", self.cache, seq, begin, end, k, v)
        return to_numpy(k), to_numpy(v)

"""A KV cache in float64 numpy that stands in for PagedKVCache, and modules compiled against it."""

from __future__ import annotations

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

from tvm_infer.relax import extern_calls
from tvm_infer.testing import rope_reference

sys.path.insert(0, str(pathlib.Path(__file__).parent))

FAKE_ATTENTION = "test.relax.attention_with_kv_cache"
FAKE_ROPE_ATTENTION = "test.relax.attention_with_kv_cache_rope"


@dataclasses.dataclass
class FakeCache:
    """Keys and values per (layer, sequence), float64; `lengths` says how the packed row is cut into sequences."""

    lengths: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # (sequence id, new tokens)
    store: dict = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)  # (layer, q shape, k shape, sm_scale, causal)

    def attend(self, layer, q, k, v, sm_scale, causal, out) -> None:
        """Append k, v [n, kv_heads, d] to their sequences, write softmax(q k^T) v of every sequence to out."""
        self.calls.append((layer, q.shape, k.shape, sm_scale, bool(causal)))
        assert sum(count for _, count in self.lengths) == q.shape[0]
        result = np.full(out.shape, np.nan)
        begin = 0
        for seq, count in self.lengths:
            rows = slice(begin, begin + count)
            begin += count
            old_k, old_v = self.store.get((layer, seq), (np.empty((0, *k.shape[1:])), np.empty((0, *v.shape[1:]))))
            keys, values = np.concatenate([old_k, k[rows]]), np.concatenate([old_v, v[rows]])
            self.store[layer, seq] = (keys, values)
            group = q.shape[1] // k.shape[1]
            scores = np.einsum("ihd,jhd->hij", q[rows].astype(np.float64), np.repeat(keys, group, 1)) * sm_scale
            if causal:
                position = np.arange(count)[:, None] + len(old_k)
                scores = np.where(np.arange(len(keys))[None, :] <= position, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            result[rows] = np.einsum("hij,jhd->ihd", weights, np.repeat(values, group, 1))
        out[...] = result

    def positions(self, layer) -> np.ndarray:
        """Of the step's tokens, before the layer's keys are stored."""
        old = {seq: len(self.store.get((layer, seq), ((),))[0]) for seq, _ in self.lengths}
        return np.concatenate([old[seq] + np.arange(count) for seq, count in self.lengths])


_CACHES: dict[int, FakeCache] = {}


@tvm_ffi.register_global_func(FAKE_ATTENTION, override=True)
def _fake_attention(kv, layer, q, k, v, sm_scale, causal, out):
    q, k, v, out = (np.from_dlpack(x) for x in (q, k, v, out))
    out.flags.writeable or out.setflags(write=True)
    _CACHES[int(kv)].attend(int(layer), q, k, v, float(sm_scale), bool(causal), out)


@tvm_ffi.register_global_func(FAKE_ROPE_ATTENTION, override=True)
def _fake_rope_attention(kv, layer, q, k, v, inv_freq, interleaved, magnitude, sm_scale, causal, rotated_q, out):
    """The same after a rotation in float64."""
    q, k, v, inv_freq, rotated_q, out = (np.from_dlpack(x) for x in (q, k, v, inv_freq, rotated_q, out))
    cache = _CACHES[int(kv)]
    positions = cache.positions(int(layer))
    style = {"interleaved": bool(interleaved), "magnitude": float(magnitude)}
    q, k = (rope_reference(x.astype(np.float64), positions, inv_freq, **style) for x in (q, k))
    for written in (rotated_q, out):
        written.flags.writeable or written.setflags(write=True)
    rotated_q[...] = np.nan  # nobody reads it
    cache.attend(int(layer), q, k, v, float(sm_scale), bool(causal), out)


class Compiled:
    """A rewritten module on the CPU, with its weights, run step by step."""

    def __init__(self, mod, weights) -> None:
        self.vm = relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())
        self.weights = [tvm.runtime.tensor(weight.detach().contiguous().numpy()) for weight in weights.values()]
        self.cache = FakeCache()
        _CACHES[id(self.cache)] = self.cache

    def __call__(self, lengths, *inputs) -> np.ndarray:
        """Run one step: lengths is a list of (sequence id, new tokens), inputs are numpy arrays; returns the first output."""
        self.cache.lengths = lengths
        args = [tvm.runtime.tensor(np.ascontiguousarray(x)) for x in inputs]
        result = self.vm["main"](*args, id(self.cache), *self.weights)
        return (result if isinstance(result, tvm.runtime.Tensor) else result[0]).numpy()


@pytest.fixture
def compile_with_fake_cache(monkeypatch):
    """(pass, ImportedModel) -> Compiled, whose attention calls go to the float64 cache."""
    monkeypatch.setattr(extern_calls, "ATTENTION_WITH_KV_CACHE", FAKE_ATTENTION)
    monkeypatch.setattr(extern_calls, "ATTENTION_WITH_KV_CACHE_ROPE", FAKE_ROPE_ATTENTION)

    def build(rewrite, imported) -> Compiled:
        return Compiled(rewrite(imported.mod), imported.weights)

    return build

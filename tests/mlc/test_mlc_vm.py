"""Models as MLC writes them, compiled by TVM's own pipeline with nothing of ours, take our cache as a parameter."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from mlc_model import Driver, check, to_numpy, to_tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache

H_Q, H_KV, D = 4, 2, 16


class Layers(nn.Module):
    """Two layers of nothing but attention: the second takes the first one's output in place of its queries."""

    def fused(self, qkv: nn.Tensor, paged_kv_cache: PagedKVCache):
        first = paged_kv_cache.attention_with_fused_qkv(0, qkv, H_Q, sm_scale=D**-0.5)
        _, kv = nn.op.split(qkv, [H_Q], axis=2)
        again = nn.op.concat([first, kv], dim=2)
        return paged_kv_cache.attention_with_fused_qkv(1, again, H_Q, sm_scale=D**-0.5), paged_kv_cache

    def parts(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, paged_kv_cache: PagedKVCache):
        o_self, lse_self = paged_kv_cache.self_attention(0, q, k, v, D**-0.5)
        o_cross, lse_cross = paged_kv_cache.cross_attention(0, q, D, D**-0.5)
        o, lse = paged_kv_cache.merge_attn_output_inplace(o_self, lse_self, o_cross, lse_cross)
        return o, lse

    def positions(self, x: nn.Tensor, paged_kv_cache: PagedKVCache):
        return paged_kv_cache.get_query_positions(x.shape[1])


@pytest.fixture(scope="module")
def vm():
    cache = nn.spec.Object(object_type=PagedKVCache)
    mode = {"param_mode": "none", "effect_mode": "none"}
    q, kv = nn.spec.Tensor([1, "n", H_Q, D], "float32"), nn.spec.Tensor([1, "n", H_KV, D], "float32")
    module, _ = Layers().export_tvm(
        spec={
            "fused": {
                "qkv": nn.spec.Tensor([1, "n", H_Q + 2 * H_KV, D], "float32"),
                "paged_kv_cache": cache,
                "$": mode,
            },
            "parts": {"q": q, "k": kv, "v": kv, "paged_kv_cache": cache, "$": mode},
            "positions": {"x": nn.spec.Tensor([1, "n"], "float32"), "paged_kv_cache": cache, "$": mode},
        }
    )
    return relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())


def test_a_compiled_model_runs_on_our_cache(vm):
    d = Driver()
    d.add(0), d.add(6)
    for ids, lengths in (([0, 6], [5, 3]), ([6, 0], [1, 1]), ([6], [4])):
        n = sum(lengths)
        d.begin(ids, lengths)
        qkv = d.random(1, n, 8, 16)
        positions = vm["positions"](to_tvm(np.zeros((1, n))), d.cache).numpy()
        out, cache = vm["fused"](to_tvm(qkv), d.cache)
        d.end()
        assert positions.tolist() == [d.length(s) + i for s, k in zip(ids, lengths, strict=True) for i in range(k)]
        assert cache.same_as(d.cache.__tvm_ffi_object__())
        for seq, (begin, end) in zip(ids, d.rows(lengths), strict=True):
            new = np.stack(np.split(qkv[0, begin:end, H_Q:], 2, axis=1))[None].repeat(2, axis=0)
            d.history[seq] = np.concatenate([d.history[seq], new], axis=2)
        first = d.whole(0, ids, lengths, qkv[0, :, :H_Q])
        check(to_numpy(out)[0], d.whole(1, ids, lengths, first), "float32", f"{ids} + {lengths}")
    d.check_contents()


def test_fine_grained_attention_in_a_compiled_model(vm):
    d = Driver()
    d.add(0), d.add(6)
    d.step([0], [7])
    d.begin([6, 0], [2, 3])
    q, k, v = d.random(1, 5, 4, 16), d.random(1, 5, 2, 16), d.random(1, 5, 2, 16)
    o, _ = vm["parts"](to_tvm(q), to_tvm(k), to_tvm(v), d.cache)
    for seq, (begin, end) in zip([6, 0], d.rows([2, 3]), strict=True):
        new = np.stack([k[0, begin:end], v[0, begin:end]])[None].repeat(2, axis=0)
        d.history[seq] = np.concatenate([d.history[seq], new], axis=2)
    check(to_numpy(o)[0], d.whole(0, [6, 0], [2, 3], q[0]), "float32", "merged")

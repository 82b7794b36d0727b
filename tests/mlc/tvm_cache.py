"""TVM's own cache object on the CPU with TVM's own kernels, to be given the same calls as ours."""

from __future__ import annotations

import functools
import importlib
import json

import numpy as np
import tvm
from mlc_model import attention_kv_cache, kv_state, shape, to_numpy, to_tvm
from tvm.relax.frontend.nn.llm import kv_cache as kernels
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

tree_attn = importlib.import_module("tvm.relax.frontend.nn.llm.tree_attn")  # its package has a function of this name

H_Q, H_KV, D, LAYERS = 4, 2, 16, 2
PAGE = 16  # TVM's kernels are made for it
LIMITS = {"max_batch_size": 5, "max_total_seq_len": 640, "prefill_chunk_size": 48, "page_size": PAGE}
ROPE_MODES = {"none": 0, "normal": 1, "inline": 2}


@functools.cache
def compiled(window, rope_scaling):
    """rope_scaling : JSON of MLC's dict."""
    rope_scaling = json.loads(rope_scaling)
    made = {
        "append": kernels._kv_cache_transpose_append(H_KV, D, "float32"),
        "ragged": kernels._attention_prefill_ragged_cpu(H_KV, H_Q, D, D, "float32", rope_scaling),
        "prefill": kernels._attention_prefill_cpu(H_KV, H_Q, D, "float32", False, rope_scaling),
        "decode": kernels._attention_decode_cpu(H_KV, H_Q, D, "float32", False, rope_scaling),
        "prefill_window": kernels._attention_prefill_cpu(
            H_KV, H_Q, D, "float32", True, rope_scaling, sliding_window_size=window
        ),
        "decode_window": kernels._attention_decode_cpu(H_KV, H_Q, D, "float32", True, rope_scaling),
        "tree_paged": tree_attn.tree_attn_with_paged_kv_cache_cpu(H_KV, H_Q, D, "float32", rope_scaling),
        "tree": tree_attn.tree_attn_cpu(H_KV, H_Q, D, "float32", rope_scaling),
        "merge": kernels._merge_state_inplace_cpu("float32"),
        "rope": llama_rope_with_position_map(1e4, 1.0, D, H_Q, H_KV, "float32", {}, D),
        "copy": kernels._copy_single_page_cpu(H_KV, PAGE, D, "float32"),
        "debug": kernels._kv_cache_debug_get_kv(LAYERS, H_KV, D, "float32"),
        "compact": kernels._compact_kv_copy_cpu(H_KV, D, "float32"),
    }
    module = tvm.compile(tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in made.items()}), target="llvm")
    return {name: module[name] for name in made}


def create(
    rope_mode="none",
    attn_kinds=(0, 0),
    support_sliding_window=False,
    window=1024,
    rope_scaling=None,
    scale=1.0,
    theta=1e4,
):
    """rope_scaling, scale, theta : of rotation inline."""
    f = compiled(window, json.dumps(rope_scaling or {}))
    attention = [
        ["tirx", f[n]] for n in ("ragged", "prefill", "decode", "prefill_window", "decode_window", "tree_paged", "tree")
    ]
    limits = [*LIMITS.values(), int(support_sliding_window), window]
    return tvm.get_global_func("vm.builtin.paged_attention_kv_cache_create")(
        shape(limits), shape([0, LAYERS]), H_Q, H_KV, D, D, shape(attn_kinds), False, ROPE_MODES[rope_mode], scale, theta, 0,
        to_tvm(np.zeros(())), f["append"], None, *attention, [], [f["merge"]], f["rope"], f["copy"], f["debug"], f["compact"],
    )  # fmt: skip


class Both:
    """Calls on our cache and on TVM's; what they return must be the same.

    reads_garbage : TVM's kernel for past keys behind a window begins with a maximum that nobody has set where the first key is hidden,
        which makes rows NaN, or not, as the memory was; they are left out.
    """

    def __init__(self, ours, tvms, *, reads_garbage=False):
        self.caches, self.reads_garbage = (ours, tvms), reads_garbage
        self.rng = np.random.default_rng(0)

    def state(self, name, *args):
        for cache in self.caches:
            kv_state(name, cache, *args)

    def call(self, name, *args):
        ours, tvms = (attention_kv_cache(name, cache, *args) for cache in self.caches)
        assert ours == tvms, name
        return ours

    def step(self, ids, lengths, parents=None):
        """A step of random tokens: their outputs at every layer."""
        more = [] if parents is None else [shape(parents)]
        self.state("begin_forward", shape(ids), shape(lengths), *more)
        positions = [attention_kv_cache("get_query_positions", cache).numpy().tolist() for cache in self.caches]
        assert positions[0] == positions[1]
        for layer in range(LAYERS):
            qkv = to_tvm(self.rng.standard_normal((sum(lengths), H_Q + 2 * H_KV, D)))
            outputs = []
            for cache in self.caches:
                o = to_tvm(np.full((sum(lengths), H_Q, D), np.nan))
                attention_kv_cache("attention_with_fused_qkv", cache, layer, D**-0.5, qkv, o)
                outputs.append(to_numpy(o))
            assert np.isfinite(outputs[0]).all()
            if self.reads_garbage:
                outputs[1] = np.where(np.isnan(outputs[1]), outputs[0], outputs[1])
            assert np.abs(outputs[0] - outputs[1]).max() <= 2e-5, f"layer {layer} of {ids} + {lengths}"
        self.state("end_forward")
        self.call("get_total_sequence_length")
        return positions[0]

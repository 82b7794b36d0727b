"""A module written for TVM's or MLC's cache, dispatched onto ours: what it computes, steps and forks by TVM's own builtins."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax

from tvm_infer import blas
from tvm_infer.models import LlamaConfig
from tvm_infer.models.mlc_llama import export_llama
from tvm_infer.relax import DispatchKVCacheCreation, pipeline
from tvm_infer.runtime import MLCPagedKVCache, mlc_library

CONFIG = LlamaConfig(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_qo_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=500.0,
    rms_norm_eps=1e-5,
    max_position=512,
    tie_word_embeddings=False,
)
PROMPTS = ([5, 1, 77, 3, 9], list(range(40, 63)))


class Machine:
    """The model's functions on one virtual machine, and a cache of its own making, driven by vm.builtin.kv_state_*."""

    def __init__(self, mod, weights, support_sliding_window=0):
        target = pipeline.host_target()
        mod = pipeline.prepare_unpaged(mod, {"seq_len": 64})
        self.vm = relax.VirtualMachine(pipeline.lower_unpaged(mod, target), tvm.cpu())
        self.weights = weights
        self.kv = self.vm["create_paged_kv_cache"](
            *(tvm_ffi.Shape((n,)) for n in (4, 512, 64, 16, support_sliding_window))
        )

    def state(self, name, *arguments):
        return tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.kv, *arguments)

    def step(self, batch):
        """Logits [sequences, vocab] of (sequence, tokens)."""
        lengths = [len(tokens) for _, tokens in batch]
        flat = np.array([t for _, tokens in batch for t in tokens], np.int32)
        self.state("begin_forward", tvm_ffi.Shape([seq for seq, _ in batch]), tvm_ffi.Shape(lengths))
        rows = self.vm["embed"](tvm.runtime.tensor(flat), *self.weights)
        rows = rows._create_view((1, len(flat), CONFIG.hidden_size))
        last = tvm.runtime.tensor((np.cumsum(lengths) - 1).astype(np.int32))
        logits = self.vm["batch_prefill"](rows, last, self.kv, *self.weights)[0]
        self.state("end_forward")
        return logits.numpy()[0]


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    described = export_llama(CONFIG, rotary="model", functions=("embed",)).weights
    return [
        tvm.runtime.tensor(
            np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape).astype(np.float32) * 0.3
        )
        for _, shape, _ in described
    ]


@pytest.fixture(scope="module")
def reference(weights):
    """TVM's cache with its own kernels."""
    blas.ensure_blas()
    mlc_library.load()
    return run(Machine(export("tir"), weights))


def export(kind):
    functions = ("embed", "batch_prefill", "create_paged_kv_cache")
    return export_llama(CONFIG, cache=kind, target=pipeline.host_target(), functions=functions).mod


def run(machine):
    """Prefill, decode, a fork that goes its own way, pop and a chunk after decodes; all logits."""
    found = []
    machine.state("add_sequence", 0)
    machine.state("add_sequence", 1)
    found.append(machine.step([(0, PROMPTS[0]), (1, PROMPTS[1])]))
    found.append(machine.step([(1, [8]), (0, [2])]))
    machine.state("fork_sequence", 1, 2, -1)
    found.append(machine.step([(0, [4]), (1, [5]), (2, [6])]))
    machine.state("popn", 0, 3)
    found.append(machine.step([(0, [11, 12, 13, 14]), (2, [7])]))
    machine.state("remove_sequence", 1)
    found.append(machine.step([(2, [1]), (0, [1])]))
    return found


@pytest.mark.parametrize("kind", ["generic", "tir"])
def test_a_dispatched_module_gives_tvms_logits(kind, weights, reference):
    dispatch = DispatchKVCacheCreation(pipeline.host_target())
    machine = Machine(dispatch(export(kind)), weights)
    cache = MLCPagedKVCache.from_handle(machine.kv)
    assert (cache.inner.num_layers, cache.inner.num_kv_heads, cache.inner.page_size) == (2, 2, 16)
    for ours, theirs in zip(run(machine), reference, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
        assert np.abs(theirs).max() > 1


def run_windows(machine):
    """A text far longer than its window beside one without, decode steps and chunks; all logits."""
    machine.state("add_sequence", 0), machine.state("add_sequence", 1)
    tvm.get_global_func("vm.builtin.attention_kv_cache_enable_sliding_window_for_seq")(machine.kv, 0, 24, 5)
    found = [machine.step([(0, list(range(30, 70))), (1, PROMPTS[1])])]
    found += [machine.step([(1, [t]), (0, [t + 1])]) for t in range(20)]
    found.append(machine.step([(0, PROMPTS[0]), (1, PROMPTS[0])]))
    found.append(machine.step([(0, [8]), (1, [2])]))
    return found


def test_a_dispatched_module_with_windows_of_sequences_gives_tvms_logits(weights):
    """Which is rotated inline by either cache, by positions within the window."""
    blas.ensure_blas()
    ours = Machine(DispatchKVCacheCreation(pipeline.host_target())(export("generic")), weights, 1)
    mlc_library.load()
    theirs = run_windows(Machine(export("tir"), weights, 1))
    for mine, expected in zip(run_windows(ours), theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-4)

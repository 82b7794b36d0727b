"""A dispatched module on a GPU: TVM captures its decode step with our attention inside, and it computes what TVM's own cache does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from tvm import relax

from tvm_infer import cublas, doctor
from tvm_infer.compiler import _cuda_compiler
from tvm_infer.models import LlamaConfig
from tvm_infer.models.mlc_llama import export_llama
from tvm_infer.relax import DispatchKVCacheCreation, pipeline
from tvm_infer.runtime import mlc_library

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not doctor.gpus()[1], reason="needs a CUDA device")]

CONFIG = LlamaConfig(
    vocab_size=131,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_qo_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=500.0,
    rms_norm_eps=1e-5,
    max_position=512,
    tie_word_embeddings=False,
)
FUNCTIONS = ("embed", "batch_prefill", "batch_decode", "create_paged_kv_cache")


class Machine:
    """The model's functions on one virtual machine, and a cache of its own making, driven by vm.builtin.kv_state_*."""

    def __init__(self, kind, weights, graphs, support_sliding_window=0):
        target = pipeline.cuda_target()
        with target:
            mod = export_llama(CONFIG, dtype="bfloat16", cache=kind, target=target, functions=FUNCTIONS).mod
        if kind == "generic":
            mod = DispatchKVCacheCreation(target)(mod)
        mod = pipeline.prepare_unpaged(mod, {"seq_len": 64, "num_logits": 4, "batch_size": 4}, "cuda")
        if graphs:
            decode = mod["batch_decode"].with_attr("relax.rewrite_cuda_graph.capture_symbolic_vars", ["batch_size"])
            mod.update_func(mod.get_global_var("batch_decode"), decode)
        with _cuda_compiler():
            executable = pipeline.lower_unpaged(mod, target, use_cuda_graph=graphs)
        self.text = executable.as_text()
        self.vm = relax.VirtualMachine(executable, tvm.cuda())
        self.weights = weights
        self.kv = self.vm["create_paged_kv_cache"](
            *(tvm_ffi.Shape((n,)) for n in (4, 512, 64, 16, support_sliding_window))
        )

    def state(self, name, *arguments):
        return tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.kv, *arguments)

    def step(self, batch):
        """Logits [sequences, vocab] of (sequence, tokens); one token each is a decode step."""
        lengths = [len(tokens) for _, tokens in batch]
        flat = np.array([t for _, tokens in batch for t in tokens], np.int32)
        self.state("begin_forward", tvm_ffi.Shape([seq for seq, _ in batch]), tvm_ffi.Shape(lengths))
        rows = self.vm["embed"](tvm.runtime.tensor(flat, tvm.cuda()), *self.weights)
        if max(lengths) == 1:
            rows = rows._create_view((len(flat), 1, CONFIG.hidden_size))
            logits = self.vm["batch_decode"](rows, self.kv, *self.weights)[0]
        else:
            rows = rows._create_view((1, len(flat), CONFIG.hidden_size))
            last = tvm.runtime.tensor((np.cumsum(lengths) - 1).astype(np.int32), tvm.cuda())
            logits = self.vm["batch_prefill"](rows, last, self.kv, *self.weights)[0]
        self.state("end_forward")
        return logits.numpy().reshape(len(batch), -1)


def run(machine):
    """Prefill, decode steps of two and three sequences, a fork that goes its own way, a chunk after decodes; all logits."""
    found = []
    machine.state("add_sequence", 0), machine.state("add_sequence", 1)
    found.append(machine.step([(0, [5, 1, 77, 3, 9]), (1, list(range(40, 63)))]))
    for token in (8, 2, 90):
        found.append(machine.step([(1, [token]), (0, [token + 1])]))
    machine.state("fork_sequence", 1, 2, -1)
    for token in (4, 5, 6):
        found.append(machine.step([(0, [token]), (1, [token]), (2, [token + 7])]))
    machine.state("popn", 0, 3)
    found.append(machine.step([(0, [11, 12, 13, 14]), (2, [7])]))
    machine.state("remove_sequence", 1)
    for token in (20, 21):
        found.append(machine.step([(2, [token]), (0, [token])]))
    return found


@pytest.fixture(scope="module")
def weights():
    cublas.ensure_cublas()
    mlc_library.load()
    torch.manual_seed(0)
    described = export_llama(CONFIG, dtype="bfloat16", rotary="model", functions=("embed",)).weights
    return [
        tvm.runtime.from_dlpack(
            (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[-1] ** -0.5).cuda().bfloat16()
        )
        for _, shape, _ in described
    ]


@pytest.mark.parametrize("support_sliding_window", [0, 1], ids=["stored rotated", "rotated inline"])
def test_attention_is_captured_and_right(weights, support_sliding_window):
    graphed, eager, tvms = (
        Machine("generic", weights, True, support_sliding_window),
        Machine("generic", weights, False, support_sliding_window),
        Machine("tir", weights, False, support_sliding_window),
    )
    assert "run_or_capture" in graphed.text and "run_or_capture" not in eager.text
    for mine, plain, theirs in zip(run(graphed), run(eager), run(tvms), strict=True):
        np.testing.assert_array_equal(mine, plain)
        assert np.linalg.norm(mine - theirs) <= 2e-2 * np.linalg.norm(theirs)

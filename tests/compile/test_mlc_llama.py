"""The Llama of the nn.Module frontend, on our cache and on TVM's, beside transformers."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from llamas import hf_greedy, prompts_of, tiny_llama

import tvm_infer
from tvm_infer import blas, errors
from tvm_infer.models import LlamaConfig
from tvm_infer.models.llama import LLAMA_3_8B
from tvm_infer.models.mlc_llama import SMOLLM2_135M, LlamaForCausalLM, export_llama, fuse_weights
from tvm_infer.relax import pipeline

NEW_TOKENS = 8


def ours_of(model):
    """(sizes, fused weights) of a transformers model."""
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_hidden_layers,
        num_qo_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rope_theta=10000.0,
        rms_norm_eps=c.rms_norm_eps,
        max_position=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
    )
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return config, fuse_weights(config, weights)


@pytest.fixture(scope="module")
def untied():
    return tiny_llama(tied=False, seed=3)


@pytest.fixture(scope="module")
def answers(untied):
    prompts = prompts_of(5)
    return prompts, [hf_greedy(untied, prompt, NEW_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("rotary", ["cache", "model"])
def test_compiled_on_our_cache_it_gives_transformers_tokens(untied, answers, rotary):
    config, weights = ours_of(untied)
    functions = ("main", "create_paged_kv_cache") if rotary == "cache" else ("main",)
    exported = export_llama(config, rotary=rotary, functions=functions)
    executable = tvm_infer.compile(exported.mod, params=weights, max_tokens=64)
    assert [name for name, _ in executable.manifest.inputs] == ["input_ids", "logit_indices"]
    assert (executable.manifest.rope is not None) == (rotary == "cache")
    prompts, expected = answers
    assert [g.tokens for g in executable.generate(prompts, max_new_tokens=NEW_TOKENS)] == expected
    assert "PagedKVCache" in executable.explain()
    # of every layer: qkv, o, gate/up, down; and the head
    assert f"{4 * config.num_layers + 1} matmul(s) to tvm_infer.matmul, 0 left" in executable.explain()
    assert f"{2 * config.num_layers} of them with the addition that followed" in executable.explain()  # o, down


def test_tied_embeddings_need_no_head():
    model = tiny_llama(tied=True, seed=5, layers=1)
    config, weights = ours_of(model)
    assert "lm_head.weight" not in weights
    executable = tvm_infer.compile(
        export_llama(config, functions=("main", "create_paged_kv_cache")).mod, params=weights, max_tokens=64
    )
    (text,) = executable.generate([[5, 6, 7]], max_new_tokens=4)
    assert text.tokens == hf_greedy(model, [5, 6, 7], 4)


def test_fused_attention_without_rotary_settings_is_refused(untied):
    config, weights = ours_of(untied)
    with pytest.raises(errors.ModelError, match="export the model's create_paged_kv_cache beside it"):
        tvm_infer.compile(export_llama(config, functions=("main",)).mod, params=weights)


class Machine:
    """All of MLC's functions on one virtual machine, with a cache made by create_paged_kv_cache."""

    def __init__(self, model, cache):
        config, weights = ours_of(model)
        target = pipeline.host_target()
        blas.ensure_blas()
        exported = export_llama(config, cache=cache, target=target)
        executable = pipeline.lower_cpu(pipeline.prepare_unpaged(exported.mod, {"seq_len": 64}), target)
        self.vm = tvm.relax.VirtualMachine(executable, tvm.cpu())
        self.weights = [tvm.runtime.tensor(weights[name]) for name, _, _ in exported.weights]
        self.kv = self.vm["create_paged_kv_cache"](*(tvm_ffi.Shape([n]) for n in (4, 512, 64, 16, 0)))
        self.config = config

    def embed(self, tokens, shape):
        rows = self.vm["embed"](tvm.runtime.tensor(np.asarray(tokens, np.int32)), *self.weights)
        return rows._create_view((*shape, self.config.hidden_size))

    def tokens(self, result):
        logits = np.from_dlpack(result[0])
        assert logits.dtype == np.float32 and logits.shape[-1] == self.config.vocab_size
        return logits.reshape(-1, logits.shape[-1]).argmax(-1).tolist()


@pytest.fixture(scope="module")
def tir(untied):
    return Machine(untied, "tir")


@pytest.fixture(scope="module")
def native(untied):
    return Machine(untied, "tvm_infer")


def state(name, *arguments):
    return tvm.get_global_func(f"vm.builtin.kv_state_{name}")(*arguments)


class TvmSteps:
    """Steps of TVM's cache."""

    def __init__(self, machine):
        self.m = machine

    def add(self, seq):
        state("add_sequence", self.m.kv, seq)

    def begin(self, seqs, lengths):
        state("begin_forward", self.m.kv, tvm_ffi.Shape(seqs), tvm_ffi.Shape(lengths))

    def end(self):
        state("end_forward", self.m.kv)


class OurSteps:
    """Steps of ours: the object that the compiled creation call made."""

    def __init__(self, machine):
        self.cache = tvm_infer.PagedKVCache.from_handle(machine.kv)

    def add(self, seq):
        self.cache.add_sequence(seq)

    def begin(self, seqs, lengths):
        self.cache.begin_forward(seqs, lengths)

    def end(self):
        self.cache.end_forward()


@pytest.mark.parametrize("cache", ["tir", "native"])
def test_every_mlc_function_gives_transformers_tokens(cache, answers, request):
    """prefill and decode for one sequence, then batch_prefill and batch_decode for three, on either cache."""
    m = request.getfixturevalue(cache)
    steps = TvmSteps(m) if cache == "tir" else OurSteps(m)
    prompts, expected = answers
    steps.add(0)
    steps.begin([0], [len(prompts[0])])
    (token,) = m.tokens(m.vm["prefill"](m.embed(prompts[0], (1, len(prompts[0]))), m.kv, *m.weights))
    steps.end()
    text = [token]
    while len(text) < NEW_TOKENS:
        steps.begin([0], [1])
        text += m.tokens(m.vm["decode"](m.embed(text[-1:], (1, 1)), m.kv, *m.weights))
        steps.end()
    assert text == expected[0]

    seqs, batch = [1, 2, 3], prompts[1:4]
    for seq in seqs:
        steps.add(seq)
    lengths = [len(prompt) for prompt in batch]
    last = tvm.runtime.tensor((np.cumsum(lengths) - 1).astype(np.int32))
    steps.begin(seqs, lengths)
    embedded = m.embed([token for prompt in batch for token in prompt], (1, sum(lengths)))
    texts = [[t] for t in m.tokens(m.vm["batch_prefill"](embedded, last, m.kv, *m.weights))]
    steps.end()
    while len(texts[0]) < NEW_TOKENS:
        steps.begin(seqs, [1, 1, 1])
        following = m.tokens(m.vm["batch_decode"](m.embed([t[-1] for t in texts], (3, 1)), m.kv, *m.weights))
        steps.end()
        for text, token in zip(texts, following, strict=True):
            text.append(token)
    assert texts == expected[1:4]


def test_sizes():
    """Numbers of parameters as their makers publish them."""
    for config, count in ((LLAMA_3_8B, 8_030_261_248), (SMOLLM2_135M, 134_515_008)):
        weights = export_llama(config, functions=("embed",)).weights
        assert sum(int(np.prod(shape)) for _, shape, _ in weights) == count


def test_bad_arguments():
    with pytest.raises(errors.ArgumentError, match="rotary is \"model\" and cache is 'tir'"):
        LlamaForCausalLM(SMOLLM2_135M, cache="tir", rotary="model", target="llvm")
    with pytest.raises(errors.ArgumentError, match="cache 'tir' compiles its kernels: pass `target`"):
        LlamaForCausalLM(SMOLLM2_135M, cache="tir")
    with pytest.raises(errors.ArgumentError, match=r"`functions` has \['verify'\]; the model has embed, prefill"):
        export_llama(SMOLLM2_135M, functions=("embed", "verify"))

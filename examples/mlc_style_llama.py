"""A Llama written in TVM's nn.Module frontend, MLC style, with SmolLM2-135M-Instruct's weights: three ways to run one model.

    python examples/mlc_style_llama.py [--model FILE.gguf] [--new-tokens 32] [--compare-hf]

1. `tvm_infer.compile` takes the model's `main` (a whole step) and runs it with continuous batching.
2. MLC's functions (embed, batch_prefill, batch_decode) on our cache, made by the model's own create_paged_kv_cache.
3. The same functions on TVM's builtin paged KV cache with its TIR kernels: what changes is the class that the model takes.

All choose the same tokens; --compare-hf puts transformers beside them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click
import numpy as np
import tvm
import tvm_ffi
from rich.console import Console

import tvm_infer
from tvm_infer.models import find_smollm2, load_gguf
from tvm_infer.models.mlc_llama import export_llama, fuse_weights
from tvm_infer.relax import pipeline

QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "List three fruits and their colours.")
PAGE_SIZE = 16


class OurSequences:
    """Sequences and steps of a tvm_infer.PagedKVCache."""

    def __init__(self, handle: Any) -> None:
        self.cache = tvm_infer.PagedKVCache.from_handle(handle)

    def add(self, seq: int) -> None:
        self.cache.add_sequence(seq)

    def begin(self, seqs: Sequence[int], lengths: Sequence[int]) -> None:
        self.cache.begin_forward(seqs, lengths)

    def end(self) -> None:
        self.cache.end_forward()


class TvmSequences:
    """The same of TVM's builtin cache."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def call(self, name: str, *arguments: Any) -> None:
        tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.handle, *arguments)

    def add(self, seq: int) -> None:
        self.call("add_sequence", seq)

    def begin(self, seqs: Sequence[int], lengths: Sequence[int]) -> None:
        self.call("begin_forward", tvm_ffi.Shape(tuple(seqs)), tvm_ffi.Shape(tuple(lengths)))

    def end(self) -> None:
        self.call("end_forward")


class MlcStyle:
    """MLC's functions, driven as its engine does: one batch_prefill for the prompts, then a batch_decode for every token."""

    def __init__(self, config: Any, weights: dict[str, np.ndarray], kind: str, max_tokens: int) -> None:
        target = pipeline.host_target()
        functions = ("embed", "batch_prefill", "batch_decode", "create_paged_kv_cache")
        exported = export_llama(config, cache=kind, target=target, functions=functions)
        mod = pipeline.prepare_unpaged(exported.mod, {"seq_len": max_tokens})
        self.vm = tvm.relax.VirtualMachine(pipeline.lower_unpaged(mod, target), tvm.cpu())
        self.weights = [tvm.runtime.tensor(weights[name]) for name, _, _ in exported.weights]
        self.kind, self.config, self.max_tokens = kind, config, max_tokens

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Greedy texts."""
        batch, longest = len(prompts), max(map(len, prompts)) + new_tokens
        total = batch * (longest + PAGE_SIZE)
        sizes = (batch, total, self.max_tokens, PAGE_SIZE, 0)
        handle = self.vm["create_paged_kv_cache"](*(tvm_ffi.Shape((size,)) for size in sizes))
        sequences = OurSequences(handle) if self.kind == "tvm_infer" else TvmSequences(handle)
        seqs = list(range(batch))
        for seq in seqs:
            sequences.add(seq)
        lengths = [len(prompt) for prompt in prompts]
        rows = self._embed([token for prompt in prompts for token in prompt], (1, sum(lengths)))
        last = tvm.runtime.tensor((np.cumsum(lengths) - 1).astype(np.int32))
        sequences.begin(seqs, lengths)
        logits, _ = self.vm["batch_prefill"](rows, last, handle, *self.weights)
        sequences.end()
        texts = [[token] for token in _greedy(logits)]
        for _ in range(new_tokens - 1):
            sequences.begin(seqs, [1] * batch)
            logits, _ = self.vm["batch_decode"](self._embed([t[-1] for t in texts], (batch, 1)), handle, *self.weights)
            sequences.end()
            for text, token in zip(texts, _greedy(logits), strict=True):
                text.append(token)
        return texts

    def _embed(self, tokens: Sequence[int], shape: tuple[int, int]) -> Any:
        rows = self.vm["embed"](tvm.runtime.tensor(np.asarray(tokens, np.int32)), *self.weights)
        return rows._create_view((*shape, self.config.hidden_size))


def _greedy(logits: Any) -> list[int]:
    logits = np.from_dlpack(logits)
    return [int(token) for token in logits.reshape(-1, logits.shape[-1]).argmax(-1)]


def _hf_texts(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    import torch

    hf = model.to_hf()
    hf.generation_config.eos_token_id = None
    texts = []
    for prompt in prompts:
        with torch.inference_mode():
            out = hf.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        texts.append(out[0, len(prompt) :].tolist())
    return texts


@click.command()
@click.option("--model", "path", type=click.Path(dir_okay=False), help="a Llama's GGUF file; default: SmolLM2's")
@click.option("--new-tokens", default=32, show_default=True)
@click.option("--compare-hf", is_flag=True, help="run transformers on the same weights beside them")
def main(path: str | None, new_tokens: int, compare_hf: bool) -> None:
    """One nn.Module Llama on our cache and on TVM's."""
    console = Console()
    model = load_gguf(path or find_smollm2())
    weights = fuse_weights(model.config, model.weights)
    prompts = [model.tokenizer.encode(model.tokenizer.chat(question)) for question in QUESTIONS]
    max_tokens = max(512, sum(map(len, prompts)))

    exported = export_llama(model.config, functions=("main", "create_paged_kv_cache"))
    executable = tvm_infer.compile(exported.mod, params=weights, max_tokens=max_tokens)
    start = time.perf_counter()
    found = {"tvm_infer.compile": [g.tokens for g in executable.generate(prompts, max_new_tokens=new_tokens)]}
    times = {"tvm_infer.compile": time.perf_counter() - start}
    for kind, name in (("tvm_infer", "MLC's functions, our cache"), ("tir", "MLC's functions, TVM's cache")):
        machine = MlcStyle(model.config, weights, kind, max_tokens)
        start = time.perf_counter()
        found[name] = machine.generate(prompts, new_tokens)
        times[name] = time.perf_counter() - start
    if compare_hf:
        start = time.perf_counter()
        found["transformers, one by one"] = _hf_texts(model, prompts, new_tokens)
        times["transformers, one by one"] = time.perf_counter() - start

    for question, tokens in zip(QUESTIONS, found["tvm_infer.compile"], strict=True):
        text = model.tokenizer.decode(tokens).strip().replace("\n", " ")
        console.print(f"{question}\n    {text}", markup=False, highlight=False, soft_wrap=True)
    reference = found["tvm_infer.compile"]
    for name, texts in found.items():
        same = sum(a == b for a, b in zip(texts, reference, strict=True))
        console.print(
            f"{name}: {same} of {len(prompts)} texts the same, {times[name]:.1f} s with prompts", highlight=False
        )


if __name__ == "__main__":
    main()

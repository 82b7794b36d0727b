"""Our compiled model beside transformers on torch: same dequantised weights, same prompts, same run."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tvm_infer.models import LanguageModel
from tvm_infer.runtime import Executable, Sampler

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "List three fruits and their colours.",
    "Who wrote Romeo and Juliet, and when?",
    "Explain what a compiler does to a child.",
    "What is 12 times 12? Show how you got there.",
    "Describe a walk through an old forest in autumn, with its sounds and smells.",
]
NEW_TOKENS = 64
BATCH = 4
ROUNDS = 3  # timings alternate between the two, because a shared machine's speed drifts


class Recorder(Sampler):
    """Greedy, and remembers the logits it saw: one list for each request's stream of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[int, list[np.ndarray]] = {}

    def stream(self, request: int, sample: int) -> Any:
        self.logits[request] = []
        return self.logits[request]

    def choose(self, logits: np.ndarray, rng: Any) -> int:
        rng.append(logits.copy())
        return int(logits.argmax())


def compare(model: LanguageModel, executable: Executable, console: Console, num_threads: int | None) -> None:
    """Print speed, equality of greedy tokens, and the largest difference of logits."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    if num_threads:
        torch.set_num_threads(num_threads)
    hf = model.to_hf()
    hf.generation_config.eos_token_id = None  # every text gets all its tokens, here as there
    prompts = [model.tokenizer.encode(model.tokenizer.chat(question)) for question in QUESTIONS]
    compare_texts(executable, hf, prompts, console)
    compare_speed(executable, hf, prompts[:BATCH], console)


def compare_texts(executable: Executable, hf: Any, prompts: list[list[int]], console: Console) -> None:
    """8 prompts, at most 5 at a time: three begin, one joins every ten steps, each leaves after its 64 tokens."""
    import torch

    recorder = Recorder()
    cache = executable.new_cache(num_pages=128, max_batch=5)
    engine = executable.engine(cache)
    generations = []
    for i, prompt in enumerate(prompts):
        generations += engine.submit(prompt, max_new_tokens=NEW_TOKENS, sampler=recorder)
        if i >= 2:
            for _ in range(10):
                engine.step()
    engine.run()
    equal, worst = 0, 0.0
    for generation in generations:
        with torch.inference_mode():
            out = hf.generate(
                torch.tensor([generation.prompt]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        theirs = out.sequences[0, len(generation.prompt) :].tolist()
        same = next((i for i, (a, b) in enumerate(zip(generation.tokens, theirs, strict=True)) if a != b), NEW_TOKENS)
        equal += same == NEW_TOKENS
        # logits after a first different token belong to different texts
        steps = min(same + 1, NEW_TOKENS)
        ours = np.stack(recorder.logits[generation.request][:steps])
        worst = max(worst, float(np.abs(ours - torch.cat(out.logits[:steps]).numpy()).max()))
    console.print(
        f"greedy tokens equal to transformers': {equal} of {len(prompts)} prompts x {NEW_TOKENS} tokens, joining and leaving mid-way; "
        f"largest difference of a logit {worst:.1e}",
        soft_wrap=True,
    )


def compare_speed(executable: Executable, hf: Any, prompts: list[list[int]], console: Console) -> None:
    """Decode tokens a second at batch 4, prefill left out on both sides; medians of rounds that alternate."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(_our_speed(executable, prompts))
        theirs.append(_hf_speed(hf, prompts))
    table = Table("decode, fp32, batch 4", "tokens/s (median)", "all rounds")
    for name, speeds in (("tvm_infer", ours), ("transformers on torch", theirs)):
        table.add_row(name, f"{np.median(speeds):.0f}", ", ".join(f"{s:.0f}" for s in speeds))
    console.print(table)
    console.print(f"ratio {np.median(ours) / np.median(theirs):.2f}")


def _our_speed(executable: Executable, prompts: list[list[int]]) -> float:
    engine = executable.engine(executable.new_cache(num_pages=64))
    for prompt in prompts:
        engine.submit(prompt, max_new_tokens=NEW_TOKENS)
    engine.run()
    return engine.stats.decode_tokens_per_second


def _hf_speed(hf: Any, prompts: list[list[int]]) -> float:
    import torch

    times: list[float] = []

    def clock(input_ids: Any, scores: Any) -> Any:
        times.append(time.perf_counter())  # called once a step; the first time after the prefill
        return scores

    width = max(len(prompt) for prompt in prompts)
    pads = [width - len(prompt) for prompt in prompts]
    with torch.inference_mode():
        hf.generate(
            torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[clock],
        )
    return (len(times) - 1) * len(prompts) / (times[-1] - times[0])

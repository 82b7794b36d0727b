"""`tvm-infer bench serve`: a compiled model under load, on our cache and on TVM's, with the same weights and matrix products."""

from __future__ import annotations

import datetime
import gc
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .. import __version__, _ffi, ops
from ..doctor import package_versions
from ..errors import ArgumentError, TvmInferError
from . import peers, serve_backends, serve_decode, serve_models, serve_report
from .plot import require_matplotlib
from .serve_loop import Backend, CacheSizes, Clock, Loop, ServeRun, pages_needed
from .serve_metrics import summarize
from .serve_models import ServeModel
from .serve_workloads import Request, ServeWorkload, longest, workload

SCHEMA = 1  # of the JSON; bumped when a key changes its meaning
_WARM_UP_TOKENS = 3  # of each sample: decode steps of every batch size are run before the clock starts
_METHOD_SERVE = (
    "TTFT from a request's arrival, waiting included; ITL between consecutive tokens of a text, prompts of others in between included",
    "requests start first come, first served; prompts go in chunks beside the decodes; greedy tokens, no stop token",
    "before the clock starts: one chunk of prompt, then decode steps of 1, 2, 4, … sequences",
)
_METHOD_DECODE = (
    "ITL: host time from step to step of a full batch, tokens on the host; keys grow by one a step and are --kv in the mean",
    "every request has a prompt of its own in pages of its own",
)
MakeBackend = Callable[[str, ServeModel, CacheSizes, str], Any]


def cache_sizes(requests: Sequence[Request], max_batch: int, max_tokens: int, page_size: int) -> CacheSizes:
    """A cache that holds the longest requests of a full batch."""
    needs = sorted((pages_needed(request, page_size) for request in requests), reverse=True)
    together = max(1, max_batch // max(request.samples for request in requests))
    return CacheSizes(max_batch, max_tokens, sum(needs[:together]), page_size)


def warm_up(backend: Backend, vocab_size: int) -> int:
    """Run each kind of step once; returns a sequence number that is free."""
    sizes = backend.sizes
    room = sizes.num_pages * sizes.page_size
    length = max(2, min(sizes.max_tokens, room) // 2)
    prompt = tuple(i % vocab_size for i in range(length))
    Loop(backend, Clock()).run([Request(0.0, prompt, 1)])
    batch = 1
    first_free = 1
    while batch <= min(sizes.max_batch, sizes.max_tokens, sizes.num_pages):
        seqs = range(first_free, first_free + batch)
        for seq in seqs:
            backend.add(seq)
        for _ in range(_WARM_UP_TOKENS):
            backend.step([(seq, [seq % vocab_size]) for seq in seqs])
        for seq in seqs:
            backend.remove(seq)
        first_free += batch
        batch *= 2
    return first_free


def _breakdown(backend: Any, typical: dict[str, int] | None, vocab_size: int, first_seq: int, seed: int) -> dict[str, Any]:
    """Where a decode step of the run's median size spends its time."""
    if typical is None:
        return {"skipped": "no sample decoded a second token"}
    sizes = backend.sizes
    batch = min(typical["batch"], sizes.max_batch)
    pages = sizes.num_pages // batch
    keys = min(typical["keys"], pages * sizes.page_size - 4)  # three steps follow
    if keys < 1:
        return {"skipped": f"the cache has no room for {batch} sequences apart"}
    seqs = range(first_seq, first_seq + batch)
    try:
        tokens = serve_decode.fill(backend, seqs, keys, vocab_size, seed)
        found = backend.breakdown(lambda: backend.step([(s, [t]) for s, t in zip(seqs, tokens, strict=True)]))
    except TvmInferError as error:
        return {"skipped": f"{type(error).__name__}: {error}"}
    finally:
        for seq in seqs:
            backend.remove(seq)
    return {"batch": batch, "keys": keys, **asdict(found)}


def _serve_row(backend: Any, requests: Sequence[Request], clock: Clock, first_seq: int) -> tuple[dict[str, Any], ServeRun]:
    loop = Loop(backend, clock, first_seq=first_seq)
    run = loop.run(requests)
    return summarize(run), run


def _tokens(run: ServeRun) -> list[list[int]]:
    return [sample.tokens for record in run.records for sample in record.samples]


def _agreement(tokens: list[list[int]], reference: list[list[int]]) -> dict[str, int]:
    """Tokens before the first difference of each text, summed, and all."""
    same = 0
    for ours, theirs in zip(tokens, reference, strict=True):
        same += next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return {"same_tokens": same, "compared_tokens": sum(map(len, tokens))}


def _describe_device(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": device, "isa": _ffi.func("cpu_info")().split()[0], "threads": ops.num_threads()}
    from .cuda_device import CudaDevice

    return {"device": device, **CudaDevice().describe()}


def _describe_model(model: ServeModel) -> dict[str, Any]:
    sizes = asdict(model.config)
    return {"name": model.name, "dtype": model.dtype, "weights": model.origin, "parameters": model.num_parameters} | sizes


def _check(backends: Sequence[str], rate: float, requests: int, settings: dict[str, int]) -> None:
    for name in backends:
        if name not in serve_backends.BACKENDS:
            raise ArgumentError(
                f"argument `--backends` names {name!r}; it must be among {', '.join(serve_backends.BACKENDS)}"
            )
    if not backends:
        raise ArgumentError(f"argument `--backends` is empty; name one of {', '.join(serve_backends.BACKENDS)}")
    if not rate > 0:
        raise ArgumentError(f"argument `--rate` is {rate}; it must be above 0 requests a second (inf: all at once)")
    for flag, value in {"--requests": requests, **settings}.items():
        if value < 1:
            raise ArgumentError(f"argument `{flag}` is {value}; it must be at least 1")


def _check_folder(path: str | None, argument: str) -> None:
    folder = pathlib.Path(path).resolve().parent if path else None
    if folder is not None and not folder.is_dir():
        raise ArgumentError(f"argument `{argument}` is {path!r}, but there is no folder {folder}; make it first")


def run(
    *,
    model: str = "tiny",
    device: str = "cpu",
    dtype: str | None = None,
    backends: Sequence[str] = serve_backends.BACKENDS,
    workload_name: str = "uniform",
    prompt_lens: str | None = None,
    output_lens: str | None = None,
    samples: int | None = None,
    rate: float = 1.0,
    num_requests: int = 64,
    decode_only: bool = False,
    batches: str = "16,64",
    keys: int = 2048,
    steps: int = 32,
    max_batch: int = 64,
    max_tokens: int = 2048,
    page_size: int = 16,
    seed: int = 0,
    json_path: str | None = None,
    plot_path: str | None = None,
    make_backend: MakeBackend = serve_backends.make,
    make_clock: Callable[[], Clock] = Clock,
) -> dict[str, Any]:
    """Measure, print a table, write JSON and a plot if asked, and return the results.

    Parameters
    ----------
    model, device, dtype : serve_models.py has the names; dtype None: float32 on the CPU, bfloat16 on CUDA.
    backends : serve_backends.BACKENDS; the first that is measured is the one whose tokens the others' are compared with.
    workload_name, prompt_lens, output_lens, samples : serve_workloads.py. rate : requests a second; num_requests : of them.
    decode_only : a full batch of each of `batches` decodes `steps` steps at `keys` keys, in place of a workload.
    max_batch, max_tokens, page_size : of the cache, whose pages are as many as the longest requests of a full batch need.
    seed : of lengths, arrivals and prompts.
    make_backend, make_clock : what tests put other things in place of.

    Returns
    -------
    dict : "schema", "date", "versions", "device" and what describes it, "mode", "asked", "model", "cache", "method", "seed", "backends",
    "rows". A row whose backend cannot run here has "skipped", one that failed has "failed".

    Raises
    ------
    ArgumentError : any argument. MissingDependencyError : torch, matplotlib or a model's package. All before anything is measured.
    """
    from rich.console import Console
    from rich.progress import track

    dtype = serve_models.check(model, dtype, device)
    settings = {"--max-batch": max_batch, "--max-tokens": max_tokens, "--page-size": page_size, "--steps": steps}
    _check(backends, rate, num_requests, settings)
    chosen = workload(workload_name, prompt_lens, output_lens, samples)
    _check_folder(json_path if json_path != "-" else None, "json")
    _check_folder(plot_path, "plot")
    if plot_path:
        require_matplotlib()
    sizes_of_batches = serve_decode.parse_batches(batches) if decode_only else []
    head = _describe_device(device)
    loaded = serve_models.load(model, dtype, device)
    vocab_size = loaded.config.vocab_size
    requests: list[Request] = []
    if decode_only:
        sizes = serve_decode.cache_sizes(sizes_of_batches, keys, steps, max_tokens, page_size)
        asked = f"decode only: {steps} steps of batch {batches} at {keys} keys"
        needed = keys + steps
    else:
        requests = chosen.requests(num_requests, rate, vocab_size, seed)
        _check_samples(chosen, max_batch, max_tokens)
        sizes = cache_sizes(requests, max_batch, max_tokens, page_size)
        speed = "all at once" if math.isinf(rate) else f"{rate:g} a second"
        asked = f"{num_requests} requests, {speed}; {chosen}"
        needed = longest(requests)
    if needed > loaded.config.max_position:
        raise ArgumentError(
            f"texts have up to {needed} tokens; {model} was made for {loaded.config.max_position}: choose shorter --prompt-lens, "
            "--output-lens or --kv"
        )
    rows: list[dict[str, Any]] = []
    described: dict[str, str] = {}
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"tvm_infer": __version__, **package_versions(), **peers.versions()},
        **head,
        "mode": "decode" if decode_only else "serve",
        "asked": asked,
        "model": _describe_model(loaded),
        "cache": asdict(sizes),
        "method": list(_METHOD_DECODE if decode_only else _METHOD_SERVE),
        "seed": seed,
        "backends": described,
        "rows": rows,
    }
    reference: dict[Any, list[list[int]]] = {}
    for name in track(backends, "measuring", console=Console(stderr=True), transient=True):
        try:
            backend = make_backend(name, loaded, sizes, device)
            described[name] = backend.describe()
            first_seq = warm_up(backend, vocab_size)
            if decode_only:
                for batch in sizes_of_batches:
                    rows.append(_decode_row(backend, name, batch, keys, steps, vocab_size, seed, make_clock(), first_seq, reference))
                    first_seq += batch
            else:
                figures, served = _serve_row(backend, requests, make_clock(), first_seq)
                free = first_seq + sum(request.samples for request in requests)
                parts = _breakdown(backend, figures["typical"], vocab_size, free, seed)
                rows.append({"backend": name, **figures, "breakdown": parts} | _compare(reference, "serve", _tokens(served)))
        except peers.Skipped as reason:
            rows.append({"backend": name, "skipped": str(reason)})
        except (TvmInferError, RuntimeError, MemoryError, ImportError) as error:
            rows.append({"backend": name, "failed": f"{type(error).__name__}: {error}"})
        backend = None
        _release(device)
        if json_path != "-":
            _write(results, json_path)
    console = Console(stderr=json_path == "-")
    console.width = max(console.width, 140)  # a table that wraps cannot be read
    serve_report.print_table(console, results)
    if json_path == "-":
        _write(results, json_path)
    if plot_path:
        serve_report.save(results, plot_path)
    return results


def _check_samples(chosen: ServeWorkload, max_batch: int, max_tokens: int) -> None:
    if chosen.samples > min(max_batch, max_tokens):
        raise ArgumentError(
            f"{chosen.samples} samples of a prompt run together; a step takes {min(max_batch, max_tokens)} sequences: raise --max-batch"
        )


def _compare(reference: dict[Any, list[list[int]]], key: Any, tokens: list[list[int]]) -> dict[str, Any]:
    """How far the tokens are those of the first backend; nothing for the first itself."""
    if key not in reference:
        reference[key] = tokens
        return {}
    return _agreement(tokens, reference[key])


def _decode_row(
    backend: Any,
    name: str,
    batch: int,
    keys: int,
    steps: int,
    vocab_size: int,
    seed: int,
    clock: Clock,
    first_seq: int,
    reference: dict[Any, list[list[int]]],
) -> dict[str, Any]:
    figures = serve_decode.measure(backend, batch, keys, steps, vocab_size, seed, clock, first_seq)
    tokens = figures.pop("following")
    for seq in range(first_seq, first_seq + batch):
        backend.remove(seq)
    typical = {"batch": batch, "keys": keys}
    parts = _breakdown(backend, typical, vocab_size, first_seq + batch, seed)
    return {"backend": name, **figures, "breakdown": parts} | _compare(reference, batch, [[token] for token in tokens])


def _release(device: str) -> None:
    """The next backend needs the memory."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _write(results: dict[str, Any], json_path: str | None) -> None:
    if json_path == "-":
        sys.stdout.write(json.dumps(results, indent=2) + "\n")
    elif json_path:
        pathlib.Path(json_path).write_text(json.dumps(results, indent=2) + "\n")


def num_failed(results: dict[str, Any]) -> int:
    """Rows without a figure because something went wrong; what is not installed is no failure."""
    return sum("failed" in row for row in results["rows"])

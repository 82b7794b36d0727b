"""`tvm-infer bench serve`: a compiled model under load, on our cache and on TVM's, with the same weights and matrix products."""

from __future__ import annotations

import datetime
import gc
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__, _ffi, ops
from ..doctor import package_versions
from ..errors import ArgumentError, TvmInferError
from . import peers, serve_decode, serve_models, serve_report, serve_tasks
from .plot import require_matplotlib
from .serve_backends import BACKENDS, make
from .serve_loop import CacheSizes, Clock
from .serve_models import ServeModel
from .serve_tasks import Task
from .serve_workloads import workload

SCHEMA = 1  # of the JSON; bumped when a key changes its meaning
MakeBackend = Callable[[str, ServeModel, CacheSizes, str], Any]


@dataclass(frozen=True)
class Options:
    """What to measure. serve_models.py, serve_backends.py and serve_workloads.py have the names.

    dtype : None for the device's usual one. backends : the first that is measured is the one whose tokens the others' are compared
        with. workload, prompt_lens, output_lens, samples, rate, requests : a workload, with lengths or samples of its own where they
        are given; requests a second, and how many. decode_only, batch, kv, steps : full batches in its place. max_batch, max_tokens,
        page_size : of the cache, whose pages are as many as the longest requests of a full batch need.
    """

    model: str = "tiny"
    device: str = "cpu"
    dtype: str | None = None
    backends: Sequence[str] = BACKENDS
    workload: str = "uniform"
    prompt_lens: str | None = None
    output_lens: str | None = None
    samples: int | None = None
    rate: float = 1.0
    requests: int = 64
    decode_only: bool = False
    batch: str = "16,64"
    kv: int = 2048
    steps: int = 32
    max_batch: int = 64
    max_tokens: int = 2048
    page_size: int = 16
    seed: int = 0

    def check(self) -> None:
        """ArgumentError for a value out of range."""
        unknown = [name for name in self.backends if name not in BACKENDS]
        if unknown or not self.backends:
            named = f"names {unknown[0]!r}" if unknown else "is empty"
            raise ArgumentError(f"argument `--backends` {named}; it must be among {', '.join(BACKENDS)}")
        if not self.rate > 0:
            raise ArgumentError(
                f"argument `--rate` is {self.rate}; it must be above 0 requests a second (inf: all at once)"
            )
        for name in ("requests", "steps", "max_batch", "max_tokens", "page_size"):
            if getattr(self, name) < 1:
                flag = f"--{name.replace('_', '-')}"
                raise ArgumentError(f"argument `{flag}` is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ArgumentError(f"argument `--seed` is {self.seed}; it must be at least 0")


def _task(options: Options, vocab_size: int, max_position: int) -> Task:
    o = options
    task: Task
    if o.decode_only:
        batches = serve_decode.parse_batches(o.batch)
        sizes = serve_decode.cache_sizes(batches, o.kv, o.steps, o.max_tokens, o.page_size)
        task = serve_tasks.Decoding(batches, o.kv, o.steps, sizes, vocab_size, o.seed)
    else:
        chosen = workload(o.workload, o.prompt_lens, o.output_lens, o.samples)
        requests = chosen.requests(o.requests, o.rate, vocab_size, o.seed)
        sizes = serve_tasks.serving_sizes(requests, o.max_batch, o.max_tokens, o.page_size)
        task = serve_tasks.Serving(chosen, o.rate, requests, sizes, vocab_size, o.seed)
    if task.longest > max_position:
        raise ArgumentError(
            f"texts have up to {task.longest} tokens; {o.model} was made for {max_position}: choose shorter --prompt-lens, "
            "--output-lens or --kv"
        )
    return task


def _check_folder(path: str | None, argument: str) -> None:
    """What cannot be written is refused before minutes of measuring."""
    folder = pathlib.Path(path).resolve().parent if path else None
    if folder is not None and not folder.is_dir():
        raise ArgumentError(f"argument `{argument}` is {path!r}, but there is no folder {folder}; make it first")


def _describe_device(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": device, "isa": _ffi.func("cpu_info")().split()[0], "threads": ops.num_threads()}
    from .cuda_device import CudaDevice

    return {"device": device, **CudaDevice().describe()}


def _head(options: Options, model: ServeModel, task: Task, device: dict[str, Any]) -> dict[str, Any]:
    named = {"name": model.name, "dtype": model.dtype, "weights": model.origin, "parameters": model.num_parameters}
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"tvm_infer": __version__, **package_versions(), **peers.versions()},
        **device,
        "mode": task.mode,
        "asked": str(task),
        "model": named | asdict(model.config),
        "cache": asdict(task.sizes),
        "method": list(task.method),
        "seed": options.seed,
    }


def run(
    options: Options,
    *,
    json_path: str | None = None,
    plot_path: str | None = None,
    make_backend: MakeBackend = make,
    make_clock: Callable[[], Clock] = Clock,
) -> dict[str, Any]:
    """Measure, print a table, write JSON and a plot if asked, and return the results.

    Parameters
    ----------
    options : what to measure. json_path : file for the results, or "-" for stdout; the table goes to stderr then. A file is written
    after every backend. plot_path : file for a chart. make_backend, make_clock : what tests put other things in place of.

    Returns
    -------
    dict : "schema", "date", "versions", "device" and what describes it, "mode", "asked", "model", "cache", "method", "seed", "backends"
    (how each runs a step), "rows". A row whose backend cannot run here has "skipped", one that failed has "failed".

    Raises
    ------
    ArgumentError : any argument. MissingDependencyError : torch, matplotlib or a model's package. ExecutorError : no CUDA device. All
    before anything is measured.
    """
    from rich.console import Console
    from rich.progress import track

    options.check()
    dtype = serve_models.check(options.model, options.dtype, options.device)
    config = serve_models.config_of(options.model)
    task = _task(options, config.vocab_size, config.max_position)
    _check_folder(json_path if json_path != "-" else None, "json")
    _check_folder(plot_path, "plot")
    if plot_path:
        require_matplotlib()
    device = _describe_device(options.device)
    model = serve_models.load(options.model, dtype, options.device)
    described: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    results = {**_head(options, model, task, device), "backends": described, "rows": rows}
    reference: list[serve_tasks.Tokens] = []
    for name in track(options.backends, "measuring", console=Console(stderr=True), transient=True):
        reference += _measure(name, model, task, options.device, described, rows, reference, make_backend, make_clock)
        _release(options.device)
        if json_path != "-":
            _write(results, json_path)
    for name in track(described, "parts of a step", console=Console(stderr=True), transient=True):
        _break_down(name, model, task, options, [row for row in rows if row["backend"] == name], make_backend)
        _release(options.device)
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


def _measure(
    name: str,
    model: ServeModel,
    task: Task,
    device: str,
    described: dict[str, str],
    rows: list[dict[str, Any]],
    reference: Sequence[serve_tasks.Tokens],
    make_backend: MakeBackend,
    make_clock: Callable[[], Clock],
) -> list[serve_tasks.Tokens]:
    """Add the backend's rows; returns its tokens by row if there was no reference yet."""
    chosen: list[serve_tasks.Tokens] = []
    try:
        backend = make_backend(name, model, task.sizes, device)
        described[name] = backend.describe()
        first_seq = serve_tasks.warm_up(backend, model.config.vocab_size)
        for figures, tokens in task.rows(backend, make_clock, first_seq):
            compared = serve_tasks.agreement(tokens, reference[len(chosen)]) if reference else {}
            rows.append({"backend": name, **figures, **compared})
            chosen.append(tokens)
    except peers.Skipped as reason:
        rows.append({"backend": name, "skipped": str(reason)})
    except (TvmInferError, RuntimeError, MemoryError, ImportError) as error:
        rows.append({"backend": name, "failed": f"{type(error).__name__}: {error}"})
        return []
    return [] if reference else chosen


def _break_down(
    name: str,
    model: ServeModel,
    task: Task,
    options: Options,
    rows: Sequence[dict[str, Any]],
    make_backend: MakeBackend,
) -> None:
    """Add the parts of a step to the backend's rows, when all backends have been timed: a profiler slows what comes after it."""
    timed = [row for row in rows if "plain_step" in row]
    if not timed:
        return
    backend = make_backend(name, model, task.sizes, options.device)
    first_seq = 0
    for row in timed:
        row["breakdown"] = serve_tasks.breakdown(
            backend, row["plain_step"], model.config.vocab_size, first_seq, options.seed
        )
        first_seq += row["plain_step"].get("batch", 0)


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

"""What serves the requests: the same Llama on our cache, and on TVM's own cache with its TIR kernels or FlashInfer's.

All take the same weights and the same matrix products (`tvm_infer.matmul`); attention, cache and the driving of a step differ.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import _ffi, blas, cublas
from ..errors import ArgumentError
from ..jit import nvcc
from ..runtime.session import CudaSession, StepResult
from . import serve_flashinfer
from .peers import Skipped
from .serve_breakdown import CUDA_METHOD, PLAIN_RUNS, RUNS, VM_METHOD, Breakdown, VmTimer, cuda_kernels, of_step, sums
from .serve_loop import Batch, CacheSizes
from .serve_models import ServeModel

_TVM_PAGE_SIZE = 16  # in its kernels, whatever the cache is created with
_GRAPH_LAUNCHES = 5  # back to back, of which the mean counts
BACKENDS = ("tvm_infer", "tvm-tir", "flashinfer")


def greedy(logits: Any) -> list[int]:
    """The largest of each row of logits [m, vocab], numpy or a TVM tensor on any device; only the tokens come to the host."""
    if isinstance(logits, np.ndarray):
        return [int(token) for token in logits.argmax(-1)]
    if logits.device.type == "cpu":
        return greedy(np.from_dlpack(logits))
    import torch

    return [int(token) for token in torch.from_dlpack(logits).argmax(-1).tolist()]


def make(name: str, model: ServeModel, sizes: CacheSizes, device: str) -> ServedModel:
    """The backend called `name`, compiled. Raises Skipped where it cannot run here, saying why; ArgumentError for an unknown name."""
    if name not in BACKENDS:
        raise ArgumentError(f"argument `--backends` names {name!r}; it must be among {', '.join(BACKENDS)}")
    if name == "tvm_infer":
        return OurCache(model, sizes, device)
    return TvmCache(model, sizes, device, "tir" if name == "tvm-tir" else "flashinfer")


class ServedModel:
    """What all backends share: `step`, of which subclasses write `_logits`, and the breakdown of a step."""

    runs_ahead = False

    def __init__(self, model: ServeModel, sizes: CacheSizes, device: str) -> None:
        self.model, self.sizes, self.device = model, sizes, device
        self.vm: Any = None

    def add(self, seq: int) -> None:
        """An empty sequence."""
        raise NotImplementedError

    def fork(self, parent: int, child: int) -> None:
        """A sequence that begins as the parent is now."""
        raise NotImplementedError

    def remove(self, seq: int) -> None:
        """Its pages go back."""
        raise NotImplementedError

    def step(self, batch: Batch, *, goes_on: bool = False) -> list[int]:
        """Run new tokens; the greedy next token of each sequence, in the order of the batch.

        goes_on : the next step will be of the same sequences with these tokens; a backend that can may begin it already.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """How a step runs, in a line."""
        raise NotImplementedError

    def breakdown(self, step: Callable[[], object], plain: float) -> Breakdown:
        """Where the time of `step` goes, which takes `plain` seconds; it is run a few times, and nothing is timed after it (see
        serve_breakdown). Raises ExecutorError where kernels cannot be seen."""
        if self.device == "cpu":
            return of_step(step, VmTimer(self.vm), VM_METHOD, plain)
        return of_step(step, cuda_kernels, CUDA_METHOD, plain)


class OurCache(ServedModel):
    """tvm_infer.compile, Executable and PagedKVCache: prompts and decodes of a step in one call."""

    def __init__(self, model: ServeModel, sizes: CacheSizes, device: str) -> None:
        super().__init__(model, sizes, device)
        from ..compiler import compile
        from ..models.mlc_llama import export_llama

        exported = export_llama(model.config, dtype=model.dtype, functions=("main", "create_paged_kv_cache"))
        self.executable = compile(
            exported.mod,
            target="llvm" if device == "cpu" else "cuda",
            params=model.weights,
            max_tokens=sizes.max_tokens,
            max_batch=sizes.max_batch,  # of CUDA graphs
        )
        self.cache = self.executable.new_cache(
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            max_batch=sizes.max_batch,
            max_tokens=sizes.max_tokens,
        )
        self.vm = self.executable._host_vm if device == "cpu" else None
        self.runs_ahead = self.executable.runs_ahead
        self._ahead: StepResult | None = None  # of the next step, under way

    def add(self, seq: int) -> None:
        self.cache.add_sequence(seq)

    def fork(self, parent: int, child: int) -> None:
        self.cache.fork_sequence(parent, child)

    def remove(self, seq: int) -> None:
        self.cache.remove_sequence(seq)

    def step(self, batch: Batch, *, goes_on: bool = False) -> list[int]:
        result, self._ahead = self._ahead or self.executable.forward(self.cache, batch), None
        if goes_on and self.runs_ahead:
            self._ahead = self.executable.decode_next(self.cache, result)
        return [int(token) for token in result.greedy]

    def graph_alone(self, seqs: Sequence[int]) -> float | None:
        """Seconds of the graph of a decode step, launched again and again without the host in between: what a whole step is held
        against. None on the CPU, where nothing is captured."""
        if self.device == "cpu":
            return None
        import torch

        count, session = len(seqs), self._session()
        launch = session.decode_graph(self.cache, count)
        self.cache.begin_step(seqs, [1] * count, num_rows=session.bucket(count), token_ids=np.zeros(count, np.int64))
        try:
            times = []
            for _ in range(PLAIN_RUNS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                launch()  # the GPU is busy when the first event is recorded
                begin.record()
                for _ in range(_GRAPH_LAUNCHES):
                    launch()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e-3 / _GRAPH_LAUNCHES)
            return min(times)
        finally:
            self.cache.cancel_forward()

    def _session(self) -> CudaSession:
        session = self.executable._session(self.cache)
        assert isinstance(session, CudaSession)
        return session

    def attention_alone(self, seqs: Sequence[int], *, swept: bool) -> float | None:
        """Seconds of the attention kernels of all layers of a decode step, in a graph of their own: what those inside a whole step are
        held against. swept : before each layer other data pass through the L2, as the weights do in a step; else the kernels stand back
        to back. None on the CPU, where nothing is captured."""
        if self.device == "cpu":
            return None
        import torch

        passing = torch.zeros(2 * torch.cuda.get_device_properties().L2_cache_size, device="cuda", dtype=torch.uint8)
        passing.add_(1)  # not for the first time under the capture
        c, cache = self.model.config, self.cache
        dtype = getattr(torch, self.model.dtype)
        rows = self._session().bucket(len(seqs))
        qkv = torch.randn(rows, c.num_qo_heads + 2 * c.num_kv_heads, c.head_dim, device="cuda", dtype=dtype)
        out = torch.empty(rows, c.num_qo_heads, c.head_dim, device="cuda", dtype=dtype)
        cache.begin_step(seqs, [1] * len(seqs), num_rows=rows)
        try:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for layer in range(c.num_layers):
                    if swept:
                        passing.add_(1)
                    cache.attention_fused_qkv(layer, qkv, out=out)
            return min(sums(cuda_kernels(graph.replay))["attention"] for _ in range(RUNS))
        finally:
            cache.cancel_forward()

    def describe(self) -> str:
        ahead = "; a decode step is launched before the tokens ahead of it are read" if self.runs_ahead else ""
        return f"tvm_infer.compile, one call a step for prompts and decodes together{ahead}"


class TvmCache(ServedModel):
    """TVM's builtin paged KV cache, driven as MLC's engine does: decodes in one call, prompts in another."""

    def __init__(self, model: ServeModel, sizes: CacheSizes, device: str, kernels: str) -> None:
        super().__init__(model, sizes, device)
        if sizes.page_size != _TVM_PAGE_SIZE:
            raise Skipped(f"TVM's cache has pages of {_TVM_PAGE_SIZE} tokens, not {sizes.page_size}: see --page-size")
        if kernels == "flashinfer":
            serve_flashinfer.require(device, model.config.head_dim)
        import tvm
        import tvm_ffi

        self.kernels = kernels
        library = _compiled_tvm(model, sizes, device, kernels)
        self._device = tvm.cpu() if device == "cpu" else tvm.cuda()
        self.vm = tvm.relax.VirtualMachine(library, self._device)
        self._functions = {name: self.vm[name] for name in ("embed", "batch_prefill", "batch_decode")}
        self._weights = _ordered_weights(model)
        self._shape, self._tensor = tvm_ffi.Shape, tvm.runtime.tensor
        self._state = {
            name: tvm.get_global_func(f"vm.builtin.kv_state_{name}")
            for name in ("add_sequence", "fork_sequence", "remove_sequence", "begin_forward", "end_forward")
        }
        total = sizes.num_pages * sizes.page_size
        arguments = (sizes.max_batch, total, sizes.max_tokens, sizes.page_size, 0)
        self.cache = self.vm["create_paged_kv_cache"](*(self._shape((n,)) for n in arguments))

    def add(self, seq: int) -> None:
        self._state["add_sequence"](self.cache, seq)

    def fork(self, parent: int, child: int) -> None:
        self._state["fork_sequence"](self.cache, parent, child, -1)

    def remove(self, seq: int) -> None:
        self._state["remove_sequence"](self.cache, seq)

    def step(self, batch: Batch, *, goes_on: bool = False) -> list[int]:
        decodes = [i for i, (_, tokens) in enumerate(batch) if len(tokens) == 1]
        prompts = [i for i, (_, tokens) in enumerate(batch) if len(tokens) != 1]
        found: dict[int, int] = {}
        for which, run in ((decodes, self._decode), (prompts, self._prefill)):
            if which:
                found |= dict(zip(which, run([batch[i] for i in which]), strict=True))
        return [found[i] for i in range(len(batch))]

    def _call(self, batch: Batch, run: Callable[[Any], Any]) -> list[int]:
        """One forward pass: `run` takes the embedded tokens [num_tokens, hidden] and returns logits."""
        lengths = tuple(len(tokens) for _, tokens in batch)
        ids = np.concatenate([np.asarray(tokens, np.int32) for _, tokens in batch])
        self._state["begin_forward"](self.cache, self._shape(tuple(seq for seq, _ in batch)), self._shape(lengths))
        embedded = self._functions["embed"](self._tensor(ids, self._device), *self._weights)
        logits = run(embedded)[0]
        self._state["end_forward"](self.cache)
        return greedy(logits._create_view((len(batch), self.model.config.vocab_size)))

    def _decode(self, batch: Batch) -> list[int]:
        def run(embedded: Any) -> Any:
            rows = embedded._create_view((len(batch), 1, self.model.config.hidden_size))
            return self._functions["batch_decode"](rows, self.cache, *self._weights)

        return self._call(batch, run)

    def _prefill(self, batch: Batch) -> list[int]:
        last = np.cumsum([len(tokens) for _, tokens in batch], dtype=np.int32) - np.int32(1)

        def run(embedded: Any) -> Any:
            rows = embedded._create_view((1, int(last[-1]) + 1, self.model.config.hidden_size))
            return self._functions["batch_prefill"](rows, self._tensor(last, self._device), self.cache, *self._weights)

        return self._call(batch, run)

    def describe(self) -> str:
        kernels = "TIR" if self.kernels == "tir" else f"FlashInfer {serve_flashinfer.installed_version()}'s"
        return f"TVM's builtin paged KV cache with {kernels} kernels; a call for decodes, another for prompts"


_COMPILED: dict[tuple[str, ...], Any] = {}  # a backend is made twice: to be timed, and to be taken apart


def _compiled_tvm(model: ServeModel, sizes: CacheSizes, device: str, kernels: str) -> Any:
    key = (repr(model.config), model.dtype, repr(sizes), device, kernels)
    if key not in _COMPILED:
        _COMPILED[key] = _compile_tvm(model, sizes, device, kernels)
    return _COMPILED[key]


def _compile_tvm(model: ServeModel, sizes: CacheSizes, device: str, kernels: str) -> Any:
    """The library of the model on TVM's cache, with our matrix products."""
    import tvm

    from ..compiler import _cuda_compiler
    from ..models.mlc_llama import export_llama
    from ..relax import pipeline

    _ffi.library()
    if device == "cpu":
        blas.ensure_blas()
        target = pipeline.host_target()
    else:
        cublas.ensure_cublas()
        # "sm_90", not "sm_90a": TVM's schedules take "90a" for no architecture at all
        target = tvm.target.Target({"kind": "cuda", "arch": "sm_90"}, host={"kind": "llvm"})
    compiler = contextlib.nullcontext() if device == "cpu" else _cuda_compiler()
    building = serve_flashinfer.building() if kernels == "flashinfer" else contextlib.nullcontext()
    with compiler:
        with target, building:
            exported = export_llama(
                model.config,
                dtype=model.dtype,
                cache=kernels,  # type: ignore[arg-type]
                target=target,
                functions=("embed", "batch_prefill", "batch_decode", "create_paged_kv_cache"),
            )
        bounds = {"seq_len": sizes.max_tokens, "num_logits": sizes.max_batch, "batch_size": sizes.max_batch}
        mod = pipeline.prepare_unpaged(exported.mod, bounds, device)
        if exported.extern_mods:
            mod = mod.with_attr("external_mods", list(exported.extern_mods))
        executable = pipeline.lower_unpaged(mod, target)
    options = serve_flashinfer.link_options(nvcc.find()) if kernels == "flashinfer" else []
    with tempfile.TemporaryDirectory(prefix="tvm_infer-") as folder:
        path = pathlib.Path(folder) / "model.so"
        executable.export_library(str(path), options=options)
        return tvm.runtime.load_module(str(path))


def _ordered_weights(model: ServeModel) -> Sequence[Any]:
    from ..models.mlc_llama import export_llama
    from ..runtime.executable import as_weight

    described = export_llama(model.config, dtype=model.dtype, rotary="model", functions=("embed",)).weights
    return [as_weight(model.weights[name], name) for name, _, _ in described]

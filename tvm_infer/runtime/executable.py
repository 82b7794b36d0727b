"""A compiled model: steps over a paged KV cache, and text from prompts."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import pathlib
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tvm_ffi

from .. import _ffi
from ..errors import ArgumentError, CacheStateError, ModelError
from . import library, model_kernels, ranges, variants, weights_file
from .engine import Engine, Generation, OnToken
from .kv_cache import PagedKVCache
from .manifest import Manifest
from .page_budget import PageBudget
from .sampling import Sampler
from .session import CudaSession, Session, StepResult

if TYPE_CHECKING:
    from ..models import Tokenizer

DEFAULT_MAX_BATCH = 16
_TILE_FIELDS = 5  # of a class in a tile table: rows, keys, three costs; behind the classes are two costs more
_ALIGNMENT = 64  # bytes: what TVM's kernels assume of a tensor
_numbers = itertools.count(1)
_steps = itertools.count(1)  # of all caches


class Executable:
    """A compiled model with its weights. Made by :func:`tvm_infer.compile`.

    A step takes new tokens of any number of sequences, prefill and decode alike, and returns logits. One cache serves one executable.

    Attributes
    ----------
    manifest : sizes, inputs, layers.
    report : what the compiler's passes matched, dispatched and left alone.
    from_cache : True if nothing was compiled, because the cache folder had this model.
    use_graphs : whether decode steps on CUDA run as captured graphs; looked at when a cache takes its first step. Off, the same
        kernels are launched one by one, for the same bits.
    tokenizer : of the model file, or None. max_position : the context the model was trained for, or None.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        weights: Mapping[str, Any],
        *,
        tokenizer: Tokenizer | None = None,
        max_position: int | None = None,
        from_cache: bool = False,
        owner: Any = None,
    ) -> None:
        _ffi.library()
        self._compiled = library.read(folder)
        self.manifest = Manifest.parse(self._compiled.manifest, folder)
        self.report = self._compiled.report
        self.from_cache = from_cache
        self.tokenizer = tokenizer
        self.max_position = max_position
        self.use_graphs = True
        self._owner = owner  # of the folder: it stays while this executable or a twin does
        self._library_path = self._compiled.library
        self._number = next(_numbers)
        missing = [name for name in self.manifest.weights if name not in weights]
        if missing:
            raise ModelError(
                f"{len(missing)} weights of the compiled model are not given, {missing[0]!r} first; given are "
                f"{', '.join(list(weights)[:4])}, …"
            )
        self._weights = [as_weight(weights[name], name) for name in self.manifest.weights]
        self._check_weight_types()
        self._weights_on: dict[str, list[Any]] = {}
        self._sessions: dict[int, Session] = {}  # by the address of the cache's object
        if self.manifest.device_kind == "cpu":
            _ = self._module  # fails now if it must. On CUDA a GPU is needed to run, not to compile and export

    def _check_weight_types(self) -> None:
        """Once, here: a captured step does not look at its weights again."""
        for name, kind, weight in zip(self.manifest.weights, self.manifest.weight_types, self._weights, strict=True):
            have = f"{weight.dtype} {[int(n) for n in weight.shape]}"
            if have != kind:
                raise ModelError(
                    f"weight {name!r} is {have}; the model was compiled for {kind}: convert it, or give this model's own weights"
                )

    def twin(self) -> Executable:
        """The same model with settings and caches of its own; code and weights are shared."""
        other = copy.copy(self)
        other._number, other._sessions = next(_numbers), {}
        return other

    @functools.cached_property
    def _module(self) -> Any:
        module = library.load_module(self._library_path)
        library.ensure_blas(self._compiled, module)
        return module

    @functools.cached_property
    def _host_vm(self) -> Any:
        return self._make_vm("cpu")

    def _make_vm(self, device: str) -> Any:
        import tvm
        from tvm.runtime.vm import VirtualMachine  # `tvm.relax` is the compiler's

        return VirtualMachine(self._module, tvm.device(device))

    def _device_weights(self, device: str) -> list[Any]:
        """The weights where the model runs; on a device they are copied once, those that lie there already not at all."""
        if device == "cpu":
            return self._weights
        if device not in self._weights_on:
            import tvm

            library.ensure_cuda_runtime()

            target = tvm.device(device)
            self._weights_on[device] = [w if w.device == target else w.copyto(target) for w in self._weights]
        return self._weights_on[device]

    def _session(self, cache: PagedKVCache) -> Session:
        """What runs steps of this cache: on CUDA with a virtual machine of its own, since graphs keep the cache's addresses."""
        key = cache.address
        session = self._sessions.get(key)
        if session is None:
            self.bind(cache)
            weights = self._device_weights(cache.device)
            if cache.device == "cpu":
                session = Session(self._host_vm, self.manifest, cache, weights)
            else:
                vm = self._make_vm(cache.device)
                session = CudaSession(vm, self.manifest, cache, weights, use_graphs=self.use_graphs)
            self._sessions[key] = session
            weakref.finalize(cache, self._sessions.pop, key, None)
        return session

    @property
    def folder(self) -> pathlib.Path:
        """Where the compiled code, its manifest and its report lie."""
        return self._library_path.parent

    def _explain_kernels(self) -> str:
        """What runs the attention, and in which pieces."""
        m = self.manifest
        spec = m.layers[0]
        widths = (spec.head_dim, spec.width_vo)
        table = _ffi.func("cuda_vo_tile_table" if m.device_kind == "cuda" else "cpu_vo_tile_table")(
            spec.dtype, *widths, spec.dtype
        )
        tiles = ", ".join(
            f"{table[i]} x {table[i + 1]}" for i in range(0, len(table) // _TILE_FIELDS * _TILE_FIELDS, _TILE_FIELDS)
        )
        lines = [f"tiles of packed rows (tokens x {spec.group_size} heads of a group) x keys: {tiles}"]
        if m.device_kind == "cuda":
            element = {"bfloat16": "bf16", "float16": "fp16"}[spec.dtype]
            kernels = model_kernels.kernel_names(m.layers, library.called_functions(self._compiled), ())
            appends = " or ".join(name for name in kernels if "append" in name)
            attention = model_kernels.attention_kernel(spec, 0)[:-1]
            lines += [
                f"two launches a layer: {appends}, {attention}<page_size>; each plan says which tiles",
                f"matrix products of up to 8 rows: gemv_{element} where it fits (docs/relax.md), others: cuBLASLt",
                f"decode steps of up to {m.decode_rows} sequences are one graph, for {', '.join(map(str, m.buckets))} rows; others run "
                "kernel by kernel",
            ]
        lines += self._explain_variants()
        return "Attention kernels\n" + "\n".join(f"  {line}" for line in lines)

    def _explain_variants(self) -> list[str]:
        """Where the code of the layers' variants comes from, if they have any."""
        layers = variants.in_kernels(self.manifest, self._compiled.about)
        if self._compiled.about is not None:
            made = "which this library holds"
        elif self.manifest.device_kind == "cuda":
            pages = ", ".join(map(str, library.DEFAULT_PAGE_SIZES))
            made = f"compiled with the model for pages of {pages} tokens, for others at the first step"
        else:
            made = "tvm_infer's own, or compiled with the model"
        numbers = ", ".join(map(str, layers))
        return [f"layers {numbers}: their variant's code is in the kernels, {made}"] if layers else []

    def explain(self) -> str:
        """What the passes did, what is captured and what not, and what the executable is."""
        m = self.manifest
        head = (
            f"{m.function}({', '.join(name for name, _ in m.inputs)}, kv_cache, {len(m.weights)} weights) for {m.target}\n"
            f"{len(m.layers)} layers, vocabulary {m.vocab_size}, at most {m.max_tokens} tokens a step"
            f"{', from the cache folder' if self.from_cache else ''}"
        )
        return f"{head}\n\n{self.report}\n\n{self._explain_kernels()}"

    def export_library(
        self,
        path: str | os.PathLike[str],
        *,
        archs: Sequence[str] = library.DEFAULT_ARCHS,
        page_sizes: Sequence[int] = library.DEFAULT_PAGE_SIZES,
        include_blas: bool = True,
        kv_dtype: str | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        shared_prefix: bool | None = None,
        page_budget: PageBudget | None = None,
    ) -> None:
        """Write one shared library that runs this model with TVM's runtime alone: no Python, no compiler, no tvm_infer beside it.

        It holds the compiled code, tvm_infer's functions (planner, cache, executors), a manifest, and what those need: for CUDA
        targets the kernels, for CPU targets the BLAS and the code of attention variants. Weights go to a file of their own
        (:meth:`save_weights`). See docs/deploy.md.

        Parameters
        ----------
        archs, page_sizes : of the caches and GPUs that it will run with, for CUDA targets: a kernel for each is built and embedded.
        include_blas : put the packaged BLAS (25 MB) into the library of a model for CPUs; without it the program that loads the
            library names one with `tvm_infer_set_blas`.
        kv_dtype, k_scale, v_scale, shared_prefix, page_budget : of the caches that its program makes, as :meth:`new_cache` has them,
            unless it asks for others. kv_dtype of 8 bits: kernels for such pages are stored beside those for pages of the model's own
            type. page_budget: those that select pages are.

        Raises
        ------
        ArgumentError : a path in no folder, an unknown architecture or page size, a scale that is none; of a loaded model, what its
        library does not hold. DTypeError : another kv_dtype. ExecutorError : kv_dtype of 8 bits for CUDA with a head_dim, page size or
        attention variant that it has no such kernels for. MissingDependencyError : no C++ compiler to link
        with, no nvcc, no BLAS to include. CompileError : what they printed. ModelError, VariantError, DTypeError : an attention variant
        reads a weight that is not there, or is of another shape or type.
        """
        weights = [
            (name, tuple(int(n) for n in tensor.shape), str(tensor.dtype))
            for name, tensor in zip(self.manifest.weights, self._weights, strict=True)
        ]
        library.export(
            self._compiled,
            path,
            weights=weights,
            max_position=self.max_position,
            archs=archs,
            page_sizes=page_sizes,
            include_blas=include_blas,
            kv_dtype=kv_dtype,
            k_scale=k_scale,
            v_scale=v_scale,
            shared_prefix=shared_prefix,
            page_budget=page_budget,
        )

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Write the weights as a safetensors file, named as in `manifest.weights`. ArgumentError for a path in no folder."""
        tensors = dict(zip(self.manifest.weights, self._weights, strict=True))
        weights_file.save(path, tensors, {"tvm_infer.abi_version": str(self.manifest.abi_version), "format": "pt"})

    def save(self, folder: str | os.PathLike[str], **export_arguments: Any) -> None:
        """Write library and weights into a folder, made if need be, for :func:`tvm_infer.load`; arguments as export_library's."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.export_library(folder / library.LIBRARY, **export_arguments)
        self.save_weights(folder / library.WEIGHTS)

    # Steps

    def new_cache(
        self,
        *,
        num_pages: int,
        page_size: int = 16,
        max_batch: int | None = None,
        max_tokens: int | None = None,
        prefix_reuse: bool = False,
        device: Any = None,
        kv_dtype: str | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        shared_prefix: bool | None = None,
        page_budget: PageBudget | Literal[False] | None = None,
    ) -> PagedKVCache:
        """A cache of this model's layers and heads.

        max_batch : sequences of a step, at most (default 16; on CUDA what decode steps were compiled for). max_tokens : new tokens of a
        step, at most (default: what was compiled for). device : "cpu", or the CUDA device to run on (default "cuda"). prefix_reuse : as
        of PagedKVCache; an engine turns it on by itself. kv_dtype, k_scale, v_scale : of its pages, as PagedKVCache has them; the
        compiled code serves each. shared_prefix : whether steps read pages that their sequences share once for all (docs/plan.md);
        layers with a variant that tells requests apart, a window or a chunk never do. page_budget : pages of a sequence that layers
        read in decode steps, as PagedKVCache has it (docs/kv-formats.md), its `dense_layers` all layers with a variant; False: all.
        None: what the model was exported with, else pages of the model's dtype, scales of 1, shared prefixes on, and all keys.

        Layers in which the pass found a variant (soft cap, window, sinks, …) have it in this cache, bound to the model's weights.
        MissingDependencyError, CompileError : one that has to be compiled for the CPU, because the kept one was for another processor,
        and cannot be. ExecutorError : on CUDA, a model that has one that changes queries or keys with 8-bit pages.
        """
        spec, m = self.manifest.layers[0], self.manifest
        cache = PagedKVCache.for_spec(
            spec,
            len(m.layers),
            num_pages=num_pages,
            page_size=page_size,
            max_batch=(m.decode_rows or DEFAULT_MAX_BATCH) if max_batch is None else max_batch,
            max_tokens=m.max_tokens if max_tokens is None else max_tokens,
            device=m.device_kind if device is None else device,
            **library.cache_defaults(self._compiled).settings(
                kv_dtype=kv_dtype,
                k_scale=k_scale,
                v_scale=v_scale,
                shared_prefix=shared_prefix,
                page_budget=page_budget,
            ),
        )
        if m.rope is not None:
            cache._call(
                "set_rope",
                np.asarray(m.rope["inv_freq"], np.float32),
                int(m.rope["interleaved"]),
                float(m.rope["magnitude"]),
            )
        self._give_variants(cache)
        if prefix_reuse:
            cache.enable_prefix_reuse()
        return cache

    def _give_variants(self, cache: PagedKVCache) -> None:
        """The variants that the model's layers have, with its weights."""
        if self._compiled.about is not None and self.manifest.variants:
            variants.give_exported(self.manifest, cache, self._module, self._device_weights(cache.device))
            return
        names = self.manifest.weights

        def weight(name: str) -> Any:
            return self._device_weights(cache.device)[names.index(name)]

        variants.give(self.manifest, cache, weight)

    def bind(self, cache: PagedKVCache) -> None:
        """Take the cache for this executable. CacheStateError if another one has it; ArgumentError if its shape is another model's,
        or its steps larger than the largest graph."""
        spec, m = self.manifest.layers[0], self.manifest
        have = (
            cache.num_layers,
            cache.num_qo_heads,
            cache.num_kv_heads,
            cache.head_dim,
            cache.head_dim_vo,
            cache.dtype,
        )
        need = (len(m.layers), spec.num_qo_heads, spec.num_kv_heads, spec.head_dim, spec.width_vo, spec.dtype)
        if have != need:
            raise ArgumentError(
                f"argument `cache` has (layers, query heads, KV heads, head_dim, head_dim_vo, dtype) {have}, the model has {need}: "
                "make it with Executable.new_cache"
            )
        kind = cache.device.partition(":")[0]
        if kind != m.device_kind:
            raise ArgumentError(
                f"argument `cache` is on {cache.device}, the model was compiled for {m.device_kind}: make it with Executable.new_cache"
            )
        if kind == "cuda" and cache.max_batch > m.decode_rows:
            raise ArgumentError(
                f"argument `cache` takes {cache.max_batch} sequences a step (max_batch), the model was compiled for graphs of up to "
                f"{m.decode_rows}: make it with max_batch={m.decode_rows} or less, or compile with max_batch={cache.max_batch}"
            )
        cache.bind(self._number)
        if not variants.has(self.manifest, cache):
            cache.release(self._number)  # of a cache that is bound the kernels are settled
            self._give_variants(cache)
            cache.bind(self._number)

    def release(self, cache: PagedKVCache) -> None:
        """Give the cache back, so that another executable of the same shape may take it. Its graphs go, a new use captures anew."""
        cache.release(self._number)
        self._sessions.pop(cache.address, None)

    def step(
        self, cache: PagedKVCache, batch: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int] | None = None
    ) -> np.ndarray:
        """Run new tokens of some sequences through the model; the cache keeps their keys and values.

        Parameters
        ----------
        batch : (sequence id, its new tokens), for sequences that the cache has: a whole prompt, a part of one, or one token.
        rows : which tokens to compute logits for, counted over the batch's tokens in order; None: the last of every sequence (those
            without new tokens left out).

        Returns
        -------
        Logits, float32 [len(rows), vocab_size].

        Raises
        ------
        ArgumentError : a token that is not in the vocabulary, a row that is not in the step, too many tokens. OutOfPagesError,
        UnknownSequenceError, CacheStateError : as PagedKVCache.begin_forward. The cache is as before then.
        """
        return self.forward(cache, batch, rows).logits

    def forward(
        self, cache: PagedKVCache, batch: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int] | None = None
    ) -> StepResult:
        """:meth:`step` that leaves its result on the device until it is asked for: `.logits`, or `.greedy`, the most likely tokens.

        On CUDA a step of one token each is a graph launch, if max_batch of :func:`tvm_infer.compile` allows so many, and this returns
        before the device is done. The result can be asked for until the next step of the same cache, and raises CacheStateError then.
        """
        session = self._session(cache)
        ids = [seq_id for seq_id, _ in batch]
        new_tokens = [new for _, new in batch]
        lengths = [len(new) for new in new_tokens]
        flat = np.fromiter(itertools.chain.from_iterable(new_tokens), np.int64, sum(lengths))
        self._check_tokens(flat)
        wanted = None if rows is None else self._checked_rows(rows, flat.size)
        if flat.size == 0:
            with cache.forward(ids, lengths):
                result = StepResult(np.zeros((0, self.manifest.vocab_size), np.float32), slice(None))
            return self._numbered(result, session, ())
        shape = session.shape(lengths, wanted)
        step = cache.forward(ids, lengths, num_rows=shape.num_rows, token_ids=flat, logit_rows=shape.logit_rows)
        with ranges.mark("decode" if shape.is_decode else "main", shape.num_rows), step:
            result = session.run(cache, shape)
        sequences = None if rows is not None else tuple(seq for seq, n in zip(ids, lengths, strict=True) if n)
        return self._numbered(result, session, sequences)

    @staticmethod
    def _numbered(result: StepResult, session: Session, sequences: tuple[int, ...] | None) -> StepResult:
        """The result of the session's latest step, which both are told."""
        result.sequences, result.step = sequences, next(_steps)
        session.latest_step = result.step
        return result

    def decode_next(self, cache: PagedKVCache, previous: StepResult) -> StepResult:
        """The decode step behind `previous`: each of its sequences goes on with its most likely token.

        The same as :meth:`forward` with `previous.greedy`, but on CUDA, where `previous` was a captured decode step, it is launched
        before the host knows these tokens: the device need not wait for the host between the two. `previous.greedy` can still be
        asked for then, until two more steps were made; its logits cannot.

        Parameters
        ----------
        previous : of the latest step of `cache`, made without `rows`.

        Raises
        ------
        ArgumentError : `previous` was made with `rows`. CacheStateError : another step of the cache came after it, or it is of another
        cache. As :meth:`forward` otherwise.
        """
        if previous.sequences is None:
            raise ArgumentError(
                "argument `previous` is of a step that was made with `rows`, which do not say whose tokens they are: make it without"
            )
        session = self._session(cache)
        if previous.step != session.latest_step:
            raise CacheStateError(
                "argument `previous` is not of the latest step of `cache`: another came after it, whose tokens its sequences may have "
                "by now, or it is of another cache; pass the latest result"
            )
        if not (isinstance(session, CudaSession) and session.follows(previous)):
            tokens = previous.greedy.tolist()
            return self.forward(cache, [(seq, [token]) for seq, token in zip(previous.sequences, tokens, strict=True)])
        return self._numbered(session.follow(cache, previous), session, previous.sequences)

    @property
    def runs_ahead(self) -> bool:
        """Whether :meth:`decode_next` launches steps before the tokens ahead of them are known: CUDA, with graphs."""
        return self.manifest.device_kind == "cuda" and self.use_graphs

    @staticmethod
    def _checked_rows(rows: Sequence[int], num_tokens: int) -> np.ndarray:
        wanted = np.asarray(rows, np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < num_tokens):
            raise ArgumentError(
                f"argument `rows` names {wanted.min()} to {wanted.max()}; the step has rows 0 to {num_tokens - 1}"
            )
        return wanted

    def _check_tokens(self, flat: np.ndarray) -> None:
        m = self.manifest
        if flat.size and not (flat.min() >= 0 and flat.max() < m.vocab_size):
            bad = flat[(flat < 0) | (flat >= m.vocab_size)][0]
            raise ArgumentError(f"argument `batch` has the token {bad}; the vocabulary is 0 to {m.vocab_size - 1}")
        if flat.size > m.max_tokens:
            raise ArgumentError(
                f"the step has {flat.size} tokens, the model was compiled for at most {m.max_tokens}: split the prompt into chunks, or "
                "compile with a larger max_tokens"
            )

    # Text

    def engine(self, cache: PagedKVCache, *, prefix_reuse: bool = True) -> Engine:
        """A queue of requests that share `cache` and run together, joining and leaving between steps.

        prefix_reuse : prompts begin with the pages of earlier ones that began alike (:class:`Engine`).
        """
        return Engine(self, cache, prefix_reuse=prefix_reuse)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = 64,
        sampler: Sampler | None = None,
        n: int = 1,
        stop_tokens: Sequence[int] = (),
        on_token: OnToken | None = None,
        max_batch: int | None = None,
        page_size: int = 16,
        prefix_reuse: bool = True,
        shared_prefix: bool | None = None,
        page_budget: PageBudget | Literal[False] | None = None,
    ) -> list[Generation]:
        """Continue prompts, as many at a time as `max_batch` allows (default as in :meth:`new_cache`); others join as they finish.

        Parameters
        ----------
        prompts : token lists, or texts if the model file had a tokenizer.
        sampler : how tokens are chosen; greedy by default. n : samples of every prompt, which share the prompt's pages.
        prefix_reuse : compute what prompts begin with in common once (:class:`Engine`). shared_prefix : as of :meth:`new_cache`; False
            for logits that do not depend, in their last bits, on which requests share pages. page_budget : as of :meth:`new_cache`.
        stop_tokens : end a text; they are part of its tokens. on_token : called as (generation, token) for each token as it comes.

        Returns
        -------
        len(prompts) * n generations, those of one prompt together. For more control (a cache of your own, requests that arrive later)
        use :meth:`engine`.
        """
        token_lists = [self._encode(prompt) for prompt in prompts]
        needs = [Engine.pages_needed(len(t), max_new_tokens, n, page_size) for t in token_lists]
        if max_batch is None:
            max_batch = self.manifest.decode_rows or DEFAULT_MAX_BATCH
        together = max(1, max_batch // max(n, 1))
        cache = self.new_cache(
            num_pages=max(1, sum(sorted(needs)[-together:])),
            page_size=page_size,
            max_batch=max(max_batch, n),
            shared_prefix=shared_prefix,
            page_budget=page_budget,
        )
        engine = self.engine(cache, prefix_reuse=prefix_reuse)
        generations: list[Generation] = []
        for tokens in token_lists:
            generations += engine.submit(
                tokens,
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                n=n,
                stop_tokens=stop_tokens,
                on_token=on_token,
            )
        engine.run()
        return generations

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ArgumentError("argument `prompts` holds text and the model has no tokenizer: pass token ids")
        return self.tokenizer.encode(prompt)


def as_weight(x: Any, name: str) -> Any:
    """A weight as a TVM tensor: shared where it is contiguous and aligned for TVM's kernels, copied otherwise."""
    import tvm

    if hasattr(x, "detach"):
        x = x.detach().contiguous()
    elif isinstance(x, np.ndarray):
        x = np.asarray(x, order="C")  # ascontiguousarray would give a scalar a dimension
    pointer = x.ctypes.data if isinstance(x, np.ndarray) else getattr(x, "data_ptr", lambda: 0)()
    if isinstance(x, np.ndarray) and x.dtype.name == "bfloat16":
        return tvm.runtime.tensor(x)  # numpy's DLPack does not know the type
    if not hasattr(x, "__dlpack__"):
        raise ArgumentError(
            f"weight {name!r} is a {type(x).__name__}; it must be a torch tensor, a numpy array or a TVM tensor"
        )
    if isinstance(x, np.ndarray):
        return tvm.runtime.tensor(x) if pointer % _ALIGNMENT or not x.flags.writeable else tvm.runtime.from_dlpack(x)
    if not pointer % _ALIGNMENT:
        return tvm.runtime.from_dlpack(x)
    # NOTE: not by way of numpy, which knows no bfloat16 and no device; torch aligns what it allocates
    if hasattr(x, "clone"):
        return tvm.runtime.from_dlpack(x.clone())
    elsewhere: Any = tvm_ffi.from_dlpack(x)
    aligned = tvm.runtime.empty(elsewhere.shape, elsewhere.dtype, elsewhere.device)
    elsewhere.copyto(aligned)
    return aligned

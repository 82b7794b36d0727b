"""tvm_infer.compile: a model in, an executable out; compiled code is kept in the cache folder."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__, _ffi, cache_dir, errors
from .band import Band
from .models import LanguageModel, Tokenizer, load_gguf
from .runtime import library, model_kernels, variant_code
from .runtime.executable import Executable
from .runtime.manifest import Manifest
from .runtime.variants import MAX_BANDS
from .spec import AttentionSpec

DEFAULT_MAX_TOKENS = 512
DEFAULT_MAX_BATCH = 64
Progress = Callable[[str, float], None]  # (step, fraction done)
_KEYED = (
    "compiler.py",
    "spec.py",
    "rope.py",
    "runtime/manifest.py",
    "runtime/library.py",
    "variant/*.py",
)  # beside relax/ and models/


@dataclass(frozen=True)
class _Options:
    target: str
    function: str
    max_tokens: int
    on_unmatched: str
    assume_full: tuple[str, ...]
    buckets: tuple[int, ...]  # of CUDA targets
    dtype: str  # "": the model's own
    programmatic_launch: bool  # of CUDA targets


@dataclass
class _Source:
    """A model, whatever it came as: how its Relax module is made, and what tells it from others before that."""

    key: str  # digest of its contents
    module: Callable[[], tuple[Any, Mapping[str, str]]]  # (IRModule, parameter name -> weight name)
    weights: Mapping[str, Any]
    tokenizer: Tokenizer | None = None
    max_position: int | None = None


def compile(
    model: Any,
    *,
    target: Any = "llvm",
    params: Mapping[str, Any] | None = None,
    function: str = "main",
    max_tokens: int = DEFAULT_MAX_TOKENS,
    on_unmatched: str = "error",
    assume_full: Sequence[str] = (),
    max_batch: int = DEFAULT_MAX_BATCH,
    buckets: Sequence[int] | None = None,
    dtype: str | None = None,
    programmatic_launch: bool = True,
    cache: bool = True,
    progress: Progress | None = None,
) -> Executable:
    """Compile a model whose attention reads a paged KV cache.

    Attention over packed tokens becomes append + attend on a :class:`PagedKVCache`, with the windows, soft caps, biases and sinks that
    it has (docs/variants.md), whose code is compiled here, too; logits are computed only for rows that sample, matrix products go to
    the packaged BLAS, TVM compiles the rest. Compiled code is kept in the cache folder under a digest of the model, the options and all
    versions; weights are shared with the model.

    Parameters
    ----------
    model : the path of a GGUF file; a `models.LanguageModel`; a Hugging Face causal language model; a `torch.export` program or a
        `tvm.IRModule` with inputs input_ids [1, n] and position_ids [1, n] (n symbolic) whose first output is the logits.
    target : "llvm" for this machine's processor, "cuda" for a Hopper GPU, or a `tvm.target.Target` of one of these kinds. Compiling for
        CUDA takes an nvcc (extra `cuda`) and no GPU.
    params : for an IRModule: its weights by parameter name.
    function : of the IRModule.
    max_tokens : tokens of one step, at most; longer prompts go in chunks.
    on_unmatched, assume_full : as `relax.RewritePagedAttention` has them.
    max_batch : CUDA: sequences of a decode step that runs as one captured graph; caches of larger steps are refused.
    buckets : CUDA: numbers of sequences that graphs are captured for, a step takes the next larger one; default 1, 2, 4, … max_batch.
    dtype : for a GGUF file: "float32", or "bfloat16", "float16" to round its weights to; default float32 on CPU, bfloat16 on CUDA,
        whose kernels compute in 16-bit types. Other models have the type that they come in.
    programmatic_launch : CUDA: TVM's kernels start before the kernels ahead of them have ended, and wait there; False to see what that
        gains, or with a tool that does not follow it. Results have the same bits.
    cache : keep the compiled code, and use what is kept.
    progress : called as (step, fraction done).

    Raises
    ------
    ModelError : a path that does not exist, a file that is no Llama-like GGUF, a function without packed-token inputs, more than 4
    different windows. MatchError : an attention that cannot be rewritten. ArgumentError : an option. MissingDependencyError : names the
    extra; or a variant has to be compiled and there is no C++ compiler, or nvcc. CompileError : what it printed.
    """
    progress = progress or (lambda step, fraction: None)
    if max_tokens < 1:
        raise errors.ArgumentError(f"max_tokens is {max_tokens}; it must be at least 1")
    target_text = _target_text(target)
    is_cuda = json.loads(target_text)["kind"] == "cuda"
    if isinstance(model, (str, os.PathLike)):
        model = load_gguf(model, progress, cache=cache)
    if isinstance(model, LanguageModel):
        dtype = ("bfloat16" if is_cuda else "float32") if dtype is None else dtype
    elif dtype is not None:
        raise errors.ArgumentError(
            f"argument `dtype` is {dtype!r}; it goes with a GGUF file. This model is compiled in its own type: convert it before"
        )
    source = _source(model, params, function, dtype)
    graph_rows = _checked_buckets(max_batch, buckets) if is_cuda else ()
    options = _Options(
        target_text,
        function,
        max_tokens,
        on_unmatched,
        tuple(assume_full),
        graph_rows,
        dtype or "",
        is_cuda and programmatic_launch,
    )

    def make(folder: pathlib.Path) -> None:
        _build(source, options, folder, progress)

    stored = _stored_kernels() if is_cuda else ""
    key = cache_dir.digest_of(source.key, repr(options), stored, *_versions())[:32]
    owner = None
    if not cache:
        owner = _TemporaryFolder()
        folder, known = owner.path, False
        make(folder)
    else:
        known = cache_dir.find("compiled", key) is not None
        folder = cache_dir.published_folder("compiled", key, make)
    return Executable(
        folder,
        source.weights,
        tokenizer=source.tokenizer,
        max_position=source.max_position,
        from_cache=known,
        owner=owner,
    )


class _TemporaryFolder:
    """A folder that goes with the last reference to this."""

    def __init__(self) -> None:
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="tvm_infer-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _target_text(target: Any) -> str:
    """The target as JSON, with the processor written out, so that a cache folder shared by two machines holds code for each."""
    import tvm

    from .relax import pipeline

    if target == "llvm":
        return str(pipeline.host_target())
    if target == "cuda":
        return str(pipeline.cuda_target())
    try:
        parsed = tvm.target.Target(target)
    except (ValueError, TypeError, RuntimeError) as e:
        raise errors.ArgumentError(
            f'target is {target!r}, which TVM refuses: pass "llvm", "cuda" or a dict ({e})'
        ) from e
    kind = parsed.kind.name
    if kind not in ("llvm", "cuda"):
        raise errors.ArgumentError(
            f"target is of kind {kind!r}; models are compiled for llvm (this machine's CPU) and cuda (Hopper GPUs)"
        )
    if kind == "cuda" and str(parsed.attrs.get("arch", "")) != pipeline.CUDA_ARCH:
        raise errors.ArgumentError(
            f"target has the architecture {parsed.attrs.get('arch')!r}; TVM's own kernels are compiled for {pipeline.CUDA_ARCH!r} "
            f'(with "sm_90a" it leaves the tensor cores unused), attention for sm_90a regardless: pass "cuda"'
        )
    return str(parsed)


def _checked_buckets(max_batch: int, buckets: Sequence[int] | None) -> tuple[int, ...]:
    """Ascending, the last is max_batch."""
    if max_batch < 1:
        raise errors.ArgumentError(f"max_batch is {max_batch}; it must be at least 1")
    if buckets is None:
        return (*(1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch), max_batch)
    ascending = tuple(sorted(set(buckets)))
    if not ascending or ascending[0] < 1 or ascending[-1] != max_batch:
        raise errors.ArgumentError(
            f"buckets is {list(buckets)}; it must hold numbers from 1 to max_batch = {max_batch}, the largest of them {max_batch}"
        )
    return ascending


def _stored_kernels() -> str:
    """TVM stores its CUDA kernels as binaries where the driver's library loads, and as source elsewhere: what was kept on a machine
    without a driver is not what one with a driver should find."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "source"
    return "binaries"


def _versions() -> list[str]:
    """Everything besides model and options that compiled code depends on."""

    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} absent"

    ours = pathlib.Path(__file__).parent
    # passes, what they read models with, and the form of what is kept: a manifest of another form would be refused at every start
    sources = [path for pattern in ("relax/*.py", "models/*.py", *_KEYED) for path in sorted(ours.glob(pattern))]
    return [
        f"tvm_infer {__version__} abi {_ffi.func('abi_version')()}",
        cache_dir.digest_of_file(_ffi.LIBRARY_DIR / "libtvm_infer.so"),
        *(cache_dir.digest_of_file(path) for path in sources),
        *(version(package) for package in ("apache-tvm", "apache-tvm-ffi", "torch", "transformers")),
    ]


def _source(model: Any, params: Mapping[str, Any] | None, function: str, dtype: str | None) -> _Source:
    if isinstance(model, LanguageModel):
        return _from_language_model(model, str(dtype))
    import tvm

    from .relax import ImportedModel

    if isinstance(model, tvm.IRModule):
        return _from_module(model, params or {}, function)
    if params:
        raise errors.ArgumentError("argument `params` goes with an IRModule; other models bring their weights")
    if isinstance(model, ImportedModel):
        return _from_imported(model)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.export.ExportedProgram):
        from .relax import from_torch

        return _from_imported(from_torch(model))
    if torch is not None and isinstance(model, torch.nn.Module):
        from .relax import export_hf

        position = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        return _from_imported(export_hf(model), position)
    raise errors.ArgumentError(
        f"model is a {type(model).__name__}; it must be the path of a GGUF file, a LanguageModel, a Hugging Face causal "
        "language model, a torch.export program or a tvm.IRModule"
    )


def _from_language_model(model: LanguageModel, dtype: str) -> _Source:
    """The code depends on the sizes alone, so a known model starts without torch."""
    rounded = model.astype(dtype)

    def module() -> tuple[Any, Mapping[str, str]]:
        from .relax import export_hf

        imported = export_hf(rounded.to_hf())
        return imported.mod, imported.torch_names

    weights = dict(rounded.weights)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return _Source(f"{model.config!r} {dtype}", module, weights, model.tokenizer, model.config.max_position)


def _from_imported(imported: Any, max_position: int | None = None) -> _Source:
    names = dict(imported.torch_names)
    weights = {names[name]: tensor for name, tensor in imported.weights.items()}
    return _Source(
        _digest(imported.mod) + repr(sorted(names.items())), lambda: (imported.mod, names), weights, None, max_position
    )


def _from_module(mod: Any, params: Mapping[str, Any], function: str) -> _Source:
    from tvm import relax

    functions = [str(var.name_hint) for var, func in mod.functions_items() if isinstance(func, relax.Function)]
    if function not in functions:
        raise errors.ModelError(f"the module has no Relax function {function!r}; it has {functions}: pass function=…")
    func = mod[function]
    names = [str(p.name) for p in func.params]
    unknown = [name for name in params if name not in names]
    if unknown:
        raise errors.ArgumentError(f"argument `params` has {unknown[:4]}, which are no parameters of {function!r}")
    if not (func.attrs and "num_input" in func.attrs):
        num_input = len(names) - len(params)
        if any(name in params for name in names[:num_input]):
            raise errors.ModelError(
                f"function {function!r} has weights before inputs: {names[: num_input + 1]}; put inputs first, or set its attribute "
                "num_input"
            )
        mod = mod.clone()
        mod.update_func(mod.get_global_var(function), func.with_attr("num_input", num_input))
    return _Source(_digest(mod), lambda: (mod, {}), params)


def _digest(mod: Any) -> str:
    import tvm

    return cache_dir.digest_of(tvm.ir.save_json(mod))


def _build(source: _Source, options: _Options, folder: pathlib.Path, progress: Progress) -> None:
    """Write model.so, manifest.json and report.txt into `folder`."""
    progress("importing the model", 0.0)
    mod, names = source.module()
    import tvm

    from .relax import pipeline
    from .relax.written import written_rope

    progress("rewriting attention and matrix products", 0.5)
    rope = written_rope(mod)
    target = tvm.target.Target(json.loads(options.target))
    decode_rows = options.buckets[-1] if options.buckets else 0
    mod, reports = pipeline.prepare(
        mod,
        function=options.function,
        max_tokens=options.max_tokens,
        decode_rows=decode_rows,
        on_unmatched=options.on_unmatched,
        assume_full=options.assume_full,
        target_kind=str(target.kind.name),
    )
    inputs, weights, vocab_size = pipeline.entry_signature(mod, options.function)
    specs = [spec.with_weight_names(names) for spec in reports.attention.specs()]
    _check_entry(options.function, inputs, specs)
    if decode_rows:
        _check_cuda_inputs(options.function, inputs)
        _check_cuda_layers(specs)
    progress("compiling kernels", 0.6)
    with _cuda_compiler() if decode_rows else contextlib.nullcontext():
        lowered = pipeline.lower(
            mod, target, reports, options.function, programmatic_launch=options.programmatic_launch
        )
        objects = folder / library.OBJECTS  # kept: Executable.export_library links them anew
        objects.mkdir()
        lowered.executable.export_library(str(folder / library.LIBRARY), workspace_dir=str(objects))
        (folder / library.FUNCTIONS).write_text(library.functions_called(lowered.executable))
    (folder / library.REPORT).write_text(str(reports))
    Manifest(
        abi_version=int(_ffi.func("abi_version")()),
        target=options.target,
        function=options.function,
        inputs=tuple(inputs),
        weights=tuple(names.get(name, name) for name, _ in weights),
        weight_types=tuple(kind for _, kind in weights),
        layers=tuple(specs),
        vocab_size=vocab_size,
        max_tokens=options.max_tokens,
        decode_function=lowered.decode_function,
        decode_rows=decode_rows,
        buckets=options.buckets,
        logits_dtype=lowered.logits_dtype,
        logits_rank=lowered.logits_rank,
        rope=rope,
    ).save(folder)
    progress("compiling attention variants", 0.9)
    _prepare_variants(specs, weights, names, str(target.kind.name))
    progress("compiling kernels", 1.0)


def _prepare_variants(
    specs: Sequence[AttentionSpec], weights: Sequence[tuple[str, str]], names: Mapping[str, str], target_kind: str
) -> None:
    """Compile, or find in the cache, what the layers' variants need, so that the first step need not wait for it: for CUDA the kernels
    of caches with pages of the default size.

    weights : (parameter, "dtype [shape]"). names : of parameters, as the specs have them.
    """
    variants = list(dict.fromkeys(spec.variant for spec in specs if spec.variant is not None))
    types = {names.get(name, name): _shape_and_dtype(kind) for name, kind in weights}
    layers = [
        {**vars(spec), "variant": None if spec.variant is None else variants.index(spec.variant)} for spec in specs
    ]
    codes = variant_code.of_model(variants, layers, types, "cuda" if target_kind == "cuda" else "cpu")
    if target_kind != "cuda":
        variant_code.prepare_host(codes)
        return
    variant_code.register(codes)
    kernels = [
        model_kernels.attention_kernel(specs[code.layers[0]], page_size, code.digest)
        for code in variant_code.by_digest(codes).values()
        for page_size in library.DEFAULT_PAGE_SIZES
    ]
    library.build_kernels(kernels, library.DEFAULT_ARCHS)


def _shape_and_dtype(kind: str) -> tuple[list[int], str]:
    """Of a weight's "dtype [shape]"."""
    dtype, _, shape = kind.partition(" ")
    return json.loads(shape), dtype


def _check_cuda_inputs(function: str, inputs: Sequence[tuple[str, str]]) -> None:
    """A captured step reads them where the cache puts them: nothing stands between that could convert."""
    others = [f"{name} {dtype}" for name, dtype in inputs if dtype != "int64"]
    if others:
        raise errors.ModelError(
            f"function {function!r} takes {', '.join(others)}; inputs of a model for CUDA are int64, as the cache writes them: declare "
            "them so, and cast in the function (R.astype) where it computes with another type"
        )


def _check_cuda_layers(specs: Sequence[Any]) -> None:
    """Before anything is compiled, in terms of the model."""
    tile_table = _ffi.func("cuda_vo_tile_table")
    for spec in specs:
        try:
            tile_table(spec.dtype, spec.head_dim, spec.width_vo, spec.dtype)
        except (errors.ExecutorError, errors.DTypeError) as error:
            raise errors.ExecutorError(
                f"the model has {spec}, for which there is no CUDA kernel ({error}). Convert the model, model.to(torch.bfloat16), or "
                'compile it for target="llvm"'
            ) from error


@contextlib.contextmanager
def _cuda_compiler() -> Iterator[None]:
    """TVM's kernels are compiled by the nvcc that compiles ours, without fast-math: its sines are wrong at late positions."""
    from .jit import nvcc

    found = pathlib.Path(nvcc.find().path)
    changes = {
        "TVM_CUDA_COMPILE_MODE": "nvcc",
        "TVM_CUDA_NVCC_NO_FAST_MATH": "1",
        "PATH": os.pathsep.join([str(found.parent), os.environ.get("PATH", "")]),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_entry(function: str, inputs: Sequence[tuple[str, str]], specs: Sequence[Any]) -> None:
    known = ("input_ids", "position_ids", "logit_indices")
    unknown = [name for name, _ in inputs if name not in known]
    if unknown:
        raise errors.ModelError(
            f"function {function!r} has the inputs {unknown}, which an executable cannot feed; it knows {', '.join(known)}: pass "
            "weights as `params`, or remove the input"
        )
    if not specs:
        raise errors.ModelError(
            f"function {function!r} has no attention that reads a KV cache: there is nothing to decode with"
        )
    if len({(s.num_qo_heads, s.num_kv_heads, s.head_dim, s.width_vo, s.dtype) for s in specs}) > 1:
        raise errors.ModelError(
            f"the attention layers of {function!r} differ in heads, head_dim or dtype: {sorted({str(s) for s in specs})}; one cache "
            "serves equal layers only"
        )
    _check_bands(function, specs)
    if any(not s.causal for s in specs):
        raise errors.ModelError(
            f"an attention of {function!r} is not causal: tokens that come one by one cannot see later ones"
        )


def _check_bands(function: str, specs: Sequence[Any]) -> None:
    """A step makes a plan for each band (window, chunk, first keys and window) of its layers, and has room for so many."""
    plain = Band(window_right=0)
    bands = {plain if s.variant is None else s.variant.band for s in specs}
    if len(bands) > MAX_BANDS:
        shown = ", ".join("none" if band == plain else str(band) for band in sorted(bands))
        raise errors.ModelError(
            f"the attention layers of {function!r} have {len(bands)} different windows ({shown}), each of which takes a plan, and a "
            f"step has at most {MAX_BANDS}: export the model with fewer (no window counts as one)"
        )

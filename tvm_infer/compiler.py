"""tvm_infer.compile: a model in, an executable out; compiled code is kept in the cache folder."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import __version__, _ffi, cache_dir, errors
from .models import LanguageModel, Tokenizer, load_gguf
from .runtime import library
from .runtime.executable import Executable, Manifest

DEFAULT_MAX_TOKENS = 512
Progress = Callable[[str, float], None]  # (step, fraction done)


@dataclass(frozen=True)
class _Options:
    target: str
    function: str
    max_tokens: int
    on_unmatched: str
    assume_full: tuple[str, ...]


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
    cache: bool = True,
    progress: Progress | None = None,
) -> Executable:
    """Compile a model whose attention reads a paged KV cache.

    Attention over packed tokens becomes append + attend on a :class:`PagedKVCache`, logits are computed only for rows that sample,
    matrix products go to the packaged BLAS, TVM compiles the rest. Compiled code is kept in the cache folder under a digest of the
    model, the options and all versions; weights are shared with the model.

    Parameters
    ----------
    model : the path of a GGUF file; a `models.LanguageModel`; a Hugging Face causal language model; a `torch.export` program or a
        `tvm.IRModule` with inputs input_ids [1, n] and position_ids [1, n] (n symbolic) whose first output is the logits.
    target : "llvm" for this machine's processor, or a `tvm.target.Target` of kind llvm.
    params : for an IRModule: its weights by parameter name.
    function : of the IRModule.
    max_tokens : tokens of one step, at most; longer prompts go in chunks.
    on_unmatched, assume_full : as `relax.RewritePagedAttention` has them.
    cache : keep the compiled code, and use what is kept.
    progress : called as (step, fraction done).

    Raises
    ------
    ModelError : a path that does not exist, a file that is no Llama-like GGUF, a function without packed-token inputs.
    MatchError : an attention that cannot be rewritten. ArgumentError : an option. MissingDependencyError : names the extra.
    """
    progress = progress or (lambda step, fraction: None)
    if max_tokens < 1:
        raise errors.ArgumentError(f"max_tokens is {max_tokens}; it must be at least 1")
    if isinstance(model, (str, os.PathLike)):
        model = load_gguf(model, progress, cache=cache)
    source = _source(model, params, function)
    options = _Options(_target_text(target), function, max_tokens, on_unmatched, tuple(assume_full))

    def make(folder: pathlib.Path) -> None:
        _build(source, options, folder, progress)

    key = cache_dir.digest_of(source.key, repr(options), *_versions())[:32]
    if not cache:
        holder = tempfile.TemporaryDirectory(prefix="tvm_infer-")
        folder, known = pathlib.Path(holder.name), False
        make(folder)
    else:
        known = cache_dir.find("compiled", key) is not None
        folder = cache_dir.published_folder("compiled", key, make)
    executable = Executable(
        folder, source.weights, tokenizer=source.tokenizer, max_position=source.max_position, from_cache=known
    )
    if not cache:
        weakref.finalize(executable, holder.cleanup)
    return executable


def _target_text(target: Any) -> str:
    """The target as JSON, with the processor written out, so that a cache folder shared by two machines holds code for each."""
    import tvm

    from .relax import pipeline

    if target == "llvm":
        return str(pipeline.host_target())
    try:
        parsed = tvm.target.Target(target)
    except (ValueError, TypeError, RuntimeError) as e:
        raise errors.ArgumentError(f'target is {target!r}, which TVM refuses: pass "llvm" or a dict ({e})') from e
    if parsed.kind.name != "llvm":
        raise errors.ArgumentError(
            f"target is of kind {parsed.kind.name!r}; models are compiled for llvm (this machine's CPU) so far"
        )
    return str(parsed)


def _versions() -> list[str]:
    """Everything besides model and options that compiled code depends on."""

    def version(package: str) -> str:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{package} absent"

    ours = pathlib.Path(__file__).parent
    passes = [cache_dir.digest_of_file(path) for path in sorted((ours / "relax").glob("*.py"))]
    return [
        f"tvm_infer {__version__} abi {_ffi.func('abi_version')()}",
        cache_dir.digest_of_file(_ffi.LIBRARY_DIR / "libtvm_infer.so"),
        cache_dir.digest_of_file(__file__),
        *passes,
        *(version(package) for package in ("apache-tvm", "apache-tvm-ffi", "torch", "transformers")),
    ]


def _source(model: Any, params: Mapping[str, Any] | None, function: str) -> _Source:
    if isinstance(model, LanguageModel):
        return _from_language_model(model)
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


def _from_language_model(model: LanguageModel) -> _Source:
    """The code depends on the sizes alone, so a known model starts without torch."""

    def module() -> tuple[Any, Mapping[str, str]]:
        from .relax import export_hf

        imported = export_hf(model.to_hf())
        return imported.mod, imported.torch_names

    weights = dict(model.weights)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return _Source(repr(model.config), module, weights, model.tokenizer, model.config.max_position)


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

    progress("rewriting attention and matrix products", 0.5)
    mod, reports = pipeline.prepare(
        mod,
        function=options.function,
        max_tokens=options.max_tokens,
        on_unmatched=options.on_unmatched,
        assume_full=options.assume_full,
    )
    inputs, weights, vocab_size = pipeline.entry_signature(mod, options.function)
    specs = reports.attention.specs()
    _check_entry(options.function, inputs, specs)
    progress("compiling kernels", 0.6)
    executable = pipeline.lower(mod, tvm.target.Target(json.loads(options.target)))
    objects = folder / library.OBJECTS  # kept: Executable.export_library links them anew
    objects.mkdir()
    executable.export_library(str(folder / library.LIBRARY), workspace_dir=str(objects))
    (folder / library.REPORT).write_text(str(reports))
    Manifest(
        abi_version=int(_ffi.func("abi_version")()),
        target=options.target,
        function=options.function,
        inputs=tuple(inputs),
        weights=tuple(names.get(name, name) for name in weights),
        layers=tuple(specs),
        vocab_size=vocab_size,
        max_tokens=options.max_tokens,
    ).save(folder)
    progress("compiling kernels", 1.0)


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
    if len({(s.num_qo_heads, s.num_kv_heads, s.head_dim, s.dtype) for s in specs}) > 1:
        raise errors.ModelError(
            f"the attention layers of {function!r} differ in heads, head_dim or dtype: {sorted({str(s) for s in specs})}; one cache "
            "serves equal layers only"
        )
    if any(not s.causal for s in specs):
        raise errors.ModelError(
            f"an attention of {function!r} is not causal: tokens that come one by one cannot see later ones"
        )

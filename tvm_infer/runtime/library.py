"""A compiled model in one file: what goes into the library, and how one is read (docs/deploy.md)."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__, _ffi, blas, cublas, errors
from ..spec import AttentionSpec
from . import linker, model_kernels, variant_code
from .cache_defaults import CacheDefaults

FORMAT = 2  # of the embedded manifest
LIBRARY, OBJECTS, MANIFEST, REPORT, WEIGHTS = "model.so", "objects", "manifest.json", "report.txt", "model.safetensors"
FUNCTIONS = "functions.json"
_CUDA_LOADER = "ffi.Module.load_from_bytes.cuda"
DEFAULT_ARCHS, DEFAULT_PAGE_SIZES = ("sm_90a",), (16,)


@dataclass(frozen=True)
class CompiledModel:
    """A compiled model as it lies on disk.

    manifest : fields of runtime.Manifest. report : of the compiler. library : the shared library with the code.
    about : what the library of an exported model says of itself; None for a folder of the compiler.
    """

    manifest: dict[str, Any]
    report: str
    library: pathlib.Path
    about: dict[str, Any] | None = None


def read(path: os.PathLike[str] | str) -> CompiledModel:
    """What the compiler left in a folder, or what an exported library says of itself. Raises ModelError."""
    path = pathlib.Path(path)
    if path.is_dir():
        manifest = json.loads((path / MANIFEST).read_text())
        return CompiledModel(manifest, (path / REPORT).read_text(), path / LIBRARY)
    about = json.loads(str(_manifest_function(path)()))
    if about.get("format") != FORMAT:
        raise errors.AbiError(
            f"{path} was exported by tvm_infer {about.get('tvm_infer')} with a manifest of format {about.get('format')}; this is "
            f"tvm_infer {__version__}, which reads format {FORMAT}: export the model again with this version"
        )
    return CompiledModel(about["model"], about["report"], path, about)


def load_module(path: pathlib.Path) -> Any:
    """The library as a module of TVM's runtime. Raises ModelError for what is none."""
    import tvm

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise errors.ModelError(f"{path} {what}; name a library that Executable.export_library wrote")
    try:
        return tvm.runtime.load_module(str(path.resolve()))
    except Exception as error:  # a loader's, TVM's, or tvm-ffi's own kind
        if _CUDA_LOADER in str(error):  # it holds kernels that TVM made
            ensure_cuda_runtime()
            return tvm.runtime.load_module(str(path.resolve()))
        raise errors.ModelError(
            f"{path} is no library that TVM {tvm_version()} loads: {str(error).strip().splitlines()[-1]}"
        ) from error


@functools.cache
def ensure_cuda_runtime() -> None:
    """TVM's CUDA runtime, which `import tvm` leaves out where TVM_USE_RUNTIME_LIB is set. ExecutorError where it cannot be loaded."""
    import tvm
    from tvm_ffi import get_global_func

    if get_global_func("device_api.cuda", allow_missing=True) is not None:
        return
    path = pathlib.Path(str(tvm.__file__)).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise errors.ExecutorError(
            f"TVM's CUDA runtime cannot be loaded ({error}): it needs the driver's libcuda.so.1 and CUDA's libcudart.so, on the "
            "loader's path (LD_LIBRARY_PATH)"
        ) from error


def offer_kernels(model: CompiledModel) -> None:
    """Let the package's cache and functions launch the model's kernels: a machine that loads it need not have a compiler."""
    assert model.about is not None
    cubin = load_module(model.library).get_function("tvm_infer_model_cubin", True)
    for arch in model.about["archs"]:
        for name in model.about["kernels"]:
            _ffi.offer_cubin(name, arch, functools.partial(cubin, name, arch))


def ensure_blas(model: CompiledModel, module: Any) -> None:
    """Give the model's matrix products a BLAS, unless they need none or the library brought its own."""
    about = model.about
    if _device(str(model.manifest["target"])) == "cuda":
        ensure_cuda_runtime()
        if about is None:
            cublas.ensure_cublas()
        elif model_kernels.multiplies(about["functions"]) and not module.get_function("tvm_infer_cublas_path", True)():
            module.get_function("tvm_infer_set_cublas", True)(cublas.need().path)
    elif about is None:
        blas.ensure_blas()
    elif model_kernels.multiplies(about["functions"]) and not module.get_function("tvm_infer_blas_path", True)():
        module.get_function("tvm_infer_set_blas", True)(str(blas.packaged_blas()), blas.PACKAGED_PREFIX)


def _manifest_function(path: pathlib.Path) -> Any:
    module = load_module(path)
    if not module.implements_function("tvm_infer_model_manifest", True):
        raise errors.ModelError(
            f"{path} holds no model of tvm_infer's (no function tvm_infer_model_manifest); Executable.export_library writes one"
        )
    return module.get_function("tvm_infer_model_manifest", True)


def export(
    model: CompiledModel,
    path: os.PathLike[str] | str,
    *,
    weights: Sequence[tuple[str, Sequence[int], str]],
    max_position: int | None,
    archs: Sequence[str],
    page_sizes: Sequence[int],
    include_blas: bool,
    **cache_settings: Any,
) -> None:
    """Write the library of a compiled model; weights : (name, shape, dtype). cache_settings : CacheDefaults.make's. Arguments and
    errors: Executable.export_library."""
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise errors.ArgumentError(f"argument `path` is {os.fspath(path)!r}; there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise errors.ArgumentError(f"argument `path` is {os.fspath(path)!r}, which is a folder; name a file: model.so")
    if model.about is not None:
        _copy(model, path, archs, page_sizes, cache_settings)
        return
    objects = sorted((model.library.parent / OBJECTS).glob("*.o"))
    if not objects:
        raise errors.ModelError(f"{model.library.parent} holds no object files: compile the model again")
    _refuse_source(objects)
    functions = called_functions(model)
    device = _device(str(model.manifest["target"]))
    defaults = _cache_defaults(model, cache_settings)
    codes = _variants(model.manifest, {name: (shape, dtype) for name, shape, dtype in weights}, device)
    layers = [AttentionSpec(**{**spec, "variant": None}) for spec in model.manifest["layers"]]
    kernels: tuple[str, ...] = ()
    variant_objects, variant_symbols = list[pathlib.Path](), dict[tuple[str, str], str]()
    if device == "cuda":
        variant_code.register(codes)
        digests = {number: code.digest for code in codes for number in code.layers}
        selects = defaults.page_budget is not None
        kernels = model_kernels.kernel_names(layers, functions, page_sizes, digests, defaults.kv_dtype, selects)
    else:
        archs = page_sizes = ()
        variant_objects, variant_symbols = variant_code.host_objects(codes)
    about = {
        "format": FORMAT,
        "tvm_infer": __version__,
        "tvm": tvm_version(),
        "device": device,
        "functions": functions,
        "kernels": kernels,
        "archs": tuple(archs),
        "page_sizes": tuple(page_sizes),
        "cache": defaults.to_row(),
        "weights": [{"name": name, "shape": list(shape), "dtype": dtype} for name, shape, dtype in weights],
        "variants": [code.to_row() for code in codes],
        "max_position": max_position,
        "model": model.manifest,
        "report": model.report,
    }
    wants_blas = include_blas and device == "cpu" and model_kernels.multiplies(functions)
    contents = linker.Contents(
        manifest=json.dumps(about),
        cubins=_cubins(kernels, archs),
        blas=blas.packaged_blas() if wants_blas else None,
        blas_prefix=blas.PACKAGED_PREFIX,
        variants=variant_symbols,
    )
    linker.link([*objects, *variant_objects], contents, path)


def _cache_defaults(model: CompiledModel, settings: Mapping[str, Any]) -> CacheDefaults:
    layers = model.manifest["layers"]
    defaults = CacheDefaults.make(layers[0]["dtype"], len(layers), layers[0]["num_kv_heads"], **settings)
    if defaults.page_budget is not None:
        defaults.page_budget.check_variants(
            [number for number, layer in enumerate(layers) if layer["variant"] is not None]
        )
    return defaults


def cache_defaults(model: CompiledModel) -> CacheDefaults:
    """What caches of the model are unless they are asked to be others: of an exported library as it says, else of the model's dtype."""
    return _cache_defaults(model, {}) if model.about is None else CacheDefaults.from_row(model.about["cache"])


def _variants(manifest: Mapping[str, Any], weights: variant_code.Types, device: str) -> list[variant_code.VariantCode]:
    """Of the manifest's "variants", in their order."""
    if not manifest["variants"]:
        return []
    from ..variant.layer import LayerVariant

    variants = [LayerVariant.from_fields(stored) for stored in manifest["variants"]]
    return variant_code.of_model(variants, manifest["layers"], weights, device)


# In what TVM packs: the kind of a module, the size of what it saved, and first in that the format of its code.
_KERNELS_AS_SOURCE = re.compile(rb"\x04\0{7}cuda.{8}\x04\0{7}cuda", re.DOTALL)


def _refuse_source(objects: Sequence[pathlib.Path]) -> None:
    """TVM compiles its kernels only where its CUDA runtime can be loaded, and otherwise leaves that to whoever loads the library."""
    if any(_KERNELS_AS_SOURCE.search(path.read_bytes()) for path in objects):
        raise errors.ExecutorError(
            "the model was compiled without an NVIDIA driver (libcuda.so.1) in reach, where TVM keeps its own kernels as source, for "
            "which the receiver would need a CUDA toolkit: compile the model on a machine with a driver"
        )


def build_kernels(kernels: Sequence[str], archs: Sequence[str]) -> None:
    """Compile CUDA kernels into the cache, several at a time, unless a folder of prebuilt ones is set. Raises as jit.build."""
    from .. import jit

    if not kernels or os.environ.get("TVM_INFER_CUBIN_DIR"):
        return
    for arch in archs:
        jit.build(kernels, arch)


def _cubins(kernels: Sequence[str], archs: Sequence[str]) -> dict[tuple[str, str], bytes]:
    from .. import jit

    build_kernels(kernels, archs)  # what follows finds them in the cache
    return {(name, arch): jit.cubin(name, arch) for arch in archs for name in kernels}


def _copy(
    model: CompiledModel,
    path: pathlib.Path,
    archs: Sequence[str],
    page_sizes: Sequence[int],
    cache_settings: Mapping[str, Any],
) -> None:
    """An exported library is exported by copying it, if it holds what is asked for."""
    assert model.about is not None
    for name, asked in (("archs", archs), ("page_sizes", page_sizes)):
        have = model.about[name]
        if model.about["device"] == "cuda" and not set(asked) <= set(have):
            raise errors.ArgumentError(
                f"argument `{name}` is {list(asked)}; this model was loaded from {model.library}, which holds kernels for {have}: "
                "compile it again to export others"
            )
    own = cache_defaults(model)
    given = {name: value for name, value in cache_settings.items() if value is not None}
    if given and _cache_defaults(model, own.settings(**given)) != own:
        raise errors.ArgumentError(
            f"arguments {', '.join(f'`{name}`' for name in given)} ask for other caches than those of {model.library}, which this "
            f"model was loaded from ({own.kv_dtype} pages, shared_prefix={own.shared_prefix}, page_budget={own.page_budget}): compile "
            "it again to export it so"
        )
    linker.publish(model.library, path)


def called_functions(model: CompiledModel) -> list[str]:
    """Names of tvm_infer's packed functions that a compiled model calls."""
    if model.about is not None:
        return list(model.about["functions"])
    return list(json.loads((model.library.parent / FUNCTIONS).read_text()))


def functions_called(executable: Any) -> str:
    """Names of tvm_infer's packed functions that a `tvm.relax.VMExecutable` calls, as JSON: for the file FUNCTIONS."""
    return json.dumps(sorted(set(re.findall(r"\btvm_infer\.(\w+)", str(executable.mod["stats"]())))))


def _device(target: str) -> str:
    return "cuda" if json.loads(target)["kind"] == "cuda" else "cpu"


def tvm_version() -> str:
    """Of the TVM that is installed."""
    return importlib.metadata.version("apache-tvm")

"""tvm_infer.load: an exported model, without its compiler."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import __version__, _ffi, errors
from . import library
from .executable import Executable
from .weights_file import WeightsFile

if TYPE_CHECKING:
    from ..models import Tokenizer


def load(
    path: os.PathLike[str] | str,
    weights: os.PathLike[str] | str | Mapping[str, Any] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> Executable:
    """A model that :meth:`Executable.export_library` or :meth:`Executable.save` wrote.

    Compiles nothing, and needs neither torch nor TVM's compiler: its runtime is enough (``TVM_USE_RUNTIME_LIB=1``).

    Parameters
    ----------
    path : the library, or the folder of Executable.save.
    weights : a safetensors file (Executable.save_weights), which is mapped into memory and not copied, or tensors by name; may be
        left out where `path` is a folder.
    tokenizer : for prompts that are texts.

    Raises
    ------
    ModelError : no such file, no exported model, weights that are missing or of another shape or type. AbiError : the library or the
    weights are of another tvm_infer ABI. ExecutorError : the library holds no kernels for this machine's GPU.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        weights = path / library.WEIGHTS if weights is None else weights
        path = path / library.LIBRARY
    if weights is None:
        raise errors.ArgumentError(
            f"argument `weights` is missing: {path} holds code alone; pass the file of Executable.save_weights"
        )
    model = library.read(path)
    if model.about is None:
        raise errors.ModelError(f"{path} is no exported model")
    tensors = weights if isinstance(weights, Mapping) else WeightsFile(weights)
    _check_abi(model, tensors)
    _check_weights(model.about, tensors)
    if model.about["device"] == "cuda":
        library.load_module(path).get_function("tvm_infer_model_check_cuda", True)(0)
        library.offer_kernels(model)
    return Executable(path, tensors, tokenizer=tokenizer, max_position=model.about["max_position"])


def _check_abi(model: library.CompiledModel, tensors: Mapping[str, Any]) -> None:
    assert model.about is not None
    theirs, ours = str(model.about["tvm"]), library.tvm_version()
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise errors.AbiError(
            f"{model.library} was compiled by TVM {theirs} and this is TVM {ours}, whose runtime may call it differently: export the "
            "model again, or install that TVM"
        )
    have, built = int(_ffi.func("abi_version")()), int(model.manifest["abi_version"])
    if built != have:
        raise errors.AbiError(
            f"{model.library} was exported by tvm_infer {model.about['tvm_infer']} with ABI {built}; this is tvm_infer {__version__} "
            f"with ABI {have}: export the model again, or load it with the version that made it"
        )
    if not isinstance(tensors, WeightsFile):
        return
    written = tensors.metadata.get("tvm_infer.abi_version", str(built))  # a file of other makers has none
    if written != str(built):
        raise errors.AbiError(
            f"the weights {tensors.path} were written with tvm_infer ABI {written}, {model.library} has ABI {built}: write them again "
            "with Executable.save_weights"
        )


def _check_weights(about: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Names, shapes and types, before anything runs. Other tensors in the file are no error."""
    wanted = about["weights"]
    missing = [w["name"] for w in wanted if w["name"] not in tensors]
    if missing:
        raise errors.ModelError(
            f"{len(missing)} weights of the compiled model are not given, {missing[0]!r} first; given are "
            f"{', '.join(list(tensors)[:4])}, …"
        )
    for w in wanted:
        if isinstance(tensors, WeightsFile):
            shape, dtype = tensors.shape_and_dtype(w["name"])
        else:
            tensor = tensors[w["name"]]
            shape, dtype = tuple(int(n) for n in tensor.shape), str(tensor.dtype).removeprefix("torch.")
        if list(shape) != w["shape"] or dtype != w["dtype"]:
            raise errors.ModelError(
                f"weight {w['name']!r} is {dtype} {list(shape)}; the model was compiled for {w['dtype']} {w['shape']}: these are the "
                "weights of another model"
            )

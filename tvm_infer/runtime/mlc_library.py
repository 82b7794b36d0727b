"""The adapter between TVM's KV cache builtins and our cache: built against the TVM that is installed, checked, loaded.

Its object derives from a C++ class of TVM whose virtual functions differ from version to version, so no wheel of ours can carry it
built. It is compiled once (5 s) and kept; sources: cuda_src/tvm_infer/mlc.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from .. import _ffi, cache_dir, env
from ..errors import AbiError, ArgumentError, MissingDependencyError
from ..jit import cxx, headers
from . import mlc_names, mlc_rope, mlc_variants

# What of TVM's headers decides the layout of the class; their folder is the wheel's root.
_TVM_HEADERS = (
    "src/runtime/vm/kv_state.h",
    "include/tvm/runtime/base.h",
    "include/tvm/runtime/device_api.h",
    "include/tvm/runtime/tensor.h",
)
_PROBE_PAGES = 5


def _tvm() -> Any:
    try:
        import tvm
    except ImportError as error:
        raise MissingDependencyError(
            f"apache-tvm is needed for TVM's KV cache builtins and does not import: {error}"
        ) from error
    return tvm


def _tvm_headers(root: pathlib.Path) -> dict[str, bytes]:
    missing = [name for name in _TVM_HEADERS if not (root / name).is_file()]
    if missing:
        raise MissingDependencyError(
            f"the installed apache-tvm ({root}) lacks {', '.join(missing)}, which the adapter is built against: install its wheel "
            "(pip install 'apache-tvm==0.27.*')"
        )
    return {name: (root / name).read_bytes() for name in _TVM_HEADERS}


def _layout(root: pathlib.Path) -> str:
    """A digest of TVM's headers: two versions of one number are told apart by it."""
    return cache_dir.digest_of(*(part for item in _tvm_headers(root).items() for part in item))[:16]


def _sources(folder: pathlib.Path) -> dict[str, bytes]:
    paths = sorted(p for p in (folder / "tvm_infer" / "mlc").rglob("*") if p.suffix in {".h", ".cc"})
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def describe() -> cxx.Library:
    """What the adapter is built from, on this machine."""
    import tvm_ffi
    from tvm_ffi import libinfo

    tvm = _tvm()
    root, ours = pathlib.Path(tvm.__file__).parent, headers.include_dir()
    ffi_include = [pathlib.Path(p) for p in dict.fromkeys(libinfo.include_paths())]
    return cxx.Library(
        name="tvm_infer_mlc",
        sources=_sources(ours),
        foreign=_tvm_headers(root),
        defines={
            "MLC_ADAPTER_TVM_VERSION": tvm.__version__,
            "MLC_ADAPTER_TVM_LAYOUT": _layout(root),
            "MLC_ADAPTER_FFI_VERSION": tvm_ffi.__version__,
        },
        # TVM's own come first: where a wheel has the headers that shims/ stands in for, they win.
        include_dirs=[root / "include", root, *ffi_include, ours, ours / "tvm_infer" / "mlc" / "shims"],
        library_dirs=[*_library_dirs(root), pathlib.Path(libinfo.find_libtvm_ffi()).parent],
        libraries=["tvm_runtime", "tvm_ffi"],
    )


def _library_dirs(root: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in (root / "lib", root) if (path / "libtvm_runtime.so").is_file()]


def build() -> pathlib.Path:
    """The adapter's path: of the setting TVM_INFER_MLC_LIBRARY, else of the cache, compiled if it is not there.

    Raises
    ------
    MissingDependencyError : no C++ compiler, no TVM, or one without its headers. CompileError : the compiler refused; its output.
    ArgumentError : TVM_INFER_MLC_LIBRARY names no file.
    """
    prebuilt = env.setting("TVM_INFER_MLC_LIBRARY").value
    if prebuilt:
        path = pathlib.Path(prebuilt).expanduser()
        if not path.is_file():
            raise ArgumentError(
                f"setting TVM_INFER_MLC_LIBRARY is {prebuilt!r}, which is no file: name the adapter, or unset it to have it built"
            )
        return path
    return cxx.shared_library(describe())


@functools.cache
def load() -> Any:
    """Load the adapter once; `tvm_infer.mlc_kv_cache_create` is a global function from then on.

    Raises as :func:`build`, and AbiError where it does not fit the TVM that is loaded.
    """
    import tvm_ffi

    tvm = _tvm()
    _ffi.library()  # whose functions the adapter calls
    module = tvm_ffi.load_module(str(build()))
    _check_versions(module, tvm.__version__, _layout(pathlib.Path(tvm.__file__).parent))
    _check_calls(module, tvm)
    tvm_ffi.register_global_func("tvm_infer.mlc_rope_tables", mlc_rope.rope_tables, override=True)
    tvm_ffi.register_global_func("tvm_infer.mlc_variant", mlc_variants.code, override=True)
    module["tvm_infer_mlc_register"]()
    mlc_names.register_call_names()
    return module


def _check_versions(module: Any, version: str, layout: str) -> None:
    """Refuse an adapter that was built against another TVM: its virtual functions would be others."""
    built, built_layout = str(module["tvm_infer_mlc_tvm_version"]()), str(module["tvm_infer_mlc_tvm_layout"]())
    if (built, built_layout) != (version, layout):
        raise AbiError(
            f"the MLC adapter was built against TVM {built} (headers {built_layout}) and TVM {version} (headers {layout}) is loaded: "
            "unset TVM_INFER_MLC_LIBRARY, and it is built again for this one"
        )


def _check_calls(module: Any, tvm: Any) -> None:
    """Call a small cache through TVM's own builtins, which find the functions by their place: do they get the right ones?"""
    import numpy as np
    import tvm_ffi

    shape = tvm_ffi.Shape
    capacity = 4 * (_PROBE_PAGES - 1)
    cache = module["tvm_infer_mlc_create"](
        shape((1, capacity, 4, 4, 0)), shape((0, 1)), 1, 1, 1, 8, 8, shape((0,)), 0, 0, 0, 1.0, 1e4, "", None, 8, False,
        tvm.runtime.tensor(np.zeros((), np.float32)),
    )  # fmt: skip

    def call(name: str, *args: Any) -> Any:
        return tvm.get_global_func(f"vm.builtin.{name}")(cache, *args)

    # First those that take nothing and change nothing, so that a wrong one among them does no harm.
    seen = [
        call("attention_kv_cache_empty"),
        call("attention_kv_cache_get_num_available_pages"),
        call("attention_kv_cache_get_total_sequence_length"),
    ]
    if seen == [True, _PROBE_PAGES, 0]:
        call("kv_state_add_sequence", 3)
        call("kv_state_begin_forward", shape((3,)), shape((2,)))
        positions = call("attention_kv_cache_get_query_positions").numpy().tolist()
        call("kv_state_end_forward")
        seen = [positions, call("attention_kv_cache_get_total_sequence_length"), call("attention_kv_cache_empty")]
    if seen != [[0, 1], 2, False]:
        raise AbiError(
            f"TVM {tvm.__version__} does not reach the adapter's functions as its headers say (a probe gave {seen}): its headers and "
            "libraries are not of one version; install apache-tvm again"
        )

"""Links a compiled model, tvm_infer's functions, kernels and a manifest into one shared library (embedded.h has the C++ side)."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .. import _ffi, errors

# What TVM's runtime looks for: packed functions, TVM's own data and the pointers that it fills in. Everything else stays inside.
_VERSION_SCRIPT = "{ global: __tvm_ffi_*; __TVM*; local: *; };\n"


@dataclass(frozen=True)
class Contents:
    """What a library holds besides code.

    manifest : JSON. cubins : (kernel name, architecture) -> bytes. blas : a shared library, and what its symbols begin with.
    variants : (instruction set of the CPU executor, digest) -> the symbol of a variant's functions, which an object must define.
    """

    manifest: str
    cubins: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    blas: pathlib.Path | None = None
    blas_prefix: str = ""
    variants: Mapping[tuple[str, str], str] = field(default_factory=dict)


def link(objects: Sequence[pathlib.Path], contents: Contents, path: pathlib.Path) -> None:
    """Write the shared library `path`; it appears whole or not at all.

    Raises MissingDependencyError where there is no C++ compiler, CompileError with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="tvm_infer-link-") as folder:
        work = pathlib.Path(folder)
        _write_table(contents, work)
        (work / "exports.map").write_text(_VERSION_SCRIPT)
        _run(["-c", "embedded.s", "-o", "embedded.o"], work)
        inputs = [*(str(o.resolve()) for o in objects), str(_ffi.static_library()), "embedded.o"]
        libraries = [f"-L{_ffi_folder()}", "-ltvm_ffi", "-lpthread", "-ldl", "-lm"]
        # --no-undefined: what the library would miss on the other machine is missed here.
        # nodelete: its threads, loaded kernels, and errors on their way to a handler need its code after the last module has gone.
        flags = [
            "-shared",
            "-Wl,--version-script=exports.map",
            "-Wl,--no-undefined",
            "-Wl,--as-needed",
            "-Wl,-z,nodelete",
        ]
        _run([*flags, "-o", "model.so", *inputs, *libraries], work)
        publish(work / "model.so", path)


def _write_table(contents: Contents, work: pathlib.Path) -> None:
    """embedded.s: the bytes, and the EmbeddedTable that points to them."""
    data: list[str] = []

    def put(label: str, file: str) -> None:
        data.extend(
            [".balign 64", f"tvm_infer_{label}_begin:", f'.incbin "{file}"', f"tvm_infer_{label}_end:", ".byte 0"]
        )

    def bytes_of(label: str) -> str:
        return f".quad tvm_infer_{label}_begin, tvm_infer_{label}_end"

    (work / "manifest.json").write_text(contents.manifest)
    put("manifest", "manifest.json")
    (work / "blas.so").write_bytes(b"" if contents.blas is None else contents.blas.read_bytes())
    put("blas", "blas.so")
    strings, rows = [f'tvm_infer_blas_prefix: .asciz "{contents.blas_prefix}"'], list[str]()
    for i, ((name, arch), cubin) in enumerate(contents.cubins.items()):
        (work / f"{i}.cubin").write_bytes(cubin)
        put(f"cubin{i}", f"{i}.cubin")
        strings += [f'tvm_infer_name{i}: .asciz "{name}"', f'tvm_infer_arch{i}: .asciz "{arch}"']
        rows += [f".quad tvm_infer_name{i}, tvm_infer_arch{i}", bytes_of(f"cubin{i}")]
    variants = list[str]()
    for i, ((isa, digest), symbol) in enumerate(contents.variants.items()):
        strings += [f'tvm_infer_isa{i}: .asciz "{isa}"', f'tvm_infer_digest{i}: .asciz "{digest}"']
        variants += [f".hidden {symbol}", f".quad tvm_infer_isa{i}, tvm_infer_digest{i}, {symbol}"]
    lines = [
        ".section .rodata",
        *data,
        *strings,
        '.section .data.rel.ro,"aw"',  # addresses that the loader fills in
        ".balign 8",
        "tvm_infer_cubins:",
        *rows,
        "tvm_infer_variants:",
        *variants,
        ".globl tvm_infer_embedded",
        ".hidden tvm_infer_embedded",
        ".type tvm_infer_embedded, %object",
        "tvm_infer_embedded:",
        bytes_of("manifest"),
        bytes_of("blas"),
        f".quad tvm_infer_blas_prefix, tvm_infer_cubins, {len(contents.cubins)}",
        f".quad tvm_infer_variants, {len(contents.variants)}",
        ".size tvm_infer_embedded, . - tvm_infer_embedded",
        '.section .note.GNU-stack,"",%progbits',
    ]
    (work / "embedded.s").write_text("\n".join(lines) + "\n")


def _ffi_folder() -> pathlib.Path:
    from tvm_ffi import libinfo

    return pathlib.Path(libinfo.find_libtvm_ffi()).resolve().parent


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise errors.MissingDependencyError(
        "exporting a model links it with a C++ compiler, and there is none on PATH: install g++, or name one in the variable CXX"
    )


def _run(arguments: Sequence[str], work: pathlib.Path) -> None:
    command = [_compiler(), *arguments]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise errors.CompileError(f"linking the model failed: {' '.join(command)}\n{done.stderr[-4000:]}")


def publish(finished: pathlib.Path, path: pathlib.Path) -> None:
    """Copy a file to `path`. By rename: a library that is loaded from there keeps its old contents."""
    handle, unfinished = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    os.close(handle)
    try:
        shutil.copyfile(finished, unfinished)
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise

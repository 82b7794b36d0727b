"""Host C++ that is compiled on the user's machine, because it depends on what is installed there or on the model: from sources to a
shared library, or to an object that a model is linked with.

Like a kernel, a library is kept under a digest of contents alone: sources, foreign headers, flags, and what the compiler's `--version`
prints.
"""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import cache_dir, env
from ..errors import ArgumentError, CompileError, MissingDependencyError
from .progress import progress

INSTALL_HINT = (
    "install one (Debian, Ubuntu: `apt install g++`; Fedora: `dnf install gcc-c++`), or set TVM_INFER_CXX to one"
)
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
_SHARED, _OBJECT = ("-shared", "-Wl,--no-undefined"), ("-c",)
NATIVE = "-march=native"  # in a library's flags: its key names this machine's processor too
_KIND = "libraries"  # folder of the cache
_KEPT_LINES = 40  # of what a failing compiler printed, from the start: the first error explains the others


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that answers. version : all that `--version` prints."""

    path: str
    found_by: str
    version: str

    def __str__(self) -> str:
        return f"{self.version.splitlines()[0]} ({self.path}, by {self.found_by})"


def find() -> Compiler:
    """The C++ compiler: setting TVM_INFER_CXX, else CXX, else g++, c++ or clang++ on PATH.

    Raises MissingDependencyError that says what to install; ArgumentError where a setting names something that does not run.
    """
    for name, value in (
        ("TVM_INFER_CXX", env.setting("TVM_INFER_CXX").value),
        ("CXX", os.environ.get("CXX", "")),
    ):
        if value:
            if shutil.which(value) is None:
                raise ArgumentError(
                    f"setting {name} is {value!r}, which is no executable file: name a C++ compiler, or unset it"
                )
            return _ask(value, name)
    for command in ("g++", "c++", "clang++"):
        path = shutil.which(command)
        if path:
            return _ask(path, "PATH")
    raise MissingDependencyError(f"a C++ compiler (g++ 10 or newer) is needed and none is on PATH: {INSTALL_HINT}")


@functools.cache
def _ask(path: str, found_by: str) -> Compiler:
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ArgumentError(f"{path} (by {found_by}) does not run: {error}") from error
    if run.returncode != 0 or not run.stdout.strip():
        raise ArgumentError(f"{path} (by {found_by}) is no C++ compiler: `--version` printed {run.stdout[:200]!r}")
    return Compiler(path, found_by, run.stdout)


@dataclass(frozen=True)
class Library:
    """What to build: everything that its contents depend on, and where that is found here.

    sources : name -> contents; those that end in .cc are compiled, as one unit, in the order of their names. foreign : name ->
    contents of headers of others, for the key. defines : name -> value, a C++ string. include_dirs, library_dirs : folders on
    this machine. libraries : to link. flags : besides those that every library is compiled with. generated : source text that is
    compiled after the sources.
    """

    name: str
    sources: Mapping[str, bytes]
    foreign: Mapping[str, bytes]
    defines: Mapping[str, str]
    include_dirs: Sequence[pathlib.Path]
    library_dirs: Sequence[pathlib.Path]
    libraries: Sequence[str]
    flags: Sequence[str] = ()
    generated: str = ""

    def unit(self) -> str:
        """The source that is compiled: one unit, since most of its time is the headers that all of them include."""
        includes = "".join(f'#include "{name}"\n' for name in sorted(self.sources) if name.endswith(".cc"))
        return includes + self.generated

    def key(self, compiler: Compiler, form: Sequence[str] = _SHARED) -> str:
        """The digest under which it is kept. form : flags that say what is made of it."""
        contents: list[str | bytes] = [self.name, self.unit(), compiler.version, *_FLAGS, *form]
        contents += [*self.flags, *self.libraries]
        if NATIVE in self.flags:
            contents.append(processor())
        for table in (self.sources, self.foreign, self.defines):
            contents += [part for name in sorted(table) for part in (name, table[name])]
        return cache_dir.digest_of(*contents)[:32]


@functools.cache
def processor() -> str:
    """What tells this machine's processor from others that code for it may not run on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part")
    # The first processor's lines: the others repeat them, and clock rates change.
    facts = {line.split(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join([platform.machine(), *(facts[name] for name in names if name in facts)])


def shared_library(library: Library) -> pathlib.Path:
    """The library from the cache, compiled if it is not there. One process compiles a key, others wait for it.

    Raises MissingDependencyError without a compiler, CompileError that holds the command and what the compiler printed.
    """
    return _built(library, _SHARED, f"lib{library.name}.so")


def object_file(library: Library) -> pathlib.Path:
    """The same as an object, whose libraries are for whoever links it. Raises as :func:`shared_library`."""
    return _built(library, _OBJECT, f"{library.name}.o")


def _built(library: Library, form: Sequence[str], output: str) -> pathlib.Path:
    compiler = find()
    key = library.key(compiler, form)
    folder = cache_dir.published_folder(_KIND, key, lambda folder: _compile(library, compiler, form, folder / output))
    return folder / output


def _compile(library: Library, compiler: Compiler, form: Sequence[str], output: pathlib.Path) -> None:
    folder = output.parent
    unit = folder / f"{library.name}.cc"
    unit.write_text(library.unit())
    command = [
        compiler.path,
        *_FLAGS,
        *form,
        *library.flags,
        *(f'-D{name}="{value}"' for name, value in library.defines.items()),
        *(f"-I{path}" for path in library.include_dirs),
        unit.name,
        "-o",
        output.name,
        *(f"-L{path}" for path in library.library_dirs),
        *(f"-l{name}" for name in library.libraries),
    ]
    with progress(f"tvm_infer: compiling {library.name} …") as outcome:
        start = time.perf_counter()
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        if run.returncode != 0:
            printed = "\n".join((run.stderr or run.stdout).strip().splitlines()[:_KEPT_LINES])
            raise CompileError(
                f"{compiler} could not compile {library.name} (exit status {run.returncode})\n  command: {' '.join(command)}\n{printed}"
            )
        outcome.append(f"{time.perf_counter() - start:.1f} s")

"""From a kernel's name to its cubin: taken from a folder of prebuilt ones, or from the cache, or compiled.

The key of the cache is contents alone: the source, every header of ours that it reaches (the kernel ABI is in one), what
`nvcc --version` prints, the flags. No path and no time, so that two checkouts, or a machine and its image, share what is compiled.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from .. import cache_dir, env
from ..errors import AbiError, ArgumentError, CompileError
from . import cubin_file, headers, nvcc
from .names import KernelSpec, parse
from .progress import progress

DEFAULT_ARCH = "sm_90a"
_KIND = "kernels"  # folder of the cache
_RESOURCES = "resources.json"


@dataclass(frozen=True)
class Resources:
    """What compiling a kernel took and what it made.

    seconds, cpu_seconds : of nvcc. registers : of a thread. spill_bytes : stored to local memory because registers ran out.
    stack_bytes : local memory of a thread, spills included. shared_bytes : of a CTA, static and dynamic. threads : of a CTA.
    """

    seconds: float
    cpu_seconds: float
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int


@dataclass(frozen=True)
class Built:
    """A kernel in the cache. path : its cubin. cached : it was there already."""

    name: str
    arch: str
    path: pathlib.Path
    cached: bool
    resources: Resources


def key(spec: KernelSpec, arch: str, compiler: nvcc.Nvcc, include_dir: pathlib.Path) -> str:
    """The digest under which a kernel is kept."""
    source = spec.source()
    contents = [part for item in headers.reached(source, include_dir).items() for part in item]
    steering = [f"{name}={os.environ.get(name, '')}" for name in nvcc.STEERING_VARIABLES]
    return cache_dir.digest_of(source, *contents, compiler.version, *nvcc.flags(arch), *steering)[:32]


def build_one(name: str, arch: str = DEFAULT_ARCH, include_dir: pathlib.Path | None = None) -> Built:
    """The kernel from the cache, compiled if it is not there. One process compiles a key, others wait for it."""
    spec, folder_of_headers = parse(name), include_dir or headers.include_dir()
    nvcc.flags(arch)  # an unknown architecture is refused before a compiler is looked for
    compiler = nvcc.find()
    compiled = False

    def make(folder: pathlib.Path) -> None:
        nonlocal compiled
        compiled = True
        _compile(spec, arch, compiler, folder_of_headers, folder)

    folder = cache_dir.published_folder(_KIND, key(spec, arch, compiler, folder_of_headers), make)
    resources = Resources(**json.loads((folder / _RESOURCES).read_text())["resources"])
    return Built(name, arch, folder / f"{name}.cubin", not compiled, resources)


def _compile(
    spec: KernelSpec,
    arch: str,
    compiler: nvcc.Nvcc,
    include_dir: pathlib.Path,
    folder: pathlib.Path,
) -> None:
    name = spec.name
    source, cubin_path = folder / f"{name}.cu", folder / f"{name}.cubin"
    source.write_text(spec.source())
    with progress(f"tvm_infer: compiling {name} for {arch} …") as outcome:
        run = nvcc.compile_cubin(compiler, source, cubin_path, arch, [include_dir])
        outcome.append(f"{run.seconds:.1f} s")
    resources = _resources(run, cubin_file.kernel_info(cubin_path.read_bytes(), name))
    about = {"name": name, "arch": arch, "nvcc": compiler.version, "resources": asdict(resources)}
    (folder / _RESOURCES).write_text(json.dumps(about, indent=2))


def _resources(run: nvcc.Run, info: cubin_file.KernelInfo) -> Resources:
    """From what ptxas said under -v."""

    def number(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, run.log)), default=0)

    return Resources(
        seconds=round(run.seconds, 3),
        cpu_seconds=round(run.cpu_seconds, 3),
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill stores"),
        stack_bytes=number(r"(\d+) bytes stack frame"),
        shared_bytes=number(r"(\d+) bytes smem") + info.shared_bytes,
        threads=info.threads,
    )


def build(
    names: Iterable[str],
    arch: str = DEFAULT_ARCH,
    *,
    jobs: int | None = None,
    out: os.PathLike[str] | str | None = None,
    done: Callable[[Built], None] | None = None,
) -> list[Built]:
    """Compile kernels, several at a time; what is in the cache is taken from there.

    Parameters
    ----------
    names : of :func:`all_names`. arch : "sm_90a". jobs : kernels at once; None: the processors this process may run on.
    out : a folder to put the cubins in, as NAME.ARCH.cubin, for machines without a compiler (:func:`load`, TVM_INFER_CUBIN_DIR).
    done : called with each kernel when it is there.

    Raises
    ------
    ArgumentError : an unknown name or arch, an `out` that is no folder, before anything is compiled. MissingDependencyError : no
    nvcc, or one that is too old.
    CompileError : of every kernel that failed; the others are built nevertheless.
    """
    if isinstance(names, str):
        raise ArgumentError(f"argument `names` is the string {names!r}; it must be a list of names: [{names!r}]")
    specs = [parse(name) for name in dict.fromkeys(names)]
    for spec in specs:
        spec.source()  # a variant that this process does not know
    wanted = [spec.name for spec in specs]
    nvcc.flags(arch)
    nvcc.check_release(nvcc.find(), arch)
    if jobs is not None and jobs < 1:
        raise ArgumentError(f"argument `jobs` is {jobs}; it must be at least 1")
    threads = min(jobs or len(os.sched_getaffinity(0)), max(len(wanted), 1))
    if out is not None:
        _make_folder(out)

    def one(name: str) -> Built | CompileError:
        try:
            built = build_one(name, arch)
        except CompileError as error:
            return error
        if out is not None:
            _publish(built.path.read_bytes(), pathlib.Path(out) / f"{name}.{arch}.cubin")
        if done is not None:
            done(built)
        return built

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(one, wanted))
    failed = [str(r) for r in results if isinstance(r, CompileError)]
    if failed:
        raise CompileError("\n".join(failed))
    return [r for r in results if isinstance(r, Built)]


def _make_folder(out: os.PathLike[str] | str) -> None:
    try:
        pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(
            f"argument `out` is {os.fspath(out)!r}, and no such folder can be made: {error.strerror}"
        ) from error


def _publish(contents: bytes, path: pathlib.Path) -> None:
    handle, unfinished = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    with open(handle, "wb") as f:
        f.write(contents)
    os.chmod(unfinished, 0o644)
    os.replace(unfinished, path)


def cubin(name: str, arch: str = DEFAULT_ARCH) -> bytes:
    """The kernel's cubin: of the folder TVM_INFER_CUBIN_DIR if it is there, else of the cache, else compiled now.

    Raises ArgumentError for an unknown name or arch or a TVM_INFER_CUBIN_DIR that is no folder, MissingDependencyError without a
    compiler, CompileError, AbiError for a prebuilt cubin of another version.
    """
    parse(name)
    nvcc.flags(arch)
    prebuilt = env.setting("TVM_INFER_CUBIN_DIR").value
    if prebuilt:
        folder = pathlib.Path(prebuilt).expanduser()
        if not folder.is_dir():
            raise ArgumentError(
                f"setting TVM_INFER_CUBIN_DIR is {prebuilt!r}, which is no folder: name one, or unset it"
            )
        path = folder / f"{name}.{arch}.cubin"
        if path.is_file():
            return _checked(path, name)
    return build_one(name, arch).path.read_bytes()


def _checked(path: pathlib.Path, name: str) -> bytes:
    contents = path.read_bytes()
    try:
        abi, ours = cubin_file.kernel_info(contents, name).abi, headers.kernel_abi()
    except CompileError as error:
        raise CompileError(f"{path}: {error}") from error
    if abi != ours:
        raise AbiError(
            f"{path} was built for kernel ABI {abi} and this tvm_infer has {ours}: build it again with this version"
        )
    return contents


def load(folder: os.PathLike[str] | str) -> list[str]:
    """Give this process the cubins of a folder that :func:`build` wrote with `out`; nothing is compiled for them then.

    Returns the kernels' names. Raises ArgumentError for a folder without cubins or a file of no known kernel, AbiError for a
    cubin of another version, CompileError for a file that is no whole cubin.
    """
    from .. import _ffi

    paths = sorted(pathlib.Path(folder).glob("*.cubin"))
    if not paths:
        raise ArgumentError(
            f"argument `folder` is {os.fspath(folder)!r}, which holds no *.cubin: `tvm-infer build --out` makes one"
        )
    found = []
    for path in paths:
        name, _, arch = path.stem.partition(".")
        try:
            parse(name), nvcc.flags(arch)
        except ArgumentError as error:
            raise ArgumentError(
                f"argument `folder` holds {path}, which is no kernel of this version: {error}"
            ) from error
        found.append((name, arch, _checked(path, name)))
    for name, arch, contents in found:
        _ffi.func("add_cubin")(name, arch, contents)
    return [name for name, _, _ in found]


def cached_names() -> list[str]:
    """Kernels in the cache, of any version, each once."""
    known = (env.cache_dir() / _KIND).glob(f"*/{_RESOURCES}")
    return sorted({str(json.loads(path.read_text())["name"]) for path in known})

"""What was held on a GPU, and whether it was held by the code as it stands.

  python tests/gpu/record.py run [--families A,B] [--sanitizer] [--workers N] [--out FILE]   on a machine with a GPU: all GPU tests, or
      those of some families, then record.json; what it says of other families stays, if it was the same device and software
  python tests/gpu/record.py check [--record FILE]   anywhere: families whose record is of other code; exit code 1 if any

A kernel family's digest covers what decides how it behaves: its kernel source and all that includes, the launchers in cuda/ and
ffi/, and its GPU tests. Comments and blank lines of C++ do not count; nor do where the tree lies, file times, the order of listings.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = pathlib.Path(__file__).resolve().parent / "record.json"


@dataclass(frozen=True)
class Family:
    """`kernels` in kernels/ (none: of a library); files in cuda/ with one of `words` in their names are this family's alone (of
    several, the longest word decides); `tests` in tests/gpu."""

    kernels: tuple[str, ...]
    words: tuple[str, ...]
    tests: tuple[str, ...]


FAMILIES = {
    "attention_sm90": Family(
        ("attention_sm90.cuh",),
        ("attention", "tile_table"),
        (
            "test_gpu_attention.py",
            "test_gpu_variants.py",
            "test_gpu_random_variants.py",
            "test_gpu_invariance.py",
            "test_gpu_levels.py",
            "test_gpu_streams.py",
            "test_gpu_float8.py",
            "test_gpu_float8_formats.py",
            "test_gpu_float8_variants.py",
            "test_gpu_formats.py",
        ),
    ),
    "append": Family(("append.cuh",), ("append",), ("test_gpu_append.py", "test_gpu_float8.py")),
    "rope_append": Family(("rope_append.cuh",), ("rope_append",), ("test_gpu_rope.py", "test_gpu_float8.py")),
    "merge_states": Family(("merge_states.cuh",), ("merge",), ("test_gpu_merge.py",)),
    "kv_cache": Family(
        ("copy_pages.cuh", "move_tokens.cuh"),
        ("copy_pages", "move_tokens", "memory", "staging", "pinned"),
        (
            "test_gpu_kv_cache.py",
            "test_gpu_kv_reuse.py",
            "test_gpu_float8.py",
            "test_gpu_float8_variants.py",
            "test_gpu_levels.py",
        ),
    ),
    "page_selection": Family(
        ("page_bounds.cuh", "page_scores.cuh", "select_pages.cuh"),
        ("page_selection",),
        ("test_gpu_page_selection.py", "test_gpu_kv_page_budget.py"),
    ),
    "compiled_model": Family((), (), ("test_gpu_model.py", "test_gpu_extracted.py", "prepare_models.py")),
    "matmul": Family((), ("matmul", "cublas"), ("test_gpu_matmul.py", "gpu_products.py")),
    "gemv": Family(("gemv.cuh",), ("gemv",), ("test_gpu_gemv.py", "gpu_products.py")),
}
COMMON_TESTS = ("conftest.py", "gpu_batches.py", "test_gpu_errors.py")
LAUNCHER_FOLDERS = ("cuda", "ffi")  # where the walk from the ffi's CUDA files stays
INCLUDE = re.compile(r'^\s*#\s*include\s*"(tvm_infer/[^"]+)"', re.MULTILINE)
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def walk(source: pathlib.Path, begin: Iterable[pathlib.Path], follow: Any) -> set[pathlib.Path]:
    """`begin` and every file of ours that they include, at any depth, where `follow(path)` says so."""
    seen: set[pathlib.Path] = set()
    todo = list(begin)
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        found = [source / name for name in INCLUDE.findall(path.read_text(encoding="utf-8"))]
        if path.suffix == ".h" and path.with_suffix(".cc").exists():
            found.append(path.with_suffix(".cc"))
        todo += [p for p in found if p.exists() and follow(p)]
    return seen


def kernel_files(root: pathlib.Path, family: Family) -> set[pathlib.Path]:
    """The kernels and all headers that they include."""
    source = root / "cuda_src"
    kernels = [source / "tvm_infer" / "kernels" / kernel for kernel in family.kernels]
    return walk(source, [k for k in kernels if k.exists()], lambda p: p.suffix in {".h", ".cuh"})


def launcher_files(root: pathlib.Path, family: Family) -> set[pathlib.Path]:
    """What brings a call to the kernel: from the ffi's CUDA files on, what they include of cuda/ and ffi/, less other families'.

    The family's own launchers also where only another family's include them (matmul.cc launches gemv).
    """
    source = root / "cuda_src"
    ours = source / "tvm_infer"
    words = sorted((word for f in FAMILIES.values() for word in f.words), key=len, reverse=True)

    def word_of(path: pathlib.Path) -> str | None:
        return next((word for word in words if word in path.stem), None)

    def follow(path: pathlib.Path) -> bool:
        folder = path.relative_to(ours).parts[0]
        own = folder != "cuda" or word_of(path) in (None, *family.words)  # ffi files serve all families
        return folder in LAUNCHER_FOLDERS and own

    begin = [p for p in (ours / "ffi").glob("*.cc") if "cuda" in p.stem]
    begin += [p for p in (ours / "cuda").glob("*.cc") if word_of(p) in family.words]
    return walk(source, begin, follow)


def family_files(root: pathlib.Path, name: str) -> list[pathlib.Path]:
    """All files whose contents decide what a record of this family says."""
    family = FAMILIES[name]
    tests = {root / "tests" / "gpu" / test for test in (*COMMON_TESTS, *family.tests)}
    files = kernel_files(root, family) | launcher_files(root, family) | {t for t in tests if t.exists()}
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def contents(path: pathlib.Path) -> bytes:
    """A file's text without what cannot matter."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        text = COMMENT_OR_STRING.sub(lambda m: " " if m.group().startswith("/") else m.group(), text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()).encode()


def digest(root: pathlib.Path, name: str) -> str:
    """sha256 over a family's files, by their names in the tree."""
    total = hashlib.sha256()
    for path in family_files(root, name):
        total.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(contents(path)).hexdigest()}\n".encode())
    return total.hexdigest()


def complaints(root: pathlib.Path, record: dict[str, Any] | None) -> Iterator[str]:
    """One line for each family whose record does not speak for the code as it stands."""
    families = (record or {}).get("families", {})
    for name in FAMILIES:
        entry = families.get(name)
        if entry is None:
            yield f"{name}: no record of a GPU run"
            continue
        now = digest(root, name)
        if entry["digest"] != now:
            yield f"{name}: the record is of other code (digest {entry['digest'][:12]}, now {now[:12]}); run the GPU tests again"
        elif entry["failed"] or not entry["passed"]:
            yield f"{name}: recorded with {entry['failed']} failed and {entry['passed']} passed tests"


def check(root: pathlib.Path = ROOT, path: pathlib.Path = RECORD) -> int:
    """Prints complaints; 1 if there are any."""
    lines = list(complaints(root, json.loads(path.read_text(encoding="utf-8")) if path.exists() else None))
    for line in lines:
        print(f"GPU record: {line}")
    if not lines:
        print(f"GPU record: {', '.join(FAMILIES)} belong to the code as it stands")
    return 1 if lines else 0


def machine() -> dict[str, str]:
    import torch

    smi = shutil.which("nvidia-smi")
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"] if smi else None
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split() if query else []
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else "unknown",
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def kept(found: dict[str, str], names: Sequence[str], path: pathlib.Path) -> dict[str, Any]:
    """Entries of families that are not run, of an earlier record of the same device and software."""
    if not names or not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if any(earlier.get(key) != value for key, value in found.items() if key != "date"):
        return {}
    return {name: entry for name, entry in earlier["families"].items() if name not in names}


def run(
    out: pathlib.Path, sanitizer: bool, workers: int = 0, names: Sequence[str] = (), root: pathlib.Path = ROOT
) -> int:
    """All GPU tests here, or those of some families, then the record. Returns pytest's exit code, or the sanitizer's."""
    tests = sorted(str(p) for p in (root / "tests" / "gpu").glob("test_gpu_*.py"))
    with tempfile.TemporaryDirectory() as folder:
        counts = pathlib.Path(folder) / "counts.json"
        command = [sys.executable, "-m", "pytest", *tests, "--device", "cuda", "--record-json", str(counts)]
        command += ["-p", "no:cacheprovider", "--durations", "10", *(["-n", str(workers)] if workers else [])]
        command += ["--families", ",".join(names)] if names else []
        # kernels of these sources, not prebuilt ones of who knows which
        environment = {k: v for k, v in os.environ.items() if k != "TVM_INFER_CUBIN_DIR"}
        code = subprocess.run(command, cwd=root, env=environment, check=False).returncode
        families = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else {}
    record: dict[str, Any] = machine()
    others = kept(record, names, RECORD)
    run_now = {name: {"digest": digest(root, name), **families[name]} for name in names or FAMILIES if name in families}
    record["families"] = {name: (run_now | others)[name] for name in FAMILIES if name in run_now | others}
    if sanitizer:
        script = root / "tests" / "gpu" / "sanitize.sh"
        done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=root, check=False)
        print(done.stdout, done.stderr, sep="", end="", flush=True)
        record["sanitizer"] = {"exit_code": done.returncode, "lines": done.stdout.splitlines()}
        code = code or done.returncode
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")
    return code


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run all GPU tests here and write the record")
    runner.add_argument("--out", type=pathlib.Path, default=RECORD)
    runner.add_argument(
        "--workers", type=int, default=0, help="processes that share the GPU (pytest-xdist); 0: this one alone"
    )
    runner.add_argument(
        "--families", default="", help=f"tests of these alone, comma-separated, of {', '.join(FAMILIES)}; default: all"
    )
    runner.add_argument("--sanitizer", action="store_true", help="tests/gpu/sanitize.sh, too")
    checker = commands.add_parser("check", help="say which families' records are of other code")
    checker.add_argument("--record", type=pathlib.Path, default=RECORD)
    args = parser.parse_args(["check", *argv[1:]] if argv[:1] == ["--check"] else argv)
    if args.command == "check":
        return check(path=args.record)
    names = [name for name in args.families.split(",") if name]
    for name in names:
        if name not in FAMILIES:
            parser.error(f"argument --families: {name!r} is none; there are {', '.join(FAMILIES)}")
    return run(args.out, args.sanitizer, args.workers, names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

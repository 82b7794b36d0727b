"""The tree is the architecture: who may include or import whom."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
CUDA_SRC = REPO / "cuda_src" / "tvm_infer"
PACKAGE = REPO / "tvm_infer"

# folder -> folders of ours that it may include from, besides itself
MAY_INCLUDE = {
    "schedule": set(),
    "variant": set(),
    "kv": {"schedule"},
    "cpu": {"schedule", "variant"},
    "cuda": {"schedule", "variant"},
    "ffi": {"schedule", "kv", "cpu", "cuda", "variant"},
    "ptx": set(),
    "tile": {"ptx"},
    "attention": {"tile", "ptx", "schedule", "cuda", "variant"},
    "kernels": {"attention", "tile", "ptx", "schedule", "cuda", "variant"},
    "mlc": set(),  # calls the others by the names of their packed functions only
}
INCLUDE_TVM = {"ffi", "mlc"}
FOREIGN = re.compile(r"^(tvm/|dlpack/|cuda\.|cuda_|cute/|cutlass/|cub/|thrust/)")


def includes(path: pathlib.Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def sources() -> list[pathlib.Path]:
    return sorted(p for p in CUDA_SRC.rglob("*") if p.suffix in {".h", ".cc", ".cuh", ".cu"})


def violations(path: pathlib.Path, text_includes: list[str]) -> list[str]:
    folder = path.relative_to(CUDA_SRC).parts[0]
    if folder not in MAY_INCLUDE:  # error.h and the like: plain headers at the top
        return [i for i in text_includes if FOREIGN.match(i)]
    bad = []
    for include in text_includes:
        ours = re.match(r"tvm_infer/([^/]+)/", include)
        if ours and ours.group(1) != folder and ours.group(1) not in MAY_INCLUDE[folder]:
            bad.append(include)
        if (
            FOREIGN.match(include)
            and folder not in INCLUDE_TVM
            and not (include.startswith("cuda") and folder in {"ptx", "kernels"})
        ):
            bad.append(include)
    return bad


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(CUDA_SRC)))
def test_includes_go_one_way(path):
    assert violations(path, includes(path)) == []


def test_the_rule_catches_a_violation():
    assert violations(CUDA_SRC / "schedule" / "x.h", ["tvm/ffi/function.h", "tvm_infer/ffi/common.h"]) == [
        "tvm/ffi/function.h",
        "tvm_infer/ffi/common.h",
    ]
    assert violations(CUDA_SRC / "kv" / "x.h", ["tvm_infer/cpu/attention.h"]) == ["tvm_infer/cpu/attention.h"]


def test_only_the_mlc_adapter_includes_the_tvm_runtime():
    """tvm/runtime and src/runtime are bound to one version of TVM; ffi/ stays with tvm-ffi, whose C interface is stable."""
    bound = {
        path.relative_to(CUDA_SRC).parts[0]
        for path in sources()
        for include in includes(path)
        if re.match(r"(tvm/(?!ffi/)|src/)", include)
    }
    assert bound == {"mlc"}


def test_the_library_compiles_nothing_of_the_mlc_adapter():
    """It is compiled on the user's machine: the folder's sources are installed, in no target of the build."""
    cmake = (REPO / "cmake" / "CMakeLists.txt").read_text()
    assert [line for line in cmake.splitlines() if "mlc" in line and "install(" not in line and line[0] != "#"] == []


def test_bare_data_ptr_is_not_used():
    """TensorView::data_ptr() ignores byte_offset; DataPtr<T>() does not. Exceptions say so on their line."""
    bare = [
        f"{path.name}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "data_ptr()" in line.split("//")[0] and "// lint:" not in line
    ]
    assert bare == []


def test_bare_stride_is_not_used():
    """TensorView::stride() reads through a null pointer for tensors that generated code passes; Stride() does not."""
    bare = [
        f"{path.name}:{number}"
        for path in sources()
        if path.relative_to(CUDA_SRC).parts[0] in INCLUDE_TVM
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"(\.|->)strides?\(", line.split("//")[0]) and "// lint:" not in line
    ]
    assert bare == []


def imports(path: pathlib.Path) -> set[str]:
    """Modules of tvm_infer that a file imports, at any depth of nesting, as dotted names without the package."""
    package = ("tvm_infer", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found |= {module} | {f"{module}.{a.name}" for a in node.names}
    return {name.removeprefix("tvm_infer.") for name in found if name.startswith("tvm_infer.")}


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("relax", ("runtime", "schedule", "jit", "bench", "ops", "compiler")),
        ("runtime", ("relax", "compiler", "bench")),
        ("schedule", ("relax", "runtime", "ops", "compiler", "bench")),
        ("variant", ("relax", "runtime", "schedule", "ops", "planning", "compiler", "bench")),
        ("jit", ("relax", "runtime", "schedule", "ops", "planning", "compiler", "bench")),
    ],
)
def test_python_layers(folder, forbidden):
    bad = {
        str(path.relative_to(PACKAGE)): name
        for path in (PACKAGE / folder).rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] in forbidden
    }
    assert bad == {}


def test_import_is_light():
    """`import tvm_infer` loads neither TVM's compiler, nor torch, nor matplotlib."""
    code = (
        "import sys, tvm_infer; print([m for m in ('tvm', 'torch', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_setting_that_the_code_reads_is_in_the_table():
    from tvm_infer import env

    known = {s.name for s in env.SETTINGS}
    pattern = re.compile(r"\bTVM_INFER_[A-Z_]+\b")
    read = set()
    for path in sources():
        read |= {m for m in re.findall(r'getenv\("(TVM_INFER_[A-Z_]+)"\)', path.read_text())}
    for path in PACKAGE.rglob("*.py"):
        read |= {m for m in pattern.findall(path.read_text()) if f'"{m}"' in path.read_text()}
    assert read <= known


@pytest.mark.parametrize("path", [p for p in sources() if p.suffix in {".h", ".cuh"}], ids=lambda p: p.name)
def test_headers_stay_short(path):
    assert len(path.read_text().splitlines()) <= 300

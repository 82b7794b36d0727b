"""What an installed tvm_infer is: one wheel for every Python, pinned dependencies, a library that needs no CUDA and no libpython."""

from __future__ import annotations

import importlib.metadata
import pathlib
import re
import subprocess

import pytest

from tvm_infer import _ffi

REPO = pathlib.Path(__file__).resolve().parents[2]


def needed(path: pathlib.Path) -> set[str]:
    out = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+?)\]", out))


def test_the_library_needs_tvm_ffi_and_the_c_runtime_only():
    allowed = re.compile(r"^(libtvm_ffi|libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|librt|ld-linux-x86-64)\.so")
    assert {n for n in needed(_ffi.LIBRARY_DIR / "libtvm_infer.so") if not allowed.match(n)} == set()


def test_the_library_exports_nothing_by_accident():
    """Hidden by default: symbols of ours in the global namespace would collide with a model that links the static object."""
    out = subprocess.run(
        ["nm", "-D", "--defined-only", str(_ffi.LIBRARY_DIR / "libtvm_infer.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line for line in out.splitlines() if re.search(r" T .*tvm_infer", line)] == []


def test_the_abi_version_is_a_number():
    assert _ffi.func("abi_version")() >= 1


def test_dependencies_are_pinned_where_tvm_breaks():
    text = (REPO / "pyproject.toml").read_text()
    assert '"apache-tvm==0.27.*"' in text
    assert text.count('"apache-tvm-ffi>=0.1.14.post0,<0.1.15"') == 2  # to build with, and to run with
    base = text.split("dependencies = [")[1].split("]")[0]
    for heavy in ("torch", "transformers", "gguf", "matplotlib"):
        assert f'"{heavy}' not in base


def installed_wheel() -> str:
    try:
        return importlib.metadata.distribution("tvm_infer").read_text("WHEEL") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


@pytest.mark.skipif(
    not installed_wheel(), reason="run from a source tree; tests/run.sh installs the wheel and runs this"
)
def test_one_wheel_serves_every_python():
    tags = re.findall(r"^Tag: (.+)$", installed_wheel(), re.MULTILINE)
    assert tags and all(tag.startswith("py3-none-") for tag in tags)

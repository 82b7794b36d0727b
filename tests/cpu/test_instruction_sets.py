"""No code for AVX2 or AVX-512 where other processors run: not by an inline function of which the linker keeps any one copy."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from tvm_infer import _ffi

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64"),
]
SETS = ("avx2", "avx512")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
# Every instruction that these sets have and SSE2 has not is encoded anew, and is called v…; x86-64 has three others of this letter.
_VECTOR = re.compile(r"^\s+[0-9a-f]+:\s+v(?!err|erw|mcall)\w+\s")


def functions_with_vectors(path: str) -> set[str]:
    """Functions of an object file that hold an instruction of AVX or later."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", path]
    found, function = set(), ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        header = _FUNCTION.match(line)
        if header:
            function = header[1]
        elif _VECTOR.match(line):
            found.add(function)
    return found


def of_a_set(function: str) -> bool:
    """Whether the function, or a template's argument, is of a set's own namespace."""
    return any(f"tvm_infer::{folder}::{isa}::" in function for folder in ("cpu", "variant") for isa in SETS)


def test_vectors_are_in_the_namespaces_of_their_sets():
    """The static object is what the library is made of, with its symbols."""
    found = functions_with_vectors(str(_ffi.static_library()))
    assert {function for function in found if not of_a_set(function)} == set()
    for isa in SETS:
        for part in (f"tvm_infer::cpu::{isa}::Attend", f"LogitsOfRow<tvm_infer::variant::{isa}::variant_"):
            assert any(part in function for function in found), part


def test_symbols_that_may_be_merged_are_told_apart():
    """Weak symbols of generated code: each carries its set's namespace."""
    out = subprocess.run(
        ["nm", "-C", "--defined-only", str(_ffi.static_library())], capture_output=True, text=True, check=True
    ).stdout
    weak = [line.split(maxsplit=2)[2] for line in out.splitlines() if re.search(r" [WVu] .*tvm_infer::variant::", line)]
    generated = [symbol for symbol in weak if "ffi_api" not in symbol]
    assert len(generated) >= 3 * 9
    assert [s for s in generated if not re.search(r"tvm_infer::variant::(portable|avx2|avx512)::variant_", s)] == []


def test_a_leak_is_found(tmp_path):
    """An inline function that is compiled for AVX-512 and left out of line."""
    source = tmp_path / "leak.cc"
    source.write_text(
        "namespace tvm_infer { template <typename T> __attribute__((noinline)) T Twice(const T* x) { T s = 0;"
        " for (int i = 0; i < 64; ++i) s += x[i]; return s; } }\n"
        "namespace tvm_infer::cpu::avx512 { float Sum(const float* x) { return tvm_infer::Twice(x); } }\n"
    )
    command = ["g++", "-std=c++17", "-O2", "-mavx512f", "-c", str(source), "-o", str(tmp_path / "leak.o")]
    subprocess.run(command, check=True)
    (leak,) = (f for f in functions_with_vectors(str(tmp_path / "leak.o")) if not of_a_set(f))
    assert "tvm_infer::Twice<float>" in leak

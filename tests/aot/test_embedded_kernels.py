"""Kernels inside an exported library, on a driver that is none (tests/cuda/fake_libcuda.cc), without tvm_infer beside it."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest

from tvm_infer.jit import headers
from tvm_infer.runtime import linker

COMPILER = shutil.which("c++") or shutil.which("g++")
HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

SCRIPT = f"""
import sys
sys.path[:0] = [{str(HERE.parent / "cuda")!r}]
import tvm_ffi
from fake_tensors import Driver, index, tensor
module = tvm_ffi.load_module(sys.argv[1])
driver = Driver()
def call(name, *arguments):
    try:
        return module.get_function("tvm_infer_" + name)(*arguments)
    except Exception as error:
        print(type(error).__name__, str(error).strip())
def append(page_size=16, device=0):
    on = (2, device)
    kv = tensor((3, 2, 2, page_size, 64), device=on)
    rows = tensor((3, 2, 64), device=on)
    lists = [index(values, device=on) for values in ([0, 3], [3], [0, 1], [0])]
    return call("append", rows, rows, lists[0], lists[1], kv, None, 0, lists[2], lists[3])
"""


def fake_cubin(name: str, abi: int = headers.kernel_abi(), threads: int = 128) -> bytes:
    return f"{name} {abi} {threads} 1024 0".encode() + b"\0"


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    from test_fake_driver import compile_fake

    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def run(run_python, fake):
    def go(code: str, library: pathlib.Path) -> list[str]:
        path = os.pathsep.join([str(fake), os.environ.get("LD_LIBRARY_PATH", "")])
        out = run_python(SCRIPT + code, library, LD_LIBRARY_PATH=path)
        return out.splitlines()

    return go


@pytest.fixture
def library_of(tmp_path):
    def link(**cubins: str) -> pathlib.Path:
        """append_b16="sm_90a": a library with a fake kernel of that name, for that architecture."""
        contents = linker.Contents(
            manifest='{"format": 2}', cubins={(name, arch): fake_cubin(name) for name, arch in cubins.items()}
        )
        linker.link([], contents, tmp_path / "kernels.so")
        return tmp_path / "kernels.so"

    return link


def test_a_call_loads_the_library_s_own_kernel(library_of, run):
    """At the call, not before; once; without tvm_infer, whose compiler would be asked otherwise."""
    out = run(
        """
print(driver.calls("cuLibraryLoadData"))
append(), append(device=1), append()
print(driver.calls("cuLibraryLoadData"), [(l["name"], l["device"]) for l in driver.launches()])
print([m for m in sys.modules if m == "tvm_infer" or m == "tvm"])
""",
        library_of(append_b16="sm_90a"),
    )
    launches = [("append_b16", "0"), ("append_b16", "1"), ("append_b16", "0")]
    assert out == ["[]", f"['append_b16', 'append_b16'] {launches}", "[]"]


def test_a_gpu_that_the_library_has_no_kernels_for(library_of, run):
    """Devices 0 and 1 of the fake are H200s, 2 is an A100."""
    out = run('call("model_check_cuda", 0), call("model_check_cuda", 2)', library_of(append_b16="sm_90a"))
    assert len(out) == 1 and "this library holds kernels for sm_90a; cuda device 2 (Fake A100) needs sm_80" in out[0]
    out = run('call("model_check_cuda", 2), call("model_check_cuda", 0)', library_of(append_b16="sm_80"))
    assert len(out) == 1 and "holds kernels for sm_80; cuda device 0 (Fake H200) needs sm_90a" in out[0]
    assert 'archs=["sm_90a"]' in out[0]
    out = run('call("model_check_cuda", 0)', library_of())
    assert len(out) == 1 and "this library holds no CUDA kernels; cuda device 0" in out[0]


def test_a_kernel_that_is_not_in_the_library(library_of, run):
    out = run("append()", library_of(merge_states_fp32="sm_90a", attention_bf16_h64_p16="sm_90a"))
    assert len(out) == 1
    assert "there is no kernel `append_b16` for sm_90a" in out[0]
    assert "holds merge_states_fp32 for sm_90a, attention_bf16_h64_p16 for sm_90a" in out[0]
    assert "export it with the archs, page_sizes, kv_dtype and page_budget" in out[0]


def test_a_kernel_of_another_abi(tmp_path, run):
    contents = linker.Contents(manifest="{}", cubins={("append_b16", "sm_90a"): fake_cubin("append_b16", abi=99)})
    linker.link([], contents, tmp_path / "kernels.so")
    out = run("append()", tmp_path / "kernels.so")
    assert len(out) == 1 and "was compiled from sources of kernel ABI 99, this library launches" in out[0]


def test_two_libraries_have_kernels_of_their_own(tmp_path, run):
    for number, threads in ((1, 128), (2, 64)):
        cubins = {("append_b16", "sm_90a"): fake_cubin("append_b16", threads=threads)}
        contents = linker.Contents(manifest=f'{{"n": {number}}}', cubins=cubins)
        linker.link([], contents, tmp_path / f"{number}.so")
    out = run(
        """
append()
module = tvm_ffi.load_module(sys.argv[1].replace("1.so", "2.so"))
append()
print([l["block"] for l in driver.launches()], str(call("model_manifest")))
""",
        tmp_path / "1.so",
    )
    assert out == ["['128,1,1', '64,1,1'] {\"n\": 2}"]


def test_load_refuses_a_library_without_kernels_for_this_gpu(
    executable, saved, fake, tmp_path, monkeypatch, run_python
):
    """tvm_infer.load says it, before weights go anywhere."""
    from test_library import cuda_model, export_cuda

    from tvm_infer import jit

    monkeypatch.setattr(jit, "build", lambda names, arch: None)
    monkeypatch.setattr(jit, "cubin", lambda name, arch: fake_cubin(name))
    export_cuda(cuda_model(executable), tmp_path / "model.so", archs=("sm_80",))
    out = run_python(
        """
import sys, tvm_infer
try:
    tvm_infer.load(sys.argv[1], sys.argv[2])
except tvm_infer.errors.ExecutorError as error:
    print(error)
""",
        tmp_path / "model.so",
        saved / "model.safetensors",
        LD_LIBRARY_PATH=os.pathsep.join([str(fake), os.environ.get("LD_LIBRARY_PATH", "")]),
    )
    assert "this library holds kernels for sm_80; cuda device 0 (Fake H200) needs sm_90a" in out


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_real_kernel_is_embedded_whole(tmp_path):
    from tvm_infer import jit

    cubin = jit.cubin("append_b16")
    linker.link([], linker.Contents(manifest="{}", cubins={("append_b16", "sm_90a"): cubin}), tmp_path / "k.so")
    assert (tmp_path / "k.so").read_bytes().count(cubin) == 1

"""The backend `flashinfer` of `bench serve`: what it asks for, said; and, where the package is installed, the library it compiles."""

from __future__ import annotations

import ctypes.util
import dataclasses
import importlib.metadata
import shutil
import sys

import pytest

from tvm_infer import cublas
from tvm_infer.bench import serve_backends, serve_flashinfer, serve_models
from tvm_infer.bench.peers import Skipped
from tvm_infer.bench.serve_loop import CacheSizes
from tvm_infer.errors import CompileError, MissingDependencyError
from tvm_infer.jit import nvcc
from tvm_infer.models.llama import LLAMA_3_8B


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(version, jit): a package flashinfer-python of that version, whose module flashinfer.jit has that text; and a ninja."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
            del sys.modules[name]

    def make(version, jit=""):
        package, info = tmp_path / "flashinfer", tmp_path / f"flashinfer_python-{version}.dist-info"
        for folder in (package, info):
            folder.mkdir()
        (package / "__init__.py").write_text("")
        (package / "jit.py").write_text(jit)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    forget()
    yield make
    forget()


def test_the_release_of_tvms_glue_is_taken(installed):
    installed("0.6.3")
    serve_flashinfer.require("cuda", 128)
    assert serve_flashinfer.installed_version() == "0.6.3"


@pytest.mark.parametrize("version", ["0.6.2", "0.6.14", "0.7.2.post1"])
def test_other_releases_are_refused_before_minutes_of_compiling(installed, version):
    installed(version)
    with pytest.raises(Skipped, match=rf"{version} is installed; .*pip install flashinfer-python==0\.6\.3"):
        serve_flashinfer.require("cuda", 128)


def test_an_absent_package_is_named_with_its_releases(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(Skipped, match=r"flashinfer-python is not installed: pip install flashinfer-python==0\.6\.3"):
        serve_flashinfer.require("cuda", 128)


def test_a_missing_dependency_is_named(installed):
    installed("0.6.3", "import a_module_that_nobody_has\n")
    with pytest.raises(Skipped, match=r"0\.6\.3 cannot be imported .*a_module_that_nobody_has.*with its dependencies"):
        serve_flashinfer.require("cuda", 128)


def test_ninja_must_be_found(installed, monkeypatch):
    installed("0.6.3")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Skipped, match="ninja, which is not on PATH"):
        serve_flashinfer.require("cuda", 128)


@pytest.mark.parametrize(
    ("device", "head_dim", "message"),
    [("cpu", 128, "CUDA only"), ("cuda", 16, "head_dim 64, 128, 256; this model's is 16")],
)
def test_device_and_model_come_first(device, head_dim, message):
    with pytest.raises(Skipped, match=message):
        serve_flashinfer.require(device, head_dim)


def test_the_backend_asks_before_it_compiles():
    model = serve_models.ServeModel("tiny", serve_models.TINY, "bfloat16", {}, "none")
    with pytest.raises(Skipped, match="this model's is 16"):
        serve_backends.make("flashinfer", model, CacheSizes(4, 32, 32, 16), "cuda")


def test_a_failed_build_is_told_by_its_end():
    printed = [
        "Ninja build failed. Ninja output:",
        "nvcc " + "x" * 9000,
        *(f"line {i}" for i in range(20)),
        "ld: no -lcuda",
    ]
    with pytest.raises(CompileError, match="do not compile") as caught, serve_flashinfer.building():
        raise RuntimeError("\n".join(printed))
    assert "ld: no -lcuda" in str(caught.value) and "line 19" in str(caught.value)
    assert len(str(caught.value)) < 300 and "line 3\n" not in str(caught.value)


def test_other_errors_of_a_build_are_left_as_they_are():
    with pytest.raises(RuntimeError, match=r"^something else$") as caught, serve_flashinfer.building():
        raise RuntimeError("something else")
    assert not isinstance(caught.value, CompileError)


@pytest.mark.parametrize("folder", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_the_runtime_beside_the_compiler_is_linked(tmp_path, folder):
    (tmp_path / "bin").mkdir()
    (tmp_path / folder).mkdir(parents=True)
    compiler = nvcc.Nvcc(str(tmp_path / "bin" / "nvcc"), "a test", (13, 0), "")
    with pytest.raises(MissingDependencyError, match=r"no libcudart\.so beside it .*CUDA_HOME"):
        serve_flashinfer.link_options(compiler)
    library = tmp_path / folder / "libcudart.so.13"
    library.write_text("")
    assert serve_flashinfer.link_options(compiler)[1:] == [str(library), f"-Wl,-rpath,{library.parent}"]


def test_the_compiler_may_be_a_link_into_a_toolkit_or_out_of_it(tmp_path):
    for root, target in (("toolkit", "elsewhere"), ("elsewhere", "toolkit")):
        folder = tmp_path / root
        for name in ("toolkit/bin", "toolkit/lib64", "elsewhere/bin"):
            (folder / name).mkdir(parents=True)
        (folder / target / "bin" / "nvcc").write_text("")
        (folder / root / "bin" / "nvcc").symlink_to(folder / target / "bin" / "nvcc")
        library = folder / "toolkit" / "lib64" / "libcudart.so"
        library.write_text("")
        compiler = nvcc.Nvcc(str(folder / root / "bin" / "nvcc"), "a test", (13, 0), "")
        assert str(library) in serve_flashinfer.link_options(compiler)


_ARGUMENTS = {  # of TVM's calls, in attn_backend.h
    "batch_prefill_plan": 19,
    "batch_decode_plan": 15,
    "batch_prefill_paged_run": 19,
    "batch_prefill_ragged_run": 17,
    "batch_decode_run": 17,
}


@pytest.mark.slow
@pytest.mark.needs_nvcc
def test_the_library_has_its_functions_with_the_arguments_of_tvms_calls(monkeypatch):
    if serve_flashinfer.installed_version() is None or shutil.which("ninja") is None:
        pytest.skip("flashinfer-python and ninja are not installed")
    if ctypes.util.find_library("cuda") is None:
        pytest.skip("its build links the driver's library, which is not on this machine")
    import tvm

    if not tvm.cuda().exist:
        monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
        monkeypatch.setattr(cublas, "ensure_cublas", lambda: None)  # nothing is run
    serve_flashinfer.require("cuda", 128)
    config = dataclasses.replace(LLAMA_3_8B, num_layers=2)
    model = serve_models.ServeModel("two layers", config, "bfloat16", {}, "none")
    library = serve_backends._compile_tvm(model, CacheSizes(4, 256, 512, 16), "cuda", "flashinfer")
    for name, count in _ARGUMENTS.items():
        function = library.get_function(name, True)
        with pytest.raises(TypeError, match="Mismatched type on argument"):  # the count is right, nothing else
            function(*[None] * count)
        with pytest.raises(TypeError, match="Mismatched number of arguments"):
            function(*[None] * (count + 1))
    tvm.relax.VirtualMachine(library, tvm.cpu())  # looks every function up

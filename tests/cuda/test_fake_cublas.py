"""Products on CUDA without a GPU: a libcuda.so.1 and a libcublasLt.so.13 that record what they are asked, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from tvm_infer import cublas, env, errors

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_processes import COMPILER, CUDA_HEADERS, CUDA_SRC, HERE, compile_fake, python

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

PRODUCT = """
import sys
sys.path.insert(0, {here!r})
import tvm_ffi
from fake_tensors import tensor
from tvm_infer import _ffi, errors
_ffi.library()
{before}
try:
    _ffi.func("matmul")(tensor((3, 4)), tensor((5, 4)), 1, tensor((3, 5)))
    print("ran on", _ffi.func("cublas_path")())
except errors.TvmInferError as e:
    print(type(e).__name__, e)
"""
WITHOUT_PYTHONS_SEARCH = 'tvm_ffi.register_global_func("tvm_infer.find_cublas", lambda: "", override=True)'


def compile_cublas(folder: pathlib.Path, name: str = "libcublasLt.so.13", *flags: str) -> pathlib.Path:
    command = [COMPILER, "-std=c++20", "-shared", "-fPIC", "-I", str(CUDA_SRC), f"-Wl,-soname,{name}", *flags]
    subprocess.run([*command, str(HERE / "fake_libcublaslt.cc"), "-o", str(folder / name)], check=True)
    return folder / name


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder with both libraries."""
    folder = compile_fake(tmp_path_factory.mktemp("fake"))
    compile_cublas(folder)
    return folder


@pytest.fixture(scope="module")
def driver_alone(tmp_path_factory):
    return compile_fake(tmp_path_factory.mktemp("driver"))


def product(library: pathlib.Path, before: str = "", **environment: str) -> str:
    result = python(["-c", PRODUCT.format(here=str(HERE), before=before)], library, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_products_arguments_and_errors(fake):
    """tests/cuda/with_fake_cublas.py, in a process that has the fake libraries."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "with_fake_cublas.py")]
    result = python(arguments, fake, TVM_INFER_CUBLASLT=str(fake / "libcublasLt.so.13"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(".") > 250 and "skipped" not in result.stdout


def test_products_of_a_few_rows(fake):
    """tests/cuda/with_fake_gemv.py, in such a process."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "with_fake_gemv.py")]
    result = python(arguments, fake, TVM_INFER_CUBLASLT=str(fake / "libcublasLt.so.13"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(".") > 80 and "skipped" not in result.stdout


FEW_ROWS = """
import sys
sys.path.insert(0, {here!r})
from fake_tensors import Driver, tensor
from with_fake_gemv import _ffi
before = len(Driver().launches())
_ffi.func("matmul")(tensor((4, 64)), tensor((256, 64)), 1, tensor((4, 256)))
print(len(Driver().launches()) - before, _ffi.func("set_matmul_gemv")(True))
"""


@pytest.mark.parametrize(("value", "on"), [("0", False), ("1", True), ("", True), (None, True)])
def test_the_setting_sends_products_of_a_few_rows_to_cublaslt(fake, value, on):
    environment = {"TVM_INFER_CUBLASLT": str(fake / "libcublasLt.so.13")}
    environment |= {} if value is None else {"TVM_INFER_MATMUL_GEMV": value}
    result = python(["-c", FEW_ROWS.format(here=str(HERE))], fake, **environment)
    assert result.stdout.split() == [str(int(on)), str(on)], result.stderr


def headers_of_cublas() -> list[pathlib.Path]:
    spec = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(f) / "cu13" / "include" for f in (spec.submodule_search_locations or () if spec else ())]
    found = [f for f in (*folders, *CUDA_HEADERS) if (f / "cublasLt.h").exists()]
    return found if any((f / "library_types.h").exists() for f in (*folders, *CUDA_HEADERS)) else []


@pytest.mark.skipif(not headers_of_cublas(), reason="needs cublasLt.h")
def test_declarations_are_those_of_cublaslt_h():
    includes = [word for f in (*headers_of_cublas(), *CUDA_HEADERS) for word in ("-I", str(f))]
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-I", str(CUDA_SRC), *includes]
    subprocess.run([*command, str(HERE / "cublas_constants.cc")], check=True)


def test_the_dynamic_loader_finds_it(fake):
    """As a program without Python has it: the loader's path holds the library."""
    assert product(fake, WITHOUT_PYTHONS_SEARCH) == f"ran on {fake}/libcublasLt.so.13"


def test_one_that_is_loaded_is_not_loaded_again(driver_alone, tmp_path):
    path = compile_cublas(tmp_path)
    load = f"import ctypes; ctypes.CDLL({str(path)!r})\n"
    assert product(driver_alone, load + WITHOUT_PYTHONS_SEARCH) == f"ran on {path}"
    assert product(driver_alone, load) == f"ran on {path}"  # Python's search


def test_an_older_driver_takes_the_older_library(fake, tmp_path):
    older = compile_cublas(tmp_path, "libcublasLt.so.12")
    both = os.pathsep.join([str(tmp_path), str(fake)])
    assert product(both, WITHOUT_PYTHONS_SEARCH, FAKE_CUDA_VERSION="12080") == f"ran on {older}"
    assert product(both, WITHOUT_PYTHONS_SEARCH).endswith("libcublasLt.so.13")


def test_the_setting_names_it(driver_alone, tmp_path):
    path = compile_cublas(tmp_path, "renamed.so")
    for before in ("", WITHOUT_PYTHONS_SEARCH):
        assert product(driver_alone, before, TVM_INFER_CUBLASLT=str(path)) == f"ran on {path}"
        missing = product(driver_alone, before, TVM_INFER_CUBLASLT="/no/such.so")
        assert missing.startswith("ArgumentError setting TVM_INFER_CUBLASLT is /no/such.so, which cannot be opened")


def test_none_says_which_package_to_install(driver_alone):
    out = product(driver_alone, WITHOUT_PYTHONS_SEARCH)
    assert out.startswith("MissingDependencyError matmul on a CUDA device needs cuBLASLt")
    assert "pip install nvidia-cublas" in out and "TVM_INFER_CUBLASLT" in out


def test_a_library_that_is_too_old(driver_alone, tmp_path):
    path = compile_cublas(tmp_path, "old.so", "-DFAKE_CUBLAS_OLD")
    out = product(driver_alone, TVM_INFER_CUBLASLT=str(path))
    assert out.startswith("ArgumentError") and "has no function cublasLtMatmulDescCreate" in out


# Python's search


@pytest.fixture
def bare(monkeypatch):
    """Nothing set, loaded or installed, no driver."""
    for name in ("TVM_INFER_CUBLASLT", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cublas, "_loaded", lambda: None)
    monkeypatch.setattr(cublas, "_driver_version", lambda: None)
    monkeypatch.setattr(cublas, "_toolkits", lambda: iter(()))
    monkeypatch.setattr(cublas, "_packages", lambda: iter(()))
    return monkeypatch


def library_in(folder: pathlib.Path, *names: str) -> pathlib.Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_search_order(bare, tmp_path):
    with pytest.raises(errors.MissingDependencyError, match=r"libcublasLt\.so\.13.*tvm_infer\[cuda\].*nvidia-cublas"):
        cublas.set_cublas()
    assert cublas.path_or_empty() == "" and "nvidia-cublas" in cublas.describe()
    package = library_in(tmp_path / "package", "libcublasLt.so.13", "libcublasLt.so.12")
    bare.setattr(cublas, "_packages", lambda: iter([(package, "the package")]))
    assert cublas.find() == cublas.Library(str(package / "libcublasLt.so.13"), "the package")
    bare.setattr(cublas, "_driver_version", lambda: 12080)
    assert cublas.path_or_empty() == str(package / "libcublasLt.so.12")
    toolkit = library_in(tmp_path / "toolkit", "libcublasLt.so.12")
    bare.setattr(cublas, "_toolkits", lambda: iter([(tmp_path / "absent", "no"), (toolkit, "the toolkit")]))
    assert cublas.find().found_by == "the toolkit"
    bare.setattr(cublas, "_loaded", lambda: "/torch/libcublasLt.so.12")
    assert cublas.find().path == "/torch/libcublasLt.so.12"
    bare.setenv("TVM_INFER_CUBLASLT", "/named")
    assert cublas.find() == cublas.Library("/named", "TVM_INFER_CUBLASLT")
    assert cublas.describe().startswith("not usable: /named, by TVM_INFER_CUBLASLT")


def test_toolkits_and_packages(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert next(cublas._toolkits()) == (tmp_path / "lib64", "CUDA_HOME")
    assert all(folder.name in {"lib", "lib64"} for folder, _ in (*cublas._toolkits(), *cublas._packages()))


def test_doctor_tells(fake):
    path = fake / "libcublasLt.so.13"
    code = "from tvm_infer import doctor; print(doctor.cublas())"
    out = python(["-c", code], fake, TVM_INFER_CUBLASLT=str(path)).stdout
    assert out.strip() == f"13.1.0 ({path}, by TVM_INFER_CUBLASLT)"
    settings = {"TVM_INFER_CUBLASLT", "TVM_INFER_MATMUL_TF32", "TVM_INFER_MATMUL_GEMV"}
    assert settings <= {s.name for s in env.SETTINGS}

"""The launch path without a GPU: a libcuda.so.1 that records what it is asked, in processes of their own."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_processes import COMPILER, CUDA_HEADERS, CUDA_SRC, HERE, compile_fake, python

TRY = """
from tvm_infer import _ffi, errors
try:
    {}
except errors.TvmInferError as e:
    print(type(e).__name__, e)
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    return compile_fake(tmp_path_factory.mktemp("fake"))


def test_launches_arguments_and_errors(fake):
    """tests/cuda/with_fake_driver.py, in a process that has the fake driver."""
    result = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "with_fake_driver.py")], fake)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(".") > 50 and "s" not in result.stdout.splitlines()[0]  # all ran


def test_launches_of_page_selection(fake):
    """tests/cuda/with_fake_page_selection.py, in such a process."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "with_fake_page_selection.py")]
    result = python(arguments, fake)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(".") > 30 and "s" not in result.stdout.splitlines()[0]


@pytest.mark.skipif(not CUDA_HEADERS, reason="needs cuda.h")
def test_declarations_are_those_of_cuda_h():
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-I", str(CUDA_SRC), "-I", str(CUDA_HEADERS[0])]
    subprocess.run([*command, str(HERE / "driver_constants.cc")], check=True)


def has_driver() -> bool:
    return python(["-c", "import ctypes; ctypes.CDLL('libcuda.so.1')"], None).returncode == 0


@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_no_driver_is_told_which_executor_there_is():
    out = python(["-c", TRY.format('_ffi.func("cuda_info")(0)')], None).stdout
    assert out.startswith("ExecutorError the cuda executor is not available: there is no NVIDIA driver")
    assert "cpu" in out


def test_a_driver_without_devices(fake):
    out = python(["-c", TRY.format('_ffi.func("cuda_info")(0)')], fake, FAKE_CUDA_INIT="100").stdout
    assert out.startswith("ExecutorError") and "cuInit returned CUDA_ERROR_NO_DEVICE (100)" in out and "cpu" in out


def test_a_driver_that_is_too_old(tmp_path):
    out = python(["-c", TRY.format('_ffi.func("cuda_info")(0)')], compile_fake(tmp_path, "-DFAKE_CUDA_OLD")).stdout
    assert out.startswith("ExecutorError") and "lacks cuInit" in out and "CUDA 12.0" in out


def test_importing_and_planning_do_not_open_the_driver(fake):
    code = (
        'from tvm_infer import _ffi; _ffi.func("cuda_tile_table")("bfloat16", 128); '
        'print(open("/proc/self/maps").read())'
    )
    assert "libcuda.so" not in python(["-c", code], fake).stdout

"""Compiling and caching of kernels. The small merge kernel stands for all: what is tested is the way, not the kernel."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tvm_infer import _ffi, errors, jit
from tvm_infer.jit import cubin_file, cubins, headers, nvcc

NAME = "merge_states_fp32"
needs_nvcc = pytest.mark.needs_nvcc
FAKE = nvcc.Nvcc("/somewhere/nvcc", "PATH", (13, 0), "release 13.0")


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
    """A copy of our headers elsewhere."""
    folder = tmp_path / "copied headers"
    shutil.copytree(headers.include_dir() / "tvm_infer", folder / "tvm_infer")
    return folder


def key(folder: pathlib.Path, compiler: nvcc.Nvcc = FAKE) -> str:
    return cubins.key(jit.parse(NAME), "sm_90a", compiler, folder)


def test_the_key_is_contents_not_paths(tree):
    before = key(headers.include_dir())
    assert key(tree) == before
    for path in tree.rglob("*"):
        os.utime(path, (1, 1))
    assert key(tree, nvcc.Nvcc("/elsewhere/nvcc", "CUDA_HOME", (13, 0), FAKE.version)) == before


def test_every_header_that_is_reached_changes_the_key(tree):
    before = key(tree)
    reached = headers.reached(jit.parse(NAME).source(), tree)
    assert {"tvm_infer/kernels/merge_states.cuh", "tvm_infer/cuda/params.h"} <= set(reached)
    for name, contents in reached.items():
        (tree / name).write_bytes(contents + b"\n// changed\n")
        assert key(tree) != before, name
        (tree / name).write_bytes(contents)
    (tree / "tvm_infer/attention/consumer.cuh").write_text("not reached\n")
    assert key(tree) == before


def test_compiler_flags_and_steering_change_the_key(tree, monkeypatch):
    keys = {key(tree), key(tree, nvcc.Nvcc("/somewhere/nvcc", "PATH", (13, 1), "release 13.1"))}
    monkeypatch.setenv("TVM_INFER_LINEINFO", "1")
    keys.add(key(tree))
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    keys.add(key(tree))
    assert len(keys) == 4


@needs_nvcc
def test_compiled_once_then_silent(own_cache, counting_nvcc, capfd):
    first = jit.cubin(NAME)
    line = capfd.readouterr().err
    assert line.startswith(f"tvm_infer: compiling {NAME} for sm_90a … ") and line.endswith(" s\n")
    assert jit.cubin(NAME) == first
    assert counting_nvcc() == 1
    assert capfd.readouterr().err == ""
    info = cubin_file.kernel_info(first, NAME)
    assert info.abi == headers.kernel_abi() and info.threads % 32 == 0 and info.threads > 0


@needs_nvcc
def test_progress_can_be_switched_off(own_cache, monkeypatch, capfd):
    monkeypatch.setenv("TVM_INFER_PROGRESS", "0")
    jit.cubin(NAME)
    assert capfd.readouterr() == ("", "")


@needs_nvcc
def test_eight_processes_one_compilation(own_cache, counting_nvcc):
    code = f"import sys; from tvm_infer import jit; sys.stdout.buffer.write(jit.cubin({NAME!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(8)]
    made = {p.communicate(timeout=120)[0] for p in processes}
    assert [p.returncode for p in processes] == [0] * 8
    assert len(made) == 1 and made.pop().startswith(b"\x7fELF")
    assert counting_nvcc() == 1


@needs_nvcc
def test_cubins_hold_no_path_and_are_the_same_everywhere(own_cache, tree, counting_nvcc, monkeypatch, tmp_path):
    here = jit.cubin(NAME)
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path / "another cache"))
    there = cubins.build_one(NAME, include_dir=tree).path.read_bytes()
    assert counting_nvcc() == 2
    assert here == there
    assert str(tmp_path).encode() not in there


@needs_nvcc
def test_a_broken_header_is_a_compile_error(own_cache, tree, capfd):
    path = tree / "tvm_infer/kernels/merge_states.cuh"
    path.write_text(path.read_text() + "\nint broken = no_such_thing;\n")
    with pytest.raises(errors.CompileError) as error:
        cubins.build_one(NAME, include_dir=tree)
    for part in (NAME, "no_such_thing", "-gencode=arch=compute_90a,code=sm_90a", "exit status"):
        assert part in str(error.value)
    assert capfd.readouterr().err.endswith("… failed\n")
    assert [p for p in (own_cache / "kernels").iterdir() if p.suffix != ".lock"] == []  # nothing half


@needs_nvcc
def test_prebuilt_folder_needs_no_compiler(cache, tmp_path, monkeypatch):
    seen = []
    out = tmp_path / "out"
    (built,) = jit.build([NAME], jobs=1, out=out, done=seen.append)
    assert seen == [built] and [p.name for p in out.iterdir()] == [f"{NAME}.sm_90a.cubin"]
    without_compiler(monkeypatch)
    monkeypatch.setenv("TVM_INFER_CUBIN_DIR", str(out))
    assert jit.cubin(NAME) == built.path.read_bytes()
    given = []
    monkeypatch.setattr(_ffi, "func", {"add_cubin": lambda *cubin: given.append(cubin)}.get)
    assert jit.load(out) == [NAME]
    assert given == [(NAME, "sm_90a", built.path.read_bytes())]
    monkeypatch.setattr(headers, "kernel_abi", lambda: 999)
    with pytest.raises(errors.AbiError, match="999"):
        jit.cubin(NAME)
    (out / f"{NAME}.sm_90a.cubin").write_bytes(built.path.read_bytes()[:1000])
    with pytest.raises(errors.CompileError, match="not whole"):
        jit.load(out)


def test_load_refuses_a_folder_without_cubins(tmp_path):
    with pytest.raises(errors.ArgumentError, match="holds no"):
        jit.load(tmp_path)


def test_load_names_the_file_that_is_none(tmp_path):
    stray = tmp_path / "stray.sm_90a.cubin"
    stray.write_bytes(b"")
    with pytest.raises(
        errors.ArgumentError, match=r"argument `folder` holds .*stray\.sm_90a\.cubin, which is no kernel"
    ):
        jit.load(tmp_path)
    stray.rename(tmp_path / f"{NAME}.sm_90a.cubin")
    with pytest.raises(errors.CompileError, match=rf"{NAME}\.sm_90a\.cubin: .*\(0 bytes\)"):
        jit.load(tmp_path)


def test_folders_and_names_that_are_none(tmp_path, script, monkeypatch):
    monkeypatch.setenv("TVM_INFER_NVCC", str(script("nvcc", "echo release 13.0")))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(errors.ArgumentError, match=r"argument `out` is .*file"):
        jit.build([NAME], out=file)
    with pytest.raises(errors.ArgumentError, match="argument `names` is the string"):
        jit.build(NAME)
    with pytest.raises(errors.ArgumentError, match="argument `name` is 3"):
        jit.cubin(3)
    monkeypatch.setenv("TVM_INFER_CUBIN_DIR", str(file))
    with pytest.raises(errors.ArgumentError, match=r"setting TVM_INFER_CUBIN_DIR is .*no folder"):
        jit.cubin(NAME)


def without_compiler(monkeypatch) -> None:
    monkeypatch.delenv("TVM_INFER_NVCC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(nvcc, "_packaged", lambda: None)


def test_no_compiler_says_what_to_install(own_cache, monkeypatch):
    without_compiler(monkeypatch)
    with pytest.raises(errors.MissingDependencyError, match=r"pip install 'tvm_infer\[cuda\]'"):
        jit.cubin(NAME)


def test_an_old_compiler_is_told_both_versions(own_cache, script, monkeypatch):
    monkeypatch.setenv("TVM_INFER_NVCC", str(script("old", "echo 'Cuda compilation tools, release 11.8, V11.8.89'")))
    with pytest.raises(errors.MissingDependencyError, match=r"nvcc 11\.8 .*12\.0 or newer"):
        jit.cubin(NAME)
    with pytest.raises(errors.MissingDependencyError, match=r"11\.8"):
        jit.build([NAME])


@pytest.mark.parametrize("text", ["echo hello", "exit 3"])
def test_what_is_no_nvcc_is_said(own_cache, script, monkeypatch, text):
    monkeypatch.setenv("TVM_INFER_NVCC", str(script("odd", text)))
    with pytest.raises(errors.ArgumentError, match="is no nvcc"):
        jit.cubin(NAME)
    monkeypatch.setenv("TVM_INFER_NVCC", "/no/such/nvcc")
    with pytest.raises(errors.ArgumentError, match="TVM_INFER_NVCC"):
        jit.cubin(NAME)


def test_unknown_architecture_and_jobs(own_cache, script, monkeypatch):
    monkeypatch.setenv("TVM_INFER_NVCC", str(script("nvcc", "echo release 13.0")))
    with pytest.raises(errors.ArgumentError, match="'sm_80'; kernels are compiled for sm_90a"):
        jit.cubin(NAME, "sm_80")
    with pytest.raises(errors.ArgumentError, match="`jobs` is 0"):
        jit.build([NAME], jobs=0)


def test_no_host_compiler_is_said(own_cache, script, monkeypatch):
    text = 'if [ "$1" = --version ]; then echo release 13.0; else echo "gcc: No such file or directory"\n'
    text += 'echo "nvcc fatal   : Failed to preprocess host compiler properties."; exit 1; fi'
    monkeypatch.setenv("TVM_INFER_NVCC", str(script("nvcc", text)))
    with pytest.raises(errors.MissingDependencyError, match=r"install g\+\+"):
        jit.cubin(NAME)


def test_the_packages_of_the_extra_are_found_last(monkeypatch, script, tmp_path):
    without_compiler(monkeypatch)
    packaged = script("packaged", "echo release 13.1")
    monkeypatch.setattr(nvcc, "_packaged", lambda: packaged)
    assert nvcc.find().found_by == "the package nvidia-cuda-nvcc"
    (tmp_path / "bin").mkdir()
    shutil.copy(script("nvcc", "echo release 13.0"), tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find().found_by == "CUDA_HOME"


def test_import_is_light():
    code = "import sys, tvm_infer.jit; print([m for m in ('tvm', 'tvm_ffi', 'torch', 'numpy', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

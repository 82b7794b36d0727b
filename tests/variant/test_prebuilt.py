"""The standard variants in the C++ library: all of them, up to date, right in every instruction set, and without a compiler."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import standard_results
from test_standard import KV_LEN

import tvm_infer
from tvm_infer import _ffi, errors, variant
from tvm_infer.variant import cpu, prebuilt

HERE = pathlib.Path(__file__).resolve().parent
STANDARD_INC = HERE.parents[1] / "cuda_src" / "tvm_infer" / "variant" / "standard.inc"
ISAS = ["portable", "avx2", "avx512"]
NAMES = list(standard_results.needs_code())


def run_python(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess:
    """In an environment with these settings; None: without."""
    root = str(pathlib.Path(tvm_infer.__file__).parents[1])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    changed = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_generated_file_is_up_to_date():
    done = run_python("-m", "tvm_infer.variant.prebuilt")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert STANDARD_INC.read_text() == done.stdout, (
        "python -m tvm_infer.variant.prebuilt > cuda_src/tvm_infer/variant/standard.inc, then build"
    )
    for name in NAMES:
        assert done.stdout.count(variant.STANDARD[name].source()) == 1


def test_the_library_has_every_one():
    assert len(NAMES) == 14
    addresses = {variant.STANDARD[name].digest: prebuilt.address(variant.STANDARD[name]) for name in NAMES}
    assert all(addresses.values()) and len(set(addresses.values())) == len(addresses)
    for name in NAMES:
        functions = standard_results.CpuFunctions.from_address(prebuilt.address(variant.STANDARD[name]))
        v = variant.STANDARD[name]
        assert (functions.abi, bool(functions.output)) == (2, v.output is not None)
        assert (bool(functions.turn), bool(functions.has_softmax)) == (v.rotates, v.settings.softmax)


def test_bands_ask_for_no_code_of_their_own():
    assert prebuilt.address(variant.soft_cap & variant.sliding_window) == prebuilt.address(variant.soft_cap)


def test_other_digests_are_not_there():
    assert prebuilt.address(variant.Variant("v", logits=lambda value: value * 21.25)) == 0
    assert _ffi.func("standard_variant")("0123456789abcdef") == 0
    for wrong in ("", "0123", "variant_01234567"):
        with pytest.raises(errors.ArgumentError, match=r"argument `digest`.*16 hexadecimal digits"):
            _ffi.func("standard_variant")(wrong)


def test_they_come_before_the_compiler(monkeypatch):
    monkeypatch.setattr(cpu, "compiled", lambda v: pytest.fail(f"{v} compiled"))
    for name in NAMES:
        assert variant.cpu_functions(variant.STANDARD[name]) == prebuilt.address(variant.STANDARD[name])


@pytest.fixture(scope="module")
def compiled() -> dict[str, np.ndarray]:
    return standard_results.results(cpu.compiled)


def of_library(isa: str, folder: pathlib.Path) -> dict[str, np.ndarray]:
    available = ISAS[: ISAS.index(_ffi.func("cpu_info")().split()[0]) + 1]
    if isa not in available:
        pytest.skip(f"this machine runs {available[-1]}: {isa} is not below it")
    done = run_python(str(HERE / "standard_results.py"), str(folder / "results.npz"), TVM_INFER_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "results.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_sets_give_the_numbers_of_compiled_code(isa, compiled, tmp_path):
    found = of_library(isa, tmp_path)
    assert found.pop("isa") == isa
    found.pop("code")
    assert found.keys() == compiled.keys()
    for name, expected in compiled.items():
        np.testing.assert_allclose(found[name], expected, rtol=2e-6, atol=2e-6, err_msg=name)
        assert name != "soft_cap" or np.ptp(found[name][:, :KV_LEN]) > 3


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_runs_its_own_code(isa, tmp_path):
    """Soft-capped logits are computed in vectors of its width."""
    (tmp_path / "code").write_bytes(of_library(isa, tmp_path)["code"].tobytes())
    command = ["objdump", "-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", str(tmp_path / "code")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    widths = {"z" if "%zmm" in text else "y" if "%ymm" in text else "x"}
    assert widths == {{"portable": "x", "avx2": "y", "avx512": "z"}[isa]}
    multiply = {"portable": r"\bmulps\b", "avx2": r"\bvmulps .*%ymm", "avx512": r"\bvmulps .*%zmm"}[isa]
    assert re.search(multiply, text)


WITHOUT_COMPILER = """
import json, numpy as np, tvm_infer
from tvm_infer import errors, variant
from tvm_infer.testing import make_paged_batch

sizes = dict(num_qo_heads=2, num_kv_heads=1, head_dim=32)
batch = make_paged_batch([3], [40], page_size=8, **sizes)

def run(v):
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, variant=v, **sizes)
    return tvm_infer.attention(batch.q, batch.kv_cache, plan, variant=v, **batch.tables)

out = run(variant.soft_cap.bind(cap=1.5))
scores = 1.5 * np.tanh(np.einsum("qhd,kd->hqk", batch.q.astype(float), batch.keys[0][:, 0].astype(float)) * batch.sm_scale / 1.5)
scores[:, np.arange(40) > np.arange(37, 40)[:, None]] = -np.inf
weights = np.exp(scores)
expected = np.einsum("hqk,kd->qhd", weights / weights.sum(-1, keepdims=True), batch.values[0][:, 0].astype(float))
try:
    run(variant.Variant("mine", logits=lambda value: value * 0.75))
    message = None
except errors.MissingDependencyError as error:
    message = str(error)
print(json.dumps({"error": float(abs(out - expected).max()), "message": message}))
"""


def test_a_machine_without_a_compiler(tmp_path):
    """Soft cap is computed there; a variant of one's own says what to install, and which need nothing."""
    nothing, cache = tmp_path / "bin", tmp_path / "cache"
    nothing.mkdir()
    done = run_python(
        "-c", WITHOUT_COMPILER, PATH=str(nothing), TVM_INFER_CXX=None, CXX=None, TVM_INFER_CACHE_DIR=str(cache)
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["error"] <= 1e-5
    for part in ("variant mine", "tvm_infer.variant.STANDARD", "a C++ compiler", "apt install g++", "TVM_INFER_CXX"):
        assert part in (found["message"] or "")
    assert not list(cache.rglob("*.so"))

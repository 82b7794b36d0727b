"""tvm_infer.matmul against float64, over every way the work is cut, and its errors."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import CORES, f32, operands, reference

import tvm_infer
from tvm_infer import _ffi, errors


def error(out, a, b, transpose_b):
    """Largest error in units of fp32 rounding of the sum of |products|."""
    scale = np.abs(a).astype(np.float64) @ np.abs(b.T if transpose_b else b).astype(np.float64)
    return float((np.abs(out - reference(a, b, transpose_b)) / np.maximum(scale, 1e-30)).max(initial=0.0)) * 2**23


@given(
    m=st.integers(1, 80), k=st.integers(1, 300), n=st.integers(1, 300), transpose_b=st.booleans(), pad=st.integers(0, 5)
)
def test_any_shape(m, k, n, transpose_b, pad):
    a, b, out = operands(np.random.default_rng(m * 7 + k * 3 + n), m, k, n, transpose_b, pad)
    tvm_infer.matmul(a, b, transpose_b=transpose_b, out=out)
    assert error(out, a, b, transpose_b) < 4 + np.sqrt(k)
    if pad and m > 1:
        assert np.isnan(out.base[:, n:]).all()


@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 576, 49152), (4, 576, 1536), (5, 1536, 577), (33, 576, 3072), (300, 64, 31), (2, 70000, 40)]
)
def test_shapes_of_models(m, k, n, transpose_b):
    a, b, out = operands(np.random.default_rng(0), m, k, n, transpose_b)
    assert tvm_infer.matmul(a, b, transpose_b=transpose_b, out=out) is out
    assert error(out, a, b, transpose_b) < 4 + np.sqrt(k)


@pytest.mark.parametrize("core", CORES)
def test_every_kernel_family(core):
    """In a fresh process, because OpenBLAS chooses its kernels once."""
    code = """
import numpy as np, test_matmul as t, tvm_infer
print(tvm_infer.set_blas())
for m, k, n in [(1, 576, 100), (3, 65, 1000), (4, 576, 500), (8, 129, 700), (40, 200, 300)]:
    for transpose_b in (True, False):
        a, b, out = t.operands(np.random.default_rng(1), m, k, n, transpose_b, pad=3)
        tvm_infer.matmul(a, b, transpose_b=transpose_b, out=out)
        assert t.error(out, a, b, transpose_b) < 4 + k**0.5, (m, k, n, transpose_b)
"""
    folders = [str(pathlib.Path(__file__).parent), str(pathlib.Path(tvm_infer.__file__).parents[1])]
    env = {**os.environ, "OPENBLAS_CORETYPE": core, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != core:
        pytest.skip(f"this processor runs {done.stdout.strip()}, not {core}")


def test_leading_dimensions_are_rows():
    rng = np.random.default_rng(2)
    a = rng.standard_normal((2, 1, 3, 40), dtype=np.float32)
    b = rng.standard_normal((50, 40), dtype=np.float32)
    out = tvm_infer.matmul(a, b, transpose_b=True)
    assert out.shape == (2, 1, 3, 50)
    np.testing.assert_allclose(out, a @ b.T, rtol=1e-4, atol=1e-4)


def test_offset_views_of_torch_and_tvm():
    """byte_offset is honoured: the data of a slice does not start where its allocation does."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    whole = torch.from_numpy(rng.standard_normal((9, 64), dtype=np.float32))
    b = torch.from_numpy(rng.standard_normal((32, 48), dtype=np.float32))
    a = whole[2:7, 5:53]
    np.testing.assert_allclose(tvm_infer.matmul(a, b, transpose_b=True), a @ b.T, rtol=1e-4, atol=1e-4)
    import tvm

    flat = tvm.runtime.tensor(np.arange(64, dtype=np.float32))
    view = flat._create_view([2, 8], relative_byte_offset=4 * 8)
    assert view.numpy()[0, 0] == 8.0
    out = tvm_infer.matmul(view, np.eye(8, dtype=np.float32), out=np.empty((2, 8), np.float32))
    np.testing.assert_array_equal(out, view.numpy())


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty(m, k, n):
    out = np.full((m, n), np.nan, np.float32)
    tvm_infer.matmul(np.ones((m, k), np.float32), np.ones((k, n), np.float32), out=out)
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("a", "b", "out", "kind", "message"),
    [
        (f32(2, 3), f32(5, 4), f32(2, 5), errors.ArgumentError, r"`b` has shape \[5, 4\]; dimension 1 must be 3"),
        (f32(2, 3), f32(5, 3), f32(2, 4), errors.ArgumentError, r"`out` has shape \[2, 4\]; dimension 1 must be 5"),
        (f32(2, 3), f32(5, 3), f32(3, 5), errors.ArgumentError, "`out`.*has 3 rows"),
        (f32(3), f32(5, 3), f32(1, 5), errors.ArgumentError, "`a` has rank 1"),
        (f32(2, 3), f32(1, 5, 3), f32(2, 5), errors.ArgumentError, "`b` has rank 3"),
        (f32(3, 2).T, f32(5, 3), f32(2, 5), errors.ArgumentError, "`a` has stride 2 in its last dimension"),
        (np.zeros((2, 3)), f32(5, 3), f32(2, 5), errors.DTypeError, "`a` has dtype float64"),
        (f32(2, 3).astype(np.float16), f32(5, 3), f32(2, 5), errors.DTypeError, "cast a, b and out to float32"),
        (f32(2, 3), f32(5, 3).astype(ml_dtypes.bfloat16), f32(2, 5), errors.DTypeError, "`b` has dtype bfloat16"),
        (
            np.lib.stride_tricks.as_strided(f32(9), (3, 3), (4, 4)),
            f32(5, 3),
            f32(3, 5),
            errors.ArgumentError,
            "must not overlap",
        ),
    ],
)
def test_errors_name_the_argument(a, b, out, kind, message):
    before = out.copy()
    with pytest.raises(kind, match=message):
        tvm_infer.matmul(a, b, transpose_b=True, out=out)
    np.testing.assert_array_equal(out, before)


def test_rows_must_be_evenly_spaced():
    a = np.zeros((4, 6, 8), np.float32)[:, ::2][:, :2]
    with pytest.raises(errors.ArgumentError, match="rows must be evenly spaced"):
        tvm_infer.matmul(a, f32(5, 8), transpose_b=True)


def test_set_blas_refuses_and_keeps_what_was_set(tmp_path):
    tvm_infer.set_blas()
    before = _ffi.func("blas_path")()
    with pytest.raises(errors.ArgumentError, match=r"cannot be opened.*tvm_infer\[blas\]"):
        tvm_infer.set_blas(tmp_path / "no.so")
    spec = importlib.util.find_spec("scipy_openblas32")
    path = pathlib.Path(spec.submodule_search_locations[0]) / "lib" / "libscipy_openblas.so"
    with pytest.raises(errors.ArgumentError, match="has no symbol wrong_cblas_sgemm"):
        tvm_infer.set_blas(path, "wrong_")
    assert _ffi.func("blas_path")() == before != ""


def test_without_a_blas():
    """The packed function says which extra to install."""
    code = """
import numpy as np, sys
from tvm_infer import _ffi, errors
x = np.zeros((2, 2), np.float32)
try:
    _ffi.func("matmul")(x, x, 0, x)
except errors.MissingDependencyError as e:
    print(e)
"""
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(tvm_infer.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "pip install 'tvm_infer[blas]'" in done.stdout


def test_package_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingDependencyError, match=r"tvm_infer\[blas\]"):
        tvm_infer.set_blas()


def test_bench_measures_every_peer(monkeypatch, capsys, tmp_path):
    from tvm_infer.bench import matmul

    monkeypatch.setattr(matmul, "SHAPES", ((8, 16), (8, 8), (8, 24), (24, 8), (8, 64)))
    monkeypatch.setattr(matmul, "ROWS", (1, 3))
    monkeypatch.setattr(matmul, "_CYCLE_BYTES", 1.0)
    results = matmul.run(peers=["torch", "tvm"], json_path=str(tmp_path / "out.json"), seconds=0.001)
    assert len(results["rows"]) == 10
    assert all(row[name] > 0 for row in results["rows"] for name in ("tvm_infer", "torch", "tvm"))
    assert "tvm_infer ms" in capsys.readouterr().out and (tmp_path / "out.json").stat().st_size > 0
    with pytest.raises(errors.ArgumentError, match="known peers are torch, tvm"):
        matmul.run(peers=["mkl"])

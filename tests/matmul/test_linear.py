"""tvm_infer.linear on the CPU, where it is matmul, or matmul_add, with a transposed weight: against float64, outputs, errors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrices import f32, operands, reference

import tvm_infer
from tvm_infer import _ffi, errors


def error(out, x, weight, c=None):
    """Largest error in units of fp32 rounding of the sum of |products| and |c|."""
    c = np.float64(0) if c is None else c.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(weight.T).astype(np.float64) + np.abs(c)
    return float((np.abs(out - reference(x, weight, True) - c) / scale).max(initial=0.0)) * 2**23


def addend(rng, m, n):
    """Large beside the products: leaving it out, or adding it twice, shows."""
    return (100 + rng.standard_normal((m, n))).astype(np.float32)


@given(m=st.integers(1, 20), k=st.integers(1, 200), n=st.integers(1, 200), pad=st.integers(0, 5))
def test_any_shape(m, k, n, pad):
    rng = np.random.default_rng(m * 7 + k * 3 + n)
    x, weight, out = operands(rng, m, k, n, True, pad)
    assert tvm_infer.linear(x, weight, out=out) is out
    assert error(out, x, weight) < 4 + np.sqrt(k)
    np.testing.assert_array_equal(out, tvm_infer.matmul(x, weight, transpose_b=True))
    c = addend(rng, m, n)
    kept = c.copy()
    assert tvm_infer.linear(x, weight, c=c, out=out) is out
    assert error(out, x, weight, c) < 4 + np.sqrt(k)
    np.testing.assert_array_equal(c, kept)
    np.testing.assert_array_equal(out, tvm_infer.matmul_add(x, weight, transpose_b=True, c=c))
    if pad and m > 1:
        assert np.isnan(out.base[:, n:]).all()
    assert tvm_infer.linear(x, weight, c=c, out=c) is c  # in place
    np.testing.assert_array_equal(c, out)


def test_leading_dimensions_are_rows_and_outputs_are_made():
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((2, 1, 3, 40), dtype=np.float32), rng.standard_normal((50, 40), dtype=np.float32)
    c = rng.standard_normal((2, 1, 3, 50), dtype=np.float32)
    for out, added in ((tvm_infer.linear(x, weight), 0), (tvm_infer.linear(x, weight, c=c), c)):
        assert out.shape == (2, 1, 3, 50) and out.dtype == np.float32
        np.testing.assert_allclose(out, x @ weight.T + added, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty(m, k, n):
    x, weight, out = operands(np.random.default_rng(0), m, k, n, True, pad=2)
    tvm_infer.linear(x, weight, out=out)
    assert (out == 0).all()
    c = np.full((m, n), 3, np.float32)
    tvm_infer.linear(x, weight, c=c, out=out)
    assert (out == 3).all() and np.isnan(out.base[:, n:]).all()


ERRORS = [
    ({"weight": f32(3, 5)}, errors.ArgumentError, r"`b` has shape \[3, 5\]; dimension 1 must be 3"),
    ({"weight": f32(1, 5, 3)}, errors.ArgumentError, r"`b` has rank 3"),
    ({"x": f32(3)}, errors.ArgumentError, r"`a` has rank 1"),
    ({"x": f32(3, 2).T}, errors.ArgumentError, "`a` has stride 2 in its last dimension"),
    ({"weight": f32(3, 5).T}, errors.ArgumentError, "`b` has stride 5 in its last dimension"),
    ({"x": np.zeros((2, 3))}, errors.DTypeError, "`a` has dtype float64"),
    ({"weight": f32(5, 3).astype(ml_dtypes.bfloat16)}, errors.DTypeError, "`b` has dtype bfloat16"),
    ({"c": f32(1, 5)}, errors.ArgumentError, r"`c`.*has 1 rows; `out`, shape \[2, 5\], has 2.*not broadcast"),
    ({"c": f32(2, 4)}, errors.ArgumentError, r"`c` has shape \[2, 4\]; dimension 1 must be 5"),
    ({"c": np.zeros((2, 5))}, errors.DTypeError, "`c` has dtype float64; it must be float32"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS, ids=[row[2] for row in ERRORS])
def test_errors_name_the_argument(changes, kind, message):
    """By matmul's names of them: `a` is x, `b` the weight."""
    out = np.full((2, 5), np.nan, np.float32)
    with pytest.raises(kind, match=message):
        tvm_infer.linear(**{"x": f32(2, 3), "weight": f32(5, 3), "out": out, **changes})
    assert np.isnan(out).all()


def test_errors_of_the_output():
    with pytest.raises(errors.ArgumentError, match=r"`out`.*has 3 rows; `a`"):
        tvm_infer.linear(f32(2, 3), f32(5, 3), out=f32(3, 5))
    with pytest.raises(errors.ArgumentError, match=r"shapes \[2, 3\], \[3\]"):
        tvm_infer.linear(f32(2, 3), f32(3))
    buffer = f32(2, 8)
    with pytest.raises(errors.ArgumentError, match=r"`c`.*overlaps `out`"):
        tvm_infer.linear(f32(2, 3), f32(5, 3), c=buffer[:, 1:6], out=buffer[:, :5])


def test_packed_functions_say_whether_few_rows_have_a_kernel_of_their_own():
    """The setting is the process's, and of no effect on the CPU."""
    exchange = _ffi.func("set_matmul_gemv")
    former = exchange(False)
    try:
        assert exchange(True) is False and exchange(former) is True
    finally:
        exchange(former)

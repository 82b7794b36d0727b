"""tvm_infer.scale_lse: an LSE in another base, in place."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_infer import _ffi, errors


def scale(lse, factor):
    _ffi.func("scale_lse")(lse, factor)


def test_base_2_and_back():
    rng = np.random.default_rng(0)
    lse = rng.standard_normal((7, 5)).astype(np.float32) * 9
    lse[2, 3] = -np.inf
    out = lse.copy()
    scale(out, 1 / np.log(2))
    np.testing.assert_allclose(out, lse.astype(np.float64) / np.log(2), rtol=6e-8)  # one rounding
    scale(out, np.log(2))
    np.testing.assert_allclose(out, lse, rtol=1.2e-7)
    assert out[2, 3] == -np.inf


def test_strides_and_offsets():
    whole = np.arange(60, dtype=np.float32).reshape(5, 12)
    expected = whole.copy()
    expected[1:4, 2:9:3] *= 2
    scale(whole[1:4, 2:9:3], 2.0)
    assert np.array_equal(whole, expected)
    scale(whole.T[2:5], 1.0)
    assert np.array_equal(whole, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty(shape):
    scale(np.zeros(shape, np.float32), 2.0)


def test_errors():
    with pytest.raises(errors.ArgumentError, match="`lse`"):
        scale(np.zeros(3, np.float32), 2.0)
    with pytest.raises(errors.DTypeError, match="`lse`"):
        scale(np.zeros((3, 2), np.float64), 2.0)
    for factor in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(errors.ArgumentError, match=r"`factor` is .*above 0"):
            scale(np.ones((3, 2), np.float32), factor)

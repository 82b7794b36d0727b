"""Operands and the reference of products on the CPU, for the tests of this folder."""

from __future__ import annotations

import numpy as np

# Both ways small products are cut: AVX-512 small-matrix kernels, and row after row where there are none.
CORES = ["SkylakeX", "Haswell"]


def reference(a, b, transpose_b):
    return a.astype(np.float64) @ (b.T if transpose_b else b).astype(np.float64)


def operands(rng, m, k, n, transpose_b, pad=0):
    """a, b, out with row strides `pad` longer than their rows; the padding and out hold NaN."""

    def matrix(rows, cols):
        whole = np.full((rows, cols + pad), np.nan, np.float32)
        return whole[:, :cols]

    a, b, out = matrix(m, k), matrix(n, k) if transpose_b else matrix(k, n), matrix(m, n)
    a[:] = rng.standard_normal(a.shape)
    b[:] = rng.standard_normal(b.shape)
    return a, b, out


def f32(*shape):
    return np.zeros(shape, np.float32)

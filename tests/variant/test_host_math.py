"""exp, exp2, tanh and the logistic function of generated code on processors, against float64, over all floats."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess

import numpy as np
import pytest
from generated import At, output

from tvm_infer import variant
from tvm_infer.jit import cxx
from tvm_infer.variant import cpu

LIMIT = 2e-6  # relative, where the result is a normal number
TINY = float(np.finfo(np.float32).tiny)
ONE_ROW = At(0, 0, 0, 0, 1, 1)
FUNCTIONS = {
    "exp": (variant.exp, np.exp),
    "exp2": (variant.exp2, np.exp2),
    "tanh": (variant.tanh, np.tanh),
    "sigmoid": (variant.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
}
# What generated code is compiled with, for processors that multiply and add in one step or in two, in vectors of each width.
FLAGS = {
    "sse2": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"),
}


def address_of(v: variant.Variant, isa: str) -> int:
    supported = cxx.processor().split()
    if not {flag[2:] for flag in FLAGS[isa] if "=" not in flag} <= set(supported):
        pytest.skip(f"this machine has no {isa}")
    described = cpu.describe(v)
    flags = [flag for flag in described.flags if flag != cxx.NATIVE]
    path = cxx.shared_library(dataclasses.replace(described, flags=(*flags, *FLAGS[isa])))
    return ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(path)), f"variant_{v.digest}_cpu"))


def every_kind_of_float() -> np.ndarray:
    """All signs and exponents, fractions at random; and where results are neither 0, nor 1, nor infinite, densely."""
    rng = np.random.default_rng(1)
    bits = (np.arange(512, dtype=np.uint32)[:, None] << 23) + rng.integers(0, 2**23, (512, 400), dtype=np.uint32)
    spread = bits.view(np.float32).ravel()
    dense = np.concatenate([np.linspace(-limit, limit, 200_001) for limit in (1e-3, 1, 12, 160)])
    return np.concatenate([spread[np.isfinite(spread)], dense]).astype(np.float32)


def computed(name: str, isa: str, x: np.ndarray) -> np.ndarray:
    v = variant.Variant(name, output=lambda value: FUNCTIONS[name][0](value))
    return output(address_of(v, isa), v.bind(), ONE_ROW, 0.0, x)


@pytest.mark.parametrize("isa", FLAGS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_over_all_floats(name, isa):
    x = every_kind_of_float()
    got = computed(name, isa, x)
    with np.errstate(over="ignore", under="ignore"):
        expected = FUNCTIONS[name][1](x.astype(np.float64))
        rounded = expected.astype(np.float32)
    assert not np.isnan(got).any()
    finite, normal = np.isfinite(rounded), np.abs(expected) >= TINY
    # Next to the largest float either side of infinity is right.
    edge = np.abs(expected / np.finfo(np.float32).max - 1) < LIMIT
    np.testing.assert_array_equal(np.isfinite(got)[~edge], finite[~edge])
    both = normal & finite & np.isfinite(got)
    assert both.sum() > 100_000
    error = np.abs(got[both] - expected[both]) / np.abs(expected[both])
    assert error.max() <= LIMIT, (x[both][error.argmax()], error.max())
    assert np.abs(got[~normal] - expected[~normal]).max(initial=0) <= 2 * TINY * LIMIT + (
        TINY if name == "sigmoid" else 2.0**-148
    )


@pytest.mark.parametrize("isa", FLAGS)
@pytest.mark.parametrize(
    ("name", "at_minus_infinity", "at_zero", "at_infinity"),
    [("exp", 0, 1, np.inf), ("exp2", 0, 1, np.inf), ("tanh", -1, 0, 1), ("sigmoid", 0, 0.5, 1)],
)
def test_limits(name, at_minus_infinity, at_zero, at_infinity, isa):
    """Also in the elements that a loop has left behind its vectors."""
    for length in (1, 3, 16, 37):
        for x, expected in ((-np.inf, at_minus_infinity), (0, at_zero), (np.inf, at_infinity), (np.nan, np.nan)):
            got = computed(name, isa, np.full(length, x))
            np.testing.assert_array_equal(got, np.full(length, expected, np.float32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_called(name, cache):
    """A call of libm's function, once an element, is what these are there to avoid."""
    v = variant.Variant(name, output=lambda value: FUNCTIONS[name][0](value))
    path = cxx.shared_library(cpu.describe(v))
    undefined = subprocess.run(["nm", "-D", "-u", str(path)], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in undefined.splitlines() if " U " in line] == []

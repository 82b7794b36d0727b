"""Whether logits stay within [-64, 64], told from the expression and its scalars; the struct that kernels are compiled with says so."""

from __future__ import annotations

import numpy as np
import pytest
from random_expressions import HOLES
from test_random_expressions import AT, COUNT, KEYS, Case

from tvm_infer import variant
from tvm_infer.variant.interval import SMALL, are_small


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        (lambda value, a: a * variant.tanh(value / a), True),
        (lambda value, a: a * variant.tanh(value / a) + 35.0, False),  # 30 + 35
        (lambda value, a: value * a, False),
        (lambda value, a: variant.sigmoid(value) * 128.0 - 64.0 + 0 * a, True),
        (lambda value, a: variant.minimum(variant.maximum(value, -a), a), True),
        (lambda value, a: variant.minimum(value, a), False),
        (lambda value, kv_pos, a: variant.tanh(value) + kv_pos * a, False),
        (lambda value, kv_pos, a: variant.where(kv_pos < 3, a, -variant.tanh(value)), True),
        (lambda value, a: variant.exp(variant.tanh(value) * 4.0) * a / 30.0, True),
        (lambda value, a: variant.exp(variant.tanh(value) * 4.2) * a / 30.0, False),
        (lambda value, a: variant.tanh(value) / (a - 30.0), False),
        (lambda value, a: variant.log(variant.sigmoid(value)) * a, False),
    ],
)
def test_by_hand(logits, expected):
    v = variant.Variant("v", logits=logits, a=variant.scalar())
    assert v.bind(a=30.0).has_small_logits is expected


def test_tables_may_hold_anything():
    v = variant.Variant("v", logits=lambda value, t: variant.tanh(value) * t, t=variant.per_head())
    assert not v.bind(t=np.ones(2, np.float32)).has_small_logits


def test_kernels_are_told_and_the_cpu_is_not():
    small, large = variant.soft_cap.bind(cap=50.0), variant.soft_cap.bind(cap=65.0)
    assert small.has_small_logits and not large.has_small_logits
    assert "kHasSmallLogits = true" in small.cuda_struct.source and small.cuda_struct.digest != variant.soft_cap.digest
    assert large.cuda_struct.digest == variant.soft_cap.digest == small.variant.digest
    assert variant.soft_cap.bind(cap=-50.0).has_small_logits
    combined = (variant.soft_cap & variant.sliding_window).bind(cap=50.0, window=7)
    assert combined.cuda_struct == small.cuda_struct
    assert not variant.sliding_window.bind(window=7).has_small_logits


def test_never_said_of_a_logit_that_is_large():
    rng = np.random.default_rng(1)
    said = 0
    for case in (Case(seed) for seed in range(2 * COUNT) if HOLES[seed % len(HOLES)] == "logits"):
        scalars = {name: x for name, x in case.values.items() if case.variant.parameters[name].is_scalar}
        if not are_small(case.code, scalars):
            continue
        said += 1
        for at in AT:
            values = {
                **at._asdict(),
                **case.values,
                "kv_pos": np.arange(KEYS),
                "value": rng.standard_normal(KEYS) * 1e3,
            }
            assert (np.abs(variant.evaluate(case.code, values)) <= SMALL).all(), str(case.variant)
    assert said > 5

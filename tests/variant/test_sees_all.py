"""The test of a run of keys never says yes where a key of it is hidden, and says yes where it can be told."""

from __future__ import annotations

import numpy as np
import pytest
from random_expressions import HOLES
from test_random_expressions import AT, COUNT, KEYS, Case

from tvm_infer import variant
from tvm_infer.variant import evaluate
from tvm_infer.variant.sees_all import sees_all

RUNS = [(first, last) for first in range(KEYS) for last in range(first, KEYS)]
FIRST, LAST = (np.array(x) for x in zip(*RUNS, strict=True))
W = {"w": variant.scalar("int32")}
where, minimum, maximum = variant.where, variant.minimum, variant.maximum


def verdicts(code, test, values) -> tuple[np.ndarray, np.ndarray]:
    """(what the test says, whether all keys are seen) of every run."""
    seen = np.broadcast_to(evaluate(code, {**values, "kv_pos": np.arange(KEYS)}), (KEYS,))
    truth = np.array([seen[first : last + 1].all() for first, last in RUNS])
    said = np.broadcast_to(evaluate(test, {**values, "@first": FIRST, "@last": LAST}), truth.shape)
    return said, truth


# masks for which the test is exact
EXACT = [
    (lambda q_pos, kv_pos: kv_pos <= q_pos, {}),
    (lambda q_pos, kv_pos: q_pos - kv_pos < 5, {}),
    (lambda q_pos, kv_pos, w: q_pos // w == kv_pos // w, W),
    (lambda q_pos, kv_pos: ~(kv_pos > q_pos) & (kv_pos >= 1), {}),
    (lambda q_pos, kv_pos: (kv_pos >> 2) <= (q_pos >> 2), {}),
    (lambda q_pos, kv_pos: maximum(kv_pos, 4) <= minimum(q_pos, 9), {}),
    (lambda kv_pos, kv_len, q_len: kv_pos < kv_len - q_len, {}),
    (lambda kv_pos, q_pos: variant.to_float(kv_pos) + 0.5 < variant.to_float(q_pos), {}),
    (lambda kv_pos: kv_pos != 6, {}),
    (lambda kv_pos: variant.to_float(kv_pos < 5) <= 0.5, {}),
    (lambda kv_pos: variant.to_int(kv_pos >= 4) == 1, {}),
    (lambda kv_pos, batch: (batch == 1) | (kv_pos < 2), {}),
]


@pytest.mark.parametrize(("mask", "parameters"), EXACT)
def test_exact(mask, parameters):
    code = variant.Variant("m", mask=mask, **parameters).mask
    test = sees_all(code)
    some = [False, False]
    for at in AT:
        said, truth = verdicts(code, test, {**at._asdict(), "w": 4})
        np.testing.assert_array_equal(said, truth)
        some = [some[0] or truth.any(), some[1] or not truth.all()]
    assert all(some)  # both answers were asked for


@pytest.mark.parametrize(
    "mask",
    [
        lambda kv_pos: kv_pos % 3 != 0,
        lambda q_pos, kv_pos: kv_pos * kv_pos <= q_pos,
        lambda q_pos, kv_pos: where(kv_pos > 2, kv_pos, 0) <= q_pos,
        lambda kv_pos: (kv_pos & 4) == 0,
    ],
)
def test_what_is_not_told(mask):
    assert sees_all(variant.Variant("m", mask=mask).mask) is None


def test_one_side_that_is_told_is_enough():
    """Of an `or` one known side, of an `and` both."""
    either = variant.Variant("m", mask=lambda q_pos, kv_pos: (kv_pos % 3 != 0) | (kv_pos <= q_pos)).mask
    said, truth = verdicts(either, sees_all(either), AT[0]._asdict())
    assert said.any() and not (said & ~truth).any()
    both = variant.Variant("m", mask=lambda q_pos, kv_pos: (kv_pos % 3 != 0) & (kv_pos <= q_pos)).mask
    assert sees_all(both) is None
    # a negated `and` is an `or` of negations
    negated = variant.Variant("m", mask=lambda q_pos, kv_pos: ~((kv_pos % 3 != 0) & (kv_pos > q_pos))).mask
    said, truth = verdicts(negated, sees_all(negated), AT[0]._asdict())
    assert said.any() and not (said & ~truth).any()


def test_never_yes_where_a_key_is_hidden():
    told = 0
    for case in (Case(seed) for seed in range(2 * COUNT) if HOLES[seed % len(HOLES)] == "mask"):
        test = sees_all(case.code)
        if test is None:
            continue
        for at in AT:
            values = {**at._asdict(), **case.values}
            if "marks" in case.values or "weights" in case.values:
                values |= {name: np.asarray(case.values[name]) for name in case.values}
            said, truth = verdicts(case.code, test, values)
            assert not (said & ~truth).any(), str(case.variant)
            told += int(said.any() and not truth.all())
    assert told > 0


@pytest.mark.parametrize("name", ["sink_window", "chunked_local", "tree_mask"])
def test_standard_masks_are_told(name):
    """Kernels skip the mask of most tiles: the test is there, and reads no table."""
    v = variant.STANDARD[name]
    test = sees_all(v.residual_mask)
    assert test is not None and not any(node.op == "load" for node in test.nodes)
    assert "static bool SeesAll" in v.source()

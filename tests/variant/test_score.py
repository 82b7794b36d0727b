"""Logits as kernels compute them, from q . k and sm_scale: the same value, with uniform factors multiplied once."""

from __future__ import annotations

import numpy as np
from random_expressions import HOLES
from test_random_expressions import AT, COUNT, KEYS, Case

from tvm_infer import variant
from tvm_infer.variant import evaluate, text
from tvm_infer.variant.score import of_score, reads_by_key_of

SCALE = 0.125


def shown(v: variant.Variant) -> str:
    return text.expression(of_score(v.logits, v.parameters)).replace("@", "")


def test_uniform_factors_come_together():
    assert shown(variant.soft_cap) == "tanh(score * (scale / cap)) * cap"
    thrice = variant.Variant("t", logits=lambda value, a: 2.0 * (value * a) / 3.0, a=variant.scalar())
    assert shown(thrice) == "score * (scale * a * 2.0 / 3.0)"
    # what differs from row to row stays where it is
    by_head = variant.Variant("h", logits=lambda value, a: (value * a) * 2.0, a=variant.per_head())
    assert shown(by_head) == "score * scale * a[qo_head] * 2.0"
    assert shown(variant.Variant("s", logits=lambda value: value * value)) == "score * scale * (score * scale)"


def test_the_value_is_the_same():
    rng = np.random.default_rng(0)
    checked = 0
    for case in (Case(seed) for seed in range(COUNT) if HOLES[seed % len(HOLES)] == "logits"):
        code = of_score(case.code, case.variant.parameters)
        for at in AT:
            score = rng.standard_normal(KEYS) * 8
            values = {**at._asdict(), **case.values, "kv_pos": np.arange(KEYS), "@scale": SCALE, "@score": score}
            expected = np.broadcast_to(evaluate(case.code, {**values, "value": score * SCALE}), (KEYS,))
            got = np.broadcast_to(evaluate(code, values), (KEYS,))
            usual = np.isfinite(expected) & (abs(expected) < 1e30)
            np.testing.assert_allclose(got[usual], expected[usual], rtol=1e-6, atol=1e-6, err_msg=str(case.variant))
            checked += usual.sum()
    assert checked > 1000


def test_which_tables_are_read_by_key():
    table = {"t": variant.tensor(1, "int32")}
    cases = [
        (lambda value, kv_pos, t: value + t[kv_pos], True),
        (lambda value, kv_pos, q_pos, t: value + t[(q_pos - kv_pos) // 2], True),
        (lambda value, kv_pos, q_pos, t: value + t[q_pos] * kv_pos, False),
        (lambda value, kv_pos, t: value + t[t[kv_pos]], True),
    ]
    for logits, expected in cases:
        v = variant.Variant("v", logits=logits, **table)
        assert reads_by_key_of(v.logits) is expected
        assert f"kReadsByKey = {str(expected).lower()}" in v.source()
    assert "kReadsByKey = true" in variant.custom_mask.source()
    assert "kReadsByKey = false" in variant.alibi.source()


def test_parameters_called_as_the_generated_functions_arguments_are():
    """Their values are read, not those of the arguments: the code is that of the same variant with other names."""
    for name in ("score", "scale", "first", "last", "p", "row", "t0"):
        for parameter in (variant.scalar(), variant.per_head(), variant.per_request()):
            scope = {"variant": variant}
            made = [
                variant.Variant(
                    "v",
                    logits=eval(f"lambda value, {n}: value * {n} + {n}", scope),
                    mask=eval(f"lambda kv_pos, {n}: kv_pos >= {n}", scope),
                    output=eval(f"lambda value, {n}: value - {n}", scope),
                    **{n: parameter},
                )
                for n in (name, "other")
            ]
            assert made[0].source() == made[1].source() and made[0].digest == made[1].digest

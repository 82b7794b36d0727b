"""Which masks the planner is told of, in whatever way they are written; and that band and rest together are the mask."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_infer import variant
from tvm_infer.errors import VariantError
from tvm_infer.variant import evaluate, text

W = {"w": variant.scalar("int32")}
where, minimum, maximum = variant.where, variant.minimum, variant.maximum

# mask, parameters, band with w = 5, what is left
CASES = [
    (lambda q_pos, kv_pos: kv_pos <= q_pos, {}, (True, -1), None),
    (lambda q_pos, kv_pos: q_pos >= kv_pos, {}, (True, -1), None),
    (lambda q_pos, kv_pos: kv_pos - q_pos <= 0, {}, (True, -1), None),
    (lambda q_pos, kv_pos: 0 <= q_pos - kv_pos, {}, (True, -1), None),  # noqa: SIM300
    (lambda q_pos, kv_pos: kv_pos < q_pos + 1, {}, (True, -1), None),
    (lambda q_pos, kv_pos: q_pos - kv_pos > -1, {}, (True, -1), None),
    (lambda q_pos, kv_pos: ~(kv_pos > q_pos), {}, (True, -1), None),
    (lambda q_pos, kv_pos: ~(q_pos < kv_pos), {}, (True, -1), None),
    (lambda q_pos, kv_pos: 2 * kv_pos <= 2 * q_pos, {}, (True, -1), None),
    (lambda q_pos, kv_pos: 2 * kv_pos <= 2 * q_pos + 1, {}, (True, -1), None),
    (lambda q_pos, kv_pos, q_len, kv_len: kv_pos - (kv_len - q_len) <= q_pos - (kv_len - q_len), {}, (True, -1), None),
    (lambda q_pos, kv_pos: (kv_pos <= q_pos) & (kv_pos <= q_pos), {}, (True, -1), None),
    (lambda q_pos, kv_pos: maximum(kv_pos, 0) <= q_pos, {}, (True, -1), "0 <= q_pos"),
    (lambda q_pos, kv_pos: kv_pos < q_pos, {}, (True, -1), "kv_pos < q_pos"),
    (lambda q_pos, kv_pos: q_pos - kv_pos <= 3, {}, (False, 3), None),
    (lambda q_pos, kv_pos: q_pos - kv_pos < 4, {}, (False, 3), None),
    (lambda q_pos, kv_pos: 3 * (q_pos - kv_pos) < 10, {}, (False, 3), None),
    (lambda q_pos, kv_pos: q_pos <= kv_pos, {}, (False, 0), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w, W, (False, 5), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos < w, W, (False, 4), None),
    (lambda q_pos, kv_pos, w: kv_pos >= q_pos - w, W, (False, 5), None),
    (lambda q_pos, kv_pos, w: kv_pos > q_pos - w, W, (False, 4), None),
    (lambda q_pos, kv_pos, w: kv_pos + w >= q_pos, W, (False, 5), None),
    (lambda q_pos, kv_pos, w: ~(q_pos > kv_pos + w), W, (False, 5), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= 2 * w + 1, W, (False, 11), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= minimum(w, 4), W, (False, 4), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w // 2, W, (False, 2), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= where(w > 3, 7, w), W, (False, 7), None),
    (lambda q_pos, kv_pos, w: ~((kv_pos > q_pos) | (q_pos - kv_pos > w)), W, (True, 5), None),
    (lambda q_pos, kv_pos, w: (kv_pos <= q_pos) & (q_pos - kv_pos <= w) & (q_pos - kv_pos <= 3), W, (True, 3), None),
    (lambda q_pos, kv_pos, w: abs(q_pos - kv_pos) <= w, W, (False, 5), "-(q_pos - kv_pos) <= w"),
    (lambda q_pos, kv_pos, w: w >= abs(q_pos - kv_pos), W, (False, 5), "-(q_pos - kv_pos) <= w"),
    (lambda q_pos, kv_pos, w: (kv_pos <= q_pos) & ((kv_pos < 4) | (q_pos - kv_pos <= w)), W, (True, -1),
     "(kv_pos < 4) | (q_pos - kv_pos <= w)"),
    (lambda q_pos, kv_pos: (kv_pos <= q_pos) & True, {}, (True, -1), None),
    (lambda: True, {}, (False, -1), None),
    # no bands
    (lambda q_pos, kv_pos: kv_pos >= q_pos + 1, {}, (False, -1), "kv_pos >= q_pos + 1"),
    (lambda q_pos, kv_pos: kv_pos <= q_pos + 1, {}, (False, -1), "kv_pos <= q_pos + 1"),
    (lambda q_pos, kv_pos, w: kv_pos - q_pos <= w, W, (False, -1), "kv_pos - q_pos <= w"),
    (lambda q_pos, kv_pos: kv_pos <= 2 * q_pos, {}, (False, -1), "kv_pos <= 2 * q_pos"),
    (lambda q_pos, kv_pos, kv_len: q_pos - kv_pos <= kv_len // 2, {}, (False, -1), "q_pos - kv_pos <= kv_len // 2"),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w, {"w": variant.per_request("int32")}, (False, -1),
     "q_pos - kv_pos <= w[batch]"),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w, {"w": variant.scalar()}, (False, -1), "q_pos - kv_pos <= w"),
    (lambda q_pos, kv_pos: q_pos * q_pos - kv_pos <= 3, {}, (False, -1), "q_pos * q_pos - kv_pos <= 3"),
    (lambda q_pos, kv_pos: (kv_pos <= q_pos) | (kv_pos < 3), {}, (False, -1), "(kv_pos <= q_pos) | (kv_pos < 3)"),
    (lambda q_pos, kv_pos: ~((kv_pos <= q_pos) & (kv_pos < 3)), {}, (False, -1), "~((kv_pos <= q_pos) & (kv_pos < 3))"),
    (lambda kv_pos: kv_pos < 3, {}, (False, -1), "kv_pos < 3"),
    (lambda: False, {}, (False, -1), "False"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CASES)))
def test_bands(index):
    mask, parameters, band, rest = CASES[index]
    v = variant.Variant("v", mask=mask, **parameters)
    value = {"w": np.full(1, 5, np.int32) if "per" in str(parameters) else 5} if parameters else {}
    assert v.bind(**value).band == band
    assert (v.residual_mask and text.expression(v.residual_mask)) == rest
    assert ("kHasMask = true" in v.source()) == (rest is not None)
    assert isinstance(v.bind(**value).band, variant.Band)

    # what is left and the band are together the mask
    q_pos, kv_pos = np.arange(24)[:, None], np.arange(24)[None]
    values = {"q_pos": q_pos, "kv_pos": kv_pos, "q_len": 3, "kv_len": 24, "batch": 0, **value}
    seen = np.broadcast_to(evaluate(v.mask, values), (24, 24))
    inside = np.ones((24, 24), bool)
    inside &= (kv_pos <= q_pos) | (not band[0])
    inside &= (q_pos - kv_pos <= band[1]) | (band[1] < 0)
    if v.residual_mask is not None:
        inside &= evaluate(v.residual_mask, values)
    np.testing.assert_array_equal(seen, inside)


def test_several_windows_the_smallest_counts():
    v = variant.Variant(
        "v",
        mask=lambda q_pos, kv_pos, a, b: (q_pos - kv_pos <= a) & (q_pos - kv_pos <= b),
        a=variant.scalar("int32"),
        b=variant.scalar("int32"),
    )
    assert v.bind(a=3, b=7).band == v.bind(a=7, b=3).band == (False, 3)


def test_a_negative_window_is_refused_when_it_is_known():
    with pytest.raises(VariantError, match=r"sliding_window: with window=-2 .* at least 2 after .* must be 0"):
        variant.sliding_window.bind(window=-2)
    with pytest.raises(VariantError, match="`chunk` is 0"):
        variant.chunked_local.bind(chunk=0)

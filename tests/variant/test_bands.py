"""Which masks the planner is told of, in whatever way they are written; and that band and rest together are the mask."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_infer import variant
from tvm_infer.errors import VariantError
from tvm_infer.variant import Band, evaluate, text

W = {"w": variant.scalar("int32")}
ALL, CAUSAL = Band(), Band(window_right=0)
where, minimum, maximum = variant.where, variant.minimum, variant.maximum

# mask, parameters, band with w = 5, what is left (for sinks and chunks their condition)
CASES = [
    (lambda q_pos, kv_pos: kv_pos <= q_pos, {}, CAUSAL, None),
    (lambda q_pos, kv_pos: q_pos >= kv_pos, {}, CAUSAL, None),
    (lambda q_pos, kv_pos: kv_pos - q_pos <= 0, {}, CAUSAL, None),
    (lambda q_pos, kv_pos: 0 <= q_pos - kv_pos, {}, CAUSAL, None),  # noqa: SIM300
    (lambda q_pos, kv_pos: kv_pos < q_pos + 1, {}, CAUSAL, None),
    (lambda q_pos, kv_pos: q_pos - kv_pos > -1, {}, CAUSAL, None),
    (lambda q_pos, kv_pos: ~(kv_pos > q_pos), {}, CAUSAL, None),
    (lambda q_pos, kv_pos: ~(q_pos < kv_pos), {}, CAUSAL, None),
    (lambda q_pos, kv_pos: 2 * kv_pos <= 2 * q_pos, {}, CAUSAL, None),
    (lambda q_pos, kv_pos: 2 * kv_pos <= 2 * q_pos + 1, {}, CAUSAL, None),
    (lambda q_pos, kv_pos, q_len, kv_len: kv_pos - (kv_len - q_len) <= q_pos - (kv_len - q_len), {}, CAUSAL, None),
    (lambda q_pos, kv_pos: (kv_pos <= q_pos) & (kv_pos <= q_pos), {}, CAUSAL, None),
    (lambda q_pos, kv_pos: maximum(kv_pos, 0) <= q_pos, {}, CAUSAL, "0 <= q_pos"),
    (lambda q_pos, kv_pos: kv_pos < q_pos, {}, CAUSAL, "kv_pos < q_pos"),
    (lambda q_pos, kv_pos: q_pos - kv_pos <= 3, {}, Band(3), None),
    (lambda q_pos, kv_pos: q_pos - kv_pos < 4, {}, Band(3), None),
    (lambda q_pos, kv_pos: 3 * (q_pos - kv_pos) < 10, {}, Band(3), None),
    (lambda q_pos, kv_pos: q_pos <= kv_pos, {}, Band(0), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w, W, Band(5), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos < w, W, Band(4), None),
    (lambda q_pos, kv_pos, w: kv_pos >= q_pos - w, W, Band(5), None),
    (lambda q_pos, kv_pos, w: kv_pos > q_pos - w, W, Band(4), None),
    (lambda q_pos, kv_pos, w: kv_pos + w >= q_pos, W, Band(5), None),
    (lambda q_pos, kv_pos, w: ~(q_pos > kv_pos + w), W, Band(5), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= 2 * w + 1, W, Band(11), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= minimum(w, 4), W, Band(4), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w // 2, W, Band(2), None),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= where(w > 3, 7, w), W, Band(7), None),
    (lambda q_pos, kv_pos, w: ~((kv_pos > q_pos) | (q_pos - kv_pos > w)), W, Band(5, 0), None),
    (lambda q_pos, kv_pos, w: (kv_pos <= q_pos) & (q_pos - kv_pos <= w) & (q_pos - kv_pos <= 3), W, Band(3, 0), None),
    (lambda q_pos, kv_pos, w: abs(q_pos - kv_pos) <= w, W, Band(5, 5), None),
    (lambda q_pos, kv_pos, w: w >= abs(q_pos - kv_pos), W, Band(5, 5), None),
    (lambda q_pos, kv_pos, w: (kv_pos <= q_pos) & ((kv_pos < 4) | (q_pos - kv_pos <= w)), W, Band(5, 0, 4),
     "(kv_pos < 4) | (q_pos - kv_pos <= w)"),
    (lambda q_pos, kv_pos: (kv_pos <= q_pos) & True, {}, CAUSAL, None),
    (lambda: True, {}, ALL, None),
    # on the right
    (lambda q_pos, kv_pos: kv_pos <= q_pos + 1, {}, Band(-1, 1), None),
    (lambda q_pos, kv_pos: 3 * (kv_pos - q_pos) < 10, {}, Band(-1, 3), None),
    (lambda q_pos, kv_pos, w: kv_pos - q_pos <= w, W, Band(-1, 5), None),
    (lambda q_pos, kv_pos, w: q_pos > kv_pos - w, W, Band(-1, 4), None),
    (lambda q_pos, kv_pos, w: ~(kv_pos > q_pos + w) & (q_pos - w < kv_pos), W, Band(4, 5), None),
    (lambda q_pos, kv_pos, w: maximum(kv_pos - q_pos - w, q_pos - kv_pos - 2) <= 0, W, Band(2, 5), None),
    (lambda q_pos, kv_pos, w: (kv_pos - q_pos <= w) & (kv_pos - q_pos <= 3), W, Band(-1, 3), None),
    (lambda q_pos, kv_pos, w: (kv_pos - q_pos <= w) & (kv_pos <= q_pos), W, CAUSAL, "kv_pos - q_pos <= w"),
    (lambda q_pos, kv_pos: (kv_pos - q_pos <= 3) & (kv_pos <= q_pos), {}, CAUSAL, None),
    (lambda q_pos, kv_pos, w: (kv_pos - q_pos <= 0 - w) & (kv_pos <= q_pos), W, CAUSAL, "kv_pos - q_pos <= -w"),
    (lambda q_pos, kv_pos, w: ~(q_pos - kv_pos <= w), W, CAUSAL, "q_pos - kv_pos > w"),
    (lambda q_pos, kv_pos, w: kv_pos + 2 * w <= q_pos, W, CAUSAL, "kv_pos + 2 * w <= q_pos"),
    (lambda q_pos, kv_pos, w: ~(kv_pos - q_pos <= w), W, ALL, "~(kv_pos - q_pos <= w)"),
    # chunks
    (lambda q_pos, kv_pos, w: q_pos // w == kv_pos // w, W, Band(chunk=5), "q_pos // w == kv_pos // w"),
    (lambda q_pos, kv_pos, w: (kv_pos // w == q_pos // w) & (kv_pos <= q_pos), W, Band(-1, 0, 0, 5), "kv_pos // w == q_pos // w"),
    (lambda q_pos, kv_pos: ~(q_pos // 7 != kv_pos // 7), {}, Band(chunk=7), "q_pos // 7 == kv_pos // 7"),
    (lambda q_pos, kv_pos: q_pos // 7 - kv_pos // 7 == 0, {}, Band(chunk=7), "q_pos // 7 - kv_pos // 7 == 0"),
    (lambda q_pos, kv_pos: q_pos >> 2 == kv_pos >> 2, {}, Band(chunk=4), "q_pos >> 2 == kv_pos >> 2"),
    (lambda q_pos, kv_pos, w: q_pos - q_pos % w == kv_pos - kv_pos % w, W, Band(chunk=5),
     "q_pos - q_pos % w == kv_pos - kv_pos % w"),
    (lambda q_pos, kv_pos, w: q_pos // (2 * w) == kv_pos // (2 * w), W, Band(chunk=10),
     "q_pos // (2 * w) == kv_pos // (2 * w)"),
    (lambda q_pos, kv_pos, w: q_pos // (w - 9) == kv_pos // (w - 9), W, Band(chunk=1), "q_pos // (w - 9) == kv_pos // (w - 9)"),
    (lambda q_pos, kv_pos, w: (kv_pos >= q_pos // w * w) & (kv_pos <= q_pos), W, Band(-1, 0, 0, 5), "kv_pos >= q_pos // w * w"),
    (lambda q_pos, kv_pos, w: (q_pos - kv_pos <= q_pos % w) & (kv_pos <= q_pos), W, Band(-1, 0, 0, 5),
     "q_pos - kv_pos <= q_pos % w"),
    (lambda q_pos, kv_pos, w: ~(kv_pos < w * (q_pos // w)) & (kv_pos <= q_pos), W, Band(-1, 0, 0, 5),
     "kv_pos >= w * (q_pos // w)"),
    (lambda q_pos, kv_pos, w: (q_pos // w <= kv_pos // w) & (kv_pos // w <= q_pos // w), W, Band(chunk=5),
     "(q_pos // w <= kv_pos // w) & (kv_pos // w <= q_pos // w)"),
    (lambda q_pos, kv_pos, w: (kv_pos >= q_pos // w * w) & (kv_pos < (q_pos // w + 1) * w), W, Band(chunk=5),
     "(kv_pos >= q_pos // w * w) & (kv_pos < (q_pos // w + 1) * w)"),
    (lambda q_pos, kv_pos, w: (kv_pos <= q_pos) & (kv_pos >= maximum(q_pos - 3, q_pos // w * w)), W, Band(3, 0, 0, 5),
     "q_pos // w * w <= kv_pos"),
    (lambda q_pos, kv_pos, w: (q_pos // w == kv_pos // w) & (q_pos // 3 == kv_pos // 3), W, Band(chunk=3),
     "(q_pos // w == kv_pos // w) & (q_pos // 3 == kv_pos // 3)"),
    # a size below 1 divides as 1, and multiplies as itself
    (lambda q_pos, kv_pos, w: (kv_pos >= q_pos // (w - 9) * (w - 9)) & (kv_pos <= q_pos), W, CAUSAL,
     "kv_pos >= q_pos // (w - 9) * (w - 9)"),
    (lambda q_pos, kv_pos, w: (q_pos - kv_pos <= q_pos % (w - 9)) & (kv_pos <= q_pos), W, CAUSAL,
     "q_pos - kv_pos <= q_pos % (w - 9)"),
    # sinks
    (lambda q_pos, kv_pos, w: (kv_pos < w) | (q_pos - kv_pos <= 3), W, Band(3, -1, 5), "(kv_pos < w) | (q_pos - kv_pos <= 3)"),
    (lambda q_pos, kv_pos, w: ~((kv_pos >= 2) & (q_pos - kv_pos > w)), W, Band(5, -1, 2), "~((kv_pos >= 2) & (q_pos - kv_pos > w))"),
    (lambda q_pos, kv_pos, w: (q_pos <= kv_pos + 3) | (w - 2 >= kv_pos), W, Band(3, -1, 4),
     "(q_pos <= kv_pos + 3) | (w - 2 >= kv_pos)"),
    (lambda q_pos, kv_pos, w: (kv_pos == 0) | (q_pos - kv_pos <= w), W, Band(5, -1, 1), "(kv_pos == 0) | (q_pos - kv_pos <= w)"),
    (lambda q_pos, kv_pos, w: minimum(kv_pos - 1, q_pos - kv_pos - w) <= 0, W, Band(5, -1, 2),
     "minimum(kv_pos - 1, q_pos - kv_pos - w) <= 0"),
    (lambda q_pos, kv_pos, w: (kv_pos < 2) | (kv_pos < w) | (q_pos - kv_pos <= 3), W, Band(3, -1, 5),
     "(kv_pos < 2) | (kv_pos < w) | (q_pos - kv_pos <= 3)"),
    (lambda q_pos, kv_pos, w: (2 * kv_pos < w) | (q_pos - kv_pos <= 3), W, Band(3, -1, 3), "(2 * kv_pos < w) | (q_pos - kv_pos <= 3)"),
    (lambda q_pos, kv_pos, w: (kv_pos < -w) | (q_pos - kv_pos <= 3), W, Band(3), "(kv_pos < -w) | (q_pos - kv_pos <= 3)"),
    (lambda q_pos, kv_pos, w: (kv_pos < w) | (q_pos - kv_pos <= -w), W, Band(0, -1, 5), "(kv_pos < w) | (q_pos - kv_pos <= -w)"),
    (lambda q_pos, kv_pos, w: ((kv_pos < 2) & (kv_pos <= q_pos)) | ((q_pos - kv_pos <= w) & (kv_pos <= q_pos)), W, Band(5, 0, 2),
     "(kv_pos < 2) & (kv_pos <= q_pos) | (q_pos - kv_pos <= w) & (kv_pos <= q_pos)"),
    (lambda q_pos, kv_pos, w: (kv_pos < 2) | (q_pos // w == kv_pos // w), W, Band(-1, -1, 2, 5),
     "(kv_pos < 2) | (q_pos // w == kv_pos // w)"),
    (lambda q_pos, kv_pos, w: ((kv_pos < 2) | ((q_pos // w == kv_pos // w) & (q_pos - kv_pos < 4))) & (kv_pos <= q_pos), W,
     Band(3, 0, 2, 5), "(kv_pos < 2) | (q_pos // w == kv_pos // w) & (q_pos - kv_pos < 4)"),
    # sinks that a window beside them hides are none
    (lambda q_pos, kv_pos, w: ((kv_pos < 2) | (q_pos - kv_pos <= w)) & (q_pos - kv_pos <= 9), W, Band(9),
     "(kv_pos < 2) | (q_pos - kv_pos <= w)"),
    (lambda q_pos, kv_pos, w: ((kv_pos < 2) | (q_pos - kv_pos <= 3)) & (q_pos // w == kv_pos // w), W, Band(chunk=5),
     "((kv_pos < 2) | (q_pos - kv_pos <= 3)) & (q_pos // w == kv_pos // w)"),
    # no bands
    (lambda q_pos, kv_pos, w: kv_pos >= q_pos // w * w, W, ALL, "kv_pos >= q_pos // w * w"),
    (lambda q_pos, kv_pos, w: q_pos // w <= kv_pos // w + 1, W, ALL, "q_pos // w <= kv_pos // w + 1"),
    (lambda q_pos, kv_pos, w: q_pos // w == kv_pos // 3, W, ALL, "q_pos // w == kv_pos // 3"),
    (lambda q_pos, kv_pos, w: q_pos // w != kv_pos // w, W, ALL, "q_pos // w != kv_pos // w"),
    (lambda q_pos, kv_pos, w: q_pos % w == kv_pos % w, W, ALL, "q_pos % w == kv_pos % w"),
    (lambda q_pos, kv_pos, w: (q_pos + 1) // w == (kv_pos + 1) // w, W, ALL, "(q_pos + 1) // w == (kv_pos + 1) // w"),
    (lambda q_pos, kv_pos, kv_len: q_pos // kv_len == kv_pos // kv_len, {}, ALL, "q_pos // kv_len == kv_pos // kv_len"),
    (lambda q_pos, kv_pos, w: (kv_pos > w) | (q_pos - kv_pos <= w), W, ALL, "(kv_pos > w) | (q_pos - kv_pos <= w)"),
    (lambda q_pos, kv_pos, w: (kv_pos < w) | (q_pos > 20) | (q_pos - kv_pos <= w), W, ALL,
     "(kv_pos < w) | (q_pos > 20) | (q_pos - kv_pos <= w)"),
    (lambda q_pos, kv_pos, kv_len: (kv_pos < kv_len - 9) | (q_pos - kv_pos <= 3), {}, ALL,
     "(kv_pos < kv_len - 9) | (q_pos - kv_pos <= 3)"),
    (lambda q_pos, kv_pos: kv_pos >= q_pos + 1, {}, ALL, "kv_pos >= q_pos + 1"),
    (lambda q_pos, kv_pos: kv_pos <= 2 * q_pos, {}, ALL, "kv_pos <= 2 * q_pos"),
    (lambda q_pos, kv_pos, kv_len: q_pos - kv_pos <= kv_len // 2, {}, ALL, "q_pos - kv_pos <= kv_len // 2"),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w, {"w": variant.per_request("int32")}, ALL,
     "q_pos - kv_pos <= w[batch]"),
    (lambda q_pos, kv_pos, w: q_pos - kv_pos <= w, {"w": variant.scalar()}, ALL, "q_pos - kv_pos <= w"),
    (lambda q_pos, kv_pos: q_pos * q_pos - kv_pos <= 3, {}, ALL, "q_pos * q_pos - kv_pos <= 3"),
    (lambda q_pos, kv_pos: (kv_pos <= q_pos) | (kv_pos < 3), {}, ALL, "(kv_pos <= q_pos) | (kv_pos < 3)"),
    (lambda q_pos, kv_pos: ~((kv_pos <= q_pos) & (kv_pos < 3)), {}, ALL, "~((kv_pos <= q_pos) & (kv_pos < 3))"),
    (lambda kv_pos: kv_pos < 3, {}, ALL, "kv_pos < 3"),
    (lambda: False, {}, ALL, "False"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(CASES)))
def test_bands(index):
    mask, parameters, band, rest = CASES[index]
    v = variant.Variant("v", mask=mask, **parameters)
    value = {"w": np.full(1, 5, np.int32) if "per" in str(parameters) else 5} if parameters else {}
    assert v.bind(**value).band == band
    assert (v.residual_mask and text.expression(v.residual_mask)) == rest
    assert ("kHasMask = true" in v.source()) == (rest is not None)

    assert_split(v, value)


def assert_split(v, parameters):
    """What is left and what executors test of the band are together the mask; the whole band hides no key that the mask shows."""
    band = v.bind(**parameters).band
    q_pos, kv_pos = np.arange(24)[:, None], np.arange(24)[None]
    values = {"q_pos": q_pos, "kv_pos": kv_pos, "q_len": 3, "kv_len": 24, "batch": 0, **parameters}
    seen = np.broadcast_to(evaluate(v.mask, values), (24, 24))
    assert not (seen & ~inside(band, q_pos, kv_pos)).any()
    tested = inside(Band(-1 if band.num_sink else band.window_left, band.window_right), q_pos, kv_pos)
    if v.residual_mask is not None:
        tested &= evaluate(v.residual_mask, values)
    np.testing.assert_array_equal(seen, tested)


def inside(band, q_pos, kv_pos):
    """plan.h, MaskBand."""
    seen = np.ones((24, 24), bool)
    if band.window_left >= 0:
        seen &= q_pos - kv_pos <= band.window_left
    if band.chunk > 0:
        seen &= q_pos // band.chunk == kv_pos // band.chunk
    seen |= kv_pos < band.num_sink
    return seen & (kv_pos - q_pos <= band.window_right) if band.window_right >= 0 else seen


def test_a_lag_of_either_sign():
    """What is negative for any scalar from 1 on is not so for all: nothing is taken from it before the scalar is known."""
    v = variant.Variant("v", mask=lambda q_pos, kv_pos, lag: kv_pos <= q_pos - lag, lag=variant.scalar("int32"))
    assert [v.bind(lag=lag).band for lag in (3, 0, -4)] == [CAUSAL, CAUSAL, Band(-1, 4)]
    assert text.expression(v.residual_mask) == "kv_pos <= q_pos - lag"
    for lag in (3, 0, -4):
        assert_split(v, {"lag": lag})


def test_widths_beyond_32_bits_are_all_keys():
    bound = variant.two_sided_window.bind(left=2**31 - 1, right=2**31 - 1)
    assert bound.band == Band(2**30, 2**30)
    assert variant.sink_window.bind(sink=2**31 - 1, window=5).band == Band(5, 0, 2**30)


SPELLINGS = [
    lambda q, k, w: k <= q,
    lambda q, k, w: ~(q - k < 0),
    lambda q, k, w: q - k <= w,
    lambda q, k, w: k > q - w - 1,
    lambda q, k, w: k - q < w,
    lambda q, k, w: abs(q - k) <= w,
    lambda q, k, w: k // w == q // w,
    lambda q, k, w: k >= q // w * w,
    lambda q, k, w: k % w + q - k >= q % w,
    lambda q, k, w: q // w >= k // w,
    lambda q, k, w: q // (w - 3) == k // (w - 3),
    lambda q, k, w: k >= q // (w - 3) * (w - 3),
    lambda q, k, w: k // (w - 3) * (w - 3) >= q // (w - 3) * (w - 3),
    lambda q, k, w: k % (w - 3) + q - k >= q % (w - 3),
    lambda q, k, w: k < w,
    lambda q, k, w: 3 * k + 1 <= w,
    lambda q, k, w: k != w,
    lambda q, k, w: q % w == 0,
    lambda q, k, w: (q + k) % 2 == w % 2,
]


@pytest.mark.parametrize("seed", range(300))
def test_random_masks(seed):
    """Conjunctions, disjunctions and negations of what bands are made of, and of other things: the band hides nothing that is seen, and
    what executors test of it and what is left are together the mask."""
    rng = np.random.default_rng(seed)

    def mask(depth, q, k, ws):
        if depth == 0:
            return SPELLINGS[rng.integers(len(SPELLINGS))](q, k, ws[rng.integers(3)])
        a, b = mask(depth - 1, q, k, ws), mask(rng.integers(depth), q, k, ws)
        return [lambda: a & b, lambda: a | b, lambda: ~(a | b), lambda: ~(~a | ~b), lambda: ~(~a & ~b)][
            rng.integers(5)
        ]()

    depth = int(rng.integers(1, 4))
    scalars = {name: variant.scalar("int32") for name in "abc"}

    def traced(q_pos, kv_pos, a, b, c):
        # the window is there for the parameters to be read
        return mask(depth, q_pos, kv_pos, (a, b, c)) & (q_pos - kv_pos <= a + b + c + 99) & (kv_pos - q_pos <= 99)

    v = variant.Variant("v", mask=traced, **scalars)
    for lowest in (1, 1, 1, -4, -4, -4):
        values = dict(zip("abc", rng.integers(lowest, 12, 3).tolist(), strict=True))
        try:
            v.bind(**values)
        except VariantError:  # a divisor below 1, a window that hides a query's own key
            assert lowest < 1
            continue
        assert_split(v, values)


def test_several_windows_the_smallest_counts():
    v = variant.Variant(
        "v",
        mask=lambda q_pos, kv_pos, a, b: (q_pos - kv_pos <= a) & (q_pos - kv_pos <= b),
        a=variant.scalar("int32"),
        b=variant.scalar("int32"),
    )
    assert v.bind(a=3, b=7).band == v.bind(a=7, b=3).band == Band(3)


def test_a_negative_window_is_refused_when_it_is_known():
    with pytest.raises(VariantError, match=r"sliding_window: with window=-2 .* at least 2 after .* must be 0"):
        variant.sliding_window.bind(window=-2)
    with pytest.raises(VariantError, match="`chunk` is 0"):
        variant.chunked_local.bind(chunk=0)
    with pytest.raises(
        VariantError, match=r"two_sided_window: with right=-3 .* at least 3 before .* must be 0 .* says kv_pos <= q_pos"
    ):
        variant.two_sided_window.bind(left=1, right=-3)


def test_the_standard_library():
    bands = {
        "full": ALL,
        "sliding_window": Band(6, 0),
        "two_sided_window": Band(6, 3),
        "chunked_local": Band(-1, 0, 0, 7),
        "sink_window": Band(5, 0, 4),
        "streaming": Band(5, 0, 4),
        "custom_mask": ALL,
        "tree_mask": ALL,
    }
    from test_standard import CASES as STANDARD

    for name, (parameters, _, _) in STANDARD.items():
        assert variant.STANDARD[name].bind(**parameters).band == bands.get(name, CAUSAL), name
    assert variant.two_sided_window.is_plain

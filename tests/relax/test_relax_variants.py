"""Attention that is not plain: what variant the pass makes of it, and that it computes the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tvm
from attention_values import check
from attention_writer import HEADS, INF, Writer, const, refusal
from tvm import relax, tirx

from tvm_infer import variant
from tvm_infer.errors import VariantError
from tvm_infer.relax import RewritePagedAttention
from tvm_infer.variant.layer import LayerVariant

op = relax.op
LOWEST = -3.4028234663852886e38
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], "float32").reshape(4, 1, 1)


def where(condition, a, b):
    return op.where(condition, a, b)


def distance(w):
    """i - j, float32."""
    return op.astype(op.subtract(w.i(), w.j()), "float32")


def and_(*conditions):
    result = conditions[0]
    for condition in conditions[1:]:
        result = op.logical_and(result, condition)
    return result


def causal(w):
    return op.less_equal(w.j(), w.i())


def near(w, size=6):
    return op.less(op.subtract(w.i(), w.j()), const(size, "int64"))


# Logits


def soft_cap(w, s):
    return w.causal(op.multiply(op.tanh(op.divide(s, const(30.0))), const(30.0)))


def alibi(w, s):
    return w.causal(op.subtract(s, op.multiply(const(SLOPES), distance(w))))


def alibi_of_keys(w, s):
    """BLOOM: slopes * j, in front of the scores."""
    return w.causal(op.add(op.multiply(const(SLOPES), op.astype(w.j(), "float32")), s))


def alibi_from_the_end(w, s):
    """MPT: counted from the last token, negative slopes, scaled with the scores."""
    run = op.expand_dims(op.arange(1 - w.n, 1, 1, "int64"), [0])
    return w.causal(op.multiply(op.add(s, op.multiply(op.astype(run, "float32"), const(4 * SLOPES))), const(0.5)))


def alibi_of_weights(w, s):
    return w.causal(op.add(s, op.multiply(op.negative(op.exp(w.extra["weight"])), distance(w))))


def alibi_absolute(w, s):
    return w.causal(op.subtract(s, op.multiply(const(SLOPES), op.abs(distance(w)))))


def squared(w, s):
    return w.causal(op.multiply(s, s))


def gated(w, s):
    return w.causal(op.multiply(s, op.sigmoid(op.multiply(s, const(2.0)))))


def capped_with_bias(w, s):
    bias = op.multiply(const(SLOPES), distance(w))
    return w.causal(op.multiply(const(5.0), op.tanh(op.divide(op.subtract(s, bias), const(5.0)))))


def clipped_table(w, s):
    """A learned number for each distance up to 7 and head, as an embedding."""
    place = op.clip(op.subtract(w.i(), w.j()), 0, 7)
    return w.causal(op.add(s, op.permute_dims(op.take(w.extra["weight"], place, axis=0), [2, 0, 1])))


def table_of_positions(w, s):
    rows = op.take(w.extra["weight"], op.arange(0, w.n, 1, "int64"), axis=1)
    return w.causal(op.add(s, op.take(rows, op.arange(0, w.n, 1, "int64"), axis=2)))


def temperature_of_heads(w, s):
    return w.causal(op.multiply(s, op.reshape(w.extra["weight"], [1, HEADS, 1, 1])))


def row_maximum(w, s):
    masked = w.emit(w.causal(soft_cap(w, s)))
    return op.subtract(masked, op.max(masked, axis=-1, keepdims=True))


# Masks


def window(w, s):
    return where(near(w), w.causal(s), const(-INF))


def window_added_twice(w, s):
    s = op.add(s, where(causal(w), const(0.0), const(LOWEST)))
    return op.add(s, where(near(w), const(0.0), const(LOWEST)))


def clipped(w, s):
    """To what is finite, as float16 models do, and to 2."""
    finite = op.clip(op.add(s, where(causal(w), const(0.0), const(-INF))), LOWEST, -LOWEST)
    return w.causal(op.minimum(finite, const(2.0)))


def window_subtracted(w, s):
    """(1 - mask) * 1e9 taken off."""
    keep = op.astype(and_(causal(w), near(w)), "float32")
    return op.subtract(s, op.multiply(op.subtract(const(1.0), keep), const(1e9)))


def window_by_absolute_distance(w, s):
    close = op.less_equal(op.abs(op.subtract(w.i(), w.j())), const(5, "int64"))
    return where(and_(close, causal(w)), s, const(-INF))


def window_of_positions(w, s):
    i, j = op.expand_dims(w.positions, [-1]), op.expand_dims(w.positions, [-2])
    return where(and_(op.less_equal(j, i), op.greater(j, op.subtract(i, const(6, "int64")))), s, const(-INF))


def window_of_triangles(w, s):
    """Gemma's first form: lower triangles of ones."""
    ones = op.ones([w.n, w.n], "float32")
    hidden = op.logical_or(op.equal(op.tril(ones), const(0.0)), op.not_equal(op.tril(ones, -6), const(0.0)))
    return where(hidden, const(-INF), s)


def first_and_near(w, s):
    return where(and_(op.logical_or(op.less(w.j(), const(2, "int64")), near(w, 4)), causal(w)), s, const(-INF))


def chunks(w, s):
    same = op.equal(op.floor_divide(w.i(), const(7, "int64")), op.floor_divide(w.j(), const(7, "int64")))
    return where(and_(same, causal(w)), s, const(-INF))


def every_third(w, s):
    even = op.equal(op.floor_mod(op.subtract(w.i(), w.j()), const(3, "int64")), const(0, "int64"))
    return where(and_(even, causal(w)), s, const(-INF))


def windows_of_heads(w, s):
    heads = op.reshape(op.arange(0, HEADS, 1, "int64"), [HEADS, 1, 1])
    seen = op.logical_or(op.less(heads, const(2, "int64")), near(w))
    return where(and_(seen, causal(w)), s, const(-INF))


def blocks(w, s):
    """A table of blocks of 4, and the own block."""
    layout = const(np.random.default_rng(0).random((HEADS, 8, 8)) < 0.5, "bool")
    place = op.floor_divide(op.arange(0, w.n, 1, "int64"), const(4, "int64"))
    chosen = op.take(op.take(layout, place, axis=1), place, axis=2)
    block = [op.floor_divide(x, const(4, "int64")) for x in (w.i(), w.j())]
    return where(and_(op.logical_or(op.equal(*block), chosen), causal(w)), s, const(-INF))


def masked_before_the_cap(w, s):
    """A finite number goes through the cap: the keys are not masked by it, but by what is added after it."""
    s = op.multiply(const(3.0), op.tanh(where(causal(w), s, const(-INF))))
    return op.add(s, where(causal(w), const(0.0), const(-INF)))


WEIGHTS = {
    "alibi_of_weights": [HEADS, 1, 1],
    "clipped_table": [8, HEADS],
    "table_of_positions": [HEADS, 40, 40],
    "temperature_of_heads": [HEADS],
}

TEXTS = {
    soft_cap: ["logits = cap * tanh(value / cap)", "cap = 30"],
    alibi: ["logits = value + slopes[qo_head] * (kv_pos - q_pos)", "slopes = [0.5, 0.25, 0.125, 0.0625]"],
    alibi_of_keys: ["logits = value + slopes[qo_head] * (kv_pos - q_pos)", "slopes = [0.5, 0.25, 0.125, 0.0625]"],
    alibi_from_the_end: ["logits = value + 0.5 * (slopes[qo_head] * (kv_pos - q_pos))"],
    alibi_of_weights: ["exp(slopes[qo_head, 0, 0])", "slopes = weight weight"],
    alibi_absolute: ["logits = value + slopes[qo_head] * (kv_pos - q_pos)"],
    squared: ["logits = 0.0625 * (value * value)"],
    gated: ["logits = value * sigmoid(2.0 * value)"],
    capped_with_bias: ["tanh("],
    clipped_table: ["logits = value + bias[", "bias = weight weight"],
    table_of_positions: ["logits = value + bias[qo_head, minimum(q_pos, 39), minimum(kv_pos, 39)]"],
    temperature_of_heads: ["logits = value * bias[qo_head]", "bias = weight weight"],
    row_maximum: ["logits = cap * tanh(value / cap)"],
    window: ["mask = (kv_pos <= q_pos) & (q_pos - kv_pos < 6)"],
    window_added_twice: ["mask = (kv_pos <= q_pos) & (q_pos - kv_pos < 6)"],
    window_subtracted: ["extracted()\n  mask = (kv_pos <= q_pos) & (q_pos - kv_pos < 6)"],
    window_by_absolute_distance: ["mask = (kv_pos <= q_pos) & (q_pos - kv_pos <= 5)"],
    window_of_positions: ["mask = (kv_pos <= q_pos) & (kv_pos > q_pos - 6)"],
    window_of_triangles: ["mask = (kv_pos <= q_pos) & (kv_pos - q_pos > -6)"],
    first_and_near: ["mask = (kv_pos <= q_pos) & ((kv_pos < 2) | (q_pos - kv_pos < 4))"],
    chunks: ["mask = (kv_pos <= q_pos) & (q_pos // 7 == kv_pos // 7)"],
    every_third: ["mask = (kv_pos <= q_pos) & ((q_pos - kv_pos) % 3 == 0)"],
    windows_of_heads: ["qo_head < 2"],
    blocks: ["table[qo_head, minimum(q_pos // 4, 7), minimum(kv_pos // 4, 7)]"],
    clipped: ["logits = minimum(value, 2.0)"],
    masked_before_the_cap: ["logits = cap * tanh(value / cap)"],
}


def extracted(change, parameters=(), **options):
    """(the one match, its module) of a change of the scores, whose extra parameters are weights."""
    extra = [(name, lambda w, shape=shape: shape, "float32") for name, shape in parameters]
    writer = Writer(extra)
    mod = writer.module(change, num_input=5, **options)
    rewrite = RewritePagedAttention()
    rewrite(mod)
    (match,) = rewrite.report.matched
    return match, mod


@pytest.mark.parametrize("change", TEXTS, ids=lambda change: change.__name__)
def test_what_is_extracted(change):
    weights = [("weight", WEIGHTS[change.__name__])] if change.__name__ in WEIGHTS else []
    match, mod = extracted(change, weights)
    text = str(match.spec.variant)
    for part in TEXTS[change]:
        assert part in text, text
    check(match, mod, weights)


# Sinks: an entry without a key


def with_sink(sink, *, first=False, subtract=False, masked=lambda w, s: w.causal(s)):
    """(change of the scores, change of the weights) of a softmax over the keys and one entry more."""

    def change(w, s):
        entry = op.broadcast_to(sink(w), [1, HEADS, w.n, 1])
        parts = [entry, masked(w, s)] if first else [masked(w, s), entry]
        joined = w.emit(op.concat(parts, axis=-1))
        if subtract:
            joined = op.subtract(joined, op.max(joined, axis=-1, keepdims=True))
        return joined

    def weights(w, p):
        begin = 1 if first else 0
        return op.strided_slice(p, [3], [begin], [w.n + begin], [1], assume_inbound=True)

    return change, weights


def learned(w):
    return op.reshape(w.extra["weight"], [1, HEADS, 1, 1])


SINKS = {
    "learned": (with_sink(learned), ["output = value * sigmoid(lse - sink[qo_head])", "sink = weight weight"]),
    "subtracted": (with_sink(learned, subtract=True), ["output = value * sigmoid(lse - sink[qo_head])"]),
    "first": (with_sink(learned, first=True, subtract=True), ["output = value * sigmoid(lse - sink[qo_head])"]),
    "zero": (with_sink(lambda w: const([[[[0.0]]]])), ["output = value * sigmoid(lse - 0.0)"]),
    "window": (with_sink(learned, masked=window), ["(q_pos - kv_pos < 6)", "sigmoid(lse - sink[qo_head])"]),
    "cap": (with_sink(learned, masked=soft_cap), ["logits = cap * tanh(value / cap)", "sigmoid(lse - sink[qo_head])"]),
    "alibi": (with_sink(learned, masked=alibi), ["(q_pos - kv_pos)", "sigmoid(lse - sink[qo_head])"]),
    "mask": (
        with_sink(learned, masked=window_subtracted),
        ["mask = (kv_pos <= q_pos) & (q_pos - kv_pos < 6)\n  output"],
    ),
    # what a softmax without a sink would not notice
    "keys": (with_sink(learned, masked=alibi_of_keys), ["* kv_pos", "sigmoid(lse - sink[qo_head])"]),
    "scaled": (with_sink(lambda w: op.multiply(learned(w), const(0.5))), ["sigmoid(lse - 0.5 * sink[qo_head])"]),
}


@pytest.mark.parametrize("kind", SINKS)
def test_sinks(kind):
    (change, weights), parts = SINKS[kind]
    extra = [] if kind == "zero" else [("weight", [HEADS])]
    match, mod = extracted(change, extra, weights=weights)
    text = str(match.spec.variant)
    for part in parts:
        assert part in text, text
    assert match.form == "matmul, softmax with a sink, matmul"
    check(match, mod, extra)


# As the standard library has them: no compiler is needed then, and equal layers share what is compiled


@pytest.mark.parametrize(
    "change, standard",
    [
        (soft_cap, variant.soft_cap),
        (alibi, variant.alibi),
        (alibi_of_keys, variant.alibi),
        (window, variant.sliding_window),
    ],
    ids=lambda x: getattr(x, "__name__", None) or x.name,
)
def test_the_code_is_that_of_the_standard_variant(change, standard):
    match, _ = extracted(change)
    assert match.spec.variant.variant.digest == standard.digest
    assert match.spec.variant.variant.is_plain == standard.is_plain


def test_the_code_of_sinks_is_that_of_the_standard_variant():
    change, weights = with_sink(learned, subtract=True)
    match, _ = extracted(change, [("weight", [HEADS])], weights=weights)
    assert match.spec.variant.variant.digest == variant.attention_sink.digest


def test_what_is_plain_after_all_has_no_variant():
    """A row's maximum taken off by hand, a number added to all keys."""

    def change(w, s):
        masked = w.emit(w.causal(op.add(s, op.multiply(const(SLOPES), op.astype(w.i(), "float32")))))
        return op.subtract(masked, op.max(masked, axis=-1, keepdims=True))

    match, mod = extracted(change)
    assert match.spec.variant is None and match.spec.causal and match.spec.sm_scale == 0.25
    check(match, mod)


def test_positions_of_the_input_are_an_assumption():
    match, _ = extracted(window_of_positions)
    assert match.assumptions == ("`position_ids` counts the tokens of a sequence: 0, 1, 2, …",)


def test_a_mask_by_positions_is_plain():
    def change(w, s):
        return where(
            op.less_equal(op.expand_dims(w.positions, [-2]), op.expand_dims(w.positions, [-1])), s, const(-INF)
        )

    match, _ = extracted(change)
    assert match.spec.variant is None and match.spec.causal
    assert match.assumptions == ("`position_ids` counts the tokens of a sequence: 0, 1, 2, …",)


def test_tables_that_end_are_an_assumption():
    match, _ = extracted(table_of_positions, [("weight", [HEADS, 40, 40])])
    assert match.assumptions == (
        "positions stay within `weight` [4, 40, 40], whose last entry counts for those beyond",
    )
    match, _ = extracted(clipped_table, [("weight", [8, HEADS])])
    assert match.assumptions == ()


def test_finite_masks_are_an_assumption():
    match, _ = extracted(window_subtracted)
    assert match.assumptions == ("masked scores get -1e+09, taken as -inf",)


def test_a_mask_that_is_assumed_full_beside_a_window():
    extra = [("mask", lambda w: [w.n, w.n], "float32")]
    mod = Writer(extra).module(lambda w, s: op.add(window(w, s), w.extra["mask"]))
    rewrite = RewritePagedAttention(assume_full=["mask"])
    rewrite(mod)
    (match,) = rewrite.report.matched
    assert str(match.spec.variant) == "extracted()\n  mask = (kv_pos <= q_pos) & (q_pos - kv_pos < 6)"
    assert "mask input `mask` masks nothing (assume_full)" in match.assumptions
    assert "depends on the function input `mask`" in refusal(mod).why


# Refusals


def score_threshold(w, s):
    return where(op.less(s, const(-9.0)), const(-INF), w.causal(s))


def no_own_key(w, s):
    return where(op.less(w.j(), op.subtract(w.i(), const(3, "int64"))), s, const(-INF))


def only_some_rows(w, s):
    return where(and_(causal(w), op.less(w.j(), const(9, "int64"))), s, const(-INF))


def sees_ahead(w, s):
    return where(op.less_equal(w.j(), op.add(w.i(), const(1, "int64"))), soft_capped(s), const(-INF))


def soft_capped(s):
    return op.multiply(op.tanh(op.divide(s, const(30.0))), const(30.0))


def bias_without_a_mask(w, s):
    return op.add(s, op.multiply(const(SLOPES), distance(w)))


def capped_mask(w, s):
    return soft_capped(w.causal(s))


def length_of_the_row(w, s):
    length = op.astype(op.arange(w.n, w.n + 1, 1, "int64"), "float32")
    return w.causal(op.multiply(s, op.log(length)))


def buckets(w, s):
    """T5's logarithmic buckets."""
    far = op.maximum(op.subtract(w.i(), w.j()), const(1, "int64"))
    place = op.minimum(op.astype(op.log(op.astype(far, "float32")), "int64"), const(8, "int64"))
    return w.causal(op.add(s, op.take(const(np.arange(9, dtype="float32")), place, axis=0)))


def of_the_tokens(w, s):
    """A bias that the tokens' own queries make."""
    return w.causal(op.add(s, op.mean(w.extra["bias"], axis=[-1])))


def of_an_input(w, s):
    return w.causal(op.add(soft_capped(s), w.extra["bias"]))


def error_function(w, s):
    return w.causal(op.erf(s))


def hashed(w, s):
    key = op.floor_mod(op.multiply(w.i(), w.j()), const(8, "int64"))
    return w.causal(op.add(s, op.take(const(np.arange(8, dtype="float32")), key, axis=0)))


def large_constant(w, s):
    rows = op.take(
        const(np.random.default_rng(0).random((HEADS, 300, 300)), "float32"), op.arange(0, w.n, 1, "int64"), axis=1
    )
    return w.causal(op.add(s, op.take(rows, op.arange(0, w.n, 1, "int64"), axis=2)))


def large_number(w, s):
    """Beside it the scores have no digits left, in the model's float32 either."""
    far = op.less(op.subtract(w.i(), w.j()), const(9, "int64"))
    return w.causal(op.add(soft_capped(s), op.where(far, const(2e9), op.multiply(s, const(0.0)))))


def no_number(w, s):
    return w.causal(op.add(soft_capped(s), op.multiply(op.astype(w.j(), "float32"), const(float("nan")))))


REFUSED = {
    large_number: ([], "the number 2e+09 stays in the scores of keys that are seen"),
    no_number: ([], "the number nan stays in the scores of keys that are seen"),
    score_threshold: ([], "the mask `not (score * 0.25 < -9) and j <= i` depends on the scores"),
    no_own_key: ([], "`j < i - 3` decides which keys are seen, and it is not proven that a query sees its own key"),
    only_some_rows: ([], "`j < 9` decides which keys are seen, and it is not proven that a query sees its own key"),
    sees_ahead: ([], "a query may see keys after its own, which are not there when tokens come one by one"),
    bias_without_a_mask: ([], "a query may see keys after its own"),
    capped_mask: ([], "a query may see keys after its own"),
    length_of_the_row: ([], "`n` is the number of tokens of the row"),
    buckets: ([], "rounds a floating-point number to an integer"),
    of_the_tokens: ([HEADS, "n", "n", 3], "is computed by the model, by an operator that is not written out here"),
    of_an_input: ([HEADS, "n", "n"], "depends on the function input `bias`"),
    error_function: ([], "no matmul makes its scores"),
    hashed: ([], "`i * j` is a product that may exceed int32"),
    large_constant: ([], "is of a constant of 1440000 bytes; constants of at most 1048576 go into a variant"),
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_is_refused(change):
    shape, why = REFUSED[change]
    extra = [("bias", lambda w: [w.n if x == "n" else x for x in shape], "float32")] if shape else []
    reason = refusal(Writer(extra).module(change))
    assert why in reason.why, reason.why
    assert reason.fix


@pytest.mark.parametrize(
    "shape, dtype, why",
    [
        (
            [HEADS],
            "int64",
            "is int64; weights that attention variants read are float32, float16, bfloat16, int32, uint8",
        ),
        ([1, 1, HEADS, 1, 1], "float32", "is of a weight of rank 5; tables of attention variants have rank 1 to 4"),
    ],
)
def test_weights_that_cannot_be_tables(shape, dtype, why):
    def change(w, s):
        return w.causal(op.multiply(s, op.reshape(op.astype(w.extra["weight"], "float32"), [1, HEADS, 1, 1])))

    reason = refusal(Writer([("weight", lambda w: shape, dtype)]).module(change, num_input=5))
    assert why in reason.why


def test_more_weights_than_a_variant_takes():
    extra = [(f"w{k}", lambda w: [HEADS, 1, 1], "float32") for k in range(9)]

    def change(w, s):
        for weight in w.extra.values():
            s = op.multiply(s, op.add(weight, const(1.0)))
        return w.causal(s)

    assert (
        "it reads 9 weights and constants; an attention variant has at most 8 tables"
        in refusal(Writer(extra).module(change, num_input=5)).why
    )


def test_sinks_that_are_refused():
    for sink, why in (
        (lambda w: op.expand_dims(op.astype(w.i(), "float32"), [0, 1]), "makes the sink differ from token to token"),
        (lambda w: op.mean(w.extra["x"], axis=[-1], keepdims=True), "is computed by the model"),
    ):
        change, weights = with_sink(sink)
        writer = Writer([("x", lambda w: [1, HEADS, w.n, 3], "float32")])
        assert why in refusal(writer.module(change, weights=weights)).why


def test_two_entries_without_a_key_are_refused():
    def change(w, s):
        return op.concat([w.causal(s), op.zeros(relax.ShapeExpr([1, HEADS, w.n, 2]), "float32")], axis=-1)

    reason = refusal(
        Writer().module(change, weights=lambda w, p: op.strided_slice(p, [3], [0], [w.n], [1], assume_inbound=True))
    )
    assert "its keys number n + 2, not the n current tokens" in reason.why


def test_the_report_shows_variants_once():
    rewrite = RewritePagedAttention()
    rewrite(Writer().module(window))
    text = str(rewrite.report)
    assert "causal, variant" in text
    assert "variant of layer 0: extracted()\n    mask = (kv_pos <= q_pos) & (q_pos - kv_pos < 6)" in text
    assert "with a variant" in str(rewrite.report.specs()[0])


# What is emitted


@pytest.mark.parametrize("change", [soft_cap, window, alibi, first_and_near], ids=lambda change: change.__name__)
def test_the_module_is_that_of_plain_attention(change):
    """The call is the same: what it computes besides is the cache's affair."""
    before, expected = Writer().module(change), RewritePagedAttention()(Writer().module())
    original = before.clone()
    tvm.ir.assert_structural_equal(RewritePagedAttention()(before), expected, map_free_vars=True)
    tvm.ir.assert_structural_equal(before, original)


def test_weights_of_a_variant_stay_parameters():
    extra = [("weight", lambda w: [HEADS], "float32")]
    change, weights = with_sink(learned, masked=window)
    before = Writer(extra).module(change, weights=weights, num_input=5)
    expected = RewritePagedAttention()(Writer(extra).module(num_input=5))
    after = RewritePagedAttention()(before)
    tvm.ir.assert_structural_equal(after, expected, map_free_vars=True)
    assert [str(p.name) for p in after["main"].params][-2:] == ["kv_cache", "weight"]


def fused(window_size, bias=None):
    """R.nn.attention with a window, and a bias."""
    builder, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    tokens = relax.TensorType([1, n], "int64")
    q, k, v = (
        relax.Var(x, relax.TensorType([1, n, heads, 8], "float32")) for x, heads in zip("qkv", (4, 2, 2), strict=True)
    )
    with builder.function("main", [relax.Var("input_ids", tokens), relax.Var("position_ids", tokens), q, k, v]):
        with builder.dataflow():
            output = builder.emit_output(op.nn.attention(q, k, v, bias, causal_mask="TopLeft", window_size=window_size))
        builder.emit_func_output(output)
    return builder.get()


def test_fused_attention_with_a_window_and_a_bias():
    rewrite = RewritePagedAttention()
    after = rewrite(fused(6, const(np.full((1, 4, 1, 1), -2.0, "float32"))))
    tvm.ir.assert_structural_equal(after, RewritePagedAttention()(fused(None)), map_free_vars=True)
    (match,) = rewrite.report.matched
    assert str(match.spec.variant) == "extracted()\n  mask = (kv_pos <= q_pos) & (kv_pos > q_pos - 6)"


def test_safe_softmax_of_a_variant():
    """torch's decomposition, which sets rows to 0 that are masked entirely; ours see their own key."""

    def weights(w, p):
        masked = w.masked
        seen = op.logical_not(op.equal(masked, const(-INF)))
        some = op.max(op.astype(seen, "int8"), axis=[-1], keepdims=True)
        return op.where(op.logical_not(op.astype(some, "bool")), op.full_like(p, const(0.0)), p)

    def change(w, s):
        w.masked = w.emit(where(near(w), w.causal(soft_capped(s)), const(-INF)))
        return w.masked

    match, mod = extracted(change, weights=weights)
    assert match.form == "matmul, safe softmax, matmul"
    assert "(q_pos - kv_pos < 6)" in str(match.spec.variant)
    check(match, mod)


def test_layers_of_equal_expressions_are_equal():
    first, second = (extracted(alibi_of_weights, [("weight", [HEADS, 1, 1])])[0].spec for _ in range(2))
    assert first.variant == second.variant and hash(first.variant) == hash(second.variant) and first == second
    assert LayerVariant.from_fields(json.loads(json.dumps(first.variant.to_fields()))) == first.variant
    constants = extracted(alibi)[0].spec.variant
    assert LayerVariant.from_fields(json.loads(json.dumps(constants.to_fields()))) == constants
    assert constants != first.variant
    with pytest.raises(VariantError, match="no layer's variant"):
        LayerVariant.from_fields({"variant": "{}"})

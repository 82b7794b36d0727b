"""What the pass does not prove it refuses, with the place, what it saw, why, and what to do."""

from __future__ import annotations

import math

import pytest
import tvm
from attention_writer import DIM, HEADS, INF, Writer, const, refusal
from tvm import relax, tirx

from tvm_infer.errors import MatchError
from tvm_infer.relax import RewritePagedAttention


def strict(w, scores):
    return relax.op.where(relax.op.less(w.j(), w.i()), scores, const(-INF))


def reversed_mask(w, scores):
    return relax.op.where(relax.op.greater_equal(w.j(), w.i()), scores, const(-INF))


def weak_mask(w, scores):
    return relax.op.where(relax.op.less_equal(w.j(), w.i()), scores, const(-100.0))


def all_masked(w, scores):
    return relax.op.add(scores, const(-INF))


def negative_scale(w, scores):
    return w.causal(relax.op.negative(scores))


def prefix(w, scores):
    sees = relax.op.logical_or(relax.op.less_equal(w.j(), w.i()), relax.op.less(w.j(), const(5, "int64")))
    return relax.op.where(sees, scores, const(-INF))


@pytest.mark.parametrize(
    "change, why, seen",
    [
        (strict, "neither causal nor full: `j < i` decides", "where(j < i, score * 0.25, -inf)"),
        (reversed_mask, "neither causal nor full: `j >= i` decides", "where(j >= i, score * 0.25, -inf)"),
        (weak_mask, "a key after its query gets -100", "-100"),
        (all_masked, "every key is masked", "score * 0.25 + -inf"),
        (negative_scale, "the factor on the score is -0.25, not positive", "score * 0.25 * -1"),
        (prefix, "neither causal nor full: `j < 5` decides", "where(j <= i or j < 5, score * 0.25, -inf)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_scores_that_are_not_causal_or_full(change, why, seen):
    reason = refusal(Writer().module(change))
    assert why in reason.why
    assert seen in reason.seen
    assert reason.location.variable == "p" and reason.location.operator == "nn.softmax"
    assert "on_unmatched" in reason.fix or "mask" in reason.fix or "scale" in reason.fix


MASKS = {
    "bool": (
        [("mask", lambda w: [1, 1, w.n, w.n], "bool")],
        lambda w, s: relax.op.where(w.extra["mask"], s, const(-INF)),
    ),
    "additive": ([("mask", lambda w: [w.n, w.n], "float32")], lambda w, s: relax.op.add(s, w.extra["mask"])),
    "padding": (
        [("mask", lambda w: [1, w.n], "int64")],
        lambda w, s: relax.op.where(
            relax.op.reshape(relax.op.astype(w.extra["mask"], "bool"), [1, 1, 1, w.n]), w.causal(s), const(-INF)
        ),
    ),
    "padding, HF style": (
        [("mask", lambda w: [1, w.n], "int64")],
        lambda w, s: relax.op.where(
            relax.op.logical_and(
                relax.op.less_equal(w.j(), w.i()),
                relax.op.not_equal(relax.op.reshape(w.extra["mask"], [1, 1, 1, w.n]), const(0, "int64")),
            ),
            s,
            const(-INF),
        ),
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_input_is_refused_unless_assumed_full(kind):
    extra, change = MASKS[kind]
    mod = Writer(extra).module(change)
    reason = refusal(mod)
    assert "the mask depends on the function input `mask`" in reason.why
    assert 'assume_full=["mask"]' in reason.fix
    rewrite = RewritePagedAttention(assume_full=["mask"])
    rewrite(mod)
    (match,) = rewrite.report.matched
    assert match.spec.causal == kind.startswith("padding")
    assert match.assumptions == ("mask input `mask` masks nothing (assume_full)",)
    assert "assumed: layer 0: mask input `mask` masks nothing (assume_full)" in str(rewrite.report)


def test_another_mask_is_not_assumed_full():
    extra = [("mask", lambda w: [w.n, w.n], "float32"), ("bias", lambda w: [w.n, w.n], "float32")]
    mod = Writer(extra).module(lambda w, s: relax.op.add(relax.op.add(s, w.extra["mask"]), w.extra["bias"]))
    reason = refusal(mod, assume_full=["mask"])
    assert "function input `bias`" in reason.why


def test_cross_attention_of_another_length():
    reason = refusal(Writer(keys="m").module(lambda w, s: s))
    assert "its keys number m, not the n current tokens" in reason.why
    assert "[1, 4, n, m]" in reason.seen


def test_a_symbolic_batch():
    reason = refusal(Writer(batch=lambda w: w.m).module())
    assert "axis 0 has length m" in reason.why and "batch 1" in reason.fix


def test_softmax_over_the_queries():
    reason = refusal(Writer().module(lambda w, scores: scores, axis=-2))
    assert "does not sum softmax[h, i, j] * v[j] over the axis j that the softmax normalises" in reason.why


@pytest.mark.parametrize(
    "group",
    [
        lambda w, x: relax.op.concat([x, x], axis=1),
        lambda w, x: relax.op.reshape(
            relax.op.broadcast_to(relax.op.expand_dims(x, [1]), [1, 2, 2, w.n, DIM]), [1, 4, w.n, DIM]
        ),
    ],
    ids=["concat", "broadcast"],
)
def test_heads_that_interleave_are_cached_repeated(group):
    """Query head h with KV head h % 2 is no group: the repeated tensor, whose head h is h's own, goes to the cache."""
    rewrite = RewritePagedAttention()
    rewrite(Writer().module(group=group))
    assert rewrite.report.specs()[0].num_kv_heads == HEADS


@pytest.mark.parametrize(
    "weights, why",
    [
        (lambda w, p: relax.op.multiply(p, const(0.5)), "does not sum softmax[h, i, j]"),
        (lambda w, p: relax.op.where(relax.op.less(w.j(), const(3, "int64")), p, const(0.0)), "does not sum"),
    ],
    ids=["scaled", "selected"],
)
def test_weights_that_are_not_the_softmax(weights, why):
    assert why in refusal(Writer().module(weights=weights)).why


def test_returned_weights():
    reason = refusal(Writer().module(result=lambda w, p, o: relax.Tuple([o, p])))
    assert "its probabilities are also used by" in reason.why


def test_pooling_over_the_tokens():
    """A softmax over tokens without a matmul after it."""
    reason = refusal(Writer().module(result=lambda w, p, o: o, weights=lambda w, p: w.emit(relax.op.exp(p))))
    assert "no matmul consumes its probabilities" in reason.why or "also used" in reason.why


def test_a_mean_over_the_tokens_is_refused_after_the_rewrite():
    mod = Writer().module(result=lambda w, p, o: relax.op.mean(o, axis=[1]))
    rewrite = RewritePagedAttention()
    with pytest.raises(MatchError, match="mean across the n packed tokens"):
        rewrite(mod)
    assert len(rewrite.report.matched) == 1
    kept = RewritePagedAttention(on_unmatched="keep")
    kept(mod)
    assert "it mixes the tokens of all sequences" in str(kept.report)


def test_the_last_row_is_noted():
    mod = Writer().module(result=lambda w, p, o: relax.op.take(o, const(-1, "int64"), axis=1))
    rewrite = RewritePagedAttention()
    rewrite(mod)
    assert any("picks fixed rows of the packed row" in text for text in rewrite.report.assumptions)


@pytest.mark.parametrize("static", [True, False])
def test_attention_over_encoder_states(static):
    """Keys of a fixed number: from an input they are cross attention, from weights a memory that does not mix tokens."""
    builder, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    tokens = relax.TensorType([1, n], "int64")
    x = relax.Var("x", relax.TensorType([n, DIM], "float32"))
    memory = relax.Var("memory", relax.TensorType([7, DIM], "float32"))
    params = [relax.Var("input_ids", tokens), relax.Var("position_ids", tokens), x, memory]
    with builder.function("main", params, attrs={"num_input": 4 if static else 3}):
        with builder.dataflow():
            scores = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(memory))))
            p = builder.emit(relax.op.nn.softmax(scores, axis=-1), "p")
            output = builder.emit_output(builder.emit(relax.op.matmul(p, memory)))
        builder.emit_func_output(output)
    rewrite = RewritePagedAttention()
    if static:
        with pytest.raises(MatchError, match="its keys number 7, not the n current tokens"):
            rewrite(builder.get())
    else:
        tvm.ir.assert_structural_equal(rewrite(builder.get()), builder.get())
        assert [item.location.variable for item in rewrite.report.not_attention] == ["p"]


@pytest.mark.parametrize(
    "shapes, why",
    [
        ({"k": (1, "m", 2, 8), "v": (1, "m", 2, 8)}, "k has m rows, not the n current tokens"),
        ({"v": (1, "n", 2, 16)}, "v as wide as q"),
    ],
    ids=["cross", "wide-v"],
)
def test_fused_attention_that_is_not_plain(shapes, why):
    builder = relax.BlockBuilder()
    lengths = {"n": tirx.Var("n", "int64"), "m": tirx.Var("m", "int64")}
    shapes = {"q": (1, "n", 4, 8), "k": (1, "n", 2, 8), "v": (1, "n", 2, 8), **shapes}
    tokens = relax.TensorType([1, lengths["n"]], "int64")
    operands = [
        relax.Var(name, relax.TensorType([lengths.get(d, d) for d in shape], "float32"))
        for name, shape in shapes.items()
    ]
    with builder.function("main", [relax.Var("input_ids", tokens), relax.Var("position_ids", tokens), *operands]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.nn.attention(*operands, causal_mask="TopLeft"))
        builder.emit_func_output(output)
    reason = refusal(builder.get())
    assert why in reason.why


def test_every_refusal_is_reported_at_once():
    """Two bad attentions, one error."""
    builder, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    tokens = relax.TensorType([1, n], "int64")
    x = relax.Var("x", relax.TensorType([1, n, 2, 8], "float32"))
    with builder.function("main", [relax.Var("input_ids", tokens), relax.Var("position_ids", tokens), x]):
        with builder.dataflow():
            a = builder.emit(relax.op.nn.attention(x, x, x, scale=-0.5, causal_mask="TopLeft"), "a")
            b = builder.emit(relax.op.nn.attention(a, a, a, scale=-1.0), "b")
            c = builder.emit(relax.op.nn.attention(b, b, b), "c")
            output = builder.emit_output(c)
        builder.emit_func_output(output)
    rewrite = RewritePagedAttention()
    with pytest.raises(MatchError) as caught:
        rewrite(builder.get())
    assert "main/a (nn.attention)" in str(caught.value) and "main/b (nn.attention)" in str(caught.value)
    assert "2 operator(s) cannot be rewritten" in str(caught.value)
    keep = RewritePagedAttention(on_unmatched="keep")
    keep(builder.get())
    assert [match.layer for match in keep.report.matched] == [0], "kept attentions have no layer in the cache"


def test_scale_is_the_product_of_all_factors():
    """Factors on q, k, the scores, and behind divisions and negations that cancel."""
    op = relax.op

    def change(w, scores):
        return w.causal(op.negative(op.divide(op.negative(scores), const(math.sqrt(2.0)))))

    rewrite = RewritePagedAttention()
    rewrite(Writer().module(change))
    assert rewrite.report.specs()[0].sm_scale == pytest.approx(0.25 / math.sqrt(2.0), rel=1e-6)


def test_attention_in_a_called_function_is_not_overlooked():
    """The pass looks at one function; what it cannot look into it refuses, and inlining helps."""
    builder = relax.BlockBuilder()
    inner_n, n = tirx.Var("n", "int64"), tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([1, inner_n, 2, 8], "float32"))
    with builder.function("attend", [x], private=True):
        with builder.dataflow():
            output = builder.emit_output(relax.op.nn.attention(x, x, x, causal_mask="TopLeft"))
        builder.emit_func_output(output)
    tokens = relax.TensorType([1, n], "int64")
    y = relax.Var("y", relax.TensorType([1, n, 2, 8], "float32"))
    with builder.function("main", [relax.Var("input_ids", tokens), relax.Var("position_ids", tokens), y]):
        with builder.dataflow():
            output = builder.emit_output(relax.Call(builder.get().get_global_var("attend"), [y]), "o")
        builder.emit_func_output(output)
    mod = builder.get()
    reason = refusal(mod)
    assert "a function that is called" in reason.seen and reason.location.variable == "o"
    rewrite = RewritePagedAttention()
    rewrite(relax.transform.InlinePrivateFunctions()(mod))
    assert len(rewrite.report.matched) == 1

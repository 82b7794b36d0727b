"""Writes modules around one attention, for tests of what the pass makes of it."""

from __future__ import annotations

import pytest
from tvm import relax, tirx

from tvm_infer.errors import MatchError
from tvm_infer.relax import RewritePagedAttention

HEADS, KV_HEADS, DIM = 4, 2, 8
INF = float("inf")


def const(value, dtype="float32"):
    return relax.const(value, dtype)


class Writer:
    """Writes a function of packed tokens around one attention, whose scores, weights or operands a test changes."""

    def __init__(self, extra=(), *, keys="n", batch=1) -> None:
        self.n = tirx.Var("n", "int64")
        self.m = tirx.Var("m", "int64")
        self.builder = relax.BlockBuilder()
        self.length = {"n": self.n, "m": self.m}[keys]
        self.extra = {name: relax.Var(name, relax.TensorType(shape(self), dtype)) for name, shape, dtype in extra}
        self.batch = batch(self) if callable(batch) else batch

    def emit(self, expr, name="lv"):
        return self.builder.emit(expr, name)

    def i(self):
        """Query positions [n, 1]."""
        return relax.op.expand_dims(relax.op.arange(0, self.n, 1, "int64"), [1])

    def j(self):
        """Key positions [1, m]."""
        return relax.op.expand_dims(relax.op.arange(0, self.length, 1, "int64"), [0])

    def causal(self, scores):
        return relax.op.where(relax.op.less_equal(self.j(), self.i()), scores, const(-INF))

    def module(
        self,
        change=lambda w, scores: w.causal(scores),
        *,
        axis=-1,
        weights=None,
        group=None,
        result=None,
        num_input=None,
    ):
        """main(input_ids, position_ids, q [b, n, 4, 8], k, v [b, m, 2, 8], *extra) -> attention [b, n, 4, 8]."""
        op = relax.op
        tokens = relax.TensorType([1, self.n], "int64")
        q = relax.Var("q", relax.TensorType([self.batch, self.n, HEADS, DIM], "float32"))
        k, v = (relax.Var(x, relax.TensorType([self.batch, self.length, KV_HEADS, DIM], "float32")) for x in "kv")
        self.positions = relax.Var("position_ids", tokens)
        params = [relax.Var("input_ids", tokens), self.positions, q, k, v, *self.extra.values()]
        attrs = None if num_input is None else {"num_input": num_input}
        with self.builder.function("main", params, attrs=attrs):
            with self.builder.dataflow():
                qt = self.emit(op.permute_dims(q, [0, 2, 1, 3]))
                kt, vt = (self.emit(op.permute_dims(x, [0, 2, 1, 3])) for x in (k, v))
                repeat = group or (lambda w, x: op.repeat(x, HEADS // KV_HEADS, axis=1))
                kt, vt = self.emit(repeat(self, kt)), self.emit(repeat(self, vt))
                scores = self.emit(op.matmul(qt, self.emit(op.permute_dims(kt, [0, 1, 3, 2]))), "scores")
                scores = self.emit(op.multiply(scores, const(0.25)))
                masked = self.emit(change(self, scores), "masked")
                p = self.emit(op.nn.softmax(masked, axis=axis), "p")
                if weights is not None:
                    p = self.emit(weights(self, p))
                o = self.emit(op.permute_dims(self.emit(op.matmul(p, vt)), [0, 2, 1, 3]))
                output = self.builder.emit_output(o if result is None else result(self, p, o))
            self.builder.emit_func_output(output)
        return self.builder.get()


def refusal(mod, **options):
    """The one Reason of a refused module; it is in the error's text, and `keep` leaves the attention as it was."""
    rewrite = RewritePagedAttention(**options)
    with pytest.raises(MatchError) as caught:
        rewrite(mod)
    (reason,) = rewrite.report.refused
    assert str(reason) in str(caught.value) and not rewrite.report.matched
    assert reason.seen and reason.why and reason.fix and reason.location.function == "main"
    keep = RewritePagedAttention(on_unmatched="keep", **options)
    after = keep(mod)
    assert [str(r) for r in keep.report.refused] == [str(reason)]
    assert len(after["main"].params) == len(mod["main"].params)
    assert "refused: main/" in str(keep.report)
    return reason

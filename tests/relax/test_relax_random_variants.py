"""Random scores, masks and sinks: what is extracted computes the same as the module did; what is refused is refused for a reason."""

from __future__ import annotations

import numpy as np
import pytest
from attention_values import check
from attention_writer import HEADS, INF, Writer, const
from tvm import relax

from tvm_infer.relax import RewritePagedAttention

op = relax.op
WEIGHTS = [("per_head", [HEADS, 1, 1]), ("table", [HEADS, 9]), ("sink", [HEADS])]


class Random:
    """Draws one attention. `w` is the writer of the module, there once the module is written."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.has_sink = self.rng.random() < 0.3
        self.sink_first = self.rng.random() < 0.3

    def pick(self, *choices):
        return choices[self.rng.integers(len(choices))]

    def integer(self, low, high):
        return const(int(self.rng.integers(low, high)), "int64")

    def number(self):
        return const(float(np.float32(self.rng.uniform(0.3, 3.0))))

    def per_head(self):
        constant = const(self.rng.uniform(0.1, 1.0, (HEADS, 1, 1)).astype("float32"))
        return self.pick(constant, self.w.extra["per_head"], op.exp(self.w.extra["per_head"]))

    def distance(self):
        i, j = self.w.i(), self.w.j()
        return self.pick(op.subtract(i, j), op.subtract(j, i), op.abs(op.subtract(i, j)), j, op.add(i, j))

    def bias(self):
        product = op.multiply(self.per_head(), op.astype(self.distance(), "float32"))
        clipped = op.clip(self.pick(self.distance(), op.subtract(self.w.j(), self.w.i())), 0, 8)
        table = op.take(self.w.extra["table"], clipped, axis=1)
        row = op.multiply(self.per_head(), op.astype(self.w.i(), "float32"))
        chosen = op.where(self.condition(1), self.per_head(), self.pick(const(0.0), self.number()))
        return self.pick(product, op.negative(product), table, row, chosen, self.per_head(), self.number())

    def condition(self, depth):
        i, j = self.w.i(), self.w.j()
        if depth and self.rng.random() < 0.5:
            parts = [self.condition(depth - 1), self.condition(depth - 1)]
            return self.pick(op.logical_and, op.logical_or)(*parts)
        heads = op.reshape(op.arange(0, HEADS, 1, "int64"), [HEADS, 1, 1])
        size = int(self.rng.integers(2, 9))
        result = self.pick(
            op.less(op.subtract(i, j), const(size, "int64")),
            op.greater(j, op.subtract(i, const(size, "int64"))),
            op.less_equal(op.abs(op.subtract(i, j)), const(size, "int64")),
            op.equal(op.floor_divide(i, const(size, "int64")), op.floor_divide(j, const(size, "int64"))),
            op.equal(op.floor_mod(op.subtract(i, j), const(size, "int64")), const(0, "int64")),
            op.less(j, const(size, "int64")),
            op.less(heads, const(1 + size % 3, "int64")),
            op.less_equal(j, i),
        )
        return op.logical_not(op.logical_not(result)) if self.rng.random() < 0.2 else result

    def hide(self, s, keep):
        hidden = op.logical_not(keep)
        lowest = const(self.pick(-INF, -1e10, -3.4028234663852886e38))
        return self.pick(
            lambda: op.where(keep, s, lowest),
            lambda: op.where(hidden, lowest, s),
            lambda: op.add(s, op.where(keep, const(0.0), lowest)),
            lambda: op.add(op.multiply(op.astype(hidden, "float32"), const(-1e10)), s),
            lambda: op.subtract(s, op.multiply(op.subtract(const(1.0), op.astype(keep, "float32")), const(1e10))),
            lambda: op.maximum(op.where(keep, s, const(-INF)), const(-1e10)),
        )()

    def step(self, s):
        cap = self.number()
        return self.pick(
            lambda: op.multiply(s, self.number()),
            lambda: op.multiply(op.tanh(op.divide(s, cap)), cap),
            lambda: op.add(s, self.bias()),
            lambda: op.subtract(s, self.bias()),
            lambda: op.multiply(s, self.per_head()),
            lambda: op.multiply(s, op.sigmoid(s)),
            lambda: op.where(self.condition(1), s, op.multiply(s, self.number())),
        )()

    def scores(self, w, s):
        self.w = w
        for _ in range(self.rng.integers(0, 4)):
            s = w.emit(self.step(s))
        masks = [op.less_equal(w.j(), w.i())]
        if self.rng.random() < 0.7:
            masks.append(self.condition(2))
        if self.rng.random() < 0.5:
            masks = [masks[0] if len(masks) == 1 else op.logical_and(*masks)]
        self.rng.shuffle(masks)
        for mask in masks:
            s = w.emit(self.hide(s, mask))
            if self.rng.random() < 0.3:
                s = w.emit(op.add(s, self.bias()))
        if self.has_sink:
            sink = op.broadcast_to(op.reshape(w.extra["sink"], [1, HEADS, 1, 1]), [1, HEADS, w.n, 1])
            s = w.emit(op.concat([sink, s] if self.sink_first else [s, sink], axis=-1))
        if self.rng.random() < 0.3:
            s = op.subtract(s, op.max(s, axis=[-1], keepdims=True))
        return s

    def weights(self, w, p):
        if not self.has_sink:
            return p
        begin = int(self.sink_first)
        return op.strided_slice(p, [3], [begin], [w.n + begin], [1], assume_inbound=True)


def run(seed):
    """The match that was checked, or the reasons."""
    random = Random(seed)
    extra = [(name, lambda w, shape=shape: shape, "float32") for name, shape in WEIGHTS]
    mod = Writer(extra).module(random.scores, weights=random.weights, num_input=5)
    rewrite = RewritePagedAttention(on_unmatched="keep")
    rewrite(mod)
    for match in rewrite.report.matched:
        check(match, mod, WEIGHTS, n=23, relative=True)
        return match
    return rewrite.report.refused


@pytest.mark.parametrize("first", range(0, 24, 4))
def test_random_attention(first):
    assert any(not isinstance(run(seed), list) for seed in range(first, first + 4)), "everything was refused"

"""Random functions of the whole grammar, each good for traced values and for numpy arrays alike.

Numbers are kept where float32 and float64 agree: ints below 2^31, floats compared only where nothing was rounded before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tvm_infer import variant
from tvm_infer.variant.parameters import VARIABLES

Make = Callable[[Any], Any]  # environment -> value

TRACED = SimpleNamespace(
    **{
        name: getattr(variant, name)
        for name in (
            "tanh exp exp2 log log2 sqrt sigmoid abs minimum maximum where to_float to_int cos sin cast".split()
        )
    },
    constant=lambda x: variant.to_float(x) if isinstance(x, float) else variant.to_int(x),
    floordiv=lambda x, y: x // y,
    mod=lambda x, y: x % y,
)
NUMPY = SimpleNamespace(
    **{name: getattr(np, name) for name in "tanh exp exp2 log log2 sqrt abs minimum maximum where cos sin".split()},
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    to_float=lambda x: np.asarray(x, np.float64),
    to_int=lambda x: np.trunc(x).astype(np.int64),
    cast=lambda x, dtype: np.trunc(x).astype(np.int64) if dtype == "int32" else np.asarray(x, np.float64),
    constant=lambda x: np.float64(np.float32(x)) if isinstance(x, float) else np.int64(x),
    floordiv=lambda x, y: x // np.maximum(y, 1),
    mod=lambda x, y: x % np.maximum(y, 1),
)
INTS = ("batch", "qo_head", "kv_head", "q_pos", "kv_pos", "q_len", "kv_len", "channel", "n")
HOLES = ("logits", "mask", "output", "query", "key")
ROWS, COLUMNS = 5, 7  # of the tables `weights` and `marks`


def of(g: Callable[..., Any], *operands: Callable[[], Make]) -> Callable[[], Make]:
    """Makes g(namespace of functions, operands)."""

    def make() -> Make:
        xs = [operand() for operand in operands]
        return lambda e: g(e.f, *(x(e) for x in xs))

    return make


class Generator:
    """Makes functions of an environment: `f` is the namespace of functions, the other attributes are variables and parameters."""

    def __init__(self, seed: int, hole: str) -> None:
        self.random = random.Random(seed)
        self.hole = hole

    def name(self, name: str) -> Make:
        return lambda e: getattr(e, name)

    def make(self, kind: str, depth: int) -> Make:
        if depth == 0:
            return self.random.choice(self.leaves(kind))()
        x, y, z = (lambda kind=kind: self.make(kind, depth - 1) for kind in "fib")
        operations = {"f": self.floats, "i": self.ints, "b": self.bools}[kind](x, y, z)
        return self.random.choice(operations)()

    def leaves(self, kind: str) -> list[Callable[[], Make]]:
        r = self.random
        known = {*VARIABLES[self.hole], "n", "a", "half"} | ({"slope", "flag"} if self.hole != "key" else set())
        ints = [n for n in INTS if n in known]
        floats = [n for n in ("value", "a", "slope", "half", "lse") if n in known]
        computed = [n for n in ("mean_square",) if n in known]

        def constant(x: Any) -> Make:
            return lambda e: e.f.constant(x)

        def load(table: str) -> Make:
            i, j = self.name(r.choice(ints)), self.name(r.choice(ints))
            read = self.name(table)
            return lambda e: read(e)[i(e) % ROWS, j(e) % COLUMNS]

        if kind == "f":
            return [
                *[lambda: self.name(r.choice(floats + computed))] * 3,
                lambda: constant(round(r.uniform(-2, 2), 3)),
                lambda: load("weights"),
            ]
        if kind == "i":
            return [
                *[lambda: self.name(r.choice(ints))] * 3,
                lambda: constant(r.randint(-9, 9)),
                lambda: load("marks"),
            ]
        # of floats that were not computed: no rounding decides
        x, y = self.name(r.choice(floats)), self.name(r.choice(floats))
        flags = [lambda: self.name("flag")] if "flag" in known else []
        return [lambda: lambda e: x(e) < y(e), lambda: lambda e: x(e) >= 0.5, *flags]

    def floats(self, f: Any, i: Any, b: Any) -> list[Callable[[], Make]]:
        return [
            *[of(lambda n, x, y: x + y, f, f), of(lambda n, x, y: x - y, f, f), of(lambda n, x, y: x * y, f, f)] * 2,
            of(lambda n, x, y: x / (n.abs(y) + 1), f, f),
            of(lambda n, x, y: x * y, f, i),
            of(lambda n, x, y: y - x, f, i),
            of(lambda n, x, y: x / n.maximum(y, 1), i, i),
            of(lambda n, x, y: n.minimum(x, y), f, f),
            of(lambda n, x, y: n.maximum(x, y), i, f),
            of(lambda n, c, x, y: n.where(c, x, y), b, f, f),
            of(lambda n, c, x: n.where(c, x, 1.5), b, f),
            of(lambda n, c: n.to_float(c), b),
            of(lambda n, x: n.cast(x, "float32"), i),
            *[
                of(g, f)
                for g in (
                    lambda n, x: -x,
                    lambda n, x: abs(x),
                    lambda n, x: x**2,
                    lambda n, x: 2 - x,
                    lambda n, x: n.tanh(x),
                    lambda n, x: n.exp(n.minimum(x, 3)),
                    lambda n, x: n.exp2(n.tanh(x)),
                    lambda n, x: n.log(n.abs(x) + 1),
                    lambda n, x: n.log2(abs(x) + 0.5),
                    lambda n, x: n.sqrt(abs(x) + 0.01),
                    lambda n, x: n.sigmoid(x),
                    lambda n, x: n.cos(3 * n.tanh(x)),
                    lambda n, x: n.sin(n.tanh(x) - 1),
                )
            ],
        ]

    def ints(self, f: Any, i: Any, b: Any) -> list[Callable[[], Make]]:
        def leaf() -> Make:
            return self.random.choice(self.leaves("f")[:3])()

        return [
            *[of(lambda n, x, y: x + y, i, i), of(lambda n, x, y: x - y, i, i)] * 2,
            of(lambda n, x, y: (x % 97) * (y % 89), i, i),
            of(lambda n, x, y: n.floordiv(x, y | 1), i, i),
            of(lambda n, x, y: n.mod(x, y | 1), i, i),
            of(lambda n, x: x // 3, i),
            of(lambda n, x: -x % 8, i),
            of(lambda n, x, y: n.minimum(x, y), i, i),
            of(lambda n, x, y: n.maximum(x, y), i, i),
            of(lambda n, x: abs(x), i),
            of(lambda n, x, y: x & y, i, i),
            of(lambda n, x, y: x | y, i, i),
            of(lambda n, x, y: x ^ y, i, i),
            of(lambda n, x: ~x, i),
            of(lambda n, x, y: x << (y & 3), i, i),
            of(lambda n, x, y: x >> (y & 31), i, i),
            of(lambda n, c, x, y: n.where(c, x, y), b, i, i),
            of(lambda n, x: n.to_int(x), leaf),
            of(lambda n, c: n.cast(n.where(c, 1, 0), "int32"), b),
        ]

    def bools(self, f: Any, i: Any, b: Any) -> list[Callable[[], Make]]:
        return [
            *[of(g, i, i) for g in (
                lambda n, x, y: x == y, lambda n, x, y: x != y, lambda n, x, y: x < y,
                lambda n, x, y: x <= y, lambda n, x, y: x > y, lambda n, x, y: x >= y,
            )],
            *[of(g, b, b) for g in (lambda n, x, y: x & y, lambda n, x, y: x | y, lambda n, x, y: x ^ y, lambda n, x, y: x == y)],
            of(lambda n, x: ~x, b),
            of(lambda n, x: n.to_float(x) < 0.5, b),
            of(lambda n, x, y: n.to_float(x) + n.to_float(y) <= 1.0, b, b),
            of(lambda n, c, x, y: n.where(c, x, y), b, b, b),
            *self.leaves("b"),
        ]  # fmt: skip

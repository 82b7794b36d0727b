"""rope_append on the CPU executor against float64: every scaling, pairs of both kinds, partial rotation, views, padding, poison."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import tvm_infer
from tvm_infer import RopeConfig, _ffi, errors
from tvm_infer.testing import rope_reference
from tvm_infer.testing.batches import numpy_dtype

# half of the distance between neighbours, relative; and what float32 arithmetic adds
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT_ERROR = 1.5e-6
QO, KV = (1, 5, 0, 3, 1), (37, 5, 11, 20, 1)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclasses.dataclass
class Case:
    """A batch whose q, k and v are slices of one tensor [num_tokens + padding, hq + 2 * hkv + 1, head_dim]."""

    rope: RopeConfig
    dtype: str = "float32"
    heads: tuple[int, int] = (6, 2)
    head_dim: int = 64
    page_size: int = 5
    layout: str = "HND"
    padding: int = 0
    qo: tuple[int, ...] = QO
    kv: tuple[int, ...] = KV
    seed: int = 0

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        kind = numpy_dtype(self.dtype)
        hq, hkv = self.heads
        self.qo_indptr = np.cumsum((0, *self.qo)).astype(np.int32)
        self.kv_len = np.asarray(self.kv, np.int32)
        self.num_tokens = int(self.qo_indptr[-1])
        rows = self.num_tokens + self.padding
        self.qkv = rng.standard_normal((rows, hq + 2 * hkv + 1, self.head_dim)).astype(kind)
        self.qkv[:, -1] = np.nan  # no head
        self.qkv[self.num_tokens :] = np.nan
        self.q, self.k, self.v = self.qkv[:, :hq], self.qkv[:, hq : hq + hkv], self.qkv[:, hq + hkv : hq + 2 * hkv]
        counts = -(-self.kv_len // self.page_size) + 1  # one page more than needed
        self.kv_page_indptr = np.cumsum((0, *counts)).astype(np.int32)
        num_pages = int(self.kv_page_indptr[-1])
        self.kv_page_indices = rng.permutation(num_pages).astype(np.int32)
        shape = (hkv, self.page_size) if self.layout == "HND" else (self.page_size, hkv)
        self.cache = np.full((num_pages, 2, *shape, self.head_dim), np.nan).astype(kind)
        self.out_memory = np.full((rows, hq + 2, self.head_dim), 7.0).astype(kind)
        self.out = self.out_memory[:, 1:-1]

    @property
    def tables(self) -> dict:
        return {"kv_page_indptr": self.kv_page_indptr, "kv_page_indices": self.kv_page_indices}

    @property
    def lengths(self) -> dict:
        return {"qo_indptr": self.qo_indptr, "kv_len": self.kv_len}

    @property
    def positions(self) -> np.ndarray:
        runs = zip(self.qo, self.kv, strict=True)
        return np.concatenate([np.arange(length - n, length) for n, length in runs] or [np.zeros(0)]).astype(np.int64)

    def slots(self) -> tuple[np.ndarray, np.ndarray]:
        """(page, slot) of each token."""
        request = np.repeat(np.arange(len(self.qo)), self.qo)
        entry = self.kv_page_indptr[request] + self.positions // self.page_size
        return self.kv_page_indices[entry], self.positions % self.page_size

    def planes(self, cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K and V as views [num_pages, num_kv_heads, page_size, head_dim]."""
        views = cache[:, 0], cache[:, 1]
        return views if self.layout == "HND" else tuple(x.transpose(0, 2, 1, 3) for x in views)

    def run(self, **changes) -> np.ndarray:
        arguments = {"rope": self.rope, "kv_layout": self.layout, "out": self.out, **self.lengths, **self.tables}
        return tvm_infer.rope_append(self.q, self.k, self.v, self.cache, **{**arguments, **changes})

    def check(self, before: np.ndarray, inv_freq: np.ndarray | None = None) -> None:
        """Q, the new slots, and every other bit."""
        inv_freq = self.rope.inv_freq() if inv_freq is None else inv_freq
        style = {"interleaved": self.rope.interleaved, "magnitude": self.rope.magnitude()}
        n = self.num_tokens
        inputs = {"q": self.q, "k": self.k, "v": self.v}
        q, k = (rope_reference(inputs[x][:n], self.positions, inv_freq, **style) for x in "qk")
        self.assert_close(self.out[:n], q)
        assert not self.out[n:].astype(np.float32).any()
        np.testing.assert_array_equal(self.out_memory[:, [0, -1]].astype(np.float32), 7.0)
        expected = before.copy()
        page, slot = self.slots()
        got_k, _ = self.planes(self.cache)
        self.assert_close(got_k[page, :, slot], k)
        for plane, values in zip(self.planes(expected), (got_k[page, :, slot], self.v[:n]), strict=True):
            plane[page, :, slot] = values
        np.testing.assert_array_equal(raw(self.cache), raw(expected))
        passing = 2 * len(inv_freq)  # not rotated: not even rounded
        np.testing.assert_array_equal(raw(self.out[:n, :, passing:]), raw(self.q[:n, :, passing:]))
        np.testing.assert_array_equal(raw(got_k[page, :, slot][..., passing:]), raw(self.k[:n, :, passing:]))

    def assert_close(self, got: np.ndarray, exact: np.ndarray) -> None:
        assert got.shape == exact.shape
        error = np.abs(got.astype(np.float64) - exact)
        smallest = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0}[self.dtype]
        limit = ROUNDING[self.dtype] * np.abs(exact) * 1.01 + smallest + FLOAT_ERROR * np.abs(self.magnitude_of_heads())
        assert (error <= limit).all(), f"{(error - limit).max()} beyond {limit.max()}"

    def magnitude_of_heads(self) -> float:
        """Elements are about 1, 5 at most."""
        return max(1.0, self.rope.magnitude())


def raw(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.itemsize])


CASES = {
    "plain": Case(RopeConfig(64)),
    "bf16": Case(RopeConfig(64, 500000.0, scaling=LLAMA3), "bfloat16"),
    "fp16": Case(RopeConfig(64, scale=0.25), "float16", layout="NHD"),
    "interleaved": Case(RopeConfig(64, interleaved=True), layout="NHD"),
    "interleaved bf16": Case(RopeConfig(64, interleaved=True), "bfloat16", padding=3),
    "partial": Case(RopeConfig(20), head_dim=80, heads=(4, 4)),
    "partial fp16": Case(RopeConfig(32), "float16", head_dim=96),
    "partial interleaved": Case(RopeConfig(6, interleaved=True), "bfloat16", head_dim=40),
    "one pair": Case(RopeConfig(2), head_dim=8, heads=(1, 1)),
    "wide": Case(RopeConfig(256), "bfloat16", head_dim=256, heads=(3, 1), page_size=16),
    "padding": Case(RopeConfig(64), padding=9),
    "none": Case(RopeConfig(0), "bfloat16", padding=2),
    "linear": Case(RopeConfig(64, scaling={"rope_type": "linear", "factor": 4.0}), page_size=1),
    "yarn": Case(
        RopeConfig(64, scaling={"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}),
        "float16",
    ),
    "prompts": Case(RopeConfig(128), "bfloat16", head_dim=128, qo=(300, 0, 41), kv=(300, 9, 1041), page_size=16),
    "odd": Case(RopeConfig(24), heads=(71, 1), head_dim=24, page_size=3, padding=1),
}


@pytest.mark.parametrize("by", ["lengths", "plan"])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, by):
    case = dataclasses.replace(CASES[name])
    before = case.cache.copy()
    changes = {}
    if by == "plan":
        hq, hkv = case.heads
        shape = {"num_qo_heads": hq, "num_kv_heads": hkv, "head_dim": case.head_dim, "num_ctas": 3}
        changes = {"plan": tvm_infer.plan(case.qo_indptr, case.kv_len, **shape), "qo_indptr": None, "kv_len": None}
    assert case.run(**changes) is case.out
    case.check(before)


def test_longrope_takes_its_frequencies():
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": [1.0 + i for i in range(32)],
        "original_max_position_embeddings": 16,
        "factor": 8.0,
    }
    case = Case(RopeConfig(64, scaling=scaling))
    before = case.cache.copy()
    with pytest.raises(errors.ArgumentError, match=r"longrope.*inv_freq=rope.inv_freq\(seq_len\)"):
        case.run()
    inv_freq = case.rope.inv_freq(37)
    assert case.rope.magnitude() > 1.3 and inv_freq[1] < case.rope.inv_freq(16)[1]
    case.run(inv_freq=inv_freq)
    case.check(before, inv_freq)


@pytest.mark.parametrize("position", [4095, 131071, 1_000_003])
@pytest.mark.parametrize("interleaved", [False, True])
def test_angles_are_exact_far_out(position, interleaved):
    """A float32 product would be off by 0.004 at 131072."""
    page = 4096
    case = Case(RopeConfig(128, interleaved=interleaved), head_dim=128, qo=(3,), kv=(3,), page_size=page)
    case.kv_len = np.asarray([position + 2], np.int32)
    pages = -(-int(case.kv_len[0]) // page)
    last = int(case.kv_len[0] - 3) // page
    table = np.zeros(pages, np.int32)
    table[last:] = 1  # the pages before are never touched
    case.kv_page_indptr, case.kv_page_indices = np.asarray([0, pages], np.int32), table
    case.run()
    positions = np.arange(position - 1, position + 2)
    for got, x in ((case.out, case.q), (case.cache[1, 0].transpose(1, 0, 2)[positions % page], case.k)):
        exact = rope_reference(x, positions, case.rope.inv_freq(), interleaved=interleaved)
        assert np.abs(got - exact).max() < 3e-6
    assert np.isnan(case.cache[0]).all()


def test_in_place_and_the_default_output():
    case = CASES["interleaved"]
    case = dataclasses.replace(case)
    expected = case.run(out=None)
    assert expected.shape == case.q.shape and expected is not case.q
    np.testing.assert_array_equal(case.run(), expected)
    assert case.run(out=case.q) is case.q
    np.testing.assert_array_equal(case.q, expected)


def test_results_do_not_depend_on_the_batch():
    """A token alone is rotated as it is among others, to the last bit."""
    case = dataclasses.replace(CASES["prompts"])
    out = case.run().copy()
    alone = dataclasses.replace(case, qo=(1, 0, 0), kv=(300, 9, 1000))
    alone.q, alone.k, alone.v = (x[case.qo[0] - 1 : case.qo[0]] for x in (case.q, case.k, case.v))
    np.testing.assert_array_equal(raw(alone.run(out=None)), raw(out[case.qo[0] - 1 : case.qo[0]]))


@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (5, 0))], ids=["no requests", "idle"])
@pytest.mark.parametrize("padding", [0, 4])
def test_nothing_new(lengths, padding):
    case = Case(RopeConfig(64), qo=lengths[0], kv=lengths[1], padding=padding)
    before = case.cache.copy()
    case.run()
    case.check(before)


@pytest.mark.parametrize("kind", ["torch", "tvm"])
def test_other_kinds_of_array(kind):
    case = dataclasses.replace(CASES["plain"])
    expected = case.run(out=None)
    if kind == "torch":
        torch = pytest.importorskip("torch")
        to = torch.from_numpy
    else:
        to = pytest.importorskip("tvm").runtime.tensor
    tensors = [to(np.ascontiguousarray(x)) for x in (case.q, case.k, case.v)]
    cache = to(np.full_like(case.cache, np.nan))
    out = tvm_infer.rope_append(*tensors, cache, rope=case.rope, **case.lengths, **case.tables)
    assert type(out) is type(tensors[0])
    np.testing.assert_array_equal(out.numpy(), expected)
    np.testing.assert_array_equal(raw(cache.numpy()), raw(case.cache))


ERRORS = [
    ("rope", errors.ArgumentError, "`rope` is a dict", lambda c: {"rope": {}}),
    (
        "both",
        errors.ArgumentError,
        "`plan`, `qo_indptr`, `kv_len` are given, given, given",
        lambda c: {"plan": plan(c)},
    ),
    ("neither", errors.ArgumentError, "are None, given, None; pass either", lambda c: {"kv_len": None}),
    ("too wide", errors.ArgumentError, "`inv_freq` has 33 entries.*66.*64", lambda c: {"rope": RopeConfig(66)}),
    (
        "inv_freq dtype",
        errors.DTypeError,
        "`inv_freq` has dtype float64",
        lambda c: {"inv_freq": c.rope.inv_freq().astype(np.float64)},
    ),
    (
        "inv_freq strided",
        errors.ArgumentError,
        "`inv_freq`.*not contiguous",
        lambda c: {"inv_freq": np.ones(32, np.float32)[::2]},
    ),
    ("inv_freq rank", errors.ArgumentError, "`inv_freq` has rank 2", lambda c: {"inv_freq": np.ones((1, 9), "f")}),
    ("out shape", errors.ArgumentError, "`q_out`.*dimension 0", lambda c: {"out": c.out[1:]}),
    ("out dtype", errors.DTypeError, "`q_out` has dtype float16", lambda c: {"out": c.out.astype(np.float16)}),
    (
        "out stride",
        errors.ArgumentError,
        "`q_out` has stride 2",
        lambda c: {"out": np.zeros((*c.q.shape[:2], 128), "f")[..., ::2]},
    ),
    ("layout", errors.ArgumentError, "`kv_layout` is 'DHN'", lambda c: {"kv_layout": "DHN"}),
    (
        "lengths",
        errors.ArgumentError,
        "`kv_len` is 4 for request 1.*at least 5",
        lambda c: {"kv_len": np.asarray([37, 4, 11, 20, 1], np.int32)},
    ),
    (
        "too many tokens",
        errors.ArgumentError,
        "`q` has shape .10, 6, 64.; qo_indptr names 11",
        lambda c: {"qo_indptr": np.asarray([0, 1, 6, 6, 10, 11], np.int32), "kv_len": np.asarray(KV, np.int32) + 9},
    ),
    (
        "pages",
        errors.PlanMismatchError,
        "`kv_page_indptr` has 5 entries; 5 requests need 6",
        lambda c: {"kv_page_indptr": c.kv_page_indptr[:-1]},
    ),
    (
        "another plan",
        errors.PlanMismatchError,
        "`q` has 10 tokens.*11",
        lambda c: {"plan": plan(c, (11,)), **NO_LENGTHS},
    ),
]
NO_LENGTHS = {"qo_indptr": None, "kv_len": None}


def plan(case, qo=QO):
    kv = KV if qo == QO else qo
    hq, hkv = case.heads
    return tvm_infer.plan(
        np.cumsum((0, *qo)).astype(np.int32), list(kv), num_qo_heads=hq, num_kv_heads=hkv, head_dim=64, num_ctas=2
    )


@pytest.mark.parametrize(("kind", "words", "changes"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_bad_arguments_change_nothing(kind, words, changes):
    case = Case(RopeConfig(64))
    before = raw(case.cache).copy(), raw(case.out_memory).copy()
    with pytest.raises(kind, match=words):
        case.run(**changes(case))
    assert (raw(case.cache) == before[0]).all() and (raw(case.out_memory) == before[1]).all()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("q", lambda c: c.q[:, :, :32], "`q` has head_dim 32, `k_cache` has 64"),
        ("q", lambda c: c.q[1:], "`k`.*dimension 0 must be 9"),
        ("k", lambda c: c.k[:, :1], "`k`.*num_kv_heads of the cache"),
        ("v", lambda c: c.v[:-1], "`v`.*dimension 0 must be 10"),
        ("q", lambda c: c.q[0], "`q` has shape"),
    ],
)
def test_bad_tokens(place, value, words):
    case = Case(RopeConfig(64))
    setattr(case, place, value(case))
    with pytest.raises(errors.ArgumentError, match=words):
        case.run(out=None)


@pytest.mark.parametrize(
    ("interleaved", "magnitude", "words"),
    [(2, 1.0, "`interleaved` is 2"), (0, float("nan"), "`magnitude` is "), (0, float("inf"), "`magnitude` is inf")],
)
def test_what_only_the_packed_function_can_be_told(interleaved, magnitude, words):
    case = Case(RopeConfig(64))
    with pytest.raises(errors.ArgumentError, match=words):
        _ffi.func("rope_append_paged")(
            *(np.ascontiguousarray(x) for x in (case.q, case.k, case.v)),
            case.rope.inv_freq(),
            interleaved,
            magnitude,
            None,
            case.qo_indptr,
            case.kv_len,
            case.cache,
            None,
            0,
            case.kv_page_indptr,
            case.kv_page_indices,
            np.zeros(case.q.shape, np.float32),
        )

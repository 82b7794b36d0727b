"""Tables too short for the batch are a typed error before anything runs, as far as the host knows lengths; others are left alone."""

from __future__ import annotations

import numpy as np
import pytest

import tvm_infer
from tvm_infer import PagedKVCache, variant
from tvm_infer.errors import VariantError
from tvm_infer.variant import table_bounds

HEADS = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 64}
QO, KV = [0, 3, 3, 5], [20, 7, 40]  # request 1 has no queries
CUSTOM_BITS, TREE_BITS = 3 * 20 + 2 * 40, 3 * 3 + 2 * 2
BIAS = (8, 3, 40)


def custom(num_bits=CUSTOM_BITS, first=(0, 0, 60), base=variant.custom_mask):
    bits = np.full(-(-num_bits // 8), 255, np.uint8)
    return base.bind(bits=bits, first_bit=np.array(first, np.int32))


def tree(num_bits=TREE_BITS, first=(0, 0, 9)):
    return custom(num_bits, first, variant.tree_mask)


def bias(shape=BIAS):
    return variant.logit_bias.bind(bias=np.zeros(shape, np.float32))


RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((5, heads, 64)).astype(np.float32) for heads in (8, 2, 2))
CACHE = RNG.standard_normal((8, 2, 2, 16, 64)).astype(np.float32)
TABLES = {"kv_page_indptr": np.array([0, 2, 3, 6], np.int32), "kv_page_indices": np.arange(6, dtype=np.int32)}


def plan_for(bound):
    return tvm_infer.plan(QO, KV, **HEADS, variant=bound)


def attention(bound):
    return tvm_infer.attention(Q, CACHE, plan_for(bound), **TABLES, variant=bound)


def append_attention(bound):
    return tvm_infer.append_attention(Q, K, V, CACHE.copy(), plan_for(bound), **TABLES, variant=bound)


def ragged_attention(bound):
    k = np.zeros((sum(KV), 2, 64), np.float32)
    indptr = np.cumsum([0, *KV]).astype(np.int32)
    return tvm_infer.ragged_attention(Q, k, k, plan_for(bound), kv_indptr=indptr, variant=bound)


def cached(bound):
    cache = PagedKVCache(**HEADS, num_layers=2, num_pages=16, page_size=16, max_batch=3, max_tokens=64)
    lengths = np.diff(QO)
    for i, (n, m) in enumerate(zip(lengths, KV, strict=True)):
        cache.add_sequence(i)
        with cache.forward([i], [m - n]) as step:
            rows = np.zeros((m - n, 8, 64), np.float32)
            step.attention(1, rows, rows[:, :2], rows[:, :2])
    cache.set_variant(bound, layers=[1])
    with cache.forward([0, 1, 2], lengths, causal=bound.band.causal) as step:
        step.attention(0, Q, K, V)  # of a layer that has none
        return step.attention(1, Q, K, V)


CALLS = [attention, append_attention, ragged_attention, cached]
FIT = [custom(), tree(), bias()]
REFUSED = [
    (custom(CUSTOM_BITS - 8), "`bits` has 17 elements in dimension 0, and request 2, of 2 queries and 40 keys, reads number 17"),
    (custom(first=(0, 0, 68)), "request 2, of 2 queries and 40 keys, reads number 18 at its last query and key"),
    (custom(first=(-60, 0, 0)), "request 0, of 3 queries and 20 keys, reads number -1"),
    (tree(8, (0, 0, 4)), "tree_mask: parameter `bits` has 1 elements in dimension 0, and request 0, of 3 queries and 20 keys"),
    (tree(first=(0, 0, 13)), "request 2, of 2 queries and 40 keys, reads number 2"),
    (bias((8, 3, 39)), "`bias` has 39 elements in dimension 2, and request 2, of 2 queries and 40 keys, reads number 39"),
    (bias((8, 2, 40)), "`bias` has 2 elements in dimension 1, and request 0, of 3 queries and 20 keys, reads number 2"),
    (bias((7, 3, 40)), "`bias` has 7 elements in dimension 0, and request 0, of 3 queries and 20 keys, reads number 7"),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", range(len(FIT)))
def test_tables_that_just_fit(call, number):
    assert np.isfinite(np.asarray(call(FIT[number]))).all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_tables_that_are_too_short(call, number):
    bound, message = REFUSED[number]
    with pytest.raises(VariantError, match=message.replace("(", r"\(")):
        call(bound)


def test_masks_that_are_combined():
    both = variant.soft_cap & variant.custom_mask
    for first, fits in ((60, True), (68, False)):
        bits = np.full(18, 255, np.uint8)
        bound = both.bind(cap=5.0, bits=bits, first_bit=np.array([0, 0, first], np.int32))
        if fits:
            attention(bound)
        else:
            with pytest.raises(VariantError, match="`bits` has 18 elements"):
                attention(bound)


def test_elements_that_are_not_read():
    """Behind a condition that hides them from the last key, or that is not known."""
    short = np.zeros(4, np.float32)
    tables = {"t": variant.tensor(1)}
    for logits in (
        lambda value, kv_pos, t: value + variant.where(kv_pos < 4, t[kv_pos], 0.0),
        lambda value, kv_pos, t: variant.where(value > 1e30, t[kv_pos], value),
    ):
        attention(variant.Variant("guarded", logits=logits, **tables).bind(t=short))
    masked = variant.Variant(
        "masked", logits=lambda value, kv_pos, t: value + t[kv_pos], mask=lambda kv_pos: kv_pos < 4, **tables
    )
    attention(masked.bind(t=short))
    unguarded = variant.Variant("unguarded", logits=lambda value, kv_pos, t: value + t[kv_pos], **tables)
    with pytest.raises(VariantError, match="`t` has 4 elements in dimension 0, and request 0"):
        attention(unguarded.bind(t=short))


def test_once_a_plan(monkeypatch):
    """Layers that share a plan do not pay again; another plan is looked at."""
    bound, seen = custom(), []
    check = table_bounds.check
    monkeypatch.setattr(table_bounds, "check", lambda *arguments: (seen.append(1), check(*arguments)))
    plan = plan_for(bound)
    for _ in range(3):
        tvm_infer.attention(Q, CACHE, plan, **TABLES, variant=bound)
    assert len(seen) == 1
    attention(bound)
    assert len(seen) == 2
    cap = variant.soft_cap.bind(cap=3.0)
    attention(cap)  # no table that lengths decide on
    assert len(seen) == 2


def test_once_a_step(monkeypatch):
    """Layers of a cache share the step's plan; tables may have changed by the next step, though its lengths be the same."""
    first = np.array([0, 0, 60], np.int32)
    bound, seen = variant.custom_mask.bind(bits=np.full(18, 255, np.uint8), first_bit=first), []
    check = table_bounds.check
    monkeypatch.setattr(table_bounds, "check", lambda *arguments: (seen.append(1), check(*arguments)))
    cache = PagedKVCache(**HEADS, num_layers=3, num_pages=16, page_size=16, max_batch=3, max_tokens=80)
    cache.set_variant(bound)
    for i in range(3):
        cache.add_sequence(i)
    causal = bound.band.causal

    def run(on, layers=(0, 1, 2), lengths=KV):
        rows = np.zeros((sum(lengths), 8, 64), np.float32)
        for layer in layers:
            on.attention(layer, rows, rows[:, :2], rows[:, :2], causal=causal)

    small = [3, 0, 4]
    for begin in (cache.begin_forward, cache.begin_step):
        seen.clear()
        begin([0, 1, 2], small, causal=causal)
        run(cache, lengths=small)
        assert len(seen) == 1
        cache.cancel_forward()
        begin([0, 1, 2], small, causal=causal)  # as before, but for the tables
        first[2] = 144
        with pytest.raises(VariantError, match="`bits` has 18 elements"):
            run(cache, lengths=small)
        first[2] = 60
        run(cache, lengths=small)
        assert len(seen) == 3
        cache.cancel_forward()
    with cache.forward([0, 1, 2], small, causal=causal):
        run(cache, lengths=small)
    assert len(seen) == 4
    # steps that another wrapper of the cache ends and begins, of other lengths
    cache.begin_forward([0], [1], causal=causal)
    run(cache, (0,), [1])
    other = PagedKVCache.from_handle(cache.__tvm_ffi_object__())
    other.cancel_forward()
    other.begin_forward([0], [2], causal=causal)
    seen.clear()
    run(cache, lengths=[2])
    assert len(seen) == 1


def on_device(monkeypatch, bound):
    """Its tables are said to lie on a device, where the host knows nothing but their shapes."""
    monkeypatch.setattr(table_bounds._device, "cuda_index", lambda table: 0)
    table_bounds.check(bound, np.diff(QO), np.array(KV), 8, 2)


@pytest.mark.parametrize(
    ("bound", "fits"),
    [
        (custom(80, (0, 0, 0)), True),  # matrices may overlap: what the largest alone needs
        (custom(72, (0, 0, 0)), False),
        (custom(CUSTOM_BITS, (0, 0, 10**6)), True),  # not known before the launch
        (tree(9), True),
        (tree(8), False),
        (bias(), True),
        (bias((8, 3, 39)), False),
    ],
)
def test_tables_on_a_device(monkeypatch, bound, fits):
    if fits:
        on_device(monkeypatch, bound)
    else:
        with pytest.raises(VariantError, match="at its last query and key"):
            on_device(monkeypatch, bound)


def test_first_elements_of_other_tables_are_not_guessed(monkeypatch):
    own = variant.Variant(
        "own", logits=lambda value, kv_pos, t, start: value + t[kv_pos - start], t=variant.tensor(1), start=variant.per_request("int32")
    )  # fmt: skip
    on_device(monkeypatch, own.bind(t=np.zeros(4, np.float32), start=np.full(3, 36, np.int32)))


def test_an_empty_batch():
    bound = custom(8)
    plan = tvm_infer.plan([0], [], **HEADS, variant=bound)
    empty = {"kv_page_indptr": np.zeros(1, np.int32), "kv_page_indices": np.zeros(0, np.int32)}
    assert tvm_infer.attention(Q[:0], CACHE, plan, **empty, variant=bound).shape == (0, 8, 64)

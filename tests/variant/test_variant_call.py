"""Variants at the packed functions and in plans: what is refused and how, what is made once."""

from __future__ import annotations

import copy
import pathlib
import pickle
import sys

import numpy as np
import pytest

import tvm_infer
from tvm_infer import _ffi, errors, variant_call
from tvm_infer.schedule import Band
from tvm_infer.testing import make_paged_batch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "cuda"))
import cpu_variants
import fake_tensors
import variant_cases as cases
from cpu_variants import KINDS, bind

HEADS = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64}
DIGEST = "0" * 16


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Digests whose CPU functions were asked for."""
    digests = []
    monkeypatch.setitem(sys.modules, "tvm_infer.variant", cpu_variants.package(digests))
    cpu_variants.library()
    return digests


@pytest.fixture
def batch():
    return make_paged_batch([1, 9], [70, 40], **HEADS)


def call(digest=DIGEST, functions=None, scalars=(), tables=()):
    functions = cpu_variants.address(digest) if functions is None else functions
    return _ffi.func("variant_call")(digest, functions, list(scalars), list(tables))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"digest": "0" * 15, "functions": 0}, r'`digest` is "0{15}"; it must be 16 hexadecimal digits'),
        ({"digest": "../../etc/passwd", "functions": 0}, "`digest` is .* 16 hexadecimal digits"),
        ({"scalars": [0] * 17}, "`scalars` has 17 entries; a variant has at most 16 scalars.*into a table"),
        ({"scalars": [0, 2**32]}, r"`scalars` holds 4294967296 at entry 1; .* from -2\^31 to 2\^32 - 1"),
        ({"scalars": [-(2**31) - 1]}, "`scalars` holds -2147483649 at entry 0"),
        ({"tables": [np.zeros(1, np.float32)] * 9}, "`tables` has 9 entries; a variant has at most 8 tables"),
        (
            {"tables": [np.zeros(1), np.zeros((1, 2, 1, 1, 1))]},
            r"`tables\[1\]` has rank 5, shape \[1, 2, 1, 1, 1\].*rank 4",
        ),
    ],
)
def test_wrong_parameters(arguments, message):
    with pytest.raises(errors.ArgumentError, match=message):
        call(**arguments)


def test_limits_themselves_are_taken():
    big = np.lib.stride_tricks.as_strided(np.zeros(4, np.uint8), (2, 2), (2**31 - 1, 1))
    one = np.lib.stride_tricks.as_strided(
        np.zeros(16, np.uint8), (1, 2, 2), (2**40, 8, 1)
    )  # an axis nobody steps along
    call(scalars=[-(2**31), 2**32 - 1] + [0] * 14, tables=[big, one, np.zeros(()), *[np.zeros((1, 2, 3, 4))] * 5])


def test_strides_that_do_not_fit():
    wide = np.lib.stride_tricks.as_strided(np.zeros(4, np.uint8), (2, 2), (2**31, 1))
    with pytest.raises(
        errors.ArgumentError, match=r"`tables\[0\]`, shape \[2, 2\], has stride 2147483648 in dimension 0"
    ):
        call(tables=[wide])


def test_another_abi():
    functions = cpu_variants.address("00000000000000ff")
    with pytest.raises(
        errors.AbiError, match=r"compiled for variant ABI 43, this tvm_infer has variant ABI 2\..* again"
    ):
        call(functions=functions)


def test_tables_on_two_devices():
    with pytest.raises(errors.ArgumentError, match=r"`tables\[1\]` is on cuda:0, `tables\[0\]` on cpu"):
        call(functions=0, tables=[np.zeros(2), fake_tensors.tensor((2,), "float32")])
    with pytest.raises(errors.ArgumentError, match=r"`tables\[1\]` is on cuda:1, `tables\[0\]` on cuda:0"):
        call(functions=0, tables=[fake_tensors.tensor((2,), "float32", device=(fake_tensors.CUDA, i)) for i in (0, 1)])
    with pytest.raises(errors.ExecutorError, match=r"`tables\[0\]` is on .*no executor"):
        call(functions=0, tables=[fake_tensors.tensor((2,), "float32", device=(fake_tensors.ROCM, 0))])
    call(tables=[np.zeros(2), fake_tensors.tensor((2,), "float32", device=(fake_tensors.PINNED, 0))])


def attend(name, q, variant, make):
    """One of the packed functions, with tensors of `make`, which nobody should come to look at."""
    plan, cache, new = make((64,), "int32"), make((4, 2, 2, 16, 64)), make((3, 2, 64))
    indptr, workspace, out = make((2,), "int32"), make((0,), "float32"), make((3, 4, 64))
    paged = (cache, None, 0, indptr, indptr, 0.125, workspace, out, None, variant)
    return {
        "variant_paged_attention": lambda f: f(plan, q, *paged),
        "variant_append_attention": lambda f: f(plan, q, new, new, *paged),
        "variant_ragged_attention": lambda f: f(plan, q, new, new, indptr, 0.125, workspace, out, None, variant),
    }[name](_ffi.func(name))


@pytest.mark.parametrize("name", ["variant_paged_attention", "variant_ragged_attention", "variant_append_attention"])
def test_the_variant_must_be_where_q_is(name):
    def on_host(shape, dtype="bfloat16"):
        return fake_tensors.tensor(shape, dtype, device=(fake_tensors.CPU, 0))

    on_card, slopes = fake_tensors.tensor, fake_tensors.tensor((4,), "float32")
    with pytest.raises(errors.ArgumentError, match="`variant` has tables on cuda:0, `q` is on cpu"):
        attend(name, on_host((3, 4, 64)), call(tables=[slopes]), on_host)
    with pytest.raises(errors.ArgumentError, match="`variant` has tables on cpu, `q` is on cuda:0"):
        attend(name, on_card((3, 4, 64)), call(tables=[on_host((4,), "float32")]), on_card)
    with pytest.raises(errors.ArgumentError, match="`variant` has tables on cuda:0, `q` is on cuda:1"):
        attend(name, on_card((3, 4, 64), device=(fake_tensors.CUDA, 1)), call(tables=[slopes]), on_card)
    with pytest.raises(errors.ArgumentError, match="the variant was bound for cuda, and `q` is on cpu"):
        attend(name, on_host((3, 4, 64)), call(functions=0), on_host)
    with pytest.raises(errors.PlanMismatchError):  # past the variant, at the plan
        attend(name, on_host((3, 4, 64)), call(), on_host)


def test_a_refused_append_has_written_nothing(batch):
    cache = batch.kv_cache.copy()
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, **HEADS)
    far = bind(KINDS["alibi"], tables=[fake_tensors.tensor((4,), "float32")])
    with pytest.raises(errors.ArgumentError, match="tables on cuda:0"):
        tvm_infer.append_attention(batch.q, -batch.k_new, batch.v_new, cache, plan, variant=far, **batch.tables)
    assert cache.tobytes() == batch.kv_cache.tobytes()


def test_a_plan_takes_the_band_of_its_variant(batch):
    bound = bind(KINDS["everything"], [2.5, 4])
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, variant=bound, **HEADS)
    assert plan.band == Band(90)
    same = tvm_infer.plan(batch.qo_indptr, batch.kv_len, variant=bound, causal=False, window_left=90, **HEADS)
    plain = tvm_infer.plan(batch.qo_indptr, batch.kv_len, causal=False, window_left=90, **HEADS)
    assert plan.buffer.tobytes() == same.buffer.tobytes() == plain.buffer.tobytes()
    assert tvm_infer.plan(batch.qo_indptr, batch.kv_len, **HEADS).band == Band(window_right=0)
    limits = {"max_requests": 4, "max_tokens": 100, "num_ctas": 8}
    assert tvm_infer.workspace_size(variant=bound, **limits, **HEADS) == tvm_infer.workspace_size(
        causal=False, window_left=90, **limits, **HEADS
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"causal": True}, "`causal` is True, and `variant` was made with causal=False; leave `causal` out"),
        (
            {"window_left": -1},
            "`window_left` is -1, and `variant` was made with window_left=90; leave `window_left` out",
        ),
        ({"causal": False, "window_left": 91}, "`window_left` is 91"),
    ],
)
def test_a_plan_that_contradicts_its_variant(batch, settings, message):
    bound = bind(KINDS["everything"], [2.5, 4])
    with pytest.raises(errors.ArgumentError, match=message):
        tvm_infer.plan(batch.qo_indptr, batch.kv_len, variant=bound, **settings, **HEADS)
    with pytest.raises(errors.ArgumentError, match=message):
        tvm_infer.workspace_size(variant=bound, max_requests=1, max_tokens=1, **settings, **HEADS)


def test_a_call_with_a_plan_of_another_band(batch):
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, **HEADS)
    bound = bind(KINDS["bias"])
    out = np.full_like(batch.q, np.nan)
    message = (
        "`plan` was made with causal=True, window_left=-1, and `variant` 0{15}3 has causal=True, window_left=20; plan with "
        r"tvm_infer.plan\(…, variant=variant\).* or with causal=True, window_left=20"
    )
    for words in (plan, plan.buffer):
        with pytest.raises(errors.PlanMismatchError, match=message):
            tvm_infer.attention(batch.q, batch.kv_cache, words, variant=bound, out=out, **batch.tables)
    assert np.isnan(out).all()


def test_tables_of_another_size_are_refused_at_every_batch(batch):
    """Heads and requests index tables: a call whose numbers differ from the last one's has them checked again."""
    bound = bind(KINDS["alibi"], tables=[np.ones(4, np.float32)])
    cases.run("paged", batch, bound)
    wide = make_paged_batch([1, 9], [70, 40], num_qo_heads=8, num_kv_heads=2, head_dim=64)
    for way in ("paged", "ragged", "append"):
        with pytest.raises(errors.ArgumentError, match="4 slopes, 8 heads, 2 requests"):
            cases.run(way, wide, bound)
    cases.run("paged", batch, bound)


def test_a_bound_variant_is_prepared_once(batch, compiled):
    bound = bind(KINDS["soft cap"], [1.5])
    first, _ = cases.run("paged", batch, bound)
    for way in ("paged", "ragged", "append"):
        cases.run(way, batch, bound)
    assert compiled == [DIGEST]
    for other in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        out, _ = cases.run("paged", batch, other)
        assert out.tobytes() == first.tobytes()
    assert compiled == [DIGEST] * 3


def test_a_variant_for_cuda_is_not_compiled_for_the_host(compiled):
    bound = bind(KINDS["soft cap"], [1.5])
    prepared = variant_call.prepare(bound)
    on_card = prepared.call(True, 4, 2, 64)
    assert compiled == []
    assert prepared.call(True, 4, 2, 96, is_scaled=True) is on_card
    on_host = prepared.call(False, 4, 2, 64)
    assert compiled == [DIGEST] and not on_host.same_as(on_card)
    assert prepared.call(True, 4, 2, 64) is on_card and prepared.call(False, 4, 2, 64) is on_host
    with pytest.raises(errors.ArgumentError, match="the variant was bound for cuda"):
        attend(
            "variant_paged_attention",
            np.zeros((3, 4, 64), np.float32),
            on_card,
            lambda shape, dtype="float32": np.zeros(shape, dtype),
        )

"""Bad input to CUDA calls: a typed error that names the argument, before any launch; the context stays good."""

from __future__ import annotations

import pytest
import torch
from gpu_batches import Batch, Case, make_plan, same_bits

import tvm_infer
from tvm_infer import _ffi, errors

pytestmark = pytest.mark.family("attention_sm90", "append", "merge_states")

CASE = Case("errors", split="cut64", lengths=((1, 3, 1), (300, 70, 17)))
RAGGED = Case("errors", split="cut64", lengths=CASE.lengths, page_size=0)


@pytest.fixture(scope="module")
def good(cuda):
    batch = Batch(CASE, cuda)
    o, lse = batch.attend()
    return o, lse


@pytest.fixture
def batch(cuda, good):
    """A batch to spoil a call of; afterwards the same batch must compute what it computed before."""
    yield Batch(CASE, cuda)
    torch.cuda.synchronize()
    o, lse = Batch(CASE, cuda).attend()
    assert same_bits(o, good[0]) and same_bits(lse, good[1])


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values, 2 bytes behind a 16-byte boundary."""
    base = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return base[1:].view(x.shape).copy_(x)


def strided_last(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def odd_heads(x: torch.Tensor) -> torch.Tensor:
    """A head stride that is no multiple of 16 bytes."""
    base = torch.empty((*x.shape[:-1], x.shape[-1] + 4), dtype=x.dtype, device=x.device)
    return base[..., : x.shape[-1]].copy_(x)


def of_pages(b: Batch, page_size: int) -> torch.Tensor:
    return torch.zeros((40, 2, b.num_kv_heads, page_size, 128), dtype=b.dtype, device=b.device)


def of_dim(b: Batch, head_dim: int) -> dict:
    q = torch.zeros((*b.q.shape[:2], head_dim), dtype=b.dtype, device=b.device)
    cache = torch.zeros((len(b.cache), 2, b.num_kv_heads, 16, head_dim), dtype=b.dtype, device=b.device)
    return {"q": q, "kv_cache": cache, "out": q.clone(), "workspace": None, "sm_scale": 0.1}


# (name, exceptions, what the message names, changes to the call)
ATTENTION = [
    ("q float64", errors.TvmInferError, ["q"], lambda b: {"q": b.q.double()}),
    ("q int16", errors.TvmInferError, ["q"], lambda b: {"q": b.q.view(torch.int16)}),
    ("other dtype than the cache", errors.DTypeError, ["dtype"], lambda b: {"q": b.q.half(), "out": b.q.half()}),
    (
        "float32",
        (errors.ExecutorError, errors.DTypeError),
        ["float32"],
        lambda b: {"q": b.q.float(), "kv_cache": b.cache.float(), "out": b.q.float()},
    ),
    ("head_dim 104", errors.ExecutorError, ["104", "64"], lambda b: of_dim(b, 104)),
    ("head_dim 40", errors.ExecutorError, ["40", "128"], lambda b: of_dim(b, 40)),
    ("page_size 12", errors.ExecutorError, ["page_size 12"], lambda b: {"kv_cache": of_pages(b, 12)}),
    ("page_size 128", errors.ExecutorError, ["page_size 128"], lambda b: {"kv_cache": of_pages(b, 128)}),
    ("host cache", errors.ArgumentError, ["k_cache", "cpu"], lambda b: {"kv_cache": b.cache.cpu()}),
    ("host page table", errors.TvmInferError, ["kv_page_indptr"], lambda b: {"kv_page_indptr": b.kv_page_indptr.cpu()}),
    ("host pages", errors.TvmInferError, ["kv_page_indices"], lambda b: {"kv_page_indices": b.kv_page_indices.cpu()}),
    ("host out", errors.TvmInferError, ["cpu"], lambda b: {"out": b.q.cpu()}),
    ("host lse", errors.TvmInferError, ["lse"], lambda b: {"lse": torch.zeros(b.q.shape[:2])}),
    ("host workspace", errors.TvmInferError, ["workspace"], lambda b: {"workspace": torch.zeros(99_999)}),
    (
        "host plan",
        errors.TvmInferError,
        ["plan"],
        lambda b: {"plan": make_plan(b.qo_indptr, b.kv, CASE, "cpu", num_ctas=132)},
    ),
    ("indptr int64", errors.DTypeError, ["kv_page_indptr"], lambda b: {"kv_page_indptr": b.kv_page_indptr.long()}),
    (
        "indptr short",
        (errors.PlanMismatchError, errors.ArgumentError),
        [],
        lambda b: {"kv_page_indptr": b.kv_page_indptr[:-1]},
    ),
    (
        "workspace small",
        errors.WorkspaceError,
        ["workspace", "workspace_size"],
        lambda b: {"workspace": torch.zeros(10, device=b.device)},
    ),
    (
        "workspace dtype",
        errors.DTypeError,
        ["workspace"],
        lambda b: {"workspace": torch.zeros(99_999, dtype=torch.float64, device=b.device)},
    ),
    (
        "workspace misaligned",
        errors.ArgumentError,
        ["workspace", "16"],
        lambda b: {"workspace": torch.zeros(99_999, device=b.device)[1:]},
    ),
    ("q misaligned", errors.ArgumentError, ["`q`", "16"], lambda b: {"q": misaligned(b.q)}),
    ("cache misaligned", errors.ArgumentError, ["k_cache", "16"], lambda b: {"kv_cache": misaligned(b.cache)}),
    ("out misaligned", errors.ArgumentError, ["16"], lambda b: {"out": misaligned(b.q)}),
    ("q odd head stride", errors.ArgumentError, ["`q`", "stride"], lambda b: {"q": odd_heads(b.q)}),
    ("cache odd stride", errors.ArgumentError, ["k_cache", "stride"], lambda b: {"kv_cache": odd_heads(b.cache)}),
    ("q last dim strided", errors.ArgumentError, ["`q`", "stride 2"], lambda b: {"q": strided_last(b.q)}),
    ("out last dim strided", errors.ArgumentError, ["stride 2"], lambda b: {"out": strided_last(b.q)}),
    ("cache last dim strided", errors.ArgumentError, ["k_cache"], lambda b: {"kv_cache": strided_last(b.cache)}),
    (
        "lse strided",
        errors.ArgumentError,
        ["lse", "contiguous"],
        lambda b: {"lse": torch.zeros((b.num_tokens, 64), device=b.device)[:, ::2]},
    ),
    (
        "lse dtype",
        errors.DTypeError,
        ["lse"],
        lambda b: {"lse": torch.zeros(b.q.shape[:2], dtype=b.dtype, device=b.device)},
    ),
    ("sm_scale 0", errors.ArgumentError, ["sm_scale"], lambda b: {"sm_scale": 0.0}),
    ("sm_scale negative", errors.ArgumentError, ["sm_scale"], lambda b: {"sm_scale": -0.1}),
    ("sm_scale NaN", errors.ArgumentError, ["sm_scale"], lambda b: {"sm_scale": float("nan")}),
    (
        "plan of other heads",
        errors.PlanMismatchError,
        ["heads"],
        lambda b: {"plan": make_plan(b.qo_indptr, b.kv, Case(group=8), b.device)},
    ),
    (
        "plan of more tokens",
        errors.PlanMismatchError,
        ["tokens"],
        lambda b: {"plan": make_plan([0, 1, 4, 9], b.kv, CASE, b.device)},
    ),
    (
        "plan of more requests",
        errors.PlanMismatchError,
        [],
        lambda b: {"plan": make_plan([0, 1, 4, 5, 5], [*b.kv, 3], CASE, b.device)},
    ),
    (
        "not a plan",
        errors.TvmInferError,
        ["plan"],
        lambda b: {"plan": torch.zeros(8, dtype=torch.int32, device=b.device)},
    ),
    ("layout", errors.ArgumentError, ["kv_layout"], lambda b: {"kv_layout": "DHN"}),
    ("cache heads", errors.TvmInferError, ["heads"], lambda b: {"kv_cache": b.cache[:, :, :3]}),
    ("cache rank", errors.ArgumentError, ["k_cache", "rank"], lambda b: {"kv_cache": b.cache[:, 0]}),
]


def ids(rows) -> list[str]:
    return [r[0].replace(" ", "-") for r in rows]


@pytest.mark.parametrize(("kind", "words", "changes"), [r[1:] for r in ATTENTION], ids=ids(ATTENTION))
def test_attention_refuses(batch, kind, words, changes):
    plan = batch.plan()
    assert plan.num_partial_rows > 0
    out, lse = batch.outputs()
    arguments = {"q": batch.q, "kv_cache": batch.cache, "plan": plan, "out": out, "lse": lse, **batch.tables}
    arguments |= {"workspace": batch.workspace(plan), **changes(batch)}
    with pytest.raises(kind) as caught:
        tvm_infer.attention(**arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    torch.cuda.synchronize()
    assert bool(torch.isnan(out).all()) and bool(torch.isnan(lse).all())


RAGGED_ERRORS = [
    ("k misaligned", errors.ArgumentError, ["`k`", "16"], lambda b: {"k": misaligned(b.k)}),
    ("v odd stride", errors.ArgumentError, ["`v`", "stride"], lambda b: {"v": odd_heads(b.v)}),
    ("host k", errors.TvmInferError, ["`k`"], lambda b: {"k": b.k.cpu()}),
    ("host indptr", errors.TvmInferError, ["kv_indptr"], lambda b: {"kv_indptr": b.kv_indptr.cpu()}),
    ("v dtype", errors.DTypeError, ["`v`"], lambda b: {"v": b.v.half()}),
    ("k heads", errors.TvmInferError, ["heads"], lambda b: {"k": b.k[:, :3], "v": b.v[:, :3]}),
    ("v shorter", errors.ArgumentError, ["`v`"], lambda b: {"v": b.v[:-1]}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), [r[1:] for r in RAGGED_ERRORS], ids=ids(RAGGED_ERRORS))
def test_ragged_attention_refuses(batch, kind, words, changes):
    ragged = Batch(RAGGED, batch.device)
    plan = ragged.plan()
    out, lse = ragged.outputs()
    arguments = {"q": ragged.q, "k": ragged.k, "v": ragged.v, "plan": plan, "kv_indptr": ragged.kv_indptr, "out": out}
    with pytest.raises(kind) as caught:
        tvm_infer.ragged_attention(**(arguments | {"lse": lse} | changes(ragged)))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    torch.cuda.synchronize()
    assert bool(torch.isnan(out).all())


APPEND_ERRORS = [
    ("k float32", errors.TvmInferError, ["k"], lambda b: {"k": b.k_new.float(), "v": b.v_new.float()}),
    (
        "all float32",
        errors.ExecutorError,
        ["float32"],
        lambda b: {"k": b.k_new.float(), "v": b.v_new.float(), "kv_cache": b.cache.float()},
    ),
    ("k misaligned", errors.ArgumentError, ["`k`", "16"], lambda b: {"k": misaligned(b.k_new)}),
    ("v heads", errors.ArgumentError, ["`v`"], lambda b: {"v": b.v_new[:, :1]}),
    ("v tokens", errors.ArgumentError, ["`v`"], lambda b: {"v": b.v_new[:-1]}),
    ("host v", errors.TvmInferError, ["`v`"], lambda b: {"v": b.v_new.cpu()}),
    ("host lengths", errors.TvmInferError, ["kv_len"], lambda b: {"kv_len": b.device_kv_len.cpu()}),
    ("lengths in a list", errors.TvmInferError, ["kv_len"], lambda b: {"kv_len": b.kv}),
    ("indptr short", errors.ArgumentError, ["qo_indptr"], lambda b: {"qo_indptr": b.device_qo_indptr[:-1]}),
    ("tables short", errors.TvmInferError, ["kv_page_indptr"], lambda b: {"kv_page_indptr": b.kv_page_indptr[:-1]}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), [r[1:] for r in APPEND_ERRORS], ids=ids(APPEND_ERRORS))
def test_append_refuses(batch, kind, words, changes):
    before = batch.k_base.clone()
    arguments = {"k": batch.k_new, "v": batch.v_new, "kv_cache": batch.cache, "qo_indptr": batch.device_qo_indptr}
    with pytest.raises(kind) as caught:
        tvm_infer.append(**(arguments | {"kv_len": batch.device_kv_len, **batch.tables} | changes(batch)))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    torch.cuda.synchronize()
    assert same_bits(batch.k_base, before)


def test_merge_refuses(batch, cuda):
    o = torch.zeros((3, 4, 64), dtype=torch.bfloat16, device=cuda)
    lse = torch.zeros((3, 4), device=cuda)
    for kind, word, arguments in (
        (errors.ArgumentError, "`o_b`", (o, lse, o[:2], lse[:2])),
        (errors.DTypeError, "`o_b`", (o, lse, o.half(), lse)),
        (errors.DTypeError, "`lse_b`", (o, lse, o, lse.double())),
        (errors.ArgumentError, "`o_b`", (o, lse, misaligned(o), lse)),
        (errors.TvmInferError, "`lse_a`", (o, lse.cpu(), o, lse)),
        (errors.TvmInferError, "`o_b`", (o, lse, o.cpu(), lse)),
    ):
        with pytest.raises(kind) as caught:
            tvm_infer.merge(*arguments)
        assert word in str(caught.value), str(caught.value)


def test_plan_refuses(batch, cuda):
    settings = {"num_qo_heads": 32, "num_kv_heads": 8}
    for kind, words, changes in (
        (errors.TvmInferError, ["float32"], {"head_dim": 128, "dtype": "float32"}),
        (errors.TvmInferError, ["104"], {"head_dim": 104, "dtype": "bfloat16"}),
        (errors.TvmInferError, [], {"head_dim": 128, "dtype": "bfloat16", "device": "cuda:77"}),
        (errors.ArgumentError, ["kv_len"], {"head_dim": 128, "dtype": "bfloat16", "kv_len": [-3]}),
    ):
        arguments = {"qo_indptr": [0, 1], "kv_len": [20], "device": cuda, **settings, **changes}
        with pytest.raises(kind) as caught:
            tvm_infer.plan(arguments.pop("qo_indptr"), arguments.pop("kv_len"), **arguments)
        for word in words:
            assert word in str(caught.value), str(caught.value)


def test_debug_checks_read_the_page_table(batch):
    """TVM_INFER_DEBUG_CHECKS: a page outside the pool is an error, not a fault."""
    former = _ffi.func("set_debug_checks")(True)
    try:
        plan = batch.plan()
        batch.attend(plan)
        batch.kv_page_indices[1] = len(batch.cache)
        with pytest.raises(errors.ArgumentError, match="kv_page_indices"):
            batch.attend(plan)
    finally:
        _ffi.func("set_debug_checks")(former)


def test_another_device_is_named(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    batch = Batch(CASE, cuda)
    plan = batch.plan()
    with pytest.raises(errors.ArgumentError, match=r"k_cache.*cuda:1"):
        tvm_infer.attention(batch.q, batch.cache.to("cuda:1"), plan, **batch.tables)


def test_more_rows_than_tokens_is_padding(cuda, good):
    """q may have more rows than the plan has tokens (a bucket's size): the first rows are the batch's."""
    batch = Batch(CASE, cuda)
    q = torch.cat([batch.q, torch.full_like(batch.q, torch.nan)])
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan, device=cuda)
    tvm_infer.attention(q, batch.cache, batch.plan(), **batch.tables, out=out, lse=lse)
    assert same_bits(out[: batch.num_tokens], good[0]) and same_bits(lse[: batch.num_tokens], good[1])

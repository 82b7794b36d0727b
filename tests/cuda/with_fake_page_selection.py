"""Run by test_fake_driver.py in a process whose libcuda.so.1 is fake_libcuda.cc: the launches of page selection."""

from __future__ import annotations

import ctypes
import pathlib
import re
import sys

import numpy as np
import pytest
import tvm_ffi

import tvm_infer
from tvm_infer import _ffi, errors, schedule
from tvm_infer.jit import headers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_tensors import CUDA, Driver, addresses, index, tensor
from with_fake_driver import HEAD_LISTS, ROW_MASKS, SHARED_WORKS, Params, RopeParams

ABI = headers.kernel_abi()
REQUESTS, HQ, HKV, DIM, PAGE, PAGES, BUDGET, MAX_PAGES = 3, 8, 2, 128, 16, 40, 4, 20
KV_LEN, INDPTR = [100, 0, 200], [0, 7, 7, 20]

_ffi.library()  # registers the real one, which this replaces


@tvm_ffi.register_global_func("tvm_infer.jit_cubin", override=True)
def jit_cubin(name, arch):
    return f"{name} {ABI} 128 0 4".encode() + b"\0"


class Bounds(ctypes.Structure):
    """cuda/params.h, PageBounds."""

    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class BoundsParams(ctypes.Structure):
    """cuda/params.h, PageBoundsParams: AppendParams, with which RopeAppendParams begin, and the bounds."""

    _fields_ = [
        ("append", ctypes.c_byte * (RopeParams.q.offset)),
        ("bounds", Bounds),
    ]


class ScoresParams(ctypes.Structure):
    """cuda/params.h, PageScoresParams."""

    _fields_ = [
        ("q", ctypes.c_void_p),
        ("q_strides", ctypes.c_int64 * 2),
        ("bounds", Bounds),
        *[(n, ctypes.c_void_p) for n in ("kv_len", "kv_page_indptr", "kv_page_indices", "scores")],
        ("scores_strides", ctypes.c_int64 * 2),
        *[(n, ctypes.c_int32) for n in ("num_requests", "num_kv_heads", "group_size", "head_dim", "page_size")],
        *[(n, ctypes.c_int32) for n in ("max_pages", "min_pages", "is_sum", "ctas_per_list")],
    ]


class SelectParams(ctypes.Structure):
    """cuda/params.h, SelectPagesParams."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("scores_strides", ctypes.c_int64 * 2),
        *[
            (n, ctypes.c_void_p)
            for n in ("kv_len", "kv_page_indptr", "kv_page_indices", "page_lists", "planned", "plan")
        ],
        ("budget", ctypes.c_int32 * 4),
        *[(n, ctypes.c_int32) for n in ("num_requests", "num_kv_heads", "max_pages")],
        ("plan_bytes", ctypes.c_int64),
    ]


@pytest.fixture
def driver():
    made = Driver()
    made.clear()
    yield made
    assert made.current_device() == -1  # no call leaves a context behind


def plan_words(length=BUDGET * PAGE):
    plan = tvm_infer.plan(
        list(range(REQUESTS + 1)), [[length] * HKV] * REQUESTS, num_qo_heads=HQ, num_kv_heads=HKV, head_dim=DIM,
        dtype="bfloat16", num_ctas=132, causal=False, tile_table=tuple(_ffi.func("cuda_tile_table")("bfloat16", DIM)),
    )  # fmt: skip
    return plan.buffer


def bounds(dtype="bfloat16", **kwargs):
    return tensor((PAGES, 2, HKV, DIM), dtype, **kwargs)


def table():
    return {"kv_page_indptr": index(INDPTR), "kv_page_indices": index(list(range(20)))}


def update(**changes):
    made = {
        "page_bounds": bounds(),
        "qo_indptr": index([0, 1, 1, 5]),
        "kv_len": index(KV_LEN),
        "k_cache": tensor((PAGES, 2, HKV, PAGE, DIM)),
        "v_cache": None,
        "kv_layout": 0,
        **table(),
        **changes,
    }
    _ffi.func("update_page_bounds")(*made.values())
    return made


def scores(**changes):
    made = {
        "q": tensor((REQUESTS, HQ, DIM)),
        "page_bounds": bounds(),
        "kv_len": index(KV_LEN),
        **table(),
        "page_size": PAGE,
        "is_sum": 0,
        "min_pages": BUDGET,
        "scores": tensor((REQUESTS, HKV, MAX_PAGES), "float32"),
        **changes,
    }
    _ffi.func("page_scores")(*made.values())
    return made


def select(**changes):
    words = plan_words()
    made = {
        "scores": tensor((REQUESTS, HKV, MAX_PAGES), "float32"),
        "kv_len": index(KV_LEN),
        **table(),
        "page_size": PAGE,
        "num_pages": BUDGET,
        "num_sink": 1,
        "num_recent": 2,
        "planned": index(words),
        "plan": index(words),
        "page_lists": index([0] * (REQUESTS * HKV * BUDGET)),
        **changes,
    }
    _ffi.func("select_pages")(*made.values())
    return made


def check_addresses(params, made, *names):
    for name in names:
        assert getattr(params, name) == addresses[id(made[name])], name


def test_update_launch(driver):
    a = update(page_bounds=bounds(strides=(2000, 1000, DIM, 1), offset=64))
    (launch,) = driver.launches()
    assert (launch["name"], launch["grid"], launch["attributes"]) == ("page_bounds_bf16", "528,1,1", "1,6,1")
    p = driver.page_params("page_bounds", BoundsParams)
    append = RopeParams.from_buffer_copy(bytes(p.append) + bytes(ctypes.sizeof(RopeParams) - len(p.append)))
    check_addresses(append, a, "qo_indptr", "kv_len", "kv_page_indptr", "kv_page_indices", "k_cache")
    assert (append.plan, append.num_requests, append.num_kv_heads) == (None, REQUESTS, HKV)
    assert (append.head_dim, append.page_size) == (DIM, PAGE)
    assert list(append.cache_strides)[:3] == [2 * HKV * PAGE * DIM, PAGE * DIM, DIM]
    assert p.bounds.data == addresses[id(a["page_bounds"])] and list(p.bounds.strides) == [2000, 1000, DIM]


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "name"),
    [
        ("float16", "float16", "page_bounds_fp16"),
        ("float16", "float8_e5m2", "page_bounds_fp16_e5m2"),
        ("bfloat16", "float8_e4m3fn", "page_bounds_bf16_e4m3"),
    ],
)
def test_update_by_type_and_layout(driver, dtype, kv_dtype, name):
    update(page_bounds=bounds(dtype), k_cache=tensor((PAGES, 2, PAGE, HKV, DIM), kv_dtype), kv_layout=1)
    assert driver.launches()[0]["name"] == name
    p = driver.page_params("page_bounds", BoundsParams)
    append = RopeParams.from_buffer_copy(bytes(p.append) + bytes(ctypes.sizeof(RopeParams) - len(p.append)))
    assert list(append.cache_strides)[:3] == [2 * HKV * PAGE * DIM, DIM, HKV * DIM]


def test_update_by_plan(driver):
    words = tvm_infer.plan(
        [0, 1, 1, 5], KV_LEN, num_qo_heads=HQ, num_kv_heads=HKV, head_dim=DIM, dtype="bfloat16", num_ctas=132,
        tile_table=tuple(_ffi.func("cuda_tile_table")("bfloat16", DIM)),
    ).buffer  # fmt: skip
    plan, cache = index(words), tensor((PAGES, 2, HKV, PAGE, DIM))
    by_plan = _ffi.func("update_page_bounds_by_plan")
    by_plan(bounds(), plan, HQ, cache, None, 0, *table().values())
    p = driver.page_params("page_bounds", BoundsParams)
    append = RopeParams.from_buffer_copy(bytes(p.append) + bytes(ctypes.sizeof(RopeParams) - len(p.append)))
    # KV heads, group, any tokens, any partial rows, lists, any capture key, what plans may have
    features = SHARED_WORKS | ROW_MASKS
    assert list(append.expected) == [HKV, HQ // HKV, 2**31 - 1, 2**31 - 1, REQUESTS, 0, 0, features]
    assert append.plan == addresses[id(plan)]
    driver.clear()
    with pytest.raises(errors.ArgumentError, match="`num_qo_heads` is 7"):
        by_plan(bounds(), plan, 7, cache, None, 0, *table().values())
    assert driver.launches() == []


def test_scores_launch(driver):
    a = scores(is_sum=1)
    (launch,) = driver.launches()
    # 20 pages are one turn of a CTA's four warps, 64 pages
    assert (launch["name"], launch["grid"], launch["attributes"]) == ("page_scores_bf16", "6,1,1", "1,6,1")
    p = driver.page_params("page_scores", ScoresParams)
    check_addresses(p, a, "q", "kv_len", "kv_page_indptr", "kv_page_indices", "scores")
    assert p.bounds.data == addresses[id(a["page_bounds"])]
    assert list(p.bounds.strides) == [2 * HKV * DIM, HKV * DIM, DIM]
    assert list(p.q_strides) == [HQ * DIM, DIM] and list(p.scores_strides) == [HKV * MAX_PAGES, MAX_PAGES]
    assert (p.num_requests, p.num_kv_heads, p.group_size, p.head_dim, p.page_size) == (REQUESTS, HKV, 4, DIM, PAGE)
    assert (p.max_pages, p.min_pages, p.is_sum, p.ctas_per_list) == (MAX_PAGES, BUDGET, 1, 1)


def test_scores_of_long_requests_fill_the_device(driver):
    many = 64 * 5000
    scores(
        q=tensor((REQUESTS, HQ, DIM), "float16"), page_bounds=bounds("float16"),
        scores=tensor((REQUESTS, HKV, many), "float32"),
    )  # fmt: skip
    (launch,) = driver.launches()
    assert launch["name"] == "page_scores_fp16"
    p = driver.page_params("page_scores", ScoresParams)
    assert p.ctas_per_list == 132 * 4 * 8 // (REQUESTS * HKV)
    assert launch["grid"] == f"{p.ctas_per_list * REQUESTS * HKV},1,1"


def test_select_launch(driver):
    a = select()
    (launch,) = driver.launches()
    assert (launch["name"], launch["grid"], launch["attributes"]) == (
        "select_pages",
        "8,1,1",
        "1,6,1",
    )  # a CTA a list, and two for the plan
    p = driver.page_params("select_pages", SelectParams)
    check_addresses(p, a, "scores", "kv_len", "kv_page_indptr", "kv_page_indices", "page_lists", "planned", "plan")
    assert list(p.scores_strides) == [HKV * MAX_PAGES, MAX_PAGES] and list(p.budget) == [PAGE, BUDGET, 1, 2]
    assert (p.num_requests, p.num_kv_heads, p.max_pages) == (REQUESTS, HKV, MAX_PAGES)
    assert p.plan_bytes == plan_words().nbytes


def test_nothing_that_a_capture_forbids(driver):
    update(), scores(), select()
    driver.clear()
    driver.capture(True)
    update(), scores(), select()
    assert [launch["name"] for launch in driver.launches()] == ["page_bounds_bf16", "page_scores_bf16", "select_pages"]
    for name in ("cuStreamSynchronize", "cuMemcpyDtoH", "cuLibraryLoadData", "cuMemAlloc"):
        assert driver.calls(name) == []


def test_nothing_to_do(driver):
    none = {"kv_len": index([]), "kv_page_indptr": index([0])}
    scores(q=tensor((0, HQ, DIM)), scores=tensor((0, HKV, MAX_PAGES), "float32"), **none)
    select(scores=tensor((0, HKV, MAX_PAGES), "float32"), page_lists=index([]), **none)
    scores(scores=tensor((REQUESTS, HKV, BUDGET), "float32"))  # no request can have so many pages that they are scored
    assert driver.launches() == []


ERRORS = [
    (update, errors.ArgumentError, "`page_bounds` has shape [39, 2, 2, 128]", lambda: {"page_bounds": tensor((39, 2, HKV, DIM))}),
    (update, errors.DTypeError, "`page_bounds`", lambda: {"page_bounds": bounds("float16")}),
    (update, errors.ExecutorError, "`page_bounds` has dtype float32; the cuda executor", lambda: {
        "page_bounds": bounds("float32"), "k_cache": tensor((PAGES, 2, HKV, PAGE, DIM), "float32")}),
    (update, errors.ArgumentError, "`page_bounds`", lambda: {"page_bounds": bounds(offset=8)}),
    (update, errors.ArgumentError, "`kv_len` is on cuda:1", lambda: {"kv_len": index(KV_LEN, device=(CUDA, 1))}),
    (scores, errors.ArgumentError, "`q` has shape [2, 8, 128]", lambda: {"q": tensor((2, HQ, DIM))}),
    (scores, errors.ArgumentError, "`q` has 7 heads", lambda: {"q": tensor((REQUESTS, 7, DIM))}),
    (scores, errors.DTypeError, "`page_bounds` has dtype bfloat16", lambda: {"q": tensor((REQUESTS, HQ, DIM), "float16")}),
    (scores, errors.ExecutorError, "has dtype float32", lambda: {
        "q": tensor((REQUESTS, HQ, DIM), "float32"), "page_bounds": bounds("float32")}),
    (scores, errors.ArgumentError, "`q`", lambda: {"q": tensor((REQUESTS, HQ, DIM), offset=8)}),
    (scores, errors.ArgumentError, "`page_size` is 0", lambda: {"page_size": 0}),
    (scores, errors.ArgumentError, "`is_sum` is 2", lambda: {"is_sum": 2}),
    (scores, errors.DTypeError, "`scores`", lambda: {"scores": index([0] * 120)} | {
        "scores": tensor((REQUESTS, HKV, MAX_PAGES), "float16")}),
    (select, errors.ArgumentError, "`num_sink` and `num_recent` are 3 and 2 of lists of 4 pages", lambda: {"num_sink": 3}),
    (select, errors.ArgumentError, "`num_sink` and `num_recent` are 1 and 0", lambda: {"num_recent": 0}),
    (select, errors.ArgumentError, "`num_pages` is 536870912 pages of 16 tokens", lambda: {"num_pages": 2**29}),
    (select, errors.ArgumentError, "`page_lists` has shape [23]", lambda: {"page_lists": index([0] * 23)}),
    (select, errors.ArgumentError, "`planned` has shape", lambda: {"planned": index([0] * 64)}),
    (select, errors.PlanMismatchError, "`plan`, 40 bytes, is not a plan", lambda: {"plan": index([0] * 10)}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words", "changes"), ERRORS)
def test_refused_before_any_launch(driver, call, kind, words, changes):
    with pytest.raises(kind, match=re.escape(words)):
        call(**changes())
    assert driver.launches() == []


@pytest.fixture
def debug_checks():
    before = _ffi.func("set_debug_checks")(True)
    yield
    _ffi.func("set_debug_checks")(before)


DEBUG_ERRORS = [
    (update, errors.ArgumentError, "`kv_len` is 3 for request 2, which appends 4", lambda: {"kv_len": index([100, 0, 3])}),
    (update, errors.ArgumentError, "page 40 at entry 0", lambda: {"kv_page_indices": index([40] * 20)}),
    (scores, errors.ArgumentError, "`kv_len` is -1 for request 1", lambda: {"kv_len": index([100, -1, 200])}),
    (scores, errors.ArgumentError, "`scores` has room for 12 pages of a request; request 2", lambda: {
        "scores": tensor((REQUESTS, HKV, 12), "float32")}),
    (select, errors.PlanMismatchError, "request 2 has kv_len 209", lambda: {"kv_len": index([100, 0, 209])}),
    (select, errors.PlanMismatchError, "`planned` is not a plan of 3 requests of one query token and 2 KV heads", lambda: {
        "planned": index(plan_words(3 * PAGE))}),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "words", "changes"), DEBUG_ERRORS)
def test_debug_checks_read_the_device(driver, debug_checks, call, kind, words, changes):
    with pytest.raises(kind, match=re.escape(words)):
        call(**changes())
    assert driver.launches() == [] and driver.calls("cuStreamSynchronize")
    call()
    assert len(driver.launches()) == 1


# ---- a cache whose layers select

CACHE = dict(
    num_layers=3, num_qo_heads=HQ, num_kv_heads=HKV, head_dim=DIM, dtype="bfloat16", page_size=PAGE, num_pages=PAGES
)
CACHE |= dict(max_batch=5, max_tokens=128, device="cuda")
SELECTING = ["append_b16", "page_bounds_bf16", "page_scores_bf16", "select_pages", "attention_bf16_h128_p16"]


def words_at(address, count):
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32)), (count,))


def attend(cache, layer, num_rows):
    q, kv = (tensor((num_rows, heads, DIM)) for heads in (HQ, HKV))
    cache.attention(layer, q, kv, kv, out=tensor((num_rows, HQ, DIM)))
    return q


def step_addresses(driver):
    """What the launches of a selecting layer read and write, which captured graphs keep."""
    scores, select = driver.page_params("page_scores", ScoresParams), driver.page_params("select_pages", SelectParams)
    attention = driver.params(Params)
    return [
        *(getattr(scores, n) for n in ("kv_len", "kv_page_indptr", "kv_page_indices", "scores", "num_requests")),
        *(
            getattr(select, n)
            for n in ("scores", "kv_len", "kv_page_indptr", "kv_page_indices", "page_lists", "planned", "plan")
        ),
        *(getattr(attention, n) for n in ("plan", "kv_indptr", "kv_page_indices", "partial_o")),
        *attention.capture_key,
    ]


def test_a_layer_that_selects_is_five_launches_in_every_step(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, page_budget=tvm_infer.PageBudget(num_pages=BUDGET, dense_layers=1))
    for seq, length in ((0, 100), (1, 10), (2, 120)):
        cache.add_sequence(seq)
        cache.begin_forward([seq], [length])
        driver.clear()
        attend(cache, 0, length)
        assert [launch["name"] for launch in driver.launches()] == ["append_b16", "attention_bf16_h128_p16"]
        driver.clear()
        attend(cache, 1, length)
        assert [launch["name"] for launch in driver.launches()] == SELECTING
        cache.end_forward()
    # a step that selects, of 3 sequences in 4 rows: lists for 4 requests, the last one's empty
    driver.clear()
    cache.begin_step([2, 0, 1], [1, 1, 1], num_rows=4)
    assert cache.selects_pages
    assert len(driver.calls("cuMemcpyHtoDAsync")) == 3  # the step's block, the plan for lists and its copy
    driver.clear()
    q = attend(cache, 2, 4)
    assert [launch["name"] for launch in driver.launches()] == SELECTING
    scores, select = driver.page_params("page_scores", ScoresParams), driver.page_params("select_pages", SelectParams)
    attention = driver.params(Params)
    assert (scores.num_requests, scores.max_pages, scores.min_pages) == (4, PAGES, BUDGET)
    assert scores.q == addresses[id(q)] and list(scores.scores_strides) == [HKV * PAGES, PAGES]
    assert (select.num_requests, select.num_kv_heads, list(select.budget)) == (4, HKV, [PAGE, BUDGET, 1, 1])
    assert words_at(scores.kv_len, 5).tolist() == [121, 101, 11, 0, 0]
    own = words_at(scores.kv_page_indptr, 6)
    assert words_at(scores.kv_page_indices, int(own[-1]))[own[0] : own[1]].tolist() == list(cache.page_table(2))
    assert own[3] == own[4] == own[5]
    # attention reads what select_pages writes: its plan, and lists that its page table points at
    assert attention.plan == select.plan != select.planned and attention.plan_is_ready == 0
    assert attention.features == HEAD_LISTS | SHARED_WORKS and attention.max_kv_lists == 5 * HKV
    lists = (select.page_lists - attention.kv_page_indices) // 4
    assert words_at(attention.kv_indptr, 4 * HKV + 1).tolist() == [lists + BUDGET * i for i in range(4 * HKV + 1)]
    planned = schedule.Plan(words_at(select.planned, words_at(select.planned, 5)[4] // 4).copy())  # bytes_used
    assert planned.kv_len.tolist() == [BUDGET * PAGE] * (4 * HKV)
    assert bytes(words_at(select.plan, planned.buffer.size)) == bytes(planned.buffer)
    cache.end_forward()
    # the next one of as many rows brings no plan for lists, of other sequences and fewer
    driver.clear()
    before = step_addresses(driver)
    cache.begin_step([0, 2], [1, 1], num_rows=4)
    assert len(driver.calls("cuMemcpyHtoDAsync")) == 1
    attend(cache, 2, 4)
    assert step_addresses(driver) == before
    cache.end_forward()
    # nor has one that selects nothing other addresses, but the plan is the step's, and lists are its sequences' tables
    cache.begin_step([1, 2], [2, 2], num_rows=4)
    assert not cache.selects_pages
    attend(cache, 2, 4)
    assert step_addresses(driver) == before
    dense = cache.plan.buffer
    assert bytes(words_at(select.plan, dense.size)) == bytes(dense)
    assert words_at(select.planned, 1).tolist() == [0] and words_at(scores.kv_len, 5).tolist() == [0] * 5
    own = words_at(scores.kv_page_indptr, 6)
    assert words_at(attention.kv_indptr, 5 * HKV + 1).tolist() == [*own[:3], *[own[2]] * (5 * HKV - 2)]
    cache.end_forward()
    # and the plan for lists is there again in the step after it
    cache.begin_step([0, 2], [1, 1], num_rows=4)
    assert bytes(words_at(select.planned, planned.buffer.size)) == bytes(planned.buffer)
    assert bytes(words_at(select.plan, planned.buffer.size)) == bytes(planned.buffer)
    cache.end_forward()


def test_a_layer_that_selects_may_be_captured_in_a_step_that_does_not(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, page_budget=tvm_infer.PageBudget(num_pages=BUDGET, dense_layers=1))
    cache.add_sequence(0)
    cache.begin_forward([0], [1])
    driver.clear()
    attend(cache, 1, 1)  # attention is loaded; what selects was when the budget was set
    driver.clear()
    driver.capture(True)
    attend(cache, 1, 1)
    driver.capture(False)
    assert [launch["name"] for launch in driver.launches()] == SELECTING
    for name in ("cuStreamSynchronize", "cuMemcpyDtoH", "cuMemcpyHtoD", "cuLibraryLoadData", "cuMemAlloc"):
        assert driver.calls(name) == []
    cache.end_forward()


def test_bounds_of_moved_and_swapped_pages_are_made_anew(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, page_budget=tvm_infer.PageBudget(num_pages=BUDGET, dense_layers=1))
    for seq in (0, 1):
        cache.add_sequence(seq)
        with cache.forward([seq], [40]):
            pass
    driver.clear()
    cache._call("move_tokens", (1, 1, 1), (39, 38, 37), (3, 4, 20))
    assert [launch["name"] for launch in driver.launches()] == ["move_tokens", "page_bounds_bf16", "page_bounds_bf16"]
    p = driver.page_params("page_bounds", BoundsParams)
    append = RopeParams.from_buffer_copy(bytes(p.append) + bytes(ctypes.sizeof(RopeParams) - len(p.append)))
    table = cache.page_table(1)
    assert (append.plan, append.num_requests) == (None, 2)
    assert words_at(append.qo_indptr, 3).tolist() == [0, 16, 32] and words_at(append.kv_len, 2).tolist() == [16, 16]
    assert words_at(append.kv_page_indptr, 3).tolist() == [0, 1, 2]
    assert words_at(append.kv_page_indices, 2).tolist() == sorted(table[:2])
    cache.swap_out(1)
    driver.clear()
    cache.swap_in(1)
    assert [launch["name"] for launch in driver.launches()] == ["page_bounds_bf16"] * 2
    p = driver.page_params("page_bounds", BoundsParams)
    append = RopeParams.from_buffer_copy(bytes(p.append) + bytes(ctypes.sizeof(RopeParams) - len(p.append)))
    assert words_at(append.kv_len, 3).tolist() == [16, 16, 8]
    assert words_at(append.kv_page_indices, 3).tolist() == list(cache.page_table(1))

"""Run by test_fake_driver.py in a process whose libcuda.so.1 is fake_libcuda.cc."""

from __future__ import annotations

import ctypes
import math
import pathlib
import sys

import numpy as np
import pytest
import tvm_ffi

import tvm_infer
from tvm_infer import _ffi, errors, variant
from tvm_infer.jit import headers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fake_tensors import CPU, CUDA, PINNED, ROCM, Driver, addresses, index, tensor

HEAD_LISTS, SHARED_WORKS, ROW_MASKS = 1, 2, 4  # cuda/params.h, PlanFeature
ABI, THREADS, SHARED = headers.kernel_abi(), 384, 230000
QO, KV_LEN = [0, 1, 4], [20, 3]
HQ, HKV, DIM, PAGE, PAGES, ROWS = 8, 2, 128, 16, 5, 4


class Params(ctypes.Structure):
    """cuda/params.h, AttentionParams."""

    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("plan", "kv_indptr", "kv_page_indices", "q")],
        *[(n, ctypes.c_int64) for n in ("q_stride_token", "q_stride_head")],
        ("o", ctypes.c_void_p),
        *[(n, ctypes.c_int64) for n in ("o_stride_token", "o_stride_head")],
        *[(n, ctypes.c_void_p) for n in ("lse", "partial_o", "partial_lse", "k", "v")],
        ("kv_strides", ctypes.c_int64 * 6),
        *[(n, ctypes.c_void_p) for n in ("k_scales", "v_scales")],
        *[(n, ctypes.c_float) for n in ("k_scale", "v_scale")],
        *[
            (n, ctypes.c_int32)
            for n in ("num_kv_heads", "group_size", "max_tokens", "max_partial_rows", "max_kv_lists")
        ],
        ("capture_key", ctypes.c_uint32 * 2),
        ("features", ctypes.c_int32),
        ("sm_scale_log2", ctypes.c_float),
        ("sm_scale", ctypes.c_float),
        ("plan_is_ready", ctypes.c_int32),
    ]


class VariantArgs(ctypes.Structure):
    """variant/variant.h, Args: 8 tables of an address and 4 strides."""

    class Table(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int32 * 4)]

    _fields_ = [("scalars", ctypes.c_uint32 * 16), ("tables", Table * 8)]


def cubin(name, abi=ABI, threads=THREADS, shared=SHARED, ctas=1):
    return f"{name} {abi} {threads} {shared} {ctas}".encode() + b"\0"


asked: list[tuple[str, str]] = []
NO_SUCH_VARIANT = "f" * 16  # there are no kernels of
_ffi.library()  # registers the real one, which this replaces


@tvm_ffi.register_global_func("tvm_infer.jit_cubin", override=True)
def jit_cubin(name, arch):
    asked.append((str(name), str(arch)))
    if name.endswith(NO_SUCH_VARIANT):
        raise errors.ExecutorError(f"variant {NO_SUCH_VARIANT} changes keys")
    if "read_ceiling" in str(name):
        return b""
    return cubin(name)


@pytest.fixture
def driver():
    _ffi.library()
    made = Driver()
    made.clear()
    asked.clear()
    yield made
    assert made.current_device() == -1  # no call leaves a context behind


def host_plan(num_ctas=132, kv_len=KV_LEN, **kwargs):
    settings = {
        "num_qo_heads": HQ,
        "num_kv_heads": HKV,
        "head_dim": DIM,
        "dtype": "bfloat16",
        "num_ctas": num_ctas,
        **kwargs,
    }
    return tvm_infer.plan(QO, kv_len, tile_table=tuple(_ffi.func("cuda_tile_table")("bfloat16", DIM)), **settings)


def paged(**changes):
    made = {
        "plan": index(host_plan().buffer),
        "q": tensor((ROWS, HQ, DIM)),
        "k_cache": tensor((PAGES, 2, HKV, PAGE, DIM)),
        "v_cache": None,
        "kv_layout": 0,
        "kv_page_indptr": index([0, 2, 3]),
        "kv_page_indices": index([4, 0, 2]),
        "sm_scale": 0.5,
        "workspace": tensor((7 * (DIM + 1) + 3,), "float32"),
        "o": tensor((ROWS, HQ, DIM)),
        "lse": tensor((ROWS, HQ), "float32"),
    }
    return {**made, **changes}


def attend(**changes):
    arguments = paged(**changes)
    _ffi.func("paged_attention")(*arguments.values())
    return arguments


def ragged(**changes):
    made = paged()
    made = {
        **{n: made[n] for n in ("plan", "q")},
        "k": tensor((23, HKV, DIM)),
        "v": tensor((23, HKV, DIM)),
        "kv_indptr": index([0, 20, 23]),
        **{n: made[n] for n in ("sm_scale", "workspace", "o", "lse")},
        **changes,
    }
    _ffi.func("ragged_attention")(*made.values())
    return made


def test_paged_launch(driver):
    a = attend()
    (launch,) = driver.launches()
    assert launch == {
        "name": "attention_bf16_h128_p16",
        "grid": "132,1,1",
        "block": f"{THREADS},1,1",
        "shared": str(SHARED),
        "stream": "0",
        "attributes": "1,6,1",
        "device": "0",
    }
    p = driver.params(Params)
    at = lambda name: addresses[id(a[name])]  # noqa: E731
    assert (p.plan, p.q, p.o, p.lse) == (at("plan"), at("q"), at("o"), at("lse"))
    assert (p.kv_indptr, p.kv_page_indices) == (at("kv_page_indptr"), at("kv_page_indices"))
    assert (p.q_stride_token, p.q_stride_head, p.o_stride_token, p.o_stride_head) == (HQ * DIM, DIM, HQ * DIM, DIM)
    assert p.partial_o == at("workspace") and p.partial_lse == at("workspace") + 7 * DIM * 4
    plane = HKV * PAGE * DIM
    assert (p.k, p.v) == (at("k_cache"), at("k_cache") + plane * 2)
    assert list(p.kv_strides) == [2 * plane, PAGE * DIM, DIM] * 2
    assert (p.num_kv_heads, p.group_size, p.max_tokens, p.max_partial_rows, p.max_kv_lists) == (
        HKV,
        HQ // HKV,
        ROWS,
        7,
        2,
    )
    assert list(p.capture_key) == [0, 0]
    assert p.sm_scale_log2 == pytest.approx(0.5 * math.log2(math.e), rel=1e-6)
    k_pages, v_pages, k_panels = driver.maps()
    assert k_pages == {
        "type": "9",
        "rank": "5",
        "base": str(p.k),
        "sizes": f"64,{PAGE},2,{HKV},{PAGES}",
        "strides": f"{DIM * 2},128,{PAGE * DIM * 2},{plane * 4}",
        "box": f"64,{PAGE},2,1,1",
        "element": "1,1,1,1,1",
        "modes": "0,3,2,0",
    }
    assert v_pages == {**k_pages, "base": str(p.v)} and k_panels == {**k_pages, "box": f"64,{PAGE},1,1,1"}


def test_a_variant_is_part_of_the_name_and_a_third_parameter(driver):
    made, table = paged(), tensor((4, 6), "float32", offset=2)
    call = _ffi.func("variant_call")("0123456789abcdef", 0, [0x40490FDB, -1], [table], 0)
    _ffi.func("variant_paged_attention")(*made.values(), call)
    (launch,) = driver.launches()
    assert launch["name"] == "attention_bf16_h128_p16_v0123456789abcdef"
    args = driver.variant_args(VariantArgs)
    assert list(args.scalars[:3]) == [0x40490FDB, 0xFFFFFFFF, 0]
    assert (args.tables[0].data, list(args.tables[0].strides)) == (addresses[id(table)], [6, 1, 0, 0])
    assert driver.params(Params).sm_scale == 0.5
    attend()
    assert driver.launches()[1]["name"] == "attention_bf16_h128_p16"
    assert driver.params(Params).plan_is_ready == 0  # whoever wrote the plan may still be at it


def test_what_a_plan_may_have_depends_on_the_call(driver):
    """Kernels refuse other plans: what they would make of them is not what was meant (attention/plan_check.cuh)."""
    made, new = paged(), [tensor((ROWS, HKV, DIM)) for _ in "kv"]
    call = _ffi.func("variant_call")("0123456789abcdef", 0, [], [], 0)
    features = lambda: driver.params(Params).features  # noqa: E731
    attend()
    assert features() == HEAD_LISTS | SHARED_WORKS
    ragged()
    assert features() == HEAD_LISTS | SHARED_WORKS
    _ffi.func("variant_paged_attention")(*made.values(), call)
    assert features() == ROW_MASKS
    taking = _ffi.func("variant_call")("0123456789abcdef", 0, [], [], 1)
    _ffi.func("variant_paged_attention")(*made.values(), taking)
    assert features() == ROW_MASKS | SHARED_WORKS
    arguments = list(made.values())
    _ffi.func("append_paged_attention")(*arguments[:2], *new, *arguments[2:])
    assert features() == SHARED_WORKS  # of both launches: neither runs where the other is refused


def test_a_variant_with_tables_elsewhere_is_refused_before_any_launch(driver):
    call = _ffi.func("variant_call")("0123456789abcdef", 0, [], [tensor((4,), "float32", device=(CUDA, 1))], 0)
    with pytest.raises(errors.ArgumentError, match=r"`variant` has tables on cuda:1, `q` is on cuda:0"):
        _ffi.func("variant_paged_attention")(*paged().values(), call)
    assert driver.launches() == []


def test_nothing_that_a_capture_forbids_after_the_first_call(driver):
    attend()
    driver.clear()
    driver.capture(True)
    attend()
    assert len(driver.launches()) == 1
    for name in ("cuStreamSynchronize", "cuMemcpyDtoH", "cuLibraryLoadData", "cuMemHostAlloc"):
        assert driver.calls(name) == []


def test_a_kernel_is_not_loaded_inside_a_capture(driver):
    driver.capture(True)
    with pytest.raises(errors.DeviceError, match=r"attention_bf16_h128_p64.*captured.*once before"):
        attend(k_cache=tensor((PAGES, 2, HKV, 64, DIM)))
    assert driver.calls("cuLibraryLoadData") == [] and asked == []


def test_other_device_and_layouts(driver):
    there = {"device": (CUDA, 1)}
    a = {
        "plan": index(host_plan().buffer, **there),
        "q": tensor((ROWS, HQ, DIM), "float16", **there),
        "k_cache": tensor((PAGES, 8, HKV, DIM), "float16", **there),
        "v_cache": tensor((PAGES, 8, HKV, DIM), "float16", strides=(9 * HKV * DIM, HKV * DIM, DIM, 1), **there),
        "kv_layout": 1,
        "kv_page_indptr": index([0, 2, 3], **there),
        "kv_page_indices": index([4, 0, 2], **there),
        "workspace": tensor((0,), "float32", **there),
        "o": tensor((ROWS, HQ, DIM), "float16", offset=32, **there),
        "lse": None,
    }
    a = attend(**a)
    (launch,) = driver.launches()
    assert (launch["name"], launch["device"]) == ("attention_fp16_h128_p8", "1")
    p = driver.params(Params)
    assert p.o == addresses[id(a["o"])] and p.lse is None and p.max_partial_rows == 0
    assert driver.maps()[0]["type"] == "6"
    assert driver.maps()[0]["strides"] == f"{HKV * DIM * 2},128,{DIM * 2},{8 * HKV * DIM * 2}"
    assert driver.maps()[1]["strides"] == f"{HKV * DIM * 2},128,{DIM * 2},{9 * HKV * DIM * 2}"
    assert asked == [("attention_fp16_h128_p8", "sm_90a")]
    assert driver.calls("cuKernelSetAttribute") == [f"8 {SHARED} 1"]


def test_head_dim_64_needs_two_maps_and_axes_of_one_any_stride(driver):
    k = tensor((1, 1, 32, 64), strides=(7, 3, 64, 1))
    a = {"q": tensor((ROWS, HQ, 64)), "o": tensor((ROWS, HQ, 64)), "k_cache": k, "v_cache": tensor((1, 1, 32, 64))}
    attend(**a)
    assert driver.launches()[0]["name"] == "attention_bf16_h64_p32"
    assert [m["box"] for m in driver.maps()] == ["64,32,1,1,1"] * 2
    assert driver.params(Params).group_size == HQ


def scaled(name="scaled_paged_attention", *, scales=(0.5, 0.25, None, None), variant=None, new=(), **changes):
    """A call with keys and values of 8 bits; `new`: k and v to append."""
    values = list(paged(**{"k_cache": tensor((PAGES, 2, HKV, PAGE, DIM), "float8_e4m3fn"), **changes}).values())
    _ffi.func(name)(*values[:2], *new, *values[2:], *scales, variant)


def test_eight_bit_keys_are_panels_of_128_bytes_with_scales(driver):
    cache, scales = (
        tensor((PAGES, 2, HKV, PAGE, DIM), "float8_e4m3fn"),
        tensor((HKV,), "float32", data=np.array([2, 3], np.float32)),
    )
    scaled(k_cache=cache, scales=(1.0, 0.25, scales, None))
    assert driver.launches()[0]["name"] == "attention_bf16_e4m3_h128_p16"
    p = driver.params(Params)
    plane = HKV * PAGE * DIM
    assert (p.k, p.v) == (addresses[id(cache)], addresses[id(cache)] + plane)
    assert list(p.kv_strides) == [2 * plane, PAGE * DIM, DIM] * 2
    assert (p.k_scales, p.k_scale, p.v_scales, p.v_scale) == (addresses[id(scales)], 1.0, None, 0.25)
    k_pages, v_pages = driver.maps()  # heads of 128 are one panel
    assert k_pages == {
        "type": "0",
        "rank": "5",
        "base": str(p.k),
        "sizes": f"128,{PAGE},1,{HKV},{PAGES}",
        "strides": f"{DIM},128,{PAGE * DIM},{2 * plane}",
        "box": f"128,{PAGE},1,1,1",
        "element": "1,1,1,1,1",
        "modes": "0,3,2,0",
    }
    assert v_pages == {**k_pages, "base": str(p.v)}
    attend()
    p = driver.params(Params)
    assert (p.k_scales, p.k_scale, p.v_scales, p.v_scale) == (None, 1.0, None, 1.0)


@pytest.mark.parametrize(
    ("head_dim", "columns", "panel", "panels", "swizzle", "promotion"),
    [
        (64, 64, 64, 1, 2, 1),
        (80, 80, 128, 1, 3, 1),
        (96, 96, 128, 1, 3, 1),
        (192, 64, 64, 3, 2, 1),
        (256, 128, 128, 2, 3, 2),
    ],
)
def test_eight_bit_heads_are_panels_that_the_swizzle_spans(
    driver, head_dim, columns, panel, panels, swizzle, promotion
):
    """Of heads of 80 and 96 the one panel ends behind them: the copy engine brings zeros. Rows of whole 128 bytes are fetched so."""
    cache = tensor((PAGES, 2, HKV, 32, head_dim), "float8_e5m2")
    outer = {n: tensor((ROWS, HQ, head_dim), "float16") for n in "qo"}
    scaled(k_cache=cache, **outer, workspace=tensor((0,), "float32"))
    assert driver.launches()[0]["name"] == f"attention_fp16_e5m2_h{head_dim}_p32"
    maps = driver.maps()
    assert [(m["type"], m["modes"]) for m in maps] == [("0", f"0,{swizzle},{promotion},0")] * len(maps)
    assert maps[0]["sizes"] == f"{columns},32,{panels},{HKV},{PAGES}"
    assert maps[0]["strides"] == f"{head_dim},{panel},{32 * head_dim},{2 * HKV * 32 * head_dim}"
    assert [m["box"] for m in maps] == [
        f"{panel},32,{panels},1,1", f"{panel},32,{panels},1,1", *([f"{panel},32,1,1,1"] if panels > 1 else [])
    ]  # fmt: skip


def test_nothing_is_appended_where_there_is_no_kernel_to_attend(driver):
    call = _ffi.func("variant_call")(NO_SUCH_VARIANT, 0, [], [], 0)
    with pytest.raises(errors.ExecutorError, match="changes keys"):
        scaled("scaled_append_attention", new=[tensor((ROWS, HKV, DIM)) for _ in "kv"], variant=call)
    assert driver.launches() == []


def test_a_variant_goes_with_eight_bits(driver):
    scaled(variant=_ffi.func("variant_call")("0123456789abcdef", 0, [0x40490FDB], [], 0))
    assert driver.launches()[0]["name"] == "attention_bf16_e4m3_h128_p16_v0123456789abcdef"
    assert driver.variant_args(VariantArgs).scalars[0] == 0x40490FDB


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_appends_to_eight_bits_are_kernels_of_their_own(driver, dtype):
    element = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    new = [tensor((ROWS, HKV, DIM), dtype) for _ in "kv"]
    scaled("scaled_append_attention", new=new, **{n: tensor((ROWS, HQ, DIM), dtype) for n in "qo"})
    names = [f"append_{element}_e4m3", f"attention_{element}_e4m3_h128_p16"]
    assert [launch["name"] for launch in driver.launches()] == names
    cache = tensor((PAGES, 2, HKV, PAGE, DIM), "float8_e5m2")
    arguments = [*new, index(QO), index(KV_LEN), cache, None, 0, index([0, 2, 3]), index([4, 0, 2])]
    _ffi.func("scaled_append")(*arguments, 0.5, 1.0, None, None)
    _ffi.func("append")(*arguments)  # both scales are 1
    assert [launch["name"] for launch in driver.launches()][2:] == [f"append_{element}_e5m2"] * 2


BAD_SCALED = [
    (
        "page size",
        errors.ExecutorError,
        "page_size 8.*8-bit elements in pages of 16, 32 and 64 tokens.*cpu executor takes any page_size",
        lambda: {"k_cache": tensor((PAGES, 2, HKV, 8, DIM), "float8_e4m3fn")},
    ),
    (
        "head_dim",
        errors.ExecutorError,
        r"`q` has head_dim 72 with 8-bit keys and values \(e5m2\).*for 64, 80, 96, 128, 192 and 256",
        lambda: {
            "k_cache": tensor((PAGES, 2, HKV, PAGE, 72), "float8_e5m2"),
            **{n: tensor((ROWS, HQ, 72)) for n in "qo"},
        },
    ),
    (
        "scale 0",
        errors.ArgumentError,
        "`k_scale` is 0; a scale is finite and above 0",
        lambda: {"scales": (0.0, 1.0, None, None)},
    ),
    ("scale nan", errors.ArgumentError, "`v_scale` is nan", lambda: {"scales": (1.0, float("nan"), None, None)}),
    (
        "scale shape",
        errors.ArgumentError,
        r"`v_scales` has shape \[3\]; dimension 0 must be 2",
        lambda: {"scales": (1.0, 1.0, None, tensor((3,), "float32"))},
    ),
    (
        "scale dtype",
        errors.DTypeError,
        "`k_scales` has dtype float16; it must be float32",
        lambda: {"scales": (1.0, 1.0, tensor((HKV,), "float16"), None)},
    ),
    (
        "scale place",
        errors.ArgumentError,
        "`k_scales` is on cuda:1",
        lambda: {"scales": (1.0, 1.0, tensor((HKV,), "float32", device=(CUDA, 1)), None)},
    ),
    (
        "scale of what has none",
        errors.ArgumentError,
        "`k_scale` is 0.5.*bfloat16 have no scale.*float8_e4m3fn or float8_e5m2",
        lambda: {"k_cache": tensor((PAGES, 2, HKV, PAGE, DIM))},
    ),
    (
        "a pair that is none",
        errors.DTypeError,
        "`q` has dtype bfloat16, `k_cache` has float16; they must be the same, or `k_cache` float8_e4m3fn or float8_e5m2",
        lambda: {"k_cache": tensor((PAGES, 2, HKV, PAGE, DIM), "float16"), "scales": (1.0, 1.0, None, None)},
    ),
]


@pytest.mark.parametrize(
    ("kind", "message", "changes"), [case[1:] for case in BAD_SCALED], ids=[c[0] for c in BAD_SCALED]
)
@pytest.mark.parametrize("appends", [False, True], ids=["attend", "append"])
def test_what_eight_bits_do_not_take_is_refused_before_any_launch(driver, kind, message, changes, appends):
    made = changes()
    head_dim = made["q"].shape[2] if "q" in made else DIM
    new = [tensor((ROWS, HKV, head_dim)) for _ in "kv"] if appends else ()
    with pytest.raises(kind, match=message):
        scaled("scaled_append_attention" if appends else "scaled_paged_attention", new=new, **made)
    assert driver.launches() == []


def test_ragged_keys_of_eight_bits_are_refused(driver):
    made = paged()
    keys = [tensor((23, HKV, DIM), "float8_e4m3fn") for _ in "kv"]
    rest = [made[n] for n in ("sm_scale", "workspace", "o", "lse")]
    with pytest.raises(
        errors.ExecutorError, match="has no pages; the cuda executor has kernels for 8-bit elements in pages"
    ):
        _ffi.func("scaled_ragged_attention")(
            made["plan"], made["q"], *keys, index([0, 20, 23]), *rest, 1.0, 1.0, None, None, None
        )
    assert driver.launches() == []


def test_scales_on_a_device_are_looked_at_where_debug_checks_are_on(driver):
    scales = tensor((HKV,), "float32", data=np.array([1, -2], np.float32))
    scaled(scales=(1.0, 1.0, scales, None))
    before = _ffi.func("set_debug_checks")(True)
    try:
        with pytest.raises(errors.ArgumentError, match="`k_scales` has -2 at entry 1; a scale is finite and above 0"):
            scaled(scales=(1.0, 1.0, scales, None))
    finally:
        _ffi.func("set_debug_checks")(before)
    assert len(driver.launches()) == 1


@pytest.mark.parametrize("page", [1, 2, 4])
def test_small_pages_are_gathered_without_maps(driver, page):
    attend(k_cache=tensor((PAGES, 2, HKV, page, DIM)))
    assert driver.launches()[0]["name"] == f"attention_bf16_h128_p{page}" and driver.maps() == []


def test_ragged_launch(driver):
    a = ragged()
    assert driver.launches()[0]["name"] == "attention_bf16_h128_ragged"
    k_map, _ = driver.maps()
    assert (k_map["sizes"], k_map["box"]) == (f"64,23,2,{HKV},1", "64,128,2,1,1")
    assert k_map["strides"].split(",")[:3] == [str(HKV * DIM * 2), "128", str(DIM * 2)]
    p = driver.params(Params)
    assert p.kv_indptr == addresses[id(a["kv_indptr"])] and p.kv_page_indices is None and p.max_kv_lists == 2


def contiguous(**changes):
    made = paged()
    made |= {"k": tensor((3, 12, HKV, DIM)), "v": tensor((3, 12, HKV, DIM)), "kv_start": index([14, 0])} | changes
    rest = [made[n] for n in ("sm_scale", "workspace", "o", "lse")]
    _ffi.func("contiguous_attention")(
        made["plan"], made["q"], made["k"], made["v"], made["kv_start"], *rest, 1.0, 1.0, None, None, None
    )
    return made


def test_contiguous_launch(driver):
    """Buffers are rows of one tensor for the same kernel, which reads first rows only."""
    cases = (
        ({}, 3 * 12, HKV * DIM, DIM),
        ({n: tensor((3, 12, HKV, DIM), strides=(40 * HKV * DIM, HKV * DIM, DIM, 1)) for n in "kv"}, 92, HKV * DIM, DIM),
        ({n: tensor((3, 12, HKV, DIM), strides=(HKV * 12 * DIM, DIM, 12 * DIM, 1)) for n in "kv"}, 60, DIM, 12 * DIM),
        ({n: tensor((50, HKV, DIM)) for n in "kv"}, 50, HKV * DIM, DIM),
    )
    for changes, rows, token, head in cases:
        driver.clear()
        a = contiguous(**changes)
        assert driver.launches()[0]["name"] == "attention_bf16_h128_ragged"
        k_map, _ = driver.maps()
        assert k_map["sizes"] == f"64,{rows},2,{HKV},1"
        assert k_map["strides"].split(",")[:3] == [str(token * 2), "128", str(head * 2)]
        p = driver.params(Params)
        assert p.kv_indptr == addresses[id(a["kv_start"])] and p.kv_page_indices is None and p.max_kv_lists == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": tensor((3, 12, HKV, DIM), strides=(9000, HKV * DIM, DIM, 1))}, "`k`.*strides 9000 from one buffer to the next"),
        ({"v": tensor((3, 13, HKV, DIM))}, "`k` and `v` have 12 and 13 rows from one buffer to the next"),
        ({"kv_start": index([0, 1], device=(CUDA, 1))}, "`kv_start` is on cuda:1"),
        ({"kv_start": index([[0, 1]])}, "`kv_start` has rank 2"),
    ],
)  # fmt: skip
def test_contiguous_refuses_before_any_launch(driver, changes, message):
    with pytest.raises(errors.ArgumentError, match=message):
        contiguous(**changes)
    assert driver.launches() == []


def test_contiguous_rows_are_looked_at_where_debug_checks_are_on(driver):
    before = _ffi.func("set_debug_checks")(True)
    try:
        with pytest.raises(errors.ArgumentError, match="`kv_start` is 17 for request 0, which has 20 keys"):
            contiguous(kv_start=index([17, 0]))
        contiguous(kv_start=index([16, 0]))
    finally:
        _ffi.func("set_debug_checks")(before)
    assert len(driver.launches()) == 1


def test_lists_of_heads(driver):
    """As many lists as the table has; appending by such a plan is refused where it is looked at."""
    lists = index(host_plan(kv_len=[[20, 9], [3, 16]]).buffer)
    tables = {"kv_page_indptr": index([0, 2, 3, 4, 5]), "kv_page_indices": index([4, 0, 1, 2, 3])}
    attend(plan=lists, **tables)
    assert driver.params(Params).max_kv_lists == 4
    before = _ffi.func("set_debug_checks")(True)
    try:
        attend(plan=lists, **tables)
        with pytest.raises(
            errors.PlanMismatchError, match="3 entries; 4 lists, one for each request and KV head, need 5"
        ):
            attend(plan=lists)
        new = [tensor((ROWS, HKV, DIM)) for _ in "kv"]
        made = paged(plan=lists, **tables)
        with pytest.raises(errors.PlanMismatchError, match="4 lists of 2 requests, which say nothing of where"):
            _ffi.func("append_paged_attention")(made.pop("plan"), made.pop("q"), *new, *made.values())
    finally:
        _ffi.func("set_debug_checks")(before)


@pytest.mark.parametrize(
    ("dim", "sizes", "box"),
    [(80, "80,23,1", "64,128,1"), (256, "64,23,4", "64,64,4")],  # one axis of columns, or one of panels; keys of a tile
)
def test_maps_of_other_widths(driver, dim, sizes, box):
    q, k = tensor((ROWS, HQ, dim)), tensor((23, HKV, dim))
    ragged(q=q, o=tensor((ROWS, HQ, dim)), k=k, v=tensor((23, HKV, dim)), workspace=tensor((7 * (dim + 1),), "float32"))
    assert driver.launches()[0]["name"] == f"attention_bf16_h{dim}_ragged"
    k_map, _ = driver.maps()
    assert (k_map["sizes"], k_map["box"]) == (f"{sizes},{HKV},1", f"{box},1,1")
    assert k_map["strides"].split(",")[0] == str(HKV * dim * 2)


def unequal(name="paged_attention", new=(), **changes):
    """Keys of 192, values and outputs of 128."""
    made = paged(
        q=tensor((ROWS, HQ, 192)),
        k_cache=tensor((PAGES, HKV, PAGE, 192)),
        v_cache=tensor((PAGES, HKV, PAGE, 128)),
        **changes,
    )
    values = list(made.values())
    _ffi.func(name)(*values[:2], *new, *values[2:])
    return made


def test_keys_wider_than_values(driver):
    a = unequal()
    assert driver.launches()[0]["name"] == "attention_bf16_h192_v128_p16"
    k_pages, v_pages, k_panels = driver.maps()
    assert (k_pages["sizes"], k_pages["box"]) == (f"64,{PAGE},3,{HKV},{PAGES}", f"64,{PAGE},3,1,1")
    assert (v_pages["sizes"], v_pages["box"]) == (f"64,{PAGE},2,{HKV},{PAGES}", f"64,{PAGE},2,1,1")
    assert k_pages["strides"] == f"{192 * 2},128,{PAGE * 192 * 2},{HKV * PAGE * 192 * 2}"
    assert v_pages["strides"] == f"{128 * 2},128,{PAGE * 128 * 2},{HKV * PAGE * 128 * 2}"
    assert k_panels == {**k_pages, "box": f"64,{PAGE},1,1,1"}
    p = driver.params(Params)
    workspace = addresses[id(a["workspace"])]
    assert (p.q_stride_head, p.o_stride_head) == (192, 128) and p.max_partial_rows == 7
    assert (p.partial_o, p.partial_lse) == (workspace, workspace + 7 * 128 * 4)
    driver.clear()
    unequal("append_paged_attention", [tensor((ROWS, HKV, 192)), tensor((ROWS, HKV, 128))])
    assert [launch["name"] for launch in driver.launches()] == ["append_b16_h192_v128", "attention_bf16_h192_v128_p16"]


@pytest.mark.parametrize(
    ("kind", "words", "call"),
    [
        (
            errors.ExecutorError,
            ["`q`", "head_dim 192 beside a head_dim_vo of 64", "for 192 with a head_dim_vo of 128"],
            lambda: attend(
                q=tensor((ROWS, HQ, 192)),
                k_cache=tensor((PAGES, HKV, PAGE, 192)),
                v_cache=tensor((PAGES, HKV, PAGE, 64)),
                o=tensor((ROWS, HQ, 64)),
            ),
        ),
        (
            errors.ArgumentError,
            ["`o`", "dimension 2 must be 128", "of values"],
            lambda: unequal(o=tensor((ROWS, HQ, 192))),
        ),
        (
            errors.ArgumentError,
            ["`v`", "dimension 2 must be 128", "cache's values"],
            lambda: unequal("append_paged_attention", [tensor((ROWS, HKV, 192)) for _ in "kv"]),
        ),
        (
            errors.ExecutorError,
            ["`k`", "head_dim 192 and `v` 64", "192 with 128"],
            lambda: _ffi.func("append")(
                tensor((ROWS, HKV, 192)), tensor((ROWS, HKV, 64)), index(QO), index(KV_LEN),
                tensor((PAGES, HKV, PAGE, 192)), tensor((PAGES, HKV, PAGE, 64)), 0, index([0, 2, 3]), index([4, 0, 2]),
            ),
        ),
        (
            errors.ExecutorError,
            ["`k_cache`", "head_dim 192 beside head_dim_vo 128", "no variant"],
            lambda: unequal_variant(),
        ),
    ],
)  # fmt: skip
def test_keys_wider_than_values_refuse_before_any_launch(driver, kind, words, call):
    with pytest.raises(kind) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert driver.launches() == []


def unequal_variant():
    made = paged(
        q=tensor((ROWS, HQ, 192)),
        k_cache=tensor((PAGES, HKV, PAGE, 192)),
        v_cache=tensor((PAGES, HKV, PAGE, 128)),
    )
    call = _ffi.func("variant_call")("0123456789abcdef", 0, [], [], 0)
    _ffi.func("variant_paged_attention")(*made.values(), call)


def test_no_tokens_no_pages(driver):
    empty = tensor((0, HQ, DIM))
    attend(q=empty, o=tensor((0, HQ, DIM)), lse=None)
    assert driver.launches() == []
    attend(k_cache=tensor((0, 2, HKV, PAGE, DIM)))  # requests without keys: a map needs an address all the same
    assert len(driver.launches()) == 1


def test_append_then_attend_on_one_stream(driver):
    a = paged()
    new = [tensor((ROWS, HKV, DIM)) for _ in "kv"]
    values = list(a.values())
    _ffi.func("append_paged_attention")(*values[:2], *new, *values[2:])
    assert [launch["name"] for launch in driver.launches()] == ["append_b16", "attention_bf16_h128_p16"]


def test_append_and_merge(driver):
    new = [tensor((ROWS, HKV, DIM)) for _ in "kv"]
    tables = [index([0, 2, 3]), index([4, 0, 2])]
    _ffi.func("append")(*new, index(QO), index(KV_LEN), tensor((PAGES, 2, HKV, PAGE, DIM)), None, 0, *tables)
    state = lambda: [tensor((ROWS, HQ, DIM), "float32"), tensor((ROWS, HQ), "float32")]  # noqa: E731
    _ffi.func("merge")(*state(), *state(), *state())
    assert [launch["name"] for launch in driver.launches()] == ["append_b16", "merge_states_fp32"]


def test_scale_lse(driver):
    _ffi.func("scale_lse")(tensor((100, HQ), "float32"), 1.5)
    (launch,) = driver.launches()
    assert launch["name"] == "scale_lse" and launch["grid"] == "3,1,1"  # 800 elements; the fake kernel says 384 threads
    _ffi.func("scale_lse")(tensor((0, HQ), "float32"), 1.5)
    assert len(driver.launches()) == 1


class RopeParams(ctypes.Structure):
    """cuda/params.h, RopeAppendParams: AppendParams, and what Q and its rotation need."""

    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("plan", "qo_indptr", "kv_len")],
        *[(n, ctypes.c_int32) for n in ("num_requests", "max_tokens")],
        *[(n, ctypes.c_void_p) for n in ("kv_page_indptr", "kv_page_indices", "k", "v")],
        ("kv_strides", ctypes.c_int64 * 4),
        *[(n, ctypes.c_void_p) for n in ("k_cache", "v_cache")],
        ("cache_strides", ctypes.c_int64 * 6),
        *[(n, ctypes.c_void_p) for n in ("k_scales", "v_scales")],
        *[(n, ctypes.c_float) for n in ("k_scale", "v_scale")],
        ("o", ctypes.c_void_p),
        ("o_strides", ctypes.c_int64 * 2),
        ("num_qo_heads", ctypes.c_int32),
        ("expected", ctypes.c_int32 * 8),
        *[(n, ctypes.c_int32) for n in ("num_kv_heads", "head_dim", "page_size", "plan_is_ready")],
        *[(n, ctypes.c_void_p) for n in ("q", "q_out")],
        ("q_strides", ctypes.c_int64 * 4),
        ("inv_freq", ctypes.c_void_p),
        ("magnitude", ctypes.c_float),
        *[(n, ctypes.c_int32) for n in ("rotary_dim", "is_interleaved")],
    ]


def rope_append(**changes):
    row = (HQ + 2 * HKV) * DIM  # q, k and v as slices of one tensor
    arguments = {
        **{n: tensor((ROWS, heads, DIM), strides=(row, DIM, 1)) for n, heads in (("q", HQ), ("k", HKV), ("v", HKV))},
        "inv_freq": tensor((DIM // 2,), "float32"),
        "interleaved": 0,
        "magnitude": 1.5,
        "plan": None,
        "qo_indptr": index(QO),
        "kv_len": index(KV_LEN),
        "k_cache": tensor((PAGES, 2, HKV, PAGE, DIM)),
        "v_cache": None,
        "kv_layout": 0,
        "kv_page_indptr": index([0, 2, 3]),
        "kv_page_indices": index([4, 0, 2]),
        "q_out": tensor((ROWS, HQ, DIM)),
        **changes,
    }
    _ffi.func("rope_append_paged")(*arguments.values())
    return arguments


def test_rope_append_launch(driver):
    a = rope_append()
    (launch,) = driver.launches()
    # 12 rows of 8 lanes: 3 steps of a warp a token; the fake says that a CTA has 12 warps
    assert (launch["name"], launch["grid"], launch["attributes"]) == ("rope_append_bf16", "1,1,1", "1,6,1")
    p = driver.rope_append_params(RopeParams)
    for name in (
        "q",
        "k",
        "v",
        "q_out",
        "k_cache",
        "qo_indptr",
        "kv_len",
        "kv_page_indptr",
        "kv_page_indices",
        "inv_freq",
    ):
        assert getattr(p, name) == addresses[id(a[name])], name
    row, plane = (HQ + 2 * HKV) * DIM, HKV * PAGE * DIM
    assert p.v_cache == p.k_cache + plane * 2 and list(p.cache_strides) == [2 * plane, PAGE * DIM, DIM] * 2
    assert list(p.kv_strides) == [row, DIM] * 2 and list(p.q_strides) == [row, DIM, HQ * DIM, DIM]
    assert (p.plan, p.num_requests, p.max_tokens, p.o) == (None, 2, ROWS, None)
    assert (p.num_qo_heads, p.num_kv_heads, p.head_dim, p.page_size) == (HQ, HKV, DIM, PAGE)
    assert (p.rotary_dim, p.is_interleaved, p.magnitude) == (DIM, 0, 1.5)


def test_rope_append_by_a_plan_of_another_dtype_and_device(driver):
    there = {"device": (CUDA, 1)}
    shape = {"q": HQ, "k": HKV, "v": HKV, "q_out": HQ}
    a = rope_append(
        **{n: tensor((ROWS, heads, DIM), "float16", **there) for n, heads in shape.items()},
        inv_freq=tensor((0,), "float32", **there),
        interleaved=1,
        plan=index(host_plan().buffer, **there),
        qo_indptr=None,
        kv_len=None,
        k_cache=tensor((PAGES, HKV, PAGE, DIM), "float16", **there),
        v_cache=tensor((PAGES, HKV, PAGE, DIM), "float16", **there),
        kv_page_indptr=index([0, 2, 3], **there),
        kv_page_indices=index([4, 0, 2], **there),
    )
    (launch,) = driver.launches()
    assert (launch["name"], launch["device"]) == ("rope_append_fp16", "1")
    p = driver.rope_append_params(RopeParams)
    assert (p.plan, p.qo_indptr, p.kv_len) == (addresses[id(a["plan"])], None, None)
    # KV heads, group, tokens, partial rows, lists, any capture key
    assert list(p.expected) == [HKV, HQ // HKV, ROWS, 2**31 - 1, 2, 0, 0, SHARED_WORKS | ROW_MASKS]
    assert (p.rotary_dim, p.is_interleaved) == (0, 1)


def test_rope_append_of_nothing_and_in_a_capture(driver):
    rope_append()
    driver.clear()
    none = {n: tensor((0, heads, DIM)) for n, heads in (("q", HQ), ("k", HKV), ("v", HKV), ("q_out", HQ))}
    rope_append(**none, qo_indptr=index([0, 0, 0]))
    assert driver.launches() == []
    driver.capture(True)
    rope_append()
    assert len(driver.launches()) == 1
    for name in ("cuStreamSynchronize", "cuMemcpyDtoH", "cuLibraryLoadData", "cuMemHostAlloc"):
        assert driver.calls(name) == []


ROPE_ERRORS = [
    (errors.ArgumentError, "`inv_freq` is on cpu, `q` on cuda:0", lambda: {"inv_freq": np.zeros(64, np.float32)}),
    (errors.ArgumentError, "`inv_freq` begins 4 bytes", lambda: {"inv_freq": tensor((64,), "float32", offset=4)}),
    (
        errors.ExecutorError,
        "`inv_freq` has 10 entries, a rotary_dim of 20.*multiple of 16",
        lambda: {"inv_freq": tensor((10,), "float32")},
    ),
    (errors.ArgumentError, "`q_out` begins 2 bytes", lambda: {"q_out": tensor((ROWS, HQ, DIM), offset=2)}),
    (
        errors.ArgumentError,
        "`q`.*stride 132 in dimension 1.*multiples of 16",
        lambda: {"q": tensor((ROWS, HQ, DIM), strides=(HQ * 132, 132, 1))},
    ),
    (errors.ArgumentError, "`q_out` is on cuda:1", lambda: {"q_out": tensor((ROWS, HQ, DIM), device=(CUDA, 1))}),
    (errors.ArgumentError, "`kv_page_indptr`.*dimension 0 must be 3", lambda: {"kv_page_indptr": index([0, 2])}),
    (errors.ArgumentError, "are None, None, given; pass either", lambda: {"qo_indptr": None}),
    (errors.PlanMismatchError, "`plan`, 40 bytes, is not a plan", lambda: {**BY_PLAN, "plan": index([0] * 10)}),
    (
        errors.ArgumentError,
        "`q` has 7 heads.*`k_cache` has 2",
        lambda: {**BY_PLAN, "q": tensor((ROWS, 7, DIM)), "q_out": tensor((ROWS, 7, DIM)), "plan": index([0] * 100)},
    ),
    (errors.ExecutorError, "`q` has head_dim 24.*multiple of 16", lambda: of_heads(24)),
    (errors.ExecutorError, "`k` has dtype float32.*float16 and bfloat16", lambda: of_heads(DIM, "float32")),
]
BY_PLAN = {"qo_indptr": None, "kv_len": None}


def of_heads(head_dim, dtype="bfloat16"):
    """All tensors of a call with other heads."""
    rows = {n: tensor((ROWS, h, head_dim), dtype) for n, h in (("q", HQ), ("k", HKV), ("v", HKV), ("q_out", HQ))}
    cache = tensor((PAGES, 2, HKV, PAGE, head_dim), dtype)
    return {**rows, "k_cache": cache, "inv_freq": tensor((0,), "float32")}


@pytest.mark.parametrize(("kind", "words", "changes"), ROPE_ERRORS, ids=[row[1] for row in ROPE_ERRORS])
def test_rope_append_refuses_before_any_launch(driver, kind, words, changes):
    with pytest.raises(kind, match=words):
        rope_append(**changes())
    assert driver.launches() == []


ERRORS = [
    (
        "dtype",
        errors.ExecutorError,
        ["`q`", "float32", "float16 and bfloat16", "cpu"],
        lambda: {"q": tensor((ROWS, HQ, DIM), "float32"), "o": tensor((ROWS, HQ, DIM), "float32")},
    ),
    (
        "head_dim",
        errors.ExecutorError,
        ["`q`", "head_dim 40", "64, 80, 96, 128, 192 and 256"],
        lambda: {"q": tensor((ROWS, HQ, 40)), "o": tensor((ROWS, HQ, 40))},
    ),
    (
        "page_size",
        errors.ExecutorError,
        ["`k_cache`", "page_size 24", "8"],
        lambda: {"k_cache": tensor((PAGES, 2, HKV, 24, DIM))},
    ),
    (
        "plan on the host",
        errors.ArgumentError,
        ["`plan`", "cpu", "cuda:0"],
        lambda: {"plan": index([0] * 64, device=(CPU, 0))},
    ),
    (
        "table elsewhere",
        errors.ArgumentError,
        ["`kv_page_indices`", "cuda:1", "cuda:0"],
        lambda: {"kv_page_indices": index([0], device=(CUDA, 1))},
    ),
    (
        "cache pinned",
        errors.ArgumentError,
        ["`k_cache`", "pinned", "cuda:0"],
        lambda: {"k_cache": tensor((PAGES, 2, HKV, PAGE, DIM), device=(PINNED, 0))},
    ),
    (
        "q elsewhere",
        errors.ExecutorError,
        ["`q`", "device type 10", "cpu", "cuda"],
        lambda: {"q": tensor((ROWS, HQ, DIM), device=(ROCM, 0))},
    ),
    ("no such device", errors.ExecutorError, ["cuda device 9", "3 devices"], lambda: on_device(9)),
    ("architecture", errors.ExecutorError, ["Fake A100", "sm_80", "sm_90a", "cpu"], lambda: on_device(2)),
    ("plan too short", errors.PlanMismatchError, ["`plan`", "40 bytes"], lambda: {"plan": index([0] * 10)}),
    ("plan dtype", errors.DTypeError, ["`plan`", "float32", "int32"], lambda: {"plan": tensor((64,), "float32")}),
    ("plan misaligned", errors.ArgumentError, ["`plan`", "4 bytes", "16"], lambda: {"plan": index([0] * 64, offset=4)}),
    ("q misaligned", errors.ArgumentError, ["`q`", "2 bytes", "16"], lambda: {"q": tensor((ROWS, HQ, DIM), offset=2)}),
    (
        "q stride",
        errors.ArgumentError,
        ["`q`", "dimension 1", "multiples of 16"],
        lambda: {"q": tensor((ROWS, HQ, DIM), strides=(HQ * 132, 132, 1))},
    ),
    ("o misaligned", errors.ArgumentError, ["`o`", "8 bytes"], lambda: {"o": tensor((ROWS, HQ, DIM), offset=8)}),
    (
        "cache stride",
        errors.ArgumentError,
        ["`k_cache`", "dimension 3"],
        lambda: {
            "k_cache": tensor(
                (PAGES, 2, HKV, PAGE, DIM), strides=(2 * HKV * PAGE * 130, HKV * PAGE * 130, PAGE * 130, 130, 1)
            )
        },
    ),
    (
        "workspace misaligned",
        errors.ArgumentError,
        ["`workspace`", "4 bytes"],
        lambda: {"workspace": tensor((500,), "float32", offset=4)},
    ),
    (
        "lse strided",
        errors.ArgumentError,
        ["`lse`", "contiguous"],
        lambda: {"lse": tensor((ROWS, HQ), "float32", strides=(2 * HQ, 1))},
    ),
    ("lse dtype", errors.DTypeError, ["`lse`", "float16", "float32"], lambda: {"lse": tensor((ROWS, HQ), "float16")}),
    ("scale 0", errors.ArgumentError, ["`sm_scale` is 0", "above 0"], lambda: {"sm_scale": 0.0}),
    ("scale negative", errors.ArgumentError, ["`sm_scale` is -1"], lambda: {"sm_scale": -1.0}),
    ("scale nan", errors.ArgumentError, ["`sm_scale` is "], lambda: {"sm_scale": float("nan")}),
    ("scale infinite", errors.ArgumentError, ["`sm_scale` is inf"], lambda: {"sm_scale": float("inf")}),
    (
        "heads",
        errors.ArgumentError,
        ["`q`", "8 heads", "`k_cache` has 3"],
        lambda: {"k_cache": tensor((PAGES, 2, 3, PAGE, DIM))},
    ),
    (
        "cache dtype",
        errors.DTypeError,
        ["`q`", "bfloat16", "`k_cache`"],
        lambda: {"k_cache": tensor((PAGES, 2, HKV, PAGE, DIM), "float16")},
    ),
    ("o shape", errors.ArgumentError, ["`o`", "dimension 0"], lambda: {"o": tensor((ROWS + 1, HQ, DIM))}),
    (
        "table dtype",
        errors.DTypeError,
        ["`kv_page_indptr`", "float32"],
        lambda: {"kv_page_indptr": tensor((3,), "float32")},
    ),
    ("table empty", errors.ArgumentError, ["`kv_page_indptr`", "empty"], lambda: {"kv_page_indptr": index([])}),
]


def on_device(number):
    """All tensors of a call on another device."""
    there = {"device": (CUDA, number)}
    return {
        "plan": index(host_plan().buffer, **there),
        "q": tensor((ROWS, HQ, DIM), **there),
        "k_cache": tensor((PAGES, 2, HKV, PAGE, DIM), **there),
        "kv_page_indptr": index([0, 2, 3], **there),
        "kv_page_indices": index([4, 0, 2], **there),
        "workspace": tensor((0,), "float32", **there),
        "o": tensor((ROWS, HQ, DIM), **there),
        "lse": None,
    }


@pytest.mark.parametrize(("kind", "words", "changes"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_bad_arguments_are_refused_before_any_launch(driver, kind, words, changes):
    with pytest.raises(kind) as caught:
        attend(**changes())
    for word in words:
        assert word in str(caught.value)
    assert driver.launches() == []


def test_gather_spans_below_64_gib(driver):
    # One page of two tokens 64 GiB apart; its memory, all of it but the pages written to, exists as addresses only.
    with pytest.raises(errors.ArgumentError, match=r"`k_cache` spans 68719476736 bytes.*64 GiB.*larger pages"):
        attend(k_cache=tensor((1, 1, 2, DIM), strides=(1 << 40, 1 << 40, 1 << 35, 1)), v_cache=tensor((1, 1, 2, DIM)))
    assert driver.launches() == []


def test_query_spans_below_64_gib(driver):
    with pytest.raises(errors.ArgumentError, match=r"`q` spans .* bytes.*64 GiB.*fewer tokens"):
        attend(q=tensor((2, HQ, DIM), strides=(1 << 36, DIM, 1)), o=tensor((2, HQ, DIM)), lse=None)
    assert driver.launches() == []


def test_driver_errors_have_a_name_and_leave_the_context_alone(driver):
    attend()
    driver.clear()
    driver.fail("cuLaunchKernelEx", 700)
    with pytest.raises(
        errors.DeviceError,
        match=r"cuLaunchKernelEx of `attention_bf16_h128_p16` failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)",
    ):
        attend()
    driver.fail("cuTensorMapEncodeTiled", 1)
    with pytest.raises(errors.DeviceError, match="cuTensorMapEncodeTiled"):
        attend()
    attend()


def test_cubins_by_name(driver):
    add = _ffi.func("add_cubin")
    call = {"q": tensor((ROWS, HQ, 64)), "o": tensor((ROWS, HQ, 64)), "k_cache": tensor((PAGES, 2, HKV, 64, 64))}
    name = "attention_bf16_h64_p64"
    add(name, "sm_80", cubin(name))  # for another architecture: not used
    add(name, "sm_90a", cubin(name, abi=99))
    with pytest.raises(errors.AbiError, match=rf"{name}.*ABI 99.*launches {ABI}"):
        attend(**call)
    assert driver.calls("cuLibraryUnload") == [""] and asked == []
    add(name, "sm_90a", cubin(name, shared=10**6))
    with pytest.raises(errors.ExecutorError, match=r"1000000 bytes of shared memory.*232448"):
        attend(**call)
    add(name, "sm_90a", b"garbage\0")
    with pytest.raises(errors.DeviceError, match=f"cuLibraryLoadData of `{name}`"):
        attend(**call)
    add(name, "sm_90a", cubin("other"))
    with pytest.raises(errors.DeviceError, match=f"cuLibraryGetKernel of `{name}`"):
        attend(**call)
    add(name, "sm_90a", cubin(name, ctas=2, threads=128))
    attend(**call, plan=index(host_plan(num_ctas=264).buffer))
    header_bytes = tvm_infer.schedule.plan.HEADER.itemsize
    attend(**call, plan=index(host_plan(num_ctas=100).buffer[: (header_bytes + 100 * 48) // 4]))
    # two CTAs a multiprocessor; never more than the plan's tensor has first works for
    assert [(x["grid"], x["block"]) for x in driver.launches()] == [("264,1,1", "128,1,1"), ("100,1,1", "128,1,1")]
    add(name, "sm_90a", cubin(name, ctas=2, threads=128))  # the same again
    with pytest.raises(errors.ArgumentError, match=f"{name}.*loaded already"):
        add(name, "sm_90a", cubin(name))
    with pytest.raises(errors.ArgumentError, match="empty"):
        add("x", "sm_90a", b"")


def test_a_kernel_that_nobody_makes(driver):
    x, total = tensor((64,), "float32"), index([0])
    with pytest.raises(errors.ExecutorError, match=r"`read_ceiling` for sm_90a.*tvm-infer build"):
        _ffi.func("read_ceiling")(x, total)
    assert asked == [("read_ceiling", "sm_90a")]


def test_cuda_info(driver):
    info = _ffi.func("cuda_info")
    assert (info(0), info(2)) == ("sm_90a 132 Fake H200", "sm_80 108 Fake A100")
    for number in (-1, 3, 1000):
        with pytest.raises(errors.ExecutorError, match=f"no cuda device {number}.*3 devices"):
            info(number)


@pytest.fixture
def debug_checks():
    before = _ffi.func("set_debug_checks")(True)
    yield
    _ffi.func("set_debug_checks")(before)


DEBUG_ERRORS = [
    (errors.PlanMismatchError, "not a plan", lambda: {"plan": index([0] * 64)}),
    (errors.ArgumentError, "page 5 at entry 1", lambda: {"kv_page_indices": index([4, 5, 2])}),
    (errors.PlanMismatchError, "kv_len 20", lambda: {"kv_page_indptr": index([0, 1, 3])}),
    (errors.ArgumentError, "ends at 9", lambda: {"kv_page_indptr": index([0, 2, 9])}),
    (
        errors.PlanMismatchError,
        "`q` has 3 tokens",
        lambda: {"q": tensor((3, HQ, DIM)), "o": tensor((3, HQ, DIM)), "lse": None},
    ),
    (errors.PlanMismatchError, "1 KV heads", lambda: {"k_cache": tensor((PAGES, 2, 1, PAGE, DIM))}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), DEBUG_ERRORS, ids=[row[1] for row in DEBUG_ERRORS])
def test_debug_checks_read_the_device(driver, debug_checks, kind, words, changes):
    with pytest.raises(kind, match=words):
        attend(**changes())
    assert driver.launches() == [] and driver.calls("cuStreamSynchronize")
    attend()
    assert len(driver.launches()) == 1


def test_debug_checks_stay_out_of_a_capture(driver, debug_checks):
    attend()
    driver.clear()
    driver.capture(True)
    attend(kv_page_indices=index([4, 5, 2]))
    assert len(driver.launches()) == 1 and driver.calls("cuStreamSynchronize") == []


def test_debug_checks_of_ragged_and_append(driver, debug_checks):
    with pytest.raises(errors.PlanMismatchError, match="request 0 19 keys"):
        ragged(kv_indptr=index([0, 19, 22]))
    ragged()
    new = [tensor((ROWS, HKV, DIM)) for _ in "kv"]
    with pytest.raises(errors.ArgumentError, match="`kv_len` is 2 for request 1"):
        cache = tensor((PAGES, 2, HKV, PAGE, DIM))
        _ffi.func("append")(*new, index(QO), index([20, 2]), cache, None, 0, index([0, 2, 3]), index([4, 0, 2]))


def test_debug_checks_of_rope_append(driver, debug_checks):
    rope_append()
    rope_append(**BY_PLAN, plan=index(host_plan().buffer))
    assert len(driver.launches()) == 2
    driver.clear()
    with pytest.raises(errors.ArgumentError, match="`kv_len` is 2 for request 1"):
        rope_append(kv_len=index([20, 2]))
    with pytest.raises(errors.ArgumentError, match="page 5 at entry 1"):
        rope_append(**BY_PLAN, plan=index(host_plan().buffer), kv_page_indices=index([4, 5, 2]))
    with pytest.raises(errors.PlanMismatchError, match="not a plan"):
        rope_append(**BY_PLAN, plan=index([0] * 100))
    assert driver.launches() == []


def test_plan_status(driver):
    status, header = _ffi.func("plan_status"), tvm_infer.schedule.plan.HEADER
    words = host_plan().buffer.copy()
    assert status(index(words)) == 0
    words[words.view(np.uint8)[: header.itemsize].view(header)[0]["tickets_offset"] // 4] = 4
    assert status(index(words)) == 4
    assert status(index(np.zeros(100, np.int32))) == 1 and status(index([1, 2])) == 1
    with pytest.raises(errors.ArgumentError, match="`plan_device` is on the host"):
        status(words)


CHECKS = [
    (None, None, {}),
    (None, None, {"tokens": 9, "lists": 7, "sms": 200, "rows": 10**6}),
    (errors.PlanMismatchError, "4 query tokens; `q` has 3", {"tokens": 3}),
    (errors.PlanMismatchError, "8 query heads and 2 KV heads; the tensors have 16 and 2", {"qo_heads": 16}),
    (errors.PlanMismatchError, "the tensors have 8 and 4", {"kv_heads": 4}),
    (errors.PlanMismatchError, "132 CTAs; the device runs 108", {"sms": 108}),
    (errors.PlanMismatchError, "2 requests; the page table has 1", {"lists": 1}),
    (errors.WorkspaceError, "holds -1 partial rows", {"rows": -1}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), CHECKS)
def test_check_plan(driver, kind, words, changes):
    values = {"tokens": ROWS, "qo_heads": HQ, "kv_heads": HKV, "rows": 10**6, "lists": 2, "sms": 132, **changes}
    call = lambda: _ffi.func("check_plan")(host_plan().buffer, *values.values())  # noqa: E731
    if kind is None:
        call()
    else:
        with pytest.raises(kind, match=words):
            call()


# The KV cache, whose device memory is the host's here

CACHE = {
    "num_layers": 2,
    "num_qo_heads": HQ,
    "num_kv_heads": HKV,
    "head_dim": DIM,
    "dtype": "bfloat16",
    "page_size": PAGE,
}
CACHE_SIZE = {"num_pages": 12, "max_batch": 4, "max_tokens": 40, "device": "cuda:1"}


def words(address, count):
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_int32)), (count,))


def rows(count, heads, device=(CUDA, 1)):
    return tensor((count, heads, DIM), device=device)


def test_cache_on_a_device_owns_and_frees_its_memory(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    assert cache.device == "cuda:1" and cache.num_ctas == 132
    allocated = [int(call) for call in driver.calls("cuMemAlloc")]
    assert (
        allocated[0] == 2 * 12 * 2 * HKV * PAGE * DIM * 2 and len(allocated) == 3
    )  # pages, a step's tables, partial results
    driver.clear()
    del cache
    assert len(driver.calls("cuMemFree")) == 3


def test_cache_step_is_one_copy_and_two_launches_a_layer(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    for seq in (5, 6):
        cache.add_sequence(seq)
    cache.begin_step([5, 6], [20, 1], token_ids=np.arange(21), logit_rows=np.array([19, 20]))
    driver.clear()
    cache.attention(1, rows(21, HQ), rows(21, HKV), rows(21, HKV), out=rows(21, HQ))
    assert [launch["name"] for launch in driver.launches()] == ["append_b16", "attention_bf16_h128_p16"]
    params = driver.params(Params)
    base = params.kv_page_indices
    indptr = words(params.kv_indptr, 3)
    assert words(base, indptr[2])[indptr[0] : indptr[1]].tolist() == list(cache.page_table(5))
    assert words(base, indptr[2])[indptr[1] : indptr[2]].tolist() == list(cache.page_table(6))
    plan = np.array(cache.plan.buffer)
    np.testing.assert_array_equal(words(params.plan, plan.size), plan)
    assert list(params.capture_key) == plan[2:4].view(np.uint32).tolist() != [0, 0]
    assert (params.max_tokens, params.max_kv_lists) == (21, 4)
    cache.end_forward()
    # the next step: same addresses, one copy of what is used
    before = (params.plan, params.kv_indptr, params.kv_page_indices)
    driver.clear()
    cache.begin_step([6, 5], [1, 1], num_rows=4, token_ids=np.array([3, 4]))
    (upload,) = driver.calls("cuMemcpyHtoDAsync")
    used = params.plan - params.kv_indptr + np.array(cache.plan.buffer).nbytes
    assert used < int(upload) < used + 8 * 128  # page indices, tokens and positions: each begins on a line
    cache.attention(0, rows(4, HQ), rows(4, HKV), rows(4, HKV), out=rows(4, HQ))
    params = driver.params(Params)
    assert (params.plan, params.kv_indptr, params.kv_page_indices) == before and params.max_tokens == 4
    # tokens, then positions, left of the page table
    assert words(params.kv_indptr - 256, 8)[::2].tolist() == [3, 4, 0, 0]
    assert words(params.kv_indptr - 128, 8)[::2].tolist() == [1, 20, 0, 0]


def test_cache_of_eight_bits(driver):
    sizes = {**CACHE, **CACHE_SIZE}
    cache = tvm_infer.PagedKVCache(**sizes, kv_dtype="float8_e4m3fn")
    assert 2 * cache.bytes_per_page == tvm_infer.PagedKVCache(**sizes).bytes_per_page
    driver.clear()
    cache.set_scales([[1, 2], [3, 4]], [5, 6])
    assert driver.calls("cuMemcpyHtoDAsync") == ["16", "16"]
    cache.add_sequence(0)
    with cache.forward([0], [20]):
        driver.clear()
        cache.attention(1, rows(20, HQ), rows(20, HKV), rows(20, HKV), out=rows(20, HQ))
    assert [launch["name"] for launch in driver.launches()] == ["append_bf16_e4m3", "attention_bf16_e4m3_h128_p16"]
    params = driver.params(Params)
    scales = [
        np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (HKV,))
        for at in (params.k_scales, params.v_scales)
    ]
    assert [x.tolist() for x in scales] == [[3, 4], [6, 6]]
    with pytest.raises(errors.CacheStateError, match="holds 1 sequences, which were stored with other scales"):
        cache.set_scales(1.0, 1.0)
    driver.clear()
    _ffi.func("kv_cache_move_tokens")(cache, [0] * 3, [17, 18, 19], [4, 5, 6])
    assert [(x["name"], x["grid"]) for x in driver.launches()] == [("move_tokens", "1,1,1")]
    rope = variant.rope.bind(inv_freq=np.ones(64, np.float32), magnitude=1.0)
    with pytest.raises(errors.ExecutorError, match=r"changes queries, and the call has keys of 8 bits.*in 16 bits"):
        cache.set_variant(rope)
    cache.set_variant(variant.soft_cap.bind(cap=20.0), layers=[0])
    cache.set_variant(variant.sliding_window.bind(window=20))  # a band is the plan's business
    with pytest.raises(errors.ExecutorError, match=r"`page_size` is 8; .* 8-bit elements in pages of 16, 32 and 64"):
        tvm_infer.PagedKVCache(**{**sizes, "page_size": 8}, kv_dtype="float8_e5m2")
    with pytest.raises(errors.ExecutorError, match="`head_dim` has head_dim 72 with 8-bit keys"):
        tvm_infer.PagedKVCache(**{**sizes, "head_dim": 72}, kv_dtype="float8_e5m2")


def test_cache_of_eight_bits_rotates_in_the_launch_that_appends(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE, kv_dtype="float8_e5m2", k_scale=0.5)
    cache.set_rope(tvm_infer.RopeConfig(64, 500.0))
    cache.add_sequence(0)
    with cache.forward([0], [4]):
        driver.clear()
        cache.attention_fused_qkv(0, rows(4, HQ + 2 * HKV), out=rows(4, HQ))
    assert [x["name"] for x in driver.launches()] == ["rope_append_bf16_e5m2", "attention_bf16_e5m2_h128_p16"]
    p, attention = driver.rope_append_params(RopeParams), driver.params(Params)
    assert (p.k_scales, p.v_scales, p.k_cache) == (attention.k_scales, attention.v_scales, attention.k)


def test_cache_copies_shared_pages_in_one_launch(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    cache.add_sequence(0)
    with cache.forward([0], [20]):
        pass
    cache.fork_sequence(0, 1), cache.fork_sequence(0, 2)
    driver.clear()
    cache.begin_forward([0, 1, 2], [1, 1, 1])
    assert len(driver.calls("cuMemcpyHtoDAsync")) == 1
    (launch,) = driver.launches()
    assert launch["name"] == "copy_pages" and launch["grid"] == "4,1,1"  # two copies in two layers


def test_cache_keeps_the_places_of_pages_that_left_a_window(driver):
    """The append takes a request's first entry for the end of the one before: those of pages that are gone must have their place."""
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    cache.set_variant(variant.sliding_window.bind(window=20))
    for seq in (5, 6):
        cache.add_sequence(seq)
    for lengths in ([20, 20], [20, 1], [20, 1], [20, 1], [1, 1]):
        cache.begin_forward([5, 6], lengths)
        driver.clear()
        cache.attention(0, *(rows(sum(lengths), h) for h in (HQ, HKV, HKV)), out=rows(sum(lengths), HQ))
        cache.end_forward()
    params = driver.params(Params)
    indptr = words(params.kv_indptr, 3)
    assert np.diff(indptr).tolist() == [6, 2]  # 81 and 24 tokens
    table = words(params.kv_page_indices + 4 * int(indptr[0]), 8).tolist()
    assert table == [*cache.page_table(5), *cache.page_table(6)]
    assert table[:3] == [-1, -1, -1] and min(table[3:]) >= 0


def test_cache_of_keys_wider_than_values(driver):
    sizes = {**CACHE, **CACHE_SIZE, "head_dim": 192, "head_dim_vo": 128}
    cache = tvm_infer.PagedKVCache(**sizes)
    assert cache.bytes_per_page == 2 * HKV * PAGE * (192 + 128) * 2
    cache.add_sequence(5)
    driver.clear()
    rows = lambda heads, width: tensor((20, heads, width), device=(CUDA, 1))  # noqa: E731
    with cache.forward([5], [20]):
        driver.clear()
        cache.attention(1, rows(HQ, 192), rows(HKV, 192), rows(HKV, 128), out=rows(HQ, 128))
        assert [x["name"] for x in driver.launches()] == ["append_b16_h192_v128", "attention_bf16_h192_v128_p16"]
        p = driver.params(Params)
        assert p.v - p.k == HKV * PAGE * 192 * 2
        page = HKV * PAGE * (192 + 128)
        assert list(p.kv_strides) == [page, PAGE * 192, 192, page, PAGE * 128, 128]
        for q, v, out, name in ((192, 192, 128, "v"), (192, 128, 192, "out"), (128, 128, 128, "q")):
            with pytest.raises(errors.ArgumentError, match=f"`{name}`.*dimension 2 must be"):
                cache.attention(1, rows(HQ, q), rows(HKV, 192), rows(HKV, v), out=rows(HQ, out))
    driver.clear()
    _ffi.func("kv_cache_move_tokens")(cache, [5], [17], [4])
    assert [launch["name"] for launch in driver.launches()] == ["move_tokens"] * 2  # keys, then values
    cache.remove_sequence(5)
    with pytest.raises(errors.ExecutorError, match=r"head_dim 192 beside head_dim_vo 128.*where they are equal"):
        cache.set_rope(tvm_infer.RopeConfig(64))
    with pytest.raises(errors.ExecutorError, match="head_dim 192 beside a head_dim_vo of 64"):
        tvm_infer.PagedKVCache(**{**sizes, "head_dim_vo": 64})
    with pytest.raises(errors.ExecutorError, match="head_dim_vo of 128 with 8-bit keys"):
        tvm_infer.PagedKVCache(**sizes, kv_dtype="float8_e4m3fn")


def test_cache_moves_tokens_in_one_launch(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    cache.add_sequence(0)
    with cache.forward([0], [20]):
        pass
    driver.clear()
    _ffi.func("kv_cache_move_tokens")(cache, [0] * 3, [17, 18, 19], [4, 5, 6])
    (launch,) = driver.launches()
    assert (
        launch["name"] == "move_tokens" and launch["grid"] == "1,1,1"
    )  # 2 layers, 4 heads' planes, 8 vectors of a row
    assert driver.calls("cuMemcpyHtoDAsync") == []
    driver.clear()
    _ffi.func("kv_cache_move_tokens")(cache, [0] * 129, [19] * 129, [4] * 129)
    assert [launch["name"] for launch in driver.launches()] == ["move_tokens"] * 2
    _ffi.func("kv_cache_move_tokens")(cache, [], [], [])


def all_pages(cache, driver):
    """uint16 [layers, pages, 2, heads, page_size, head_dim]: the memory of a cache that was just made."""
    (address,) = (base for base, size in driver.allocations() if size == 12 * cache.bytes_per_page)
    flat = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint16)), (6 * cache.bytes_per_page,))
    return flat.reshape(2, 12, 2, HKV, PAGE, DIM)


def test_cache_swaps_in_one_copy_for_each_run_of_pages(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    memory = all_pages(cache, driver)
    memory[:] = np.arange(memory.size, dtype=np.uint32).astype(np.uint16).reshape(memory.shape)
    for seq, length in ((0, 20), (1, 5), (2, 40)):
        cache.add_sequence(seq)
        with cache.forward([seq], [length]):
            pass
    with cache.forward([0], [30]):
        pass
    assert cache.page_table(0) == (0, 1, 6, 7)
    held = memory[:, [0, 1, 6, 7]].copy()
    driver.clear()
    cache.swap_out(0)
    page = HKV * 2 * PAGE * DIM * 2  # bytes
    assert driver.calls("cuMemcpy3DAsync") == [f"to_host {page},2,2"] * 2 and driver.calls("cuMemHostAlloc") == ["1"]
    assert not driver.calls("cuStreamSynchronize") and not driver.calls("cuEventSynchronize")
    memory[:, [0, 1, 6, 7]] = 0xFFFF  # NaN: others write there now
    cache.fork_sequence(1, 3)
    with cache.forward([1, 3], [1, 1]):
        pass
    driver.clear()
    cache.swap_in(0)
    table = list(cache.page_table(0))
    assert sorted(call.split()[0] for call in driver.calls("cuMemcpy3DAsync")) == ["to_device"] * len(
        [i for i in range(4) if i == 0 or table[i] != table[i - 1] + 1]
    )
    assert not driver.calls("cuEventSynchronize") and not driver.calls("cuMemHostAlloc")
    np.testing.assert_array_equal(memory[:, table], held)
    # the block is used again, behind the copy that read it
    driver.clear()
    cache.swap_out(1)
    assert not driver.calls("cuMemHostAlloc") and driver.calls("cuEventSynchronize") == [""]
    state = cache.export_sequence(0)
    assert state.kv.shape == (2, 2, 50, HKV, DIM)
    rows = held.transpose(0, 2, 1, 4, 3, 5).reshape(2, 2, 64, HKV, DIM)[:, :, :50]
    np.testing.assert_array_equal(state.kv.view(np.uint16), rows)
    cache.remove_sequence(0)
    cache.import_sequence(9, state)
    back = memory[:, list(cache.page_table(9))].transpose(0, 2, 1, 4, 3, 5).reshape(2, 2, 64, HKV, DIM)[:, :, :50]
    np.testing.assert_array_equal(back, rows)


def test_cache_swaps_fail_whole(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE, prefix_reuse=True)
    cache.add_sequence(0)
    with cache.forward([0], [40]):
        pass
    before = list(cache._call("debug_state"))
    for function in ("cuEventCreate", "cuMemHostAlloc", "cuMemcpy3DAsync", "cuEventRecord"):
        driver.fail(function, 700)
        with pytest.raises(errors.DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            cache.swap_out(0)
        assert list(cache._call("debug_state")) == before and not cache.is_swapped_out(0)
        # nothing would say when the copies are done that were begun
        assert bool(driver.calls("cuStreamSynchronize")) == (function in ("cuMemcpy3DAsync", "cuEventRecord"))
        driver.clear()
    driver.capture(True)
    for call in (cache.swap_out, cache.export_sequence):
        with pytest.raises(errors.DeviceError, match="being captured"):
            call(0)
    driver.capture(False)
    state = cache.export_sequence(0)
    driver.fail("cuMemcpy3DAsync", 700)
    with pytest.raises(errors.DeviceError):
        cache.import_sequence(1, state)
    assert list(cache._call("debug_state")) == before
    cache.swap_out(0)
    driver.fail("cuMemcpy3DAsync", 700)
    with pytest.raises(errors.DeviceError):
        cache.swap_in(0)
    assert cache.is_swapped_out(0) and cache.num_free_pages == 12
    cache.swap_in(0)
    assert cache.seq_len(0) == 40


def test_cache_waits_for_copies_before_it_gives_back_host_memory(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    for seq in (0, 1):
        cache.add_sequence(seq)
        with cache.forward([seq], [40]):
            pass
        cache.swap_out(seq)
    cache.swap_in(1)
    driver.clear()
    del cache
    assert len(driver.calls("cuEventSynchronize")) == len(driver.calls("cuMemFreeHost")) == 2
    assert len(driver.calls("cuMemFree")) == 3


def test_cache_rotates_in_the_launch_that_appends(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    driver.clear()
    rope = tvm_infer.RopeConfig(64, 500.0)
    cache.set_rope(rope)
    assert driver.calls("cuMemAlloc") == [str(DIM // 2 * 4), str(40 * HQ * DIM * 2)]  # frequencies, rotated queries
    assert driver.calls("cuMemcpyHtoDAsync") == ["128"]
    cache.add_sequence(5)
    cache.begin_step([5], [3], num_rows=4)
    driver.clear()
    qkv, out = tensor((4, HQ + 2 * HKV, DIM), device=(CUDA, 1)), rows(4, HQ)
    cache.attention_fused_qkv(1, qkv, out=out)
    assert [launch["name"] for launch in driver.launches()] == ["rope_append_bf16", "attention_bf16_h128_p16"]
    p, attention = driver.rope_append_params(RopeParams), driver.params(Params)
    row, at = (HQ + 2 * HKV) * DIM, addresses[id(qkv)]
    assert (p.q, p.k, p.v) == (at, at + HQ * DIM * 2, at + (HQ + HKV) * DIM * 2)
    assert list(p.q_strides) == [row, DIM, HQ * DIM, DIM] and list(p.kv_strides) == [row, DIM] * 2
    assert p.q_out == attention.q and p.o == attention.o == addresses[id(out)]
    assert (p.plan, p.kv_page_indptr, p.kv_page_indices) == (
        attention.plan,
        attention.kv_indptr,
        attention.kv_page_indices,
    )
    assert list(p.expected[:5]) == [HKV, HQ // HKV, 4, attention.max_partial_rows, 4] and p.expected[5] != 0
    assert (p.rotary_dim, p.is_interleaved, p.magnitude, p.max_tokens, p.num_qo_heads) == (64, 0, 1.0, 4, HQ)
    np.testing.assert_array_equal(words(p.inv_freq, 32).view(np.float32), rope.inv_freq())
    before = p.q_out
    cache.attention_fused_qkv(0, qkv, out=out)
    assert driver.rope_append_params(RopeParams).q_out == before
    driver.clear()
    with pytest.raises(errors.ArgumentError, match="`qkv` begins 2 bytes"):
        cache.attention_fused_qkv(0, tensor((4, HQ + 2 * HKV, DIM), device=(CUDA, 1), offset=2), out=out)
    assert driver.launches() == []
    cache.cancel_forward()
    cache.clear()
    with pytest.raises(errors.ExecutorError, match="a rotary_dim of 20"):
        cache.set_rope(tvm_infer.RopeConfig(20))


def test_a_call_brings_its_rotation(driver):
    """Queries, keys and values apart, the rotated queries in memory of the caller's; nothing is allocated or copied."""
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    cache.add_sequence(5)
    cache.begin_step([5], [3], num_rows=4)
    driver.clear()
    q, k, v, rotated_q, out = rows(4, HQ), rows(4, HKV), rows(4, HKV), rows(4, HQ), rows(4, HQ)
    inv_freq = tensor((32,), dtype="float32", device=(CUDA, 1))
    call = _ffi.func("attention_with_kv_cache_rope")
    call(cache, 1, q, k, v, inv_freq, 1, 1.5, 0.25, 1, rotated_q, out)
    assert [launch["name"] for launch in driver.launches()] == ["rope_append_bf16", "attention_bf16_h128_p16"]
    assert driver.calls("cuMemAlloc") == driver.calls("cuMemcpyHtoDAsync") == []
    p, attention = driver.rope_append_params(RopeParams), driver.params(Params)
    assert (p.q, p.k, p.v, p.inv_freq) == tuple(addresses[id(x)] for x in (q, k, v, inv_freq))
    assert p.q_out == attention.q == addresses[id(rotated_q)] and p.o == attention.o == addresses[id(out)]
    assert list(p.q_strides) == [HQ * DIM, DIM] * 2 and list(p.kv_strides) == [HKV * DIM, DIM] * 2
    assert (p.rotary_dim, p.is_interleaved, p.magnitude, p.max_tokens, p.num_qo_heads) == (64, 1, 1.5, 4, HQ)
    driver.clear()
    for name, change in {"q": 0, "k": 1, "v": 2, "rotated_q": 3}.items():
        tensors = [q, k, v, rotated_q]
        tensors[change] = tensor((4, HKV if name in "kv" else HQ, DIM), device=(CUDA, 1), offset=2)
        with pytest.raises(errors.ArgumentError, match=f"`{name}` begins 2 bytes"):
            call(cache, 1, *tensors[:3], inv_freq, 1, 1.5, 0.25, 1, tensors[3], out)
    with pytest.raises(errors.ExecutorError, match="a rotary_dim of 20"):
        call(cache, 1, q, k, v, tensor((10,), dtype="float32", device=(CUDA, 1)), 1, 1.5, 0.25, 1, rotated_q, out)
    with pytest.raises(errors.ArgumentError, match="`inv_freq`"):
        call(cache, 1, q, k, v, np.ones(32, np.float32), 1, 1.5, 0.25, 1, rotated_q, out)
    assert driver.launches() == []


@pytest.mark.parametrize(
    ("change", "error", "words_"),
    [
        ({"dtype": "float32"}, errors.ExecutorError, ["float32", "bfloat16"]),
        ({"head_dim": 104}, errors.ExecutorError, ["104", "192 and 256"]),
        ({"page_size": 24}, errors.ExecutorError, ["`page_size` is 24", "16"]),
        ({"device": "cuda:2"}, errors.ExecutorError, ["`device` is cuda:2", "sm_80"]),
        ({"device": "cuda:7"}, errors.ExecutorError, ["`device` is cuda:7"]),
    ],
    ids=str,
)
def test_cache_refuses_what_has_no_kernel(driver, change, error, words_):
    with pytest.raises(error) as caught:
        tvm_infer.PagedKVCache(**{**CACHE, **CACHE_SIZE, **change})
    assert all(word in str(caught.value) for word in words_), str(caught.value)


def test_cache_says_what_a_full_device_has(driver):
    driver.fail("cuMemAlloc", 2)
    with pytest.raises(errors.ArgumentError, match=r"no \d+ bytes for its pages: 1000 of 2000 are free.*num_pages"):
        tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)


def test_cache_step_is_not_begun_within_a_capture(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    cache.add_sequence(0)
    driver.capture(True)
    with pytest.raises(errors.DeviceError, match="being captured"):
        cache.begin_forward([0], [1])
    driver.capture(False)
    assert not cache.in_forward and cache.num_used_pages == 0


def test_cache_takes_tensors_of_its_device_only(driver):
    cache = tvm_infer.PagedKVCache(**CACHE, **CACHE_SIZE)
    cache.add_sequence(0)
    with cache.forward([0], [1]) as step, pytest.raises(errors.ArgumentError, match="cuda:0"):
        step.attention(0, *(rows(1, heads, (CUDA, 0)) for heads in (HQ, HKV, HKV)), out=rows(1, HQ))


# Results on their way to the host


def test_copies_between_page_locked_and_device_memory_do_not_wait(driver):
    host, device = tensor((3,), "int32", device=(CPU, 0), data=np.array([4, 5, 6], np.int32)), tensor((1, 3), "int32")
    back = tensor((3,), "int32", device=(CPU, 0), data=np.zeros(3, np.int32))
    _ffi.func("copy_on_stream")(host, device)
    _ffi.func("copy_on_stream")(device, back)
    assert driver.calls("cuMemcpyHtoDAsync") == driver.calls("cuMemcpyDtoHAsync") == ["12"]
    assert (ctypes.c_int32 * 3).from_address(addresses[id(back)])[:] == [4, 5, 6]
    assert not driver.calls("cuStreamSynchronize") and not driver.calls("cuEventSynchronize")


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: (tensor((2,), "int32"), tensor((2,), "int32")), errors.ExecutorError, "`target`.*cuda"),
        (
            lambda: (tensor((2,), "int32", device=(CPU, 0)), tensor((2,), "int32", device=(CPU, 0))),
            errors.ArgumentError,
            "`target`.*must be on a cuda device",
        ),
        (lambda: (tensor((2,), "int32"), tensor((3,), "int32", device=(CPU, 0))), errors.ArgumentError, "as many"),
        (lambda: (tensor((2,), "int32"), tensor((2,), "float32", device=(CPU, 0))), errors.DTypeError, "`target`"),
    ],
)
def test_copies_that_are_refused(driver, make, kind, words):
    with pytest.raises(kind, match=words):
        _ffi.func("copy_on_stream")(*make())
    assert not driver.calls("cuMemcpyHtoDAsync") and not driver.calls("cuMemcpyDtoHAsync")


def test_an_event_is_recorded_and_waited_for(driver):
    record, wait = _ffi.func("new_event")(tvm_ffi.device("cuda:0"))
    record()
    wait()
    names = ("cuEventCreate", "cuEventRecord", "cuEventSynchronize")
    assert [len(driver.calls(name)) for name in names] == [1, 1, 1] and not driver.calls("cuEventDestroy")
    driver.fail("cuEventSynchronize", 700)
    with pytest.raises(errors.DeviceError, match="cuEventSynchronize"):
        wait()
    del record
    assert not driver.calls("cuEventDestroy")  # each of the two keeps it
    del wait
    assert len(driver.calls("cuEventDestroy")) == 1
    with pytest.raises(errors.ArgumentError, match=r"`device` is on cpu.*cuda device"):
        _ffi.func("new_event")(tvm_ffi.device("cpu"))

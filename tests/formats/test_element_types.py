"""The table of element types: one in C++ and Python, sizes and costs by bits, types without kernels refused by their names."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import numpy as np
import pytest

import tvm_infer
from tvm_infer import PagedKVCache, _ffi, errors, kv_dtypes
from tvm_infer.jit import names

CUDA_SRC = pathlib.Path(__file__).resolve().parents[2] / "cuda_src"
HEADS = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128}
PAIRS = (
    r"float32 with float32, float8_e4m3fn, float8_e5m2 \(cpu\); float16 with float16, float8_e4m3fn, float8_e5m2 \(cpu, cuda\); "
    r"bfloat16 with bfloat16, float8_e4m3fn, float8_e5m2 \(cpu, cuda\)"
)


def test_python_and_cpp_have_one_table():
    lines = str(_ffi.func("kv_dtypes")()).splitlines()
    rows = [line.split(" ") for line in lines]
    assert [(r.name, r.suffix, str(r.bits), r.scale) for r in kv_dtypes.TABLE] == [tuple(row[:4]) for row in rows]
    assert [r.executors for r in kv_dtypes.TABLE] == [tuple(filter(None, row[4:])) for row in rows]


def test_kernels_are_named_by_the_table():
    scaled = [row.suffix for row in kv_dtypes.TABLE if row.is_scaled and "cuda" in row.executors]
    assert list(names.KV_ELEMENTS) == scaled
    assert set(names.ATTENTION_ELEMENTS) == {
        r.suffix for r in kv_dtypes.TABLE if not r.is_scaled and "cuda" in r.executors
    }


@pytest.mark.parametrize("row", kv_dtypes.TABLE, ids=lambda row: row.name)
def test_bytes_of_a_page(row):
    """What a cache takes of the system, and would take of types that have no kernels."""
    for head_dim, page_size in ((128, 16), (80, 5), (8, 1)):
        page_bytes = _ffi.func("kv_page_bytes")(2, page_size, head_dim, head_dim, row.name)
        assert 8 * page_bytes == 2 * 2 * page_size * head_dim * row.bits
        assert (
            8 * _ffi.func("kv_page_bytes")(2, page_size, 192, 128, row.name) == 2 * page_size * (192 + 128) * row.bits
        )
        if not row.executors:
            continue
        dtype = "float16" if row.is_scaled else row.name
        sizes = {"num_layers": 3, "num_pages": 2, "max_batch": 1, "max_tokens": 1, "page_size": page_size}
        cache = PagedKVCache(**HEADS | {"head_dim": head_dim}, **sizes, dtype=dtype, kv_dtype=row.name)
        assert cache.bytes_per_page == 3 * page_bytes


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The lines of element_types.cc, a dictionary by their first words."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    program = tmp_path_factory.mktemp("element_types") / "program"
    sources = [pathlib.Path(__file__).with_name("element_types.cc")]
    sources += [CUDA_SRC / "tvm_infer" / folder / "tile_table.cc" for folder in ("cpu", "cuda")]
    subprocess.run([compiler, "-std=c++20", "-I", str(CUDA_SRC), "-o", str(program), *map(str, sources)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    return {tuple(line.split()[:3]): line.split()[3:] for line in lines}


def table_of(printed, executor, kv_dtype, head_dim=128) -> list[int]:
    return [int(x) for row in printed[(executor, kv_dtype, str(head_dim))] for x in row.split(",")]


def test_bytes_of_elements(printed):
    """Two of 4 bits share a byte, and the last of an odd number has one for itself."""
    for row in kv_dtypes.TABLE:
        for elements in (0, 1, 7, 8, 128):
            assert printed[("bytes", row.name, str(elements))] == [str(-(-elements * row.bits // 8))]


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_costs_follow_bits(printed, head_dim):
    """On a GPU decode is bound by bytes, and prefill by what widening takes; the CPU spends on widening what it saves in bytes."""
    tables = {
        row.name: table_of(printed, "cuda", row.name, head_dim) for row in kv_dtypes.TABLE if row.name != "float32"
    }
    eight, four = tables["float8_e4m3fn"], tables["int4"]
    assert tables["int8"] == eight == tables["float8_e5m2"]
    assert four[4] == eight[4] // 2 and [*four[:4], *four[5:]] == [*eight[:4], *eight[5:]]
    assert eight[4] < tables["bfloat16"][4]
    assert list(tvm_infer.cuda_tile_table("bfloat16", head_dim, "float8_e4m3fn"))[: len(eight)] == eight
    for row in kv_dtypes.TABLE:
        assert table_of(printed, "cpu", row.name, head_dim) == table_of(printed, "cpu", "bfloat16", head_dim)


def test_plans_are_made_of_them(printed):
    """Decode of long keys: the planner's own arithmetic, whose costs are the table's."""
    costs = {}
    for name in ("bfloat16", "int8", "int4"):
        table = table_of(printed, "cuda", name)
        plan = tvm_infer.plan(np.arange(65, dtype=np.int32), [4096] * 64, **HEADS, num_ctas=132, tile_table=table)
        assert plan.num_works > 0
        costs[name] = plan.total_cost_us
    keys = 64 * HEADS["num_kv_heads"] * 4096 * 1e-6
    assert costs["int8"] - costs["int4"] == pytest.approx(keys * (7425 - 3712), rel=0.02)
    assert costs["int4"] < costs["int8"] < costs["bfloat16"]


SIZES = {"num_layers": 1, "num_pages": 2, "max_batch": 1, "max_tokens": 1}
BATCH = {"plan": None, "kv_page_indptr": np.array([0, 1], np.int32), "kv_page_indices": np.array([0], np.int32)}


@pytest.mark.parametrize("name", kv_dtypes.WITHOUT_KERNELS)
@pytest.mark.parametrize(
    "call",
    [
        lambda name: PagedKVCache(**HEADS, **SIZES, kv_dtype=name),
        lambda name: tvm_infer.plan([0, 1], [5], **HEADS, kv_dtype=name),
        lambda name: tvm_infer.workspace_size(max_requests=1, max_tokens=1, **HEADS, kv_dtype=name),
        lambda name: tvm_infer.cpu_tile_table("float32", 128, name),
        lambda name: tvm_infer.cuda_tile_table("bfloat16", 128, name),
        lambda name: _ffi.func("kv_cache_create_scaled")(
            1, 8, 2, 128, "float32", name, 16, 2, 1, 1, 0, 0, __import__("tvm_ffi").device("cpu")
        ),
    ],
    ids=["cache", "plan", "workspace", "cpu table", "cuda table", "packed cache"],
)
def test_types_without_kernels_are_refused_by_name(name, call):
    message = rf"`kv_dtype` is \W?{name}\W.*No executor has kernels for {name} yet\. Queries go with .* so: {PAIRS}"
    with pytest.raises(errors.DTypeError, match=message):
        call(name)


def test_tensors_without_kernels_are_refused_by_name():
    plan = tvm_infer.plan([0, 1], [5], **HEADS)
    cache, q = np.zeros((1, 2, 2, 16, 128), np.int8), np.zeros((1, 8, 128), np.float32)
    with pytest.raises(
        errors.DTypeError, match=rf"`k_cache` has dtype int8; .*No executor has kernels for int8 yet.*{PAIRS}"
    ):
        tvm_infer.attention(q, cache, **BATCH | {"plan": plan})


def test_types_that_are_none():
    with pytest.raises(
        errors.DTypeError, match=r'`kv_dtype` is "int3"; it must be one of .*float8_e5m2\. Cast it first'
    ):
        _ffi.func("kv_page_bytes")(1, 1, 8, 8, "int3")
    with pytest.raises(errors.DTypeError, match=r"`kv_dtype` is 'int3'; it must be one of .*float8_e5m2$"):
        PagedKVCache(**HEADS, **SIZES, kv_dtype="int3")

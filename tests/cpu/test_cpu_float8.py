"""Keys and values of 8 bits on the CPU: attention against float64 of what the cache holds, and rounding, by ml_dtypes as the oracle."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import _array, errors, variant
from tvm_infer.testing import make_paged_batch, relative_error
from tvm_infer.testing.batches import numpy_dtype, quantise

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import matrix_cases as matrix
from test_cpu_attention import assert_right, available_isas, run_matrix

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
FLOATS = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matrix(dtype, kv_dtype):
    """Every unread slot of the cache is NaN."""
    cases = [case for case in matrix.float8_cases() if (case.dtype, case.kv_dtype) == (dtype, kv_dtype)]
    assert len(cases) == 24
    for case in cases:
        assert_right(matrix.check(case))
    for case in cases[::3]:
        assert_right(matrix.check(case, tile_table=matrix.DEAR_TILES, num_ctas=7, fixed_split_size=48))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    if isa not in available_isas()[:-1]:
        pytest.skip(f"this machine runs {available_isas()[-1]}: {isa} is not below it")
    for result in run_matrix("4", "float8", TVM_INFER_CPU_ISA=isa) + run_matrix(
        "9", "split", "float8", TVM_INFER_CPU_ISA=isa
    ):
        assert_right(result)


ROUNDING = """
import sys
import numpy as np, ml_dtypes
import tvm_infer
sys.path.insert(0, sys.argv[1])
from test_cpu_float8 import appended, hard_values, FLOAT8, FLOATS
from tvm_infer.testing.batches import quantise
for kv_dtype in FLOAT8:
    for dtype in FLOATS:
        for scale in (1.0, 0.37, 2.0**-6):
            x = hard_values(dtype, kv_dtype, scale)
            got, expected = appended(x, kv_dtype, scale), quantise(x, scale, kv_dtype)
            is_nan = np.isnan(x.astype(np.float32))
            assert np.isnan(got[is_nan].astype(np.float32)).all() and is_nan.any()
            np.testing.assert_array_equal(got[~is_nan].view(np.uint8), expected[~is_nan].view(np.uint8))
print("right")
"""


def hard_values(dtype: str, kv_dtype: str, scale: float, head_dim: int = 24) -> np.ndarray:
    """[num_tokens, 2, head_dim] of `dtype`: every code's value, the values half way between two, their neighbours, what overflows, what
    is too small, infinities and NaN, times `scale`."""
    codes = np.arange(256, dtype=np.uint8).view(numpy_dtype(kv_dtype)).astype(np.float64)
    finite = np.unique(codes[np.isfinite(codes)])
    halves = (finite[1:] + finite[:-1]) / 2
    exact = (
        np.concatenate([codes, halves, finite * 1e3, finite * 1e-3, [0.0, -0.0, 1e30, -1e30, 464.0, 61440.0, 449.0]])
        * scale
    )
    x = exact.astype(np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, -np.float32(np.inf))])
    x = np.concatenate(
        [x, np.random.default_rng(0).standard_normal(999).astype(np.float32) * 100 * scale, [np.inf, -np.inf, np.nan]]
    )
    with np.errstate(over="ignore"):
        x = np.resize(x, (-(-x.size // (2 * head_dim)), 2, head_dim)).astype(numpy_dtype(dtype))
    return x


def appended(x: np.ndarray, kv_dtype: str, scale: float) -> np.ndarray:
    """What a cache of pages of 3 tokens holds of x, which is appended as keys and, backwards, as values."""
    num_tokens, heads, head_dim = x.shape
    num_pages = -(-num_tokens // 3)
    cache = np.full((num_pages, 2, heads, 3, head_dim), np.nan, numpy_dtype(kv_dtype))
    tables = {"kv_page_indptr": [0, num_pages], "kv_page_indices": list(range(num_pages))[::-1]}
    lengths = {"qo_indptr": [0, num_tokens], "kv_len": [num_tokens]}
    tvm_infer.append(x, x[::-1], cache, **lengths, **tables, k_scale=scale, v_scale=np.full(heads, scale, np.float32))
    rows = cache[::-1].transpose(1, 0, 3, 2, 4).reshape(2, -1, heads, head_dim)[:, :num_tokens]
    np.testing.assert_array_equal(rows[1, ::-1].view(np.uint8), rows[0].view(np.uint8))
    return rows[0]


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_append_rounds_to_nearest_even_and_saturates(isa):
    """From every type, with strided input: values come backwards."""
    if isa not in available_isas():
        pytest.skip(f"this machine has no {isa}")
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(pathlib.Path(tvm_infer.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", ROUNDING, str(here)],
        env={**os.environ, "PYTHONPATH": path, "TVM_INFER_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_every_code_is_read_as_its_value(kv_dtype):
    """Through attention over one key: the output is its value times the scale. NaN and infinities stay what they are."""
    values = np.arange(256, dtype=np.uint8).view(numpy_dtype(kv_dtype))
    cache = np.zeros((1, 2, 1, 1, 256), numpy_dtype(kv_dtype))
    cache[0, 1, 0, 0] = values
    plan = tvm_infer.plan([0, 1], [1], num_qo_heads=1, num_kv_heads=1, head_dim=256, kv_dtype=kv_dtype)
    q = np.ones((1, 1, 256), np.float32)
    o = tvm_infer.attention(q, cache, plan, kv_page_indptr=[0, 1], kv_page_indices=[0], v_scale=0.75)
    np.testing.assert_array_equal(o[0, 0], values.astype(np.float32) * np.float32(0.75))


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", FLOATS)
def test_append_attention_is_append_then_attention(dtype, kv_dtype):
    """From an empty cache, NaN all over: to the last bit what a cache of these elements gives."""
    scales = {"k_scale": np.array([0.02, 0.013], np.float32), "v_scale": np.array([0.01, 0.04], np.float32)}
    lens = [5, 1, 0, 17]
    batch = make_paged_batch(
        lens,
        [5, 1, 3, 17],
        num_qo_heads=6,
        num_kv_heads=2,
        head_dim=40,
        page_size=3,
        dtype=dtype,
        kv_dtype=kv_dtype,
        **scales,
    )
    heads = {"num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 40, "dtype": dtype, "kv_dtype": kv_dtype}
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, **heads)
    full = batch.kv_cache.copy()
    expected = tvm_infer.attention(batch.q, full, plan, **batch.tables, **scales)
    table = np.concatenate([batch.kv_page_indices[a : b - 1] for a, b in itertools.pairwise(batch.kv_page_indptr)])
    idle = batch.kv_page_indices[batch.kv_page_indptr[2]]  # of the request without new tokens
    cache = np.full_like(full, np.nan)
    cache[idle] = full[idle]
    o = tvm_infer.append_attention(batch.q, batch.k_new, batch.v_new, cache, plan, **batch.tables, **scales)
    np.testing.assert_array_equal(cache[table].view(np.uint8), full[table].view(np.uint8))
    np.testing.assert_array_equal(o.view(np.uint8), expected.view(np.uint8))
    reference, _ = batch.reference()
    assert relative_error(o, reference) <= matrix.TOLERANCE[dtype]


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_append_rounds_a_rotated_key_once(kv_dtype, interleaved):
    """Of bfloat16 keys the cache holds what float32 keys give, not what bfloat16 makes of them on the way."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((7, heads, 40)).astype(ml_dtypes.bfloat16) for heads in (4, 2, 2))
    rope = tvm_infer.RopeConfig(24, 100.0, interleaved=interleaved)
    where = {"qo_indptr": [0, 7], "kv_len": [30], "kv_page_indptr": [0, 2], "kv_page_indices": [1, 0]}
    scales = {"k_scale": np.array([0.02, 0.013], np.float32), "v_scale": 0.05}
    caches = [np.full((2, 2, 2, 16, 40), np.nan, numpy_dtype(kv_dtype)) for _ in range(2)]
    out = tvm_infer.rope_append(q, k, v, caches[0], rope=rope, **where, **scales)
    tvm_infer.rope_append(*(x.astype(np.float32) for x in (q, k, v)), caches[1], rope=rope, **where, **scales)
    plain = np.full((2, 2, 2, 16, 40), np.nan, ml_dtypes.bfloat16)
    np.testing.assert_array_equal(out, tvm_infer.rope_append(q, k, v, plain, rope=rope, **where))
    np.testing.assert_array_equal(caches[0].view(np.uint8), caches[1].view(np.uint8))
    turned = np.full((2, 2, 2, 16, 40), np.nan, np.float32)
    tvm_infer.rope_append(*(x.astype(np.float32) for x in (q, k, v)), turned, rope=rope, **where)
    for plane, scale in ((0, scales["k_scale"]), (1, scales["v_scale"])):
        rows = turned[:, plane].swapaxes(1, 2)  # [pages, slots, heads, head_dim]
        written = ~np.isnan(rows).any(axis=(2, 3))
        assert written.sum() == 7
        got = caches[0][:, plane].swapaxes(1, 2)
        np.testing.assert_array_equal(
            got[written].view(np.uint8), quantise(rows[written], scale, kv_dtype).view(np.uint8)
        )
        assert np.isnan(got[~written].astype(np.float32)).all()


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_ragged_keys(kv_dtype):
    rng = np.random.default_rng(0)
    k, v = (quantise(rng.standard_normal((70, 2, 64)), 0.01, kv_dtype) for _ in range(2))
    q = rng.standard_normal((3, 4, 64)).astype(np.float32)
    heads = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    lengths = ([0, 1, 3], [30, 40])
    o = tvm_infer.ragged_attention(
        q, k, v, tvm_infer.plan(*lengths, **heads, kv_dtype=kv_dtype), kv_indptr=[0, 30, 70], k_scale=0.01, v_scale=0.02
    )
    wide = [x.astype(np.float32) * np.float32(s) for x, s in ((k, 0.01), (v, 0.02))]
    expected = tvm_infer.ragged_attention(q, *wide, tvm_infer.plan(*lengths, **heads), kv_indptr=[0, 30, 70])
    assert relative_error(o, expected) < 1e-6


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_variants_see_values_not_elements(kv_dtype):
    """Of an 8-bit cache the same as of a float32 cache that holds its values: soft cap, norms and rotation of keys."""
    scales = {"k_scale": np.array([0.02, 0.013], np.float32), "v_scale": 0.03}
    batch = make_paged_batch([1, 9], [80, 9], num_qo_heads=4, num_kv_heads=2, head_dim=32, kv_dtype=kv_dtype, **scales)
    heads = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    k_scale = scales["k_scale"][:, None, None]
    wide = batch.kv_cache.astype(np.float32)
    wide[:, 0] *= k_scale
    wide[:, 1] *= np.float32(0.03)
    ones = np.linspace(0.5, 1.5, 32, dtype=np.float32)
    norm = variant.qk_norm.bind(q_weight=ones, k_weight=ones, eps=1e-5)
    for bound in (variant.soft_cap.bind(cap=2.0), norm):
        plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, **heads, variant=bound)
        o = tvm_infer.attention(batch.q, batch.kv_cache, plan, **batch.tables, **scales, variant=bound)
        expected = tvm_infer.attention(batch.q, wide, plan, **batch.tables, variant=bound)
        assert relative_error(o, expected) < 1e-6


def test_tensors_of_every_library_are_taken():
    tvm = pytest.importorskip("tvm")
    batch = make_paged_batch(
        [2], [20], num_qo_heads=2, num_kv_heads=1, head_dim=16, kv_dtype="float8_e4m3fn", k_scale=0.02, v_scale=0.02
    )
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, num_qo_heads=2, num_kv_heads=1, head_dim=16)
    call = {**batch.tables, "k_scale": 0.02, "v_scale": 0.02}
    expected = tvm_infer.attention(batch.q, batch.kv_cache, plan, **call)
    in_torch = torch.from_numpy(batch.kv_cache.view(np.uint8)).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(tvm_infer.attention(batch.q, in_torch, plan, **call), expected)
    in_tvm = tvm.runtime.empty(batch.kv_cache.shape, "float8_e4m3fn")
    _array.on_host(in_tvm, "float8_e4m3fn")[...] = batch.kv_cache
    np.testing.assert_array_equal(tvm_infer.attention(batch.q, in_tvm, plan, **call), expected)
    frozen = batch.kv_cache.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(tvm_infer.attention(batch.q, frozen, plan, **call), expected)
    scale = torch.tensor([0.02])
    np.testing.assert_array_equal(
        tvm_infer.attention(batch.q, batch.kv_cache, plan, **{**call, "k_scale": scale, "v_scale": scale}), expected
    )


def test_empty_input():
    cache = np.zeros((0, 2, 2, 16, 64), ml_dtypes.float8_e4m3fn)
    none = np.zeros((0, 2, 64), np.float32)
    tvm_infer.append(none, none, cache, qo_indptr=[0], kv_len=[], kv_page_indptr=[0], kv_page_indices=[], k_scale=0.5)
    plan = tvm_infer.plan([0], [], num_qo_heads=2, num_kv_heads=2, head_dim=64)
    o = tvm_infer.attention(none, cache, plan, kv_page_indptr=[0], kv_page_indices=[], k_scale=0.5)
    assert o.shape == (0, 2, 64)


def call(**changes):
    batch = make_paged_batch([2], [20], num_qo_heads=4, num_kv_heads=2, head_dim=16, dtype="float16")
    cache = quantise(batch.kv_cache.swapaxes(2, 3), 1.0, "float8_e4m3fn").swapaxes(2, 3)
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, num_qo_heads=4, num_kv_heads=2, head_dim=16)
    made = {"q": batch.q, "k": batch.k_new, "v": batch.v_new, "kv_cache": cache, **batch.tables, **changes}
    tensors = [made.pop(name) for name in ("q", "k", "v", "kv_cache")]
    before = np.array(tensors[3]).view(np.uint8).copy() if isinstance(tensors[3], np.ndarray) else None
    try:
        return tvm_infer.append_attention(*tensors, plan, **made)
    except Exception:
        np.testing.assert_array_equal(tensors[3].view(np.uint8), before)  # nothing is written
        raise


TWO = np.ones(2, np.float32)
BAD = [
    ("zero", errors.ArgumentError, ["`k_scale` is 0", "finite and above 0"], {"k_scale": 0.0}),
    ("negative", errors.ArgumentError, ["`v_scale` is -0.5"], {"v_scale": -0.5}),
    ("nan", errors.ArgumentError, ["`k_scale` is nan"], {"k_scale": float("nan")}),
    ("infinite", errors.ArgumentError, ["`v_scale` is inf"], {"v_scale": float("inf")}),
    ("too small for float32", errors.ArgumentError, ["`k_scale` is 1e-60", "in float32"], {"k_scale": 1e-60}),
    ("a word", errors.ArgumentError, ["`k_scale` is 'much'", "a number, or a float32 tensor"], {"k_scale": "much"}),
    (
        "shape",
        errors.ArgumentError,
        ["`k_scales` has shape [3]", "dimension 0 must be 2"],
        {"k_scale": np.ones(3, np.float32)},
    ),
    ("rank", errors.ArgumentError, ["`v_scales` has rank 2"], {"v_scale": np.ones((1, 2), np.float32)}),
    ("dtype", errors.DTypeError, ["`k_scales` has dtype float64", "float32"], {"k_scale": np.ones(2)}),
    ("strided", errors.ArgumentError, ["`k_scales`", "contiguous"], {"k_scale": np.ones(4, np.float32)[::2]}),
    ("entry", errors.ArgumentError, ["`v_scales` has 0 at entry 1"], {"v_scale": np.array([1, 0], np.float32)}),
    (
        "entry nan",
        errors.ArgumentError,
        ["`k_scales` has nan at entry 0"],
        {"k_scale": np.array([np.nan, 1], np.float32)},
    ),
    (
        "of what has none",
        errors.ArgumentError,
        ["`k_scale` is 0.5", "values of float16 have no scale", "float8_e4m3fn or float8_e5m2"],
        {"kv_cache": np.zeros((4, 2, 2, 16, 16), np.float16), "k_scale": 0.5},
    ),
    (
        "tensor of what has none",
        errors.ArgumentError,
        ["`v_scale` is a tensor [2]", "float16"],
        {"kv_cache": np.zeros((4, 2, 2, 16, 16), np.float16), "v_scale": TWO},
    ),
    (
        "a pair that is none",
        errors.DTypeError,
        [
            "`q` has dtype float16",
            "`k_cache` has float32",
            "float8_e4m3fn or float8_e5m2 beside float32 (cpu), float16 or bfloat16",
        ],
        {"kv_cache": np.zeros((4, 2, 2, 16, 16), np.float32)},
    ),
    (
        "a type that is none",
        errors.DTypeError,
        ["`k_cache` has dtype int8", "float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"],
        {"kv_cache": np.zeros((4, 2, 2, 16, 16), np.int8)},
    ),
    (
        "queries of 8 bits",
        errors.DTypeError,
        ["`q` has dtype float8_e4m3fn", "float32, float16 or bfloat16"],
        {"q": np.zeros((2, 4, 16), ml_dtypes.float8_e4m3fn), "out": np.zeros((2, 4, 16), ml_dtypes.float8_e4m3fn)},
    ),
    (
        "new keys of 8 bits",
        errors.DTypeError,
        ["`k` has dtype float8_e4m3fn", "float32, float16 or bfloat16"],
        {"k": np.zeros((2, 2, 16), ml_dtypes.float8_e4m3fn)},
    ),
    (
        "new keys of two types",
        errors.DTypeError,
        ["`v` has dtype float32, `k` has float16"],
        {"v": np.zeros((2, 2, 16), np.float32)},
    ),
]


@pytest.mark.parametrize(("kind", "parts", "changes"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_refused_by_name(kind, parts, changes):
    with pytest.raises(kind) as error:
        call(**changes)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_good_input_is_what_the_bad_is_made_of():
    assert np.isfinite(call(k_scale=TWO, v_scale=2.0)).all()


@pytest.mark.parametrize("table", [tvm_infer.cpu_tile_table, tvm_infer.cuda_tile_table])
def test_tile_tables_by_the_type_of_keys(table):
    assert table("bfloat16", 128, "bfloat16") == table("bfloat16", 128)
    assert len(table("bfloat16", 128, "float8_e4m3fn")) % 5 == 3  # five for each class, three of shared keys
    with pytest.raises(errors.DTypeError, match=r'`kv_dtype` is "int4".*float8_e5m2'):
        table("bfloat16", 128, "int4")
    with pytest.raises(errors.DTypeError, match="they must be the same"):
        table("bfloat16", 128, "float16")
    with pytest.raises(errors.DTypeError, match="name it by a string"):
        table("bfloat16", 128, torch.float8_e4m3fn)


def test_a_key_of_8_bits_costs_a_decode_on_cuda_about_half():
    two, one = (tvm_infer.cuda_tile_table("bfloat16", 128, kv) for kv in ("bfloat16", "float8_e4m3fn"))
    assert 0.5 < one[4] / two[4] < 0.6 and one[9] > two[9]  # prefill widens tiles first
    with pytest.raises(errors.ExecutorError, match=r"head_dim 72 with 8-bit keys and values \(e5m2\)"):
        tvm_infer.cuda_tile_table("bfloat16", 72, "float8_e5m2")


# Attention with 8-bit keys and values beside the same with bfloat16's, on Gaussian data, scales from the largest magnitude: what
# docs/kv-formats.md states.
LOSS = {"float8_e4m3fn": (0.033, 0.043), "float8_e5m2": (0.066, 0.086)}


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("kv_len", [128, 1024])
def test_what_8_bits_lose_beside_bfloat16(kv_dtype, kv_len):
    rng = np.random.default_rng(0)
    kinds = [rng.standard_normal((kv_len, 2, 128)).astype(ml_dtypes.bfloat16) for _ in range(2)]
    q = rng.standard_normal((16, 8, 128)).astype(ml_dtypes.bfloat16)
    largest = float(ml_dtypes.finfo(numpy_dtype(kv_dtype)).max)
    scales = [float(np.abs(x.astype(np.float32)).max()) / largest for x in kinds]
    heads = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    o = tvm_infer.ragged_attention(
        q,
        *(quantise(x, s, kv_dtype) for x, s in zip(kinds, scales, strict=True)),
        tvm_infer.plan([0, 16], [kv_len], **heads, kv_dtype=kv_dtype),
        kv_indptr=[0, kv_len],
        k_scale=scales[0],
        v_scale=scales[1],
    )
    exact = tvm_infer.ragged_attention(q, *kinds, tvm_infer.plan([0, 16], [kv_len], **heads), kv_indptr=[0, kv_len])
    low, high = LOSS[kv_dtype]
    assert low < relative_error(o, exact) < high

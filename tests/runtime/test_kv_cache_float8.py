"""A cache of 8-bit pages: attention, forks and moves against float64 of what it holds; scales, sizes, what is refused."""

from __future__ import annotations

import pathlib
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer import AttentionSpec, _ffi, errors, variant
from tvm_infer.runtime import PagedKVCache
from tvm_infer.testing.batches import quantise

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from test_kv_cache_attention import Driver

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SIZE = {
    "num_layers": 3,
    "num_qo_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 16,
    "num_pages": 10,
    "max_batch": 4,
    "max_tokens": 64,
}
K_SCALE = np.array([[0.02, 0.013], [0.01, 0.03]], np.float32)  # [num_layers, num_kv_heads]
V_SCALE = np.array([0.015, 0.04], np.float32)  # [num_layers]


class Float8Driver(Driver):
    """Its keys and values are the float32 values of the codes that the cache should hold, bit for bit."""

    def __init__(self, kv_dtype, **settings):
        self.scales = (K_SCALE, np.broadcast_to(V_SCALE[:, None], (2, 2)))
        super().__init__(num_layers=2, kv_dtype=kv_dtype, k_scale=K_SCALE, v_scale=V_SCALE, **settings)

    def add(self, seq):
        super().add(seq)
        none = np.zeros((0, self.cache.num_kv_heads, self.cache.head_dim), np.float32)
        self.keys[seq], self.values[seq] = [none] * 2, [none] * 2

    def kept(self, plane, layer, x):
        scale = self.scales[plane][layer]
        return quantise(x, scale, self.cache.kv_dtype).astype(np.float32) * scale[:, None]

    def check_contents(self):
        for seq in self.keys:
            for layer in range(2):
                for plane, held in enumerate((self.keys, self.values)):
                    codes = self.cache.gather(seq, layer)[plane].astype(np.float32)
                    assert np.array_equal(codes * self.scales[plane][layer][:, None], held[seq][layer])


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_prefill_append_decode_and_mixtures(dtype, kv_dtype, page_size):
    """Scales of K by layer and head, of V by layer; every slot without a token is NaN."""
    d = Float8Driver(kv_dtype, dtype=dtype, page_size=page_size, num_pages=400, head_dim=40)
    for seq in (10, 20, 30, 40):
        d.add(seq)
    d.step([10, 20, 30], [50, 1, 16])
    d.step([30, 10, 20], [1, 1, 1])
    d.step([20, 40, 10], [9, 33, 1])
    d.step([10, 20, 30, 40], [0, 1, 0, 0])
    d.step([40, 20], [1, 1], causal=False)


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_forks_truncations_cancelled_steps_and_moves(kv_dtype):
    d = Float8Driver(kv_dtype)
    d.add(1)
    d.step([1], [9])
    d.fork(1, 2, 6)
    d.step([2, 1], [3, 2])  # a shared page is copied
    d.step([1], [5], cancel=True)
    d.truncate(1, 7)
    d.step([1, 2], [1, 1])
    _ffi.func("kv_cache_move_tokens")(d.cache, [1, 1], [7, 6], [5, 6])
    for held in (d.keys, d.values):
        for layer in range(2):
            held[1][layer][5] = held[1][layer][7]
    d.check_contents()


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_fused_qkv_rotates_then_rounds_once(kv_dtype):
    """The codes are those of the rotated float32 keys."""
    rng = np.random.default_rng(0)
    rope = tvm_infer.RopeConfig(16, 100.0)
    settings = {**SIZE, "num_layers": 1, "dtype": "bfloat16"}
    caches = [
        PagedKVCache(**settings, kv_dtype=kv_dtype, k_scale=0.02, v_scale=0.04),
        PagedKVCache(**{**settings, "dtype": "float32"}),
    ]
    qkv = rng.standard_normal((20, 10, 16)).astype(ml_dtypes.bfloat16)
    for cache, x in zip(caches, (qkv, qkv.astype(np.float32)), strict=True):
        cache.set_rope(rope)
        cache.add_sequence(0)
        with cache.forward([0], [20]) as step:
            step.attention_fused_qkv(0, x)
    for got, exact, scale in zip(caches[0].gather(0, 0), caches[1].gather(0, 0), (0.02, 0.04), strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), quantise(exact, scale, kv_dtype).view(np.uint8))


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_a_page_has_half_the_bytes_of_16_bits(kv_dtype):
    wide, cache = (PagedKVCache(**SIZE, dtype="float16", kv_dtype=x) for x in (None, kv_dtype))
    assert cache.bytes_per_page == 3 * 2 * 2 * 16 * 16 == wide.bytes_per_page // 2
    assert (cache.dtype, cache.kv_dtype, wide.kv_dtype) == ("float16", kv_dtype, "float16")
    cache.add_sequence(0)
    assert cache.bytes_after([0], [33]) == 3 * cache.bytes_per_page
    with cache.forward([0], [33]):
        pass
    assert cache.bytes == 3 * cache.bytes_per_page
    assert f"float16, pages of {kv_dtype};" in repr(cache)
    again = PagedKVCache.from_handle(cache._handle)
    assert (again.dtype, again.kv_dtype) == ("float16", kv_dtype)


def test_types_have_torch_names_too():
    cache = PagedKVCache(**SIZE, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    assert (cache.dtype, cache.kv_dtype) == ("bfloat16", "float8_e4m3fn")
    spec = AttentionSpec(6, 2, 16, "bfloat16")
    sizes = {name: SIZE[name] for name in ("num_pages", "max_batch", "max_tokens")}
    assert PagedKVCache.for_spec(spec, 2, kv_dtype="float8_e5m2", **sizes).kv_dtype == "float8_e5m2"


def test_pages_of_the_same_type_by_name_are_no_other():
    cache = PagedKVCache(**SIZE, dtype="float16", kv_dtype="float16")
    assert cache.kv_dtype == "float16" and repr(cache).count("pages of") == 1


def attend(cache: PagedKVCache, layer: int = 0) -> np.ndarray:
    rng = np.random.default_rng(5)
    cache.clear()
    cache.add_sequence(0)
    with cache.forward([0], [5]) as step:
        return step.attention(layer, *(rng.standard_normal((5, h, 16)).astype(np.float32) for h in (6, 2, 2)))


def test_scales_are_set_as_the_constructor_takes_them():
    scales = {"k_scale": [0.1, 0.2, 0.3], "v_scale": np.full((3, 2), 0.05)}
    made, later = (
        PagedKVCache(**SIZE, kv_dtype="float8_e4m3fn", **scales),
        PagedKVCache(**SIZE, kv_dtype="float8_e4m3fn"),
    )
    ones = attend(later, 2)
    later.clear()
    later.set_scales(**scales)
    np.testing.assert_array_equal(attend(made, 2), attend(later, 2))
    assert not np.array_equal(ones, attend(later, 2))
    later.clear()
    later.set_scales(1, 1.0)
    np.testing.assert_array_equal(attend(later, 2), ones)


def test_scales_are_those_of_what_is_stored():
    cache = PagedKVCache(**SIZE, kv_dtype="float8_e4m3fn")
    cache.add_sequence(0)
    with pytest.raises(errors.CacheStateError, match="holds 1 sequences, which were stored with other scales"):
        cache.set_scales(0.5, 0.5)
    cache.begin_forward([0], [1])
    with pytest.raises(errors.CacheStateError, match="in a step"):
        cache.set_scales(0.5, 0.5)


def test_prefixes_that_were_stored_with_other_scales_are_not_found():
    cache = PagedKVCache(**SIZE, kv_dtype="float8_e4m3fn", prefix_reuse=True)
    page, tokens = cache.page_size, list(range(3 * cache.page_size))
    for scale, reused in ((0.5, 0), (0.5, 2 * page), (0.25, 0), (0.25, 2 * page)):
        if cache.prefix_stats.lookups % 2 == 0:
            cache.set_scales(scale, scale)
        assert cache.add_sequence(0, tokens) == reused
        for begin in range(reused, len(tokens), page):
            with cache.forward([0], [page], token_ids=tokens[begin : begin + page]) as step:
                for layer in range(3):
                    step.attention(layer, *(np.zeros((page, heads, 16), np.float32) for heads in (6, 2, 2)))
        cache.remove_sequence(0)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"kv_dtype": "int8"}, errors.DTypeError, r"`kv_dtype` is 'int8'; .*bfloat16, float8_e4m3fn, float8_e5m2"),
        ({"dtype": "float8_e4m3fn"}, errors.DTypeError, r"`dtype` is 'float8_e4m3fn'; .*name them by `kv_dtype`"),
        (
            {"kv_dtype": "float16"},
            errors.DTypeError,
            r"`dtype` has dtype float32, `kv_dtype` has float16; .*float8_e4m3fn or float8_e5m2",
        ),
        (
            {"kv_dtype": None, "k_scale": 0.5},
            errors.ArgumentError,
            "`k_scale`, `v_scale` are for pages of 8 bits; pages of float32 have no",
        ),
        ({"k_scale": 0.0}, errors.ArgumentError, r"`k_scale` has 0\.0; a scale is finite and above 0"),
        ({"v_scale": [1, float("nan"), 1]}, errors.ArgumentError, r"`v_scale` has nan"),
        ({"v_scale": float("inf")}, errors.ArgumentError, r"`v_scale` has inf"),
        (
            {"k_scale": [1, 2]},
            errors.ArgumentError,
            r"`k_scale` has shape \(2,\); .*\[num_layers\] = \[3\], or .*\[3, 2\]",
        ),
        ({"k_scale": np.ones((2, 3))}, errors.ArgumentError, r"`k_scale` has shape \(2, 3\)"),
        ({"k_scale": "large"}, errors.DTypeError, "`k_scale` is 'large'; it must be a number or an array"),
    ],
)
def test_create_refuses(changes, kind, message):
    with pytest.raises(kind, match=message):
        PagedKVCache(**{**SIZE, "kv_dtype": "float8_e4m3fn", **changes})


def test_packed_functions_check_what_python_would():
    device = PagedKVCache(**SIZE)._call("pages", 0).device
    create = _ffi.func("kv_cache_create_scaled")
    with pytest.raises(errors.DTypeError, match=r"`kv_dtype` is int8; it must be one of float32, .*float8_e5m2"):
        create(1, 1, 1, 8, "float32", "int8", 1, 1, 1, 1, 0, 0, device)
    with pytest.raises(errors.DTypeError, match=r"`dtype` is float8_e4m3fn; .*a kv_dtype"):
        create(1, 1, 1, 8, "float8_e4m3fn", "float8_e4m3fn", 1, 1, 1, 1, 0, 0, device)
    kv = create(2, 1, 1, 8, "float32", "float8_e4m3fn", 1, 1, 1, 1, 0, 0, device)
    good = np.ones((2, 1), np.float32)
    for bad, kind, message in (
        (np.ones((1, 1), np.float32), errors.ArgumentError, r"`k_scales` has shape \[1, 1\]; dimension 0 must be 2"),
        (np.ones((2, 1)), errors.DTypeError, "`k_scales` has dtype float64"),
        (
            np.array([[1], [-1]], np.float32),
            errors.ArgumentError,
            "`k_scales` has -1 at entry 1; a scale is finite and above 0",
        ),
    ):
        with pytest.raises(kind, match=message):
            _ffi.func("kv_cache_set_scales")(kv, bad, good)
    with pytest.raises(errors.ArgumentError, match="whose elements have no scale; create it with an 8-bit kv_dtype"):
        PagedKVCache(**SIZE).set_scales(0.5, 0.5)


def test_new_tokens_have_the_type_of_queries():
    cache = PagedKVCache(**SIZE, kv_dtype="float8_e4m3fn")
    cache.add_sequence(0)
    with cache.forward([0], [1]):
        q, k = np.zeros((1, 6, 16), np.float32), np.zeros((1, 2, 16), ml_dtypes.float8_e4m3fn)
        with pytest.raises(errors.DTypeError, match="`k` has dtype float8_e4m3fn; it must be float32"):
            cache.attention(0, q, k, k)


def test_a_variant_on_the_host_sees_values():
    cache, wide = (
        PagedKVCache(**SIZE, kv_dtype=x, **s)
        for x, s in ((FLOAT8[0], {"k_scale": 2.0**-5, "v_scale": 2.0**-5}), (None, {}))
    )
    for c in (cache, wide):
        c.set_variant(variant.soft_cap.bind(cap=2.0))
    error = np.abs(attend(cache) - attend(wide)).max()
    assert 0 < error < 0.1


def test_mlc_caches_have_no_8_bits():
    pytest.importorskip("tvm")
    from tvm_infer.runtime.mlc_cache import MLCPagedKVCache

    with pytest.raises(
        errors.DTypeError, match=r"`dtype` is 'float8_e4m3fn'; it must be one of float32, float16, bfloat16"
    ):
        MLCPagedKVCache(
            max_batch_size=1,
            max_total_seq_len=16,
            prefill_chunk_size=16,
            num_layers=1,
            num_qo_heads=1,
            num_kv_heads=1,
            head_dim=16,
            dtype="float8_e4m3fn",
        )


def test_states_do_not_leave_their_scales_behind():
    """A state has no scales, so that another cache would read other values: refused both ways. Swaps stay in the cache."""
    sizes = dict(num_layers=1, num_qo_heads=2, num_kv_heads=1, head_dim=16, num_pages=4, max_batch=1, max_tokens=8)
    plain = PagedKVCache(**sizes, dtype="float32")
    plain.add_sequence(0)
    state = plain.export_sequence(0)
    cache = PagedKVCache(**sizes, dtype="float32", kv_dtype="float8_e4m3fn", k_scale=0.5)
    cache.add_sequence(0)
    new = [np.full((3, heads, 16), 1.5, np.float32) for heads in (2, 1, 1)]
    with cache.forward([0], [3]) as step:
        step.attention(0, *new)
    with pytest.raises(errors.DTypeError, match=r"pages of float8_e4m3fn, whose scales.*swap_out"):
        cache.export_sequence(0)
    with pytest.raises(errors.DTypeError, match=r"whose scales"):
        cache.import_sequence(1, state)
    before = [np.array(x) for x in cache.gather(0, 0)]
    cache.swap_out(0)
    cache.swap_in(0)
    for was, now in zip(before, cache.gather(0, 0), strict=True):
        assert was.tobytes() == np.array(now).tobytes() and was.any()

"""The adapter with its cache on a CUDA device: the same calls, the same float64 model."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
import tvm_ffi
from inline_model import InlineDriver, InlineLayerWindows, InlineSequenceWindows, frequencies, parts, turned
from mlc_model import Driver, attend, attention_kv_cache, check, to_numpy, to_tvm
from test_mlc_trees import WIDE, Trees
from test_mlc_windows import LayerWindows, SequenceWindows

from tvm_infer import doctor, errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not doctor.gpus()[1], reason="needs a CUDA device")]

SETTINGS = {
    "num_qo_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 64,
    "page_size": 16,
    "max_total_seq_len": 900,
    "prefill_chunk_size": 200,
    "device": "cuda",
}


INV_FREQ = frequencies(32, 5e5)


@pytest.fixture(params=["bfloat16", "float16"])
def dtype(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return request.param


def test_steps_forks_and_pops(dtype):
    d = Driver(dtype, **SETTINGS)
    d.add(3), d.add(1)
    d.step([3, 1], [37, 150], padding=6)
    d.step([1, 3], [1, 1])
    d.fork(1, 8, 100), d.fork(8, 9), d.fork(9, 10, 41)
    d.step([8, 3, 10, 9, 1], [1, 40, 1, 1, 1])
    d.popn(3, 50), d.remove(1)
    d.step([3, 9], [2, 70])
    d.check_contents()


def test_windows_of_layers(dtype):
    d = LayerWindows(40, dtype=dtype, **SETTINGS)
    d.add(0), d.add(1)
    for ids, lengths in [([0, 1], [150, 30]), ([1, 0], [1, 1]), ([0, 1], [20, 100]), ([0, 1], [1, 1])]:
        d.step(ids, lengths, padding=3)


def test_windows_of_sequences(dtype):
    d = SequenceWindows(dtype=dtype, **SETTINGS)
    for seq in (0, 1, 2):
        d.add(seq)
    d.enable(0, 60, 7), d.enable(2, 33, 0)
    for ids, lengths in [
        ([0, 1, 2], [100, 20, 40]),
        ([2, 0], [1, 1]),
        ([0, 1], [150, 5]),
        *([([1, 2, 0], [1, 1, 1])] * 20),
    ]:
        d.step(ids, lengths, padding=2)
    assert d.held() == 60 + d.length(1) + 33


@pytest.mark.parametrize("rope_mode", ["none", "normal", "inline"])
def test_token_trees(dtype, rope_mode):
    settings = {**SETTINGS, "rope_mode": rope_mode, "rope_theta": 5e5}
    rotate = None
    if rope_mode != "none":

        def rotate(qkv, positions):
            q, k, v = np.split(qkv, [8, 10], axis=1)
            return turned(q, positions, INV_FREQ), turned(k, positions, INV_FREQ), v

    d = Trees(dtype, rotate=rotate or (lambda qkv, _: np.split(qkv, [8, 10], axis=1)), **settings)
    d.add(3), d.add(5)
    d.tree_step([3, 5], [[-1, *range(59)], [-1, *range(20)]])
    d.commit([3, 5], [59, 20])
    d.tree_step([5, 3], [WIDE, [-1, -1, 1]])
    d.tree_step([5], [[3, 8, 8, 9]])
    d.commit([5, 3], [12, 2])
    d.tree_step([3, 5], [[-1], WIDE])
    d.commit([3, 5], [-1, 6])
    if rope_mode == "none":
        d.check_contents()


@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_rope(dtype, rotary_dim):
    d = Driver(dtype, rope_mode="normal", rope_theta=5e5, rotary_dim=rotary_dim, **SETTINGS)
    inv_freq = frequencies(rotary_dim // 2, 5e5)
    d.add(0), d.add(7)
    for ids, lengths in (([0, 7], [90, 33]), ([7, 0], [1, 1]), ([0, 7], [1, 60])):
        positions = np.concatenate([d.length(s) + np.arange(n) for s, n in zip(ids, lengths, strict=True)])
        d.begin(ids, lengths)
        qkv = d.random(sum(lengths), 12, 64)
        outputs = [d.fused(layer, qkv, padding=3) for layer in range(d.layers)]
        d.end()
        q, k, v = np.split(qkv, [8, 10], axis=1)
        for seq, (begin, end) in zip(ids, d.rows(lengths), strict=True):
            new = np.stack([turned(k, positions, inv_freq)[begin:end], v[begin:end]])[None].repeat(d.layers, axis=0)
            d.history[seq] = np.concatenate([d.history[seq], new], axis=2)
        for layer, o in enumerate(outputs):
            check(o, d.whole(layer, ids, lengths, turned(q, positions, inv_freq)), dtype, f"{ids} + {lengths}")


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": {"rope_type": "gptj"}}, {"rotary_dim": 32}], ids=str)
@pytest.mark.parametrize("page_size", [16, 1])
def test_inline_rotation(dtype, scaling, page_size):
    inv_freq = frequencies(scaling.get("rotary_dim", 64) // 2, 5e5)

    def turn(x, positions, layer):
        return turned(x, positions, inv_freq, "rope_scaling" in scaling)

    d = InlineDriver(dtype, rope_theta=5e5, turn=turn, **{**SETTINGS, "page_size": page_size}, **scaling)
    d.add(3), d.add(1)
    d.step([3, 1], [37, 150], padding=6)
    d.step([1, 3], [1, 1])
    d.fork(1, 8, 100)
    d.step([8, 3, 1], [1, 40, 1])
    d.popn(3, 50)
    d.step([3, 8], [2, 70])
    d.check_contents()


@pytest.mark.parametrize("page_size", [16, 4])
def test_inline_rotation_and_windows_of_sequences(dtype, page_size):
    d = InlineSequenceWindows(dtype=dtype, rope_mode="normal", **{**SETTINGS, "page_size": page_size})
    for seq in (0, 1, 2):
        d.add(seq)
    d.enable(0, 60, 7), d.enable(2, 33, 0)
    for ids, lengths in [
        ([0, 1, 2], [100, 20, 40]),
        ([2, 0], [1, 1]),
        ([0, 1], [150, 5]),
        *([([1, 2, 0], [1, 1, 1])] * 20),
    ]:
        d.step(ids, lengths, padding=2)
    d.begin([0, 2], [90, 1])
    q, k, v = d.random(91, 8, 64), d.random(91, 2, 64), d.random(91, 2, 64)
    own, cross = parts(d, 1, q, k, v)
    expected = d.self_attention([0, 2], [90, 1], q, k, v), d.cross_attention(1, [0, 2], [90, 1], q)
    for pair, values in zip((own, cross), expected, strict=True):
        for tensor, x in zip(pair, values, strict=True):
            check(to_numpy(tensor), x, dtype, "self or cross")


def test_inline_rotation_and_windows_of_layers(dtype):
    def turn(x, positions, layer):
        return turned(x, positions, frequencies(32, (5e5, 1e4)[layer]))

    d = InlineLayerWindows(40, dtype=dtype, rope_theta=5e5, turn=turn, **SETTINGS)
    d.add(0), d.add(1)
    for ids, lengths in [([0, 1], [150, 30]), ([1, 0], [1, 1]), ([0, 1], [20, 100]), ([0, 1], [1, 1])]:
        d.step(ids, lengths, padding=3)


def test_shared_kv(dtype):
    d = Driver(dtype, **SETTINGS)
    d.add(2), d.add(5)
    d.step([2, 5], [60, 3])
    for lengths in ([40, 20], [1, 1]):
        n = sum(lengths)
        d.begin([2, 5], lengths)
        qkv, q, o = d.random(n, 12, 64), d.random(n, 8, 64), d.tvm(np.zeros((n, 8, 64)))
        d.fused(0, qkv), d.fused(1, qkv)
        k, v = qkv[:, 8:10], qkv[:, 10:]
        attention_kv_cache("attention_with_shared_kv", d.cache, 0, d.scale, d.tvm(q), d.tvm(k), d.tvm(v), o)
        d.end()
        for seq, (begin, end) in zip([2, 5], d.rows(lengths), strict=True):
            new = np.stack([k[begin:end], v[begin:end]])[None].repeat(2, axis=0)
            d.history[seq] = np.concatenate([d.history[seq], new], axis=2)
        check(to_numpy(o), d.whole(0, [2, 5], lengths, q), dtype, "o")


def test_debug_set(dtype):
    d = Driver(dtype, **SETTINGS)
    d.add(0)
    d.step([0], [50])
    new = d.random(2, 2, 30, 2, 64)
    d.cache.debug_set_kv(0, 11, d.tvm(new[:, 0]), d.tvm(new[:, 1]))
    d.history[0][:, :, 11:41] = new
    d.check_contents()
    d.step([0], [1])


def test_tensors_on_the_host_are_refused():
    d = Driver("float16", **SETTINGS)
    d.add(0)
    d.begin([0], [2])
    qkv, o = d.random(2, 12, 64), d.tvm(np.zeros((2, 8, 64)))
    host = Driver("float16").tvm(qkv)
    with pytest.raises(errors.ArgumentError, match="`qkv_data` is on cpu:0 and the cache on cuda:0"):
        attention_kv_cache("attention_with_fused_qkv", d.cache, 0, 1.0, host, o)


def test_self_cross_and_merge(dtype):
    d = Driver(dtype, **SETTINGS)
    ids, lengths = [0, 1, 2], [50, 20, 3]
    for seq in ids:
        d.add(seq)
    d.step(ids[:2], [60, 17])  # the third has no keys: its rows see nothing in cross attention
    d.begin(ids, lengths)
    q, k, v = d.random(73, 8, 64), d.random(73, 2, 64), d.random(73, 2, 64)
    pairs = [(d.tvm(np.full((73, 8, 64), np.nan)), d.tvm(np.full((73, 8), np.nan), "float32")) for _ in range(2)]
    attention_kv_cache("self_attention", d.cache, 1, d.scale, d.tvm(q), d.tvm(k), d.tvm(v), *pairs[0])
    attention_kv_cache("cross_attention", d.cache, 1, d.scale, d.tvm(q), *pairs[1])
    for pair, expected in zip(
        pairs, (d.self_attention(ids, lengths, q, k, v), d.cross_attention(1, ids, lengths, q)), strict=True
    ):
        for tensor, values in zip(pair, expected, strict=True):
            check(to_numpy(tensor), values, dtype, "self or cross")
    out = attention_kv_cache("merge_attn_output_inplace", d.cache, *pairs[0], *pairs[1])
    for seq, (begin, end) in zip(ids, d.rows(lengths), strict=True):
        new = np.stack([k[begin:end], v[begin:end]])[None].repeat(2, axis=0)
        d.history[seq] = np.concatenate([d.history[seq], new], axis=2)
    check(to_numpy(out[0]), d.whole(1, ids, lengths, q), dtype, "merged")


def test_functions_of_the_flashinfer_tag(dtype):
    """A prefill and a decode over TVM's pages, twice each: the second layer takes the first one's plan."""
    d = Driver(dtype, **SETTINGS)
    lengths, pages = [37, 0, 16], [[4, 1, 7], [], [2]]
    pool = d.random(9, 2, 2, 16, 64)
    kv = [np.concatenate([pool[p] for p in own], axis=2) if own else np.zeros((2, 2, 0, 64)) for own in pages]
    device = tvm_ffi.device(SETTINGS["device"])
    float_ws, int_ws = (tvm.runtime.empty((n << 20,), "uint8", device) for n in (64, 8))
    pinned = tvm.runtime.empty((8 << 20,), "uint8")
    index = lambda x, where=SETTINGS["device"]: to_tvm(x, "int32", where)  # noqa: E731
    ours = lambda name: tvm.get_global_func(f"tvm_infer.mlc.{name}")  # noqa: E731
    k_pages, v_pages = (d.tvm(np.ascontiguousarray(pool[:, i])) for i in (0, 1))
    tables = index([0, 3, 3, 4]), index([4, 1, 7, 2]), index([5, 0, 16])
    empty = d.tvm(np.zeros(0))
    for decode, rows in ((False, [2, 1, 3]), (True, [1, 1, 1])):
        n, indptr = sum(rows), np.concatenate([[0], np.cumsum(rows)])
        if decode:
            info = ours("decode_plan")(
                float_ws, int_ws, pinned, index([0, 3, 3, 4], "cpu"), 3, 8, 2, 16, False, -1, 0.0, 64, 64, empty, empty
            )
        else:
            info = ours("prefill_plan")(
                float_ws, int_ws, pinned, index(indptr, "cpu"), index([0, 3, 3, 4], "cpu"), index(lengths, "cpu"), n, 3, 8,
                2, 16, False, 64, 64, False, -1, -1, False, 0,
            )  # fmt: skip
        for _ in range(2):
            q, o, lse = d.random(n, 8, 64), d.tvm(np.zeros((n, 8, 64))), d.tvm(np.zeros((n, 8)), "float32")
            args = (float_ws, int_ws, info, d.tvm(q), k_pages, v_pages)
            if decode:
                ours("decode_run")(*args, *tables, o, lse, 1, -1, False, 0.125, 1.0, 1e-4)
            else:
                ours("paged_run")(*args, index(indptr), *tables, o, lse, 0, 1, -1, False, 0.125, 1.0, 1e-4)
            for r, (begin, end) in enumerate(d.rows(rows)):
                keys, values = (x.swapaxes(0, 1)[: lengths[r]] for x in kv[r])
                mask = np.ones((end - begin, lengths[r]), bool)
                expected, expected_lse = attend(q[begin:end], keys, values, 0.125, mask)
                check(to_numpy(o)[begin:end], expected, dtype, "o")
                check(to_numpy(lse)[begin:end], expected_lse, dtype, "lse")

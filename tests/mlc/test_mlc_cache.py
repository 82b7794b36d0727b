"""Our cache behind `vm.builtin.kv_state_*` and `vm.builtin.attention_kv_cache_*`, against a float64 model."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from mlc_model import Driver, attention_kv_cache, check, kv_state, merged, shape, to_numpy, to_tvm

from tvm_infer import errors


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    if request.param == "bfloat16":
        pytest.importorskip("ml_dtypes")
    return request.param


def test_prefill_decode_and_append_after_decode(dtype):
    d = Driver(dtype)
    d.add(3), d.add(1), d.add(2)
    d.step([3, 1, 2], [5, 1, 9])  # ids in any order, odd lengths
    d.step([2, 3, 1], [1, 1, 1])
    d.step([1, 3], [7, 1])  # a chunk beside a decode
    d.step([2, 1, 3], [3, 2, 6])
    d.check_contents()


def test_a_cache_is_empty_at_first_and_again():
    d = Driver()
    d.check_contents()
    assert (
        attention_kv_cache("get_num_available_pages", d.cache) == 160 // 4 + 1
    )  # ceil(max_total_seq_len / page_size) + 1
    d.add(0)
    d.step([0], [9])
    d.clear()
    d.check_contents()
    assert attention_kv_cache("get_num_available_pages", d.cache) == 41
    d.add(0)  # the id is free again
    d.step([0], [2])


def test_a_number_of_tokens_that_fills_no_page_gets_a_page_more():
    d = Driver(max_total_seq_len=161)
    assert attention_kv_cache("get_num_available_pages", d.cache) == 42


@pytest.mark.parametrize("position", [-1, 0, 1, 4, 5, 8, 10])
def test_fork(dtype, position):
    """At the end, nowhere, within a page, at its end."""
    d = Driver(dtype)
    d.add(0)
    d.step([0], [10])
    d.fork(0, 1, position)
    d.step([0, 1], [1, 1])
    d.step([1], [6])
    d.step([0], [2])
    d.check_contents()


def test_forks_of_forks():
    """TVM's kernels see two levels of sharing; here every level shares pages."""
    d = Driver(max_total_seq_len=400)
    d.add(0)
    d.step([0], [22])
    for depth, position in enumerate([19, -1, 13, 13, -1, 6]):
        d.fork(depth, depth + 1, position)
        d.step([depth + 1], [3])
    d.step([5, 0, 3], [1, 1, 1])
    d.step([1, 6, 2, 4], [4, 1, 2, 1])
    d.check_contents()
    for seq in (0, 3, 6, 1):  # parents go before their children
        d.remove(seq)
        d.check_contents()
    d.step([2, 4, 5], [1, 1, 1])
    d.check_contents()


def test_forks_share_pages():
    d = Driver()
    d.add(0)
    d.step([0], [16])
    before = attention_kv_cache("get_num_available_pages", d.cache)
    for child in range(1, 5):
        d.fork(0, child)
    assert attention_kv_cache("get_num_available_pages", d.cache) == before
    d.step([0, 1, 2, 3, 4], [1, 1, 1, 1, 1])
    assert attention_kv_cache("get_num_available_pages", d.cache) == before - 5


@pytest.mark.parametrize("n", [0, 1, 2, 7, 11])
def test_popn(n):
    d = Driver()
    d.add(0)
    d.step([0], [11])
    d.fork(0, 1, 9)
    d.popn(0, n)
    d.step([0, 1], [3, 1])
    d.check_contents()


def test_padding_rows_are_neither_read_nor_written():
    d = Driver()
    d.add(0), d.add(1)
    d.step([0, 1], [3, 4], padding=5)
    d.step([0, 1], [1, 1], padding=2)
    d.check_contents()


def test_strided_and_offset_qkv():
    """TVM passes views of its storages."""
    d = Driver()
    d.add(0)
    d.begin([0], [3])
    qkv = d.random(3, 8, 16)
    wide = np.full((5, 3, 8, 16), np.nan, np.float32)
    wide[2] = qkv
    view = to_tvm(wide)._create_view((3, 8, 16), "float32", 2 * 3 * 8 * 16 * 4)
    o = to_tvm(np.zeros((3, 4, 16)))
    attention_kv_cache("attention_with_fused_qkv", d.cache, 1, d.scale, view, o)
    expected, _ = d.self_attention([0], [3], *np.split(qkv, [4, 6], axis=1))
    check(to_numpy(o), expected, "float32", "a view")


def test_a_step_without_tokens():
    d = Driver()
    d.step([], [])
    d.add(0)
    d.step([0], [0])
    d.step([0], [2])
    d.check_contents()


def test_a_begin_ends_the_step_before():
    """TVM's EndForward does nothing, so callers may leave it out."""
    d = Driver()
    d.add(0)
    d.begin([0], [2])
    d.begin([0], [3])
    d.end(), d.end()
    assert attention_kv_cache("get_total_sequence_length", d.cache) == 5


def test_sequence_length():
    if tvm.get_global_func("vm.builtin.attention_kv_cache_get_sequence_length", allow_missing=True) is None:
        pytest.skip("this TVM has no such builtin")
    d = Driver()
    d.add(5)
    d.step([5], [3])
    assert attention_kv_cache("get_sequence_length", d.cache, 5) == 3


class TestFineGrained:
    """Self and cross attention with LSE in base 2, and their merge."""

    def tensors(self, d, n):
        o = to_tvm(np.full((n, d.h_q, d.d), np.nan), d.dtype)
        return o, tvm.runtime.tensor(np.full((n, d.h_q), np.nan, np.float32))

    def test_self(self, dtype):
        d = Driver(dtype)
        ids, lengths = [4, 0, 9], [3, 1, 6]
        for seq in ids:
            d.add(seq)
        d.step(ids, [2, 5, 1])
        d.begin(ids, lengths)
        q, k, v = d.random(10, 4, 16), d.random(10, 2, 16), d.random(10, 2, 16)
        o, lse = self.tensors(d, 10)
        args = [to_tvm(x, dtype) for x in (q, k, v)]
        attention_kv_cache("self_attention", d.cache, 1, d.scale, *args, o, lse)
        expected, expected_lse = d.self_attention(ids, lengths, q, k, v)
        check(to_numpy(o), expected, dtype, "o")
        check(to_numpy(lse), expected_lse, dtype, "lse")

    @pytest.mark.parametrize("lengths", [[3, 1, 6], [2, 1, 1]])
    def test_cross_sees_what_was_there_before_the_step(self, dtype, lengths):
        d = Driver(dtype)
        ids = [4, 0, 9]  # the last one is empty: its rows see nothing
        for seq in ids:
            d.add(seq)
        d.step(ids[:2], [7, 4])
        d.begin(ids, lengths)
        for layer in range(2):  # one plan serves the layers
            q = d.random(sum(lengths), 4, 16)
            o, lse = self.tensors(d, sum(lengths))
            attention_kv_cache("cross_attention", d.cache, layer, d.scale, to_tvm(q, dtype), o, lse)
            expected, expected_lse = d.cross_attention(layer, ids, lengths, q)
            assert np.isinf(expected_lse[-1]).all()
            check(to_numpy(o), expected, dtype, "o")
            check(to_numpy(lse), expected_lse, dtype, "lse")

    def test_cross_in_a_decode_step_sees_the_new_tokens_too(self):
        d = Driver()
        d.add(0), d.add(1)
        d.step([0, 1], [4, 7])
        d.begin([1, 0], [1, 1])
        qkv = d.random(2, 8, 16)
        d.fused(0, qkv)
        for row, seq in enumerate([1, 0]):
            kv = np.zeros((2, 2, 1, 2, 16))
            kv[0, :, 0] = np.split(qkv[row, 4:], 2)
            d.history[seq] = np.concatenate([d.history[seq], kv], axis=2)
        q = d.random(2, 4, 16)
        o, lse = self.tensors(d, 2)
        attention_kv_cache("cross_attention", d.cache, 0, d.scale, to_tvm(q), o, lse)
        expected, expected_lse = d.cross_attention(0, [1, 0], [1, 1], q)
        check(to_numpy(o), expected, "float32", "o")
        check(to_numpy(lse), expected_lse, "float32", "lse")

    def test_self_and_cross_merged_are_the_whole(self, dtype):
        d = Driver(dtype)
        ids, lengths = [0, 1], [5, 2]
        d.add(0), d.add(1)
        d.step([0], [6])
        starts = dict(d.history)
        d.begin(ids, lengths)
        q, k, v = d.random(7, 4, 16), d.random(7, 2, 16), d.random(7, 2, 16)
        pairs = [self.tensors(d, 7), self.tensors(d, 7)]
        attention_kv_cache("self_attention", d.cache, 0, d.scale, *(to_tvm(x, dtype) for x in (q, k, v)), *pairs[0])
        attention_kv_cache("cross_attention", d.cache, 0, d.scale, to_tvm(q, dtype), *pairs[1])
        lse_cross = pairs[1][1].numpy().copy()
        out = attention_kv_cache("merge_attn_output_inplace", d.cache, *pairs[0], *pairs[1])
        assert out[0].same_as(pairs[0][0]) and out[1].same_as(pairs[0][1])
        assert np.array_equal(pairs[1][1].numpy(), lse_cross)
        for seq, (begin, end) in zip(ids, d.rows(lengths), strict=True):
            new = np.stack([k[begin:end], v[begin:end]])[None].repeat(2, axis=0)
            d.history[seq] = np.concatenate([starts[seq], new], axis=2)
        check(to_numpy(out[0]), d.whole(0, ids, lengths, q), dtype, "o")

    def test_merge(self, dtype):
        d = Driver(dtype)
        o_a, o_b = d.random(5, 4, 16), d.random(5, 4, 16)
        lse_a, lse_b = d.rng.standard_normal((2, 5, 4)).astype(np.float32) * 9
        lse_a[1], lse_b[2], lse_a[3], lse_b[3] = -np.inf, -np.inf, -np.inf, -np.inf
        o_a[1] = o_a[3] = o_b[2] = o_b[3] = 0
        args = to_tvm(o_a, dtype), to_tvm(lse_a), to_tvm(o_b, dtype), to_tvm(lse_b)
        o, lse = attention_kv_cache("merge_attn_output_inplace", d.cache, *args)
        expected, expected_lse = merged(o_a, lse_a.astype(float), o_b, lse_b.astype(float))
        check(to_numpy(o), expected, dtype, "o")
        check(to_numpy(lse), expected_lse, "float32", "lse")

    def test_shared_kv(self, dtype):
        """A layer without keys of its own attends to those of another, prefill and decode alike."""
        d = Driver(dtype)
        ids = [2, 5]
        d.add(2), d.add(5)
        d.step(ids, [6, 3])
        for lengths in ([4, 2], [1, 1]):
            n = sum(lengths)
            d.begin(ids, lengths)
            qkv = d.random(n, 8, 16)
            d.fused(0, qkv)
            q, k, v = d.random(n, 4, 16), qkv[:, 4:6], qkv[:, 6:]
            o, _ = self.tensors(d, n)
            attention_kv_cache(
                "attention_with_shared_kv", d.cache, 0, d.scale, *(to_tvm(x, dtype) for x in (q, k, v)), o
            )
            d.fused(1, qkv)
            d.end()
            for seq, (begin, end) in zip(ids, d.rows(lengths), strict=True):
                new = np.stack([k[begin:end], v[begin:end]])[None].repeat(2, axis=0)
                d.history[seq] = np.concatenate([d.history[seq], new], axis=2)
            check(to_numpy(o), d.whole(0, ids, lengths, q), dtype, "o")

    def test_lse_is_base_2(self):
        """One key: its LSE is its score times log2(e)."""
        d = Driver(num_qo_heads=1, num_kv_heads=1)
        d.add(0)
        d.begin([0], [1])
        q, k, v = d.random(1, 1, 16), d.random(1, 1, 16), d.random(1, 1, 16)
        o, lse = self.tensors(d, 1)
        attention_kv_cache("self_attention", d.cache, 0, 0.5, *(to_tvm(x) for x in (q, k, v)), o, lse)
        assert lse.numpy()[0, 0] == pytest.approx(0.5 * (q * k).sum() / np.log(2), rel=1e-6)


class TestDebugViews:
    def test_a_range_within_pages(self):
        d = Driver()
        d.add(0)
        d.step([0], [11])
        k, v = d.get(0, 3, 10)
        assert np.array_equal(k, d.history[0][:, 0, 3:10]) and np.array_equal(v, d.history[0][:, 1, 3:10])

    def test_set(self, dtype):
        d = Driver(dtype)
        d.add(0), d.add(1)
        d.step([0, 1], [11, 5])
        new = d.random(2, 2, 6, 2, 16)
        d.cache.debug_set_kv(0, 2, to_tvm(new[:, 0], dtype), to_tvm(new[:, 1], dtype))
        d.history[0][:, :, 2:8] = new
        d.check_contents()
        d.step([0, 1], [2, 1])

    def test_shared_pages_are_not_set(self):
        d = Driver()
        d.add(0)
        d.step([0], [6])
        d.fork(0, 1)
        d.step([0, 1], [4, 4])
        zeros = to_tvm(np.zeros((2, 2, 2, 16)))
        with pytest.raises(
            errors.CacheStateError, match="positions 0 to 3 of sequence 1 lie in a page that 2 sequences share"
        ):
            d.cache.debug_set_kv(1, 2, zeros, zeros)
        d.cache.debug_set_kv(1, 8, zeros, zeros)
        d.history[1][:, :, 8:10] = 0
        d.check_contents()

    @pytest.mark.parametrize(("begin", "end"), [(-1, 2), (2, 2), (3, 1), (0, 6)])
    def test_bad_ranges(self, begin, end):
        d = Driver()
        d.add(0)
        d.step([0], [5])
        x = to_tvm(np.zeros((2, max(end - begin, 1), 2, 16)))
        with pytest.raises(errors.ArgumentError, match=f"are {begin} and {end} for a sequence of 5 tokens"):
            attention_kv_cache("debug_get_kv", d.cache, 0, begin, end, x, x)


class TestErrors:
    @pytest.fixture
    def d(self):
        d = Driver()
        d.add(0)
        d.step([0], [5])
        return d

    def test_sequences(self, d):
        with pytest.raises(errors.UnknownSequenceError, match="8"):
            kv_state("remove_sequence", d.cache, 8)
        with pytest.raises(errors.UnknownSequenceError, match="0"):
            kv_state("add_sequence", d.cache, 0)
        with pytest.raises(errors.ArgumentError, match="6"):
            kv_state("fork_sequence", d.cache, 0, 1, 6)
        with pytest.raises(errors.ArgumentError, match="6"):
            kv_state("popn", d.cache, 0, 6)
        with pytest.raises(errors.ArgumentError):
            kv_state("popn", d.cache, 0, -1)
        d.check_contents()

    def test_steps(self, d):
        with pytest.raises(errors.UnknownSequenceError, match="4"):
            d.begin([0, 4], [1, 1])
        with pytest.raises(errors.ArgumentError, match="append_lengths"):
            d.begin([0], [1, 1])
        with pytest.raises(errors.ArgumentError, match="25"):
            d.begin([0], [25])
        with pytest.raises(errors.CacheStateError, match="begin_forward"):
            d.fused(0, d.random(1, 8, 16))
        d.check_contents()

    def test_out_of_pages(self):
        d = Driver(max_total_seq_len=8)  # 3 pages of 4
        d.add(0)
        d.step([0], [8])
        with pytest.raises(errors.OutOfPagesError):
            d.begin([0], [5])
        d.check_contents()
        d.step([0], [4])

    def test_within_a_step(self, d):
        d.begin([0], [1])
        for call in (lambda: d.add(1), lambda: d.popn(0, 1), lambda: d.fork(0, 1), lambda: d.remove(0)):
            with pytest.raises(errors.CacheStateError, match="end_forward"):
                call()
        d.clear()  # as TVM's: at any time
        d.check_contents()

    @pytest.mark.parametrize(
        ("qkv", "o", "kind", "message"),
        [
            (
                (2, 7, 16),
                (2, 4, 16),
                errors.ArgumentError,
                r"`qkv_data` has shape \[2, 7, 16\]; it must be \[num_tokens, 8, 16\]",
            ),
            ((2, 8, 16), (2, 4, 8), errors.ArgumentError, r"`o_data` has shape \[2, 4, 8\]"),
            (
                (1, 8, 16),
                (2, 4, 16),
                errors.PlanMismatchError,
                r"`qkv_data` has shape \[1, 8, 16\] but begin_forward announced 2",
            ),
            ((2, 8, 16), (1, 4, 16), errors.PlanMismatchError, r"`o_data`"),
            ((2, 128), (2, 4, 16), errors.ArgumentError, r"`qkv_data` has shape \[2, 128\]"),
        ],
    )
    def test_shapes(self, d, qkv, o, kind, message):
        d.begin([0], [2])
        with pytest.raises(kind, match=message):
            attention_kv_cache("attention_with_fused_qkv", d.cache, 0, 1.0, to_tvm(np.zeros(qkv)), to_tvm(np.zeros(o)))

    def test_layers_and_types(self, d):
        d.begin([0], [2])
        qkv, o, lse = np.zeros((2, 8, 16)), to_tvm(np.zeros((2, 4, 16))), to_tvm(np.zeros((2, 4)))
        with pytest.raises(errors.DTypeError, match="`qkv_data` has dtype float16; it must be float32"):
            attention_kv_cache("attention_with_fused_qkv", d.cache, 0, 1.0, to_tvm(qkv, "float16"), o)
        with pytest.raises(errors.ArgumentError, match="`layer` is 2"):
            attention_kv_cache("attention_with_fused_qkv", d.cache, 2, 1.0, to_tvm(qkv), o)
        with pytest.raises(errors.ArgumentError, match="`layer_id` is -1"):
            attention_kv_cache("cross_attention", d.cache, -1, 1.0, to_tvm(qkv[:, :4]), o, lse)
        with pytest.raises(errors.DTypeError, match="`lse_data` has dtype float16"):
            bad = to_tvm(np.zeros((2, 4)), "float16")
            attention_kv_cache("cross_attention", d.cache, 0, 1.0, to_tvm(qkv[:, :4]), o, bad)
        with pytest.raises(errors.PlanMismatchError, match="`lse_data` has shape"):
            bad = to_tvm(np.zeros((3, 4)))
            attention_kv_cache("cross_attention", d.cache, 0, 1.0, to_tvm(qkv[:, :4]), o, bad)

    def test_positions_before_the_first_step(self):
        with pytest.raises(errors.CacheStateError, match="get_query_positions came before the first step"):
            attention_kv_cache("get_query_positions", Driver().cache)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda c: attention_kv_cache("append_mla_kv", c, 0, to_tvm(np.zeros((2, 16)))), r"append_mla_kv\(layer_id=0"),
            (lambda c: attention_kv_cache("debug_get_kv_mla", c, 0, 0, 1, to_tvm(np.zeros((2, 1, 16)))), "debug_get_kv_mla"),
            (lambda c: tvm.get_global_func("vm.builtin.kv_cache_disagg_prepare_recv")(c, 0, 3), "disagg_prepare_recv.*3"),
            (
                lambda c: tvm.get_global_func("vm.builtin.kv_cache_disagg_mark_send")(c, 0, 1, shape([1, 2, 3]), 6),
                "disagg_mark_send.*recver_pe_offset=6",
            ),
        ],
    )  # fmt: skip
    def test_refused_by_name(self, d, call, message):
        with pytest.raises(errors.ArgumentError, match=message) as error:
            call(d.cache)
        assert "supported yet" in str(error.value)
        d.check_contents()

    @pytest.mark.parametrize(
        "name, args",
        [
            ("get_checkpoint_metadata", (0,)),
            ("get_layout_hash", ()),
            ("export_page_group", (0, 0, "tensor")),
            ("prepare_import", (0, "{}")),
            ("import_page_group", (0, 0, "tensor")),
            ("finish_import", (0,)),
        ],
    )
    def test_checkpoints_are_refused_by_name(self, d, name, args):
        if tvm.get_global_func(f"vm.builtin.attention_kv_cache_{name}", allow_missing=True) is None:
            pytest.skip("this TVM has no checkpoints of caches")
        values = [to_tvm(np.zeros(1)) if a == "tensor" else a for a in args]
        with pytest.raises(errors.ArgumentError, match=rf"operation {name}\(.*not supported yet"):
            attention_kv_cache(name, d.cache, *values)

"""How steps of a cache on a device are chosen: graph or not, how many rows, which results, for how long they can be read."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda_session import make_cache, make_session, manifest

from tvm_infer import errors
from tvm_infer.runtime.executable import Executable
from tvm_infer.runtime.session import Session


def run(session, cache, batch, rows=None):
    """A step as Executable.forward has it."""
    lengths = [len(new) for _, new in batch]
    flat = np.array([token for _, new in batch for token in new], np.int64)
    shape = session.shape(lengths, None if rows is None else np.asarray(rows, np.int64))
    ids = [seq for seq, _ in batch]
    with cache.forward(ids, lengths, num_rows=shape.num_rows, token_ids=flat, logit_rows=shape.logit_rows):
        return session.run(cache, shape)


def with_sequences(cache, count):
    for seq in range(count):
        cache.add_sequence(seq)
    return cache


# Buckets


@pytest.mark.parametrize(
    ("sizes", "changes", "buckets"),
    [
        ({}, {}, (1, 2, 4, 8)),
        ({"max_batch": 5}, {}, (1, 2, 4, 5)),  # no graph is wider than the cache's steps
        ({"max_batch": 1}, {}, (1,)),
        ({"max_tokens": 3}, {}, (1, 2, 3)),
        ({}, {"buckets": (8,)}, (8,)),
        ({"max_batch": 5}, {"buckets": (8,)}, (5,)),
        # TVM planned the memory of `main` for 3 rows, and with graphs off it is `main` that runs decode steps
        ({}, {"max_tokens": 3}, (1, 2, 3)),
    ],
)
def test_buckets_end_where_the_cache_and_the_model_do(monkeypatch, sizes, changes, buckets):
    session, _, _ = make_session(monkeypatch, make_cache(**sizes), **changes)
    assert session.buckets == buckets


@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize(("count", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)])
def test_steps_of_one_token_each_are_padded_to_a_bucket(monkeypatch, count, bucket, use_graphs):
    session, _, _ = make_session(monkeypatch, make_cache(), use_graphs=use_graphs)
    shape = session.shape([1] * count, None)
    assert (shape.num_rows, shape.is_decode, shape.wanted) == (bucket, use_graphs, slice(0, count))
    assert (shape.logit_rows is None) == use_graphs
    if not use_graphs:
        assert shape.logit_rows.tolist() == list(range(bucket))


@pytest.mark.parametrize("lengths", [[1] * 9, [1, 2], [1, 0, 1], [0], [5]])
def test_other_steps_have_as_many_rows_as_tokens(monkeypatch, lengths):
    session, _, _ = make_session(monkeypatch, make_cache(max_batch=16))
    shape = session.shape(lengths, None)
    assert not shape.is_decode and shape.num_rows == sum(lengths)
    ends = [int(e) - 1 for e, length in zip(np.cumsum(lengths), lengths, strict=True) if length]
    assert shape.logit_rows[: max(len(ends), 1)].tolist() == (ends or [0])


@pytest.mark.parametrize(
    ("lengths", "rows", "computed"),
    [
        ([9, 9, 9], None, [8, 17, 26, 0]),
        ([9, 1], None, [8, 9]),
        ([2, 1, 0], [0, 1, 2], [0, 1, 2]),  # no more than the step has
        ([20], range(5), [0, 1, 2, 3, 4, 0, 0, 0]),
        ([20], [7, 3, 7, 5], [3, 5, 7, 0]),
        ([20], [], [0]),
    ],
)
def test_logits_are_computed_for_powers_of_two_of_rows(monkeypatch, lengths, rows, computed):
    """Few sizes, so that TVM's pool of device memory keeps few blocks; what is returned is what was asked for."""
    cache = with_sequences(make_cache(), 3)
    session, _, _ = make_session(monkeypatch, cache)
    wanted = None if rows is None else np.array(list(rows), np.int64)
    assert session.shape(lengths, wanted).logit_rows.tolist() == computed
    result = run(session, cache, [(seq, range(50, 50 + n)) for seq, n in enumerate(lengths)], rows)
    positions = [p for n in lengths for p in range(n)]
    asked = [int(e) - 1 for e, n in zip(np.cumsum(lengths), lengths, strict=True) if n] if rows is None else list(rows)
    assert result.logits[:, 1].tolist() == [positions[row] for row in asked]
    assert result.greedy.tolist() == [51 + positions[row] for row in asked]


# Steps


@pytest.mark.parametrize("use_graphs", [True, False])
@pytest.mark.parametrize("rows", [None, [], [2], [2, 0], [1, 1, 2, 1, 0], [2, 2, 2, 2, 2]], ids=str)
def test_rows_of_a_decode_step(monkeypatch, rows, use_graphs):
    cache = with_sequences(make_cache(), 3)
    session, vm, _ = make_session(monkeypatch, cache, use_graphs=use_graphs)
    run(session, cache, [(0, [1, 2, 3]), (1, [4]), (2, [5, 6])])
    result = run(session, cache, [(2, [30]), (0, [10]), (1, [20])], rows)
    wanted = range(3) if rows is None else rows
    tokens, positions = np.array([30, 10, 20]), np.array([2, 3, 1])
    assert result.logits.shape == (len(wanted), 7) and result.logits.dtype == np.float32
    assert result.logits[:, 0].tolist() == tokens[list(wanted)].tolist()
    assert result.logits[:, 1].tolist() == positions[list(wanted)].tolist()
    assert result.greedy.tolist() == (tokens[list(wanted)] + 1).tolist()
    assert vm.launches == ["main", "decode_of_4_rows" if use_graphs else "main"]


@pytest.mark.parametrize("rows", [[3, 0, 3], [4] * 9, [4, 3, 2, 1, 0], [0, 1, 4]], ids=str)
def test_rows_of_other_steps_may_repeat(monkeypatch, rows):
    """Each row is computed once, though it is asked for more often than the step has rows."""
    cache = with_sequences(make_cache(), 2)
    session, _, _ = make_session(monkeypatch, cache)
    shape = session.shape([3, 2], np.array(rows))
    assert shape.logit_rows.size <= 5
    result = run(session, cache, [(0, [5, 6, 7]), (1, [8, 9])], rows)
    assert result.logits[:, 0].tolist() == [5 + row for row in rows]
    assert result.greedy.tolist() == [6 + row for row in rows]


def test_padding_is_token_0_at_position_0(monkeypatch):
    cache = with_sequences(make_cache(), 3)
    session, vm, _ = make_session(monkeypatch, cache)
    for token in (3, 4):
        run(session, cache, [(0, [token]), (1, [token]), (2, [token])])
    ids, positions, *_ = vm.saved["decode_of_4_rows"]
    assert np.from_dlpack(ids).tolist() == [[4, 4, 4, 0]] and np.from_dlpack(positions).tolist() == [[1, 1, 1, 0]]


def test_a_graph_is_bound_once_and_buckets_share_their_buffers(monkeypatch):
    cache = with_sequences(make_cache(), 8)
    session, vm, _ = make_session(monkeypatch, cache)
    for count in (1, 8, 3, 1, 8, 4):
        run(session, cache, [(seq, [seq + 1]) for seq in range(count)])
    assert sorted(vm.saved) == ["decode_of_1_rows", "decode_of_4_rows", "decode_of_8_rows"]
    assert vm.launches == [f"decode_of_{rows}_rows" for rows in (1, 8, 4, 1, 8, 4)]
    for which, shape in ((-2, (1, 4, 7)), (-1, (1, 4))):
        addresses = {np.from_dlpack(arguments[which]).ctypes.data for arguments in vm.saved.values()}
        assert len(addresses) == 1 and vm.saved["decode_of_4_rows"][which].shape == shape


# Results


def test_a_result_is_refused_once_the_next_step_has_overwritten_it(monkeypatch):
    cache = with_sequences(make_cache(), 2)
    session, _, _ = make_session(monkeypatch, cache)
    first = run(session, cache, [(0, [1]), (1, [2])])
    read = first.greedy
    second = run(session, cache, [(0, [3]), (1, [4])])
    assert first.greedy is read and read.tolist() == [2, 3]  # what was asked for in time is the caller's
    with pytest.raises(errors.CacheStateError, match=r"logits of a decode step.*before the next step"):
        _ = first.logits
    # a step that runs kernel by kernel has results of its own, and leaves the buffers alone
    third = run(session, cache, [(0, [5, 6])])
    assert second.logits[:, 0].tolist() == [3, 4] and third.greedy.tolist() == [7]
    fourth = run(session, cache, [(0, [7]), (1, [8])])
    assert third.logits[:, 0].tolist() == [6] and fourth.greedy.tolist() == [8, 9]


@pytest.mark.parametrize("lengths", [1, 2])
def test_results_are_waited_for_on_the_stream_of_the_step(monkeypatch, lengths):
    cache = with_sequences(make_cache(), 1)
    session, _, waited = make_session(monkeypatch, cache)
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cpu"), 77):
        result = run(session, cache, [(0, [1] * lengths)])
    _ = result.greedy, result.logits
    assert waited == [77, 77] and tvm_ffi.get_raw_stream(tvm_ffi.device("cpu")) == 0


# Steps that follow before the tokens ahead of them are read


def decode(session, cache, tokens):
    """A decode step of sequences 0, 1, … as Executable.forward has it."""
    result = run(session, cache, [(seq, [token]) for seq, token in enumerate(tokens)])
    result.sequences = tuple(range(len(tokens)))
    return result


def follow(session, cache, previous):
    assert session.follows(previous)
    result = session.follow(cache, previous)
    result.sequences = previous.sequences
    return result


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_step_goes_on_with_tokens_that_the_host_has_not_seen(monkeypatch, count):
    cache = with_sequences(make_cache(), count)
    session, vm, waited = make_session(monkeypatch, cache)
    results = [decode(session, cache, range(10, 10 + count))]
    tokens = []
    for _ in range(5):
        results.append(follow(session, cache, results[-1]))
        assert not waited
        tokens.append(results[-2].greedy.tolist())
        assert waited.pop() == 0
    tokens.append(results[-1].greedy.tolist())
    assert tokens == [[11 + seq + step for seq in range(count)] for step in range(6)]
    assert results[-1].logits[:, 0].tolist() == tokens[-2] and results[-1].logits[:, 1].tolist() == [5] * count
    assert cache.seq_len(0) == 6
    ids = np.from_dlpack(vm.saved[f"decode_of_{session.bucket(count)}_rows"][0])
    assert ids[0, count:].tolist() == [0] * (session.bucket(count) - count)  # padding


def test_tokens_stay_until_two_more_steps_were_made(monkeypatch):
    cache = with_sequences(make_cache(), 2)
    session, _, _ = make_session(monkeypatch, cache)
    first = decode(session, cache, [1, 2])
    second = follow(session, cache, first)
    with pytest.raises(errors.CacheStateError, match=r"logits of a decode step"):
        _ = first.logits
    third = follow(session, cache, second)
    assert first.greedy.tolist() == [2, 3]
    follow(session, cache, third)  # takes the slot of the first
    assert first.greedy.tolist() == [2, 3] and second.greedy.tolist() == [3, 4]
    step = late = decode(session, cache, [1, 2])
    for _ in range(3):
        step = follow(session, cache, step)
    with pytest.raises(errors.CacheStateError, match=r"tokens of a decode step.*decode_next"):
        _ = late.greedy


def test_tokens_that_were_read_are_not_kept_again(monkeypatch):
    cache = with_sequences(make_cache(), 1)
    session, _, _ = make_session(monkeypatch, cache)
    first = decode(session, cache, [1])
    read = first.greedy
    follow(session, cache, first)
    assert first.greedy is read and first._kept is None


def test_what_cannot_be_followed(monkeypatch):
    cache = with_sequences(make_cache(), 2)
    session, _, _ = make_session(monkeypatch, cache)
    prefill = run(session, cache, [(0, [1, 2]), (1, [3])])
    assert not session.follows(prefill)  # not captured: its tokens lie elsewhere
    first = decode(session, cache, [1, 2])
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cpu"), 77):  # which does not wait for the other
        assert not session.follows(first)
    assert session.follows(first)
    decode(session, cache, [1, 2])
    assert not session.follows(first)
    plain, _, _ = make_session(monkeypatch, cache, use_graphs=False)
    assert not plain.follows(decode(plain, cache, [1, 2]))


def test_a_step_that_cannot_begin_leaves_the_one_ahead_readable(monkeypatch):
    cache = with_sequences(make_cache(num_pages=1), 1)
    session, _, _ = make_session(monkeypatch, cache)
    result = decode(session, cache, [1])
    for _ in range(3):
        result = follow(session, cache, result)
    with pytest.raises(errors.OutOfPagesError):
        session.follow(cache, result)
    assert result.greedy.tolist() == [5] and cache.seq_len(0) == 4


# Lifetime


def test_nothing_of_a_session_keeps_its_cache(monkeypatch):
    """An executable's sessions end with their caches, at once: pages and graphs are device memory."""
    cache = with_sequences(make_cache(), 2)
    session, vm, _ = make_session(monkeypatch, cache)
    result = run(session, cache, [(0, [1]), (1, [2])])
    gone, session_gone = weakref.ref(cache), weakref.ref(session)
    gc.disable()
    try:
        del cache
        assert gone() is None
        del session, result
        assert session_gone() is None
    finally:
        gc.enable()
    assert vm.saved


def test_an_executables_session_goes_with_the_cache():
    executable = object.__new__(Executable)
    executable.manifest = manifest()
    executable._sessions, executable._weights, executable._number = {}, [], 1
    executable._host_vm = {"main": print}
    executable.bind = lambda cache: cache.bind(1)
    addresses = set()
    for _ in range(3):  # the address of a cache that is gone may come again
        cache = make_cache()
        addresses.add(cache.address)
        session = executable._session(cache)
        assert type(session) is Session and executable._session(cache) is session
        assert list(executable._sessions) == [cache.address]
        del cache
        assert not executable._sessions
        del session
    cache = make_cache()
    session = executable._session(cache)
    executable.release(cache)
    assert not executable._sessions
    assert executable._session(cache) is not session

"""What the state machine of test_kv_cache_reuse_stateful.py does not say: who goes first, what makes pages unfindable, errors by their
words, states in files."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest

from tvm_infer import _ffi, errors, variant
from tvm_infer.rope import RopeConfig
from tvm_infer.runtime import PagedKVCache, PrefixStats, SequenceState

SIZES = dict(num_layers=2, num_qo_heads=2, num_kv_heads=2, head_dim=8, max_batch=4, max_tokens=64)


def make(**settings):
    return PagedKVCache(**{**SIZES, "page_size": 4, "num_pages": 8, "prefix_reuse": True, **settings})


def fill(cache, seq, tokens, *, told=True, causal=True):
    """Append tokens; keys are the tokens, values half more. k and v differ from layer to layer and from head to head."""
    tokens = np.asarray(tokens, np.int64)
    dtype = ml_dtypes.bfloat16 if cache.dtype == "bfloat16" else np.dtype(cache.dtype)
    with cache.forward([seq], [len(tokens)], token_ids=tokens if told else None, causal=causal) as step:
        for layer in range(cache.num_layers):
            k = tokens[:, None, None] + 100 * layer + 10 * np.arange(cache.num_kv_heads)[:, None] + np.zeros(8)
            q = np.zeros((len(tokens), cache.num_qo_heads, 8))
            step.attention(layer, *(x.astype(dtype) for x in (q, k, k + 0.5)))


def add(cache, seq, tokens, **settings):
    """A prompt in the cache; how many of its tokens were there."""
    count = cache.add_sequence(seq, tokens, **settings)
    fill(cache, seq, tokens[count:])
    return count


A, B, C = list(range(12)), [50, 51, 52, 53, 54], [60, 61, 62, 63, 64]


def test_it_is_off_unless_asked_for():
    cache = make(prefix_reuse=False)
    assert not cache.prefix_reuse and cache.add_sequence(0) == 0
    fill(cache, 0, A)
    cache.remove_sequence(0)
    for call in (
        lambda: cache.add_sequence(1, A),
        lambda: cache.add_sequence(1, namespace=3),
        lambda: cache.match_prefix(A),
        lambda: cache.prefix_stats,
        lambda: cache.drop_prefixes(),
    ):
        with pytest.raises(errors.CacheStateError, match="create it with prefix_reuse=True"):
            call()
    assert 1 not in cache
    cache.enable_prefix_reuse()
    assert cache.match_prefix(A) == 0 and cache.prefix_stats == PrefixStats(0, 0, 0, 0, 0, 0, 0)


def test_one_token_is_left_to_compute():
    cache = make()
    add(cache, 0, A)
    assert [cache.match_prefix(A[:n]) for n in (0, 1, 4, 5, 8, 9, 12)] == [0, 0, 0, 4, 4, 8, 8]
    assert cache.match_prefix([*A, 1]) == 12
    assert cache.match_prefix(A, namespace=1) == 0 and cache.match_prefix([*A[:4], 9, *A[5:]]) == 4


def test_pages_without_a_sequence_are_free_and_found():
    cache = make()
    add(cache, 0, A)
    table = cache.page_table(0)
    cache.remove_sequence(0)
    assert cache.num_free_pages == 8 and cache.bytes == 0 and cache.prefix_stats.cached_pages == 3
    assert cache.add_sequence(1, [*A, 7]) == 12 and cache.page_table(1) == table and cache.num_used_pages == 3
    assert cache.bytes_after([1], [1]) == 4 * cache.bytes_per_page
    for layer in range(2):
        keys, values = cache.gather(1, layer)
        assert np.array_equal(keys[:, 1, 0], np.asarray(A) + 100 * layer + 10) and np.array_equal(values, keys + 0.5)
    assert cache.prefix_stats == PrefixStats(2, 1, 25, 12, 0, 0, 3)


def test_the_page_that_was_not_used_for_longest_goes_first_and_ends_go_before_beginnings():
    cache = make()
    for seq, tokens in enumerate((A, B, C)):  # 3 + 2 + 2 pages, of which 3 + 1 + 1 are full
        add(cache, seq, tokens)
    for seq in (1, 0, 2):
        cache.remove_sequence(seq)
    assert cache.prefix_stats.cached_pages == 5
    found = lambda: [cache.match_prefix([*t, 0]) for t in (A, B, C)]  # noqa: E731
    cache.add_sequence(9)
    fill(cache, 9, [0] * 12, told=False)  # the three pages that are free
    assert found() == [12, 4, 4]
    fill(cache, 9, [0] * 4, told=False)
    assert found() == [12, 0, 4]
    fill(cache, 9, [0] * 4, told=False)
    assert found() == [8, 0, 4], "the end of A, not its beginning"
    fill(cache, 9, [0] * 8, told=False)
    assert found() == [0, 0, 4] and cache.prefix_stats.evictions == 4
    with pytest.raises(errors.OutOfPagesError, match=r"needs 2 pages .* but 1 of 8 are free"):
        cache.begin_forward([9], [8])
    assert found() == [0, 0, 4], "a step that is refused takes nothing"


def test_use_makes_young():
    cache = make(num_pages=5)
    for seq, tokens in enumerate((B[:4], C[:4])):
        add(cache, seq, tokens)
        cache.remove_sequence(seq)
    cache.add_sequence(2, B), cache.remove_sequence(2)
    cache.add_sequence(9)
    fill(cache, 9, [0] * 16, told=False)
    assert [cache.match_prefix(t) for t in (B, C)] == [4, 0]


def test_a_page_that_others_stand_on_goes_with_what_it_holds():
    """Filled twice at a time: the second's pages hang below the first's, which is nobody's when the first is gone."""
    cache = make()
    cache.add_sequence(0), cache.add_sequence(1)
    fill(cache, 0, A[:4]), fill(cache, 1, A)
    assert cache.page_table(0)[0] not in cache.page_table(1) and cache.match_prefix([*A, 0]) == 12
    cache.remove_sequence(0)
    assert cache.prefix_stats.cached_pages == 1
    cache.add_sequence(9)
    fill(cache, 9, [0] * 20, told=False)  # the last page needed is the one below which 1's pages hang
    assert cache.match_prefix([*A, 0]) == 0 and cache.prefix_stats.indexed_pages == 0
    assert np.array_equal(cache.gather(1, 0)[0][:, 0, 0], A), "sequence 1 keeps its pages"
    cache.remove_sequence(9)
    fill(cache, 1, [12, 13, 14, 15])  # which are entered anew when it fills another
    assert cache.match_prefix([*range(16), 0]) == 16


@pytest.mark.parametrize("told", [False, True])
def test_tokens_may_come_after_the_step(told):
    cache = make()
    cache.add_sequence(0)
    fill(cache, 0, A[:5], told=told), fill(cache, 0, A[5:], told=False)
    assert cache.num_known_tokens(0) == (5 if told else 0)
    with pytest.raises(errors.ArgumentError, match="sequence 0 has 12 tokens: commit those that steps have appended"):
        cache.commit_tokens(0, [*A, 0])
    cache.commit_tokens(0, A[5:7] if told else A[:7])
    assert cache.match_prefix([*A, 0]) == 4
    cache.commit_tokens(0, A[7:])
    assert cache.match_prefix([*A, 0]) == 12 and cache.num_known_tokens(0) == 12


def test_two_who_say_otherwise_of_one_page():
    cache = make()
    cache.add_sequence(0)
    fill(cache, 0, A, told=False)
    cache.fork_sequence(0, 1)
    cache.commit_tokens(0, A), cache.commit_tokens(1, [*A[:4], *C, 1, 1, 1])
    assert cache.match_prefix([*A, 0]) == 12, "the first has it"
    assert cache.match_prefix([*A[:4], *C, 1, 1, 1, 0]) == 4
    for seq in (0, 1):
        cache.remove_sequence(seq)
    assert cache.prefix_stats.cached_pages == 3 and cache.num_free_pages == 8


def test_tokens_behind_a_gap_are_not_known():
    cache = make()
    cache.add_sequence(0)
    fill(cache, 0, A[:4]), fill(cache, 0, [9], told=False), fill(cache, 0, A[5:])
    assert cache.num_known_tokens(0) == 4 and cache.match_prefix([*A, 0]) == 4
    cache.truncate(0, 4)
    fill(cache, 0, A[4:])
    assert cache.match_prefix([*A, 0]) == 12


def test_steps_that_see_the_future_are_not_found():
    cache = make()
    cache.add_sequence(0)
    fill(cache, 0, A, causal=False)
    assert cache.num_known_tokens(0) == 0 and cache.match_prefix([*A, 0]) == 0


@pytest.mark.parametrize("share", [False, True])
def test_a_page_is_written_only_when_nobody_can_find_it(share):
    cache = make()
    add(cache, 0, A)
    cache.truncate(0, 6)  # within its second page
    assert cache.match_prefix([*A, 0]) == 12, "nothing was written yet"
    if share:
        assert cache.add_sequence(1, A[:9]) == 8
    fill(cache, 0, [90, 91])
    if share:  # the page was copied
        assert cache.match_prefix([*A, 0]) == 12 and cache.page_table(0)[1] != cache.page_table(1)[1]
        assert np.array_equal(cache.gather(1, 1)[0][:, 0, 0], np.arange(8) + 100)
    else:
        assert cache.match_prefix([*A, 0]) == 4
    assert cache.match_prefix([*A[:6], 90, 91, 0]) == 8


def test_a_window_shows_what_a_sequence_begins_with():
    """Pages behind the window are not taken; they can be found while the pool has room."""
    cache = make(num_pages=12)
    cache.set_variant(variant.sliding_window.bind(window=4))
    text = list(range(24))
    add(cache, 0, text[:16])
    fill(cache, 0, text[16:])
    fill(cache, 0, [24])
    assert cache.page_table(0)[:5] == (-1,) * 5 and cache.num_used_pages == 2
    assert cache.match_prefix([*text, 0]) == 24
    assert cache.add_sequence(1, [*text, 0]) == 24
    assert cache.page_table(1)[:5] == (-1,) * 5 and cache.page_table(1)[5] == cache.page_table(0)[5]
    assert cache.num_used_pages == 2
    fill(cache, 1, [0])
    assert np.array_equal(cache.gather(1, 0, 20)[0][:, 0, 0], [*text[20:], 0])
    with pytest.raises(errors.ArgumentError, match="were given back"):
        cache.pop(1, 10)


def test_what_changes_keys_and_values_makes_them_unfindable():
    for change in (
        lambda cache: cache.set_variant(variant.sliding_window.bind(window=9)),
        lambda cache: cache.drop_prefixes(),
        lambda cache: cache.bind(7),
        lambda cache: (cache.clear(), cache.set_rope(RopeConfig(theta=500.0, rotary_dim=8))),
    ):
        cache = make()
        add(cache, 0, A)
        change(cache)
        assert cache.match_prefix([*A, 0]) == 0 and cache.prefix_stats.indexed_pages == 0
        if 0 in cache and cache.num_known_tokens(0) == 0:  # what it has was made otherwise
            fill(cache, 0, [12, 13, 14, 15])
            assert cache.match_prefix([*range(16), 0]) == 0
    cache = make()
    cache.bind(7)
    add(cache, 0, A)
    cache.release(7), cache.bind(7)
    assert cache.match_prefix([*A, 0]) == 12, "the same executable again"
    cache.release(7), cache.bind(8)
    assert cache.match_prefix([*A, 0]) == 0


def test_moved_and_dropped_tokens_are_not_found():
    cache = make(num_pages=12)
    add(cache, 0, A)
    _ffi.func("kv_cache_move_tokens")(cache, [0], [11], [5])
    assert cache.match_prefix([*A, 0]) == 4 and cache.num_known_tokens(0) == 5
    cache.commit_tokens(0, [11, *A[6:]])
    assert cache.match_prefix([*A[:5], 11, *A[6:], 0]) == 4
    add(cache, 1, B + C + [1, 2])
    _ffi.func("kv_cache_drop_pages")(cache, 1, 1, 1)
    assert cache.num_known_tokens(1) == 4
    cache.commit_tokens(1, [C[3], *C[4:], 1, 2])
    assert cache.match_prefix([*B[:4], C[3], *C[4:], 1, 2]) == 4
    cache.truncate(1, 0)
    fill(cache, 1, C)
    assert cache.match_prefix([*C, 0]) == 4


def test_tables_by_request_do_not_go_with_it():
    tree = variant.tree_mask.bind(bits=np.zeros(1, np.uint8), first_bit=np.zeros(4, np.int32))
    with pytest.raises(errors.ArgumentError, match="tree_mask, which has tables by request"):
        make().set_variant(tree)
    cache = make(prefix_reuse=False)
    cache.set_variant(tree, layers=[1])
    assert cache.has_request_tables
    with pytest.raises(errors.ArgumentError, match="layers 1 have a variant with tables by request"):
        cache.enable_prefix_reuse()
    cache.set_variant(None, layers=[1])
    cache.enable_prefix_reuse()


@pytest.mark.parametrize("tokens", [[1.5, 2], [[1, 2]], ["a"], 3])
def test_tokens_are_integers(tokens):
    cache = make()
    for call in (lambda: cache.add_sequence(0, tokens), lambda: cache.match_prefix(tokens)):
        with pytest.raises(errors.DTypeError, match="`tokens` holds"):
            call()
    assert len(cache) == 0


# Host memory


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("page_size", [1, 4, 5])
def test_a_state_goes_to_a_file_and_to_pages_of_another_size(tmp_path, dtype, page_size):
    cache = make(dtype=dtype)
    add(cache, 3, A[:11], namespace=2)
    state = cache.export_sequence(3)
    assert (state.length, state.missing, state.namespace) == (11, (0, 0), 2)
    assert state.tokens.tolist() == A[:11] and state.kv.dtype.name == dtype and state.kv.shape == (2, 2, 11, 2, 8)
    for layer in range(2):
        keys, values = cache.gather(3, layer)
        assert np.array_equal(state.kv[layer, 0], keys) and np.array_equal(state.kv[layer, 1], values)
    assert "11 tokens, 11 known; 2 layers, 2 KV heads, head_dim 8" in repr(state)
    state.save(tmp_path / "state.npz")
    other = make(dtype=dtype, page_size=page_size, num_pages=40)
    for i, copy in enumerate((SequenceState.load(tmp_path / "state.npz"), pickle.loads(pickle.dumps(state)))):
        other.import_sequence(i, copy)
        for layer in range(2):
            for mine, yours in zip(other.gather(i, layer), cache.gather(3, layer), strict=True):
                assert np.array_equal(mine, yours)
    assert other.match_prefix([*A[:11], 0], namespace=2) == 11 // page_size * page_size
    fill(other, 0, A[11:])
    assert np.array_equal(other.gather(0, 1)[0][:, 1, 3].astype(np.int64), np.asarray(A) + 110)


def test_an_empty_state():
    cache = make()
    cache.add_sequence(0)
    state = cache.export_sequence(0)
    assert state.kv.shape == (2, 2, 0, 2, 8)
    cache.swap_out(0)
    assert cache.export_sequence(0).kv.shape == (2, 2, 0, 2, 8) and cache.swapped_bytes == 0
    cache.swap_in(0), cache.import_sequence(1, state)
    fill(cache, 1, A)


def test_a_file_that_is_something_else(tmp_path):
    np.savez(tmp_path / "x.npz", a=1)
    np.save(tmp_path / "y.npy", np.zeros(2))
    (tmp_path / "z.npz").write_text("nothing")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("x.npz", "y.npy", "z.npz", "empty.npz"):
        with pytest.raises(errors.ArgumentError, match=r"not of SequenceState\.save"):
            SequenceState.load(tmp_path / name)


def test_states_that_do_not_fit():
    cache = make()
    add(cache, 0, A)
    state = cache.export_sequence(0)
    refused = [
        (errors.ArgumentError, r"`state` is a dict", {}, dict(a=1)),
        (errors.UnknownSequenceError, "0, a sequence that the cache holds already", {}, state),
        (errors.ArgumentError, r"shape \[2, 2, 12, 2, 8\].*\[3, 2, 12, 2, 8\]", {"num_layers": 3}, state),
        (errors.ArgumentError, r"\[2, 2, 12, 2, 16\] in this cache", {"head_dim": 16}, state),
        (errors.ArgumentError, r"\[2, 2, 12, 1, 8\] in this cache", {"num_kv_heads": 1}, state),
        (errors.DTypeError, "holds float32, the cache float16", {"dtype": "float16"}, state),
        (
            errors.OutOfPagesError,
            "import_sequence of sequence 0 needs 3 pages but 2 of 2 are free",
            {"num_pages": 2},
            state,
        ),
        (errors.ArgumentError, r"13 tokens, 0 of them missing", {}, SequenceState(state.kv, 13)),
        (errors.ArgumentError, r"12, with 13 known tokens", {}, SequenceState(state.kv, 12, tokens=np.arange(13))),
    ]
    for kind, words, settings, given in refused:
        target = cache if kind is errors.UnknownSequenceError else make(**settings)
        before = list(target._call("debug_state"))
        with pytest.raises(kind, match=words):
            target.import_sequence(0, given)
        assert list(target._call("debug_state")) == before


def test_pages_of_another_shape_are_refused_by_the_packed_function_too():
    cache = make()
    for shape, words in (
        ((2, 3, 2, 2, 4, 9), "head_dim of the cache"),
        ((2, 2, 2, 2, 4, 8), "the pages of so many tokens"),
        ((1, 3, 2, 2, 4, 8), "num_layers of the cache"),
    ):
        with pytest.raises(errors.ArgumentError, match=words):
            cache._call("import_pages", 0, np.zeros(shape, np.float32), 12, (0, 0), np.zeros(0, np.int64), 0)
        assert len(cache) == 0 and cache.num_used_pages == 0


def test_states_with_a_window():
    window = variant.sliding_window.bind(window=4)
    cache = make(num_pages=12)
    cache.set_variant(window)
    add(cache, 0, list(range(20)))
    fill(cache, 0, [20])
    state = cache.export_sequence(0)
    assert state.missing == (0, 16) and state.length == 21 and state.kv.shape[2] == 5
    for page_size, words in (
        (4, None),
        (2, None),
        (1, None),
        (8, None),
        (5, "no whole pages of this cache's 5 tokens"),
    ):
        other = make(num_pages=12, page_size=page_size)
        other.set_variant(window)
        if words:
            with pytest.raises(errors.ArgumentError, match=words):
                other.import_sequence(0, state)
            continue
        other.import_sequence(0, state)
        fill(other, 0, [21])
        assert np.array_equal(other.gather(0, 1, 17)[0][:, 0, 0], np.arange(117, 122))
        with pytest.raises(errors.ArgumentError, match="were given back"):
            other.pop(0, 10)
    with pytest.raises(errors.ArgumentError, match=r"all from 0 on\. Import it into a cache of the same variants"):
        make().import_sequence(0, state)
    cache.swap_out(0)
    assert cache.export_sequence(0).missing == (0, 16)
    cache.swap_in(0)
    assert cache.page_table(0)[:4] == (-1,) * 4
    assert np.array_equal(cache.gather(0, 0, 16)[0][:, 0, 0], np.arange(16, 21))


def test_swapped_out_sequences_keep_their_id_and_nothing_else_works():
    cache = make()
    add(cache, 0, A), cache.fork_sequence(0, 1)
    cache.swap_out(0)
    assert cache.is_swapped_out(0) and cache.seq_len(0) == 12 and cache.page_table(0) == (-1, -1, -1)
    assert cache.swapped_bytes == 3 * cache.bytes_per_page and cache.num_used_pages == 3, "1 has the pages"
    for call in (
        lambda: cache.begin_forward([1, 0], [1, 1]),
        lambda: cache.pages_after([0], [1]),
        lambda: cache.fork_sequence(0, 5),
        lambda: cache.pop(0, 1),
        lambda: cache.truncate(0, 3),
        lambda: _ffi.func("kv_cache_drop_pages")(cache, 0, 0, 1),
        lambda: _ffi.func("kv_cache_move_tokens")(cache, [0], [1], [2]),
        lambda: cache.swap_out(0),
    ):
        with pytest.raises(
            errors.CacheStateError, match=r"sequence 0, which was swapped out with its 12 tokens; swap_in\(\)"
        ):
            call()
    with pytest.raises(errors.CacheStateError, match="was not swapped out"):
        cache.swap_in(1)
    for call in (cache.swap_out, cache.swap_in, cache.is_swapped_out, cache.export_sequence, cache.num_known_tokens):
        with pytest.raises(errors.UnknownSequenceError):
            call(77)
    cache.remove_sequence(1)
    cache.add_sequence(2)
    fill(cache, 2, [0] * 24, told=False)
    with pytest.raises(errors.OutOfPagesError, match="swap_in of sequence 0 needs 3 pages but 2 of 8 are free"):
        cache.swap_in(0)
    with cache.forward([2], [1]):
        for call in (cache.swap_out, cache.swap_in, cache.export_sequence):
            with pytest.raises(errors.CacheStateError, match="in a step"):
                call(0)
    cache.truncate(2, 4)
    cache.swap_in(0)
    assert np.array_equal(cache.gather(0, 1)[0][:, 1, 0], np.asarray(A) + 110) and cache.swapped_bytes == 0
    cache.swap_out(0), cache.remove_sequence(0)
    assert cache.swapped_bytes == 0
    cache.swap_out(2), cache.clear()
    assert cache.swapped_bytes == 0 and cache.num_used_pages == 0

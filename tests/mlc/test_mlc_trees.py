"""Token trees of speculative decoding: masks, positions, commits, against a float64 model and TVM's own cache with its own kernels."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import tvm_cache
from mlc_model import Driver, attend, attention_kv_cache, check, kv_state, shape, to_numpy, to_tvm
from test_mlc_rope import CASES, tvm_rotation

from tvm_infer import errors
from tvm_infer.runtime import MLCPagedKVCache

WIDE = [-1, 0, 0, 1, 1, 2, 5, -1, 7]  # two roots, and nodes that are nobody's only child
CHAIN = [-1, 0, 1, 2]


def ancestors(parents, node):
    """Of a node, itself included, the first of them first."""
    path = []
    while node != -1:
        path.append(node)
        node = parents[node]
    return path[::-1]


class Trees(Driver):
    """The history has the nodes of trees behind the text, in their order, until they are committed."""

    def __init__(self, *args, rotate=None, **settings):
        super().__init__(*args, **settings)
        self.parents = {}
        self.rotate = rotate or (lambda qkv, positions: np.split(qkv, [4, 6], axis=1))

    def tree_step(self, ids, trees):
        lengths = [len(t) for t in trees]
        text = {seq: self.length(seq) - len(self.parents.get(seq, ())) for seq in ids}
        for seq, tree in zip(ids, trees, strict=True):
            self.parents[seq] = self.parents.get(seq, []) + tree
        kv_state("begin_forward", self.cache, shape(ids), shape(lengths), shape(itertools.chain(*trees)))
        positions = [
            text[seq] + len(ancestors(self.parents[seq], node)) - 1
            for seq, n in zip(ids, lengths, strict=True)
            for node in range(len(self.parents[seq]) - n, len(self.parents[seq]))
        ]
        assert attention_kv_cache("get_query_positions", self.cache).numpy().tolist() == positions
        new = [np.empty((self.layers, 2, n, self.h_kv, self.d)) for n in lengths]
        outputs = []
        for layer in range(self.layers):
            qkv = self.random(sum(lengths), self.h_q + 2 * self.h_kv, self.d)
            o = self.fused(layer, qkv, padding=layer)
            q, k, v = self.rotate(qkv, positions)
            for r, (begin, end) in enumerate(self.rows(lengths)):
                new[r][layer] = k[begin:end], v[begin:end]
            outputs.append((q, o))
        self.end()
        for seq, kv in zip(ids, new, strict=True):
            self.history[seq] = np.concatenate([self.history[seq], kv], axis=2)
        for layer, (q, o) in enumerate(outputs):
            for seq, (begin, end) in zip(ids, self.rows(lengths), strict=True):
                k, v = self.history[seq][layer]
                mask = np.zeros((end - begin, len(k)), bool)
                mask[:, : text[seq]] = True
                for row, node in enumerate(range(len(k) - text[seq] - (end - begin), len(k) - text[seq])):
                    mask[row, [text[seq] + a for a in ancestors(self.parents[seq], node)]] = True
                expected, _ = attend(q[begin:end], k, v, self.scale, mask)
                check(o[begin:end], expected, self.dtype, f"layer {layer} of {seq}")

    def commit(self, ids, leaves):
        attention_kv_cache("commit_accepted_token_tree_nodes", self.cache, shape(ids), shape(leaves))
        for seq, leaf in zip(ids, leaves, strict=True):
            parents = self.parents.pop(seq)
            text = self.length(seq) - len(parents)
            kept = [*range(text), *(text + a for a in ancestors(parents, leaf))]
            self.history[seq] = self.history[seq][:, :, kept]


@pytest.fixture
def d():
    d = Trees()
    d.add(3), d.add(5)
    d.step([3, 5], [7, 16])
    return d


@pytest.mark.parametrize("leaf", [-1, 0, 3, 6, 8])
def test_a_tree_and_its_commit(d, leaf):
    d.tree_step([5, 3], [WIDE, [-1, -1, 1]])
    d.commit([5, 3], [leaf, 2])
    d.check_contents()
    d.step([3, 5], [1, 1])  # the text goes on
    d.tree_step([3], [WIDE])
    d.commit([3], [leaf])
    d.check_contents()


def test_a_chain_is_causal(d):
    d.tree_step([5, 3], [CHAIN, [-1]])
    d.commit([3, 5], [0, 2])
    d.check_contents()
    d.step([3, 5], [2, 1])


def test_a_tree_that_grows_step_by_step(d):
    """As drafts are made, level by level; then all of it is verified no more, but committed as it is."""
    d.tree_step([5, 3], [[-1, -1, -1], [-1]])
    d.tree_step([5], [[0, 0, 2, 1]])
    d.tree_step([3, 5], [[0, 1], [3, 4, 6]])
    d.commit([5, 3], [8, 1])
    d.check_contents()
    d.step([3, 5], [1, 3])
    # a chain, whose next level is none
    d.tree_step([3], [[-1, 0]])
    d.tree_step([3], [[0]])
    d.commit([3], [2])
    d.check_contents()


def test_forks_share_the_text_of_trees(d):
    d.fork(5, 6), d.fork(5, 7, 14)
    d.tree_step([5, 6, 7], [WIDE, WIDE[:3], [-1, -1]])
    d.commit([7, 5, 6], [1, 6, 2])
    d.check_contents()
    d.fork(5, 8)
    d.tree_step([8, 5], [[-1, 0, 0], [-1, -1]])
    d.commit([5, 8], [1, -1])
    d.check_contents()


def test_pops_and_removals_of_trees(d):
    d.tree_step([5, 3], [WIDE, WIDE])
    d.popn(5, 4), d.parents.update({5: WIDE[:5]})
    d.tree_step([5], [[3, 4]])
    d.commit([5], [6])
    d.popn(3, 11), d.parents.pop(3)  # all nodes, and two tokens of the text
    d.step([3, 5], [1, 1])
    d.check_contents()
    d.tree_step([3], [WIDE])
    d.remove(3), d.parents.pop(3)
    d.add(3)
    d.step([3], [4])
    d.tree_step([3], [WIDE])
    d.clear(), d.parents.clear()
    d.add(3)
    d.step([3], [4])


@pytest.mark.parametrize("case", ["plain", "theta", "half of the head", "llama3", "gptj"])
def test_nodes_are_rotated_by_their_depth(case):
    d = Trees(rotate=tvm_rotation(**CASES[case]), rope_mode="normal", **CASES[case])
    d.add(3), d.add(5)
    d.tree_step([3, 5], [[-1, *range(8)], [-1, 0]])
    d.commit([3, 5], [8, 1])
    d.tree_step([5, 3], [WIDE, [-1, -1, 1]])
    d.tree_step([3], [[0, 2]])
    d.commit([3, 5], [4, 6])
    for seq, kv in d.history.items():
        k, v = d.get(seq, 0, d.length(seq))
        check(k, kv[:, 0], d.dtype, "stored keys")
        assert np.array_equal(v, kv[:, 1])


def test_shared_keys_in_a_tree(d):
    kv_state("begin_forward", d.cache, shape([3]), shape([4]), shape([-1, 0, 0, 2]))
    qkv = d.random(4, 8, 16)
    own = d.fused(0, qkv)
    o = to_tvm(np.zeros((4, 4, 16)))
    attention_kv_cache(
        "attention_with_shared_kv", d.cache, 0, d.scale, *(to_tvm(x) for x in np.split(qkv, [4, 6], axis=1)), o
    )
    check(to_numpy(o), own, "float32", "o")


def test_random_trees():
    rng = random.Random(0)
    d = Trees(max_total_seq_len=2000, prefill_chunk_size=64)
    for seq in range(4):
        d.add(seq)
    for _ in range(60):
        ids = rng.sample(range(4), rng.randint(1, 4))
        for _ in range(rng.randint(1, 2)):
            trees = []
            for seq in ids:
                begun = len(d.parents.get(seq, ()))
                trees.append([rng.randint(-1, begun + n - 1) for n in range(rng.randint(1, 16))])
            d.tree_step(ids, trees)
        d.commit(ids, [rng.randint(-1, len(d.parents[seq]) - 1) for seq in ids])
        if rng.random() < 0.5:
            d.step(ids[:2], [rng.randint(1, 9) for _ in ids[:2]])
    d.check_contents()


@pytest.mark.parametrize("rope_mode", ["none", "normal"])
def test_trees_as_tvm_has_them(rope_mode):
    both = tvm_cache.Both(
        MLCPagedKVCache(
            num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, rope_mode=rope_mode, **tvm_cache.LIMITS
        ),
        tvm_cache.create(rope_mode),
    )
    for seq in (3, 5):
        both.state("add_sequence", seq)
    both.step([3, 5], [18, 16])
    for trees, leaves in [
        ((WIDE, [-1, -1, 1]), (6, 2)),
        ((WIDE, CHAIN), (-1, 3)),
        ((CHAIN, CHAIN), (1, 3)),
        ((WIDE, WIDE), (8, 4)),
    ]:
        both.step([5, 3], [len(t) for t in trees], list(itertools.chain(*trees)))
        both.call("commit_accepted_token_tree_nodes", shape([5, 3]), shape(leaves))
        both.call("get_total_sequence_length")
        both.step([3, 5], [1, 1])
    both.step([5, 3], [3, 2], [-1, -1, 1, -1, 0])
    both.step([5, 3], [2, 3], [0, 2, 0, 1, 1])  # both trees grow


class TestErrors:
    def begin(self, d, ids, lengths, parents):
        kv_state("begin_forward", d.cache, shape(ids), shape(lengths), shape(parents))

    @pytest.mark.parametrize(
        ("ids", "lengths", "parents", "message"),
        [
            ([3], [2], [-1], r"has 1 entries and `append_lengths`, \[2\] for 1 sequences, adds up to 2"),
            ([3, 5], [2, 1], [-1, 1, -1], "has 1 at entry 1, node 1 of the tree of sequence 3; .*from -1 to 0"),
            ([3, 5], [2, 1], [-1, 0, -2], "has -2 at entry 2, node 0 of the tree of sequence 5; .*from -1 to -1"),
        ],
    )
    def test_what_is_no_tree(self, d, ids, lengths, parents, message):
        with pytest.raises(errors.ArgumentError, match=f"`token_tree_parent_ptr` {message}"):
            self.begin(d, ids, lengths, parents)
        d.check_contents()
        d.step([3, 5], [1, 1])

    def test_trees_wait_for_their_commit(self, d):
        d.tree_step([5], [WIDE])
        with pytest.raises(
            errors.CacheStateError, match="sequence 5, which has a token tree of 9 nodes; say first which"
        ):
            d.begin([3, 5], [1, 1])
        with pytest.raises(errors.CacheStateError, match="fork_sequence on sequence 5, which has a token tree"):
            d.fork(5, 6)
        d.step([3], [1])
        d.commit([5], [0])

    def test_commits(self, d):
        commit = attention_kv_cache
        name = "commit_accepted_token_tree_nodes"
        with pytest.raises(errors.CacheStateError, match="sequence 3, which has no token tree"):
            commit(name, d.cache, shape([3]), shape([0]))
        d.tree_step([5, 3], [WIDE, CHAIN])
        with pytest.raises(errors.ArgumentError, match="`leaf_indices` has 1 entries and `seq_ids` 2"):
            commit(name, d.cache, shape([3, 5]), shape([0]))
        for leaf in (-2, 4):
            with pytest.raises(
                errors.ArgumentError, match=f"`leaf_indices` is {leaf} for sequence 3, .*4 nodes; .*from 0 to 3"
            ):
                commit(name, d.cache, shape([5, 3]), shape([6, leaf]))
        with pytest.raises(errors.CacheStateError, match="sequence 5"):
            commit(name, d.cache, shape([5, 5]), shape([1, 1]))
        with pytest.raises(errors.UnknownSequenceError):
            commit(name, d.cache, shape([5, 9]), shape([1, 1]))
        d.check_contents()
        d.commit([3, 5], [0, 6])
        d.check_contents()

    def test_parts_and_windows(self, d):
        self.begin(d, [3], [3], [-1, 0, 0])
        q, k, o, lse = (to_tvm(np.zeros(s)) for s in ((3, 4, 16), (3, 2, 16), (3, 4, 16), (3, 4)))
        with pytest.raises(errors.CacheStateError, match="self_attention in a step of token trees"):
            attention_kv_cache("self_attention", d.cache, 0, 1.0, q, k, k, o, lse)
        with pytest.raises(errors.CacheStateError, match="cross_attention in a step of token trees"):
            attention_kv_cache("cross_attention", d.cache, 0, 1.0, q, o, lse)
        with pytest.raises(errors.ArgumentError, match="`layer_id` is 2"):
            attention_kv_cache("attention_with_fused_qkv", d.cache, 2, 1.0, to_tvm(np.zeros((3, 8, 16))), o)
        windows = Trees(attn_kinds=["mha", "mha_sliding"])
        windows.add(0)
        with pytest.raises(
            errors.ArgumentError, match=r"trees that are no chains on a cache with mha_sliding layers \(layer 1\)"
        ):
            self.begin(windows, [0], [2], [-1, -1])
        windows.tree_step([0], [CHAIN])
        windows.commit([0], [1])
        windows.check_contents()

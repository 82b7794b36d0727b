"""Prefix reuse, swaps and imports under random use: every page is free, kept or owned, and no page is read for tokens it was not filled
with. A key is a hash of its namespace and all tokens up to its own, so that a page of other tokens, or at another place, shows."""

from __future__ import annotations

import collections
import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tvm_infer import errors, variant
from tvm_infer.runtime import PagedKVCache

DIM = 8
IDS = st.integers(0, 5)
SPACES = st.sampled_from([0, 0, 0, 7])
# few unlike tokens and short texts: beginnings meet
TEXTS = st.lists(st.sampled_from([0, 1, -(2**62)]), max_size=14)


def path_keys(space, tokens):
    """float32 [n], exact: each stands for everything up to its token."""
    keys, state = [], space % 1009 + 1
    for token in tokens:
        state = (state * 48271 + token % 10007 + 11) % (1 << 23)
        keys.append(state)
    return np.asarray(keys, np.float32)


class Sequence:
    def __init__(self, space, tokens=()):
        self.space, self.tokens = space, list(tokens)
        self.known, self.is_away, self.gone = len(self.tokens), False, 0


class ReuseMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4]),
        num_pages=st.integers(2, 14),
        window=st.sampled_from([None, None, 0, 3, 6]),
    )
    def create(self, page_size, num_pages, window):
        settings_ = dict(num_layers=1, num_qo_heads=1, num_kv_heads=1, head_dim=DIM, max_batch=4, max_tokens=20)
        self.cache = PagedKVCache(page_size=page_size, num_pages=num_pages, prefix_reuse=True, **settings_)
        other = {1: 2, 2: 4, 3: 1, 4: 3}[page_size]
        self.other = PagedKVCache(page_size=other, num_pages=40, prefix_reuse=True, **settings_)
        self.page_size, self.num_pages, self.window = page_size, num_pages, window
        if window is not None:
            for cache in (self.cache, self.other):
                cache.set_variant(variant.sliding_window.bind(window=window))
        self.memory = self.cache.pages(0)
        self.memory[:] = np.nan
        self.model: dict[int, Sequence] = {}
        self.lookups = self.asked = self.reused = 0

    # What the cache says of itself

    def pages(self):
        """(free, reference counts, tables by id)."""
        state = np.asarray(self.cache._call("debug_state"), np.int64)
        num_free = int(state[4])
        num_listed = num_free - self.cache.prefix_stats.cached_pages
        free, counts, rest = np.split(state[5:], [num_listed, num_listed + self.num_pages])
        tables, at = {}, 0
        while at < len(rest):
            seq, _, count = (int(x) for x in rest[at : at + 3])
            tables[seq] = rest[at + 3 : at + 3 + count]
            at += 3 + count
        return free, counts, tables

    def index(self):
        """page -> (namespace, tokens up to its end, parent)."""
        dump = [int(x) for x in self.cache._call("debug_prefixes")]
        entries, width = {}, 3 + self.page_size
        for at in range(1, len(dump), width):
            page, parent, space = dump[at : at + 3]
            entries[page] = (space, parent, tuple(dump[at + 3 : at + width]))
        assert len(entries) == dump[0]

        def path(page):
            return () if page < 0 else path(entries[page][1]) + entries[page][2]

        return {page: (space, path(page), parent) for page, (space, parent, _) in entries.items()}

    def matched(self, tokens, space):
        known = {(space_, path) for space_, path, _ in self.index().values()}
        count = 0
        while (count + 1) * self.page_size < len(tokens):
            if (space, tuple(tokens[: (count + 1) * self.page_size])) not in known:
                break
            count += 1
        return count * self.page_size

    def fails(self, expected, call):
        """`call` raises `expected`, and changes nothing."""
        before = (np.asarray(self.cache._call("debug_state")).tolist(), self.index(), self.cache.prefix_stats)
        try:
            call()
        except expected:
            after = (np.asarray(self.cache._call("debug_state")).tolist(), self.index(), self.cache.prefix_stats)
            assert before == after
            return True
        raise AssertionError(f"did not raise {expected}")

    # Operations

    @rule(seq=IDS, space=SPACES, tokens=TEXTS)
    def add(self, seq, space, tokens):
        if seq in self.model:
            self.fails(errors.UnknownSequenceError, lambda: self.cache.add_sequence(seq, tokens, namespace=space))
            return
        expected = self.matched(tokens, space)
        assert self.cache.match_prefix(tokens, namespace=space) == expected
        assert self.cache.add_sequence(seq, tokens, namespace=space) == expected
        if tokens:
            self.lookups, self.asked, self.reused = (
                self.lookups + 1,
                self.asked + len(tokens),
                self.reused + expected,
            )
        self.model[seq] = Sequence(space, tokens[:expected])
        self.note_gone(seq)

    @rule(seq=IDS, tokens=TEXTS, told=st.booleans())
    def add_and_fill(self, seq, tokens, told):
        """A prompt, as an engine does it."""
        if seq in self.model or not tokens:
            return
        self.add(seq, 0, tokens)
        rest = tokens[self.cache.seq_len(seq) :]
        self.step([(seq, rest)], told, "end")

    @rule(
        batch=st.dictionaries(IDS, st.lists(st.integers(0, 1), max_size=6), max_size=3),
        told=st.sampled_from([True, True, True, False]),
        ending=st.sampled_from(["end", "end", "end", "cancel", "cancel unwritten"]),
    )
    def step_any(self, batch, told, ending):
        self.step([(seq, new) for seq, new in batch.items() if seq in self.model], told, ending)

    def step(self, batch, told, ending):
        ids, lengths = [seq for seq, _ in batch], [len(new) for _, new in batch]
        tokens = np.asarray([t for _, new in batch for t in new], np.int64)
        begin = lambda: self.cache.begin_step(ids, lengths, token_ids=tokens if told else None)  # noqa: E731
        if any(self.model[seq].is_away for seq in ids):
            self.fails(errors.CacheStateError, begin)
            return
        after = self.cache.pages_after(ids, lengths)
        if after > self.num_pages:
            self.fails(errors.OutOfPagesError, begin)
            return
        before = {seq: self.cache.seq_len(seq) for seq in ids}
        begin()
        assert self.cache.num_used_pages == after
        for seq in ids:
            self.note_gone(seq, before[seq])
        if ending != "cancel unwritten":
            self.write(batch)
        if ending != "end":
            self.cache.cancel_forward()
            return
        self.cache.end_forward()
        for seq, new in batch:
            sequence = self.model[seq]
            if told and sequence.known == len(sequence.tokens):
                sequence.known += len(new)
            sequence.tokens += new
        for seq, new in batch:
            sequence = self.model[seq]
            whole, was = (n // self.page_size for n in (sequence.known, len(sequence.tokens) - len(new)))
            if self.window is None and sequence.known == len(sequence.tokens) and whole > was:
                found = self.cache.match_prefix(
                    [*sequence.tokens[: whole * self.page_size], 5], namespace=sequence.space
                )
                assert found == whole * self.page_size, "a page that a step filled is not found"

    def write(self, batch):
        free, _, _ = self.pages()
        self.memory[free] = np.nan  # nobody may read them, or count on them
        keys = [
            path_keys(self.model[seq].space, self.model[seq].tokens + new)[len(self.model[seq].tokens) :]
            for seq, new in batch
        ]
        k = np.repeat(np.concatenate([np.zeros(0, np.float32), *keys])[:, None, None], DIM, 2)
        for _ in range(2):  # a call may be repeated
            o = self.cache.attention(0, np.zeros_like(k), k, k + 1)
        rows = iter(o[:, 0, 0])
        for seq, new in batch:
            sequence = self.model[seq]
            seen = path_keys(sequence.space, sequence.tokens + new)
            for i in range(len(sequence.tokens), len(seen)):
                first = 0 if self.window is None else max(0, i - self.window)
                expected = seen[first : i + 1].astype(np.float64).mean() + 1
                assert abs(next(rows) - expected) <= 1e-5 * (expected + 1)

    @rule(seq=IDS)
    def remove(self, seq):
        if seq in self.model:
            self.cache.remove_sequence(seq)
            del self.model[seq]

    @rule(seq=IDS, child=IDS, cut=st.integers(0, 6))
    def fork(self, seq, child, cut):
        if seq not in self.model or child in self.model:
            return
        parent = self.model[seq]
        length = max(0, len(parent.tokens) - cut)
        call = lambda: self.cache.fork_sequence(seq, child, length)  # noqa: E731
        if parent.is_away:
            self.fails(errors.CacheStateError, call)
        elif self.hidden(parent, length):
            self.fails(errors.ArgumentError, call)
        else:
            call()
            copy = self.model[child] = Sequence(parent.space, parent.tokens[:length])
            copy.known = min(parent.known, length)
            copy.gone = parent.gone if length > 0 else 0

    @rule(seq=IDS, count=st.integers(0, 9))
    def pop(self, seq, count):
        if seq not in self.model:
            return
        sequence = self.model[seq]
        count = min(count, len(sequence.tokens))
        length = len(sequence.tokens) - count
        call = lambda: self.cache.pop(seq, count)  # noqa: E731
        if sequence.is_away:
            self.fails(errors.CacheStateError, call)
        elif self.hidden(sequence, length):
            self.fails(errors.ArgumentError, call)
        else:
            call()
            sequence.tokens = sequence.tokens[:length]
            sequence.known = min(sequence.known, length)
            if length == 0:
                sequence.gone = 0

    @rule(seq=IDS, extra=st.integers(0, 1))
    def commit(self, seq, extra):
        if seq not in self.model:
            return
        sequence = self.model[seq]
        rest = sequence.tokens[sequence.known :]
        if extra:
            self.fails(errors.ArgumentError, lambda: self.cache.commit_tokens(seq, [*rest, 0]))
        half = rest[: (len(rest) + 1) // 2]
        self.cache.commit_tokens(seq, half)
        sequence.known += len(half)

    @rule(seq=IDS)
    def swap(self, seq):
        if seq not in self.model:
            return
        sequence = self.model[seq]
        if not sequence.is_away:
            self.cache.swap_out(seq)
            sequence.is_away = True
            self.fails(errors.CacheStateError, lambda: self.cache.swap_out(seq))
        elif self.held(sequence) > self.cache.num_free_pages:
            self.fails(errors.OutOfPagesError, lambda: self.cache.swap_in(seq))
        else:
            self.cache.swap_in(seq)
            sequence.is_away = False
            self.fails(errors.CacheStateError, lambda: self.cache.swap_in(seq))

    @rule(seq=IDS, child=IDS, by_way_of_another=st.booleans())
    def export_and_import(self, seq, child, by_way_of_another):
        if seq not in self.model:
            return
        sequence = self.model[seq]
        state = self.cache.export_sequence(seq)
        missing = state.missing
        assert state.length == len(sequence.tokens) and state.tokens.tolist() == sequence.tokens[: sequence.known]
        keys = path_keys(sequence.space, sequence.tokens)
        assert np.array_equal(state.kv[0, 0, :, 0, 0], np.delete(keys, range(*missing)))
        if by_way_of_another and missing == (0, 0):
            self.other.import_sequence(0, state)
            state = self.other.export_sequence(0)
            self.other.clear()
        call = lambda: self.cache.import_sequence(child, state)  # noqa: E731
        if child in self.model:
            self.fails(errors.UnknownSequenceError, call)
        elif self.held(sequence) > self.cache.num_free_pages:
            self.fails(errors.OutOfPagesError, call)
        else:
            call()
            copy = self.model[child] = Sequence(sequence.space, sequence.tokens)
            copy.known, copy.gone = sequence.known, sequence.gone

    @rule()
    def clear(self):
        self.cache.clear()
        self.model.clear()

    @precondition(lambda self: len(self.cache.sequences) < 2)
    @rule()
    def drop_prefixes(self):
        self.cache.drop_prefixes()
        assert self.cache.prefix_stats.cached_pages == self.cache.prefix_stats.indexed_pages == 0

    # What must hold

    def note_gone(self, seq, length=None):
        """Positions that left the window, as the cache has them now."""
        sequence = self.model[seq]
        if self.window is not None:
            length = len(sequence.tokens) if length is None else length
            first = max(0, length - self.window) // self.page_size * self.page_size
            sequence.gone = max(sequence.gone, first)

    def hidden(self, sequence, length):
        return length > 0 and sequence.gone > max(0, length - (self.window or 0))

    def held(self, sequence):
        return (len(sequence.tokens) + self.page_size - 1) // self.page_size - sequence.gone // self.page_size

    @invariant()
    def holds(self):
        if not hasattr(self, "cache"):
            return
        free, counts, tables = self.pages()
        index = self.index()
        assert tables.keys() == self.model.keys()
        # each page is owned as often as tables have it, or kept for its tokens, or free: one of them
        owned = collections.Counter(int(p) for table in tables.values() for p in table if p >= 0)
        assert [owned[p] for p in range(self.num_pages)] == counts.tolist()
        kept = {p for p in index if counts[p] == 0}
        assert sorted([*free.tolist(), *kept, *owned]) == list(range(self.num_pages))
        stats = self.cache.prefix_stats
        assert (stats.cached_pages, stats.indexed_pages) == (len(kept), len(index))
        assert self.cache.num_free_pages == len(free) + len(kept)
        assert (stats.lookups, stats.tokens_asked, stats.tokens_reused) == (self.lookups, self.asked, self.reused)
        # what is found by tokens is what they give
        assert len({(space, path) for space, path, _ in index.values()}) == len(index)
        for page, (space, path, parent) in index.items():
            assert parent < 0 or parent in index
            keys = path_keys(space, path)[-self.page_size :]
            assert np.array_equal(self.memory[page, 0, 0, :, 0], keys), "a page holds other keys than its tokens'"
        for seq, sequence in self.model.items():
            assert self.cache.seq_len(seq) == len(sequence.tokens)
            assert self.cache.num_known_tokens(seq) == sequence.known
            assert self.cache.is_swapped_out(seq) == sequence.is_away
            if sequence.is_away:
                assert set(tables[seq].tolist()) <= {-1}
                continue
            assert np.count_nonzero(tables[seq] >= 0) == self.held(sequence)
            keys, values = self.cache.gather(seq, 0, min(sequence.gone, len(sequence.tokens)))
            expected = path_keys(sequence.space, sequence.tokens)[sequence.gone :]
            assert np.array_equal(keys[:, 0, 0], expected) and np.array_equal(values[:, 0, -1], expected + 1)
        away = sum(self.held(sequence) for sequence in self.model.values() if sequence.is_away)
        assert self.cache.swapped_bytes == away * self.cache.bytes_per_page


@pytest.mark.parametrize("seed", range(8))
def test_6000_operations(seed):
    """The same, steered by chance towards what engines do, in few pages: texts branch off others, pages are given up."""
    rng = random.Random(seed)
    machine = ReuseMachine()
    machine.create(rng.choice([1, 2, 2, 3]), rng.randint(8, 16), rng.choice([None, None, None, 5]))
    texts = [[0, 1, 0, 1, 1]]
    for _ in range(6000):
        seq = rng.randrange(6)
        live = list(machine.model)
        known = rng.choice(live) if live else seq
        name = rng.choices(
            ["add_and_fill", "step", "remove", "fork", "pop", "commit", "swap", "import", "clear", "drop"],
            [20, 40, 12, 6, 6, 6, 4, 3, 0.2, 0.2],
        )[0]
        if name == "add_and_fill":
            base = rng.choice(texts)
            text = [*base[: rng.randint(0, len(base))], *(rng.randrange(2) for _ in range(rng.randint(1, 6)))][:14]
            if seq in machine.model:
                machine.remove(seq)
            if rng.random() < 0.3:
                machine.add(seq, rng.choice([0, 7]), text)
            else:
                machine.add_and_fill(seq, text, rng.random() < 0.85)
            texts = [*texts[-20:], text]
        elif name == "step":
            batch = {
                s: [rng.randrange(2) for _ in range(rng.choice([0, 1, 1, 1, 2, 4]))] for s in live if rng.random() < 0.6
            }
            batch = {s: new for s, new in batch.items() if not machine.model[s].is_away or rng.random() < 0.1}
            told = rng.random() < 0.85
            machine.step_any(
                dict(list(batch.items())[:4]), told, rng.choice(["end"] * 6 + ["cancel", "cancel unwritten"])
            )
        elif name == "remove":
            machine.remove(known)
        elif name == "fork":
            machine.fork(known, seq, rng.choice([0, 0, 1, 3]))
        elif name == "pop":
            machine.pop(known, rng.choice([0, 1, 1, 2, 5]))
        elif name == "commit":
            machine.commit(known, rng.randrange(2))
        elif name == "swap":
            machine.swap(rng.choice([s for s in live if machine.model[s].is_away] or [known]))
        elif name == "import":
            machine.export_and_import(known, seq, rng.random() < 0.5)
        elif name == "clear":
            machine.clear()
        elif len(live) < 2:
            machine.drop_prefixes()
        machine.holds()
    stats = machine.cache.prefix_stats
    assert stats.hits > 100 and stats.evictions > 100, stats


TestReuseMachine = ReuseMachine.TestCase
TestReuseMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)

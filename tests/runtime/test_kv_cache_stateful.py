"""The cache against a model in Python: hypothesis looks for short counterexamples, a seeded driver does 100,000 operations.

The model knows what a sequence holds (its tokens), which abstract pages it owns, and who shares them. Keys and values are real: a
token is a number that the step writes, so a page that is lost, shared wrongly or written in place while shared shows in what
`gather` reads. Free pages are NaN before each layer runs, so that a page that a window gave back too early shows in its result.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tvm_infer import errors, variant
from tvm_infer.runtime import PagedKVCache

HEAD_DIM = 8


class Pages:
    """Who owns which pages; pages are numbers that are never used again."""

    def __init__(self) -> None:
        self.tables: dict[int, list[int]] = {}  # 0: given back
        self.owners: dict[int, set[int]] = {}
        self.next = 0

    def copy(self) -> Pages:
        other = Pages()
        other.tables = {seq: list(table) for seq, table in self.tables.items()}
        other.owners = {page: set(owners) for page, owners in self.owners.items()}
        other.next = self.next
        return other

    def take(self, seq: int) -> int:
        self.next += 1
        self.owners[self.next] = {seq}
        return self.next

    def drop(self, seq: int, page: int) -> None:
        if page == 0:
            return
        self.owners[page].discard(seq)
        if not self.owners[page]:
            del self.owners[page]


class Model:
    """What the cache should be, and which error each operation should give."""

    def __init__(self, page_size: int, num_pages: int, max_batch: int, max_tokens: int) -> None:
        self.page_size, self.num_pages, self.max_batch, self.max_tokens = page_size, num_pages, max_batch, max_tokens
        self.tokens: dict[int, list[int]] = {}
        self.pages = Pages()
        self.before_step: tuple[dict, Pages] | None = None  # what a cancel returns to
        self.window: int | None = None
        self.fresh = 0

    def count(self, length: int) -> int:
        return -(-length // self.page_size)

    # Each returns the error class that the cache must raise, or None after applying the operation.

    def add(self, seq):
        if self.before_step:
            return errors.CacheStateError
        if seq in self.tokens:
            return errors.UnknownSequenceError
        self.tokens[seq], self.pages.tables[seq] = [], []

    def remove(self, seq):
        if self.before_step:
            return errors.CacheStateError
        if seq not in self.tokens:
            return errors.UnknownSequenceError
        self.shrink(seq, 0)
        del self.tokens[seq], self.pages.tables[seq]

    def fork(self, parent, child, position):
        if self.before_step:
            return errors.CacheStateError
        if parent not in self.tokens or child in self.tokens:
            return errors.UnknownSequenceError
        if position < -1 or position > len(self.tokens[parent]):
            return errors.ArgumentError
        length = len(self.tokens[parent]) if position == -1 else position
        if self.lacks(parent, length):
            return errors.ArgumentError
        self.tokens[child] = self.tokens[parent][:length]
        self.pages.tables[child] = self.pages.tables[parent][: self.count(length)]
        for page in filter(None, self.pages.tables[child]):
            self.pages.owners[page].add(child)

    def pop(self, seq, n):
        if self.before_step:
            return errors.CacheStateError
        if seq not in self.tokens:
            return errors.UnknownSequenceError
        if not 0 <= n <= len(self.tokens[seq]) or self.lacks(seq, len(self.tokens[seq]) - n):
            return errors.ArgumentError
        self.shrink(seq, len(self.tokens[seq]) - n)

    def truncate(self, seq, length):
        if self.before_step:
            return errors.CacheStateError
        if seq not in self.tokens:
            return errors.UnknownSequenceError
        if not 0 <= length <= len(self.tokens[seq]) or self.lacks(seq, length):
            return errors.ArgumentError
        self.shrink(seq, length)

    def clear(self):
        if self.before_step:
            return errors.CacheStateError
        self.tokens, self.pages = {}, Pages()

    def set_window(self, window):
        if self.before_step:
            return errors.CacheStateError
        if any(self.gone(seq) > self.first_seen(len(self.tokens[seq]), window) for seq in self.tokens):
            return errors.ArgumentError
        self.window = window

    def first_seen(self, position, window):
        """The first position that a token at `position` sees."""
        return 0 if window is None else max(0, position - window)

    def gone(self, seq):
        """Positions at its beginning that a sequence has given back."""
        return self.pages.tables[seq].count(0) * self.page_size

    def lacks(self, seq, length):
        """Whether a sequence cut to `length` would lack keys that its next token sees."""
        return length > 0 and self.gone(seq) > self.first_seen(length, self.window)

    def give_back(self, ids):
        """What the next tokens of these sequences do not see; returns pages in the order in which they go."""
        dropped = []
        for seq in ids:
            table = self.pages.tables[seq]
            for i in range(self.first_seen(len(self.tokens[seq]), self.window) // self.page_size):
                if table[i]:
                    dropped.append((seq, i))
                self.pages.drop(seq, table[i])
                table[i] = 0
        return dropped

    def begin(self, ids, lengths):
        if self.before_step:
            return errors.CacheStateError
        if len(ids) > self.max_batch or sum(n for n in lengths if n > 0) > self.max_tokens:
            return errors.ArgumentError
        error = self.check(ids, lengths)
        if error:
            return error
        if self.pages_after(ids, lengths) > self.num_pages:
            return errors.OutOfPagesError
        self.dropped = self.give_back(ids)
        self.before_step = (dict(self.tokens), self.pages.copy())  # token lists are replaced, never changed
        copying = self.copying(ids, lengths)
        for seq, n in zip(ids, lengths, strict=True):
            table = self.pages.tables[seq]
            if seq in copying:
                self.pages.drop(seq, table[-1])
                table[-1] = self.pages.take(seq)
            self.tokens[seq] = self.tokens[seq] + list(range(self.fresh, self.fresh + n))
            self.fresh += n
            while len(table) < self.count(len(self.tokens[seq])):
                table.append(self.pages.take(seq))

    def end(self):
        if not self.before_step:
            return errors.CacheStateError
        self.before_step = None

    def cancel(self):
        if not self.before_step:
            return errors.CacheStateError
        self.tokens, self.pages = self.before_step
        self.before_step = None

    def check(self, ids, lengths):
        for i, (seq, n) in enumerate(zip(ids, lengths, strict=True)):
            if seq not in self.tokens:
                return errors.UnknownSequenceError
            if seq in ids[:i] or n < 0:
                return errors.ArgumentError

    def copying(self, ids, lengths):
        """Sequences that copy their last page: those that share it, less one where every owner writes."""
        writers: dict[int, list[int]] = {}
        for seq, n in zip(ids, lengths, strict=True):
            table = self.pages.tables[seq]
            if n and len(self.tokens[seq]) % self.page_size and len(self.pages.owners[table[-1]]) > 1:
                writers.setdefault(table[-1], []).append(seq)
        result = set()
        for page, group in writers.items():
            result |= set(group)
            if len(group) == len(self.pages.owners[page]):
                result.discard(max(group, key=lambda seq: len(self.tokens[seq])))
        return result

    def pages_after(self, ids, lengths):
        kept, self.pages = self.pages, self.pages.copy()
        try:
            self.give_back(ids)
            return self.pages_needed(ids, lengths)
        finally:
            self.pages = kept

    def pages_needed(self, ids, lengths):
        grown = sum(
            self.count(len(self.tokens[seq]) + n) - len(self.pages.tables[seq])
            for seq, n in zip(ids, lengths, strict=True)
        )
        return len(self.pages.owners) + grown + len(self.copying(ids, lengths))

    def shrink(self, seq, length):
        table = self.pages.tables[seq]
        while len(table) > self.count(length):
            self.pages.drop(seq, table.pop())
        self.tokens[seq] = self.tokens[seq][:length]


class Pair:
    """A cache and its model, driven together."""

    def __init__(self, page_size: int, num_pages: int, max_batch: int, max_tokens: int) -> None:
        self.model = Model(page_size, num_pages, max_batch, max_tokens)
        self.cache = PagedKVCache(
            num_layers=1,
            num_qo_heads=1,
            num_kv_heads=1,
            head_dim=HEAD_DIM,
            page_size=page_size,
            num_pages=num_pages,
            max_batch=max_batch,
            max_tokens=max_tokens,
            num_ctas=2,
            num_threads=1,
        )
        self.memory = self.cache.pages(0)
        self.memory[...] = np.nan
        self.operations = {
            "add": self.cache.add_sequence,
            "remove": self.cache.remove_sequence,
            "fork": self.cache.fork_sequence,
            "pop": self.cache.pop,
            "truncate": self.cache.truncate,
            "clear": self.cache.clear,
            "set_window": self.set_window,
            "begin": self.cache.begin_forward,
            "end": self.cache.end_forward,
            "cancel": self.cache.cancel_forward,
        }
        self.step: tuple = ()
        self.failed: dict[str, int] = {}

    def state(self) -> np.ndarray:
        return np.asarray(self.cache._call("debug_state"))

    def set_window(self, window: int | None) -> None:
        self.cache.set_variant(None if window is None else variant.sliding_window.bind(window=window))
        assert self.cache.window_left == window

    def tables(self, state: np.ndarray) -> dict[int, np.ndarray]:
        """Views of the page lists in a state."""
        at, tables = 5 + state[4] + state[1], {}
        while at < len(state):
            tables[int(state[at])] = state[at + 3 : at + 3 + state[at + 2]]
            at += 3 + state[at + 2]
        return tables

    def without(self, state: np.ndarray, dropped: list[tuple[int, int]]) -> np.ndarray:
        """The state after these entries of page lists were given back, the first of them first."""
        state = state.copy()
        tables, counts, freed = self.tables(state), state[5 + state[4] :], []
        for seq, entry in dropped:
            page = tables[seq][entry]
            tables[seq][entry] = -1
            counts[page] -= 1
            if counts[page] == 0:
                freed.append(page)
        num_free = state[4]
        state[4] += len(freed)
        return np.concatenate([state[: 5 + num_free], np.asarray(freed, state.dtype), state[5 + num_free :]])

    def do(self, name: str, *args) -> bool:
        """One operation on both. A failure must be the model's, and must change nothing (that includes a cancelled step)."""
        before = self.state()
        expected = getattr(self.model, name)(*args)
        if expected is None:
            self.operations[name](*args)
        else:
            with pytest.raises(expected):
                self.operations[name](*args)
            self.failed[expected.__name__] = self.failed.get(expected.__name__, 0) + 1
            assert np.array_equal(self.state(), before)
            return False
        if name == "begin":
            self.step, self.before_step = args, self.without(before, self.model.dropped)
        if name == "cancel":
            assert np.array_equal(self.state(), self.before_step), (
                "cancel restores everything, the order of free pages too"
            )
        return True

    def write(self) -> None:
        """Run the step's one layer: each new token's key is its number, its value the number and a half."""
        ids, lengths = self.step
        tokens = np.concatenate(
            [[], *(self.model.tokens[s][len(self.model.tokens[s]) - n :] for s, n in zip(ids, lengths, strict=True))]
        )
        k = np.repeat(tokens.astype(np.float32)[:, None, None], HEAD_DIM, axis=2)
        q = np.zeros_like(k)
        state = self.state()
        self.memory[state[5 : 5 + state[4]]] = np.nan
        o = self.cache.attention(0, q, k, k + 0.5)  # the mean of the values that are seen
        rows = iter(o[:, 0, 0])
        for s, n in zip(ids, lengths, strict=True):
            held = np.asarray(self.model.tokens[s], np.float64)
            for position in range(len(held) - n, len(held)):
                seen = held[self.model.first_seen(position, self.model.window) : position + 1]
                assert abs(next(rows) - (seen.mean() + 0.5)) <= 1e-5 * (seen.max() + 1)
        expected = [
            position
            for s, n in zip(ids, lengths, strict=True)
            for position in range(len(self.model.tokens[s]) - n, len(self.model.tokens[s]))
        ]
        assert self.cache.query_positions.tolist() == expected

    def check(self) -> None:
        """Every invariant, from the cache's whole state."""
        state = self.state()
        model = self.model
        page_size, num_pages, in_forward, num_sequences, num_free = state[:5]
        assert (page_size, num_pages, bool(in_forward)) == (model.page_size, model.num_pages, bool(model.before_step))
        free, counts, _ = np.split(state[5:], [num_free, num_free + num_pages])
        tables = self.tables(state)
        assert num_sequences == len(tables)
        assert tables.keys() == model.tokens.keys()
        assert all(self.cache.seq_len(seq) == len(model.tokens[seq]) for seq in tables)
        # reference counts are the number of lists that contain a page; what no list contains is free, once
        entries = np.concatenate([np.zeros(0, np.int64), *tables.values()])
        owned = np.bincount(entries[entries >= 0], minlength=num_pages)
        assert np.array_equal(owned, counts)
        assert np.array_equal(np.sort(free), np.flatnonzero(counts == 0))
        # pages are shared exactly where the model shares them
        real_of: dict[int, int] = {0: -1}
        for seq, table in tables.items():
            assert len(table) == len(model.pages.tables[seq])
            for real, abstract in zip(table.tolist(), model.pages.tables[seq], strict=True):
                assert real_of.setdefault(abstract, real) == real
        assert len(set(real_of.values())) == len(real_of) == num_pages - num_free + 1

    def check_contents(self, seq: int) -> None:
        """The keys of a sequence are its tokens (outside of a step)."""
        start = self.model.gone(seq)
        if start:
            with pytest.raises(errors.ArgumentError, match=f"take {start} or more"):
                self.cache.gather(seq, 0, start - 1)
        keys, values = self.cache.gather(seq, 0, start)
        tokens = np.asarray(self.model.tokens[seq][start:], np.float32)
        assert np.array_equal(keys[:, 0, 0], tokens)
        assert np.array_equal(values[:, 0, -1], tokens + 0.5)


def test_100_000_operations():
    """Random valid and invalid operations, seeded; small enough a cache that pages run out and forks pile up, windows come and go."""
    rng = random.Random(20250101)
    pair = Pair(page_size=4, num_pages=48, max_batch=6, max_tokens=40)
    model, num_operations, done, num_given_back = pair.model, 100_000, {}, 0
    for i in range(num_operations):
        if i % 10_000 == 0:  # every other time with windows, under which pages rarely run out
            if model.before_step:
                pair.do("cancel")
            pair.do("clear"), pair.do("set_window", None)
        known = list(model.tokens)
        seq = rng.choice(known) if known and rng.random() < 0.97 else rng.randrange(12)
        if model.before_step and rng.random() < 0.93:
            name, args = rng.choice(["end", "end", "end", "cancel"]), ()
            if name == "end" or rng.random() < 0.5:  # a step may be cancelled before its layers ran
                pair.write()
        else:
            name = rng.choices(
                ["add", "remove", "fork", "pop", "truncate", "begin", "end", "cancel", "clear", "set_window"],
                [10, 3, 14, 4, 3, 62, 1, 1, 0.05, i // 10_000 % 2],
            )[0]
            length = len(model.tokens.get(seq, ()))
            if name == "begin":
                ids = rng.sample(known, rng.randint(0, min(len(known), 6))) if known else []
                if rng.random() < 0.02:
                    ids.append(seq)
                args = (ids, [rng.choice([0, 1, 1, 1, 2, 5, rng.randint(0, 12)]) for _ in ids])
                if ids and rng.random() < 0.01:
                    args[1][0] = rng.choice([-1, 1000])
            elif name == "fork":
                args = (
                    seq,
                    rng.randrange(12),
                    rng.choice([-1, -1, rng.randint(-2, length + 1), max(0, length - rng.randint(0, 9))]),
                )
            elif name == "add":
                args = (rng.randrange(12),)
            elif name == "remove":
                args = (seq,)
            elif name == "set_window":
                args = (rng.choice([None, 0, 1, 3, 4, 9, 17, 30, 30]),)
            elif name in ("pop", "truncate"):
                n = rng.choice([rng.randint(0, length), rng.randint(-1, length + 1), rng.randint(0, min(length, 9))])
                args = (seq, n if name == "pop" else length - n)
            else:
                args = ()
                if name == "end" and model.before_step:
                    pair.write()
        if name == "begin" and not model.check(*args) and not model.before_step:
            predicted = model.pages_after(*args)
            assert pair.cache.pages_after(*args) == predicted
        if pair.do(name, *args):
            done[name] = done.get(name, 0) + 1
            if name == "begin":
                assert pair.cache.num_used_pages == predicted
                num_given_back += len(model.dropped)
        if name == "cancel" or i % 4 == 0:
            pair.check()
        if not model.before_step and model.tokens and i % 3 == 0:
            pair.check_contents(rng.choice(list(model.tokens)))
            if i % 100 == 0:
                for s in model.tokens:
                    pair.check_contents(s)
    # the driver reached every operation and every error, often
    assert min(done[name] for name in ("add", "remove", "fork", "pop", "truncate", "begin", "end", "cancel")) > 1000
    assert done["set_window"] > 50 and num_given_back > 1000
    assert (
        min(pair.failed[e] for e in ("OutOfPagesError", "UnknownSequenceError", "ArgumentError", "CacheStateError"))
        > 500
    )


IDS = st.integers(0, 5)


class CacheMachine(RuleBasedStateMachine):
    """The same, steered by hypothesis, which shrinks what it finds."""

    @initialize(page_size=st.sampled_from([1, 2, 3, 4, 16]), num_pages=st.integers(1, 12), max_batch=st.integers(1, 5))
    def create(self, page_size, num_pages, max_batch):
        self.pair = Pair(page_size, num_pages, max_batch, max_tokens=24)
        self.written = True

    @rule(seq=IDS)
    def add(self, seq):
        self.pair.do("add", seq)

    @rule(seq=IDS)
    def remove(self, seq):
        self.pair.do("remove", seq)

    @rule(parent=IDS, child=IDS, position=st.integers(-2, 30))
    def fork(self, parent, child, position):
        self.pair.do("fork", parent, child, position)

    @rule(parent=IDS, child=IDS)
    def fork_all(self, parent, child):
        self.pair.do("fork", parent, child, -1)

    @rule(seq=IDS, n=st.integers(-1, 20))
    def pop(self, seq, n):
        self.pair.do("pop", seq, n)

    @rule(seq=IDS, length=st.integers(-1, 20))
    def truncate(self, seq, length):
        self.pair.do("truncate", seq, length)

    @rule(batch=st.dictionaries(IDS, st.integers(0, 9), max_size=5))
    def begin(self, batch):
        self.written = not self.pair.do("begin", list(batch), list(batch.values())) and self.written

    @rule(batch=st.lists(st.tuples(IDS, st.integers(-1, 30)), max_size=6))
    def begin_anything(self, batch):
        ids, lengths = [s for s, _ in batch], [n for _, n in batch]
        self.written = not self.pair.do("begin", ids, lengths) and self.written

    @precondition(lambda self: self.pair.model.before_step)
    @rule()
    def write(self):
        self.pair.write()
        self.pair.write()  # a call may be repeated
        self.written = True

    @rule()
    def end(self):
        if self.pair.model.before_step and not self.written:
            self.pair.write()
        self.pair.do("end")

    @rule()
    def cancel(self):
        self.pair.do("cancel")

    @rule(window=st.none() | st.integers(0, 12))
    def set_window(self, window):
        self.pair.do("set_window", window)

    @rule()
    def clear(self):
        self.pair.do("clear")

    @invariant()
    def holds(self):
        if hasattr(self, "pair"):
            self.pair.check()
            if not self.pair.model.before_step:
                for seq in self.pair.model.tokens:
                    self.pair.check_contents(seq)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)

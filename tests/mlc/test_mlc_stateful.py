"""Any sequence of calls to TVM's builtins leaves our cache and the float64 model alike."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlc_model import Driver, attention_kv_cache
from test_mlc_trees import Trees
from test_mlc_windows import SequenceWindows

from tvm_infer import errors

_CHUNK = 12  # prefill_chunk_size


class Builtins(RuleBasedStateMachine):
    @initialize(page_size=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
    def create(self, page_size, seed):
        self.d = Driver(
            page_size=page_size, max_total_seq_len=60, prefill_chunk_size=_CHUNK, max_batch_size=4, seed=seed
        )
        self.next_id = 0

    def new_id(self):
        self.next_id += 7
        return self.next_id % 31 * (-1) ** self.next_id  # any int64 is an id

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.d.history)))

    @precondition(lambda self: len(self.d.history) < 8)
    @rule()
    def add(self):
        self.d.add(self.new_id())

    @precondition(lambda self: 0 < len(self.d.history) < 8)
    @rule(data=st.data())
    def fork(self, data):
        parent = self.pick(data)
        self.d.fork(parent, self.new_id(), data.draw(st.integers(-1, self.d.length(parent))))

    @precondition(lambda self: self.d.history)
    @rule(data=st.data())
    def popn(self, data):
        seq = self.pick(data)
        self.d.popn(seq, data.draw(st.integers(0, self.d.length(seq))))

    @precondition(lambda self: self.d.history)
    @rule(data=st.data())
    def remove(self, data):
        self.d.remove(self.pick(data))

    @precondition(lambda self: self.d.history)
    @rule(data=st.data(), padding=st.sampled_from([0, 0, 3]))
    def step(self, data, padding):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.d.history)), min_size=1, max_size=4, unique=True))
        longest = data.draw(st.sampled_from([1, 1, _CHUNK // len(ids)]))
        lengths = [data.draw(st.integers(1, longest)) for _ in ids]
        inner = self.d.cache.inner
        if inner.pages_after(ids, lengths) > inner.num_pages:
            with pytest.raises(errors.OutOfPagesError):
                self.d.begin(ids, lengths)
        else:
            self.d.step(ids, lengths, padding)

    @rule()
    def clear_sometimes(self):
        if self.next_id % 5 == 4:
            self.d.clear()

    @invariant()
    def alike(self):
        if hasattr(self, "d"):
            self.d.check_contents()

    def teardown(self):
        if hasattr(self, "d"):
            for seq in sorted(self.d.history):
                self.d.remove(seq)
            assert attention_kv_cache("get_num_available_pages", self.d.cache) == self.d.cache.inner.num_pages


Builtins.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestBuiltins = Builtins.TestCase


class Windows(RuleBasedStateMachine):
    """Sequences with windows and without, in a cache that never runs out."""

    @initialize(page_size=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
    def create(self, page_size, seed):
        self.page_size = page_size
        self.d = SequenceWindows(
            page_size=page_size, max_total_seq_len=3000, prefill_chunk_size=_CHUNK, max_batch_size=4, seed=seed
        )

    @rule(seq=st.integers(0, 5))
    def add_or_remove(self, seq):
        if seq in self.d.history:
            self.d.remove(seq)
        else:
            self.d.add(seq)

    @precondition(lambda self: self.d.history.keys() - self.d.windows.keys())
    @rule(data=st.data(), size=st.integers(1, 20))
    def enable(self, data, size):
        seq = data.draw(st.sampled_from(sorted(self.d.history.keys() - self.d.windows.keys())))
        self.d.enable(seq, size, data.draw(st.integers(0, size - 1)))

    @precondition(lambda self: self.d.history)
    @rule(data=st.data())
    def popn(self, data):
        seq = data.draw(st.sampled_from(sorted(self.d.history)))
        sink = self.d.windows[seq][1] if seq in self.d.slid else 0
        most = self.d.length(seq) - sink
        if seq in self.d.slid:
            with pytest.raises(errors.ArgumentError, match=f"from 0 to {most}"):
                self.d.popn(seq, most + 1)
        self.d.popn(seq, data.draw(st.integers(0, most)))

    @precondition(lambda self: self.d.history and len(self.d.history) < 6)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.d.history)))
        child = min(set(range(6)) - self.d.history.keys())
        most = self.d.length(parent)
        if parent in self.d.windows:
            most = min(most, self.d.windows[parent][1])
        self.d.fork(parent, child, data.draw(st.integers(0, most)))

    @precondition(lambda self: self.d.history)
    @rule(data=st.data())
    def step(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.d.history)), min_size=1, max_size=4, unique=True))
        longest = data.draw(st.sampled_from([1, 1, _CHUNK // len(ids)]))
        self.d.step(ids, [data.draw(st.integers(1, longest)) for _ in ids])

    @invariant()
    def alike(self):
        if not hasattr(self, "d"):
            return
        assert self.d.held() == sum(map(self.d.length, self.d.history))
        # what a sequence keeps, cut outwards to pages at its end, its window's beginning and its sinks' end; forks share some
        most = sum(self.d.length(seq) // self.page_size + 3 for seq in self.d.history)
        assert self.d.cache.inner.num_used_pages <= most


class TreesGrow(RuleBasedStateMachine):
    """Trees that grow, are cut, committed, and the texts behind them."""

    @initialize(page_size=st.sampled_from([1, 3, 4]), seed=st.integers(0, 99))
    def create(self, page_size, seed):
        self.d = Trees(page_size=page_size, max_total_seq_len=3000, prefill_chunk_size=24, max_batch_size=3, seed=seed)
        for seq in range(3):
            self.d.add(seq)

    @rule(data=st.data())
    def tree(self, data):
        ids = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
        trees = []
        for seq in ids:
            begun = len(self.d.parents.get(seq, ()))
            trees.append([data.draw(st.integers(-1, begun + n - 1)) for n in range(data.draw(st.integers(1, 8)))])
        self.d.tree_step(ids, trees)

    @rule(data=st.data())
    def commit(self, data):
        ids = sorted(self.d.parents)
        self.d.commit(ids, [data.draw(st.integers(-1, len(self.d.parents[seq]) - 1)) for seq in ids])

    @rule(data=st.data())
    def popn(self, data):
        seq = data.draw(st.integers(0, 2))
        n = data.draw(st.integers(0, self.d.length(seq)))
        self.d.popn(seq, n)
        if n and seq in self.d.parents:
            kept = self.d.parents.pop(seq)[:-n]
            if kept:
                self.d.parents[seq] = kept

    @precondition(lambda self: len(self.d.parents) < 3)
    @rule(data=st.data())
    def step(self, data):
        ids = [seq for seq in range(3) if seq not in self.d.parents]
        self.d.step(ids, [data.draw(st.integers(1, 5)) for _ in ids])

    @invariant()
    def alike(self):
        if hasattr(self, "d"):
            self.d.check_contents()


for machine in (Windows, TreesGrow):
    machine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestWindows, TestTreesGrow = Windows.TestCase, TreesGrow.TestCase

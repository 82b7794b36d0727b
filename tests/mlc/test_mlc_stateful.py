"""Any sequence of calls to TVM's builtins leaves our cache and the float64 model alike."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlc_model import Driver, attention_kv_cache

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

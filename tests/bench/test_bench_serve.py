"""`bench serve` without a model: distributions, the loop on a scripted backend with a clock of its own, figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tvm_infer.bench import serve_breakdown, serve_decode, serve_tasks
from tvm_infer.bench.serve_loop import CacheSizes, Loop
from tvm_infer.bench.serve_metrics import quantiles, summarize
from tvm_infer.bench.serve_workloads import (
    WORKLOADS,
    Arrivals,
    LogNormal,
    Request,
    Uniform,
    Zipf,
    parse_lengths,
    workload,
)
from tvm_infer.errors import ArgumentError, ExecutorError


class ScriptedClock:
    """Moves when the backend works, or when the loop waits."""

    def __init__(self):
        self.time, self.waits = 0.0, []

    def now(self):
        return self.time

    def wait_until(self, moment):
        self.waits.append(moment)
        self.time = max(self.time, moment)


class ScriptedBackend:
    """A token is a hash of the sequence's tokens so far; a step takes `base` seconds and `per_token` for each token.
    Keeps count of pages, and refuses what a real cache would."""

    def __init__(self, sizes, clock=None, base=1.0, per_token=0.0, runs_ahead=False):
        self.sizes, self.clock, self.base, self.per_token = sizes, clock, base, per_token
        self.runs_ahead, self.expected, self.went_on = runs_ahead, None, 0
        self.texts, self.batches, self.forks = {}, [], 0

    def add(self, seq):
        assert seq not in self.texts
        self.texts[seq] = []

    def fork(self, parent, child):
        assert child not in self.texts
        self.texts[child] = list(self.texts[parent])
        self.forks += 1

    def remove(self, seq):
        assert self.expected is None
        del self.texts[seq]

    @staticmethod
    def next_token(text):
        value = 7
        for token in text:
            value = (value * 31 + token + 1) % 1000003
        return value % 251

    def step(self, batch, *, goes_on=False):
        found = self._step(batch)
        self.expected = [(seq, [token]) for (seq, _), token in zip(batch, found, strict=True)] if goes_on else None
        self.went_on += goes_on
        return found

    def _step(self, batch):
        # what was said to go on does, and nothing is removed, forked or begun in between
        assert self.expected is None or [(seq, list(tokens)) for seq, tokens in batch] == self.expected
        assert batch and len({seq for seq, _ in batch}) == len(batch) <= self.sizes.max_batch
        assert all(len(tokens) >= 1 for _, tokens in batch)
        total = sum(len(tokens) for _, tokens in batch)
        assert total <= self.sizes.max_tokens
        for seq, tokens in batch:
            self.texts[seq] += list(tokens)
        assert self.distinct_pages() <= self.sizes.num_pages
        self.batches.append([(seq, len(tokens)) for seq, tokens in batch])
        if self.clock is not None:
            self.clock.time += self.base + self.per_token * total
        return [self.next_token(self.texts[seq]) for seq, _ in batch]

    def distinct_pages(self):
        """Full pages with equal contents from the start are shared; the rest are each one's own."""
        size, pages = self.sizes.page_size, set()
        for seq, text in self.texts.items():
            for begin in range(0, len(text), size):
                full = begin + size <= len(text)
                pages.add((tuple(text[: begin + size]), None if full else seq))
        return len(pages)

    def describe(self):
        return "scripted"

    def breakdown(self, step, plain):
        step()
        return serve_breakdown.Breakdown(0.1, 0.2, 0.3, 0.4, "scripted")


def alone(request):
    text, tokens = list(request.prompt), []
    for _ in range(request.max_new_tokens):
        tokens.append(ScriptedBackend.next_token(text))
        text.append(tokens[-1])
    return tokens


# Distributions


def draw(distribution, count=200_000, seed=3):
    return distribution.sample(np.random.default_rng(seed), count)


def test_uniform_covers_both_ends():
    lengths = draw(Uniform(512, 2048))
    assert lengths.min() == 512 and lengths.max() == 2048
    assert abs(lengths.mean() - 1280) < 3
    assert abs(lengths.std() - math.sqrt((1537**2 - 1) / 12)) < 3
    assert set(draw(Uniform(7, 7), 100)) == {7}


def test_log_normal_has_its_mean_and_is_clipped():
    lengths = draw(LogNormal(161, 1.2, 1, 10**9))
    assert abs(lengths.mean() / 161 - 1) < 0.03
    assert abs(np.log(np.maximum(lengths, 1)).std() - 1.2) < 0.05
    clipped = draw(LogNormal(161, 1.2, 4, 1024))
    assert clipped.min() == 4 and clipped.max() == 1024


def test_zipf_follows_its_exponent():
    zipf = Zipf(1.0, 16, 4096)
    lengths = draw(zipf)
    assert lengths.min() == 16 and lengths.max() <= 4096
    expected = float((np.arange(16, 4097) * zipf.probabilities()).sum())
    assert abs(lengths.mean() / expected - 1) < 0.02
    # twice the length, half as likely: counts of 100..199 and 200..399 are as sum(1/k) says, equal within a percent
    near, far = ((lengths >= 100) & (lengths < 200)).sum(), ((lengths >= 200) & (lengths < 400)).sum()
    assert abs(near / far - 1) < 0.03
    steep = draw(Zipf(2.0, 16, 4096))
    assert steep.mean() < lengths.mean() / 5


@pytest.mark.parametrize("cv", [1.0, 2.0, 0.5])
def test_arrivals_have_their_rate_and_burstiness(cv):
    times = Arrivals(cv).sample(np.random.default_rng(0), 200_000, 4.0)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    assert abs(gaps.mean() * 4 - 1) < 0.02
    assert abs(gaps.std() / gaps.mean() - cv) < 0.05 * cv


def test_an_infinite_rate_is_all_at_once():
    assert not Arrivals(2.0).sample(np.random.default_rng(0), 5, math.inf).any()


@pytest.mark.parametrize("name", list(WORKLOADS))
def test_workloads_are_deterministic_and_say_what_they_are(name):
    chosen = workload(name, None, None, None)
    first, again, other = (chosen.requests(20, 2.0, 100, seed) for seed in (5, 5, 6))
    assert first == again
    assert again != other
    assert all(0 <= token < 100 for r in first for token in r.prompt)
    assert [r.arrival for r in first] == sorted(r.arrival for r in first)
    assert "synthetic" in str(chosen) and str(chosen.prompt) in str(chosen)
    # arrivals do not depend on lengths, nor lengths on the rate: one knob changes one thing
    faster = chosen.requests(20, 4.0, 100, 5)
    assert [len(r.prompt) for r in faster] == [len(r.prompt) for r in first]
    np.testing.assert_allclose([2 * r.arrival for r in faster], [r.arrival for r in first])


def test_workload_lengths_can_be_replaced():
    chosen = workload("sharegpt", "8..16", "5", 3)
    requests = chosen.requests(50, 1.0, 10, 0)
    assert {r.max_new_tokens for r in requests} == {5} and {r.samples for r in requests} == {3}
    assert min(len(r.prompt) for r in requests) >= 8 and max(len(r.prompt) for r in requests) <= 16


@pytest.mark.parametrize("text", ["", "0", "-3", "9..3", "a", "3...5", "3..", "1e3"])
def test_bad_lengths(text):
    with pytest.raises(ArgumentError, match=r"`--prompt-lens` is .*such as 128 or 512..2048"):
        parse_lengths(text, "--prompt-lens")


def test_unknown_workloads_and_samples_are_refused():
    with pytest.raises(ArgumentError, match=r"`--workload` is 'burst'; known are fixed, uniform"):
        workload("burst", None, None, None)
    with pytest.raises(ArgumentError, match=r"`--samples` is 0"):
        workload("fixed", None, None, 0)


# The loop


@pytest.mark.parametrize("sizes", [CacheSizes(8, 64, 64, 4), CacheSizes(3, 5, 12, 4), CacheSizes(2, 16, 12, 1)])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_every_request_gets_the_tokens_of_running_alone(sizes, samples, runs_ahead):
    top = 10 if sizes.page_size > 1 else 5
    requests = [
        Request(r.arrival, r.prompt, r.max_new_tokens, samples if i % 2 else 1)
        for i, r in enumerate(workload("uniform", f"1..{top}", "1..3", None).requests(25, 0.8, 50, 1))
    ]
    clock = ScriptedClock()
    backend = ScriptedBackend(sizes, clock, base=0.5, runs_ahead=runs_ahead)
    run = Loop(backend, clock, first_seq=100).run(requests)
    for record, request in zip(run.records, requests, strict=True):
        assert record.request is request
        for sample in record.samples:
            assert sample.tokens == alone(request)
            assert len(sample.times) == len(sample.tokens)
            assert sample.times[0] > request.arrival and sample.times == sorted(sample.times)
    assert backend.texts == {}, "every sequence was removed"
    assert len(run.steps) == len(backend.batches)
    assert sum(s.prompt_tokens for s in run.steps) == sum(len(r.prompt) for r in requests)
    assert backend.forks == sum(r.samples - 1 for r in requests)


def test_nothing_starts_before_it_arrives_and_the_loop_waits():
    clock = ScriptedClock()
    backend = ScriptedBackend(CacheSizes(4, 16, 16, 4), clock)
    run = Loop(backend, clock).run([Request(50.0, (1, 2), 1), Request(3.0, (4,), 2)])
    assert clock.waits == [3.0, 50.0]
    assert [s.start for s in run.steps] == [3.0, 4.0, 50.0]
    assert run.records[0].samples[0].times == [51.0]
    assert run.records[1].samples[0].times == [4.0, 5.0]


def test_prompts_go_in_chunks_beside_decodes():
    clock = ScriptedClock()
    backend = ScriptedBackend(CacheSizes(4, 4, 16, 4), clock)
    run = Loop(backend, clock).run([Request(0.0, (1, 2), 6), Request(0.0, tuple(range(9)), 1)])
    # step 1: the first prompt and 2 of the second; then 1 decode + 3, 1 + 3, 1 + 1, decodes alone
    assert [(s.decoding, s.prompt_tokens) for s in run.steps] == [(0, 4), (1, 3), (1, 3), (1, 1), (1, 0), (1, 0)]
    assert run.steps[1].keys == 3 + 5
    assert run.records[1].samples[0].times == [4.0]


def test_what_arrives_while_a_step_is_under_way_begins_a_step_later():
    requests = [Request(0.0, (1, 2), 6), Request(1.5, (3,), 1)]
    steps = {}
    for runs_ahead in (False, True):
        clock = ScriptedClock()
        backend = ScriptedBackend(CacheSizes(4, 16, 16, 4), clock, runs_ahead=runs_ahead)
        run = Loop(backend, clock).run(requests)
        steps[runs_ahead] = [(s.decoding, s.prompt_tokens) for s in run.steps]
    # the prompt; a decode, at whose end the second has arrived
    assert steps[False] == [(0, 2), (1, 0), (1, 1), (1, 0), (1, 0), (1, 0)]
    assert steps[True] == [(0, 2), (1, 0), (1, 0), (1, 1), (1, 0), (1, 0)]


def test_requests_wait_for_pages_in_their_order():
    clock = ScriptedClock()
    backend = ScriptedBackend(CacheSizes(8, 64, 4, 4), clock)
    big, small = Request(0.0, tuple(range(9)), 4), Request(0.0, (1,), 1)
    run = Loop(backend, clock).run([big, big, small])
    firsts = [record.samples[0].times[0] for record in run.records]
    assert firsts == [1.0, 5.0, 5.0], "the second waits for the first, and the small one behind it though it would fit"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0.0, tuple(range(40)), 30), r"request 0 needs 18 pages of 4 tokens; the cache has 16"),
        (Request(0.0, (), 3), "request 0 has no prompt"),
        (Request(0.0, (1,), 0), "asks for no tokens"),
        (Request(0.0, (1,), 1, 9), "request 0 has 9 samples; a step takes 4 sequences: raise --max-batch"),
    ],
)
def test_requests_that_can_never_run_are_refused_at_once(request_, message):
    backend = ScriptedBackend(CacheSizes(4, 16, 16, 4))
    with pytest.raises(ArgumentError, match=message):
        Loop(backend, ScriptedClock()).run([request_])
    assert not backend.batches


# Figures


def test_metrics_of_a_scripted_run():
    """Steps take 1 s + 0.1 s a token: every time can be reckoned by hand."""
    clock = ScriptedClock()
    backend = ScriptedBackend(CacheSizes(4, 64, 16, 4), clock, base=1.0, per_token=0.1)
    requests = [Request(0.0, (1, 2, 3, 4, 5), 3), Request(1.0, (1, 2), 2, samples=2)]
    figures = summarize(Loop(backend, clock).run(requests))
    # 0: prompt of 5, until 1.5. 1: decode + prompt of 2, until 2.8. 2: 3 decodes, until 4.1
    assert figures["ttft_ms"]["median"] == pytest.approx((1500 + 1800) / 2)
    assert figures["ttft_ms"]["p99"] == pytest.approx(1500 + 0.99 * 300)
    assert figures["itl_ms"]["median"] == pytest.approx(1300)
    assert figures["seconds"] == pytest.approx(4.1)
    assert figures["tokens_per_s"] == pytest.approx(7 / 4.1)
    assert (figures["requests"], figures["prompt_tokens"], figures["output_tokens"], figures["steps"]) == (2, 7, 7, 3)
    assert figures["mean_decoding"] == 2.0
    assert figures["typical"] == {"batch": 3, "keys": round((7 + 3 + 3) / 3)}


def test_single_tokens_have_no_time_between():
    clock = ScriptedClock()
    figures = summarize(Loop(ScriptedBackend(CacheSizes(4, 64, 16, 4), clock), clock).run([Request(2.0, (1,), 1)]))
    assert figures["itl_ms"] == {"median": None, "p99": None} and figures["typical"] is None
    assert figures["seconds"] == 1.0


def test_quantiles():
    found = quantiles([i * 1e-3 for i in range(101)])
    assert found == {"median": pytest.approx(50), "p99": pytest.approx(99)}


def test_agreement_counts_up_to_the_first_difference():
    assert serve_tasks.agreement([[1, 2, 3], [4]], [[1, 9, 3], [4]]) == {"same_tokens": 2, "compared_tokens": 4}


def test_the_cache_holds_the_longest_of_a_full_batch():
    requests = [Request(0.0, tuple(range(n)), 3) for n in (3, 60, 20, 40)]
    sizes = serve_tasks.serving_sizes(requests, 2, 32, 8)
    assert sizes == CacheSizes(2, 32, 8 + 6, 8)
    with pytest.raises(ArgumentError, match=r"4 samples of a prompt run together; a step takes 3 sequences"):
        serve_tasks.serving_sizes([Request(0.0, (1,), 1, 4)], 3, 32, 8)


# Decode only


@pytest.mark.parametrize(("keys", "steps"), [(64, 16), (64, 1), (2, 1), (9, 8), (100, 31)])
def test_timed_steps_have_the_asked_keys_in_the_mean(keys, steps):
    sizes = serve_decode.cache_sizes([3, 2], keys, steps, 7, 4)
    clock = ScriptedClock()
    backend = ScriptedBackend(sizes, clock)
    figures, tokens = serve_decode.measure(backend, range(5, 8), keys, steps, 50, 0, clock)
    decodes = [batch for batch in backend.batches if len(batch) == 3][-steps:]
    assert len(decodes) == steps
    last = len(backend.texts[5])
    mean = last - (steps - 1) / 2
    assert abs(mean - keys) <= 0.5
    assert figures["itl_ms"] == {"median": pytest.approx(1000), "p99": pytest.approx(1000)}
    assert figures["tokens_per_s"] == pytest.approx(3.0)
    assert all(len(text) >= steps + 1 for text in tokens)
    assert backend.distinct_pages() <= sizes.num_pages


@pytest.mark.parametrize("text", ["", "0", "a", "1,", "-2", "2 4"])
def test_bad_batches(text):
    with pytest.raises(ArgumentError, match=r"`--batch` is .*such as 16,64"):
        serve_decode.parse_batches(text)


def test_too_few_keys_for_the_steps():
    with pytest.raises(ArgumentError, match=r"`--kv` is 8 with 32 steps.*at least 17"):
        serve_decode.first_length(8, 32)


# Where the time goes


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("tvm_infer.attention_with_kv_cache", "attention"),
        ("vm.builtin.attention_kv_cache_attention_with_fused_qkv", "attention"),
        ("batch_decode_paged_kv_kernel", "attention"),
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<…>", "attention"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<…>", "attention"),
        ("merge_state_inplace_kernel", "attention"),
        ("append_b16", "attention"),
        ("tvm_infer.matmul", "gemm"),
        ("tvm_infer.matmul_add", "gemm"),
        ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop…>", "gemm"),
        ("fused_rms_norm_kernel", "other"),
        ("take_kernel", "other"),
    ],
)
def test_kernels_belong_to_parts_by_name(kernel, part):
    assert serve_breakdown.part_of(kernel) == part


def test_the_host_has_what_kernels_leave():
    calls = []
    kernels = [("matmul", 0.002), ("take", 0.001), ("matmul", 0.001)]
    found = serve_breakdown.of_step(lambda: calls.append(1), lambda run: (run(), kernels)[1], "m", 0.0095)
    assert len(calls) == serve_breakdown.RUNS
    assert (found.attention, found.gemm, found.other) == (0.0, pytest.approx(0.003), 0.001)
    assert found.host == pytest.approx(0.0055) and found.step == pytest.approx(0.0095)


def test_kernels_that_overlap_are_charged_from_the_end_of_those_ahead():
    spans = [("c", 5.0, 9.0), ("a", 0.0, 4.0), ("b", 1.0, 6.0), ("inside", 6.5, 8.0), ("later", 10.0, 10.5)]
    found = serve_breakdown.exclusive(spans)
    assert found == [("a", 4.0), ("b", 2.0), ("c", 3.0), ("inside", 0.0), ("later", 0.5)]
    assert sum(time for _, time in found) == 9.5  # the gap between 9 and 10 is nobody's


def test_a_plain_step_is_the_median_of_a_few():
    import time

    half = serve_breakdown.PLAIN_RUNS // 2
    waits = iter([*[0.001] * half, *[0.02] * (half + 1)])
    asked = []
    assert serve_breakdown.plain_step(lambda goes_on: (asked.append(goes_on), time.sleep(next(waits)))) >= 0.02
    assert asked == [True] * (serve_breakdown.PLAIN_RUNS - 1) + [False]


def test_breakdown_removes_its_sequences_even_when_it_fails():
    backend = ScriptedBackend(CacheSizes(4, 16, 16, 4))

    def fail(step, plain):
        raise ExecutorError("no CUPTI")

    backend.breakdown = fail
    plain = {"batch": 2, "keys": 9, "seconds": 1.0}
    assert serve_tasks.breakdown(backend, plain, 50, 0, 0) == {"skipped": "ExecutorError: no CUPTI"}
    assert backend.texts == {}
    assert "no room" in serve_tasks.plain_step(backend, {"batch": 20, "keys": 9}, 50, 0, 0)["skipped"]
    assert "second token" in serve_tasks.plain_step(backend, None, 50, 0, 0)["skipped"]
    assert serve_tasks.breakdown(backend, {"skipped": "why"}, 50, 0, 0) == {"skipped": "why"}


@pytest.mark.parametrize("sizes", [CacheSizes(8, 16, 10, 4), CacheSizes(1, 1, 1, 1), CacheSizes(6, 3, 2, 2)])
def test_warm_up_fits_every_cache_and_leaves_it_empty(sizes):
    backend = ScriptedBackend(sizes)
    free = serve_tasks.warm_up(backend, 50)
    assert backend.texts == {} and free >= 1
    backend.add(free)

"""A compiled Llama against transformers: steps, mixtures, forks, engines, sampling, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm_ffi
from hypothesis import given
from hypothesis import strategies as st
from llamas import hf_greedy, hf_logits, prompts_of, tiny_llama

import tvm_infer
from tvm_infer import errors
from tvm_infer.runtime import Sampler
from tvm_infer.runtime.executable import Executable, as_weight
from tvm_infer.runtime.sampling import nucleus

TOLERANCE = 2e-5  # of logits around 10


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max()))


def test_prefill_gives_every_logit(llama, executable):
    prompt = prompts_of(1, seed=3)[0] + [1, 2, 3]
    cache = executable.new_cache(num_pages=8)
    cache.add_sequence(5)
    logits = executable.step(cache, [(5, prompt)], rows=range(len(prompt)))
    assert_close(logits, hf_logits(llama, prompt))


def test_prefill_and_decode_in_one_step(llama, executable):
    """Sequences that come, grow at different paces, in another order, and go."""
    a, b, c = prompts_of(3, seed=1)
    cache = executable.new_cache(num_pages=32, page_size=4)
    for seq_id in (7, 1):
        cache.add_sequence(seq_id)
    first = executable.step(cache, [(7, a), (1, b[:1])])
    assert_close(first[0], hf_logits(llama, a)[-1])
    cache.add_sequence(3)
    mixed = executable.step(cache, [(1, b[1:] or [9]), (3, c), (7, [11])])
    assert_close(mixed[0], hf_logits(llama, b if len(b) > 1 else [*b, 9])[-1])
    assert_close(mixed[1], hf_logits(llama, c)[-1])
    assert_close(mixed[2], hf_logits(llama, [*a, 11])[-1])
    cache.remove_sequence(3)
    assert_close(executable.step(cache, [(7, [12, 13])])[0], hf_logits(llama, [*a, 11, 12, 13])[-1])


def test_rows_choose_and_order_the_logits(llama, executable):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    cache = executable.new_cache(num_pages=8)
    cache.add_sequence(0)
    expected = hf_logits(llama, prompt)
    assert_close(executable.step(cache, [(0, prompt)], rows=[6, 0, 6]), expected[[6, 0, 6]])
    cache.clear()
    cache.add_sequence(0)
    assert executable.step(cache, [(0, prompt)], rows=[]).shape == (0, 131)
    assert cache.seq_len(0) == len(prompt)
    assert executable.step(cache, []).shape == (0, 131)


def test_fork_continues_a_prompt_twice(llama, executable):
    prompt = prompts_of(1, seed=8)[0] + [5]
    cache = executable.new_cache(num_pages=64, page_size=4)
    cache.add_sequence(0)
    executable.step(cache, [(0, prompt)])
    used = cache.num_used_pages
    cache.fork_sequence(0, 1)
    assert cache.num_used_pages == used
    left, right = executable.step(cache, [(0, [1]), (1, [2])])
    assert_close(left, hf_logits(llama, [*prompt, 1])[-1])
    assert_close(right, hf_logits(llama, [*prompt, 2])[-1])


@pytest.mark.parametrize(("kv_dtype", "loss"), [("float8_e4m3fn", 0.1), ("float8_e5m2", 0.2)])
def test_the_same_code_runs_on_pages_of_8_bits(executable, kv_dtype, loss):
    """Logits of weights drawn at random, whose attention is sharp, lose about twice what the format does (0.077, 0.14)."""
    prompt = prompts_of(1, seed=8)[0] + [5]
    plain = executable.new_cache(num_pages=64, page_size=4)
    cache = executable.new_cache(num_pages=64, page_size=4, kv_dtype=kv_dtype, k_scale=0.01, v_scale=0.01)
    assert 4 * cache.bytes_per_page == plain.bytes_per_page
    logits = []
    for c in (plain, cache):
        c.add_sequence(0)
        executable.step(c, [(0, prompt)])
        c.fork_sequence(0, 1)
        logits.append(executable.step(c, [(0, [1]), (1, [2])]))
    error = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
    assert 0 < error < loss


@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads", "tied"), [(4, 4, False), (3, 1, True)])
def test_other_head_counts(num_qo_heads, num_kv_heads, tied):
    model = tiny_llama(num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, tied=tied, layers=1)
    executable = tvm_infer.compile(model, max_tokens=64)
    prompt = prompts_of(1, seed=2)[0]
    (generation,) = executable.generate([prompt], max_new_tokens=8)
    assert generation.tokens == hf_greedy(model, prompt, 8)


def test_requests_join_and_leave(llama, executable):
    """8 prompts, 3 at a time at most, some submitted while others run: the same greedy tokens as one by one."""
    prompts = prompts_of(8, seed=4)
    lengths = [5, 12, 1, 9, 20, 3, 7, 12]
    cache = executable.new_cache(num_pages=40, page_size=4, max_batch=3, max_tokens=16)
    engine = executable.engine(cache)
    generations = [engine.submit(p, max_new_tokens=n)[0] for p, n in zip(prompts[:3], lengths[:3], strict=True)]
    most = 0
    for p, n in zip(prompts[3:], lengths[3:], strict=True):
        for _ in range(2):
            engine.step()
            most = max(most, engine.num_running)
        generations += engine.submit(p, max_new_tokens=n)
    engine.run()
    assert 2 <= most <= 3
    assert [g.tokens for g in generations] == [hf_greedy(llama, p, n) for p, n in zip(prompts, lengths, strict=True)]
    assert {g.finish_reason for g in generations} == {"length"}
    assert cache.num_free_pages == cache.num_pages and len(cache) == 0
    assert engine.stats.decode_tokens > 0 and engine.stats.decode_tokens_per_second > 0


def test_stop_tokens_end_a_text(llama, executable):
    prompt = prompts_of(1, seed=5)[0]
    text = hf_greedy(llama, prompt, 12)
    stop = text[4]
    (generation,) = executable.generate([prompt], max_new_tokens=12, stop_tokens=[stop])
    assert generation.tokens == text[: text.index(stop) + 1]
    assert generation.finish_reason == "stop"


def test_tokens_stream_in_order(executable):
    seen = []
    generations = executable.generate(
        prompts_of(3), max_new_tokens=5, n=2, on_token=lambda g, t: seen.append((g.request, g.sample, t))
    )
    for g in generations:
        assert [t for request, sample, t in seen if (request, sample) == (g.request, g.sample)] == g.tokens
    assert [(g.request, g.sample) for g in generations] == [(r, s) for r in range(3) for s in range(2)]


def test_samples_are_reproducible_and_independent_of_the_batch(executable):
    prompts = prompts_of(4, seed=6)
    sampler = Sampler(temperature=1.0, top_p=0.95, seed=11)
    alone = executable.generate(prompts[:1], max_new_tokens=10, sampler=sampler, n=3)
    together = executable.generate(prompts, max_new_tokens=10, sampler=sampler, n=3, max_batch=5)
    assert [g.tokens for g in together[:3]] == [g.tokens for g in alone]
    assert len({tuple(g.tokens) for g in alone}) > 1
    other = executable.generate(prompts[:1], max_new_tokens=10, sampler=Sampler(temperature=1.0, seed=12), n=3)
    assert [g.tokens for g in other] != [g.tokens for g in alone]


def test_cancel_frees_pages(executable):
    cache = executable.new_cache(num_pages=20, page_size=4)
    engine = executable.engine(cache)
    (a,), (b,) = engine.submit([1, 2, 3], max_new_tokens=20), engine.submit([4, 5], max_new_tokens=6)
    engine.step()
    engine.cancel(a)
    engine.run()
    assert a.finish_reason == "cancelled" and len(a.tokens) == 1
    assert b.finish_reason == "length" and len(b.tokens) == 6
    assert cache.num_free_pages == 20


class Ahead(Executable):
    """An executable that says it runs ahead: the engine then asks for a step before it looks at the tokens ahead of it."""

    runs_ahead = True
    followed = 0

    def decode_next(self, cache, previous):
        self.followed += 1
        return super().decode_next(cache, previous)


def running_ahead(executable):
    ahead = executable.twin()
    ahead.__class__ = Ahead
    return ahead


def test_an_engine_that_runs_ahead_takes_the_same_tokens(llama, executable):
    """Texts of several lengths, one that a stop token ends, one that is cancelled, some that arrive later."""
    prompts, lengths = prompts_of(7, seed=21), [5, 12, 1, 9, 20, 3, 7]
    expected = [hf_greedy(llama, p, n) for p, n in zip(prompts, lengths, strict=True)]
    stop = expected[4][6]
    expected[4] = expected[4][: expected[4].index(stop) + 1]
    ahead = running_ahead(executable)
    cache = ahead.new_cache(num_pages=60, page_size=4, max_batch=4, max_tokens=16)
    engine = ahead.engine(cache)
    seen = []

    def submit(i):
        return engine.submit(
            prompts[i],
            max_new_tokens=lengths[i],
            stop_tokens=[stop] if i == 4 else (),
            on_token=lambda g, token: seen.append((g.request, token)),
        )[0]

    generations = [submit(i) for i in range(5)]
    (cancelled,) = engine.submit(prompts[0], max_new_tokens=30)
    while len(cancelled.tokens) < 2:
        assert engine.step()
    engine.cancel(cancelled)
    generations += [submit(5), submit(6)]
    engine.run()
    assert [g.tokens for g in generations] == expected
    assert [g.finish_reason for g in generations] == ["length"] * 4 + ["stop"] + ["length"] * 2
    assert cancelled.finish_reason == "cancelled" and len(cancelled.tokens) == 2
    assert sorted(seen) == sorted((g.request, token) for g in generations for token in g.tokens)
    assert cache.num_free_pages == cache.num_pages and len(cache) == 0 and ahead.followed > 5


@pytest.mark.parametrize("error", [errors.OutOfPagesError, errors.DeviceError, KeyboardInterrupt])
def test_an_engine_that_fails_on_its_way_ahead_loses_no_token(llama, executable, error):
    """The step ahead cannot begin, once: the tokens of the one under way are taken by the next call."""
    prompts, ahead = prompts_of(2, seed=31), running_ahead(executable)
    cache = ahead.new_cache(num_pages=40, page_size=4)
    engine = ahead.engine(cache)
    generations = [engine.submit(p, max_new_tokens=12)[0] for p in prompts]
    failures = iter([False, False, True, False, True])
    follow = Ahead.decode_next

    def sometimes(cache, previous):
        if next(failures, False):
            raise error("once")
        return follow(ahead, cache, previous)

    ahead.decode_next = sometimes
    raised = 0
    while True:
        try:
            engine.run()
        except error:
            raised += 1
        else:
            break
    assert raised == 2
    assert [g.tokens for g in generations] == [hf_greedy(llama, p, 12) for p in prompts]
    assert cache.num_free_pages == cache.num_pages


def test_an_engine_keeps_no_step_of_ended_texts(llama, executable):
    prompt, ahead = prompts_of(1, seed=32)[0], running_ahead(executable)
    stop = hf_greedy(llama, prompt, 5)[4]
    engine = ahead.engine(ahead.new_cache(num_pages=20))
    (text,) = engine.submit(prompt, max_new_tokens=20, stop_tokens=[stop])
    engine.run()
    assert text.finish_reason == "stop" and not engine._launched and ahead.followed > 0


def test_an_engine_runs_ahead_only_where_tokens_are_sure_to_follow(executable):
    ahead = running_ahead(executable)
    engine = ahead.engine(ahead.new_cache(num_pages=40, max_batch=2))
    engine.submit([1, 2], max_new_tokens=2)  # one decode step, its last
    engine.run()
    assert ahead.followed == 0
    engine.submit([1, 2], max_new_tokens=6, sampler=Sampler(temperature=1.0, seed=1))  # chosen on the host
    engine.run()
    assert ahead.followed == 0
    engine.submit([1, 2], max_new_tokens=6)
    engine.run()
    assert ahead.followed == 4


def test_decode_next_is_forward_with_the_greedy_tokens(llama, executable):
    cache = executable.new_cache(num_pages=20)
    prompts = prompts_of(2, seed=8)
    for seq in range(2):
        cache.add_sequence(seq)
    result = executable.forward(cache, list(enumerate(prompts)))
    tokens = [result.greedy]
    for _ in range(3):
        result = executable.decode_next(cache, result)
        tokens.append(result.greedy)
    assert np.array(tokens).T.tolist() == [hf_greedy(llama, p, 4) for p in prompts]
    assert result.sequences == (0, 1) and not executable.runs_ahead
    with pytest.raises(errors.ArgumentError, match=r"made with `rows`.*make it without"):
        executable.decode_next(cache, executable.forward(cache, [(0, [1, 2])], rows=[0]))
    empty = executable.decode_next(cache, executable.forward(cache, []))
    assert empty.logits.shape[0] == 0
    latest = executable.forward(cache, [(0, [1]), (1, [2])])
    length = cache.seq_len(0)
    with pytest.raises(errors.CacheStateError, match="not of the latest step"):
        executable.decode_next(cache, result)
    executable.decode_next(cache, latest)
    with pytest.raises(errors.CacheStateError, match="not of the latest step"):  # once is enough
        executable.decode_next(cache, latest)
    assert cache.seq_len(0) == length + 1
    other = executable.new_cache(num_pages=4)
    with pytest.raises(errors.CacheStateError, match="or it is of another cache"):
        executable.decode_next(other, latest)
    last = executable.forward(cache, [(0, [1]), (1, [2])])
    executable.release(cache)
    executable.forward(cache, [(0, [3]), (1, [4])])  # the first step of a new session
    with pytest.raises(errors.CacheStateError, match="not of the latest step"):
        executable.decode_next(cache, last)


def test_a_callback_that_raises_leaves_the_engine_whole(llama, executable):
    """Both requests go on as if nothing had happened; a callback may submit a request."""
    prompts = prompts_of(3, seed=13)
    engine = executable.engine(executable.new_cache(num_pages=40))
    late = []

    def raise_once(generation, token):
        if len(generation.tokens) == 2:
            late.extend(engine.submit(prompts[2], max_new_tokens=4))
            raise RuntimeError("mine")

    generations = [
        engine.submit(prompts[0], max_new_tokens=6, on_token=raise_once)[0],
        engine.submit(prompts[1], max_new_tokens=6)[0],
    ]
    with pytest.raises(RuntimeError, match="mine"):
        engine.run()
    engine.run()
    assert [g.tokens for g in generations] == [hf_greedy(llama, p, 6) for p in prompts[:2]]
    assert late[0].tokens == hf_greedy(llama, prompts[2], 4)


def test_more_samples_than_a_step_has_tokens(executable):
    """max_tokens bounds the sequences as max_batch does."""
    engine = executable.engine(executable.new_cache(num_pages=40, max_batch=8, max_tokens=2))
    with pytest.raises(errors.ArgumentError, match="at most 2 sequences"):
        engine.submit([1, 2, 3], n=3)
    generations = [engine.submit([i, 2, 3], max_new_tokens=3)[0] for i in range(5)]
    engine.run()
    assert [len(g.tokens) for g in generations] == [3] * 5


def test_failed_step_changes_nothing(llama, executable):
    cache = executable.new_cache(num_pages=4, page_size=4)
    cache.add_sequence(0)
    executable.step(cache, [(0, [1, 2, 3])])
    for batch, kind, message in [
        ([(0, [131])], errors.ArgumentError, "token 131; the vocabulary is 0 to 130"),
        ([(0, [-1])], errors.ArgumentError, "token -1"),
        ([(0, [1] * 65)], errors.ArgumentError, "65 tokens, the model was compiled for at most 64"),
        ([(0, [1] * 30)], errors.OutOfPagesError, "page"),
        ([(9, [1])], errors.UnknownSequenceError, "9"),
    ]:
        with pytest.raises(kind, match=message):
            executable.step(cache, batch)
    with pytest.raises(errors.ArgumentError, match="names 2 to 2; the step has rows 0 to 1"):
        executable.step(cache, [(0, [1, 1])], rows=[2])
    assert cache.seq_len(0) == 3 and not cache.in_forward
    assert_close(executable.step(cache, [(0, [7])])[0], hf_logits(llama, [1, 2, 3, 7])[-1])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"prompt": []}, errors.ArgumentError, "empty"),
        ({"prompt": [1, 200]}, errors.ArgumentError, "vocabulary is 0 to 130"),
        ({"prompt": [1], "max_new_tokens": 0}, errors.ArgumentError, "at least 1"),
        ({"prompt": [1], "n": 17}, errors.ArgumentError, "n is 17; a step takes at most 16"),
        ({"prompt": [1] * 90, "max_new_tokens": 11}, errors.OutOfPagesError, r"need 25 pages.*has 16.*num_pages=25"),
        ({"prompt": [1] * 500, "max_new_tokens": 20}, errors.ArgumentError, "context is 512"),
    ],
)
def test_requests_that_cannot_run(executable, arguments, kind, message):
    engine = executable.engine(executable.new_cache(num_pages=16, page_size=4))
    with pytest.raises(kind, match=message):
        engine.submit(**arguments)
    assert engine.num_waiting == 0 and not engine.step()


def test_one_executable_a_cache(executable, llama, imported):
    other = tvm_infer.compile(imported, max_tokens=64)
    cache = executable.new_cache(num_pages=4)
    cache.add_sequence(0)
    executable.step(cache, [(0, [1])])
    with pytest.raises(errors.CacheStateError):
        other.step(cache, [(0, [2])])
    with pytest.raises(errors.ArgumentError, match="an engine needs an empty cache"):
        executable.engine(cache)
    executable.release(cache)
    assert_close(other.step(cache, [(0, [2])])[0], hf_logits(llama, [1, 2])[-1])


def test_cache_of_another_model(executable):
    cache = tvm_infer.PagedKVCache(
        num_layers=3, num_qo_heads=6, num_kv_heads=2, head_dim=16, num_pages=4, max_batch=2, max_tokens=8
    )
    with pytest.raises(errors.ArgumentError, match="new_cache"):
        executable.step(cache, [])


def test_text_without_a_tokenizer(executable):
    with pytest.raises(errors.ArgumentError, match="no tokenizer"):
        executable.generate(["hello"])


@given(st.integers(1, 400), st.integers(1, 100), st.integers(1, 5), st.sampled_from([1, 4, 16]))
def test_reserved_pages_suffice_and_are_tight(prompt, new, n, page_size):
    """Against the cache itself: pages after the prompt, n - 1 forks and all but the last token of each sample."""
    from tvm_infer.runtime import Engine

    need = Engine.pages_needed(prompt, new, n, page_size)
    cache = tvm_infer.PagedKVCache(
        num_layers=1,
        num_qo_heads=1,
        num_kv_heads=1,
        head_dim=8,
        page_size=page_size,
        num_pages=need,
        max_batch=8,
        max_tokens=512,
    )
    cache.add_sequence(0)
    with cache.forward([0], [prompt]):
        pass
    for child in range(1, n):
        cache.fork_sequence(0, child)
    with cache.forward(range(n), [new - 1] * n):
        pass
    assert new == 1 or cache.num_free_pages == 0


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1}]
)
def test_sampler_refuses(settings):
    with pytest.raises(errors.ArgumentError, match=next(iter(settings))):
        Sampler(**settings)


@given(st.integers(0, 2**32), st.sampled_from([3, 600, 5000]), st.floats(0.01, 1.0))
def test_nucleus_is_the_smallest_set(seed, size, top_p):
    weights = np.exp(np.random.default_rng(seed).standard_normal(size))
    tokens, kept = nucleus(weights, top_p)
    order = np.sort(weights)[::-1]
    smallest = int(np.searchsorted(np.cumsum(order), top_p * weights.sum())) + 1
    assert abs(len(tokens) - min(smallest, size)) <= 1  # one either way at equality, by rounding
    np.testing.assert_array_equal(kept, weights[tokens])
    np.testing.assert_allclose(kept, order[: len(kept)])


def test_sampling_follows_the_distribution():
    """10,000 draws: every frequency within 5 standard deviations, nothing outside the nucleus."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    logits = np.log(probabilities).astype(np.float32)
    rng = Sampler(seed=1).stream(0, 0)
    sampler = Sampler(temperature=1.0, top_p=0.85)
    counts = np.bincount([sampler.choose(logits, rng) for _ in range(10_000)], minlength=5)
    expected = np.array([0.5, 0.25, 0.15, 0, 0]) / 0.9
    assert (np.abs(counts - expected * 10_000) <= 5 * np.sqrt(10_000 * expected * (1 - expected))).all()
    cold = Sampler(temperature=0.01)
    assert all(cold.choose(logits, rng) == 0 for _ in range(100))


def test_rows_may_be_asked_for_more_often_than_there_are(llama, executable):
    cache = executable.new_cache(num_pages=8)
    cache.add_sequence(0)
    assert_close(executable.step(cache, [(0, [3, 1])], rows=[1, 0, 1, 1, 0]), hf_logits(llama, [3, 1])[[1, 0, 1, 1, 0]])


def test_a_twin_outlives_what_was_not_kept(llama):
    """Code that is not kept lies in a folder that goes with the last of those who run it."""
    original = tvm_infer.compile(tiny_llama(layers=1), max_tokens=64, cache=False)
    twin, folder = original.twin(), original.folder
    del original
    assert folder.is_dir() and twin.generate([[1, 2]], max_new_tokens=2)[0].finish_reason == "length"
    del twin
    assert not folder.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_at_any_address(dtype):
    """A view into a file's memory begins where the file says; TVM's kernels assume 64 bytes."""
    memory = torch.arange(65, dtype=torch.float32).to(dtype)
    for view in (memory[1:], tvm_ffi.from_dlpack(memory[1:])):
        taken = torch.from_dlpack(as_weight(view, "w"))
        assert taken.dtype == dtype and taken.data_ptr() % 64 == 0 and torch.equal(taken, memory[1:])
    assert torch.from_dlpack(as_weight(memory, "w")).data_ptr() == memory.data_ptr()

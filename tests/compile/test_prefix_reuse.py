"""Prompts that begin alike are computed once: the same tokens as transformers', fewer of them computed."""

from __future__ import annotations

import numpy as np
import pytest
from llamas import hf_greedy, prompts_of
from test_executable import running_ahead

from tvm_infer import errors
from tvm_infer.runtime import Sampler

SYSTEM = [7, 3, 99, 12, 45, 45, 2, 8, 120, 64, 5, 5, 1, 17, 33, 90, 61]  # 17 tokens: 4 pages of 4, and one


def texts(count, seed=3):
    return [SYSTEM + p for p in prompts_of(count, seed=seed)]


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("max_tokens", [64, 10])
def test_the_same_tokens_with_and_without(llama, executable, runs_ahead, max_tokens):
    """Chunked prompts too, and steps whose tokens the host does not know when they begin."""
    chosen = running_ahead(executable) if runs_ahead else executable
    prompts, lengths = texts(6), [5, 9, 1, 12, 3, 7]
    expected = [hf_greedy(llama, p, n) for p, n in zip(prompts, lengths, strict=True)]
    computed = {}
    for reuse in (False, True):
        cache = chosen.new_cache(num_pages=120, page_size=4, max_batch=4, max_tokens=max_tokens)
        engine = chosen.engine(cache, prefix_reuse=reuse)
        assert (engine.prefix_reuse, cache.prefix_reuse) == (reuse, reuse)
        generations = [engine.submit(p, max_new_tokens=n)[0] for p, n in zip(prompts, lengths, strict=True)]
        engine.run()
        assert [g.tokens for g in generations] == expected
        assert cache.num_free_pages == cache.num_pages
        computed[reuse] = engine.stats.prefill_tokens
        assert engine.stats.prefill_tokens + engine.stats.reused_tokens == sum(map(len, prompts))
    assert computed[True] == computed[False] - 5 * 16, "five prompts share the first one's four pages"


def test_an_answer_is_part_of_the_next_prompt(llama, executable):
    """A chat: each turn begins with all before it, the answers' pages included, also those of steps ahead."""
    for chosen in (executable, running_ahead(executable)):
        cache = chosen.new_cache(num_pages=40, page_size=4)
        engine = chosen.engine(cache)
        talk = list(SYSTEM)
        for turn in range(3):
            (text,) = engine.submit(talk, max_new_tokens=9)
            before = engine.stats.reused_tokens
            engine.run()
            assert text.tokens == hf_greedy(llama, talk, 9)
            # the last token of an answer was never fed back
            known = 0 if turn == 0 else len(talk) - 3 - 1
            assert engine.stats.reused_tokens - before == known // 4 * 4
            talk += [*text.tokens, 11, 12, 13]


def test_a_request_waits_for_the_step_that_computes_its_beginning(executable):
    cache = executable.new_cache(num_pages=60, page_size=4, max_batch=4)
    engine = executable.engine(cache)
    other = engine.submit([1, 2, 3], max_new_tokens=8)[0]
    first, second = (engine.submit([*SYSTEM, t], max_new_tokens=8)[0] for t in (1, 2))
    third = engine.submit([*SYSTEM[:5], *range(30)], max_new_tokens=8)[0]  # shares too little to wait
    engine.step()
    assert [len(g.tokens) for g in (other, first, second, third)] == [1, 1, 0, 1]
    assert engine.stats.reused_tokens == 0
    engine.step()
    assert [len(g.tokens) for g in (other, first, second, third)] == [2, 2, 1, 2]
    assert engine.stats.reused_tokens == 16
    engine.run()


def test_steps_by_hand(llama, executable):
    cache = executable.new_cache(num_pages=30, page_size=4, prefix_reuse=True)
    for seq, prompt in enumerate(texts(3)):
        count = cache.add_sequence(seq, prompt)
        assert count == (16 if seq else 0)
        tokens = [int(executable.step(cache, [(seq, prompt[count:])])[0].argmax())]
        for _ in range(4):
            tokens.append(int(executable.step(cache, [(seq, tokens[-1:])])[0].argmax()))
        assert tokens == hf_greedy(llama, prompt, 5)
        assert cache.num_known_tokens(seq) == cache.seq_len(seq)


def test_namespaces_and_samples(executable):
    engine = executable.engine(executable.new_cache(num_pages=60, page_size=4))
    sampler = Sampler(temperature=1.0, seed=5)
    first = engine.submit(SYSTEM, max_new_tokens=6, n=3, sampler=sampler, namespace=1)
    engine.run()
    other = engine.submit(SYSTEM, max_new_tokens=6, namespace=2)
    engine.run()
    assert engine.stats.reused_tokens == 0
    alone = executable.generate([SYSTEM], max_new_tokens=6, n=3, sampler=sampler, prefix_reuse=False)
    assert [g.tokens for g in first] == [g.tokens for g in alone] and len(other[0].tokens) == 6
    again = engine.submit(SYSTEM, max_new_tokens=6, n=2, namespace=1)
    engine.run()
    assert engine.stats.reused_tokens == 16 and again[0].tokens == again[1].tokens == other[0].tokens


def test_a_cancelled_request_leaves_its_pages_to_be_found(llama, executable):
    ahead = running_ahead(executable)
    cache = ahead.new_cache(num_pages=40, page_size=4)
    engine = ahead.engine(cache)
    (text,) = engine.submit(SYSTEM, max_new_tokens=30)
    for _ in range(12):
        engine.step()
    engine.cancel(text)
    assert len(cache) == 0 and cache.prefix_stats.cached_pages == (len(SYSTEM) + len(text.tokens)) // 4
    prompt = [*SYSTEM, *text.tokens]
    assert cache.match_prefix([*prompt, 1]) == len(prompt) // 4 * 4
    (next_text,) = engine.submit(prompt, max_new_tokens=5)
    engine.run()
    assert next_text.tokens == hf_greedy(llama, prompt, 5)


def test_room_for_texts_comes_before_kept_pages(llama, executable):
    """A cache that just holds two texts at once, and many that begin alike or not: nothing runs out, tokens are right."""
    rng = np.random.default_rng(1)
    prompts = texts(5) + [rng.integers(0, 131, 20).tolist() for _ in range(4)] + texts(3, seed=9)
    cache = executable.new_cache(num_pages=16, page_size=4, max_batch=3)
    engine = executable.engine(cache)
    generations = [engine.submit(p[:24], max_new_tokens=8)[0] for p in prompts]
    engine.run()
    assert [g.tokens for g in generations] == [hf_greedy(llama, p[:24], 8) for p in prompts]
    assert cache.prefix_stats.evictions > 0 and cache.num_free_pages == 16


def test_pages_that_requests_share_are_reserved_once(llama, executable):
    """Six pages each, four of them shared: without that, 16 pages hold two texts at a time."""
    prompts = [[*SYSTEM, i] for i in range(7)]
    most = {}
    for reuse in (False, True):
        cache = executable.new_cache(num_pages=16, page_size=4, max_batch=8)
        engine = executable.engine(cache, prefix_reuse=reuse)
        lengths = [6, 6, 3, 6, 5, 6, 6]
        generations = [engine.submit(p, max_new_tokens=n, n=1)[0] for p, n in zip(prompts, lengths, strict=True)]
        most[reuse] = 0
        while engine.step():
            most[reuse] = max(most[reuse], engine.num_running)
            assert engine._reserved_pages - engine._shared_pages >= cache.num_used_pages
        assert engine._reserved_pages == engine._shared_pages == 0
        assert [g.tokens for g in generations] == [
            hf_greedy(llama, p, n) for p, n in zip(prompts, lengths, strict=True)
        ]
    assert most[False] == 2 and most[True] >= 4


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_never_run_out_of_pages(executable, seed):
    """Prompts that branch off each other, several samples, requests that are cancelled, few pages: the books stay right."""
    rng = np.random.default_rng(seed)
    chosen = running_ahead(executable) if seed % 2 else executable
    cache = chosen.new_cache(num_pages=24, page_size=2, max_batch=6, max_tokens=int(rng.integers(6, 20)))
    engine = chosen.engine(cache)
    said, running = [[1, 2, 3, 4, 5, 6, 7, 8]], []
    for _ in range(150):
        if len(running) < 8 and rng.random() < 0.4:
            base = said[int(rng.integers(len(said)))]
            prompt = [*base[: int(rng.integers(1, len(base) + 1))], *rng.integers(0, 3, int(rng.integers(1, 4)))][:12]
            try:
                running += [
                    (prompt, g)
                    for g in engine.submit(prompt, max_new_tokens=int(rng.integers(1, 7)), n=int(rng.integers(1, 4)))
                ]
            except errors.OutOfPagesError:
                continue
        if running and rng.random() < 0.05:
            engine.cancel(running[int(rng.integers(len(running)))][1])
        engine.step()
        assert engine._reserved_pages - engine._shared_pages >= cache.num_used_pages
        said += [[*prompt, *g.tokens] for prompt, g in running if g.finish_reason]
        running = [(prompt, g) for prompt, g in running if not g.finish_reason]
    engine.run()
    assert engine._reserved_pages == engine._shared_pages == len(cache) == 0
    assert engine.stats.reused_tokens > 100 and cache.prefix_stats.evictions > 10


def test_a_sequence_is_swapped_and_moved_between_steps_of_a_model(llama, executable):
    prompt = texts(1)[0][:24]
    cache = executable.new_cache(num_pages=11, page_size=4)
    cache.add_sequence(0), cache.add_sequence(1)
    tokens = [int(executable.step(cache, [(0, prompt)])[0].argmax())]
    executable.step(cache, [(1, [5, 6, 7])])
    other = executable.twin().new_cache(num_pages=3, page_size=16)
    twin = executable.twin()
    for i in range(6):
        if i % 2 == 0:
            cache.swap_out(0)
            executable.step(cache, [(1, [9])])  # takes its pages
            cache.swap_in(0)
        else:
            other.import_sequence(0, cache.export_sequence(0))
            copied = twin.step(other, [(0, tokens[-1:])])[0]
            other.remove_sequence(0)
        logits = executable.step(cache, [(0, tokens[-1:])])[0]
        if i % 2:
            np.testing.assert_allclose(copied, logits, atol=1e-5)
        tokens.append(int(logits.argmax()))
    assert tokens == hf_greedy(llama, prompt, 7)

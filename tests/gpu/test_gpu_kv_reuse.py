"""Prefixes that sequences share by their tokens, and contents that go to host memory and back, in the stream's order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tvm_infer
from tvm_infer.runtime import SequenceState

pytestmark = pytest.mark.family("kv_cache")

HQ, HKV = 8, 2


def make(device, **settings):
    defaults = dict(
        num_layers=3, head_dim=64, dtype="bfloat16", page_size=16, num_pages=64, max_batch=4, max_tokens=512
    )
    return tvm_infer.PagedKVCache(num_qo_heads=HQ, num_kv_heads=HKV, device=device, **{**defaults, **settings})


def as_torch(x):
    """What `pages` and `gather` give: on the host numpy, bfloat16 as a type of its own."""
    if isinstance(x, torch.Tensor):
        return x
    return (
        torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype.name == "bfloat16" else torch.from_numpy(x)
    )


def rows_of(tokens, layer, heads, kind, head_dim, dtype=torch.bfloat16):
    """[n, heads, head_dim]: the same for a token wherever it stands, so that what is shared can be known."""
    generator = torch.Generator().manual_seed(1000 * layer + kind)
    table = torch.randn(600, heads, head_dim, generator=generator)
    return table[torch.as_tensor(tokens)].to(dtype)


def step(cache, batch, *, told=True):
    """New tokens of sequences, [(id, tokens)]; the outputs of each layer."""
    tokens = np.asarray([t for _, new in batch for t in new], np.int64)
    ids, lengths = [seq for seq, _ in batch], [len(new) for _, new in batch]
    outs = []
    with cache.forward(ids, lengths, token_ids=tokens if told else None) as under_way:
        for layer in range(cache.num_layers):
            q, k, v = (
                rows_of(tokens, layer, heads, kind, cache.head_dim).to(cache.device)
                for kind, heads in enumerate((HQ, HKV, HKV))
            )
            outs.append(under_way.attention(layer, q, k, v))
    return outs


def reference(tokens, layer, head_dim, new):
    """float64 [new, HQ, head_dim] of the last `new` tokens of a text."""
    q, k, v = (rows_of(tokens, layer, h, kind, head_dim).double() for kind, h in enumerate((HQ, HKV, HKV)))
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q[-new:], k) / head_dim**0.5
    n, m = scores.shape[1:]
    scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(m - n + 1), float("-inf"))
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


def poison_free_pages(cache):
    state = np.asarray(cache._call("debug_state"))
    free = state[5 : 5 + state[4] - cache.prefix_stats.cached_pages]
    for layer in range(cache.num_layers):
        pages = as_torch(cache.pages(layer))
        pages[torch.as_tensor(free, device=pages.device)] = float("nan")


def check(cache, outs, texts, lengths):
    for layer, out in enumerate(outs):
        row = 0
        for text, new in zip(texts, lengths, strict=True):
            expected = reference(text, layer, cache.head_dim, new)
            actual = out[row : row + new].double().cpu()
            assert (actual - expected).norm() <= 4e-3 * expected.norm()
            row += new


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_prompts_that_begin_alike_against_float64(device, page_size, head_dim):
    """What is shared is read as if each had computed it; what is free and not kept is NaN. Pages come and go, some are given up."""
    rng = np.random.default_rng(page_size)
    cache = make(device, page_size=page_size, head_dim=head_dim, num_pages=2048 // page_size, prefix_reuse=True)
    system = rng.integers(0, 600, 300).tolist()
    texts, reused = {}, 0
    for number in range(14):
        prompt = [*system[: int(rng.choice([300, 300, 150, 8]))], *rng.integers(0, 600, int(rng.integers(1, 180)))]
        prompt = [int(t) for t in prompt]
        count = cache.add_sequence(number, prompt)
        reused += count
        texts[number] = prompt
        poison_free_pages(cache)
        others = [s for s in texts if s != number][-3:]
        for seq in others:
            texts[seq].append(int(rng.integers(0, 600)))
        outs = step(cache, [(number, prompt[count:]), *((seq, texts[seq][-1:]) for seq in others)])
        check(cache, outs, [texts[s] for s in (number, *others)], [len(prompt) - count, *(1 for _ in others)])
        if len(texts) == 4:
            gone = int(rng.choice(list(texts)))
            cache.remove_sequence(gone), texts.pop(gone)
    assert reused > 1000 and cache.prefix_stats.hits > 5
    assert page_size != 16 or cache.prefix_stats.evictions > 0


@pytest.mark.parametrize(("page_size", "num_layers"), [(16, 3), (1, 2), (64, 1)])
def test_swapped_contents_are_the_same_bits(device, page_size, num_layers):
    """In runs of pages of all lengths; the pages are another's while they are away, and NaN."""
    cache = make(device, page_size=page_size, num_layers=num_layers, num_pages=1024 // page_size, prefix_reuse=True)
    rng = np.random.default_rng(7)
    texts = {seq: [] for seq in range(3)}
    for seq in texts:
        cache.add_sequence(seq)
    for _ in range(9):
        batch = [(seq, rng.integers(0, 600, int(rng.integers(1, 40))).tolist()) for seq in rng.permutation(3)]
        step(cache, batch)
        for seq, new in batch:
            texts[seq] += new
    before = [[as_torch(x).clone() for x in cache.gather(0, layer)] for layer in range(num_layers)]
    state = cache.export_sequence(0)
    cache.drop_prefixes()
    cache.swap_out(0)
    poison_free_pages(cache)
    length = len(texts[0])
    assert (cache.seq_len(0), cache.swapped_bytes) == (length, -(-length // page_size) * cache.bytes_per_page)
    new = rng.integers(0, 600, 33).tolist()
    texts[1] += new
    step(cache, [(1, new)])
    cache.swap_in(0)
    cache.import_sequence(9, state)
    for seq in (0, 9):
        for layer in range(num_layers):
            for mine, kept in zip(cache.gather(seq, layer), before[layer], strict=True):
                assert torch.equal(as_torch(mine), kept)
    for seq in (0, 9):
        outs = step(cache, [(seq, [5])])
        check(cache, outs, [[*texts[0], 5]], [1])


def test_states_go_between_host_and_device(cuda, tmp_path):
    """A prompt filled on the CPU goes on on the GPU in pages of another size, and the other way round, through a file."""
    rng = np.random.default_rng(3)
    text = rng.integers(0, 600, 203).tolist()
    here, there = make("cpu", page_size=16, prefix_reuse=True), make("cuda", page_size=8, prefix_reuse=True)
    for first, second in ((here, there), (there, here)):
        first.add_sequence(1)
        step(first, [(1, text)])
        first.export_sequence(1).save(tmp_path / "state.npz")
        second.import_sequence(2, SequenceState.load(tmp_path / "state.npz"))
        assert second.match_prefix([*text, 0]) == 203 // second.page_size * second.page_size
        check(second, step(second, [(2, [7, 8])]), [[*text, 7, 8]], [2])
        first.clear(), second.clear(), second.drop_prefixes()


def test_swaps_keep_the_order_of_the_stream(cuda):
    """All queued behind a slow kernel: contents leave before others overwrite their pages, and come back before they are read."""
    results = []
    for ahead in (True, False):
        cache = make("cuda", num_pages=8)
        cache.add_sequence(0), cache.add_sequence(1)
        step(cache, [(0, list(range(100)))])
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(100_000_000)  # about 50 ms
        outs = []
        for i in range(6):
            cache.swap_out(0)
            outs += step(cache, [(1, list(range(110)))])
            cache.truncate(1, 0)
            cache.swap_in(0)
            outs += step(cache, [(0, [i])])
            if not ahead:
                torch.cuda.synchronize()
        results.append([out.cpu() for out in outs])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_further_apart_than_a_pitch_may_be(cuda):
    """Layers 4.3 GB apart: 2-D copies take pitches up to 2^31 - 1 bytes."""
    page_bytes = 2 * HKV * 64 * 128 * 2
    cache = make("cuda", num_layers=2, head_dim=128, page_size=64, num_pages=(1 << 32) // page_bytes + 5)
    last = cache.num_pages - 1
    cache.add_sequence(0)
    step(cache, [(0, list(range(100)))])
    state = cache.export_sequence(0)
    for layer in range(2):
        keys, values = cache.gather(0, layer)
        kept = as_torch(state.kv).to("cuda")
        assert torch.equal(kept[layer, 0], keys) and torch.equal(kept[layer, 1], values)
        cache.pages(layer)[last].fill_(layer + 1)
    cache.swap_out(0), cache.swap_in(0)
    check(cache, step(cache, [(0, [3])]), [[*range(100), 3]], [1])
    assert all((cache.pages(layer)[last] == layer + 1).all() for layer in range(2))

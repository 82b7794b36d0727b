"""Steps of compiled models that read pages that their sequences share once: the same tokens, and levels in the plan."""

from __future__ import annotations

import numpy as np
import pytest
from llamas import prompts_of
from variant_models import Gemma2, decoder, exported

import tvm_infer
from tvm_infer.errors import CacheStateError

PROMPT = np.random.default_rng(3).integers(0, 131, 4003).tolist()  # so long that merges are paid for
SIZES = {"num_pages": 400, "max_batch": 12}


@pytest.fixture(scope="module")
def long(llama, cache_folder):
    """The model of this folder, in steps of up to 1024 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_INFER_CACHE_DIR", str(cache_folder))
        executable = tvm_infer.compile(llama, max_tokens=1024)
    executable.max_position = None  # of weights drawn at random: there is nothing to be too long for
    return executable


class Plans:
    """Works of several requests in the plan of each step that an engine makes; levels, at most."""

    def __init__(self, engine, layer) -> None:
        self.shared, self.levels = [], 0
        while engine.step():
            plan = engine.cache.plan_of(layer)
            self.shared.append(plan.num_shared_works)
            self.levels = max(self.levels, plan.header["num_levels"])


def run(executable, requests, layer=0, **settings):
    """(tokens of each generation, plans of a layer). requests : arguments of Engine.submit."""
    engine = executable.engine(executable.new_cache(**SIZES, **settings))
    generations = [g for request in requests for g in engine.submit(**request)]
    plans = Plans(engine, layer)
    return [g.tokens for g in generations], plans


def test_samples_of_one_prompt(long):
    """Parallel generation: its decodes share the prompt."""
    request = [{"prompt": PROMPT, "max_new_tokens": 6, "n": 12}]
    tokens, plans = run(long, request)
    assert sum(n > 0 for n in plans.shared) >= 4  # every decode; the first tokens are the prefill's
    flat, without = run(long, request, shared_prefix=False)
    assert tokens == flat and set(without.shared) == {0}
    assert tokens == [tokens[0]] * 12  # greedy


def test_generate_says_it_to_its_cache(long, monkeypatch):
    asked, new_cache = [], long.new_cache
    monkeypatch.setattr(long, "new_cache", lambda **settings: (asked.append(settings), new_cache(**settings))[1])
    texts = [long.generate([PROMPT], max_new_tokens=4, n=12, shared_prefix=shares) for shares in (None, True, False)]
    assert [settings["shared_prefix"] for settings in asked] == [None, True, False]
    assert len({tuple(g.tokens) for generations in texts for g in generations}) == 1


def test_requests_that_begin_alike(long):
    """Prefixes that the engine finds by their tokens are shared pages, too; a stranger among them reads its own."""
    tails = prompts_of(9, seed=5)
    prompts = [PROMPT[:-1] + tail for tail in tails] + [PROMPT[:3000] + tail for tail in tails[:2]] + [tails[0]]
    requests = [{"prompt": prompt, "max_new_tokens": 8} for prompt in prompts]
    tokens, plans = run(long, requests)
    flat, without = run(long, requests, shared_prefix=False)
    assert tokens == flat and set(without.shared) == {0}
    assert max(plans.shared) > 0


def test_logits_of_forked_decodes(long):
    """Beside a cache that reads every sequence's own: equal but for the order of sums."""
    logits = {}
    for shares in (True, False):
        cache = long.new_cache(**SIZES, shared_prefix=shares)
        cache.add_sequence(0)
        for chunk in range(0, len(PROMPT), 1024):
            long.step(cache, [(0, PROMPT[chunk : chunk + 1024])])
        for child in range(1, 12):
            cache.fork_sequence(0, child)
        logits[shares] = long.step(cache, [(i, [i]) for i in range(12)])
        assert (cache.plan.num_shared_works > 0) == shares
    error = np.linalg.norm(logits[True] - logits[False]) / np.linalg.norm(logits[False])
    assert 0 < error < 1e-4


def test_8_bit_pages_are_shared_alike(long):
    request = [{"prompt": PROMPT, "max_new_tokens": 4, "n": 12}]
    in_8_bits = {"kv_dtype": "float8_e4m3fn", "k_scale": 0.02, "v_scale": 0.01}
    tokens, plans = run(long, request, **in_8_bits)
    assert sum(n > 0 for n in plans.shared) >= 2
    assert tokens == run(long, request, **in_8_bits, shared_prefix=False)[0]


def test_capped_layers_share_and_windows_do_not(tmp_path):
    """Gemma 2: a cap in every layer, a window in every other; compiled, and as an exported library makes its caches."""
    model = tvm_infer.compile(exported(decoder(Gemma2)), max_tokens=1024)
    model.save(tmp_path)
    request = [{"prompt": [token % 60 for token in PROMPT], "max_new_tokens": 3, "n": 12}]
    flat, without = run(model, request, 1, shared_prefix=False)
    assert set(without.shared) == {0}
    for executable in (model, tvm_infer.load(tmp_path)):
        tokens, plans = run(executable, request, 1)
        assert tokens == flat and max(plans.shared) > 0
        assert set(run(executable, request, 0)[1].shared) == {0}


def test_a_step_under_way_is_planned_already(long):
    cache = long.new_cache(**SIZES)
    cache.add_sequence(0)
    with cache.forward([0], [1]), pytest.raises(CacheStateError, match="kv_cache_set_shared_prefix in a step"):
        cache._call("set_shared_prefix", 0)

"""Compiled models on caches whose layers select pages in decode steps."""

from __future__ import annotations

import numpy as np
import pytest
from llamas import prompts_of
from variant_models import Gemma2, decoder, exported

import tvm_infer
from tvm_infer import PageBudget
from tvm_infer.errors import ArgumentError, CacheStateError, DTypeError

TEXT = np.random.default_rng(3).integers(0, 131, 61).tolist()
SIZES = {"num_pages": 60, "page_size": 4, "max_batch": 4}
STREAMING = PageBudget(num_pages=4, num_sink_pages=1, num_recent_pages=3, dense_layers=[0])


def prefilled(executable, **settings):
    cache = executable.new_cache(**SIZES, **settings)
    for seq in (0, 1):
        cache.add_sequence(seq)
        executable.step(cache, [(seq, TEXT[: 61 - 30 * seq])])
    return cache


def test_a_budget_of_all_pages_generates_the_same(executable):
    prompts = prompts_of(3)
    budget = PageBudget(num_tokens=60, dense_layers=0)
    texts = [
        [g.tokens for g in executable.generate(prompts, max_new_tokens=12, page_size=4, page_budget=b)]
        for b in (None, budget)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_a_decode_step_reads_what_the_budget_says(executable, kv_dtype):
    """With no pages between sinks and recent ones it is known which: the others are NaN."""
    scales = {} if kv_dtype is None else {"kv_dtype": kv_dtype, "k_scale": 0.02, "v_scale": 0.02}
    logits = []
    for poisons in (False, True):
        cache = prefilled(executable, page_budget=STREAMING, **scales)
        assert not cache.selects_pages
        if poisons:
            for seq in (0, 1):
                cache.pages(1)[list(cache.page_table(seq)[1:-3])] = np.nan
        # the new tokens begin a page and go on in one: 61 + 1 and 31 + 1 tokens
        logits.append(executable.step(cache, [(0, [5]), (1, [6])]))
        assert cache.selects_pages
    assert np.isfinite(logits[0]).all() and np.array_equal(*logits)
    dense = executable.step(prefilled(executable, **scales), [(0, [5]), (1, [6])])
    assert 1e-4 < np.linalg.norm(dense - logits[0]) / np.linalg.norm(dense) < 1
    cache.pages(0)[cache.page_table(0)[5]] = np.nan  # of a layer that reads all
    assert np.isnan(executable.step(cache, [(0, [5])])).all()


def test_an_engine_serves_requests_that_outgrow_the_budget(executable):
    """Requests that come and go, with reused prefixes: each text is that of its request alone."""
    budget, prompts = (
        PageBudget(num_pages=5, num_recent_pages=2, dense_layers=1),
        [TEXT[:23], TEXT[:9], TEXT[:40], TEXT[5:30]],
    )

    def texts_of(prompts):
        engine = executable.engine(executable.new_cache(**SIZES, page_budget=budget))
        texts, selected = [engine.submit(p, max_new_tokens=9)[0] for p in prompts], 0
        while engine.step():
            selected += engine.cache.selects_pages
        executable.release(engine.cache)
        return [g.tokens for g in texts], selected

    together, selected = texts_of(prompts)
    assert together == [texts_of([p])[0][0] for p in prompts] and selected > 4


def test_bad_budgets(executable):
    with pytest.raises(DTypeError, match=r"argument `page_budget` is a int; it must be a tvm_infer.PageBudget"):
        executable.new_cache(**SIZES, page_budget=7)
    with pytest.raises(ArgumentError, match=r"`dense_layers` is 2 for a cache of 2 layers"):
        executable.new_cache(**SIZES, page_budget=PageBudget(num_pages=5))
    cache = prefilled(executable)
    cache.clear()
    with pytest.raises(CacheStateError, match=r"on a cache that ran steps for executable \d+, whose graphs"):
        cache.set_page_budget(STREAMING)


def test_layers_with_a_variant_stay_dense():
    model = tvm_infer.compile(exported(decoder(Gemma2)), max_tokens=64)
    with pytest.raises(ArgumentError, match=r"argument `layers` has 0, a layer that selects pages; a variant"):
        model.new_cache(**SIZES, page_budget=PageBudget(num_pages=5, dense_layers=[1]))

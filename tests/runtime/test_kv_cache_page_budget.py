"""PagedKVCache whose layers select pages: attention over exactly the chosen pages, and bounds that stay those of the keys."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tvm_infer import PageBudget, PagedKVCache, RopeConfig, variant
from tvm_infer.errors import ArgumentError, CacheStateError, DTypeError, OutOfPagesError, WorkspaceError
from tvm_infer.testing import attention_reference, relative_error

BF16 = np.dtype(ml_dtypes.bfloat16)
PAGE = 4
TOLERANCE = {"float32": 3e-6, "bfloat16": 4e-3}
SIZES = dict(num_layers=3, num_qo_heads=6, num_kv_heads=2, head_dim=16, page_size=PAGE, num_pages=80)


def cache_of(budget, **settings):
    sizes = SIZES | dict(max_batch=5, max_tokens=64) | settings
    return PagedKVCache(**sizes, page_budget=budget)


class Model:
    """Random q, k and v of each step, and what the cache must hold of them: keys and values of each sequence and layer."""

    def __init__(self, cache, seed=0):
        self.cache, self.rng = cache, np.random.default_rng(seed)
        self.dtype = np.dtype(ml_dtypes.bfloat16 if cache.dtype == "bfloat16" else cache.dtype)

    def random(self, n):
        c = self.cache
        shapes = ((c.num_qo_heads, c.head_dim), (c.num_kv_heads, c.head_dim), (c.num_kv_heads, c.head_dim_vo))
        return [self.rng.standard_normal((n, *shape)).astype(self.dtype) for shape in shapes]

    def step(self, ids, lengths, *, on_layer=None, num_rows=None):
        """o of each layer; `on_layer(layer, q, k, v)` is called before attention, and what it returns after it."""
        n, outputs = sum(lengths), []
        with self.cache.forward(ids, lengths, num_rows=num_rows) as s:
            for layer in range(self.cache.num_layers):
                q, k, v = self.random(n if num_rows is None else num_rows)
                after = None if on_layer is None else on_layer(layer, q, k, v)
                outputs.append(s.attention(layer, q, k, v))
                if after is not None:
                    after(outputs[-1])
        return outputs

    def prefill(self, lengths):
        for seq, length in enumerate(lengths):
            self.cache.add_sequence(seq)
            for begin in range(0, length, 37):
                self.step([seq], [min(37, length - begin)])


def planes(cache, layer):
    """Keys and values, each [num_pages, num_kv_heads, page_size, width]."""
    pages = cache.pages(layer)
    return pages if isinstance(pages, tuple) else (pages[:, 0], pages[:, 1])


def widened(x, scale=1.0):
    return np.asarray(x, np.float64) * scale


def expected_bounds(keys):
    """Of each page of a sequence's keys [tokens, heads, dim]: [pages, 2, heads, dim]."""
    pages = [keys[i : i + PAGE] for i in range(0, len(keys), PAGE)]
    return np.array([[page.min(0), page.max(0)] for page in pages])


def chosen_pages(cache, keys, q, head):
    """Numbers of the pages that a KV head's queries [group, dim] take of a sequence's keys, this step's included."""
    budget, count = cache.page_budget, -(-len(keys) // PAGE)
    if count <= budget.num_pages:
        return list(range(count))
    bounds = expected_bounds(keys)[:, :, head]
    of = np.maximum(q[:, None] * bounds[None, :, 0], q[:, None] * bounds[None, :, 1]).sum(2)
    scores = of.max(0) if budget.group_reduce == "max" else of.sum(0)
    between = np.arange(budget.num_sink_pages, count - budget.num_recent_pages)
    num_best = budget.num_pages - budget.num_sink_pages - budget.num_recent_pages
    best = between[np.lexsort((between, -scores[between]))][:num_best]
    return sorted([*range(budget.num_sink_pages), *best.tolist(), *range(count - budget.num_recent_pages, count)])


class Selected:
    """For Model.step: what was not chosen is NaN while attention runs, and attention is float64's over what was."""

    def __init__(self, cache, ids, scale=1.0):
        self.cache, self.ids, self.scale, self.selected = cache, ids, scale, 0

    def __call__(self, layer, q, k, v):
        cache, group = self.cache, self.cache.num_qo_heads // self.cache.num_kv_heads
        dense = layer in cache.page_budget.dense_layers
        of_keys, of_values = planes(cache, layer)
        stored = of_keys.dtype
        expected = np.zeros((len(q), cache.num_qo_heads, cache.head_dim_vo))
        taken = np.zeros((cache.num_pages, cache.num_kv_heads), bool)
        for r, seq in enumerate(self.ids):
            new = [np.asarray(widened(x[r : r + 1]) / self.scale, np.float32).astype(stored) for x in (k, v)]
            past = cache.seq_len(seq) - 1
            table = cache.page_table(seq)
            own = [
                widened(planes[list(table)].transpose(0, 2, 1, 3).reshape(-1, *planes.shape[1::2])[:past])
                for planes in (of_keys, of_values)
            ]
            keys, values = (np.concatenate([a, widened(b)]) for a, b in zip(own, new, strict=True))
            queries = widened(q[r])
            for h in range(cache.num_kv_heads):
                heads = slice(h * group, (h + 1) * group)
                numbers = range(len(table)) if dense else chosen_pages(cache, keys, queries[heads], h)
                self.selected += len(numbers) < len(table)
                taken[np.array(table)[list(numbers)], h] = True
                at = [j for i in numbers for j in range(i * PAGE, min(len(keys), (i + 1) * PAGE))]
                expected[r, heads] = attention_reference(
                    queries[None, heads],
                    keys[at][:, h : h + 1] * self.scale,
                    values[at][:, h : h + 1] * self.scale,
                    sm_scale=cache.head_dim**-0.5,
                )[0]
        kept = of_keys.copy(), of_values.copy()
        for x in (of_keys, of_values):
            x[~taken] = np.nan  # [pages, heads, page_size, width]

        def after(o):
            of_keys[~taken], of_values[~taken] = kept[0][~taken], kept[1][~taken]
            n = len(self.ids)
            assert relative_error(o[:n], expected[:n]) < TOLERANCE[cache.dtype]
            assert not o[n:].any()  # padding

        return after


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({}, PageBudget(num_pages=5, dense_layers=1)),
        ({"dtype": "bfloat16"}, PageBudget(num_tokens=30, num_sink_pages=0, num_recent_pages=3, dense_layers=[1])),
        (
            {"kv_dtype": "float8_e4m3fn", "k_scale": 0.01, "v_scale": 0.01},
            PageBudget(num_pages=6, group_reduce="sum", dense_layers=0),
        ),
        ({"head_dim_vo": 8}, PageBudget(num_pages=3, num_sink_pages=2, dense_layers=0)),
    ],
    ids=["float32", "bfloat16", "8 bits", "two widths"],
)
def test_decode_steps_attend_to_exactly_the_chosen_pages(settings, budget):
    cache = cache_of(budget, **settings)
    model = Model(cache)
    model.prefill([50, 3, 92])
    assert not cache.selects_pages
    for num_rows in (None, 3, 5, 8):  # as many rows, and padding up to and beyond max_batch
        check = Selected(cache, [2, 0, 1], settings.get("k_scale", 1.0))
        model.step([2, 0, 1], [1, 1, 1], on_layer=check, num_rows=num_rows)
        assert cache.selects_pages
        assert check.selected == 2 * 2 * (3 - len(cache.page_budget.dense_layers))


def test_a_budget_of_all_pages_is_dense_attention_to_the_last_bit():
    caches = [cache_of(PageBudget(num_pages=23, dense_layers=0)), cache_of(None)]
    outputs = []
    for cache in caches:
        model = Model(cache)
        model.prefill([50, 3, 89])
        outputs.append([model.step([0, 1, 2], [1, 1, 1]) for _ in range(3)])
        assert not cache.selects_pages
    assert np.array_equal(*outputs)


def test_steps_of_several_tokens_read_all_keys():
    cache, dense = cache_of(PageBudget(num_pages=3, dense_layers=0)), cache_of(None)
    for on in (cache, dense):
        Model(on).prefill([50, 60])
    a, b = Model(cache, 1), Model(dense, 1)
    for ids, lengths in (([0, 1], [1, 2]), ([1, 0], [9, 1]), ([0, 1], [0, 1])):
        assert np.array_equal(a.step(ids, lengths), b.step(ids, lengths))
        assert not cache.selects_pages
    a.step([0, 1], [1, 1])
    assert cache.selects_pages
    b.step([0, 1], [1, 1])
    assert np.array_equal(a.step([0], [4]), b.step([0], [4]))


def test_rotated_keys_are_selected_by_rotated_queries():
    budget = PageBudget(num_pages=5, dense_layers=0)
    cache = cache_of(budget, num_layers=1)
    cache.set_rope(RopeConfig(16, theta=100.0))
    other = cache_of(budget, num_layers=1)  # gets them rotated
    rng = np.random.default_rng(0)
    for on in (cache, other):
        on.add_sequence(0)

    def turned(x, positions):
        angle = positions[:, None] * RopeConfig(16, theta=100.0).inv_freq()[None]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = x[..., :8], x[..., 8:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(np.float32)

    for length in (60, 1, 1):
        qkv = rng.standard_normal((length, 10, 16)).astype(np.float32)
        with cache.forward([0], [length]) as s, other.forward([0], [length]) as t:
            positions = s.query_positions
            o = s.attention_fused_qkv(0, qkv)
            expected = t.attention(0, turned(qkv[:, :6], positions), turned(qkv[:, 6:8], positions), qkv[:, 8:])
        assert relative_error(o, expected) < 1e-5
    assert cache.selects_pages
    assert np.allclose(
        cache.page_bounds(0)[list(cache.page_table(0))], other.page_bounds(0)[list(other.page_table(0))], atol=1e-5
    )


def check_bounds(cache, exact=None):
    """Bounds of all sequences' pages are those of their keys; of last pages that are not in `exact` they may be wider."""
    dense = cache.page_budget.dense_layers
    for seq in cache.sequences:
        if cache.is_swapped_out(seq) or cache.seq_len(seq) == 0:
            continue
        for layer in set(range(cache.num_layers)) - set(dense):
            keys = cache.gather(seq, layer)[0]
            expected = expected_bounds(widened(keys))
            bounds = widened(cache.page_bounds(layer)[list(cache.page_table(seq))])
            full = len(keys) // PAGE
            assert np.array_equal(bounds[:full], expected[:full])
            if len(keys) % PAGE == 0:
                continue
            if exact is not None and seq in exact:
                assert np.array_equal(bounds[full], expected[full])
            assert (bounds[full, 0] <= expected[full, 0]).all()
            assert (bounds[full, 1] >= expected[full, 1]).all()


@pytest.mark.parametrize("kv_dtype", [None, "float8_e5m2"])
def test_bounds_follow_the_pages(kv_dtype):
    """Forks, pops, cancelled steps, swaps, moves of tokens and dropped pages, at random."""
    scales = {} if kv_dtype is None else {"kv_dtype": kv_dtype, "k_scale": 0.5, "v_scale": 0.5}
    cache = cache_of(PageBudget(num_pages=3, dense_layers=[1]), num_pages=150, **scales)
    for layer in (0, 2):
        cache.page_bounds(layer)[...] = np.nan
    model, rng = Model(cache), np.random.default_rng(1)
    cache.add_sequence(0)
    model.step([0], [30])
    for number in range(1, 400):
        alive = [seq for seq in cache.sequences if not cache.is_swapped_out(seq)]
        seq = int(rng.choice(alive)) if alive else None
        action = rng.choice(
            ["decode", "decode", "append", "fork", "pop", "cancel", "swap", "remove", "move", "drop", "import"]
        )
        length = 0 if seq is None else cache.seq_len(seq)
        ids = [int(i) for i in rng.permutation(alive)[:5]]
        try:
            exact = ()
            if action == "decode":
                model.step(ids, [1] * len(ids))
                exact = ids
            elif action == "append" and ids:
                lengths = rng.integers(1, 12, len(ids)).tolist()
                model.step(ids, lengths)
                exact = ids
            elif action == "fork" and seq is not None and len(cache.sequences) < 8:
                cache.fork_sequence(seq, number, int(rng.integers(0, length + 1)))
            elif action == "pop" and seq is not None:
                cache.pop(seq, int(rng.integers(0, min(length, 9) + 1)))
            elif action == "cancel" and ids:
                with pytest.raises(ZeroDivisionError), cache.forward(ids, [1] * len(ids)) as s:
                    for layer in range(3):
                        s.attention(layer, *model.random(len(ids)))
                    raise ZeroDivisionError
            elif action == "swap":
                away = [i for i in cache.sequences if cache.is_swapped_out(i)]
                if away:
                    cache.swap_in(away[0])
                    exact = away[:1]
                elif seq is not None:
                    cache.swap_out(seq)
            elif action == "remove" and len(alive) > 2:
                cache.remove_sequence(seq)
            elif action == "move" and seq is not None and length > 2 * PAGE and cache.num_shared_pages([seq]) == 0:
                dst, src = sorted(rng.choice(length, 2, replace=False).tolist())
                cache._call("move_tokens", (seq,), (src,), (dst,))
            elif action == "drop" and seq is not None and length > 4 * PAGE:
                cache._call("drop_pages", seq, 1, 2)
            elif action == "import" and kv_dtype is None and seq is not None and len(cache.sequences) < 8:
                cache.import_sequence(number, cache.export_sequence(seq))
                exact = (number,)
        except OutOfPagesError:
            cache.remove_sequence(seq)
        if not cache.sequences:
            cache.add_sequence(number)
            model.step([number], [20])
        check_bounds(cache, exact)


def test_reused_prefixes_bring_their_bounds():
    cache = cache_of(PageBudget(num_pages=5, dense_layers=0), prefix_reuse=True)
    model, tokens = Model(cache), list(range(60))

    def prefill(seq):
        reused = cache.add_sequence(seq, tokens)
        with cache.forward([seq], [60 - reused], token_ids=np.array(tokens[reused:])) as s:
            for layer in range(3):
                s.attention(layer, *model.random(60 - reused))
        return reused

    assert prefill(0) == 0
    cache.remove_sequence(0)
    assert prefill(1) == 56
    check_bounds(cache, {1})
    check = Selected(cache, [1])
    model.step([1], [1], on_layer=check)
    assert check.selected == 6


def test_layers_that_stay_dense_may_have_windows():
    cache = cache_of(PageBudget(num_pages=4, dense_layers=[2]))
    cache.set_variant(variant.sliding_window.bind(window=9), layers=[2])
    model = Model(cache)
    model.prefill([60])
    for _ in range(2):
        check = Selected(cache, [0])
        model.step([0], [1], on_layer=lambda layer, *qkv, check=check: check(layer, *qkv) if layer < 2 else None)
        assert check.selected == 4
    with pytest.raises(
        ArgumentError, match=r"argument `layers` has 1, a layer that selects pages; a variant, a window"
    ):
        cache.set_variant(variant.sliding_window.bind(window=9), layers=[2, 1])
    windowed = cache_of(None)
    windowed.set_variant(variant.sliding_window.bind(window=9), layers=[1])
    with pytest.raises(
        ArgumentError, match=r"`dense_layers` does not have layer 1, which has an attention variant, a window"
    ):
        windowed.set_page_budget(PageBudget(num_pages=4, dense_layers=0))
    windowed.set_page_budget(PageBudget(num_pages=4, dense_layers=[1]))


def test_pages_count_their_bounds():
    dense, cache = cache_of(None), cache_of(PageBudget(num_pages=4, dense_layers=1))
    assert dense.page_budget is None and not dense.selects_pages
    assert cache.bytes_per_page == dense.bytes_per_page + 2 * (2 * 2 * 16 * 4)  # of two layers
    cache.add_sequence(0)
    Model(cache).step([0], [10])
    assert cache.bytes == 3 * cache.bytes_per_page and cache.bytes_after([0], [3]) == 4 * cache.bytes_per_page
    assert cache.page_budget == PageBudget(num_pages=4, dense_layers=[0], max_pages=80)
    assert PageBudget(num_tokens=17).pages(PAGE) == 5


BAD = [
    ({}, ArgumentError, r"`num_pages` and `num_tokens` of a PageBudget are None and None; give one of them"),
    ({"num_pages": 3, "num_tokens": 9}, ArgumentError, r"are 3 and 9; give one of them"),
    ({"num_pages": 0}, ArgumentError, r"argument `num_pages` is 0; it must be from 1 to"),
    ({"num_pages": 2.5}, DTypeError, r"argument `num_pages` is 2.5 \(float\); it must be an integer"),
    ({"num_pages": 3, "num_recent_pages": 0}, ArgumentError, r"argument `num_recent_pages` is 0; it must be from 1 to"),
    ({"num_pages": 3, "num_sink_pages": 3}, ArgumentError, r"are 3 and 1, more than the budget of 3 pages of 4 tokens"),
    (
        {"num_pages": 3, "group_reduce": "mean"},
        ArgumentError,
        r"argument `group_reduce` is 'mean'; it must be \"max\" or \"sum\"",
    ),
    (
        {"num_pages": 3, "dense_layers": 3},
        ArgumentError,
        r"argument `dense_layers` is 3 for a cache of 3 layers, 0 to 2",
    ),
    (
        {"num_pages": 3, "dense_layers": [3]},
        ArgumentError,
        r"argument `dense_layers` is \(3,\) for a cache of 3 layers",
    ),
    ({"num_pages": 3, "dense_layers": [-1]}, ArgumentError, r"argument `dense_layers` is -1; it must be from 0"),
    ({"num_pages": 3, "max_pages": 0}, ArgumentError, r"argument `max_pages` is 0; it must be from 1"),
    ({"num_pages": 2**27}, ArgumentError, r"argument `num_pages` is 134217728 for lists of 5 sequences and 2 KV heads"),
    ({"num_pages": 2**30}, ArgumentError, r"argument `num_pages` is 1073741824 pages of 4 tokens; a list may have"),
]


@pytest.mark.parametrize(("numbers", "error", "text"), BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_budgets(numbers, error, text):
    with pytest.raises(error, match=text):
        cache_of(PageBudget(**numbers))


def test_when_a_budget_may_be_set():
    with pytest.raises(DTypeError, match=r"argument `page_budget` is a int; it must be a tvm_infer.PageBudget"):
        cache_of(5)
    cache = cache_of(None)
    with pytest.raises(ArgumentError, match=r"argument `layer` is 0, of whose pages the cache keeps no bounds"):
        cache.page_bounds(0)
    cache.add_sequence(0)
    budget = PageBudget(num_pages=5, max_pages=9, dense_layers=1)
    with pytest.raises(CacheStateError, match=r"kv_cache_set_page_budget on a cache that holds 1 sequences"):
        cache.set_page_budget(budget)
    with cache.forward([0], [1]), pytest.raises(CacheStateError, match=r"kv_cache_set_page_budget in a step"):
        cache.set_page_budget(budget)
    cache.clear()
    cache.bind(7)
    with pytest.raises(CacheStateError, match=r"on a cache that ran steps for executable 7, whose graphs"):
        cache.set_page_budget(budget)
    cache.release(7)
    cache.set_page_budget(budget)
    with pytest.raises(ArgumentError, match=r"argument `layer` is 0, of whose pages the cache keeps no bounds"):
        cache.page_bounds(0)
    model = Model(cache)
    model.prefill([36, 35])
    with pytest.raises(WorkspaceError, match=r"sequence 1 of the step has 10 pages; .* max_pages = 9 of a sequence"):
        cache.begin_forward([1, 0], [1, 1])
    assert not cache.in_forward and cache.seq_len(0) == 36
    model.step([1], [1], on_layer=Selected(cache, [1]))
    model.step([0], [2])  # reads all keys, whatever max_pages is

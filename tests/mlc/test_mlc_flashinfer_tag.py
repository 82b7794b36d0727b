"""TVM's own cache object with our functions as its backend "flashinfer", on the cpu."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from mlc_model import Driver, attend, attention_kv_cache, check, kv_state, shape, to_numpy, to_tvm
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache
from tvm.relax.frontend.nn.llm.position_embedding import llama_rope_with_position_map

from tvm_infer import errors
from tvm_infer.runtime import mlc_library

H_KV, D, LAYERS = 2, 16, 2
PAGE = 4
TVM_PAGE = 16  # TVM's kernels are made for it


def ours(name):
    mlc_library.load()
    return tvm.get_global_func(f"tvm_infer.mlc.{name}")


@pytest.fixture(
    scope="module", params=[4, 8], ids=["group 2", "group 4"]
)  # TVM decodes groups of 4 and more by the prefill functions
def kernels(request):
    """What TVM's cache needs besides attention, compiled."""
    h_q = request.param
    made = {
        "append": tvm_kv_cache._kv_cache_transpose_append(H_KV, D, "float32"),
        "merge": tvm_kv_cache._merge_state_inplace_cpu("float32"),
        "rope": llama_rope_with_position_map(1e4, 1.0, D, h_q, H_KV, "float32", {}, D),
        "copy": tvm_kv_cache._copy_single_page_cpu(H_KV, TVM_PAGE, D, "float32"),
        "debug": tvm_kv_cache._kv_cache_debug_get_kv(LAYERS, H_KV, D, "float32"),
        "compact": tvm_kv_cache._compact_kv_copy_cpu(H_KV, D, "float32"),
    }
    module = tvm.compile(tvm.IRModule({k: f.with_attr("global_symbol", k) for k, f in made.items()}), target="llvm")
    return h_q, {k: module[k] for k in made}


def tvms_cache(h_q, kernels):
    paged = ["flashinfer", ours("paged_run"), ours("prefill_plan")]
    return tvm.get_global_func("vm.builtin.paged_attention_kv_cache_create")(
        shape([5, 320, 24, TVM_PAGE, 0]), shape([0, LAYERS]), h_q, H_KV, D, D, shape([0] * LAYERS), False, 0, 1.0, 1e4, 0,
        to_tvm(np.zeros(())), kernels["append"], None, ["flashinfer", ours("ragged_run"), ours("prefill_plan")], paged,
        ["flashinfer", ours("decode_run"), ours("decode_plan")], [], [], [], [], [], [kernels["merge"]], kernels["rope"],
        kernels["copy"], kernels["debug"], kernels["compact"],
    )  # fmt: skip


@pytest.fixture
def driver(kernels):
    h_q, compiled = kernels
    d = Driver(num_qo_heads=h_q)
    d.cache = tvms_cache(h_q, compiled)
    return d


def test_tvms_cache_runs_on_our_functions(driver):
    d = driver
    d.add(3), d.add(1)
    d.step([3, 1], [5, 19])
    d.step([1, 3], [1, 1])
    d.step([3, 1], [20, 4])
    d.fork(3, 7, 18), d.fork(1, 8)  # two depths: the shared prefix and what follows, merged
    d.step([7, 3, 8, 1], [1, 1, 1, 1])
    d.step([8, 7, 1], [3, 1, 2])
    d.popn(8, 2), d.remove(1)
    d.step([3, 8, 7], [1, 1, 1])
    for seq in d.history:
        k, v = d.get(seq, 0, d.length(seq))
        assert np.array_equal(k, d.history[seq][:, 0]) and np.array_equal(v, d.history[seq][:, 1])


def workspaces():
    return [tvm.runtime.empty((1 << 20,), "uint8") for _ in range(3)]


def index(values):
    return tvm.runtime.tensor(np.asarray(values, np.int32))


def prefill_plan(qo_indptr, kv_indptr, kv_len, *, window_left=-1, split=-1, no_split=False, causal=False, d_vo=D):
    buffers = workspaces()
    info = ours("prefill_plan")(
        *buffers, index(qo_indptr), index(kv_indptr), index(kv_len), qo_indptr[-1], len(kv_len), 4, 2, PAGE, False, D, d_vo,
        causal, window_left, split, no_split, 0,
    )  # fmt: skip
    return buffers[0], buffers[1], info


@pytest.mark.parametrize("split", [{}, {"split": 4}, {"no_split": True}])
@pytest.mark.parametrize("layout", [0, 1])
def test_paged_run(split, layout):
    """Strided views of one pool, in both orders of heads; a request without pages; a fixed split."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((6, 2, 2, PAGE, D) if layout == 1 else (6, 2, PAGE, 2, D)).astype(np.float32)
    q = rng.standard_normal((5, 4, D)).astype(np.float32)
    lengths, pages = [7, 0, 3], [[4, 1], [], [2]]
    plan = prefill_plan([0, 2, 3, 5], [0, 2, 2, 3], lengths, **split)
    o, lse = to_tvm(np.full((5, 4, D), np.nan)), to_tvm(np.full((5, 4), np.nan))
    tables = index([0, 2, 3, 5]), index([0, 2, 2, 3]), index([4, 1, 2]), index([3, 0, 3])
    ours("paged_run")(*plan, q, pool[:, 0], pool[:, 1], *tables, o, lse, 0, layout, -1, False, 0.3, 1.0, 1e-4)
    for begin, end, n, own in ((0, 2, 7, pages[0]), (2, 3, 0, pages[1]), (3, 5, 3, pages[2])):
        dense = pool[own].swapaxes(2, 3) if layout == 1 else pool[own]  # [pages, 2, page, heads, d]
        k, v = (dense[:, i].reshape(-1, 2, D)[:n].astype(float) for i in (0, 1))
        expected, expected_lse = attend(q[begin:end].astype(float), k, v, 0.3, np.ones((end - begin, n), bool))
        check(to_numpy(o)[begin:end], expected, "float32", "o")
        check(to_numpy(lse)[begin:end], expected_lse, "float32", "lse")


def test_ragged_run_with_a_window():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((7, h, D)).astype(np.float32) for h in (4, 2, 2))
    plan = prefill_plan([0, 7], [0, 7], [7], causal=True, window_left=2)
    o, lse = to_tvm(np.zeros((7, 4, D))), to_tvm(np.zeros((7, 4)))
    ours("ragged_run")(*plan, q, k, v, index([0, 7]), index([0, 7]), o, lse, 1, 0, 2, False, 0.3, 1.0, 1e-4)
    i, j = np.ogrid[:7, :7]
    expected, expected_lse = attend(*(x.astype(float) for x in (q, k, v)), 0.3, (j <= i) & (i - j <= 2))
    check(to_numpy(o), expected, "float32", "o")
    check(to_numpy(lse), expected_lse, "float32", "lse")


class TestErrors:
    def test_widths(self):
        with pytest.raises(errors.ArgumentError, match="`head_dim_vo` is 8 and `head_dim_qk` is 16"):
            prefill_plan([0, 1], [0, 1], [1], d_vo=8)

    def test_soft_cap(self):
        empty = to_tvm(np.zeros(0))
        with pytest.raises(errors.ArgumentError, match=r"`logits_soft_cap` is 30.*pass 0"):
            ours("decode_plan")(*workspaces(), index([0, 1]), 1, 4, 2, PAGE, False, -1, 30.0, D, D, empty, empty)

    def test_masks_and_plans_of_others(self):
        q, k = np.zeros((1, 4, D), np.float32), np.zeros((1, 2, D), np.float32)
        o, lse, one = to_tvm(np.zeros((1, 4, D))), to_tvm(np.zeros((1, 4))), index([0, 1])
        plan = prefill_plan([0, 1], [0, 1], [1], causal=True)
        run = ours("ragged_run")
        with pytest.raises(errors.PlanMismatchError, match="are 0 and -1 but the plan was made for 1 and -1"):
            run(*plan, q, k, k, one, one, o, lse, 0, 0, -1, False, 1.0, 1.0, 1.0)
        with pytest.raises(
            errors.PlanMismatchError, match=r"`plan_info` has 2 numbers; plans of tvm_infer\.mlc have 7"
        ):
            run(*plan[:2], [1, 2], q, k, k, one, one, o, lse, 1, 0, -1, False, 1.0, 1.0, 1.0)
        with pytest.raises(errors.ArgumentError, match="`layout` is 1; it must be 0"):
            run(*plan, q, k, k, one, one, o, lse, 1, 1, -1, False, 1.0, 1.0, 1.0)

    def test_decode_tables(self):
        empty = to_tvm(np.zeros(0))
        buffers = workspaces()
        info = ours("decode_plan")(*buffers, index([0, 1]), 1, 4, 2, PAGE, False, -1, 0.0, D, D, empty, empty)
        q, pool = np.zeros((1, 4, D), np.float32), np.zeros((2, 2, PAGE, D), np.float32)
        o, lse = to_tvm(np.zeros((1, 4, D))), to_tvm(np.zeros((1, 4)))
        with pytest.raises(errors.ArgumentError, match=r"`last_page_len` has shape \[2\]; it must be int32 \[1\]"):
            ours("decode_run")(
                *buffers[:2], info, q, pool, pool, index([0, 1]), index([0]), index([1, 1]), o, lse, 1, -1, False, 1.0, 1.0, 1.0
            )  # fmt: skip


def test_the_two_caches_are_alike(kernels):
    """The same calls to TVM's object and to ours give the same results: their semantics, not only our reading of them."""
    h_q, compiled = kernels
    a, b = Driver(num_qo_heads=h_q, seed=5), Driver(num_qo_heads=h_q, seed=5)
    b.cache = tvms_cache(h_q, compiled)
    for d in (a, b):
        d.add(0), d.add(1)
        d.step([0, 1], [6, 3])
        d.begin([0, 1], [4, 2])
    out = []
    for d in (a, b):
        q, k, v = d.random(6, h_q, D), d.random(6, H_KV, D), d.random(6, H_KV, D)
        o, lse = to_tvm(np.zeros((6, h_q, D))), to_tvm(np.zeros((6, h_q)))
        pair = to_tvm(np.zeros((6, h_q, D))), to_tvm(np.zeros((6, h_q)))
        attention_kv_cache("self_attention", d.cache, 1, d.scale, *(to_tvm(x) for x in (q, k, v)), o, lse)
        attention_kv_cache("cross_attention", d.cache, 1, d.scale, to_tvm(q), *pair)
        shared = to_tvm(np.zeros((6, h_q, D)))
        qkv = np.concatenate([q, k, v], axis=1)
        fused = d.fused(0, qkv)
        attention_kv_cache("attention_with_shared_kv", d.cache, 0, d.scale, *(to_tvm(x) for x in (q, k, v)), shared)
        out.append([*map(to_numpy, (o, lse, *pair, shared)), fused])
        kv_state("end_forward", d.cache)
    for ours_, theirs in zip(*out, strict=True):
        check(ours_, theirs, "float32", "ours beside TVM's")

"""Shared prefixes and lists of KV heads with keys and values of 8 bits, beside the same values in 16."""

from __future__ import annotations

import numpy as np
import pytest
import test_gpu_formats as formats
import test_gpu_levels as levels
import torch

import tvm_infer

pytestmark = pytest.mark.family("attention_sm90")

SCALES = {"k_scale": 1 / 32, "v_scale": 1 / 32}
KINDS = [
    (64, 16, torch.float8_e4m3fn, "bfloat16"),
    (80, 64, torch.float8_e5m2, "float16"),
    (128, 16, torch.float8_e4m3fn, "bfloat16"),
    (192, 32, torch.float8_e4m3fn, "float16"),
]


def both(cache: torch.Tensor, kv: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements of 8 bits, and what they stand for, which has a bit pattern in 16 bits too. NaN stays NaN."""
    eight = (cache.float() * 32).to(kv)
    return eight, (eight.float() / 32).to(cache.dtype)


def assert_alike(got, expected, dtype: str) -> None:
    (o, lse), (o_16, lse_16) = ([x.cpu().double() for x in pair] for pair in (got, expected))
    assert torch.isfinite(o).all() and torch.equal(lse.isinf(), lse_16.isinf())
    assert (o - o_16).norm() <= 2 * levels.TOLERANCE[dtype] * o_16.norm()
    seen = lse_16.isfinite()
    assert (lse - lse_16)[seen].abs().max() < 2e-3


@pytest.mark.parametrize("name", ["an odd number of keys", "chats of a prompt", "prefills behind a prompt"])
@pytest.mark.parametrize(("head_dim", "page_size", "kv", "dtype"), KINDS)
def test_levels(name, head_dim, page_size, kv, dtype, device):
    batch = levels.Batch(name, device, head_dim=head_dim, page_size=page_size, dtype=dtype)
    table = [64 if head_dim > 128 and i in (1, 6) else x for i, x in enumerate(levels.EAGER)]  # keys of a tile
    plan = batch.plan(tile_table=table)
    assert plan.num_shared_works > 0
    eight, batch.cache = both(batch.cache, kv)
    expected = batch.attend(plan)
    batch.cache = eight
    for _ in range(2):
        assert_alike(batch.attend(plan, **SCALES), expected, dtype)
    assert device == "cpu" or tvm_infer.plan_status(plan) == "accepted"


@pytest.mark.parametrize("name", ["decode", "append", "empty lists"])
@pytest.mark.parametrize(("head_dim", "page_size", "kv", "dtype"), KINDS)
def test_head_lists(name, head_dim, page_size, kv, dtype, device):
    qo_lens, lengths = formats.LISTS[name]
    kv_lens = lengths(np.random.default_rng(head_dim), len(qo_lens), 3)
    lists = formats.HeadLists(device, qo_lens, kv_lens, page=page_size, dtype=dtype, dim=head_dim)
    eight, lists.cache = both(lists.cache, kv)
    for split in (0, 100):
        plan = lists.plan(causal=name != "empty lists", fixed_split_size=split)
        expected = lists.run(plan)
        values, lists.cache = lists.cache, eight
        assert_alike(lists.run(plan, **SCALES), expected, dtype)
        lists.cache = values

"""Variants of logits, mask and output with keys and values of 8 bits, against float64 of what the cache holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_gpu_float8 import Float8Batch, Float8Case
from test_gpu_variants import ROWS, VariantBatch, assert_is_right, seen_in

import tvm_infer
from tvm_infer import errors, variant

pytestmark = pytest.mark.family("attention_sm90")

NAMES = (
    "soft_cap", "alibi", "attention_sink", "sink_window", "custom_mask", "logit_bias", "sigmoid_attention", "gated"
)  # fmt: skip
STORES = (
    ("e4m3", "bf16", 128, 16, 4, "auto"),
    ("e5m2", "fp16", 64, 32, 7, "cut64"),
    ("e4m3", "fp16", 192, 64, 3, "cut96"),
)


def cases() -> list:
    made = []
    for i, (name, shape) in enumerate(itertools.product(NAMES, ("decode", "append", "mixed", "verify"))):
        # every variant with the first store, and with one of the others
        for kv, dtype, head_dim, page_size, group, split in (STORES[0], STORES[1 + i // 4 % 2]):
            case = Float8Case(
                shape, mask=ROWS[name].masks[0], split=split, dtype=dtype, head_dim=head_dim, page_size=page_size,
                group=group, layout=("HND", "NHD2")[i % 2], views=("plain", "strided")[i % 2], float8=kv, by_head=i % 3 != 1,
            )  # fmt: skip
            marks = [pytest.mark.subset] if shape == "verify" and head_dim == 128 and i % 8 == 3 else []
            made.append(pytest.param(name, case, id=f"{name}-{case.name}", marks=marks))
    return made


@pytest.mark.parametrize(("name", "case"), cases())
def test_variant(name, case, device, note):
    """Decode, append, mixed and short prompts, cut and whole; NaN outside the variant's band."""
    batch = VariantBatch(ROWS[name], Float8Batch(case, device))
    batch.batch.poison(seen_in(batch.bound.band))
    assert_is_right(batch, name, case.dtype, note)


@pytest.mark.parametrize("name", ["rope", "qk_norm", "streaming"])
def test_a_variant_that_changes_keys_is_refused(name, cuda):
    batch = VariantBatch(ROWS[name], Float8Batch(Float8Case("verify"), cuda))
    with pytest.raises(errors.ExecutorError, match=r"changes queries, and the call has keys of 8 bits.*in 16 bits"):
        batch.attend()
    torch.cuda.synchronize()


@pytest.mark.family("kv_cache")
def test_layers_of_a_cache_have_variants(cuda):
    """Steps of a cache with a soft cap, beside the same on the host."""
    made = {}
    for where in ("cpu", cuda):
        cache = tvm_infer.PagedKVCache(
            num_layers=2, num_qo_heads=8, num_kv_heads=2, head_dim=128, dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn,
            k_scale=[[0.02, 0.03], [0.01, 0.05]], v_scale=0.02, num_pages=40, max_batch=4, max_tokens=300, device=where,
        )  # fmt: skip
        cache.set_variant(variant.soft_cap.bind(cap=3.0), layers=[1])
        generator = torch.Generator().manual_seed(0)
        cache.add_sequence(0)
        outputs = []
        for count in (150, 1, 5):
            with cache.forward([0], [count]) as step:
                for layer in range(2):
                    new = [torch.randn((count, h, 128), generator=generator).bfloat16() for h in (8, 2, 2)]
                    outputs.append(step.attention(layer, *(x.to(where) for x in new)).cpu())
        made[where] = outputs
    for ours, theirs in zip(made[cuda], made["cpu"], strict=True):
        assert (ours.double() - theirs.double()).norm() / theirs.double().norm() < 8e-3

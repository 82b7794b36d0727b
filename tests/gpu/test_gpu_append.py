"""append writes exactly the new tokens' slots; append_attention is append, then attention."""

from __future__ import annotations

import pytest
import torch
from gpu_batches import GARBAGE, Batch, Case, bits, embedded, same_bits

import tvm_infer

pytestmark = pytest.mark.family("append")

LENGTHS = {
    "decode": ((1,) * 9, (1, 15, 16, 17, 64, 65, 129, 1000, 8)),
    "prompts": ((1, 15, 16, 17, 130, 257), (1, 15, 16, 17, 130, 257)),
    "crossing": ((2, 17, 40, 100, 129), (17, 33, 512, 1111, 200)),  # a page's last slot and the next one's first
    "idle": ((0, 1, 0, 5, 0), (10, 100, 0, 80, 0)),
    "many": (tuple(i % 4 for i in range(150)), tuple(i % 4 + 7 * i % 90 for i in range(150))),
}
MATRIX = [
    Case(
        shape,
        lengths=LENGTHS[shape],
        dtype=dtype,
        head_dim=dim,
        page_size=page,
        layout=layout,
        group=group,
        views=views,
    )
    for shape, dtype, dim, page, layout, group, views in (
        ("decode", "bf16", 128, 16, "HND", 4, "plain"),
        ("decode", "fp16", 64, 1, "NHD", 1, "offset"),
        ("decode", "bf16", 64, 8, "HND2", 71, "strided"),
        ("decode", "bf16", 128, 64, "NHD2", 8, "strided"),
        ("prompts", "bf16", 128, 16, "NHD", 4, "strided"),
        ("prompts", "fp16", 64, 8, "HND", 3, "plain"),
        ("prompts", "bf16", 128, 1, "HND2", 5, "offset"),
        ("prompts", "fp16", 128, 64, "NHD", 16, "offset"),
        ("crossing", "bf16", 128, 16, "HND2", 4, "offset"),
        ("crossing", "fp16", 64, 32, "NHD2", 1, "strided"),
        ("crossing", "bf16", 128, 1, "NHD", 7, "plain"),
        ("crossing", "bf16", 64, 64, "HND", 64, "strided"),
        ("idle", "bf16", 128, 16, "HND", 4, "offset"),
        ("idle", "fp16", 64, 1, "NHD2", 3, "plain"),
        ("many", "bf16", 128, 16, "HND", 4, "plain"),
        ("many", "fp16", 64, 8, "NHD", 5, "strided"),
    )
]
MATRIX += [
    Case(
        shape,
        lengths=LENGTHS[shape],
        dtype=dtype,
        head_dim=192,
        head_dim_vo=128,
        page_size=page,
        layout=layout,
        group=group,
        views=views,
    )
    for shape, dtype, page, layout, group, views in (
        ("decode", "bf16", 16, "HND2", 4, "plain"),
        ("prompts", "fp16", 64, "NHD2", 3, "strided"),
        ("crossing", "bf16", 1, "HND2", 7, "offset"),
        ("many", "fp16", 8, "NHD2", 5, "strided"),
        ("idle", "bf16", 32, "HND2", 71, "offset"),
    )
]


def params(cases: list[Case]) -> list:
    return [pytest.param(c, id=c.name, marks=[pytest.mark.sanitize] if i % 4 == 1 else []) for i, c in enumerate(cases)]


def storages(batch: Batch) -> list[torch.Tensor]:
    """All memory of the cache, what surrounds its views included."""
    return [b for b in (batch.k_base, batch.v_base) if b is not None]


def append(batch: Batch, **changes) -> None:
    arguments = {"qo_indptr": batch.device_qo_indptr, "kv_len": batch.device_kv_len, **batch.tables, **changes}
    tvm_infer.append(
        arguments.pop("k", batch.k_new),
        arguments.pop("v", batch.v_new),
        arguments.pop("cache", batch.cache),
        **arguments,
    )


@pytest.mark.subset
@pytest.mark.parametrize("case", params(MATRIX))
def test_append_writes_its_slots_alone(case, device):
    """Every bit of the pool, of free pages and of what lies between strides: as if the tokens had been there from the start."""
    batch, full = Batch(case, device, appended=False), Batch(case, device)
    before = [bits(b).clone() for b in storages(batch)]
    append(batch)
    for got, expected in zip(storages(batch), storages(full), strict=True):
        assert same_bits(got, expected)
    if sum(case.qo):
        assert any(not torch.equal(x, bits(b)) for x, b in zip(before, storages(batch), strict=True))


@pytest.mark.subset
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256, 24])
def test_any_head_dim_that_is_a_multiple_of_8(head_dim, device):
    case = Case("crossing", lengths=LENGTHS["crossing"], head_dim=head_dim, page_size=16, group=3)
    batch, full = Batch(case, device, appended=False), Batch(case, device)
    append(batch)
    assert same_bits(batch.k_base, full.k_base)


@pytest.mark.parametrize("page_size", [16, 1])
def test_padding_tokens_go_nowhere(page_size, cuda):
    """Tokens behind qo_indptr's end pad a batch to a bucket's size."""
    case = Case("crossing", lengths=LENGTHS["crossing"], page_size=page_size)
    batch, full = Batch(case, cuda, appended=False), Batch(case, cuda)
    more = (batch.num_tokens + 37, *batch.k_new.shape[1:])
    k, v = (embedded(more, batch.dtype, cuda, "plain", fill=7.0)[0] for _ in range(2))
    k[: batch.num_tokens], v[: batch.num_tokens] = batch.k_new, batch.v_new
    append(batch, k=k, v=v)
    assert same_bits(batch.k_base, full.k_base)


@pytest.mark.subset
@pytest.mark.parametrize("lengths", [((), ()), ((0, 0), (5, 0))], ids=["no-requests", "idle"])
def test_nothing_to_append(lengths, device):
    batch = Batch(Case("nothing", lengths=lengths), device)
    before = bits(batch.k_base).clone()
    append(batch)
    assert torch.equal(before, bits(batch.k_base))


@pytest.mark.subset
@pytest.mark.family("append", "attention_sm90")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.sanitize] if c.page_size == 1 else [])
        for c in (
            Case("crossing", split="cut96", lengths=LENGTHS["crossing"], group=1),
            Case("decode", lengths=LENGTHS["decode"], page_size=1, views="offset", layout="NHD", group=3),
            Case("idle", lengths=LENGTHS["idle"], dtype="fp16", head_dim=64, page_size=64, views="strided"),
            Case("prompts", lengths=LENGTHS["prompts"], page_size=8, layout="HND2", mask="w100", group=3),
        )
    ],
)
def test_append_attention_is_append_then_attention(case, device, note):
    """To the last bit, in outputs and in the cache."""
    two, one = Batch(case, device, appended=False), Batch(case, device, appended=False)
    plan = two.plan()
    append(two)
    o, lse = two.attend(plan)
    one_plan = one.plan()
    out, one_lse = one.outputs()
    tvm_infer.append_attention(
        one.q,
        one.k_new,
        one.v_new,
        one.cache,
        one_plan,
        **one.tables,
        out=out,
        lse=one_lse,
        workspace=one.workspace(one_plan),
    )
    assert same_bits(o, out) and same_bits(lse, one_lse)
    for a, b in zip(storages(two), storages(one), strict=True):
        assert same_bits(a, b)
    errors = one.errors(out, one_lse)
    errors.assert_small()
    one.assert_margins()
    note(errors)


@pytest.mark.subset
def test_garbage_is_garbage():
    """Entries behind a request's pages would be far outside any pool."""
    assert all(abs(g) > 1_000_000 for g in GARBAGE)

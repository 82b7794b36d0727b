"""Sources (a), (c), (d): attention as PyTorch users and nn.Module users write it, compiled and run against the torch original."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from tvm_infer.relax import ImportedModel, RewritePagedAttention, from_torch
from tvm_infer.spec import AttentionSpec

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (3, 1)}
DIM = 16


def causal_mask(n):
    """[n, n] bool, true where key j <= query i."""
    positions = torch.arange(n)
    return positions[:, None] >= positions[None, :]


def repeat(x, group):
    """[1, kv_heads, n, d] -> [1, kv_heads * group, n, d]."""
    _, heads, n, d = x.shape
    return x[:, :, None].expand(1, heads, group, n, d).reshape(1, heads * group, n, d)


# each: (q [1, h, n, d], k, v [1, kv_heads, n, d], group) -> [1, h, n, d]
def sdpa_enable_gqa(q, k, v, group):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sdpa_repeat_interleave(q, k, v, group):
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True
    )


def sdpa_expand_reshape(q, k, v, group):
    return F.scaled_dot_product_attention(q, repeat(k, group), repeat(v, group), is_causal=True, scale=0.3)


def sdpa_bool_mask(q, k, v, group):
    mask = causal_mask(q.shape[2])[None, None]
    return F.scaled_dot_product_attention(q, repeat(k, group), repeat(v, group), attn_mask=mask)


def spelled_where(q, k, v, group):
    scores = q @ repeat(k, group).transpose(-1, -2) / math.sqrt(DIM)
    return torch.softmax(torch.where(causal_mask(q.shape[2]), scores, float("-inf")), -1) @ repeat(v, group)


def spelled_additive(q, k, v, group):
    bias = (1.0 - causal_mask(q.shape[2]).float()) * torch.finfo(torch.float32).min
    return torch.softmax((q * DIM**-0.5) @ repeat(k, group).mT + bias, -1) @ repeat(v, group)


def spelled_masked_fill(q, k, v, group):
    scores = (q * 0.5) @ (repeat(k, group) * 0.25).mT
    scores = scores.masked_fill(~causal_mask(q.shape[2]), -1e9)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ repeat(v, group)


def spelled_grouped(q, k, v, group):
    """Query heads as [kv_heads, group]; keys are broadcast, never repeated."""
    _, heads, n, d = q.shape
    scores = q.reshape(1, heads // group, group, n, d) @ k[:, :, None].mT * 0.2
    scores = scores.masked_fill(~causal_mask(n), float("-inf"))
    return (torch.softmax(scores, -1) @ v[:, :, None]).reshape(1, heads, n, d)


def spelled_einsum(q, k, v, group):
    """Tokens first, no batch axis: [n, h, d]."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, repeat(k, group), repeat(v, group)))
    scores = torch.einsum("ihd,jhd->hij", q, k) * 0.25
    i, j = torch.arange(q.shape[0])[:, None], torch.arange(q.shape[0])[None]
    weights = torch.softmax(torch.where(j > i, float("-inf"), scores), -1)
    return torch.einsum("hij,jhd->ihd", weights, v).transpose(0, 1)[None]


LOWER = torch.tril(torch.ones(1, 1, 65, 65))  # a buffer, as GPT-2 and its kin keep one


def spelled_tril_buffer(q, k, v, group):
    n = q.shape[2]
    scores = q @ repeat(k, group).transpose(-2, -1) * (1.0 / math.sqrt(DIM))
    scores = scores.masked_fill(LOWER[:, :, :n, :n] == 0, float("-inf"))
    return F.softmax(scores, dim=-1) @ repeat(v, group)


FORMS = [
    sdpa_enable_gqa,
    sdpa_repeat_interleave,
    sdpa_expand_reshape,
    sdpa_bool_mask,
    spelled_where,
    spelled_additive,
    spelled_masked_fill,
    spelled_grouped,
    spelled_einsum,
    spelled_tril_buffer,
]
SCALES = [0.25, 0.25, 0.3, 0.25, 0.25, 0.25, 0.125, 0.2, 0.25, 0.25]


class Layer(torch.nn.Module):
    def __init__(self, form, heads, kv_heads) -> None:
        super().__init__()
        self.form, self.heads, self.kv_heads = form, heads, kv_heads
        width = heads * DIM
        self.q = torch.nn.Linear(width, width)
        self.k = torch.nn.Linear(width, kv_heads * DIM)
        self.v = torch.nn.Linear(width, kv_heads * DIM)
        self.o = torch.nn.Linear(width, width, bias=False)

    def forward(self, x):
        n = x.shape[1]
        q = self.q(x).view(1, n, self.heads, DIM).transpose(1, 2)
        k = self.k(x).view(1, n, self.kv_heads, DIM).transpose(1, 2)
        v = self.v(x).view(1, n, self.kv_heads, DIM).transpose(1, 2)
        return x + self.o(self.form(q, k, v, self.heads // self.kv_heads).transpose(1, 2).reshape(1, n, -1))


class Packed(torch.nn.Module):
    """Embeddings of tokens and positions, and one attention layer per form."""

    def __init__(self, forms, heads, kv_heads) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.token = torch.nn.Embedding(50, heads * DIM)
        self.position = torch.nn.Embedding(32, heads * DIM)
        self.layers = torch.nn.ModuleList(Layer(form, heads, kv_heads) for form in forms)

    def forward(self, input_ids, position_ids):
        x = self.token(input_ids) + self.position(position_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def export(model) -> torch.export.ExportedProgram:
    n = torch.export.Dim("n", min=2, max=64)
    inputs = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None])
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes={"input_ids": {1: n}, "position_ids": {1: n}})


def check_against_torch(compiled, model) -> None:
    """Two sequences prefilled together, then one decodes while the other appends: all rows equal torch's, one by one."""
    rng = np.random.default_rng(3)
    tokens = {0: rng.integers(0, 50, 9), 1: rng.integers(0, 50, 6)}
    with torch.no_grad():
        expected = {
            seq: model(torch.tensor(ids)[None], torch.arange(len(ids))[None])[0].numpy() for seq, ids in tokens.items()
        }
    done = {0: 0, 1: 0}
    for step in ([(0, 6), (1, 3)], [(1, 1), (0, 3)], [(1, 1)], [(1, 1)]):
        spans = [(seq, done[seq], done[seq] + count) for seq, count in step]
        ids = np.concatenate([tokens[seq][begin:end] for seq, begin, end in spans])
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in spans])
        output = compiled(step, ids[None], positions[None])[0]
        wanted = np.concatenate([expected[seq][begin:end] for seq, begin, end in spans])
        error = np.linalg.norm(output - wanted) / np.linalg.norm(wanted)
        assert error <= 1e-5, (step, error)
        for seq, _, end in spans:
            done[seq] = end


@pytest.mark.parametrize(
    "heads, keep_attention",
    [("mha", False), ("gqa", True), ("gqa", False), ("mqa", True)],
    ids=["mha-decomposed", "gqa-kept", "gqa-decomposed", "mqa-kept"],
)
def test_torch_attention_equals_its_original(compile_with_fake_cache, heads, keep_attention):
    """Every form of sources (a) and (d) is a layer of one model."""
    num_heads, kv_heads = HEADS[heads]
    model = Packed(FORMS, num_heads, kv_heads)
    imported = from_torch(export(model), dim_names={"input_ids:1": "n"}, keep_attention=keep_attention)
    rewrite = RewritePagedAttention()
    compiled = compile_with_fake_cache(rewrite, imported)
    specs = [AttentionSpec(num_heads, kv_heads, DIM, "float32", True, scale) for scale in SCALES]
    assert [(s.num_qo_heads, s.num_kv_heads, s.causal) for s in rewrite.report.specs()] == [
        (s.num_qo_heads, s.num_kv_heads, s.causal) for s in specs
    ]
    assert [s.sm_scale for s in rewrite.report.specs()] == pytest.approx(SCALES, rel=1e-6)
    check_against_torch(compiled, model)


def test_default_import_is_rewritten_too(compile_with_fake_cache):
    """A module straight from TVM's importer: weights still attached, torch's own symbol names."""
    from tvm.relax.frontend.torch import from_exported_program

    model = Packed([sdpa_enable_gqa], 6, 2)
    program = export(model)
    mod = from_exported_program(program, keep_params_as_input=True)
    weights = {name: program.state_dict[name].detach() for name, _ in program.named_parameters()}
    compiled = compile_with_fake_cache(RewritePagedAttention(), ImportedModel(mod, weights, {}))
    check_against_torch(compiled, model)


def full(q, k, v, group):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("keep_attention", [True, False], ids=["kept", "decomposed"])
def test_full_attention_sees_every_key_of_its_sequence(compile_with_fake_cache, keep_attention):
    model = Packed([full], 6, 2)
    rewrite = RewritePagedAttention()
    compiled = compile_with_fake_cache(rewrite, from_torch(export(model), keep_attention=keep_attention))
    assert not rewrite.report.specs()[0].causal
    a, b = np.arange(4), np.arange(7) * 3
    output = compiled(
        [(0, 4), (1, 7)], np.concatenate([a, b])[None], np.concatenate([np.arange(4), np.arange(7)])[None]
    )
    for ids, rows in ((a, output[0, :4]), (b, output[0, 4:])):
        with torch.no_grad():
            wanted = model(torch.tensor(ids)[None], torch.arange(len(ids))[None])[0].numpy()
        assert np.linalg.norm(rows - wanted) / np.linalg.norm(wanted) <= 1e-5


class FrontendLayer(nn.Module):
    def __init__(self, heads, kv_heads) -> None:
        self.heads, self.kv_heads = heads, kv_heads
        width = heads * DIM
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, kv_heads * DIM)
        self.v = nn.Linear(width, kv_heads * DIM)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x):
        n = x.shape[1]
        q = op.reshape(self.q(x), (1, n, self.heads, DIM))
        k = op.reshape(self.k(x), (1, n, self.kv_heads, DIM))
        v = op.reshape(self.v(x), (1, n, self.kv_heads, DIM))
        attended = op.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(op.reshape(attended, (1, n, self.heads * DIM)))


class FrontendPacked(nn.Module):
    """The nn.Module frontend's counterpart of Packed([sdpa_enable_gqa] * 2)."""

    def __init__(self, heads, kv_heads) -> None:
        self.token = nn.Embedding(50, heads * DIM)
        self.position = nn.Embedding(32, heads * DIM)
        self.layers = nn.ModuleList([FrontendLayer(heads, kv_heads) for _ in range(2)])

    def main(self, input_ids, position_ids):
        x = self.token(input_ids) + self.position(position_ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("heads", HEADS)
def test_nn_module_frontend_equals_torch(compile_with_fake_cache, heads):
    """Source (c): R.nn.attention with unequal head numbers, which TVM's own lowering gets wrong."""
    num_heads, kv_heads = HEADS[heads]
    tensor = nn.spec.Tensor([1, "n"], "int64")
    frontend = FrontendPacked(num_heads, kv_heads)
    mod, params = frontend.export_tvm(spec={"main": {"input_ids": tensor, "position_ids": tensor}})
    model = Packed([sdpa_enable_gqa] * 2, num_heads, kv_heads)
    state = model.state_dict()
    imported = ImportedModel(mod, {name: state[name] for name, _ in params}, {})
    rewrite = RewritePagedAttention()
    compiled = compile_with_fake_cache(rewrite, imported)
    assert rewrite.report.specs() == [AttentionSpec(num_heads, kv_heads, DIM, "float32", True, 0.25)] * 2
    assert {match.form for match in rewrite.report.matched} == {"R.nn.attention"}
    check_against_torch(compiled, model)

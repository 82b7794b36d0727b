"""Models whose values are narrower than their keys: DeepSeek's latent attention, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import tvm_infer
from tvm_infer import AttentionSpec, compiler, errors
from tvm_infer.relax import RewritePagedAttention, from_torch
from tvm_infer.runtime import model_kernels

HEADS, NOPE, ROPE, VALUE = 2, 16, 8, 16


def turned(x, cos, sin):
    """Half-split rotary embedding; x : [1, heads, n, ROPE]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class LatentDecoder(torch.nn.Module):
    """Keys are 16 elements of content by head and 8 of position that all heads share; values are 16."""

    def __init__(self, written=False):
        super().__init__()
        self.written = written  # attention as matmul, softmax, matmul
        torch.manual_seed(0)
        self.tokens, self.head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50)
        self.q = torch.nn.Linear(32, HEADS * (NOPE + ROPE))
        self.latent, self.position = torch.nn.Linear(32, 12), torch.nn.Linear(32, ROPE)
        self.expand, self.out = torch.nn.Linear(12, HEADS * (NOPE + VALUE)), torch.nn.Linear(HEADS * VALUE, 32)

    def forward(self, input_ids, position_ids):
        x = self.tokens(input_ids)
        q = self.q(x).unflatten(-1, (HEADS, NOPE + ROPE)).transpose(1, 2)
        k, v = self.expand(self.latent(x)).unflatten(-1, (HEADS, NOPE + VALUE)).transpose(1, 2).split([NOPE, VALUE], -1)
        angle = position_ids[0, :, None].float() * torch.tensor([1.0, 0.1, 0.01, 0.001])
        cos, sin = angle.cos(), angle.sin()
        q = torch.cat([q[..., :NOPE], turned(q[..., NOPE:], cos, sin)], -1)
        k_position = turned(self.position(x)[:, None], cos, sin).expand(-1, HEADS, -1, -1)
        k = torch.cat([k, k_position], -1)
        if self.written:
            scores = q @ k.transpose(-1, -2) * (NOPE + ROPE) ** -0.5
            hidden = position_ids[:, None, :, None] < position_ids[:, None, None, :]
            y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        else:
            y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(-2)))


def program_of(decoder):
    n = torch.export.Dim("n", min=2, max=64)
    ids = torch.arange(7)[None]
    shapes = {"input_ids": {1: n}, "position_ids": {1: n}}
    return torch.export.export(decoder, (ids, ids.clone()), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def decoder():
    return LatentDecoder().eval()


@pytest.fixture(scope="module")
def compiled(decoder):
    return tvm_infer.compile(program_of(decoder), max_tokens=64)


def check_steps(decoder, executable):
    cache = executable.new_cache(num_pages=8)
    assert (cache.head_dim, cache.head_dim_vo) == (NOPE + ROPE, VALUE)
    tokens = [4, 8, 15, 16, 23, 42, 1, 2]
    with torch.inference_mode():
        expected = decoder(torch.tensor([tokens]), torch.arange(8)[None])[0].numpy()
    cache.add_sequence(0), cache.add_sequence(1)
    logits = executable.step(cache, [(0, tokens[:5]), (1, tokens[:2])])
    np.testing.assert_allclose(logits, expected[[4, 1]], atol=1e-5)
    for position in (5, 6, 7):
        np.testing.assert_allclose(executable.step(cache, [(0, [tokens[position]])])[0], expected[position], atol=1e-5)


@pytest.mark.parametrize("written", [False, True])
def test_the_pass_finds_both_widths(written):
    rewrite = RewritePagedAttention()
    rewrite(from_torch(program_of(LatentDecoder(written).eval())).mod)
    (spec,) = rewrite.report.specs()
    assert (spec.head_dim, spec.head_dim_vo, spec.num_qo_heads, spec.num_kv_heads) == (24, 16, 2, 2)
    assert "head_dim 24 / 16" in str(spec)
    assert spec.sm_scale == pytest.approx(24**-0.5, rel=1e-6)


def test_steps(decoder, compiled):
    assert "1 attention(s) rewritten, 0 refused" in compiled.explain()
    check_steps(decoder, compiled)


def test_steps_of_attention_written_out():
    decoder = LatentDecoder(written=True).eval()
    check_steps(decoder, tvm_infer.compile(program_of(decoder), max_tokens=64))


def test_saved_and_loaded(decoder, compiled, tmp_path):
    compiled.save(tmp_path / "model")
    check_steps(decoder, tvm_infer.load(tmp_path / "model"))


def test_a_cache_of_other_widths_is_refused(compiled):
    cache = tvm_infer.PagedKVCache(
        num_layers=1, num_qo_heads=2, num_kv_heads=2, head_dim=24, num_pages=4, max_batch=1, max_tokens=8
    )
    cache.add_sequence(0)
    with pytest.raises(
        errors.ArgumentError, match=r"head_dim_vo, dtype\) \(1, 2, 2, 24, 24, 'float32'\), the model has"
    ):
        compiled.step(cache, [(0, [1])])


def test_widths_without_a_kernel_for_cuda():
    compiler._check_cuda_layers([AttentionSpec(8, 8, 192, "bfloat16", head_dim_vo=128)])
    with pytest.raises(
        errors.ExecutorError, match=r"head_dim 24 / 16.*for which there is no CUDA kernel.*head_dim_vo of 16"
    ):
        compiler._check_cuda_layers([AttentionSpec(2, 2, 24, "bfloat16", head_dim_vo=16)])


def test_kernels_of_a_model_for_cuda():
    layers = [AttentionSpec(8, 8, 192, "bfloat16", head_dim_vo=128)] * 2
    assert model_kernels.kernel_names(layers, ["attention_with_kv_cache"], (16, 64)) == (
        "append_b16_h192_v128",
        "copy_pages",
        "attention_bf16_h192_v128_p16",
        "attention_bf16_h192_v128_p64",
    )

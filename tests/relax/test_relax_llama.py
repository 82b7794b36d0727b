"""Source (b): a random Hugging Face Llama, exported, rewritten, compiled, and run against transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from tvm_infer.errors import MatchError, ModelError
from tvm_infer.relax import RewritePagedAttention, export_hf, from_torch
from tvm_infer.spec import AttentionSpec


def make_llama(heads: int, kv_heads: int, head_dim: int = 64, layers: int = 2, **options):
    torch.manual_seed(heads * 100 + kv_heads)
    config = transformers.LlamaConfig(
        hidden_size=heads * 16,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=97,
        initializer_range=0.2,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def torch_logits(model, tokens) -> np.ndarray:
    """Logits [len(tokens), vocab] of one sequence by transformers."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize(
    "heads, kv_heads, tied, keep_attention",
    [(9, 3, True, True), (9, 3, False, False), (4, 4, False, True), (4, 1, True, True)],
    ids=["gqa-kept", "gqa-decomposed", "mha", "mqa"],
)
def test_packed_prefill_and_decode_equal_transformers(compile_with_fake_cache, heads, kv_heads, tied, keep_attention):
    """Prefill of two sequences, then a mixture: one decodes, one joins, one appends; every logit row equals a run by itself."""
    model = make_llama(heads, kv_heads, tie_word_embeddings=tied)
    before = model.config._attn_implementation
    imported = export_hf(model, keep_attention=keep_attention, max_tokens=64)
    assert model.config._attn_implementation == before
    rewrite = RewritePagedAttention()
    compiled = compile_with_fake_cache(rewrite, imported)
    spec = AttentionSpec(heads, kv_heads, 64, "float32", True, 0.125)
    assert rewrite.report.specs() == [spec, spec]

    rng = np.random.default_rng(0)
    sequences = {seq: rng.integers(0, 97, 12).tolist() for seq in "abc"}
    done = dict.fromkeys("abc", 0)

    def step(counts):
        ids, positions, rows = [], [], []
        for seq, count in counts:
            ids += sequences[seq][done[seq] : done[seq] + count]
            positions += range(done[seq], done[seq] + count)
            done[seq] += count
            rows.append(len(ids) - 1)
        logits = compiled(
            [("abc".index(seq), count) for seq, count in counts],
            np.array([ids]),
            np.array([positions]),
            np.array(rows, np.int64),
        )
        assert logits.shape == (1, len(counts), 97)
        for (seq, _), row in zip(counts, logits[0], strict=True):
            assert relative(row, torch_logits(model, sequences[seq][: done[seq]])[-1]) <= 1e-5

    step([("a", 5), ("b", 3)])
    step([("b", 1), ("c", 4), ("a", 2)])
    step([("c", 1)])  # one token alone: torch.export saw at least two
    assert {call[0] for call in compiled.cache.calls} == {0, 1}
    assert all(call[1][1:] == (heads, 64) and call[2][1:] == (kv_heads, 64) for call in compiled.cache.calls)


def test_logits_of_chosen_rows_only(compile_with_fake_cache):
    """logit_indices picks rows in any order, with repeats; the lm_head runs over those alone."""
    model = make_llama(2, 1, head_dim=8, layers=1)
    compiled = compile_with_fake_cache(RewritePagedAttention(), export_hf(model))
    tokens = [3, 1, 4, 1, 5, 9, 2]
    rows = np.array([6, 0, 3, 3, 1])
    logits = compiled([(0, 7)], np.array([tokens]), np.arange(7)[None], rows)
    assert relative(logits[0], torch_logits(model, tokens)[rows]) <= 1e-5


def test_weights_are_named_shared_and_not_copied():
    model = make_llama(2, 1, head_dim=8, layers=1, tie_word_embeddings=True)
    imported = export_hf(model)
    state = model.state_dict()
    assert set(imported.weights) == set(imported.torch_names)
    for name, tensor in imported.weights.items():
        assert tensor.data_ptr() == state[imported.torch_names[name]].data_ptr()
    params = [str(param.name) for param in imported.mod["main"].params]
    assert params[:3] == ["input_ids", "position_ids", "logit_indices"]
    assert params[3:] == list(imported.weights)
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(tied & set(imported.torch_names.values())) == 1, "tied weights are one parameter"


def tiny_mistral(**settings):
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, vocab_size=11, **settings)).eval()


def refused(model, match):
    """The export raises a ModelError, as it is or in what torch makes of it, and leaves the model as it was."""
    before = model.config._attn_implementation
    with pytest.raises(Exception, match=match) as caught:
        export_hf(model)
    assert isinstance(caught.value, ModelError) or "ModelError" in str(caught.value)
    assert model.config._attn_implementation == before


def test_layers_of_other_types_are_refused():
    model = tiny_mistral(sliding_window=None)
    model.config.layer_types = ["chunked_attention"]
    refused(model, r"layers of type \['chunked_attention'\]; only full_attention and sliding_attention")


def test_a_window_that_is_not_the_masks_is_refused():
    model = tiny_mistral(sliding_window=4)
    forward = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *args, **kwargs: forward(
        *args, **{**kwargs, "attention_mask": None}
    )
    refused(model, "uses sliding_window=4, and its mask has none")


def test_a_mask_or_bias_of_its_own_is_refused():
    model = tiny_mistral(sliding_window=None)
    forward = model.model.layers[0].self_attn.forward
    for changed, match in (
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "got a mask of its own"),
        ({"position_bias": torch.zeros(2, 7, 7)}, "uses position_bias"),
    ):
        model.model.layers[0].self_attn.forward = lambda *args, c=changed, **kwargs: forward(*args, **{**kwargs, **c})
        refused(model, match)


@pytest.mark.parametrize("thing", [object(), torch.nn.Linear(2, 2)])
def test_what_is_no_language_model_is_refused(thing):
    with pytest.raises(ModelError, match="not a Hugging Face causal language model"):
        export_hf(thing)


class WithMask(torch.nn.Module):
    """A Llama exported by hand, with its padding mask as an input."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids, attention_mask):
        return self.model(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padding_mask_is_refused_or_assumed_full(implementation):
    model = make_llama(3, 1, head_dim=8, layers=1)
    model.config._attn_implementation = implementation
    n = torch.export.Dim("n", min=2, max=64)
    row = torch.zeros(1, 6, dtype=torch.int64)
    shapes = {name: {1: n} for name in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        program = torch.export.export(WithMask(model), (row, row, row + 1), dynamic_shapes=shapes)
    imported = from_torch(program, dim_names={"input_ids:1": "n"})
    with pytest.raises(MatchError, match="the mask depends on the function input `attention_mask`") as caught:
        RewritePagedAttention()(imported.mod)
    assert "attention_mask[0, j] != 0" in str(caught.value)
    rewrite = RewritePagedAttention(assume_full=["attention_mask"])
    rewrite(imported.mod)
    (match,) = rewrite.report.matched
    assert match.spec == AttentionSpec(3, 1, 8, "float32", True, 1 / math.sqrt(8))
    assert match.assumptions[0] == "mask input `attention_mask` masks nothing (assume_full)"

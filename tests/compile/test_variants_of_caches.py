"""How the variants of a compiled model's layers get to its caches, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from variant_models import Attention, Gemma2, GptOss, Mistral, causal_bias, decoder, exported, logits64

import tvm_infer
from tvm_infer import errors
from tvm_infer.runtime.manifest import Manifest
from tvm_infer.runtime.variants import MAX_BANDS

TEXT = [5, 17, 3, 44, 60, 2, 8, 8, 19, 31, 7]


@pytest.fixture(scope="module")
def models():
    return {attention: decoder(attention) for attention in (Gemma2, GptOss, Mistral)}


@pytest.fixture(scope="module")
def executables(models, cache_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_INFER_CACHE_DIR", str(cache_folder))
        return {attention: tvm_infer.compile(exported(model), max_tokens=32) for attention, model in models.items()}


def hand_made(executable, **sizes):
    """A cache of the model's shape that the model did not make."""
    spec = executable.manifest.layers[0]
    return tvm_infer.PagedKVCache(
        num_layers=len(executable.manifest.layers),
        num_qo_heads=spec.num_qo_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        **{"num_pages": 16, "page_size": 4, "max_batch": 4, "max_tokens": 32, **sizes},
    )


def is_right(executable, cache, model):
    cache.add_sequence(0)
    logits = executable.step(cache, [(0, TEXT)], rows=range(len(TEXT)))
    cache.clear()
    return bool(np.abs(logits - logits64(model, TEXT)).max() < 1e-3)


def test_a_cache_made_by_hand_gets_them_when_it_is_bound(models, executables):
    for attention, executable in executables.items():
        assert is_right(executable, hand_made(executable), models[attention])


def test_what_a_user_sets_on_a_new_cache_stays(models, executables):
    cache = executables[Mistral].new_cache(num_pages=16, page_size=4)
    cache.set_variant(None)
    assert not is_right(executables[Mistral], cache, models[Mistral])


def test_a_cache_that_goes_from_model_to_model_has_those_of_each(models, executables):
    plain = decoder(Plain)
    executables = {**executables, Plain: tvm_infer.compile(exported(plain), max_tokens=32)}
    models = {**models, Plain: plain}
    cache = hand_made(executables[Mistral])
    for attention in (Mistral, Gemma2, Plain, GptOss, Plain, Mistral):
        executable = executables[attention]
        assert is_right(executable, cache, models[attention]), attention.__name__
        executable.release(cache)


class Plain(Attention):
    def attend(self, q, k, v, position_ids):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_models_whose_variants_the_library_has_need_no_compiler(models, executables, monkeypatch):
    def refuse(variant):
        raise AssertionError(f"{variant} was compiled")

    monkeypatch.setattr("tvm_infer.variant.cpu.compiled", refuse)
    for attention, executable in executables.items():
        assert is_right(executable, executable.new_cache(num_pages=16), models[attention])


def test_layers_with_equal_variants_are_bound_once(executables):
    variants = executables[Mistral].manifest.variants
    assert list(variants.values()) == [(0, 1)]
    assert [layers for layers in executables[GptOss].manifest.variants.values()] == [(0,), (1,)]


def test_the_manifest_keeps_them(executables):
    for executable in executables.values():
        manifest = Manifest.load(executable.folder)
        assert manifest == executable.manifest
        assert any(spec.variant is not None for spec in manifest.layers)
    names = {str(value) for spec in executables[GptOss].manifest.layers for _, value in spec.variant.values}
    assert names == {"weight layers.0.sinks", "weight layers.1.sinks"}


def test_explain_shows_them(executables):
    text = executables[GptOss].explain()
    assert "variant of layer 0: extracted(sink: per_head(float32))" in text
    assert "output = value * sigmoid(lse - sink[qo_head])" in text
    assert "layers 0, 1: their variant's code is in the kernels" in text
    assert "in the kernels" not in executables[Mistral].explain()  # windows are the plan's


def test_a_kept_model_has_them(models, executables):
    again = tvm_infer.compile(exported(models[GptOss]), max_tokens=32)
    assert again.from_cache and again.manifest.layers == executables[GptOss].manifest.layers
    assert is_right(again, again.new_cache(num_pages=16), models[GptOss])


class Windows(Attention):
    """Another window in every layer."""

    def __init__(self, layer):
        super().__init__(layer)
        self.window = layer + 2

    def attend(self, q, k, v, position_ids):
        scores = q @ k.transpose(2, 3) + causal_bias(q.shape[2], q.dtype, self.window)
        return scores.softmax(-1) @ v


class WindowsAndSinks(Attention):
    """As many windows as there may be, and a sink of its own in each of twice as many layers."""

    def __init__(self, layer):
        super().__init__(layer)
        self.window = 2 + layer % MAX_BANDS
        self.sinks = torch.nn.Parameter(torch.randn(1, 4, 1, 1))

    def attend(self, q, k, v, position_ids):
        scores = q @ k.transpose(2, 3) + causal_bias(q.shape[2], q.dtype, self.window)
        sinks = self.sinks.expand(1, -1, q.shape[2], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def test_more_windows_than_a_step_has_plans():
    message = r"have 5 different windows \(.*\), each of which takes a plan, and a step has at most 4: export the model with fewer"
    with pytest.raises(errors.ModelError, match=message):
        tvm_infer.compile(exported(decoder(Windows, layers=5)), max_tokens=32)


def test_as_many_windows_as_there_may_be():
    """Of twice as many variants: on the way to them there are never more."""
    model = decoder(WindowsAndSinks, layers=2 * MAX_BANDS)
    executable = tvm_infer.compile(exported(model), max_tokens=32)
    assert len(executable.manifest.variants) == 2 * MAX_BANDS
    assert is_right(executable, executable.new_cache(num_pages=16), model)


def test_a_model_that_is_refused_says_why():
    class Ahead(Attention):
        def attend(self, q, k, v, position_ids):
            bias = torch.ones(q.shape[2], q.shape[2]).triu(2) * -1e9
            return (torch.tanh(q @ k.transpose(2, 3)) + bias).softmax(-1) @ v

    with pytest.raises(errors.MatchError, match="a query may see keys after its own") as caught:
        tvm_infer.compile(exported(decoder(Ahead)), max_tokens=32)
    assert str(caught.value).count("a query may see keys after its own") == 2

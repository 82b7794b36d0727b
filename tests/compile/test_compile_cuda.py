"""Models compiled for CUDA, on machines without a GPU: what the passes made, what is captured, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import tvm
from llamas import tiny_llama

import tvm_infer
from tvm_infer import errors
from tvm_infer.models.llama import LLAMA_3_8B
from tvm_infer.models.mlc_llama import export_llama
from tvm_infer.relax import export_hf, pipeline

CUDA = {"kind": "cuda", "arch": "sm_90"}


def rounded(model, dtype=torch.bfloat16):
    """Weights alone: rounding the rope's frequencies too would turn late positions by whole degrees."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def llama16():
    model = rounded(tiny_llama())
    model.config.head_dim = 16
    return model


@pytest.fixture(scope="module")
def imported16(llama16):
    return export_hf(llama16)


@pytest.fixture(scope="module")
def prepared(imported16):
    return pipeline.prepare(imported16.mod, max_tokens=64, decode_rows=8, target_kind="cuda")


def test_a_16_bit_model_stays_in_its_type(imported16, llama16):
    """TVM's importer makes every product float32; ours has torch's types, so that attention and products find their kernels."""
    _, reports = pipeline.prepare(imported16.mod, max_tokens=64, decode_rows=8, target_kind="cuda")
    assert {spec.dtype for spec in reports.attention.specs()} == {"bfloat16"}
    assert not reports.matmul.left and len(reports.matmul.dispatched) == 2 * (7 * 2 + 1)


def test_decode_takes_every_row_and_returns_tokens(prepared):
    mod, _ = prepared
    decode, main = mod["decode"], mod["main"]
    names = [str(p.name) for p in decode.params]
    assert names[:3] == ["input_ids", "position_ids", "kv_cache"] and "logit_indices" not in names
    assert "logit_indices" in [str(p.name) for p in main.params]
    logits, tokens = decode.ret_ty.fields
    n = decode.params[0].ty.shape.values[1]
    assert logits.shape.values[1].same_as(n) and tokens.shape.values[1].same_as(n) and str(tokens.dtype) == "int64"


def checks_of(executable):
    """Checks of tensors at each call of the two functions, counted in the virtual machine's code."""
    found, function = {"main": 0, "decode": 0}, ""
    for line in executable.as_text().splitlines():
        if not line.startswith(" "):
            function = line.strip("@:")
        elif function in found:
            found[function] += "vm.builtin.check_tensor_info" in line
    return found


@pytest.mark.needs_nvcc
def test_a_decode_step_is_one_graph(prepared):
    """All kernels and calls of the step, the logits' product and the search for the largest among them, in one region."""
    from tvm_infer.compiler import _cuda_compiler

    mod, reports = prepared
    with _cuda_compiler():
        lowered = pipeline.lower(mod, tvm.target.Target(CUDA), reports)
    assert reports.capture.is_whole("decode"), str(reports.capture)
    (region,) = reports.capture.regions["decode"]
    assert region["tvm_infer.attention_with_kv_cache_rope"] == 2
    # of each layer o and down add the residual, q, k, v, gate and up do not; nor does the head
    assert region["tvm_infer.linear_add"] == 2 * 2 and region["tvm_infer.linear"] == 2 * 5 + 1
    assert "8 of them with the addition that followed" in str(reports.matmul)  # of main and decode
    assert any("argmax" in kernel for kernel in region) and "add" not in region
    text = str(reports)
    assert "main: not captured" in text and "its number of tokens changes" in text and "decode: 1 graph(s) hold" in text
    assert "TVM's kernels start before those ahead have ended" in text
    assert (lowered.decode_function, lowered.logits_dtype, lowered.logits_rank) == ("decode", "bfloat16", 3)
    # a step checks its inputs; the weights, 20 here, were checked when the executable was given them
    assert checks_of(lowered.executable) == {"main": 3, "decode": 4}


@pytest.mark.needs_nvcc
def test_a_norm_is_one_kernel():
    """Two a layer and the last one; written out, each is a sum of squares and what is made of it."""
    from tvm_infer.compiler import _cuda_compiler

    mod = export_hf(rounded(tiny_llama(head_dim=64, hidden_size=192))).mod
    prepared, reports = pipeline.prepare(mod, max_tokens=64, decode_rows=8, target_kind="cuda")
    with _cuda_compiler():
        pipeline.lower(prepared, tvm.target.Target(CUDA), reports)
    (region,) = reports.capture.regions["decode"]
    assert region["rms_norm"] == 2 * 2 + 1
    assert not [name for name in region if "power" in name or "rsqrt" in name or "mean" in name]
    norms = "Norms\n10 RMSNorm(s) to nn.rms_norm, 0 left as written\n    10 x  [.., 192] bfloat16, epsilon 1e-06"
    assert norms in str(reports)


@pytest.mark.needs_nvcc
def test_no_addition_and_no_cast_is_left_of_a_decode_step():
    """Each kernel costs 2 to 3 us. Of a layer two norms, four products, an attention and the activation remain."""
    from tvm_infer.compiler import _cuda_compiler

    # 509 is prime: the search for the largest logit is not cut into parts
    config = dataclasses.replace(LLAMA_3_8B, num_layers=2, vocab_size=509, hidden_size=256, intermediate_size=512)
    mod = export_llama(config, dtype="bfloat16", functions=("main", "create_paged_kv_cache")).mod
    mod, reports = pipeline.prepare(mod, max_tokens=64, decode_rows=8, target_kind="cuda")
    with _cuda_compiler():
        lowered = pipeline.lower(mod, tvm.target.Target(CUDA), reports)
    assert lowered.logits_dtype == "float32"
    (region,) = reports.capture.regions["decode"]
    assert region == {
        "take": 1,
        "rms_norm": 2 * 2 + 1,
        "tvm_infer.linear": 2 * 2 + 1,  # qkv, gate and up; the head, which writes float32
        "tvm_infer.attention_with_kv_cache_fused_qkv": 2,
        "tvm_infer.linear_add": 2 * 2,  # o, down
        "fused_split_silu_multiply": 2,
        "argmax": 1,
    }
    assert reports.capture.is_whole("decode") and sum(region.values()) == 20


def test_head_dims_without_a_kernel_are_refused(llama16):
    with pytest.raises(errors.ExecutorError, match="head_dim 16") as caught:
        tvm_infer.compile(llama16, target="cuda", max_tokens=64)
    assert 'target="llvm"' in str(caught.value)


def test_float32_models_are_refused_before_anything_is_compiled():
    with pytest.raises(errors.ExecutorError, match=r"float32.*bfloat16"):
        tvm_infer.compile(tiny_llama(), target="cuda", max_tokens=64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_batch": 8, "buckets": [1, 4]}, "the largest of them 8"),
        ({"max_batch": 8, "buckets": [0, 8]}, "numbers from 1 to max_batch = 8"),
        ({"dtype": "bfloat16"}, "goes with a GGUF file"),
    ],
)
def test_options_that_are_refused(imported16, options, words):
    with pytest.raises(errors.ArgumentError, match=words):
        tvm_infer.compile(imported16, target="cuda", max_tokens=64, **options)


def test_a_function_called_decode_is_in_the_way(imported16):
    mod = imported16.mod.clone()
    mod["decode"] = mod["main"].with_attr("global_symbol", "decode")
    with pytest.raises(errors.ModelError, match="'decode' already"):
        pipeline.prepare(mod, max_tokens=64, decode_rows=8, target_kind="cuda")


def test_inputs_of_another_type_are_refused():
    """A captured step reads int64 where the cache puts it; on the host inputs are converted."""
    from tvm_infer.compiler import _check_cuda_inputs

    _check_cuda_inputs("main", [("input_ids", "int64"), ("position_ids", "int64")])
    with pytest.raises(errors.ModelError, match=r"takes input_ids int32; inputs of a model for CUDA are int64"):
        _check_cuda_inputs("main", [("input_ids", "int32"), ("position_ids", "int64")])

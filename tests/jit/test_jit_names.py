"""Names of kernels, their parameters, their source."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_infer import errors, jit, variant
from tvm_infer.jit import all_names, parse
from tvm_infer.jit.headers import include_dir, reached

NAMES = all_names()


def test_the_matrix():
    attention = {f"attention_{e}_h{d}" for e, d in itertools.product(("bf16", "fp16"), (64, 80, 96, 128, 192, 256))}
    expected = {f"{a}_p{p}" for a, p in itertools.product(attention, (1, 2, 4, 8, 16, 32, 64))} | {
        f"{a}_ragged" for a in attention
    }
    expected |= {f"attention_{e}_h192_v128_p{p}" for e in ("bf16", "fp16") for p in (1, 2, 4, 8, 16, 32, 64)}
    expected |= {"attention_bf16_h192_v128_ragged", "attention_fp16_h192_v128_ragged", "append_b16_h192_v128"}
    expected |= {"append_b16", "copy_pages", "move_tokens", "read_ceiling", "select_pages"}
    plain, scaled = ("rope_append", "gemv", "page_bounds", "page_scores"), ("append", "rope_append", "page_bounds")
    expected |= {f"{name}_{e}" for name, e in itertools.product(plain, ("bf16", "fp16"))}
    expected |= {f"{name}_{e}_{kv}" for name, e, kv in itertools.product(scaled, ("bf16", "fp16"), ("e4m3", "e5m2"))}
    expected |= {
        f"attention_{e}_{kv}_h{d}_p{p}"
        for e, kv, d, p in itertools.product(
            ("bf16", "fp16"), ("e4m3", "e5m2"), (64, 80, 96, 128, 192, 256), (16, 32, 64)
        )
    }
    expected |= {f"merge_states_{e}" for e in ("bf16", "fp16", "fp32")}
    expected |= {"scale_lse"}
    assert set(NAMES) == expected and len(NAMES) == len(expected)


@given(st.sampled_from(NAMES))
def test_a_name_comes_back(name):
    spec = parse(name)
    assert spec.name == name and parse(spec.name) == spec
    assert re.fullmatch(r"[a-z][a-z0-9_]*", name)  # a C symbol


@pytest.mark.parametrize("name", NAMES)
def test_source_is_short_and_names_the_kernel(name):
    include, call = parse(name).source().splitlines()
    assert include.startswith('#include "tvm_infer/kernels/')
    assert re.fullmatch(rf"TVM_INFER_\w+\({name}(, [\w:]+)*\);", call)
    header = re.search(r'"(.+)"', include)[1]
    macro = call.partition("(")[0]
    assert (include_dir() / header).is_file()
    assert f"#define {macro}(".encode() in reached(include, include_dir())[header]


@given(st.text(max_size=30).filter(lambda t: t not in NAMES))
def test_what_is_no_name_is_refused(text):
    with pytest.raises(errors.ArgumentError, match="which is no kernel"):
        parse(text)


def test_the_refusal_lists_what_there_is():
    with pytest.raises(errors.ArgumentError) as error:
        parse("attention_bf16_h128_p15")
    assert "did you mean 'attention_bf16_h128_p1" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


def test_variants_that_change_rows_are_for_some_widths():
    standard = variant.STANDARD["rope"]
    jit.register_variant(standard.digest, standard.source())
    with pytest.raises(errors.ExecutorError, match=r"changes queries, and the call has head_dim 96.*64, 128, 256"):
        parse(f"attention_bf16_h96_p16_v{standard.digest}").source()
    with pytest.raises(
        errors.ExecutorError, match=r"changes keys, and the call has head_dim 256.*for head_dim 64, 128\."
    ):
        parse(f"attention_bf16_h256_p16_v{standard.digest}").source()
    with pytest.raises(errors.ExecutorError, match=r"changes queries, and the call has keys of 8 bits.*logits, mask"):
        parse(f"attention_bf16_e4m3_h128_p16_v{standard.digest}").source()
    capped = variant.STANDARD["soft_cap"]
    jit.register_variant(capped.digest, capped.source())
    assert "E5m2, 64, 64, 32, variant_" in parse(f"attention_bf16_e5m2_h64_p32_v{capped.digest}").source()
    assert "96" in parse(f"attention_bf16_h96_p16_v{capped.digest}").source()

"""A variant is a value: it prints, compares, stores, pickles and does not change; its digest names the generated code."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from tvm_infer import variant
from tvm_infer.errors import VariantError


def soft_cap(name="soft_cap", parameter="cap", scale=1.0):
    return eval(
        f"variant.Variant(name, logits=lambda value, {parameter}: scale * {parameter} * variant.tanh(value / {parameter}), "
        f"{parameter}=variant.scalar())",
        {"variant": variant, "name": name, "scale": scale},
    )


def test_it_prints_a_line_per_hole():
    assert str(variant.alibi & variant.attention_sink) == (
        "alibi & attention_sink(slopes: per_head(float32), sink: per_head(float32))\n"
        "  logits = value + slopes[qo_head] * (kv_pos - q_pos)\n"
        "  mask = kv_pos <= q_pos\n"
        "  output = value * sigmoid(lse - sink[qo_head])"
    )
    assert repr(variant.alibi) == "<Variant alibi>"
    assert str(variant.tree_mask).splitlines()[1:] == [
        "  mask = (t1 < 0) | (bits[t2 >> 3] >> (t2 & 7) & 1 != 0), where",
        "    t0 = kv_len - q_len",
        "    t1 = kv_pos - t0",
        "    t2 = first_bit[batch] + (q_pos - t0) * q_len + maximum(t1, 0)",
    ]


def test_it_does_not_change():
    with pytest.raises(AttributeError, match="make another"):
        variant.causal.name = "x"
    with pytest.raises(AttributeError, match="stays"):
        del variant.causal.name
    with pytest.raises(TypeError):
        variant.soft_cap.parameters["cap"] = variant.per_head()


def test_equality_is_by_meaning():
    assert soft_cap() == soft_cap("another")
    assert hash(soft_cap()) == hash(soft_cap("another"))
    assert soft_cap() != soft_cap(parameter="c")  # bind would take another name
    assert soft_cap() != soft_cap(scale=2.0)
    assert soft_cap(scale=0.0) != soft_cap(scale=-0.0)
    assert soft_cap() != 3
    assert len({soft_cap(), soft_cap("another"), soft_cap(scale=2.0)}) == 2


def test_the_digest_is_that_of_the_code_alone():
    assert soft_cap().digest == soft_cap("another", "c").digest
    assert soft_cap().digest != soft_cap(scale=2.0).digest
    # bands are the planner's: the kernels do not know them
    assert variant.causal.digest == variant.full.digest == variant.sliding_window.digest
    assert variant.chunked_local.digest != variant.causal.digest
    halves = variant.Variant("v", logits=lambda value, s: value * s, s=variant.per_head("float16"))
    floats = variant.Variant("v", logits=lambda value, s: value * s, s=variant.per_head())
    assert halves.digest != floats.digest
    assert len(halves.digest) == 16 and f"struct variant_{halves.digest} : " in halves.source()


@pytest.mark.parametrize("name", variant.STANDARD)
def test_stored_and_pickled_it_is_the_same(name):
    v = variant.STANDARD[name]
    for again in (variant.Variant.from_json(v.to_json()), pickle.loads(pickle.dumps(v))):
        assert (again, again.name, again.digest, again.bands) == (v, v.name, v.digest, v.bands)
        assert str(again) == str(v) and again.to_json() == v.to_json()


def test_zeros_of_both_signs_are_kept():
    v = variant.Variant("v", logits=lambda value: variant.where(value > 1, 0.0, -0.0))
    assert str(v).endswith("where(value > 1.0, 0.0, -0.0)") and variant.Variant.from_json(v.to_json()) == v


def test_infinity_is_stored():
    v = variant.Variant("v", logits=lambda value: variant.where(value > 1, -float("inf"), value))
    assert variant.Variant.from_json(v.to_json()) == v
    assert "huge_val" in variant.Variant.from_json(v.to_json()).source()


def test_the_stored_form_and_the_digest_are_the_same_in_another_process():
    code = "from tvm_infer import variant; print(variant.soft_cap.to_json(), variant.tree_mask.digest)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [variant.soft_cap.to_json(), variant.tree_mask.digest]


def test_declaring_one_does_not_load_tvm_before_a_function_is_traced():
    code = "import sys; from tvm_infer import variant; variant.scalar(), variant.Variant; print('tvm' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


class TestCombine:
    def test_logits_are_composed_in_order(self):
        a = variant.Variant("a", logits=lambda value, x: value + x, x=variant.scalar())
        b = variant.Variant("b", logits=lambda value, y: value * y, y=variant.scalar())
        assert str(a & b) == "a & b(x: scalar(float32), y: scalar(float32))\n  logits = (value + x) * y"
        assert str(variant.combine(b, a)).endswith("logits = value * y + x")

    def test_masks_are_and_ed_and_each_condition_is_there_once(self):
        v = variant.soft_cap & variant.sliding_window
        assert str(v).endswith("mask = (kv_pos <= q_pos) & (q_pos - kv_pos <= window)")
        assert v.digest == variant.soft_cap.digest
        assert v.bind(cap=30, window=5).band == variant.Band(5, 0)

    def test_masks_keep_their_order(self):
        first = variant.Variant("first", mask=lambda batch, q_pos: (batch > 1) & (batch > 2) & (q_pos > 3))
        then = variant.Variant("then", mask=lambda batch, kv_pos: (kv_pos > 4) & (batch > 2))
        assert str(first & then).endswith("mask = (batch > 1) & (batch > 2) & (q_pos > 3) & (kv_pos > 4)")

    def test_outputs_are_composed(self):
        half = variant.Variant("half", output=lambda value, lse: value / 2)
        assert str(half & variant.attention_sink).endswith("output = value / 2.0 * sigmoid(lse - sink[qo_head])")

    def test_full_changes_nothing(self):
        assert variant.full & variant.alibi == variant.alibi == variant.alibi & variant.full
        assert variant.full & variant.full == variant.full

    def test_a_parameter_that_both_declare_alike_is_one(self):
        assert list((variant.soft_cap & variant.soft_cap).parameters) == ["cap"]

    def test_a_parameter_that_is_declared_differently_is_refused(self):
        other = variant.Variant("other", logits=lambda value, cap: value * cap, cap=variant.per_head())
        with pytest.raises(VariantError, match=r"`cap`, scalar\(float32\) and per_head\(float32\)"):
            variant.soft_cap & other

    def test_only_variants_combine(self):
        with pytest.raises(TypeError):
            variant.soft_cap & 3

    def test_a_parameter_that_no_longer_matters_drops_out(self):
        constant = variant.Variant("constant", logits=lambda: 0.0)
        assert dict((variant.soft_cap & constant).parameters) == {}


def test_the_tir_is_the_expression():
    tir = variant.soft_cap.tir("logits")
    assert str(tir.ty) == "float32" and "tanh" in str(tir)
    assert variant.soft_cap.tir("output") is None
    assert str(tir).replace(" ", "") == "cap*T.tanh(value/cap)"


def test_numpy_numbers_are_constants():
    v = variant.Variant("v", logits=lambda value: value * np.float64(0.1))
    assert v.logits.nodes[1].value == float(np.float32(0.1))

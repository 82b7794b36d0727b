"""What functions of a variant may do, and what they are told where they do something else."""

from __future__ import annotations

import inspect
import json
import math
import re

import numpy as np
import pytest

from tvm_infer import errors, variant
from tvm_infer.errors import VariantError
from tvm_infer.variant import text


def logits(function, **parameters):
    return text.expression(variant.Variant("v", logits=function, **parameters).logits)


def mask(function, **parameters):
    return text.expression(variant.Variant("v", mask=function, **parameters).mask)


def this_line(offset=0):
    return inspect.currentframe().f_back.f_lineno + offset


@pytest.mark.parametrize(
    ("function", "printed"),
    [
        (lambda value: value + 1, "value + 1.0"),
        (lambda value: 2 * value - 0.1, "2.0 * value - 0.1"),
        (lambda value: 1 - (2 - value), "1.0 - (2.0 - value)"),
        (lambda value: (1 - value) - 2, "1.0 - value - 2.0"),
        (lambda value: -value, "-value"),
        (lambda value: (-value) ** 3, "-value * -value * -value"),
        (lambda value: value**-1, "1.0 / value"),
        (lambda value: value**0.5, "sqrt(value)"),
        (lambda value: value**0, "1.0"),
        (lambda value: abs(+value), "abs(value)"),
        (lambda value: np.float32(0.5) * value, "0.5 * value"),
        (lambda value: value / np.int64(4), "value / 4.0"),
        (lambda value, q_pos: value + q_pos, "value + q_pos"),
        (lambda value, q_pos, q_len: q_pos / q_len, "q_pos / q_len"),
        (lambda value, q_pos: q_pos + 1, "to_float(q_pos + 1)"),
        (lambda value, q_pos: 7, "7.0"),
        (lambda value, q_pos: value * (q_pos // 2 % 5), "value * (q_pos // 2 % 5)"),
        (lambda value, q_pos: variant.exp(q_pos), "exp(to_float(q_pos))"),
        (lambda value, q_pos: value * (5 // q_pos + 7 % q_pos), "value * (5 // q_pos + 7 % q_pos)"),
        (lambda value, q_pos: value * ((q_pos << 2 | 1) ^ ~q_pos & 7), "value * ((q_pos << 2 | 1) ^ ~q_pos & 7)"),
        (lambda value, q_pos: value * (1 << q_pos) + (9 >> q_pos), "value * (1 << q_pos) + (9 >> q_pos)"),
        (lambda value, q_pos: variant.cast(value, "int32") * 1.5, "to_int(value) * 1.5"),
        (lambda value, q_pos: value * variant.to_float(q_pos > 3), "value * to_float(q_pos > 3)"),
        (lambda value: variant.where(value > 0, value, 0), "where(value > 0.0, value, 0.0)"),
        (lambda value: variant.where(value > 0, -math.inf, 0), "where(value > 0.0, -inf, 0.0)"),
        (lambda value, q_pos: abs(q_pos - 3) * value, "maximum(q_pos - 3, -(q_pos - 3)) * value"),
        (
            lambda value: variant.minimum(value, 3) + variant.maximum(2, value),
            "minimum(value, 3.0) + maximum(2.0, value)",
        ),
        (lambda value, k=3: value * k, "value * 3.0"),
    ],
)
def test_expressions_print_as_python(function, printed):
    assert logits(function) == printed
    names = inspect.signature(function).parameters
    scope = {
        name: getattr(variant, name) for name in ("exp", "sqrt", "where", "minimum", "maximum", "to_int", "to_float")
    }
    again = eval(f"lambda {', '.join(n for n in names if n != 'k')}: {printed}", {"inf": math.inf, **scope})
    assert logits(again) == printed


@pytest.mark.parametrize(
    ("function", "printed"),
    [
        (lambda q_pos, kv_pos: ~(q_pos < kv_pos), "~(q_pos < kv_pos)"),
        (lambda q_pos, kv_pos: (q_pos > 3) & (kv_pos != 2) | (kv_pos == q_pos), "(q_pos > 3) & (kv_pos != 2) | (kv_pos == q_pos)"),
        (lambda q_pos, kv_pos: (q_pos > 3) ^ (kv_pos >= 2), "(q_pos > 3) != (kv_pos >= 2)"),
        (lambda q_pos, kv_pos: q_pos / 2 <= kv_pos, "q_pos / 2.0 <= kv_pos"),
        (lambda: True, "True"),
    ],
)  # fmt: skip
def test_conditions_print_as_python(function, printed):
    assert mask(function) == printed


def test_tables_are_read():
    assert logits(lambda value, s: value * s, s=variant.per_head("bfloat16")) == "value * s[qo_head]"
    assert logits(lambda value, s: value * s, s=variant.per_request("uint8")) == "value * s[batch]"
    assert mask(lambda s: s, s=variant.per_request("bool")) == "s[batch]"
    whole = logits(lambda value, s: value + variant.to_int(s) % 2, s=variant.per_head())
    assert whole == "value + to_int(s[qo_head]) % 2"
    assert logits(lambda value, s: s, s=variant.per_head("int32")) == "to_float(s[qo_head])"
    assert mask(lambda q_pos, t: t[q_pos, 3] > 0, t=variant.tensor(2, "float16")) == "t[q_pos, 3] > 0.0"


def test_shared_values_are_traced_once_and_printed_once():
    def doubled(value):
        for _ in range(60):
            value = value * value
        return value

    v = variant.Variant("v", logits=doubled)
    assert len(v.logits.nodes) == 61
    assert str(v).count("\n") <= 62
    deep = variant.Variant("v", logits=lambda value: sum((value * i for i in range(3000)), value))
    assert len(deep.logits.nodes) > 6000 and "2999" in deep.source()


def branch(value):
    return 1.0 if value > 0 else value


def chained(value, q_pos):
    return variant.where(0 <= q_pos < 5, value, 0)


WRONG = [
    (branch, 1, "variant.where"),
    (chained, 1, "chained comparisons"),
    (lambda value: math.tanh(value), 0, "variant.tanh"),
    (lambda value: np.tanh(value), 0, "numpy.tanh.*variant.tanh"),
    (lambda value: np.abs(value), 0, "variant.abs"),
    (lambda value: np.where(value > 0, value, 0.0), 0, "variant.where"),
    (lambda value: np.zeros(3) * value, 0, "numpy array.*variant.tensor"),
    (lambda value: value * np.zeros(3), 0, "ndarray.*variant.tensor"),
    (lambda value: value * "x", 0, "a str beside"),
    (lambda value, q_pos: [1, 2][q_pos], 0, "variant.to_int"),
    (lambda value, q_pos: list(q_pos), 0, "iterated"),
    (lambda value, q_pos: value[q_pos], 0, "cannot be indexed"),
    (lambda value, q_pos: 3 in value, 0, "`in`"),
    (lambda value, q_pos: q_pos // 0, 0, "at least 1"),
    (lambda value, q_pos: q_pos % -2, 0, "at least 1"),
    (lambda value, q_pos: value // 2, 0, "variant.to_int"),
    (lambda value, q_pos: value + (q_pos > 3), 0, "variant.where"),
    (lambda value, q_pos: value & 1, 0, "int32"),
    (lambda value, q_pos: q_pos << 1.5, 0, "int32"),
    (lambda value, q_pos: variant.where(q_pos, 1, 2), 0, "a comparison"),
    (lambda value, q_pos: value**q_pos, 0, "whole number"),
    (lambda value, q_pos: value**0.3, 0, "whole number"),
    (lambda value, q_pos: value ** "2", 0, "whole number"),
    (lambda value, q_pos: 2**value, 0, "variant.exp2"),
    (lambda value, q_pos: q_pos + 2**31, 0, "no int32"),
    (lambda value, q_pos: value + 1e39, 0, "no float32"),
    (lambda value, q_pos: value + math.nan, 0, "no float32"),
    (lambda value, q_pos: variant.cast(value, "int8"), 0, "float32 or int32"),
    (lambda value: None, 0, "returns None"),
    (lambda value: value > 0, 0, "returns a bool"),
    (lambda values: values, 0, "asks for `values`; there are value, batch.*no parameter is declared"),
    (lambda value, lse: lse, 0, "asks for `lse`"),
    (lambda *args: 1, 0, "must name"),
]


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_what_cannot_be_traced_is_told_with_its_line(index):
    function, offset, message = WRONG[index]
    line = function.__code__.co_firstlineno + offset
    with pytest.raises(VariantError, match=rf"^{re.escape(__file__)}:{line}: (?s:.*){message}"):
        variant.Variant("v", logits=function)


def test_torch_functions_are_refused():
    torch = pytest.importorskip("torch")
    for function in (lambda value: torch.tanh(value), lambda value: value * torch.ones(3)):
        with pytest.raises(VariantError, match=r"variant\.tensor"):
            variant.Variant("v", logits=function)


def test_tables_must_be_indexed_as_declared():
    for function, message in (
        (lambda value, t: value + t, r"t\[…, …\]"),
        (lambda value, t: value + t[0], "rank 2"),
        (lambda value, t: value + t[0, :], "rank 2"),
        (lambda value, t: value + t[0, value], "float32: indices are int32"),
        (lambda value, t: value + sum(t), "iterated"),
    ):
        with pytest.raises(VariantError, match=message):
            variant.Variant("v", logits=function, t=variant.tensor(2))


def test_other_holes_have_other_variables_and_results():
    with pytest.raises(VariantError, match="asks for `value`"):
        variant.Variant("v", mask=lambda value: value > 0)
    with pytest.raises(VariantError, match=r"returns a int32; it must return a bool \(a comparison\)"):
        variant.Variant("v", mask=lambda q_pos: q_pos)
    with pytest.raises(VariantError, match="asks for `kv_pos`"):
        variant.Variant("v", output=lambda value, kv_pos: value)
    with pytest.raises(VariantError, match="must be a function"):
        variant.Variant("v", mask=True)
    assert issubclass(VariantError, errors.ArgumentError)


def test_a_mistake_of_the_users_own_keeps_its_own_error():
    with pytest.raises(NameError, match="cosh"):
        variant.Variant("v", logits=lambda value: cosh(value))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variant.scalar("float16"), "float32, int32"),
        (lambda: variant.per_head("float64"), "float64"),
        (lambda: variant.tensor(5), "1 to 4"),
        (lambda: variant.tensor(True), "1 to 4"),
        (lambda: variant.Variant("v", logits=lambda value, a: value * a, a=3.0), "variant.scalar"),
        (lambda: variant.Variant("v", logits=lambda value: value, a=variant.scalar()), "no expression reads the parameter `a`"),
        (lambda: variant.Variant("v", mask=lambda q_pos: q_pos > 0, q_pos=variant.scalar()), "cannot be called `q_pos`"),
        (lambda: variant.Variant("v", **{"a b": variant.scalar()}), "cannot be called"),
        (lambda: variant.Variant("", logits=lambda value: value), "name"),
        (lambda: variant.Variant("v", **{f"s{i}": variant.scalar() for i in range(17)}), "17 scalars"),
        (lambda: variant.Variant("v", **{f"s{i}": variant.per_head() for i in range(9)}), "9 tables"),
        (lambda: variant.Variant.from_json("{}"), "to_json"),
        (lambda: variant.Variant.from_json("nonsense"), "to_json"),
    ],
)  # fmt: skip
def test_declarations_are_checked(make, message):
    with pytest.raises(VariantError, match=message):
        make()


def test_a_wrong_declaration_is_told_with_its_line():
    with pytest.raises(VariantError, match=rf"^{re.escape(__file__)}:{this_line(1)}: "):
        variant.tensor(9)


def test_a_parameter_may_be_called_name_or_self():
    v = variant.Variant(
        "v", logits=lambda value, name, self: value * name + self, **dict.fromkeys(("name", "self"), variant.scalar())
    )
    assert v.bind(name=1, self=0).scalars == [0x3F800000, 0]


def test_forged_json_is_refused():
    """Stored code is compiled: nothing may get into it that tracing would not have put there."""
    good = json.loads(variant.soft_cap.to_json())
    assert variant.Variant.from_json(json.dumps(good)) == variant.soft_cap
    for node in (
        ["name", "float32", [], "lse"],
        ["name", "float32", [], "system()"],
        ["name", "int32", [], "cap"],
        ["const", "float32", [], "1; }"],
        ["load", "float32", [], "cap"],
        ["shell", "float32", [], "cap"],
        ["tanh", "float32", [7]],
        ["tanh", "int32", [0]],
        ["add", "float32", [0]],
        ["name", ["float32"], [], {}],
    ):
        with pytest.raises(VariantError):
            forged = json.dumps({**good, "holes": {"logits": [*good["holes"]["logits"][:2], node]}})
            variant.Variant.from_json(forged)
    with pytest.raises(VariantError, match="format 3"):
        variant.Variant.from_json(json.dumps({**good, "format": 3}))
    old = {name: x for name, x in good.items() if name != "settings"}
    assert variant.Variant.from_json(json.dumps({**old, "format": 1})) == variant.soft_cap
    for settings in ({"softmax": True}, {"softmax": 0, "interleaved": False, "rotary_dim": 8}, {"shell": True}, 7):
        with pytest.raises(VariantError):
            variant.Variant.from_json(json.dumps({**good, "settings": settings}))

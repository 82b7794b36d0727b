"""Values of parameters: what is taken, without a copy, and what is refused."""

from __future__ import annotations

import struct

import ml_dtypes
import numpy as np
import pytest

from tvm_infer import variant
from tvm_infer.errors import DTypeError, VariantError


@pytest.fixture(scope="module")
def mixed():
    return variant.Variant(
        "mixed",
        logits=lambda value, a, n, slopes, bias, q_pos, kv_pos: value * a + n + slopes + bias[q_pos, kv_pos],
        mask=lambda flag: flag,
        a=variant.scalar(),
        slopes=variant.per_head("bfloat16"),
        n=variant.scalar("int32"),
        flag=variant.per_request("bool"),
        bias=variant.tensor(2, "float16"),
    )


def values(**other):
    good = {
        "a": 1.5,
        "n": -3,
        "slopes": np.zeros(4, ml_dtypes.bfloat16),
        "flag": np.ones(2, bool),
        "bias": np.zeros((8, 9), np.float16),
    }
    return {**good, **other}


def address(x):
    return np.asarray(x).__array_interface__["data"][0]


def test_values_are_in_the_order_of_declaration(mixed):
    given = values()
    bound = mixed.bind(**given)
    assert bound.variant is mixed and bound.band == variant.Band()
    assert bound.scalars == [struct.unpack("I", struct.pack("f", 1.5))[0], 2**32 - 3]
    slopes, flag, bias = bound.tables
    assert str(slopes.dtype) == "bfloat16" and flag.dtype == np.uint8 and bias is given["bias"]
    assert address(flag) == address(given["flag"])


def test_numbers_of_numpy_are_numbers(mixed):
    bound = mixed.bind(**values(a=np.float64(2), n=np.int16(7)))
    assert bound.scalars == [0x40000000, 7]
    assert mixed.bind(**values(a=3, n=2**31 - 1)).scalars == [0x40400000, 2**31 - 1]


def test_torch_and_tvm_tensors_are_taken(mixed):
    torch = pytest.importorskip("torch")
    import tvm

    bias = tvm.runtime.tensor(np.zeros((3, 4), np.float16))
    flag = torch.ones(2, dtype=torch.bool)
    slopes = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    bound = mixed.bind(**values(bias=bias, flag=flag, slopes=slopes))
    assert bound.tables[0].data_ptr() == slopes.data_ptr() and not bound.tables[0].requires_grad
    assert bound.tables[1].data_ptr() == flag.data_ptr() and bound.tables[1].dtype == torch.uint8
    assert bound.tables[2] is bias


def test_read_only_and_strided_arrays_are_taken_as_they_are(mixed):
    bias = np.zeros((8, 9), np.float16).T
    bias.flags.writeable = False
    table = mixed.bind(**values(bias=bias)).tables[2]
    assert address(table) == address(bias) and np.asarray(table).strides == bias.strides


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        ({"a": None}, VariantError, r"mixed: parameter `a` is None; it is scalar\(float32\)"),
        ({"a": "3"}, VariantError, "must be a number"),
        ({"a": True}, VariantError, "must be a number"),
        ({"a": np.zeros(1)}, VariantError, "must be a number"),
        ({"a": float("nan")}, VariantError, "no float32"),
        ({"a": 1e39}, VariantError, "no float32"),
        ({"a": 10**400}, VariantError, "no float32"),
        ({"n": 1.0}, VariantError, "whole number"),
        ({"n": 2**31}, VariantError, "whole number"),
        ({"slopes": 3.0}, VariantError, r"`slopes` is a float; it is per_head\(bfloat16\)"),
        ({"slopes": [1.0, 2.0]}, VariantError, "`slopes` is a list"),
        ({"slopes": np.zeros(4, np.float32)}, DTypeError, r"is float32; it is per_head\(bfloat16\)"),
        ({"slopes": np.zeros((4, 1), ml_dtypes.bfloat16)}, VariantError, r"shape \(4, 1\)"),
        ({"flag": np.zeros(4, np.int32)}, DTypeError, "bool or uint8"),
        ({"bias": np.zeros((2, 2))}, DTypeError, "is float64"),
        ({"bias": np.zeros(2, np.float16)}, VariantError, "rank 2"),
        ({"other": 1}, VariantError, "no parameter `other`; it has a: scalar"),
    ],
)
def test_wrong_values_are_refused(mixed, other, error, message):
    with pytest.raises(error, match=message):
        mixed.bind(**values(**other))


def test_missing_values_are_named(mixed):
    given = values()
    del given["slopes"]
    with pytest.raises(VariantError, match=r"needs a value for `slopes` \(per_head\(bfloat16\)\)"):
        mixed.bind(**given)


def test_a_scalar_that_divides_is_at_least_one():
    v = variant.Variant("v", mask=lambda q_pos, n: q_pos % n == 0, n=variant.scalar("int32"))
    assert v.bind(n=1).scalars == [1]
    for n in (0, -4):
        with pytest.raises(VariantError, match=f"`n` is {n}; it divides"):
            v.bind(n=n)


def test_tables_lie_on_one_device(mixed):
    class Elsewhere:
        """A CUDA tensor, as far as binding looks at it."""

        shape, dtype = (2,), "uint8"

        def __dlpack__(self):
            raise NotImplementedError

        def __dlpack_device__(self):
            return 2, 1

    with pytest.raises(VariantError, match=r"`flag` is on cuda:1, `slopes` is on cpu"):
        mixed.bind(**values(flag=Elsewhere()))


def test_shapes_are_checked_where_the_call_is_known(mixed):
    bound = mixed.bind(**values())
    bound.check_shapes(num_qo_heads=4, num_requests=2, head_dim=8)
    with pytest.raises(VariantError, match=r"`slopes` has 4 elements; .* num_qo_heads 8"):
        bound.check_shapes(num_qo_heads=8, num_requests=2, head_dim=8)
    with pytest.raises(VariantError, match=r"`flag` has 2 elements; .* num_requests 3"):
        bound.check_shapes(num_qo_heads=4, num_requests=3, head_dim=8)


def test_tables_of_channels_and_pairs_fit_the_head():
    table = np.ones(32, np.float32)
    norm = variant.qk_norm.bind(q_weight=table, k_weight=table, eps=1e-6)
    norm.check_shapes(4, 2, head_dim=32)
    with pytest.raises(VariantError, match=r"`q_weight` has 32 elements; .* per_channel.* head_dim 64"):
        norm.check_shapes(4, 2, head_dim=64)
    turn = variant.rotary(64).bind(inv_freq=table, magnitude=1.0)
    turn.check_shapes(4, 2, head_dim=128)
    with pytest.raises(VariantError, match=r"64 channels turn, and the call has head_dim 48"):
        turn.check_shapes(4, 2, head_dim=48)
    whole = variant.rope.bind(inv_freq=table, magnitude=1.0)
    whole.check_shapes(4, 2, head_dim=64)
    with pytest.raises(VariantError, match=r"`inv_freq` has 32 elements; .* rotary_dim / 2 64"):
        whole.check_shapes(4, 2, head_dim=128)
    with pytest.raises(VariantError, match="multiple of 16"):
        whole.check_shapes(4, 2, head_dim=24)


def test_a_variant_without_parameters_needs_no_bind(mixed):
    assert variant.as_bound(variant.causal).band == variant.Band(window_right=0)
    assert variant.as_bound(variant.causal) is variant.as_bound(variant.causal)
    bound = mixed.bind(**values())
    assert variant.as_bound(bound) is bound
    with pytest.raises(VariantError, match=r"mixed is not bound: call `\.bind\(a=…, slopes=…"):
        variant.as_bound(mixed)
    with pytest.raises(VariantError, match="argument `variant` is a str"):
        variant.as_bound("causal")

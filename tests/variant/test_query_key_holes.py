"""Functions of queries and keys, rotations, softmax off: what is refused and how, how they combine, what is stored."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import tvm_infer
from tvm_infer import variant
from tvm_infer.errors import VariantError
from tvm_infer.testing import make_paged_batch


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variant.Variant("v", query=lambda value, kv_pos: value), "`query` asks for `kv_pos`"),
        (lambda: variant.Variant("v", key=lambda value, q_pos: value), "`key` asks for `q_pos`"),
        (
            lambda: variant.Variant("v", key=lambda value, s: value * s, s=variant.per_head()),
            r"`s`, which is per_head\(float32\), an element for each `qo_head`; `key` has none.*variant.tensor",
        ),
        (lambda: variant.Variant("v", rope_position=lambda pos: pos // 2), "need a `rope_rate`"),
        (lambda: variant.Variant("v", logits=lambda value: value, interleaved=True), "need a `rope_rate`"),
        (lambda: variant.rotary(24), "`rotary_dim` is 24; it must be a multiple of 16"),
        (lambda: variant.rotary(-16), "`rotary_dim` is -16"),
        (lambda: variant.Variant("v", rope_rate=lambda pair: pair > 3), "returns a bool; it must return a float32"),
        (
            lambda: variant.Variant("v", rope_rate=lambda pair: 1.0 * pair, rope_position=lambda pos: pos * 0.5),
            "returns a float32; it must return a int32",
        ),
        (lambda: variant.rope & variant.rope_interleaved, "rope and rope_interleaved both have a `rope_rate`"),
        (lambda: variant.rope & variant.qk_norm, "takes `mean_square`.*the other way round"),
        (
            lambda: variant.Variant("v", softmax=False, output=lambda value, lse: value * lse),
            "without softmax there is none",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(VariantError, match=message):
        make()


def test_combined():
    both = variant.qk_norm & variant.rotary(32, interleaved=True) & variant.sliding_window
    assert set(both.holes) == {"mask", "query", "key", "rope_rate"} and both.rotates
    assert (both.settings.interleaved, both.settings.rotary_dim, both.settings.softmax) == (True, 32, True)
    again = variant.sliding_window & both
    assert again.settings == both.settings and again.holes.keys() == both.holes.keys()
    assert not (variant.sigmoid_attention & variant.rope).settings.softmax


@pytest.mark.parametrize("name", ["rope", "rope_interleaved", "streaming", "qk_norm", "sigmoid_attention"])
def test_stored_and_read_back(name):
    v = variant.STANDARD[name]
    again = pickle.loads(pickle.dumps(v))
    assert again == v and again.settings == v.settings and again.digest == v.digest and str(again) == str(v)
    assert not v.is_plain


def test_settings_are_part_of_a_variant():
    half, neighbours = variant.rotary(), variant.rotary(interleaved=True)
    assert half != neighbours and half.digest != neighbours.digest
    assert "interleaved = True" in str(neighbours) and "interleaved" not in str(half)


def test_softmax_off_without_logits_is_linear_attention():
    """The weights are sm_scale q . k: the generated code says so itself."""
    v = variant.Variant("linear", softmax=False)
    assert "kHasSoftmax = false" in v.source() and "static float Logits" in v.source()
    assert not v.is_plain and v.bind().band == (-1, -1, 0, 0)


def test_tables_are_given_in_their_type():
    with pytest.raises(Exception, match=r"`inv_freq` is float64; it is per_pair\(float32\)"):
        variant.rope.bind(inv_freq=np.ones(64), magnitude=1.0)


def test_rotation_by_other_positions():
    """Request 0 by its own positions, request 1 by three times its own: as by frequencies three times as high."""
    stretched = variant.rotary(position=lambda pos, stretch: pos * stretch, stretch=variant.per_request("int32"))
    assert list(stretched.parameters) == ["stretch", "inv_freq", "magnitude"] and stretched != variant.STANDARD["rope"]
    batch = make_paged_batch([3, 5], [20, 33], num_qo_heads=4, num_kv_heads=2, head_dim=32, page_size=4)
    inv_freq = (1e4 ** -(np.arange(16) / 16)).astype(np.float32)
    bounds = [
        stretched.bind(stretch=np.array([1, 3], np.int32), inv_freq=inv_freq, magnitude=1.0),
        *(variant.STANDARD["rope"].bind(inv_freq=x, magnitude=1.0) for x in (inv_freq, 3 * inv_freq)),
    ]
    plan = tvm_infer.plan(batch.qo_indptr, batch.kv_len, num_qo_heads=4, num_kv_heads=2, head_dim=32, variant=bounds[0])
    own, plain, fast = (
        tvm_infer.attention(
            batch.q, batch.kv_cache, plan, variant=bound,
            kv_page_indptr=batch.kv_page_indptr, kv_page_indices=batch.kv_page_indices,
        )
        for bound in bounds
    )  # fmt: skip
    np.testing.assert_allclose(own, np.concatenate([plain[:3], fast[3:]]), atol=2e-6)
    assert np.abs(plain[3:] - fast[3:]).max() > 1e-2

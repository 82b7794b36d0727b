"""Rotary embedding before the first matmul: lifted into the attention call where it is proven, left in the model with a reason else."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import nn
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_infer.errors import ArgumentError
from tvm_infer.relax import RewritePagedAttention, from_torch
from tvm_infer.relax.nodes import bindings_of, op_name, shape_of, static_int

n = TypeVar("n")
HEADS, KV_HEADS, DIM, WIDTH = 4, 2, 8, 24
INV_FREQ = torch.tensor([0.9, 0.35, 0.11, 0.02])
OTHER_FREQ = torch.tensor([0.8, 0.35, 0.11, 0.02])

# ---- before and expected


@I.ir_module
class Before:
    """Half-split pairs in [heads, tokens, head_dim], as Llama has them; a factor of 2 on cosine and sine."""

    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        q: R.Tensor((1, n, 2, 4), "float32"),
        k: R.Tensor((1, n, 2, 4), "float32"),
        v: R.Tensor((1, n, 2, 4), "float32"),
    ) -> R.Tensor((1, n, 2, 4), "float32"):
        with R.dataflow():
            p = R.astype(R.expand_dims(position_ids, [2]), "float32")
            angle = R.multiply(p, R.const([0.5, 0.125], "float32"))
            both = R.concat((angle, angle), axis=-1)
            cos = R.expand_dims(R.multiply(R.cos(both), R.const(2.0, "float32")), [1])
            sin = R.expand_dims(R.multiply(R.sin(both), R.const(2.0, "float32")), [1])
            q_t = R.permute_dims(q, [0, 2, 1, 3])
            q_low = R.strided_slice(q_t, [3], [0], [2], [1])
            q_high = R.negative(R.strided_slice(q_t, [3], [2], [4], [1]))
            q_r = R.add(R.multiply(q_t, cos), R.multiply(R.concat((q_high, q_low), axis=-1), sin))
            k_t = R.permute_dims(k, [0, 2, 1, 3])
            k_low = R.strided_slice(k_t, [3], [0], [2], [1])
            k_high = R.negative(R.strided_slice(k_t, [3], [2], [4], [1]))
            k_r = R.add(R.multiply(k_t, cos), R.multiply(R.concat((k_high, k_low), axis=-1), sin))
            o = R.nn.attention(
                R.permute_dims(q_r, [0, 2, 1, 3]), R.permute_dims(k_r, [0, 2, 1, 3]), v, causal_mask="TopLeft"
            )
            R.output(o)
        return o


@I.ir_module
class Expected:
    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        position_ids: R.Tensor((1, n), "int64"),
        q: R.Tensor((1, n, 2, 4), "float32"),
        k: R.Tensor((1, n, 2, 4), "float32"),
        v: R.Tensor((1, n, 2, 4), "float32"),
        kv_cache: R.Any,
    ) -> R.Tensor((1, n, 2, 4), "float32"):
        with R.dataflow():
            q0 = R.reshape(q, R.shape([n, 2, 4]))
            k0 = R.reshape(k, R.shape([n, 2, 4]))
            v0 = R.reshape(v, R.shape([n, 2, 4]))
            turned = R.call_dps_packed(
                "tvm_infer.attention_with_kv_cache_rope",
                (
                    kv_cache,
                    R.prim_value(0),
                    q0,
                    k0,
                    v0,
                    R.const([0.5, 0.125], "float32"),
                    R.prim_value(0),
                    R.prim_value(2.0),
                    R.prim_value(0.5),
                    R.prim_value(1),
                ),
                out_ty=[R.Tensor((n, 2, 4), "float32"), R.Tensor((n, 2, 4), "float32")],
            )
            attention0: R.Tensor((n, 2, 4), "float32") = turned[1]
            o = R.reshape(attention0, R.shape([1, n, 2, 4]))
            R.output(o)
        return o


def test_before_and_expected():
    """Cosines, sines and both transposes are gone; the call takes the projections."""
    rewrite = RewritePagedAttention()
    tvm.ir.assert_structural_equal(rewrite(Before), Expected, map_free_vars=True)
    report = str(rewrite.report)
    assert (
        "rope of layer 0: lifted: half-split pairs of the first 4 elements, 0.5 to 0.125 radians a token, times 2"
        in report
    )
    assert "assumed: layer 0: `position_ids` counts the tokens of a sequence: 0, 1, 2, …" in report


def test_not_asked_for():
    rewrite = RewritePagedAttention(lift_rope=False)
    mod = rewrite(Before)
    assert calls(mod)[0][0] == "tvm_infer.attention_with_kv_cache" and has_trigonometry(mod)
    assert "rope of layer 0: not looked for" in str(rewrite.report) and "assumed" not in str(rewrite.report)
    with pytest.raises(ArgumentError, match="target_kind is 'rocm'"):
        RewritePagedAttention(target_kind="rocm")


def test_kernels_for_cuda_turn_multiples_of_16():
    rewrite = RewritePagedAttention(target_kind="cuda")
    assert has_trigonometry(rewrite(Before))
    text = "rope of layer 0: left in the model: 4 of 4 elements turn, and kernels of the target take multiples of 16"
    assert text in str(rewrite.report)


# ---- blocks in plain torch


def half_split(x, position_ids):
    """Llama's: x cos + rotate_half(x) sin, angles by a matmul."""
    angle = (INV_FREQ[None, :, None] @ position_ids[:, None].float()).transpose(1, 2)
    cos, sin = (torch.cat([turn] * 2, -1)[:, None] for turn in (angle.cos(), angle.sin()))
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def halves_apart(x, position_ids):
    """GPT-OSS's: each half by itself, with cosines of half a head."""
    angle = position_ids[0, :, None] * INV_FREQ
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos() * 1.25, angle.sin() * 1.25
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def interleaved(x, position_ids):
    """GPT-J's: rotate_every_two, cosines repeated."""
    angle = position_ids[0, :, None].float() * INV_FREQ
    cos, sin = (turn.repeat_interleave(2, -1) for turn in (angle.cos(), angle.sin()))
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin


def interleaved_pairs(x, position_ids):
    """Llama's own: pairs as the last axis."""
    angle = position_ids[0, :, None].float() * INV_FREQ
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


def partial(x, position_ids):
    """GPT-NeoX's and Phi's: half of a head turns."""
    angle = position_ids[0, :, None].float() * INV_FREQ[:2]
    cos, sin = (torch.cat([turn] * 2, -1) for turn in (angle.cos(), angle.sin()))
    turning, rest = x[..., :4], x[..., 4:]
    return torch.cat([turning * cos + torch.cat([-turning[..., 2:], turning[..., :2]], -1) * sin, rest], -1)


def partial_interleaved(x, position_ids):
    angle = position_ids[0, :, None].float() * INV_FREQ[:1]
    a, b = x[..., 0:1], x[..., 1:2]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[..., 2:]], -1)


def by_row(x, position_ids):
    """Positions counted in the function, frequencies computed there."""
    inv_freq = 1.0 / (100.0 ** (torch.arange(0, DIM, 2).float() / DIM))
    angle = torch.outer(torch.arange(x.shape[2]).float(), inv_freq)
    cos, sin = (torch.cat([turn] * 2, -1) for turn in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def scaled_positions(x, position_ids):
    """Position interpolation, and a turn the other way."""
    angle = -(position_ids[0, :, None].float() / 4.0) * INV_FREQ
    cos, sin = (torch.cat([turn] * 2, -1) for turn in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def scaled_before(x, position_ids):
    """A factor on x, which goes to the scale of the scores (0.5 twice)."""
    return half_split(x * 0.5, position_ids)


def normed(x, position_ids):
    """QK-norm first, as in Qwen 3: what is turned is the norm's result."""
    return half_split(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), position_ids)


class Block(nn.Module):
    """Attention with rotary embedding `turn` of q, and `turn_k` of k."""

    def __init__(self, turn, turn_k=None):
        super().__init__()
        torch.manual_seed(7)
        self.turns = (turn, turn_k or turn)
        self.embedding = nn.Embedding(11, WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=True)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, input_ids, position_ids):
        x = self.qkv(self.embedding(input_ids)) * 3
        sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        q, k, v = (part.view(1, -1, part.shape[-1] // DIM, DIM).transpose(1, 2) for part in x.split(sizes, -1))
        q, k = (turn(part, position_ids) for turn, part in zip(self.turns, (q, k), strict=True))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(o.transpose(1, 2).reshape(1, -1, HEADS * DIM))


def imported(block, **options):
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None])
    length = torch.export.Dim("n", min=2, max=64)
    shapes = {"input_ids": {1: length}, "position_ids": {1: length}}
    with torch.no_grad():
        return from_torch(torch.export.export(block.eval(), example, dynamic_shapes=shapes), **options)


def calls(mod):
    """(name, arguments) of the packed calls."""
    found = []
    for binding in bindings_of(mod["main"]):
        if op_name(binding.value) == "relax.call_dps_packed":
            found.append((str(binding.value.args[0].global_symbol), list(binding.value.args[1].fields)))
    return found


def has_trigonometry(mod) -> bool:
    return any(op_name(binding.value) in ("relax.cos", "relax.sin") for binding in bindings_of(mod["main"]))


def check_steps(compiled, block) -> None:
    """Prefill of two sequences, a mixture, one token alone: rows are what torch computes of each sequence by itself."""
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 11, 40).tolist() for _ in range(2)]
    done = [0, 0]
    for counts in ([6, 3], [1, 20], [1, 1], [9, 0], [1, 0]):
        ids = [token for seq, count in enumerate(counts) for token in texts[seq][done[seq] : done[seq] + count]]
        positions = [p for seq, count in enumerate(counts) for p in range(done[seq], done[seq] + count)]
        done = [before + count for before, count in zip(done, counts, strict=True)]
        lengths = [(seq, count) for seq, count in enumerate(counts) if count]
        rows = compiled(lengths, np.array([ids]), np.array([positions]))[0]
        expected = []
        for seq, count in lengths:
            with torch.no_grad():
                whole = block(torch.tensor([texts[seq][: done[seq]]]), torch.arange(done[seq])[None])[0]
            expected.append(whole[len(whole) - count :].numpy())
        expected = np.concatenate(expected)
        assert np.linalg.norm(rows - expected) <= 2e-6 * np.linalg.norm(expected)


LIFTED = {
    half_split: (INV_FREQ, False, 1.0, 1.0),
    halves_apart: (INV_FREQ, False, 1.25, 1.0),
    interleaved: (INV_FREQ, True, 1.0, 1.0),
    interleaved_pairs: (INV_FREQ, True, 1.0, 1.0),
    partial: (INV_FREQ[:2], False, 1.0, 1.0),
    partial_interleaved: (INV_FREQ[:1], False, 1.0, 1.0),  # of one pair, both orders are the same
    by_row: (100.0 ** -(torch.arange(0, 8, 2) / 8), False, 1.0, 1.0),
    scaled_positions: (-INV_FREQ / 4, False, 1.0, 1.0),
    scaled_before: (INV_FREQ, False, 0.5, 1.0),
    normed: (INV_FREQ, False, 1.0, 1.0),
}


@pytest.mark.parametrize("keep_attention", [True, False], ids=["kept", "decomposed"])
@pytest.mark.parametrize("turn", LIFTED, ids=lambda turn: turn.__name__)
def test_blocks_are_lifted(compile_with_fake_cache, turn, keep_attention):
    inv_freq, is_interleaved, magnitude, factor = LIFTED[turn]
    block = Block(turn)
    model = imported(block, keep_attention=keep_attention)
    rewrite = RewritePagedAttention()
    mod = rewrite(model.mod)
    assert not has_trigonometry(mod), str(rewrite.report)
    ((_, arguments),) = calls(mod)
    np.testing.assert_allclose(arguments[5].value.numpy(), inv_freq, rtol=1e-7)
    assert arguments[5].value.numpy().dtype == np.float32
    assert [float(argument.value) for argument in arguments[6:8]] == [is_interleaved, magnitude]
    assert math.isclose(float(arguments[8].value), factor / math.sqrt(DIM), rel_tol=1e-6)
    assert "rope of layer 0: lifted" in str(rewrite.report)
    counted = "`position_ids` counts the tokens" in str(rewrite.report)
    assert counted == (turn is not by_row) and "numbers the packed row" not in str(rewrite.report)
    check_steps(compile_with_fake_cache(RewritePagedAttention(), model), block)


def test_factors_of_q_alone_go_to_the_scale(compile_with_fake_cache):
    block = Block(lambda x, p: half_split(x * 0.5, p) * 3.0, half_split)
    ((_, arguments),) = calls(RewritePagedAttention()(imported(block).mod))
    assert float(arguments[7].value) == 1.0 and math.isclose(float(arguments[8].value), 1.5 / DIM**0.5, rel_tol=1e-6)
    check_steps(compile_with_fake_cache(RewritePagedAttention(), imported(block)), block)


def test_16_bit_heads_that_are_turned_in_float32():
    """Cosines in float32, and back: what is turned is what has the type of the attention."""
    block = Block(lambda x, p: half_split(x.float(), p).to(torch.bfloat16)).to(torch.bfloat16)
    rewrite = RewritePagedAttention()
    mod = rewrite(imported(block).mod)
    assert not has_trigonometry(mod), str(rewrite.report)
    ((_, arguments),) = calls(mod)
    assert {str(argument.ty.dtype) for argument in arguments[2:5]} == {"bfloat16"}
    np.testing.assert_array_equal(arguments[5].value.numpy(), INV_FREQ)


def test_angles_by_a_matmul():
    """TVM's own import leaves the product of positions and frequencies one of matrices."""
    from tvm.relax.frontend.torch import from_exported_program

    length = torch.export.Dim("n", min=2, max=64)
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None])
    shapes = {"input_ids": {1: length}, "position_ids": {1: length}}
    with torch.no_grad():
        program = torch.export.export(Block(half_split).eval(), example, dynamic_shapes=shapes)
    before = from_exported_program(program, keep_params_as_input=True)
    products = [shape_of(b.value.args[1]) for b in bindings_of(before["main"]) if op_name(b.value) == "relax.matmul"]
    assert any(static_int(shape[-2]) == 1 for shape in products)
    mod = RewritePagedAttention()(before)
    ((_, arguments),) = calls(mod)
    np.testing.assert_array_equal(arguments[5].value.numpy(), INV_FREQ)
    assert not has_trigonometry(mod)


# ---- what is left in the model


def other_frequencies(x, position_ids):
    return half_split_of(x, position_ids[0].float()[:, None] * OTHER_FREQ)


def half_split_of(x, angle, cos_factor=1.0, signs=(-1, 1)):
    cos, sin = (torch.cat([turn] * 2, -1) for turn in (angle.cos() * cos_factor, angle.sin()))
    return x * cos + torch.cat([signs[0] * x[..., 4:], signs[1] * x[..., :4]], -1) * sin


def unchanged(x, position_ids):
    return x


def next_position(x, position_ids):
    return half_split_of(x, (position_ids[0] + 1).float()[:, None] * INV_FREQ)


def data_dependent(x, position_ids):
    """Angles that follow what the token is."""
    rate = x[0, 0, :, :1].sigmoid()
    return half_split_of(x, position_ids[0].float()[:, None] * rate * INV_FREQ)


def by_position(x, position_ids):
    """Frequencies that follow the position (as those of dynamic NTK follow the length)."""
    base = 100.0 + position_ids[0].float()[:, None]
    return half_split_of(x, position_ids[0].float()[:, None] * base ** -(torch.arange(4) / 4.0))


def by_heads(x, position_ids):
    """Every head at frequencies of its own."""
    rates = INV_FREQ / torch.arange(1, 1 + x.shape[1])[:, None]
    return half_split_of(x, position_ids[0].float()[:, None] * rates[:, None])


TURNS = torch.arange(64)[:, None] * torch.cat([INV_FREQ, INV_FREQ])
TABLES = TURNS.cos(), TURNS.sin()


def from_a_table(x, position_ids):
    cos, sin = (table[position_ids[0]] for table in TABLES)
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def rounded_angles(x, position_ids):
    return half_split_of(x, (position_ids[0].to(torch.bfloat16)[:, None] * INV_FREQ.to(torch.bfloat16)).float())


def rounded_heads(x, position_ids):
    """To 8 bits: no rounding of a model's type."""
    return half_split(x, position_ids).to(torch.int8).float()


def last_elements(x, position_ids):
    angle = position_ids[0].float()[:, None] * INV_FREQ[:2]
    cos, sin = (torch.cat([turn] * 2, -1) for turn in (angle.cos(), angle.sin()))
    rest, turning = x[..., :4], x[..., 4:]
    return torch.cat([rest, turning * cos + torch.cat([-turning[..., 2:], turning[..., :2]], -1) * sin], -1)


def mirrored(x, position_ids):
    """No rotation: both elements of a pair get plus the sine."""
    return half_split_of(x, position_ids[0].float()[:, None] * INV_FREQ, signs=(1, 1))


def stretched(x, position_ids):
    return half_split_of(x, position_ids[0].float()[:, None] * INV_FREQ, cos_factor=1.5)


def shifted(x, position_ids):
    return half_split(x, position_ids) + 0.25


def louder_when_partial(x, position_ids):
    angle = position_ids[0].float()[:, None] * INV_FREQ[:2]
    cos, sin = (torch.cat([turn] * 2, -1) * 2 for turn in (angle.cos(), angle.sin()))
    return torch.cat([x[..., :4] * cos + torch.cat([-x[..., 2:4], x[..., :2]], -1) * sin, x[..., 4:]], -1)


LEFT = [
    (
        half_split,
        other_frequencies,
        "q and k are turned differently: q has half-split pairs of the first 8 elements, 0.9 to",
    ),
    (half_split, interleaved, "q and k are turned differently"),
    (half_split, unchanged, "q alone is turned"),
    (unchanged, half_split, "k alone is turned"),
    (next_position, None, "of q: its angles are not a constant times the token's position"),
    (data_dependent, None, "of q: "),
    (half_split, data_dependent, "of k: "),
    (by_position, None, "of q: its angles depend on "),
    (by_heads, None, "of q: it depends on h, which is not the position along the head"),
    (from_a_table, None, "of q: its cosines, sines or angles come from a table by position"),
    (rounded_angles, None, "of q: it is rounded to bfloat16"),
    (rounded_heads, None, "of q: it is rounded to int8"),
    (last_elements, None, "of q: elements 4, 7 of a head turn, and others between or before them do not"),
    (mirrored, None, "of q: its pairs do not turn: signs differ"),
    (stretched, None, "of q: cosines and sines have different factors"),
    (shifted, None, "of q: something else than x is added to it"),
    (louder_when_partial, partial, "factors on what turns differ, 2 of q and 1 of k"),
]


@pytest.mark.parametrize(("turn", "turn_k", "why"), LEFT, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_not_proven_stays_in_the_model(turn, turn_k, why):
    rewrite = RewritePagedAttention()
    mod = rewrite(imported(Block(turn, turn_k)).mod)
    assert f"rope of layer 0: left in the model: {why}" in str(rewrite.report)
    assert [name for name, _ in calls(mod)] == ["tvm_infer.attention_with_kv_cache"]
    assert has_trigonometry(mod) == (turn is not from_a_table)


@pytest.mark.parametrize(("turn", "turn_k"), [(half_split, other_frequencies), (next_position, None), (mirrored, None)])
def test_what_stays_in_the_model_is_right(compile_with_fake_cache, turn, turn_k):
    block = Block(turn, turn_k)
    check_steps(compile_with_fake_cache(RewritePagedAttention(), imported(block)), block)


def test_positions_of_another_input():
    """Only position_ids is known to count the tokens."""

    class Shifted(Block):
        def forward(self, input_ids, position_ids, rope_positions):
            return super().forward(input_ids, rope_positions)

    length = torch.export.Dim("n", min=2, max=64)
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.arange(5)[None], torch.arange(5)[None])
    shapes = {name: {1: length} for name in ("input_ids", "position_ids", "rope_positions")}
    with torch.no_grad():
        program = torch.export.export(Shifted(half_split).eval(), example, dynamic_shapes=shapes)
    rewrite = RewritePagedAttention()
    assert has_trigonometry(rewrite(from_torch(program).mod))
    why = "its angles depend on `rope_positions`, which is neither a constant nor the token's position (position_ids)"
    assert f"rope of layer 0: left in the model: of q: {why}" in str(rewrite.report)


def test_no_rotary_embedding():
    rewrite = RewritePagedAttention()
    mod = rewrite(imported(Block(unchanged)).mod)
    assert [name for name, _ in calls(mod)] == ["tvm_infer.attention_with_kv_cache"]
    assert "rope of layer 0: none before the first matmul" in str(rewrite.report)


def test_frequencies_that_are_equal_are_one_constant():
    """Of two layers; a third has its own, as Gemma 3's local and global layers do."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(half_split), Block(half_split), Block(other_frequencies)])

        def forward(self, input_ids, position_ids):
            return sum(block(input_ids, position_ids) for block in self.blocks)

    rewrite = RewritePagedAttention()
    first, second, third = (arguments[5] for _, arguments in calls(rewrite(imported(Layers()).mod)))
    assert isinstance(first, tvm.ir.GenericConst) and first.same_as(second) and not first.same_as(third)
    np.testing.assert_array_equal(third.value.numpy(), OTHER_FREQ)
    report = str(rewrite.report)
    assert "rope of layers 0, 1: lifted" in report and "rope of layer 2: lifted" in report
    assert "assumed: layers 0, 1, 2: `position_ids` counts" in report

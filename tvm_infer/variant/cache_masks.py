"""Variants that the cache of TVM's builtins needs (docs/mlc.md): masks with an entry for each request of a step, and the rotation of
queries and keys by where they stand under such a mask. The most common ones are compiled into the library."""

from __future__ import annotations

from .expression import Expr
from .functions import maximum, where
from .parameters import per_request, scalar, tensor
from .standard import _bit, rotary
from .table import Table
from .variant import Variant


def _tree(q_pos: Expr, kv_pos: Expr, q_len: Expr, kv_len: Expr, bits: Table, first_bit: Expr, width: Expr) -> Expr:
    node = kv_pos - (kv_len - width)  # the index in bits must be good for keys of the context too
    row = q_pos - (kv_len - q_len)
    return (kv_pos <= q_pos) & ((node < 0) | _bit(bits, first_bit + row * width + maximum(node, 0)))


# As `tree_mask`, of trees that several steps made: all see the keys before the last `width`, and of those what request r's bit matrix
# [q_len, width] says.
token_tree = Variant(
    "token_tree", mask=_tree, bits=tensor(1, "uint8"), first_bit=per_request("int32"), width=scalar("int32")
)

# Request r's first sink[r] keys and those from first[r] on; causal.
kept_keys = Variant(
    "kept_keys",
    mask=lambda q_pos, kv_pos, sink, first: ((kv_pos < sink) | (kv_pos >= first)) & (kv_pos <= q_pos),
    sink=per_request("int32"),
    first=per_request("int32"),
)


def _depth(pos: Expr, batch: Expr, kv_len: Expr, places: Table, width: Expr) -> Expr:
    """Of request r's last `width` tokens number i stands places[r * width + i] behind those before: of nodes their depth counts."""
    before = kv_len - width
    return where(pos < before, pos, before + places[batch * width + maximum(pos - before, 0)])


def _of_tree(rotary_dim: int | None, interleaved: bool) -> Variant:
    """`token_tree`, turned by depths. Tables: bits, first_bit, places, inv_freq; scalars: width, magnitude."""
    declared = {"places": tensor(1, "int32"), "width": scalar("int32")}
    return token_tree & rotary(rotary_dim, interleaved, position=_depth, **declared)


def _of_window(rotary_dim: int | None, interleaved: bool) -> Variant:
    """`kept_keys`, turned by places among the keys kept. Tables: sink, first, inv_freq; scalar: magnitude."""
    return kept_keys & rotary(
        rotary_dim,
        interleaved,
        position=lambda pos, sink, first: where(pos < sink, pos, pos - (first - sink)),
        sink=per_request("int32"),
        first=per_request("int32"),
    )


_MASKS = {v.name: v for v in (token_tree, kept_keys)}
_TURNED_MASKS = {"token_tree": _of_tree, "kept_keys": _of_window}


def turned(mask: str, rotary_dim: int | None, interleaved: bool) -> Variant:
    """The rotation (standard.rotary) under a mask, "token_tree" or "kept_keys", or "" for none; its parameters after the mask's."""
    if mask:
        return _TURNED_MASKS[mask](rotary_dim, interleaved)
    return rotary(rotary_dim, interleaved)


token_tree_rope, kept_keys_rope = (turned(name, None, False) for name in _TURNED_MASKS)

# What the library has compiled.
CACHE_MASKS = _MASKS | {"token_tree_rope": token_tree_rope, "kept_keys_rope": kept_keys_rope}


def cache_variant(mask: str, rotary_dim: int | None, interleaved: bool, *, turns: bool) -> Variant:
    """What a layer of the cache computes in a step: a mask ("" for none), and where `turns` the rotation."""
    return turned(mask, rotary_dim, interleaved) if turns else _MASKS[mask]

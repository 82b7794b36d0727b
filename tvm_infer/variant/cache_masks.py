"""Masks that the cache of TVM's builtins needs (docs/mlc.md), with an entry for each request of a step; compiled into the library."""

from __future__ import annotations

from .expression import Expr
from .functions import maximum
from .parameters import per_request, scalar, tensor
from .standard import _bit
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

CACHE_MASKS = {v.name: v for v in (token_tree, kept_keys)}

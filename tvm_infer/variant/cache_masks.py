"""Masks that the cache of TVM's builtins needs (docs/mlc.md), with an entry for each request of a step; compiled into the library."""

from __future__ import annotations

from .expression import Expr
from .functions import maximum
from .parameters import per_request, tensor
from .standard import _bit
from .table import Table
from .variant import Variant


def _tree(q_pos: Expr, kv_pos: Expr, kv_len: Expr, bits: Table, first_bit: Expr, tree_size: Expr) -> Expr:
    context = kv_len - tree_size
    node = kv_pos - context  # the index in bits must be good for keys of the context too
    return (kv_pos <= q_pos) & ((node < 0) | _bit(bits, first_bit + (q_pos - context) * tree_size + maximum(node, 0)))


# As `tree_mask`, of trees that several steps made: request r's last tree_size[r] keys are nodes, the call's queries the last of them.
token_tree = Variant(
    "token_tree", mask=_tree, bits=tensor(1, "uint8"), first_bit=per_request("int32"), tree_size=per_request("int32")
)

# Request r's first sink[r] keys and those from first[r] on; causal.
kept_keys = Variant(
    "kept_keys",
    mask=lambda q_pos, kv_pos, sink, first: ((kv_pos < sink) | (kv_pos >= first)) & (kv_pos <= q_pos),
    sink=per_request("int32"),
    first=per_request("int32"),
)

CACHE_MASKS = {v.name: v for v in (token_tree, kept_keys)}

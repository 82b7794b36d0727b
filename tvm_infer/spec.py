"""The one description of an attention that every stage shares: matched by the pass, planned for, executed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention computes, without lengths or pointers.

    Attributes
    ----------
    num_qo_heads, num_kv_heads : query and KV heads; the first is a multiple of the second (grouped-query attention).
    head_dim : width of a head, of queries, keys and values alike.
    dtype : "float32", "float16" or "bfloat16".
    causal : a query at position p sees keys at positions <= p; otherwise it sees all keys.
    sm_scale : factor on q·k before softmax.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = True
    sm_scale: float = 0.0

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_qo_heads // self.num_kv_heads

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return (
            f"attention({self.num_qo_heads}/{self.num_kv_heads} heads, head_dim {self.head_dim}, {self.dtype}, "
            f"{mask}, sm_scale {self.sm_scale:.6g})"
        )

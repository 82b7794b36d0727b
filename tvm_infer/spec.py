"""The one description of an attention that every stage shares: matched by the pass, planned for, executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .variant.layer import LayerVariant


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention computes, without lengths or pointers.

    Attributes
    ----------
    num_qo_heads, num_kv_heads : query and KV heads; the first is a multiple of the second (grouped-query attention).
    head_dim : width of a head, of queries and keys and, but for `head_dim_vo`, of values.
    dtype : "float32", "float16" or "bfloat16".
    causal : a query at position p sees keys at positions <= p; otherwise it sees all keys.
    sm_scale : factor on q·k before softmax.
    variant : what it computes besides (soft cap, window, biases, sinks, …), and of which weights; None for nothing.
    head_dim_vo : width of values and of the output where they are narrower than queries and keys; 0 for head_dim.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = True
    sm_scale: float = 0.0
    variant: LayerVariant | None = None
    head_dim_vo: int = 0

    @property
    def width_vo(self) -> int:
        """Width of values and of the output."""
        return self.head_dim_vo or self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_qo_heads // self.num_kv_heads

    def with_weight_names(self, names: Mapping[str, str]) -> AttentionSpec:
        """The same, with the weights of its variant called as `names` says."""
        return self if self.variant is None else replace(self, variant=self.variant.renamed(names))

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        variant = "" if self.variant is None else ", with a variant"
        width = f"{self.head_dim} / {self.head_dim_vo}" if self.head_dim_vo else f"{self.head_dim}"
        return (
            f"attention({self.num_qo_heads}/{self.num_kv_heads} heads, head_dim {width}, {self.dtype}, "
            f"{mask}, sm_scale {self.sm_scale:.6g}{variant})"
        )

"""The band of a mask: which keys a plan leaves out, by position. plan.h's MaskBand."""

from __future__ import annotations

from typing import NamedTuple


class Band(NamedTuple):
    """Keys that a query at position p sees: those at j <= p + window_right that are among the first num_sink, or at
    j >= p - window_left and in the same chunk (p // chunk == j // chunk).

    window_left, window_right : -1 for all keys; causal is window_right 0. num_sink, chunk : 0 for none.
    """

    window_left: int = -1
    window_right: int = -1
    num_sink: int = 0
    chunk: int = 0

    @property
    def causal(self) -> bool:
        """No key after a query's own position is seen."""
        return self.window_right == 0

    def __str__(self) -> str:
        right = f"causal={self.causal}" if self.window_right <= 0 else f"window_right={self.window_right}"
        parts = [right, f"window_left={self.window_left}"]
        parts += [f"{name}={value}" for name, value in (("num_sink", self.num_sink), ("chunk", self.chunk)) if value]
        return ", ".join(parts)

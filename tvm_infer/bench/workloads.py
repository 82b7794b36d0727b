"""What a benchmark computes: lengths, heads, dtype, page layout. suites.py names workloads, shapes.py makes them of flags."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
KV_SCALE = 2.0**-5  # N(0, 1) within 14; a power of two, so that 16 bits hold what 8 stand for


@dataclass(frozen=True)
class Workload:
    """One batch: query and key lengths of its requests, heads, head_dim, page_size, dtype. Causal.

    kv_layout : "HND" or "NHD", of the pages. ragged : keys without pages. plan_only : the planner is measured, not the attention.
    variant : a name of variants.py, "" for plain attention. window : keys before its own that a query sees, -1 for all. chunk :
    positions a chunk, outside of which it sees none, 0 for no chunks. num_sink : first keys that it sees besides. (Those two have
    their variants.)
    kv_dtype : of keys and values, where it is another than dtype; of 8 bits, times KV_SCALE.
    prefix : first keys that all requests share, in whole pages; 0 for none. flat : not said to the plan: each request reads its own.
    streaming : of decodes whose keys fill their pages, (first keys, last keys), whole pages and at most all, that every other
    KV head reads, from the first one on; the others read all. (0, 0) for none such.
    head_dim_vo : of values and outputs, where they are narrower than queries and keys; 0 for head_dim.
    selected : of decodes, (pages of a list, first pages, last pages) of a page selection, which is part of what is measured; its scores
    read bounds of every page. (0, 0, 0) for none.
    """

    name: str
    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    dtype: str = "float32"
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    kv_layout: str = "HND"
    ragged: bool = False
    plan_only: bool = False
    variant: str = ""
    window: int = -1
    num_sink: int = 0
    chunk: int = 0
    prefix: int = 0
    flat: bool = False
    kv_dtype: str = ""
    streaming: tuple[int, int] = (0, 0)
    head_dim_vo: int = 0
    selected: tuple[int, int, int] = (0, 0, 0)

    @property
    def width_vo(self) -> int:
        """head_dim of values and outputs."""
        return self.head_dim_vo or self.head_dim

    @property
    def list_lens(self) -> list[Any]:
        """`kv_len` of tvm_infer.plan: of each request, or of each request and KV head."""
        if self.selected[0]:
            left_out = [max(0, -(-n // self.page_size) - self.selected[0]) for n in self.kv_lens]
            kept = [n - pages * self.page_size for n, pages in zip(self.kv_lens, left_out, strict=True)]
            return [[n] * self.num_kv_heads for n in kept]
        if not sum(self.streaming):
            return list(self.kv_lens)
        few = sum(self.streaming)
        return [[n if head % 2 else few for head in range(self.num_kv_heads)] for n in self.kv_lens]

    @property
    def has_lists(self) -> bool:
        """Whether KV heads have lists of keys of their own."""
        return sum(self.streaming) > 0 or self.selected[0] > 0

    @property
    def bounds_bytes(self) -> int:
        """Bytes of the bounds of all pages, which a selection reads."""
        if not self.selected[0]:
            return 0
        pages = sum(-(-n // self.page_size) for n in self.kv_lens)
        return pages * 2 * self.num_kv_heads * self.head_dim * self.element_bytes

    def streams(self, key: Any, kv_len: int) -> Any:
        """Whether a streaming head reads a key; for tensors."""
        first, last = self.streaming
        return (key < first) | (key >= kv_len - last)

    @property
    def levels(self) -> list[list[tuple[range, int]]]:
        """`levels` of tvm_infer.plan."""
        return [[(range(len(self.kv_lens)), self.prefix)]] if self.prefix and not self.flat else []

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of q and o."""
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_element_bytes(self) -> int:
        """Bytes of one element of k and v in memory."""
        return 1 if self.kv_dtype else self.element_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, and of bounds of pages, that every query together must read once."""
        keys = sum(m - self._hidden_from_all(n, m) for n, m in zip(self.qo_lens, self.kv_lens, strict=True))
        keys -= self.prefix * (len(self.kv_lens) - 1)
        keys_of_heads = sum(map(sum, self.list_lens)) if self.has_lists else keys * self.num_kv_heads
        return keys_of_heads * (self.head_dim + self.width_vo) * self.kv_element_bytes + self.bounds_bytes

    @property
    def bytes_moved(self) -> int:
        """Bytes that any executor must move: keys and values once, q once, o once."""
        rows = sum(self.qo_lens) * self.num_qo_heads
        return self.kv_bytes + rows * (self.head_dim + self.width_vo) * self.element_bytes

    @property
    def visible_pairs(self) -> int:
        """(query token, key) pairs of the causal mask, window, sinks and chunks; other masks hide keys that count nevertheless."""
        pairs = 0
        for n, m in zip(self.qo_lens, self.kv_lens, strict=True):
            if self.window < 0 and not self.chunk:
                pairs += n * m - n * (n - 1) // 2
            else:
                pairs += sum(p + 1 - self._hidden_from(p) for p in range(m - n, m))
        return pairs

    def sees(self, position: Any, key: Any) -> Any:
        """Whether the query at a position sees a key, by the causal mask, window, sinks and chunks; for tensors, broadcast."""
        near = position >= key
        if self.window >= 0:
            near = near & (position - key <= self.window)
        if self.chunk:
            near = near & (position // self.chunk == key // self.chunk)
        return near | ((key < self.num_sink) & (position >= key)) if self.num_sink else near

    def _hidden_from(self, position: int) -> int:
        """Keys before its own that a query does not see: those between the sinks and its window or chunk."""
        begin = max(0, position - self.window) if self.window >= 0 else 0
        if self.chunk:
            begin = max(begin, position // self.chunk * self.chunk)
        return begin - min(begin, self.num_sink)

    def _hidden_from_all(self, n: int, m: int) -> int:
        """Keys of a request that no query sees."""
        return self._hidden_from(m - n) if n else m

    @property
    def flops(self) -> int:
        """Multiply-adds, counted as two, of q·k and p·v over visible keys (causal)."""
        width = self.head_dim + self.width_vo
        if self.has_lists:  # decodes
            return 2 * sum(map(sum, self.list_lens)) * (self.num_qo_heads // self.num_kv_heads) * width
        return 2 * self.visible_pairs * self.num_qo_heads * width

    def with_dtype(self, dtype: str) -> Workload:
        """The same batch in another data type."""
        return replace(self, dtype=dtype)


def decode(batch: int, kv_len: int, **kwargs: object) -> Workload:
    """`batch` requests with one new token each."""
    return Workload(f"decode b{batch} kv{kv_len}", (1,) * batch, (kv_len,) * batch, **kwargs)  # type: ignore[arg-type]


def prefill(batch: int, qo_len: int, **kwargs: object) -> Workload:
    """`batch` requests without history."""
    return Workload(f"prefill {batch}x{qo_len}", (qo_len,) * batch, (qo_len,) * batch, **kwargs)  # type: ignore[arg-type]

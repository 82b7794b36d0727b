"""Named attention workloads: lengths, heads, dtype. Shapes by flag go through the same class."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ArgumentError


@dataclass(frozen=True)
class Workload:
    """One batch: query and key lengths of its requests, heads, head_dim, page_size, dtype. Causal."""

    name: str
    qo_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    dtype: str = "float32"
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that every query together must read once."""
        size = 4 if self.dtype == "float32" else 2
        return 2 * sum(self.kv_lens) * self.num_kv_heads * self.head_dim * size

    @property
    def flops(self) -> int:
        """Multiply-adds, counted as two, of q·k and p·v over visible keys (causal)."""
        pairs = sum(n * m - n * (n - 1) // 2 for n, m in zip(self.qo_lens, self.kv_lens, strict=True))
        return 4 * pairs * self.num_qo_heads * self.head_dim

    def with_dtype(self, dtype: str) -> Workload:
        """The same batch in another data type."""
        return replace(self, dtype=dtype)


def decode(batch: int, kv_len: int, **kwargs: object) -> Workload:
    """`batch` requests with one new token each."""
    return Workload(f"decode b{batch} kv{kv_len}", (1,) * batch, (kv_len,) * batch, **kwargs)  # type: ignore[arg-type]


def prefill(batch: int, qo_len: int, **kwargs: object) -> Workload:
    """`batch` requests without history."""
    return Workload(f"prefill {batch}x{qo_len}", (qo_len,) * batch, (qo_len,) * batch, **kwargs)  # type: ignore[arg-type]


SUITES: dict[str, tuple[Workload, ...]] = {
    "cpu": (
        decode(8, 4096),
        decode(8, 4096, dtype="bfloat16"),
        decode(8, 4096, dtype="float16"),
        decode(1, 8192),
        prefill(1, 2048),
        prefill(1, 2048, dtype="bfloat16"),
        Workload("prefill 1x2048 h32/32", (2048,), (2048,), num_kv_heads=32),
        Workload("append 1x256 on 2048", (256,), (2304,)),
        Workload("mixed 1x512 + 15x1 kv1024", (512,) + (1,) * 15, (512,) + (1024,) * 15),
        Workload("decode skew 1x8192 + 7x256", (1,) * 8, (8192,) + (256,) * 7),
    ),
}


def select(suite: str, names: tuple[str, ...] = (), dtypes: tuple[str, ...] = ()) -> list[Workload]:
    """Workloads of a suite, restricted to `names`, each in every one of `dtypes` (default: its own)."""
    if suite not in SUITES:
        raise ArgumentError(f"argument `suite` is {suite!r}; it must be one of {', '.join(SUITES)}")
    chosen = [w for w in SUITES[suite] if not names or w.name in names]
    missing = set(names) - {w.name for w in chosen}
    if missing:
        raise ArgumentError(
            f"argument `workload` is {sorted(missing)[0]!r}; suite {suite!r} has: {', '.join(w.name for w in SUITES[suite])}"
        )
    if dtypes:
        chosen = list(dict.fromkeys(w.with_dtype(d) for w in chosen for d in dtypes))
    return chosen

"""Batches for the CUDA kernels: small ones that try to hurt, and the benchmark's. Plain data: no tvm_infer, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

# Tile table of attention_sm90.cuh (rows, kv_granule, fixed, row, kv; picoseconds): decode class, prefill class. Measured on an H200. A
# key costs the decode class 15.2 ns when every SM decodes, less beside prefill: 13.5 balances both.
SM90_TILES = ((16, 128, 600_000, 10_000, 13_500), (128, 128, 3_600_000, 0, 14_000))
RAGGED = 0  # in place of a page size: K and V are rows [kv_tokens, num_kv_heads, head_dim], a request's in a run


@dataclass(frozen=True)
class Case:
    """One batch. Causal unless said; `window` keys before the query's own are visible, -1 for all. page RAGGED: no pages."""

    name: str
    qo: tuple[int, ...]
    kv: tuple[int, ...]
    hq: int = 32
    hkv: int = 8
    dim: int = 128
    page: int = 16
    dtype: str = "bf16"
    causal: bool = True
    window: int = -1
    split: int = 0
    tiles: tuple[tuple[int, ...], ...] = SM90_TILES
    layout: str = "HND"
    tags: tuple[str, ...] = field(default=())

    @property
    def kernel(self) -> str:
        keys = "ragged" if self.page == RAGGED else f"p{self.page}"
        return f"attention_{self.dtype}_h{self.dim}_{keys}"

    @property
    def flops(self) -> int:
        """Causal only."""
        pairs = sum(n * m - n * (n - 1) // 2 for n, m in zip(self.qo, self.kv, strict=True))
        return 4 * pairs * self.hq * self.dim

    @property
    def bytes(self) -> int:
        return 2 * (2 * sum(self.kv) * self.hkv + 2 * sum(self.qo) * self.hq) * self.dim


def check_cases() -> list[Case]:
    """Odd lengths, groups 1 3 4 5 7 8 64, page sizes, dtypes, head dims, windows, empty requests, cut rows."""
    cases = []
    odd_kv = (1, 15, 16, 17, 31, 127, 128, 129, 300, 1000, 2049, 5000)
    ones = (1,) * len(odd_kv)
    for hq, hkv in ((8, 8), (6, 2), (32, 8), (10, 2), (14, 2), (64, 8), (16, 1), (9, 3)):
        heads = f"h{hq}-{hkv}"
        cases.append(Case(f"decode {heads}", ones, odd_kv, hq, hkv))
        cases.append(Case(f"decode {heads} split96", ones, odd_kv, hq, hkv, split=96))
        cases.append(Case(f"prefill {heads}", (1, 7, 33, 130, 257), (1, 7, 33, 130, 257), hq, hkv))
        cases.append(Case(f"append {heads}", (1, 5, 40, 100, 129), (100, 77, 512, 1111, 129), hq, hkv))
        cases.append(
            Case(f"append {heads} split128", (1, 5, 40, 100, 129), (100, 77, 512, 1111, 129), hq, hkv, split=128)
        )
        cases.append(Case(f"mixed {heads}", (300, 1, 1, 64, 1, 1, 2), (300, 999, 2048, 700, 1, 16, 50), hq, hkv))
    cases.append(Case("decode mqa71", (1, 1, 1), (100, 1000, 17), 71, 1))
    cases.append(Case("mixed g64", (1, 3, 20), (900, 100, 1500), 64, 1))
    for window in (0, 1, 15, 100, 128, 333):
        cases.append(Case(f"window {window} decode", ones, odd_kv, window=window))
        cases.append(Case(f"window {window} prefill", (300, 513, 64), (300, 513, 1000), window=window))
        cases.append(Case(f"window {window} split64", (300, 1, 64), (300, 777, 1000), window=window, split=64))
    cases.append(Case("full", (7, 1, 200, 33), (5, 64, 300, 1024), causal=False))
    cases.append(Case("full window", (7, 1, 200, 33), (50, 64, 300, 1024), causal=False, window=40))
    cases.append(Case("no keys", (3, 1, 200, 0, 1), (0, 0, 0, 50, 20), causal=False))
    cases.append(Case("empty requests", (0, 1, 0, 5), (10, 100, 0, 80)))
    cases.append(Case("long", (1, 2, 1000), (40000, 9000, 12345)))
    cases.append(Case("many", (1,) * 300, tuple(37 * i % 900 + 1 for i in range(300))))
    for dtype in ("bf16", "fp16"):
        for dim in (64, 128):
            for page in (8, 16, 32, 64):
                if (dtype, dim, page) == ("bf16", 128, 16):
                    continue
                if dtype == "fp16" and page not in (16, 64):
                    continue
                kw = {"dtype": dtype, "dim": dim, "page": page}
                name = f"{dtype} d{dim} p{page}"
                cases.append(Case(f"{name} decode", ones, odd_kv, **kw))
                cases.append(Case(f"{name} decode split80", ones, odd_kv, 9, 3, split=80, **kw))
                cases.append(Case(f"{name} prefill", (1, 7, 33, 130, 257), (1, 7, 33, 130, 257), **kw))
                cases.append(
                    Case(f"{name} mixed", (300, 1, 1, 64, 1, 1, 2), (300, 999, 2048, 700, 1, 16, 50), 24, 8, **kw)
                )
                cases.append(Case(f"{name} window", (300, 1, 64), (300, 777, 1000), window=77, split=192, **kw))
    for dtype in ("bf16", "fp16"):
        for dim in (64, 128):
            for page in (1, RAGGED):
                kw = {"dtype": dtype, "dim": dim, "page": page}
                name = f"{dtype} d{dim} {'ragged' if page == RAGGED else 'p1'}"
                prompts, mixed = (1, 7, 33, 130, 257), ((300, 1, 1, 64, 1, 1, 2), (300, 999, 2048, 700, 1, 16, 50))
                cases.append(Case(f"{name} decode", ones, odd_kv, **kw))
                cases.append(Case(f"{name} decode split80", ones, odd_kv, 9, 3, split=80, **kw))
                cases.append(Case(f"{name} prefill", prompts, prompts, **kw))
                cases.append(Case(f"{name} prefill split64", prompts, prompts, 14, 2, split=64, **kw))
                cases.append(Case(f"{name} mixed", *mixed, 24, 8, **kw))
                cases.append(Case(f"{name} window", (300, 1, 64), (300, 777, 1000), window=77, split=192, **kw))
                cases.append(Case(f"{name} full", (7, 1, 200, 33, 1), (5, 64, 300, 1024, 0), causal=False, **kw))
                cases.append(Case(f"{name} long", (1, 2, 1000), (40000, 9000, 12345), **kw))
    for page in (1, 16, 64):
        cases.append(Case(f"NHD p{page}", (300, 1, 1, 64), (300, 999, 2048, 700), page=page, layout="NHD"))
    return cases


def _decode(batch: int, kv: int, **kw: object) -> Case:
    heads = f"h{kw.get('hq', 32)}/{kw.get('hkv', 8)}"
    page = f" p{kw['page']}" if "page" in kw else ""
    return Case(f"decode {heads} b{batch} kv{kv}{page}", (1,) * batch, (kv,) * batch, **kw)  # type: ignore[arg-type]


MIXED_LENS = (3401, 1163, 1462, 936, 1113, 919, 3497, 3976, 599, 1325, 2078, 4031, 2413, 2632, 1102, 723)
UNIFORM_LENS = tuple(
    int(x)
    for x in (
        "1496 571 752 4941 4195 1471 745 4693 1890 1309 350 7806 2964 6443 1036 7967 4467 1284 5620 2629 3848 452 3537 2395 "
        "5554 6734 457 1580 2353 1394 2587 7949 7071 1394 6510 6959 3933 464 4740 3291 6388 2991 4190 2927 4902 6816 3962 4026 "
        "499 6541 7770 3985 7256 6823 5001 7349 1520 3729 6137 6526 4381 6802 3715 2550"
    ).split()
)
ZIPF_LENS = tuple(
    int(x)
    for x in (
        "618 1129 840 1365 2520 712 1213 1260 910 1560 885 2340 2978 8192 963 564 936 595 1310 799 3640 697 1724 1927 1170 585 "
        "1638 512 2184 1820 1489 6553 546 1024 992 528 520 2730 606 3276 1092 744 1057 819 780 642 682 668 16384 2048 1424 655 "
        "4681 537 728 762 10922 862 630 555 5461 32768 4096 574"
    ).split()
)


def bench_cases(tiles: tuple[tuple[int, ...], ...] = SM90_TILES) -> list[tuple[Case, float]]:
    """(case, bar): the bar in µs, or in TFLOP/s where the case is bound by arithmetic (tag "flops")."""
    f = ("flops",)
    rows: list[tuple[Case, float]] = []
    for kv, bar in ((512, 8.0), (2048, 9.0), (8192, 15.0), (32768, 40.0)):
        rows.append((_decode(1, kv, tiles=tiles), bar))
    for kv, bar in ((512, 11.5), (2048, 38.0), (8192, 128.0)):
        rows.append((_decode(16, kv, tiles=tiles), bar))
    for kv, bar in ((2048, 127.0), (8192, 490.0)):
        rows.append((_decode(64, kv, tiles=tiles), bar))
    for batch, kv, bar in ((16, 2048, 38.0), (64, 2048, 127.0), (64, 8192, 490.0)):
        rows.append((_decode(batch, kv, page=1, tiles=tiles), 1.05 * bar))
    rows.append((_decode(64, 2048, hq=64, tiles=tiles), 127.0))
    rows.append((_decode(64, 8192, hq=64, tiles=tiles), 490.0))
    rows.append((_decode(16, 2048, hkv=32, tiles=tiles), 125.0))
    rows.append((Case("skew one_long", (1,) * 64, (65536,) + (512,) * 63, tiles=tiles), 102.0))
    rows.append((Case("skew zipf", (1,) * 64, ZIPF_LENS, tiles=tiles), 156.0))
    rows.append((Case("skew uniform", (1,) * 64, UNIFORM_LENS, tiles=tiles), 250.0))
    for n, length, bar in ((1, 1024, 290.0), (1, 4096, 560.0), (1, 16384, 640.0), (8, 2048, 510.0), (16, 512, 340.0)):
        rows.append((Case(f"prefill {n}x{length}", (length,) * n, (length,) * n, tags=f, tiles=tiles), bar))
    for n, length, bar in ((1, 4096, 560.0), (1, 16384, 640.0), (8, 2048, 510.0)):
        lens = (length,) * n
        rows.append((Case(f"prefill {n}x{length} p1", lens, lens, page=1, tags=f, tiles=tiles), 0.85 * bar))
        rows.append((Case(f"prefill {n}x{length} ragged", lens, lens, page=RAGGED, tags=f, tiles=tiles), bar))
    rows.append((Case("prefill 16 mixed", MIXED_LENS, MIXED_LENS, tags=f, tiles=tiles), 515.0))
    rows.append((Case("chunked 4x512 on 16384", (512,) * 4, (16384,) * 4, tags=f, tiles=tiles), 600.0))
    rows.append(
        (Case("mixed 2x1024+62x1@4096", (1024,) * 2 + (1,) * 62, (1024,) * 2 + (4096,) * 62, tiles=tiles), 285.0)
    )
    rows.append((Case("mixed 512@8192+63x1@2048", (512,) + (1,) * 63, (8192,) + (2048,) * 63, tiles=tiles), 240.0))
    rows.append(
        (Case("mixed 4x2048+60x1@8192", (2048,) * 4 + (1,) * 60, (2048,) * 4 + (8192,) * 60, tiles=tiles), 740.0)
    )
    return rows

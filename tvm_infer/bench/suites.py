"""Named lists of workloads. Plain data: lengths drawn at random are written out, so that every run and every peer has the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ArgumentError
from .workloads import DTYPES, Workload, decode, prefill

# 64 decode requests with lengths uniform in 256 … 8192, and by Zipf's law (32768 / rank, shuffled)
UNIFORM_LENS = tuple(
    int(n)
    for n in (
        "1496 571 752 4941 4195 1471 745 4693 1890 1309 350 7806 2964 6443 1036 7967 4467 1284 5620 2629 3848 452 3537 2395 "
        "5554 6734 457 1580 2353 1394 2587 7949 7071 1394 6510 6959 3933 464 4740 3291 6388 2991 4190 2927 4902 6816 3962 4026 "
        "499 6541 7770 3985 7256 6823 5001 7349 1520 3729 6137 6526 4381 6802 3715 2550"
    ).split()
)
ZIPF_LENS = tuple(
    int(n)
    for n in (
        "618 1129 840 1365 2520 712 1213 1260 910 1560 885 2340 2978 8192 963 564 936 595 1310 799 3640 697 1724 1927 1170 585 "
        "1638 512 2184 1820 1489 6553 546 1024 992 528 520 2730 606 3276 1092 744 1057 819 780 642 682 668 16384 2048 1424 655 "
        "4681 537 728 762 10922 862 630 555 5461 32768 4096 574"
    ).split()
)
ONE_LONG_LENS = (65536,) + (512,) * 63
# 16 prompts with lengths uniform in 128 … 4096
MIXED_LENS = (3401, 1163, 1462, 936, 1113, 919, 3497, 3976, 599, 1325, 2078, 4031, 2413, 2632, 1102, 723)


@dataclass(frozen=True)
class Suite:
    """Workloads, and the device that they are run on unless another is asked for."""

    device: str
    workloads: tuple[Workload, ...]


def _row(
    name: str, qo_lens: tuple[int, ...], kv_lens: tuple[int, ...], num_qo_heads: int = 32, num_kv_heads: int = 8
) -> Workload:
    return Workload(name, qo_lens, kv_lens, "bfloat16", num_qo_heads, num_kv_heads)


def _decode(batch: int, kv_len: int, num_qo_heads: int = 32, num_kv_heads: int = 8) -> Workload:
    name = f"decode h{num_qo_heads}/{num_kv_heads} b{batch} kv{kv_len}"
    return _row(name, (1,) * batch, (kv_len,) * batch, num_qo_heads, num_kv_heads)


def _prefill(batch: int, qo_len: int) -> Workload:
    return prefill(batch, qo_len, dtype="bfloat16")


def _mixed(name: str, *groups: tuple[int, int, int]) -> Workload:
    """groups: (requests, qo_len, kv_len)."""
    return _row(
        f"mixed {name}",
        tuple(qo_len for count, qo_len, _ in groups for _ in range(count)),
        tuple(kv_len for count, _, kv_len in groups for _ in range(count)),
    )


def _single_token_pages(workload: Workload) -> Workload:
    return replace(workload, name=f"{workload.name} page1", page_size=1)


_SKEW_UNIFORM = _row("skew uniform_random", (1,) * 64, UNIFORM_LENS)
_PREFILL_MIXED = _row("prefill 16 mixed", MIXED_LENS, MIXED_LENS)

H200 = (
    *(_decode(1, kv_len) for kv_len in (512, 2048, 8192, 32768)),
    *(_decode(16, kv_len) for kv_len in (512, 2048, 8192)),
    *(_decode(64, kv_len) for kv_len in (2048, 8192)),
    *(_decode(64, kv_len, num_qo_heads=64) for kv_len in (2048, 8192)),
    _decode(16, 2048, num_kv_heads=32),
    _row("skew one_long", (1,) * 64, ONE_LONG_LENS),
    _row("skew zipf", (1,) * 64, ZIPF_LENS),
    _SKEW_UNIFORM,
    *(_prefill(batch, qo_len) for batch, qo_len in ((1, 1024), (1, 4096), (1, 16384), (8, 2048), (16, 512))),
    _PREFILL_MIXED,
    _row("chunked 4x512 on 16384", (512,) * 4, (16384,) * 4),
    _mixed("2x1024 + 62x1@4096", (2, 1024, 1024), (62, 1, 4096)),
    _mixed("1x512@8192 + 63x1@2048", (1, 512, 8192), (63, 1, 2048)),
    _mixed("4x2048 + 60x1@8192", (4, 2048, 2048), (60, 1, 8192)),
    *(
        _single_token_pages(w)
        for w in (
            _decode(16, 2048),
            _decode(64, 2048),
            _decode(64, 8192),
            _prefill(1, 4096),
            _prefill(1, 16384),
            _prefill(8, 2048),
        )
    ),
    replace(_SKEW_UNIFORM, name="plan 64 decode", plan_only=True),
    replace(_PREFILL_MIXED, name="plan 16 mixed prefill", plan_only=True),
)


def _variant(workload: Workload, name: str = "", window: int = -1, **band: int) -> Workload:
    said = [workload.name, name, *map(str, band.values()), f"window {window}" if window >= 0 else ""]
    return replace(workload, name=" ".join(filter(None, said)), variant=name, window=window, **band)  # type: ignore[arg-type]


# what an attention variant costs: beside each kind of batch without one the same with it
_DECODES, _PREFILLS = (_decode(16, 8192), _decode(64, 8192)), (_prefill(1, 4096), _prefill(1, 16384))
_DRAFTS = _row("verify 32x64 on 2048", (64,) * 32, (2048 + 64,) * 32)
_ROPE_DECODE = _decode(32, 4096)
VARIANTS = (
    *(_variant(w) for w in (*_DECODES, *_PREFILLS)),
    *(_variant(w, window=1024) for w in (*_DECODES, *_PREFILLS)),
    *(_variant(w, name) for name in ("soft cap", "ALiBi", "attention sink") for w in (*_DECODES, *_PREFILLS)),
    *(_variant(w, "sinks", 1024, num_sink=4) for w in (*_DECODES, *_PREFILLS)),
    *(_variant(w, "chunks", chunk=1024) for w in (*_DECODES, *_PREFILLS)),
    _variant(_DRAFTS),
    _variant(_DRAFTS, "tree mask"),
    _variant(_ROPE_DECODE),
    *(_variant(w, "fused RoPE") for w in (_ROPE_DECODE, *_DECODES, *_PREFILLS)),
)


def _prefix(batch: int, prefix: int, own: int, num_qo_heads: int = 32) -> tuple[Workload, Workload]:
    """One token each of `batch` answers of one prompt, and the same where each request reads the prompt for itself."""
    name = f"prefix {prefix} + {own} h{num_qo_heads}/8 b{batch}"
    row = replace(_row(name, (1,) * batch, (prefix + own,) * batch, num_qo_heads), prefix=prefix)
    return row, replace(row, name=f"{name} flat", flat=True)


# what page tables have in common, each beside the flat plan of the same batch
def _streaming(workload: Workload, first: int, last: int) -> tuple[Workload, Workload]:
    """The batch, and the same with every other KV head reading first and last keys only."""
    name = f"{workload.name} half streaming {first} + {last}"
    return workload, replace(workload, name=name, streaming=(first, last))


def _selecting(workload: Workload, num_pages: int, first: int, last: int) -> Workload:
    """The batch, each KV head reading the best pages only; the selection is part of what is measured."""
    name = f"{workload.name} {num_pages} pages selected"
    return replace(workload, name=name, selected=(num_pages, first, last))


FORMATS = (
    *_streaming(_decode(16, 32768), 4 * 16, 1024),
    _selecting(_decode(16, 32768), 128, 1, 4),
    *_prefix(64, 8192, 256),
    *_prefix(64, 8192, 256, num_qo_heads=64),
    *_prefix(16, 512, 512),
    *(row for batch in (4, 8, 16, 32) for row in _prefix(batch, 2048, 256)),
    # heads of every width that has kernels
    *(
        replace(w, name=f"{w.name} d{head_dim}", head_dim=head_dim)
        for w in (_decode(64, 2048), _prefill(1, 8192))
        for head_dim in (64, 80, 96, 128, 192, 256)
    ),
    *(
        replace(w, name=f"{w.name} d192/128", head_dim=192, head_dim_vo=128)
        for w in (_decode(64, 2048), _prefill(1, 8192))
    ),
)


def _eight_bits(workload: Workload, kv_dtype: str = "float8_e4m3fn") -> Workload:
    return replace(workload, name=f"{workload.name} {kv_dtype.removeprefix('float8_')}", kv_dtype=kv_dtype)


_FP8_BASES = (
    *(_decode(64, kv_len) for kv_len in (2048, 8192)),
    _decode(16, 8192),
    _prefill(1, 8192),
    _prefill(16, 512),
    _mixed("4x512@16384", (4, 512, 16384)),
    _mixed("2x1024 + 62x1@4096", (2, 1024, 1024), (62, 1, 4096)),
)
# keys and values of 8 bits, each beside the same in 16
FP8 = (
    *(row for w in _FP8_BASES for row in (w, _eight_bits(w))),
    _eight_bits(_decode(64, 2048), "float8_e5m2"),
    *(
        replace(_eight_bits(_decode(64, 2048)), name=f"decode h32/8 b64 kv2048 d{head_dim} e4m3fn", head_dim=head_dim)
        for head_dim in (64, 80, 96, 192, 256)
    ),
    *(
        replace(_eight_bits(_prefill(1, 8192)), name=f"prefill 1x8192 d{head_dim} e4m3fn", head_dim=head_dim)
        for head_dim in (64, 96, 192, 256)
    ),
)
_QUICK = (
    "decode h32/8 b1 kv2048",
    "decode h32/8 b64 kv2048",
    "skew zipf",
    "prefill 1x4096",
    "mixed 2x1024 + 62x1@4096",
    "decode h32/8 b64 kv2048 page1",
)

SUITES: dict[str, Suite] = {
    "cpu": Suite(
        "cpu",
        (
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
    ),
    "h200": Suite("cuda", H200),
    "variants": Suite("cuda", VARIANTS),
    "formats": Suite("cuda", FORMATS),
    "fp8": Suite("cuda", FP8),
    "h200-quick": Suite("cuda", tuple(w for w in H200 if w.name in _QUICK)),
}
# the suite of a device when none is named
DEFAULT = {"cpu": "cpu", "cuda": "h200"}


def suite(name: str) -> Suite:
    """The suite called `name`."""
    if name not in SUITES:
        raise ArgumentError(f"argument `suite` is {name!r}; it must be one of {', '.join(SUITES)}")
    return SUITES[name]


def select(name: str, names: tuple[str, ...] = (), dtypes: tuple[str, ...] = ()) -> list[Workload]:
    """Workloads of suite `name`, restricted to `names`, each in every one of `dtypes` (default: its own)."""
    workloads = suite(name).workloads
    chosen = [w for w in workloads if not names or w.name in names]
    missing = set(names) - {w.name for w in chosen}
    if missing:
        known = ", ".join(dict.fromkeys(w.name for w in workloads))
        raise ArgumentError(f"argument `workload` is {sorted(missing)[0]!r}; suite {name!r} has: {known}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ArgumentError(f"argument `--dtype` is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if dtypes:
        chosen = list(dict.fromkeys(w.with_dtype(d) for w in chosen for d in dtypes))
    return chosen

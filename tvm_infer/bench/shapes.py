"""Workloads by flag: `--qo-lens 1 --kv-lens 64x2048 --heads 32/8 …`.

A list of lengths is comma-separated items, one for each request or run of requests:

    2048           one request
    64x2048        64 requests of 2048 each (as in the names of workloads)
    128..4096/16   16 requests, evenly spaced from 128 to 4096, both included

A list of one number serves every request of the other list.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from ..errors import ArgumentError
from .workloads import DTYPES, Workload

LAYOUTS = ("HND", "NHD")
_MAX_REQUESTS = 65536
_MAX_TOKENS = 2**31 - 1  # lengths and their sums are int32 in the packed functions
_ITEM = re.compile(r"(?:(?P<count>\d+)x)?(?P<length>\d+)|(?P<first>\d+)\.\.(?P<last>\d+)/(?P<steps>\d+)")


def parse_lengths(text: str, flag: str) -> tuple[int, ...]:
    """The lengths that `text` lists; `flag` names it in errors."""
    lengths: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ArgumentError(
                f"argument `{flag}` has the item {item.strip()!r}; an item is a length (2048), COUNTxLENGTH (64x2048) or "
                "FIRST..LAST/COUNT (128..4096/16), separated by commas"
            )
        count = int(match["count"] or match["steps"] or 1)
        if not 1 <= count <= _MAX_REQUESTS - len(lengths):
            raise ArgumentError(
                f"argument `{flag}`, item {item.strip()!r}: {count} requests; 1 to {_MAX_REQUESTS} in all are possible"
            )
        if match["steps"]:
            first, last = int(match["first"]), int(match["last"])
            lengths += [first + (last - first) * i // max(count - 1, 1) for i in range(count)]
        else:
            lengths += [int(match["length"])] * count
    if sum(lengths) > _MAX_TOKENS:
        raise ArgumentError(
            f"argument `{flag}` adds up to {sum(lengths)} tokens; at most {_MAX_TOKENS} (int32) are possible"
        )
    return tuple(lengths)


def format_lengths(lengths: tuple[int, ...]) -> str:
    """Lengths as :func:`parse_lengths` reads them: "2x1024,62x1"."""
    runs = ((length, len(list(run))) for length, run in itertools.groupby(lengths))
    return ",".join(f"{count}x{length}" if count > 1 else str(length) for length, count in runs)


def parse_heads(text: str) -> tuple[int, int]:
    """(num_qo_heads, num_kv_heads) of "32/8"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None:
        raise ArgumentError(f"argument `--heads` is {text!r}; it must be QUERY_HEADS/KV_HEADS, such as 32/8")
    num_qo_heads, num_kv_heads = int(match[1]), int(match[2])
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        raise ArgumentError(f"argument `--heads` is {text!r}; query heads must be a positive multiple of KV heads")
    return num_qo_heads, num_kv_heads


def describe(qo_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> str:
    """Runs of equal requests: "2x1024@1024 + 62x1@4096"; a summary where there are many."""
    pairs = itertools.groupby(zip(qo_lens, kv_lens, strict=True))
    runs = [(len(list(run)), pair) for pair, run in pairs]
    if len(runs) > 4:
        return f"{len(qo_lens)} requests, {sum(qo_lens)} tokens on {sum(kv_lens)} keys"
    return " + ".join(f"{count}x{n}@{m}" for count, (n, m) in runs)


def custom_workloads(
    *,
    qo_lens: str | None,
    kv_lens: str | None,
    heads: str = "32/8",
    head_dim: int = 128,
    page_size: int = 16,
    dtypes: tuple[str, ...] = (),
    kv_layout: str = "HND",
    ragged: bool = False,
) -> list[Workload]:
    """The workload that the flags describe, once for each dtype (default bfloat16). Without `kv_lens`: no history; without `qo_lens`:
    one token each."""
    if qo_lens is None and kv_lens is None:
        raise ArgumentError("argument `--kv-lens` is missing; shapes by flag need --kv-lens, --qo-lens or both")
    kv = parse_lengths(kv_lens, "--kv-lens") if kv_lens is not None else ()
    qo = parse_lengths(qo_lens, "--qo-lens") if qo_lens is not None else (1,) * len(kv)
    kv = kv or qo
    qo, kv = (qo * len(kv) if len(qo) == 1 else qo), (kv * len(qo) if len(kv) == 1 else kv)
    if len(qo) != len(kv):
        raise ArgumentError(
            f"argument `--kv-lens` lists {len(kv)} requests, `--qo-lens` {len(qo)}; the two must list as many, or one of them one"
        )
    for r, (n, m) in enumerate(zip(qo, kv, strict=True)):
        if n < 1:
            raise ArgumentError(f"argument `--qo-lens`: request {r} has {n} tokens; it must have at least 1")
        if m < n:
            raise ArgumentError(
                f"argument `--kv-lens`: request {r} has {m} keys for {n} new tokens; keys include the new tokens' own"
            )
    num_qo_heads, num_kv_heads = parse_heads(heads)
    for flag, value in (("--head-dim", head_dim), ("--page-size", page_size)):
        if value < 1:
            raise ArgumentError(f"argument `{flag}` is {value}; it must be at least 1")
    if kv_layout not in LAYOUTS:
        raise ArgumentError(f"argument `--layout` is {kv_layout!r}; it must be one of {', '.join(LAYOUTS)}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ArgumentError(f"argument `--dtype` is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    where = "ragged" if ragged else f"page{page_size} {kv_layout}"
    name = f"{describe(qo, kv)} h{num_qo_heads}/{num_kv_heads} d{head_dim} {where}"
    return [
        Workload(name, qo, kv, dtype, num_qo_heads, num_kv_heads, head_dim, page_size, kv_layout, ragged)
        for dtype in dtypes or ("bfloat16",)
    ]


_FLAGS = {
    "heads": "--heads",
    "head_dim": "--head-dim",
    "page_size": "--page-size",
    "kv_layout": "--layout",
    "ragged": "--ragged",
}


def from_flags(kv_lens: str | None, qo_lens: str | None, dtypes: tuple[str, ...] = (), **given: Any) -> list[Workload]:
    """The workloads that command-line flags describe; none without lengths, where `given` (arguments of :func:`custom_workloads`) must
    be empty: a suite's workloads have shapes of their own."""
    if kv_lens is None and qo_lens is None:
        if given:
            flag = _FLAGS[next(iter(given))]
            raise ArgumentError(
                f"argument `{flag}` is given without --kv-lens or --qo-lens; a suite's workloads have shapes of their own"
            )
        return []
    return custom_workloads(qo_lens=qo_lens, kv_lens=kv_lens, dtypes=dtypes, **given)

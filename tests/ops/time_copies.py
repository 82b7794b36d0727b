"""Checks and times tvm_infer.append and tvm_infer.merge on a cuda device, beside a plain copy of as many bytes.

usage: python time_copies.py      (needs an H200 or H100 and torch)

Each call reads and writes memory of its own, of which there is more than the L2 cache holds; calls are captured in one CUDA graph and
follow each other directly. us a call, and GB/s of bytes read and written.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch

import tvm_infer

L2_BYTES = 50e6
HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16


def measure(calls: list[Callable[[], Any]], at_least: int = 40) -> float:
    """Microseconds of one call: the median of 15 replays of a graph that holds them all, several times over where they are few."""
    calls = calls * math.ceil(at_least / len(calls))
    for call in calls[:3]:
        call()  # loads the kernels, which a capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def ints(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32).cuda()


def append_calls(qo_len: int, requests: int, past: int) -> tuple[list[Callable[[], Any]], int]:
    """Appends of `qo_len` new tokens to each of `requests` behind `past` ones, checked; and the bytes that one moves."""
    tokens = qo_len * requests
    moved = 2 * 2 * tokens * HEADS * HEAD_DIM * 2
    pages = -(-(past + qo_len) // PAGE_SIZE)
    indptr = ints([r * pages for r in range(requests + 1)])
    qo_indptr, kv_len = ints([r * qo_len for r in range(requests + 1)]), ints([past + qo_len] * requests)
    calls = []
    for _ in range(max(1, math.ceil(4 * L2_BYTES / moved) if tokens > 512 else 8)):
        indices = ints(torch.randperm(requests * pages))
        shape = (requests * pages, 2, HEADS, PAGE_SIZE, HEAD_DIM)
        cache = torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")
        k, v = torch.randn(2, tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")

        def call(k=k, v=v, cache=cache, indices=indices):
            tvm_infer.append(
                k, v, cache, qo_indptr=qo_indptr, kv_len=kv_len, kv_page_indptr=indptr, kv_page_indices=indices
            )

        call()
        expected = torch.full_like(cache, float("nan"))
        position = past + torch.arange(qo_len, device="cuda").repeat(requests)
        request = torch.arange(requests, device="cuda").repeat_interleave(qo_len)
        page = indices.long()[request * pages + position // PAGE_SIZE]
        expected[page, 0, :, position % PAGE_SIZE] = k
        expected[page, 1, :, position % PAGE_SIZE] = v
        assert torch.equal(cache.view(torch.int16), expected.view(torch.int16)), "append wrote something else"
        calls.append(call)
    return calls, moved


def merge_calls(rows: int, heads: int, dtype: torch.dtype) -> tuple[list[Callable[[], Any]], int]:
    """Merges of two states, some of which saw no key, checked; and the bytes that one moves."""
    moved = 3 * rows * heads * (HEAD_DIM * dtype.itemsize + 4)
    calls = []
    for _ in range(max(1, math.ceil(4 * L2_BYTES / moved) if moved > 4e6 else 8)):
        o_a, o_b, out = torch.randn(3, rows, heads, HEAD_DIM, device="cuda").to(dtype)
        lse_a, lse_b, lse = 3 * torch.randn(3, rows, heads, device="cuda")
        for o, l in ((o_a, lse_a), (o_b, lse_b)):
            empty = torch.rand(rows, heads, device="cuda") < 0.1
            o[empty], l[empty] = float("nan"), -math.inf

        def call(o_a=o_a, lse_a=lse_a, o_b=o_b, lse_b=lse_b, out=out, lse=lse):
            tvm_infer.merge(o_a, lse_a, o_b, lse_b, out=out, lse=lse)

        call()
        union = torch.logaddexp(lse_a.double(), lse_b.double())
        parts = [
            (torch.exp(l - union).nan_to_num(0)[..., None] * o.double().nan_to_num(0))
            for o, l in ((o_a, lse_a), (o_b, lse_b))
        ]
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(out.double(), sum(parts), atol=tolerance, rtol=0)
        torch.testing.assert_close(lse.double(), union, atol=1e-5, rtol=1e-5)
        calls.append(call)
    return calls, moved


def copy_calls(moved: int) -> list[Callable[[], Any]]:
    pairs = [
        torch.empty(2, moved // 4, dtype=torch.int16, device="cuda")
        for _ in range(max(1, math.ceil(4 * L2_BYTES / moved)))
    ]
    return [lambda a=a, b=b: b.copy_(a) for a, b in pairs]


def main() -> None:
    print(torch.cuda.get_device_name())
    for qo_len, requests, past in (
        (1, 1, 511),
        (1, 64, 2047),
        (1, 256, 500),
        (512, 4, 4096),
        (2048, 4, 0),
        (8192, 1, 0),
    ):
        calls, moved = append_calls(qo_len, requests, past)
        us, copy = measure(calls), measure(copy_calls(moved))
        name = f"append {requests} x {qo_len} after {past}"
        print(
            f"{name:32} {us:8.2f} us {moved / us / 1e3:7.0f} GB/s   copy {copy:8.2f} us {moved / copy / 1e3:7.0f} GB/s"
        )
    for rows, heads, dtype in (
        (64, 32, torch.bfloat16),
        (8192, 32, torch.bfloat16),
        (8192, 32, torch.float16),
        (8192, 32, torch.float32),
    ):
        calls, moved = merge_calls(rows, heads, dtype)
        us = measure(calls)
        print(f"{f'merge {rows} x {heads} {dtype}':32} {us:8.2f} us {moved / us / 1e3:7.0f} GB/s")


if __name__ == "__main__":
    main()

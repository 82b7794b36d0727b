"""Runs the sm_90a attention kernel over the cases: correctness against float64, then time by CUDA-graph replay.

Needs torch, a Hopper GPU, the cubins (<dtype>_<head_dim>_<page>.cubin) and the plans of make_plans.py.
usage: python run_cases.py --cubins DIR --plans PLANS.npz [--bench] [--check] [--only WORD] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import pathlib
import statistics
from typing import Any

import numpy as np
import torch
from cases import RAGGED, Case, bench_cases, check_cases
from driver import AttentionParams, Kernel, KvTensorMaps, kv_tensor_maps
from refusals import check_refusals

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
REFUSED = "append h32-8 split128"  # the case whose plan is made unfit: it has cut rows
ROTATE_BYTES = 256 << 20  # more than four times the L2


class Batch:
    """Inputs and outputs of a case on the GPU; everything a kernel must not read is NaN."""

    def __init__(self, case: Case, plan: np.ndarray, seed: int = 0, poison: bool = True) -> None:
        torch.manual_seed(seed)
        self.case, self.dtype = case, DTYPES[case.dtype]
        # pool: [num_pages, 2, num_kv_heads, page_size, head_dim] view. places[r]: (page, token in it) of each key of request r.
        if case.page == RAGGED:
            self._lay_out_rows(poison)
        else:
            self._lay_out_pages(poison)
        tokens = sum(case.qo)
        self.q = torch.empty((tokens, case.hq, case.dim), device="cuda", dtype=self.dtype).normal_()
        self.o = torch.full_like(self.q, math.nan)
        self.lse = torch.full((tokens, case.hq), math.nan, device="cuda")
        self.set_plan(plan)

    def _lay_out_pages(self, poison: bool) -> None:
        case, page = self.case, self.case.page
        pages_of = [-(-n // page) for n in case.kv]
        num_pages = sum(pages_of) + 3
        order = torch.randperm(num_pages, device="cuda", dtype=torch.int32)
        shape = (num_pages, 2, case.hkv, page, case.dim)
        if case.layout == "NHD":
            shape = (num_pages, 2, page, case.hkv, case.dim)
        pool = torch.empty(shape, device="cuda", dtype=self.dtype).normal_()
        self.pool = pool.transpose(2, 3) if case.layout == "NHD" else pool
        self.places, indices, indptr, taken = [], [], [0], 0
        for r, count in enumerate(pages_of):
            pages = order[taken : taken + count]
            taken += count
            slot = torch.arange(count * page, device="cuda")
            places = (pages.long().repeat_interleave(page), slot % page)
            if poison:
                self._poison(places, case.kv[r], len(slot))
                self._poison(places, 0, self._first_visible(r))
            self.places.append((places[0][: case.kv[r]], places[1][: case.kv[r]]))
            indices += [pages, torch.full((1,), -1_234_567_890, device="cuda", dtype=torch.int32)]
            indptr.append(indptr[-1] + count + 1)
        if poison:
            self.pool[order[taken:].long()] = math.nan
        self.indices = torch.cat(indices)
        self.indptr = torch.tensor(indptr, device="cuda", dtype=torch.int32)

    def _lay_out_rows(self, poison: bool) -> None:
        """Rows of one tensor; between requests a gap of odd length, as another list's rows would be there."""
        case, gap = self.case, 3
        indptr = [gap]
        for n in case.kv:
            indptr.append(indptr[-1] + n + gap)
        shape = (2, indptr[-1], case.hkv, case.dim)
        self.pool = torch.empty(shape, device="cuda", dtype=self.dtype).normal_().transpose(1, 2)[None]
        self.places = []
        slot = torch.arange(indptr[-1], device="cuda")
        is_key = torch.zeros_like(slot, dtype=torch.bool)
        for r, n in enumerate(case.kv):
            rows = slot[indptr[r] : indptr[r] + n]
            is_key[rows] = True
            is_key[rows[: self._first_visible(r)]] = False
            self.places.append((torch.zeros_like(rows), rows))
        if poison:
            self.pool[0, :, :, slot[~is_key]] = math.nan
        self.indices = None
        self.indptr = torch.tensor(indptr, device="cuda", dtype=torch.int32)

    def _first_visible(self, r: int) -> int:
        """First key of request r that a query of it sees."""
        case = self.case
        return max(0, case.kv[r] - case.qo[r] - case.window) if case.window >= 0 and case.qo[r] else 0

    def _poison(self, places: tuple[torch.Tensor, torch.Tensor], begin: int, end: int) -> None:
        self.pool[places[0][begin:end], :, :, places[1][begin:end]] = math.nan

    def _set_keys(self) -> None:
        """Tensor maps, or pointers and strides for the kernel that gathers."""
        k, v, page = self.pool[:, 0], self.pool[:, 1], self.case.page
        self.params.k, self.params.v = k.data_ptr(), v.data_ptr()
        for i, view in enumerate((k, v)):
            for j, axis in enumerate((0, 1, 2)):
                self.params.kv_strides[3 * i + j] = view.stride(axis)
        if page == RAGGED or page >= 8:
            self.maps = kv_tensor_maps(k, v, 128 if page == RAGGED else page)
        else:
            self.maps = KvTensorMaps()

    def set_plan(self, plan: np.ndarray) -> None:
        self.plan = torch.from_numpy(plan).cuda()
        partial_rows = max(1, int(plan[14]))
        self.partial_o = torch.full((partial_rows, self.case.dim), math.nan, device="cuda")
        self.partial_lse = torch.full((partial_rows,), math.nan, device="cuda")
        q = self.q
        self.params = AttentionParams(
            self.plan.data_ptr(),
            self.indptr.data_ptr(),
            None if self.indices is None else self.indices.data_ptr(),
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            self.o.data_ptr(),
            self.o.stride(0),
            self.o.stride(1),
            self.lse.data_ptr(),
            self.partial_o.data_ptr(),
            self.partial_lse.data_ptr(),
            sm_scale_log2=self.case.dim**-0.5 * math.log2(math.e),
            expected_plan=(
                self.case.hkv,
                self.case.hq // self.case.hkv,
                len(q),
                partial_rows,
                len(self.case.qo),
                0,
                0,
                3,
            ),
        )
        self._set_keys()

    def clone(self) -> Batch:
        """Another copy of all tensors, for rotation above the L2."""
        other = object.__new__(Batch)
        other.__dict__.update(self.__dict__)
        other.pool = self.pool.clone(memory_format=torch.preserve_format)
        other.q, other.o, other.lse = self.q.clone(), self.o.clone(), self.lse.clone()
        other.params = AttentionParams.from_buffer_copy(self.params)
        other._set_keys()
        for name in ("q", "o", "lse"):
            setattr(other.params, name, getattr(other, name).data_ptr())
        return other

    def reference(self, max_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(token indices, o, lse) in float64 for each request; at most max_tokens tokens of each."""
        case, result, first = self.case, [], 0
        group = case.hq // case.hkv
        for r, (n, m) in enumerate(zip(case.qo, case.kv, strict=True)):
            if n == 0:
                continue
            tokens = torch.arange(n, device="cuda")
            if n > max_tokens:
                tokens = torch.unique(
                    torch.cat([tokens[:2], tokens[-2:], torch.randint(n, (max_tokens,), device="cuda")])
                )
            kv = (
                self.pool[self.places[r][0], :, :, self.places[r][1]].double().permute(1, 2, 0, 3)
            )  # [2, hkv, keys, dim]
            q = self.q[first + tokens].double().view(-1, case.hkv, group, case.dim)
            s = torch.einsum("thgd,hkd->thgk", q, kv[0]) * case.dim**-0.5
            position = tokens + (m - n)
            key = torch.arange(m, device="cuda")
            visible = torch.ones((len(tokens), m), dtype=torch.bool, device="cuda")
            if case.causal:
                visible &= key <= position[:, None]
            if case.window >= 0:
                visible &= key >= position[:, None] - case.window
            s = torch.where(visible[:, None, None], s, -math.inf)
            lse = torch.logsumexp(s, -1)
            p = torch.where(torch.isneginf(lse)[..., None], 0.0, torch.exp(s - lse[..., None]))
            v = torch.where(visible.any(0)[None, :, None], kv[1], 0.0)
            o = torch.einsum("thgk,hkd->thgd", p, v)
            result.append(
                (first + tokens, o.reshape(len(tokens), case.hq, case.dim), lse.reshape(len(tokens), case.hq))
            )
            first += n
        return result

    def error(self, max_tokens: int = 1 << 30) -> tuple[float, float]:
        """(‖o - ref‖ / ‖ref‖, largest |lse - ref|); inf where anything is NaN or a row was not written."""
        if bool(torch.isnan(self.o).any()) or bool(torch.isnan(self.lse).any()):
            return math.inf, math.inf
        difference = norm = lse_error = 0.0
        for tokens, o, lse in self.reference(max_tokens):
            got = self.o[tokens].double()
            difference += float(((got - o) ** 2).sum())
            norm += float((o**2).sum())
            ours = self.lse[tokens].double()
            if bool((torch.isneginf(ours) != torch.isneginf(lse)).any()):
                return math.inf, math.inf
            some = ~torch.isneginf(lse)
            if bool(some.any()):
                lse_error = max(lse_error, float((ours - lse)[some].abs().max()))
        return math.sqrt(difference / norm) if norm else math.sqrt(difference), lse_error


def tolerance(case: Case) -> float:
    return 4e-3 if case.dtype == "bf16" else 6e-4


def graph_time(launches: list[Any], repeats: int) -> float:
    """Median µs of one launch: a graph that walks over all of them, replayed."""
    for launch in launches[:3]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


class Runner:
    def __init__(self, cubins: pathlib.Path) -> None:
        self._cubins, self._kernels = cubins, {}

    def kernel(self, name: str) -> Kernel | None:
        if name not in self._kernels:
            path = self._cubins / f"{name}.cubin"
            self._kernels[name] = Kernel(path) if path.exists() else None
        return self._kernels[name]

    def check(self, case: Case, plan: np.ndarray) -> dict[str, Any]:
        kernel = self.kernel(case.kernel)
        if kernel is None:
            return {"name": case.name, "skipped": "no cubin"}
        batch = Batch(case, plan)
        errors = []
        for _ in range(2):  # twice: the second launch meets what the first left in the plan's tickets
            batch.o.fill_(math.nan)
            batch.lse.fill_(math.nan)
            kernel.launch(int(plan[5]), (batch.params, batch.maps))
            torch.cuda.synchronize()
            errors.append((batch.error(), batch.o.clone()))
        o_error, lse_error = errors[1][0]
        same = bool(torch.equal(errors[0][1].view(torch.int16), errors[1][1].view(torch.int16)))
        ok = o_error < tolerance(case) and lse_error < 2e-3 and same and errors[0][0][0] < tolerance(case)
        return {"name": case.name, "ok": ok, "o": o_error, "lse": lse_error, "same": same, "merges": int(plan[12])}

    def refusals(self, case: Case, plan: np.ndarray) -> list[dict[str, Any]]:
        kernel = self.kernel(case.kernel)
        return [] if kernel is None else check_refusals(kernel, Batch(case, plan), plan)

    def bench(self, case: Case, plan: np.ndarray, bar: float, dependent: bool = True) -> dict[str, Any]:
        kernel = self.kernel(case.kernel)
        assert kernel is not None
        batch = Batch(case, plan, poison=False)
        kernel.launch(int(plan[5]), (batch.params, batch.maps))
        torch.cuda.synchronize()
        o_error, lse_error = batch.error(max_tokens=8)
        copies = [batch] + [batch.clone() for _ in range(min(200, max(0, math.ceil(ROTATE_BYTES / case.bytes) - 1)))]
        rounds = max(1, 8 // len(copies)) if case.flops < 4e11 else 1  # long ones: no longer under load than one walk

        def launcher(b: Batch) -> Any:
            return lambda: kernel.launch(int(plan[5]), (b.params, b.maps), dependent)

        us = graph_time([launcher(b) for b in copies] * rounds, 15)
        header = plan.view(np.uint8)
        row = {
            "name": case.name,
            "ok": o_error < tolerance(case) and lse_error < 2e-3,
            "o": o_error,
            "us": us,
            "tflops": case.flops / us / 1e6,
            "gbps": case.bytes / us / 1e3,
            "bar": bar,
            "merges": int(plan[12]),
            "works": int(plan[11]),
            "predicted_us": int(header[104:112].view(np.int64)[0]) / 1e6,
        }
        row["of_bar"] = row["tflops"] / bar if "flops" in case.tags else bar / us
        return row


def read_ceiling() -> float:
    """GB/s of a plain reduction over 4 GB, as context for the figures of this run."""
    x = torch.empty(1 << 31, device="cuda", dtype=torch.bfloat16).normal_()
    y = x.view(torch.int32)
    us = graph_time([lambda: torch.amax(y)] * 2, 9)
    return x.numel() * 2 / us / 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cubins", type=pathlib.Path, required=True)
    parser.add_argument("--plans", required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--out")
    args = parser.parse_args()
    plans, runner = np.load(args.plans), Runner(args.cubins)
    plan_of = lambda case: plans[case.name.replace("/", "|")]  # noqa: E731
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "check": [], "bench": []}
    if args.check:
        for case in check_cases():
            if args.only in case.name:
                row = runner.check(case, plan_of(case))
                result["check"].append(row)
                if not row.get("ok", True):
                    print("FAIL", row, flush=True)
                elif case.name == REFUSED:
                    result["refusals"] = runner.refusals(case, plan_of(case))
                    for refusal in result["refusals"]:
                        if not refusal["ok"]:
                            print("FAIL", refusal, flush=True)
                    print(f"refusals: {sum(r['ok'] for r in result['refusals'])} of {len(result['refusals'])} ok")
        done = [r for r in result["check"] if "ok" in r]
        print(
            f"check: {sum(r['ok'] for r in done)} of {len(done)} ok, {len(result['check']) - len(done)} without a cubin"
        )
        if done:
            print(f"  largest error {max(r['o'] for r in done):.2e}, lse {max(r['lse'] for r in done):.2e}")
    if args.bench:
        result["read_gbps"] = read_ceiling()
        print(f"read ceiling {result['read_gbps']:.0f} GB/s")
        print(f"{'case':28} {'us':>9} {'TF':>6} {'GB/s':>6} {'bar':>6} {'of bar':>6} {'pred':>8} works merges error")
        for case, bar in bench_cases():
            if args.only in case.name:
                row = runner.bench(case, plan_of(case), bar)
                result["bench"].append(row)
                print(
                    f"{row['name']:28} {row['us']:9.2f} {row['tflops']:6.0f} {row['gbps']:6.0f} {bar:6.0f} {row['of_bar']:6.3f} "
                    f"{row['predicted_us']:8.1f} {row['works']:5} {row['merges']:5} {row['o']:.1e}{'' if row['ok'] else ' WRONG'}",
                    flush=True,
                )
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    ctypes.CDLL("libcuda.so.1")
    main()

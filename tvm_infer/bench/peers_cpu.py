"""Peers of the CPU executor: PyTorch, and the kernels of TVM's own paged KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..testing import PagedBatch
from .peers import Prepared, Skipped, require
from .workloads import Workload


class Torch:
    """torch.nn.functional.scaled_dot_product_attention on dense keys (no pages), one call per group of equal lengths."""

    def variants(self, workload: Workload) -> Sequence[str]:
        return ("",)

    def prepare(self, variant: str, workload: Workload, batches: Sequence[PagedBatch]) -> Prepared:
        require("torch", "torch")
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        from ..ops import num_threads

        torch.set_num_threads(num_threads())
        batch = batches[0]

        def tensor(x: np.ndarray) -> Any:
            dtype = getattr(torch, workload.dtype)
            if workload.dtype == "bfloat16":
                return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(dtype)
            return torch.from_numpy(np.ascontiguousarray(x))

        calls = []
        for shape in sorted(set(zip(workload.qo_lens, workload.kv_lens, strict=True))):
            pairs = enumerate(zip(workload.qo_lens, workload.kv_lens, strict=True))
            members = [r for r, pair in pairs if pair == shape]
            q = tensor(np.stack([batch.q[batch.qo_indptr[r] : batch.qo_indptr[r + 1]] for r in members])).transpose(
                1, 2
            )
            k = tensor(np.stack([batch.keys[r] for r in members])).transpose(1, 2).contiguous()
            v = tensor(np.stack([batch.values[r] for r in members])).transpose(1, 2).contiguous()
            qo_len, kv_len = shape
            options: dict[str, Any] = {
                "scale": batch.sm_scale,
                "enable_gqa": workload.num_qo_heads != workload.num_kv_heads,
            }
            if qo_len == kv_len:
                options["is_causal"] = qo_len > 1
            elif qo_len > 1:
                options["attn_mask"] = torch.ones(qo_len, kv_len, dtype=torch.bool).tril(kv_len - qo_len)
            calls.append((members, q, k, v, options))

        def run() -> list[Any]:
            return [scaled_dot_product_attention(q, k, v, **options) for _, q, k, v, options in calls]

        def output() -> np.ndarray:
            o = np.zeros(batch.q.shape, np.float64)
            for (members, *_), result in zip(calls, run(), strict=True):
                for r, rows in zip(members, result.transpose(1, 2), strict=True):
                    o[batch.qo_indptr[r] : batch.qo_indptr[r + 1]] = rows.to(torch.float64).numpy()
            return o

        return Prepared([run], output)


class TvmTir:
    """The kernels of TVM's builtin paged KV cache for the CPU, compiled for this machine."""

    def variants(self, workload: Workload) -> Sequence[str]:
        return ("",)

    def prepare(self, variant: str, workload: Workload, batches: Sequence[PagedBatch]) -> Prepared:
        require("tvm")
        import tvm
        from tvm.relax.frontend.nn.llm import _decode_kernels, _prefill_kernels

        if workload.dtype == "bfloat16":
            raise Skipped("TVM's CPU kernels do not compile for bfloat16")
        if workload.ragged:
            raise Skipped("keys without pages: not measured")
        batch = batches[0]
        decode = all(n == 1 for n in workload.qo_lens)
        heads: tuple[Any, ...] = (
            workload.num_kv_heads,
            workload.num_qo_heads,
            workload.head_dim,
            workload.dtype,
            False,
            {},
        )
        make = _decode_kernels._attention_decode_cpu if decode else _prefill_kernels._attention_prefill_cpu
        function = make(*heads, workload.page_size)
        library = tvm.compile(
            tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), tvm.target.Target({"kind": "llvm"})
        )
        # TVM's tables have no garbage entries and no empty pages at the end of a request
        pages = [
            batch.kv_page_indices[batch.kv_page_indptr[r] : batch.kv_page_indptr[r] + -(-n // workload.page_size)]
            for r, n in enumerate(workload.kv_lens)
        ]
        indptr = np.concatenate([[0], np.cumsum([len(p) for p in pages])]).astype(np.int32)
        last = np.asarray([(n - 1) % workload.page_size + 1 for n in workload.kv_lens], np.int32)
        positions = np.concatenate(
            [np.arange(m - n, m) for n, m in zip(workload.qo_lens, workload.kv_lens, strict=True)]
        ).astype(np.int32)
        o = tvm.runtime.tensor(np.zeros(batch.q.shape, batch.q.dtype))
        lse = tvm.runtime.tensor(np.zeros(batch.q.shape[:2], np.float32))
        t = [
            tvm.runtime.tensor(x)
            for x in (batch.q, batch.qo_indptr, batch.kv_cache, indptr, np.concatenate(pages), last)
        ]
        q, qo_indptr, cache, kv_indptr, indices, last_page_len = t
        rope_offset = tvm.runtime.tensor(np.zeros(len(workload.kv_lens), np.int32))
        position = tvm.runtime.tensor(positions)
        kernel = library["main"]
        tables = (cache, kv_indptr, indices, last_page_len, rope_offset, position, o, lse)
        arguments = (q, *tables) if decode else (q, qo_indptr, *tables, 1)

        def run() -> None:
            kernel(*arguments, 0, 1.0, 1e4, batch.sm_scale)

        def output() -> np.ndarray:
            run()
            return o.numpy().astype(np.float64)

        return Prepared([run], output)

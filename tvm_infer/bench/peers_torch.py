"""Peers of PyTorch on CUDA: scaled_dot_product_attention and FlexAttention, on dense keys (no pages)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import variants as variants_module
from .inputs import DeviceBatch
from .peers import Prepared, Skipped, require
from .workloads import Workload


@dataclass(frozen=True)
class Group:
    """`n` requests of equal lengths, dense. q : [n, num_qo_heads, qo_len, head_dim]. k, v : [n, num_kv_heads, kv_len, head_dim]."""

    members: tuple[int, ...]
    qo_len: int
    kv_len: int
    q: Any
    k: Any
    v: Any


def equal_lengths(workload: Workload) -> dict[tuple[int, int], tuple[int, ...]]:
    """(qo_len, kv_len) -> its requests."""
    groups: dict[tuple[int, int], list[int]] = {}
    for r, pair in enumerate(zip(workload.qo_lens, workload.kv_lens, strict=True)):
        groups.setdefault(pair, []).append(r)
    return {pair: tuple(members) for pair, members in groups.items()}


def dense_groups(batch: DeviceBatch) -> list[Group]:
    """The batch in dense tensors, one set for each group of equal lengths."""
    import torch

    starts = torch.tensor(batch.workload.qo_lens).cumsum(0).tolist()
    groups = []
    for (n, m), members in equal_lengths(batch.workload).items():
        keys = [batch.dense(r) for r in members]
        groups.append(
            Group(
                members,
                n,
                m,
                torch.stack([batch.q[starts[r] - n : starts[r]].transpose(0, 1) for r in members]).contiguous(),
                torch.stack([k for k, _ in keys]).contiguous(),
                torch.stack([v for _, v in keys]).contiguous(),
            )
        )
    return groups


def scatter(workload: Workload, groups: Sequence[Group], results: Sequence[Any], like: Any) -> Any:
    """Results of groups, [n, num_qo_heads, qo_len, head_dim] each, in the order of tokens of `like`."""
    import torch

    starts = torch.tensor(workload.qo_lens).cumsum(0).tolist()
    out = torch.full_like(like, float("nan"))
    for group, result in zip(groups, results, strict=True):
        for r, rows in zip(group.members, result.transpose(1, 2), strict=True):
            out[starts[r] - group.qo_len : starts[r]] = rows
    return out


def _prepared(
    workload: Workload, batches: Sequence[DeviceBatch], call: Callable[[Group], Any], dense: Sequence[Sequence[Group]]
) -> Prepared:
    def runner(groups: Sequence[Group]) -> Callable[[], list[Any]]:
        return lambda: [call(group) for group in groups]

    runs = [runner(groups) for groups in dense]
    count = len(dense[0])
    return Prepared(
        runs,
        lambda: scatter(workload, dense[0], runs[0](), batches[0].out),
        note="dense keys" if count == 1 else f"dense keys, {count} calls: one for each pair of lengths",
    )


class Torch:
    """scaled_dot_product_attention, by backend: FlashAttention and cuDNN as torch ships them."""

    takes_unequal = True

    def variants(self, workload: Workload) -> Sequence[str]:
        require("torch", "torch")
        return ("flash", "cudnn")

    def prepare(self, variant: str, workload: Workload, batches: Sequence[DeviceBatch]) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.bias import causal_lower_right
        from torch.nn.functional import scaled_dot_product_attention

        if variant == "flash" and workload.head_dim_vo:
            raise Skipped("torch's FlashAttention takes keys as wide as values")
        history = any(1 < n < m for n, m in equal_lengths(workload))
        if variant == "cudnn" and history:
            raise Skipped("torch hands cuDNN no causal mask for queries with history")
        backend = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[variant]
        scale, gqa = batches[0].sm_scale, workload.num_qo_heads != workload.num_kv_heads

        def call(group: Group) -> Any:
            n, m = group.qo_len, group.kv_len
            mask = causal_lower_right(n, m) if 1 < n < m else None
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(
                    group.q, group.k, group.v, attn_mask=mask, is_causal=n == m and n > 1, scale=scale, enable_gqa=gqa
                )

        return _prepared(workload, batches, call, [dense_groups(b) for b in batches])


class Flex:
    """FlexAttention through torch.compile: the attention that PyTorch's compiler generates (Triton), with a block mask."""

    takes_variants = True
    takes_unequal = True

    def variants(self, workload: Workload) -> Sequence[str]:
        require("torch", "torch")
        require("triton")
        if len(equal_lengths(workload)) > 1:
            raise Skipped("lengths differ: one block mask and one compiled kernel for each pair of lengths")
        return ("",)

    def prepare(self, variant: str, workload: Workload, batches: Sequence[DeviceBatch]) -> Prepared:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        ((n, m),) = equal_lengths(workload)
        torch._dynamo.reset()  # a compiled kernel for each shape: dynamo gives up after a few recompilations otherwise
        compiled = torch.compile(flex_attention, dynamic=False)

        mods = variants_module.flex(batches[0])
        hides = mods.mask

        def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            seen = workload.sees(q_idx + (m - n), kv_idx)
            return seen if hides is None else seen & hides(q_idx, kv_idx)

        needs_mask = n > 1 or workload.window >= 0 or workload.chunk > 0 or hides is not None
        block_mask = create_block_mask(visible, None, None, n, m, device=batches[0].q.device) if needs_mask else None
        scale, gqa = batches[0].sm_scale, workload.num_qo_heads != workload.num_kv_heads

        def call(group: Group) -> Any:
            return compiled(
                group.q, group.k, group.v, score_mod=mods.score, block_mask=block_mask, scale=scale, enable_gqa=gqa
            )

        return _prepared(workload, batches, call, [dense_groups(b) for b in batches])

"""A CUDA schedule for nn.rms_norm: one block of threads a row, which is read once, 16 bytes a load, and stays in registers.

TVM's own schedule reads a row twice, one element a load, with 1024 threads whatever its width. A decode step's rows are few and short:
a norm takes as long as its chain of dependent loads and barriers, so this one has few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import DataType, s_tir, tirx
from tvm.s_tir import dlight

from .nodes import static_int

LOAD_BYTES = 16
MAX_THREADS = 1024
MAX_LOADS = 8  # of a thread
_WARP = 32
_NORM_BLOCK, _ROOT_BLOCK = (
    "T_rms_norm",
    "rsqrt",
)  # what TVM's legalisation of nn.rms_norm calls the blocks that scale and by what


@dataclass(frozen=True)
class RowThreads:
    """How `threads` threads share a row: each takes `loads` vectors of `lanes` elements that lie next to each other."""

    threads: int
    loads: int
    lanes: int

    @staticmethod
    def of(width: int, element_bytes: int) -> RowThreads | None:
        """The widest loads that give whole warps equal shares; None where not even single elements do. (A thread without a share would
        bring an undefined value into the sum.)"""
        lanes = LOAD_BYTES // element_bytes
        while lanes:
            vectors, rest = divmod(width, lanes * _WARP)
            for loads in range(1, MAX_LOADS + 1):
                if rest == 0 and vectors % loads == 0 and 0 < vectors // loads * _WARP <= MAX_THREADS:
                    return RowThreads(vectors // loads * _WARP, loads, lanes)
            lanes //= 2
        return None


class RowNorm(dlight.base.ScheduleRule):
    """A rule for `tvm.s_tir.dlight.ApplyDefaultSchedule`.

    Schedules for CUDA what TVM makes of nn.rms_norm over the last axis: of any number of rows, with elementwise operators fused
    behind it or not, where RowThreads divides the width. Any other function it leaves to the next rule.
    """

    def apply(self, func: Any, target: Any, _: bool) -> Any | None:
        """The schedule, or None."""
        if str(target.kind.name) != "cuda":
            return None
        sch = s_tir.Schedule(func)
        norm = _Norm.find(sch)
        if norm is None:
            return None
        _schedule(sch, norm)
        return sch


@dataclass(frozen=True)
class _Norm:
    """The blocks that everything else is inlined into. total : sums the squares of a row; root : 1 / root of their mean; scaled : the
    result."""

    total: Any
    root: Any
    scaled: Any
    share: RowThreads

    @staticmethod
    def find(sch: Any) -> _Norm | None:
        """The norm over the last axis that the function is, or None."""
        blocks = sch.get_child_blocks(sch.get_sblock("root"))
        names = [str(sch.get(block).name_hint) for block in blocks]
        totals = [block for block in blocks if _reduced(sch, block)]
        if len(totals) != 1 or names.count(_NORM_BLOCK) != 1 or names.count(_ROOT_BLOCK) != 1:
            return None
        total, root, scaled = totals[0], blocks[names.index(_ROOT_BLOCK)], blocks[-1]
        for block in blocks:
            if block not in (total, root, scaled):
                sch.compute_inline(block)
        inputs, axes = sch.get(total).reads, _reduced(sch, total)
        rows = [static_int(var.dom.extent) for var in sch.get(total).iter_vars if not var.same_as(axes[0])]
        if None in [extent for extent in rows if extent != 1][1:]:
            return None  # TVM could not prove that the product of the extents is the number of blocks
        if len(inputs) != 1 or len(axes) != 1 or not inputs[0].region[-1].min.same_as(axes[0].var):
            return None
        width = static_int(axes[0].dom.extent)
        share = None if width is None else RowThreads.of(width, DataType(inputs[0].source.dtype).itemsize)
        return None if share is None else _Norm(total, root, scaled, share)


def _reduced(sch: Any, block: Any) -> list[Any]:
    return [var for var in sch.get(block).iter_vars if int(var.iter_type) == tirx.IterVar.CommReduce]


def _schedule(sch: Any, norm: _Norm) -> None:
    total, scaled, share = norm.total, norm.scaled, norm.share
    x = sch.cache_read(total, 0, "local", consumer_blocks=[total, scaled])
    stored = sch.cache_write(scaled, 0, "local")
    for block in (x, total, scaled, stored):
        sch.fuse(*sch.get_loops(block)[:-1])

    # each thread's part of the sum, from the elements that it loads
    thread, _ = sch.split(sch.get_loops(total)[-1], [share.threads, share.loads * share.lanes])
    part = sch.rfactor(thread, 0)
    row, _ = sch.get_loops(x)
    sch.bind(row, "blockIdx.x")
    sch.reverse_compute_at(part, _share_out(sch, x, share))
    sch.set_scope(part, 0, "local")

    # the sum over the threads, which all of them get
    # NOTE: not in local scope: TVM would compute the root in place, in the word of shared memory that all threads read the sum from
    sch.reverse_compute_at(total, row)
    sch.bind(sch.get_loops(total)[-1], "threadIdx.x")
    sch.set_scope(total, 0, "shared")

    sch.reverse_compute_at(norm.root, row)
    sch.set_scope(norm.root, 0, "local")
    sch.reverse_compute_at(scaled, row)
    width = share.threads * share.loads * share.lanes
    for index, read in enumerate(sch.get(scaled).reads):
        if [static_int(extent) for extent in read.source.shape] == [width]:
            weight = sch.cache_read(scaled, index, "local")
            sch.compute_at(weight, row, index=0)  # its loads are under way before those of x are waited for
            _share_out(sch, weight, share)
    thread, _ = sch.split(sch.get_loops(scaled)[-1], [share.threads, share.loads * share.lanes])
    sch.bind(thread, "threadIdx.x")
    sch.compute_at(norm.root, thread)  # once a thread, not once an element
    sch.reverse_compute_at(stored, thread)
    out_bytes = DataType(sch.get(stored).writes[0].source.dtype).itemsize
    _, lanes = sch.split(sch.get_loops(stored)[-1], [None, min(share.lanes, LOAD_BYTES // out_bytes)])
    sch.vectorize(lanes)


def _share_out(sch: Any, copy: Any, share: RowThreads) -> Any:
    """Bind a copy of a row to the threads, in vectors; returns the loop over threads."""
    thread, _, lanes = sch.split(sch.get_loops(copy)[-1], [share.threads, share.loads, share.lanes])
    sch.bind(thread, "threadIdx.x")
    sch.vectorize(lanes)
    return thread

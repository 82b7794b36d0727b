"""A Plan as a value to look at: its arrays as numpy views, a text table, a plot. Layout: cuda_src/tvm_infer/schedule/plan.h."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ..band import Band
from ..errors import ArgumentError, MissingDependencyError, PlanMismatchError

PLAN_MAGIC = 0x4E4C5054
PLAN_VERSION = 4
FINAL_ROWS = -1
NUM_TICKETS = 3  # before those of the merges: PlanTicket

_HEADER_INT32 = (
    "bytes_used num_ctas num_requests num_tokens num_kv_heads group_size num_kv_lists num_works num_merges num_merge_slots "
    "num_partial_rows num_shared_works band_left band_right num_tile_classes works_offset work_indptr_offset merges_offset "
    "merge_indptr_offset merge_slots_offset qo_indptr_offset kv_len_offset"
).split()
HEADER = np.dtype(
    [
        ("magic", "<i4"),
        ("version", "<i4"),
        ("capture_key", "<u8"),
        *[(name, "<i4") for name in _HEADER_INT32],
        ("makespan", "<i8"),
        ("total_cost", "<i8"),
        ("flat_cost", "<i8"),
        ("tile_classes_offset", "<i4"),
        ("token_order_offset", "<i4"),
        ("tickets_offset", "<i4"),
        ("paced_ctas", "<i4"),
        ("window_left", "<i4"),
        ("num_sink", "<i4"),
        ("chunk", "<i4"),
        ("num_levels", "<i4"),
    ]
)
_HEADER_FIELDS: Any = HEADER.fields
# Words of the band: its right side; window_left, which num_sink and chunk follow. Calls read all: a fifth of what it takes through
# the header.
_RIGHT, _LEFT = _HEADER_FIELDS["band_right"][1] // 4, _HEADER_FIELDS["window_left"][1] // 4
_WORK_FIELDS = (
    "row_begin num_rows kv_head_begin num_kv_heads kv_list kv_begin kv_end merge_tiles qo_pos_base tile_class out merge"
).split()
WORK = np.dtype([(name, "<i4") for name in _WORK_FIELDS])
MERGE = np.dtype([(name, "<i4") for name in ("row_begin", "num_rows", "kv_head_begin", "num_kv_heads")])
TILE_CLASS = np.dtype([("rows", "<i4"), ("kv_granule", "<i4"), ("fixed", "<i8"), ("row", "<i8"), ("kv", "<i8")])


def _word(name: str, doc: str) -> property:
    """An int32 of the header, read from the buffer each time: the buffer may be planned into again."""
    index = _HEADER_FIELDS[name][1] // 4
    return property(lambda self: int(self.buffer[index]), doc=doc)


class Plan:
    """Who computes which query rows against which keys, and which partial results are merged.

    Wraps the buffer that the planner wrote (no copy); arrays are views of it. Made by :func:`tvm_infer.plan`.

    Parameters
    ----------
    buffer : int32 or uint8 array, contiguous, host: a plan, possibly followed by unused space.
    device_buffer : int32 tensor on a cuda device that holds a copy of the plan, or None.

    Attributes
    ----------
    buffer : int32 array, the whole buffer as the cpu executor takes it.
    device_buffer : the copy that cuda kernels read, or None: the plan is for the cpu.
    num_ctas, num_requests, num_kv_lists, num_tokens, num_kv_heads, group_size, num_works, num_shared_works, num_merges,
    num_partial_rows, bytes_used : int
    band : Band, the keys that a query sees by position. header["band_left"] and ["band_right"] are the part that executors test.
    works : structured array, fields of plan.h's Work. CTA c executes ``works[work_indptr[c]:work_indptr[c + 1]]``.
    merges : structured array; merge m joins partials ``merge_slots[merge_indptr[m]:merge_indptr[m + 1]]``.
    tile_classes : structured array, the tile table with its costs in picoseconds.
    makespan_us, total_cost_us : predicted load of the busiest CTA, and of all together.
    capture_key : what a captured graph bakes in; a plan of another key cannot replace this one.

    Raises
    ------
    ArgumentError : the buffer is of another dtype or not contiguous.
    PlanMismatchError : it holds no plan, a plan of another version, or a part of one.
    """

    def __init__(self, buffer: np.ndarray, device_buffer: Any = None) -> None:
        if (
            not isinstance(buffer, np.ndarray)
            or buffer.dtype not in (np.int32, np.uint8)
            or buffer.ndim != 1
            or not buffer.flags.c_contiguous
            or buffer.nbytes % 4
        ):
            what = (
                f"{buffer.dtype} array of shape {buffer.shape}"
                if isinstance(buffer, np.ndarray)
                else type(buffer).__name__
            )
            raise ArgumentError(
                f"argument `buffer` is a {what}; it must be a contiguous int32 array [words], or uint8 [4 * words]"
            )
        self.buffer = buffer if buffer.dtype == np.int32 else buffer.view(np.int32)
        self.device_buffer = device_buffer
        if buffer.nbytes < HEADER.itemsize or int(self.buffer[0]) != PLAN_MAGIC:
            raise PlanMismatchError(
                f"argument `buffer` ({buffer.nbytes} bytes) holds no plan: a plan starts with the word {PLAN_MAGIC:#x} and a header "
                f"of {HEADER.itemsize} bytes. Make one with tvm_infer.plan"
            )
        if int(self.buffer[1]) != PLAN_VERSION:
            raise PlanMismatchError(
                f"the plan has version {int(self.buffer[1])}, this tvm_infer reads version {PLAN_VERSION}: make the plan with the "
                "library that runs it"
            )
        if self.bytes_used > buffer.nbytes:
            raise PlanMismatchError(
                f"argument `buffer` has {buffer.nbytes} bytes, the plan in it {self.bytes_used}: it was cut off. Keep bytes_used bytes"
            )

    @property
    def header(self) -> Any:
        """PlanHeader of plan.h as a structured value: ``plan.header["num_ctas"]``."""
        return self.buffer[: HEADER.itemsize // 4].view(HEADER)[0]

    def _array(self, name: str, dtype: Any, count: int) -> np.ndarray:
        offset = int(self.header[f"{name}_offset"])
        if offset == 0:
            return np.zeros(0, dtype)
        size = count * np.dtype(dtype).itemsize
        return self.buffer.view(np.uint8)[offset : offset + size].view(dtype)

    @functools.cached_property
    def host_tensor(self) -> Any:
        """`buffer` as a tensor of tvm-ffi: a packed function takes it ten times faster than a numpy array."""
        import tvm_ffi

        return tvm_ffi.from_dlpack(self.buffer) if self.buffer.flags.writeable else self.buffer

    bytes_used = _word("bytes_used", "Bytes of the header and its arrays.")
    num_ctas = _word("num_ctas", "CTAs whose queues the plan fills.")
    num_requests = _word("num_requests", "Requests of the batch.")
    num_kv_lists = _word(
        "num_kv_lists", "Lists of keys: one for each request, or for each request and KV head (`has_head_lists`)."
    )
    num_tokens = _word("num_tokens", "Query tokens of all requests.")
    num_kv_heads = _word("num_kv_heads", "KV heads.")
    group_size = _word("group_size", "Query heads of each KV head.")
    num_works = _word("num_works", "Works of all CTAs.")
    num_merges = _word("num_merges", "Tiles whose keys were cut.")
    num_shared_works = _word(
        "num_shared_works", "Works with rows of several requests, whose keys are read once for all."
    )
    num_partial_rows = _word("num_partial_rows", "Rows of fp32 partial results that a workspace must hold.")

    @property
    def capture_key(self) -> int:
        """What a captured graph bakes in of the settings, 64 bits."""
        return int(self.header["capture_key"])

    makespan_us = property(lambda self: int(self.header["makespan"]) / 1e6)
    total_cost_us = property(lambda self: int(self.header["total_cost"]) / 1e6)

    @property
    def band(self) -> Band:
        """Keys that a query sees, by position; the plan leaves out what no row of a tile sees."""
        left, num_sink, chunk = self.buffer[_LEFT : _LEFT + 3].tolist()
        return Band(left, int(self.buffer[_RIGHT]), num_sink, chunk)

    @property
    def needs_variant(self) -> bool:
        """Whether it runs only with a variant, whose mask tests its sinks or chunks row by row."""
        return bool(self.buffer[_LEFT + 1] or self.buffer[_LEFT + 2])

    @property
    def has_head_lists(self) -> bool:
        """Whether the KV heads of a request have lists of keys of their own. With one KV head there is no difference."""
        return self.num_kv_lists != self.num_requests

    @property
    def works(self) -> np.ndarray:
        """Structured array [num_works]: fields of plan.h's Work, those of one CTA together."""
        return self._array("works", WORK, self.num_works)

    @property
    def work_indptr(self) -> np.ndarray:
        """int32 [num_ctas + 1]."""
        return self._array("work_indptr", np.int32, self.num_ctas + 1)

    @property
    def merges(self) -> np.ndarray:
        """Structured array [num_merges]: rows and heads whose keys were split."""
        return self._array("merges", MERGE, self.num_merges)

    @property
    def merge_indptr(self) -> np.ndarray:
        """int32 [num_merges + 1]."""
        return self._array("merge_indptr", np.int32, self.num_merges + 1)

    @property
    def merge_slots(self) -> np.ndarray:
        """int32 [number of partials]: `out` of the works that a merge joins, in ascending order of keys."""
        return self._array("merge_slots", np.int32, int(self.header["num_merge_slots"]))

    @property
    def qo_indptr(self) -> np.ndarray:
        """int32 [num_requests + 1]: query tokens of each request."""
        return self._array("qo_indptr", np.int32, self.num_requests + 1)

    @property
    def kv_len(self) -> np.ndarray:
        """int32 [num_kv_lists]: keys of each request; of KV head h of request r at r * num_kv_heads + h."""
        return self._array("kv_len", np.int32, self.num_kv_lists)

    @property
    def token_order(self) -> np.ndarray:
        """int32 [num_tokens]: packed row r is of token ``token_order[r // group_size]``. The identity where no keys are shared."""
        if int(self.header["token_order_offset"]) == 0:
            return np.arange(self.num_tokens, dtype=np.int32)
        return self._array("token_order", np.int32, self.num_tokens)

    @property
    def tile_classes(self) -> np.ndarray:
        """Structured array: the tile table that the plan was made with; costs in picoseconds."""
        return self._array("tile_classes", TILE_CLASS, int(self.header["num_tile_classes"]))

    def requests_of(self, work: Any) -> np.ndarray:
        """int [n]: requests whose rows a work has, in the order of the rows."""
        first, last = int(work["row_begin"]), int(work["row_begin"]) + int(work["num_rows"]) - 1
        tokens = self.token_order[first // self.group_size : last // self.group_size + 1]
        requests = np.searchsorted(self.qo_indptr, tokens, side="right") - 1
        return requests[np.append(True, requests[1:] != requests[:-1])]

    def work_costs(self) -> np.ndarray:
        """int64 [num_works]: predicted picoseconds of each work, all its KV heads together."""
        works = self.works
        tile = self.tile_classes[works["tile_class"]]
        granule = tile["kv_granule"].astype(np.int64)
        keys = -(-(works["kv_end"] - works["kv_begin"]) // granule) * granule  # a tile is computed whole
        return (
            np.maximum(1, tile["fixed"] + tile["row"] * works["num_rows"] + tile["kv"] * keys) * works["num_kv_heads"]
        )

    def loads(self) -> np.ndarray:
        """int64 [num_ctas]: predicted picoseconds of each CTA. Their maximum is the makespan, their sum the total cost."""
        ends = np.concatenate([[0], np.cumsum(self.work_costs())])[self.work_indptr]
        return np.diff(ends)

    @property
    def balance(self) -> float:
        """Mean load / load of the busiest CTA: 1.0 is perfect."""
        makespan = int(self.header["makespan"])
        return int(self.header["total_cost"]) / (self.num_ctas * makespan) if makespan else 1.0

    def __repr__(self) -> str:
        where = "" if self.device_buffer is None else f", on {self.device_buffer.device}"
        return (
            f"Plan({self.num_requests} requests, {self.num_tokens} tokens, {self.num_ctas} CTAs, {self.num_works} works, "
            f"{self.num_merges} merges, makespan {self.makespan_us:.1f} us{where})"
        )

    def __str__(self) -> str:
        from .text import plan_table

        return plan_table(self)

    def plot(self, path: Any = None) -> Any:
        """Load of each CTA, stacked by work and coloured by request, with the mean as a line.

        Parameters
        ----------
        path : file to save to (the ending chooses the format), or None.

        Returns
        -------
        matplotlib.figure.Figure : shown by notebooks.

        Raises
        ------
        MissingDependencyError : matplotlib is not installed.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingDependencyError(
                "Plan.plot() needs matplotlib, which is not installed: `pip install 'tvm_infer[plot]'`"
            ) from error
        works, indptr, cost = self.works, self.work_indptr, self.work_costs() / 1e6
        cta = np.repeat(np.arange(self.num_ctas), np.diff(indptr))
        ends = np.concatenate([[0.0], np.cumsum(cost)])
        bottom = ends[:-1] - ends[indptr[cta]]
        figure = Figure(figsize=(min(16.0, 5.0 + 0.07 * self.num_ctas), 3.6), layout="constrained")
        axes = figure.subplots()
        request = works["kv_list"] // (self.num_kv_heads if self.has_head_lists else 1)
        color = colormaps["tab20"]((request * 7 % 20) / 19.5)
        axes.bar(cta, cost, bottom=bottom, width=0.9, color=color, edgecolor="white", linewidth=0.3)
        mean = self.total_cost_us / self.num_ctas
        axes.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean {mean:.1f} us")
        axes.set(xlabel="CTA", ylabel="predicted load (us)", xlim=(-0.7, self.num_ctas - 0.3))
        axes.set_title(
            f"{self.num_requests} requests, {self.num_works} works coloured by request, {self.num_merges} merges, "
            f"balance {self.balance:.3f}",
            fontsize="medium",
        )
        axes.legend(loc="lower right")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

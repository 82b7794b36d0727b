"""One cache of a compiled model: a virtual machine of its own, and how a step runs on it.

A captured CUDA graph keeps the addresses it was captured with and does not know which cache they belong to. So every cache gets a
virtual machine of its own: graphs and activations are its, the weights are everybody's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm_ffi

from .. import _array, _ffi
from ..errors import CacheStateError
from . import ranges
from .kv_cache import PagedKVCache

if TYPE_CHECKING:
    from .manifest import Manifest


@dataclass(frozen=True)
class StepShape:
    """How a step is begun. num_rows : of its tensors, padding included. logit_rows : which of them get logits; None: all.

    wanted : rows of the logits that the caller asked for. is_decode : the captured function runs it.
    """

    num_rows: int
    logit_rows: np.ndarray | None
    wanted: np.ndarray | slice
    is_decode: bool = False


class StepResult:
    """Logits of a step on the host.

    sequences : whose tokens they follow, an id for each row; None where rows were asked for by number. step : its own number.
    """

    def __init__(self, logits: Any, wanted: np.ndarray | slice) -> None:
        self._logits, self._wanted = logits, wanted
        self.sequences: tuple[int, ...] | None = None
        self.step = 0

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """float32 [rows asked for, vocab_size]."""
        logits = np.from_dlpack(self._logits)
        return logits.reshape(-1, logits.shape[-1])[self._wanted].astype(np.float32, copy=False)

    @functools.cached_property
    def greedy(self) -> np.ndarray:
        """int64 [rows asked for]: the token with the largest logit."""
        return self.logits.argmax(axis=-1)


class DeviceStepResult(StepResult):
    """Logits of a step on a device, which the host waits for when it asks, on the stream that the step was launched on.

    is_current : says whether the buffers still hold this step's results. CacheStateError where they do not and are asked for.
    is_decode : whether it is of a captured step, whose buffers the next one uses too.
    """

    is_decode = False

    def __init__(
        self, logits: Any, tokens: Any, wanted: np.ndarray | slice, device: Any, is_current: Callable[[], bool]
    ) -> None:
        super().__init__(logits, wanted)
        self._tokens, self._device, self._is_current = tokens, device, is_current
        self._stream = tvm_ffi.get_raw_stream(device)
        self._kept: Callable[[], np.ndarray] | None = None

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """float32 [rows asked for, vocab_size], copied."""
        logits, vocab_size = self._logits, int(self._logits.shape[-1])
        if isinstance(self._wanted, slice) and self._wanted.stop > 0:  # they come first: padding is not copied
            logits = logits._create_view((self._wanted.stop, vocab_size))
        with self._reading("logits"):
            on_host = _array.copy_to_host(logits)
        return on_host.reshape(-1, vocab_size)[self._wanted].astype(np.float32, copy=False)

    @functools.cached_property
    def greedy(self) -> np.ndarray:
        """int64 [rows asked for]: the token with the largest logit, found on the device."""
        if self._kept is not None:
            with ranges.mark("tokens"):
                return self._kept()[self._wanted].copy()
        with self._reading("tokens"):
            return self._fetch_tokens()

    def keep_tokens(self, slot: TokenSlot, tokens: Any) -> None:
        """Let `slot` have the tokens, which lie in `tokens`, before the next step writes its own there."""
        if "greedy" not in self.__dict__:
            self._kept = slot.hold(tokens)

    def is_followed_on_this_stream(self) -> bool:
        """Whether the next step may read the tokens on the device: they are there still, and the caller's stream orders the two."""
        return self._is_current() and self._stream == tvm_ffi.get_raw_stream(self._device)

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        if not self._is_current():
            raise CacheStateError(_TOO_LATE.format(what=what))
        # the caller's stream may be another one by now, and would not wait for the step
        with ranges.mark(what), tvm_ffi.use_raw_stream(self._device, self._stream):
            yield

    def _fetch_tokens(self) -> np.ndarray:
        tokens = self._tokens
        if isinstance(tokens, np.ndarray):  # memory that the device writes to
            _ffi.func("wait_for_stream")(self._device)
            return tokens[self._wanted].copy()
        return _array.copy_to_host(tokens).reshape(-1)[self._wanted]


_TOO_LATE = (
    "the {what} of a decode step were asked for after the cache's next step, which wrote its own over them: read .logits or .greedy of "
    "a result before the next step of the same cache (.greedy of one that Executable.decode_next followed, before the step after that)"
)


class TokenSlot:
    """Page-locked memory where the tokens of a step stay while the steps behind it write theirs."""

    def __init__(self, rows: int, device: Any) -> None:
        import tvm

        _, on_host = _ffi.func("host_visible")((rows,), "int64", device)
        self._tensor, self._on_host = tvm.runtime.from_dlpack(on_host), np.from_dlpack(on_host)
        self._record, self._wait = _ffi.func("new_event")(device)
        self._holds = 0  # how often it was given tokens

    def hold(self, tokens: Any) -> Callable[[], np.ndarray]:
        """Copy int64 [n] tokens of the device in the order of the stream; what waits for them and returns a view [rows]."""
        self._holds = number = self._holds + 1
        _ffi.func("copy_on_stream")(tokens, self._tensor._create_view((int(tokens.shape[0]),)))
        self._record()

        def read() -> np.ndarray:
            if self._holds != number:
                raise CacheStateError(_TOO_LATE.format(what="tokens"))
            self._wait()
            return self._on_host

        return read


def logit_rows(lengths: Sequence[int], rows: np.ndarray | None) -> np.ndarray:
    """The rows whose logits are wanted, int64: `rows`, or the last of every sequence that has new tokens."""
    if rows is not None:
        return rows
    ends = np.cumsum(np.asarray(lengths, np.int64)) - 1
    return ends[np.asarray(lengths) > 0]


class Session:
    """Steps on the host: a step has as many rows as tokens, and nothing is captured."""

    def __init__(self, vm: Any, manifest: Manifest, cache: PagedKVCache, weights: Sequence[Any]) -> None:
        self._main = vm[manifest.function]
        self._manifest, self._weights = manifest, weights
        self.latest_step = 0  # the number of its result
        self._handle = cache.__tvm_ffi_object__()

    def shape(self, lengths: list[int], rows: np.ndarray | None) -> StepShape:
        """How a step of these new tokens is begun. rows : as Executable.step has them."""
        wanted = logit_rows(lengths, rows)
        if wanted.size > 1 and rows is not None and (np.diff(wanted) <= 0).any():  # each is computed once, in order
            computed, picked = np.unique(wanted, return_inverse=True)
            return StepShape(sum(lengths), computed, picked)
        # operators are compiled for one row at least
        computed = wanted if wanted.size else np.zeros(1, np.int64)
        return StepShape(sum(lengths), computed, slice(0, wanted.size))

    def run(self, cache: PagedKVCache, shape: StepShape) -> StepResult:
        """The model on the step under way."""
        logits, _ = self._run_main(cache, shape)
        return StepResult(logits, shape.wanted)

    def _run_main(self, cache: PagedKVCache, shape: StepShape) -> tuple[Any, Any]:
        assert shape.logit_rows is not None
        ids, positions, rows = cache.step_inputs(shape.num_rows, shape.logit_rows.size)
        given = {"input_ids": ids, "position_ids": positions, "logit_indices": rows}
        inputs = [_as_dtype(given[name], dtype) for name, dtype in self._manifest.inputs]
        result = self._main(*inputs, self._handle, *self._weights)
        return (result, None) if hasattr(result, "shape") else (result[0], result[1] if len(result) > 1 else None)


def _as_dtype(value: Any, dtype: str) -> Any:
    if dtype == "int64":
        return value
    import tvm

    return tvm.runtime.tensor(np.from_dlpack(value).astype(dtype))


def _padded(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """As many rows as the next power of two, or all: TVM's pool keeps a block for each number of logits that it has seen (0.5 GB of
    blocks for 1 to 64 rows of 128,256 in bfloat16; 33 MB for powers of two), and a new one waits for the device."""
    size = max(rows.size, min(1 << (rows.size - 1).bit_length(), num_rows))
    return np.concatenate([rows, np.zeros(size - rows.size, np.int64)])


_KEPT_STEPS = 2  # followed steps whose tokens can still be read: the one that runs, and the one ahead of it


class CudaSession(Session):
    """Steps on a CUDA device, on the caller's stream: decode steps are one graph each, other steps run kernel by kernel.

    buckets : numbers of rows that decode steps are padded to; one graph each, captured at its first step, all in one workspace.
    """

    def __init__(
        self, vm: Any, manifest: Manifest, cache: PagedKVCache, weights: Sequence[Any], *, use_graphs: bool
    ) -> None:
        super().__init__(vm, manifest, cache, weights)
        self._vm, self._use_graphs = vm, use_graphs
        self._device = tvm_ffi.device(cache.device)
        # both functions run decode steps (graphs on or off), so a bucket is no larger than either was compiled for
        limit = min(manifest.decode_rows, manifest.max_tokens, cache.max_tokens, cache.max_batch)
        self.buckets = (*(b for b in manifest.buckets if b < limit), limit)
        # NOTE: nothing here may hold `cache`, whose end is what ends the session, nor the session itself: device memory would stay
        # until Python looks for cycles.
        self._buffers: tuple[Any, Any, Any] | None = None  # logits, tokens, tokens as the host sees them
        self._graphs: dict[int, tuple[Callable[[], Any], Any, Any]] = {}  # rows -> launch, logits, tokens
        self._slots: list[TokenSlot] = []  # of followed steps, in turn
        self._latest = [0]  # number of the step that the buffers are of

    def shape(self, lengths: list[int], rows: np.ndarray | None) -> StepShape:
        """A step of one token each is padded to a bucket, graph or not: both run the same kernels on the same shapes."""
        count = len(lengths)
        if not 0 < count <= self.buckets[-1] or lengths.count(1) != count:
            shape = super().shape(lengths, rows)
            assert shape.logit_rows is not None
            return replace(shape, logit_rows=_padded(shape.logit_rows, shape.num_rows))
        bucket = self.bucket(count)
        wanted = slice(0, count) if rows is None else rows
        if self._use_graphs:
            return StepShape(bucket, None, wanted, is_decode=True)
        return StepShape(bucket, np.arange(bucket), wanted)

    def run(self, cache: PagedKVCache, shape: StepShape) -> StepResult:
        """The model on the step under way; returns before the device is done."""
        if not shape.is_decode:  # results of their own, in memory that nothing else is given while they live
            return DeviceStepResult(*self._run_main(cache, shape), shape.wanted, self._device, lambda: True)
        launch, logits, tokens = self._graph(cache, shape.num_rows)
        latest = self._latest
        latest[0] = number = latest[0] + 1
        launch()
        result = DeviceStepResult(logits, tokens, shape.wanted, self._device, lambda: latest[0] == number)
        result.is_decode = True
        return result

    def follows(self, previous: StepResult) -> bool:
        """Whether `previous` is the latest step, a captured one, and its tokens are in this stream's order."""
        if not (self._use_graphs and isinstance(previous, DeviceStepResult) and previous.is_decode):
            return False
        return previous.is_followed_on_this_stream()

    def follow(self, cache: PagedKVCache, previous: StepResult) -> StepResult:
        """A decode step whose tokens are those that `previous` found, read where it wrote them. `previous` : one that `follows`."""
        assert isinstance(previous, DeviceStepResult) and previous.sequences is not None and self._buffers is not None
        count = len(previous.sequences)
        if not self._slots:
            self._slots = [TokenSlot(self.buckets[-1], self._device) for _ in range(_KEPT_STEPS)]
        shape = self.shape([1] * count, None)
        with (
            ranges.mark("decode", shape.num_rows),
            cache.forward(previous.sequences, [1] * count, num_rows=shape.num_rows),
        ):
            ids, _, _ = cache.step_inputs(shape.num_rows)
            # from host memory, where the graph writes them, to the step's inputs, and from there to host memory that stays as it is
            ids = ids._create_view((count,))
            _ffi.func("copy_on_stream")(self._buffers[2]._create_view((count,)), ids)
            previous.keep_tokens(self._slots[self._latest[0] % _KEPT_STEPS], ids)
            return self.run(cache, shape)

    def _graph(self, cache: PagedKVCache, rows: int) -> tuple[Callable[[], Any], Any, Any]:
        graph = self._graphs.get(rows)
        if graph is None:
            graph = self._graphs[rows] = self._bind(cache, rows)
        return graph

    def decode_graph(self, cache: PagedKVCache, count: int) -> Callable[[], Any]:
        """What launches the step under way, of `count` sequences with a new token each, begun with the rows of their bucket. Launched
        again it computes the same: keys and values go to the same places."""
        return self._graph(cache, self.bucket(count))[0]

    def bucket(self, count: int) -> int:
        """The rows that a decode step of `count` sequences is padded to."""
        return next(b for b in self.buckets if b >= count)

    def _make_buffers(self, device: str) -> tuple[Any, Any, Any]:
        """Logits and tokens of the largest bucket, which smaller ones use the beginning of, and the tokens as the host sees them."""
        import tvm

        rows, m = self.buckets[-1], self._manifest
        tokens, on_host = _ffi.func("host_visible")((rows,), "int64", self._device)
        logits = tvm.runtime.empty((rows, m.vocab_size), m.logits_dtype, tvm.device(device))
        return logits, tvm.runtime.from_dlpack(tokens), tvm.runtime.from_dlpack(on_host)

    def _bind(self, cache: PagedKVCache, rows: int) -> tuple[Callable[[], Any], Any, Any]:
        """The captured function with its arguments, which stay the same: what changes lies in the buffers."""
        m = self._manifest
        if self._buffers is None:
            self._buffers = self._make_buffers(cache.device)
        logits, tokens, host_tokens = self._buffers
        logits = logits._create_view((1,) * (m.logits_rank - 2) + (rows, m.vocab_size))
        tokens = tokens._create_view((1, rows))
        ids, positions, _ = cache.step_inputs(rows)
        given = {"input_ids": ids, "position_ids": positions}
        inputs = [given[name] for name, _ in m.inputs if name in given]
        name = f"decode_of_{rows}_rows"
        arguments = (*inputs, self._handle, *self._weights, logits, tokens)
        self._vm.save_function(m.decode_function, name, *arguments, include_return=False)
        return self._vm[name], logits, np.from_dlpack(host_tokens)

"""One cache of a compiled model: a virtual machine of its own, and how a step runs on it.

A captured CUDA graph keeps the addresses it was captured with and does not know which cache they belong to. So every cache gets a virtual
machine of its own: graphs and activations are its, the weights are everybody's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .kv_cache import PagedKVCache

if TYPE_CHECKING:
    from .executable import Manifest


class StepResult:
    """Logits of a step, fetched from the device when they are asked for; good until the next step of the same cache."""

    def __init__(self, logits: Any, tokens: Any, num_logits: int, rows: Sequence[int] | None = None) -> None:
        self._logits, self._tokens, self._num_logits, self._rows = logits, tokens, num_logits, rows

    @functools.cached_property
    def logits(self) -> np.ndarray:
        """float32 [num_logits, vocab_size], copied from the device where there is one."""
        logits = _to_numpy(self._logits)
        logits = logits.reshape(-1, logits.shape[-1])
        logits = logits[: self._num_logits] if self._rows is None else logits[self._rows]
        return logits.astype(np.float32, copy=False)

    @functools.cached_property
    def greedy(self) -> np.ndarray:
        """int64 [num_logits]: the token with the largest logit. On a device it is found there, and only it is copied."""
        if self._tokens is None:
            return self.logits.argmax(axis=-1) if self._num_logits else np.zeros(0, np.int64)
        tokens = self._tokens.numpy().reshape(-1)
        return tokens[: self._num_logits] if self._rows is None else tokens[self._rows]


def _to_numpy(tensor: Any) -> np.ndarray:
    return np.from_dlpack(tensor) if str(tensor.device).startswith("cpu") else tensor.numpy()


class HostSession:
    """Steps on the host: nothing is captured, a step has as many rows as tokens."""

    def __init__(self, vm: Any, manifest: Manifest, cache: PagedKVCache, weights: Sequence[Any], make: Any) -> None:
        self._main = vm[manifest.function]
        self._manifest, self._weights, self._make = manifest, weights, make
        self._handle = cache.__tvm_ffi_object__()

    def padded_rows(self, lengths: Sequence[int], wants_all: bool) -> int | None:
        """Rows of a step's tensors, for a captured graph; None: as many as tokens."""
        return None

    def run(self, cache: PagedKVCache, num_tokens: int, wanted: np.ndarray) -> StepResult:
        """The model on the step under way. wanted : rows whose logits are computed, at least one."""
        ids, positions, rows = cache.step_inputs(num_tokens, wanted.size)
        given = {"input_ids": ids, "position_ids": positions, "logit_indices": rows}
        inputs = [self._cast(given[name], dtype) for name, dtype in self._manifest.inputs]
        result = self._main(*inputs, self._handle, *self._weights)
        return StepResult(result if hasattr(result, "shape") else result[0], None, wanted.size)

    def _cast(self, value: Any, dtype: str) -> Any:
        return value if dtype == "int64" else self._make(np.from_dlpack(value).astype(dtype))


class CudaSession:
    """Steps on a CUDA device: decode steps as one graph each, others kernel by kernel, all on the caller's stream.

    use_graphs : off, decode steps run kernel by kernel too (the same kernels, the same bits).
    """

    def __init__(self, vm: Any, manifest: Manifest, cache: PagedKVCache, weights: Sequence[Any], make: Any) -> None:
        self._vm, self._manifest, self._weights, self._make = vm, manifest, weights, make
        self._main = vm[manifest.function]
        self._handle = cache.__tvm_ffi_object__()
        self._buffers: tuple[Any, Any] | None = None
        self._decode: dict[int, tuple[Any, Any, Any]] = {}  # rows -> (call, logits, tokens)
        limit = min(manifest.decode_rows, cache.max_tokens, cache.max_batch)
        self.buckets = tuple(b for b in manifest.buckets if b < limit) + ((limit,) if limit else ())
        self.use_graphs = True

    def padded_rows(self, lengths: Sequence[int], wants_all: bool) -> int | None:
        """The smallest captured number of rows that holds a decode step; None for other steps, and for larger ones."""
        count = len(lengths)
        if not (wants_all and self.use_graphs and self.buckets) or count > self.buckets[-1]:
            return None
        if any(length != 1 for length in lengths):
            return None
        return next(bucket for bucket in self.buckets if bucket >= count)

    def run(self, cache: PagedKVCache, num_tokens: int, wanted: np.ndarray) -> StepResult:
        """The model on the step under way, rows as begun: a decode step of padded rows, or any other."""
        bucket = cache.num_rows if self.use_graphs and cache.num_rows in self._decodable(num_tokens, wanted) else None
        raise NotImplementedError(bucket)

    def _decodable(self, num_tokens: int, wanted: np.ndarray) -> tuple[int, ...]:
        return self.buckets

"""A CudaSession without a device: its virtual machine and its device functions are stand-ins that keep what they were given.

TVM's CUDA runtime loads only where a driver is; which buffers, rows and launches a session chooses is decided on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from tvm_infer import PagedKVCache, _array, _ffi
from tvm_infer.runtime import session

VOCAB = 7


def manifest(**changes: Any) -> Any:
    """What a session reads of a manifest."""
    values = {
        "function": "main",
        "decode_function": "decode",
        "decode_rows": 8,
        "buckets": (1, 2, 4, 8),
        "max_tokens": 64,
        "vocab_size": VOCAB,
        "logits_dtype": "float32",
        "logits_rank": 3,
        "inputs": (("input_ids", "int64"), ("position_ids", "int64"), ("logit_indices", "int64")),
    }
    return SimpleNamespace(**{**values, **changes})


def make_cache(**changes: Any) -> PagedKVCache:
    sizes = {"num_layers": 1, "num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 8, "page_size": 4, "num_pages": 64}
    return PagedKVCache(**{**sizes, "max_batch": 8, "max_tokens": 64, **changes})


@dataclass
class FakeVM:
    """Logits of a row are its token, its position and its row number; the token that it answers is the input token + 1."""

    saved: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    launches: list[str] = field(default_factory=list)

    def save_function(self, function: str, name: str, *arguments: Any, include_return: bool) -> None:
        assert function == "decode" and not include_return and name not in self.saved
        self.saved[name] = arguments

    def __getitem__(self, name: str) -> Any:
        if name == "main":
            return self._main
        # no reference to self in what the session keeps: a real one's functions do not keep its Python object either
        saved, launches = self.saved, self.launches

        def launch() -> None:
            launches.append(name)
            ids, positions, _, *_, logits, tokens = saved[name]
            _write(np.from_dlpack(ids)[0], np.from_dlpack(positions)[0], np.from_dlpack(logits)[0])
            np.from_dlpack(tokens)[...] = np.from_dlpack(ids) + 1

        return launch

    def _main(self, ids: Any, positions: Any, rows: Any, *_: Any) -> list[Any]:
        self.launches.append("main")
        picked = np.from_dlpack(rows)
        logits = np.zeros((1, picked.size, VOCAB), np.float32)
        _write(np.from_dlpack(ids)[0][picked], np.from_dlpack(positions)[0][picked], logits[0])
        return [tvm.runtime.tensor(x) for x in (logits, np.from_dlpack(ids)[:, picked] + 1)]


def _write(ids: np.ndarray, positions: np.ndarray, logits: np.ndarray) -> None:
    logits[:, 0], logits[:, 1], logits[:, 2] = ids, positions, np.arange(len(ids))


def make_session(monkeypatch: Any, cache: PagedKVCache, *, use_graphs: bool = True, **changes: Any) -> Any:
    """(session, its virtual machine, streams that were waited for)."""
    waited: list[int] = []
    recorded: list[int] = []
    device = tvm_ffi.device("cpu")

    def func(name: str) -> Any:
        if name == "host_visible":

            def host_visible(shape: Any, dtype: str, _: Any) -> tuple[Any, Any]:
                tensor = tvm.runtime.tensor(np.zeros(shape, dtype))
                return tensor, tensor

            return host_visible
        if name == "copy_on_stream":
            return lambda source, target: np.copyto(
                np.from_dlpack(target), np.from_dlpack(source).reshape(target.shape)
            )
        if name == "new_event":
            return lambda d: (lambda: recorded.append(tvm_ffi.get_raw_stream(d)), lambda: waited.append(recorded[-1]))
        if name == "wait_for_stream":
            return lambda d: waited.append(tvm_ffi.get_raw_stream(d))
        return _ffi.func(name)

    def copy_to_host(x: Any) -> np.ndarray:
        waited.append(tvm_ffi.get_raw_stream(device))
        return np.from_dlpack(x).copy()

    monkeypatch.setattr(session, "_ffi", SimpleNamespace(func=func))
    monkeypatch.setattr(session, "_array", SimpleNamespace(**{**vars(_array), "copy_to_host": copy_to_host}))
    vm = FakeVM()
    return session.CudaSession(vm, manifest(**changes), cache, ["a weight"], use_graphs=use_graphs), vm, waited

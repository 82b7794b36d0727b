"""The paged KV cache: sequences in reference-counted pages, and the step that every layer of a model shares."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import tvm_ffi

from .. import _array, _device, _ffi, variant_call
from ..errors import ArgumentError, CacheStateError, DTypeError
from ..kv_dtypes import DTYPES, SCALED_DTYPES
from ..rope import RopeConfig
from ..schedule import Band, Plan
from ..spec import AttentionSpec
from . import page_budget as page_budgets
from . import page_type, sequence_state
from .page_budget import PageBudget
from .sequence_state import SequenceState

_INT64 = range(-(2**63), 2**63)


def _integer(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise DTypeError(f"argument `{name}` is {value!r} ({type(value).__name__}); it must be an integer") from None
    if number not in _INT64:
        raise ArgumentError(f"argument `{name}` is {number}; it must fit in 64 bits")
    return number


def _integers(values: Iterable[int], name: str) -> tuple[int, ...]:
    # on the path of every step: 64 ids take 2 µs here
    try:
        numbers = tuple(map(operator.index, values))
    except TypeError:
        raise DTypeError(f"argument `{name}` is {values!r}; it must be a list of integers") from None
    if numbers and not (min(numbers) in _INT64 and max(numbers) in _INT64):
        raise ArgumentError(f"argument `{name}` is {values!r}; its numbers must fit in 64 bits")
    return numbers


def _tokens(values: Any, name: str = "tokens") -> np.ndarray:
    """int64 [n], contiguous."""
    tokens = np.asarray(values)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise DTypeError(
            f"argument `{name}` holds {tokens.dtype}, rank {tokens.ndim}; it must be a list of integers, one for each token"
        )
    return np.ascontiguousarray(tokens, np.int64)


@dataclass(frozen=True)
class PrefixStats:
    """What reuse of prefixes came to, since it was enabled.

    lookups, hits : sequences added with tokens, and those of them that began with pages there were. tokens_asked, tokens_reused : of
    all these. evictions : pages without a sequence that were given up for others. cached_pages : pages without a sequence that can be
    found now. indexed_pages : all that can be.
    """

    lookups: int
    hits: int
    tokens_asked: int
    tokens_reused: int
    evictions: int
    cached_pages: int
    indexed_pages: int


class Step:
    """What a step knows of its tokens: they come in the order of `ids`, sequence after sequence.

    Attributes
    ----------
    cache : the cache that the step runs on.
    ids, append_lengths : sequences of the step and the new tokens of each.
    causal : whether a token sees only the keys at its own position and before.
    """

    def __init__(
        self, cache: PagedKVCache, ids: tuple[int, ...], append_lengths: tuple[int, ...], causal: bool
    ) -> None:
        self.cache = cache
        self.ids = ids
        self.append_lengths = append_lengths
        self.causal = causal

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(self.append_lengths)

    @property
    def qo_indptr(self) -> np.ndarray:
        """int32 [len(ids) + 1]: the tokens of sequence ids[i] are rows qo_indptr[i] to qo_indptr[i + 1]."""
        return np.concatenate([[0], np.cumsum(self.append_lengths)]).astype(np.int32)

    @property
    def last_rows(self) -> np.ndarray:
        """int64: the row of each sequence's last new token (sequences without new tokens are left out)."""
        ends = np.cumsum(self.append_lengths, dtype=np.int64)
        return ends[np.asarray(self.append_lengths, np.int64) > 0] - 1

    @property
    def query_positions(self) -> np.ndarray:
        """int64 [num_tokens]: each token's position in its sequence; a view that the next step overwrites."""
        return self.cache.query_positions

    @property
    def position_ids(self) -> Any:
        """The same as a tensor [1, num_tokens], as models take it."""
        return self.cache.position_ids

    @property
    def plan(self) -> Plan:
        """The step's plan, copied."""
        return self.cache.plan

    def attention(self, layer: int, q: Any, k: Any, v: Any, *, sm_scale: float | None = None, out: Any = None) -> Any:
        """:meth:`PagedKVCache.attention` with this step's mask."""
        return self.cache.attention(layer, q, k, v, sm_scale=sm_scale, causal=self.causal, out=out)

    def attention_fused_qkv(self, layer: int, qkv: Any, *, sm_scale: float | None = None, out: Any = None) -> Any:
        """:meth:`PagedKVCache.attention_fused_qkv` with this step's mask."""
        return self.cache.attention_fused_qkv(layer, qkv, sm_scale=sm_scale, causal=self.causal, out=out)


class PagedKVCache:
    """Keys and values of many sequences, in pages that sequences share where they can.

    A sequence is a number that the caller chooses. Its tokens fill pages of `page_size`; forks share pages until one of them writes
    (copy-on-write). A step says how many tokens each sequence gets, which makes one plan for all layers:

    >>> with cache.forward([7, 8], [1, 5]) as step:              # 1 token for sequence 7, 5 for sequence 8
    ...     for layer in range(cache.num_layers):
    ...         o = step.attention(layer, q[layer], k[layer], v[layer])      # [6, num_qo_heads, head_dim]

    Pages that sequences of a step share are read once for all of them where that shortens the plan, in trees of any depth
    (docs/plan.md); layers with a window or a chunk read their own, and those of variants without `takes_shared_keys`.

    Where every layer has a window (:meth:`set_variant`), a sequence needs the pages of its window only: a step gives those back that
    none of its tokens can see any more. Sequences may then be much longer than the pool.

    The object can be passed to packed functions and to a Relax VM as it is. An operation that raises has changed nothing. Not
    thread-safe: one thread works on a cache at a time.

    Parameters
    ----------
    num_layers : layers, each with its own keys and values.
    num_qo_heads, num_kv_heads : the first is a multiple of the second (grouped-query attention).
    head_dim : of queries and keys, a multiple of 8, from 8 to 256.
    head_dim_vo : of values and the output, a multiple of 8, at most head_dim; None: head_dim. On CUDA 128 beside a head_dim of 192,
        else head_dim, and then without variants and rotation in the cache (docs/kv-formats.md).
    dtype : "float32", "float16" or "bfloat16": of q, k, v, the output and, but for `kv_dtype`, the pages.
    kv_dtype : of the pages, "float8_e4m3fn" or "float8_e5m2": half the bytes of 16-bit floats (docs/kv-formats.md); None: `dtype`.
        On CUDA with pages of 16, 32 or 64 tokens, and without variants that change queries or keys.
    k_scale, v_scale : of pages of 8 bits, value = element * scale: a number, [num_layers], or [num_layers, num_kv_heads] (arrays on
        the host), finite and above 0. The largest magnitude of keys (values) that is to be represented, divided by the format's largest
        value: 448 (e4m3) or 57344 (e5m2). See :meth:`set_scales`.
    page_size : tokens a page.
    num_pages : pages; memory is taken from the system only as pages are first used.
    max_batch : sequences in one step.
    max_tokens : new tokens in one step, all sequences together; a longer prompt is prefilled in chunks.
    num_ctas : work queues of a plan; None: as many as threads.
    num_threads : threads of the CPU executor; None: its default (TVM_INFER_NUM_THREADS, else the processors).
    prefix_reuse : let :meth:`add_sequence` find pages by their tokens, also of sequences that are gone.
    device : "cpu", "cuda" or "cuda:N". On CUDA all memory is the device's: pages, and at fixed addresses what a step reads, so that a
        captured graph can be replayed with the next step. A step begins on the current stream, and its layers run on the same.
    shared_prefix : whether steps look for shared pages; False: each sequence reads its own, and results do not depend on who shares.
    page_budget : let each KV head read, in decode steps, only the pages of a long sequence that its query may score best. Layers that
        do keep bounds of their pages, 2 / page_size of the bytes of the keys more. None: all keys are read. See
        :meth:`set_page_budget`.

    Raises
    ------
    ArgumentError, DTypeError : an argument out of its range; scales of pages that have none. ExecutorError : a device without an
    executor, or an executor without kernels for pages of this dtype, size and head_dim.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        head_dim_vo: int | None = None,
        dtype: str = "float32",
        kv_dtype: str | None = None,
        k_scale: Any = 1.0,
        v_scale: Any = 1.0,
        page_size: int = 16,
        num_pages: int,
        max_batch: int,
        max_tokens: int,
        num_ctas: int | None = None,
        num_threads: int | None = None,
        prefix_reuse: bool = False,
        device: Any = "cpu",
        shared_prefix: bool = True,
        page_budget: PageBudget | None = None,
    ) -> None:
        if page_budget is not None:
            page_budgets.checked(page_budget)
        name = page_type.checked_dtype(dtype, "dtype", DTYPES)
        kv_name = page_type.checked_kv_dtype(kv_dtype, name)
        layers, heads = _integer(num_layers, "num_layers"), _integer(num_kv_heads, "num_kv_heads")
        has_scales = page_type.are_given(k_scale, v_scale)
        if has_scales:
            page_type.check_has_scales(kv_name)
        dl_device = tvm_ffi.device(str(_device.parse(device)))
        width = _integer(head_dim, "head_dim")
        handle = _ffi.func("kv_cache_create_unequal")(
            layers,
            _integer(num_qo_heads, "num_qo_heads"),
            heads,
            width,
            width if head_dim_vo is None else _integer(head_dim_vo, "head_dim_vo"),
            name,
            kv_name,
            _integer(page_size, "page_size"),
            _integer(num_pages, "num_pages"),
            _integer(max_batch, "max_batch"),
            _integer(max_tokens, "max_tokens"),
            0 if num_ctas is None else _integer(num_ctas, "num_ctas"),
            0 if num_threads is None else _integer(num_threads, "num_threads"),
            dl_device,
        )
        self._take(handle)
        if has_scales:
            self.set_scales(k_scale, v_scale)
        if not shared_prefix:
            self._call("set_shared_prefix", 0)
        if page_budget is not None:
            self.set_page_budget(page_budget)
        if prefix_reuse:
            self.enable_prefix_reuse()

    @classmethod
    def for_spec(cls, spec: AttentionSpec, num_layers: int, **settings: Any) -> PagedKVCache:
        """A cache with the heads, head_dim and dtype of `spec`; `settings` are the constructor's other arguments."""
        return cls(
            num_layers=num_layers,
            num_qo_heads=spec.num_qo_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            head_dim_vo=spec.width_vo,
            dtype=spec.dtype,
            **settings,
        )

    # layers whose variant this object set, and which rotates, or has tables by request
    _rotating: frozenset[int] = frozenset()
    _by_request: frozenset[int] = frozenset()
    # layers whose variant reads tables by positions -> it
    _with_matrices: Mapping[int, variant_call.Prepared] = MappingProxyType({})
    # of the step under way, once a table was looked at
    _step_plan: Plan | None = None

    @classmethod
    def from_handle(cls, handle: Any) -> PagedKVCache:
        """Wrap the object that the packed function `tvm_infer.kv_cache_create` returned."""
        self = cls.__new__(cls)
        self._take(handle)
        return self

    def _take(self, handle: Any) -> None:
        self._handle = handle
        self.dtype = str(self._call("dtype"))
        self.kv_dtype = _array.dtype_name(self._call("pages", 0))
        (
            self.num_layers,
            self.num_qo_heads,
            self.num_kv_heads,
            self.head_dim,
            self.page_size,
            self.num_pages,
            self.max_batch,
            self.max_tokens,
            self.num_ctas,
            self.num_threads,
            self.bytes_per_page,
            device_type,
            device_index,
            self.head_dim_vo,
        ) = (int(x) for x in self._call("config"))
        self.device = str(_device.from_dlpack(device_type, device_index))

    def __tvm_ffi_object__(self) -> Any:
        return self._handle

    @property
    def address(self) -> int:
        """Of the object behind this one, the same for every wrapper of it."""
        return int(self._handle.__chandle__())

    def _call(self, name: str, *args: Any) -> Any:
        return _ffi.func(f"kv_cache_{name}")(self._handle, *args)

    # Sequences

    def add_sequence(self, seq_id: int, tokens: Any = None, *, namespace: int = 0) -> int:
        """Start a sequence: empty, or with what the cache holds of its beginning.

        Parameters
        ----------
        tokens : int64 [n], what the sequence is to have (its prompt), on a cache with `prefix_reuse`. It starts with the pages of the
            longest prefix, in whole pages, that other sequences filled with the same tokens, and shares them; the last token at least
            is left to compute. The tokens that are left are for steps to append. None: an empty sequence.
        namespace : of tokens that mean the same: sequences of an adapter (LoRA), say, have one of their own.

        Returns
        -------
        Tokens that it starts with: a multiple of page_size.

        Raises
        ------
        UnknownSequenceError : there is one of this id. CacheStateError : tokens, or a namespace, on a cache without `prefix_reuse`.
        DTypeError : tokens that are no integers.
        """
        seq_id, namespace = _integer(seq_id, "seq_id"), _integer(namespace, "namespace")
        if tokens is None and namespace == 0:
            self._call("add", seq_id)
            return 0
        return int(self._call("add_with_prefix", seq_id, _tokens([] if tokens is None else tokens), namespace))

    def remove_sequence(self, seq_id: int) -> None:
        """Forget a sequence; pages that nobody else shares become free. UnknownSequenceError.

        With `prefix_reuse`, full pages whose tokens are known stay findable until others need them; they count as free.
        """
        self._call("remove", _integer(seq_id, "seq_id"))

    def fork_sequence(self, parent: int, child: int, position: int = -1) -> None:
        """Start `child` as the first `position` tokens of `parent` (-1: all), sharing its pages. Copies nothing.

        UnknownSequenceError : no such parent, or the child exists. ArgumentError : `position` is past the parent's end, or so far back
        that the child's next token would see positions that left the window.
        """
        self._call("fork", _integer(parent, "parent"), _integer(child, "child"), _integer(position, "position"))

    def pop(self, seq_id: int, num_tokens: int) -> None:
        """Drop the last `num_tokens` tokens. ArgumentError if there are fewer, or the next would see what left the window."""
        self._call("pop", _integer(seq_id, "seq_id"), _integer(num_tokens, "num_tokens"))

    def truncate(self, seq_id: int, length: int) -> None:
        """Keep the first `length` tokens. ArgumentError if there are fewer, or the next would see what left the window."""
        self._call("truncate", _integer(seq_id, "seq_id"), _integer(length, "length"))

    def clear(self) -> None:
        """Remove every sequence."""
        self._call("clear")

    # Prefixes

    @property
    def prefix_reuse(self) -> bool:
        """Whether full pages are found by their tokens."""
        return bool(self._call("reuses_prefixes"))

    @property
    def has_request_tables(self) -> bool:
        """Whether a layer has a variant with tables by request (set through this object)."""
        return bool(self._by_request)

    def enable_prefix_reuse(self) -> None:
        """From now on, find full pages by their tokens (`prefix_reuse` of the constructor).

        ArgumentError : layers have a variant with tables by request, so that keys and values depend on more than tokens.
        """
        if self._by_request:
            raise ArgumentError(
                f"layers {', '.join(map(str, sorted(self._by_request)))} have a variant with tables by request: what pages hold "
                "depends on more than tokens, so prefixes cannot be reused"
            )
        self._call("enable_prefix_reuse")

    def match_prefix(self, tokens: Any, *, namespace: int = 0) -> int:
        """How many of these tokens :meth:`add_sequence` would start with now. Changes nothing."""
        return int(self._call("match_prefix", _tokens(tokens), _integer(namespace, "namespace")))

    def commit_tokens(self, seq_id: int, tokens: Any) -> None:
        """Say which tokens a sequence got in steps that were begun without `token_ids`, in order; its full pages can be found then.

        Tokens are known from position 0 on without a gap: these follow :meth:`num_known_tokens`. Steps begun with `token_ids` say
        theirs by themselves, if all before are known. Of steps with causal=False nothing can be said.

        ArgumentError : more than the sequence has. CacheStateError : no `prefix_reuse`, or in a step.
        """
        self._call("commit_tokens", _integer(seq_id, "seq_id"), _tokens(tokens))

    def num_known_tokens(self, seq_id: int) -> int:
        """How many of a sequence's tokens are known, from position 0 on."""
        return int(self._call("num_known_tokens", _integer(seq_id, "seq_id")))

    def num_shared_pages(self, ids: Iterable[int]) -> int:
        """Of the pages of these sequences, each counted once, how many other sequences have, too. UnknownSequenceError."""
        return int(self._call("num_shared_pages", _integers(ids, "ids")))

    def drop_prefixes(self) -> None:
        """Let no page be found any more that is filled now: where a model's weights changed, say. Sequences keep theirs."""
        self._call("drop_prefixes")

    @property
    def prefix_stats(self) -> PrefixStats:
        """Counts since reuse was enabled. CacheStateError without `prefix_reuse`."""
        return PrefixStats(*(int(n) for n in self._call("prefix_stats")))

    # Host memory

    def export_sequence(self, seq_id: int) -> SequenceState:
        """A copy of a sequence on the host: keys and values of all layers, and its tokens where they are known. Waits for the device.

        UnknownSequenceError. CacheStateError : in a step. DTypeError : pages of 8 bits, whose scales a state does not hold (swap_out
        works). A sequence that is swapped out can be exported.
        """
        return sequence_state.export_from(self, _integer(seq_id, "seq_id"))

    def import_sequence(self, seq_id: int, state: SequenceState) -> None:
        """A new sequence that goes on where `state` ends. The cache it came from may have had another page_size and another device.

        With `prefix_reuse`, its full pages can be found by its tokens: the state must be of the same model.

        Raises
        ------
        UnknownSequenceError : there is one of this id. OutOfPagesError : says how many pages are needed and free. ArgumentError : other
        layers, heads or head_dim; positions missing that are no whole pages here, or that the next token sees. DTypeError : another
        dtype. CacheStateError : in a step.
        """
        sequence_state.import_into(self, _integer(seq_id, "seq_id"), state)

    def swap_out(self, seq_id: int) -> None:
        """Move a sequence's contents to host memory and give its pages back; the id, its length and tokens stay.

        Pages that others share are copied and stay theirs. On CUDA memory is page-locked, stays with the cache to be used again, and
        nothing waits for the device. Until :meth:`swap_in` the sequence can only be removed and exported.

        UnknownSequenceError. CacheStateError : in a step, or it is swapped out already.
        """
        self._call("swap_out", _integer(seq_id, "seq_id"))

    def swap_in(self, seq_id: int) -> None:
        """Bring a sequence back, to pages of its own.

        UnknownSequenceError. OutOfPagesError if there are not enough. CacheStateError : in a step, or it is not swapped out.
        """
        self._call("swap_in", _integer(seq_id, "seq_id"))

    def is_swapped_out(self, seq_id: int) -> bool:
        """Whether the sequence is in host memory. UnknownSequenceError."""
        return bool(self._call("is_swapped_out", _integer(seq_id, "seq_id")))

    @property
    def swapped_bytes(self) -> int:
        """Bytes of sequences in host memory."""
        return int(self._call("swapped_bytes"))

    # Steps

    def begin_forward(self, ids: Iterable[int], append_lengths: Iterable[int], *, causal: bool = True) -> None:
        """Start a step: sequence ids[i] gets append_lengths[i] new tokens, with pages for them, and the step gets its plan.

        Until :meth:`end_forward` or :meth:`cancel_forward`, sequences cannot be changed. Prefer :meth:`forward`.

        Raises
        ------
        OutOfPagesError : says how many pages are needed and free, and which sequences would free some.
        UnknownSequenceError; CacheStateError : a step is under way; ArgumentError : an id twice, a negative length, more than
        max_batch sequences or max_tokens tokens.
        """
        self._call("begin_forward", _integers(ids, "ids"), _integers(append_lengths, "append_lengths"), int(causal))
        self._step_plan = None

    def begin_step(
        self,
        ids: Iterable[int],
        append_lengths: Iterable[int],
        *,
        num_rows: int | None = None,
        token_ids: Any = None,
        logit_rows: Any = None,
        causal: bool = True,
    ) -> None:
        """:meth:`begin_forward` with what a compiled model reads beside the cache, brought to the device by the same copy.

        Parameters
        ----------
        num_rows : rows of the step's tensors, from the step's tokens to max_tokens; None: as many as tokens. Rows behind the tokens are
            padding (token 0 at position 0): they append nothing, and their outputs are 0. A graph captured with so many rows can be
            replayed then.
        token_ids : int64 [num_tokens] on the host, or a list; with `prefix_reuse` the cache remembers them.
        logit_rows : int64, at most num_rows, each a row of the step, on the host.

        Raises
        ------
        As begin_forward, and ArgumentError, DTypeError : num_rows, token_ids or logit_rows.
        """
        ids, append_lengths = _integers(ids, "ids"), _integers(append_lengths, "append_lengths")
        self._begin(ids, append_lengths, causal, num_rows, token_ids, logit_rows)

    def _begin(
        self,
        ids: tuple[int, ...],
        append_lengths: tuple[int, ...],
        causal: bool,
        num_rows: int | None,
        token_ids: Any,
        logit_rows: Any,
    ) -> None:
        rows = sum(append_lengths) if num_rows is None else _integer(num_rows, "num_rows")
        if isinstance(token_ids, list | tuple):
            token_ids = _tokens(token_ids, "token_ids")
        self._call("begin_step", ids, append_lengths, int(causal), rows, token_ids, logit_rows)
        self._step_plan = None

    def step_inputs(self, num_rows: int, num_logits: int = 0) -> tuple[Any, Any, Any]:
        """What :meth:`begin_step` fills: TVM tensors (input_ids [1, num_rows], position_ids [1, num_rows], logit_rows [num_logits]).

        int64, on the cache's device. Views at addresses that depend on the two numbers alone: a graph captured with them reads what the
        next step of as many rows brings. ArgumentError beyond max_tokens.
        """
        ids, positions, rows = self._call(
            "step_inputs", _integer(num_rows, "num_rows"), _integer(num_logits, "num_logits")
        )
        return ids, positions, rows

    def end_forward(self) -> None:
        """End the step and keep its tokens. CacheStateError outside of a step."""
        self._call("end_forward")
        self._step_plan = None

    def cancel_forward(self) -> None:
        """End the step and take its tokens back. CacheStateError outside of a step.

        The cache is as it was before, but for pages that no token can see any more, which stay in the pool.
        """
        self._call("cancel_forward")
        self._step_plan = None

    @contextlib.contextmanager
    def forward(
        self,
        ids: Iterable[int],
        append_lengths: Iterable[int],
        *,
        causal: bool = True,
        num_rows: int | None = None,
        token_ids: Any = None,
        logit_rows: Any = None,
    ) -> Iterator[Step]:
        """A step as a context: ended at the end, cancelled if the body raises. Arguments as :meth:`begin_step`."""
        ids, append_lengths = _integers(ids, "ids"), _integers(append_lengths, "append_lengths")
        self._begin(ids, append_lengths, causal, num_rows, token_ids, logit_rows)
        try:
            yield Step(self, ids, append_lengths, causal)
        except BaseException:
            if self.in_forward:
                self.cancel_forward()
            raise
        self.end_forward()

    def attention(
        self,
        layer: int,
        q: Any,
        k: Any,
        v: Any,
        *,
        sm_scale: float | None = None,
        causal: bool = True,
        out: Any = None,
    ) -> Any:
        """Store k and v of the step's tokens at `layer`, then attend q to all keys of each token's own sequence.

        Parameters
        ----------
        q : [num_tokens, num_qo_heads, head_dim], torch, numpy or TVM; the cache's dtype. Strides are honoured, head_dim contiguous.
        k, v : [num_tokens, num_kv_heads, head_dim]; v, and the output, head_dim_vo wide.
        sm_scale : factor on q·k; default 1 / sqrt(head_dim).
        causal : as the step was begun with.
        out : as q, head_dim_vo wide; allocated, of q's kind, if None. It must not overlap q, k or v.

        Raises
        ------
        CacheStateError : no step is under way. PlanMismatchError : another number of tokens than announced, or another mask.
        ArgumentError, DTypeError : shape, layer or dtype are not the cache's. VariantError : a table of the layer's variant that is
        read by positions is too short for the step.
        """
        self._check_tables(_integer(layer, "layer"))
        if out is None:
            out = _array.empty_like(q, (*q.shape[:-1], self.head_dim_vo))
        _ffi.func("attention_with_kv_cache")(
            self._handle,
            _integer(layer, "layer"),
            _array.as_tensor(q, "q"),
            _array.as_tensor(k, "k"),
            _array.as_tensor(v, "v"),
            1.0 / math.sqrt(self.head_dim) if sm_scale is None else float(sm_scale),
            int(causal),
            _array.as_tensor(out, "out", output=True),
        )
        return out

    def _check_tables(self, layer: int) -> None:
        prepared = self._with_matrices.get(layer)
        if prepared is not None and self.in_forward:
            prepared.check_tables(self._plan_of_step(), self.num_qo_heads)

    def _plan_of_step(self) -> Plan:
        """The plan of the step under way, one object until it ends: tables found to hold its lengths are not looked at again."""
        words = np.from_dlpack(self._call("plan"))
        # another wrapper, or a compiled model, may have begun a step since
        if self._step_plan is None or not np.array_equal(self._step_plan.buffer, words):
            self._step_plan = Plan(words.copy())
        return self._step_plan

    def set_rope(self, rope: RopeConfig, *, seq_len: int | None = None) -> None:
        """Rotate queries and keys of :meth:`attention_fused_qkv` so, at every layer. Once, before the first sequence.

        rope : a rotary_dim of 0 rotates nothing. On cuda rotary_dim and head_dim are multiples of 16.
        seq_len : how long sequences get; needed for rope_type "longrope", whose frequencies depend on it.

        Raises
        ------
        ArgumentError : rotary_dim is above head_dim. ExecutorError : the executor has no kernel for it. CacheStateError : in a step, or
        with another rotation than that of the sequences there are.
        """
        if not isinstance(rope, RopeConfig):
            raise ArgumentError(f"argument `rope` is a {type(rope).__name__}; it must be a tvm_infer.RopeConfig")
        if rope.rope_type == "longrope" and seq_len is None:
            raise ArgumentError(
                'argument `seq_len` is None with a `rope` of rope_type "longrope", whose frequencies depend on it; say how long '
                "sequences get"
            )
        length = None if seq_len is None else _integer(seq_len, "seq_len")
        self._call("set_rope", rope.inv_freq(length), int(rope.interleaved), rope.magnitude())

    def set_scales(self, k_scale: Any, v_scale: Any) -> None:
        """Scales of pages of 8 bits, as the constructor takes them, 1 before. Before the first sequence, whose keys have them.

        Raises
        ------
        ArgumentError : another shape, or a scale that is not finite and above 0; pages that have no scale. CacheStateError : in a
        step, or on a cache that holds sequences.
        """
        size = (self.num_layers, self.num_kv_heads)
        scales = (
            page_type.checked_scales(value, name, *size) for value, name in ((k_scale, "k_scale"), (v_scale, "v_scale"))
        )
        self._call("set_scales", *scales)

    def set_page_budget(self, page_budget: PageBudget | None) -> None:
        """Let layers select pages in decode steps from now on (`page_budget` of the constructor); None: read all keys again.

        Before the first sequence.

        The cache then keeps bounds of its pages by itself: through forks, pops, swaps, moves of tokens and reuse of prefixes. They
        count in `bytes_per_page`. In a decode step some of whose sequences have more pages than the budget, a layer that selects
        appends, updates bounds, scores, selects and attends; on CUDA these are five launches, and the same five in every other step
        (which then select nothing), so that a captured graph serves both. Such layers do not read shared pages once for all
        sequences in a step that selects.

        Raises
        ------
        DTypeError : no PageBudget. ArgumentError : numbers that do not fit the cache; a layer with a variant, a window or chunks that
        is not among `dense_layers`. CacheStateError : in a step; on a cache that holds sequences, or that ran steps for an
        executable. A decode step with a sequence of more than `max_pages` pages is a WorkspaceError.
        """
        arguments = (0, 0, 1, 0, 0, ())
        if page_budget is not None:
            arguments = page_budgets.checked(page_budget).arguments(self.page_size, self.num_layers)
        *numbers, dense = arguments
        self._call("set_page_budget", *numbers, tvm_ffi.Shape(dense))
        self._take(self._handle)  # a page has more bytes now

    @property
    def page_budget(self) -> PageBudget | None:
        """What layers read in decode steps; None: all keys. With the numbers of this cache: pages, layers, most pages."""
        return PageBudget.from_values(self._call("page_budget"))

    @property
    def selects_pages(self) -> bool:
        """Whether layers select pages in the step under way, or did in the last one."""
        return bool(self._call("selects_pages"))

    def set_variant(self, variant: Any, *, layers: Iterable[int] | None = None) -> None:
        """Let layers compute this attention from the next step on: a model of soft caps, windows, sinks … (docs/variants.md).

        variant : a tvm_infer.variant.BoundVariant, or a Variant without parameters; None for plain attention. ``per_request`` tables
            have an entry for each of the `max_batch` sequences of a step, in the order of its ids; what tables hold may change between
            steps. Layers of up to 4 different bands (windows, sinks, chunks) are planned apart, in the one copy of begin_forward.
        layers : which; None: all.

        Where every layer has a window then, sequences give back their pages behind the widest. A variant that rotates turns keys as
        they are read: give :meth:`attention` queries and keys that are not turned.

        Raises
        ------
        VariantError : not bound, or tables of other lengths. ArgumentError : tables on another device, a layer that is none, more
        than 4 bands, a wider window than a sequence has kept keys for. CacheStateError : in a step; on a cache that ran steps for an
        executable, whose graphs know its kernels.
        MissingDependencyError, CompileError : it cannot be compiled for the host. (For cuda it is at the first step.)
        ExecutorError : on cuda, where it changes queries or keys beside pages of 8 bits, or of a head_dim that kernels do not.
        """
        chosen = range(self.num_layers) if layers is None else _integers(layers, "layers")
        call, causal, band, by_request = None, -1, Band(), False
        if variant is not None:
            prepared = variant_call.prepare(variant)
            by_request = any(p.sort == "per_request" for p in prepared.bound.variant.parameters.values())
            if by_request and self.prefix_reuse:
                raise ArgumentError(
                    f"argument `variant` is {prepared.bound.variant.name}, which has tables by request: what pages hold depends on "
                    "more than tokens, so that a cache that reuses prefixes cannot have it; make one with prefix_reuse=False"
                )
            causal, band = int(prepared.band.causal), prepared.band
            if not prepared.is_plain:
                sizes = (self.num_qo_heads, self.max_batch, self.head_dim)
                is_scaled = self.kv_dtype in SCALED_DTYPES
                call = prepared.call(self.device.startswith("cuda"), *sizes, is_scaled=is_scaled)
        self._call("set_variant", tvm_ffi.Shape(tuple(chosen)), call, causal, tvm_ffi.Shape(band))
        rotates = variant is not None and prepared.rotates
        self._rotating = self._rotating | set(chosen) if rotates else self._rotating - set(chosen)
        self._by_request = self._by_request | set(chosen) if by_request else self._by_request - set(chosen)
        others = {number: kept for number, kept in self._with_matrices.items() if number not in chosen}
        has_matrices = variant is not None and prepared.has_matrices
        self._with_matrices = others | (dict.fromkeys(chosen, prepared) if has_matrices else {})

    def attention_fused_qkv(
        self, layer: int, qkv: Any, *, sm_scale: float | None = None, causal: bool = True, out: Any = None
    ) -> Any:
        """:meth:`attention` of what a model's projection gives: queries and keys are rotated by their positions on the way.

        qkv : [num_tokens, num_qo_heads + 2 * num_kv_heads, head_dim], queries first, then keys, then values; strided, not written.
        out : [num_tokens, num_qo_heads, head_dim]; allocated, of qkv's kind, if None. Others as in :meth:`attention`.

        Raises
        ------
        As :meth:`attention`, and CacheStateError before :meth:`set_rope`, or where the layer's variant rotates, too.
        """
        if _integer(layer, "layer") in self._rotating:
            raise CacheStateError(
                f"argument `layer` is {layer}, whose variant turns queries and keys as attention reads them; attention_fused_qkv would "
                "turn them before: call attention, or set a variant without a rotation"
            )
        self._check_tables(layer)
        if out is None:
            out = _array.empty_like(qkv, (int(qkv.shape[0]), self.num_qo_heads, self.head_dim))
        _ffi.func("attention_with_kv_cache_fused_qkv")(
            self._handle,
            _integer(layer, "layer"),
            _array.as_tensor(qkv, "qkv"),
            1.0 / math.sqrt(self.head_dim) if sm_scale is None else float(sm_scale),
            int(causal),
            _array.as_tensor(out, "out", output=True),
        )
        return out

    @property
    def in_forward(self) -> bool:
        """True between begin_forward and its end."""
        return bool(self._call("in_forward"))

    @property
    def query_positions(self) -> np.ndarray:
        """int64 [num_tokens] of the step, on the host: each token's position in its sequence; a view that the next step overwrites."""
        return np.from_dlpack(self._call("query_positions"))

    @property
    def position_ids(self) -> Any:
        """The step's positions, int64 [1, num_rows] on the device, as models take them; a view that the next step overwrites."""
        return self._call("position_ids")

    @property
    def plan(self) -> Plan:
        """The plan of the last step, copied; of layer 0, where layers have several. CacheStateError before the first."""
        return Plan(np.from_dlpack(self._call("plan")).copy())

    def plan_of(self, layer: int) -> Plan:
        """:attr:`plan` of the layers that have the band of this one (:meth:`set_variant`)."""
        return Plan(np.from_dlpack(self._call("layer_plan", _integer(layer, "layer"))).copy())

    # Room

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence owns; those that can still be found by their tokens count."""
        return int(self._call("num_free_pages"))

    @property
    def num_used_pages(self) -> int:
        """Pages that sequences own; a shared page counts once."""
        return self.num_pages - self.num_free_pages

    @property
    def bytes(self) -> int:
        """Bytes of the pages in use: keys, values and, with a page budget, bounds, of all layers."""
        return int(self._call("bytes"))

    @property
    def window_left(self) -> int | None:
        """Keys before its own that a token sees at most, in any layer, sinks apart; None for all. Pages behind go back to the pool."""
        left = int(self._call("window_left"))
        return None if left < 0 else left

    def peak_pages(self, length: int, max_append: int | None = None) -> int:
        """Pages that a sequence has at most on its way to `length` tokens, if it shares none.

        max_append : tokens that it gets in a step, at most; None: max_tokens. ArgumentError : a negative length, max_append below 1.
        """
        most = self.max_tokens if max_append is None else _integer(max_append, "max_append")
        return int(self._call("peak_pages", _integer(length, "length"), most))

    def bytes_after(self, ids: Iterable[int], append_lengths: Iterable[int]) -> int:
        """Exact `bytes` in a step in which these sequences grow so far: copies of shared pages counted, those that leave windows not.
        Changes nothing.

        It may exceed ``num_pages * bytes_per_page``: then a step of these lengths would raise OutOfPagesError.
        """
        return int(self._call("bytes_after", _integers(ids, "ids"), _integers(append_lengths, "append_lengths")))

    def pages_after(self, ids: Iterable[int], append_lengths: Iterable[int]) -> int:
        """:meth:`bytes_after` in pages."""
        return int(self._call("pages_after", _integers(ids, "ids"), _integers(append_lengths, "append_lengths")))

    # Looking inside

    @property
    def sequences(self) -> tuple[int, ...]:
        """Ids, ascending."""
        return tuple(int(i) for i in self._call("sequences"))

    def seq_len(self, seq_id: int) -> int:
        """Tokens of a sequence, those of a step under way included. UnknownSequenceError."""
        return int(self._call("seq_len", _integer(seq_id, "seq_id")))

    def page_table(self, seq_id: int) -> tuple[int, ...]:
        """Pages of a sequence, in the order of its tokens; -1 for those that left the window, and for all while it is swapped out."""
        return tuple(int(p) for p in self._call("page_table", _integer(seq_id, "seq_id")))

    def pages(self, layer: int) -> Any:
        """The memory of a layer, [num_pages, 2, num_kv_heads, page_size, head_dim], not copied: keys [:, 0], values [:, 1].

        Where head_dim_vo is not head_dim, two arrays [num_pages, num_kv_heads, page_size, …], keys and values.

        For debugging. Slots without a token hold anything; elements of 8 bits are not scaled. On the host a numpy array (bfloat16 and
        8-bit floats come as ml_dtypes'), on CUDA a torch tensor: MissingDependencyError without torch.
        """
        index = _integer(layer, "layer")
        tensor = self._call("pages", index)
        if self.head_dim_vo != self.head_dim:
            return self._view(tensor), self._view(self._call("value_pages", index))
        return self._view(tensor)

    def page_bounds(self, layer: int) -> Any:
        """The bounds of a layer's pages, [num_pages, 2, num_kv_heads, head_dim] of `dtype`, not copied: least [:, 0], greatest [:, 1].

        Of pages that hold tokens; of others anything. Of a cache of 8 bits those of elements, without their scale. Exact, but for the
        last page of a sequence that was shortened, or whose step was cancelled: until it grows again these may be bounds of what the
        page held before, too. For debugging, as :meth:`pages`. ArgumentError : a layer that keeps none.
        """
        return self._view(self._call("page_bounds", _integer(layer, "layer")), self.dtype)

    def _view(self, tensor: Any, dtype: str | None = None) -> Any:
        if self.device != "cpu":
            return _array.to_torch(tensor, "PagedKVCache.pages")
        return _array.on_host(tensor, self.kv_dtype if dtype is None else dtype)

    def gather(self, seq_id: int, layer: int, start: int = 0) -> tuple[Any, Any]:
        """Keys and values of a sequence at a layer, from position `start` on, copied.

        Two arrays [seq_len - start, num_kv_heads, head_dim], values head_dim_vo wide, of the kind that :meth:`pages` gives.

        ArgumentError : there is no such position, or some from there on left the window.
        """
        length, begin = self.seq_len(seq_id), _integer(start, "start")
        if not 0 <= begin <= length:
            raise ArgumentError(f"argument `start` is {begin}; sequence {seq_id} has positions 0 to {length - 1}")
        first = begin // self.page_size
        table = self.page_table(seq_id)[first:]
        if -1 in table:
            kept = (first + len(table) - table[::-1].index(-1)) * self.page_size
            raise ArgumentError(
                f"argument `start` is {begin}, but sequence {seq_id} gave back positions that left the window: take {kept} or more"
            )
        pages = self.pages(layer)
        skip = first * self.page_size

        def rows(of: Any) -> Any:
            taken = of[list(table)]  # [pages, heads, page_size, width], a copy
            by_token = taken.transpose((0, 2, 1, 3)) if self.device == "cpu" else taken.permute((0, 2, 1, 3))
            return by_token.reshape(-1, self.num_kv_heads, of.shape[-1])[begin - skip : length - skip]

        keys, values = pages if isinstance(pages, tuple) else (pages[:, 0], pages[:, 1])
        return rows(keys), rows(values)

    # Ownership

    def bind(self, token: int) -> None:
        """Reserve the cache for the executable that has this number (not 0). CacheStateError if another one holds it.

        A captured graph does not know which cache it was captured with, so an executable and its cache belong together.
        """
        self._call("bind", _integer(token, "token"))

    def release(self, token: int) -> None:
        """Undo :meth:`bind`. CacheStateError if another executable holds the cache, or none."""
        self._call("release", _integer(token, "token"))

    def __len__(self) -> int:
        return len(self.sequences)

    def __contains__(self, seq_id: object) -> bool:
        return seq_id in self.sequences

    def __bool__(self) -> bool:  # an empty cache is still a cache
        return True

    def __repr__(self) -> str:
        state = ", in a step" if self.in_forward else ""
        dtype = self.dtype if self.kv_dtype == self.dtype else f"{self.dtype}, pages of {self.kv_dtype}"
        width = f"{self.head_dim}" + ("" if self.head_dim_vo == self.head_dim else f" / {self.head_dim_vo}")
        return (
            f"PagedKVCache({self.num_layers} layers, {self.num_qo_heads}/{self.num_kv_heads} heads, head_dim {width}, "
            f"{dtype}; {len(self)} sequences in {self.num_used_pages} of {self.num_pages} pages of {self.page_size} tokens, "
            f"{self.num_free_pages} free, {self.bytes / 2**20:.1f} of {self.num_pages * self.bytes_per_page / 2**20:.1f} MiB{state})"
        )

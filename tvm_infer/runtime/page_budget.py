"""How much of a long sequence the layers of a cache read in a decode step (docs/kv-formats.md, "Page selection")."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArgumentError, DTypeError

_REDUCTIONS = ("max", "sum")
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class PageBudget:
    """Pages of a sequence that each KV head reads in a decode step: the first, the last, and those its query may score best.

    A decode step is one of one token a sequence. Other steps (prefill, verification of proposed tokens) read all keys, and so does a
    decode step none of whose sequences has more pages than the budget.

    Parameters
    ----------
    num_pages, num_tokens : the budget, one of the two: pages of a list, or tokens, rounded up to whole pages of the cache.
    num_sink_pages : first pages, always read, >= 0. num_recent_pages : last pages, always read, >= 1: the page that is being filled is
        among them. Both together at most the budget.
    group_reduce : how the query heads of a KV head agree on a page's score, "max" or "sum".
    dense_layers : layers that read all keys in every step, and keep no bounds: a number, the first so many (2, as in Quest, arXiv
        2406.10774, section 4.1), or a list of layers. Layers with a variant, a window or chunks must be among them.
    max_pages : pages that a sequence may have in a decode step; scores take 4 * max_batch * num_kv_heads * max_pages bytes. None: all
        of the cache.

    Raises
    ------
    ArgumentError : numbers out of their ranges; both budgets, or none. DTypeError : what is no integer.
    """

    num_pages: int | None = None
    num_tokens: int | None = None
    num_sink_pages: int = 1
    num_recent_pages: int = 1
    group_reduce: str = "max"
    dense_layers: int | tuple[int, ...] = 2
    max_pages: int | None = None

    def __post_init__(self) -> None:
        if (self.num_pages is None) == (self.num_tokens is None):
            raise ArgumentError(
                f"arguments `num_pages` and `num_tokens` of a PageBudget are {self.num_pages} and {self.num_tokens}; give one of "
                "them: how much of a sequence a KV head reads"
            )
        for name, least in (
            ("num_pages", 1),
            ("num_tokens", 1),
            ("num_sink_pages", 0),
            ("num_recent_pages", 1),
            ("max_pages", 1),
        ):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _number(value, name, least))
        if self.group_reduce not in _REDUCTIONS:
            raise ArgumentError(
                f'argument `group_reduce` is {self.group_reduce!r}; it must be "max" or "sum", over the query heads of a KV head'
            )
        layers = self.dense_layers
        if isinstance(layers, Iterable):
            numbers = tuple(sorted({_number(layer, "dense_layers", 0) for layer in layers}))
            object.__setattr__(self, "dense_layers", numbers)
        else:
            object.__setattr__(self, "dense_layers", _number(layers, "dense_layers", 0))

    def pages(self, page_size: int) -> int:
        """The budget in pages of so many tokens. ArgumentError if the pages that are always read are more."""
        count = -(-self.num_tokens // page_size) if self.num_pages is None else self.num_pages  # type: ignore[operator]
        if self.num_sink_pages + self.num_recent_pages > count:
            raise ArgumentError(
                f"arguments `num_sink_pages` and `num_recent_pages` are {self.num_sink_pages} and {self.num_recent_pages}, more than "
                f"the budget of {count} pages of {page_size} tokens; take fewer, or a larger budget"
            )
        return count

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that stay dense. ArgumentError if that leaves none, or the model has no such layer."""
        dense = tuple(range(self.dense_layers)) if isinstance(self.dense_layers, int) else self.dense_layers
        if len(dense) >= num_layers or (dense and dense[-1] >= num_layers):
            raise ArgumentError(
                f"argument `dense_layers` is {self.dense_layers} for a cache of {num_layers} layers, 0 to {num_layers - 1}; name "
                "layers of these, and leave one at least that selects"
            )
        return dense

    def check_variants(self, varied: Iterable[int]) -> None:
        """ArgumentError if a layer of these, which have a variant, a window or chunks, would select."""
        assert not isinstance(self.dense_layers, int)
        missing = sorted(set(varied) - set(self.dense_layers))
        if missing:
            raise ArgumentError(
                f"argument `dense_layers` is {self.dense_layers}, without {missing}: layers of the model that have an attention "
                "variant, a window or chunks, which know positions; lists of pages have none. Let these layers stay dense"
            )

    def arguments(self, page_size: int, num_layers: int) -> tuple[Any, ...]:
        """Of the packed function kv_cache_set_page_budget, behind the cache."""
        return (
            self.pages(page_size),
            self.num_sink_pages,
            self.num_recent_pages,
            _REDUCTIONS.index(self.group_reduce),
            self.max_pages or 0,
            self.layers(num_layers),
        )

    @classmethod
    def from_values(cls, values: Iterable[int]) -> PageBudget | None:
        """Of the packed function kv_cache_page_budget; None where no layer selects."""
        numbers = [int(value) for value in values]
        if not numbers:
            return None
        num_pages, num_sink, num_recent, is_sum, max_pages, *dense = numbers
        return cls(
            num_pages=num_pages,
            num_sink_pages=num_sink,
            num_recent_pages=num_recent,
            group_reduce=_REDUCTIONS[is_sum],
            dense_layers=tuple(dense),
            max_pages=max_pages,
        )

    def to_row(self) -> dict[str, Any]:
        """For a manifest, JSON."""
        return dict(vars(self))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PageBudget:
        """Of a manifest."""
        return cls(**row)


def checked(value: Any) -> PageBudget:
    """`value`, an argument `page_budget`. DTypeError for anything but a PageBudget."""
    if isinstance(value, PageBudget):
        return value
    raise DTypeError(f"argument `page_budget` is a {type(value).__name__}; it must be a tvm_infer.PageBudget")


def _number(value: Any, name: str, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise DTypeError(f"argument `{name}` is {value!r} ({type(value).__name__}); it must be an integer") from None
    if not least <= number <= _MAX_INT32:
        raise ArgumentError(f"argument `{name}` is {number}; it must be from {least} to {_MAX_INT32}")
    return number

"""What the caches of a model are, unless whoever makes one says otherwise: kept in the manifest of an exported library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..kv_dtypes import SCALED_DTYPES
from . import page_type
from .page_budget import PageBudget, checked

Scales = tuple[tuple[float, ...], ...]  # [num_layers, num_kv_heads], each a float32


@dataclass(frozen=True)
class CacheDefaults:
    """Settings of caches that a model brings along.

    kv_dtype : of the pages. k_scales, v_scales : of pages of 8 bits, None of others. shared_prefix : whether steps look for pages
    that their sequences share. page_budget : of layers that select pages in decode steps, its dense layers a list; None: of none.
    """

    kv_dtype: str
    k_scales: Scales | None = None
    v_scales: Scales | None = None
    shared_prefix: bool = True
    page_budget: PageBudget | None = None

    @classmethod
    def make(
        cls,
        dtype: str,
        num_layers: int,
        num_kv_heads: int,
        *,
        kv_dtype: str | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        shared_prefix: bool | None = None,
        page_budget: PageBudget | Literal[False] | None = None,
    ) -> CacheDefaults:
        """From arguments as PagedKVCache has them, for a model of this dtype; None: not given. Raises as PagedKVCache."""
        budget = None
        if page_budget is not None and page_budget is not False:
            dense = checked(page_budget).layers(num_layers)
            budget = replace(page_budget, dense_layers=dense)
        kv_name = page_type.checked_kv_dtype(kv_dtype, dtype)
        k_scale, v_scale = 1.0 if k_scale is None else k_scale, 1.0 if v_scale is None else v_scale
        shares = True if shared_prefix is None else bool(shared_prefix)
        if kv_name not in SCALED_DTYPES:
            page_type.check_pair(dtype, kv_name)
            if page_type.are_given(k_scale, v_scale):
                page_type.check_has_scales(kv_name)
            return cls(kv_name, shared_prefix=shares, page_budget=budget)
        size = (num_layers, num_kv_heads)
        k_scales, v_scales = (
            _frozen(page_type.checked_scales(value, name, *size))
            for value, name in ((k_scale, "k_scale"), (v_scale, "v_scale"))
        )
        return cls(kv_name, k_scales, v_scales, shares, budget)

    def settings(self, **given: Any) -> dict[str, Any]:
        """Arguments of PagedKVCache: those given, None where they are not, with these where they are None. Pages of another type than
        this one's have scales of 1 then: these are not theirs. A page_budget of False is none."""
        own: dict[str, Any] = {
            "kv_dtype": self.kv_dtype,
            "shared_prefix": self.shared_prefix,
            "page_budget": self.page_budget,
            "k_scale": 1.0,
            "v_scale": 1.0,
        }
        asked = given.get("kv_dtype")
        if self.k_scales is not None and (asked is None or str(asked).removeprefix("torch.") == self.kv_dtype):
            own |= {"k_scale": self.k_scales, "v_scale": self.v_scales}
        settings = own | {name: value for name, value in given.items() if value is not None}
        return settings | ({"page_budget": None} if settings["page_budget"] is False else {})

    def to_row(self) -> dict[str, Any]:
        """For the manifest, JSON (cuda_src/tvm_infer/ffi/model_cache.cc reads it, too)."""
        budget = None if self.page_budget is None else self.page_budget.to_row()
        return {**vars(self), "page_budget": budget}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CacheDefaults:
        """Of the manifest."""
        scales = {
            name: None if row[name] is None else _frozen(np.asarray(row[name], np.float32))
            for name in ("k_scales", "v_scales")
        }
        stored = row.get("page_budget")  # libraries that are older than it have none
        budget = None if stored is None else PageBudget.from_row(stored)
        return cls(kv_dtype=row["kv_dtype"], shared_prefix=row["shared_prefix"], page_budget=budget, **scales)


def _frozen(scales: np.ndarray) -> Scales:
    return tuple(tuple(row) for row in scales.tolist())

"""The attention variants of a compiled model's layers, given to its caches."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import VariantError
from .kv_cache import PagedKVCache
from .manifest import Manifest

if TYPE_CHECKING:
    from ..variant.layer import LayerVariant

MAX_WINDOWS = 4  # kMaxPlans of cuda_src/tvm_infer/ffi
# cache -> what its layers' variants were set from; a cache that is not here has those that its owner set, if any
_given: weakref.WeakKeyDictionary[PagedKVCache, str] = weakref.WeakKeyDictionary()


def give(manifest: Manifest, cache: PagedKVCache, weight: Callable[[str], Any]) -> None:
    """Let the layers of a new cache compute what the model's do, each group of layers with equal variants bound once.

    weight : name -> tensor on the cache's device. Does nothing where that was done, or another model's variants were replaced since.

    Raises
    ------
    As PagedKVCache.set_variant and Variant.bind; VariantError names the layers.
    """
    variants = manifest.variants
    kind = _identity(manifest)
    if _given.get(cache, "") == kind:
        return
    if cache in _given:
        cache.set_variant(None)  # those of another model
    # layers of one window after another: on the way there are no more windows than at the end
    for variant in sorted(variants, key=lambda v: v.window_left):
        cache.set_variant(_bound(variant, variants[variant], cache, weight), layers=variants[variant])
    _given[cache] = kind


def _identity(manifest: Manifest) -> str:
    """The same for manifests of the same variants at the same layers; "" of plain attention."""
    if not manifest.variants:
        return ""
    return json.dumps([[layers, variant.to_fields()] for variant, layers in manifest.variants.items()])


def _bound(variant: LayerVariant, layers: tuple[int, ...], cache: PagedKVCache, weight: Callable[[str], Any]) -> Any:
    import tvm

    def place(array: np.ndarray) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.device(cache.device))

    try:
        return variant.bind(weight, place)
    except VariantError as error:
        raise VariantError(f"the attention variant of the layers {list(layers)} cannot be bound: {error}") from error

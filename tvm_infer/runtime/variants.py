"""The attention variants of a compiled model's layers, given to its caches."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import VariantError
from .kv_cache import PagedKVCache
from .manifest import Manifest

if TYPE_CHECKING:
    from ..band import Band
    from ..variant.layer import LayerVariant

MAX_BANDS = 4  # kMaxPlans of cuda_src/tvm_infer/ffi
# cache -> what its layers' variants were set from; a cache that is not here has those that its owner set, if any
_given: weakref.WeakKeyDictionary[PagedKVCache, str] = weakref.WeakKeyDictionary()


def has(manifest: Manifest, cache: PagedKVCache) -> bool:
    """Whether a cache was given the variants of the model's layers, or has none where the model has none."""
    return _given.get(cache, "") == _identity(manifest)


def give(manifest: Manifest, cache: PagedKVCache, weight: Callable[[str], Any]) -> None:
    """Let the layers of a cache that no executable has compute what the model's do, those with equal variants bound once.

    weight : name -> tensor on the cache's device.

    Raises
    ------
    As PagedKVCache.set_variant and Variant.bind; VariantError names the layers.
    """
    if cache in _given:
        cache.set_variant(None)  # those of another model
    _given.pop(cache, None)
    by_band: dict[Band, list[LayerVariant]] = {}
    for variant in manifest.variants:
        by_band.setdefault(variant.band, []).append(variant)
    for variants in by_band.values():
        # all layers of a band at once, then each its own: on the way there are no more bands than at the end
        layers = [layer for variant in variants for layer in manifest.variants[variant]]
        for variant in variants:
            cache.set_variant(_bound(variant, cache, weight, layers), layers=layers)
            layers = [layer for layer in layers if layer not in manifest.variants[variant]]
    _given[cache] = _identity(manifest)


def give_exported(manifest: Manifest, cache: PagedKVCache, module: Any, weights: Sequence[Any]) -> None:
    """:func:`give` of an exported library, which has the variants' code and knows their parameters: it takes no compiler, TVM's either.

    module : the library. weights : all of the model's, on the cache's device.

    Raises
    ------
    As the library's function `model_set_variants` (cuda_src/tvm_infer/ffi/model.h).
    """
    cache.set_variant(None)  # what Python knows of those of its owner
    _given.pop(cache, None)
    module.get_function("tvm_infer_model_set_variants", True)(cache._handle, list(weights))
    _given[cache] = _identity(manifest)


def in_kernels(manifest: Manifest, about: Mapping[str, Any] | None) -> list[int]:
    """The layers whose variant is not a band alone. about : of an exported library, which says it where TVM's compiler is not there."""
    if about is not None:
        return sorted(layer for row in about.get("variants", ()) if row["digest"] for layer in row["layers"])
    specs = enumerate(manifest.layers)
    return [i for i, spec in specs if spec.variant is not None and not spec.variant.variant.is_plain]


def _identity(manifest: Manifest) -> str:
    """The same for manifests of the same variants at the same layers; "" of plain attention."""
    if not manifest.variants:
        return ""
    return json.dumps([[layers, variant.to_fields()] for variant, layers in manifest.variants.items()])


def _bound(variant: LayerVariant, cache: PagedKVCache, weight: Callable[[str], Any], layers: list[int]) -> Any:
    import tvm

    def place(array: np.ndarray) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.device(cache.device))

    try:
        return variant.bind(weight, place)
    except VariantError as error:
        raise VariantError(f"the attention variant of the layers {layers} cannot be bound: {error}") from error

"""The generated code of the variants that a model's layers have: found out from the types of its weights, before there is a cache."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import jit
from ..errors import ModelError, VariantError

if TYPE_CHECKING:
    from ..variant.bind import BoundVariant
    from ..variant.layer import LayerVariant
    from ..variant.lower import Struct

Types = Mapping[str, tuple[Sequence[int], str]]  # of weights: name -> shape, dtype


@dataclass(frozen=True)
class VariantCode:
    """What the layers of one variant run. bound : to stand-ins for its tables. struct : for the device; None: the band is all of it."""

    layers: tuple[int, ...]
    bound: BoundVariant
    struct: Struct | None

    @property
    def digest(self) -> str:
        """Of the struct; "" where there is none."""
        return "" if self.struct is None else self.struct.digest

    def to_row(self) -> dict[str, Any]:
        """For the manifest of an exported library, whose functions give it to caches (cuda_src/tvm_infer/ffi/model_cache.cc)."""
        tables = [name for name, p in self.bound.variant.parameters.items() if not p.is_scalar]
        return {
            "layers": list(self.layers),
            "digest": self.digest,
            "scalars": self.bound.scalars,
            "tables": tables,
            "takes_shared_keys": int(self.bound.variant.takes_shared_keys),
            "causal": int(self.bound.band.causal),
            "band": list(self.bound.band),
        }


def of_model(
    variants: Sequence[LayerVariant], layers: Sequence[Mapping[str, Any]], weights: Types, device: str
) -> list[VariantCode]:
    """The code of each variant for "cpu" or "cuda".

    variants : different ones. layers : of each layer num_qo_heads, head_dim, and in "variant" the index of its variant, or None.

    Raises
    ------
    ModelError : a variant reads a weight that is not there. VariantError, DTypeError : a weight is of another shape or type than it
    is read as.
    """
    codes = []
    for index, variant in enumerate(variants):
        numbers = tuple(number for number, layer in enumerate(layers) if layer["variant"] == index)
        bound = _bound(variant, numbers, layers[numbers[0]], weights)
        struct = bound.cuda_struct if device == "cuda" else bound.variant._struct
        codes.append(VariantCode(numbers, bound, None if bound.variant.is_plain else struct))
    return codes


def _bound(variant: LayerVariant, numbers: tuple[int, ...], layer: Mapping[str, Any], weights: Types) -> BoundVariant:
    import tvm

    def stand_in(name: str) -> Any:
        if name not in weights:
            raise ModelError(
                f"the attention variant of the layers {list(numbers)} reads the weight {name!r}, which the model does not have; its "
                f"weights are {', '.join(list(weights)[:4])}, …"
            )
        shape, dtype = weights[name]
        return tvm.runtime.empty(tuple(shape), dtype)

    try:
        bound = variant.bind(stand_in, lambda array: array)
        bound.check_shapes(int(layer["num_qo_heads"]), 0, int(layer["head_dim"]))
    except VariantError as error:
        raise VariantError(f"the attention variant of the layers {list(numbers)} cannot be bound: {error}") from error
    return bound


def by_digest(codes: Iterable[VariantCode]) -> dict[str, VariantCode]:
    """One of each that has code."""
    return {code.digest: code for code in codes if code.struct is not None}


def register(codes: Iterable[VariantCode]) -> None:
    """Make their CUDA kernels known to this process."""
    for code in codes:
        if code.struct is not None:
            jit.register_variant(code.digest, code.struct.source)


def prepare_host(codes: Iterable[VariantCode]) -> None:
    """Have what the library lacks of them compiled for this machine's processor. Raises as variant.cpu_functions."""
    from ..variant import cpu_functions

    for code in by_digest(codes).values():
        cpu_functions(code.bound.variant)


def host_objects(codes: Iterable[VariantCode]) -> tuple[list[pathlib.Path], dict[tuple[str, str], str]]:
    """Objects with what the library lacks of them, for each instruction set of the CPU executor; (instruction set, digest) -> symbol.

    Raises MissingDependencyError without a C++ compiler, CompileError with what it printed.
    """
    from ..variant import cpu, prebuilt

    variants = {
        d: code.bound.variant for d, code in by_digest(codes).items() if not prebuilt.address(code.bound.variant)
    }
    if not variants:
        return [], {}
    sets = cpu.instruction_sets()
    symbols = {(isa, digest): cpu.embedded_name(digest, isa) for isa in sets for digest in variants}
    return [cpu.embedded_object(variants.values(), isa) for isa in sets], symbols

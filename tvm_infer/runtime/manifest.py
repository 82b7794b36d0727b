"""What a compiled model says of itself."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any

from .. import _ffi
from ..errors import AbiError
from ..spec import AttentionSpec
from . import library

if TYPE_CHECKING:
    from ..variant.layer import LayerVariant


@dataclass(frozen=True)
class Manifest:
    """Sizes and names that running a compiled model takes.

    inputs : (name, dtype) of the function's inputs; the cache comes after them, then `weights`, named as in the model's state_dict.
    weight_types : "dtype [shape]" of each weight.
    layers : the attention of every layer, with its variant. max_tokens : tokens of one step, at most.
    decode_function : of CUDA targets, the function that is captured whole; "" where there is none. decode_rows : its rows, at most.
    rope : how the cache rotates q and k of fused calls (inv_freq, interleaved, magnitude), of models that leave it to the cache.
    buckets : numbers of rows that it is captured for. logits_dtype, logits_rank : of its logits, [rows, vocab] or [1, rows, vocab].
    """

    abi_version: int
    target: str
    function: str
    inputs: tuple[tuple[str, str], ...]
    weights: tuple[str, ...]
    weight_types: tuple[str, ...]
    layers: tuple[AttentionSpec, ...]
    vocab_size: int
    max_tokens: int
    decode_function: str = ""
    decode_rows: int = 0
    buckets: tuple[int, ...] = ()
    logits_dtype: str = "float32"
    logits_rank: int = 2
    rope: Mapping[str, Any] | None = None

    @property
    def variants(self) -> Mapping[LayerVariant, tuple[int, ...]]:
        """The variants that layers have, and which; layers of plain attention are left out."""
        layers: dict[LayerVariant, tuple[int, ...]] = {}
        for number, spec in enumerate(self.layers):
            if spec.variant is not None:
                layers[spec.variant] = (*layers.get(spec.variant, ()), number)
        return layers

    @property
    def device_kind(self) -> str:
        """ "cpu" or "cuda"."""
        return "cuda" if json.loads(self.target)["kind"] == "cuda" else "cpu"

    def save(self, folder: pathlib.Path) -> None:
        """Write into `folder`."""
        variants = list(self.variants)  # each once, however large its tables
        layers = [
            {**vars(spec), "variant": None if spec.variant is None else variants.index(spec.variant)}
            for spec in self.layers
        ]
        fields = {**vars(self), "layers": layers, "variants": [variant.to_fields() for variant in variants]}
        (folder / library.MANIFEST).write_text(json.dumps(fields, indent=1))

    @classmethod
    def load(cls, folder: pathlib.Path) -> Manifest:
        """Read from `folder`. AbiError if it was compiled against another version of the packed functions."""
        return cls.parse(json.loads((folder / library.MANIFEST).read_text()), folder)

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: os.PathLike[str] | str) -> Manifest:
        """From JSON's fields. AbiError, naming `where` they are from, if it was compiled against another version."""
        fields = dict(fields)
        have = int(_ffi.func("abi_version")())
        if fields["abi_version"] != have:
            raise AbiError(
                f"the model in {where} was compiled for tvm_infer ABI {fields['abi_version']}, this library has ABI "
                f"{have}: compile it again"
            )
        known = {"variants", *(field.name for field in dataclass_fields(cls))}
        if set(fields) != known:
            raise AbiError(
                f"the model in {where} was compiled by another version of tvm_infer: its manifest has {sorted(set(fields) - known)} "
                f"more and {sorted(known - set(fields))} fewer fields than this version's. Compile it again"
            )
        fields["inputs"] = tuple((name, dtype) for name, dtype in fields["inputs"])
        fields["weights"] = tuple(fields["weights"])
        fields["weight_types"] = tuple(fields["weight_types"])
        fields["buckets"] = tuple(fields["buckets"])
        variants = [_layer_variant(stored) for stored in fields.pop("variants")]
        fields["layers"] = tuple(
            AttentionSpec(**{**spec, "variant": None if spec["variant"] is None else variants[spec["variant"]]})
            for spec in fields["layers"]
        )
        return cls(**fields)


def _layer_variant(stored: Mapping[str, Any]) -> LayerVariant:
    from ..variant.layer import LayerVariant

    return LayerVariant.from_fields(stored)

"""The variant of one layer of a model: the expressions, and where the values of its parameters come from."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import VariantError
from .band import Band, evaluate_band
from .bind import BoundVariant
from .text import number
from .variant import Variant


@dataclass(frozen=True)
class Weight:
    """A parameter that is one of the model's weights, whole. name : of the weight."""

    name: str

    def __str__(self) -> str:
        return f"weight {self.name}"


@dataclass(frozen=True)
class Constant:
    """A parameter that is an array of the model's own. dtype : float32, int32 or bool; data : its bytes, row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray) -> Constant:
        """A copy of an array."""
        return cls(array.dtype.name, array.shape, array.tobytes())

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self.data, self.dtype).reshape(self.shape)

    def __str__(self) -> str:
        if len(self.shape) == 1 and self.shape[0] <= 8:
            return f"[{', '.join(number(x.item(), self.dtype) for x in self.array)}]"
        return f"constant {self.dtype} {list(self.shape)}"


Value = Weight | Constant | float | int


@dataclass(frozen=True)
class LayerVariant:
    """values : (parameter, what it is bound to), for each parameter of the variant. Layers of equal ones compute the same."""

    variant: Variant
    values: tuple[tuple[str, Value], ...] = ()

    @property
    def band(self) -> Band:
        """The keys around the diagonal that it sees: what it is planned with."""
        numbers = {name: value for name, value in self.values if isinstance(value, (int, float))}
        return evaluate_band(self.variant.bands, numbers, self.variant.name)

    def renamed(self, names: Mapping[str, str]) -> LayerVariant:
        """With weights called as `names` says."""
        values = ((p, Weight(names.get(v.name, v.name)) if isinstance(v, Weight) else v) for p, v in self.values)
        return LayerVariant(self.variant, tuple(values))

    def bind(self, weight: Callable[[str], Any], place: Callable[[np.ndarray], Any]) -> BoundVariant:
        """The variant with its values. weight : name -> tensor where attention runs; place : a copy of an array there.

        Raises as :meth:`Variant.bind`.
        """
        made: dict[str, Any] = {}
        for name, value in self.values:
            if isinstance(value, Weight):
                made[name] = weight(value.name)
            elif isinstance(value, Constant):
                array = value.array
                made[name] = place(array.view(np.uint8) if value.dtype == "bool" else array)
            else:
                made[name] = value
        return self.variant.bind(**made)

    def to_fields(self) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = {}
        for name, value in self.values:
            if isinstance(value, Weight):
                values[name] = {"weight": value.name}
            elif isinstance(value, Constant):
                data = base64.b64encode(value.data).decode()
                values[name] = {"dtype": value.dtype, "shape": list(value.shape), "data": data}
            else:
                values[name] = value
        return {"variant": self.variant.to_json(), "values": values}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> LayerVariant:
        """The inverse of :meth:`to_fields`. Raises VariantError for what it did not make."""
        values: list[tuple[str, Value]] = []
        try:
            for name, value in fields["values"].items():
                if not isinstance(value, Mapping):
                    values.append((name, value))
                elif "weight" in value:
                    values.append((name, Weight(value["weight"])))
                else:
                    data = base64.b64decode(value["data"])
                    values.append((name, Constant(value["dtype"], tuple(value["shape"]), data)))
            return cls(Variant.from_json(fields["variant"]), tuple(values))
        except (KeyError, TypeError, AttributeError) as error:
            raise VariantError(f"argument `fields` is no layer's variant: {error!r}") from error

    def __str__(self) -> str:
        lines = [str(self.variant)]
        lines += [
            f"  {name} = {value:g}" if isinstance(value, float) else f"  {name} = {value}"
            for name, value in self.values
        ]
        return "\n".join(lines)

"""An attention variant: functions in the holes of the attention kernels, and the parameters that they read."""

from __future__ import annotations

import functools
import json
import keyword
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import VariantError
from . import code as codes
from . import text
from .band import Split, split
from .code import Code
from .location import error_here
from .lower import Settings, Struct, lower, takes_shared_keys
from .parameters import KIND_OF_VARIABLE, MAX_SCALARS, MAX_TABLES, VARIABLES, Parameter
from .trace import trace

if TYPE_CHECKING:
    from .bind import BoundVariant

_FORMAT = 2  # of to_json; 1 had no settings
HOLES = tuple(VARIABLES)
_DEFAULTS = asdict(Settings())


class Variant:
    """What attention does besides softmax(q k) v, as a value: it does not change, can be printed, compared, pickled and stored.

    Two variants are equal where their expressions and parameters are; the name is a label and does not count.

    Parameters
    ----------
    name : for printing and errors.
    logits : function of `value`, sm_scale * q . k, and others; returns the logit that takes its place, float32.
    mask : returns a condition: whether the row sees the key.
    output : function of `value`, an element of the row's normalised output; returns what takes its place. May take `lse`, the
        natural logarithm of the row's sum of exponentials (-inf for a row that sees no key), but not `kv_pos`.
    query, key : functions of `value`, the element `channel` of a head of q or k, and of `mean_square`, the mean of the head's squares;
        each returns what enters the product in its place. A key has no `qo_head` and no `q_pos`: it serves all queries of its group.
    rope_rate : the radians by which `pair` of channels turns from one position to the next, for queries and keys alike (rotary position
        embedding), after `query` and `key`. May take `batch`, `q_len` and `kv_len`. rope_position : of `pos`, a query's or key's
        position, the whole number that the rate is multiplied by; `pos` itself if None. The angle is exact to 1e-6 at any position
        below 2^24.
    softmax : False makes the logits themselves the weights, O = sum of logit * v; there is no LSE then (0 where a row sees a key).
    interleaved : pair i is channels 2i and 2i + 1; else i and i + rotary_dim / 2. rotary_dim : a multiple of 16; the first so many
        channels turn. None for all.
    parameters : what functions get besides, by name, from :func:`scalar`, :func:`per_head`, :func:`per_request`, :func:`per_channel`,
        :func:`per_pair`, :func:`tensor`.

    Functions name what they want: batch, qo_head, kv_head; q_pos and kv_pos, positions in the request; q_len and kv_len, the
    request's queries in this call and its keys (int32), and parameters. ``q_pos - (kv_len - q_len)`` is the query's index in the call.
    Each is called once, with traced values (:class:`Expr`). Expressions must be good for every key below kv_len, also for keys that
    the mask hides.

    Raises
    ------
    VariantError : for a function that cannot be traced, with its file and line; for a parameter that is misnamed, or that no
        expression reads.
    """

    name: str
    parameters: Mapping[str, Parameter]
    settings: Settings
    _holes: Mapping[str, Code]

    def __init__(
        self,
        name: str,
        /,
        *,
        logits: Callable[..., Any] | None = None,
        mask: Callable[..., Any] | None = None,
        output: Callable[..., Any] | None = None,
        query: Callable[..., Any] | None = None,
        key: Callable[..., Any] | None = None,
        rope_rate: Callable[..., Any] | None = None,
        rope_position: Callable[..., Any] | None = None,
        softmax: bool = True,
        interleaved: bool = False,
        rotary_dim: int | None = None,
        **parameters: Parameter,
    ) -> None:
        _check_parameters(name, parameters)
        given = (logits, mask, output, query, key, rope_rate, rope_position)
        holes = {hole: trace(f, hole, parameters) for hole, f in zip(HOLES, given, strict=True) if f is not None}
        settings = Settings(bool(softmax), bool(interleaved), 0 if rotary_dim is None else rotary_dim)
        self._fill(name, holes, parameters, settings)

    def _fill(
        self, name: str, holes: Mapping[str, Code], parameters: Mapping[str, Parameter], settings: Settings
    ) -> None:
        _check_settings(name, holes, settings)
        unused = set(parameters).difference(*(code.names for code in holes.values()))
        if unused:
            raise error_here(
                f"variant {name}: no expression reads the parameter `{min(unused)}`: use it in a function, or do not declare it"
            )
        self.__dict__.update(
            name=name, parameters=MappingProxyType(dict(parameters)), settings=settings, _holes=MappingProxyType(holes)
        )

    @classmethod
    def _of(
        cls, name: str, holes: Mapping[str, Code], parameters: Mapping[str, Parameter], settings: Settings
    ) -> Variant:
        """From code that is there already."""
        _check_parameters(name, parameters)
        made = cls.__new__(cls)
        made._fill(name, {hole: holes[hole] for hole in HOLES if hole in holes}, parameters, settings)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a variant does not change: make another instead of setting `{name}`")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a variant does not change: `{name}` stays")

    @property
    def logits(self) -> Code | None:
        """The expression in the hole, or None."""
        return self._holes.get("logits")

    @property
    def mask(self) -> Code | None:
        """The whole mask, bands included, or None."""
        return self._holes.get("mask")

    @property
    def output(self) -> Code | None:
        """The expression in the hole, or None."""
        return self._holes.get("output")

    @property
    def holes(self) -> Mapping[str, Code]:
        """Every hole that is filled, by name, and its expression."""
        return self._holes

    @property
    def rotates(self) -> bool:
        """Whether it turns queries and keys by their positions: caches hold keys that are not turned then."""
        return "rope_rate" in self._holes

    @property
    def takes_shared_keys(self) -> bool:
        """Whether it goes with `levels`, keys that requests share and that are read once.

        That is where it has no mask but a band's and no rotation, and its `logits`, `query` and `key` do not read `batch`, `q_len` or
        `kv_len`.
        """
        return takes_shared_keys({**self._holes, "mask": self.residual_mask})

    def tir(self, hole: str) -> Any:
        """The TIR expression of a hole ("logits", "mask", …), or None: variables and scalars are tirx.Var of their names."""
        code = self._holes.get(hole)
        return None if code is None else codes.to_tir(code, self.parameters)

    @functools.cached_property
    def bands(self) -> Split:
        """The mask's band, and what is left of it for kernels."""
        return split(self.mask, self.parameters)

    @property
    def residual_mask(self) -> Code | None:
        """What the kernels test of the mask, since no band says it; None for nothing."""
        return self.bands.residual

    @property
    def is_plain(self) -> bool:
        """Whether the band is all of it: planned with, kernels without a variant compute it."""
        return self._holes.keys() <= {"mask"} and self.residual_mask is None and self.settings.softmax

    @functools.cached_property
    def _struct(self) -> Struct:
        return lower({**self._holes, "mask": self.residual_mask}, self.parameters, self.settings)

    @functools.cached_property
    def _struct_of_small_logits(self) -> Struct:
        holes = {**self._holes, "mask": self.residual_mask}
        return lower(holes, self.parameters, self.settings, has_small_logits=True)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name the generated code: the same for variants that differ in names or in their bands only."""
        return self._struct.digest

    def source(self) -> str:
        """The generated struct, ``variant_<digest>``, for a source that includes tvm_infer/variant/variant.h."""
        return self._struct.source

    def cpu_source(self) -> str:
        """A C++17 source that defines ``variant_<digest>_cpu``, the CpuFunctions of the CPU executor."""
        name = self._struct.name
        return f'#include "tvm_infer/variant/cpu_functions.h"\n\n{self.source()}\nTVM_INFER_VARIANT_CPU({name});\n'

    def bind(self, /, **values: Any) -> BoundVariant:
        """The variant with a number for each scalar and an array for each table (torch, numpy or TVM; not copied).

        Raises
        ------
        VariantError : a parameter is missing or unknown, a scalar is no number of its type, a table is of another rank or device, the
            window of a mask comes out negative. DTypeError : a table is of another dtype.
        """
        from .bind import bind

        return bind(self, values)

    @functools.cached_property
    def _alone(self) -> BoundVariant:
        """Bound to nothing."""
        return self.bind()

    def __and__(self, other: Any) -> Variant:
        return combine(self, other) if isinstance(other, Variant) else NotImplemented

    @functools.cached_property
    def _identity(self) -> str:
        parameters = [[name, p.sort, p.dtype, p.rank] for name, p in self.parameters.items()]
        holes = {hole: codes.to_list(code) for hole, code in self._holes.items()}
        fields = {"parameters": parameters, "settings": asdict(self.settings), "holes": holes}
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Variant) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def to_json(self) -> str:
        """The variant as text, for :meth:`from_json`."""
        return json.dumps({"format": _FORMAT, "name": self.name}, separators=(",", ":"))[:-1] + "," + self._identity[1:]

    @classmethod
    def from_json(cls, stored: str) -> Variant:
        """The variant that :meth:`to_json` made. Raises VariantError for any other text."""
        try:
            fields = json.loads(stored)
            version, name, rows, holes = (fields[key] for key in ("format", "name", "parameters", "holes"))
            parameters = {p: Parameter(sort, dtype, rank) for p, sort, dtype, rank in rows}
            settings = _settings_of(fields["settings"]) if version == _FORMAT else Settings()
            unknown = set(holes) - set(HOLES)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, VariantError):
                raise
            raise VariantError(f"argument `stored` is no variant as Variant.to_json writes it: {error!r}") from error
        if version not in (1, _FORMAT) or unknown:
            raise VariantError(
                f"argument `stored` is a variant of format {version} with the holes {', '.join(holes)}; this tvm_infer reads formats 1 "
                f"and {_FORMAT} with {', '.join(HOLES)}: store it anew"
            )
        found = {hole: codes.from_list(rows, hole, parameters) for hole, rows in holes.items()}
        return cls._of(name, found, parameters, settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return Variant.from_json, (self.to_json(),)

    def __repr__(self) -> str:
        return f"<Variant {self.name}>"

    def __str__(self) -> str:
        declared = ", ".join(f"{name}: {p}" for name, p in self.parameters.items())
        lines = [f"{self.name}({declared})"]
        lines += [f"  {hole} = {text.expression(code)}" for hole, code in self._holes.items()]
        lines += [f"  {name} = {value}" for name, value in asdict(self.settings).items() if value != _DEFAULTS[name]]
        return "\n".join(lines)


def combine(first: Variant, then: Variant) -> Variant:
    """Both variants: `then` changes the logits, outputs, queries and keys that `first` made, a key must pass both masks, and the
    parameters of both are bound. A parameter that both declare alike is one parameter. ``first & then`` is the same.

    Raises VariantError where both declare a name differently, or both rotate.
    """
    for name in first.parameters.keys() & then.parameters.keys():
        if first.parameters[name] != then.parameters[name]:
            raise error_here(
                f"variants {first.name} and {then.name} both have a parameter `{name}`, {first.parameters[name]} and "
                f"{then.parameters[name]}: rename one"
            )
    if first.rotates and then.rotates:
        raise error_here(
            f"variants {first.name} and {then.name} both have a `rope_rate`; queries and keys turn once: drop one"
        )
    for hole in ("query", "key"):
        if hole in first._holes and hole in then._holes and "mean_square" in then._holes[hole].names:
            raise error_here(
                f"variants {first.name} and {then.name} both have a `{hole}`, and that of {then.name} takes `mean_square`, which is "
                f"the head's before {first.name} changed it: combine them the other way round"
            )
    holes = {**then._holes, **first._holes}
    turning = first.settings if first.rotates else then.settings
    settings = replace(turning, softmax=first.settings.softmax and then.settings.softmax)
    for hole in first._holes.keys() & then._holes.keys():
        a, b = first._holes[hole], then._holes[hole]
        holes[hole] = (
            codes.conjunction(codes.conjuncts(a) + codes.conjuncts(b)) if hole == "mask" else codes.compose(a, b)
        )
    # A parameter drops out where `then` ignores the value that `first` made of it.
    used = set().union(*(code.names for code in holes.values())) if holes else set()
    parameters = {name: p for name, p in {**first.parameters, **then.parameters}.items() if name in used}
    return Variant._of(f"{first.name} & {then.name}", holes, parameters, settings)


def _settings_of(stored: Any) -> Settings:
    if {name: type(x) for name, x in stored.items()} != {name: type(x) for name, x in _DEFAULTS.items()}:
        raise ValueError(f"settings {stored}")
    return Settings(**stored)


def _check_settings(variant: str, holes: Mapping[str, Code], settings: Settings) -> None:
    n = settings.rotary_dim
    if "rope_rate" not in holes and ("rope_position" in holes or settings.interleaved or n):
        raise error_here(
            f"variant {variant}: `rope_position`, `interleaved` and `rotary_dim` say how channels turn, and need a `rope_rate`"
        )
    if type(n) is not int or n < 0 or n % 16:
        raise error_here(
            f"variant {variant}: `rotary_dim` is {n!r}; it must be a multiple of 16, or None for all channels"
        )
    if not settings.softmax and "output" in holes and "lse" in holes["output"].names:
        raise error_here(f"variant {variant}: `output` takes `lse`, and without softmax there is none: leave it out")


def _check_parameters(variant: str, parameters: Mapping[str, Parameter]) -> None:
    if not isinstance(variant, str) or not variant:
        raise error_here(f"argument `name` is {variant!r}; a variant's name is a string")
    for name, p in parameters.items():
        if not isinstance(p, Parameter):
            raise error_here(
                f"variant {variant}: parameter `{name}` is declared as {p!r}; declare it with variant.scalar, tensor or one of the "
                "`per_` functions, and give its value to bind"
            )
        if name in KIND_OF_VARIABLE or name in HOLES or not name.isidentifier() or keyword.iskeyword(name):
            raise error_here(
                f"variant {variant}: a parameter cannot be called `{name}`; names of Python that are none of "
                f"{', '.join((*KIND_OF_VARIABLE, *HOLES))} can"
            )
    num_scalars = sum(p.is_scalar for p in parameters.values())
    for count, limit, what in (
        (num_scalars, MAX_SCALARS, "scalars"),
        (len(parameters) - num_scalars, MAX_TABLES, "tables"),
    ):
        if count > limit:
            raise error_here(
                f"variant {variant} declares {count} {what}; a call carries at most {limit}: put several into one tensor"
            )

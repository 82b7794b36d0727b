"""Rotary position embedding: what a model's configuration says, and the frequencies that follow from it.

A head's pair i turns by ``position * inv_freq[i]`` radians, in every layer alike (RoFormer, arXiv 2104.09864). Long-context variants
change `inv_freq` and put a factor on cosine and sine. The op that applies it is :func:`tvm_infer.rope_append`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import ArgumentError

__all__ = ["RopeConfig"]


@dataclass(frozen=True)
class RopeConfig:
    """How queries and keys are rotated.

    Attributes
    ----------
    rotary_dim : elements of a head that turn, the first ones: even; 0 for none. The others pass.
    theta : base of the frequencies, theta ** (-2i / rotary_dim).
    scale : factor on positions (MLC's `rope_scale`).
    scaling : as in Hugging Face's `rope_parameters` / `rope_scaling` and in MLC's: a dict with "rope_type" (or "type") "default",
        "linear", "llama3", "yarn", "longrope", or MLC's "gptj" (default frequencies, interleaved), and that type's parameters. None
        is "default". Kept as sorted pairs, so that a configuration hashes.
    interleaved : pairs are elements (2i, 2i + 1), GPT-J's order; otherwise (i, i + rotary_dim / 2), Llama's.

    Raises ArgumentError for what is none of these, naming the value.
    """

    rotary_dim: int
    theta: float = 10000.0
    scale: float = 1.0
    scaling: Mapping[str, Any] | tuple[tuple[str, Any], ...] | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        dim = self.rotary_dim
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0 or dim % 2:
            raise ArgumentError(f"argument `rotary_dim` is {dim!r}; it must be an even number of elements, 0 for none")
        object.__setattr__(self, "theta", _positive("theta", self.theta))
        object.__setattr__(self, "scale", _positive("scale", self.scale))
        parameters = _parameters(self.scaling)
        if parameters.get("rope_type") == "gptj":
            object.__setattr__(self, "interleaved", True)
            parameters = {}
        if parameters.pop("rope_theta", self.theta) != self.theta:
            raise ArgumentError(
                f"argument `scaling` has rope_theta {_parameters(self.scaling)['rope_theta']!r}, `theta` is {self.theta!r}; "
                "they must be the same"
            )
        _check_parameters(parameters, self)
        pairs = tuple(sorted(parameters.items())) if self._type_of(parameters) != "default" else None
        object.__setattr__(self, "scaling", pairs)

    @staticmethod
    def _type_of(parameters: Mapping[str, Any]) -> str:
        return str(parameters.get("rope_type", "default"))

    @property
    def parameters(self) -> dict[str, Any]:
        """`scaling` as a dict; empty for "default"."""
        return dict(self.scaling or ())

    @property
    def rope_type(self) -> str:
        """ "default", "linear", "llama3", "yarn" or "longrope"."""
        return self._type_of(self.parameters)

    def inv_freq(self, seq_len: int | None = None) -> np.ndarray:
        """Radians a token of each pair: float32 [rotary_dim / 2], computed in float64 and rounded once.

        seq_len : of the longest sequence. Only "longrope" looks at it: above original_max_position_embeddings the long factors
            hold, otherwise (and for None) the short ones. Keys rotated by the one do not go with queries rotated by the other.
        """
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float64) / max(1, self.rotary_dim)
        plain = self.theta**-exponents
        turned = _TYPES[self.rope_type].inv_freq(plain, self, seq_len) if self.scaling else plain
        return (turned * self.scale).astype(np.float32)

    def magnitude(self) -> float:
        """Factor on cosine and sine: the attention factor of "yarn" and "longrope", else 1."""
        return _TYPES[self.rope_type].magnitude(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON; :meth:`from_dict` reads it."""
        scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in self.parameters.items()}
        return {**dataclasses.asdict(self), "scaling": scaling or None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeConfig:
        """The configuration that :meth:`to_dict` wrote. Raises ArgumentError for unknown or missing keys."""
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - fields)
        if unknown or "rotary_dim" not in values:
            raise ArgumentError(
                f"argument `values` has keys {sorted(values)}; they must be rotary_dim and any of {sorted(fields - {'rotary_dim'})}"
            )
        return cls(**values)


# Parameters that any type may come with; what they say is said elsewhere, or does not matter here.
_EVERYWHERE = {"rope_type", "partial_rotary_factor", "finetuned"}
_COUNTS = {"original_max_position_embeddings", "max_position_embeddings"}
_LISTS = {"short_factor", "long_factor"}
_NOT_NUMBERS = _LISTS | {"rope_type", "finetuned", "truncate"}


def _positive(name: str, value: Any, what: str = "argument") -> float:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ArgumentError(f"{what} `{name}` is {value!r}; it must be a finite number above 0")
    return float(value)


def _parameters(scaling: Any) -> dict[str, Any]:
    """A copy with one spelling: "type" and old names give way, lists become tuples, absent values are left out."""
    if scaling is None:
        return {}
    if not isinstance(scaling, (Mapping, tuple)):
        raise ArgumentError(
            f"argument `scaling` is a {type(scaling).__name__}; it must be a dict with a rope_type, or None"
        )
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(scaling).items() if v is not None}
    old = found.pop("type", None)
    kind = found.setdefault("rope_type", "default" if old is None else old)
    if kind == "su":  # what Phi-3 called it first
        found["rope_type"] = "longrope"
    return found


def _check_parameters(parameters: Mapping[str, Any], config: RopeConfig) -> None:
    kind = parameters.get("rope_type", "default")
    if kind not in _TYPES:
        raise ArgumentError(
            f"argument `scaling` has rope_type {kind!r}; supported are {', '.join(map(repr, _TYPES))} and MLC's 'gptj'"
        )
    row = _TYPES[kind]
    missing = [k for k in row.required if k not in parameters]
    unknown = sorted(set(parameters) - set(row.required) - set(row.optional) - _EVERYWHERE)
    if missing or unknown:
        words = [f"lacks {', '.join(missing)}"] if missing else []
        words += [f"has {', '.join(f'{k} {parameters[k]!r}' for k in unknown)}"] if unknown else []
        takes = ", ".join((*row.required, *row.optional)) or "no parameter"
        raise ArgumentError(f"argument `scaling` of rope_type {kind!r} {' and '.join(words)}; it takes {takes}")
    for name, value in parameters.items():
        if name in _LISTS:
            _check_factors(name, value, config.rotary_dim // 2)
        elif name not in _NOT_NUMBERS:
            _positive(name, value, "parameter")
        if name in _COUNTS and value != int(value):
            raise ArgumentError(f"parameter `{name}` is {value!r}; it must be a whole number of tokens")
    row.check(parameters, config)


def _check_factors(name: str, value: Any, num_pairs: int) -> None:
    if not isinstance(value, tuple) or len(value) != num_pairs:
        what = f"has {len(value)} entries" if isinstance(value, tuple) else f"is a {type(value).__name__}"
        raise ArgumentError(f"parameter `{name}` {what}; it must be a list of rotary_dim / 2 = {num_pairs} factors")
    for i, factor in enumerate(value):
        _positive(f"{name}[{i}]", factor, "parameter")


def _stretch(parameters: Mapping[str, Any]) -> float:
    """By how much the context grew: `factor`, else the ratio of the two lengths."""
    if "factor" in parameters:
        return float(parameters["factor"])
    return float(parameters["max_position_embeddings"]) / float(parameters["original_max_position_embeddings"])


def _check_stretch(parameters: Mapping[str, Any], _: RopeConfig) -> None:
    if "factor" not in parameters and "max_position_embeddings" not in parameters:
        raise ArgumentError(
            f"argument `scaling` of rope_type {parameters['rope_type']!r} lacks factor; give it, or max_position_embeddings"
        )


def _linear(plain: np.ndarray, config: RopeConfig, _: int | None) -> np.ndarray:
    """Position interpolation (arXiv 2306.15595)."""
    return plain / config.parameters["factor"]


def _check_llama3(parameters: Mapping[str, Any], _: RopeConfig) -> None:
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if high <= low:
        raise ArgumentError(f"parameter `high_freq_factor` is {high!r}; it must be above low_freq_factor, {low!r}")


def _llama3(plain: np.ndarray, config: RopeConfig, _: int | None) -> np.ndarray:
    """Llama 3.1: long waves divided by the factor, short ones kept, those between blended by how often they turn in the old context."""
    p = config.parameters
    low, high = p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * plain / p["factor"] + kept * plain


def _check_yarn(parameters: Mapping[str, Any], config: RopeConfig) -> None:
    _check_stretch(parameters, config)
    if config.theta <= 1:
        raise ArgumentError(f"argument `theta` is {config.theta!r}; with rope_type 'yarn' it must be above 1")


def _yarn(plain: np.ndarray, config: RopeConfig, _: int | None) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp over pairs between those kept and those divided by the factor."""
    p = config.parameters
    dim = config.rotary_dim

    def pair_that_turns(turns: float) -> float:
        """In the old context, that many times."""
        return (
            dim * math.log(p["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
        )

    low, high = pair_that_turns(p.get("beta_fast", 32)), pair_that_turns(p.get("beta_slow", 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as the models were trained: a step
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return plain / _stretch(p) * divided + plain * (1 - divided)


def _yarn_magnitude(parameters: Mapping[str, Any]) -> float:
    """YaRN's temperature (section 3.3), as the square root that goes on q and k each; DeepSeek's two `mscale`s weight it."""
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    factor = _stretch(parameters)

    def temperature(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in parameters and "mscale_all_dim" in parameters:
        return temperature(parameters["mscale"]) / temperature(parameters["mscale_all_dim"])
    return temperature(1.0)


def _longrope(plain: np.ndarray, config: RopeConfig, seq_len: int | None) -> np.ndarray:
    """LongRoPE (arXiv 2402.13753): a factor of its own for each pair."""
    p = config.parameters
    is_long = seq_len is not None and seq_len > p["original_max_position_embeddings"]
    return plain / np.asarray(p["long_factor" if is_long else "short_factor"], np.float64)


def _longrope_magnitude(parameters: Mapping[str, Any]) -> float:
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    factor = _stretch(parameters)
    if factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(parameters["original_max_position_embeddings"]))


@dataclass(frozen=True)
class _Type:
    """A row for each rope_type: its parameters, what they must satisfy together, and what follows from them."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    inv_freq: Callable[[np.ndarray, RopeConfig, int | None], np.ndarray] = lambda plain, _config, _seq_len: plain
    magnitude: Callable[[Mapping[str, Any]], float] = lambda _parameters: 1.0
    check: Callable[[Mapping[str, Any], RopeConfig], None] = lambda _parameters, _config: None


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_TYPES: dict[str, _Type] = {
    "default": _Type(),
    "linear": _Type(_names("factor"), inv_freq=_linear),
    "llama3": _Type(
        _names("factor low_freq_factor high_freq_factor original_max_position_embeddings"),
        inv_freq=_llama3,
        check=_check_llama3,
    ),
    "yarn": _Type(
        _names("original_max_position_embeddings"),
        _names("factor max_position_embeddings attention_factor mscale mscale_all_dim beta_fast beta_slow truncate"),
        _yarn,
        _yarn_magnitude,
        _check_yarn,
    ),
    "longrope": _Type(
        _names("short_factor long_factor original_max_position_embeddings"),
        _names("factor max_position_embeddings attention_factor"),
        _longrope,
        _longrope_magnitude,
        _check_stretch,
    ),
}

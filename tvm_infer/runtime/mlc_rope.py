"""MLC's rotary settings, as TVM's cache understands them, turned into tables of frequencies."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..rope import RopeConfig

_NEVER = 2**62  # tokens of a step


def rope_config(rotary_dim: int, theta: float, scale: float, scaling: str) -> RopeConfig:
    """The configuration that TVM's `llama_rope_with_position_map` has for these settings, "longrope" apart.

    scaling : JSON of MLC's dict. As in TVM, a dict without "rope_type" means none, and "yarn" has no factor on cosine and sine
        (models put it into their softmax scale) and no rounding of its ramp.
    """
    parameters = _parameters(scaling)
    if parameters.get("rope_type") == "yarn":
        parameters.pop("inv_theta_log_scale", None)  # follows from theta
        parameters = {**parameters, "truncate": False, "attention_factor": 1.0}
        parameters.pop("mscale", None), parameters.pop("mscale_all_dim", None)
    return RopeConfig(rotary_dim, theta, scale, parameters or None)


def _parameters(scaling: str) -> dict[str, Any]:
    try:
        parameters = json.loads(scaling) if scaling else {}
    except ValueError as error:
        raise ArgumentError(f"argument `rope_scaling` is {scaling!r}, which is no JSON: {error}") from error
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise ArgumentError(f"argument `rope_scaling` is {scaling!r}; it must be a JSON object, or empty")
    return parameters if "rope_type" in parameters else {}


def _longrope(rotary_dim: int, theta: float, scale: float, parameters: dict[str, Any], ext_factors: Any) -> RopeConfig:
    """TVM takes the factors from a tensor of their own: float32 [rotary_dim], the long ones first."""
    factors = np.ones(rotary_dim) if ext_factors is None else np.asarray(ext_factors.numpy(), np.float64)
    if factors.shape != (rotary_dim,):
        raise ArgumentError(
            f"argument `rope_ext_factors` has shape {list(factors.shape)}; it must be [rotary_dim] = [{rotary_dim}], the long factors "
            "before the short ones"
        )
    pairs = rotary_dim // 2
    kept = {k: v for k, v in parameters.items() if k.endswith("max_position_embeddings") or k == "rope_type"}
    given = {"long_factor": factors[:pairs].tolist(), "short_factor": factors[pairs:].tolist()}
    return RopeConfig(rotary_dim, theta, scale, {**kept, **given})


def rope_tables(rotary_dim: int, theta: float, scale: float, scaling: str, ext_factors: Any) -> list[Any]:
    """What the adapter asks for at creation: [short, long, long_above, interleaved, magnitude].

    short, long : float32 tensors [rotary_dim / 2], radians a token; `long` holds for steps of more than long_above tokens, which is
        how TVM chooses (only "longrope" has two). interleaved, magnitude : as `tvm_infer.rope_append_paged` takes them.

    Raises ArgumentError for a scaling that there is not, naming it.
    """
    import tvm

    parameters = _parameters(str(scaling))
    theta, scale = float(theta), float(scale)
    if parameters.get("rope_type") == "longrope":
        config = _longrope(rotary_dim, theta, scale, parameters, ext_factors)
        long_above = int(parameters["original_max_position_embeddings"])
        tables = [config.inv_freq(), config.inv_freq(long_above + 1)]
    else:
        config, long_above = rope_config(rotary_dim, theta, scale, str(scaling)), _NEVER
        tables = [config.inv_freq()] * 2
    magnitude = config.magnitude()
    assert math.isfinite(magnitude)
    return [*map(tvm.runtime.tensor, tables), long_above, int(config.interleaved), magnitude]

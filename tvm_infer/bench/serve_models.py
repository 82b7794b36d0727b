"""The models that `bench serve` runs: sizes by name, weights real or random, on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ArgumentError, MissingDependencyError
from ..models import find_smollm2, load_gguf
from ..models.llama import LLAMA_3_8B, LlamaConfig

TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    max_position=4096,
    tie_word_embeddings=False,  # tied random weights would repeat one token
)
MODELS = ("tiny", "smollm2", "llama-3-8b")
DEVICES = ("cpu", "cuda")
_DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16")}


@dataclass(frozen=True)
class ServeModel:
    """config : sizes; weights : on the device, named as in `models.mlc_llama`; origin : of the weights, in words."""

    name: str
    config: LlamaConfig
    dtype: str
    weights: Mapping[str, Any]
    origin: str

    @property
    def num_parameters(self) -> int:
        """Elements of all weights."""
        return sum(int(np.prod(w.shape)) for w in self.weights.values())


def check(name: str, dtype: str | None, device: str) -> str:
    """The data type; the device's usual one if None. ArgumentError for a name, device or data type that there is not."""
    if name not in MODELS:
        raise ArgumentError(f"argument `--model` is {name!r}; it must be one of {', '.join(MODELS)}")
    if device not in DEVICES:
        raise ArgumentError(f"argument `--device` is {device!r}; it must be one of {', '.join(DEVICES)}")
    if dtype is not None and dtype not in _DTYPES[device]:
        raise ArgumentError(
            f"argument `--dtype` is {dtype!r}; on {device} models are served in {' or '.join(_DTYPES[device])}"
        )
    return dtype or _DTYPES[device][0]


def config_of(name: str) -> LlamaConfig:
    """Sizes of a model. MissingDependencyError for SmolLM2 without the package of its weights."""
    from ..models.mlc_llama import SMOLLM2_135M

    if name == "smollm2":
        find_smollm2()
    return {"tiny": TINY, "smollm2": SMOLLM2_135M, "llama-3-8b": LLAMA_3_8B}[name]


def load(name: str, dtype: str, device: str) -> ServeModel:
    """The model with its weights on the device. MissingDependencyError : torch for CUDA, the package of SmolLM2's weights."""
    from ..models.mlc_llama import fuse_weights

    if name == "smollm2":
        model = load_gguf(find_smollm2())
        fused = fuse_weights(model.config, model.weights)
        return ServeModel(name, model.config, dtype, _place(fused, dtype, device), f"of {model.path.name}")
    config = config_of(name)
    return ServeModel(name, config, dtype, _random(config, dtype, device), "random, seed 0")


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "argument `--device` is \"cuda\", which needs torch to make weights and read logits: pip install 'tvm_infer[torch]'"
        ) from error
    return torch


def _place(weights: Mapping[str, np.ndarray], dtype: str, device: str) -> dict[str, Any]:
    if device == "cpu":
        return dict(weights)
    torch = _torch()
    return {
        name: torch.from_numpy(w).to(device="cuda", dtype=getattr(torch, dtype)).contiguous()
        for name, w in weights.items()
    }


def _random(config: LlamaConfig, dtype: str, device: str) -> dict[str, Any]:
    """N(0, 1 / k) for a matrix [n, k], so that activations keep their size; ones for norms; 1 for the embedding."""
    from ..models.mlc_llama import export_llama

    described = export_llama(config, dtype=dtype, rotary="model", functions=("embed",)).weights
    weights: dict[str, Any] = {}
    generator = np.random.default_rng(0)
    for name, shape, _ in described:
        std = 1.0 if "embed_tokens" in name else shape[-1] ** -0.5
        if device == "cpu":
            one = len(shape) == 1
            weights[name] = np.ones(shape, np.float32) if one else generator.standard_normal(shape, np.float32) * std
            continue
        torch = _torch()
        weight = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
        weights[name] = weight.fill_(1.0) if len(shape) == 1 else weight.normal_(0.0, std)
    return weights

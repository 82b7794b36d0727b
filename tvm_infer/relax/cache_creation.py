"""What a model asks of its KV cache: the arguments of TVM's and MLC's creation calls, and which of them cannot be had here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .nodes import static_int

DTYPES = ("float32", "float16", "bfloat16")
ROPE_NONE, ROPE_NORMAL, ROPE_INLINE = 0, 1, 2  # tvm.relax.frontend.nn.llm.kv_cache.RopeMode


@dataclass(frozen=True)
class Unsupported:
    """One argument of a creation call that we refuse: its name, its value, why, and the way out."""

    name: str
    value: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"argument `{self.name}` is {self.value}: {self.why}; {self.fix}"


@dataclass(frozen=True)
class CacheArguments:
    """Arguments of a KV cache's creation, named as in `tvm.relax.frontend.nn.llm.kv_cache`.

    attn_kind : of every layer: "mha", "mla" or "mha_sliding". The five sizes may be symbolic: they come when the cache is made.
    layer_sliding_window_size : keys that a token sees in "mha_sliding" layers, its own included.
    rope_ext_factors : the tensor of "longrope", None without. rope_scaling : {} without scaling.
    """

    attn_kind: tuple[str, ...]
    max_batch_size: Any
    max_total_seq_len: Any
    prefill_chunk_size: Any
    page_size: Any
    support_sliding_window: Any
    layer_partition: tuple[Any, ...]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    qk_head_dim: int
    v_head_dim: int
    rope_mode: int
    rope_scale: float
    rope_theta: float
    dtype: str
    rotary_dim: int
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    rope_ext_factors: Any = None
    enable_disaggregation: bool = False
    mla_original_qk_head_dim: int = 0
    mla_original_v_head_dim: int = 0
    layer_sliding_window_size: Any = 1024

    def unsupported(self, *, has_windows: bool = False) -> list[Unsupported]:
        """Every argument that our cache does not serve; empty if it serves all.

        has_windows : it is the one behind TVM's builtins, whose layers and sequences may have windows.
        """
        windows = [] if has_windows else [*self._unsupported_windows()]
        inline = [*(self._unsupported_inline_rope() if has_windows else self._unsupported_rope_mode())]
        return [*self._unsupported_kinds(), *windows, *self._unsupported_sizes(), *inline, *self._unsupported_rope()]

    def _unsupported_windows(self) -> Iterator[Unsupported]:
        layers = [i for i, kind in enumerate(self.attn_kind) if kind == "mha_sliding"]
        fix = "keep TVM's cache for this model"
        if layers:
            why = f"layers {_span(layers)} use sliding-window attention, which models cannot ask of this cache yet"
            yield Unsupported("attn_kind", "'mha_sliding'", why, fix)
        window = static_int(self.support_sliding_window)
        if window not in (0, None):
            why = "sequences with a sliding window are not supported"
            yield Unsupported("support_sliding_window", str(window), why, "pass 0")

    def _unsupported_inline_rope(self) -> Iterator[Unsupported]:
        """Of the cache behind TVM's builtins, which rotates inline also where sequences may have windows, as TVM's does."""
        may_slide = static_int(self.support_sliding_window) not in (0, None)
        if self.rope_mode != ROPE_INLINE and not (may_slide and self.rope_mode == ROPE_NORMAL):
            return
        why = "attention rotates heads and parts of them whose size is a multiple of 16"
        for name in ("qk_head_dim", "rotary_dim"):
            if getattr(self, name) % 16:
                yield Unsupported(
                    name, str(getattr(self, name)), why, "use RopeMode.NORMAL without windows of sequences"
                )

    def _unsupported_rope_mode(self) -> Iterator[Unsupported]:
        if self.rope_mode == ROPE_INLINE:
            why = "keys are rotated when they are stored, not when they are read"
            yield Unsupported("rope_mode", "INLINE", why, "use RopeMode.NORMAL: it gives the same attention")

    def _unsupported_kinds(self) -> Iterator[Unsupported]:
        for kind in sorted(set(self.attn_kind) - {"mha", "mha_sliding"}):
            layers = [i for i, k in enumerate(self.attn_kind) if k == kind]
            what = "multi-head latent attention" if kind == "mla" else "another attention"
            fix = "keep TVM's cache for this model"
            yield Unsupported(
                "attn_kind", repr(kind), f"layers {_span(layers)} use {what}, which has no kernel here", fix
            )
        if self.enable_disaggregation:
            why = "pages are not sent to other machines"
            yield Unsupported("enable_disaggregation", "True", why, "pass False")

    def _unsupported_sizes(self) -> Iterator[Unsupported]:
        layers = [static_int(x) for x in self.layer_partition]
        if layers != [0, self.num_hidden_layers]:
            why = "layers in pipeline stages are not supported"
            yield Unsupported("layer_partition", str(layers), why, f"pass [0, {self.num_hidden_layers}]")
        if self.num_key_value_heads < 1 or self.num_attention_heads % max(self.num_key_value_heads, 1):
            why = f"{self.num_attention_heads} query heads are no multiple of it"
            yield Unsupported("num_key_value_heads", str(self.num_key_value_heads), why, "choose a divisor")
        if self.v_head_dim != self.qk_head_dim:
            why = f"values must be as wide as keys (qk_head_dim {self.qk_head_dim})"
            yield Unsupported("v_head_dim", str(self.v_head_dim), why, "keep TVM's cache for this model")
        for name in ("mla_original_qk_head_dim", "mla_original_v_head_dim"):
            value = getattr(self, name)
            if value and "mla" in self.attn_kind:
                yield Unsupported(name, str(value), "it belongs to latent attention", "keep TVM's cache for this model")
        if self.dtype not in DTYPES:
            yield Unsupported("dtype", repr(self.dtype), f"pages hold {', '.join(DTYPES)}", "choose one of them")

    def _unsupported_rope(self) -> Iterator[Unsupported]:
        if self.rope_mode not in (ROPE_NONE, ROPE_NORMAL, ROPE_INLINE):
            yield Unsupported("rope_mode", str(self.rope_mode), "there is no such mode", "use NONE or NORMAL")
        longrope = "longrope changes the frequencies with the length of a sequence"
        if self.rope_ext_factors is not None:
            yield Unsupported("rope_ext_factors", "given", longrope, "keep TVM's cache for this model")
        if self.rope_scaling.get("rope_type") == "longrope":
            yield Unsupported(
                "rope_scaling", repr(dict(self.rope_scaling)), longrope, "keep TVM's cache for this model"
            )
        if self.rope_mode != ROPE_NONE and not 0 < self.rotary_dim <= self.qk_head_dim:
            why = f"a head has {self.qk_head_dim} elements"
            yield Unsupported("rotary_dim", str(self.rotary_dim), why, "pass an even number of them")


def _span(layers: list[int]) -> str:
    return (
        f"{layers[0]} to {layers[-1]}" if layers[-1] - layers[0] + 1 == len(layers) > 1 else ", ".join(map(str, layers))
    )

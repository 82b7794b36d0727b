"""What the pass saw: matched attentions, refused ones with the reason, softmaxes that are no attention, assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tvm_infer.spec import AttentionSpec

if TYPE_CHECKING:
    from tvm_infer.variant.layer import LayerVariant


@dataclass(frozen=True)
class Location:
    """Where in the module an operator stands.

    function : name of the Relax function; variable : the binding that holds the operator's result; operator : its name;
    source : "file:line" where the module knows it, else "".
    """

    function: str
    variable: str
    operator: str = ""
    source: str = ""

    def __str__(self) -> str:
        where = f"{self.function}/{self.variable}"
        if self.operator:
            where += f" ({self.operator})"
        return f"{where} at {self.source}" if self.source else where


@dataclass(frozen=True)
class Match:
    """One attention that was rewritten.

    layer : its layer in the KV cache, in program order; form : what it looked like; assumptions : what the proof took for granted;
    rope : what became of rotary embedding before it, and why; "" where nobody looked.
    """

    layer: int
    spec: AttentionSpec
    form: str
    location: Location
    assumptions: tuple[str, ...] = ()
    rope: str = ""


@dataclass(frozen=True)
class Reason:
    """Why one attention was not rewritten.

    seen : the expression or shape in question; why : the condition that it breaks; fix : what the user can do.
    """

    location: Location
    seen: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.location}: {self.why}\n    seen: {self.seen}\n    fix:  {self.fix}"


@dataclass(frozen=True)
class NotAttention:
    """A softmax that does not mix tokens (a router, a sampler): left alone."""

    location: Location
    why: str


@dataclass
class RewriteReport:
    """Everything that one run of RewritePagedAttention met, over all functions it looked at."""

    matched: list[Match] = field(default_factory=list)
    refused: list[Reason] = field(default_factory=list)
    not_attention: list[NotAttention] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    def specs(self) -> list[AttentionSpec]:
        """The spec of every layer, in program order."""
        return [match.spec for match in self.matched]

    def _variants(self) -> list[str]:
        """What layers compute besides, layers of equal variants together."""
        layers: dict[LayerVariant, list[int]] = {}
        for match in self.matched:
            if match.spec.variant is not None:
                layers.setdefault(match.spec.variant, []).append(match.layer)
        return [
            f"variant of {_layers(numbers)}: {variant}".replace("\n", "\n  ") for variant, numbers in layers.items()
        ]

    def _ropes(self) -> list[str]:
        """What became of rotary embedding, layers of which the same is true together."""
        layers: dict[str, list[int]] = {}
        for match in self.matched:
            if match.rope:
                layers.setdefault(match.rope, []).append(match.layer)
        return [f"rope of {_layers(numbers)}: {text}" for text, numbers in layers.items()]

    def __str__(self) -> str:
        lines = [
            f"{len(self.matched)} attention(s) rewritten, {len(self.refused)} refused, "
            f"{len(self.not_attention)} softmax(es) left alone"
        ]
        if self.matched:
            header = ("layer", "heads", "head_dim", "dtype", "mask", "sm_scale", "form", "where")
            rows = [
                (
                    str(match.layer),
                    f"{match.spec.num_qo_heads}/{match.spec.num_kv_heads}",
                    f"{match.spec.head_dim}" + (f" / {match.spec.head_dim_vo}" if match.spec.head_dim_vo else ""),
                    match.spec.dtype,
                    ("causal" if match.spec.causal else "full")
                    + (", variant" if match.spec.variant is not None else ""),
                    f"{match.spec.sm_scale:.6g}",
                    match.form,
                    str(match.location),
                )
                for match in self.matched
            ]
            widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
            lines += [
                "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in [header, *rows]
            ]
        lines += self._ropes()
        lines += self._variants()
        lines += [f"refused: {reason}" for reason in self.refused]
        lines += [f"not attention: {item.location}: {item.why}" for item in self.not_attention]
        assumptions = list(self.assumptions)
        layers: dict[str, list[int]] = {}
        for match in self.matched:
            for text in match.assumptions:
                layers.setdefault(text, []).append(match.layer)
        assumptions += [f"{_layers(numbers)}: {text}" for text, numbers in layers.items()]
        lines += [f"assumed: {text}" for text in assumptions]
        return "\n".join(lines)


def _layers(numbers: Sequence[int]) -> str:
    """ "layer 3", "layers 0, 1, 2"."""
    return f"{'layer' if len(numbers) == 1 else 'layers'} {', '.join(map(str, numbers))}"

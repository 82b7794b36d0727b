"""From a model in Relax to one whose attention reads a paged KV cache."""

from .report import Location, Match, NotAttention, Reason, RewriteReport
from .rewrite import RewritePagedAttention
from .torch_import import ImportedModel, export_hf, from_torch

__all__ = [
    "ImportedModel",
    "Location",
    "Match",
    "NotAttention",
    "Reason",
    "RewritePagedAttention",
    "RewriteReport",
    "export_hf",
    "from_torch",
]

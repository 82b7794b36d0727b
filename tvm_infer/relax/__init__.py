"""From a model in Relax to one whose attention reads a paged KV cache."""

from .dispatch_kv_cache import CacheReport, DispatchKVCacheCreation
from .fuse_norm import FuseRMSNorm, NormReport
from .kv_cache import PagedKVCache
from .programmatic_launch import TIR_PIPELINE, ProgrammaticLaunch
from .report import Location, Match, NotAttention, Reason, RewriteReport
from .rewrite import RewritePagedAttention
from .torch_import import ImportedModel, export_hf, from_torch
from .written import lift_cache

__all__ = [
    "TIR_PIPELINE",
    "CacheReport",
    "DispatchKVCacheCreation",
    "FuseRMSNorm",
    "ImportedModel",
    "Location",
    "Match",
    "NormReport",
    "NotAttention",
    "PagedKVCache",
    "ProgrammaticLaunch",
    "Reason",
    "RewritePagedAttention",
    "RewriteReport",
    "export_hf",
    "from_torch",
    "lift_cache",
]

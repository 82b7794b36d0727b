"""What a compiled model runs with: the paged KV cache, the executable, requests, sampling."""

from .engine import Engine, EngineStats, Generation
from .executable import Executable, Manifest
from .kv_cache import PagedKVCache, PrefixStats, Step
from .loading import load
from .mlc_cache import MLCPagedKVCache
from .page_budget import PageBudget
from .sampling import Sampler
from .sequence_state import SequenceState

__all__ = [
    "Engine",
    "EngineStats",
    "Executable",
    "Generation",
    "MLCPagedKVCache",
    "Manifest",
    "PageBudget",
    "PagedKVCache",
    "PrefixStats",
    "Sampler",
    "SequenceState",
    "Step",
    "load",
]

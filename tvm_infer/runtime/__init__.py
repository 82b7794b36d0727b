"""What a compiled model runs with: the paged KV cache."""

from .kv_cache import PagedKVCache, Step

__all__ = ["PagedKVCache", "Step"]

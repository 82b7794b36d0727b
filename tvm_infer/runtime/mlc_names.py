"""Calls on a cache that TVM's builtins take, under names that TVM's RewriteCUDAGraph captures (it leaves out vm.builtin.*)."""

from __future__ import annotations

import tvm_ffi

# of vm.builtin.attention_kv_cache_<name>; relax.DispatchKVCacheCreation emits tvm_infer.mlc_<name>
CALLS = ("attention_with_fused_qkv",)


def register_call_names() -> None:
    """Register TVM's builtins under our names too: the same functions, not wrappers. Can be repeated."""
    import tvm  # noqa: F401  registers the builtins

    for name in CALLS:
        builtin = tvm_ffi.get_global_func(f"vm.builtin.attention_kv_cache_{name}")
        tvm_ffi.register_global_func(f"tvm_infer.mlc_{name}", builtin, override=True)

"""The cache as an argument of a compiled Relax function: an opaque object that call_dps_packed hands to our function."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_infer import _ffi, errors
from tvm_infer.relax import extern_calls
from tvm_infer.runtime import PagedKVCache
from tvm_infer.testing import attention_reference, relative_error

HEADS, KV_HEADS, DIM, LAYERS, SCALE = 6, 2, 16, 2, 0.25


def two_layers() -> tvm.IRModule:
    """Layer 1 attends with the output of layer 0 as its query, to the same keys."""
    bb = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    q = relax.Var("q", relax.TensorType((n, HEADS, DIM), "float32"))
    k = relax.Var("k", relax.TensorType((n, KV_HEADS, DIM), "float32"))
    v = relax.Var("v", relax.TensorType((n, KV_HEADS, DIM), "float32"))
    kv = relax.Var("kv", relax.AnyType())
    with bb.function("main", [q, k, v, kv]):
        with bb.dataflow():
            x = q
            for layer in range(LAYERS):
                x = bb.emit(
                    extern_calls.attention_with_kv_cache(
                        kv,
                        layer,
                        x,
                        k,
                        v,
                        sm_scale=SCALE,
                        causal=True,
                        out_ty=relax.TensorType((n, HEADS, DIM), "float32"),
                    )
                )
            result = bb.emit_output(x)
        bb.emit_func_output(result)
    return bb.get()


def expected(q, keys, values):
    for _ in range(LAYERS):
        q, _ = attention_reference(q, keys, values, sm_scale=SCALE)
    return q


def make_cache() -> PagedKVCache:
    return PagedKVCache(
        num_layers=LAYERS,
        num_qo_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_size=4,
        num_pages=16,
        max_batch=4,
        max_tokens=64,
    )


@pytest.fixture(scope="module")
def vm():
    _ffi.library()
    return relax.VirtualMachine(tvm.compile(two_layers(), target=tvm.target.Target({"kind": "llvm"})), tvm.cpu())


def tensors(rng, n):
    return [rng.standard_normal((n, heads, DIM)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def test_through_the_vm(vm):
    rng, cache = np.random.default_rng(0), make_cache()
    cache.add_sequence(3)
    none = np.zeros((0, KV_HEADS, DIM), np.float32)
    keys, values = none, none
    for n in (9, 1, 5, 1, 0):
        q, k, v = tensors(rng, n)
        keys, values = np.concatenate([keys, k]), np.concatenate([values, v])
        with cache.forward([3], [n]):
            out = vm["main"](*map(tvm.runtime.tensor, (q, k, v)), cache)
        assert relative_error(out.numpy(), expected(q, keys, values)) < 2e-6
    for layer in range(LAYERS):
        assert np.array_equal(cache.gather(3, layer)[0], keys)


def test_errors_come_through_the_vm_with_their_types(vm):
    rng, cache = np.random.default_rng(0), make_cache()
    cache.add_sequence(3)
    args = [tvm.runtime.tensor(x) for x in tensors(rng, 2)]
    with pytest.raises(errors.CacheStateError, match="begin_forward"):
        vm["main"](*args, cache)
    with pytest.raises(errors.PlanMismatchError, match="announced 3 tokens"), cache.forward([3], [3]):
        vm["main"](*args, cache)
    assert cache.seq_len(3) == 0  # the context took the step back
    with pytest.raises(TypeError, match=r"tvm_infer\.PagedKVCache\.v5"):
        vm["main"](*args, args[0])


RUNNER = textwrap.dedent(
    """
    import sys
    import numpy as np
    import tvm, tvm_ffi
    from tvm import relax
    library = tvm.runtime.load_module(sys.argv[1])
    if sys.argv[3] == "beside":
        from tvm_infer import _ffi
        function = lambda name: _ffi.func("kv_cache_" + name)   # the cache is made by libtvm_infer.so
    else:
        # by the model's own copy
        function = lambda name: library.get_function("tvm_infer_kv_cache_" + name, query_imports=True)
    vm = relax.VirtualMachine(library, tvm.cpu())
    data = np.load(sys.argv[2])
    cache = function("create")(2, 6, 2, 16, "float32", 4, 16, 4, 64, 0, 0, tvm_ffi.device("cpu"))
    function("add")(cache, 3)
    function("begin_forward")(cache, [3], [9], 1)
    out = vm["main"](*(tvm.runtime.tensor(data[n]) for n in "qkv"), cache)
    function("end_forward")(cache)
    assert function("seq_len")(cache, 3) == 9
    assert sys.argv[3] == "beside" or not any(m.startswith("tvm_infer") for m in sys.modules)
    np.save(sys.argv[2] + ".out.npy", out.numpy())
    """
)


@pytest.mark.parametrize("how", ["alone", "beside"])
def test_a_model_that_carries_our_object(how, tmp_path, monkeypatch):
    """The static object in an exported model: with its own cache and no tvm_infer in the process; and on a cache that the shared
    library made, which both take for the same type although the object registers nothing when it is loaded."""
    monkeypatch.setattr(extern_calls, "ATTENTION_WITH_KV_CACHE", "tvm_infer_attention_with_kv_cache")
    operations = ["create", "add", "begin_forward", "end_forward", "seq_len"]
    names = ["tvm_infer_attention_with_kv_cache", *(f"tvm_infer_kv_cache_{name}" for name in operations)]
    linked = tvm.runtime.load_static_library(str(_ffi.static_library()), names)
    module = two_layers().with_attr("external_mods", [linked])
    model = tmp_path / "model.so"
    tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(str(model))
    q, k, v = tensors(np.random.default_rng(1), 9)
    data = tmp_path / "data.npz"
    np.savez(data, q=q, k=k, v=v)
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(data), how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert relative_error(np.load(str(data) + ".out.npy"), expected(q, k, v)) < 2e-6

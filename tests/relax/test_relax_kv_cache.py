"""relax.PagedKVCache: what its methods emit, what its constructor makes and refuses, and that the calls compute attention."""

from __future__ import annotations

import inspect
from typing import TypeVar

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn.llm import kv_cache as tvm_cache
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_infer import _ffi, errors
from tvm_infer.relax import PagedKVCache, extern_calls, lift_cache, pipeline
from tvm_infer.relax.written import written_attentions, written_rope
from tvm_infer.runtime import PagedKVCache as RuntimeCache
from tvm_infer.spec import AttentionSpec

n = TypeVar("n")
b = TypeVar("b")
max_batch, max_total, chunk, page, window = (
    TypeVar(name) for name in ("max_batch", "max_total", "chunk", "page", "window")
)
SIZES = ("max_batch_size", "max_total_seq_len", "prefill_chunk_size", "page_size", "support_sliding_window")
PLAIN = {"param_mode": "plain", "effect_mode": "none"}


class Model(nn.Module):
    def fused(self, qkv: nn.Tensor, kv_cache: PagedKVCache):
        return kv_cache.attention_with_fused_qkv(1, qkv, 4, sm_scale=0.25)

    def apart(self, q: nn.Tensor, k: nn.Tensor, v: nn.Tensor, kv_cache: PagedKVCache):
        return kv_cache.attention(0, q, k, v, sm_scale=0.25)

    def positions(self, x: nn.Tensor, kv_cache: PagedKVCache):
        return kv_cache.get_query_positions(x.shape[0])


def export(method, **inputs):
    spec = {**inputs, "kv_cache": nn.spec.Object(object_type=PagedKVCache), "$": PLAIN}
    return Model().export_tvm({method: spec})[0]


def check(mod, expected):
    mod, expected = (
        relax.transform.CanonicalizeBindings()(m) for m in (mod, expected)
    )  # the frontend names outputs twice
    tvm.ir.assert_structural_equal(mod, expected, map_free_vars=True)


def test_fused_attention():
    @I.ir_module
    class Expected:
        @R.function
        def fused(qkv: R.Tensor((b, 1, 8, 16), "float16"), kv_cache: R.Any) -> R.Tensor((b, 1, 4, 16), "float16"):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                packed = R.reshape(qkv, R.shape([b, 8, 16]))
                o = R.call_dps_packed(
                    "tvm_infer.attention_with_kv_cache_fused_qkv",
                    (kv_cache, R.prim_value(1), packed, R.prim_value(0.25), R.prim_value(1)),
                    out_ty=R.Tensor((b, 4, 16), "float16"),
                )
                y = R.reshape(o, R.shape([b, 1, 4, 16]))
                R.output(y)
            return y

    check(export("fused", qkv=nn.spec.Tensor(["b", 1, 8, 16], "float16")), Expected)


def test_attention_with_operands_apart():
    @I.ir_module
    class Expected:
        @R.function
        def apart(
            q: R.Tensor((1, n, 4, 16), "float32"),
            k: R.Tensor((1, n, 2, 16), "float32"),
            v: R.Tensor((1, n, 2, 16), "float32"),
            kv_cache: R.Any,
        ) -> R.Tensor((1, n, 4, 16), "float32"):
            R.func_attr({"num_input": 4})
            with R.dataflow():
                q3 = R.reshape(q, R.shape([n, 4, 16]))
                k3 = R.reshape(k, R.shape([n, 2, 16]))
                v3 = R.reshape(v, R.shape([n, 2, 16]))
                o = R.call_dps_packed(
                    "tvm_infer.attention_with_kv_cache",
                    (kv_cache, R.prim_value(0), q3, k3, v3, R.prim_value(0.25), R.prim_value(1)),
                    out_ty=R.Tensor((n, 4, 16), "float32"),
                )
                y = R.reshape(o, R.shape([1, n, 4, 16]))
                R.output(y)
            return y

    tensors = {name: nn.spec.Tensor([1, "n", heads, 16], "float32") for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    check(export("apart", **tensors), Expected)


def test_query_positions_are_of_the_type_that_tvm_returns():
    @I.ir_module
    class Expected:
        @R.function
        def positions(x: R.Tensor((n,), "float32"), kv_cache: R.Any) -> R.Tensor((n,), "int32"):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                wide = R.call_pure_packed(
                    "tvm_infer.kv_cache_query_positions", kv_cache, ty_args=R.Tensor((n,), "int64")
                )
                y = R.astype(wide, "int32")
                R.output(y)
            return y

    check(export("positions", x=nn.spec.Tensor(["n"], "float32")), Expected)


def test_the_cache_is_lifted_behind_the_inputs():
    func = export("fused", qkv=nn.spec.Tensor(["b", 1, 8, 16], "float16"))["fused"]
    lifted = lift_cache(func)
    assert [p.name for p in lifted.params] == ["qkv", "kv_cache"]
    assert int(lifted.attrs["num_input"]) == 1
    assert lift_cache(lifted) is lifted
    assert int(func.attrs["num_input"]) == 2


def test_a_cache_before_other_inputs_changes_places():
    @R.function(private=True)
    def before(kv_cache: R.Any, x: R.Tensor((4,), "float32"), w: R.Tensor((4,), "float32")):
        R.func_attr({"num_input": 2})
        return x

    lifted = lift_cache(before)
    assert [p.name for p in lifted.params] == ["x", "kv_cache", "w"]
    assert int(lifted.attrs["num_input"]) == 1


def test_two_opaque_parameters_are_refused():
    @R.function(private=True)
    def before(kv_cache: R.Any, other: R.Any, x: R.Tensor((4,), "float32")):
        return x

    with pytest.raises(errors.ModelError, match=r"'kv_cache', 'other'.*one cache"):
        lift_cache(before)


def test_written_attentions_are_read_back():
    func = export("fused", qkv=nn.spec.Tensor([1, "n", 8, 16], "float32"))["fused"]
    with pytest.raises(errors.ModelError, match=r"at the layers \[1\]; they must be 0, 1"):
        written_attentions("fused", func)
    tensors = {name: nn.spec.Tensor([1, "n", heads, 16], "float32") for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    (match,) = written_attentions("apart", export("apart", **tensors)["apart"])
    assert match.spec == AttentionSpec(4, 2, 16, "float32", True, 0.25)
    assert match.form == "PagedKVCache"


def create(constructor=PagedKVCache, **changes):
    """The module whose only function makes a cache by TVM's constructor arguments, some of them changed."""

    class Creator(nn.Module):
        def create(self, max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, support_sliding_window):
            sizes = dict(zip(SIZES, (max_batch_size, max_total_seq_len, prefill_chunk_size, page_size, 0), strict=True))
            model = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            heads = {"qk_head_dim": 16, "v_head_dim": 16, "mla_original_qk_head_dim": 0, "mla_original_v_head_dim": 0}
            rope = {"rope_mode": tvm_cache.RopeMode.NONE, "rope_scale": 1, "rope_theta": 10000, "rope_scaling": {}}
            rest = {
                "attn_kind": "mha",
                "layer_partition": relax.ShapeExpr([0, 2]),
                "rope_ext_factors": relax.prim_value(0),
                "rotary_dim": 16,
                "enable_disaggregation": False,
                "dtype": "float32",
                "target": tvm.target.Target({"kind": "llvm"}),
            }
            return constructor(**{**sizes, **model, **heads, **rope, **rest, **changes})

    spec = {**dict.fromkeys(SIZES, int), "$": {"param_mode": "none", "effect_mode": "none"}}
    return Creator().export_tvm({"create": spec})[0]


def test_our_constructor_takes_what_tvm_takes():
    theirs = list(inspect.signature(tvm_cache.TIRPagedKVCache.__init__).parameters)
    ours = list(inspect.signature(PagedKVCache.__init__).parameters)
    assert ours[: len(theirs)] == theirs
    public = [name for name in vars(tvm_cache.PagedKVCache) if not name.startswith("_") and name != "extern_mods"]
    for name in public:
        their_method, our_method = getattr(tvm_cache.PagedKVCache, name), getattr(PagedKVCache, name)
        assert list(inspect.signature(our_method).parameters) == list(inspect.signature(their_method).parameters), name


def packed_calls(mod):
    bindings = mod["create"].body.blocks[0].bindings
    return [b.value for b in bindings if isinstance(b.value, relax.Call) and "packed" in str(b.value.op.name)]


def test_creation_without_rope():
    (call,) = packed_calls(create())
    assert str(call.args[0].global_symbol) == extern_calls.KV_CACHE_CREATE_LIKE
    assert str(call.args[1].ty) == str(relax.TensorType([], "float32"))
    sizes = [str(x) for x in call.args[2].values]
    assert [int(x) for x in call.args[2].values[:4]] == [2, 4, 2, 16]
    assert sizes[4] == "page_size" and sizes[6] == "max_batch_size"
    assert "max_total_seq_len" in sizes[5] and "//" in sizes[5]
    assert "max" in sizes[7] and "prefill_chunk_size" in sizes[7]


def test_creation_runs():
    """The emitted call makes a cache of these sizes on the machine's device, whose fused calls need nothing more."""
    _ffi.library()
    vm = relax.VirtualMachine(pipeline.lower_cpu(create(dtype="float16"), pipeline.host_target()), tvm.cpu())
    made = vm["create"](*(tvm_ffi.Shape([x]) for x in (5, 100, 3, 16, 0)))
    cache = RuntimeCache.from_handle(made)
    have = (cache.num_layers, cache.num_qo_heads, cache.num_kv_heads, cache.head_dim, cache.page_size, cache.dtype)
    assert have == (2, 4, 2, 16, 16, "float16")
    assert (cache.num_pages, cache.max_batch, cache.max_tokens) == (7, 5, 5)
    cache.add_sequence(0)
    qkv = np.ones((2, 8, 16), np.float16)
    with cache.forward([0], [2]):
        np.testing.assert_array_equal(cache.attention_fused_qkv(1, qkv), np.ones((2, 4, 16), np.float16))


def test_create_like_refuses_other_sizes():
    with pytest.raises(errors.ArgumentError, match="argument `sizes` has 2 entries; it must have 8"):
        _ffi.func("kv_cache_create_like")(np.zeros(1, np.float32), tvm_ffi.Shape([1, 2]), [], 0, 1.0)


def test_creation_with_rope_carries_the_frequencies():
    scaling = {"rope_type": "gptj"}
    mod = create(rope_mode=tvm_cache.RopeMode.NORMAL, rope_theta=500, rotary_dim=8, rope_scaling=scaling)
    rope = written_rope(mod)
    np.testing.assert_allclose(rope["inv_freq"], 500.0 ** (-np.arange(0, 8, 2) / 8), rtol=1e-6)
    assert rope["interleaved"] is True and rope["magnitude"] == 1.0
    assert written_rope(create())["inv_freq"] == []
    assert written_rope(export("fused", qkv=nn.spec.Tensor(["b", 1, 8, 16], "float16"))) is None


def test_rotation_runs_from_the_creation_call():
    """What the fused call stores is k rotated by the frequencies of the call that made the cache."""
    _ffi.library()
    mod = create(rope_mode=tvm_cache.RopeMode.NORMAL, rope_theta=100, rotary_dim=8)
    vm = relax.VirtualMachine(pipeline.lower_cpu(mod, pipeline.host_target()), tvm.cpu())
    cache = RuntimeCache.from_handle(vm["create"](*(tvm_ffi.Shape([x]) for x in (1, 64, 8, 16, 0))))
    cache.add_sequence(3)
    qkv = np.random.default_rng(0).standard_normal((5, 8, 16)).astype(np.float32)
    with cache.forward([3], [5]):
        cache.attention_fused_qkv(0, qkv)
    stored, _ = cache.gather(3, 0)
    k = qkv[:, 4:6].astype(np.float64)
    angle = np.arange(5)[:, None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    low, high = k[..., :4], k[..., 4:8]
    expected = np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle), k[..., 8:]], -1
    )
    np.testing.assert_allclose(stored, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_kind": "mla"}, r"`attn_kind` is 'mla': layers 0 to 1 use multi-head latent attention"),
        ({"attn_kind": ["mha", "mha_sliding"]}, r"`attn_kind` is 'mha_sliding': layers 1 use sliding-window"),
        ({"support_sliding_window": 1}, r"`support_sliding_window` is 1"),
        ({"layer_partition": relax.ShapeExpr([0, 1, 2])}, r"`layer_partition` is \[0, 1, 2\].*pass \[0, 2\]"),
        ({"num_key_value_heads": 3}, r"`num_key_value_heads` is 3: 4 query heads are no multiple"),
        ({"v_head_dim": 8}, r"`v_head_dim` is 8: values must be as wide as keys \(qk_head_dim 16\)"),
        ({"rope_mode": tvm_cache.RopeMode.INLINE}, r"`rope_mode` is INLINE.*use RopeMode.NORMAL"),
        ({"rope_mode": 7}, r"`rope_mode` is 7: there is no such mode"),
        ({"rope_ext_factors": relax.const(np.ones(8, "float32"))}, r"`rope_ext_factors` is given: longrope"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"`rope_scaling` is \{'rope_type': 'longrope'\}"),
        ({"rope_mode": 1, "rotary_dim": 32}, r"`rotary_dim` is 32: a head has 16 elements"),
        ({"enable_disaggregation": True}, r"`enable_disaggregation` is True"),
        ({"dtype": "int8"}, r"`dtype` is 'int8': pages hold float32, float16, bfloat16"),
        ({"dtype": "int8", "v_head_dim": 8}, r"v_head_dim.*; argument `dtype`"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(changes, message):
    with pytest.raises(errors.ModelError, match=message):
        create(**changes)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("self_attention", (3, None, None, None, 1.0)),
        ("cross_attention", (3, None, 16, 1.0)),
        ("attention_with_shared_kv", (3, None, None, None, 1.0)),
        ("append_mla_kv", (3, None)),
        ("merge_attn_output_inplace", (None, None, None, None)),
    ],
)
def test_other_operations_are_refused_by_name(method, arguments):
    cache = PagedKVCache(_expr=relax.Var("kv_cache", relax.AnyType()))
    with pytest.raises(errors.ModelError, match=f"PagedKVCache.{method}.*use attention_with_fused_qkv"):
        getattr(cache, method)(*arguments)


def test_mlc_order_of_arguments():
    def generic(**given):
        given.pop("target")
        given["rope_ext_factors"] = None
        given["layer_partition"] = None
        return PagedKVCache.create_generic(**given)

    check(create(generic), create())

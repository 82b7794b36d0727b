"""What a cache can be created with, and how the adapter is built, checked and loaded."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tvm
from mlc_model import LIMITS, SHAPE, shape, to_tvm

from tvm_infer import _ffi, errors
from tvm_infer.jit import cxx
from tvm_infer.runtime import MLCPagedKVCache, mlc_library

# Arguments of tvm_infer.mlc_kv_cache_create, by name, in its order.
GOOD = {
    "cache_config": [5, 160, 24, 4, 0],
    "layer_partition": [0, 2],
    "num_layers": 2,
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "qk_head_dim": 16,
    "v_head_dim": 16,
    "attn_kinds": [0],
    "mla_original_qk_head_dim": 0,
    "mla_original_v_head_dim": 0,
    "rope_mode": 0,
    "rope_scale": 1.0,
    "rope_theta": 10000.0,
    "rope_scaling": "",
    "rope_ext_factors": None,
    "rotary_dim": 16,
    "enable_disaggregation": False,
    "init": "float32",
}


def create(**changes):
    mlc_library.load()
    args = {**GOOD, **changes}
    args = {k: shape(v) if isinstance(v, list) else v for k, v in args.items()}
    args["init"] = tvm.runtime.empty((), args["init"])
    return _ffi.func("mlc_kv_cache_create")(*args.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_kinds": [0, 0]},
        {"cache_config": [5, 160, 24, 4, 0, 1024]},  # a window for layers that have one: none here
        {"attn_kinds": [0, 3]},
        {"rope_ext_factors": 0},  # MLC passes a number where there is no tensor
    ],
)
def test_creation(changes):
    cache = MLCPagedKVCache.from_handle(create(**changes))
    inner = cache.inner
    assert (inner.num_layers, inner.num_qo_heads, inner.num_kv_heads, inner.head_dim) == (2, 4, 2, 16)
    assert (inner.page_size, inner.num_pages, inner.max_batch, inner.max_tokens) == (4, 41, 5, 24)


def test_windows_of_sequences_have_two_pages_more_for_each():
    cache = MLCPagedKVCache.from_handle(create(cache_config=[5, 160, 24, 4, 1]))
    assert cache.inner.num_pages == 41 + 2 * 5 and cache.inner.window_left is None


def test_windows_of_layers():
    cache = MLCPagedKVCache.from_handle(create(attn_kinds=[3], cache_config=[5, 160, 24, 4, 0, 17]))
    assert cache.inner.window_left == 16
    assert MLCPagedKVCache.from_handle(create(attn_kinds=[3])).inner.window_left == 1023
    assert MLCPagedKVCache.from_handle(create(attn_kinds=[0, 3])).inner.window_left is None


def test_a_batch_larger_than_the_prefill_chunk_decodes():
    assert MLCPagedKVCache.from_handle(create(cache_config=[9, 160, 4, 4, 0])).inner.max_tokens == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_config": [5, 160, 24, 4]}, r"`cache_config` is \[5, 160, 24, 4\]; it must be \[max_batch_size"),
        ({"cache_config": [0, 160, 24, 4, 0]}, "max_batch_size = 0; it must be from 1"),
        ({"cache_config": [5, 160, 24, 0, 0]}, "page_size = 0"),
        ({"cache_config": [5, 160, 24, 4, 2]}, "support_sliding_window = 2; it must be 0 or 1"),
        ({"cache_config": [5, 160, 24, 4, 0, 0]}, "layer_sliding_window_size = 0; it must be from 1"),
        ({"layer_partition": [0, 1, 2]}, r"`layer_partition` is \[0, 1, 2\] with num_layers = 2.*pipeline_parallel_stages = 1"),
        ({"layer_partition": [0, 3]}, r"`layer_partition` is \[0, 3\]"),
        ({"attn_kinds": [0, 1]}, r"`attn_kinds` is 1 \(mla\) for layer 1"),
        ({"attn_kinds": [3, 2]}, r"`attn_kinds` is 2 \(linear\) for layer 1.*mha_sliding \(3\)"),
        ({"attn_kinds": [0, 0, 0]}, "`attn_kinds` has 3 entries with num_layers = 2"),
        ({"v_head_dim": 8}, "`v_head_dim` is 8 and `qk_head_dim` is 16.*pad"),
        ({"mla_original_qk_head_dim": 192}, "`mla_original_qk_head_dim` is 192.*latent"),
        ({"mla_original_v_head_dim": 128}, "`mla_original_v_head_dim` is 128"),
        ({"rope_mode": 3}, r"`rope_mode` is 3; it must be 0 \(none\), 1 \(normal.*\) or 2 \(inline"),
        ({"rope_mode": -1}, "`rope_mode` is -1"),
        ({"rope_mode": 2, "rotary_dim": 8}, "`rotary_dim` is 8 with inline rotation; .* multiple of 16, from 16 to qk_head_dim"),
        ({"rope_mode": 2, "rotary_dim": 32}, "`rotary_dim` is 32; it must be even, from 2 to head_dim = 16"),
        ({"rope_mode": 1, "rotary_dim": 8, "cache_config": [5, 160, 24, 4, 1]}, "`rotary_dim` is 8 with inline rotation"),
        ({"rope_mode": 2, "qk_head_dim": 24, "v_head_dim": 24}, "`rope_mode` is inline with qk_head_dim = 24; .* multiple of 16"),
        ({"rope_mode": 2, "rope_ext_factors": to_tvm(np.ones(16))}, "`rope_ext_factors` is a tensor with inline rotation"),
        ({"rope_mode": 2, "rope_scaling": '{"rope_type": "llama4", "factor": 8.0}'}, "rope_type 'llama4'"),
        ({"enable_disaggregation": True}, "`enable_disaggregation` is true"),
        ({"num_kv_heads": 3}, "num_qo_heads"),
        ({"qk_head_dim": 20, "v_head_dim": 20}, "`head_dim` is 20"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(changes, message):
    with pytest.raises(errors.ArgumentError, match=message):
        create(**changes)


def test_dtypes_are_the_executors():
    with pytest.raises(errors.DTypeError, match="float64"):
        create(init="float64")
    with pytest.raises(errors.DTypeError, match="`dtype` is 'float8_e4m3fn'"):
        MLCPagedKVCache(dtype="float8_e4m3fn", **SHAPE, **LIMITS)
    with pytest.raises(errors.ArgumentError, match="`rope_mode` is 'yes'"):
        MLCPagedKVCache(rope_mode="yes", **SHAPE, **LIMITS)


def test_other_caches_are_not_taken_for_ours():
    mlc_library.load()
    plain = MLCPagedKVCache(**SHAPE, **LIMITS).inner
    with pytest.raises(TypeError):
        tvm.get_global_func("vm.builtin.kv_state_clear")(plain)


class TestTheAdapter:
    def test_loading_twice_is_loading_once(self):
        assert mlc_library.load() is mlc_library.load()

    def test_it_exports_its_entry_points_only(self):
        out = subprocess.run(
            ["nm", "-D", "--defined-only", str(mlc_library.build())], capture_output=True, text=True, check=True
        ).stdout
        functions = {line.split()[-1] for line in out.splitlines() if " T " in line}
        assert {f for f in functions if not f.startswith("__tvm_ffi_")} == set()
        assert "__tvm_ffi_tvm_infer_mlc_create" in functions

    def test_the_key_is_its_contents(self):
        library, compiler = mlc_library.describe(), cxx.find()
        key = library.key(compiler)
        assert key == mlc_library.describe().key(compiler)
        others = [
            cxx.Library(**{**vars(library), **change}).key(compiler)
            for change in (
                {"sources": {**library.sources, "tvm_infer/mlc/kv_cache.h": b""}},
                {"foreign": {**library.foreign, "src/runtime/vm/kv_state.h": b""}},
                {"defines": {**library.defines, "MLC_ADAPTER_TVM_VERSION": "0.28.0"}},
            )
        ]
        others.append(library.key(cxx.Compiler(compiler.path, "PATH", "g++ 99")))
        assert len({key, *others}) == 5
        moved = cxx.Library(**{**vars(library), "include_dirs": [pathlib.Path("/elsewhere")]})
        assert moved.key(compiler) == key

    def test_an_adapter_to_another_tvm_is_refused(self):
        module = {"tvm_infer_mlc_tvm_version": lambda: "0.26.0", "tvm_infer_mlc_tvm_layout": lambda: "aaaa"}
        with pytest.raises(errors.AbiError, match=r"against TVM 0\.26\.0 .* and TVM 0\.27\.0 .*TVM_INFER_MLC_LIBRARY"):
            mlc_library._check_versions(module, "0.27.0", "aaaa")
        with pytest.raises(errors.AbiError, match=r"headers aaaa.*headers bbbb"):
            mlc_library._check_versions(module, "0.26.0", "bbbb")
        mlc_library._check_versions(module, "0.26.0", "aaaa")

    def test_virtual_functions_in_another_order_are_refused(self):
        """The probe calls TVM's builtins: whatever they do not find as expected is an AbiError."""
        module = {"tvm_infer_mlc_create": lambda *_: create(cache_config=[1, 60, 4, 4, 0])}  # not the probe's pages
        with pytest.raises(errors.AbiError, match=r"a probe gave \[True, 16, 0\]"):
            mlc_library._check_calls(module, tvm)

    def test_no_compiler(self, monkeypatch, tmp_path):
        for name in ("TVM_INFER_CXX", "CXX"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(
            errors.MissingDependencyError, match=r"C\+\+ compiler \(g\+\+ .*apt install g\+\+.*TVM_INFER_CXX"
        ):
            mlc_library.build()

    @pytest.mark.parametrize("name", ["TVM_INFER_CXX", "CXX"])
    def test_a_compiler_that_is_none(self, monkeypatch, name):
        monkeypatch.delenv("TVM_INFER_CXX", raising=False)
        monkeypatch.setenv(name, "/no/such/compiler")
        with pytest.raises(errors.ArgumentError, match=f"setting {name} is '/no/such/compiler'"):
            cxx.find()
        monkeypatch.setenv(name, shutil.which("false"))
        with pytest.raises(errors.ArgumentError, match=r"is no C\+\+ compiler"):
            cxx.find()

    def test_sources_that_do_not_compile(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path))
        library = cxx.Library("broken", {"broken.cc": b""}, {}, {}, [], [], [])
        with pytest.raises(errors.CompileError, match=r"could not compile broken \(exit status 1\)(.|\n)*broken\.cc"):
            cxx.shared_library(library)
        assert list(tmp_path.glob("libraries/*.lock")) == list(tmp_path.glob("libraries/*"))  # nothing looks finished

    def test_a_prebuilt_one(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TVM_INFER_MLC_LIBRARY", str(tmp_path / "none.so"))
        with pytest.raises(errors.ArgumentError, match=r"none\.so', which is no file"):
            mlc_library.build()
        monkeypatch.delenv("TVM_INFER_MLC_LIBRARY")
        copy = shutil.copy(mlc_library.build(), tmp_path / "adapter.so")
        code = (
            "import tvm_infer.runtime.mlc_library as m; m.load(); import tvm; "
            "print(tvm.get_global_func('tvm_infer.mlc_kv_cache_create') is not None)"
        )
        env = {**os.environ, "TVM_INFER_MLC_LIBRARY": str(copy), "PATH": str(tmp_path)}  # and no compiler
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert run.stdout.strip() == "True", run.stderr

    def test_headers_that_the_wheel_lacks(self, tmp_path):
        with pytest.raises(errors.MissingDependencyError, match=r"lacks src/runtime/vm/kv_state\.h"):
            mlc_library._tvm_headers(tmp_path)

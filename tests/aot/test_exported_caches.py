"""Caches of exported models: 8-bit pages with their scales, shared prefixes; in Python, in C++, on a driver that is none; bad input."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import tvm_ffi
from aot_cases import NEW_TOKENS, PROMPTS, tokens_of
from test_embedded_kernels import COMPILER, fake_cubin
from test_exported_variants import function, weights_of
from test_exported_variants_cuda import SCRIPT
from test_library import cuda_model, export_cuda

import tvm_infer
from tvm_infer import AttentionSpec, PageBudget, PagedKVCache, errors, jit, variant
from tvm_infer.runtime import library, model_kernels

TEXT = [7, 1, 90, 3, 55, 2, 2, 8, 19, 31, 7]
K_SCALES, V_SCALES = [[0.01, 0.02], [0.03, 0.004]], [0.012, 0.03]  # [layers, KV heads], [layers]
E4M3 = {"kv_dtype": "float8_e4m3fn", "k_scale": K_SCALES, "v_scale": V_SCALES}
HOST = tvm_ffi.device("cpu")


@pytest.fixture(scope="module")
def in_8_bits(executable, tmp_path_factory):
    """The folder of a model whose caches are of e4m3 and do not look for shared pages, unless they are asked."""
    folder = tmp_path_factory.mktemp("in_8_bits")
    executable.save(folder, **E4M3, shared_prefix=False)
    return folder


@pytest.fixture(scope="module")
def loaded(in_8_bits):
    return tvm_infer.load(in_8_bits)


def logits(executable, cache) -> np.ndarray:
    """Of a prompt, of a fork's next token and of its parent's."""
    cache.add_sequence(0)
    of_prompt = executable.step(cache, [(0, TEXT)], rows=range(len(TEXT)))
    cache.fork_sequence(0, 1)
    of_forks = executable.step(cache, [(0, [1]), (1, [2])])
    executable.release(cache)
    return np.concatenate([of_prompt, of_forks])


def scaled_cache(folder, kv_dtype="", k_scales=None, v_scales=None, *, page_size=4, num_pages=30, device=HOST):
    """As a program makes it."""
    create = function(folder, "model_create_scaled_cache")
    return create(weights_of(folder), kv_dtype, k_scales, v_scales, page_size, num_pages, 4, 0, device)


def test_a_loaded_model_s_cache_is_as_exported(executable, loaded):
    cache = loaded.new_cache(num_pages=30, page_size=4)
    assert (cache.dtype, cache.kv_dtype) == ("float32", "float8_e4m3fn")
    expected = logits(executable, executable.new_cache(num_pages=30, page_size=4, **E4M3))
    assert (logits(loaded, cache) == expected).all()
    other = executable.new_cache(num_pages=30, page_size=4, **E4M3 | {"k_scale": 0.02})
    assert (logits(executable, other) != expected).any()  # the scales are read


def test_a_cache_of_the_library_is_the_same(executable, in_8_bits, loaded):
    expected = logits(executable, executable.new_cache(num_pages=30, page_size=4, **E4M3))
    create = function(in_8_bits, "model_create_cache")
    for made in (create(weights_of(in_8_bits), 4, 30, 4, 0, HOST), scaled_cache(in_8_bits)):
        assert (logits(loaded, PagedKVCache.from_handle(made)) == expected).all()


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_the_program_chooses(executable, saved, kv_dtype):
    """Of a library that was exported for pages of the model's own type."""
    scales = [np.array(K_SCALES, np.float32), np.repeat(np.array(V_SCALES, np.float32)[:, None], 2, 1)]
    cache = PagedKVCache.from_handle(scaled_cache(saved, kv_dtype, *scales))
    assert cache.kv_dtype == kv_dtype
    expected = executable.new_cache(num_pages=30, page_size=4, kv_dtype=kv_dtype, k_scale=K_SCALES, v_scale=V_SCALES)
    assert (logits(tvm_infer.load(saved), cache) == logits(executable, expected)).all()


def test_what_is_asked_for_goes_before_what_was_exported(executable, in_8_bits, loaded):
    plain = logits(executable, executable.new_cache(num_pages=30, page_size=4))
    assert (logits(loaded, loaded.new_cache(num_pages=30, page_size=4, kv_dtype="float32")) == plain).all()
    assert (logits(loaded, PagedKVCache.from_handle(scaled_cache(in_8_bits, "float32"))) == plain).all()
    # scales of e4m3 are not e5m2's
    ones = logits(executable, executable.new_cache(num_pages=30, page_size=4, kv_dtype="float8_e5m2"))
    assert (logits(loaded, loaded.new_cache(num_pages=30, page_size=4, kv_dtype="float8_e5m2")) == ones).all()
    assert (logits(loaded, PagedKVCache.from_handle(scaled_cache(in_8_bits, "float8_e5m2"))) == ones).all()
    # of one of the two, the other stays
    v_alone = logits(executable, executable.new_cache(num_pages=30, page_size=4, **E4M3 | {"v_scale": 0.5}))
    assert (logits(loaded, loaded.new_cache(num_pages=30, page_size=4, v_scale=0.5)) == v_alone).all()
    half = np.full((2, 2), 0.5, np.float32)
    assert (logits(loaded, PagedKVCache.from_handle(scaled_cache(in_8_bits, "", None, half))) == v_alone).all()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_the_example_generates_the_same(executable, in_8_bits, saved, generate):
    def expected(**settings):
        engine = executable.engine(executable.new_cache(num_pages=40, page_size=4, **settings))
        generations = [engine.submit(prompt, max_new_tokens=NEW_TOKENS)[0] for prompt in PROMPTS]
        engine.run()
        return [g.tokens for g in generations]

    options = ("--max-new-tokens", NEW_TOKENS, "--page-size", 4)
    assert tokens_of(generate(in_8_bits, PROMPTS, *options)) == expected(**E4M3)
    chosen = generate(saved, PROMPTS, *options, "--kv-dtype", "float8_e5m2")
    assert tokens_of(chosen) == expected(kv_dtype="float8_e5m2")
    refused = generate(saved, PROMPTS, *options, "--kv-dtype", "int3")
    assert refused.returncode == 1 and 'DTypeError: argument `kv_dtype` is "int3"; it must be one of' in refused.stderr


def test_the_manifest(in_8_bits, saved):
    row = library.read(in_8_bits / "model.so").about["cache"]
    assert (row["kv_dtype"], row["shared_prefix"]) == ("float8_e4m3fn", False)
    assert np.array(row["k_scales"], np.float32).tolist() == np.array(K_SCALES, np.float32).tolist()
    assert np.array(row["v_scales"]).tolist() == np.float32([[0.012] * 2, [0.03] * 2]).tolist()
    plain = library.read(saved / "model.so").about["cache"]
    assert plain == {
        "kv_dtype": "float32",
        "k_scales": None,
        "v_scales": None,
        "shared_prefix": True,
        "page_budget": None,
    }


# Page budgets

BUDGET = PageBudget(num_tokens=9, num_recent_pages=2, dense_layers=1)  # 3 pages of 4 tokens


@pytest.fixture(scope="module")
def budgeted(executable, tmp_path_factory):
    """The folder of a model whose caches select pages, unless they are asked."""
    folder = tmp_path_factory.mktemp("budgeted")
    executable.save(folder, page_budget=BUDGET)
    return folder


def decoded(executable, cache) -> np.ndarray:
    """Logits of two decode steps behind a prompt of 11 tokens and one of 20."""
    for seq, text in ((0, TEXT), (1, TEXT * 2)):
        cache.add_sequence(seq)
        executable.step(cache, [(seq, text[:20])])
    found = [executable.step(cache, [(1, [token]), (0, [token])]) for token in (5, 6)]
    executable.release(cache)
    return np.concatenate(found)


def test_page_budgets_are_as_exported(executable, budgeted, saved):
    sizes, loaded = {"num_pages": 30, "page_size": 4}, tvm_infer.load(budgeted)
    expected = decoded(executable, executable.new_cache(**sizes, page_budget=BUDGET))
    plain = decoded(executable, executable.new_cache(**sizes))
    assert (expected != plain).any()
    cache = loaded.new_cache(**sizes)
    assert (cache.page_budget.num_pages, cache.page_budget.dense_layers) == (3, (0,))
    made = PagedKVCache.from_handle(function(budgeted, "model_create_cache")(weights_of(budgeted), 4, 30, 4, 0, HOST))
    assert made.page_budget == cache.page_budget
    for on in (cache, made):
        assert (decoded(loaded, on) == expected).all()
    # asked for otherwise
    assert (decoded(loaded, loaded.new_cache(**sizes, page_budget=False)) == plain).all()
    of_all = function(budgeted, "model_create_cache")(weights_of(budgeted), 4, 30, 4, 0, HOST)
    function(budgeted, "kv_cache_set_page_budget")(of_all, 0, 0, 0, 0, 0, ())
    assert (decoded(loaded, PagedKVCache.from_handle(of_all)) == plain).all()
    chosen = scaled_cache(saved)
    function(saved, "kv_cache_set_page_budget")(chosen, 3, 1, 2, 0, 0, (0,))
    assert (decoded(tvm_infer.load(saved), PagedKVCache.from_handle(chosen)) == expected).all()


def test_page_budgets_of_the_manifest(budgeted, tmp_path, executable):
    row = library.read(budgeted / "model.so").about["cache"]["page_budget"]
    assert (row["num_tokens"], row["num_pages"], row["dense_layers"]) == (9, None, [0])
    loaded = tvm_infer.load(budgeted)
    loaded.export_library(tmp_path / "model.so", page_budget=BUDGET)
    with pytest.raises(
        errors.ArgumentError, match=r"`page_budget` ask for other caches than those of .*page_budget=PageBudget"
    ):
        loaded.export_library(tmp_path / "model.so", page_budget=PageBudget(num_pages=3, dense_layers=1))
    with pytest.raises(errors.ArgumentError, match=r"`dense_layers` is 2 for a cache of 2 layers"):
        executable.export_library(tmp_path / "other.so", page_budget=PageBudget(num_pages=3))
    with pytest.raises(
        errors.ArgumentError, match=r"`dense_layers` is \(0,\), without \[1\]: layers of the model that have an"
    ):
        PageBudget(num_pages=3, dense_layers=[0]).check_variants([0, 1])


def test_kernels_that_select_pages():
    layers = [AttentionSpec(8, 2, 128, "bfloat16")]
    names = model_kernels.kernel_names(layers, ["attention_with_kv_cache"], (16,), None, "float8_e5m2", True)
    assert {"page_bounds_bf16", "page_bounds_bf16_e5m2", "page_scores_bf16", "select_pages"} < set(names)


# Shared prefixes


def shared_works(executable, cache) -> int:
    """Of a decode of 12 forks of 4003 tokens: long enough that merges are paid for."""
    rng = np.random.default_rng(0)
    cache.add_sequence(0)
    for chunk in np.split(rng.integers(0, 100, 4003), range(32, 4003, 32)):
        executable.step(cache, [(0, chunk)])
    for child in range(1, 12):
        cache.fork_sequence(0, child)
    executable.step(cache, [(i, [i]) for i in range(12)])
    return cache.plan.num_shared_works


def test_shared_prefixes_are_as_exported(in_8_bits, loaded, saved):
    sizes = {"num_pages": 300}
    assert shared_works(loaded, loaded.new_cache(**sizes)) == 0
    assert shared_works(loaded, loaded.new_cache(**sizes, shared_prefix=True)) > 0
    plain = tvm_infer.load(saved)
    assert shared_works(plain, plain.new_cache(**sizes)) > 0
    assert shared_works(plain, plain.new_cache(**sizes, shared_prefix=False)) == 0
    for folder, finds in ((in_8_bits, False), (saved, True)):
        create = function(folder, "model_create_cache")
        cache = PagedKVCache.from_handle(create(weights_of(folder), 16, 300, 12, 0, HOST))
        assert (shared_works(tvm_infer.load(folder), cache) > 0) == finds


# For GPUs

ALWAYS = ("rope_append_bf16", "rope_append_bf16_e4m3", "copy_pages")


def test_kernels_of_both_kinds_of_pages():
    layers = [AttentionSpec(8, 2, 128, "bfloat16")]
    names = model_kernels.kernel_names(layers, ["attention_with_kv_cache_rope"], (16, 32), kv_dtype="float8_e4m3fn")
    own, scaled = "attention_bf16_h128_p{}", "attention_bf16_e4m3_h128_p{}"
    assert names == (*ALWAYS, *(name.format(page) for page in (16, 32) for name in (own, scaled)))
    names = model_kernels.kernel_names(layers, ["attention_with_kv_cache"], (16,), kv_dtype="float8_e5m2")
    assert names[:2] == ("append_b16", "append_bf16_e5m2")


@pytest.mark.parametrize(
    ("layer", "page_sizes", "message"),
    [
        (
            {"head_dim": 72},
            (16,),
            r"with head_dim \[72\]; the cuda executor has .* pages of 8 bits with head_dim 64, 80, 96, 128, 192, 256",
        ),
        ({"head_dim": 128}, (16, 8), r"with page_sizes \[16, 8\]; the cuda executor has .* with page_sizes 16, 32, 64"),
    ],
)
def test_kernels_that_are_none(executable, tmp_path, layer, page_sizes, message):
    with pytest.raises(errors.ExecutorError, match=message):
        export_cuda(
            cuda_model(executable, **layer), tmp_path / "model.so", page_sizes=page_sizes, kv_dtype="float8_e5m2"
        )
    assert list(tmp_path.iterdir()) == []


def test_kernels_of_variants_are_of_both_kinds_of_pages():
    layers, codes = [AttentionSpec(8, 2, 64, "bfloat16")] * 2, {0: "", 1: variant.STANDARD["soft_cap"].digest}
    jit.register_variant(codes[1], variant.STANDARD["soft_cap"].source())
    names = model_kernels.kernel_names(layers, ["attention_with_kv_cache"], (16,), codes, "float8_e4m3fn")
    own, scaled = "attention_bf16_h64_p16", "attention_bf16_e4m3_h64_p16"
    assert names[3:] == (own, scaled, f"{own}_v{codes[1]}", f"{scaled}_v{codes[1]}")
    turned = variant.STANDARD["rope"]
    jit.register_variant(turned.digest, turned.source())
    with pytest.raises(errors.ExecutorError, match=r"layer 1 has a variant without such a kernel: .* changes queries"):
        codes[1] = turned.digest
        model_kernels.kernel_names(layers, ["attention_with_kv_cache"], (16,), codes, "float8_e4m3fn")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_step_launches_the_kernels_of_8_bits(executable, tmp_path, tmp_path_factory, monkeypatch, run_python):
    """With the library's own functions and TVM's runtime alone; scales lie on the device."""
    from fake_processes import compile_fake

    monkeypatch.setattr(jit, "build", lambda names, arch: None)
    monkeypatch.setattr(jit, "cubin", lambda name, arch: fake_cubin(name))
    heads = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 128}
    weights = [
        (n, w.shape, str(w.dtype)) for n, w in zip(executable.manifest.weights, executable._weights, strict=True)
    ]
    model = cuda_model(executable, **heads)
    arguments = {"kv_dtype": "float8_e4m3fn", "k_scale": 0.5, "page_budget": PageBudget(num_pages=2, dense_layers=1)}
    export_cuda(model, tmp_path / "model.so", page_sizes=(16,), weights=weights, **arguments)
    code = (
        SCRIPT.replace("heads, 64)", "heads, 128)")
        .replace("(32,)", "(64,)")
        .replace("driver.variant_args(Args)", "None")
        + """
def launched(cache):
    call("kv_cache_add", cache, 0)  # the last layer's launches
    kernels = [kernel for kernel, _ in step(cache)]
    return kernels, [l["name"] for l in driver.launches()]
print(*launched(create()), str(call("kv_cache_pages", create(), 0).dtype))
other = call("model_create_scaled_cache", weights, "bfloat16", None, None, 16, 8, 2, 0, tvm_ffi.device("cuda:1"))
print(*launched(other))
other = call("model_create_scaled_cache", weights, "bfloat16", None, None, 16, 8, 2, 0, tvm_ffi.device("cuda:1"))
call("kv_cache_set_page_budget", other, 0, 0, 0, 0, 0, ())
print(*launched(other))
for arguments in (("float8_e5m2", None, None, 16), ("float8_e4m3fn", None, None, 8)):
    try:
        launched(call("model_create_scaled_cache", weights, *arguments, 8, 2, 0, tvm_ffi.device("cuda:1")))
    except Exception as error:
        print(str(error).splitlines()[-1])
"""
    )
    libraries = os.pathsep.join(
        [str(compile_fake(tmp_path_factory.mktemp("fake"))), os.environ.get("LD_LIBRARY_PATH", "")]
    )
    out = run_python(code, tmp_path / "model.so", LD_LIBRARY_PATH=libraries).splitlines()
    e4m3, bf16 = "attention_bf16_e4m3_h128_p16", "attention_bf16_h128_p16"
    selects = ["page_scores_bf16", "select_pages"]
    assert (
        out[0] == f"{[e4m3, e4m3]} {['rope_append_bf16_e4m3', 'page_bounds_bf16_e4m3', *selects, e4m3]} float8_e4m3fn"
    )
    assert out[1] == f"{[bf16, bf16]} {['rope_append_bf16', 'page_bounds_bf16', *selects, bf16]}"
    assert out[2] == f"{[bf16, bf16]} {['rope_append_bf16', bf16]}"
    del out[2]
    assert "there is no kernel `page_bounds_bf16_e5m2` for sm_90a" in out[2] and "export it with the archs" in out[2]
    assert (
        "argument `page_size` is 8; the cuda executor has kernels for 8-bit elements in pages of 16, 32 and 64"
        in out[3]
    )


# Bad input


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"kv_dtype": "int3"}, errors.DTypeError, "`kv_dtype` is 'int3'; it must be one of float32, .*float8_e5m2"),
        ({"kv_dtype": "int4"}, errors.DTypeError, "`kv_dtype` is 'int4'; .* No executor has kernels for int4 yet"),
        ({"kv_dtype": "bfloat16"}, errors.DTypeError, "`kv_dtype` is 'bfloat16' and the model's dtype float32; pages"),
        ({"k_scale": 0.5}, errors.ArgumentError, "pages of float32 have no scale"),
        (
            E4M3 | {"k_scale": [1.0] * 3},
            errors.ArgumentError,
            r"`k_scale` has shape \(3,\); it must be a number, \[num_",
        ),
        (E4M3 | {"v_scale": np.nan}, errors.ArgumentError, "`v_scale` has nan; a scale is finite and above 0"),
        (E4M3 | {"v_scale": "x"}, errors.DTypeError, "`v_scale` is 'x'; it must be a number"),
    ],
)
def test_export_refuses(executable, tmp_path, arguments, kind, message):
    with pytest.raises(kind, match=message):
        executable.export_library(tmp_path / "model.so", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_is_exported_as_it_is(in_8_bits, loaded, tmp_path):
    loaded.export_library(tmp_path / "model.so")
    loaded.export_library(tmp_path / "model.so", **E4M3, shared_prefix=False)
    assert (tmp_path / "model.so").read_bytes() == (in_8_bits / "model.so").read_bytes()
    for other in ({"kv_dtype": "float32"}, {"k_scale": 0.5}, {"shared_prefix": True}):
        with pytest.raises(
            errors.ArgumentError, match=rf"`{next(iter(other))}` ask for other caches than those of .*so"
        ):
            loaded.export_library(tmp_path / "model.so", **other)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("int3",), errors.DTypeError, '`kv_dtype` is "int3"; it must be one of float32'),
        (("float16",), errors.DTypeError, "`dtype` has dtype float32, `kv_dtype` has float16; they must be the same"),
        (
            ("", np.ones((2, 3), np.float32)),
            errors.ArgumentError,
            r"`k_scales` has shape \[2, 3\]; dimension 1 must be 2",
        ),
        (("", None, np.ones((2, 2))), errors.DTypeError, "`v_scales` has dtype float64; it must be float32"),
        (
            ("", None, np.zeros((2, 2), np.float32)),
            errors.ArgumentError,
            "`v_scales` has 0 at entry 0; a scale is finite",
        ),
        (
            ("float32", np.ones((2, 2), np.float32)),
            errors.ArgumentError,
            "cache of float32, whose elements have no scale",
        ),
    ],
)
def test_a_cache_of_the_library_refuses(in_8_bits, arguments, kind, message):
    with pytest.raises(kind, match=message):
        scaled_cache(in_8_bits, *arguments)


def test_a_device_that_the_model_was_not_compiled_for(in_8_bits):
    with pytest.raises(errors.ArgumentError, match="`device` is cuda:0; the model was compiled for cpu"):
        scaled_cache(in_8_bits, device=tvm_ffi.device("cuda:0"))

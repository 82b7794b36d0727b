"""Exported models whose layers have attention variants: in Python, in C++, on every instruction set, several together; bad input."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from aot_cases import NEW_TOKENS, tokens_of
from variant_models import Blocks, Gemma2, GptOss, Kerple, Mistral, decoder, exported, logits64

import tvm_infer
from tvm_infer import _ffi, errors
from tvm_infer.runtime import library
from tvm_infer.runtime.weights_file import WeightsFile
from tvm_infer.variant import cpu

PROMPTS = [[7, 1, 60, 3], [5], list(range(3, 50))]
TEXT = [5, 17, 3, 44, 60, 2, 8, 8, 19, 31, 7]
MODELS = {
    "gemma2": Gemma2,  # a number, the library's own code, two windows
    "gpt_oss": GptOss,  # weights, the library's own code, two windows
    "mistral": Mistral,  # a window, which the planner does
    "kerple": Kerple,  # weights of another shape than they are read in, code of its own
    "blocks": Blocks,  # tables of booleans that are constants, code of its own
}
HAVE_OWN_CODE = ("kerple", "blocks")
REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models():
    return {name: decoder(attention) for name, attention in MODELS.items()}


@pytest.fixture(scope="module")
def executables(models, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return {name: tvm_infer.compile(exported(model), max_tokens=32) for name, model in models.items()}


@pytest.fixture(scope="module")
def folders(executables, tmp_path_factory):
    """name -> what Executable.save wrote."""
    root = tmp_path_factory.mktemp("saved")
    for name, executable in executables.items():
        executable.save(root / name)
    return {name: root / name for name in executables}


@pytest.fixture(scope="module")
def tokens(executables):
    return {name: generated(executable) for name, executable in executables.items()}


def generated(executable) -> list[list[int]]:
    return [g.tokens for g in executable.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]


def is_right(executable, cache, model) -> bool:
    cache.add_sequence(0)
    logits = executable.step(cache, [(0, TEXT)], rows=range(len(TEXT)))
    cache.clear()
    return bool(np.abs(logits - logits64(model, TEXT)).max() < 1e-3)


def function(folder, name):
    """tvm_infer's function of that name in the exported library."""
    return library.load_module(folder / "model.so").get_function(f"tvm_infer_{name}", True)


def weights_of(folder) -> list:
    """As tensors, in the order of the manifest."""
    about = library.read(folder / "model.so").about
    weights = WeightsFile(folder / "model.safetensors")
    return [tvm.runtime.tensor(weights[entry["name"]]) for entry in about["weights"]]


def isa_of_this_machine() -> str:
    return str(_ffi.func("cpu_info")()).split()[0]


SIZES = (4, 30, 2, 0)  # page_size, num_pages, max_batch, max_tokens: the model's
HOST = tvm_ffi.device("cpu")


# What they compute


@pytest.mark.parametrize("name", MODELS)
def test_loaded_in_python(name, folders, executables, models, tokens):
    loaded = tvm_infer.load(folders[name])
    assert loaded.manifest == executables[name].manifest
    assert is_right(loaded, loaded.new_cache(num_pages=8), models[name])
    assert generated(loaded) == tokens[name]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("name", MODELS)
def test_the_program_generates_the_same(name, folders, tokens, generate):
    done = generate(folders[name], PROMPTS, "--max-new-tokens", NEW_TOKENS, "--page-size", 4)
    assert tokens_of(done) == tokens[name] and done.stderr == ""


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("name", HAVE_OWN_CODE)
def test_on_every_instruction_set(name, isa, folders, tokens, generate):
    done = generate(folders[name], PROMPTS, "--max-new-tokens", NEW_TOKENS, TVM_INFER_CPU_ISA=isa)
    if "which this machine or build does not have" in done.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert tokens_of(done) == tokens[name]


WITHOUT_COMPILERS = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import tvm_infer
for folder in sys.argv[1:]:
    loaded = tvm_infer.load(folder)
    print([g.tokens for g in loaded.generate({PROMPTS}, max_new_tokens={NEW_TOKENS})])
    print([line for line in loaded.explain().splitlines() if "variant's code" in line])
print("libtvm_compiler" in open("/proc/self/maps").read())
"""


def test_no_compiler_is_needed(folders, tokens, run_python, tmp_path):
    """Neither TVM's nor C++'s, nor what was compiled before."""
    names = ("gemma2", "mistral", "blocks")
    empty = {"PATH": str(tmp_path), "TVM_INFER_CACHE_DIR": str(tmp_path / "cache"), "TVM_USE_RUNTIME_LIB": "1"}
    out = run_python(WITHOUT_COMPILERS, *(folders[name] for name in names), **empty).splitlines()
    said = "['  layers 0, 1: their variant's code is in the kernels, which this library holds']"
    assert out[0::2] == [*(str(tokens[name]) for name in names), "False"]
    assert [line.replace('"', "'") for line in out[1::2]] == [said, "[]", said]


def test_several_in_one_process(folders, executables, tokens):
    """Of different variants, and one twice, step by step in turn, beside the compiled one."""
    running = [tvm_infer.load(folders[name]) for name in ("gpt_oss", "blocks", "kerple", "gpt_oss")]
    running.append(executables["gpt_oss"])
    engines = [m.engine(m.new_cache(num_pages=20)) for m in running]
    generations = [[e.submit(p, max_new_tokens=NEW_TOKENS)[0] for p in PROMPTS] for e in engines]
    while any([engine.step() for engine in engines]):
        pass
    expected = [tokens[name] for name in ("gpt_oss", "blocks", "kerple", "gpt_oss", "gpt_oss")]
    assert [[g.tokens for g in of_model] for of_model in generations] == expected


def test_a_cache_that_goes_from_model_to_model(folders, models, executables):
    spec = executables["blocks"].manifest.layers[0]
    cache = tvm_infer.PagedKVCache.for_spec(spec, 2, num_pages=16, page_size=4, max_batch=4, max_tokens=32)
    loaded = {name: tvm_infer.load(folders[name]) for name in MODELS}
    for name, executable in [*loaded.items(), ("gemma2", executables["gemma2"]), ("mistral", loaded["mistral"])]:
        assert is_right(executable, cache, models[name]), name
        executable.release(cache)


def test_as_many_windows_as_there_may_be(tmp_path, monkeypatch):
    """Of twice as many variants; a cache has as many plans as it may have, on the way to them too."""
    from test_variants_of_caches import MAX_BANDS, WindowsAndSinks

    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path / "cache"))
    model = decoder(WindowsAndSinks, layers=2 * MAX_BANDS)
    tvm_infer.compile(exported(model), max_tokens=32).save(tmp_path / "model")
    rows = library.read(tmp_path / "model" / "model.so").about["variants"]
    assert len(rows) == 2 * MAX_BANDS and len({tuple(row["band"]) for row in rows}) == MAX_BANDS
    loaded = tvm_infer.load(tmp_path / "model")
    assert is_right(loaded, loaded.new_cache(num_pages=16), model)


def test_16_bit_weights_are_read_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path / "cache"))
    executable = tvm_infer.compile(exported(decoder(GptOss).to(torch.float16)), max_tokens=32)
    assert executable.manifest.layers[0].dtype == "float16"
    executable.save(tmp_path / "model")
    assert generated(tvm_infer.load(tmp_path / "model")) == generated(executable)
    (row, _) = library.read(tmp_path / "model" / "model.so").about["variants"]
    assert row["tables"] == ["sink"] and _ffi.func("standard_variant")(row["digest"]) == 0


# What is in the library


def test_the_manifest(folders):
    about = library.read(folders["gpt_oss"] / "model.so").about
    assert [(row["layers"], row["tables"], row["band"], row["causal"]) for row in about["variants"]] == [
        ([0], ["sink"], [5, 0, 0, 0], 1),
        ([1], ["sink"], [-1, 0, 0, 0], 1),
    ]
    values = [stored["values"]["sink"] for stored in about["model"]["variants"]]
    assert values == [{"weight": "layers.0.sinks"}, {"weight": "layers.1.sinks"}]
    (gemma, _) = library.read(folders["gemma2"] / "model.so").about["variants"]
    assert np.uint32(gemma["scalars"]).view(np.float32).tolist() == [5.0]
    (mistral,) = library.read(folders["mistral"] / "model.so").about["variants"]
    assert (mistral["layers"], mistral["digest"]) == ([0, 1], "")  # plain attention in a band


@pytest.mark.parametrize("name", MODELS)
def test_code_that_is_not_the_library_s_is_embedded(name, folders):
    rows = library.read(folders[name] / "model.so").about["variants"]
    for digest in {row["digest"] for row in rows} - {""}:
        assert bool(_ffi.func("standard_variant")(digest)) == (name not in HAVE_OWN_CODE)
        assert function(folders[name], "standard_variant")(digest) != 0
        other = "gemma2" if name != "gemma2" else "gpt_oss"
        assert bool(function(folders[other], "standard_variant")(digest)) == (name not in HAVE_OWN_CODE)


def test_only_packed_functions_and_tvms_own_data_are_visible(folders):
    from test_library import symbols

    names = symbols(folders["blocks"] / "model.so")
    assert [name for name in names if not name.startswith(("__tvm_ffi_", "__TVM"))] == []


def test_code_of_an_instruction_set_holds_no_other_s(folders, executables, tmp_path, monkeypatch):
    """A symbol that two of them shared would be any one's: what they define is named after the instruction set."""
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path))
    variant = executables["blocks"].manifest.layers[0].variant.variant
    shared = None
    for isa in cpu.instruction_sets():
        path = cpu.embedded_object([variant], isa)
        out = subprocess.run(["nm", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
        defined = {line.split()[-1] for line in out.splitlines() if line.split()[-2].isupper()}  # seen by the linker
        assert defined and all(isa in name for name in defined)
        assert shared is None or not shared & defined
        shared = defined
    assert cpu.embedded_object([variant], isa) == path  # from the cache


def test_instruction_sets_are_those_of_the_library():
    """The flags of cmake/CMakeLists.txt, and the names that the executor knows itself by."""
    text = (REPO / "cmake" / "CMakeLists.txt").read_text()
    flags = {name.lower(): tuple(given.split()) for name, given in re.findall(r"set\((AVX\w*) (.*)\)", text)}
    assert flags == {isa: given for isa, given in cpu._X86.items() if given}
    (generated_code,) = re.findall(r"set\(GENERATED (.*)\)", text)
    assert tuple(generated_code.split()) == cpu._FLAGS
    assert isa_of_this_machine() in cpu.instruction_sets()


# Compiling ahead


def test_compile_leaves_nothing_for_the_first_step(models, tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu, "_loaded", {})
    executable = tvm_infer.compile(exported(models["kerple"]), max_tokens=32)

    def refuse(*_):
        raise AssertionError("something is compiled after compile()")

    monkeypatch.setattr("tvm_infer.jit.cxx._compile", refuse)
    monkeypatch.setattr(cpu, "_loaded", {})  # as another process: from the cache folder
    again = tvm_infer.compile(exported(models["kerple"]), max_tokens=32)
    assert again.from_cache and is_right(again, again.new_cache(num_pages=8), models["kerple"])
    assert is_right(executable, executable.new_cache(num_pages=8), models["kerple"])


# Caches that the library makes, and bad input


def test_a_cache_of_its_own_has_the_model_s_sizes(folders, executables):
    cache = function(folders["gpt_oss"], "model_create_cache")(weights_of(folders["gpt_oss"]), *SIZES, HOST)
    made = tvm_infer.PagedKVCache.from_handle(cache)
    assert (made.num_layers, made.num_qo_heads, made.num_kv_heads, made.head_dim, made.dtype) == (
        *(2, 4, 2, 16),
        "float32",
    )
    assert (made.page_size, made.num_pages, made.max_batch, made.max_tokens) == (4, 30, 2, 32)
    cache = function(folders["mistral"], "model_create_cache")(weights_of(folders["mistral"]), 4, 30, 2, 7, HOST)
    made = tvm_infer.PagedKVCache.from_handle(cache)
    assert made.max_tokens == 7 and _ffi.func("kv_cache_window_left")(cache) == 5


def test_a_cache_that_would_compute_plain_attention_is_refused(folders):
    create = function(folders["blocks"], "kv_cache_create")
    arguments = (2, 4, 2, 16, "float32", 4, 30, 2, 32, 0, 0, HOST)
    with pytest.raises(errors.ModelError, match=r"attention variants .* make it with tvm_infer_model_create_cache"):
        create(*arguments)
    assert _ffi.func("kv_cache_create")(*arguments)  # the package's own


def test_weights_that_are_not_the_model_s(folders):
    folder = folders["gpt_oss"]
    create, weights = function(folder, "model_create_cache"), weights_of(folder)
    names = [entry["name"] for entry in library.read(folder / "model.so").about["weights"]]
    at = names.index("layers.1.sinks")
    with pytest.raises(
        errors.ArgumentError, match=rf"`weights` has 0 tensors; the model has {len(names)} weights: pass"
    ):
        create([], *SIZES, HOST)

    def with_sinks(array):
        return [*weights[:at], tvm.runtime.tensor(array), *weights[at + 1 :]]

    what = rf"`weights\[{at}\] \(layers\.1\.sinks\)`"
    with pytest.raises(errors.DTypeError, match=rf"{what} has dtype float16; it must be float32 \(what the model was"):
        create(with_sinks(np.zeros(4, np.float16)), *SIZES, HOST)
    with pytest.raises(errors.ArgumentError, match=rf"{what} has shape \[3\]; dimension 0 must be 4 \(the weight's\)"):
        create(with_sinks(np.zeros(3, np.float32)), *SIZES, HOST)
    with pytest.raises(errors.ArgumentError, match=rf"{what} has rank 2, shape \[1, 4\]; it must have rank 1"):
        create(with_sinks(np.zeros((1, 4), np.float32)), *SIZES, HOST)
    assert create(with_sinks(np.zeros(4, np.float32)), *SIZES, HOST)


def test_a_device_that_the_model_was_not_compiled_for(folders):
    create = function(folders["gemma2"], "model_create_cache")
    with pytest.raises(errors.ArgumentError, match="`device` is cuda:0; the model was compiled for cpu"):
        create(weights_of(folders["gemma2"]), *SIZES, tvm_ffi.device("cuda:0"))


def test_sizes_are_checked_as_kv_cache_create_does(folders):
    create = function(folders["gemma2"], "model_create_cache")
    with pytest.raises(errors.ArgumentError, match="`page_size` is 0"):
        create(weights_of(folders["gemma2"]), 0, 30, 2, 0, HOST)


def test_a_cache_of_another_model_s_shape(folders):
    other = tvm_infer.PagedKVCache(
        num_layers=3,
        num_qo_heads=4,
        num_kv_heads=2,
        head_dim=16,
        dtype="float32",
        num_pages=4,
        max_batch=1,
        max_tokens=4,
    )
    give = function(folders["gemma2"], "model_set_variants")
    with pytest.raises(errors.ArgumentError, match=r"`kv` has 3 layers of 4 / 2 heads of 16 elements; the model has 2"):
        give(other._handle, weights_of(folders["gemma2"]))


def reexported(executable, path, **changes):
    """The library of a model whose manifest says other things."""
    model = executable._compiled
    weights = [
        (name, w.shape, str(w.dtype)) for name, w in zip(executable.manifest.weights, executable._weights, strict=True)
    ]
    library.export(
        dataclasses.replace(model, manifest={**model.manifest, **changes}),
        path,
        weights=weights,
        max_position=None,
        archs=("sm_90a",),
        page_sizes=(16, 64),
        include_blas=False,
    )


def test_a_variant_that_reads_a_weight_that_is_not_there(executables, tmp_path):
    stored = json.loads(json.dumps(executables["gpt_oss"]._compiled.manifest["variants"]))
    stored[1]["values"]["sink"] = {"weight": "no.such"}
    with pytest.raises(
        errors.ModelError,
        match=r"variant of the layers \[1\] reads the weight 'no\.such', which the model does not have",
    ):
        reexported(executables["gpt_oss"], tmp_path / "model.so", variants=stored)
    stored[1]["values"]["sink"] = {"weight": "head.weight"}
    with pytest.raises(
        errors.VariantError, match=r"variant of the layers \[1\] cannot be bound: .*`sink` has the shape"
    ):
        reexported(executables["gpt_oss"], tmp_path / "model.so", variants=stored)
    assert list(tmp_path.iterdir()) == []


def test_code_that_is_missing_is_named(executables, folders, tmp_path, monkeypatch):
    """A library that was linked without it."""
    with monkeypatch.context() as patch:
        patch.setattr(library.variant_code, "host_objects", lambda codes: ([], {}))
        reexported(executables["blocks"], tmp_path / "model.so")
    shutil.copy(folders["blocks"] / "model.safetensors", tmp_path)
    loaded = tvm_infer.load(tmp_path)
    isa = isa_of_this_machine()
    with pytest.raises(
        errors.ExecutorError, match=rf"no code of attention variant \w+, of layer 0, for the .* set {isa}"
    ):
        loaded.new_cache(num_pages=8)


def test_no_compiler_for_code_that_must_be_compiled(executables, tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "TVM_INFER_CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(errors.MissingDependencyError, match=r"a C\+\+ compiler .* is needed"):
        executables["blocks"].export_library(tmp_path / "model.so")
    assert not (tmp_path / "model.so").exists()


def test_a_loaded_model_is_exported_by_copying(folders, tmp_path):
    tvm_infer.load(folders["blocks"]).save(tmp_path)
    assert (tmp_path / "model.so").read_bytes() == (folders["blocks"] / "model.so").read_bytes()

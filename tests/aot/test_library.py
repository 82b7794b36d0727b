"""Exported libraries: what they show and need, whose functions they call, two in one process, no compiler, errors."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest
from aot_cases import NEW_TOKENS, PROMPTS

import tvm_infer
from tvm_infer import AttentionSpec, errors
from tvm_infer.runtime import library, linker, model_kernels

LOAD = f"""
import sys
import tvm_infer
PROMPTS = {PROMPTS}
def generate(path, weights, **kwargs):
    exe = tvm_infer.load(path, weights)
    return [g.tokens for g in exe.generate(PROMPTS, max_new_tokens={NEW_TOKENS})]
"""


def symbols(path) -> list[str]:
    out = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in out.splitlines()]


def relinked(executable, path, **changes):
    """The library of `executable`, whose manifest says other things of the model or (about_…) of the library."""
    model = executable._compiled
    fields = {**model.manifest, **{k: v for k, v in changes.items() if k in model.manifest}}
    weights = [(n, w.shape, str(w.dtype)) for n, w in zip(fields["weights"], executable._weights, strict=True)]
    library.export(
        dataclasses.replace(model, manifest=fields),
        path,
        weights=weights,
        max_position=None,
        archs=(),
        page_sizes=(16,),
        include_blas=False,
    )
    return path


def test_tokens_are_those_of_the_compiled_model(saved, executable, tokens):
    loaded = tvm_infer.load(saved / "model.so", saved / "model.safetensors")
    assert [g.tokens for g in loaded.generate(PROMPTS, max_new_tokens=NEW_TOKENS)] == tokens
    assert loaded.manifest == executable.manifest and loaded.max_position == executable.max_position
    assert loaded.report == executable.report
    cache, again = executable.new_cache(num_pages=4), loaded.new_cache(num_pages=4)
    cache.add_sequence(0), again.add_sequence(0)
    assert (executable.step(cache, [(0, [1, 2, 3])]) == loaded.step(again, [(0, [1, 2, 3])])).all()


def test_a_folder_is_loaded_whole(saved, tokens):
    loaded = tvm_infer.load(saved)
    assert loaded.generate(PROMPTS[:1], max_new_tokens=3)[0].tokens == tokens[0][:3]


def test_only_packed_functions_and_tvms_own_data_are_visible(saved):
    names = symbols(saved / "model.so")
    assert [name for name in names if not name.startswith(("__tvm_ffi_", "__TVM"))] == []
    ours = {name for name in names if "tvm_infer" in name}
    assert "__tvm_ffi_tvm_infer_model_manifest" in ours
    plain = {name for name in ours if name.startswith("__tvm_ffi_tvm_infer_")}
    assert {name.replace("tvm_infer_", "tvm_infer.", 1) for name in plain} == ours - plain  # each by both names


def test_it_needs_the_c_runtime_and_tvm_ffi_alone(saved):
    out = subprocess.run(["readelf", "-d", str(saved / "model.so")], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", out)
    allowed = re.compile(r"^(libtvm_ffi|libstdc\+\+|libgcc_s|libc|libm|libpthread|libdl|ld-linux-[\w-]+)\.so")
    assert [name for name in needed if not allowed.match(name)] == []
    assert "NODELETE" in out


def test_loading_registers_nothing_and_needs_no_tvm_infer(saved, run_python):
    """A VM on the library in a process that never imports tvm_infer: all names are found in the library."""
    out = run_python(
        """
import sys, tvm, tvm_ffi
from tvm_ffi import registry
from tvm.runtime.vm import VirtualMachine
before = set(registry.list_global_func_names())
module = tvm.runtime.load_module(sys.argv[1])
vm = VirtualMachine(module, tvm.cpu())
print(sorted(set(registry.list_global_func_names()) - before), [m for m in sys.modules if m.startswith("tvm_infer")])
maps = open("/proc/self/maps").read()
print("libtvm_infer.so" in maps)
""",
        saved / "model.so",
    )
    assert out.split("\n")[:2] == ["[] []", "False"]


OVERRIDE = (
    LOAD
    + """
import tvm_ffi
from tvm_infer import _ffi
_ffi.library()
calls = []
for name in ("attention_with_kv_cache_rope", "matmul", "matmul_add"):
    tvm_ffi.register_global_func(f"tvm_infer.{name}", lambda *args, name=name: calls.append(name), override=True)
print(generate(sys.argv[1], sys.argv[2]))
print(calls)
from tvm_infer.runtime import Executable
import pathlib
from tvm_infer.runtime.weights_file import WeightsFile
compiled = Executable(pathlib.Path(sys.argv[3]), WeightsFile(sys.argv[2]))
compiled.generate([[1]], max_new_tokens=1)
print(sorted(set(calls)))
"""
)


def test_a_library_calls_its_own_functions(saved, executable, tokens, run_python):
    """Also where tvm_infer is loaded: its global functions are replaced by ones that do nothing, which only the compiler's folder,
    that has no functions of its own, gets to feel."""
    folder = executable._library_path.parent
    out = run_python(OVERRIDE, saved / "model.so", saved / "model.safetensors", folder).splitlines()
    assert out[:2] == [str(tokens), "[]"]
    assert out[2] == "['attention_with_kv_cache_rope', 'matmul', 'matmul_add']"


def test_two_libraries_and_tvm_infer_in_one_process(saved, executable, tokens, tmp_path):
    """Different models, interleaved step by step with each other and with the compiled one."""
    from llamas import tiny_llama

    other = tvm_infer.compile(tiny_llama(seed=3, layers=1, vocab_size=77), max_tokens=24, cache=False)
    other.save(tmp_path)
    models = [tvm_infer.load(saved), tvm_infer.load(tmp_path), executable]
    engines = [m.engine(m.new_cache(num_pages=8)) for m in models]
    prompts = [PROMPTS[0], [t % 77 for t in PROMPTS[0]], PROMPTS[0]]
    expected = other.generate(prompts[1:2], max_new_tokens=6)[0].tokens
    generations = [e.submit(p, max_new_tokens=6)[0] for e, p in zip(engines, prompts, strict=True)]
    while any([engine.step() for engine in engines]):
        pass
    assert [g.tokens for g in generations] == [tokens[0][:6], expected, tokens[0][:6]]
    assert [m.manifest.vocab_size for m in models] == [131, 77, 131]


def test_a_process_with_tvms_runtime_alone(saved, tokens, run_python):
    """TVM_USE_RUNTIME_LIB=1, and imports of torch fail."""
    code = (
        'import sys\nsys.modules["torch"] = sys.modules["transformers"] = None\n'
        + LOAD
        + 'print(generate(sys.argv[1], sys.argv[2]))\nprint("libtvm_compiler" in open("/proc/self/maps").read())\n'
    )
    out = run_python(code, saved / "model.so", saved / "model.safetensors", TVM_USE_RUNTIME_LIB="1").splitlines()
    assert out == [str(tokens), "False"]


def test_without_its_blas_it_takes_the_package_s(executable, saved, tokens, tmp_path):
    executable.export_library(tmp_path / "model.so", include_blas=False)
    difference = (saved / "model.so").stat().st_size - (tmp_path / "model.so").stat().st_size
    assert difference > 10_000_000
    loaded = tvm_infer.load(tmp_path / "model.so", saved / "model.safetensors")
    assert [g.tokens for g in loaded.generate(PROMPTS, max_new_tokens=NEW_TOKENS)] == tokens
    path = library.load_module(tmp_path / "model.so").get_function("tvm_infer_blas_path", True)
    assert "openblas" in str(path())
    embedded = library.load_module(saved / "model.so").get_function("tvm_infer_blas_path", True)
    assert str(embedded()).startswith("/proc/self/fd/")


@pytest.mark.parametrize(
    "functions", [["matmul"], ["attention_with_kv_cache", "matmul_add"], ["attention_with_kv_cache"]]
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_whichever_product_a_model_has_it_gets_a_library(functions, device, monkeypatch):
    given = []

    class Module:
        def get_function(self, name, _):
            return (lambda path, *_: given.append(path)) if "_set_" in name else lambda: ""

    monkeypatch.setattr(library, "ensure_cuda_runtime", lambda: None)
    monkeypatch.setattr(library.cublas, "need", lambda: library.cublas.Library("cublas.so", "a test"))
    monkeypatch.setattr(library.blas, "packaged_blas", lambda: "blas.so")
    model = library.CompiledModel({"target": json.dumps({"kind": device})}, "", None, {"functions": functions})
    library.ensure_blas(model, Module())
    needed = "cublas.so" if device == "cuda" else "blas.so"
    assert given == ([] if functions == ["attention_with_kv_cache"] else [needed])


def test_a_loaded_model_is_exported_by_copying(saved, tmp_path):
    loaded = tvm_infer.load(saved)
    loaded.save(tmp_path)
    for name in ("model.so", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    loaded.export_library(saved / "model.so")  # onto itself, while it is in use
    assert loaded.generate([[1]], max_new_tokens=1)


def test_the_manifest(saved, executable):
    about = library.read(saved / "model.so").about
    assert about["format"] == 2 and about["tvm_infer"] == tvm_infer.__version__ and about["device"] == "cpu"
    assert about["functions"] == ["attention_with_kv_cache_rope", "matmul", "matmul_add"]
    assert about["kernels"] == about["archs"] == []
    assert [w["name"] for w in about["weights"]] == list(executable.manifest.weights)
    assert about["weights"][0]["shape"] == list(executable._weights[0].shape)


# ABI


def test_a_library_of_another_abi(executable, saved, tmp_path):
    path = relinked(executable, tmp_path / "model.so", abi_version=99)
    with pytest.raises(
        errors.AbiError, match=rf"model\.so was exported by tvm_infer {tvm_infer.__version__} with ABI 99; .* ABI \d+"
    ):
        tvm_infer.load(path, saved / "model.safetensors")


def test_a_library_of_another_tvm(executable, saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(library, "tvm_version", lambda: "0.31.2")
        path = relinked(executable, tmp_path / "model.so")
    with pytest.raises(errors.AbiError, match=r"compiled by TVM 0\.31\.2 and this is TVM 0\.27"):
        tvm_infer.load(path, saved / "model.safetensors")


def test_weights_of_another_abi(executable, saved, tmp_path):
    data = (saved / "model.safetensors").read_bytes()
    mark = b'"tvm_infer.abi_version":"%d"' % executable.manifest.abi_version
    assert data.count(mark) == 1 and executable.manifest.abi_version < 10
    changed = tmp_path / "other.safetensors"
    changed.write_bytes(data.replace(mark, mark[:-2] + b'7"'))
    with pytest.raises(errors.AbiError, match=r"other\.safetensors were written with tvm_infer ABI 7, .* has ABI \d+"):
        tvm_infer.load(saved / "model.so", changed)


def test_a_manifest_with_other_fields(saved, executable):
    """Of a version that keeps the ABI and describes models in another way."""
    from tvm_infer.runtime import Manifest

    fields = executable._compiled.manifest
    with pytest.raises(errors.AbiError, match=r"its manifest has \['new'\] more and \['layers'\] fewer fields"):
        Manifest.parse({**{k: v for k, v in fields.items() if k != "layers"}, "new": 1}, "here")


def test_a_manifest_of_another_format(executable, saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(library, "FORMAT", 7)
        path = relinked(executable, tmp_path / "model.so")
    with pytest.raises(errors.AbiError, match=r"manifest of format 7; this is tvm_infer [\d.]+, which reads format 2"):
        tvm_infer.load(path, saved / "model.safetensors")


# Bad paths and weights


def test_paths_that_are_none(executable, saved, tmp_path):
    weights = saved / "model.safetensors"
    with pytest.raises(errors.ModelError, match=r"no\.so does not exist"):
        tvm_infer.load(tmp_path / "no.so", weights)
    with pytest.raises(errors.ModelError, match=r"model\.so does not exist"):
        tvm_infer.load(tmp_path)
    with pytest.raises(errors.ArgumentError, match="`weights` is missing"):
        tvm_infer.load(saved / "model.so")
    with pytest.raises(errors.ModelError, match=r"no\.safetensors does not exist"):
        tvm_infer.load(saved / "model.so", tmp_path / "no.safetensors")
    text = tmp_path / "text.so"
    text.write_text("not a library")
    with pytest.raises(errors.ModelError, match=r"text\.so is no library that TVM 0\.27"):
        tvm_infer.load(text, weights)
    with pytest.raises(errors.ModelError, match="holds no model of tvm_infer's"):
        tvm_infer.load(executable._library_path, weights)  # the compiler's: not exported
    with pytest.raises(errors.ArgumentError, match="there is no folder"):
        executable.export_library(tmp_path / "no" / "model.so")
    with pytest.raises(errors.ArgumentError, match="is a folder"):
        executable.export_library(tmp_path)
    with pytest.raises(errors.ArgumentError, match="there is no folder"):
        executable.save_weights(tmp_path / "no" / "w.safetensors")


def test_a_library_without_a_model(tmp_path, saved):
    linker.link([], linker.Contents(manifest=""), tmp_path / "empty.so")
    with pytest.raises(errors.ArgumentError, match="holds no model"):
        tvm_infer.load(tmp_path / "empty.so", saved / "model.safetensors")


def test_weights_of_another_model(saved):
    from tvm_infer.runtime.weights_file import WeightsFile

    weights = dict(WeightsFile(saved / "model.safetensors"))
    name = "model.norm.weight"
    with pytest.raises(errors.ModelError, match=rf"1 weights of the compiled model are not given, '{name}' first"):
        tvm_infer.load(saved / "model.so", {k: v for k, v in weights.items() if k != name})
    with pytest.raises(
        errors.ModelError, match=rf"weight '{name}' is float32 \[24\]; the model was compiled for float32 \[48\]"
    ):
        tvm_infer.load(saved / "model.so", {**weights, name: weights[name][:24]})
    with pytest.raises(errors.ModelError, match=rf"weight '{name}' is float64 \[48\]"):
        tvm_infer.load(saved / "model.so", {**weights, name: weights[name].astype("float64")})


def test_no_compiler_to_link_with(executable, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(errors.MissingDependencyError, match=r"install g\+\+, or name one in the variable CXX"):
        executable.export_library(tmp_path / "model.so")
    assert list(tmp_path.iterdir()) == []


def test_what_the_linker_says_is_passed_on(executable, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(errors.CompileError, match=r"linking the model failed: .*false"):
        executable.export_library(tmp_path / "model.so")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_objects(executable, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(executable._library_path.parent, folder)
    shutil.rmtree(folder / "objects")
    model = library.read(folder)
    with pytest.raises(errors.ModelError, match="holds no object files: compile the model again"):
        library.export(
            model, tmp_path / "x.so", weights=(), max_position=None, archs=(), page_sizes=(), include_blas=True
        )


# Targets with kernels


def cuda_model(executable, **layer):
    """The compiled model, said to be for a GPU: what is exported for such."""
    manifest = {**executable._compiled.manifest, "target": json.dumps({"kind": "cuda", "arch": "sm_90"})}
    manifest["layers"] = [{**spec, "dtype": "bfloat16", "head_dim": 64, **layer} for spec in manifest["layers"]]
    return dataclasses.replace(executable._compiled, manifest=manifest)


def export_cuda(model, path, **arguments):
    defaults = {"archs": ("sm_90a",), "page_sizes": (16, 64), "include_blas": True, "weights": ()}
    library.export(model, path, max_position=None, **{**defaults, **arguments})


ATTENTION = ["rope_append_bf16", "copy_pages", "attention_bf16_h64_p16", "attention_bf16_h64_p64"]
KERNELS = [*ATTENTION, "gemv_bf16", "gemv_fp16"]


def test_a_fused_projection_needs_the_kernel_that_rotates():
    layers = [AttentionSpec(8, 2, 64, "bfloat16")] * 2
    always = ("copy_pages", "attention_bf16_h64_p16")
    fused, plain = "attention_with_kv_cache_fused_qkv", "attention_with_kv_cache"
    assert model_kernels.kernel_names(layers, [fused], (16,)) == ("rope_append_bf16", *always)
    assert model_kernels.kernel_names(layers, [plain, fused], (16,)) == ("append_b16", "rope_append_bf16", *always)
    assert model_kernels.kernel_names(layers, ["attention_with_kv_cache_rope"], (16,)) == ("rope_append_bf16", *always)


def test_products_of_any_kind_need_the_kernels_of_few_rows():
    gemv = ("gemv_bf16", "gemv_fp16")
    for functions in (["matmul"], ["matmul_add"], ["linear"], ["linear_add"], ["matmul_add", "linear"]):
        assert model_kernels.kernel_names([], functions, (16,)) == gemv
    assert model_kernels.kernel_names([], ["embedding", "matmul_of_another"], (16,)) == ()
    layers = [AttentionSpec(8, 2, 64, "bfloat16")]
    attention = ("append_b16", "copy_pages", "attention_bf16_h64_p16")
    assert model_kernels.kernel_names(layers, ["attention_with_kv_cache", "linear"], (16,)) == (*attention, *gemv)


def test_kernels_of_the_model_are_embedded(executable, tmp_path, monkeypatch):
    from tvm_infer import jit

    built = []
    monkeypatch.setattr(jit, "build", lambda names, arch: built.append((list(names), arch)))
    monkeypatch.setattr(jit, "cubin", lambda name, arch: f"<{name} for {arch}>".encode() * 40)
    export_cuda(cuda_model(executable), tmp_path / "model.so")
    assert built == [(KERNELS, "sm_90a")]
    about = library.read(tmp_path / "model.so").about
    assert (about["device"], about["kernels"], about["archs"], about["page_sizes"]) == (
        "cuda",
        KERNELS,
        ["sm_90a"],
        [16, 64],
    )
    data = (tmp_path / "model.so").read_bytes()
    assert all(f"<{name} for sm_90a>".encode() * 40 in data for name in KERNELS)
    assert len(data) < 10_000_000  # no BLAS


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        ({"head_dim": 104}, {}, "'attention_bf16_h104_p16', which is no kernel"),
        ({"dtype": "float32"}, {}, "'rope_append_fp32', which is no kernel"),
        ({}, {"page_sizes": (24,)}, "'attention_bf16_h64_p24', which is no kernel"),
        ({}, {"archs": ("sm_80",)}, "sm_80"),
    ],
)
def test_kernels_that_are_none(executable, tmp_path, layer, arguments, message):
    with pytest.raises(errors.ArgumentError, match=message):
        export_cuda(cuda_model(executable, **layer), tmp_path / "model.so", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_kernels_that_tvm_left_as_source_are_refused(executable, tmp_path):
    """What TVM packs where it finds no driver: a module of kind "cuda" whose code is of format "cuda"."""
    folder = tmp_path / "compiled"
    shutil.copytree(executable._library_path.parent, folder)
    words = [b"cuda", (4096).to_bytes(8, "little"), b"cuda"]
    packed = b"".join(len(w).to_bytes(8, "little") + w if w == b"cuda" else w for w in words)
    (folder / "objects" / "packed.o").write_bytes(b"..." + packed + b"...")
    with pytest.raises(
        errors.ExecutorError, match=r"without an NVIDIA driver .* compile the model on a machine with a driver"
    ):
        export_cuda(library.read(folder), tmp_path / "model.so")
    assert not (tmp_path / "model.so").exists()


def test_a_loaded_model_has_no_other_kernels(executable, tmp_path, monkeypatch):
    from tvm_infer import jit

    monkeypatch.setattr(jit, "build", lambda names, arch: None)
    monkeypatch.setattr(jit, "cubin", lambda name, arch: b"x")
    export_cuda(cuda_model(executable), tmp_path / "model.so")
    loaded = library.read(tmp_path / "model.so")
    export_cuda(loaded, tmp_path / "copy.so", page_sizes=(64,))
    with pytest.raises(errors.ArgumentError, match=r"`page_sizes` is \[32\]; .* holds kernels for \[16, 64\]"):
        export_cuda(loaded, tmp_path / "other.so", page_sizes=(32,))


def test_every_function_that_a_model_calls_is_exported(saved):
    """exports.cc and register.cc expand one table: the library has what tvm_infer registers, and its own."""
    # a process of its own: here other tests may have loaded the adapter to TVM's cache, which registers more
    listing = "from tvm_ffi import registry; from tvm_infer import _ffi; _ffi.library(); print(*registry.list_global_func_names())"
    names = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    asked_of_python = {"tvm_infer.jit_cubin", "tvm_infer.find_cublas"}
    registered = {n for n in names if n.startswith("tvm_infer.")} - asked_of_python
    dotted = {n.removeprefix("__tvm_ffi_") for n in symbols(saved / "model.so") if n.startswith("__tvm_ffi_tvm_infer.")}
    assert dotted - registered == {
        f"tvm_infer.model_{name}"
        for name in ("manifest", "check_cuda", "cubin", "create_cache", "create_scaled_cache", "set_variants")
    }
    assert registered - dotted == set()

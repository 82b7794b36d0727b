"""Exported models for GPUs whose layers have attention variants: their kernels, and caches on a driver that is none
(tests/cuda/fake_libcuda.cc), in a process with TVM's runtime alone."""

from __future__ import annotations

import os
import pathlib
import shutil

import numpy as np
import pytest
import tvm
from test_embedded_kernels import COMPILER, fake_cubin
from test_library import cuda_model, export_cuda
from variant_models import Blocks, Gemma2, GptOss, Mistral, decoder, exported

import tvm_infer
from tvm_infer import errors, jit
from tvm_infer.jit import cubin_file
from tvm_infer.runtime import library

HERE = pathlib.Path(__file__).parent
RUNTIME = pathlib.Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"
ATTENTION = "attention_bf16_h64_p16"
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def executables(tmp_path_factory):
    """Compiled for the host; cuda_model says that they are for a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        kinds = {"gemma2": Gemma2, "gpt_oss": GptOss, "blocks": Blocks, "mistral": Mistral}
        return {name: tvm_infer.compile(exported(decoder(kind)), max_tokens=32) for name, kind in kinds.items()}


def exported_for_cuda(executable, path, **arguments):
    """As export_library does; returns what the library says of itself."""
    weights = [
        (n, w.shape, str(w.dtype)) for n, w in zip(executable.manifest.weights, executable._weights, strict=True)
    ]
    export_cuda(cuda_model(executable), path, **{"page_sizes": (16,), "weights": weights, **arguments})
    return library.read(path).about


@pytest.fixture
def fake_kernels(monkeypatch):
    monkeypatch.setattr(jit, "build", lambda names, arch: None)
    monkeypatch.setattr(jit, "cubin", lambda name, arch: fake_cubin(name))


def digests(about) -> list[str]:
    return [row["digest"] for row in about["variants"]]


def test_the_kernels_are_those_of_the_variants(executables, tmp_path, fake_kernels):
    """One for both layers where they differ in numbers, windows and weights only; none without a variant where no layer is plain."""
    for name in ("gemma2", "gpt_oss", "blocks"):
        about = exported_for_cuda(executables[name], tmp_path / f"{name}.so", page_sizes=(16, 64))
        (digest,) = set(digests(about))
        kernels = [kernel for kernel in about["kernels"] if kernel.startswith("attention")]
        assert kernels == [f"attention_bf16_h64_p{page}_v{digest}" for page in (16, 64)]
    plain = exported_for_cuda(executables["mistral"], tmp_path / "mistral.so")
    assert digests(plain) == [""] and ATTENTION in plain["kernels"]


def test_small_logits_have_code_of_their_own(executables, tmp_path, fake_kernels):
    """A soft cap's kernel spares itself the maximum (variant/interval.py), which the CPU executor does not."""
    about = exported_for_cuda(executables["gemma2"], tmp_path / "model.so")
    spec = executables["gemma2"].manifest.layers[0]
    assert digests(about)[0] == spec.variant.bind(lambda name: None, lambda array: array).cuda_struct.digest
    assert digests(about)[0] != spec.variant.variant.digest


@pytest.mark.needs_nvcc
def test_real_kernels_are_embedded_whole(executables, tmp_path):
    about = exported_for_cuda(executables["gpt_oss"], tmp_path / "model.so")
    name = f"{ATTENTION}_v{digests(about)[0]}"
    cubin = jit.cubin(name)
    assert cubin_file.kernel_info(cubin, name).threads > 0
    assert (tmp_path / "model.so").read_bytes().count(cubin) == 1


SCRIPT = f"""
import ctypes, json, sys
sys.path[:0] = [{str(HERE.parent / "cuda")!r}]
import numpy as np, tvm_ffi
from fake_tensors import Driver, addresses, tensor
ctypes.CDLL({str(RUNTIME)!r}, mode=ctypes.RTLD_GLOBAL)  # registers the loader of virtual machines
module = tvm_ffi.load_module(sys.argv[1])
driver = Driver()
DEVICE = (2, 1)
class Table(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int32 * 4)]
class Args(ctypes.Structure):
    _fields_ = [("scalars", ctypes.c_uint32 * 16), ("tables", Table * 8)]
def call(name, *arguments):
    return module.get_function("tvm_infer_" + name, True)(*arguments)
about = json.loads(str(call("model_manifest")))
weights = [tensor(tuple(w["shape"]), w["dtype"], device=DEVICE) for w in about["weights"]]
at = {{w["name"]: addresses[id(t)] for w, t in zip(about["weights"], weights)}}
def create(weights=weights):
    return call("model_create_cache", weights, 16, 8, 2, 0, tvm_ffi.device("cuda:1"))
def step(cache):
    "The attention of both layers: kernels, and the variant's arguments."
    call("kv_cache_begin_forward", cache, (0,), (3,), 1)
    layers = []
    for layer in (0, 1):
        driver.clear()
        rows = [tensor((3, heads, 64), "bfloat16", device=DEVICE) for heads in (4, 2, 2, 4, 4)]
        if "append_b16" in about["kernels"]:
            call("attention_with_kv_cache", cache, layer, *rows[:3], 0.25, 1, rows[3])
        else:  # the models turn queries and keys, and their calls do
            inv_freq = tensor((32,), "float32", device=DEVICE)
            call("attention_with_kv_cache_rope", cache, layer, *rows[:3], inv_freq, 0, 1.0, 0.25, 1, *rows[3:])
        layers.append((driver.launches()[-1]["name"], driver.variant_args(Args)))
    call("kv_cache_end_forward", cache)
    return layers
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    from fake_processes import compile_fake

    return compile_fake(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def run(run_python, fake):
    def go(code: str, path: pathlib.Path) -> list[str]:
        libraries = os.pathsep.join([str(fake), os.environ.get("LD_LIBRARY_PATH", "")])
        return run_python(SCRIPT + code, path, LD_LIBRARY_PATH=libraries).splitlines()

    return go


def test_a_cache_launches_the_variants_kernels_with_the_model_s_weights(executables, tmp_path, fake_kernels, run):
    about = exported_for_cuda(executables["gpt_oss"], tmp_path / "model.so")
    out = run(
        """
cache = create()
call("kv_cache_add", cache, 0)
for layer, (kernel, args) in enumerate(step(cache)):
    print(kernel, args.tables[0].data == at[f"layers.{layer}.sinks"], list(args.tables[0].strides[:2]))
print([m for m in sys.modules if m in ("tvm", "tvm_infer")])
""",
        tmp_path / "model.so",
    )
    # a table of one dimension: the strides of the others are never stepped along
    assert out == [*[f"{ATTENTION}_v{digests(about)[0]} True [1, 0]"] * 2, "[]"]


def test_scalars_are_passed_and_constants_lie_on_the_device(executables, tmp_path, fake_kernels, run):
    exported_for_cuda(executables["gemma2"], tmp_path / "gemma2.so")
    out = run(
        'cache = create()\ncall("kv_cache_add", cache, 0)\nprint([args.scalars[0] for _, args in step(cache)])\n',
        tmp_path / "gemma2.so",
    )
    assert out == [str([int(np.float32(5).view(np.uint32))] * 2)]
    about = exported_for_cuda(executables["blocks"], tmp_path / "blocks.so")
    out = run(
        """
import base64
cache = create()
call("kv_cache_add", cache, 0)
for (kernel, args), stored in zip(step(cache), about["model"]["variants"]):
    (value,) = stored["values"].values()
    wanted = base64.b64decode(value["data"])
    print(kernel, ctypes.string_at(args.tables[0].data, len(wanted)) == wanted, args.tables[0].strides[:2] == value["shape"][1:] + [1])
driver.clear()
del cache
print(len(driver.calls("cuMemFree")))
""",
        tmp_path / "blocks.so",
    )
    kernel = f"{ATTENTION}_v{digests(about)[0]}"
    assert out == [f"{kernel} True True"] * 2 + ["5"]  # pages, a step's tables, partial results, two layouts


def test_a_cache_of_the_package_gets_them_from_the_library(executables, tmp_path, fake_kernels, run):
    """As tvm_infer.load does it: the package's cache launches kernels of its own, which the library offers."""
    about = exported_for_cuda(executables["blocks"], tmp_path / "model.so")
    out = run(
        """
import pathlib, tvm_infer
from tvm_infer import _ffi
from tvm_infer.runtime import library
_ffi.library()
library.offer_kernels(library.read(pathlib.Path(sys.argv[1])))
cache = tvm_infer.PagedKVCache(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", page_size=16,
                               num_pages=8, max_batch=2, max_tokens=32, device="cuda:1")
cache.add_sequence(0)
call("model_set_variants", cache._handle, weights)
print([(kernel, args.tables[0].data is not None) for kernel, args in step(cache._handle)])
print(_ffi.func("standard_variant")(about["variants"][0]["digest"]))
""",
        tmp_path / "model.so",
    )
    kernel = f"{ATTENTION}_v{digests(about)[0]}"
    assert out == [str([(kernel, True)] * 2), "0"]


def test_weights_on_the_host_are_refused(executables, tmp_path, fake_kernels, run):
    exported_for_cuda(executables["gpt_oss"], tmp_path / "model.so")
    out = run(
        """
try:
    create([tensor(tuple(w["shape"]), w["dtype"], device=(1, 0)) for w in about["weights"]])
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[-1])
print(len(driver.calls("cuMemAlloc")) - len(driver.calls("cuMemFree")))
""",
        tmp_path / "model.so",
    )
    assert "(layers.0.sinks)` is on cpu, `kv` on cuda:1; all tensors of a call must be on one device" in out[0]
    assert out[1] == "0"


def test_a_page_size_that_was_not_exported_is_named(executables, tmp_path, fake_kernels, run):
    about = exported_for_cuda(executables["gpt_oss"], tmp_path / "model.so", page_sizes=(64,))
    out = run(
        """
cache = create()
call("kv_cache_add", cache, 0)
try:
    step(cache)
except Exception as error:
    print(str(error).splitlines()[-1])
""",
        tmp_path / "model.so",
    )
    (digest, _) = digests(about)
    assert f"there is no kernel `{ATTENTION}_v{digest}` for sm_90a" in out[0]
    assert (
        f"holds rope_append_bf16 for sm_90a, copy_pages for sm_90a, attention_bf16_h64_p64_v{digest} for sm_90a"
        in out[0]
    )


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_compiled_with_the_model(executables, monkeypatch, tmp_path):
    """compile() asks for the kernels of the layers' variants, of pages of the default size, each once."""
    from tvm_infer import compiler

    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TVM_INFER_CUBIN_DIR", raising=False)
    asked = []
    monkeypatch.setattr(jit, "build", lambda names, arch: asked.append((list(names), arch)))
    for name in ("gpt_oss", "mistral"):
        model = cuda_model(executables[name])
        specs = [
            tvm_infer.AttentionSpec(**{**spec, "variant": executables[name].manifest.layers[i].variant})
            for i, spec in enumerate(model.manifest["layers"])
        ]
        kinds = list(zip(model.manifest["weights"], model.manifest["weight_types"], strict=True))
        compiler._prepare_variants(specs, kinds, {}, "cuda")
    (digest,) = {spec.variant.variant.digest for spec in executables["gpt_oss"].manifest.layers}
    assert asked == [([f"{ATTENTION}_v{digest}"], "sm_90a")]


def test_a_head_dim_without_a_kernel(executables, tmp_path):
    weights = [(n, w.shape, str(w.dtype)) for n, w in zip(*weights_of(executables["gpt_oss"]), strict=True)]
    model = cuda_model(executables["gpt_oss"], head_dim=104)
    with pytest.raises(errors.ArgumentError, match=r"'attention_bf16_h104_p16_v\w{16}', which is no kernel"):
        export_cuda(model, tmp_path / "model.so", weights=weights, page_sizes=(16,))
    assert list(tmp_path.iterdir()) == []


def weights_of(executable):
    return executable.manifest.weights, executable._weights

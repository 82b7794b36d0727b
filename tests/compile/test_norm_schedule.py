"""RowNorm: which functions it schedules, and the kernel that TVM makes of them, run on the host thread by thread against float64."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest
import torch
import tvm
from tvm import relax, tirx
from tvm.relax import op
from tvm.relax.backend.cuda import pipeline as cuda
from tvm.s_tir import dlight

from tvm_infer.relax import pipeline
from tvm_infer.relax.norm_schedule import LOAD_BYTES, MAX_LOADS, MAX_THREADS, RowNorm, RowThreads

EMULATED = pathlib.Path(__file__).resolve().parent / "emulated"
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}
N = tirx.Var("n", "int64")


@pytest.mark.parametrize(
    ("width", "element_bytes", "share"),
    [
        (4096, 2, (512, 1, 8)),
        (8192, 2, (1024, 1, 8)),
        (4096, 4, (1024, 1, 4)),
        (12288, 4, (1024, 3, 4)),
        (2560, 2, (320, 1, 8)),
        (576, 2, (288, 1, 2)),
        (960, 2, (480, 1, 2)),
        (128, 2, (32, 1, 4)),
        (32, 2, (32, 1, 1)),
        (48, 2, None),
        (1000, 2, None),
        (4128, 2, None),
    ],
)
def test_shares(width, element_bytes, share):
    assert RowThreads.of(width, element_bytes) == (None if share is None else RowThreads(*share))


def test_every_share_is_whole():
    """A share covers its row exactly, in whole warps, within the limits of a block and of a load."""
    for element_bytes in (2, 4):
        for width in range(1, 20000, 16):
            share = RowThreads.of(width, element_bytes)
            if share is not None:
                assert share.threads * share.loads * share.lanes == width
                assert share.threads % 32 == 0 and share.threads <= MAX_THREADS and share.loads <= MAX_LOADS
                assert share.lanes * element_bytes <= LOAD_BYTES


def module(shape, weight_shape, dtype, write):
    """main(x [shape], w [weight_shape]) that returns write(x, w)."""
    builder = relax.BlockBuilder()
    x, w = (
        relax.Var("x", relax.TensorType(list(shape), dtype)),
        relax.Var("w", relax.TensorType(list(weight_shape), dtype)),
    )
    with builder.function("main", [x, w]):
        with builder.dataflow():
            y = builder.emit_output(write(x, w))
        builder.emit_func_output(y)
    return builder.finalize()


def norm(x, w, axes=(-1,)):
    return op.nn.rms_norm(x, w, axes=list(axes), epsilon=1e-5)


def scheduled(mod, target=None):
    """The module's PrimFuncs by name, after legalisation, fusion and RowNorm alone."""
    target = target or pipeline.cuda_target()
    passes = [step for step in cuda.legalize_passes(pipeline.cuda_target()) if step.info.name != "ApplyDefaultSchedule"]
    with target, tvm.transform.PassContext(opt_level=3):
        mod = tvm.transform.Sequential([*passes, dlight.ApplyDefaultSchedule(RowNorm())])(mod)
    return {str(var.name_hint): func for var, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}


def is_scheduled(func):
    return bool(func.attrs and func.attrs.get("tirx.is_scheduled"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("lead", "rows"), [((1, N), "n"), ((N,), "n"), ((N, 1), "n"), ((1, N, 3), "n * T.int64(3)"), ((5,), "T.int64(5)")]
)
def test_one_kernel_of_a_block_a_row(lead, rows, dtype):
    (func,) = scheduled(module([*lead, 4096], [4096], dtype, norm)).values()
    text = func.script()
    assert is_scheduled(func) and text.count('thread="blockIdx.x"') == 1
    assert f'T.thread_binding({rows}, thread="blockIdx.x")' in text
    assert "T.where" not in text, "a thread without a share would bring an undefined value into the sum"


LEFT = {
    "48 elements": module((1, N, 48), (48,), "bfloat16", norm),
    "two axes": module((N, 64, 128), (64, 128), "bfloat16", lambda x, w: norm(x, w, (1, 2))),
    "rows of two symbolic extents": module((N, tirx.Var("m", "int64"), 128), (128,), "bfloat16", norm),
    "a symbolic axis": module((4, N), (N,), "bfloat16", norm),
    "softmax": module((N, 128), (128,), "float32", lambda x, w: op.nn.softmax(op.add(x, w), axis=-1)),
    "layer norm": module((N, 128), (128,), "float32", lambda x, w: op.nn.layer_norm(x, w, w, axes=[-1])),
    "sum": module((N, 128), (128,), "float32", lambda x, w: op.sum(x, axis=-1)),
    "add": module((N, 128), (128,), "float32", op.add),
}


@pytest.mark.parametrize("mod", LEFT.values(), ids=LEFT)
def test_left_to_the_next_rule(mod):
    funcs = scheduled(mod)
    assert funcs and not any(is_scheduled(func) for func in funcs.values())


def test_other_targets_keep_their_own_schedule():
    assert RowNorm().apply(*scheduled(LEFT["48 elements"]).values(), pipeline.host_target(), False) is None


def kernel_source(mod):
    """The CUDA source of the one kernel that TVM makes of a module."""
    from tvm_infer.compiler import _cuda_compiler

    with _cuda_compiler():
        executable = pipeline.lower_unpaged(mod, pipeline.cuda_target())

    def sources(found):
        own = [found.inspect_source("cuda")] if found.kind == "cuda" else []
        return own + [text for imported in found.imports for text in sources(imported)]

    (source,) = sources(executable.mod)
    (kernel,) = re.findall(r'extern "C" __global__ void[^;{]*\{.*?\n}\n', source, re.DOTALL)
    return kernel


def run_on_host(kernel, folder, x, w, out_dtype):
    """What the kernel makes of x [rows, width] and w [width], numpy arrays of raw elements."""
    head = kernel.split("{")[0]
    threads = int(re.search(r"__launch_bounds__\((\d+)\)", head)[1])
    name, arguments = re.search(r"(\w+)\(([^()]*)\)\s*$", head).groups()
    values = {"x_ptr": "x.data()", "w_ptr": "w.data()", "n": f"{len(x)}"}
    call = [values.get(argument.split()[-1], "y.data()") for argument in arguments.split(",")]
    element = re.search(r"(\w+)\* __restrict__ x_ptr", arguments)[1]
    result = "float" if out_dtype == "float32" else element
    program = f"""
{kernel.replace("__shared__ alignas(64)", "static")}
int main() {{
  auto x = emulated::Read<{element}>("x.bin"), w = emulated::Read<{element}>("w.bin");
  std::vector<{result}> y(x.size());
  emulated::Launch({len(x)}, {threads}, [&] {{ {name}({", ".join(call)}); }});
  emulated::Write("y.bin", y);
}}
"""
    (folder / "kernel.cc").write_text(program)
    x.tofile(folder / "x.bin")
    w.tofile(folder / "w.bin")
    flags = ["-std=c++20", "-O1", "-pthread", "-w", "-include", str(EMULATED / "block.h")]
    subprocess.run([shutil.which("c++") or "g++", *flags, "kernel.cc", "-o", "kernel"], cwd=folder, check=True)
    subprocess.run([str(folder / "kernel")], cwd=folder, check=True, timeout=60)
    return (folder / "y.bin").read_bytes()


CASES = [  # width, dtype, out_dtype, bytes of the loads
    (4096, "bfloat16", None, "uint4"),
    (576, "bfloat16", None, "nv_bfloat162"),
    (128, "bfloat16", None, "nv_bfloat164"),
    (256, "bfloat16", "float32", "uint4"),
    (12288, "float32", None, "float4"),
]


@pytest.mark.needs_nvcc
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler on PATH")
@pytest.mark.parametrize(("width", "dtype", "out_dtype", "load"), CASES, ids=[f"{c[1]}-{c[0]}" for c in CASES])
def test_the_kernel_does_what_its_definition_says(width, dtype, out_dtype, load, tmp_path):
    """Rows of very different sizes, one of zeros."""

    def write(x, w):
        return norm(x, w) if out_dtype is None else op.astype(norm(x, w), out_dtype)

    kernel = kernel_source(module((1, N, width), (width,), dtype, write))
    assert kernel.count(f"*({load}*)(x_ptr") == 1 and kernel.count(f"*({load}*)(w_ptr") == 1
    generator = torch.Generator().manual_seed(width)
    x = (torch.randn(4, width, generator=generator) * torch.tensor([[1e-3], [1.0], [300.0], [0.0]])).to(TORCH[dtype])
    w = torch.rand(width, generator=generator).add(0.5).to(TORCH[dtype])
    raw = run_on_host(kernel, tmp_path, *(bits(value) for value in (x, w)), out_dtype or dtype)
    y = torch.frombuffer(bytearray(raw), dtype=TORCH[out_dtype or dtype]).view(4, width).double()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double()
    rounded = exact.to(TORCH[dtype]).double()
    assert torch.equal(y[3], exact[3])
    for row in range(3):
        limit = max(1.01 * (rounded[row] - exact[row]).norm(), 3e-7 * exact[row].norm())
        assert (y[row] - exact[row]).norm() <= limit


def bits(tensor):
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()

"""Programmatic dependent launch of TVM's kernels: the attribute, and the two instructions ahead of any access to memory."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import ir as I
from tvm.script import tirx as T

from tvm_infer.relax import pipeline
from tvm_infer.relax.programmatic_launch import TIR_PIPELINE, ProgrammaticLaunch

ATTRIBUTE = "tirx.use_programtic_dependent_launch"
PROLOGUE = ["cudaTriggerProgrammaticLaunchCompletion", "cudaGridDependencySynchronize"]


def model():
    """A norm, an elementwise chain and a softmax, whose kernels read what the one ahead wrote."""
    n = tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n, 512), "bfloat16"))
    weight = relax.Var("weight", relax.TensorType((512,), "bfloat16"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, weight]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.rms_norm(x, weight, [-1]))
            y = builder.emit(relax.op.nn.softmax(y))
            y = builder.emit_output(relax.op.add(relax.op.sigmoid(y), x))
        builder.emit_func_output(y)
    return builder.get()


@pytest.fixture(scope="module")
def source():
    """CUDA source of the kernels, as TVM's pipeline for GPUs with ours for kernels writes it."""
    from tvm.relax.backend.cuda import pipeline as cuda

    target = pipeline.cuda_target()
    steps = [
        *cuda.library_dispatch_passes(target),
        *pipeline.legalize_for_cuda(target),
        *cuda.dataflow_lower_passes(target),
        *cuda.finalize_passes(target),
    ]
    with target:
        executable = tvm.compile(
            model(), target=target, relax_pipeline=tvm.transform.Sequential(steps), tir_pipeline=TIR_PIPELINE
        )
    (on_host,) = executable.mod.imports
    return "\n".join(str(module.inspect_source()) for module in on_host.imports if module.kind == "cuda")


def kernels(source):
    """name -> body of each kernel."""
    return dict(
        re.findall(r"__global__ void __launch_bounds__\(\d+\) (\w+)\([^;{]*\) \{\n(.*?)^\}", source, re.M | re.S)
    )


def test_every_kernel_begins_with_the_two_instructions(source):
    found = kernels(source)
    assert len(found) >= 2 and any("rms_norm" in name for name in found)
    for name, body in found.items():
        assert re.findall(r"(\w+)\(\);", body)[:2] == PROLOGUE, name
        lines = [line.strip() for line in body.splitlines()]
        assert lines[:2] == [f"{call}();" for call in PROLOGUE], name


@pytest.mark.needs_nvcc
def test_nothing_is_loaded_or_stored_before_the_wait(source, tmp_path):
    """The compiler may take what a kernel only reads for constant, and could then load it ahead of the wait: it does not."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    (tmp_path / "k.cu").write_text(source)
    command = [nvcc, "-ptx", "-arch=sm_90", "-O3", str(tmp_path / "k.cu"), "-o", str(tmp_path / "k.ptx")]
    subprocess.run(command, check=True, capture_output=True)
    entries = (tmp_path / "k.ptx").read_text().split(".entry ")[1:]
    assert len(entries) == len(kernels(source))
    for entry in entries:
        body = entry[entry.index("{") :]
        access = re.search(r"\b(ld|st|atom|red)\.global", body)
        assert access is not None and 0 < body.index("griddepcontrol.launch_dependents") < access.start()
        assert 0 < body.index("griddepcontrol.wait") < access.start()


@I.ir_module
class Before:
    @T.prim_func(s_tir=True)
    def kernel(a_data: T.handle("float32")):
        T.func_attr(
            {
                "target": T.target("cuda"),
                "calling_conv": 2,
                "tirx.kernel_launch_params": ["threadIdx.x"],
                "global_symbol": "kernel",
                "tirx.is_global_func": True,
            }
        )
        a = T.decl_buffer(16, dtype="float32", data=a_data)
        i = T.launch_thread("threadIdx.x", 16)
        a[i] = T.float32(0)

    @T.prim_func(s_tir=True)
    def on_host(a_data: T.handle("float32")):
        T.func_attr({"target": T.target("llvm"), "global_symbol": "on_host"})
        a = T.decl_buffer(16, dtype="float32", data=a_data)
        a[0] = T.float32(0)


@I.ir_module
class Expected:
    @T.prim_func(s_tir=True)
    def kernel(a_data: T.handle("float32")):
        T.func_attr(
            {
                "target": T.target("cuda"),
                "calling_conv": 2,
                "tirx.kernel_launch_params": ["threadIdx.x", "tirx.use_programtic_dependent_launch"],
                "global_symbol": "kernel",
                "tirx.is_global_func": True,
            }
        )
        T.call_extern("void", "cudaTriggerProgrammaticLaunchCompletion")
        T.call_extern("void", "cudaGridDependencySynchronize")
        a = T.decl_buffer(16, dtype="float32", data=a_data)
        i = T.launch_thread("threadIdx.x", 16)
        a[i] = T.float32(0)

    @T.prim_func(s_tir=True)
    def on_host(a_data: T.handle("float32")):
        T.func_attr({"target": T.target("llvm"), "global_symbol": "on_host"})
        a = T.decl_buffer(16, dtype="float32", data=a_data)
        a[0] = T.float32(0)


def test_the_attribute_and_the_two_instructions_once():
    """Host functions stay as they are, and so does a kernel that has been through the pass."""
    after = ProgrammaticLaunch()(Before)
    tvm.ir.assert_structural_equal(after, Expected)
    tvm.ir.assert_structural_equal(ProgrammaticLaunch()(after), Expected)

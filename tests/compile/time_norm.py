"""Checks and times RMSNorm on a cuda device: our schedule, TVM's schedule of the same operator, and the norm as torch.export writes it.

usage: python time_norm.py [--compile-only]      (needs an H200 or H100, torch and nvcc)

Norms that feed each other in one CUDA graph: us of one norm, from the difference between a long chain and a short one.
"""

from __future__ import annotations

import sys

import torch
import tvm
from tvm import relax
from tvm.relax import op
from tvm.relax.backend.cuda import pipeline as cuda

from tvm_infer.compiler import _cuda_compiler
from tvm_infer.relax import pipeline

SHORT, LONG = 9, 73
EPSILON = 1e-5
DTYPE = "bfloat16"


def fused(emit, x, w):
    return emit(op.nn.rms_norm(x, w, axes=[-1], epsilon=EPSILON))


def written_out(emit, x, w):
    wide = emit(op.astype(x, "float32"))
    mean = emit(op.mean(emit(op.power(wide, relax.const(2.0, "float32"))), axis=[-1], keepdims=True))
    scaled = emit(op.multiply(wide, emit(op.rsqrt(emit(op.add(mean, relax.const(EPSILON, "float32")))))))
    return emit(op.multiply(w, emit(op.astype(scaled, DTYPE))))


def chain(norm, rows, width, length):
    """main(x, w) that applies a norm `length` times; nothing of it changes between calls, so that all of it is captured."""
    builder = relax.BlockBuilder()
    x, w = (
        relax.Var(name, relax.TensorType(shape, DTYPE)) for name, shape in (("x", [1, rows, width]), ("w", [width]))
    )
    with builder.function("main", [x, w], attrs={"num_input": 0}):
        with builder.dataflow():
            y = x
            for _ in range(length):
                y = norm(builder.emit, y, w)
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    return builder.finalize()


def build(mod, legalize):
    target = pipeline.cuda_target()
    passes = [*legalize(target), *cuda.dataflow_lower_passes(target), *cuda.finalize_passes(target)]
    with (
        _cuda_compiler(),
        target,
        tvm.transform.PassContext(opt_level=3, config={"relax.backend.use_cuda_graph": True}),
    ):
        return tvm.compile(mod, target=target, relax_pipeline=tvm.transform.Sequential(passes))


def seconds(executable, x, w):
    vm = relax.VirtualMachine(executable, tvm.cuda())
    vm["main"](x, w)
    return vm.time_evaluator("main", tvm.cuda(), number=50, repeat=11)(x, w).median


def error(executable, x, w):
    """||y - reference|| / ||reference|| of one norm."""
    y = torch.from_dlpack(relax.VirtualMachine(executable, tvm.cuda())["main"](*map(tvm.runtime.from_dlpack, (x, w))))
    wide = x.double()
    reference = wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * w.double()
    return float((y.double() - reference).norm() / reference.norm())


def main():
    kinds = {
        "ours": (fused, pipeline.legalize_for_cuda),
        "TVM's schedule": (fused, cuda.legalize_passes),
        "written out": (written_out, cuda.legalize_passes),
    }
    print(f"{'rows':>6} {'width':>6}  " + "  ".join(f"{kind + ' us':>18} {'error':>8}" for kind in kinds))
    for width in (576, 2048, 4096, 8192):
        for rows in (1, 16, 64, 512, 4096):
            cells = []
            for norm, legalize in kinds.values():
                built = [build(chain(norm, rows, width, length), legalize) for length in (1, SHORT, LONG)]
                if "--compile-only" in sys.argv:
                    return
                x = torch.randn(1, rows, width, device="cuda").to(torch.bfloat16)
                w = (torch.rand(width, device="cuda") + 0.5).to(torch.bfloat16)
                times = [seconds(executable, *map(tvm.runtime.from_dlpack, (x, w))) for executable in built[1:]]
                cells.append(f"{(times[1] - times[0]) / (LONG - SHORT) * 1e6:18.2f} {error(built[0], x, w):8.1e}")
            print(f"{rows:>6} {width:>6}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()

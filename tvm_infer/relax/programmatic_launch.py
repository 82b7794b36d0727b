"""Programmatic dependent launch for the kernels that TVM generates: each may start before the kernel ahead of it has ended.

A decode step is hundreds of kernels of a few microseconds, and between two that are launched in the ordinary way the GPU idles for
about one. With the launch attribute of CUDA 12 a kernel's blocks take their places while the kernel ahead runs, wait there for its end
(`griddepcontrol.wait`), and let the next kernel do the same (`griddepcontrol.launch_dependents`). TVM's runtime knows the attribute,
its code generator does not write the two instructions.

Products are what gains most: `tvm_infer.linear` behind such a kernel begins to read its weight while that kernel runs.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.tirx.compilation_pipeline import register_tir_pipeline

TIR_PIPELINE = (
    "tvm_infer.cuda"  # for tvm.compile(…, tir_pipeline=TIR_PIPELINE): TVM's own for kernels, then ProgrammaticLaunch
)
_LAUNCH_PARAMS = "tirx.kernel_launch_params"
_ATTRIBUTE = "tirx.use_programtic_dependent_launch"  # as TVM spells it
_DEVICE_KERNEL = 2  # tvm::CallingConv::kDeviceKernelLaunch
# NOTE: dependents are let go first. They wait for this grid's end by themselves, and the sooner they are there the better. All of a
# grid's blocks have started by then, so those that wait take no place from those waited for.
_PROLOGUE = ("cudaTriggerProgrammaticLaunchCompletion", "cudaGridDependencySynchronize")


def _is_cuda_kernel(func: Any) -> bool:
    if not isinstance(func, tirx.PrimFunc) or int(func.attrs.get("calling_conv", 0)) != _DEVICE_KERNEL:
        return False
    target = func.attrs.get("target")
    return target is not None and str(target.kind.name) == "cuda"


class ProgrammaticLaunch:
    """A pass over device kernels (after SplitHostDevice): the launch attribute, and the two instructions ahead of everything else.

    A kernel then touches no memory before the one ahead has ended, which has waited for the one ahead of it, and so on: right as long
    as every kernel that has the attribute waits. Only for GPUs of compute capability 9.0 and newer.
    """

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged. A kernel that has the attribute already is left alone."""
        updated = mod.clone()
        for var, func in mod.functions_items():
            if not _is_cuda_kernel(func):
                continue
            params = [str(param) for param in func.attrs[_LAUNCH_PARAMS]]
            if _ATTRIBUTE in params:
                continue
            prologue = [tirx.Evaluate(tirx.call_extern("void", name)) for name in _PROLOGUE]
            body = tirx.SeqStmt([*prologue, func.body])
            updated.update_func(var, func.with_body(body).with_attr(_LAUNCH_PARAMS, [*params, _ATTRIBUTE]))
        return updated


def _pipeline() -> tuple[Any, Any, Any]:
    lower, finalize_host, finalize_device = default_s_tir_pipeline()

    def finalize() -> Any:
        launch = tvm.transform.module_pass(
            lambda mod, _: ProgrammaticLaunch()(mod), opt_level=0, name="ProgrammaticLaunch"
        )
        return tvm.transform.Sequential([finalize_device(), launch])

    return lower, finalize_host, finalize


register_tir_pipeline(TIR_PIPELINE, _pipeline)

"""Every kernel of the table compiles in seconds, stays in registers and fits an SM."""

from __future__ import annotations

import pytest

from tvm_infer import jit
from tvm_infer.jit import cubin_file, cubins, nvcc

MAX_SHARED_BYTES = 232448  # of a CTA on sm_90
MEASURED_WITH = (13, 0)  # the nvcc that the kernels' figures are of: nothing spills
# Its successors allocate registers a little otherwise: 13.5 keeps 8 bytes of gather kernels on the stack.
MAX_STACK_BYTES_OF_OTHERS = 16
MAX_CPU_SECONDS = 5  # of nvcc and all it starts


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("name", jit.all_names())
def test_resources(name, cache):
    built = cubins.build_one(name)
    resources = built.resources
    allowed = 0 if nvcc.find().release == MEASURED_WITH else MAX_STACK_BYTES_OF_OTHERS
    assert max(resources.spill_bytes, resources.stack_bytes) <= allowed
    assert resources.shared_bytes <= MAX_SHARED_BYTES
    assert resources.cpu_seconds <= MAX_CPU_SECONDS
    if name.startswith("attention"):
        # 384 threads share 65536 registers: at most 168 at entry, or setmaxnreg has nothing to hand around
        assert (resources.threads, resources.registers) == (384, 168)
        assert resources.shared_bytes > 100_000  # the ring: dynamic, so that only the kernel's own constant says it
        assert cubin_file.kernel_info(built.path.read_bytes(), name).ctas_per_sm == 1

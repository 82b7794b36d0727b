"""Every kernel of the table compiles in seconds, stays in registers and fits an SM."""

from __future__ import annotations

import pytest

from tvm_infer import jit, variant
from tvm_infer.jit import cubin_file, cubins
from tvm_infer.variant.cache_masks import CACHE_MASKS

MAX_SHARED_BYTES = 232448  # of a CTA on sm_90
MAX_CPU_SECONDS = 5  # of nvcc and all it starts


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("name", jit.all_names())
def test_resources(name, cache):
    built = cubins.build_one(name)
    resources = built.resources
    assert (resources.spill_bytes, resources.stack_bytes) == (0, 0)
    assert resources.shared_bytes <= MAX_SHARED_BYTES
    assert resources.cpu_seconds <= MAX_CPU_SECONDS
    if name.startswith("gemv"):
        # eight warps that multiply and one that copies; the host divides all of an SM's shared memory
        assert (resources.threads, resources.shared_bytes) == (288, MAX_SHARED_BYTES)
        assert cubin_file.kernel_info(built.path.read_bytes(), name).ctas_per_sm == 1
    if name.startswith("attention"):
        # 384 threads share 65536 registers: at most 168 at entry, or setmaxnreg has nothing to hand around
        assert (resources.threads, resources.registers) == (384, 168)
        assert resources.shared_bytes > 100_000  # the ring: dynamic, so that only the kernel's own constant says it
        assert cubin_file.kernel_info(built.path.read_bytes(), name).ctas_per_sm == 1


# On pages of 16 the standard variants stay in registers, but for the table of biases, read for every logit. Kernels that gather have
# eight registers fewer for those that compute.
VARIANT_SPILLS = {"attention_bf16_h128_p16": 0, "attention_bf16_h128_p1": 44}
PREBUILT = {name: v for name, v in (variant.STANDARD | CACHE_MASKS).items() if not v.is_plain}
SPILLS = {
    "logit_bias": {"attention_bf16_h128_p16": 4, "attention_bf16_h128_p1": 100},
    "token_tree": {"attention_bf16_h128_p16": 0, "attention_bf16_h128_p1": 56},
}
# Who changes queries and keys needs registers where queries are loaded, which those that compute lack by as many.
CHANGING_SPILLS = {"qk_norm": 40, "rope": 36, "rope_interleaved": 24, "rope_by_length": 40, "streaming": 84}


def most_spilled(name: str, kernel: str) -> int:
    return CHANGING_SPILLS.get(name, SPILLS.get(name, VARIANT_SPILLS)[kernel])


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("kernel", VARIANT_SPILLS)
@pytest.mark.parametrize("name", PREBUILT)
def test_resources_of_variants(name, kernel, cache):
    standard = PREBUILT[name]
    jit.register_variant(standard.digest, standard.source())
    resources = cubins.build_one(f"{kernel}_v{standard.digest}").resources
    assert resources.spill_bytes <= most_spilled(name, kernel)
    assert (resources.threads, resources.registers) == (384, 168)
    assert resources.shared_bytes <= MAX_SHARED_BYTES
    assert resources.cpu_seconds <= MAX_CPU_SECONDS

"""Every kernel of the table compiles in seconds, stays in registers and fits an SM."""

from __future__ import annotations

import pytest

from tvm_infer import jit, variant
from tvm_infer.jit import cubin_file, cubins
from tvm_infer.variant.cache_masks import CACHE_MASKS

MAX_SHARED_BYTES = 232448  # of a CTA on sm_90
MAX_CPU_SECONDS = 5  # of nvcc and all it starts


# As they are, so that more is seen.
SPILLS_WITHOUT_VARIANT = {"_h192_": 24, "_h96_": 16, "_e4m3_h128_": 12, "_e5m2_h128_": 12, "_h128_ragged": 8}


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("name", jit.all_names())
def test_resources(name, cache):
    built = cubins.build_one(name)
    resources = built.resources
    allowed = sum(most for part, most in SPILLS_WITHOUT_VARIANT.items() if part in name)
    assert resources.spill_bytes <= allowed and resources.stack_bytes <= allowed
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


# Bytes that may be spilled. On pages of 16 most standard variants stay in registers. Kernels that gather have eight registers fewer for
# those that compute, and so do those that change queries, whose loaders need as many.
VARIANT_SPILLS = {"attention_bf16_h128_p16": 0, "attention_bf16_h128_p1": 32}
PREBUILT = {name: v for name, v in (variant.STANDARD | CACHE_MASKS).items() if not v.is_plain}
SPILLS = {
    "alibi": (52, 24),
    "chunked_local": (16, 24),
    "logit_bias": (12, 52),
    "qk_norm": (52, 44),
    "rope": (44, 36),
    "rope_interleaved": (32, 24),
    "rope_by_length": (44, 36),
    "streaming": (76, 52),
    "token_tree_rope": (92, 68),
    "kept_keys_rope": (72, 52),
}


def most_spilled(name: str, kernel: str) -> int:
    return dict(zip(VARIANT_SPILLS, SPILLS[name], strict=True))[kernel] if name in SPILLS else VARIANT_SPILLS[kernel]


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

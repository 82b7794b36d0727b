"""Every kernel of the table compiles in seconds, stays in registers and fits an SM."""

from __future__ import annotations

import re

import pytest

from tvm_infer import jit, variant
from tvm_infer.jit import cubin_file, cubins, names
from tvm_infer.variant.cache_masks import CACHE_MASKS

MAX_SHARED_BYTES = 232448  # of a CTA on sm_90
MAX_CPU_SECONDS = 5  # of nvcc and all it starts


# As they are, so that more is seen.
EIGHT_BIT_SPILLS = {80: 8, 96: 8, 128: 88, 192: 60, 256: 116}
SPILLS_WITHOUT_VARIANT = {"_h192_": 12}
SPILLS_WITHOUT_VARIANT |= {f"_{kv}_h{d}_": n for kv in names.KV_ELEMENTS for d, n in EIGHT_BIT_SPILLS.items()}
# Of 8-bit kernels each head_dim with each page size and type of queries and of keys, not all with all: they are many.
EIGHT_BITS = ("bf16_e4m3_h{}_p16", "fp16_e5m2_h{}_p32", "bf16_e5m2_h{}_p64", "fp16_e4m3_h{}_p64")
COMPILED = [n for n in jit.all_names() if not re.match("attention_.*_e[45]m[23]_", n)]
COMPILED += [f"attention_{name.format(head_dim)}" for head_dim in names.HEAD_DIMS for name in EIGHT_BITS]


def shape_of(kernel: str) -> tuple[int, int]:
    """Threads of a CTA and their registers at entry: as many as 65536 allow, or setmaxnreg has nothing to hand around.

    Beside 8-bit keys a fourth warpgroup widens.
    """
    return (512, 128) if re.search("_e[45]m[23]_", kernel) else (384, 168)


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("name", COMPILED)
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
        assert (resources.threads, resources.registers) == shape_of(name)
        assert resources.shared_bytes > 100_000  # the ring: dynamic, so that only the kernel's own constant says it
        assert cubin_file.kernel_info(built.path.read_bytes(), name).ctas_per_sm == 1


_LOAD, _WAIT, _ALWAYS = (
    0x981,
    0x82E,
    7,
)  # of sm_90: LDG, ACQBULK (griddepcontrol.wait), the predicate that is always true


def loads_before_the_wait(code: bytes) -> int:
    """Unconditional loads of global memory above the first wait for the kernel ahead.

    An instruction is 16 bytes, its opcode the low 12 bits.
    """
    words = [int.from_bytes(code[at : at + 8], "little") for at in range(0, len(code), 16)]
    opcodes = [word & 0xFFF for word in words]
    above = words[: opcodes.index(_WAIT)]
    return sum(word & 0xFFF == _LOAD and word >> 12 & 0xF == _ALWAYS for word in above)


PLANNED = [name for name in COMPILED if re.match("attention.*_(p1|p16|ragged)$|append|rope|page|select", name)]


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("name", PLANNED)
def test_nothing_is_read_before_the_kernel_ahead_has_ended(name, cache):
    """That may write the plan or the page table. What is taken for constant memory (__ldg) compilers move above the wait."""
    code = cubin_file.code(cubins.build_one(name).path.read_bytes(), name)
    assert loads_before_the_wait(code) == 0


VARIANT_KERNELS = ("attention_bf16_h128_p16", "attention_bf16_h128_p1")
PREBUILT = {name: v for name, v in (variant.STANDARD | CACHE_MASKS).items() if not v.is_plain}
# Bytes that they may spill; variants that are not named none. Kernels that gather have eight registers fewer for those that compute,
# and so do those that change queries, whose loaders need as many.
SPILLS = {
    "alibi": (56, 24),
    "attention_sink": (0, 8),
    "chunked_local": (12, 0),
    "kept_keys_rope": (48, 36),
    "logit_bias": (52, 8),
    "qk_norm": (44, 44),
    "rope": (28, 28),
    "rope_by_length": (12, 28),
    "rope_interleaved": (12, 12),
    "streaming": (40, 28),
    "token_tree_rope": (40, 28),
}


# Beside keys of 8 bits; what changes queries or keys is refused there.
EIGHT_BITS_SPILLS = {"soft_cap": 96, "alibi": 112, "tree_mask": 120, "sigmoid_attention": 104}


def most_spilled(name: str, kernel: str) -> int:
    return dict(zip(VARIANT_KERNELS, SPILLS.get(name, (0, 0)), strict=True))[kernel]


@pytest.mark.needs_nvcc
@pytest.mark.parametrize(
    ("name", "kernel", "spills"),
    [
        *((n, kernel, most_spilled(n, kernel)) for kernel in VARIANT_KERNELS for n in PREBUILT),
        *((n, "attention_bf16_e4m3_h128_p16", most) for n, most in EIGHT_BITS_SPILLS.items()),
    ],
)
def test_resources_of_variants(name, kernel, spills, cache):
    standard = PREBUILT[name]
    jit.register_variant(standard.digest, standard.source())
    resources = cubins.build_one(f"{kernel}_v{standard.digest}").resources
    assert resources.spill_bytes <= spills
    assert (resources.threads, resources.registers) == shape_of(kernel)
    assert resources.shared_bytes <= MAX_SHARED_BYTES
    assert resources.cpu_seconds <= MAX_CPU_SECONDS

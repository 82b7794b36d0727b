"""Every kernel there is: names <-> parameters <-> the few lines of source that nvcc is given.

A name is the kernel's symbol, its cubin's file name and its key in the registry, and holds no architecture. Adding a head_dim or
a data type is one entry of a tuple below; adding a kernel is one row of FAMILIES. Attention kernels exist with a variant, too: their
names end in its digest, "attention_bf16_h128_p16_v0123456789abcdef", and their sources begin with its struct (variants.py).
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ArgumentError
from . import variants

# in names -> in source (ptx/element.cuh)
ELEMENTS = {"bf16": "Bf16", "fp16": "Fp16", "fp32": "Fp32"}
ATTENTION_ELEMENTS = ("bf16", "fp16")
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
HEAD_DIM_PAIRS = ("h192_v128",)  # keys wider than values: head_dim and head_dim_vo
PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64)  # tokens; below 8 gathered token by token, else copied by pages
RAGGED = "tvm_infer::attention::kRagged"  # in source, in place of a page size
# keys and values of 8 bits, in names -> in source (ptx/float8.cuh), and the shapes of attention over them
KV_ELEMENTS = {"e4m3": "E4m3", "e5m2": "E5m2"}
KV_HEAD_DIMS = HEAD_DIMS
KV_PAGE_SIZES = (16, 32, 64)


@dataclass(frozen=True)
class Family:
    """Kernels of one header that differ in parameters only.

    template : of the name, "attention_{element}_h{head_dim}_p{page_size}". axes : the values of each parameter.
    macro : what the source expands, behind TVM_INFER_; its arguments are the name and then `arguments`, with elements spelled as
        the source spells them.
    """

    key: str
    template: str
    header: str
    macro: str
    arguments: str
    axes: Mapping[str, tuple[object, ...]]
    takes_variant: bool = False


FAMILIES = (
    Family(
        key="attention paged",
        template="attention_{element}_h{head_dim}_p{page_size}",
        header="attention_sm90.cuh",
        macro="ATTENTION_SM90",
        arguments="{type}, {type}, {head_dim}, {head_dim}, {page_size}",
        axes={"element": ATTENTION_ELEMENTS, "head_dim": HEAD_DIMS, "page_size": PAGE_SIZES},
        takes_variant=True,
    ),
    Family(
        key="attention ragged",
        template="attention_{element}_h{head_dim}_ragged",
        header="attention_sm90.cuh",
        macro="ATTENTION_SM90",
        arguments=f"{{type}}, {{type}}, {{head_dim}}, {{head_dim}}, {RAGGED}",
        axes={"element": ATTENTION_ELEMENTS, "head_dim": HEAD_DIMS},
        takes_variant=True,
    ),
    Family(
        key="attention paged, keys wider than values",
        template="attention_{element}_{pair}_p{page_size}",
        header="attention_sm90.cuh",
        macro="ATTENTION_SM90",
        arguments="{type}, {type}, {head_dims}, {page_size}",
        axes={"element": ATTENTION_ELEMENTS, "pair": HEAD_DIM_PAIRS, "page_size": PAGE_SIZES},
    ),
    Family(
        key="attention ragged, keys wider than values",
        template="attention_{element}_{pair}_ragged",
        header="attention_sm90.cuh",
        macro="ATTENTION_SM90",
        arguments=f"{{type}}, {{type}}, {{head_dims}}, {RAGGED}",
        axes={"element": ATTENTION_ELEMENTS, "pair": HEAD_DIM_PAIRS},
    ),
    Family(
        key="attention paged, keys and values of 8 bits",
        template="attention_{element}_{kv}_h{head_dim}_p{page_size}",
        header="attention_sm90.cuh",
        macro="ATTENTION_SM90",
        arguments="{type}, {kv_type}, {head_dim}, {head_dim}, {page_size}",
        axes={
            "element": ATTENTION_ELEMENTS,
            "kv": tuple(KV_ELEMENTS),
            "head_dim": KV_HEAD_DIMS,
            "page_size": KV_PAGE_SIZES,
        },
        takes_variant=True,
    ),
    Family("copy pages", "copy_pages", "copy_pages.cuh", "COPY_PAGES", "", {}),
    Family("move tokens", "move_tokens", "move_tokens.cuh", "MOVE_TOKENS", "", {}),
    Family("append", "append_b16", "append.cuh", "APPEND", "uint16_t", {}),
    Family(
        key="append of keys wider than values",
        template="append_b16_{pair}",
        header="append.cuh",
        macro="APPEND_VO",
        arguments="{head_dims}",
        axes={"pair": HEAD_DIM_PAIRS},
    ),
    Family(
        key="append to 8 bits",
        template="append_{element}_{kv}",
        header="append.cuh",
        macro="APPEND_FLOAT8",
        arguments="{type}, {kv_type}",
        axes={"element": ATTENTION_ELEMENTS, "kv": tuple(KV_ELEMENTS)},
    ),
    Family(
        key="page bounds",
        template="page_bounds_{element}",
        header="page_bounds.cuh",
        macro="PAGE_BOUNDS",
        arguments="{type}",
        axes={"element": ATTENTION_ELEMENTS},
    ),
    Family(
        key="page bounds of 8 bits",
        template="page_bounds_{element}_{kv}",
        header="page_bounds.cuh",
        macro="PAGE_BOUNDS_FLOAT8",
        arguments="{type}, {kv_type}",
        axes={"element": ATTENTION_ELEMENTS, "kv": tuple(KV_ELEMENTS)},
    ),
    Family(
        key="page scores",
        template="page_scores_{element}",
        header="page_scores.cuh",
        macro="PAGE_SCORES",
        arguments="{type}",
        axes={"element": ATTENTION_ELEMENTS},
    ),
    Family("select pages", "select_pages", "select_pages.cuh", "SELECT_PAGES", "", {}),
    Family(
        key="merge states",
        template="merge_states_{element}",
        header="merge_states.cuh",
        macro="MERGE_STATES",
        arguments="{type}",
        axes={"element": tuple(ELEMENTS)},
    ),
    Family(
        key="rope append",
        template="rope_append_{element}",
        header="rope_append.cuh",
        macro="ROPE_APPEND",
        arguments="{type}",
        axes={"element": ATTENTION_ELEMENTS},
    ),
    Family(
        key="rope append to 8 bits",
        template="rope_append_{element}_{kv}",
        header="rope_append.cuh",
        macro="ROPE_APPEND_FLOAT8",
        arguments="{type}, {kv_type}",
        axes={"element": ATTENTION_ELEMENTS, "kv": tuple(KV_ELEMENTS)},
    ),
    Family(
        key="gemv",
        template="gemv_{element}",
        header="gemv.cuh",
        macro="GEMV",
        arguments="{type}",
        axes={"element": ATTENTION_ELEMENTS},
    ),
    Family("read ceiling", "read_ceiling", "read_ceiling.cuh", "READ_CEILING", "", {}),
    Family("scale lse", "scale_lse", "scale_lse.cuh", "SCALE_LSE", "", {}),
)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: its family, the values of its parameters in the order of its name, its variant's digest."""

    family: Family
    parameters: tuple[tuple[str, object], ...]
    variant: str | None = None

    @property
    def name(self) -> str:
        """The symbol, "attention_bf16_h128_p16"."""
        plain = self.family.template.format(**dict(self.parameters))
        return plain if self.variant is None else f"{plain}_v{self.variant}"

    def source(self) -> str:
        """What nvcc compiles: one include, the variant's struct if there is one, and one macro. Raises ExecutorError for a variant
        that kernels of this head_dim, or of keys of 8 bits, cannot have."""
        values = dict(self.parameters)
        values["type"] = ELEMENTS.get(str(values.get("element")), "")
        values["kv_type"] = KV_ELEMENTS.get(str(values.get("kv")), "")
        values["head_dims"] = str(values.get("pair", "")).replace("h", "").replace("_v", ", ")
        arguments = [self.name, self.family.arguments.format(**values)]
        macro, struct = self.family.macro, ""
        if self.variant is not None:
            variants.check_kernel(self.variant, int(str(values["head_dim"])), is_scaled="kv" in values)
            macro, struct = f"{macro}_VARIANT", variants.source_of(self.variant)
            arguments.append(variants.struct_name(self.variant))
        expanded = f"TVM_INFER_{macro}({', '.join(part for part in arguments if part)});"
        return f'#include "tvm_infer/kernels/{self.family.header}"\n{struct}{expanded}\n'


@functools.cache
def _specs() -> dict[str, KernelSpec]:
    specs = (
        KernelSpec(family, tuple(zip(family.axes, values, strict=True)))
        for family in FAMILIES
        for values in itertools.product(*family.axes.values())
    )
    return {spec.name: spec for spec in specs}


def all_names() -> tuple[str, ...]:
    """Names of all kernels without a variant, in the order of the table."""
    return tuple(_specs())


def parse(name: str) -> KernelSpec:
    """The kernel called `name`. Raises ArgumentError that lists what there is."""
    if not isinstance(name, str):
        raise ArgumentError(
            f"argument `name` is {name!r}; it must be a kernel's name, such as {next(iter(_specs()))!r}"
        )
    plain, _, digest = name.rpartition("_v")
    spec = _specs().get(plain)
    if variants.is_digest(digest) and spec is not None and spec.family.takes_variant:
        return KernelSpec(spec.family, spec.parameters, digest)
    spec = _specs().get(name)
    if spec is None:
        close = difflib.get_close_matches(name, _specs(), n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        raise ArgumentError(f"argument `name` is {name!r}, which is no kernel{hint}. There are: {', '.join(_specs())}")
    return spec

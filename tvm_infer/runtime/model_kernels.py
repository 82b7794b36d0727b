"""The CUDA kernels that a compiled model launches, which an exported library holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import ExecutorError
from ..kv_dtypes import BY_NAME, SCALED_DTYPES
from ..spec import AttentionSpec

# functions that need a BLAS, or cuBLASLt
_PRODUCTS = frozenset({"matmul", "matmul_add", "linear", "linear_add"})


def multiplies(functions: Iterable[str]) -> bool:
    """Whether one of tvm_infer's functions of these names is a matrix product."""
    return not _PRODUCTS.isdisjoint(functions)


def kernel_names(
    layers: Sequence[AttentionSpec],
    functions: Sequence[str],
    page_sizes: Sequence[int],
    digests: Mapping[int, str] | None = None,
    kv_dtype: str | None = None,
    selects: bool = False,
) -> tuple[str, ...]:
    """The CUDA kernels that a model's calls launch. Raises ArgumentError for one that there is none of.

    digests : of the layers that have a variant ("" for one that is a band alone), by the layer's number. kv_dtype : a type of pages
    that caches may have beside the layers' own. selects : whether layers may select pages. ExecutorError : kv_dtype is of 8 bits, and
    there are no kernels for these layers or pages.
    """
    from ..jit import parse

    codes = digests or {}
    scaled = [kv_dtype] if kv_dtype in SCALED_DTYPES else []
    names: dict[str, None] = {}
    for pages in (None, *scaled):
        if "attention_with_kv_cache" in functions:
            names |= {_append_kernel(spec, pages): None for spec in layers}
        if {"attention_with_kv_cache_fused_qkv", "attention_with_kv_cache_rope"} & set(functions):
            names |= {f"rope_append_{_elements(spec, pages)}": None for spec in layers}
    if names:
        for kind in scaled:
            _check_8_bits(layers, page_sizes, codes, kind)
        names["copy_pages"] = None  # forks that stop sharing a page
        if selects:
            names |= {f"page_bounds_{_elements(spec, pages)}": None for spec in layers for pages in (None, *scaled)}
            names |= {f"page_scores_{_elements(spec, None)}": None for spec in layers} | {"select_pages": None}
        for number, spec in enumerate(layers):
            for page_size in page_sizes:
                names[attention_kernel(spec, page_size, codes.get(number, ""))] = None
                names |= {attention_kernel(spec, page_size, codes.get(number, ""), kind): None for kind in scaled}
    if multiplies(functions):
        names |= {"gemv_bf16": None, "gemv_fp16": None}  # which types the products have, the calls do not say
    return tuple(parse(name).name for name in names)


def _check_8_bits(
    layers: Sequence[AttentionSpec], page_sizes: Sequence[int], digests: Mapping[int, str], kv_dtype: str
) -> None:
    """ExecutorError unless the CUDA executor has kernels for pages of this type."""
    from ..jit.names import KV_HEAD_DIMS, KV_PAGE_SIZES

    for number, digest in digests.items():
        if digest:
            _check_variant(number, digest, layers[number].head_dim, kv_dtype)
    for name, have, all_of in (
        ("head_dim", sorted({spec.head_dim for spec in layers}), KV_HEAD_DIMS),
        ("page_sizes", list(page_sizes), KV_PAGE_SIZES),
    ):
        if not set(have) <= set(all_of):
            raise ExecutorError(
                f"argument `kv_dtype` is {kv_dtype!r} with {name} {have}; the cuda executor has kernels for pages of 8 bits with "
                f"{name} {', '.join(map(str, all_of))}: export for these, or leave `kv_dtype` out"
            )


def _check_variant(number: int, digest: str, head_dim: int, kv_dtype: str) -> None:
    from ..jit import check_variant

    try:
        check_variant(digest, head_dim, is_scaled=True)
    except ExecutorError as error:
        raise ExecutorError(
            f"argument `kv_dtype` is {kv_dtype!r}, and layer {number} has a variant without such a kernel: {error}. Or leave it out"
        ) from error


def _elements(spec: AttentionSpec, kv_dtype: str | None) -> str:
    """ "bf16", or with pages of 8 bits "bf16_e4m3"."""
    own = BY_NAME[spec.dtype].suffix
    return own if kv_dtype is None else f"{own}_{BY_NAME[kv_dtype].suffix}"


def _widths(spec: AttentionSpec) -> str:
    """Of a kernel for keys wider than values, "_h192_v128"; "" where they are as wide."""
    return f"_h{spec.head_dim}_v{spec.head_dim_vo}" if spec.head_dim_vo else ""


def _append_kernel(spec: AttentionSpec, kv_dtype: str | None) -> str:
    return f"append_b16{_widths(spec)}" if kv_dtype is None else f"append_{_elements(spec, kv_dtype)}"


def attention_kernel(spec: AttentionSpec, page_size: int, digest: str = "", kv_dtype: str | None = None) -> str:
    """The name of the CUDA kernel of a layer's attention; digest : of its variant's code, "" without; kv_dtype : of pages of 8 bits."""
    heads = _widths(spec) or f"_h{spec.head_dim}"
    plain = f"attention_{_elements(spec, kv_dtype)}{heads}_p{page_size}"
    return f"{plain}_v{digest}" if digest else plain

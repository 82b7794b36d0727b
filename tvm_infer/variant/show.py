"""What becomes of a variant at each stage, as text: `tvm-infer variant`."""

from __future__ import annotations

import difflib
import importlib

from .. import jit
from ..errors import ArgumentError
from ..jit import cubin_file, cubins
from . import text
from .standard import STANDARD
from .variant import Variant


def find(name: str) -> Variant:
    """A standard variant by its name, or MODULE:NAME. Raises ArgumentError for what is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        if name in STANDARD:
            return STANDARD[name]
        close = difflib.get_close_matches(name, STANDARD, n=1)
        hint = f"; did you mean {close[0]!r}" if close else ""
        raise ArgumentError(
            f"argument `name` is {name!r}, which is no standard variant{hint}. There are: {', '.join(STANDARD)}; name your own by "
            "MODULE:NAME"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(f"argument `name` is {name!r}, which cannot be imported: {error}") from error
    if not isinstance(found, Variant):
        raise ArgumentError(
            f"argument `name` is {name!r}, which is a {type(found).__name__}; it must be a tvm_infer.variant.Variant"
        )
    return found


def _band(variant: Variant) -> str:
    bands = variant.bands
    named = (
        ("window_left", bands.lefts or bands.lefts_beside),
        ("window_right", bands.rights + bands.rights_tested),
        ("chunk", bands.chunks or bands.chunks_beside),
        ("num_sink", bands.sinks),
    )
    parts = [f"causal={bands.causal}", *(f"{name}={text.expression(code)}" for name, codes in named for code in codes)]
    if len(parts) == 1:
        parts.append("window_left=-1")
    rest = "nothing" if bands.residual is None else text.expression(bands.residual)
    return f"band, for the planner: {', '.join(parts)}\nleft of the mask, for kernels: {rest}"


def _taken(kernel: str, arch: str) -> str:
    built = cubins.build_one(kernel, arch)
    r = built.resources
    code = cubin_file.code_bytes(built.path.read_bytes(), kernel)
    taken = f"{r.registers} registers a thread at entry, {r.spill_bytes} B spilled, {r.seconds:.1f} s of nvcc"
    return f"{code / 1024:.1f} KiB of code, {taken}"


def stages(variant: Variant) -> str:
    """Expression, band, generated C++: what needs no compiler."""
    rest = "nothing is left for kernels: those without a variant run, by a plan of this band"
    return "\n\n".join([str(variant), _band(variant), rest if variant.is_plain else variant.source().rstrip()])


def resources(variant: Variant, kernel: str, arch: str, out: str | None) -> str:
    """What `kernel` takes with the variant and without. The cubin goes to folder `out`, too, if that is given."""
    spec = jit.parse(kernel)
    if not spec.family.takes_variant or spec.variant is not None:
        raise ArgumentError(
            f"argument `kernel` is {kernel!r}, which takes no variant; name an attention kernel, such as 'attention_bf16_h128_p16'"
        )
    jit.register_variant(variant.digest, variant.source())
    with_variant = f"{kernel}_v{variant.digest}"
    if out is not None:
        jit.build([with_variant], arch, out=out)
    return "\n".join(f"{name}, {arch}\n  {_taken(name, arch)}" for name in (with_variant, kernel))

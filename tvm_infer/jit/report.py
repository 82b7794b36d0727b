"""`tvm-infer build`: kernels compiled beside each other, and a table of what they take."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from . import nvcc
from .cubins import Built, build
from .names import all_names, parse

__all__ = ["all_names", "build_and_print"]


def build_and_print(names: Iterable[str], *, arch: str, jobs: int | None, out: str | None) -> None:
    """Build, then print the table on standard output; kernels that failed are in the error, the others in the table all the same."""
    built: list[Built] = []
    start = time.perf_counter()
    try:
        build(names, arch, jobs=jobs, out=out, done=built.append)
    finally:
        if built:
            _print(sorted(built, key=_place), time.perf_counter() - start, out)


def _place(built: Built) -> tuple[int, str]:
    """In the order of the table, a kernel with variants behind the plain one."""
    plain = replace(parse(built.name), variant=None).name
    return all_names().index(plain), built.name


def _print(built: list[Built], seconds: float, out: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"kernels for {built[0].arch}, nvcc {nvcc.find()}", title_justify="left")
    table.add_column("kernel", no_wrap=True)
    for column in ("", "nvcc s", "registers", "spilled B", "shared B"):
        table.add_column(column, justify="right")
    for b in built:
        r = b.resources
        state = "cached" if b.cached else "built"
        numbers = (r.registers, r.spill_bytes, r.shared_bytes)
        table.add_row(b.name, state, f"{r.seconds:.1f}", *(str(n) for n in numbers))
    console = Console()
    console.print(table)
    where = f"; cubins in {out}" if out else ""
    console.print(f"{len(built)} kernels in {seconds:.1f} s{where}", soft_wrap=True, highlight=False)

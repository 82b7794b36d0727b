"""A tensor parameter, as functions that are traced see it."""

from __future__ import annotations

from typing import Any, NoReturn

from .expression import Expr, lift
from .location import error_here
from .operations import INT
from .parameters import Parameter


class Table:
    """A tensor parameter while a function is traced: ``table[i, j]`` is an element."""

    def __init__(self, name: str, parameter: Parameter) -> None:
        from tvm import tirx

        self.name = name
        self.parameter = parameter
        shape = [tirx.Var(f"{name}_{d}", INT) for d in range(parameter.rank)]
        self._buffer = tirx.decl_buffer(shape, parameter.dtype, name)

    def __getitem__(self, index: Any) -> Expr:
        from tvm import tirx

        indices = index if isinstance(index, tuple) else (index,)
        rank = self.parameter.rank
        if len(indices) != rank or any(isinstance(i, slice) or i is None or i is Ellipsis for i in indices):
            raise error_here(f"table `{self.name}` has rank {rank}: index it with {rank} integers, not {index!r}")
        lifted = [lift(i) for i in indices]
        for i in lifted:
            if i.kind != INT:
                raise error_here(f"table `{self.name}` is indexed with a {i.kind}: indices are int32 (variant.to_int)")
        load = tirx.BufferLoad(self._buffer, [i.tir for i in lifted])
        kind = self.parameter.kind
        return Expr(load if self.parameter.dtype == kind else tirx.Cast(kind, load), kind)

    def __iter__(self) -> NoReturn:
        raise error_here(f"table `{self.name}` cannot be iterated over: index it")

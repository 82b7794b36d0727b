"""From a Python function to the expression that it computes: it is called once, with traced values for the names it asks for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import MissingDependencyError, VariantError
from . import location
from .code import Code, of_tir
from .expression import Expr, lift, to_float
from .operations import FLOAT, INT
from .parameters import KIND_OF_VARIABLE, RESULTS, VARIABLES, Parameter
from .table import Table


def variable(name: str, kind: str) -> Expr:
    """A fresh traced variable. Raises MissingDependencyError where TVM has no expressions: its runtime alone is loaded."""
    from tvm import tirx

    try:
        return Expr(tirx.Var(name, kind), kind)
    except AttributeError as error:
        raise MissingDependencyError(
            "an attention variant is made of TVM's expressions, and this process has TVM's runtime alone (TVM_USE_RUNTIME_LIB is "
            f"set, or libtvm_compiler is not there): unset it, or install apache-tvm whole ({error})"
        ) from error


def trace(function: Any, hole: str, parameters: Mapping[str, Parameter]) -> Code:
    """The flat code of what `function` returns.

    Raises VariantError, with the file and line, for a function that asks for a name it cannot have, does with a traced value what
    only a number allows, or returns what `hole` cannot take.
    """
    if not callable(function):
        raise location.error_here(f"argument `{hole}` is {function!r}; it must be a function of names such as `kv_pos`")
    where = location.of_function(function)
    result = function(**_arguments(function, hole, parameters, where))
    return of_tir(_result(result, hole, where).tir)


def _arguments(
    function: Callable[..., Any], hole: str, parameters: Mapping[str, Parameter], where: str
) -> dict[str, Expr | Table]:
    """What the function gets, by name."""
    made: dict[str, Expr] = {}

    def variable_of(name: str) -> Expr:
        if name not in made:
            kind = parameters[name].kind if name in parameters else KIND_OF_VARIABLE[name]
            made[name] = variable(name, kind)
        return made[name]

    arguments: dict[str, Expr | Table] = {}
    for name, argument in _signature(function, hole, where).parameters.items():
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD, argument.POSITIONAL_ONLY):
            raise VariantError(f"{where}: the function for `{hole}` takes `{argument}`; it must name what it wants")
        if name in VARIABLES[hole]:
            arguments[name] = variable_of(name)
        elif name in parameters:
            p = parameters[name]
            if p.index is not None and p.index not in VARIABLES[hole]:
                raise VariantError(
                    f"{where}: the function for `{hole}` asks for `{name}`, which is {p}, an element for each `{p.index}`; `{hole}` "
                    f"has none, only {', '.join(VARIABLES[hole])}: declare the parameter with variant.tensor and index it"
                )
            if p.is_scalar:
                arguments[name] = variable_of(name)
            else:
                table = Table(name, p)
                arguments[name] = table if p.index is None else table[variable_of(p.index)]
        elif argument.default is argument.empty:
            raise VariantError(
                f"{where}: the function for `{hole}` asks for `{name}`; there are {', '.join(VARIABLES[hole])}"
                + (f", and the parameters {', '.join(parameters)}" if parameters else "; no parameter is declared")
            )
    return arguments


def _signature(function: Callable[..., Any], hole: str, where: str) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise VariantError(
            f"{where}: the function for `{hole}` does not tell its arguments' names ({error}): wrap it in a lambda"
        ) from error


def _result(result: Any, hole: str, where: str) -> Expr:
    try:
        value = lift(result)
    except VariantError:
        raise VariantError(
            f"{where}: the function for `{hole}` returns {result!r}; it must return an expression or a number"
        ) from None
    if value.kind == INT and RESULTS[hole] == FLOAT:
        value = to_float(value)
    if value.kind != RESULTS[hole]:
        raise VariantError(
            f"{where}: the function for `{hole}` returns a {value.kind}; it must return a {RESULTS[hole]}"
            + (" (a comparison)" if hole == "mask" else "")
        )
    return value

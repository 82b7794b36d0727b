"""Where in the user's sources something happens."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from ..errors import VariantError


def of_caller() -> str:
    """ "file:line" of the innermost frame outside this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(f"{__package__}."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def of_function(function: Callable[..., Any]) -> str:
    """ "file:line" of a function's first line; of the caller where it is none that Python code defines."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return of_caller() if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def error_here(message: str) -> VariantError:
    """The error to raise for what the user's line does."""
    return VariantError(f"{of_caller()}: {message}")

"""The line on standard error while something is compiled."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

from .. import env


@contextlib.contextmanager
def progress(text: str) -> Iterator[list[str]]:
    """A line on standard error, ended with what the caller puts into the list. Threads beside each other print it whole."""
    show, outcome = env.setting("TVM_INFER_PROGRESS").value != "0", list[str]()
    alone = threading.current_thread() is threading.main_thread()
    if show and alone:
        print(text, end=" ", file=sys.stderr, flush=True)
    try:
        yield outcome
    finally:
        if show:
            print("" if alone else f"{text} ", *(outcome or ["failed"]), sep="", file=sys.stderr, flush=True)

"""Named ranges for profilers: off unless asked for, an error where they are asked for and cannot be."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest

from tvm_infer import errors
from tvm_infer.runtime import ranges


@pytest.fixture(autouse=True)
def fresh():
    ranges._annotate.cache_clear()  # the setting is read once
    yield
    ranges._annotate.cache_clear()


def test_off_by_default(monkeypatch):
    monkeypatch.delenv("TVM_INFER_NVTX", raising=False)
    monkeypatch.setitem(sys.modules, "nvtx", None)  # not even imported
    with ranges.mark("decode", 4) as value:
        assert value is None


def test_steps_are_named(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def annotate(message, *, domain):
        seen.append((message, domain))
        yield

    monkeypatch.setenv("TVM_INFER_NVTX", "1")
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    with ranges.mark("decode", 4), ranges.mark("tokens"):
        pass
    assert seen == [("decode [4]", "tvm_infer"), ("tokens", "tvm_infer")]


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setenv("TVM_INFER_NVTX", "1")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(errors.MissingDependencyError, match="pip install nvtx"):
        ranges.mark("decode")

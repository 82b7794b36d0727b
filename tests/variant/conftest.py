"""Helpers in this folder can be imported, and what is compiled goes to a cache of this run's own."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> pathlib.Path:
    """With xdist the parent folder is that of all workers."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "variant-cache"


@pytest.fixture(autouse=True)
def cache(shared_cache, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(shared_cache))
    return shared_cache

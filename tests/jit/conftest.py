"""A cache of this run's own, so that one compilation serves all tests, in all of their processes."""

from __future__ import annotations

import pathlib
import stat

import pytest

from tvm_infer.jit import nvcc


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> pathlib.Path:
    """With xdist the parent folder is that of all workers."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "kernel-cache"


@pytest.fixture
def cache(shared_cache, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(shared_cache))
    return shared_cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def script(tmp_path):
    """Makes an executable shell script."""

    def make(name: str, text: str) -> pathlib.Path:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


@pytest.fixture
def counting_nvcc(script, tmp_path, monkeypatch):
    """The real nvcc behind a script that writes a line for each compilation; returns the function that counts them."""
    log = tmp_path / "compilations"
    real = nvcc.find().path
    monkeypatch.setenv(
        "TVM_INFER_NVCC",
        str(script("nvcc", f'[ "$1" = --version ] || echo one >> "{log}"\nexec "{real}" "$@"')),
    )
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0

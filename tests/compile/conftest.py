"""One compiled model for all tests of this folder, in a cache folder of its own."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache_folder, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(cache_folder))


@pytest.fixture(scope="session")
def llama():
    from llamas import tiny_llama

    return tiny_llama()


@pytest.fixture(scope="session")
def imported(llama):
    """The same model as `executable`'s, exported already: exporting is what takes time."""
    from tvm_infer.relax import export_hf

    return export_hf(llama)


@pytest.fixture(scope="session")
def executable(llama, cache_folder):
    import tvm_infer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_INFER_CACHE_DIR", str(cache_folder))
        return tvm_infer.compile(llama, max_tokens=64)

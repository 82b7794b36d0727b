"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Timings vary on shared machines, so hypothesis gets no deadline; CI's runs are the same every time.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_source_tree(tmp_path_factory):
    """Processes that tests start must import the tvm_infer that is tested, not the one in the folder where pytest was started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        yield


def has_nvcc() -> bool:
    from tvm_infer import errors
    from tvm_infer.jit import nvcc

    try:
        nvcc.find()
    except errors.TvmInferError:
        return False
    return True


def pytest_collection_modifyitems(items):
    wanting = [item for item in items if item.get_closest_marker("needs_nvcc")]
    if wanting and not has_nvcc():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs nvcc: on PATH, in CUDA_HOME or of the extra `cuda`"))

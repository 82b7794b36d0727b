"""Which device the tests run on, and the counts that record.py keeps.

`--device cuda|cpu` (or TVM_INFER_TEST_DEVICE) names it. Without either it is cuda where torch has one, else cpu with the cases marked
`subset` only: enough to hold the tests' own code. The CPU executor runs every case with an explicit `--device cpu`.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

try:
    import torch
except ImportError:
    torch = None
    collect_ignore_glob = ["test_gpu_*.py"]

MARKERS = (
    "family(*names): the kernel families that a GPU test holds",
    "subset: runs on machines without a GPU, too, on the CPU executor",
    "sanitize: small enough for compute-sanitizer's memcheck",
    "racecheck: small enough for compute-sanitizer's racecheck",
)


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cuda", "cpu"), default=None, help="device of the tests in tests/gpu")
    parser.addoption("--record-json", default=None, help="write counts and errors by kernel family to this file")
    parser.addoption(
        "--families", default="", help="tests of these kernel families alone, comma-separated; empty: of all"
    )


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    path = config.getoption("--record-json", None)
    if path and not hasattr(config, "workerinput"):  # of pytest-xdist the one that hears of all
        config.pluginmanager.register(Recorder(pathlib.Path(path).absolute()), "tvm_infer_recorder")


def asked_for(config) -> str | None:
    return config.getoption("--device", None) or os.environ.get("TVM_INFER_TEST_DEVICE") or None


def device_of(config) -> str:
    return asked_for(config) or ("cuda" if torch is not None and torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(config, items):
    """Implicit cpu: only the subset of the parametrised cases, and what needs no device at all."""
    mine = [i for i in items if HERE in i.path.parents and i.get_closest_marker("family")]
    for item in mine:
        item.user_properties += [("family", name) for name in item.get_closest_marker("family").args]
    families = set(filter(None, config.getoption("--families", "").split(",")))
    if families:
        others = {id(i) for i in mine if families.isdisjoint(i.get_closest_marker("family").args)}
        items[:] = [i for i in items if id(i) not in others]
    if device_of(config) == "cuda" or asked_for(config):
        return
    drop = {id(i) for i in mine if not i.get_closest_marker("subset")}
    if drop:
        config.hook.pytest_deselected(items=[i for i in items if id(i) in drop])
        items[:] = [i for i in items if id(i) not in drop]


@pytest.fixture(scope="session")
def device(request) -> str:
    name = device_of(request.config)
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.fail("--device cuda, but torch sees no CUDA device")
        compile_kernels(request.session.items)
    elif asked_for(request.config) is None:
        torch.set_num_threads(1)  # small tensors, and as many processes beside this one as there are cores
    return name


@pytest.fixture(scope="session")
def cuda(device) -> str:
    if device != "cuda":
        pytest.skip("needs a CUDA device")
    return device


def compile_kernels(items) -> None:
    """All kernels that the collected cases need, at once: one nvcc takes seconds, and GPU machines have many cores."""
    from tvm_infer import _device, jit

    families = {name for item in items for marker in item.iter_markers("family") for name in marker.args}
    cases = (getattr(getattr(item, "callspec", None), "params", {}).get("case") for item in items)
    names = {case.kernel for case in cases if case is not None}
    if "append" in families:
        names |= {"append_b16", "append_b16_h192_v128"}
    if "rope_append" in families:
        names |= {f"rope_append_{dtype}" for dtype in ("bf16", "fp16")}
    if "merge_states" in families:
        names |= {f"merge_states_{dtype}" for dtype in ("bf16", "fp16", "fp32")}
    if "page_selection" in families:
        attention = {(64, 16), (64, 32), (80, 16), (96, 1), (128, 16), (128, 64), (256, 16)}
        names |= {f"attention_{dtype}_h{dim}_p{page}" for dtype in ("bf16", "fp16") for dim, page in attention}
        names |= {f"page_{kind}_{dtype}" for kind in ("bounds", "scores") for dtype in ("bf16", "fp16")}
        names |= {f"page_bounds_{dtype}_{kv}" for dtype in ("bf16", "fp16") for kv in ("e4m3", "e5m2")}
        names |= {"append_b16", "select_pages", "attention_bf16_e4m3_h128_p16"}
    if families & {"gemv", "matmul", "compiled_model"}:
        names |= {f"gemv_{dtype}" for dtype in ("bf16", "fp16")}
    # test_gpu_append has head_dims without an attention kernel
    names = {n for n in names if not n.startswith("attention") or n in jit.all_names()}
    names |= {
        f"{family}_{dtype}_{kv}"
        for family in families & {"append", "rope_append"}
        for dtype in ("bf16", "fp16")
        for kv in ("e4m3", "e5m2")
    }
    arch = _device.cuda_info(torch.cuda.current_device()).arch
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
        list(pool.map(lambda name: jit.cubin(name, arch), sorted(names)))


@pytest.fixture
def note(request):
    """note(errors): keep a test's errors for the record."""

    def keep(errors) -> None:
        request.node.user_properties.append(("errors", [errors.ours, errors.plain, errors.lse]))

    return keep


class Recorder:
    """Counts of each kernel family, with the largest errors, as JSON."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.families: dict[str, dict] = collections.defaultdict(
            lambda: {"passed": 0, "failed": 0, "skipped": 0, "largest_error": 0.0, "largest_lse_error": 0.0}
        )

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        for name in (value for key, value in report.user_properties if key == "family"):
            family = self.families[name]
            family[report.outcome] += 1
            for _, (error, _, lse) in (p for p in report.user_properties if p[0] == "errors"):
                family["largest_error"] = max(family["largest_error"], error)
                family["largest_lse_error"] = max(family["largest_lse_error"], lse)

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.families, indent=1, sort_keys=True) + "\n")

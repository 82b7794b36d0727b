"""record.py: a digest changes with what decides a kernel family's behaviour, and with nothing else."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
import record

KERNELS = "cuda_src/tvm_infer/kernels"


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
    """A copy of what digests look at, elsewhere and with other times."""
    root = tmp_path / "somewhere" / "else"
    for folder in ("cuda_src", "tests/gpu", "docs"):
        shutil.copytree(record.ROOT / folder, root / folder, copy_function=shutil.copyfile)
    return root


def digests(root: pathlib.Path) -> dict[str, str]:
    return {name: record.digest(root, name) for name in record.FAMILIES}


def changed(root: pathlib.Path, path: str, text: str = "\nint another_line;\n") -> set[str]:
    """Families whose digest changes when `text` is added to a file."""
    before = digests(root)
    file = root / path
    file.write_text(file.read_text(encoding="utf-8") + text, encoding="utf-8")
    after = digests(root)
    return {name for name in before if before[name] != after[name]}


def test_place_and_times_do_not_matter(tree):
    assert digests(tree) == digests(record.ROOT)


def test_every_family_has_its_kernel_its_launchers_and_its_tests():
    for name, family in record.FAMILIES.items():
        files = {p.relative_to(record.ROOT).as_posix() for p in record.family_files(record.ROOT, name)}
        assert {f"{KERNELS}/{kernel}" for kernel in family.kernels} <= files
        assert {"cuda_src/tvm_infer/cuda/driver.cc", "cuda_src/tvm_infer/ffi/attention_cuda.cc"} <= files
        assert {f"tests/gpu/{t}" for t in (*record.COMMON_TESTS, *family.tests)} <= files
        assert not any(part in f for f in files for part in ("/cpu/", "/kv/", "planner", "read_ceiling"))
        alone = {p for p in record.launcher_files(record.ROOT, family) if any(word in p.stem for word in family.words)}
        alone = {p for p in alone if p.parent.name == "cuda"}
        assert bool(alone) == bool(family.words)
        others = [set(record.family_files(record.ROOT, other)) for other in record.FAMILIES if other != name]
        assert not any(alone & files_of_other for files_of_other in others)
    tests = {p.name for p in (record.ROOT / "tests" / "gpu").glob("test_gpu_*.py")} - {pathlib.Path(__file__).name}
    named = {t for f in record.FAMILIES.values() for t in f.tests} | set(record.COMMON_TESTS)
    assert tests <= named


@pytest.mark.parametrize(
    ("path", "families"),
    [
        (f"{KERNELS}/append.cuh", {"append", "rope_append", "page_selection"}),  # others include it
        (f"{KERNELS}/rope_append.cuh", {"rope_append"}),
        (f"{KERNELS}/rope_angle.cuh", {"rope_append"}),
        (f"{KERNELS}/merge_states.cuh", {"merge_states"}),
        (f"{KERNELS}/attention_sm90.cuh", {"attention_sm90"}),
        (f"{KERNELS}/gemv.cuh", {"gemv"}),
        (f"{KERNELS}/page_bounds.cuh", {"page_selection"}),
        (f"{KERNELS}/select_pages.cuh", {"page_selection"}),
        ("cuda_src/tvm_infer/ptx/wgmma.cuh", {"attention_sm90"}),
        ("cuda_src/tvm_infer/ptx/bulk.cuh", {"gemv"}),
        ("cuda_src/tvm_infer/cuda/params.h", set(record.FAMILIES)),
        ("cuda_src/tvm_infer/cuda/driver.cc", set(record.FAMILIES)),
        ("cuda_src/tvm_infer/cuda/append.cc", {"append"}),
        ("cuda_src/tvm_infer/cuda/rope_append.cc", {"rope_append"}),
        ("cuda_src/tvm_infer/ffi/rope_cuda.cc", set(record.FAMILIES)),
        ("cuda_src/tvm_infer/cuda/cublas_api.h", {"matmul"}),
        ("cuda_src/tvm_infer/cuda/gemv.cc", {"gemv"}),
        ("cuda_src/tvm_infer/cuda/merge_states.h", {"merge_states"}),
        ("cuda_src/tvm_infer/ffi/attention_cuda.cc", set(record.FAMILIES)),
        ("tests/gpu/gpu_batches.py", set(record.FAMILIES)),
        ("tests/gpu/test_gpu_merge.py", {"merge_states"}),
        ("tests/gpu/gpu_products.py", {"gemv", "matmul"}),
        ("cuda_src/tvm_infer/cpu/attention.cc", set()),
        ("cuda_src/tvm_infer/schedule/planner.cc", set()),
        ("cuda_src/tvm_infer/kv/cache_manager.cc", set()),
        ("docs/kernels.md", set()),
        ("tests/gpu/record.py", set()),
    ],
)
def test_an_edit_changes_its_families_alone(tree, path, families):
    assert changed(tree, path) == families


def test_comments_and_blank_lines_do_not_matter(tree):
    assert changed(tree, f"{KERNELS}/append.cuh", "\n\n// a remark\n/* and\n another */\n") == set()
    assert changed(tree, f"{KERNELS}/rope_append.cuh", '\nconst char* kText = "// not a remark";\n') == {"rope_append"}
    assert changed(tree, f"{KERNELS}/rope_append.cuh", '\nconst char* kText = "// another text";\n') == {"rope_append"}


def test_a_header_included_newly_is_followed(tree):
    header = tree / "cuda_src/tvm_infer/ptx/brand_new.cuh"
    header.write_text("#pragma once\n")
    before = digests(tree)
    assert changed(tree, f"{KERNELS}/merge_states.cuh", '\n#include "tvm_infer/ptx/brand_new.cuh"\n') == {
        "merge_states"
    }
    assert changed(tree, "cuda_src/tvm_infer/ptx/brand_new.cuh") == {"merge_states"}
    assert digests(tree)["append"] == before["append"]


def test_check_names_the_families_and_fails(tree, tmp_path, capsys):
    path = tmp_path / "record.json"
    assert record.check(tree, path) == 1
    assert capsys.readouterr().out.count("no record") == len(record.FAMILIES)

    entries = {name: {"digest": d, "passed": 3, "failed": 0, "skipped": 0} for name, d in digests(tree).items()}
    path.write_text(json.dumps({"families": entries}))
    assert record.check(tree, path) == 0
    assert "belong to the code as it stands" in capsys.readouterr().out

    assert changed(tree, "cuda_src/tvm_infer/cuda/append.cc") == {"append"}
    assert record.check(tree, path) == 1
    out = capsys.readouterr().out
    assert "append: the record is of other code" in out and "merge_states" not in out

    entries["append"] = {"digest": record.digest(tree, "append"), "passed": 2, "failed": 1, "skipped": 0}
    path.write_text(json.dumps({"families": entries}))
    assert record.check(tree, path) == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_run_of_some_families_keeps_what_was_recorded_of_others(tmp_path):
    path, found = tmp_path / "record.json", {"device": "a GPU", "driver": "1", "date": "2026-01-02"}
    assert record.kept(found, ["append"], path) == {}
    path.write_text(
        json.dumps({**found, "date": "2026-01-01", "families": {"append": {"passed": 1}, "gemv": {"passed": 2}}})
    )
    assert record.kept(found, ["append"], path) == {"gemv": {"passed": 2}}
    assert record.kept(found, [], path) == {}  # all are run
    assert record.kept(found | {"driver": "2"}, ["append"], path) == {}  # not what this machine would say
    with pytest.raises(SystemExit):
        record.main(["run", "--families", "append,none"])


def test_check_is_a_command(tmp_path):
    assert record.main(["check", "--record", str(tmp_path / "none.json")]) == 1
    assert record.main(["--check", "--record", str(tmp_path / "none.json")]) == 1

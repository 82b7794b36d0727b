"""The planner's bench runs, prints every workload and writes what it returns. Times are not judged here: machines differ."""

from __future__ import annotations

import json

import pytest

from tvm_infer.bench import plan
from tvm_infer.errors import ArgumentError


def test_bench_plan(tmp_path, capsys):
    results = plan.run(json_path=str(tmp_path / "plan.json"), repeats=20)
    assert json.loads((tmp_path / "plan.json").read_text()) == results
    text = capsys.readouterr().out
    assert [row["workload"] for row in results["rows"]] == [w.name for w in plan.WORKLOADS]
    assert all(row["workload"] in text for row in results["rows"])
    assert {row["workload"]: row["bar_us"] for row in results["rows"] if row["bar_us"]} == {
        "64 decode, kv 1-8192": 15.0,
        "16 prefill, 128-4096": 50.0,
        "1024 decode, kv 1-8192": 100.0,
    }
    for row in results["rows"]:
        assert 0 < row["median_us"] <= row["p90_us"]
        assert 0.8 < row["balance"] <= 1.0
        assert (row["flat_us"] is not None) == ("shared" in row["workload"])
    shared = {row["workload"]: row["shared_works"] for row in results["rows"] if row["flat_us"]}
    assert [works > 0 for works in shared.values()] == [True, True, True, False]  # 256 shared keys do not pay
    assert len({row["bytes"] for row in results["rows"]}) == len(results["rows"])


def test_bench_plan_needs_a_repeat():
    with pytest.raises(ArgumentError, match="repeats"):
        plan.run(repeats=0)

"""The benchmark of parallel generation on the CPU executor, small: what is timed, what is compared, what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from tvm_infer import cli
from tvm_infer.bench import parallel
from tvm_infer.bench.rows import WrongResult
from tvm_infer.bench.timing import Timing

SMALL = parallel.Workload((2, 5), prompt=1003, tokens=6, model="tiny", device="cpu")


def launched_once(launches):
    for launch in launches:
        assert torch.isfinite(launch()).all()
    return Timing(median=float(len(launches)), p10=0, p90=0, runs=1)


def test_rows_of_a_small_model():
    """The prompt ends within a page, which each answer copies; tokens are those that were asked for, and the two ways agree."""
    found = parallel.measure_all(SMALL, launched_once)
    assert [row["answers"] for row in found["rows"]] == [2, 5] and found["num_layers"] == 2
    for row in found["rows"]:
        assert row["steps"] == 7 and row["difference"] < 1e-6  # the first of 8 steps has the capture in it
        assert row["attention_us"] == {"shared": 2.0, "flat": 2.0}  # a launch for each layer
        assert min(row["itl_ms"].values()) > 0
        layers_ms = row["attention_us"]["flat"] * found["num_layers"] / 1e3
        assert row["attention_percent"] == pytest.approx(100 * layers_ms / row["itl_ms"]["flat"])
        assert row["lower_percent"] == pytest.approx(100 * (1 - row["itl_ms"]["shared"] / row["itl_ms"]["flat"]))
    assert found["rows"][1]["shared_steps"] == 7
    text = parallel.lines(found, "a device")
    assert "1003 tokens on a device" in text[0] and "5 answers" in text[2] and "7 of 7 steps" in text[2]


def test_a_cache_that_differs_is_noticed():
    model = parallel.Model(SMALL)
    caches = {way: SMALL.cache(way) for way in parallel.WAYS}
    ids = torch.arange(SMALL.prompt) % 256
    for cache in caches.values():
        parallel.prefill(SMALL, model, cache, ids)
    caches["flat"].pages(0)[:, 1] *= 1.01  # values of layer 0
    with pytest.raises(WrongResult, match=r"attention of 5 answers with shared keys differs by .*e-0"):
        parallel.measure_row(SMALL, model, caches, 5, launched_once)


def test_both_ways_write_the_same_answers():
    """A step's tokens are those of a model that reads each answer's own keys, and answers differ."""
    model = parallel.Model(SMALL)
    caches = {way: SMALL.cache(way) for way in parallel.WAYS}
    for cache in caches.values():
        parallel.prefill(SMALL, model, cache, torch.arange(SMALL.prompt) % 256)
    ways = [parallel.Way(SMALL, model, caches[way], torch.arange(5)) for way in parallel.WAYS]
    for way in ways:
        way.step()
        way.step()
    assert ways[0].following.tolist() == ways[1].following.tolist() and len(set(ways[0].following.tolist())) > 1
    assert ways[0].shared_steps == 1 and ways[1].shared_steps == 0
    assert len(ways[0].times) == 1
    ways[0].end()
    assert caches["shared"].num_used_pages == -(-SMALL.prompt // 16)


def test_the_command_and_its_file(tmp_path):
    path = tmp_path / "out.json"
    arguments = "--device cpu --model tiny --layers 1 --prompt 40 --tokens 2 --answers 3".split()
    result = CliRunner().invoke(cli.main, ["bench", "parallel", *arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "1 layers of tiny" in result.output and "3 answers" in result.output
    found = json.loads(path.read_text())
    assert found["workload"]["prompt"] == 40 and len(found["rows"]) == 1


def test_it_needs_no_compiler():
    """It runs where TVM's compiler is not installed: nothing of TVM but its FFI is imported."""
    arguments = "(1,), prompt=4, tokens=1, model='tiny', device='cpu'"
    code = (
        f"import sys; from tvm_infer.bench import parallel; parallel.run(parallel.Workload({arguments}));"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'tvm'], 'tvm'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"answers": (4, 0)}, "`--answers` is 0; it must be at least 1"),
        ({"answers": ()}, "`--answers` is empty"),
        ({"page_size": 0}, "`--page-size` is 0; it must be at least 1"),
        ({"layers": -1}, "`--layers` is -1; it must be at least 1"),
        ({"model": "gpt"}, "`--model` is 'gpt'; it must be one of llama-3-8b, tiny"),
        ({"device": "tpu"}, "`--device` is 'tpu'; it must be one of cpu, cuda"),
    ],
)
def test_wrong_arguments(changed, message):
    with pytest.raises(parallel.ArgumentError, match=message):
        dataclasses.replace(SMALL, **changed)

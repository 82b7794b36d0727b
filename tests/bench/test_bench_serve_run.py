"""`bench serve` from the command to its table, JSON and chart; real backends on a tiny model."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest
from click.testing import CliRunner

from tvm_infer.bench import serve, serve_backends, serve_models, serve_report
from tvm_infer.bench.peers import Skipped
from tvm_infer.bench.serve_breakdown import Breakdown
from tvm_infer.bench.serve_loop import CacheSizes, Clock, Loop
from tvm_infer.bench.serve_workloads import workload
from tvm_infer.cli import main
from tvm_infer.errors import ArgumentError, ExecutorError

SMALL = ["--prompt-lens", "4..40", "--output-lens", "3..6", "--rate", "inf", "--max-batch", "4", "--max-tokens", "32"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny():
    return serve_models.load("tiny", "float32", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", "serve", *arguments])


def test_command_serves_on_both_caches(tmp_path):
    pytest.importorskip("matplotlib")
    out, chart = tmp_path / "out.json", tmp_path / "out.png"
    result = invoke(
        *SMALL, "--workload", "parallel", "--samples", "2", "--requests", "6", "--json", str(out), "--plot", str(chart)
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    ours, theirs, absent = found["rows"]
    assert [row["backend"] for row in found["rows"]] == list(serve_backends.BACKENDS)
    assert "CUDA only" in absent["skipped"] and "not measured: flashinfer" in result.output
    for row in (ours, theirs):
        assert row["requests"] == 6 and row["output_tokens"] >= 2 * 6 * 3
        assert row["ttft_ms"]["p99"] >= row["ttft_ms"]["median"] > 0
        assert row["itl_ms"]["p99"] >= row["itl_ms"]["median"] > 0
        parts = row["breakdown"]
        assert parts["attention"] > 0 and parts["gemm"] > 0 and parts["other"] > 0 and parts["host"] >= 0
    assert theirs["same_tokens"] == theirs["compared_tokens"] == theirs["output_tokens"]
    assert found["device"] == "cpu" and found["mode"] == "serve" and found["model"]["head_dim"] == 16
    assert "2 samples of each prompt" in found["asked"] and "uniform 4..40" in found["asked"]
    assert found["cache"]["max_batch"] == 4
    assert chart.read_bytes()[:4] == b"\x89PNG"
    for text in ("tiny, float32", "all at once", "seed 0", "TTFT ms", "tvm-tir: "):
        assert text in result.output


def test_command_decodes_only_and_prints_json():
    result = invoke(
        "--decode-only", "--batch", "1,3", "--kv", "24", "--steps", "4", "--backends", "tvm_infer", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["batch"], row["keys"]) for row in found["rows"]] == [(1, 24), (3, 24)]
    assert all(row["itl_ms"]["median"] > 0 and "ttft_ms" not in row for row in found["rows"])


def test_both_caches_give_the_tokens_of_running_alone(tiny):
    """Forks, chunks and mixed steps change no token, on either cache."""
    sizes = CacheSizes(6, 24, 24, 16)
    requests = workload("parallel", "1..50", "1..6", 2).requests(7, math.inf, 256, 2)
    for name in ("tvm_infer", "tvm-tir"):
        backend = serve_backends.make(name, tiny, sizes, "cpu")
        together = Loop(backend, Clock()).run(requests)
        for i, (record, request) in enumerate(zip(together.records, requests, strict=True)):
            alone = Loop(backend, Clock(), first_seq=1000 * (i + 1)).run([request]).records[0].samples
            assert [s.tokens for s in record.samples] == [s.tokens for s in alone], (name, i)


def test_tvm_has_one_page_size(tiny):
    with pytest.raises(Skipped, match="pages of 16 tokens, not 8"):
        serve_backends.make("tvm-tir", tiny, CacheSizes(4, 32, 32, 8), "cpu")


def test_greedy_takes_the_largest_of_every_row():
    import tvm

    logits = np.array([[0, 3, 1], [2, 1, 0]], np.float32)
    assert serve_backends.greedy(logits) == serve_backends.greedy(tvm.runtime.tensor(logits)) == [1, 0]


class Broken:
    def __init__(self, name, model, sizes, device):
        self.sizes = sizes
        if name == "tvm-tir":
            raise ExecutorError("no kernel")
        if name == "flashinfer":
            raise Skipped("not today")

    def describe(self):
        return "steady"

    def add(self, seq):
        pass

    remove = add

    def fork(self, parent, child):
        pass

    runs_ahead = False

    def step(self, batch, *, goes_on=False):
        return [0] * len(batch)

    def breakdown(self, step, plain):
        step()
        return Breakdown(1.0, 2.0, 3.0, plain, "made up")


def test_a_backend_that_fails_leaves_the_others_their_rows(capsys, tmp_path):
    options = serve.Options(requests=3, prompt_lens="4", output_lens="2", rate=math.inf)
    found = serve.run(options, make_backend=Broken, json_path=str(tmp_path / "x.json"))
    ours, failed, skipped = found["rows"]
    assert ours["output_tokens"] == 6 and ours["breakdown"]["gemm"] == 2.0
    assert failed == {"backend": "tvm-tir", "failed": "ExecutorError: no kernel"}
    assert skipped == {"backend": "flashinfer", "skipped": "not today"}
    assert serve.num_failed(found) == 1
    text = capsys.readouterr().out
    assert "FAILED: tvm-tir: ExecutorError: no kernel" in text and "parts: made up" in text
    assert json.loads((tmp_path / "x.json").read_text()) == found


def test_a_chart_can_be_drawn_from_rows_without_figures(tmp_path):
    pytest.importorskip("matplotlib")
    options = serve.Options(
        requests=3, prompt_lens="4", output_lens="1", rate=math.inf, backends=("tvm_infer", "tvm-tir")
    )
    found = serve.run(options, make_backend=Broken, plot_path=str(tmp_path / "x.png"))
    assert found["rows"][0]["itl_ms"]["median"] is None
    with pytest.raises(ArgumentError, match=r"`plot` is .*cannot be written"):
        serve_report.save(found, str(tmp_path / "x.nonsense"))


def test_the_same_seed_is_the_same_run():
    options = serve.Options(
        requests=5, prompt_lens="4..9", output_lens="2..5", rate=math.inf, backends=("tvm_infer",), seed=4
    )
    first, again = (serve.run(options, make_backend=Broken)["rows"][0] for _ in range(2))
    assert (first["prompt_tokens"], first["output_tokens"]) == (again["prompt_tokens"], again["output_tokens"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "`--model` is 'gpt'; it must be one of tiny, smollm2, llama-3-8b"),
        (["--dtype", "bfloat16"], "`--dtype` is 'bfloat16'; on cpu models are served in float32"),
        (["--backends", "vllm"], "`--backends` names 'vllm'"),
        (["--backends", ""], "`--backends` is empty"),
        (["--workload", "real"], "`--workload` is 'real'"),
        (["--rate", "0"], "`--rate` is 0.0"),
        (["--rate", "nan"], "`--rate` is nan"),
        (["--requests", "0"], "`--requests` is 0"),
        (["--max-batch", "0"], "`--max-batch` is 0"),
        (["--page-size", "0"], "`--page-size` is 0"),
        (["--seed", "-1"], "`--seed` is -1"),
        (["--samples", "9", "--max-batch", "8"], "9 samples of a prompt run together; a step takes 8 sequences"),
        (["--prompt-lens", "9..2"], "`--prompt-lens` is '9..2'"),
        (["--prompt-lens", "4000", "--output-lens", "200"], "texts have up to 4200 tokens; tiny was made for 4096"),
        (["--decode-only", "--batch", "x"], "`--batch` is 'x'"),
        (["--decode-only", "--kv", "3"], "`--kv` is 3 with 32 steps"),
        (["--json", "/nowhere/at/all.json"], "`json` is '/nowhere/at/all.json', but there is no folder"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_models_have_the_sizes_of_their_names():
    assert serve_models.config_of("llama-3-8b").head_dim == 128
    shapes = serve_models.config_of("llama-3-8b").weight_shapes().values()
    assert sum(math.prod(s) for s in shapes) == 8_030_261_248
    assert pathlib.Path(serve_backends.__file__).exists()

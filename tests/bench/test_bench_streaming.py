"""The StreamingLLM benchmark on the CPU executor, small: the ways agree, the third does not, and what is refused."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from tvm_infer import cli
from tvm_infer.bench import streaming
from tvm_infer.bench.rows import WrongResult
from tvm_infer.bench.timing import Timing

SMALL = streaming.Workload(batch=2, sink=4, window=37, kv=203, layers=1)


def test_visible_keys_by_hand():
    assert SMALL.visible == 42
    assert SMALL.positions == [0, 1, 2, 3, *range(165, 203)]


def test_fused_and_separate_rotation_agree_and_none_at_all_does_not():
    attention = streaming.Attention(SMALL, "cpu", compiled=False)
    cache = streaming.Caches(SMALL, "cpu", 3)
    assert streaming.check(attention, cache, SMALL) < 1e-2
    q = torch.empty((SMALL.batch, streaming.HEADS, streaming.HEAD_DIM), dtype=torch.bfloat16).normal_()
    fused, unturned = (attention(way, q, cache).double() for way in ("fused", "unturned"))
    assert (fused - unturned).norm() > 0.1 * fused.norm()
    cache.keys.mul_(1.5)  # the dense ones alone
    with pytest.raises(WrongResult, match="differ by"):
        streaming.check(attention, cache, SMALL)


def test_a_step_of_the_model(monkeypatch):
    for name, value in (("HIDDEN", 64), ("INTERMEDIATE", 48)):
        monkeypatch.setattr(streaming, name, value)
    launched = []

    def time(launches):
        launched.append(len(launches))
        for launch in launches:
            assert torch.isfinite(launch().float()).all()
        return Timing(median=1000.0 * len(launched), p10=0, p90=0, runs=1)

    found = streaming.measure(SMALL, "cpu", time, compiled=False)
    assert launched == [8, 1] * 3
    assert found["step_ms"] == {"fused": 2.0, "separate": 4.0, "unturned": 6.0} and found["lower_percent"] == 50
    text = streaming.lines(found, "a device")
    assert "2 requests of 203 tokens" in text[0] and "50.0 % less" in text[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "`--batch` is 0; it must be at least 1"),
        (["--kv", "2000"], "`--kv` is 2000; it must be at least sink + window + 1 = 2005"),
    ],
)
def test_wrong_arguments(arguments, message):
    result = CliRunner().invoke(cli.main, ["bench", "streaming", *arguments])
    assert result.exit_code != 0 and message in str(result.exception) + result.output

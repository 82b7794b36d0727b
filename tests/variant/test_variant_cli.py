"""`tvm-infer variant`: each stage of a variant, and names that are none."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from tvm_infer import variant
from tvm_infer.cli import main
from tvm_infer.jit import cubin_file, cubins

OWN = variant.Variant(
    "own", logits=lambda value, a: value * a, mask=lambda q_pos, kv_pos: kv_pos < q_pos, a=variant.scalar()
)
NOT_ONE = "a string"


def run(*arguments):
    return CliRunner().invoke(main, ["variant", *arguments])


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.needs_nvcc
@pytest.mark.parametrize("name", ["soft_cap", f"{__name__}:OWN"])
def test_every_stage(name, cache):
    made = run(name)
    assert made.exit_code == 0, made.output
    v = OWN if ":" in name else variant.soft_cap
    for part in (str(v), v.source().rstrip(), "causal=True, window_left=-1"):
        assert part in made.output
    rest = "kv_pos < q_pos" if ":" in name else "nothing"
    assert f"left of the mask, for kernels: {rest}" in made.output
    kernel = f"attention_bf16_h128_p16_v{v.digest}"
    ((size, spilled),) = re.findall(
        rf"{kernel}, sm_90a\n  ([\d.]+) KiB of code, 168 registers a thread at entry, (\d+) B spilled", made.output
    )
    built = cubins.build_one(kernel)
    assert float(size) == round(cubin_file.code_bytes(built.path.read_bytes(), kernel) / 1024, 1) > 50
    assert int(spilled) == built.resources.spill_bytes


def test_a_band_alone_needs_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    made = run("sliding_window")
    assert made.exit_code == 0 and "window_left=window" in made.output and "nothing is left for kernels" in made.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["softcap"], "no standard variant; did you mean 'soft_cap'. There are: full, causal"),
        (["no_such_module:x"], "cannot be imported: No module named 'no_such_module'"),
        ([f"{__name__}:nothing"], "cannot be imported"),
        ([f"{__name__}:NOT_ONE"], "is a str; it must be a tvm_infer.variant.Variant"),
        (["alibi", "--kernel", "append_b16"], "takes no variant; name an attention kernel"),
        (["alibi", "--kernel", "attention_bf16_h128_p3"], "is no kernel; did you mean"),
        (["alibi", "--arch", "sm_1"], "sm_1"),
    ],
)
def test_what_is_refused(arguments, words):
    made = CliRunner().invoke(main, ["variant", *arguments])
    assert made.exit_code == 1 and words in made.output and "Traceback" not in made.output

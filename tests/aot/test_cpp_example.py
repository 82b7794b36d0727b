"""examples/cpp: built here, run in an empty environment, where it must generate what Python generates."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from aot_cases import NEW_TOKENS, PROMPTS, tokens_of

import tvm_infer
from tvm_infer.runtime import linker

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and a C++ compiler"
)


def test_it_needs_no_python(program):
    out = subprocess.run(["readelf", "-d", str(program[0])], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", out))
    assert {"libtvm_ffi.so", "libtvm_runtime.so"} <= needed
    assert not [name for name in needed if "python" in name or "infer" in name or "compiler" in name]
    assert "RUNPATH" not in out and "RPATH" not in out


@pytest.mark.parametrize("page_size", [16, 5])
def test_tokens_are_python_s(generate, saved, tokens, page_size):
    """One prompt is longer than a step, so it comes in chunks while others decode already."""
    done = generate(saved, PROMPTS, "--max-new-tokens", NEW_TOKENS, "--page-size", page_size)
    assert tokens_of(done) == tokens
    assert done.stderr == ""


def test_a_stop_token_ends_a_sequence(generate, saved, executable, tokens):
    stop = tokens[1][3]
    expected = executable.generate(PROMPTS, max_new_tokens=NEW_TOKENS, stop_tokens=[stop])
    done = generate(saved, PROMPTS, "--max-new-tokens", NEW_TOKENS, "--stop", stop)
    assert tokens_of(done) == [g.tokens for g in expected]


def test_with_a_blas_of_the_caller_s(generate, executable, saved, tokens, tmp_path):
    from tvm_infer import blas

    executable.export_library(tmp_path / "model.so", include_blas=False)
    shutil.copy(saved / "model.safetensors", tmp_path)
    arguments = ("--max-new-tokens", NEW_TOKENS)
    without = generate(tmp_path, PROMPTS, *arguments)
    assert without.returncode == 1 and without.stdout == ""
    assert "generate: MissingDependencyError: matmul needs a BLAS library" in without.stderr
    assert "tvm_infer_set_blas(path, prefix)" in without.stderr
    given = generate(tmp_path, PROMPTS, *arguments, "--blas", blas.packaged_blas(), "--blas-prefix", "scipy_")
    assert tokens_of(given) == tokens


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", (), "has no prompts"),
        ("1 2\nthree\n", (), "line 2, is no list of token ids"),
        ("1 2\n\n", (), "line 2, is empty"),
        ("1 131\n", (), "has the token 131; the vocabulary is 0 to 130"),
        ("1 -1\n", (), "has the token -1"),
        ("1\n", ("--max-new-tokens", 0), "must be at least 1"),
        ("1\n", ("--beams", 2), "unknown option, or no value for it: --beams"),
        ("1\n", ("--stop",), "unknown option, or no value for it: --stop"),
        (
            "1\n",
            ("--blas", "/no/such.so"),
            "generate: ArgumentError: argument `path`: the BLAS library /no/such.so cannot be opened",
        ),
    ],
)
def test_bad_input(generate, saved, prompts, options, message):
    done = generate(saved, prompts, *options)
    assert done.returncode == 1 and done.stdout == "" and message in done.stderr


def test_bad_files(generate, saved, executable, tmp_path):
    assert (
        "has no function tvm_infer_model_manifest"
        in generate(executable._library_path.parent, "1\n", weights="manifest.json").stderr
    )
    shutil.copy(saved / "model.so", tmp_path)
    missing = generate(tmp_path, "1\n")
    assert missing.returncode == 1 and "cannot open" in missing.stderr
    data = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-64])
    assert "is not where it should be" in generate(tmp_path, "1\n").stderr
    mark = b'"tvm_infer.abi_version":"%d"' % executable.manifest.abi_version
    (tmp_path / "model.safetensors").write_bytes(data.replace(mark, mark[:-2] + b'7"'))
    assert "was written with tvm_infer ABI 7, the model has ABI" in generate(tmp_path, "1\n").stderr
    other = tmp_path / "other"
    other.mkdir()
    linker.link([], linker.Contents(manifest='{"format": 7}'), other / "model.so")
    assert "has a manifest of format 7; this program reads 2" in generate(other, "1\n").stderr


@pytest.mark.slow
def test_smollm2(generate, tmp_path, tmp_path_factory, monkeypatch):
    """The real model, 135 million parameters."""
    from tvm_infer.models import find_smollm2

    try:
        model = find_smollm2()
    except tvm_infer.errors.TvmInferError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path_factory.mktemp("smollm2")))
    executable = tvm_infer.compile(model)
    executable.save(tmp_path)
    prompts = [
        executable.tokenizer.encode(text) for text in ("The capital of France is", "Once upon a time", "1, 2, 3,")
    ]
    expected = [g.tokens for g in executable.generate(prompts, max_new_tokens=20)]
    assert tokens_of(generate(tmp_path, prompts, "--max-new-tokens", 20)) == expected


def test_a_model_that_leaves_the_rotation_to_its_cache(generate, tmp_path, tmp_path_factory, monkeypatch):
    """Of the nn.Module frontend (docs/nn-module.md): the manifest says by which frequencies."""
    import numpy as np

    from tvm_infer.bench.serve_models import TINY
    from tvm_infer.models.mlc_llama import export_llama

    monkeypatch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path_factory.mktemp("fused")))
    exported = export_llama(TINY, functions=("main", "create_paged_kv_cache"))
    rng = np.random.default_rng(0)
    params = {
        name: (np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
        for name, shape, _ in exported.weights
    }
    executable = tvm_infer.compile(exported.mod, params=params, max_tokens=32)
    executable.save(tmp_path)
    expected = [g.tokens for g in executable.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]
    assert tokens_of(generate(tmp_path, PROMPTS, "--max-new-tokens", NEW_TOKENS)) == expected

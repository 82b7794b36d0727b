"""A compiled model, its library and its weights, for all tests of this folder; and processes to run them in."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "cpp"
sys.path += [str(HERE), str(HERE.parent / "compile"), str(HERE.parent / "cuda")]


@pytest.fixture(scope="session")
def executable(tmp_path_factory):
    """The smallest compiled Llama; a step of it takes 32 tokens, fewer than one of the prompts has."""
    from llamas import tiny_llama

    import tvm_infer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVM_INFER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return tvm_infer.compile(tiny_llama(), max_tokens=32)


@pytest.fixture(scope="session")
def saved(executable, tmp_path_factory):
    """The folder of Executable.save: model.so and model.safetensors."""
    folder = tmp_path_factory.mktemp("saved")
    executable.save(folder)
    return folder


@pytest.fixture(scope="session")
def tokens(executable):
    """What the compiled model continues PROMPTS with."""
    from aot_cases import NEW_TOKENS, PROMPTS

    return [g.tokens for g in executable.generate(PROMPTS, max_new_tokens=NEW_TOKENS)]


@pytest.fixture
def run_python(tmp_path):
    """Run a script in a process of its own; what it printed."""

    def run(code: str, *arguments: object, **environment: str) -> str:
        script = tmp_path / "script.py"
        script.write_text(code)
        done = subprocess.run(
            [sys.executable, str(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """(the program, the LD_LIBRARY_PATH that build.sh says it needs)."""
    folder = tmp_path_factory.mktemp("example")
    done = subprocess.run(
        [str(EXAMPLE / "build.sh"), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (libraries,) = re.findall(r"^LD_LIBRARY_PATH=(\S+)", done.stdout, re.MULTILINE)
    return folder / "generate", libraries


@pytest.fixture
def generate(program, tmp_path):
    """Run the program on a folder's model in an empty environment, or one that has `environment` alone."""

    def run(
        folder, prompts, *options, model="model.so", weights="model.safetensors", **environment
    ) -> subprocess.CompletedProcess[str]:
        path, libraries = program
        text = prompts if isinstance(prompts, str) else "".join(" ".join(map(str, p)) + "\n" for p in prompts)
        (tmp_path / "prompts.txt").write_text(text)
        return subprocess.run(
            [str(path), str(folder / model), str(folder / weights), str(tmp_path / "prompts.txt"), *map(str, options)],
            capture_output=True,
            text=True,
            env={"LD_LIBRARY_PATH": libraries, **environment},  # nothing else: no PATH, no PYTHONPATH, no HOME
            check=False,
        )

    return run

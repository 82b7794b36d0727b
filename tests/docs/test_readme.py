"""The README and docs run: every python block is executed, every command and file they name exists."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

from tvm_infer import doctor

REPO = pathlib.Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def python_blocks() -> list[tuple[str, str]]:
    """(page:line, code) of each python block. A block under a comment line (<!-- name -->) has a test of its own."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if text[: match.start()].rstrip().endswith("-->"):
                continue
            found.append((f"{page.name}:{text[: match.start()].count(chr(10)) + 1}", match.group(1)))
    return found


@pytest.mark.parametrize(("where", "code"), python_blocks(), ids=[b[0] for b in python_blocks()])
def test_python_blocks_run(where, code, tmp_path):
    if where.startswith("jit.md") and doctor.nvcc().startswith("not usable"):
        pytest.skip(f"compiles kernels; nvcc is {doctor.nvcc()}")
    script = tmp_path / "block.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, f"{where}\n{done.stderr[-2000:]}"


def gpu_block() -> str:
    """The README's block for a GPU, which stands under a comment."""
    (code,) = re.findall(
        r"^<!-- needs a Hopper GPU.*-->\n```python\n(.*?)^```", PAGES[0].read_text(), re.MULTILINE | re.DOTALL
    )
    assert code.count('"cuda"') == 3
    return code


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gpu_block_computes_attention(device):
    """On a GPU, and on the CPU executor: the calls are the same."""
    torch = pytest.importorskip("torch")
    if device == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a Hopper GPU")
    values: dict = {}
    exec(compile(gpu_block().replace('"cuda"', f'"{device}"'), "README.md", "exec"), values)
    pages = values["kv_cache"][values["tables"]["kv_page_indices"][19:].long()]  # of request 1, whose keys are all new
    k, v = pages.permute(1, 2, 0, 3, 4).reshape(2, 8, 112, 128)[:, :, :100]
    assert torch.equal(k, values["k"][1:].transpose(0, 1)) and torch.equal(v, values["v"][1:].transpose(0, 1))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double()[None] for x in (values["q"][1:].transpose(0, 1), k, v)), is_causal=True, enable_gqa=True
    )
    assert (values["o"][1:].transpose(0, 1) - expected[0]).abs().max() < 0.02 and values["lse"].shape == (101, 32)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "script", ["examples/run.sh", "tests/run.sh", "tests/build.sh", "tests/lint.sh", ".ci/run", "examples/cpp/build.sh"]
)
def test_scripts_are_executable_and_parse(script):
    path = REPO / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_examples_have_help():
    for example in sorted((REPO / "examples").glob("*.py")):
        if "__main__" not in example.read_text():  # a part of another example
            continue
        done = subprocess.run(
            [sys.executable, str(example), "--help"], capture_output=True, text=True, check=False, cwd=REPO
        )
        assert done.returncode == 0 and "usage" in done.stdout.lower(), f"{example.name}\n{done.stderr[-2000:]}"


def test_the_first_example_runs(tmp_path):
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, str(REPO / "examples/01_packed_attention.py"), "--plot", str(tmp_path / "plan.png")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest difference from torch" in done.stdout
    assert (tmp_path / "plan.png").stat().st_size > 1000

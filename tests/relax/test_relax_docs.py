"""docs/relax.md shows what the pass does: its example is run."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

from tvm_infer.relax import RewritePagedAttention

DOC = pathlib.Path(__file__).parents[2] / "docs" / "relax.md"


def block(name: str) -> str:
    """The fenced block after <!-- name -->."""
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)\n```", DOC.read_text(), re.S)
    assert found, name
    return found.group(1)


def example(tmp_path):
    """The module of the first block; TVMScript reads its source from a file."""
    path = tmp_path / "relax_example.py"
    path.write_text(block("before"))
    spec = importlib.util.spec_from_file_location("relax_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["relax_example"] = module  # where TVMScript looks for it
    spec.loader.exec_module(module)
    return module.Module


def test_the_example_of_the_document_is_what_happens(tmp_path):
    rewrite = RewritePagedAttention()
    after = rewrite(example(tmp_path))
    script = after.script()
    assert script[script.index("@I.ir_module") :].strip() == block("after")
    assert str(rewrite.report) == block("report")

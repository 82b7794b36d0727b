"""docs/relax.md and docs/variants.md show what the pass does: their examples are run."""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys

import torch

from tvm_infer.relax import RewritePagedAttention, from_torch

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def block(name: str, document: str = "relax.md") -> str:
    """The fenced block after <!-- name -->."""
    found = re.search(rf"<!-- {name} -->\n```\w*\n(.*?)\n```", (DOCS / document).read_text(), re.S)
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


class Attend(torch.nn.Module):
    """The function of docs/variants.md as a layer."""

    def __init__(self) -> None:
        super().__init__()
        names: dict = {"torch": torch}
        exec(block("model", "variants.md"), names)
        self.attend = names["attend"]
        self.tokens = torch.nn.Embedding(9, 3 * 4 * 16)
        self.sinks = torch.nn.Parameter(torch.zeros(4))

    def forward(self, input_ids, position_ids):
        q, k, v = self.tokens(input_ids).view(1, -1, 12, 16).transpose(1, 2).split(4, dim=1)
        return self.attend(q, k, v, self.sinks)


def test_what_variants_md_says_is_found():
    n = torch.export.Dim("n", min=2, max=512)
    inputs = (torch.zeros(1, 7, dtype=torch.int64), torch.arange(7)[None])
    program = torch.export.export(Attend().eval(), inputs, dynamic_shapes=({1: n}, {1: n}))
    rewrite = RewritePagedAttention()
    rewrite(from_torch(program).mod)
    assert block("found", "variants.md") in str(rewrite.report)

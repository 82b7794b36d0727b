"""Logits as kernels compute them: from the bare q . k and sm_scale, with factors that are the same for all logits multiplied first.

A prefill kernel computes as many logits as the tensor cores leave time for: a multiplication a logit is 5 % of soft-capped attention.
"""

from __future__ import annotations

from collections.abc import Mapping

from .code import Builder, Code
from .operations import FLOAT
from .parameters import Parameter

# Arguments of the generated functions; no parameter can be called so.
SCORE, SCALE = "@score", "@scale"


class _Folder:
    """Rewrites (x * u) * v and (x * u) / v, with u and v the same for all logits, to x * (u * v) and x * (u / v)."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = parameters
        self.builder = Builder()
        self.uniform: dict[int, bool] = {}

    def add(self, op: str, kind: str, args: tuple[int, ...] = (), value: object = None) -> int:
        if kind == FLOAT and op in ("mul", "div"):
            x, v = args
            if op == "mul" and self.uniform[x] and not self.uniform[v]:
                x, v = v, x
            product = self.builder.nodes[x]
            if self.uniform[v] and not self.uniform[x] and product.op == "mul" and self.uniform[product.args[1]]:
                factor = self.add(op, FLOAT, (product.args[1], v))
                return self.add("mul", FLOAT, (product.args[0], factor))
            args = (x, v)
        at = self.builder.add(op, kind, args, value)
        is_uniform = op == "const" or (op == "name" and (value == SCALE or value in self.parameters))
        self.uniform[at] = is_uniform or (op not in ("load", "name") and all(self.uniform[a] for a in args))
        return at


def of_score(code: Code, parameters: Mapping[str, Parameter]) -> Code:
    """The logits over `score` and `scale` in place of `value`, their product."""
    folder, at = _Folder(parameters), list[int]()
    for node in code.nodes:
        if node.op == "name" and node.value == "value":
            score, scale = (folder.add("name", FLOAT, (), name) for name in (SCORE, SCALE))
            at.append(folder.add("mul", FLOAT, (score, scale)))
        else:
            at.append(folder.add(node.op, node.kind, tuple(at[i] for i in node.args), node.value))
    return folder.builder.code(at[-1])


def reads_by_key_of(code: Code) -> bool:
    """Whether an index of a table depends on kv_pos."""
    depends: list[bool] = []
    for node in code.nodes:
        own = node.op == "name" and node.value == "kv_pos"
        of_args = any(depends[i] for i in node.args)
        if node.op == "load" and of_args:
            return True
        depends.append(own or of_args)
    return False

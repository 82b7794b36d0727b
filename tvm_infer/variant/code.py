"""A traced expression as a flat list, each node after its operands: what is printed, lowered, evaluated, compared and stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import VariantError
from .operations import BOOL, FLOAT, INT, OF_TIR, OPERATIONS
from .parameters import KIND_OF_VARIABLE, VARIABLES, Parameter


class Node(NamedTuple):
    """One value.

    op : a row of OPERATIONS; or "const" (value: the number), "name" (value: a variable's or scalar's name) or "load" (value: a
    table's name, args: its indices). kind : float32, int32 or bool. args : positions of the operands in the list.
    """

    op: str
    kind: str
    args: tuple[int, ...] = ()
    value: str | float | int | bool | None = None


class Code(NamedTuple):
    """An expression: the last node is its value. No node is there twice, and none without use."""

    nodes: tuple[Node, ...]

    @property
    def kind(self) -> str:
        """float32, int32 or bool."""
        return self.nodes[-1].kind

    @property
    def names(self) -> set[str]:
        """Variables and parameters that it reads."""
        return {str(node.value) for node in self.nodes if node.op in ("name", "load")}


class Builder:
    """Collects nodes, each once."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._at: dict[tuple[Any, ...], int] = {}

    def add(self, op: str, kind: str, args: tuple[int, ...] = (), value: Any = None) -> int:
        """The position of the node, appended if it is new."""
        node = Node(op, kind, args, value)
        key = (*node, repr(value))  # -0.0 is not 0.0
        if key not in self._at:
            self._at[key] = len(self.nodes)
            self.nodes.append(node)
        return self._at[key]

    def insert(self, code: Code, value: int | None = None) -> int:
        """The position of `code`'s result, its nodes appended; the variable `value` stands for the node at that position, if given."""
        at: list[int] = []
        for node in code.nodes:
            if node.op == "name" and node.value == "value" and value is not None:
                at.append(value)
            else:
                at.append(self.add(node.op, node.kind, tuple(at[i] for i in node.args), node.value))
        return at[-1]

    def conjunction(self, codes: Sequence[Code]) -> int:
        """The position of the conjunction of conditions, each stated once."""
        result = None
        for at in dict.fromkeys(self.insert(code) for code in codes):
            result = at if result is None else self.add("and", BOOL, (result, at))
        assert result is not None, "a conjunction of something"
        return result

    def code(self, result: int) -> Code:
        """The expression whose value is the node at `result`, without nodes that it does not need."""
        needed = {result}
        for i in range(result, -1, -1):
            if i in needed:
                needed.update(self.nodes[i].args)
        place = {old: new for new, old in enumerate(sorted(needed))}
        return Code(
            tuple(self.nodes[i]._replace(args=tuple(place[a] for a in self.nodes[i].args)) for i in sorted(needed))
        )


def compose(first: Code, then: Code) -> Code:
    """`then` with `first` as its `value`."""
    builder = Builder()
    return builder.code(builder.insert(then, builder.insert(first)))


def conjunction(codes: Sequence[Code]) -> Code:
    """All of the conditions."""
    builder = Builder()
    return builder.code(builder.conjunction(codes))


def conjuncts(code: Code) -> list[Code]:
    """The conditions that a condition is the conjunction of, in order."""
    builder = Builder()
    pending, found = [builder.insert(code)], []
    while pending:
        at = pending.pop()
        if builder.nodes[at].op == "and":
            pending += reversed(builder.nodes[at].args)
        else:
            found.append(builder.code(at))
    return found


def of_tir(expression: Any) -> Code:
    """The flat form of a TIR expression that tracing made."""
    builder = Builder()
    at: dict[int, int] = {}  # by object: TIR shares what the user's function shares
    pending = [expression]
    while pending:
        tir = pending[-1]
        op, operands, value = _parts(tir)
        missing = [x for x in operands if _key(x) not in at]
        if missing:
            pending += reversed(missing)
            continue
        pending.pop()
        at[_key(tir)] = builder.add(op, _kind(tir), tuple(at[_key(x)] for x in operands), value)
    return builder.code(at[_key(expression)])


def _key(tir: Any) -> int:
    return int(tir.__chandle__())


def _kind(tir: Any) -> str:
    dtype = str(tir.ty)
    return {"float16": FLOAT, "bfloat16": FLOAT, "uint8": INT}.get(dtype, dtype)


def _parts(tir: Any) -> tuple[str, list[Any], Any]:
    """Operation, operands and value of a TIR node."""
    name = type(tir).__name__
    if name == "Var":
        return "name", [], str(tir.name)
    if name == "IntImm":
        return "const", [], bool(tir.value) if str(tir.ty) == BOOL else int(tir.value)
    if name == "FloatImm":
        return "const", [], float(tir.value)
    if name == "TensorLoad":
        return "load", list(tir.indices), str(tir.source.name)
    if name == "Cast":
        operand = tir.value
        if type(operand).__name__ == "TensorLoad" and str(operand.ty) != _kind(operand):
            # half precision and bytes: the load converts
            return "load", list(operand.indices), str(operand.source.name)
        return ("to_float" if str(tir.ty) == FLOAT else "to_int"), [operand], None
    if name == "Call":
        return OF_TIR[tir.op.name.rpartition(".")[2]].name, list(tir.args), None
    if name == "Select":
        return "select", [tir.condition, tir.true_value, tir.false_value], None
    return OF_TIR[name].name, [tir.a] if name in ("Not", "BitwiseNot") else [tir.a, tir.b], None


def to_tir(code: Code, parameters: Mapping[str, Parameter], leaves: dict[str, Any] | None = None) -> Any:
    """The TIR expression of flat code: variables and scalars are tirx.Var of their names, tables buffers of theirs.

    leaves : traced variables to use, by name; those that are made are added.
    """
    from .expression import Expr, apply, lift
    from .table import Table
    from .trace import variable

    leaves = {} if leaves is None else leaves
    made: list[Expr] = []
    for node in code.nodes:
        args = [made[i] for i in node.args]
        name = str(node.value)
        if node.op == "const":
            made.append(lift(node.value))
        elif node.op == "name":
            if name not in leaves:
                leaves[name] = variable(name, node.kind)
            made.append(leaves[name])
        elif node.op == "load":
            if name not in leaves:
                leaves[name] = Table(name, parameters[name])
            made.append(leaves[name][tuple(args)])
        else:
            made.append(apply(node.op, *args))
    return made[-1].tir


def to_list(code: Code) -> list[list[Any]]:
    """For JSON: [op, kind, args] and value where there is one. Infinities are strings, which JSON lacks."""
    rows = []
    for node in code.nodes:
        row: list[Any] = [node.op, node.kind, list(node.args)]
        if node.value is not None:
            is_infinite = isinstance(node.value, float) and node.value in (float("inf"), float("-inf"))
            row.append(str(node.value) if is_infinite else node.value)
        rows.append(row)
    return rows


def from_list(rows: Any, hole: str, parameters: Mapping[str, Parameter]) -> Code:
    """The inverse of :func:`to_list`. Raises VariantError for what is no expression of `hole`."""
    builder = Builder()
    at: list[int] = []
    try:
        for op, kind, args, *rest in rows:
            if any(not 0 <= a < len(at) for a in args):
                raise VariantError(f"hole `{hole}` holds a node whose operands do not come before it: {[op, args]}")
            operands = tuple(at[a] for a in args)
            value = _checked(op, kind, [builder.nodes[a].kind for a in operands], rest, hole, parameters)
            at.append(builder.add(op, kind, operands, value))
        return builder.code(at[-1])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        if isinstance(error, VariantError):
            raise
        raise VariantError(f"hole `{hole}` is no list of nodes as Variant.to_json writes them: {error}") from error


def _checked(
    op: str, kind: str, operands: list[str], rest: list[Any], hole: str, parameters: Mapping[str, Parameter]
) -> Any:
    """The value of a stored node; raises where the node could not have been traced."""
    value = rest[0] if rest else None
    if op == "const":
        value = {FLOAT: float, INT: int, BOOL: bool}[kind](value)
        good = True
    elif op == "load":
        p = parameters[str(value)]
        good = not p.is_scalar and p.kind == kind and operands == [INT] * p.rank
    elif op == "name":
        name = str(value)
        if name in parameters:
            good = parameters[name].is_scalar and parameters[name].kind == kind
        else:
            good = name in VARIABLES[hole] and KIND_OF_VARIABLE[name] == kind
    else:
        good = OPERATIONS[op].signatures.get(tuple(operands)) == kind
    if not good:
        raise VariantError(f"hole `{hole}` holds a node that no function makes: {[op, kind, operands, *rest]}")
    return value

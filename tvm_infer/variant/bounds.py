"""What a condition says of a key's position beside the query's, found by TVM's arithmetic: distances, chunks, first keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .code import Builder, Code, of_tir, to_tir
from .conditions import SWAPPED, conjuncts
from .expression import Expr
from .operations import INT, OPERATIONS
from .parameters import Parameter

_MOST = 2**30  # a scalar's values, to tell the sign of a width
_OF_QUERY, _OF_KEY = "@q_chunk", "@kv_chunk"  # the chunk that a position is in


class Bounds(NamedTuple):
    """What a condition implies. Widths, sizes and counts are integers of constants and scalars.

    left : q_pos - kv_pos <= left. right : kv_pos - q_pos <= right. chunk : the size of chunks of positions; with starts_in_chunk the
    key's is the query's or a later one, with ends_in_chunk the query's or an earlier one. first : kv_pos < first. is_exact : it says
    no more than `left` or `right`. hides_own : `left` or `right` is negative for any scalars from 1 on.
    """

    left: Code | None = None
    right: Code | None = None
    chunk: Code | None = None
    starts_in_chunk: bool = False
    ends_in_chunk: bool = False
    first: Code | None = None
    is_exact: bool = False
    hides_own: bool = False


class Recogniser:
    """Of the conditions of one mask.

    parameters : the variant's. leaves : traced variables by name, q_pos and kv_pos among them, and parameters, that the conditions are
    made of.
    """

    def __init__(self, parameters: Mapping[str, Parameter], leaves: Mapping[str, Any]) -> None:
        self.parameters = parameters
        self.leaves = dict(leaves)
        self.scalars = {name for name, p in parameters.items() if p.is_scalar and p.dtype == INT}
        self.q_pos: Expr = leaves["q_pos"]
        self.kv_pos: Expr = leaves["kv_pos"]

    def of_condition(self, tir: Any) -> Bounds:
        """What one comparison implies."""
        relation = _as_at_most_zero(tir)
        if relation is None:
            return Bounds()
        found = self._linear(*relation)
        return found if found != Bounds() else self._chunked(tir)

    def of_all(self, tir: Any) -> list[Bounds]:
        """What the conjuncts of a condition imply, each for itself."""
        return [self.of_condition(part) for part in conjuncts(tir)]

    def _linear(self, difference: Any, is_equal: bool) -> Bounds:
        """`difference` <= 0, or == 0, where it is slope * kv_pos - slope * q_pos + base, or slope * kv_pos + base."""
        from tvm import sym, tirx

        analyzer = sym.Analyzer()
        linear = sym.detect_linear_equation(analyzer.simplify(difference), [self.q_pos.tir, self.kv_pos.tir])
        coefficients = [analyzer.simplify(x) for x in linear]
        if len(coefficients) != 3 or any(type(x).__name__ != "IntImm" for x in coefficients[:2]):
            return Bounds()
        of_query, slope = (int(x.value) for x in coefficients[:2])
        base = coefficients[2]
        if is_equal and slope < 0:
            of_query, slope, base = -of_query, -slope, tirx.Sub(tirx.IntImm(INT, 0), base)
        if slope == 0 or of_query not in (0, -slope):
            return Bounds()
        limit = analyzer.simplify(tirx.FloorDiv(tirx.Sub(tirx.IntImm(INT, 0), base), tirx.IntImm(INT, abs(slope))))
        if of_query == 0:  # kv_pos <= limit, or kv_pos >= -limit
            is_first = slope > 0
            return Bounds(first=self._integer(analyzer.simplify(limit + 1)) if is_first else None)
        width = self._integer(limit)
        if is_equal or width is None:
            return Bounds()
        hides_own = self._is_negative(limit)
        if slope > 0:
            return Bounds(right=width, is_exact=True, hides_own=hides_own)
        return Bounds(left=width, is_exact=True, hides_own=hides_own)

    def _is_negative(self, tir: Any) -> bool:
        from tvm import ir, sym

        analyzer = sym.Analyzer()
        for name in self.scalars & self.leaves.keys():
            analyzer.bind(self.leaves[name].tir, ir.Range.from_min_extent(1, _MOST))
        return int(analyzer.const_int_bound(tir).max_value) < 0

    def _chunked(self, tir: Any) -> Bounds:
        """The same of floor(q_pos / size) and floor(kv_pos / size)."""
        from tvm import sym

        code, size = _with_chunks(of_tir(tir))
        if size is None or not self._is_of_scalars(size):
            return Bounds()
        leaves = dict(self.leaves)
        chunked = to_tir(code, self.parameters, leaves)
        relation = _as_at_most_zero(chunked)
        assert relation is not None, "still a comparison of integers"
        difference, is_equal = relation
        analyzer, of_size = sym.Analyzer(), Expr(to_tir(size, self.parameters, leaves), INT)

        def is_any(*expressions: Expr) -> bool:
            return any(analyzer.can_prove_equal(difference, x.tir) for x in expressions)

        starts = ends = False
        if _OF_QUERY in leaves:
            query = leaves[_OF_QUERY]
            if _is_positive(size):
                starts = is_any(query * of_size - self.kv_pos)
                ends = is_any(self.kv_pos - query * of_size - of_size + 1)
            if _OF_KEY in leaves:
                later = leaves[_OF_KEY] - query
                starts |= is_any(-later) or (_is_positive(size) and is_any(-later * of_size))
                ends |= is_any(later) or (_is_positive(size) and is_any(later * of_size))
                if is_equal:
                    starts = ends = starts or ends
        return Bounds(chunk=size, starts_in_chunk=starts, ends_in_chunk=ends) if starts or ends else Bounds()

    def _integer(self, tir: Any) -> Code | None:
        """The code of an integer of constants and scalars; None for what is none, or what the simplifier made foreign operations of."""
        try:
            code = of_tir(tir)
        except KeyError:
            return None
        for node in code.nodes:
            kinds = tuple(code.nodes[a].kind for a in node.args)
            if node.op in OPERATIONS and OPERATIONS[node.op].signatures.get(kinds) != node.kind:
                return None
        return code if self._is_of_scalars(code) else None

    def _is_of_scalars(self, code: Code) -> bool:
        return code.names <= self.scalars and all(node.op != "load" for node in code.nodes)


def constant_of(code: Code) -> int | None:
    """Its value, where it is a constant."""
    (*others, node) = code.nodes
    return node.value if not others and node.op == "const" and isinstance(node.value, int) else None


def _as_at_most_zero(tir: Any) -> tuple[Any, bool] | None:
    """(difference, whether it is == 0 instead of <= 0) for a comparison of integers; None for anything else."""
    from tvm import tirx

    name = type(tir).__name__
    if name not in (*SWAPPED, "EQ") or str(tir.a.ty) != INT:
        return None
    if name == "EQ":
        return tirx.Sub(tir.a, tir.b), True
    low, high = (tir.a, tir.b) if name in ("LT", "LE") else (tir.b, tir.a)
    difference = tirx.Sub(low, high)
    return (difference if name in ("LE", "GE") else tirx.Add(difference, tirx.IntImm(INT, 1))), False


def _is_positive(size: Code) -> bool:
    """Whether a divisor is at least 1: constants and scalars are, or they are refused. Others divide as 1 below it, but multiply as
    they are."""
    return len(size.nodes) == 1


def _with_chunks(code: Code) -> tuple[Code, Code | None]:
    """`code` with names for the chunks of q_pos and kv_pos, and their size; None where there are no chunks, or of several sizes.

    x % n becomes x - x // n * n first, x >> n a division.
    """
    builder, at = Builder(), list[int]()
    sizes = set[Code]()

    def chunk(x: int, size: int) -> int:
        node = builder.nodes[x]
        names = {"q_pos": _OF_QUERY, "kv_pos": _OF_KEY}
        if node.op != "name" or node.value not in names:
            return builder.add("floordiv", INT, (x, size))
        sizes.add(builder.code(size))
        return builder.add("name", INT, (), names[str(node.value)])

    for node in code.nodes:
        args = tuple(at[i] for i in node.args)
        shift = builder.nodes[args[1]] if node.op == "shr" else None
        if node.op == "floordiv":
            at.append(chunk(*args))
        elif node.op == "mod":
            x, size = args
            if not _is_positive(builder.code(size)):
                at.append(builder.add("mod", INT, args))
                continue
            whole = builder.add("mul", INT, (chunk(x, size), size))
            at.append(builder.add("sub", INT, (x, whole)))
        elif shift is not None and shift.op == "const" and isinstance(shift.value, int) and 0 <= shift.value <= 30:
            at.append(chunk(args[0], builder.add("const", INT, (), 1 << shift.value)))
        else:
            at.append(builder.add(node.op, node.kind, args, node.value))
    return builder.code(at[-1]), sizes.pop() if len(sizes) == 1 else None

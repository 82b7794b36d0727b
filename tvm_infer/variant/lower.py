"""From flat code to the C++ struct that kernels and the CPU executor are compiled with (cuda_src/tvm_infer/variant/variant.h)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .code import Code, Node
from .operations import BOOL, FLOAT, INT, OPERATIONS
from .parameters import OF_A_REQUEST, POSITIONS, Parameter
from .score import SCALE, SCORE, of_score, reads_by_key_of
from .sees_all import FIRST, LAST, sees_all
from .text import number

Signature = tuple[str, str, tuple[tuple[str, str], ...]]

_TYPES = {FLOAT: "float", INT: "int32_t", BOOL: "bool"}
_LOADS = {
    "float32": "LoadFp32({})",
    "float16": "LoadFp16({})",
    "bfloat16": "LoadBf16({})",
    "int32": "LoadInt32({})",
    "uint8": "LoadUint8({})",
    "bool": "LoadUint8({}) != 0",
}
_NAMESPACE = "tvm_infer::variant"
# hole -> result, name of the function, its arguments: type and name, as variant.h documents them
_ARGS, _ROW = (f"const {_NAMESPACE}::Args&", "p"), (f"const {_NAMESPACE}::Row&", "row")
_FUNCTIONS: dict[str, Signature] = {
    "logits": ("float", "Logits", (_ARGS, _ROW, ("int32_t", "kv_pos"), ("float", SCORE[1:]), ("float", SCALE[1:]))),
    "mask": ("bool", "Mask", (_ARGS, _ROW, ("int32_t", "kv_pos"))),
    "output": ("float", "Output", (_ARGS, _ROW, ("float", "lse"), ("float", "value"))),
}
_ELEMENT = (("int32_t", "channel"), ("float", "mean_square"), ("float", "value"))
_TURNING: dict[str, Signature] = {
    "query": ("float", "Query", (_ARGS, _ROW, *_ELEMENT)),
    "key": ("float", "Key", (_ARGS, _ROW, ("int32_t", "kv_pos"), *_ELEMENT)),
    "rope_rate": ("float", "Rate", (_ARGS, _ROW, ("int32_t", "pair"))),
    "rope_position": ("int32_t", "Position", (_ARGS, _ROW, ("int32_t", "pos"))),
}
_SEES_ALL = ("bool", "SeesAll", (_ARGS, _ROW, ("int32_t", FIRST[1:]), ("int32_t", LAST[1:])))
_NEVER = Code((Node("const", BOOL, (), False),))


@dataclass(frozen=True)
class Settings:
    """What a variant is besides its functions.

    softmax : whether logits go through it; else they are the weights. interleaved : pairs are channels 2i and 2i + 1, else i and
    i + rotary_dim / 2. rotary_dim : the channels that turn, from the first on; 0 for all.
    """

    softmax: bool = True
    interleaved: bool = False
    rotary_dim: int = 0


class Struct(NamedTuple):
    """The generated struct. digest : 16 hex digits of its body, in which no name of the user's is."""

    digest: str
    source: str

    @property
    def name(self) -> str:
        """Of the struct."""
        return f"variant_{self.digest}"


_PLAIN = Settings()


def takes_shared_keys(holes: Mapping[str, Code | None]) -> bool:
    """Whether rows of several requests may go against keys that these share: of a row nothing counts but its heads and position.

    Masks that no band says, and rotations, are left out: kernels would tell rows apart in registers that they do not have. An `output`
    is computed row by row, whatever it reads.
    """
    is_bare = holes.get("mask") is None and holes.get("rope_rate") is None
    return is_bare and not _reads(holes, ("logits", "query", "key"), OF_A_REQUEST)


def _reads(holes: Mapping[str, Code | None], names: Iterable[str], variables: Iterable[str]) -> bool:
    codes = [holes.get(name) for name in names]
    return any(code is not None and not code.names.isdisjoint(variables) for code in codes)


def lower(
    holes: Mapping[str, Code | None],
    parameters: Mapping[str, Parameter],
    settings: Settings = _PLAIN,
    *,
    has_small_logits: bool = False,
) -> Struct:
    """The struct of a variant whose holes are filled with `holes`; parameters are numbered in the order of their declaration.

    has_small_logits : see interval.py.
    """
    present = {hole: code for hole, code in holes.items() if code is not None}
    reads_by_key = any(reads_by_key_of(present[hole]) for hole in ("logits", "mask") if hole in present)
    if not settings.softmax and "logits" not in present:
        present["logits"] = Code((Node("name", FLOAT, (), "value"),))
    flags = ", ".join(f"kHas{hole.capitalize()} = {'true' if hole in present else 'false'}" for hole in _FUNCTIONS)
    if "logits" in present:
        present["logits"] = of_score(present["logits"], parameters)
    numbers = _numbers(parameters)
    body = "".join(
        [
            f"  static constexpr bool {flags}, kReadsByKey = {'true' if reads_by_key else 'false'};\n",
            *_settings(present, settings),
            *(["  static constexpr bool kHasSmallLogits = true;\n"] if has_small_logits else []),
            *(
                _function(signature, present[hole], parameters, numbers)
                for hole, signature in (_FUNCTIONS | _TURNING).items()
                if hole in present
            ),
            *(
                _function(_SEES_ALL, sees_all(mask) or _NEVER, parameters, numbers)
                for mask in [present.get("mask")]
                if mask
            ),
        ]
    )
    digest = hashlib.sha256(body.encode()).hexdigest()[:16]
    return Struct(digest, f"struct variant_{digest} : {_NAMESPACE}::Defaults {{\n{body}}};\n")


def _settings(present: Mapping[str, Code], settings: Settings) -> list[str]:
    """Members that differ from those of variant.h's Defaults."""
    flags = [f"kHas{signature[1]}" for hole, signature in _TURNING.items() if hole in present]
    flags += [
        f"k{hole.capitalize()}NeedsSquare"
        for hole in ("query", "key")
        if hole in present and "mean_square" in present[hole].names
    ]
    flags += ["kIsInterleaved"] if settings.interleaved else []
    takes_shared = takes_shared_keys(present)
    flags += ["kReadsPosition"] if takes_shared and _reads(present, ("logits", "query"), ("q_pos",)) else []
    lines = [f"  static constexpr bool {', '.join(f'{flag} = true' for flag in flags)};\n"] if flags else []
    lines += ["  static constexpr bool kHasSoftmax = false;\n"] if not settings.softmax else []
    lines += ["  static constexpr bool kTakesSharedKeys = false;\n"] if not takes_shared else []
    lines += [f"  static constexpr int kRotaryDim = {settings.rotary_dim};\n"] if settings.rotary_dim else []
    return lines


def _numbers(parameters: Mapping[str, Parameter]) -> dict[str, int]:
    """Name -> place among the scalars, or among the tables."""
    scalars = [name for name, p in parameters.items() if p.is_scalar]
    tables = [name for name, p in parameters.items() if not p.is_scalar]
    return {name: i for names in (scalars, tables) for i, name in enumerate(names)}


def _function(signature: Signature, code: Code, parameters: Mapping[str, Parameter], numbers: Mapping[str, int]) -> str:
    values: list[str] = []
    lines: list[str] = []
    for node in code.nodes:
        text = _value(node, values, parameters, numbers)
        if node.op not in ("const", "name"):
            lines.append(f"    const {_TYPES[node.kind]} t{len(lines)} = {text};\n")
            text = f"t{len(lines) - 1}"
        values.append(text)
    result, name, arguments = signature
    # What the expression does not use goes without a name: an unused argument is a warning.
    used = _used(code, parameters)
    declared = ", ".join(f"{kind} {argument}" if argument in used else kind for kind, argument in arguments)
    using = f"    using namespace {_NAMESPACE};\n" if lines else ""
    return f"  TVM_INFER_VARIANT static {result} {name}({declared}) {{\n{using}{''.join(lines)}    return {values[-1]};\n  }}\n"


def _used(code: Code, parameters: Mapping[str, Parameter]) -> set[str]:
    used = set()
    for name in code.names:
        if name.startswith("@"):
            used.add(name[1:])
        elif name in parameters:
            used.add("p")
        elif name in POSITIONS and name != "kv_pos":
            used.add("row")
        else:
            used.add(name)
    return used


def _value(node: Node, values: list[str], parameters: Mapping[str, Parameter], numbers: Mapping[str, int]) -> str:
    args = [values[i] for i in node.args]
    name = str(node.value)
    if node.op == "const":
        return _constant(node)
    if node.op == "name":
        if name.startswith("@"):
            return name[1:]
        if name in parameters:
            return f"p.{'Float' if node.kind == FLOAT else 'Int'}({numbers[name]})"
        return f"row.{name}" if name in POSITIONS and name != "kv_pos" else name
    if node.op == "load":
        table = f"p.tables[{numbers[name]}]"
        at = " + ".join(f"static_cast<int64_t>({x}) * {table}.strides[{d}]" for d, x in enumerate(args))
        return _LOADS[parameters[name].dtype].format(f"{table}, {at}")
    if node.op in ("floordiv", "mod"):
        args[1] = _divisor(args[1])
    return OPERATIONS[node.op].cpp.format(*args)


def _divisor(text: str) -> str:
    """A divisor of at least 1. Constants and scalars were checked, when they were traced and bound."""
    return text if (text.isdecimal() and int(text) > 0) or text.startswith("p.Int(") else f"Max({text}, 1)"


def _constant(node: Node) -> str:
    assert isinstance(node.value, (int, float))
    if node.kind == BOOL:
        return "true" if node.value else "false"
    if node.kind == INT:
        if node.value == -(2**31):
            return "INT32_MIN"  # the literal would be a long
        return f"({node.value})" if node.value < 0 else str(node.value)
    if node.value in (float("inf"), float("-inf")):
        return "__builtin_huge_valf()" if node.value > 0 else "(-__builtin_huge_valf())"
    text = f"{number(node.value, FLOAT)}f"
    return f"({text})" if text.startswith("-") else text

"""The evaluator against numpy: what it says an element is, is what the element is."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, sym, tirx

from tvm_infer.relax.movement import reshape_index
from tvm_infer.relax.nodes import bindings_of, int_imm, static_int
from tvm_infer.relax.printer import format_expr
from tvm_infer.relax.scalars import constant_value, substitute
from tvm_infer.relax.symbolic import Evaluator, TooComplexError


def function(inputs, write):
    """(evaluator, result variable, parameters) of a function of `inputs` (name -> shape) that `write(emit, *params)` writes."""
    builder = relax.BlockBuilder()
    params = [relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in inputs.items()]
    with builder.function("main", params):
        with builder.dataflow():
            output = builder.emit_output(write(builder.emit, *params))
        builder.emit_func_output(output)
    func = builder.get()["main"]
    return Evaluator({binding.var: binding.value for binding in bindings_of(func)}), func.body.body, func.params


def factorizations(size):
    """Every way to write a small number as a product of up to 4 factors, in order."""
    found = [()] if size == 1 else []
    for first in range(2, size + 1):
        if size % first == 0:
            found += [(first, *rest) for rest in factorizations(size // first)]
    return [shape for shape in found if len(shape) <= 4]


@st.composite
def movements(draw):
    """A shape and a chain of data movements: (name, argument)."""
    shape = list(draw(st.sampled_from(factorizations(24))))
    start, steps = tuple(shape), []
    for _ in range(draw(st.integers(1, 5))):
        name = draw(st.sampled_from(["reshape", "permute", "expand", "slice", "repeat"]))
        if name == "reshape":
            shape = list(draw(st.sampled_from(factorizations(math.prod(shape)))) or [1])
            steps.append(("reshape", tuple(shape)))
        elif name == "permute":
            axes = draw(st.permutations(range(len(shape))))
            shape = [shape[axis] for axis in axes]
            steps.append(("permute", tuple(axes)))
        elif name == "expand" and math.prod(shape) <= 48:
            axis, times = draw(st.integers(0, len(shape))), draw(st.integers(1, 3))
            shape.insert(axis, times)
            steps.append(("expand", (axis, tuple(shape))))
        elif name == "slice" and shape:
            axis = draw(st.integers(0, len(shape) - 1))
            begin = draw(st.integers(0, shape[axis] - 1))
            end = draw(st.integers(begin + 1, shape[axis]))
            shape[axis] = end - begin
            steps.append(("slice", (axis, begin, end)))
        elif name == "repeat" and shape and math.prod(shape) <= 48:
            axis = draw(st.integers(0, len(shape) - 1))
            shape[axis] *= 2
            steps.append(("repeat", axis))
    return start, steps


def apply_numpy(x, steps):
    for name, argument in steps:
        if name == "reshape":
            x = x.reshape(argument)
        elif name == "permute":
            x = x.transpose(argument)
        elif name == "expand":
            x = np.broadcast_to(np.expand_dims(x, argument[0]), argument[1])
        elif name == "slice":
            axis, begin, end = argument
            x = x[(slice(None),) * axis + (slice(begin, end),)]
        else:
            x = np.repeat(x, 2, axis=argument)
    return x


def apply_relax(emit, x, steps):
    op = relax.op
    for name, argument in steps:
        if name == "reshape":
            x = emit(op.reshape(x, list(argument)))
        elif name == "permute":
            x = emit(op.permute_dims(x, list(argument)))
        elif name == "expand":
            x = emit(op.broadcast_to(emit(op.expand_dims(x, [argument[0]])), list(argument[1])))
        elif name == "slice":
            x = emit(op.strided_slice(x, [argument[0]], [argument[1]], [argument[2]]))
        else:
            x = emit(op.repeat(x, 2, axis=argument))
    return x


@settings(max_examples=60)
@given(movements())
def test_data_movement_is_index_arithmetic(case):
    """For every element of the result: the index that the evaluator gives holds, in numpy, the same number."""
    shape, steps = case
    data = np.arange(math.prod(shape)).reshape(shape)
    wanted = apply_numpy(data, steps)
    evaluator, result, (x,) = function(
        {"x": (list(shape), "float32")}, lambda emit, x: apply_relax(emit, emit(relax.op.negative(x)), steps)
    )
    symbolic = [evaluator.bind(f"i{axis}", int_imm(dim)) for axis, dim in enumerate(wanted.shape)]
    *_, view = evaluator.views(result, symbolic)
    assert view.tensor.same_as(x) and view.factor == -1.0
    analyzer = sym.Analyzer()
    for position in np.ndindex(wanted.shape):
        values = dict(zip(symbolic, map(int_imm, position), strict=True))
        index = tuple(static_int(analyzer.simplify(substitute(part, values))) for part in view.index)
        assert data[index] == wanted[position]


def test_symbolic_lengths_never_enter_a_division():
    """[1, n, 24] -> [1, n, 3, 8] -> [n, 24]: n stands alone in every run of dimensions."""
    n = tirx.Var("n", "int64")
    evaluator = Evaluator({})
    i, c = evaluator.bind("i", n), evaluator.bind("c", int_imm(24))
    index = reshape_index(evaluator, (1, n, 3, 8), (n, 24), (i, c))
    assert [format_expr(part) for part in index] == ["0", "i", "c // 8", "c % 8"]
    flat = reshape_index(evaluator, (3, n), (n * 3,), (evaluator.bind("x", n * 3),))
    assert flat is not None and "//" in format_expr(flat[0]), "a run that mixes n in is written out, not simplified"


@pytest.mark.parametrize(
    "write, shape, dtype, text",
    [
        (
            lambda op, x: op.add(op.multiply(x, relax.const(2.0)), relax.const(1.0)),
            [4, 5],
            "float32",
            "x[i, j] * 2 + 1",
        ),
        (lambda op, x: op.tril(x), [4, 5], "float32", "where(j - i <= 0, x[i, j], 0)"),
        (lambda op, x: op.triu(x, 1), [4, 5], "float32", "where(1 <= j - i, x[i, j], 0)"),
        (
            lambda op, x: op.concat([x, op.negative(x)], axis=1),
            [4, 5],
            "float32",
            "where(j < 5, x[i, j], x[i, j - 5] * -1)",
        ),
        (lambda op, x: op.clip(x, -1, 1), [4, 5], "float32", "min(max(x[i, j], -1), 1)"),
        (lambda op, x: op.logical_not(op.less(x, relax.const(3, "int32"))), [4, 5], "int32", "not (x[i, j] < 3)"),
        (lambda op, x: op.max(x, axis=[1], keepdims=True), [4, 5], "float32", "max(x[i, …])"),
        (
            lambda op, x: op.where(op.equal(x, x), op.tanh(x), op.zeros_like(x)),
            [4, 5],
            "float32",
            "where(x[i, j] == x[i, j], tanh(x[i, j]), 0)",
        ),
    ],
)
def test_elements_read_as_written(write, shape, dtype, text):
    evaluator, result, _ = function({"x": (shape, dtype)}, lambda emit, x: emit(write(relax.op, x)))
    i, j = evaluator.bind("i", int_imm(4)), evaluator.bind("j", int_imm(10))
    assert format_expr(evaluator.element(result, (i, j)), evaluator) == text


def test_an_atom_is_one_variable_however_often_it_is_met():
    evaluator, result, _ = function(
        {"x": ([4], "float32")}, lambda emit, x: emit(relax.op.add(x, relax.op.multiply(x, x)))
    )
    evaluator.element(result, (evaluator.bind("i", int_imm(4)),))
    assert [atom.name for atom in evaluator.atoms.values()] == ["x"]


def test_a_network_is_not_evaluated():
    """Sharing doubles the expression at every step: the evaluator gives up instead of hanging."""

    def write(emit, x):
        for _ in range(24):
            x = emit(relax.op.add(x, x))
        return x

    evaluator, result, _ = function({"x": ([4], "float32")}, write)
    with pytest.raises(TooComplexError):
        evaluator.element(result, (int_imm(0),))


def test_scalar_constants_are_folded():
    def write(emit, x):
        root = emit(relax.op.sqrt(relax.const(64.0)))
        return emit(relax.op.divide(emit(relax.op.divide(x, root)), relax.const([2.0])))

    evaluator, result, (x,) = function({"x": ([4], "float32")}, write)
    *_, view = evaluator.views(result, (int_imm(1),))
    assert view.tensor.same_as(x) and view.factor == 1 / 16
    assert constant_value(tirx.FloatImm("float32", 2.0) * tirx.FloatImm("float32", 4.0)) == 8.0
    assert constant_value(tirx.Var("y", "float32")) is None

"""The decode function: every row samples, results are written to buffers, and the report says what is captured."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_infer.errors import ModelError
from tvm_infer.relax import decode_graph
from tvm_infer.relax.nodes import bindings_of, op_name

n = TypeVar("n")
m = TypeVar("m")


@I.ir_module
class Sampled:
    @R.function
    def main(
        input_ids: R.Tensor((1, n), "int64"),
        logit_indices: R.Tensor((m,), "int64"),
        table: R.Tensor((11, 8), "float32"),
        head: R.Tensor((8, 11), "float32"),
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            x = R.take(table, input_ids, axis=0)
            rows = R.take(x, logit_indices, axis=1)
            logits = R.matmul(rows, head)
            R.output(logits)
        return logits


@I.ir_module
class EveryRow:
    @R.function
    def decode(
        input_ids: R.Tensor((1, n), "int64"),
        table: R.Tensor((11, 8), "float32"),
        head: R.Tensor((8, 11), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            x = R.take(table, input_ids, axis=0)
            rows: R.Tensor((1, n, 8), "float32") = x
            logits = R.matmul(rows, head)
            R.output(logits)
        return logits


def normalised(func):
    return relax.transform.CanonicalizeBindings()(tvm.IRModule({"f": func.without_attr("global_symbol")}))


def test_decode_is_the_function_with_every_row_taken():
    mod = decode_graph.add_decode_function(Sampled, "main")
    assert "decode" not in [str(var.name_hint) for var in Sampled.get_global_vars()]
    assert [str(var.name_hint) for var in mod.get_global_vars()] == ["decode", "main"]
    tvm.ir.assert_structural_equal(normalised(mod["decode"]), normalised(EveryRow["decode"]), map_free_vars=True)
    tvm.ir.assert_structural_equal(mod["main"], Sampled["main"])
    assert int(mod["decode"].attrs["num_input"]) == 1 and str(mod["decode"].attrs["global_symbol"]) == "decode"
    relax.analysis.well_formed(mod)  # raises where it is not


def with_indices(read):
    """A function in which `read(builder, hidden, table, logit_indices)` makes the rows that are projected."""
    builder = relax.BlockBuilder()
    rows, taken = tvm.tirx.Var("n", "int64"), tvm.tirx.Var("m", "int64")
    ids = relax.Var("input_ids", relax.TensorType([1, rows], "int64"))
    indices = relax.Var("logit_indices", relax.TensorType([taken], "int64"))
    table = relax.Var("table", relax.TensorType([11, 8], "float32"))
    head = relax.Var("head", relax.TensorType([8, 11], "float32"))
    with builder.function("main", [ids, indices, table, head], attrs={"num_input": 2}):
        with builder.dataflow():
            hidden = builder.emit(relax.op.take(table, ids, axis=0))
            out = builder.emit_output(relax.op.matmul(read(builder, hidden, table, indices), head))
        builder.emit_func_output(out)
    return builder.get()


@pytest.mark.parametrize(
    ("read", "operator"),
    [
        # arithmetic on the rows' numbers: their values matter, not only which rows they name
        (lambda b, hidden, table, i: b.emit(relax.op.take(hidden, b.emit(relax.op.add(i, i)), axis=1)), "relax.add"),
        # the numbers of rows look up something that has no rows of the step
        (lambda b, hidden, table, i: b.emit(relax.op.take(table, i, axis=0)), "relax.take"),
        # an axis of the row's elements
        (lambda b, hidden, table, i: b.emit(relax.op.take(hidden, i, axis=2)), "relax.take"),
    ],
    ids=["added", "of a table", "of elements"],
)
def test_other_uses_of_logit_indices_are_refused(read, operator):
    with pytest.raises(ModelError, match=rf"logit_indices is read by {operator}.*every row"):
        decode_graph.add_decode_function(with_indices(read), "main")


def test_a_function_without_logit_indices_is_copied():
    mod = tvm.IRModule({"main": EveryRow["decode"].with_attr("global_symbol", "main")})
    added = decode_graph.add_decode_function(mod, "main")
    tvm.ir.assert_structural_equal(normalised(added["decode"]), normalised(EveryRow["decode"]), map_free_vars=True)


# Greedy tokens


def logits_function(returns):
    """returns(builder, logits, other) -> what the function gives back."""
    builder = relax.BlockBuilder()
    rows = tvm.tirx.Var("n", "int64")
    ids = relax.Var("input_ids", relax.TensorType([1, rows], "int64"))
    table = relax.Var("table", relax.TensorType([11, 8], "float32"))
    with builder.function("main", [ids, table]):
        with builder.dataflow():
            logits = builder.emit(relax.op.take(table, ids, axis=0))
            other = builder.emit(relax.op.negative(logits))
            out = builder.emit_output(returns(logits, other))
        builder.emit_func_output(out)
    return builder.get()["main"]


@pytest.mark.parametrize("returns", [lambda a, b: a, lambda a, b: relax.Tuple([a, b])], ids=["logits", "a tuple"])
def test_greedy_tokens_are_the_largest_logits(returns):
    func = decode_graph.with_greedy_tokens(logits_function(returns))
    assert [str(t.dtype) for t in func.ret_ty.fields] == ["float32", "int64"]
    mod = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    table = np.random.default_rng(0).standard_normal((11, 8), np.float32)
    table[4] = 1.0  # all alike: the first one, as on the host
    ids = np.array([[3, 4, 10]], np.int64)
    logits, tokens = vm["main"](tvm.runtime.tensor(ids), tvm.runtime.tensor(table))
    np.testing.assert_array_equal(logits.numpy(), table[ids])
    np.testing.assert_array_equal(tokens.numpy(), table[ids].argmax(-1))


def test_outputs_that_are_not_written_out_are_refused():
    builder = relax.BlockBuilder()
    ids = relax.Var("input_ids", relax.TensorType([1, 3], "int64"))
    x = relax.Var("x", relax.TupleType([relax.TensorType([3, 4], "float32")] * 2))
    with builder.function("main", [ids, x]):
        builder.emit_func_output(x)
    with pytest.raises(ModelError, match="logits first"):
        decode_graph.with_greedy_tokens(builder.get()["main"])


# Output buffers


def lowered_decode():
    """`decode` as OutputBuffers finds it: kernels that write into tensors allocated before."""
    mod = decode_graph.add_decode_function(Sampled, "main")
    mod = tvm.IRModule({"decode": decode_graph.make_static(decode_graph.with_greedy_tokens(mod["decode"]))})
    passes = [relax.transform.LegalizeOps(), relax.transform.ToNonDataflow(), relax.transform.CallTIRRewrite()]
    return tvm.transform.Sequential(passes)(mod)


def test_output_buffers_are_parameters():
    before = lowered_decode()
    mod = decode_graph.OutputBuffers()(before)
    func = mod["decode"]
    assert [str(p.name) for p in func.params[-2:]] == ["decode_logits", "decode_tokens"]
    assert [str(p.ty.dtype) for p in func.params[-2:]] == ["float32", "int64"]
    assert int(func.attrs["num_input"]) == 0
    allocated, before_it = (
        [op_name(b.value) for b in bindings_of(m["decode"])].count("relax.builtin.alloc_tensor") for m in (mod, before)
    )
    assert allocated == before_it - 2 == 1  # what is left is storage between kernels
    assert len(before["decode"].params) == len(func.params) - 2


def test_results_are_written_to_the_buffers():
    mod = decode_graph.OutputBuffers()(lowered_decode())
    vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    rng = np.random.default_rng(1)
    table, head = rng.standard_normal((11, 8), np.float32), rng.standard_normal((8, 11), np.float32)
    for rows in (1, 3):
        ids = rng.integers(0, 11, (1, rows))
        logits = tvm.runtime.tensor(np.full((1, rows, 11), np.nan, np.float32))
        tokens = tvm.runtime.tensor(np.full((1, rows), -1, np.int64))
        vm["decode"](*map(tvm.runtime.tensor, (ids, table, head)), logits, tokens)
        expected = table[ids].astype(np.float64) @ head
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)
        np.testing.assert_array_equal(tokens.numpy(), expected.argmax(-1))


# Reports


def captured(callee):
    """A decode function of static buffers with a call to `callee` between two kernels, after TVM's RewriteCUDAGraph."""

    @I.ir_module
    class Module:
        @T.prim_func
        def twice(a: T.handle, b: T.handle):
            A = T.match_buffer(a, (4, 8), "float32")
            B = T.match_buffer(b, (4, 8), "float32")
            for i, j in T.grid(4, 8):
                B[i, j] = A[i, j] * T.float32(2)

    builder = relax.BlockBuilder(Module)
    ty = relax.TensorType([4, 8], "float32")
    x, out = relax.Var("x", ty), relax.Var("out", ty)
    twice = Module.get_global_var("twice")
    with builder.function("decode", [x, out], attrs={"num_input": 0, "relax.force_pure": True}):
        first, second = (
            builder.emit(relax.op.builtin.alloc_tensor(relax.ShapeExpr([4, 8]), "float32", 0, "global"))
            for _ in range(2)
        )
        builder.emit(relax.Call(twice, [x, first]))
        builder.emit(relax.Call(relax.ExternFunc(callee), [first, second], attrs=None, ty_args=[relax.TupleType([])]))
        builder.emit(relax.Call(twice, [second, out]))
        done = builder.emit(relax.Call(relax.ExternFunc("vm.builtin.copy"), [out], attrs=None, ty_args=[ty]))
        builder.emit_func_output(done)
    passes = [relax.transform.StaticPlanBlockMemory(), relax.transform.RewriteCUDAGraph()]
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        mod = tvm.transform.Sequential(passes)(builder.get())
    return decode_graph.report_capture(mod, {"decode": ""})


def test_a_step_without_obstacles_is_one_graph():
    report = captured("tvm_infer.matmul")
    assert report.is_whole("decode"), str(report)
    assert "decode: 1 graph(s) hold 3 of 3 kernels and calls" in str(report)


def test_a_builtin_in_the_middle_splits_the_graph_and_the_report_says_so():
    report = captured("vm.builtin.attention_kv_cache_attention_with_fused_qkv")
    text = str(report)
    assert not report.is_whole("decode") and len(report.regions["decode"]) == 2, text
    assert "decode: 2 graph(s) hold 2 of 3 kernels and calls" in text
    assert (
        "1 x  vm.builtin.attention_kv_cache_attention_with_fused_qkv outside: TVM captures no builtin of its VM" in text
    )


def test_what_is_not_captured_says_why():
    report = decode_graph.CaptureReport()
    report.outside["main"] = decode_graph.Counter({"kernel": 3})
    report.reasons["main"] = "it changes"
    assert str(report) == "main: not captured, 3 kernels and calls: it changes"
    assert not report.is_whole("main")

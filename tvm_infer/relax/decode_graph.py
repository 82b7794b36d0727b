"""A decode step as one CUDA graph: a function of static tensors, for TVM's RewriteCUDAGraph to capture whole.

That pass captures what depends on nothing but constants, parameters behind `num_input` and storage of constant size. So the
decode function has no inputs in its sense: tokens, positions, cache and outputs are buffers at fixed addresses, one set for each
number of rows, and its results are written to parameters instead of being allocated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import relax

from tvm_infer.errors import InternalError, ModelError

from .nodes import bindings_of, known_shape, op_name, same, shape_of, used_vars
from .sampled_rows import LOGIT_INDICES

DECODE, DECODE_LOGITS, DECODE_TOKENS = "decode", "decode_logits", "decode_tokens"
_MAX_PARTS, _MIN_PARTS = 256, 16  # that a row of logits is cut into to find the largest
_CAPTURED = "cuda_graph_capture"  # what RewriteCUDAGraph calls the functions it makes
_BOOKKEEPING = (
    "vm.builtin.cuda_graph",
    "vm.builtin.copy",
    "relax.memory",
    "relax.builtin",
    "relax.vm",
    "relax.call_builtin_with_ctx",
    "relax.null_value",
)


def logits_of(func: Any) -> Any:
    """The variable that a function returns as its logits: its result, or the first of a tuple."""
    definitions = {binding.var: binding.value for binding in bindings_of(func)}
    result = func.body.body
    while isinstance(definitions.get(result), tvm.ir.Var):
        result = definitions[result]
    value = definitions.get(result, result)
    if isinstance(value, relax.Tuple):
        return value.fields[0]
    if not isinstance(result.ty, relax.TensorType):
        raise ModelError(
            f"the function returns {result.ty}; it must return its logits, or a tuple that is written out, logits first"
        )
    return result


def with_greedy_tokens(func: Any) -> Any:
    """The function returning (logits, int64 [1, num_rows]: where each row is largest), whatever else it returned before."""
    logits = logits_of(func)
    builder = relax.BlockBuilder()
    last = func.body.blocks[-1]
    bindings = list(last.bindings)
    is_dataflow = isinstance(last, relax.DataflowBlock)

    def emit(value: Any, name: str, kind: Any = relax.DataflowVar if is_dataflow else relax.Var) -> Any:
        value = builder.normalize(value)
        var = kind(name, value.ty)
        bindings.append(relax.VarBinding(var, value))
        return var

    tokens = _argmax(logits, emit)
    result = emit(relax.Tuple([logits, tokens]), "logits_and_tokens", relax.Var)
    block = relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings)
    body = relax.SeqExpr([*func.body.blocks[:-1], block], result)
    return relax.Function(func.params, body, result.ty, func.is_pure, func.attrs, func.span)


def _argmax(logits: Any, emit: Callable[[Any, str], Any]) -> Any:
    """The first index of the largest of logits [1, n, vocab] or [n, vocab]: [1, n].

    TVM gives a row to one thread block, too little for 128256 logits. So the row is cut into parts of equal size, a block
    each: where the largest of each part is, which part's is the largest (the first of equal ones), and that part's place. (Of NaN
    alone the largest is at -1 for TVM: held at 0, so that nothing is read there.)
    """
    *_, num_rows, vocab = shape_of(logits)
    if len(shape_of(logits)) == 2:
        logits = emit(relax.op.reshape(logits, [1, num_rows, vocab]), "logits_of_a_batch")
    parts = next(p for p in range(_MAX_PARTS, 0, -1) if int(vocab) % p == 0)
    if parts < _MIN_PARTS:
        return emit(relax.op.argmax(logits, axis=-1), "greedy_tokens")
    size = int(vocab) // parts
    cut = emit(relax.op.reshape(logits, [num_rows, parts, size]), "logits_in_parts")
    zero = relax.const(0, "int64")
    found = emit(relax.op.argmax(cut, axis=-1, keepdims=True), "found_in_parts")
    places = emit(relax.op.maximum(found, zero), "place_in_parts")  # [n, parts, 1]
    largest = emit(relax.op.gather_nd(cut, places, batch_dims=2), "largest_of_parts")  # [n, parts]
    best = emit(relax.op.argmax(largest, axis=-1, keepdims=True), "best_part")
    part = emit(relax.op.maximum(best, zero), "part")  # [n, 1]
    place = emit(relax.op.gather_nd(places, part, batch_dims=1), "place_in_part")  # [n, 1]
    token = emit(
        relax.op.add(emit(relax.op.multiply(part, relax.const(size, "int64")), "begin_of_part"), place), "token"
    )
    return emit(relax.op.reshape(token, [1, num_rows]), "greedy_tokens")


def add_decode_function(mod: tvm.IRModule, function: str) -> tvm.IRModule:
    """The module with `decode`, a copy of `function` in which every row samples: logits [1, num_tokens, vocab].

    An input logit_indices of the function (which rows to compute logits for) is taken out. ModelError where that is used for anything
    but R.take of rows, or where there is a function `decode` already.
    """
    if any(str(var.name_hint) == DECODE for var in mod.get_global_vars()):
        raise ModelError(f"the module has a function {DECODE!r} already; rename it")
    updated = mod.clone()
    updated[DECODE] = _all_rows(relax.utils.copy_with_new_vars(mod[function])).with_attr("global_symbol", DECODE)
    return relax.transform.DeadCodeElimination()(updated)


def _all_rows(func: Any) -> Any:
    """Without the parameter logit_indices: every row is taken, in order."""
    position = next((i for i, param in enumerate(func.params) if str(param.name) == LOGIT_INDICES), None)
    if position is None:
        return func
    num_rows = num_rows_var(func)
    func = func.bind_symbolic_vars({shape_of(func.params[position])[0]: num_rows})
    indices = func.params[position]
    blocks = []
    for block in func.body.blocks:
        bindings = []
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Expr) and indices in used_vars(value):
                if not _takes_rows(value, indices, num_rows):
                    raise ModelError(
                        f"{LOGIT_INDICES} is read by {op_name(value) or value}; a decode step takes every row, so it may only be "
                        "read by R.take of rows, with the axis given"
                    )
                binding = relax.VarBinding(binding.var, value.args[0])
            bindings.append(binding)
        is_dataflow = isinstance(block, relax.DataflowBlock)
        blocks.append(relax.DataflowBlock(bindings) if is_dataflow else relax.BindingBlock(bindings))
    params = [param for i, param in enumerate(func.params) if i != position]
    whole = relax.Function(params, relax.SeqExpr(blocks, func.body.body), func.ret_ty, func.is_pure, func.attrs)
    return whole.with_attr("num_input", int(func.attrs["num_input"]) - 1)


def _takes_rows(value: Any, indices: Any, num_rows: Any) -> bool:
    """Whether this is R.take along an axis of num_rows, which every row in order leaves as it is."""
    if op_name(value) != "relax.take" or value.attrs.axis is None or not same(value.args[1], indices):
        return False
    shape = known_shape(value.args[0])
    return shape is not None and same(shape[int(value.attrs.axis)], num_rows)


def make_static(func: Any) -> Any:
    """All parameters are buffers at fixed addresses."""
    return func.with_attr("num_input", 0)


class OutputBuffers:
    """Give a function that returns (logits, tokens) two parameters more, into which it writes them.

    Comes when tensors are allocated explicitly (after CallTIRRewrite). The new parameters `decode_logits` and `decode_tokens` have the
    shapes of the results ([1, n, vocab] or [n, vocab], and [1, n]), whatever shapes their kernels compute them in.
    """

    def __init__(self, function: str = DECODE) -> None:
        self.function = function

    def __call__(self, mod: tvm.IRModule) -> tvm.IRModule:
        """The rewritten module; `mod` is unchanged."""
        func = mod[self.function]
        definitions = {binding.var: binding.value for binding in bindings_of(func)}
        outputs = definitions[func.body.body].fields
        allocated = [_allocation(var, definitions) for var in outputs]
        names = (DECODE_LOGITS, DECODE_TOKENS)
        params = [relax.Var(name, var.ty) for var, name in zip(outputs, names, strict=True)]
        builder = relax.BlockBuilder()
        memory = {
            var: param
            if tvm_ffi.structural_equal(var.ty, param.ty)
            else builder.normalize(relax.op.reshape(param, list(shape_of(var))))
            for var, param in zip(allocated, params, strict=True)
        }
        blocks = []
        for block in func.body.blocks:
            bindings = [
                relax.VarBinding(b.var, memory[b.var]) if isinstance(b, relax.VarBinding) and b.var in memory else b
                for b in block.bindings
            ]
            blocks.append(relax.BindingBlock(bindings))
        # NOTE: a view that is made within the captured region and read outside of it (by a builtin, which is never captured). TVM's VM
        # writes what a region returns to a register, and fails where the region's result is read by nothing.
        view = builder.normalize(relax.op.reshape(params[1], [num_rows_var(func)]))
        inside, result = relax.Var("decode_tokens_view", view.ty), relax.Var("decode_done", view.ty)
        outside = builder.normalize(
            relax.Call(relax.ExternFunc("vm.builtin.copy"), [inside], attrs=None, ty_args=[view.ty])
        )
        blocks.append(relax.BindingBlock([relax.VarBinding(inside, view), relax.VarBinding(result, outside)]))
        body = relax.SeqExpr(blocks, result)
        static = relax.Function([*func.params, *params], body, result.ty, False, func.attrs)
        updated = mod.clone()
        updated.update_func(mod.get_global_var(self.function), static)
        return relax.transform.CanonicalizeBindings()(updated)


def _allocation(var: Any, definitions: dict[Any, Any]) -> Any:
    """The variable of the allocation that an output's elements lie in."""
    while True:
        value: Any = definitions.get(var)
        name = op_name(value)
        if name == "relax.builtin.alloc_tensor":
            return var
        if isinstance(value, tvm.ir.Var):
            var = value
        elif name == "relax.reshape":
            var = value.args[0]
        else:
            raise InternalError(f"output {var} is made by {value}, not by a kernel that writes into memory of its own")


@dataclass
class CaptureReport:
    """What of each function runs inside a captured graph.

    regions : function -> kernels and calls of each region in it. outside : function -> (callee, times) launched one by one, and why.
    starts_early : by ProgrammaticLaunch.
    """

    regions: dict[str, list[Counter[str]]] = field(default_factory=dict)
    outside: dict[str, Counter[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    starts_early: bool = False  # TVM's kernels, all of them

    def __str__(self) -> str:
        lines = []
        for name, outside in self.outside.items():
            regions = self.regions.get(name, [])
            if not regions:
                lines.append(f"{name}: not captured, {outside.total()} kernels and calls: {self.reasons.get(name, '')}")
                continue
            inside = sum(region.total() for region in regions)
            lines.append(
                f"{name}: {len(regions)} graph(s) hold {inside} of {inside + outside.total()} kernels and calls"
            )
            lines += [f"  {count:5d} x  {callee}" for region in regions for callee, count in region.most_common()]
            lines += [f"  {count:5d} x  {callee} outside: {_why_outside(callee)}" for callee, count in outside.items()]
        if self.starts_early:
            lines.append(
                "TVM's kernels start before those ahead have ended, and wait there (programmatic dependent launch)"
            )
        return "\n".join(lines)

    def is_whole(self, function: str) -> bool:
        """Whether a step of the function is one graph launch."""
        return len(self.regions.get(function, [])) == 1 and not self.outside[function].total()


def _why_outside(callee: str) -> str:
    return (
        "TVM captures no builtin of its VM"
        if callee.startswith("vm.builtin")
        else "it reads a tensor that is not static"
    )


def report_capture(mod: tvm.IRModule, functions: dict[str, str]) -> CaptureReport:
    """Read a module that RewriteCUDAGraph has rewritten. functions : name -> why it is not captured, "" where it should be."""
    report = CaptureReport()
    for name, reason in functions.items():
        outside: Counter[str] = Counter()
        regions = []
        for binding in bindings_of(mod[name]):
            value = binding.value
            if not isinstance(value, relax.Call):
                continue
            captured = [g for g in _global_vars(value) if _CAPTURED in str(g.name_hint)]
            if captured:
                regions.append(_callees(mod[captured[0]]))
            else:
                outside.update(_callee(value))
        report.outside[name] = outside
        report.reasons[name] = reason
        if regions:
            report.regions[name] = regions
    return report


def _global_vars(value: Any) -> list[Any]:
    return [
        item
        for arg in value.args
        for item in (arg.fields if isinstance(arg, relax.Tuple) else [arg])
        if isinstance(item, tvm.ir.GlobalVar)
    ]


def _callees(func: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for binding in bindings_of(func):
        if isinstance(binding.value, relax.Call):
            found.update(_callee(binding.value))
    return found


def _callee(call: Any) -> list[str]:
    """The kernel or packed function that a call launches; nothing for bookkeeping of the VM."""
    op = call.op
    if isinstance(op, tvm.ir.GlobalVar):
        return [str(op.name_hint)]
    name = str(op.global_symbol) if isinstance(op, relax.ExternFunc) else op_name(call)
    return [] if not name or name.startswith(_BOOKKEEPING) or name == "relax.reshape" else [name]


def num_rows_var(func: Any) -> Any:
    """The symbolic number of rows: n of input_ids [1, n]."""
    return next(shape_of(param)[1] for param in func.params if str(param.name) == "input_ids")

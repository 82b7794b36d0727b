"""Finds every attention over the packed tokens of one Relax function, and proves what it computes.

Anchors are `R.nn.softmax` and `R.nn.attention`. A softmax is followed forward to the matmul that consumes its probabilities and
evaluated backward (symbolic.py) to the matmul that makes its scores; prove.py settles the mask. Operands are then traced through data
movement to the deepest tensor whose axes are tokens, heads and head_dim, so that repeats of KV heads and transposes fall away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import ir, relax, tirx

from tvm_infer.spec import AttentionSpec

from .extract import Input, extract
from .movement import VIEW_RULES, broadcast_index
from .nodes import (
    Index,
    UnknownShapeError,
    bindings_of,
    dtype_of,
    int_imm,
    known_shape,
    op_name,
    same,
    shape_of,
    static_int,
    used_vars,
)
from .printer import format_expr
from .prove import MaskProof, NotPlainError, Refusal, prove_mask, resolve_probability
from .report import Location, NotAttention, Reason
from .rotation import Lifted, NotARotationError, Rotation, lift
from .scalars import free_vars, literal, walk
from .symbolic import Evaluator, TooComplexError, View, decided

KEEP = (
    'keep this attention with on_unmatched="keep", or rewrite it as softmax(scale * q @ k^T + mask) @ v over the tokens'
)

SOFTMAX = "relax.nn.softmax"
ATTENTION = ("relax.nn.attention", "relax.nn.attention_bias")
VAR_LEN_ATTENTION = "relax.nn.attention_var_len"
_ANCHORS = (SOFTMAX, *ATTENTION, VAR_LEN_ATTENTION)
# operators that may stand between the softmax and the matmul that consumes it; what they compute is proven later
_BETWEEN = {
    *VIEW_RULES,
    "relax.where",
    "relax.astype",
    "relax.multiply",
    "relax.divide",
    "relax.full_like",
    "relax.zeros_like",
}


@dataclass(frozen=True)
class Operand:
    """q, k or v: `tensor` whose axes in the order `axes` are (unit axes, tokens, heads…, head_dim)."""

    tensor: Any
    axes: tuple[int, ...]
    num_heads: int


@dataclass(frozen=True)
class Attention:
    """One proven attention.

    output : the variable to replace; output_axes : for each axis of its shape without the unit ones, its place in
    (tokens, heads…, head_dim); head_extents : the head axes of the output, outermost first. rotation : of q and k, which are what they
    were before it; None where they come as they are. rope : the same for the report, with the reason.
    """

    spec: AttentionSpec
    q: Operand
    k: Operand
    v: Operand
    output: Any
    output_axes: tuple[int, ...]
    head_extents: tuple[int, ...]
    form: str
    location: Location
    assumptions: tuple[str, ...]
    rotation: Rotation | None
    rope: str


class Matcher:
    """Matches the attentions of one function.

    Parameters
    ----------
    mod, name : the module and the function in it. num_tokens : the symbolic number of packed tokens, n of input_ids [1, n].
    inputs : parameters that change with every call (not weights). positions : the one of them that counts the tokens of a sequence.
    assume_full : names of mask inputs that mask nothing. rotary_multiple : of which head_dim and the elements that turn must be
    multiples for a rotation to be lifted; 0 to lift none.
    """

    def __init__(
        self,
        mod: tvm.IRModule,
        name: str,
        num_tokens: Any,
        inputs: Sequence[Any],
        positions: Any,
        assume_full: Set[str],
        rotary_multiple: int,
    ) -> None:
        func = mod[name]
        self._mod = mod
        self._name = name
        self._num_tokens = num_tokens
        self._n = format_expr(num_tokens)
        self._inputs = list(inputs)
        self._positions = positions
        self._assume_full = assume_full
        self._rotary_multiple = rotary_multiple
        self._bindings = bindings_of(func)
        self._definitions = {binding.var: binding.value for binding in self._bindings}
        self._users: dict[Any, list[Any]] = {}
        for binding in self._bindings:
            for var in used_vars(binding.value):
                self._users.setdefault(var, []).append(binding.var)
        self._returned = used_vars(func.body.body)

    def run(self) -> list[Attention | Reason | NotAttention]:
        """What became of every anchor, in program order."""
        found: list[Attention | Reason | NotAttention] = []
        for binding in self._bindings:
            name = op_name(binding.value)
            location = self._location(binding)
            if _contains_anchor(self._mod, binding.value):
                seen = "a softmax or attention inside a branch or a function that is called"
                fix = "inline it first (relax.transform.InlinePrivateFunctions)"
                found.append(Reason(location, seen, "the pass looks at the bindings of one function alone", fix))
            if name not in _ANCHORS:
                continue
            try:
                if name == SOFTMAX:
                    found.append(self._softmax(binding.var, binding.value, location))
                elif name == VAR_LEN_ATTENTION:
                    raise Refusal(
                        "R.nn.attention_var_len", "it packs sequences by itself", "export with one packed row of tokens"
                    )
                else:
                    found.append(self._fused(binding.var, binding.value, location))
            except Refusal as refusal:
                found.append(Reason(location, refusal.seen, refusal.why, refusal.fix))
            except UnknownShapeError as error:
                why = "its shape is not known when compiling"
                fix = (
                    "give the dynamic length an upper bound that buffers cover (torch.export.Dim(…, max=…)), or keep it"
                )
                found.append(Reason(location, f"tensor {error}", why, fix))
            except TooComplexError:
                found.append(Reason(location, "the softmax input", "it is too large an expression to evaluate", KEEP))
        return found

    def _location(self, binding: Any) -> Location:
        span, source = binding.value.span, ""
        if span is not None and span.source_name is not None:
            source = f"{str(span.source_name.name).rsplit('/', 1)[-1]}:{span.line}"
        return Location(self._name, str(binding.var.name), op_name(binding.value).removeprefix("relax."), source)

    # ---- softmax between two matmuls

    def _softmax(self, var: Any, call: Any, location: Location) -> Attention | NotAttention:
        shape = shape_of(var)
        axis = int(call.attrs.axis) % len(shape)
        extent = shape[axis]
        products, escapes = self._consumers(var)
        evaluator = Evaluator(self._definitions, self._positions)
        if static_int(extent) is not None:
            return self._static_softmax(evaluator, call, shape, axis, products, location)
        seen = f"softmax over axis {axis} of {format_shape(shape)}"
        has_sink = evaluator.equal(extent, self._num_tokens + 1)
        if not has_sink and not evaluator.equal(extent, self._num_tokens):
            raise Refusal(
                seen,
                f"its keys number {format_expr(extent)}, not the {self._n} current tokens (cross attention, or keys from elsewhere)",
                KEEP,
            )
        if not products:
            raise Refusal(seen, "it mixes tokens, but no matmul consumes its probabilities", KEEP)
        if len(products) > 1 or escapes:
            others = ", ".join(str(other.name) for other in [*products[1:], *escapes])
            raise Refusal(
                seen, f"its probabilities are also used by {others}", "do not return or reuse attention weights"
            )

        h, i, j, heads, index = self._axes(evaluator, shape, axis, seen)
        evaluator.read_positions = False
        value, sink = evaluator.element(call.args[0], index), None
        if has_sink:
            index, value, sink = self._sink(evaluator, call.args[0], axis, index, value, seen)
        reads_positions = evaluator.read_positions
        score = self._score(evaluator, value, seen)
        q_views, k_views, depth, head_dim = self._score_operands(evaluator, score, i, j)
        axes = _Axes(h, i, j, depth)
        q, q_factor = self._operand(evaluator, q_views, axes, i, "q", heads, seen)
        k, k_factor = self._operand(evaluator, k_views, axes, j, "k", heads, seen)
        given = Input(value, score, h, i, j, heads, dtype_of(call.args[0]), sink, self._inputs, self._assume_full)
        proof = self._proof(evaluator, given, reads_positions)
        context = _Context(evaluator, h, i, j, heads, index, var, score, proof, head_dim)
        v, output_axes, extents = self._product(context, products[0], seen)
        rope = self._rope(context, (q_views[-1], k_views[-1]), axes, v)
        safe = "softmax with a sink" if has_sink else "safe softmax" if len(self._users[var]) > 1 else "softmax"
        return self._attention(
            context,
            (q, k, v),
            products[0],
            output_axes,
            extents,
            f"matmul, {safe}, matmul",
            location,
            q_factor * k_factor,
            rope,
            seen,
        )

    def _proof(self, ev: Evaluator, given: Input, reads_positions: bool) -> MaskProof:
        """What the softmax input means: plain where that can be proven, else the variant that it is."""
        if given.sink is None:
            try:
                proof = prove_mask(
                    ev, given.value, given.score, given.i, given.j, given.dtype, given.assume_full, self._is_input
                )
            except NotPlainError:
                proof = extract(ev, given)
        else:
            proof = extract(ev, given)
        if not reads_positions:
            return proof
        return dataclasses.replace(proof, assumptions=(*proof.assumptions, self._counts_tokens()))

    def _is_input(self, source: Any) -> bool:
        return any(same(source, parameter) for parameter in self._inputs)

    def _sink(
        self, ev: Evaluator, scores: Any, axis: int, index: Index, value: Any, seen: str
    ) -> tuple[Index, Any, Any]:
        """(index of key j, softmax input there, the entry without a key) of n + 1 entries, one of which is none of a matmul."""

        def at(place: Any) -> tuple[Index, Any]:
            moved = (*index[:axis], place, *index[axis + 1 :])
            return moved, decided(ev, ev.element(scores, moved))

        for keys, sink in ((index[axis], self._num_tokens), (ev.simplify(index[axis] + 1), int_imm(0))):
            (moved, value), (_, entry) = at(keys), at(sink)
            if any(ev.atoms[var].kind == "dot" for var in free_vars(value) if var in ev.atoms) and not any(
                ev.atoms[var].kind == "dot" for var in free_vars(entry) if var in ev.atoms
            ):
                return moved, value, entry
        raise Refusal(
            seen,
            f"its entries number {self._n} + 1, and neither the first nor the last is one without a key (a sink)",
            KEEP,
        )

    def _static_softmax(
        self, ev: Evaluator, call: Any, shape: Any, axis: int, products: list[Any], location: Location
    ) -> NotAttention:
        """A softmax over an axis of fixed length: a router or a sampler, unless its scores come from keys that are inputs."""
        if products:
            index = [ev.bind(f"x{position}", dim) for position, dim in enumerate(shape)]
            walk_atoms = _atoms_in(ev, ev.element(call.args[0], index))
            for atom in walk_atoms:
                if atom.kind == "dot" and all(self._depends_on_inputs(argument) for argument in atom.call.args):
                    raise Refusal(
                        f"softmax over axis {axis} of {format_shape(shape)}",
                        f"its keys number {format_expr(shape[axis])}, not the {self._n} current tokens (cross attention)",
                        KEEP,
                    )
        return NotAttention(
            location, f"softmax over {format_expr(shape[axis])} entries of a fixed axis: it does not mix tokens"
        )

    def _consumers(self, var: Any) -> tuple[list[Any], list[Any]]:
        """Matmuls that consume the probabilities through data movement and selections, and whatever else uses them."""
        products: list[Any] = []
        escapes: list[Any] = []
        pending, seen = [var], set()
        while pending:
            current = pending.pop()
            if current in self._returned:
                escapes.append(current)
            for user in self._users.get(current, []):
                if user in seen:
                    continue
                seen.add(user)
                value = self._definitions[user]
                if op_name(value) == "relax.matmul":
                    products.append(user)
                elif isinstance(value, ir.Var) or op_name(value) in _BETWEEN:
                    pending.append(user)
                else:
                    escapes.append(user)
        return products, escapes

    def _axes(self, ev: Evaluator, shape: Any, key_axis: int, seen: str) -> tuple[Any, Any, Any, int, Index]:
        """Index variables (h, i, j) for scores of this shape, the number of heads, and the index written in them."""
        i, j = ev.bind("i", self._num_tokens), ev.bind("j", self._num_tokens)
        query_axes, extents = self._classify(ev, shape, {key_axis}, seen)
        heads = math.prod(extents)
        h = ev.bind("h", int_imm(heads))
        index = _head_index(ev, shape, {key_axis: j, query_axes: i}, h)
        return h, i, j, heads, index

    def _classify(self, ev: Evaluator, shape: Any, known: Set[int], seen: str) -> tuple[int, list[int]]:
        """The axis of the queries, and the extents of the head axes, of a shape whose other axes are `known`."""
        queries: list[int] = []
        extents: list[int] = []
        for axis, dim in enumerate(shape):
            number = static_int(dim)
            if axis in known or number == 1:
                continue
            if number is not None:
                extents.append(number)
            elif ev.equal(dim, self._num_tokens):
                queries.append(axis)
            else:
                raise Refusal(
                    seen,
                    f"axis {axis} has length {format_expr(dim)}, which is neither the {self._n} tokens nor a fixed number of heads",
                    "export with batch 1: packed tokens are [1, n]",
                )
        if len(queries) != 1:
            raise Refusal(seen, f"{len(queries)} axes have the length of the queries, one is needed", KEEP)
        return queries[0], extents

    def _score(self, ev: Evaluator, value: Any, seen: str) -> Any:
        """The one matmul entry that the softmax input depends on."""
        scores = [var for var in free_vars(value) if var in ev.atoms and ev.atoms[var].kind == "dot"]
        if len(scores) != 1:
            what = "no matmul makes its scores" if not scores else f"it mixes {len(scores)} matmul entries"
            raise Refusal(f"{seen}: input[h, i, j] = {format_expr(value, ev)}", what, KEEP)
        return scores[0]

    def _score_operands(self, ev: Evaluator, score: Any, i: Any, j: Any) -> tuple[list[View], list[View], Any, int]:
        """Views of q, views of k, the index along head_dim and head_dim of a score; whichever operand depends on i is q."""
        atom = ev.atoms[score]
        depth = ev.bind("d", shape_of(atom.call.args[0])[-1])
        left, right = _dot_operands(atom.call, atom.index, depth)
        sides = []
        for _, index in (left, right):
            names = [var for part in index for var in free_vars(part)]
            sides.append((any(same(i, var) for var in names), any(same(j, var) for var in names)))
        seen = f"score = {atom.name}[{', '.join(str(part) for part in atom.index)}]"
        if sides == [(True, False), (False, True)]:
            q_side, k_side = left, right
        elif sides == [(False, True), (True, False)]:
            q_side, k_side = right, left
        else:
            raise Refusal(seen, "it is not the product of a query (of i) and a key (of j)", KEEP)
        head_dim = static_int(shape_of(atom.call.args[0])[-1])
        if head_dim is None:
            raise Refusal(seen, "head_dim is not a fixed number", KEEP)
        return list(ev.views(*q_side)), list(ev.views(*k_side)), depth, head_dim

    # ---- operands

    def _operand(
        self, ev: Evaluator, views: list[View], axes: _Axes, token: Any, name: str, heads: int, seen: str
    ) -> tuple[Operand, float]:
        """The deepest view whose axes are tokens, heads and head_dim, and the constant factor that was taken off it.

        Its head is proven to be the one that query head h attends: h // group.
        """
        problem = f"no tensor behind {name} has separate axes for tokens, heads and head_dim"
        for view in reversed(views):
            layout = self._layout(ev, view, axes, token)
            if layout is None:
                continue
            order, flat, count = layout
            group = max(heads // count, 1)
            wanted = tirx.floordiv(axes.h, int_imm(group)) if group > 1 else axes.h
            if heads % count == 0 and ev.equal(flat, wanted):
                return Operand(view.tensor, order, count), view.factor
            problem = (
                f"query head h uses head {format_expr(flat)} of the {count} of {name}; only h // {group} "
                "(consecutive query heads share a KV head) is supported"
            )
        tensor = views[-1].tensor
        raise Refusal(
            f"{seen}; {name} = {getattr(tensor, 'name', 'constant')} {format_shape(known_shape(tensor))}", problem, KEEP
        )

    def _layout(self, ev: Evaluator, view: View, axes: _Axes, token: Any) -> tuple[tuple[int, ...], Any, int] | None:
        """(axes as unit axes, tokens, heads…, head_dim; flat head index; number of heads), None where axes are mixed."""
        shape = known_shape(view.tensor)
        if shape is None:
            return None
        units, tokens, heads, depths = [], [], [], []
        flat: Any = int_imm(0)
        count = 1
        for axis, (dim, index) in enumerate(zip(shape, view.index, strict=True)):
            names = free_vars(index)
            if static_int(dim) == 1:
                units.append(axis)
            elif same(index, token) and ev.equal(dim, self._num_tokens):
                tokens.append(axis)
            elif same(index, axes.depth) and self._spans(ev, index, dim):
                depths.append(axis)
            elif names and all(same(var, axes.h) for var in names):
                heads.append(axis)
                flat = flat * dim + index
                count *= static_int(dim) or 0
            else:
                return None
        if len(tokens) != 1 or len(depths) != 1 or count == 0:
            return None
        return (*units, *tokens, *heads, *depths), ev.simplify(flat), count

    def _spans(self, ev: Evaluator, index: Any, dim: Any) -> bool:
        """Whether the index variable runs over the whole axis."""
        return int(ev.analyzer.const_int_bound(index).max_value) + 1 == static_int(dim)

    # ---- the second matmul

    def _product(self, context: _Context, product: Any, seen: str) -> tuple[Operand, tuple[int, ...], tuple[int, ...]]:
        """v, and the layout of the output, of the matmul that sums v over the keys."""
        ev, call = context.evaluator, self._definitions[product]
        shape = shape_of(product)
        is_left = context.softmax in self._cone(call.args[0])
        depth_axis = len(shape) - 1 if is_left else len(shape) - 2
        depth = static_int(shape[depth_axis])
        if depth is None or not _fits(depth, context.head_dim):
            raise Refusal(seen, f"v has width {format_expr(shape[depth_axis])}, q and k {context.head_dim}", KEEP)
        query_axis, extents = self._classify(ev, shape, {depth_axis}, f"{product.name} {format_shape(shape)}")
        if math.prod(extents) != context.heads:
            raise Refusal(seen, f"its output {format_shape(shape)} has other heads than the scores", KEEP)
        column = ev.bind("c", int_imm(depth))
        index = _head_index(ev, shape, {depth_axis: column, query_axis: context.i}, context.h)
        left, right = _dot_operands(call, index, context.j)
        weights, values = (left, right) if is_left else (right, left)

        entry = ev.element(*weights)
        probability = ev.atom("softmax", context.softmax, context.index, call=self._definitions[context.softmax])
        score_matmul = ev.atoms[context.score].source

        def is_score(var: Any) -> bool:
            atom = ev.atoms.get(var)
            return atom is not None and atom.kind == "dot" and same(atom.source, score_matmul)

        if not resolve_probability(ev, entry, probability, context.i, context.j, is_score, self._assume_full):
            raise Refusal(
                f"weight of key j = {format_expr(entry, ev)}",
                "the matmul after the softmax does not sum softmax[h, i, j] * v[j] over the axis j that the softmax normalises",
                KEEP,
            )
        views = [view for view in ev.views(*values) if view.factor == 1.0]  # a factor on v stays outside
        axes = _Axes(context.h, context.i, context.j, column)
        v, _ = self._operand(ev, views, axes, context.j, "v", context.heads, seen)
        nonunit = [axis for axis, dim in enumerate(shape) if static_int(dim) != 1 or axis == depth_axis]
        order = [query_axis, *[a for a in nonunit if a not in (query_axis, depth_axis)], depth_axis]
        return v, tuple(order.index(axis) for axis in nonunit), tuple(extents)

    def _cone(self, expr: Any) -> set[Any]:
        """Variables that an operand of the second matmul depends on, up to and including matmuls and softmaxes."""
        cone: set[Any] = set()
        pending = list(used_vars(expr))
        while pending:
            var = pending.pop()
            if var in cone:
                continue
            cone.add(var)
            value = self._definitions.get(var)
            if value is not None and op_name(value) not in ("relax.matmul", SOFTMAX):
                pending += used_vars(value)
        return cone

    def _depends_on_inputs(self, expr: Any) -> bool:
        """Whether a value changes from call to call (and is not a weight or made of weights)."""
        seen: set[Any] = set()
        pending = list(used_vars(expr))
        while pending:
            var = pending.pop()
            if var in seen:
                continue
            seen.add(var)
            if any(same(var, parameter) for parameter in self._inputs):
                return True
            if var in self._definitions:
                pending += used_vars(self._definitions[var])
        return False

    # ---- R.nn.attention

    def _fused(self, var: Any, call: Any, location: Location) -> Attention:
        """R.nn.attention(q, k, v, [bias]) in BSHD layout: written out as a softmax input, then proven like any other."""
        ev = Evaluator(self._definitions, self._positions)
        shapes = [shape_of(argument) for argument in call.args[:3]]
        seen = "R.nn.attention of " + ", ".join(format_shape(shape) for shape in shapes)
        q_shape, k_shape, v_shape = shapes
        for name, shape in (("q", q_shape), ("k", k_shape), ("v", v_shape)):
            if static_int(shape[0]) != 1:
                raise Refusal(
                    seen,
                    f"the batch of {name} is {format_expr(shape[0])}, not 1",
                    "export with batch 1: packed tokens are [1, n]",
                )
            if not ev.equal(shape[1], self._num_tokens):
                raise Refusal(
                    seen,
                    f"{name} has {format_expr(shape[1])} rows, not the {self._n} current tokens (cross attention)",
                    KEEP,
                )
        heads, kv_heads, depth = (static_int(dim) for dim in (q_shape[2], k_shape[2], q_shape[3]))
        depth_vo = static_int(v_shape[3])
        if (
            heads is None
            or kv_heads is None
            or depth is None
            or depth_vo is None
            or heads % kv_heads
            or not _fits(depth_vo, depth)
        ):
            raise Refusal(
                seen,
                "heads and head_dim must be fixed, v as wide as q or narrower by a multiple of 8, q heads a multiple of KV heads",
                KEEP,
            )
        h, i, j = ev.bind("h", int_imm(heads)), ev.bind("i", self._num_tokens), ev.bind("j", self._num_tokens)
        column, column_vo = ev.bind("d", int_imm(depth)), ev.bind("c", int_imm(depth_vo))
        kv_head = ev.simplify(tirx.floordiv(h, int_imm(heads // kv_heads)))
        places = ((i, h, column), (j, kv_head, column), (j, kv_head, column_vo))
        views = [
            list(ev.views(argument, (int_imm(0), *place)))
            for argument, place in zip(call.args[:3], places, strict=True)
        ]
        ev.read_positions = False
        value, score = self._fused_value(ev, var, call, h, i, j, depth)
        given = Input(value, score, h, i, j, heads, dtype_of(call.args[0]), None, self._inputs, self._assume_full)
        proof = self._proof(ev, given, ev.read_positions)
        context = _Context(ev, h, i, j, heads, (), var, score, proof, depth)
        axes = _Axes(h, i, j, column)
        v_views = [view for view in views[2] if view.factor == 1.0]
        q, q_factor = self._operand(ev, views[0], axes, i, "q", heads, seen)
        k, k_factor = self._operand(ev, views[1], axes, j, "k", heads, seen)
        v, _ = self._operand(ev, v_views, _Axes(h, i, j, column_vo), j, "v", heads, seen)
        extents = (heads,) if heads > 1 else ()
        output_axes = tuple(range(2 + len(extents)))
        rope = self._rope(context, (views[0][-1], views[1][-1]), axes, v)
        factor = q_factor * k_factor
        form = "R.nn.attention"
        return self._attention(context, (q, k, v), var, output_axes, extents, form, location, factor, rope, seen)

    def _fused_value(self, ev: Evaluator, var: Any, call: Any, h: Any, i: Any, j: Any, depth: int) -> tuple[Any, Any]:
        """(softmax input at (h, i, j), score) of R.nn.attention."""
        attrs, dtype = call.attrs, dtype_of(call)
        score = ev.atom("dot", var, (int_imm(0), h, i, j), call=call)
        scale = float(attrs.scale.value) if attrs.scale is not None else 1.0 / math.sqrt(depth)
        value = tirx.Mul(score, literal(scale, dtype))
        if len(call.args) > 3:
            bias = ev.element(call.args[3], broadcast_index(call.args[3], (int_imm(0), h, i, j)))
            value = tirx.Add(value, bias if str(bias.ty) == dtype else tirx.Cast(dtype, bias))
        if (
            attrs.causal_mask is not None
        ):  # TopLeft and BottomRight are one mask where queries and keys are the same tokens
            value = tirx.Select(j <= i, value, literal(-math.inf, dtype))
        if attrs.window_size is not None:
            window = int_imm(int(attrs.window_size))
            value = tirx.Select(j > i - window, value, literal(-math.inf, dtype))
        return value, score

    # ---- result

    def _attention(
        self,
        context: _Context,
        operands: tuple[Operand, Operand, Operand],
        output: Any,
        output_axes: tuple[int, ...],
        head_extents: tuple[int, ...],
        form: str,
        location: Location,
        operand_factor: float,
        rope: Lifted | str,
        seen: str,
    ) -> Attention:
        q, k, v = operands
        assumptions = context.proof.assumptions
        if isinstance(rope, Lifted):
            q, k, operand_factor = rope.q, rope.k, rope.factor
            if rope.reads_positions:
                assumptions = (*dict.fromkeys((*assumptions, self._counts_tokens())),)
        dtypes = {name: dtype_of(operand.tensor) for name, operand in zip("qkv", (q, k, v), strict=True)}
        if len(set(dtypes.values())) != 1:
            raise Refusal(seen, f"q, k and v differ in data type: {dtypes}", "cast them to one data type")
        dtype = dtypes["q"]
        if dtype not in ("float32", "float16", "bfloat16"):
            raise Refusal(seen, f"data type {dtype} is not supported", "use float32, float16 or bfloat16")
        if k.num_heads != v.num_heads:
            raise Refusal(seen, f"k has {k.num_heads} heads and v {v.num_heads}", KEEP)
        if q.num_heads != context.heads:
            raise Refusal(seen, f"q has {q.num_heads} heads, the scores {context.heads}", KEEP)
        scale = snap_scale(context.proof.scale * operand_factor, context.head_dim)
        if not scale > 0.0:
            raise Refusal(seen, f"the factor on the score is {scale:g}, not positive", "use a positive softmax scale")
        proof = context.proof
        width = static_int(shape_of(v.tensor)[v.axes[-1]])
        head_dim_vo = 0 if width is None or width == context.head_dim else width
        if head_dim_vo and proof.variant is not None:
            raise Refusal(
                seen, f"v has width {width}, q and k {context.head_dim}, in an attention with a variant", KEEP
            )
        heads = (context.heads, k.num_heads, context.head_dim)
        spec = AttentionSpec(*heads, dtype, proof.causal, scale, proof.variant, head_dim_vo)
        rotation = rope.rotation if isinstance(rope, Lifted) else None
        text = f"lifted: {rotation}" if rotation is not None else str(rope)
        return Attention(spec, q, k, v, output, output_axes, head_extents, form, location, assumptions, rotation, text)

    def _rope(self, context: _Context, views: tuple[View, View], axes: _Axes, v: Operand) -> Lifted | str:
        """q and k before their rotary embedding, or why they are taken as they are."""
        ev = context.evaluator
        width_vo = static_int(shape_of(v.tensor)[v.axes[-1]])

        def as_operand(view: View, token: Any, name: str) -> Operand | None:
            try:
                return self._operand(ev, [view], axes, token, name, context.heads, "")[0]
            except Refusal:
                return None

        if not self._rotary_multiple:
            return "not looked for"
        if width_vo != context.head_dim:
            return f"left in the model: v has width {width_vo}, q and k {context.head_dim}"
        try:
            tokens = (context.i, context.j)
            lifted = lift(ev, views, tokens, axes.depth, context.head_dim, self._rotary_multiple, as_operand)
        except NotARotationError as error:
            return f"left in the model: {error}"
        return "none before the first matmul" if lifted is None else lifted

    def _counts_tokens(self) -> str:
        return f"`{self._positions.name}` counts the tokens of a sequence: 0, 1, 2, …"


def _fits(width: int, head_dim: int) -> bool:
    """Whether values may be so wide beside keys of head_dim: as wide, or narrower where kernels count by eights."""
    return width == head_dim or (0 < width < head_dim and width % 8 == 0 and head_dim % 8 == 0)


@dataclass(frozen=True)
class _Axes:
    """Index variables: query head, query token, key token, and the place in a head."""

    h: Any
    i: Any
    j: Any
    depth: Any


@dataclass(frozen=True)
class _Context:
    """What the first half of a match hands to the second."""

    evaluator: Evaluator
    h: Any
    i: Any
    j: Any
    heads: int
    index: Index
    softmax: Any
    score: Any
    proof: MaskProof
    head_dim: int


def _contains_anchor(mod: tvm.IRModule, value: Any) -> bool:
    """Whether a branch, or a Relax function that is called, has a softmax or an attention in it."""
    if isinstance(value, relax.If):
        bodies = [value.true_branch, value.false_branch]
    elif isinstance(value, relax.Call) and isinstance(value.op, ir.GlobalVar):
        callee = mod[value.op]
        bodies = [callee.body] if isinstance(callee, relax.Function) else []
    else:
        return False
    inner = [binding.value for body in bodies for block in getattr(body, "blocks", ()) for binding in block.bindings]
    return any(op_name(part) in _ANCHORS or _contains_anchor(mod, part) for part in inner)


def _head_index(ev: Evaluator, shape: Any, known: dict[int, Any], head: Any) -> Index:
    """An index whose `known` axes are given and whose other axes are the digits of `head`, outermost first."""
    index: list[Any] = []
    stride = math.prod(static_int(dim) or 1 for axis, dim in enumerate(shape) if axis not in known)
    for axis, dim in enumerate(shape):
        if axis in known:
            index.append(known[axis])
            continue
        extent = static_int(dim) or 1
        stride //= extent
        digit = tirx.floormod(tirx.floordiv(head, int_imm(stride)), int_imm(extent))
        index.append(ev.simplify(digit))
    return tuple(index)


def _dot_operands(call: Any, index: Index, inner: Any) -> tuple[tuple[Any, Index], tuple[Any, Index]]:
    """(left tensor, index), (right tensor, index) of one entry of a matmul; `inner` is summed over."""
    a, b = call.args[:2]
    if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
        raise Refusal(
            f"matmul of {format_shape(shape_of(a))} and {format_shape(shape_of(b))}", "an operand is a vector", KEEP
        )
    batch, row, column = index[:-2], index[-2], index[-1]
    left = broadcast_index(a, (*batch, int_imm(0), int_imm(0)))[:-2]
    right = broadcast_index(b, (*batch, int_imm(0), int_imm(0)))[:-2]
    return (a, (*left, row, inner)), (b, (*right, inner, column))


def _atoms_in(ev: Evaluator, expr: Any) -> list[Any]:
    found: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, ir.Var) and node in ev.atoms:
            found.append(ev.atoms[node])

    walk(expr, visit)
    return found


def snap_scale(scale: float, head_dim: int) -> float:
    """The number that was meant: importers multiply float32 square roots, which leaves an error of about 1e-7.

    1/sqrt(head_dim) where the scale is that to within 1e-6, else a decimal of six digits where it is that to within 2e-7.
    """
    for meant, tolerance in ((1.0 / math.sqrt(head_dim), 1e-6), (float(f"{scale:.6g}"), 2e-7)):
        if meant and abs(scale / meant - 1.0) < tolerance:
            return meant
    return scale


def format_shape(shape: Any) -> str:
    """A shape as "[1, 9, n, n]"."""
    return "[unknown]" if shape is None else "[" + ", ".join(format_expr(dim) for dim in shape) + "]"

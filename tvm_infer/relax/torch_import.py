"""PyTorch programs as Relax modules: `from_torch` for any torch.export program, `export_hf` for Hugging Face causal language models."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import tvm
from tvm import ir, relax, sym, tirx
from tvm.sym.analyzer import ProofStrength

from tvm_infer.errors import ArgumentError, MissingDependencyError, ModelError

from . import torch_integers, torch_matmul
from .nodes import bindings_of, known_shape, op_name, shape_of, static_int, used_vars

_HF_ATTENTION = "tvm_infer"  # name under which transformers knows our attention and mask functions
_HF_LAYERS = ("full_attention", "sliding_attention")
_EXAMPLE_TOKENS, _EXAMPLE_LOGITS = 7, 3  # lengths while tracing: torch.export fixes dimensions of length 0 and 1


@dataclass(frozen=True)
class ImportedModel:
    """A Relax module and the weights that its function takes.

    mod : module with one function `main`; its parameters are the inputs (attribute num_input), then the weights.
    weights : parameter name -> torch tensor (shares memory with the model), in the order of the parameters.
    torch_names : parameter name -> name in the model's state_dict.
    """

    mod: tvm.IRModule
    weights: Mapping[str, Any]
    torch_names: Mapping[str, str]


def from_torch(
    program: Any, *, dim_names: Mapping[str, str] = MappingProxyType({}), keep_attention: bool = True
) -> ImportedModel:
    """Import a torch.export program; parameters become inputs of `main`, buffers and constants become constants.

    Parameters
    ----------
    program : torch.export.ExportedProgram.
    dim_names : "input:axis" -> name for the symbolic length of that axis, instead of torch's (s70, …).
    keep_attention : keep F.scaled_dot_product_attention as one R.nn.attention (with its scale, mask and repeated KV heads) instead of
        decomposing it; RewritePagedAttention takes both, this form compiles faster.

    Raises
    ------
    MissingDependencyError : torch is not installed. ArgumentError : a wrong key in dim_names.
    """
    _require("torch", "torch")
    with _quiet_torch():
        mod = _import(program, keep_attention)
    func = mod["main"].without_attr("params")
    func = _drop_unused_weights(_name_lengths(_InboundSlices.apply(func), dim_names))
    imported = tvm.IRModule({"main": func})
    targets = {
        str(spec.arg.name): str(spec.target) for spec in program.graph_signature.input_specs if spec.target is not None
    }
    names = [str(param.name) for param in func.params[int(func.attrs["num_input"]) :]]
    weights = {name: program.state_dict[targets[name]].detach() for name in names}
    return ImportedModel(imported, weights, {name: targets[name] for name in names})


def _import(program: Any, keep_attention: bool) -> tvm.IRModule:
    from tvm.relax.frontend.torch import from_exported_program

    converters = {**torch_matmul.CONVERTERS, **torch_integers.CONVERTERS}
    options: dict[str, Any] = {"keep_params_as_input": True, "custom_convert_map": converters}
    if keep_attention:
        import torch

        table = torch.export.default_decompositions()
        table.pop(torch.ops.aten.scaled_dot_product_attention.default, None)
        program = _without_asserts(program.run_decompositions(table))
        options["run_ep_decomposition"] = False
        converters["scaled_dot_product_attention.default"] = _convert_attention
    return from_exported_program(program, **options)


def _without_asserts(program: Any) -> Any:
    """The program, whose graph is its own, without its tests of lengths: their arithmetic (torch.sym_min) has no converter."""
    import torch

    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return program


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without a warning about torch's own use of its pytrees, which a caller can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        yield


def export_hf(model: Any, *, max_tokens: int | None = None, keep_attention: bool = True) -> ImportedModel:
    """Export a Hugging Face causal language model (LlamaForCausalLM and its kin) for packed tokens.

    `main(input_ids [1, num_tokens] int64, position_ids [1, num_tokens] int64, logit_indices [num_logits] int64, *weights)` returns a
    tuple of the logits [1, num_logits, vocab_size] of the rows that `logit_indices` names. Attention is causal over the row of tokens,
    with the model's sliding windows, soft caps and sinks, and has no mask input, ready for RewritePagedAttention. The model is left as
    it was.

    Parameters
    ----------
    model : a transformers PreTrainedModel with an lm_head, on the CPU.
    max_tokens : upper bound of num_tokens, which lets TVM plan memory ahead; None leaves it open.

    Raises
    ------
    MissingDependencyError : torch or transformers is not installed. ModelError : the model is no causal language model, or one of its
    layers has an attention that is none of these (chunked, bidirectional, position biases or a mask of its own).
    """
    _require("torch", "torch")
    _require("transformers", "llm")
    import torch

    _check_model(model)
    if max_tokens is not None and max_tokens <= _EXAMPLE_TOKENS:
        raise ArgumentError(f"max_tokens is {max_tokens}; it must be above {_EXAMPLE_TOKENS}")

    class Packed(torch.nn.Module):
        """The model as a function of packed tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, position_ids: Any, logit_indices: Any) -> Any:
            output = self.model(
                input_ids=input_ids, position_ids=position_ids, logits_to_keep=logit_indices, use_cache=False
            )
            return output.logits

    num_tokens = torch.export.Dim("num_tokens", min=2, max=max_tokens)
    num_logits = torch.export.Dim("num_logits", min=2)
    device = next(model.parameters()).device
    inputs = (
        torch.zeros(1, _EXAMPLE_TOKENS, dtype=torch.int64, device=device),
        torch.arange(_EXAMPLE_TOKENS, device=device)[None],
        torch.arange(_EXAMPLE_LOGITS, device=device),
    )
    shapes = {"input_ids": {1: num_tokens}, "position_ids": {1: num_tokens}, "logit_indices": {0: num_logits}}
    with _packed_attention(model), torch.no_grad(), _quiet_torch():
        # torch 2.11 guards min(64 n, 256 n) = 64 n without it, and finds that not to hold; torch 2.6 does not have it
        name = "prefer_deferred_runtime_asserts_over_guards"
        options: dict[str, Any] = {name: True} if name in inspect.signature(torch.export.export).parameters else {}
        program = torch.export.export(Packed().eval(), inputs, dynamic_shapes=shapes, **options)
    imported = from_torch(
        program,
        dim_names={"input_ids:1": "num_tokens", "logit_indices:0": "num_logits"},
        keep_attention=keep_attention,
    )
    # Packed prefixes every name with "model."
    torch_names = {name: target.removeprefix("model.") for name, target in imported.torch_names.items()}
    return ImportedModel(imported.mod, imported.weights, torch_names)


def _require(package: str, extra: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"{package} is not installed, and importing a {package} model needs it: pip install 'tvm_infer[{extra}]'"
        ) from error


def _check_model(model: Any) -> None:
    """Refuse what is no causal language model of layers that `_hf_attention` knows."""
    config = getattr(model, "config", None)
    kind = type(model).__name__
    if (
        config is None
        or not callable(getattr(model, "get_output_embeddings", None))
        or model.get_output_embeddings() is None
    ):
        raise ModelError(f"{kind} is not a Hugging Face causal language model: it has no config with an output head")
    if getattr(config, "is_causal", True) is False or getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is not a causal decoder; only those can be served from a KV cache of past tokens")
    layers = sorted(set(getattr(config, "layer_types", None) or []) - set(_HF_LAYERS))
    if layers:
        raise ModelError(f"{kind} has layers of type {layers}; only {' and '.join(_HF_LAYERS)} layers are supported")


@contextmanager
def _packed_attention(model: Any) -> Iterator[None]:
    """Give the model, for the time of the export, an attention that is causal by itself and a mask function that makes no tensor."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_HF_ATTENTION, _hf_attention)
    AttentionMaskInterface.register(_HF_ATTENTION, _hf_mask)
    was_training, before = model.training, model.config._attn_implementation
    model.eval()
    model.config._attn_implementation = _HF_ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before
        model.train(was_training)


@dataclass(frozen=True)
class _LocalMask:
    """What stands for the mask of layers with a sliding window. size : keys that a query sees, its own among them."""

    size: int


def _hf_mask(*args: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any) -> _LocalMask | None:
    """No tensor: packed tokens have no padding, and which keys of other sequences a token sees is the KV cache's affair."""
    if use_vmap:
        raise ModelError(
            "the model has a mask function of its own; only causal masks and sliding windows are supported"
        )
    return None if local_size is None else _LocalMask(int(local_size))


def _hf_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **kwargs: Any
) -> Any:
    """Causal attention, query [1, heads, n, head_dim], key and value [1, kv_heads, n, head_dim], with sliding_window, softcap and s_aux
    (sinks [heads]) as transformers' models pass them; refuses every other kind."""
    import torch

    kind = type(module).__name__
    if kwargs.get("position_bias") is not None:
        raise ModelError(
            f"{kind} uses position_bias, which export_hf does not know: export the model by hand (from_torch)"
        )
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{kind} is not causal: only causal attention is supported")
    window = _window(kind, attention_mask, kwargs.get("sliding_window"))
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if window is None and softcap is None and sinks is None:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        output = _written_attention(query, key, value, scaling, window, softcap, sinks)
    return output.transpose(1, 2).contiguous(), None


def _window(kind: str, mask: Any, named: int | None) -> int | None:
    """The window of a layer, which its mask and the model's own argument must say alike."""
    if not (mask is None or isinstance(mask, _LocalMask)):
        raise ModelError(f"{kind} got a mask of its own: only causal masks and sliding windows are supported")
    size = None if mask is None else mask.size
    if named is not None and named != size:
        raise ModelError(
            f"{kind} uses sliding_window={named}, and its mask has {'none' if size is None else f'a window of {size}'}: export the "
            "model by hand (from_torch)"
        )
    return size


def _written_attention(
    query: Any, key: Any, value: Any, scaling: float | None, window: int | None, softcap: float | None, sinks: Any
) -> Any:
    """The same written out, for the pass to take apart; [1, heads, n, head_dim]."""
    import torch

    heads, n = query.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    positions = torch.arange(n, device=query.device)
    distance = positions[:, None] - positions[None, :]
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, heads, 1, 1).expand(1, heads, n, 1).to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights if sinks is None else weights[..., :-1]) @ value


def _convert_attention(node: Any, importer: Any) -> Any:
    """aten.scaled_dot_product_attention as R.nn.attention in BSHD layout, with KV heads repeated as enable_gqa says.

    The repeat is explicit because TVM's lowering of R.nn.attention is wrong for unequal head numbers; the pass takes it off again.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    emit = importer.block_builder.emit
    q, k, v = (importer.env[given[name]] for name in names[:3])
    if given.get("dropout_p"):
        raise ModelError(f"attention {node.name} has dropout {given['dropout_p']}: export the model in eval mode")
    rank = len(shape_of(q))
    if rank == 3:
        q, k, v = (emit(relax.op.expand_dims(x, 0)) for x in (q, k, v))
    elif rank != 4:
        raise ModelError(f"attention {node.name} has {rank} axes; 3 or 4 are supported")
    q, k, v = (emit(relax.op.permute_dims(x, [0, 2, 1, 3])) for x in (q, k, v))
    if given.get("enable_gqa"):
        k, v = (_repeat_heads(emit, x, shape_of(q)[2]) for x in (k, v))
    bias = given.get("attn_mask")
    if bias is not None:
        bias = importer.env[bias]
        if str(bias.ty.dtype) == "bool":
            dtype = str(q.ty.dtype)
            bias = emit(relax.op.where(bias, relax.const(0, dtype), relax.const(float("-inf"), dtype)))
        axes = list(range(4 - len(shape_of(bias))))
        bias = emit(relax.op.expand_dims(bias, axes)) if axes else bias
    output = emit(
        relax.op.nn.attention(
            q, k, v, bias, scale=given.get("scale"), causal_mask="TopLeft" if given.get("is_causal") else None
        )
    )
    output = emit(relax.op.permute_dims(output, [0, 2, 1, 3]))
    return emit(relax.op.squeeze(output, [0])) if rank == 3 else output


def _repeat_heads(emit: Any, x: Any, heads: Any) -> Any:
    """[b, n, kv_heads, d] -> [b, n, heads, d], each KV head heads / kv_heads times in a row."""
    batch, length, kv_heads, depth = shape_of(x)
    group = int(heads) // int(kv_heads)
    if group == 1:
        return x
    x = emit(relax.op.expand_dims(x, 3))
    x = emit(relax.op.broadcast_to(x, [batch, length, kv_heads, group, depth]))
    return emit(relax.op.reshape(x, [batch, length, heads, depth]))


def _name_lengths(func: Any, dim_names: Mapping[str, str]) -> Any:
    """Rename symbolic lengths and drop torch's lower bounds.

    torch.export takes dynamic lengths to be at least 2 while it traces; the operators it leaves hold for 1 as well (tested), which a
    decode step of one sequence needs.
    """
    upper = dict(func.attrs["tir_var_upper_bound"]) if "tir_var_upper_bound" in func.attrs else {}
    params = {str(param.name): param for param in func.params}
    renamed: dict[Any, Any] = {}
    for key, name in dim_names.items():
        param, _, axis = key.partition(":")
        if param not in params or not axis.isdigit() or int(axis) >= len(shape_of(params[param])):
            raise ArgumentError(f'dim_names has the key {key!r}; it must be "input:axis" of one of {list(params)[:4]}')
        length = shape_of(params[param])[int(axis)]
        if not isinstance(length, ir.Var):
            raise ArgumentError(f"dim_names names axis {key}, which has the length {length}: it is not symbolic")
        renamed[length] = tirx.Var(name, "int64")
        if str(length.name) in upper:
            upper[name] = upper.pop(str(length.name))
    func = func.without_attr("tir_var_lower_bound")
    if renamed:
        func = func.bind_symbolic_vars(renamed)
    if "tir_var_upper_bound" in func.attrs:
        known = {str(var.name) for var in relax.analysis.free_symbolic_vars(func)} | set(dim_names.values())
        func = func.with_attr("tir_var_upper_bound", {k: v for k, v in upper.items() if k in known or not dim_names})
    return func


def _drop_unused_weights(func: Any) -> Any:
    """Leave out weights that nothing reads (torch lists tied weights under each of their names)."""
    num_input = int(func.attrs["num_input"])
    used = {var for binding in bindings_of(func) for var in used_vars(binding.value)} | set(used_vars(func.body.body))
    params = [*func.params[:num_input], *(param for param in func.params[num_input:] if param in used)]
    return relax.Function(params, func.body, func.ret_ty, func.is_pure, func.attrs, func.span)


@relax.expr_functor.mutator
class _InboundSlices(relax.PyExprMutator):
    """Slices `x[:n]` with n <= len(x), as the bounds of the dynamic lengths say, get the length n.

    The importer gives them min(n, len(x)), and everything that is computed with a sliced mask buffer loses its shape.
    """

    def __init__(self, mod: tvm.IRModule, bounds: Mapping[Any, int]) -> None:
        super().__init__(mod)
        self._analyzer = sym.Analyzer()
        for length, upper in bounds.items():
            self._analyzer.bind(length, ir.Range(1, upper + 1))

    @staticmethod
    def apply(func: Any) -> Any:
        """The function with such slices marked, and all types inferred anew; the same function where it has none."""
        upper = dict(func.attrs["tir_var_upper_bound"]) if "tir_var_upper_bound" in func.attrs else {}
        lengths = {dim for param in func.params for dim in known_shape(param) or () if isinstance(dim, ir.Var)}
        bounds = {dim: int(upper[str(dim.name)]) for dim in lengths if str(dim.name) in upper}
        mutator = _InboundSlices(tvm.IRModule(), bounds)
        if not any(mutator.is_inbound(binding.value) for binding in bindings_of(func)):
            return func
        return mutator.visit_expr(func)

    def is_inbound(self, call: Any) -> bool:
        """Whether a slice from 0 provably ends within every axis that it cuts, at a symbolic length."""
        shape = known_shape(call.args[0]) if op_name(call) == "relax.strided_slice" and len(call.args) == 5 else None
        if shape is None or call.attrs.assume_inbound:
            return False
        axes, begin, end, strides = (list(argument.fields) for argument in call.args[1:])
        return any(static_int(part) is None for part in end) and all(
            static_int(first) == 0
            and static_int(stride) == 1
            and self._analyzer.can_prove(last <= shape[static_int(axis) or 0], ProofStrength.SYMBOLIC_BOUND)
            for axis, first, last, stride in zip(axes, begin, end, strides, strict=True)
        )

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if self.is_inbound(call):
            axes, begin, end, strides = (list(argument.fields) for argument in call.args[1:])
            return relax.op.strided_slice(
                call.args[0], [static_int(axis) for axis in axes], begin, end, strides, assume_inbound=True
            )
        if known_shape(call) is None and isinstance(call.op, ir.Op) and isinstance(call.ty, relax.TensorType):
            return relax.Call(call.op, call.args, call.attrs)  # its operands may have shapes now
        return call

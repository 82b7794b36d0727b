"""What a matched attention computes, in float64, beside what its module computed before."""

from __future__ import annotations

import numpy as np
import tvm
from attention_writer import DIM, HEADS, KV_HEADS
from tvm import relax

from tvm_infer.variant import numpy_eval


def inputs_of(n, extra):
    rng = np.random.default_rng(7)
    qkv = [rng.standard_normal((1, n, heads, DIM)).astype("float32") * 2 for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return qkv, [rng.standard_normal(shape).astype("float32") for shape in extra]


def original(mod, n, qkv, extra):
    """What the module computes itself, [n, heads, head_dim]."""
    with tvm.transform.PassContext(opt_level=0):
        vm = relax.VirtualMachine(tvm.compile(mod, "llvm"), tvm.cpu())
    positions = np.arange(n)[None]
    args = [tvm.runtime.tensor(np.ascontiguousarray(x)) for x in (positions, positions, *qkv, *extra)]
    return vm["main"](*args).numpy()[0]


def attention_of(match, n, qkv, extra):
    """The matched attention in float64, [n, heads, head_dim]; extra : weight name -> array."""
    spec = match.spec
    q, k, v = (x[0].astype("float64") for x in qkv)
    k, v = (np.repeat(x, spec.group_size, 1) for x in (k, v))
    values = {
        "value": np.einsum("ihd,jhd->hij", q, k) * spec.sm_scale,
        "qo_head": np.arange(HEADS)[:, None, None],
        "q_pos": np.arange(n)[None, :, None],
        "kv_pos": np.arange(n)[None, None, :],
    }
    logits, seen, output = values["value"], values["kv_pos"] <= values["q_pos"], None
    if spec.variant is not None:
        for name, value in spec.variant.values:
            values[name] = extra[value.name] if hasattr(value, "name") else getattr(value, "array", value)
        holes = spec.variant.variant
        assert np.all(numpy_eval.evaluate(holes.mask, values) <= seen)
        seen = numpy_eval.evaluate(holes.mask, values) & np.ones_like(seen)
        # kernels compute in float32: what is left of a mask's number would take the digits of the score away
        nodes = [] if holes.logits is None else holes.logits.nodes
        assert all(abs(node.value) < 1e6 for node in nodes if node.op == "const"), holes
        logits = logits if holes.logits is None else numpy_eval.evaluate(holes.logits, values)
        output = holes.output
    logits = np.where(seen, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    result = np.einsum("hij,jhd->hid", weights / total, v)
    if output is not None:
        result = numpy_eval.evaluate(output, {**values, "value": result, "lse": np.log(total) + top})
    return result.transpose(1, 0, 2)


def check(match, mod, weights=(), n=31, *, relative=False):
    """The match computes what the module did. relative : to logits that may be large, whose float32 is off by as much more."""
    qkv, extra = inputs_of(n, [shape for _, shape in weights])
    expected = original(mod, n, qkv, extra)
    named = {name: array for (name, _), array in zip(weights, extra, strict=True)}
    np.testing.assert_allclose(attention_of(match, n, qkv, named), expected, atol=1e-3 if relative else 2e-5)

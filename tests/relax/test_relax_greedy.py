"""The search for the largest logit that a captured step ends with."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from tvm_infer.relax.decode_graph import with_greedy_tokens


def compiled(vocab_size, leading=(1,)):
    builder, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType([*leading, n, vocab_size], "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit_output(relax.op.add(x, relax.const(0, "float32")))
        builder.emit_func_output(y)
    mod = builder.get()
    mod.update_func(mod.get_global_var("main"), with_greedy_tokens(mod["main"]))
    return relax.VirtualMachine(tvm.compile(mod, target="llvm"), tvm.cpu())["main"]


@pytest.mark.parametrize("vocab_size", [1, 2, 131, 256, 1000, 32768, 49152])
def test_first_of_the_largest(vocab_size):
    """Few values and so many ties; any vocabulary, prime ones too, which cannot be cut."""
    rng = np.random.default_rng(vocab_size)
    for values in (3, 100_000):
        x = rng.integers(0, values, (1, 5, vocab_size)).astype(np.float32)
        x[0, 1] = -np.inf
        x[0, 1, rng.integers(vocab_size)] = -3e38
        logits, tokens = compiled(vocab_size)(tvm.runtime.tensor(x))
        np.testing.assert_array_equal(logits.numpy(), x)
        assert tokens.dtype == "int64" and tokens.shape == (1, 5)
        np.testing.assert_array_equal(tokens.numpy(), x.argmax(-1))


@pytest.mark.parametrize("vocab_size", [131, 49152])
def test_rows_of_nan_leave_the_others_alone(vocab_size):
    x = np.full((1, 3, vocab_size), np.nan, np.float32)
    x[0, 1] = np.arange(vocab_size)
    tokens = compiled(vocab_size)(tvm.runtime.tensor(x))[1].numpy()
    assert tokens[0, 1] == vocab_size - 1


@pytest.mark.parametrize("vocab_size", [131, 49152])
def test_logits_without_a_batch(vocab_size):
    """A model may return [n, vocab]: its tokens are [1, n] as others'."""
    x = np.random.default_rng(0).standard_normal((4, vocab_size), np.float32)
    logits, tokens = compiled(vocab_size, leading=())(tvm.runtime.tensor(x))
    assert logits.shape == (4, vocab_size)
    np.testing.assert_array_equal(tokens.numpy(), x.argmax(-1)[None])

"""tvm_infer.compile: sources, the cache folder, the report, errors; the passes after attention as before / expected modules."""

from __future__ import annotations

import pathlib
import threading
import time

import numpy as np
import pytest
import torch
import tvm
from llamas import hf_greedy, hf_logits, prompts_of, tiny_llama
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

import tvm_infer
from tvm_infer import cache_dir, compiler, errors
from tvm_infer.relax import RewritePagedAttention, from_torch
from tvm_infer.relax.dispatch_matmul import DispatchMatmul
from tvm_infer.relax.sampled_rows import SampledRows


def test_second_compile_uses_the_first(llama, imported, executable, cache_folder, monkeypatch):
    from tvm_infer.relax import pipeline

    monkeypatch.setattr(pipeline, "lower", lambda *args: pytest.fail("compiled again"))
    again = tvm_infer.compile(imported, max_tokens=64)
    assert again.from_cache and not executable.from_cache
    prompt = prompts_of(1, seed=9)[0]
    (generation,) = again.generate([prompt], max_new_tokens=4)
    assert generation.tokens == hf_greedy(llama, prompt, 4)
    assert not list(cache_folder.glob("compiled/*.tmp-*"))


def test_weights_do_not_change_the_code(executable):
    """Another model of the same shape runs on the same kernels with its own weights."""
    other = tiny_llama(seed=1)
    compiled = tvm_infer.compile(other, max_tokens=64)
    assert compiled.from_cache
    cache = compiled.new_cache(num_pages=4)
    cache.add_sequence(0)
    np.testing.assert_allclose(compiled.step(cache, [(0, [1, 2])])[0], hf_logits(other, [1, 2])[-1], atol=2e-4)


def test_cache_false_leaves_nothing(llama, imported, cache_folder):
    before = sorted(p.name for p in cache_folder.rglob("*"))
    steps = []
    compiled = tvm_infer.compile(
        imported, max_tokens=32, cache=False, progress=lambda step, fraction: steps.append((step, fraction))
    )
    assert [fraction for _, fraction in steps] == sorted(fraction for _, fraction in steps)
    assert steps[-1] == ("compiling kernels", 1.0)
    (generation,) = compiled.generate([[1, 2, 3]], max_new_tokens=3)
    assert generation.tokens == hf_greedy(llama, [1, 2, 3], 3)
    assert sorted(p.name for p in cache_folder.rglob("*")) == before


def test_report_names_what_was_done(executable, tmp_path):
    text = executable.explain()
    assert "2 attention(s) rewritten, 0 refused" in text
    assert "15 matmul(s) to tvm_infer.matmul, 0 left to TVM" in text
    assert "4 of them with the addition that followed (tvm_infer.matmul_add)" in text
    assert "2 x  [num_tokens, 80] x [48, 80]^T + [num_tokens, 48]" in text
    executable.export_library(tmp_path / "model.so")
    assert (tmp_path / "model.so").stat().st_size > 0


class TinyDecoder(torch.nn.Module):
    """A decoder of another family: learned positions, LayerNorm, biases; logits of every row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.tokens, self.positions = torch.nn.Embedding(50, 32), torch.nn.Embedding(64, 32)
        self.norm, self.qkv, self.out = torch.nn.LayerNorm(32), torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.head = torch.nn.Linear(32, 50)

    def forward(self, input_ids, position_ids):
        x = self.tokens(input_ids) + self.positions(position_ids)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("form", ["program", "module"])
def test_torch_program_without_logit_indices(form):
    """Logits that cover every row are narrowed to the rows that sample; a bias stays."""
    decoder = TinyDecoder().eval()
    n = torch.export.Dim("n", min=2, max=40)
    ids = torch.arange(7)[None]
    program = torch.export.export(
        decoder, (ids, ids.clone()), dynamic_shapes={"input_ids": {1: n}, "position_ids": {1: n}}
    )
    if form == "program":
        compiled = tvm_infer.compile(program, max_tokens=40)
    else:
        imported = from_torch(program)
        compiled = tvm_infer.compile(imported.mod, params=dict(imported.weights), max_tokens=40)
    assert "rows are taken before the product" in compiled.explain()
    prompt = [4, 8, 15, 16, 23, 42]
    cache = compiled.new_cache(num_pages=4)
    cache.add_sequence(0)
    with torch.inference_mode():
        expected = decoder(torch.tensor([[*prompt, 1]]), torch.arange(7)[None])[0].numpy()
    first = compiled.step(cache, [(0, prompt)], rows=[0, 5])
    np.testing.assert_allclose(first, expected[[0, 5]], atol=1e-5)
    np.testing.assert_allclose(compiled.step(cache, [(0, [1])])[0], expected[6], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("no/such/model.gguf", errors.ModelError, "no/such/model.gguf does not exist"),
        (".", errors.ModelError, "is a folder"),
        (object(), errors.ArgumentError, "model is a object"),
        (torch.nn.Linear(2, 2), errors.ModelError, "not a Hugging Face causal language model"),
    ],
)
def test_models_that_are_none(model, kind, message):
    with pytest.raises(kind, match=message):
        tvm_infer.compile(model)


@pytest.mark.parametrize("target", [{"kind": "cuda", "arch": "sm_90a"}, {"kind": "opencl"}, "no-such-target"])
def test_targets_that_are_none(imported, target):
    with pytest.raises(errors.ArgumentError, match="target"):
        tvm_infer.compile(imported, target=target)


def test_function_without_packed_tokens():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((1, 4), "float32")):
            R.func_attr({"num_input": 1})
            return x

    with pytest.raises(errors.ModelError, match="does not take packed tokens"):
        tvm_infer.compile(Module)
    with pytest.raises(errors.ModelError, match="no Relax function 'decode'"):
        tvm_infer.compile(Module, function="decode")
    with pytest.raises(errors.ArgumentError, match="no parameters"):
        tvm_infer.compile(Module, params={"y": np.zeros(1)})


def test_missing_weight(executable):
    from tvm_infer.runtime import Executable

    folder = executable._library_path.parent
    with pytest.raises(errors.ModelError, match="weights of the compiled model are not given"):
        Executable(folder, {})


def test_other_abi(executable, tmp_path):
    import dataclasses

    from tvm_infer.runtime import Manifest

    dataclasses.replace(executable.manifest, abi_version=99).save(tmp_path)
    with pytest.raises(errors.AbiError, match=r"ABI 99.*ABI \d+"):
        Manifest.load(tmp_path)


# The cache folder


def test_a_folder_is_made_once():
    made = []

    def make(folder):
        made.append(folder)
        time.sleep(0.2)
        (folder / "x").write_text("whole")

    def get():
        results.append(cache_dir.published_folder("test", "once", make).joinpath("x").read_text())

    results: list[str] = []
    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["whole"] * 4 and len(made) == 1


def test_a_failed_folder_is_not_published(cache_folder):
    def make(folder):
        (folder / "half").write_text("")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        cache_dir.published_folder("test", "failed", make)
    assert cache_dir.find("test", "failed") is None
    assert not list((cache_folder / "test").glob("failed.tmp-*"))


def test_leftovers_of_a_dead_process_are_removed(cache_folder):
    (cache_folder / "test").mkdir(exist_ok=True)
    stale = cache_folder / "test" / "key.tmp-abc"
    stale.mkdir()
    cache_dir.published_folder("test", "key", lambda folder: None)
    assert not stale.exists() and (cache_folder / "test" / "key").is_dir()


def test_digests_separate_parts():
    assert cache_dir.digest_of("ab", "c") != cache_dir.digest_of("a", "bc")


def test_everything_that_makes_compiled_code_is_in_its_key(monkeypatch):
    """A manifest of another form, kept under the same key, would be refused at every start."""
    keyed = {}
    real = cache_dir.digest_of_file
    monkeypatch.setattr(compiler.cache_dir, "digest_of_file", lambda path: keyed.setdefault(str(path), real(path)))
    compiler._versions()
    package = pathlib.Path(compiler.__file__).parent
    names = {str(pathlib.Path(path).relative_to(package)) for path in keyed}
    assert {"compiler.py", "spec.py", "rope.py", "runtime/manifest.py", "runtime/library.py"} <= names
    assert {"relax/pipeline.py", "relax/decode_graph.py", "models/llama.py", "lib/libtvm_infer.so"} <= names


# DispatchMatmul, SampledRows


@I.ir_module
class Products:
    @R.function
    def main(
        x: R.Tensor((1, "n", 8), "float32"),
        w: R.Tensor((5, 8), "float32"),
        u: R.Tensor((8, 6), "float32"),
        bias: R.Tensor((5,), "float32"),
        h: R.Tensor(("n", 8), "float16"),
        v: R.Tensor((8, 3), "float16"),
        batched: R.Tensor((1, 8, 2), "float32"),
    ):
        with R.dataflow():
            wt = R.permute_dims(w)
            y = R.matmul(x, wt)
            z = R.add(y, bias)
            p = R.matmul(x, u)
            half = R.matmul(h, v)
            b = R.matmul(x, batched)
            out = (z, p, half, b)
            R.output(out)
        return out


def test_dispatch_matmul_before_and_after():
    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, "n", 8), "float32"),
            w: R.Tensor((5, 8), "float32"),
            u: R.Tensor((8, 6), "float32"),
            bias: R.Tensor((5,), "float32"),
            h: R.Tensor(("n", 8), "float16"),
            v: R.Tensor((8, 3), "float16"),
            batched: R.Tensor((1, 8, 2), "float32"),
        ):
            n = T.int64()
            with R.dataflow():
                y = R.call_dps_packed(
                    "tvm_infer.matmul", (x, w, R.prim_value(1)), out_ty=R.Tensor((1, n, 5), "float32")
                )
                z = R.add(y, bias)
                p = R.call_dps_packed(
                    "tvm_infer.matmul", (x, u, R.prim_value(0)), out_ty=R.Tensor((1, n, 6), "float32")
                )
                half = R.matmul(h, v)
                b = R.matmul(x, batched)
                out = (z, p, half, b)
                R.output(out)
            return out

    dispatch = DispatchMatmul()
    tvm.ir.assert_structural_equal(dispatch(Products), Expected)
    assert [(d.m, d.k, d.n, d.weight, d.transpose_b) for d in dispatch.report.dispatched] == [
        ("n", "8", "5", "w", True),
        ("n", "8", "6", "u", False),
    ]
    why = [reason.why for reason in dispatch.report.left]
    assert len(why) == 2 and "float16" in why[0] and "rank 3" in why[1]
    assert "2 matmul(s) to tvm_infer.matmul, 2 left to TVM" in str(dispatch.report)


def test_a_transposed_weight_that_is_used_elsewhere_stays():
    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor(("n", 8), "float32"), w: R.Tensor((5, 8), "float32")):
            with R.dataflow():
                wt = R.permute_dims(w, axes=[1, 0])
                y = R.matmul(x, wt)
                out = (y, wt)
                R.output(out)
            return out

    text = DispatchMatmul()(Module).script()
    assert "permute_dims" in text and "tvm_infer.matmul" in text


def test_sampled_rows_before_and_after():
    @I.ir_module
    class Before:
        @R.function
        def main(
            input_ids: R.Tensor((1, "n"), "int64"), table: R.Tensor((9, 4), "float32"), w: R.Tensor((4, 9), "float32")
        ):
            n = T.int64()
            R.func_attr({"num_input": 1})
            with R.dataflow():
                x = R.take(table, input_ids, axis=0)
                logits = R.matmul(x, w)
                scaled = R.multiply(logits, R.const(0.5, "float32"))
                flat = R.reshape(scaled, R.shape([n, 9]))
                R.output(flat)
            return flat

    @I.ir_module
    class Expected:
        @R.function
        def main(
            input_ids: R.Tensor((1, "n"), "int64"),
            logit_indices: R.Tensor(("m",), "int64"),
            table: R.Tensor((9, 4), "float32"),
            w: R.Tensor((4, 9), "float32"),
        ):
            m = T.int64()
            R.func_attr({"num_input": 2})
            with R.dataflow():
                x = R.take(table, input_ids, axis=0)
                rows = R.take(x, logit_indices, axis=1, mode="fast")
                logits = R.matmul(rows, w)
                scaled = R.multiply(logits, R.const(0.5, "float32"))
                flat = R.reshape(scaled, R.shape([m, 9]))
                out = (flat,)
                R.output(out)
            return out

    tvm.ir.assert_structural_equal(SampledRows()(Before), Expected)


def test_sampled_rows_says_what_stands_in_the_way():
    @I.ir_module
    class Module:
        @R.function
        def main(
            input_ids: R.Tensor((1, "n"), "int64"), table: R.Tensor((9, 4), "float32"), w: R.Tensor((4, 9), "float32")
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                x = R.take(table, input_ids, axis=0)
                logits = R.matmul(x, w)
                total = R.sum(logits, axis=[1], keepdims=True)
                R.output(total)
            return total

    with pytest.raises(errors.ModelError, match=r"relax\.sum \(total\) stands in the way"):
        SampledRows()(Module)


def test_paged_attention_keeps_its_place_before_the_weights(imported):
    mod = SampledRows()(RewritePagedAttention()(imported.mod))
    names = [str(p.name) for p in mod["main"].params[:4]]
    assert names == ["input_ids", "position_ids", "logit_indices", "kv_cache"]

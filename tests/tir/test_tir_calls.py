"""Our functions from TIR, three ways; each is compiled, exported, loaded in a fresh process and run there.

T.call_packed     needs tvm_infer loaded in the process (its functions are registered globally)
T.call_cpacked    the symbols are linked into the model's library: nothing of tvm_infer is needed to run it
T.call_extern     likewise, by plain C symbols with raw pointers
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

import tvm_infer
from tvm_infer import _ffi
from tvm_infer.testing import make_paged_batch, relative_error

# a fixed problem: 5 requests of 3 query heads on 1 KV head, page_size 4; the plan has 3 CTAs
TOKENS, REQUESTS, HEADS, DIM, PAGE, PAGES, TABLE = 9, 5, 3, 24, 4, 23, 25
FLOATS = 4096  # workspace
WORDS = 1024  # plan buffer
SCALE = 0.25


def problem():
    return make_paged_batch(
        [1, 4, 1, 3, 0],
        [17, 4, 33, 9, 7],
        num_qo_heads=HEADS,
        num_kv_heads=1,
        head_dim=DIM,
        page_size=PAGE,
        seed=3,
        sm_scale=SCALE,
    )


def plan_words(batch) -> np.ndarray:
    buffer = np.zeros(WORDS, np.int32)
    tvm_infer.plan(
        batch.qo_indptr,
        batch.kv_len,
        num_qo_heads=HEADS,
        num_kv_heads=1,
        head_dim=DIM,
        num_ctas=3,
        out=buffer,
        max_partial_rows=FLOATS // (DIM + 1),
    )
    return buffer


@I.ir_module
class CallPacked:
    @T.prim_func
    def attend(
        plan: T.Buffer((WORDS,), "int32"),
        q: T.Buffer((TOKENS, HEADS, DIM), "float32"),
        cache: T.Buffer((PAGES, 2, 1, PAGE, DIM), "float32"),
        indptr: T.Buffer((REQUESTS + 1,), "int32"),
        indices: T.Buffer((TABLE,), "int32"),
        workspace: T.Buffer((FLOATS,), "float32"),
        o: T.Buffer((TOKENS, HEADS, DIM), "float32"),
    ):
        T.func_attr({"global_symbol": "attend"})
        # a null handle is None: keys and values are in one tensor, and no LSE is wanted
        T.evaluate(
            T.call_packed(
                "tvm_infer.paged_attention",
                plan,
                q,
                cache,
                T.reinterpret("handle", T.uint64(0)),
                0,
                indptr,
                indices,
                T.float64(SCALE),
                workspace,
                o,
                T.reinterpret("handle", T.uint64(0)),
            )
        )

    @R.function
    def main(
        plan: R.Tensor((WORDS,), "int32"),
        q: R.Tensor((TOKENS, HEADS, DIM), "float32"),
        cache: R.Tensor((PAGES, 2, 1, PAGE, DIM), "float32"),
        indptr: R.Tensor((REQUESTS + 1,), "int32"),
        indices: R.Tensor((TABLE,), "int32"),
        workspace: R.Tensor((FLOATS,), "float32"),
    ):
        cls = CallPacked
        return R.call_tir(
            cls.attend,
            (plan, q, cache, indptr, indices, workspace),
            out_ty=R.Tensor((TOKENS, HEADS, DIM), "float32"),
        )


@I.ir_module
class CallCPacked:
    @T.prim_func
    def attend(
        plan: T.Buffer((WORDS,), "int32"),
        q: T.Buffer((TOKENS, HEADS, DIM), "float32"),
        cache: T.Buffer((PAGES, 2, 1, PAGE, DIM), "float32"),
        indptr: T.Buffer((REQUESTS + 1,), "int32"),
        indices: T.Buffer((TABLE,), "int32"),
        workspace: T.Buffer((FLOATS,), "float32"),
        o: T.Buffer((TOKENS, HEADS, DIM), "float32"),
    ):
        T.func_attr({"global_symbol": "attend"})
        T.evaluate(
            T.call_cpacked(
                "__tvm_ffi_tvm_infer_paged_attention",
                plan,
                q,
                cache,
                T.reinterpret("handle", T.uint64(0)),
                0,
                indptr,
                indices,
                T.float64(SCALE),
                workspace,
                o,
                T.reinterpret("handle", T.uint64(0)),
            )
        )

    @R.function
    def main(
        plan: R.Tensor((WORDS,), "int32"),
        q: R.Tensor((TOKENS, HEADS, DIM), "float32"),
        cache: R.Tensor((PAGES, 2, 1, PAGE, DIM), "float32"),
        indptr: R.Tensor((REQUESTS + 1,), "int32"),
        indices: R.Tensor((TABLE,), "int32"),
        workspace: R.Tensor((FLOATS,), "float32"),
    ):
        cls = CallCPacked
        return R.call_tir(
            cls.attend,
            (plan, q, cache, indptr, indices, workspace),
            out_ty=R.Tensor((TOKENS, HEADS, DIM), "float32"),
        )


@I.ir_module
class CallExtern:
    @T.prim_func
    def attend(
        plan: T.Buffer((WORDS,), "int32"),
        q: T.Buffer((TOKENS, HEADS, DIM), "float32"),
        cache: T.Buffer((PAGES, 2, 1, PAGE, DIM), "float32"),
        indptr: T.Buffer((REQUESTS + 1,), "int32"),
        indices: T.Buffer((TABLE,), "int32"),
        workspace: T.Buffer((FLOATS,), "float32"),
        o: T.Buffer((TOKENS, HEADS, DIM), "float32"),
    ):
        T.func_attr({"global_symbol": "attend"})
        T.evaluate(
            T.call_extern(
                "int32",
                "tvm_infer_paged_attention",
                plan.data,
                0,
                DIM,
                q.data,
                cache.data,
                PAGE,
                indptr.data,
                indices.data,
                T.float32(SCALE),
                workspace.data,
                o.data,
                T.reinterpret("handle", T.uint64(0)),
            )
        )

    @R.function
    def main(
        plan: R.Tensor((WORDS,), "int32"),
        q: R.Tensor((TOKENS, HEADS, DIM), "float32"),
        cache: R.Tensor((PAGES, 2, 1, PAGE, DIM), "float32"),
        indptr: R.Tensor((REQUESTS + 1,), "int32"),
        indices: R.Tensor((TABLE,), "int32"),
        workspace: R.Tensor((FLOATS,), "float32"),
    ):
        cls = CallExtern
        return R.call_tir(
            cls.attend,
            (plan, q, cache, indptr, indices, workspace),
            out_ty=R.Tensor((TOKENS, HEADS, DIM), "float32"),
        )


RUNNER = textwrap.dedent(
    """
    import sys
    import numpy as np
    if sys.argv[3] == "with_tvm_infer":
        from tvm_infer import _ffi
        _ffi.library()
    import tvm
    from tvm import relax
    vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
    data = np.load(sys.argv[2])
    names = ("plan", "q", "cache", "indptr", "indices", "workspace")
    out = vm["main"](*(tvm.runtime.tensor(data[n]) for n in names))
    assert sys.argv[3] == "with_tvm_infer" or "tvm_infer" not in sys.modules
    np.save(sys.argv[2] + ".out.npy", out.numpy())
    """
)


def run_in_a_fresh_process(module, tmp_path: pathlib.Path, loaded: str) -> np.ndarray:
    library = tmp_path / "model.so"
    tvm.compile(module, target=tvm.target.Target({"kind": "llvm"})).export_library(str(library))
    batch = problem()
    data = tmp_path / "data.npz"
    np.savez(
        data,
        plan=plan_words(batch),
        q=batch.q,
        cache=batch.kv_cache,
        indptr=batch.kv_page_indptr,
        indices=batch.kv_page_indices,
        workspace=np.full(FLOATS, np.nan, np.float32),
    )
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)
    done = subprocess.run(
        [sys.executable, str(script), str(library), str(data), loaded], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(str(data) + ".out.npy")


def link_static(module, names: list[str]):
    """The module with tvm_infer's object linked in; `names` are the packed functions that it provides."""
    library = tvm.runtime.load_static_library(str(_ffi.static_library()), names)
    return module.with_attr("external_mods", [library])


def test_the_shapes_above_are_the_problem_s():
    batch = problem()
    assert batch.kv_cache.shape == (PAGES, 2, 1, PAGE, DIM)
    assert batch.kv_page_indices.shape == (TABLE,)
    assert batch.q.shape == (TOKENS, HEADS, DIM)


@pytest.mark.parametrize(
    ("module", "loaded", "link"),
    [
        (CallPacked, "with_tvm_infer", False),
        (CallCPacked, "without", True),
        (CallExtern, "without", True),
    ],
    ids=["call_packed", "call_cpacked", "call_extern"],
)
def test_attention_from_tir(module, loaded, link, tmp_path):
    if link:
        module = link_static(module, ["tvm_infer_paged_attention"])
    out = run_in_a_fresh_process(module, tmp_path, loaded)
    expected, _ = problem().reference()
    assert relative_error(out, expected) < 1e-6


def test_the_static_object_exports_prefixed_symbols_only():
    names = subprocess.run(
        ["nm", "--defined-only", "--extern-only", str(_ffi.static_library())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    symbols = [line.split()[-1] for line in names if line.strip()]
    assert "__tvm_ffi_tvm_infer_plan" in symbols
    visible = [
        s for s in symbols if "tvm_infer" not in s and not s.startswith(("_ZN3tvm3ffi", "_ZTI", "_ZTS", "_ZTV", "_ZN"))
    ]
    assert [s for s in visible if not s.startswith(("_Z", "DW.ref", "__"))] == []


def test_a_linked_model_loads_beside_tvm_infer(tmp_path):
    """The object registers nothing at load, so it does not collide with the shared library's global names."""
    module = link_static(CallCPacked, ["tvm_infer_paged_attention"])
    out = run_in_a_fresh_process(module, tmp_path, "with_tvm_infer")
    expected, _ = problem().reference()
    assert relative_error(out, expected) < 1e-6

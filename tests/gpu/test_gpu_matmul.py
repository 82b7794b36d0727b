"""tvm_infer.matmul and matmul_add: against float64, strided and misaligned rows, graphs, streams, errors.

CUDA runs on cuBLASLt, the CPU on a BLAS. Up to 8 rows of 16-bit floats by a transposed matrix run on a kernel of ours
(test_gpu_gemv.py): what is about cuBLASLt has more rows here, or the fixture `cublaslt`.
"""

from __future__ import annotations

import itertools
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_batches import same_bits
from gpu_products import assert_close, assert_sum_close, matrix, poisoned

import tvm_infer
from tvm_infer import _ffi, errors

pytestmark = pytest.mark.family("matmul")

SLEEP = 40_000_000  # clock cycles, about 20 ms
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORKSPACE = 32 << 20
# (m, k, n): odd, tiny, long sums, few rows of much
SHAPES = [
    (1, 1, 1),
    (1, 7, 5),
    (3, 129, 257),
    (17, 33, 65),
    (31, 1, 100),
    (64, 4096, 1024),
    (12, 14336, 1000),
    (255, 577, 1537),
    (2, 70001, 40),
]
LLAMA = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]  # (k, n)


@pytest.fixture
def cublaslt():
    """Products of a few rows run on it, too."""
    exchange = _ffi.func("set_matmul_gemv")
    former = exchange(False)
    yield
    exchange(former)


def check(m, k, n, dtype, device, *, out_dtype=None, transpose_b=True, pads=(0, 0, 0), offsets=(0, 0, 0)) -> None:
    out_dtype = out_dtype or dtype
    a = matrix(m, k, dtype, device, seed=1, pad=pads[0], offset=offsets[0])
    b = matrix(*((n, k) if transpose_b else (k, n)), dtype=dtype, device=device, seed=2, pad=pads[1], offset=offsets[1])
    out, whole = poisoned(m, n, out_dtype, device, pad=pads[2], offset=offsets[2])
    assert tvm_infer.matmul(a, b, transpose_b=transpose_b, out=out) is out
    assert_close(out, a, b, transpose_b)
    assert int((~torch.isnan(whole)).sum()) == m * n  # nothing around it was written


def check_sum(m, k, n, dtype, device, *, out_dtype=None, transpose_b=True, pads=(0, 0, 0, 0), offsets=(0, 0, 0, 0)):
    """Out of place and in place; the addend is of the product's size, so that losing it or adding it twice shows."""
    out_dtype = out_dtype or dtype
    a = matrix(m, k, dtype, device, seed=1, pad=pads[0], offset=offsets[0])
    b = matrix(*((n, k) if transpose_b else (k, n)), dtype=dtype, device=device, seed=2, pad=pads[1], offset=offsets[1])
    c = matrix(m, n, out_dtype, device, seed=3, pad=pads[2], offset=offsets[2]).mul_(k**0.5)
    kept = c.clone()
    out, whole = poisoned(m, n, out_dtype, device, pad=pads[3], offset=offsets[3])
    assert tvm_infer.matmul_add(a, b, transpose_b=transpose_b, c=c, out=out) is out
    assert same_bits(c, kept) and int((~torch.isnan(whole)).sum()) == m * n
    assert_sum_close(out, a, b, transpose_b, c)
    tvm_infer.matmul_add(a, b, transpose_b=transpose_b, c=c, out=c)
    # NOTE: cuBLASLt takes other kernels where c is out, and some round the product before they add
    assert_sum_close(c, a, b, transpose_b, kept, rounded_once=False)


@pytest.mark.subset
@pytest.mark.parametrize("transpose_b", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_in_float32(m, k, n, transpose_b, device):
    check_sum(m, k, n, torch.float32, device, transpose_b=transpose_b)


@pytest.mark.parametrize("transpose_b", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize("out_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_in_sixteen_bits(m, k, n, dtype, out_dtype, transpose_b, cuda):
    out = torch.float32 if out_dtype == "fp32" else None
    check_sum(m, k, n, DTYPES[dtype], cuda, out_dtype=out, transpose_b=transpose_b)


@pytest.mark.parametrize("m", [1, 4, 16, 300])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (14336, 4096)])
def test_sums_of_llama(m, k, n, cuda, cublaslt):
    check_sum(m, k, n, torch.bfloat16, cuda)


@pytest.mark.subset
@pytest.mark.parametrize("pads", [(0, 0, 1, 0), (0, 0, 0, 5), (0, 3, 5, 5), (8, 16, 8, 8)])
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (1, 2, 3, 1), (0, 0, 1, 0), (8, 8, 8, 8)])
def test_strided_and_offset_addends(pads, offsets, device):
    for dtype in DTYPES.values() if device == "cuda" else [torch.float32]:
        check_sum(19, 136, 72, dtype, device, pads=pads, offsets=offsets)


@pytest.mark.subset
@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_sums_of_nothing(m, k, n, device):
    out, whole = poisoned(m, n, torch.float32, device, pad=3)
    a, b = (torch.ones(shape, device=device) for shape in ((m, k), (k, n)))
    c = matrix(m, n, torch.float32, device, seed=1, pad=2)
    tvm_infer.matmul_add(a, b, c=c, out=out)
    assert torch.equal(out, c) and int((~torch.isnan(whole)).sum()) == m * n
    tvm_infer.matmul_add(a, b, c=c, out=c)
    assert torch.equal(out, c)


@pytest.mark.subset
def test_addends_beside_and_over_the_output(device):
    """Two halves of a buffer's columns are apart; views that share elements are refused."""
    buffer = torch.zeros((4, 16), device=device)
    buffer[:, 8:] = torch.arange(32.0, device=device).reshape(4, 8)
    a, b = torch.ones((4, 3), device=device), torch.ones((8, 3), device=device)
    tvm_infer.matmul_add(a, b, transpose_b=True, c=buffer[:, 8:], out=buffer[:, :8])
    assert torch.equal(buffer[:, :8], buffer[:, 8:] + 3)
    for c in (buffer[:, 4:12], buffer[:, 1:9]):
        with pytest.raises(errors.ArgumentError, match=r"`c`.*overlaps `out`"):
            tvm_infer.matmul_add(a, b, transpose_b=True, c=c, out=buffer[:, :8])


@pytest.mark.subset
@pytest.mark.parametrize("transpose_b", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_float32(m, k, n, transpose_b, device):
    check(m, k, n, torch.float32, device, transpose_b=transpose_b)


@pytest.mark.parametrize("transpose_b", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize("out_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sixteen_bits(m, k, n, dtype, out_dtype, transpose_b, cuda):
    out = torch.float32 if out_dtype == "fp32" else None
    check(m, k, n, DTYPES[dtype], cuda, out_dtype=out, transpose_b=transpose_b)


@pytest.mark.parametrize("m", [1, 4, 16, 300])
@pytest.mark.parametrize(("k", "n"), LLAMA)
def test_shapes_of_llama(m, k, n, cuda, cublaslt):
    check(m, k, n, torch.bfloat16, cuda)


@pytest.mark.subset
@pytest.mark.parametrize("pads", [(1, 0, 0), (0, 3, 0), (0, 0, 5), (8, 16, 8)])
@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 2, 3), (8, 8, 8)])
@pytest.mark.parametrize("transpose_b", [True, False], ids=["nk", "kn"])
def test_strided_and_offset_rows(pads, offsets, transpose_b, device):
    for dtype in DTYPES.values() if device == "cuda" else [torch.float32]:
        check(19, 136, 72, dtype, device, transpose_b=transpose_b, pads=pads, offsets=offsets)


@pytest.mark.subset
def test_leading_dimensions_are_rows(device):
    a = matrix(6, 40, torch.float32, device, seed=1).reshape(2, 1, 3, 40)
    b = matrix(50, 40, torch.float32, device, seed=2)
    out = tvm_infer.matmul(a, b, transpose_b=True)
    assert out.shape == (2, 1, 3, 50) and out.device == a.device
    assert_close(out.reshape(6, 50), a.reshape(6, 40), b, True)


@pytest.mark.subset
@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 5), (3, 0, 5), (3, 4, 0)])
def test_empty(m, k, n, device):
    out, whole = poisoned(m, n, torch.float32, device, pad=3)
    a, b = (torch.ones(shape, device=device) for shape in ((m, k), (k, n)))
    tvm_infer.matmul(a, b, out=out)
    assert bool((out == 0).all()) and int((~torch.isnan(whole)).sum()) == m * n


def products(cuda, seed=0):
    """Operands of products that split k (few rows, long sums) and of ones that do not."""
    shapes = [(9, 8192, 512), (12, 14336, 256), (16, 4096, 1024), (300, 1024, 512)]
    return [
        (matrix(m, k, torch.bfloat16, cuda, seed=seed + i), matrix(n, k, torch.bfloat16, cuda, seed=seed + 50 + i))
        for i, (m, k, n) in enumerate(shapes)
    ]


def multiply(pairs, outs=None):
    outs = outs or [None] * len(pairs)
    return [tvm_infer.matmul(a, b, transpose_b=True, out=o) for (a, b), o in zip(pairs, outs, strict=True)]


def test_the_same_bits_every_time_and_everywhere(cuda):
    """Neither the order of CTAs nor the place of buffers in memory changes a bit."""
    pairs = products(cuda)
    first = multiply(pairs)
    for shift in (0, 8, 16, 64, 8, 0):  # elements: 16-byte boundaries all
        moved = []
        for a, b in pairs:
            base = torch.empty(a.numel() + shift, dtype=a.dtype, device=cuda)
            moved.append((base[shift:].view(a.shape).copy_(a), b))
        assert all(same_bits(x, y) for x, y in zip(first, multiply(moved), strict=True))


def test_a_graph_replays_with_new_inputs(cuda):
    pairs, kept, others = products(cuda), products(cuda), products(cuda, seed=100)
    expected, expected_others = multiply(pairs), multiply(others)
    outs = [torch.full_like(o, torch.nan) for o in expected]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    before = _ffi.func("matmul_workspace_bytes")(torch.cuda.current_device())
    with torch.cuda.graph(graph):
        multiply(pairs, outs)
    assert _ffi.func("matmul_workspace_bytes")(torch.cuda.current_device()) == before
    for values, want in ((kept, expected), (others, expected_others), (kept, expected)):
        for (a, b), (new_a, new_b) in zip(pairs, values, strict=True):
            a.copy_(new_a), b.copy_(new_b)
        for o in outs:
            o.fill_(torch.nan)
        graph.replay()
        assert all(same_bits(x, y) for x, y in zip(outs, want, strict=True))


def test_sums_under_a_graph(cuda):
    """A layer's two residual additions, out of place and in place: the bits of the same calls outside a graph."""
    pairs = [
        (matrix(12, k, torch.bfloat16, cuda, seed=k), matrix(4096, k, torch.bfloat16, cuda, seed=k + 1))
        for k in (4096, 14336)
    ]
    residual = matrix(12, 4096, torch.bfloat16, cuda, seed=3)
    out = torch.empty_like(residual)

    def step():
        tvm_infer.matmul_add(*pairs[0], transpose_b=True, c=residual, out=out)
        tvm_infer.matmul_add(*pairs[1], transpose_b=True, c=out, out=out)

    step()
    expected, graph = out.clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, expected)


def test_a_problem_met_first_in_a_capture(cuda):
    """Its algorithm is looked for in the capture, which that does not break."""
    a, b = matrix(23, 2056, torch.bfloat16, cuda, seed=1), matrix(1048, 2056, torch.bfloat16, cuda, seed=2)
    tvm_infer.matmul(a[:9], b, transpose_b=True)
    out, graph = torch.full((23, 1048), torch.nan, dtype=a.dtype, device=cuda), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        tvm_infer.matmul(a, b, transpose_b=True, out=out)
    graph.replay()
    assert_close(out, a, b, True)
    assert same_bits(out, tvm_infer.matmul(a, b, transpose_b=True))


def test_run_capture_replay_as_tvm_does(cuda):
    """A region runs on a stream, is captured on another, and is replayed on the first between products that run eagerly there."""
    pairs = products(cuda)
    expected = multiply(pairs)
    outs = [torch.full_like(o, torch.nan) for o in expected]
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        multiply(pairs, outs)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            multiply(pairs, outs)
        for _ in range(20):
            for o in outs:
                o.fill_(torch.nan)
            graph.replay()
            eager = multiply(pairs)
            assert all(same_bits(x, y) for x, y in zip(expected, outs, strict=True))
            assert all(same_bits(x, y) for x, y in zip(expected, eager, strict=True))
    stream.synchronize()


def test_a_capture_before_a_first_product(cuda):
    pairs = products(cuda)
    multiply(pairs)

    def capture():
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with pytest.raises(errors.WorkspaceError, match=r"captured.*once"), torch.cuda.graph(graph, stream=stream):
            torch.zeros(1, device=cuda)
            multiply(pairs)
        return True

    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(capture).result()
    torch.cuda.synchronize()
    multiply(pairs)


def test_products_follow_what_the_stream_holds(cuda):
    pairs = products(cuda)
    expected = multiply(pairs)
    late = [a.clone() for a, _ in pairs]
    for a, _ in pairs:
        a.fill_(torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        for (a, _), value in zip(pairs, late, strict=True):
            a.copy_(value)
        kept = [o.clone() for o in multiply(pairs)]
    side.synchronize()
    assert all(same_bits(x, y) for x, y in zip(expected, kept, strict=True))


def test_streams_side_by_side(cuda):
    """Each has its workspace: products that split k on two streams at a time do not meet."""
    pairs = products(cuda)
    expected = multiply(pairs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]

    def work(stream):
        results = []
        with torch.cuda.stream(stream):
            for _ in range(50):
                results.append(multiply(pairs))
        stream.synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(work, streams):
            for outs in results:
                assert all(same_bits(x, y) for x, y in zip(expected, outs, strict=True))


def test_graphs_of_two_streams_side_by_side(cuda):
    """Each was captured after a warm-up on its stream, so that it holds that stream's workspace."""
    pairs = products(cuda)
    expected = multiply(pairs)
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):  # captures one after the other: torch allows one at a time
        stream = torch.cuda.Stream()
        outs = [torch.full_like(o, torch.nan) for o in expected]
        with torch.cuda.stream(stream):
            multiply(pairs, outs)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                for _ in range(20):
                    multiply(pairs, outs)
        graphs.append((graph, stream, outs))
    torch.cuda.synchronize()
    for _ in range(10):
        for graph, stream, _ in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, _, outs), x in itertools.product(graphs, range(len(pairs))):
        assert same_bits(outs[x], expected[x])


def test_float32_is_not_tf32_unless_asked(cuda):
    a, b = matrix(256, 1024, torch.float32, cuda, seed=1), matrix(512, 1024, torch.float32, cuda, seed=2)
    reference = a.double() @ b.double().T

    def error() -> float:
        out = tvm_infer.matmul(a, b, transpose_b=True)
        return float((out.double() - reference).norm() / reference.norm())

    exchange = _ffi.func("set_matmul_tf32")
    assert error() < 1e-6
    former = exchange(True)
    try:
        assert 1e-5 < error() < 1e-3
    finally:
        exchange(former)
    assert error() < 1e-6


def test_one_cublaslt_in_the_process(cuda):
    """torch's is used, not a second copy beside it."""
    multiply(products(cuda)[:1])
    maps = pathlib.Path("/proc/self/maps").read_text()
    loaded = set(re.findall(r"(/\S*libcublasLt\.so\S*)$", maps, re.MULTILINE))
    assert len(loaded) == 1
    assert pathlib.Path(_ffi.func("cublas_path")()).resolve() in {pathlib.Path(path).resolve() for path in loaded}


ERRORS = [
    ("host b", errors.ArgumentError, r"`b` is on cpu, `a` on cuda", lambda a, b, o: (a, b.cpu(), o)),
    ("host out", errors.ArgumentError, r"`out` is on cpu", lambda a, b, o: (a, b, o.cpu())),
    ("host a", errors.TvmInferError, r"`b` is on cuda|tvm_infer\[blas\]", lambda a, b, o: (a.float().cpu(), b, o)),
    ("b dtype", errors.DTypeError, r"`b` has dtype float16; it must be bfloat16", lambda a, b, o: (a, b.half(), o)),
    ("a dtype", errors.DTypeError, r"`a` has dtype float64", lambda a, b, o: (a.double(), b, o)),
    ("out dtype", errors.DTypeError, r"`out` has dtype float16", lambda a, b, o: (a, b, o.half())),
    ("k", errors.ArgumentError, r"`b` has shape .*must be 40", lambda a, b, o: (a, b[:, 1:], o)),
    ("n", errors.ArgumentError, r"`out` has shape .*must be 50", lambda a, b, o: (a, b, o[:, 1:])),
    ("m", errors.ArgumentError, r"`out`.*has 5 rows; `a`", lambda a, b, o: (a, b, o[1:])),
    ("a columns", errors.ArgumentError, r"`a` has stride 6 in its last", lambda a, b, o: (a.T.contiguous().T, b, o)),
    ("rows overlap", errors.ArgumentError, r"rows must not overlap", lambda a, b, o: (a[:1].expand(6, 40), b, o)),
]


ADDENDS = [
    (errors.ArgumentError, r"`c` is on cpu, `a` on cuda", lambda c: c.cpu()),
    (errors.DTypeError, r"`c` has dtype float32; it must be bfloat16", lambda c: c.float()),
    (errors.ArgumentError, r"`c` has shape .*must be 50", lambda c: c[:, 1:]),
    (errors.ArgumentError, r"`c`.*has 1 rows.*not broadcast", lambda c: c[:1]),
    (errors.ArgumentError, r"`c`.*rows must not overlap", lambda c: c[:1].expand(6, 50)),
]


@pytest.mark.parametrize(("kind", "words", "change"), ADDENDS, ids=[r[1] for r in ADDENDS])
def test_bad_addends(kind, words, change, cuda):
    a, b = matrix(6, 40, torch.bfloat16, cuda, seed=1), matrix(50, 40, torch.bfloat16, cuda, seed=2)
    c, out = (torch.full((6, 50), torch.nan, dtype=torch.bfloat16, device=cuda) for _ in range(2))
    with pytest.raises(kind, match=words):
        tvm_infer.matmul_add(a, b, transpose_b=True, c=change(c), out=out)
    torch.cuda.synchronize()
    assert bool(torch.isnan(out).all())


@pytest.mark.parametrize(("kind", "words", "change"), [r[1:] for r in ERRORS], ids=[r[0] for r in ERRORS])
def test_bad_arguments(kind, words, change, cuda):
    a, b = matrix(6, 40, torch.bfloat16, cuda, seed=1), matrix(50, 40, torch.bfloat16, cuda, seed=2)
    out = torch.full((6, 50), torch.nan, dtype=torch.bfloat16, device=cuda)
    bad_a, bad_b, bad_out = change(a, b, out)
    with pytest.raises(kind, match=words):
        tvm_infer.matmul(bad_a, bad_b, transpose_b=True, out=bad_out)
    torch.cuda.synchronize()
    assert bool(torch.isnan(out).all())
    assert_close(tvm_infer.matmul(a, b, transpose_b=True), a, b, True)


def test_another_device_is_named(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    a = torch.zeros((3, 4), device="cuda:0")
    with pytest.raises(errors.ArgumentError, match=r"`b` is on cuda:1, `a` on cuda:0"):
        tvm_infer.matmul(a, torch.zeros((4, 5), device="cuda:1"))
    with torch.cuda.device(0):  # another device than the current one
        check(9, 40, 24, torch.bfloat16, "cuda:1")

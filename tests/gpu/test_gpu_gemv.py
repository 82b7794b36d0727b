"""Products of 1 to 8 rows (kernels/gemv.cuh): against float64, NaN all around, row by row the same bits, graphs, chains of launches
that may overlap. What linear makes of float32 runs on the CPU, too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_batches import same_bits
from gpu_products import assert_close, assert_sum_close, matrix, poisoned

import tvm_infer
from tvm_infer import _ffi

pytestmark = pytest.mark.family("gemv")

SLEEP = 40_000_000  # clock cycles, about 20 ms: what is launched meanwhile runs without gaps
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# (k, n). A stage is 512 columns of 16 rows. k: one vector, a part of a stage, whole stages, a tail. n: whole groups of 16 rows, broken
# ones, fewer and more groups than an H200 has SMs (132).
SHAPES = [(8, 256), (16, 40), (136, 257), (512, 16), (520, 2113), (1000, 1000), (4104, 4099), (8192, 40)]
LLAMA = [(4096, 6144), (4096, 4096), (4096, 28672)]


def matmul(x, weight, *, c=None, out=None):
    """By tvm_infer.matmul, what linear does."""
    if c is None:
        return tvm_infer.matmul(x, weight, transpose_b=True, out=out)
    return tvm_infer.matmul_add(x, weight, transpose_b=True, c=c, out=out)


CALLS = (tvm_infer.linear, matmul)


def written(whole) -> int:
    return int((~torch.isnan(whole)).sum())


def check(m, k, n, dtype, device, *, out_dtype=None, pads=(0, 0, 0, 0), offsets=(0, 0, 0, 0)) -> None:
    """A product and a sum, out of place and in place. pads, offsets : of x, weight, c and out, in elements."""
    out_dtype = out_dtype or dtype
    x = matrix(m, k, dtype, device, seed=1, pad=pads[0], offset=offsets[0])
    weight = matrix(n, k, dtype, device, seed=2, pad=pads[1], offset=offsets[1])
    # of the product's size, so that losing it or adding it twice shows
    c = matrix(m, n, out_dtype, device, seed=3, pad=pads[2], offset=offsets[2]).mul_(k**0.5)
    kept = c.clone()
    results = []
    for call in CALLS:
        product, around = poisoned(m, n, out_dtype, device, pad=pads[3], offset=offsets[3])
        assert call(x, weight, out=product) is product and written(around) == m * n
        total, around = poisoned(m, n, out_dtype, device, pad=pads[3], offset=offsets[3])
        assert call(x, weight, c=c, out=total) is total and written(around) == m * n
        assert same_bits(c, kept)
        in_place, around = poisoned(m, n, out_dtype, device, pad=pads[2], offset=offsets[2])
        in_place.copy_(kept)
        assert call(x, weight, c=in_place, out=in_place) is in_place and written(around) == m * n
        results.append((product, total, in_place))
    (product, total, in_place), of_matmul = results
    assert_close(product, x, weight, True)
    assert_sum_close(total, x, weight, True, kept)
    assert same_bits(in_place, total)
    assert all(same_bits(a, b) for a, b in zip(results[0], of_matmul, strict=True))


@pytest.mark.subset
@pytest.mark.parametrize("m", [1, 3, 8, 9])
@pytest.mark.parametrize(("k", "n"), [(8, 1), (136, 257), (1000, 40)])
def test_linear_in_float32(m, k, n, device):
    """On a BLAS, on CUDA on cuBLASLt."""
    x, weight = matrix(m, k, torch.float32, device, seed=1, pad=8), matrix(n, k, torch.float32, device, seed=2, pad=3)
    c = matrix(m, n, torch.float32, device, seed=3, pad=1)
    out, whole = poisoned(m, n, torch.float32, device, pad=2)
    assert tvm_infer.linear(x, weight, out=out) is out and written(whole) == m * n
    assert_close(out, x, weight, True)
    assert tvm_infer.linear(x, weight, c=c, out=out) is out and written(whole) == m * n
    assert_sum_close(out, x, weight, True, c)
    made = tvm_infer.linear(x.reshape(1, m, k), weight)
    assert made.shape == (1, m, n) and made.dtype == x.dtype and made.device == x.device
    assert_close(made[0], x, weight, True)


@pytest.mark.parametrize("out_dtype", ["same", "fp32"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("m", range(1, 9))
def test_against_float64(m, k, n, dtype, out_dtype, cuda):
    check(m, k, n, DTYPES[dtype], cuda, out_dtype=torch.float32 if out_dtype == "fp32" else None)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 14336, 4096), (4, 14336, 1000), (5, 14336, 512), (1, 79232, 513), (8, 9904, 515)]
)
def test_long_rows(m, k, n, dtype, cuda):
    """Rows of x that leave the ring less shared memory: 13 to 4 stages."""
    check(m, k, n, DTYPES[dtype], cuda)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 1), (8, 8, 1), (1, 1000, 3)])
def test_a_few_columns(m, k, n, dtype, cuda):
    """Not with float32 results: of one or two of them an error relative to their size says little."""
    check(m, k, n, DTYPES[dtype], cuda)


@pytest.mark.parametrize("m", [1, 4, 8])
@pytest.mark.parametrize(("k", "n"), LLAMA)
def test_shapes_of_llama(m, k, n, cuda):
    check(m, k, n, torch.bfloat16, cuda)


# NOTE: not for racecheck. Of plain bulk copies it does not know that waiting for their barrier orders reads behind them, and reports
# every read of a stage, also where a single thread issues all copies (CUDA 13.0; FlashAttention found the same: its
# AI/RACECHECK_TMA_HAZARD.md). Of tensor copies, attention's, it reports nothing.
@pytest.mark.sanitize
@pytest.mark.parametrize("pads", [(8, 16, 3, 5), (0, 8, 0, 1), (520, 0, 7, 8)])
@pytest.mark.parametrize("offsets", [(0, 0, 0, 0), (8, 16, 1, 3), (24, 8, 8, 2)])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 8, 17), (3, 520, 33), (8, 1000, 47)])
def test_padded_and_offset_rows(m, k, n, pads, offsets, cuda):
    """NaN between rows and around: what lies behind a row, and behind k in a stage, is not part of a sum."""
    for dtype in DTYPES.values():
        check(m, k, n, dtype, cuda, pads=pads, offsets=offsets)


def test_what_was_in_shared_memory_is_not_part_of_a_sum(cuda):
    """Stages that are filled in part hold what was there before: NaN of a product ahead, in every stage of every SM."""
    for dtype in DTYPES.values():
        poison = torch.full((132 * 16 * 4, 8192), torch.nan, dtype=dtype, device=cuda)
        for k in (8, 136, 520, 1000):
            x, weight = matrix(3, k, dtype, cuda, seed=1), matrix(4099, k, dtype, cuda, seed=2)
            assert bool(torch.isnan(tvm_infer.linear(poison[:1], poison)).all())
            assert_close(tvm_infer.linear(x, weight), x, weight, True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_value_stays_in_its_row_and_column(bad, cuda):
    x, weight = matrix(5, 1000, torch.bfloat16, cuda, seed=1), matrix(1000, 1000, torch.bfloat16, cuda, seed=2)
    good = tvm_infer.linear(x, weight)
    row, column = x.clone(), weight.clone()
    row[2, 999] = bad
    out = tvm_infer.linear(row, weight)
    others = [0, 1, 3, 4]
    assert same_bits(out[others], good[others]) and not bool(torch.isfinite(out[2]).any())
    column[998, 7] = bad
    out = tvm_infer.linear(x, column)
    assert same_bits(out[:, :998], good[:, :998]) and same_bits(out[:, 999:], good[:, 999:])
    assert not bool(torch.isfinite(out[:, 998]).any())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("k", "n"), [(8, 257), (1000, 1000), (4096, 4096), (8192, 40)])
def test_a_row_does_not_depend_on_its_batch(k, n, out_dtype, cuda):
    """Alone or among others, in whichever place: the same bits."""
    x, weight = matrix(8, k, torch.bfloat16, cuda, seed=1), matrix(n, k, torch.bfloat16, cuda, seed=2)
    c = matrix(8, n, out_dtype, cuda, seed=3)
    empty = lambda m: torch.empty((m, n), dtype=out_dtype, device=cuda)  # noqa: E731
    for addend in (None, c):
        part = lambda a, b: None if addend is None else addend[a:b]  # noqa: B023, E731
        batch = tvm_infer.linear(x, weight, c=addend, out=empty(8))
        for m in range(1, 9):
            assert same_bits(tvm_infer.linear(x[:m], weight, c=part(0, m), out=empty(m)), batch[:m])
        for i in range(8):
            assert same_bits(tvm_infer.linear(x[i : i + 1], weight, c=part(i, i + 1), out=empty(1)), batch[i : i + 1])
        turned = tvm_infer.linear(x.flip(0), weight, c=None if addend is None else addend.flip(0), out=empty(8))
        assert same_bits(turned.flip(0), batch)


def operands(cuda, m, seed=0):
    """(x, weight) of products that one stream can run one after the other, small and large."""
    shapes = [(136, 257), (4096, 4096), (1000, 1000), (8192, 40), (4096, 14336)]
    return [
        (matrix(m, k, torch.bfloat16, cuda, seed=seed + i), matrix(n, k, torch.bfloat16, cuda, seed=seed + 50 + i))
        for i, (k, n) in enumerate(shapes)
    ]


def multiply(pairs, outs=None, call=tvm_infer.linear):
    return [call(*pair, out=out) for pair, out in zip(pairs, outs or [None] * len(pairs), strict=True)]


@pytest.mark.parametrize("m", [1, 8])
def test_the_same_bits_every_time_and_everywhere(m, cuda):
    pairs = operands(cuda, m)
    first = multiply(pairs)
    for shift in (0, 8, 24, 64):  # elements: 16-byte boundaries all
        moved = []
        for x, weight in pairs:
            base = torch.empty(x.numel() + shift, dtype=x.dtype, device=cuda)
            moved.append((base[shift:].view(x.shape).copy_(x), weight))
        for call in CALLS:
            assert all(same_bits(a, b) for a, b in zip(first, multiply(moved, call=call), strict=True))


@pytest.mark.parametrize("m", [1, 5])
def test_a_graph_replays_with_new_inputs(m, cuda):
    pairs, others = operands(cuda, m), operands(cuda, m, seed=100)
    kept = [x.clone() for x, _ in pairs]
    news = [x for x, _ in others]
    expected = multiply(pairs)
    expected_news = multiply([(x, weight) for x, (_, weight) in zip(news, pairs, strict=True)])
    outs = [torch.full_like(out, torch.nan) for out in expected]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        multiply(pairs, outs)
    for values, want in ((kept, expected), (news, expected_news), (kept, expected)):
        for (x, _), value in zip(pairs, values, strict=True):
            x.copy_(value)
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        assert all(same_bits(a, b) for a, b in zip(outs, want, strict=True))


# Chains: each launch needs what the one ahead wrote, writes what that one read, and may begin while that one runs


class Chain:
    """A residual stream through layers of two products, as in a model: y = x @ up.T; x = y @ down.T + x, then scaled to stay finite."""

    def __init__(self, m: int, width: int, inner: int, layers: int, cuda: str, call) -> None:
        self.weights = [
            (
                matrix(inner, width, torch.bfloat16, cuda, seed=2 * i).mul_(width**-0.5),
                matrix(width, inner, torch.bfloat16, cuda, seed=2 * i + 1).mul_(inner**-0.5),
            )
            for i in range(layers)
        ]
        self.start = matrix(m, width, torch.bfloat16, cuda, seed=99)
        self.x, self.y = torch.empty_like(self.start), torch.empty((m, inner), dtype=self.start.dtype, device=cuda)
        self.call = call

    def run(self, *, wait: bool = False, scaled_by_torch: bool = False) -> None:
        self.x.copy_(self.start)
        for up, down in self.weights:
            self.call(self.x, up, out=self.y)
            if wait:
                torch.cuda.synchronize()
            if scaled_by_torch:
                self.y.mul_(0.5)
            self.call(self.y, down, c=self.x, out=self.x)
            if wait:
                torch.cuda.synchronize()


@pytest.mark.parametrize("call", CALLS, ids=["linear", "matmul"])
@pytest.mark.parametrize("scaled_by_torch", [False, True], ids=["products alone", "torch between"])
@pytest.mark.parametrize(
    ("m", "width", "inner", "layers"),
    [(1, 256, 512, 30), (8, 256, 512, 30), (3, 1000, 136, 30), (1, 4096, 6144, 6), (8, 4096, 6144, 6)],
)
def test_a_chain_of_launches(m, width, inner, layers, scaled_by_torch, call, cuda):
    """Of launches that queue up behind a sleep, and as a graph: the bits of the same launches with the host waiting after each."""
    chain = Chain(m, width, inner, layers, cuda, call)
    chain.run(wait=True, scaled_by_torch=scaled_by_torch)
    expected = chain.x.clone()
    assert bool(torch.isfinite(expected).all()) and not same_bits(expected, chain.start)
    for _ in range(5):
        chain.x.fill_(torch.nan), chain.y.fill_(torch.nan)
        torch.cuda._sleep(SLEEP)
        chain.run(scaled_by_torch=scaled_by_torch)
        assert same_bits(chain.x, expected)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        chain.run(scaled_by_torch=scaled_by_torch)
    for _ in range(50):
        chain.x.fill_(torch.nan), chain.y.fill_(torch.nan)
        graph.replay()
        assert same_bits(chain.x, expected)


@pytest.mark.parametrize("writer", ["a product", "torch"])
def test_a_matrix_that_the_launch_ahead_writes(writer, cuda):
    """tvm_infer.matmul reads b in the order of the stream: b is new for each product."""
    steps, m, k = 40, 4, 4096
    x = matrix(m, k, torch.bfloat16, cuda, seed=1)
    weight = matrix(k, 512, torch.bfloat16, cuda, seed=2)
    seeds = [matrix(8, 512, torch.bfloat16, cuda, seed=10 + i) for i in range(steps)]
    rows = 8 if writer == "a product" else 1024
    values = [matrix(rows, k, torch.bfloat16, cuda, seed=100 + i) for i in range(steps)] if writer == "torch" else []
    b = torch.empty((rows, k), dtype=torch.bfloat16, device=cuda)
    outs = torch.empty((steps, m, rows), dtype=torch.bfloat16, device=cuda)

    def run(wait: bool = False) -> None:
        for i in range(steps):
            if writer == "a product":
                matmul(seeds[i], weight, out=b)
            else:
                b.copy_(values[i])
            if wait:
                torch.cuda.synchronize()
            matmul(x, b, out=outs[i])
            if wait:
                torch.cuda.synchronize()

    run(wait=True)
    expected = outs.clone()
    assert not any(same_bits(expected[i], expected[i + 1]) for i in range(steps - 1))
    for _ in range(5):
        b.fill_(torch.nan), outs.fill_(torch.nan)
        torch.cuda._sleep(SLEEP)
        run()
        assert same_bits(outs, expected)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    for _ in range(20):
        b.fill_(torch.nan), outs.fill_(torch.nan)
        graph.replay()
        assert same_bits(outs, expected)


def test_x_that_comes_late(cuda):
    """On a stream of its own, behind work that takes its time."""
    pairs = operands(cuda, 3)
    expected = multiply(pairs)
    late = [x.clone() for x, _ in pairs]
    for x, _ in pairs:
        x.fill_(torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        for (x, _), value in zip(pairs, late, strict=True):
            x.copy_(value)
        outs = multiply(pairs)
    side.synchronize()
    assert all(same_bits(a, b) for a, b in zip(expected, outs, strict=True))


def test_streams_side_by_side(cuda):
    pairs = operands(cuda, 2)
    expected = multiply(pairs)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]

    def work(stream):
        with torch.cuda.stream(stream):
            results = [multiply(pairs) for _ in range(30)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        for results in pool.map(work, streams):
            for outs in results:
                assert all(same_bits(a, b) for a, b in zip(expected, outs, strict=True))


def kernels_of(call) -> str:
    """The names of the kernels that it launches."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return " ".join(event.key for event in profiler.key_averages())


def test_which_kernel_runs_and_cublaslt_when_told(cuda):
    """With the setting off the product is cuBLASLt's, as near to float64. (tests/cuda/with_fake_gemv.py: which products are whose.)"""
    x, weight = matrix(4, 4096, torch.bfloat16, cuda, seed=1), matrix(4096, 4096, torch.bfloat16, cuda, seed=2)
    c = matrix(4, 4096, torch.bfloat16, cuda, seed=3)
    exchange = _ffi.func("set_matmul_gemv")
    for on in (True, False):
        former = exchange(on)
        try:
            for call in CALLS:
                names = kernels_of(lambda: call(x, weight))  # noqa: B023
                assert names and ("gemv_bf16" in names) == on, names
                assert_close(call(x, weight), x, weight, True)
                assert_sum_close(call(x, weight, c=c), x, weight, True, c)
        finally:
            exchange(former)


@pytest.mark.parametrize(("m", "k", "n"), [(9, 1000, 1000), (4, 1001, 1000), (4, 8200, 500)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_is_cublaslts_of_linears(m, k, n, dtype, cuda):
    dtype = DTYPES[dtype]
    x, weight = matrix(m, k, dtype, cuda, seed=1), matrix(n, k, dtype, cuda, seed=2)
    c = matrix(m, n, dtype, cuda, seed=3)
    assert_close(tvm_infer.linear(x, weight), x, weight, True)
    assert_sum_close(tvm_infer.linear(x, weight, c=c), x, weight, True, c)

"""Plan as a value: its arrays, text, plot, and what it refuses to wrap."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

import tvm_infer
from tvm_infer.errors import ArgumentError, MissingDependencyError, PlanMismatchError
from tvm_infer.schedule import Band, Plan
from tvm_infer.schedule.plan import PLAN_VERSION

TABLE = (64, 64, 1_500_000, 5_000, 15_300, 128, 128, 2_500_000, 10_000, 11_000)


def make(qo_len, kv_len, num_ctas=132, **kwargs):
    indptr = np.concatenate([[0], np.cumsum(qo_len)]).astype(np.int32)
    settings = dict(num_qo_heads=32, num_kv_heads=8, head_dim=128, num_ctas=num_ctas, tile_table=TABLE)
    return tvm_infer.plan(indptr, np.array(kv_len, np.int32), **(settings | kwargs))


@pytest.fixture
def mixed():
    return make([1, 1, 300, 0, 1], [9000, 7, 300, 50, 70_000])


def test_arrays_and_numbers(mixed):
    assert (mixed.num_ctas, mixed.num_requests, mixed.num_tokens) == (132, 5, 303)
    assert (mixed.num_kv_heads, mixed.group_size, mixed.band) == (8, 4, Band(window_right=0))
    assert mixed.qo_indptr.tolist() == [0, 1, 2, 302, 302, 303]
    assert mixed.kv_len.tolist() == [9000, 7, 300, 50, 70_000]
    assert len(mixed.works) == mixed.num_works == mixed.work_indptr[-1]
    assert len(mixed.merges) == mixed.num_merges > 0
    assert len(mixed.merge_slots) == mixed.merge_indptr[-1]
    assert mixed.tile_classes["fixed"].tolist() == [1_500_000, 2_500_000]
    assert mixed.bytes_used <= mixed.buffer.nbytes
    assert set(mixed.works["kv_list"].tolist()) == {0, 1, 2, 4}  # the request without a query has no work
    assert make([1, 2], [9, 9], window_left=3, causal=False).band == Band(3)


@pytest.mark.parametrize(
    ("qo_len", "kv_len", "num_kv_heads", "table", "is_paced"),
    [
        ([1, 1, 1], [9000, 7, 400], 8, TABLE, True),
        ([1, 16], [128, 128], 2, TABLE, True),  # 64 rows are still of the first class
        ([1, 17], [128, 128], 8, TABLE, False),  # 68 rows: prefill
        ([1, 1, 1], [9000, 7, 400], 8, TABLE[:5], False),  # all works are of one class, which says nothing of them
        ([300], [300], 8, TABLE, False),
        ([0, 0], [50, 60], 8, TABLE, False),
    ],
)
def test_plans_of_the_smallest_class_alone_are_paced(qo_len, kv_len, num_kv_heads, table, is_paced):
    plan = make(qo_len, kv_len, num_qo_heads=4 * num_kv_heads, num_kv_heads=num_kv_heads, tile_table=table)
    ctas_with_works = np.count_nonzero(np.diff(plan.work_indptr))
    assert ctas_with_works < 132  # some are idle, and do not count
    assert plan.header["paced_ctas"] == (ctas_with_works if is_paced else 0)


def test_tickets_are_zero_and_one_for_each_merge_and_three_more(mixed):
    begin = int(mixed.header["tickets_offset"]) // 4
    words = 3 + mixed.num_merges
    assert not mixed.buffer[begin : begin + words].any()
    assert mixed.bytes_used // 4 == begin + -(-words // 4) * 4  # the last array


def test_loads_are_the_predicted_ones(mixed):
    """Recomputed one work at a time from the tile table."""
    expected = np.zeros(132)
    for cta in range(132):
        for work in mixed.works[mixed.work_indptr[cta] : mixed.work_indptr[cta + 1]]:
            tile = mixed.tile_classes[work["tile_class"]]
            one = int(tile["fixed"]) + int(tile["row"]) * int(work["num_rows"])
            keys = int(work["kv_end"] - work["kv_begin"])
            one += (
                int(tile["kv"]) * -(-keys // int(tile["kv_granule"])) * int(tile["kv_granule"])
            )  # tiles are computed whole
            expected[cta] += one * int(work["num_kv_heads"])
    assert (mixed.loads() == expected).all()
    assert mixed.makespan_us == pytest.approx(expected.max() / 1e6)
    assert mixed.total_cost_us == pytest.approx(expected.sum() / 1e6)
    assert mixed.balance == pytest.approx(expected.mean() / expected.max())


def test_a_plan_is_a_view_of_any_buffer(mixed):
    as_bytes = Plan(mixed.buffer.view(np.uint8))
    assert as_bytes.buffer.dtype == np.int32 and np.shares_memory(as_bytes.buffer, mixed.buffer)
    exact = Plan(mixed.buffer[: mixed.bytes_used // 4].copy())
    assert (exact.works == mixed.works).all() and exact.capture_key == mixed.capture_key


def test_a_plan_of_nothing():
    plan = make([], [])
    assert plan.num_works == 0 and plan.balance == 1.0 and plan.loads().tolist() == [0] * 132
    assert "0 requests" in str(plan) and "0 works" in repr(plan)
    plan.plot()


@pytest.mark.parametrize(
    "buffer",
    [
        [1, 2, 3],
        np.zeros(64, np.int64),
        np.zeros(64, np.float32),
        np.zeros((8, 8), np.int32),
        np.zeros(128, np.int32)[::2],
        np.zeros(33, np.uint8),
    ],
)
def test_buffers_of_another_kind(buffer):
    with pytest.raises(ArgumentError, match="buffer"):
        Plan(buffer)


def test_buffers_without_a_plan(mixed):
    words = mixed.buffer[: mixed.bytes_used // 4]
    with pytest.raises(PlanMismatchError, match="holds no plan"):
        Plan(np.zeros(100, np.int32))
    with pytest.raises(PlanMismatchError, match="holds no plan"):
        Plan(words[:10].copy())
    with pytest.raises(PlanMismatchError, match=f"{words.nbytes - 4} bytes.*cut off"):
        Plan(words[:-1].copy())
    other = words.copy()
    other[1] = 99
    with pytest.raises(PlanMismatchError, match=rf"version 99.*version {PLAN_VERSION}"):
        Plan(other)


def test_the_table_shows_ctas_splits_and_merges(mixed):
    text = str(mixed)
    lines = text.splitlines()
    assert "5 requests, 303 query tokens, 79357 keys" in lines[0] and "causal" in lines[0]
    assert any(line.split()[:1] == ["0"] and "####" in line for line in lines)
    assert "…" in text and "  131  " in text and "   60  " not in text  # elided in the middle
    assert "part" in text and "merge  packed rows" in text
    assert f"{mixed.num_works} works, {mixed.num_merges} merges" in lines[-1]
    assert f"balance {mixed.balance:.3f}" in lines[-1] and f"{mixed.num_partial_rows} partial rows" in lines[-1]
    assert max(map(len, lines)) < 150


def test_a_short_table_shows_everything():
    plan = make([1, 40], [100, 900], num_ctas=3, window_left=64)
    lines = str(plan).splitlines()
    assert "band(causal=True, window_left=64)" in lines[0] and "…" not in str(plan)
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert f"{plan.loads()[1] / 1e6:.2f}" in lines[3]
    assert "r1[0:" in str(plan)  # rows are counted from the request's first


def test_plot(mixed, tmp_path):
    pytest.importorskip("matplotlib")
    figure = mixed.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000
    (axes,) = figure.axes
    tops = {}
    for bar in axes.patches:
        cta = round(bar.get_x() + bar.get_width() / 2)
        tops[cta] = max(tops.get(cta, 0), bar.get_y() + bar.get_height())
    assert len(axes.patches) == mixed.num_works
    np.testing.assert_allclose([tops.get(c, 0) for c in range(132)], mixed.loads() / 1e6, rtol=1e-6)
    (mean,) = axes.lines
    assert mean.get_ydata()[0] == pytest.approx(mixed.total_cost_us / 132)


def test_plot_without_matplotlib(mixed, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"tvm_infer\[plot\]"):
        mixed.plot()

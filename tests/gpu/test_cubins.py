"""What a machine without a GPU can hold against the harness that runs the attention kernel without the library (tests/jit compiles)."""

from __future__ import annotations

import pathlib
import re
import sys

from tvm_infer import jit

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from cases import SM90_TILES, bench_cases, check_cases


def test_every_case_has_a_kernel():
    assert {c.kernel for c in check_cases()} | {c.kernel for c, _ in bench_cases()} <= set(jit.all_names())


def test_the_tile_table_is_the_planners():
    from tvm_infer.planning import cuda_tile_table

    *classes, _, _, _ = cuda_tile_table("bfloat16", 128)  # the last three are for levels, which no case has
    assert sum(SM90_TILES, ()) == tuple(classes)


def test_plan_fields_that_the_harness_reads_are_where_it_reads_them():
    """run_cases.py runs where the library is not installed and reads a plan's words by number."""
    from tvm_infer.schedule.plan import HEADER

    source = (pathlib.Path(__file__).parent / "run_cases.py").read_text()
    words = {name: HEADER.fields[name][1] // 4 for name in ("num_ctas", "num_works", "num_merges", "num_partial_rows")}
    read = {int(n) for n in re.findall(r"plan\[(\d+)\]", source)}
    assert read == set(words.values())
    assert f"header[{HEADER.fields['makespan'][1]}:{HEADER.fields['makespan'][1] + 8}]" in source


def test_plan_words_that_the_refusals_change_are_where_they_change_them():
    import refusals

    from tvm_infer.schedule.plan import HEADER

    words = {"magic": refusals.MAGIC, "version": refusals.VERSION, "capture_key": refusals.CAPTURE_KEY}
    words |= {"num_ctas": refusals.NUM_CTAS, "num_tokens": refusals.NUM_TOKENS, "tickets_offset": refusals.TICKETS}
    assert words == {name: HEADER.fields[name][1] // 4 for name in words}

"""Writes the plans of all cases, made by the library's planner, for a machine that has a GPU but not the library.

usage: python make_plans.py OUT.npz [--num-ctas 132]
"""

from __future__ import annotations

import argparse

import numpy as np
from cases import Case, bench_cases, check_cases

import tvm_infer


def make_plan(case: Case, num_ctas: int) -> np.ndarray:
    """int32 words of the case's plan."""
    plan = tvm_infer.plan(
        np.concatenate([[0], np.cumsum(case.qo)]).astype(np.int32),
        np.asarray(case.kv, np.int32),
        num_qo_heads=case.hq,
        num_kv_heads=case.hkv,
        head_dim=case.dim,
        causal=case.causal,
        window_left=case.window,
        num_ctas=num_ctas,
        fixed_split_size=case.split,
        tile_table=[x for tile in case.tiles for x in tile],
    )
    return plan.buffer[: plan.bytes_used // 4].copy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--num-ctas", type=int, default=132)
    args = parser.parse_args()
    cases = check_cases() + [case for case, _ in bench_cases()]
    assert len({c.name for c in cases}) == len(cases)
    np.savez_compressed(args.out, **{c.name.replace("/", "|"): make_plan(c, args.num_ctas) for c in cases})


if __name__ == "__main__":
    main()

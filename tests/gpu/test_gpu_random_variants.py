"""Random variants of the whole grammar (tests/variant/random_expressions.py) in the kernels, against numpy's evaluation in float64."""

from __future__ import annotations

import functools
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gpu_batches import Batch, Case, Request, make_requests

from tvm_infer import errors, variant

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "variant"))
try:
    from test_random_expressions import Case as Random
except (errors.MissingDependencyError, ImportError) as error:
    pytest.skip(f"variants are traced by TVM's compiler: {error}", allow_module_level=True)

pytestmark = pytest.mark.family("attention_sm90")

# Four query heads and three requests, as the tables have them.
BATCH = Case("random", mask="full", lengths=((1, 40, 7), (300, 77, 20)), group=1, dtype="fp16", head_dim=64)
SEEDS = range(48)
LARGEST = 40.0  # |logit|: beyond, what float32 and the hardware's tanh lose is multiplied into another result


def table(x: Any, device: str) -> Any:
    """A parameter's value as a tensor on the device; scalars as they are."""
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.astype(np.float32)).to(device=device, dtype=torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x)).to(device)


@functools.cache
def requests() -> list[Request]:
    """The same numbers for every device."""
    return make_requests(BATCH, "cpu")


def reference(random: Random, r: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 (logits [heads, n, m], o [n, heads, head_dim], lse [n, heads]) of request r; hidden logits are -inf."""
    request = requests()[r]
    q, k, v = (x.double().numpy() for x in (request.q, request.k, request.v))
    n, m, heads = len(q), len(k), q.shape[1]
    head = np.arange(heads)[:, None, None]
    at = {
        "batch": r,
        "qo_head": head,
        "kv_head": head,
        "q_pos": np.arange(m - n, m)[None, :, None],
        "kv_pos": np.arange(m)[None, None],
        "q_len": n,
        "kv_len": m,
        **random.values,
    }
    shape = (heads, n, m)
    if random.hole in ("query", "key"):
        x = q if random.hole == "query" else k
        own = {
            **at,
            "q_pos": np.arange(m - n, m)[:, None, None],
            "kv_pos": np.arange(m)[:, None, None],
            "qo_head": np.arange(heads)[:, None],
            "kv_head": np.arange(heads)[:, None],
            "channel": np.arange(x.shape[2]),
            "mean_square": (x**2).mean(-1, keepdims=True),
        }
        x = np.broadcast_to(variant.evaluate(random.code, {**own, "value": x}), x.shape)
        q, k = (x, k) if random.hole == "query" else (q, x)
    s = np.einsum("nhd,mhd->hnm", q, k) * BATCH.head_dim**-0.5
    if random.hole == "logits":
        s = np.broadcast_to(variant.evaluate(random.code, {**at, "value": s}), shape)
    if random.hole == "mask":
        s = np.where(np.broadcast_to(variant.evaluate(random.code, at), shape), s, -np.inf)
    with np.errstate(all="ignore"):
        top = np.where(np.isneginf(s.max(-1)), 0.0, s.max(-1))
        weights = np.exp(s - top[..., None])
        total = weights.sum(-1)
        lse = np.log(total) + top
        o = np.einsum("hnm,mhd->nhd", weights / np.where(total == 0, 1, total)[..., None], v)
        if random.hole == "output":
            rows = {name: x for name, x in at.items() if name != "kv_pos"}
            out = {**rows, "value": o.transpose(1, 0, 2), "lse": lse[..., None]}
            o = np.broadcast_to(variant.evaluate(random.code, out), (heads, n, q.shape[2])).transpose(1, 0, 2)
    return s, np.where(np.isneginf(lse).T[..., None], 0.0, o), lse.T


def is_tame(s: np.ndarray, o: np.ndarray, largest: float = LARGEST) -> bool:
    """Numbers that 16-bit results can be compared by."""
    finite = s[~np.isneginf(s)]
    return bool(
        np.isfinite(finite).all()
        and np.abs(finite).max(initial=0) < largest
        and np.isfinite(o).all()
        and np.abs(o).max() < 1e3
    )


def largest(random: Random) -> float:
    """Queries and keys that a variant changed are rounded: a logit is off by up to 2^-11 of the sum of its terms."""
    return 6.0 if random.hole in ("query", "key") else LARGEST


@functools.cache
def tame() -> dict[int, tuple[Random, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]]:
    """Seed -> the variant and what each request should give, of those that can be compared."""
    made = {seed: Random(seed) for seed in SEEDS}
    expected = {seed: [reference(random, r) for r in range(len(requests()))] for seed, random in made.items()}
    return {
        seed: (made[seed], rows)
        for seed, rows in expected.items()
        if all(is_tame(s, o, largest(made[seed])) for s, o, _ in rows)
    }


@pytest.mark.subset
def test_most_are_compared_and_every_hole_is_filled():
    assert len(tame()) >= len(SEEDS) // 2
    assert {random.hole for random, _ in tame().values()} == {"logits", "mask", "output", "query", "key"}


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[pytest.mark.subset] if i < 6 else []) for i, s in enumerate(tame())]
)
def test_random_variant(seed, device):
    random, expected = tame()[seed]
    own = [Request(r.q.to(device), r.k.to(device), r.v.to(device)) for r in requests()]
    batch = Batch(BATCH, device, requests=own)
    bound = random.variant.bind(**{name: table(x, device) for name, x in random.values.items()})
    # the reference has the whole mask; the plan has its band
    o, lse = batch.attend(batch.plan(causal=None, window_left=None, variant=bound), variant=bound)
    for r, (_, ref, ref_lse) in enumerate(expected):
        at = slice(batch.qo_indptr[r], batch.qo_indptr[r + 1])
        ours, ours_lse = o[at].double().cpu().numpy(), lse[at].double().cpu().numpy()
        assert np.array_equal(np.isneginf(ours_lse), np.isneginf(ref_lse)), str(random.variant)
        seen = np.isfinite(ref_lse)
        assert np.abs(ours_lse[seen] - ref_lse[seen]).max(initial=0) <= 2e-2, str(random.variant)
        assert np.linalg.norm(ours - ref) <= 5e-3 * np.linalg.norm(ref) + 1e-6, str(random.variant)

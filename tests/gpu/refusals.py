"""Plans that a launch must refuse on the device: outputs stay as they are, and the plan says why (PlanRefusal in schedule/plan.h)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# words of the header
MAGIC, VERSION, CAPTURE_KEY, NUM_CTAS, NUM_REQUESTS, NUM_TOKENS, NUM_SHARED_WORKS = 0, 1, 2, 5, 6, 7, 15
TICKETS, NUM_SINK, CHUNK = 34, 37, 38
FEATURES, HEAD_LISTS, SHARED_WORKS = (
    7,
    1,
    2,
)  # a field of ExpectedPlan, and bits of it that a launch without a variant has

# (name, status, words of the plan, fields of the launch's ExpectedPlan, CTAs more or fewer than the plan's)
#   words, fields: index -> what is added to it
REFUSALS: tuple[tuple[str, int, dict[int, int], dict[int, int], int], ...] = (
    ("accepted", 0, {}, {}, 0),
    ("larger launch", 0, {}, {2: 5, 3: 100, 4: 1}, 7),
    ("no plan", 0, {MAGIC: 1}, {}, 0),
    ("another version", 0, {VERSION: 1}, {}, 0),
    ("another number of KV heads", 2, {}, {0: 1}, 0),
    ("another group", 2, {}, {1: -1}, 0),
    ("fewer CTAs than the plan's", 3, {}, {}, -1),
    ("fewer tokens", 4, {}, {2: -1}, 0),
    ("fewer partial rows", 5, {}, {3: -1}, 0),
    ("fewer lists", 6, {}, {4: -1}, 0),
    ("shared works in a launch with a variant", 8, {NUM_SHARED_WORKS: 1}, {FEATURES: -SHARED_WORKS}, 0),
    ("lists of KV heads behind an append", 9, {NUM_REQUESTS: -1}, {FEATURES: -HEAD_LISTS}, 0),
    ("sinks without a variant", 10, {NUM_SINK: 4}, {}, 0),
    ("chunks without a variant", 10, {CHUNK: 64}, {}, 0),
    ("negative count", 4, {NUM_TOKENS: -1_000_000}, {}, 0),
)


def check_refusals(kernel: Any, batch: Any, plan: np.ndarray) -> list[dict[str, Any]]:
    """One row a refusal, and the capture key's. `batch`: a run_cases.Batch whose plan has cut rows."""
    key = [int(x) for x in plan[CAPTURE_KEY : CAPTURE_KEY + 2]]
    cases = [(*case, (0, 0)) for case in REFUSALS]
    cases.append(("the capture key", 0, {}, {}, 0, (key[0], key[1])))
    cases.append(("another capture key", 7, {}, {}, 0, (key[0], key[1] ^ 1)))
    rows = []
    for name, status, words, fields, ctas, capture_key in cases:
        changed = plan.copy()
        for word, more in words.items():
            changed[word] += more
        batch.set_plan(plan)  # the workspace is the right plan's
        batch.plan.copy_(torch.from_numpy(changed))
        for field, more in fields.items():
            batch.params.expected_plan[field] += more
        batch.params.expected_plan[5], batch.params.expected_plan[6] = capture_key
        outputs = (batch.o, batch.lse, batch.partial_o, batch.partial_lse)
        for x in outputs:
            x.fill_(-7.0)
        kernel.launch(int(plan[NUM_CTAS]) + ctas, (batch.params, batch.maps))
        torch.cuda.synchronize()
        after = batch.plan.cpu().numpy()
        got = int(after[plan[TICKETS] // 4])
        runs = status == 0 and not words
        untouched = all(bool((x == -7.0).all()) for x in outputs)
        others = np.delete(np.arange(len(plan)), plan[TICKETS] // 4)
        ok = got == status and untouched != runs and bool((after[others] == changed[others]).all())
        if runs:
            ok = ok and batch.error()[0] < 1e-2
        rows.append({"name": f"refusal: {name}", "ok": ok, "status": got, "untouched": untouched})
    return rows

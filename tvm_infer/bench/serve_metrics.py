"""What a serving run amounts to: time to first token, time between tokens, throughput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .serve_loop import ServeRun


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Median and 99th percentile (linear interpolation) in milliseconds; None of nothing."""
    if not len(seconds):
        return {"median": None, "p99": None}
    values = np.percentile(np.asarray(seconds, np.float64) * 1e3, [50, 99])
    return {"median": float(values[0]), "p99": float(values[1])}


def summarize(run: ServeRun) -> dict[str, Any]:
    """Figures of a run, times in milliseconds.

    ttft_ms : from a request's arrival, waiting included, to its first token (of its samples, which come together). itl_ms : between
    consecutive tokens of a text. tokens_per_s : output tokens of all texts over the time from the first arrival to the last token.
    mean_decoding : samples that decoded in a step, over the steps that had any. typical : the median step of those, as (samples, keys
    of each), which the breakdown repeats.
    """
    samples = [sample for record in run.records for sample in record.samples]
    ttft = [record.samples[0].times[0] - record.request.arrival for record in run.records]
    itl = [gap for sample in samples for gap in np.diff(sample.times)]
    first = min(record.request.arrival for record in run.records)
    seconds = max(sample.times[-1] for sample in samples) - first
    tokens = sum(len(sample.tokens) for sample in samples)
    decode_steps = [step for step in run.steps if step.decoding]
    pure = [step for step in decode_steps if not step.prompt_tokens] or decode_steps
    typical = None
    if pure:
        batch = max(1, round(float(np.median([step.decoding for step in pure]))))
        keys = max(
            1, round(float(np.median([step.keys / (step.decoding + bool(step.prompt_tokens)) for step in pure])))
        )
        typical = {"batch": batch, "keys": keys}
    return {
        "ttft_ms": quantiles(ttft),
        "itl_ms": quantiles(itl),
        "tokens_per_s": tokens / seconds if seconds > 0 else None,
        "seconds": seconds,
        "requests": len(run.records),
        "prompt_tokens": sum(len(record.request.prompt) for record in run.records),
        "output_tokens": tokens,
        "steps": len(run.steps),
        "mean_decoding": float(np.mean([step.decoding for step in decode_steps])) if decode_steps else 0.0,
        "typical": typical,
    }

"""Operands of matrix products, poison around them, and how near to float64 a result must be."""

from __future__ import annotations

import torch


def matrix(rows: int, cols: int, dtype: torch.dtype, device: str, *, seed: int, pad: int = 0, offset: int = 0):
    """Random rows `pad` elements apart, beginning `offset` elements behind a boundary; NaN between them and around."""
    generator = torch.Generator(device=device).manual_seed(seed)
    whole = torch.full((offset + rows * (cols + pad) + 64,), torch.nan, dtype=dtype, device=device)
    view = whole[offset : offset + rows * (cols + pad)].view(rows, cols + pad)[:, :cols]
    view.copy_(torch.randn((rows, cols), generator=generator, device=device))
    return view


def poisoned(rows: int, cols: int, dtype: torch.dtype, device: str, *, pad: int = 0, offset: int = 0):
    """(output, its memory): NaN everywhere."""
    whole = torch.full((offset + rows * (cols + pad) + 64,), torch.nan, dtype=dtype, device=device)
    return whole[offset : offset + rows * (cols + pad)].view(rows, cols + pad)[:, :cols], whole


def by_torch(a, b, dtype: torch.dtype):
    """Plain torch's product, sums and result in what ours has them in."""
    if dtype == a.dtype:
        return a @ b
    try:
        return torch.mm(a, b, out_dtype=dtype)
    except (TypeError, RuntimeError):  # an older torch
        return a.float() @ b.float()


def assert_close(out, a, b, transpose_b: bool) -> None:
    """‖out - ref‖ / ‖ref‖ at most twice plain torch's, or twice what rounding the exact result and a sum of k terms in fp32 lose."""
    b = b.T if transpose_b else b
    reference = a.double() @ b.double()
    norm = float(reference.norm()) or 1.0

    def error(x) -> float:
        return float((x.double() - reference).norm()) / norm

    assert bool(torch.isfinite(out).all())
    rounding = error(reference.to(out.dtype)) + 2**-24 * a.shape[1] ** 0.5
    assert error(out) <= 2 * max(error(by_torch(a, b, out.dtype)), rounding)


def sum_error(out, a, b, c) -> float:
    """‖out - ref‖ / ‖ref‖ of a @ b + c."""
    reference = a.double() @ b.double() + c.double()
    return float((out.double() - reference).norm()) / (float(reference.norm()) or 1.0)


def assert_sum_close(out, a, b, transpose_b: bool, c, *, rounded_once: bool = True) -> None:
    """As assert_close, of a @ b + c. rounded_once : c was added in float32, before the one rounding."""
    b = b.T if transpose_b else b
    exact = (a.double() @ b.double() + c.double()).to(out.dtype)
    slack = 2**-24 * a.shape[1] ** 0.5
    torchs = by_torch(a, b, out.dtype) + c  # rounds twice
    assert bool(torch.isfinite(out).all())
    assert sum_error(out, a, b, c) <= 2 * max(sum_error(torchs, a, b, c), sum_error(exact, a, b, c) + slack)
    if rounded_once and a.dtype != torch.float32 and out.dtype == a.dtype and a.shape[1] > 1:  # closer than torch's two
        assert sum_error(out, a, b, c) <= 1.05 * sum_error(exact, a, b, c) + slack

"""When a result counts as right: its error against float64 is at most twice the naive layer's, plus a slack."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# In units of the dtype's epsilon; it counts where the naive layer happens to be exact.
_SLACK = {torch.float64: 64, torch.float32: 2, torch.float16: 1, torch.bfloat16: 1}


def slack_of(dtype: torch.dtype, tf32: bool = False) -> float:
    """tf32: the products of float32 run in tf32, where Triton truncates operands and cuBLAS rounds them to nearest."""
    return 2**-9 if tf32 else _SLACK[dtype] * torch.finfo(dtype).eps


def errors(got: Tensor, true: Tensor) -> tuple[float, float]:
    """The largest and the root mean square error, each relative to that value of true; infinite where not finite."""
    difference = got.double() - true
    if not difference.any():
        return 0.0, 0.0  # where true is zero too
    largest = (difference.abs().max() / true.abs().max()).item()
    rms = (difference.square().mean() / true.square().mean()).sqrt().item()
    return (largest, rms) if math.isfinite(largest) and math.isfinite(rms) else (math.inf, math.inf)


def allowed(naive: float, slack: float) -> float:
    """The largest error that counts as right, where the naive layer's is `naive`."""
    return 2 * naive + slack

"""The one place that decides which backend and which form serve a call: a pure function of shape, ranks and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch

FORMS = ("auto", "composed", "kept")
LOW_PRECISION = (torch.float16, torch.bfloat16)
COMPOSED_ONLY = ("hybrid", "triton")


class Choice(NamedTuple):
    """What runs: ``backend`` is a key of ``hydra_kernels.backends()``, ``form`` is "composed" or "kept"."""

    backend: str
    form: str


def choose(
    M: int, K: int, N: int, r_a: int, r_b: int, dtype: torch.dtype, form: str = "auto", backend: str = "auto"
) -> Choice:
    """The backend and form for x [M, K], weight [N, K], ranks r_a and r_b; what the user fixed stays fixed."""
    if backend == "auto":
        backend = "aten"
    if r_b == 0 or (form == "auto" and backend in COMPOSED_ONLY):
        form = "composed"  # the only form there, or without a sequential branch, where nothing needs y0
    elif form == "auto":
        form = _form(M, K, N, r_a, dtype)
    return Choice(backend, form)


def _form(M: int, K: int, N: int, r_a: int, dtype: torch.dtype) -> str:
    if dtype in LOW_PRECISION:
        return "kept"  # ATen rounds C = B_down W0 to the base dtype: less exact than the naive layer
    if r_a == 0 and N < K:
        return "kept"  # y0 is smaller than x, which then need not be saved
    if 5 * M < 2 * K:
        return "kept"  # composing reads W0 twice more to spare passes over [M, N]: measured to win from M = 0.4 K on
    if M * K * N < 2**24:
        return "kept"  # so small that the number of calls decides, and the kept form makes fewer
    return "composed"

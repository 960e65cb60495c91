"""The table of backends."""

from __future__ import annotations

import torch

from . import aten, native
from .interface import Backend
from .operators import Untraceable
from .triton import TritonBackend

TABLE: dict[str, Backend] = {
    "aten": aten,
    "native": Untraceable("native", native),
    "hybrid": Untraceable("hybrid", TritonBackend(always_fused=False)),
    "triton": Untraceable("triton", TritonBackend(always_fused=True)),
}
NAMES = ("auto", "reference", *TABLE)


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it runs on this machine, else the reason why it does not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"reference": None, **{name: backend.unavailable(device) for name, backend in TABLE.items()}}

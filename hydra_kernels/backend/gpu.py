"""Backends `triton` and `hybrid`: the composed form in Triton kernels, fused into the GEMM or around cuBLAS's."""

from __future__ import annotations

import importlib.util
from collections.abc import Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .interface import Operands, Saved

if TYPE_CHECKING:
    from ..kernels.configs import Architecture

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LOWEST_CAPABILITY = (8, 0)


class TritonBackend:
    """``fused``: the low-rank part is computed in the GEMM kernel itself; else beside cuBLAS, for any rank.

    Triton is imported at the first use, not with the package.
    """

    def __init__(self, fused: bool) -> None:
        self.fused = fused

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        from ..kernels.language import INTERPRETED

        if INTERPRETED.value or (torch.cuda.is_available() and torch.version.cuda is not None):
            return None
        return "it needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment for Triton's interpreter on the CPU"

    def refusal(self, form: str, dtype: torch.dtype, r_a: int, r_b: int, device: torch.device) -> str | None:
        from ..kernels import configs
        from ..kernels.language import INTERPRETED

        if not INTERPRETED.value:
            if device.type != "cuda":
                return f"it needs tensors on an NVIDIA GPU, and x is on {device}"
            capability = torch.cuda.get_device_capability(device)
            if capability < _LOWEST_CAPABILITY:
                return f"it needs compute capability 8.0 or later, and {device} has {capability[0]}.{capability[1]}"
        if dtype not in _DTYPES:
            return f"its kernels have no {dtype}"
        if form == "kept":
            return "it has the composed form only"
        if self.fused and r_a + r_b > configs.MAX_RANK_BLOCK:
            return f"it fuses ranks up to {configs.MAX_RANK_BLOCK}, and r_a + r_b is {r_a + r_b}; 'hybrid' takes any"
        return None

    def forward(self, x: Tensor, op: Operands, needs: Set[str], form: str) -> tuple[Tensor, Operands, Saved]:
        from . import gpu_steps

        return gpu_steps.forward(x, op, needs, self.fused, _tiles(x.device))

    def backward(self, G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> dict[str, Tensor]:
        from . import gpu_steps

        return gpu_steps.backward(G, op, saved, needs, self.fused, _tiles(G.device))


def _tiles(device: torch.device) -> Architecture:
    from ..kernels import configs
    from ..kernels.language import INTERPRETED

    return configs.of(None if INTERPRETED.value else torch.cuda.get_device_capability(device))

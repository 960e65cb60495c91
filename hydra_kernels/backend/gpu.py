"""Backends `triton` and `hybrid`: the composed form in Triton kernels, their own GEMM always, or where it pays."""

from __future__ import annotations

import importlib.util
from collections.abc import Set

import torch
from torch import Tensor

from ..kernels import configs
from . import operators
from .interface import CPU, Operands, Saved

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOWEST_CAPABILITY = (8, 0)


class TritonBackend:
    """``fused``: both large products in our GEMM, the low-rank part inside; else as `gpu_steps` says, for any rank.

    Triton is imported at the first use, not with the package.
    """

    def __init__(self, fused: bool) -> None:
        self.fused, self.name = fused, "triton" if fused else "hybrid"

    def unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        from ..kernels.language import INTERPRETED

        if INTERPRETED.value:
            return None
        if device.type != "cuda" or torch.version.cuda is None:
            return (
                "it needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment for Triton's interpreter on the CPU"
            )
        return too_old(torch.cuda.get_device_capability(device))

    def refusal(
        self, form: str, dtype: torch.dtype, r_a: int, r_b: int, masked: bool = False, device: torch.device = CPU
    ) -> str | None:
        if dtype not in KERNEL_DTYPES:
            return f"its kernels have no {dtype}"
        if form != "composed":
            return "it has the composed form only"
        if self.fused and r_a + r_b > configs.MAX_RANK_BLOCK:
            return f"it fuses ranks up to {configs.MAX_RANK_BLOCK}, and r_a + r_b is {r_a + r_b}; 'hybrid' takes any"
        return None

    def forward(self, x: Tensor, op: Operands, needs: Set[str], form: str) -> tuple[Tensor, Operands, Saved]:
        if operators.traced(x):
            return operators.forward(x, op, needs, self.name, form)
        from . import gpu_steps

        return gpu_steps.forward(x, op, needs, self.fused, gpu_steps.tiles_of(x.device))

    def backward(self, G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> dict[str, Tensor]:
        if operators.traced(G):
            return operators.backward(G, op, saved, needs, self.name, form)
        from . import gpu_steps

        tiles = gpu_steps.tiles_of(G.device)
        return gpu_steps.backward(G, gpu_steps.contiguous(op), saved, needs, self.fused, tiles)


def too_old(capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on GPUs of a capability, or None."""
    if capability >= LOWEST_CAPABILITY:
        return None
    return f"it needs compute capability 8.0 or later, and this GPU has {capability[0]}.{capability[1]}"

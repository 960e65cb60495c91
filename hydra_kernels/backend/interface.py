"""What a backend is given and what it owes.

A backend is a module, or an object, with the functions of `Backend`. Gradients are asked for and returned by name: "x",
or a field of `Operands`.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

LOW_PRECISION = (torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
COMPOSED_ONLY = ("hybrid", "triton")
MAX_NATIVE_RANK = 64  # of native's kernels on a GPU


class Operands(NamedTuple):
    """All of one call but x: weight [N, K] of x's dtype, adapters of that dtype or fp32, None where absent. For a
    backward, weight and bias are None where it does not read them.

    ``mask`` [M, R] is boolean with ``mask_scale`` 1/(1-p), or of x's dtype and already scaled with ``mask_scale`` 1.
    """

    weight: Tensor | None
    bias: Tensor | None
    A_down: Tensor | None
    A_up: Tensor | None
    B_down: Tensor | None
    B_up: Tensor | None
    A_down_bias: Tensor | None = None
    A_up_bias: Tensor | None = None
    B_down_bias: Tensor | None = None
    B_up_bias: Tensor | None = None
    mask: Tensor | None = None
    scale_a: float | Tensor = 1.0
    scale_b: float | Tensor = 1.0
    mask_scale: float = 1.0

    @property
    def r_a(self) -> int:
        return 0 if self.A_down is None else self.A_down.shape[0]

    @property
    def r_b(self) -> int:
        return 0 if self.B_down is None else self.B_down.shape[0]


FIRST_OPTION = Operands._fields.index("A_down_bias")  # from here on most calls leave them at their defaults

# What a forward leaves for its backward besides the operands; which tensors, each backend and form decides for itself.
Saved = tuple[Tensor | None, ...]


class Backend(Protocol):
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on a device, or None."""

    def refusal(
        self, form: str, dtype: torch.dtype, r_a: int, r_b: int, masked: bool = False, device: torch.device = CPU
    ) -> str | None:
        """Why it cannot serve such a call, ``masked`` where it has dropout, on a device like that, where it runs."""

    def forward(self, x: Tensor, op: Operands, needs: Set[str], form: str) -> tuple[Tensor, Operands, Saved]:
        """h [M, N] for x [M, K]; what the backward will read again of op, and what it will read besides."""

    def backward(self, G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> dict[str, Tensor]:
        """The gradients named in needs from G = dL/dh [M, N], each with the shape and dtype of its operand."""

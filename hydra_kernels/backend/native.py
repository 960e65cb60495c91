"""Backend `native`: both forms and the effective weight in C++ (csrc), one crossing from Python a pass."""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from .. import extension
from . import operators
from .interface import Operands, Saved

_DTYPES = (torch.float32, torch.float64)
_GRADIENTS = ("x", *Operands._fields[:-1])


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"its kernels run on the CPU, not on {device.type}"
    return extension.why_not()


def refusal(form: str, dtype: torch.dtype, r_a: int, r_b: int, masked: bool = False) -> str | None:
    if dtype not in _DTYPES:
        return f"its kernels have no {dtype}"
    if form == "effective" and masked:
        return "an effective weight leaves no place for dropout"
    return None


def forward(x: Tensor, op: Operands, needs: Set[str], form: str) -> tuple[Tensor, Operands, Saved]:
    if operators.traced(x):
        return operators.forward(x, op, needs, "native", form)
    h, saved = _native().forward(x, op, _bits(needs), form)
    through_W0 = form != "kept" and "B_down" in needs
    if not through_W0:
        op = op._replace(weight=op.weight if "x" in needs else None, bias=None)
    return h, op, saved


def backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> dict[str, Tensor]:
    if operators.traced(G):
        return operators.backward(G, op, saved, needs, "native", form)
    return _native().backward(G, op, saved, _bits(needs), form)


def _native() -> Any:
    return extension.load()


@functools.cache
def _bits(needs: Set[str]) -> int:
    """A set of gradients as operands.h numbers them."""
    return sum(1 << i for i, name in enumerate(_GRADIENTS) if name in needs)

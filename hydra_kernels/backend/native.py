"""Backend `native`: the compiled part (csrc), a whole pass in one call; on a GPU the composed form alone.

Eager calls that the compiled part vouches for do not come here: `functional` hands them to its own autograd function.
"""

from __future__ import annotations

import functools
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor

from .. import extension
from .interface import (
    ARGUMENTS,
    CPU,
    LOW_PRECISION,
    MAX_NATIVE_RANK,
    Operands,
    Saved,
    form_of,
    read_backwards,
)
from .triton import KERNEL_DTYPES, too_old

_CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unavailable(device: torch.device) -> str | None:
    if device.type == "cpu":
        return extension.why_not()
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it has kernels for CPUs and NVIDIA GPUs, not for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return extension.why_not("cuda") or too_old(capability) or extension.why_not_on(capability)


def no_sweep(capability: tuple[int, int]) -> str | None:
    """Why the one sweep over x and G (csrc/cuda/sm90_sweep.cu) cannot run on such a GPU; None where it can."""
    if capability[0] != 9:
        return f"the sweep needs compute capability 9.x, and this GPU has {capability[0]}.{capability[1]}"
    if not {"sm_90", "sm_90a"} & set(extension.record().get("architectures", ())):
        return f"the compiled part has no code for sm_90, which the sweep needs; {extension.REBUILD}"
    return None


def refusal(
    form: str,
    dtype: torch.dtype,
    r_a: int,
    r_b: int,
    masked: bool = False,
    device: torch.device = CPU,
    drops_input: bool = False,
) -> str | None:
    on_gpu = device.type == "cuda"
    if dtype not in (KERNEL_DTYPES if on_gpu else _CPU_DTYPES):
        return f"its kernels do not support {dtype}"
    if on_gpu and form != "composed":
        return "on a GPU it has only the composed form"
    if on_gpu and r_a + r_b > MAX_NATIVE_RANK:
        return f"its GPU kernels support ranks up to {MAX_NATIVE_RANK}, and r_a + r_b is {r_a + r_b}"
    if form == "effective" and dtype in LOW_PRECISION:
        return f"the effective form rounds W0 + U D to {dtype}, which is less exact than the naive layer"
    if form == "effective" and masked:
        return "the effective form does not support dropout"
    if drops_input and on_gpu:
        return "on a GPU its kernels do not support input dropout"
    return None


def forward(x: Tensor, op: Operands, needs: Set[str], plan: str) -> tuple[Tensor, Operands, Saved]:
    h, saved = _native().forward(x, op, _bits(needs), plan)
    return h, read_backwards(op, needs, form_of(plan)), saved


def backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str], plan: str) -> dict[str, Tensor]:
    return _native().backward(G, op, saved, _bits(needs), plan)


def _native() -> Any:
    return extension.load()


@functools.cache
def _bits(needs: Set[str]) -> int:
    """A set of gradients as operands.h numbers them."""
    return sum(1 << i for i, name in enumerate(ARGUMENTS) if name in needs)

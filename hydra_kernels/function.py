"""HydraFunction: the boundary to autograd. It knows which gradients are needed and what is saved, no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import TABLE
from .backend.interface import Operands, Saved

_ARGUMENTS = ("x", *Operands._fields, "choice")


class HydraFunction(torch.autograd.Function):
    """``HydraFunction.apply(x, *operands, choice)`` -> h [M, N]: Eq. 9-10 with a hand-written backward.

    Arguments have passed the checks of `hydra_linear`, which is what users call: x [M, K], the fields of
    `backend.interface.Operands`, a `choice.Choice`. The backward may run twice (``retain_graph=True``) but cannot be
    differentiated: ``create_graph=True`` raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        op, choice = Operands(*args[:-1]), args[-1]
        ctx.choice = choice
        ctx.needs = frozenset(n for n, need in zip(_ARGUMENTS, ctx.needs_input_grad, strict=True) if need)
        h, saved = TABLE[choice.backend].forward(x, op, ctx.needs, choice.form)
        ctx.save_for_backward(*saved, *(v if isinstance(v, Tensor) else None for v in op))
        ctx.constants = [None if isinstance(v, Tensor) else v for v in op]
        return h

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "hydra_linear: create_graph=True asks for a derivative of its backward, which has none; use "
                "backend='reference' for gradient penalties and other double backwards"
            )
        tensors = ctx.saved_tensors
        saved, rest = Saved(*tensors[: len(Saved._fields)]), tensors[len(Saved._fields) :]
        op = Operands(*(c if t is None else t for t, c in zip(rest, ctx.constants, strict=True)))
        with torch.autocast(G.device.type, enabled=False):
            grads = TABLE[ctx.choice.backend].backward(G, op, saved, ctx.needs, ctx.choice.form)
        return tuple(grads.get(name) for name in _ARGUMENTS)

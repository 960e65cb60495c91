"""HydraFunction: the boundary to autograd. It knows which gradients are needed and what is saved, no arithmetic."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .backend import TABLE
from .backend.interface import Operands


def autocast_is_on(t: Tensor) -> bool:
    """Whether autocast is on for t's device; the meta device has none."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


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
        needs = frozenset(compress(_ARGUMENTS, ctx.needs_input_grad))
        h, op, saved = TABLE[choice.backend].forward(x, op, needs, choice.form)
        scales = op.scale_a, op.scale_b, op.mask_scale
        ctx.save_for_backward(*op[:-3], *(s if isinstance(s, Tensor) else None for s in scales), *saved)
        ctx.scales = [None if isinstance(s, Tensor) else s for s in scales]
        ctx.needs, ctx.choice = needs, choice
        return h

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "hydra_linear: create_graph=True asks for a derivative of its backward, which has none; use "
                "backend='reference' for gradient penalties and other double backwards"
            )
        tensors, choice = ctx.saved_tensors, ctx.choice
        n = len(Operands._fields)
        scales = [t if s is None else s for t, s in zip(tensors[n - 3 : n], ctx.scales, strict=True)]
        op, saved = Operands(*tensors[: n - 3], *scales), tensors[n:]
        backend = TABLE[choice.backend]
        if autocast_is_on(G):
            with torch.autocast(G.device.type, enabled=False):
                grads = backend.backward(G, op, saved, ctx.needs, choice.form)
        else:
            grads = backend.backward(G, op, saved, ctx.needs, choice.form)
        return tuple(map(grads.get, _ARGUMENTS))

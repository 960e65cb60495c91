"""HydraFunction: the boundary to autograd. It decides which gradients are computed and what is saved."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .backend import TABLE
from .backend.interface import ARGUMENTS, FIRST_OPTION, Choice, Operands, joined, split, without_options
from .backend.operators import dense_in_backward
from .private import asks_the_engine, is_batched_for_vectorize
from .weights import Packed


def autocast_is_on(t: Tensor) -> bool:
    """Whether autocast is on for t's device; the meta device has none."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def computed_in(t: Tensor) -> torch.dtype:
    """The dtype of t's products: autocast's where that is on, which leaves float64 alone."""
    return torch.get_autocast_dtype(t.device.type) if autocast_is_on(t) and t.dtype != torch.float64 else t.dtype


def _asked_for(ctx: Any) -> frozenset[str]:
    """The gradients that this backward is asked for: fewer than its forward saw in ``torch.autograd.grad(h, [A_up])``.

    torch has only a private function for that. Without it, or outside torch's engine, all gradients are computed.
    """
    will_run = asks_the_engine()
    nodes = [node for node, _ in ctx.next_functions if node is not None]
    if will_run is None or len(nodes) != len(ctx.needs):
        return ctx.needs
    asked = []
    for name, node in zip([name for name in ARGUMENTS if name in ctx.needs], nodes, strict=True):
        try:
            if will_run(node):
                asked.append(name)
        except RuntimeError:
            asked.append(name)  # torch.autograd.grad wants just this leaf, or there is no engine to ask
    return frozenset(asked)


_ARGUMENTS = ("choice", *ARGUMENTS)


class HydraFunction(torch.autograd.Function):
    """``HydraFunction.apply(choice, x, *operands)`` -> h [M, N]: Eq. 9-10 with a hand-written backward.

    Arguments have passed the checks of `hydra_linear`, which is what users call: a `Choice`, x [M, K], the fields
    of `backend.interface.Operands`, of which those with a default may be left out, all or none. A weight may be
    `Packed`: each pass then makes the dense one anew, and the packed tensors are saved. The backward may run twice
    (``retain_graph=True``) but cannot be differentiated: ``create_graph=True`` raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, choice: Choice, x: Tensor, *operands: Any) -> Tensor:
        needs = frozenset(compress(_ARGUMENTS, ctx.needs_input_grad))
        given = Operands(*operands) if len(operands) > FIRST_OPTION else without_options(*operands)
        weight: Any = given.weight
        ctx.packed = None
        if isinstance(weight, Packed):
            given = given._replace(weight=weight.dense(x.dtype))
        h, op, saved = TABLE[choice.backend].forward(x, given, needs, choice.plan)
        if isinstance(weight, Packed):
            if op.weight is not None:
                saved, ctx.packed = (
                    (*saved, *weight.tensors),
                    (weight._replace(tensors=(), base=None), len(weight.tensors)),
                )
            op = op._replace(weight=None)
        # Every argument of this function, and every tensor saved, costs the host time in every step.
        tensors, ctx.numbers = split(op) if len(operands) == len(op) else (op[: len(operands)], None)
        ctx.save_for_backward(*tensors, *saved)
        ctx.needs, ctx.choice, ctx.operands = needs, choice, len(operands)
        return h

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Any:
        eager = not torch.compiler.is_compiling()
        if eager and torch.is_grad_enabled():
            raise RuntimeError(
                "hydra_linear: create_graph=True asks for a derivative of its backward, which has none; use "
                "backend='reference' for gradient penalties and other double backwards"
            )
        if eager and ctx.choice.backend != "aten" and is_batched_for_vectorize(G):
            raise RuntimeError(
                f"hydra_linear: backend {ctx.choice.backend!r} takes no batched gradients (is_grads_batched, "
                "vectorize=True); use backend='aten'"
            )
        if eager and G._is_zerotensor():
            G = torch.zeros(G.shape, dtype=G.dtype, device=G.device)  # a kernel would look for its elements
        tensors, choice, n = ctx.saved_tensors, ctx.choice, ctx.operands
        op = without_options(*tensors[:n]) if ctx.numbers is None else joined(tensors[:n], ctx.numbers)
        saved = tensors[n:]
        if ctx.packed is not None:
            packed, count = ctx.packed
            op = op._replace(weight=dense_in_backward(packed._replace(tensors=saved[-count:]), G))
            saved = saved[:-count]
        backend, needs = TABLE[choice.backend], _asked_for(ctx) if eager else ctx.needs
        if autocast_is_on(G):
            with torch.autocast(G.device.type, enabled=False):
                grads = backend.backward(G, op, saved, needs, choice.plan)
        else:
            grads = backend.backward(G, op, saved, needs, choice.plan)
        return tuple([grads.get(name) for name in _ARGUMENTS[: n + 2]])

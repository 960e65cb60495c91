"""Custom operators: what torch.compile takes into its graph unseen. Plain eager calls never come here.

No tracer can follow a kernel of Triton's, which Python launches, nor compiled C++, so a whole forward or backward of
such a backend is one operator. The fake implementations give the shapes and strides of what the bodies return.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from ..private import count_dispatch_modes, dispatch_modes
from ..weights import Packed, dense
from .flops import backward_flops, forward_flops
from .interface import (
    ARGUMENTS,
    FROM_Z,
    LOW_PRECISION,
    Backend,
    Operands,
    Saved,
    form_of,
    joined,
    read_backwards,
    split,
)

_PACKED = "Tensor[] tensors, str format, int[] shape, int[] numbers"
_CALL = "Tensor?[] tensors, float[] numbers, str needs, str backend, str plan"  # `split` makes the first two
_BACKENDS: dict[str, Backend] = {}  # filled by `Untraceable`, read by the operators' bodies


class Untraceable:
    """A backend that no tracer can follow: where one looks on, a whole pass is one operator."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name, self.backend = name, backend
        self.unavailable, self.refusal = backend.unavailable, backend.refusal
        _BACKENDS[name] = backend

    def forward(self, x: Tensor, op: Operands, needs: Set[str], plan: str) -> tuple[Tensor, Operands, Saved]:
        if not traced(x):
            return self.backend.forward(x, op, needs, plan)
        _tell_flop_counters()
        op = opened(op, x)
        # A list, which torch 2.11 does not trace `h, *left` to be.
        left = list(torch.ops.hydra_kernels.forward(x, *split(op), _listed(needs), self.name, plan))
        h, (with_x, *others) = left.pop(0), _are_saved(form_of(plan), op, needs)
        saved = (x if with_x else None, *(left.pop(0) if is_saved else None for is_saved in others))
        return h, read_backwards(op, needs, form_of(plan)), saved

    def backward(self, G: Tensor, op: Operands, saved: Saved, needs: Set[str], plan: str) -> dict[str, Tensor]:
        if not traced(G):
            return self.backend.backward(G, op, saved, needs, plan)
        _tell_flop_counters()
        names = _listed(needs)
        grads = torch.ops.hydra_kernels.backward(G, list(saved), *split(op), names, self.name, plan)
        return dict(zip(names.split(","), grads, strict=True))


def traced(x: Tensor) -> bool:
    """Whether a tracer or a dispatch mode looks on, or x is a stand-in without data: then nothing may be launched."""
    if torch.compiler.is_compiling() or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    return _a_mode_is_on()


def _a_mode_is_on() -> bool:
    return bool(count_dispatch_modes() > 0)


def _tell_flop_counters() -> None:
    """Gives our formulas to each FLOP counter that looks on: to register them once would import Triton."""
    if not torch.compiler.is_compiling():
        for mode in dispatch_modes():
            registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
            if registry is not None:
                registry.update(_FLOPS)


def is_static(n: float) -> bool:
    """Whether n is a plain number. One that torch.compile keeps open is bound to its value by a comparison."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value  # here: it imports sympy, as the compiler does

    return has_static_value(n)


def opened(op: Operands, x: Tensor) -> Operands:
    """op with a tensor for each number that torch.compile keeps open: an operator would bind it to its value."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for name in ("scale_a", "scale_b"):
        scale = getattr(op, name)
        if not isinstance(scale, Tensor) and not is_static(scale):
            # A product, since torch keeps a number open for those alone: new_full((), scale) would bind it.
            op = op._replace(**{name: x.new_ones((), dtype=dtype) * scale})
    if op.mask is not None and not is_static(op.mask_scale):
        op = op._replace(mask=op.mask.to(x.dtype) * op.mask_scale, mask_scale=1.0)
    return op


def accumulate_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + left @ right in out's place. Inductor on its own would copy out first, a pass over memory."""
    if torch.compiler.is_compiling():
        torch.ops.hydra_kernels.accumulate_(out, left, right)
        return out
    # A mode may keep out as it is now, as selective checkpointing does, or count plain products, as FLOP counters do.
    return torch.addmm(out, left, right) if _a_mode_is_on() else out.addmm_(left, right)


def add_(out: Tensor, v: Tensor) -> Tensor:
    """out + v, in out's place but under torch.compile: torch 2.11 would drop every gradient of a call that does so."""
    return out + v if torch.compiler.is_compiling() or _a_mode_is_on() else out.add_(v)


def dense_in_backward(weight: Packed, G: Tensor) -> Tensor:
    """W0 [N, K] of a quantised weight for a backward from G, whose dtype it has."""
    if not torch.compiler.is_compiling():
        return weight.dense(G.dtype)
    # It takes G, for else torch.compile would keep the forward's dense weight for the backward.
    made: Tensor = torch.ops.hydra_kernels.dense(
        G, list(weight.tensors), weight.format, list(weight.shape), list(weight.numbers)
    )
    return made


def _are_saved(form: str, op: Operands, needs: Set[str]) -> tuple[bool, bool, bool]:
    """Which of its three saved tensors a form leaves: x, Z, D; kept: x, Z, y0; effective: x, D, d."""
    from_Z, A_down, B_down = not needs.isdisjoint(FROM_Z), "A_down" in needs, "B_down" in needs
    if form == "kept":
        return A_down, from_Z, B_down
    if form == "composed":
        return A_down or B_down, from_Z, "x" in needs
    of_b = op.r_b > 0 and (op.bias is not None or op.B_down_bias is not None)
    return A_down or B_down or from_Z, from_Z or "x" in needs, from_Z and (of_b or op.A_down_bias is not None)


def _forward(
    x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float], needs: str, backend: str, plan: str
) -> list[Tensor]:
    op = joined(tensors, numbers)
    h, _, saved = _BACKENDS[backend].forward(x, op, frozenset(needs.split(",")), plan)
    # An operator may not return an operand, and without a sequential branch D is A_down.
    return [h, *(t.clone() if t is op.A_down or t is op.A_down_bias else t for t in saved[1:] if t is not None)]


def _fake_forward(
    x: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float], needs: str, backend: str, plan: str
) -> list[Tensor]:
    op = joined(tensors, numbers)
    (M, K), N, R = x.shape, op.weight.shape[0], op.r_a + op.r_b
    rows = R + op.r_b if x.dtype in LOW_PRECISION else R  # of D in the effective form: C is in two parts then
    shapes = {"composed": ((M, R), (R, K)), "kept": ((M, R), (M, N)), "effective": ((rows, K), (R,))}[form_of(plan)]
    _, *others = _are_saved(form_of(plan), op, set(needs.split(",")))
    h, *left = (x.new_empty(shape) for shape, saved in zip(((M, N), *shapes), (True, *others), strict=True) if saved)
    if form_of(plan) == "effective" and others[1]:
        left[-1] = left[-1].to(torch.promote_types(x.dtype, torch.float32))  # d
    return [h, *left]


def _backward(
    G: Tensor,
    saved: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    needs: str,
    backend: str,
    plan: str,
) -> list[Tensor]:
    names = needs.split(",")
    grads = _BACKENDS[backend].backward(G, joined(tensors, numbers), tuple(saved), frozenset(names), plan)
    return [grads[name] for name in names]


def _fake_backward(
    G: Tensor,
    saved: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    needs: str,
    backend: str,
    plan: str,
) -> list[Tensor]:
    op, (M, N) = joined(tensors, numbers), G.shape
    special = {"x": lambda: G.new_empty(M, op.weight.shape[1]), "bias": lambda: G.new_empty(N)}

    def like(name: str) -> Tensor:
        return torch.empty_like(getattr(op, name), memory_format=torch.contiguous_format)

    return [special[name]() if name in special else like(name) for name in needs.split(",")]


def _listed(needs: Set[str]) -> str:
    return ",".join([name for name in ARGUMENTS if name in needs])


def _accumulate_(out: Tensor, left: Tensor, right: Tensor) -> None:
    out.addmm_(left, right)


def _dense(G: Tensor, tensors: list[Tensor], format: str, shape: list[int], numbers: list[int]) -> Tensor:
    return dense(format, shape, tensors, numbers, G.dtype)


# Not torch.library.custom_op, whose wrapper costs the host 13 us a call: one of these costs 2.
_LIBRARY = torch.library.Library("hydra_kernels", "DEF")
for _name, _schema, _body, _fake in (
    ("accumulate_", "(Tensor(a!) out, Tensor left, Tensor right) -> ()", _accumulate_, lambda out, left, right: None),
    ("forward", f"(Tensor x, {_CALL}) -> Tensor[]", _forward, _fake_forward),
    ("dense", f"(Tensor G, {_PACKED}) -> Tensor", _dense, lambda G, tensors, format, shape, _: G.new_empty(shape)),
    ("backward", f"(Tensor G, Tensor?[] saved, {_CALL}) -> Tensor[]", _backward, _fake_backward),
):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hydra_kernels::{_name}", _fake, lib=_LIBRARY)

_FLOPS = {torch.ops.hydra_kernels.forward: forward_flops, torch.ops.hydra_kernels.backward: backward_flops}

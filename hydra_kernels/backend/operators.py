"""Custom operators: what torch.compile takes into its graph unseen. Plain eager calls never come here.

No tracer can follow a kernel of Triton's, which Python launches, nor compiled C++, so a whole forward or backward of
such a backend is one operator. The fake implementations give the shapes and strides of what the bodies return.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from .interface import Operands, Saved

_NUMBERS = ("scale_a", "scale_b", "mask_scale")
_TENSORS = tuple(name for name in Operands._fields if name not in _NUMBERS)
_OPERANDS = "Tensor?[] tensors, float scale_a, float scale_b, float mask_scale, str needs, str backend, str form"
_FROM_Z = ("A_up", "B_up", "scale_a", "scale_b")


def traced(x: Tensor) -> bool:
    """Whether a tracer or a dispatch mode looks on, or x is a stand-in without data: then nothing may be launched."""
    if torch.compiler.is_compiling() or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def accumulate_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + left @ right in out's place. Inductor on its own would copy out first, a pass over memory."""
    if torch.compiler.is_compiling():
        torch.ops.hydra_kernels.accumulate_(out, left, right)
        return out
    return out.addmm_(left, right)


def add_(out: Tensor, v: Tensor) -> Tensor:
    """out + v, in out's place but under torch.compile: torch 2.11 would drop every gradient of a call that does so."""
    return out + v if torch.compiler.is_compiling() else out.add_(v)


def forward(x: Tensor, op: Operands, needs: Set[str], backend: str, form: str) -> tuple[Tensor, Operands, Saved]:
    """The backend's forward as one operator."""
    # A list, which torch 2.11 does not trace `h, *left` to be.
    left = list(torch.ops.hydra_kernels.forward(x, *_packed(op), _joined(needs), backend, form))
    h, (with_x, *others) = left.pop(0), _are_saved(form, op, needs)
    return h, op, (x if with_x else None, *(left.pop(0) if saved else None for saved in others))


def backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str], backend: str, form: str) -> dict[str, Tensor]:
    """The backend's backward as one operator."""
    joined = _joined(needs)
    grads = torch.ops.hydra_kernels.backward(G, list(saved), *_packed(op), joined, backend, form)
    return dict(zip(joined.split(","), grads, strict=True))


def _are_saved(form: str, op: Operands, needs: Set[str]) -> tuple[bool, bool, bool]:
    """Which of its three saved tensors a form leaves: x, Z, D; kept: x, Z, y0; effective: x, D, d."""
    from_Z, A_down, B_down = not needs.isdisjoint(_FROM_Z), "A_down" in needs, "B_down" in needs
    if form == "kept":
        return A_down, from_Z, B_down
    if form == "composed":
        return A_down or B_down, from_Z, "x" in needs
    of_b = op.r_b > 0 and (op.bias is not None or op.B_down_bias is not None)
    return A_down or B_down or from_Z, from_Z or "x" in needs, from_Z and (of_b or op.A_down_bias is not None)


def _forward(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    backend: str,
    form: str,
) -> list[Tensor]:
    from . import TABLE

    op = _unpacked(tensors, scale_a, scale_b, mask_scale)
    h, _, saved = TABLE[backend].forward(x, op, frozenset(needs.split(",")), form)
    # An operator may not return an operand, and without a sequential branch D is A_down.
    return [h, *(t.clone() if t is op.A_down or t is op.A_down_bias else t for t in saved[1:] if t is not None)]


def _fake_forward(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    backend: str,
    form: str,
) -> list[Tensor]:
    op = _unpacked(tensors, scale_a, scale_b, mask_scale)
    (M, K), N, R = x.shape, op.weight.shape[0], op.r_a + op.r_b
    shapes = {"composed": ((M, R), (R, K)), "kept": ((M, R), (M, N)), "effective": ((R, K), (R,))}[form]
    _, *others = _are_saved(form, op, set(needs.split(",")))
    return [x.new_empty(M, N), *(x.new_empty(shape) for shape, saved in zip(shapes, others, strict=True) if saved)]


def _backward(
    G: Tensor,
    saved: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    backend: str,
    form: str,
) -> list[Tensor]:
    from . import TABLE

    op, names = _unpacked(tensors, scale_a, scale_b, mask_scale), needs.split(",")
    grads = TABLE[backend].backward(G, op, tuple(saved), frozenset(names), form)
    return [grads[name] for name in names]


def _fake_backward(
    G: Tensor,
    saved: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    backend: str,
    form: str,
) -> list[Tensor]:
    op, (M, N) = _unpacked(tensors, scale_a, scale_b, mask_scale), G.shape
    special = {"x": lambda: G.new_empty(M, op.weight.shape[1]), "bias": lambda: G.new_empty(N)}

    def like(name: str) -> Tensor:
        return torch.empty_like(getattr(op, name), memory_format=torch.contiguous_format)

    return [special[name]() if name in special else like(name) for name in needs.split(",")]


def _joined(needs: Set[str]) -> str:
    return ",".join(name for name in ("x", *Operands._fields) if name in needs)


def _packed(op: Operands) -> tuple[list[Tensor | None], float, float, float]:
    """Tensors, learnable scales among them, and numbers, 1 in the place of a learnable scale."""
    scales = op.scale_a, op.scale_b, op.mask_scale
    learnable = [s if isinstance(s, Tensor) else None for s in scales]
    a, b, c = (1.0 if isinstance(s, Tensor) else s for s in scales)
    return [*(getattr(op, name) for name in _TENSORS), *learnable], a, b, c


def _unpacked(tensors: Sequence[Tensor | None], *numbers: float) -> Operands:
    n = len(_TENSORS)
    scales = [number if t is None else t for t, number in zip(tensors[n:], numbers, strict=True)]
    return Operands(*tensors[:n], *scales)  # type: ignore[arg-type]


def _accumulate_(out: Tensor, left: Tensor, right: Tensor) -> None:
    out.addmm_(left, right)


# Not torch.library.custom_op, whose wrapper costs the host 13 us a call: one of these costs 2.
_LIBRARY = torch.library.Library("hydra_kernels", "DEF")
for _name, _schema, _body, _fake in (
    ("accumulate_", "(Tensor(a!) out, Tensor left, Tensor right) -> ()", _accumulate_, lambda out, left, right: None),
    ("forward", f"(Tensor x, {_OPERANDS}) -> Tensor[]", _forward, _fake_forward),
    ("backward", f"(Tensor G, Tensor?[] saved, {_OPERANDS}) -> Tensor[]", _backward, _fake_backward),
):
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hydra_kernels::{_name}", _fake, lib=_LIBRARY)

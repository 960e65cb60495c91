"""Custom operators: what torch.compile takes into its graph unseen. Eager calls never come here.

A kernel of Triton's is launched by Python, which no tracer can follow, so a whole forward or backward of `gpu_steps` is
one operator. The fake implementations give the shapes and strides of what the bodies return.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor, nn

from .interface import Operands, Saved

_NUMBERS = ("scale_a", "scale_b", "mask_scale")
_TENSORS = tuple(name for name in Operands._fields if name not in _NUMBERS)
_OPERANDS = "Tensor?[] tensors, float scale_a, float scale_b, float mask_scale, str needs, bool fused"
_FROM_Z = ("A_up", "B_up", "scale_a", "scale_b")


def traced(x: Tensor) -> bool:
    """Whether a tracer looks on, or x is a stand-in without data: then nothing may be launched."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter)


def accumulate_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + left @ right in out's place. Inductor on its own would copy out first, a pass over memory."""
    if torch.compiler.is_compiling():
        torch.ops.hydra_kernels.accumulate_(out, left, right)
        return out
    return out.addmm_(left, right)


def forward(x: Tensor, op: Operands, needs: Set[str], fused: bool) -> tuple[Tensor, Operands, Saved]:
    """`gpu_steps.forward` as one operator."""
    h, *left = torch.ops.hydra_kernels.forward(x, *_packed(op), _joined(needs), fused)
    Z = left[0] if not needs.isdisjoint(_FROM_Z) else None
    return h, op, (x if "A_down" in needs or "B_down" in needs else None, Z, left[-1] if "x" in needs else None)


def backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str], fused: bool) -> dict[str, Tensor]:
    """`gpu_steps.backward` as one operator."""
    joined = _joined(needs)
    return dict(
        zip(
            joined.split(","),
            torch.ops.hydra_kernels.backward(G, list(saved), *_packed(op), joined, fused),
            strict=True,
        )
    )


def _forward(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    fused: bool,
) -> list[Tensor]:
    from . import gpu_steps

    op = _unpacked(tensors, scale_a, scale_b, mask_scale)
    h, _, (_, Z, D) = gpu_steps.forward(x, op, set(needs.split(",")), fused, gpu_steps.tiles_of(x.device))
    return [h, *(t for t in (Z, D) if t is not None)]


def _fake_forward(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    fused: bool,
) -> list[Tensor]:
    op, wanted = _unpacked(tensors, scale_a, scale_b, mask_scale), needs.split(",")
    (M, K), R = x.shape, op.r_a + op.r_b
    outputs = [x.new_empty(M, op.weight.shape[0])]
    outputs += [x.new_empty(M, R)] if set(_FROM_Z).intersection(wanted) else []
    return outputs + ([x.new_empty(R, K)] if "x" in wanted else [])


def _backward(
    G: Tensor,
    saved: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    fused: bool,
) -> list[Tensor]:
    from . import gpu_steps

    op, names = gpu_steps.contiguous(_unpacked(tensors, scale_a, scale_b, mask_scale)), needs.split(",")
    grads = gpu_steps.backward(G, op, tuple(saved), set(names), fused, gpu_steps.tiles_of(G.device))
    return [grads[name] for name in names]


def _fake_backward(
    G: Tensor,
    saved: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    scale_a: float,
    scale_b: float,
    mask_scale: float,
    needs: str,
    fused: bool,
) -> list[Tensor]:
    op, (M, N) = _unpacked(tensors, scale_a, scale_b, mask_scale), G.shape
    special = {"x": lambda: G.new_empty(M, saved[2].shape[1]), "bias": lambda: G.new_empty(N)}

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

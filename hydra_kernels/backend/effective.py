"""The effective form of `hybrid`: W = W0 + U D once a pass, the frozen layer's two GEMMs on it, and the skinny passes.

forward     effective: W, b, D, d    cuBLAS: h = x W^T + b
backward    down: Z    rebuild: W    cuBLAS: dx = G W    and what `triton.backward` does for every gradient but dx

2 + 8 launches where every gradient is wanted. Nothing here has dropout, which lies between D and U. Saved are x, D and
d: W is as large as W0, a layer's and never a model's, and W0 is read once and W written once to make it again.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor

from ..kernels.configs import Architecture
from ..kernels.launch import Launch
from . import triton as composed
from .interface import FROM_Z, LOW_PRECISION, Operands, Saved, read_backwards
from .triton import Run, contiguous, launching, precision_of


def forward(
    x: Tensor, op: Operands, needs: Set[str], arch: Architecture, run: Run = Launch.run
) -> tuple[Tensor, Operands, Saved]:
    from ..kernels import effective

    run = launching(run, arch)
    op, precision = contiguous(op), precision_of(x.dtype)
    (N, K), R, from_Z = op.weight.shape, op.r_a + op.r_b, not needs.isdisjoint(FROM_Z)
    down_biases = op.A_down_bias is not None or op.B_down_bias is not None
    with_d = down_biases or (op.bias is not None and op.r_b > 0)
    with_b = down_biases or any(t is not None for t in (op.bias, op.A_up_bias, op.B_up_bias))
    W, b = x.new_empty(N, K), x.new_empty(N) if with_b else None
    # With C in two parts, as composed passes over x need it.
    rows = R + op.r_b if x.dtype in LOW_PRECISION else R
    D = x.new_empty(rows, K) if from_Z or "x" in needs else None
    d = x.new_empty(R, dtype=torch.float32) if from_Z and with_d else None
    tiles = arch.tiles(x.dtype, precision, [op.weight])
    splits, scales = arch.splits_of_effective(tiles, N, K), (op.scale_a, op.scale_b)
    run(effective.effective(
        op.weight, op.bias, op._asdict(), scales, D, d, b, W, splits, tiles.effective, precision
    ))  # fmt: skip
    h = torch.mm(x, W.t()) if b is None else torch.addmm(b, x, W.t())
    keeps_x = from_Z or not needs.isdisjoint(("A_down", "B_down"))
    return h, read_backwards(op, needs, "effective"), (x if keeps_x else None, D, d)


def backward(
    G: Tensor, op: Operands, saved: Saved, needs: Set[str], arch: Architecture, run: Run = Launch.run
) -> dict[str, Tensor]:
    from ..kernels import effective, skinny

    run = launching(run, arch)
    x, D, d = saved
    precision, R, Z = precision_of(G.dtype), op.r_a + op.r_b, None
    grads: dict[str, Tensor] = {}
    if "x" in needs:
        W = torch.empty_like(op.weight, memory_format=torch.contiguous_format)
        config, scales = arch.tiles(G.dtype, precision, [op.weight]).rebuild, (op.scale_a, op.scale_b)
        run(effective.rebuild(op.weight, op.A_up, op.B_up, scales, D, W, config, precision))
        grads["x"] = torch.mm(G, W)
    if not needs.isdisjoint(FROM_Z):
        Z, rest = G.new_empty(len(G), R), D[R:] if len(D) > R else None
        run(skinny.down(x, D[:R], rest, d, None, 1.0, Z, arch.tiles(G.dtype, precision, [x]).down, precision))
    others = needs - {"x"}
    return grads | composed.backward(G, op, (x, Z, None), others, False, arch, run) if others else grads

"""What `native` launches on Hopper in a training step of a Hydra layer with b0, for the predictions of roofline.

A kernel is (name, reads, writes, operations). They are written down, not recorded: csrc makes its launches itself. The
numbers of parts are those of csrc/cuda.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor

from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.shapes import Shape

BLOCKS = 528  # of a pass
SWEEP_BLOCKS = 128
SWEEP_COLUMNS = 8 * 8 * 16  # of a cluster of 8 blocks of 8 warps, for a group of 16 columns a warp
MAX_SWEEP_ROWS = 64  # at once

Listed = tuple[str, tuple[tuple[Tensor, int], ...], tuple[Tensor, ...], int]


def parts(steps: int, blocks: int) -> int:
    return ceil(steps / ceil(steps / max(1, BLOCKS // blocks)))


def sweep_ranges(shape: Shape, R: int) -> int:
    """Of rows: one a cluster, of 8 blocks or, where these have too few registers, of 16."""
    blocks = 8 if SWEEP_COLUMNS * (288 // (16 if R <= 16 else 32)) >= shape.K + shape.N else 16
    return min(SWEEP_BLOCKS // blocks, ceil(shape.M / MAX_SWEEP_ROWS))


def native_step(
    shape: Shape, ranks: Ranks, dtype: torch.dtype, t: Mapping[str, Tensor | None], sweep: bool
) -> list[Listed]:
    """A forward and a backward with the gradients of x and the adapters, by passes or by the one sweep."""
    (M, K, N), (r_a, r_b), R = shape, ranks, sum(ranks)
    whole = 16 if R <= 16 else 32 if R <= 32 else 64  # ranks that a product computes

    def new(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def sums(*size: int) -> Tensor:
        return new(*size, dtype=torch.float32)

    def listed(name: str, reads: list[Tensor | None], writes: list[Tensor], operations: int = 0) -> Listed:
        return name, tuple((v, 1) for v in reads if v is not None and v.numel()), tuple(writes), operations

    x, W0, b0, h, G = t["x"], t["weight"], t["bias"], new(M, N), new(M, N)
    C, z = sums(parts(ceil(N / 64), ceil(K / 64)), r_b, K), sums(parts(ceil(K / 64), ceil(M / 64)), M, R)
    D, rest, U, d, Z, dZ, dx = new(R, K), new(r_b, K), new(N, R), sums(R), new(M, R), new(M, R), new(M, K)
    ups = [t["A_up"], t["B_up"]]
    steps = [
        listed("compose", [W0, t["B_down"]], [C], 2 * N * K * whole) if r_b else None,
        listed("finish C", [C, t["A_down"], t["B_down"], *ups, b0], [D, rest, U, d]),
        listed("down", [x, D, rest], [z], 2 * M * K * whole * 2),
        listed("finish Z", [z, d], [Z]),
        listed("addmm", [x, W0, b0], [h], 2 * M * K * N),
        listed("addmm_", [h, Z, U], [h], 2 * M * N * R),
    ]
    if sweep:
        P = sweep_ranges(shape, R)
        dU, dD, z_sums = sums(P, N, R), sums(P, R, K), sums(SWEEP_BLOCKS, R)
        products = 2 * M * whole * (K + 2 * N)
        steps += [listed("sm90_sweep", [x, G, Z, *ups], [dZ, dU, dD, z_sums], products)]
    else:
        P = ceil(M / (64 * min(4, 128 // whole)))
        dz, z_sums = sums(parts(ceil(N / 64), P), M, R), sums(min(ceil(M / 32), 2 * BLOCKS), R)
        dU, dD = sums(P, N, R), sums(parts(ceil(M / 64), ceil(K / 64)), R, K)
        steps += [listed("grad_z", [G, Z, *ups], [dU, dz], 2 * M * N * whole * 2)]
        steps += [listed("finish dZ", [dz], [dZ, z_sums])]
    steps += [listed("mm", [dZ, D], [dx], 2 * M * K * R), listed("addmm_", [dx, G, W0], [dx], 2 * M * K * N)]
    if not sweep:
        steps += [listed("grad_w", [x, dZ], [dD], 2 * M * K * whole)]
    T, dB = sums(r_b, K), sums(parts(ceil(K / 64), ceil(N / 64)), N, r_b)
    steps += [listed("reduce", [dU, dD, z_sums], [new(r_a, K), new(N, R), T])]
    if r_b:
        steps += [listed("through_weight", [W0, T], [dB], 2 * N * K * whole)]
        steps += [listed("finish dB_down", [dB, z_sums, b0], [new(r_b, N)])]
    return [step for step in steps if step is not None]

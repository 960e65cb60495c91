"""Bytes and operations of a kernel: what `benchmarks.roofline` predicts its time from."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hydra_kernels.kernels.launch import Launch


class Kernel(NamedTuple):
    """One launch: the tensors it reads, each with the number of passes, and those it writes."""

    name: str
    reads: tuple[tuple[Tensor, int], ...]
    writes: tuple[Tensor, ...]
    operations: int

    @property
    def bytes(self) -> int:
        return sum(size(t) * passes for t, passes in self.reads) + sum(map(size, self.writes))


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


# What each kernel writes, among its arguments; every other tensor is read.
WRITTEN = {
    "compose": ("D_ptr", "rest_ptr", "stack_ptr", "d_ptr", "U_ptr", "u_ptr"),
    "effective": ("D_ptr", "d_ptr", "b_ptr", "out_ptr"),
    "rebuild": ("out_ptr",),
    "one_pass": ("h", "Z_ptr"),
    "down": ("Z_ptr",),
    "grad_z": ("dZ_ptr", "g_ptr", "z_sums_ptr", "scales_ptr"),
    "sum_rows": ("out_ptr", "v_sums_ptr"),
    "gemm forward": ("out",),
    "gemm dx": ("out",),
    "reduce": (
        *("dA_down_ptr", "dA_up_ptr", "dB_up_ptr", "dA_down_bias_ptr", "dA_up_bias_ptr", "dB_down_bias_ptr"),
        *("dB_up_bias_ptr", "dscale_a_ptr", "dscale_b_ptr", "dbias_ptr", "T_ptr", "z_ptr", "ended_ptr"),
    ),
    # The sums are read again too, from L2.
    "through_weight": ("partials_ptr", "ended_ptr", "dB_down_ptr"),
}
# The large operand, read again for each block of ranks.
PASSED = {"down": "x_ptr", "grad_z": "G_ptr", "sum_rows": "x_ptr", "through_weight": "w_ptr"}


def of_launch(launch: Launch) -> Kernel:
    """Bytes and operations of one of our launches, from its own arguments and grid."""
    a, name = launch.arguments, launch.kernel.__name__.removesuffix("_kernel")
    if name == "gemm":
        name = "gemm forward" if a["FORWARD"] else "gemm dx"
    passes = launch.grid[-1] if name in PASSED else 1
    tensors = {key: v.base if isinstance(v, TensorDescriptor) else v for key, v in a.items()}
    tensors = {key: v for key, v in tensors.items() if isinstance(v, Tensor)}
    reads = [(t, passes if key == PASSED.get(name) else 1) for key, t in tensors.items() if key not in WRITTEN[name]]
    writes = [t for key, t in tensors.items() if key in WRITTEN[name]]
    return Kernel(name, tuple(reads), tuple(writes), _launch_operations(name, launch, passes))


def _launch_operations(name: str, launch: Launch, passes: int) -> int:
    a = launch.arguments
    R = a.get("BLOCK_R", 0)
    if name.startswith("gemm"):
        inner = triton.cdiv(a["K"], a["BLOCK_K"]) * a["BLOCK_K"]
        tiles = triton.cdiv(a["M"], a["BLOCK_M"]) * triton.cdiv(a["N"], a["BLOCK_N"])
        return tiles * 2 * a["BLOCK_M"] * a["BLOCK_N"] * (inner + R)
    if name in ("effective", "rebuild"):
        ranks_a, ranks_b = a["BLOCK_A"] * (a["R_A"] > 0), a["BLOCK_B"] * (a["R_B"] > 0)
        of_C = launch.grid[1] * ranks_b if name == "effective" else 0  # each range of rows sums all of C
        parts = 1 if a["out_ptr"].dtype == torch.float32 else 2
        return 2 * a["N"] * a["K"] * (of_C + parts * (ranks_a + ranks_b))
    if name == "one_pass":
        inner = triton.cdiv(a["K"], a["BLOCK_K"]) * a["BLOCK_K"]
        tiles = triton.cdiv(a["M"], a["BLOCK_M"]) * triton.cdiv(a["N"], a["BLOCK_N"])
        # Z's columns in every tile: of x stack^T, and under input dropout of x' D^T.
        columns = a["HALVES"] * R * a["SEQUENTIAL"] + R * (a["D"] is not None)
        return tiles * 2 * a["BLOCK_M"] * (inner * (a["BLOCK_N"] + columns) + a["BLOCK_N"] * R)
    if name == "down":
        return 2 * a["M"] * a["K"] * R * passes * (1 + (a["rest_ptr"] is not None))
    if name == "grad_z":
        return 2 * a["M"] * a["N"] * R * passes * (a["dZ_ptr"] is not None)
    if name == "sum_rows":
        return 2 * a["M"] * a["K"] * R * passes
    # T in two parts.
    return 2 * a["N"] * a["K"] * R * passes * 2 if name == "through_weight" else 0

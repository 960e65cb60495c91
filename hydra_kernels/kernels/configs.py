"""Every tile of every kernel: typed data by architecture, and why each number is what it is.

`of` picks by compute capability; a GPU that is not listed gets the smallest shared memory and plain loads, which run
on every one. No number here was measured on a GPU yet: they follow from the limits in the comments and from the compile
report (`python -m benchmarks.compile_report`: no spills, shared memory within the limit).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

MAX_RANK_BLOCK = 64  # columns of R that a program holds: registers for an accumulator of 64 columns beside the GEMM's


def rank_block(R: int) -> int:
    """R padded to a power of two that matrix instructions take, at most MAX_RANK_BLOCK."""
    return min(MAX_RANK_BLOCK, max(16, triton.next_power_of_2(R)))


class Gemm(NamedTuple):
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8  # blocks of rows that share columns of W: 8 x 8 tiles of 16 bit fit every L2
    descriptors: bool = False  # load through the tensor memory accelerator where operands are aligned


class Skinny(NamedTuple):
    BLOCK_ROWS: int
    BLOCK_COLUMNS: int
    num_warps: int
    num_stages: int


class Reduce(NamedTuple):
    BLOCK_N: int  # columns of dB_down a program owns: few, so that N / BLOCK_N programs fill the GPU
    BLOCK_K: int
    BLOCK_E: int  # elements a program sums over BLOCK_P partials at a time
    BLOCK_P: int
    num_warps: int
    num_stages: int


class Architecture(NamedTuple):
    """The tiles of one architecture; ``*_16`` for float16 and bfloat16, ``*_32`` for float32."""

    name: str
    gemm_16: Gemm
    gemm_32: Gemm
    compose: Skinny  # rows N, columns K: narrow, since only K / BLOCK_COLUMNS programs share W0
    down: Skinny  # rows M, columns K
    grad_z: Skinny  # rows M, columns N: tall, since dU's partial sums cost 4 R / BLOCK_ROWS bytes for an element of G
    grad_z_few: Skinny  # the same below `programs` blocks of rows, where filling the GPU counts for more
    grad_w: Skinny  # rows M, columns K: lines of 128 bytes
    reduce: Reduce
    programs: int  # that keep memory busy, about the number of multiprocessors

    def gemm(self, dtype: torch.dtype) -> Gemm:
        return self.gemm_32 if dtype == torch.float32 else self.gemm_16

    def grad_z_for(self, M: int) -> Skinny:
        return self.grad_z if M >= self.programs * self.grad_z.BLOCK_ROWS // 2 else self.grad_z_few

    def splits(self, M: int, K: int) -> int:
        """Into how many ranges of rows grad_w divides M: few partial sums, yet `programs` programs."""
        columns = triton.cdiv(K, self.grad_w.BLOCK_COLUMNS)
        return max(1, min(triton.cdiv(self.programs, columns), triton.cdiv(M, self.grad_w.BLOCK_ROWS)))


_SKINNY = {
    "compose": Skinny(128, 32, 4, 3),
    "down": Skinny(64, 64, 4, 4),
    "grad_z": Skinny(128, 64, 4, 3),
    "grad_z_few": Skinny(32, 64, 4, 4),
    "grad_w": Skinny(128, 64, 4, 3),
    "reduce": Reduce(32, 64, 256, 16, 4, 3),
}

# 164 KiB of shared memory a multiprocessor and 108 of them.
SM80 = Architecture(
    "sm_80", gemm_16=Gemm(128, 128, 32, 8, 4), gemm_32=Gemm(64, 64, 32, 4, 3), **_SKINNY, programs=108
)
# 100 KiB of shared memory: one stage less.
SM86 = SM80._replace(name="sm_86", gemm_16=Gemm(128, 128, 32, 8, 3), programs=128)
# wgmma wants two warpgroups on 128 x 256, loads through the tensor memory accelerator; 227 KiB of shared memory.
SM90 = SM80._replace(
    name="sm_90",
    gemm_16=Gemm(128, 256, 64, 8, 3, descriptors=True),
    gemm_32=Gemm(64, 64, 32, 4, 3, descriptors=True),
    programs=132,
)
# sm_120 has the shared memory of sm_86 and no wgmma; one set for both keeps to it.
SM100 = SM86._replace(
    name="sm_100",
    gemm_16=Gemm(128, 128, 32, 8, 3, descriptors=True),
    gemm_32=Gemm(64, 64, 32, 4, 3, descriptors=True),
    programs=148,
)
# Tiles so small that a test's shapes have several in each direction, and a remainder.
INTERPRETER = Architecture(
    "interpreter",
    gemm_16=Gemm(32, 32, 16, 1, 1, GROUP_M=2, descriptors=True),
    gemm_32=Gemm(32, 32, 16, 1, 1, GROUP_M=2, descriptors=True),
    compose=Skinny(32, 32, 1, 1),
    down=Skinny(32, 32, 1, 1),
    grad_z=Skinny(32, 32, 1, 1),
    grad_z_few=Skinny(16, 32, 1, 1),
    grad_w=Skinny(16, 32, 1, 1),
    reduce=Reduce(16, 32, 128, 4, 1, 1),
    programs=4,
)

BY_CAPABILITY = {(8, 0): SM80, (8, 6): SM86, (8, 9): SM86, (9, 0): SM90, (10, 0): SM100, (12, 0): SM100}


def of(capability: tuple[int, int] | None) -> Architecture:
    """The tiles for a compute capability; None is the interpreter."""
    return INTERPRETER if capability is None else BY_CAPABILITY.get(capability, SM86)

"""Input dropout where a kernel reads x, and where it writes what dx gets of the parallel branch.

`backend.philox` defines the mask, a function of (seed, m, k), and makes the same bits in plain torch. It is given as a
seed, and then never stored, or as a mask [M, K] of booleans or of x's dtype. 1/(1-p) is no part of `dropped`: kernels
have it in fp32, after a product. Under a mask that is scaled already it is 1.

`dropped_product` is a pass of its own, for a dx of cuBLAS's.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import Skinny, cdiv, rank_block
from .language import begin, dot, rounded, store
from .launch import Launch


class InputDropout(NamedTuple):
    """The arguments of a kernel's input dropout; `NONE` where it has none."""

    r_dropped: int  # the ranks, from the first on, that have it: r_a
    seed_ptr: Tensor | None  # [] int64
    input_mask_ptr: Tensor | None  # [M, K] contiguous: bytes, or of x's dtype
    threshold: int  # words below it drop their element
    input_scale: float  # 1/(1-p)


NONE = InputDropout(0, None, None, 0, 1.0)


@triton.jit
def kept(seed_ptr, threshold, offs_m, k, BLOCK_K: tl.constexpr):
    """Whether the elements of rows offs_m (int64) and columns k to k + BLOCK_K stay; 4 divides k and BLOCK_K."""
    counters = k // 4 + tl.arange(0, BLOCK_K // 4).to(tl.int64)
    words = tl.randint4x(tl.load(seed_ptr), (offs_m << 32)[:, None] + counters[None, :])
    # As 64 bits: the words have no sign, and where p is almost 1 no word reaches the threshold.
    k0 = (words[0].to(tl.uint32).to(tl.int64) >= threshold).to(tl.int8)
    k1 = (words[1].to(tl.uint32).to(tl.int64) >= threshold).to(tl.int8)
    k2 = (words[2].to(tl.uint32).to(tl.int64) >= threshold).to(tl.int8)
    k3 = (words[3].to(tl.uint32).to(tl.int64) >= threshold).to(tl.int8)
    return tl.interleave(tl.interleave(k0, k2), tl.interleave(k1, k3)) != 0


@triton.jit
def dropped(v, seed_ptr, threshold, input_mask_ptr, offs_m, k, mask_m, K, BLOCK_K: tl.constexpr):
    """A tile v of rows offs_m and columns k to k + BLOCK_K under the mask of input dropout, without 1/(1-p)."""
    if seed_ptr is not None:
        return tl.where(kept(seed_ptr, threshold, offs_m, k, BLOCK_K), v, tl.zeros_like(v))
    else:
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = mask_m[:, None] & (offs_k < K)[None, :]
        mask = tl.load(input_mask_ptr + offs_m[:, None] * K + offs_k[None, :], mask=inside, other=0)
        return rounded(v.to(tl.float32) * mask.to(tl.float32), v.dtype)


@triton.jit(do_not_specialize=["M", "threshold"])
def dropped_product_kernel(
    dZ_ptr,  # [M, R] contiguous
    D_ptr,  # [R, K] contiguous
    out_ptr,  # [M, K] contiguous, written
    M, K, R,
    r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,
    SEQUENTIAL: tl.constexpr,  # whether r_dropped < R
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K
    offs_k = k + tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < M, offs_k < K
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for r in range(0, r_dropped, BLOCK_R):
        acc = add_product(acc, dZ_ptr, D_ptr, offs_m, offs_k, r, r_dropped, mask_m, mask_k, K, R, PRECISION, BLOCK_R)
    acc = dropped(acc, seed_ptr, threshold, input_mask_ptr, offs_m, k, mask_m, K, BLOCK_K) * input_scale
    if SEQUENTIAL:
        for r in range(r_dropped, R, BLOCK_R):
            acc = add_product(acc, dZ_ptr, D_ptr, offs_m, offs_k, r, R, mask_m, mask_k, K, R, PRECISION, BLOCK_R)
    store(out_ptr + offs_m[:, None] * K + offs_k[None, :], acc, mask_m[:, None] & mask_k[None, :])


@triton.jit
def add_product(
    acc, dZ_ptr, D_ptr, offs_m, offs_k, first, last, mask_m, mask_k, K, R,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + dZ D over the ranks from first on, at most BLOCK_R, and below last."""
    offs_r = first + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_r = offs_r < last
    dZ = tl.load(dZ_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
    D = tl.load(D_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0)
    return dot(dZ, D, acc, PRECISION)


def dropped_product(dZ: Tensor, D: Tensor, out: Tensor, config: Skinny, precision: str, drop: InputDropout) -> Launch:
    """out [M, K] = input_mask * (dZ_a A_down) / (1-p) + dZ_b C for dZ [M, R] and D [R, K]."""
    (M, R), K = dZ.shape, D.shape[1]
    BLOCK_M, BLOCK_K = config.BLOCK_ROWS, config.BLOCK_COLUMNS
    return Launch.of(
        dropped_product_kernel, (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)), config,
        dZ_ptr=dZ, D_ptr=D, out_ptr=out, M=M, K=K, R=R,
        **drop._asdict(), SEQUENTIAL=drop.r_dropped < R,
        PRECISION=precision, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=rank_block(R),
    )  # fmt: skip

"""The forward from one read of x: h = x W0^T + Z U^T + b, and Z = mask * (x D^T + x [0; rest]^T + d) in the same loop.

x [M, K], W0 [N, K], D [R, K] = [A_down; C], rest [r_b, K] what rounding took from C, U [N, R], b [N] and d [R] in fp32.
So A_down x and B_down (W0 x + b0) cost no pass over x of their own. But every tile of h sums Z of its rows anew: an
eighth more products at R = 16 and 256 columns a tile. So it may pay where h has few columns; none of it was measured.

D and rest are one operand, so that a step of the loop has one product more and not two. Two would cost twice as much:
matrix instructions of 16 columns take as long as those of 32, since they wait for x's tile. `compose` writes

    stack = [D; 0; rest]    [BLOCK_R + R, K], rest from row BLOCK_R + r_a on

and the columns r and BLOCK_R + r of x stack^T add up to column r of Z. Where products do not round C, and without a
sequential branch, stack is D.

Under input dropout (`philox`) the parallel branch reads another x: two products then, x' D^T and x stack^T.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import Gemm, cdiv, rank_block
from .gemm import offsets, operand, place, pointers
from .language import begin, dot, rounded
from .launch import Launch
from .philox import NONE, InputDropout, dropped


@triton.jit
def ranks_of(stack, offs_k, offs_s, rows, k, K, DESCRIPTORS: tl.constexpr):
    """Columns k to k + BLOCK_K of a stack [rows, K], transposed; zero past its rows."""
    if DESCRIPTORS:
        return stack.load([0, k]).T
    else:
        ptrs = stack + offs_s[None, :].to(tl.int64) * K + (k + offs_k)[:, None]
        return tl.load(ptrs, mask=(k + offs_k < K)[:, None] & (offs_s < rows)[None, :], other=0.0)


@triton.jit
def compute_tile(
    tile, x, w, stack, D, bias_ptr, d_ptr, mask_ptr, mask_scale, U_ptr, Z_ptr, h, M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn,
    r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,
    SEQUENTIAL: tl.constexpr, HALVES: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of h and, by the first column's tiles, the rows of Z."""
    pid_m, pid_n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first, rows, offs_m, offs_n, offs_k = offsets(pid_m, pid_n, WIDE, BLOCK_M, BLOCK_N, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    offs_s = tl.arange(0, HALVES * BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    if not DESCRIPTORS:
        block_k = tl.full((1, 1), BLOCK_K, tl.int64)
        x_ptrs, w_ptrs = pointers(x, w, offs_m, offs_n, offs_k, stride_xm, stride_xk, stride_wk, stride_wn)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = tl.zeros((BLOCK_M, HALVES * BLOCK_R), tl.float32)
    z_dropped = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        if DESCRIPTORS:
            x_tile = x.load([pid_m * BLOCK_M, k])
            w_tile = w.load([pid_n * BLOCK_N, k]).T
        else:
            mask_k = k + offs_k < K
            x_tile = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            x_ptrs += block_k * stride_xk
            w_ptrs += block_k * stride_wk
        acc = dot(x_tile, w_tile, acc, PRECISION)
        if SEQUENTIAL:
            stack_rows = (HALVES - 1) * BLOCK_R + R
            z = dot(x_tile, ranks_of(stack, offs_k, offs_s, stack_rows, k, K, DESCRIPTORS), z, PRECISION)
        if seed_ptr is not None or input_mask_ptr is not None:
            x_dropped = dropped(x_tile, seed_ptr, threshold, input_mask_ptr, offs_m, k, mask_m, K, BLOCK_K)
            z_dropped = dot(x_dropped, ranks_of(D, offs_k, offs_r, R, k, K, DESCRIPTORS), z_dropped, PRECISION)

    if HALVES == 2:
        z = tl.sum(tl.reshape(z, (BLOCK_M, 2, BLOCK_R)), 1)
    if seed_ptr is not None or input_mask_ptr is not None:
        z = tl.where((offs_r < r_dropped)[None, :], z_dropped * input_scale, z)
    if d_ptr is not None:
        z += tl.load(d_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
    inside, block = mask_m[:, None] & mask_r[None, :], rows[:, None] * R + offs_r[None, :]
    if mask_ptr is not None:
        z *= tl.load(mask_ptr + first * R + block, mask=inside, other=0.0).to(tl.float32) * mask_scale
    # What the padding holds must not spread: an infinite x times its zeros is NaN.
    z = rounded(tl.where(mask_r[None, :], z, 0.0), U_ptr.dtype.element_ty)
    if Z_ptr is not None:
        tl.store(Z_ptr + first * R + block, z, mask=inside & (pid_n == 0))

    U_ptrs = U_ptr + offs_n[None, :] * R + offs_r[:, None]
    acc = dot(z, tl.load(U_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0), acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    acc = rounded(acc, U_ptr.dtype.element_ty)
    if DESCRIPTORS:
        # In two halves, which take less shared memory: with a whole tile 32 ranks would cost a stage of the loop.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        h.store([pid_m * BLOCK_M, pid_n * BLOCK_N], left)
        h.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], right)
    else:
        h_ptrs = h + first * N + (rows[:, None] * N + offs_n[None, :])
        tl.store(h_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def one_pass_kernel(
    x,  # [M, K]: a pointer, or a tensor descriptor
    w,  # W0 [N, K], likewise
    stack,  # [rows, K], likewise
    D,  # [R, K], likewise; read under input dropout alone
    bias_ptr,  # [N] fp32, or None
    d_ptr,  # [R] fp32, or None
    mask_ptr,  # [M, R], or None
    mask_scale,
    U_ptr,  # [N, R]
    Z_ptr,  # [M, R], written, or None
    h,  # [M, N] contiguous, written: a pointer, or a tensor descriptor
    M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn,
    r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,  # of input dropout
    SEQUENTIAL: tl.constexpr,  # whether r_dropped < R
    HALVES: tl.constexpr,  # of the stack: 1 or 2
    DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # whether the rows of a tile of h span 2^31 elements
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    if PERSISTENT:
        for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
            compute_tile(
                tile, x, w, stack, D, bias_ptr, d_ptr, mask_ptr, mask_scale, U_ptr, Z_ptr, h, M, N, K, R,
                stride_xm, stride_xk, stride_wk, stride_wn, r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,
                SEQUENTIAL, HALVES, DESCRIPTORS, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
            )  # fmt: skip
    else:
        compute_tile(
            tl.program_id(0), x, w, stack, D, bias_ptr, d_ptr, mask_ptr, mask_scale, U_ptr, Z_ptr, h, M, N, K, R,
            stride_xm, stride_xk, stride_wk, stride_wn, r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,
            SEQUENTIAL, HALVES, DESCRIPTORS, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
        )  # fmt: skip


def rows_of_stack(R: int) -> int:
    return rank_block(R) + R


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, D: Tensor, stack: Tensor, d: Tensor | None,
    mask: Tensor | None, mask_scale: float, U: Tensor, Z: Tensor | None, h: Tensor,
    config: Gemm, programs: int, precision: str, drop: InputDropout = NONE,
) -> Launch:  # fmt: skip
    """h [M, N], and Z [M, R] where it is wanted; D and stack are one where C needs no rest."""
    (M, K), N, R = x.shape, weight.shape[0], len(D)
    BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, rank_block(R)
    halves, tiles = 1 if stack is D else 2, cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    drops = drop.seed_ptr is not None or drop.input_mask_ptr is not None
    return Launch.of(
        one_pass_kernel, (min(tiles, programs) if config.persistent else tiles,), config,
        x=operand(x, (BLOCK_M, BLOCK_K), config), w=operand(weight, (BLOCK_N, BLOCK_K), config),
        stack=operand(stack, (halves * BLOCK_R, BLOCK_K), config),
        D=operand(D, (BLOCK_R, BLOCK_K), config) if drops else None,
        bias_ptr=bias, d_ptr=d, mask_ptr=mask, mask_scale=mask_scale, U_ptr=U, Z_ptr=Z,
        h=operand(h, (BLOCK_M, BLOCK_N // 2), config),
        M=M, N=N, K=K, R=R,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wk=weight.stride(1), stride_wn=weight.stride(0),
        **drop._asdict(), SEQUENTIAL=drop.r_dropped < R, HALVES=halves,
        DESCRIPTORS=config.descriptors, PERSISTENT=config.persistent, PRECISION=precision,
        WIDE=BLOCK_M * max(N, R) >= 2**31,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R, GROUP_M=config.GROUP_M,
    )  # fmt: skip

"""The passes with R columns around the two frozen products: each reads one large matrix once and writes little.

r_a, r_b are the ranks, R = r_a + r_b. offs_r counts the columns of both branches: [0, r_a) are the parallel branch's.

down, one pass over x:          Z = mask * (x D^T + x [0; rest]^T + d)
grad_z, one pass over G:        dZ = mask * (G [A_up, B_up]) s    and partial sums over rows: sum_m G, sum_m dZ, and
                                <G [A_up, B_up], Z> + <G, u of the branch> for the gradients of the scales
sum_rows, one pass over x [M, K]:   y^T x in partial sums over rows; so C = B_down W0 (and B_down b0), dU^T = Z^T G,
                                dD = dZ^T x

Under input dropout (`philox`) the parallel branch's columns of Z and rows of dD are of x' = input_mask * x / (1-p), and
down and sum_rows then multiply each tile of x twice, and of each product take the ranks that are meant.

Where R exceeds BLOCK_R, the grid's last axis runs over blocks of ranks, and the pass is repeated for each block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Skinny, cdiv, rank_block
from .language import begin, dot, in_dtype, rounded, scale_of_rank, store
from .launch import Launch, Scales
from .philox import NONE, InputDropout, dropped


@triton.jit(do_not_specialize=["M", "threshold"])
def down_kernel(
    x_ptr,  # [M, K] with strides
    D_ptr,  # [R, K]
    rest_ptr,  # [R - r_a, K], or None
    d_ptr,  # [R] fp32, or None
    mask_ptr,  # [M, R], or None
    mask_scale,
    Z_ptr,  # [M, R], written
    M, K, R, r_a,
    stride_xm, stride_xk,
    r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,  # of input dropout
    SEQUENTIAL: tl.constexpr,  # whether r_dropped < R
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    first, rows = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    offs_m, offs_r = first + rows, tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    z_dropped = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        D_ptrs = D_ptr + offs_r[None, :].to(tl.int64) * K + offs_k[:, None]
        D = tl.load(D_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if seed_ptr is not None or input_mask_ptr is not None:
            x_dropped = dropped(x, seed_ptr, threshold, input_mask_ptr, offs_m, k, mask_m, K, BLOCK_K)
            z_dropped = dot(x_dropped, D, z_dropped, PRECISION)
        if SEQUENTIAL:
            z = dot(x, D, z, PRECISION)
        if rest_ptr is not None:
            rest_ptrs = rest_ptr + (offs_r - r_a)[None, :].to(tl.int64) * K + offs_k[:, None]
            mask_b = mask_r & (offs_r >= r_a)
            z = dot(x, tl.load(rest_ptrs, mask=mask_k[:, None] & mask_b[None, :], other=0.0), z, PRECISION)
    inside, tile = mask_m[:, None] & mask_r[None, :], rows[:, None] * R + offs_r[None, :]
    if seed_ptr is not None or input_mask_ptr is not None:
        z = tl.where((offs_r < r_dropped)[None, :], z_dropped * input_scale, z)
    if d_ptr is not None:
        z += tl.load(d_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
    if mask_ptr is not None:
        z *= tl.load(mask_ptr + first * R + tile, mask=inside, other=0.0).to(tl.float32) * mask_scale
    store(Z_ptr + first * R + tile, z, inside)


def down(
    x: Tensor, D: Tensor, rest: Tensor | None, d: Tensor | None, mask: Tensor | None, mask_scale: float, Z: Tensor,
    config: Skinny, precision: str, drop: InputDropout = NONE,
) -> Launch:  # fmt: skip
    """Z [M, R] for x [M, K] and what `compose` wrote."""
    (M, K), R = x.shape, D.shape[0]
    BLOCK_M, BLOCK_R = config.BLOCK_ROWS, rank_block(R)
    return Launch.of(
        down_kernel, (cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)), config,
        x_ptr=x, D_ptr=D, rest_ptr=rest, d_ptr=d, mask_ptr=mask, mask_scale=mask_scale, Z_ptr=Z,
        M=M, K=K, R=R, r_a=R if rest is None else R - rest.shape[0],
        stride_xm=x.stride(0), stride_xk=x.stride(1), **drop._asdict(), SEQUENTIAL=drop.r_dropped < R,
        PRECISION=precision, BLOCK_M=BLOCK_M, BLOCK_K=config.BLOCK_COLUMNS, BLOCK_R=BLOCK_R,
    )  # fmt: skip


@triton.jit
def pointers_to_up(
    A_up_ptr, B_up_ptr, offs_n, offs_r, N, R: tl.constexpr, R_A: tl.constexpr, BY_RANK: tl.constexpr
):  # fmt: skip
    """To rows offs_n and ranks offs_r of [A_up, B_up]."""
    if BY_RANK:
        return A_up_ptr + offs_r.to(tl.int64) * N + offs_n
    elif R_A == R:
        return A_up_ptr + offs_n * R_A + offs_r
    elif R_A == 0:
        return B_up_ptr + offs_n * R + offs_r
    else:
        return tl.where(
            offs_r < R_A, A_up_ptr + offs_n * R_A + offs_r, B_up_ptr + offs_n * (R - R_A) + (offs_r - R_A)
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def grad_z_kernel(
    G_ptr,  # [M, N] with strides
    A_up_ptr, B_up_ptr,  # [N, r_a] and [N, r_b], None where absent; with BY_RANK [A_up, B_up]^T [R, N] and None
    A_up_bias_ptr, B_up_bias_ptr,  # each where the gradient of its scale is wanted, else None
    scale_a, scale_b,
    Z_ptr,  # [M, R], or None
    mask_ptr,  # [M, R], or None
    mask_scale,
    dZ_ptr,  # [M, R], written, or None
    g_ptr,  # [P, N] fp32: sum_m G, written, or None; P = blocks of rows
    z_sums_ptr,  # [P, R] fp32: sum_m dZ, written, or None
    scales_ptr,  # [P, R + 2] fp32, written, or None: <G [A_up, B_up], Z> by rank, <G, a_u> and <G, b_u>
    M, N,
    stride_gm, stride_gn,
    R: tl.constexpr, R_A: tl.constexpr,  # R and r_a: the rows of A_up and B_up are loaded as wide as they are
    BY_RANK: tl.constexpr,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr,  # whether scale_a, scale_b are pointers
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    pid, pid_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, rows = pid * BLOCK_M, tl.arange(0, BLOCK_M)
    offs_m, offs_r = first + rows, pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    inside, tile = mask_m[:, None] & mask_r[None, :], rows[:, None] * R + offs_r[None, :]
    dtype = G_ptr.dtype.element_ty
    dz = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    ds_a = tl.zeros((BLOCK_N,), tl.float32)
    ds_b = tl.zeros((BLOCK_N,), tl.float32)
    if Z_ptr is not None:
        z = tl.load(Z_ptr + first * R + tile, mask=inside, other=0.0)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = offs_n < N
        G_ptrs = G_ptr + offs_m[:, None] * stride_gm + offs_n[None, :] * stride_gn
        G = tl.load(G_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if dZ_ptr is not None or scales_ptr is not None:
            up_ptrs = pointers_to_up(A_up_ptr, B_up_ptr, offs_n[:, None], offs_r[None, :], N, R, R_A, BY_RANK)
            up = in_dtype(tl.load(up_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0), dtype)
            dz = dot(G, up, dz, PRECISION)
        if g_ptr is not None or A_up_bias_ptr is not None or B_up_bias_ptr is not None:
            g, mask_g = tl.sum(G.to(tl.float32), 0), mask_n & (pid_r == 0)
            if g_ptr is not None:
                tl.store(g_ptr + pid * N + offs_n, g, mask=mask_g)
            if A_up_bias_ptr is not None:
                ds_a += g * tl.load(A_up_bias_ptr + offs_n, mask=mask_g, other=0.0).to(tl.float32)
            if B_up_bias_ptr is not None:
                ds_b += g * tl.load(B_up_bias_ptr + offs_n, mask=mask_g, other=0.0).to(tl.float32)

    if scales_ptr is not None:
        # One column for each rank. Summed over the ranks here, it does not compile for sm_100 (Triton 3.6).
        tl.store(scales_ptr + pid * (R + 2) + offs_r, tl.sum(dz * z.to(tl.float32), 0), mask=mask_r)
        if pid_r == 0:
            tl.store(scales_ptr + pid * (R + 2) + R, tl.sum(ds_a, 0))
            tl.store(scales_ptr + pid * (R + 2) + R + 1, tl.sum(ds_b, 0))
    if dZ_ptr is not None:
        dz *= scale_of_rank(scale_a, scale_b, offs_r, R_A, LOADED_A, LOADED_B)[None, :]
        if mask_ptr is not None:
            dz *= tl.load(mask_ptr + first * R + tile, mask=inside, other=0.0).to(tl.float32) * mask_scale
        dz_rounded = rounded(dz, dtype)
        tl.store(dZ_ptr + first * R + tile, dz_rounded, mask=inside)
        if z_sums_ptr is not None:
            # Sums the rounded dZ, as dZ^T x does: where b0 cancels W0 x, the two sums must cancel too.
            tl.store(z_sums_ptr + pid * R + offs_r, tl.sum(dz_rounded.to(tl.float32), 0), mask=mask_r)


def grad_z(
    G: Tensor, A_up: Tensor | None, B_up: Tensor | None, up_biases: tuple[Tensor | None, Tensor | None], scales: Scales,
    Z: Tensor | None, mask: Tensor | None, mask_scale: float,
    dZ: Tensor | None, g: Tensor | None, z_sums: Tensor | None, scale_sums: Tensor | None,
    config: Skinny, precision: str,
) -> Launch:  # fmt: skip
    """Writes those of dZ [M, R] and the kernel's partial sums that are not None; A_up is [N, r_a], B_up [N, r_b]."""
    (M, N), (s_a, s_b), ups = G.shape, scales, [up for up in (A_up, B_up) if up is not None]
    R, r_a = sum(up.shape[1] for up in ups), 0 if A_up is None else A_up.shape[1]
    # Rows that asynchronous copies take in small pieces, or not at all, are copied once instead.
    by_rank = any(up.shape[1] * up.element_size() % 8 or up.data_ptr() % 16 for up in ups)
    if by_rank:
        A_up, B_up = torch.cat([up.t().to(G.dtype) for up in ups]).contiguous(), None
    BLOCK_M, BLOCK_R = config.BLOCK_ROWS, rank_block(R)
    return Launch.of(
        grad_z_kernel, (cdiv(M, BLOCK_M), cdiv(R, BLOCK_R)), config,
        G_ptr=G, A_up_ptr=A_up, B_up_ptr=B_up, A_up_bias_ptr=up_biases[0], B_up_bias_ptr=up_biases[1],
        scale_a=s_a, scale_b=s_b, Z_ptr=Z, mask_ptr=mask, mask_scale=mask_scale,
        dZ_ptr=dZ, g_ptr=g, z_sums_ptr=z_sums, scales_ptr=scale_sums,
        M=M, N=N, stride_gm=G.stride(0), stride_gn=G.stride(1), R=R, R_A=r_a, BY_RANK=by_rank,
        LOADED_A=isinstance(s_a, Tensor), LOADED_B=isinstance(s_b, Tensor),
        PRECISION=precision, BLOCK_M=BLOCK_M, BLOCK_N=config.BLOCK_COLUMNS, BLOCK_R=BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "rows_of_split", "threshold"])
def sum_rows_kernel(
    x_ptr,  # [M, K] with strides
    y_ptr,  # [M, R] with strides
    v_ptr,  # [M], or None
    out_ptr,  # [S, R, K] fp32: y^T x, written; S = splits of the rows
    v_sums_ptr,  # [S, R] fp32: v^T y, written, or None
    M, K, R,
    rows_of_split,  # whole blocks
    stride_xm, stride_xk, stride_ym, stride_yr,
    r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,  # of input dropout on x, for columns of y
    SEQUENTIAL: tl.constexpr,  # whether r_dropped < R
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    split = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_K
    offs_k = first + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    out = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    out_dropped = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    v_sums = tl.zeros((BLOCK_R,), tl.float32)
    for m in range(0, rows_of_split, BLOCK_M):
        offs_m = split * rows_of_split + m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_r[None, :] * stride_yr
        y = in_dtype(tl.load(y_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0), x_ptr.dtype.element_ty)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if seed_ptr is not None or input_mask_ptr is not None:
            x_dropped = dropped(x, seed_ptr, threshold, input_mask_ptr, offs_m, first, mask_m, K, BLOCK_K)
            out_dropped = dot(tl.trans(y), x_dropped, out_dropped, PRECISION)
        if SEQUENTIAL:
            out = dot(tl.trans(y), x, out, PRECISION)
        if v_ptr is not None:
            v = tl.load(v_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float32)
            v_sums += tl.sum(y.to(tl.float32) * v[:, None], 0)
    if seed_ptr is not None or input_mask_ptr is not None:
        out = tl.where((offs_r < r_dropped)[:, None], out_dropped * input_scale, out)
    out_ptrs = out_ptr + (split * R + offs_r)[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, out, mask=mask_r[:, None] & mask_k[None, :])
    if v_ptr is not None:
        tl.store(v_sums_ptr + split * R + offs_r, v_sums, mask=mask_r & (tl.program_id(0) == 0))


def sum_rows(
    x: Tensor, y: Tensor, out: Tensor, config: Skinny, precision: str,
    v: Tensor | None = None, v_sums: Tensor | None = None, drop: InputDropout = NONE,
) -> Launch:  # fmt: skip
    """The S partial sums out [S, R, K] of y^T x for x [M, K], y [M, R]; v_sums [S, R] those of v^T y for v [M]."""
    (M, K), (S, R, _) = x.shape, out.shape
    BLOCK_M, BLOCK_K, BLOCK_R = config.BLOCK_ROWS, config.BLOCK_COLUMNS, rank_block(R)
    return Launch.of(
        sum_rows_kernel, (cdiv(K, BLOCK_K), S, cdiv(R, BLOCK_R)), config,
        x_ptr=x, y_ptr=y, v_ptr=v, out_ptr=out, v_sums_ptr=v_sums,
        M=M, K=K, R=R, rows_of_split=cdiv(cdiv(M, S), BLOCK_M) * BLOCK_M,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_ym=y.stride(0), stride_yr=y.stride(1),
        **drop._asdict(), SEQUENTIAL=drop.r_dropped < R,
        PRECISION=precision, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
    )  # fmt: skip

"""The passes with R columns around the two frozen products: what they read is read once, what they write is small.

r_a, r_b ranks, R = r_a + r_b; in the code offs_r numbers the columns of both branches, [0, r_a) the parallel one's.

compose, once a forward:        C = B_down W0    D = [A_down; C] in x's dtype    rest = C - its rows of D
                                d = [a_d, B_down b0 + b_d]    U = [s_a A_up, s_b B_up]    u = s_a a_u + s_b b_u
down (hybrid alone):            Z = mask * (x D^T + x [0; rest]^T + d)
grad_z, a pass over G:          dZ = mask * (G [A_up, B_up]) s    and partial sums over rows: dU = G^T Z, sum_m G,
                                sum_m dZ, <G [A_up, B_up], Z> + <G, u of the branch> for the gradients of the scales
grad_w, a pass over x:          partial sums over rows of dD = dZ^T x

Where R exceeds BLOCK_R, the grid's last axis runs over blocks of ranks and the pass is repeated for each.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .configs import Skinny, cdiv, rank_block
from .language import dot, leading, load_up, rounded, scalar, scale_of_rank, store
from .launch import Launch, scale_arguments


@triton.jit
def compose_columns(
    w_ptr, bias_ptr, A_down_ptr, B_down_ptr, A_down_bias_ptr, B_down_bias_ptr, D_ptr, rest_ptr, d_ptr,
    pid, offs_r, N, K, r_a, r_b, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """D and rest at one block of columns and the ranks offs_r; the first block writes d."""
    offs_k = pid.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k, mask_a = offs_k < K, offs_r < r_a
    mask_b = (offs_r >= r_a) & (offs_r < r_a + r_b)
    dtype = D_ptr.dtype.element_ty
    D = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    d = tl.zeros((BLOCK_R,), tl.float32)
    if B_down_ptr is not None:
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N).to(tl.int64)
            mask_n = offs_n < N
            down_ptrs = B_down_ptr + (offs_r - r_a)[:, None] * N + offs_n[None, :]
            down = tl.load(down_ptrs, mask=mask_b[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
            down = rounded(down, dtype)
            w_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
            D = dot(down, tl.load(w_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0), D, PRECISION)
            if bias_ptr is not None:
                b0 = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                d += tl.sum(down.to(tl.float32) * b0[None, :], 1)
        if rest_ptr is not None:
            hi = leading(D, dtype, PRECISION).to(tl.float32)
            rest_ptrs = rest_ptr + (offs_r - r_a)[:, None] * K + offs_k[None, :]
            store(rest_ptrs, D - hi, mask_b[:, None] & mask_k[None, :])
            D = hi
    if A_down_ptr is not None:
        A_ptrs = A_down_ptr + offs_r[:, None] * K + offs_k[None, :]
        D += tl.load(A_ptrs, mask=mask_a[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
    mask_r = offs_r < r_a + r_b
    store(D_ptr + offs_r[:, None] * K + offs_k[None, :], D, mask_r[:, None] & mask_k[None, :])
    if d_ptr is not None:
        if A_down_bias_ptr is not None:
            d += tl.load(A_down_bias_ptr + offs_r, mask=mask_a, other=0.0).to(tl.float32)
        if B_down_bias_ptr is not None:
            d += tl.load(B_down_bias_ptr + offs_r - r_a, mask=mask_b, other=0.0).to(tl.float32)
        tl.store(d_ptr + offs_r, d, mask=mask_r & (pid == 0))


@triton.jit
def compose_rows(
    bias_ptr, A_up_ptr, B_up_ptr, A_up_bias_ptr, B_up_bias_ptr, scale_a, scale_b, U_ptr, u_ptr,
    pid, pid_r, offs_r, N, r_a, r_b,
    WITH_BIAS: tl.constexpr, LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """U at one block of rows and the ranks offs_r, and u with the first ranks."""
    first = pid.to(tl.int64) * BLOCK_N
    rows, R = tl.arange(0, BLOCK_N), r_a + r_b
    offs_n = first + rows
    mask_n = offs_n < N
    U = load_up(A_up_ptr, B_up_ptr, first, N, offs_r, r_a, r_b, BLOCK_N)
    U *= scale_of_rank(scale_a, scale_b, offs_r, r_a, LOADED_A, LOADED_B)[None, :]
    store(U_ptr + first * R + (rows[:, None] * R + offs_r[None, :]), U, mask_n[:, None] & (offs_r < R)[None, :])
    if u_ptr is not None:
        u = tl.zeros((BLOCK_N,), tl.float32)
        if WITH_BIAS:
            u += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if A_up_bias_ptr is not None:
            u += scalar(scale_a, LOADED_A) * tl.load(A_up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if B_up_bias_ptr is not None:
            u += scalar(scale_b, LOADED_B) * tl.load(B_up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        store(u_ptr + offs_n, u, mask_n & (pid_r == 0))


@triton.jit
def compose_kernel(
    w_ptr,  # W0 [N, K] with strides
    bias_ptr,  # b0 [N], or None
    A_down_ptr,
    A_up_ptr,
    B_down_ptr,
    B_up_ptr,
    A_down_bias_ptr,
    A_up_bias_ptr,
    B_down_bias_ptr,
    B_up_bias_ptr,
    scale_a,
    scale_b,
    D_ptr,  # [R, K], written
    rest_ptr,  # [r_b, K], written, or None
    d_ptr,  # [R] fp32, written, or None
    U_ptr,  # [N, R], written
    u_ptr,  # [N], written, or None
    N,
    K,
    r_a,
    r_b,
    stride_wn,
    stride_wk,
    WITH_BIAS: tl.constexpr,  # whether u includes b0
    LOADED_A: tl.constexpr,  # whether scale_a is a pointer
    LOADED_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid, pid_r, blocks_k = tl.program_id(0), tl.program_id(1), tl.cdiv(K, BLOCK_K)
    offs_r = pid_r.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if pid < blocks_k:
        compose_columns(
            w_ptr, bias_ptr, A_down_ptr, B_down_ptr, A_down_bias_ptr, B_down_bias_ptr, D_ptr, rest_ptr, d_ptr,
            pid, offs_r, N, K, r_a, r_b, stride_wn, stride_wk, PRECISION, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        compose_rows(
            bias_ptr, A_up_ptr, B_up_ptr, A_up_bias_ptr, B_up_bias_ptr, scale_a, scale_b, U_ptr, u_ptr,
            pid - blocks_k, pid_r, offs_r, N, r_a, r_b, WITH_BIAS, LOADED_A, LOADED_B, BLOCK_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def down_kernel(
    x_ptr,  # [M, K] with strides
    D_ptr,
    rest_ptr,
    d_ptr,
    mask_ptr,  # [M, R], or None
    mask_scale,
    Z_ptr,  # [M, R], written
    M,
    K,
    R,
    r_a,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first, rows = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    offs_m, offs_r = first + rows, tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        mask_k = offs_k < K
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        D_ptrs = D_ptr + offs_r[None, :] * K + offs_k[:, None]
        z = dot(x, tl.load(D_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0), z, PRECISION)
        if rest_ptr is not None:
            rest_ptrs = rest_ptr + (offs_r - r_a)[None, :] * K + offs_k[:, None]
            mask_b = mask_r & (offs_r >= r_a)
            z = dot(x, tl.load(rest_ptrs, mask=mask_k[:, None] & mask_b[None, :], other=0.0), z, PRECISION)
    inside, tile = mask_m[:, None] & mask_r[None, :], rows[:, None] * R + offs_r[None, :]
    if d_ptr is not None:
        z += tl.load(d_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
    if mask_ptr is not None:
        z *= tl.load(mask_ptr + first * R + tile, mask=inside, other=0.0).to(tl.float32) * mask_scale
    store(Z_ptr + first * R + tile, z, inside)


@triton.jit(do_not_specialize=["M"])
def grad_z_kernel(
    G_ptr,  # [M, N] with strides
    A_up_ptr,
    B_up_ptr,
    A_up_bias_ptr,  # where the gradient of its scale is wanted
    B_up_bias_ptr,
    scale_a,
    scale_b,
    Z_ptr,  # [M, R], or None
    mask_ptr,  # [M, R], or None
    mask_scale,
    dZ_ptr,  # [M, R], written, or None
    dU_ptr,  # [P, N, R] fp32, written, or None; P = blocks of rows
    g_ptr,  # [P, N] fp32: sum_m G, written, or None
    z_sums_ptr,  # [P, R] fp32: sum_m dZ, written, or None
    scales_ptr,  # [P, R + 2] fp32, written, or None: <G [A_up, B_up], Z> by rank, <G, a_u> and <G, b_u>
    M,
    N,
    r_a,
    r_b,
    stride_gm,
    stride_gn,
    LOADED_A: tl.constexpr,  # whether scale_a is a pointer
    LOADED_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid, pid_r, R = tl.program_id(0).to(tl.int64), tl.program_id(1), r_a + r_b
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
            up = rounded(load_up(A_up_ptr, B_up_ptr, n, N, offs_r, r_a, r_b, BLOCK_N), dtype)
            dz = dot(G, up, dz, PRECISION)
        if dU_ptr is not None:
            dU = dot(tl.trans(G), z, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), PRECISION)
            columns = tl.arange(0, BLOCK_N)[:, None]
            dU_ptrs = dU_ptr + (pid * N + n) * R + (columns * R + offs_r[None, :])
            tl.store(dU_ptrs, dU, mask=mask_n[:, None] & mask_r[None, :])
        if g_ptr is not None or A_up_bias_ptr is not None or B_up_bias_ptr is not None:
            g, mask_g = tl.sum(G.to(tl.float32), 0), mask_n & (pid_r == 0)
            if g_ptr is not None:
                tl.store(g_ptr + pid * N + offs_n, g, mask=mask_g)
            if A_up_bias_ptr is not None:
                ds_a += g * tl.load(A_up_bias_ptr + offs_n, mask=mask_g, other=0.0).to(tl.float32)
            if B_up_bias_ptr is not None:
                ds_b += g * tl.load(B_up_bias_ptr + offs_n, mask=mask_g, other=0.0).to(tl.float32)

    if scales_ptr is not None:
        # A column a rank: summed over them here, compilation for sm_100 fails (Triton 3.6).
        tl.store(scales_ptr + pid * (R + 2) + offs_r, tl.sum(dz * z.to(tl.float32), 0), mask=mask_r)
        if pid_r == 0:
            tl.store(scales_ptr + pid * (R + 2) + R, tl.sum(ds_a, 0))
            tl.store(scales_ptr + pid * (R + 2) + R + 1, tl.sum(ds_b, 0))
    if dZ_ptr is not None:
        dz *= scale_of_rank(scale_a, scale_b, offs_r, r_a, LOADED_A, LOADED_B)[None, :]
        if mask_ptr is not None:
            dz *= tl.load(mask_ptr + first * R + tile, mask=inside, other=0.0).to(tl.float32) * mask_scale
        dz_rounded = rounded(dz, dtype)
        tl.store(dZ_ptr + first * R + tile, dz_rounded, mask=inside)
        if z_sums_ptr is not None:
            # Of the rounded dZ, as in dZ^T x: where b0 cancels W0 x the two sums must cancel too.
            tl.store(z_sums_ptr + pid * R + offs_r, tl.sum(dz_rounded.to(tl.float32), 0), mask=mask_r)


@triton.jit(do_not_specialize=["M", "rows_of_split"])
def grad_w_kernel(
    x_ptr,  # [M, K] with strides
    dZ_ptr,  # [M, R]
    dD_ptr,  # [S, R, K] fp32, written; S = splits of the rows
    M,
    K,
    R,
    rows_of_split,  # whole blocks
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    offs_k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k, mask_r = offs_k < K, offs_r < R
    dD = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(0, rows_of_split, BLOCK_M):
        first = split * rows_of_split + m
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        dZ_ptrs = dZ_ptr + first * R + (tl.arange(0, BLOCK_M)[:, None] * R + offs_r[None, :])
        dZ = tl.load(dZ_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        dD = dot(tl.trans(dZ), x, dD, PRECISION)
    dD_ptrs = dD_ptr + (split * R + offs_r)[:, None] * K + offs_k[None, :]
    tl.store(dD_ptrs, dD, mask=mask_r[:, None] & mask_k[None, :])


def compose(
    weight: Tensor,
    bias: Tensor | None,
    adapters: dict[str, Tensor | None],
    scales: tuple[float | Tensor, float | Tensor],
    D: Tensor,
    rest: Tensor | None,
    d: Tensor | None,
    U: Tensor,
    u: Tensor | None,
    with_bias: bool,
    config: Skinny,
    precision: str,
) -> Launch:
    """Writes D [R, K], rest [r_b, K], d [R], U [N, R] and u [N]; u includes b0 where with_bias is set."""
    (N, K), R = weight.shape, D.shape[0]
    A_down, B_down = adapters["A_down"], adapters["B_down"]
    arguments = {
        **{"w_ptr": weight, "bias_ptr": bias},
        **{f"{name}_ptr": t for name, t in adapters.items()},
        **scale_arguments(scales),
        **{"D_ptr": D, "rest_ptr": rest, "d_ptr": d, "U_ptr": U, "u_ptr": u, "N": N, "K": K},
        **{"r_a": 0 if A_down is None else A_down.shape[0], "r_b": 0 if B_down is None else B_down.shape[0]},
        **{"stride_wn": weight.stride(0), "stride_wk": weight.stride(1), "WITH_BIAS": with_bias},
        **{"PRECISION": precision, "BLOCK_N": config.BLOCK_ROWS, "BLOCK_K": config.BLOCK_COLUMNS},
        **{"BLOCK_R": rank_block(R)},
    }
    programs = cdiv(K, config.BLOCK_COLUMNS) + cdiv(N, config.BLOCK_ROWS)
    grid = (programs, cdiv(R, rank_block(R)))
    return Launch.of(compose_kernel, grid, arguments, config)


def down(
    x: Tensor,
    D: Tensor,
    rest: Tensor | None,
    d: Tensor | None,
    mask: Tensor | None,
    mask_scale: float,
    Z: Tensor,
    config: Skinny,
    precision: str,
) -> Launch:
    """Z [M, R] for x [M, K] and what `compose` wrote."""
    (M, K), R = x.shape, D.shape[0]
    arguments = {
        **{"x_ptr": x, "D_ptr": D, "rest_ptr": rest, "d_ptr": d, "mask_ptr": mask, "mask_scale": mask_scale},
        **{"Z_ptr": Z, "M": M, "K": K, "R": R, "r_a": R if rest is None else R - rest.shape[0]},
        **{"stride_xm": x.stride(0), "stride_xk": x.stride(1), "PRECISION": precision},
        **{"BLOCK_M": config.BLOCK_ROWS, "BLOCK_K": config.BLOCK_COLUMNS, "BLOCK_R": rank_block(R)},
    }
    grid = (cdiv(M, config.BLOCK_ROWS), cdiv(R, rank_block(R)))
    return Launch.of(down_kernel, grid, arguments, config)


def grad_z(
    G: Tensor,
    ups: tuple[Tensor | None, Tensor | None],
    up_biases: tuple[Tensor | None, Tensor | None],
    scales: tuple[float | Tensor, float | Tensor],
    Z: Tensor | None,
    mask: Tensor | None,
    mask_scale: float,
    dZ: Tensor | None,
    dU: Tensor | None,
    g: Tensor | None,
    z_sums: Tensor | None,
    scale_sums: Tensor | None,
    config: Skinny,
    precision: str,
) -> Launch:
    """Writes those of dZ [M, R] and the partial sums of the file's first lines that are not None."""
    (M, N), (A_up, B_up) = G.shape, ups
    r_a, r_b = 0 if A_up is None else A_up.shape[1], 0 if B_up is None else B_up.shape[1]
    arguments = {
        **{"G_ptr": G, "A_up_ptr": A_up, "B_up_ptr": B_up},
        **{"A_up_bias_ptr": up_biases[0], "B_up_bias_ptr": up_biases[1]},
        **scale_arguments(scales),
        **{"Z_ptr": Z, "mask_ptr": mask, "mask_scale": mask_scale, "dZ_ptr": dZ, "dU_ptr": dU, "g_ptr": g},
        **{"z_sums_ptr": z_sums, "scales_ptr": scale_sums, "M": M, "N": N, "r_a": r_a, "r_b": r_b},
        **{"stride_gm": G.stride(0), "stride_gn": G.stride(1), "PRECISION": precision},
        **{"BLOCK_M": config.BLOCK_ROWS, "BLOCK_N": config.BLOCK_COLUMNS, "BLOCK_R": rank_block(r_a + r_b)},
    }
    grid = (cdiv(M, config.BLOCK_ROWS), cdiv(r_a + r_b, rank_block(r_a + r_b)))
    return Launch.of(grad_z_kernel, grid, arguments, config)


def grad_w(x: Tensor, dZ: Tensor, dD: Tensor, config: Skinny, precision: str) -> Launch:
    """The S partial sums dD [S, R, K] of dZ^T x for x [M, K], dZ [M, R]."""
    (M, K), (S, R, _) = x.shape, dD.shape
    arguments = {
        **{"x_ptr": x, "dZ_ptr": dZ, "dD_ptr": dD, "M": M, "K": K, "R": R},
        **{"rows_of_split": cdiv(cdiv(M, S), config.BLOCK_ROWS) * config.BLOCK_ROWS},
        **{"stride_xm": x.stride(0), "stride_xk": x.stride(1), "PRECISION": precision},
        **{"BLOCK_M": config.BLOCK_ROWS, "BLOCK_K": config.BLOCK_COLUMNS, "BLOCK_R": rank_block(R)},
    }
    grid = (cdiv(K, config.BLOCK_COLUMNS), S, cdiv(R, rank_block(R)))
    return Launch.of(grad_w_kernel, grid, arguments, config)

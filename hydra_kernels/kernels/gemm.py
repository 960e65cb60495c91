"""out = X W + P Q + bias: the frozen product with the low-rank part in its accumulator, for the forward and for dx.

Forward, x [M, K], W0 [N, K]:    h = x W0^T + Z U^T + b    Z = mask * (x D^T + x [0; C_rest]^T + d)
    D [R, K] = [A_down; C], C_rest [r_b, K] what rounding took from C = B_down W0, U [N, R], b [N] and d [R] in fp32.
    Z is summed in the K loop of the frozen product, from the same tile of x: the one pass over x.
dx, G [M, N], W0 [N, K]:         dx = G W0 + dZ D          dZ [M, R] is given.

Both are one kernel with M rows, N columns and inner dimension K in its own naming: for dx those are M, K and N.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Gemm, cdiv, rank_block
from .language import dot, rounded
from .launch import Launch


# The number of rows must not decide what is compiled: a last short batch would wait for it.
@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,  # [M, K]: a pointer, or a tensor descriptor
    w,  # W0, likewise; rows are N in the forward and K for dx
    bias_ptr,  # [N] fp32, or None
    out_ptr,  # [M, N] contiguous
    p_ptr,  # [M, R] contiguous: Z, written (None: not wanted), or dZ, read
    q_ptr,  # [R, N] with strides: U^T or D
    down_ptr,  # D [R, K] contiguous (forward)
    rest_ptr,  # C_rest [R - r_a, K] contiguous (forward), or None
    d_ptr,  # [R] fp32 (forward), or None
    mask_ptr,  # [M, R] contiguous (forward), or None
    mask_scale,
    M,
    N,
    K,
    R,
    r_a,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_qr,
    stride_qn,
    FORWARD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs walk down GROUP_M blocks of rows before the next column, so that tiles of W stay in L2.
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    pid_m = first_m + pid % (GROUP_M * blocks_n) % group
    pid_n = pid % (GROUP_M * blocks_n) // group

    first, rows = pid_m.to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    offs_m = first + rows
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    if not DESCRIPTORS:
        block_k = tl.full((1, 1), BLOCK_K, tl.int64)
        x_ptrs = x + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        w_ptrs = w + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    if FORWARD:
        down_ptrs = down_ptr + offs_r[None, :] * K + offs_k[:, None]
        p = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if rest_ptr is not None:
            rest_ptrs = rest_ptr + (offs_r - r_a)[None, :] * K + offs_k[:, None]
            mask_rest = mask_r & (offs_r >= r_a)
            if DESCRIPTORS:
                # Not into p: asynchronous products into one accumulator wait for each other, and for all in flight.
                p_rest = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = k + offs_k < K
        if DESCRIPTORS:
            x_tile = x.load([pid_m * BLOCK_M, k])
            if FORWARD:
                w_tile = w.load([pid_n * BLOCK_N, k]).T
            else:
                w_tile = w.load([k, pid_n * BLOCK_N])
        else:
            x_tile = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            x_ptrs += block_k * stride_xk
            w_ptrs += block_k * stride_wk
        acc = dot(x_tile, w_tile, acc, PRECISION)
        if FORWARD:
            p = dot(x_tile, tl.load(down_ptrs + k, mask=mask_k[:, None] & mask_r[None, :], other=0.0), p, PRECISION)
            if rest_ptr is not None:
                rest = tl.load(rest_ptrs + k, mask=mask_k[:, None] & mask_rest[None, :], other=0.0)
                if DESCRIPTORS:
                    p_rest = dot(x_tile, rest, p_rest, PRECISION)
                else:
                    p = dot(x_tile, rest, p, PRECISION)

    dtype = out_ptr.dtype.element_ty
    inside, tile = mask_m[:, None] & mask_r[None, :], rows[:, None] * R + offs_r[None, :]
    if FORWARD:
        if DESCRIPTORS and rest_ptr is not None:
            p += p_rest
        if d_ptr is not None:
            p += tl.load(d_ptr + offs_r, mask=mask_r, other=0.0)[None, :]
        if mask_ptr is not None:
            p *= tl.load(mask_ptr + first * R + tile, mask=inside, other=0.0).to(tl.float32) * mask_scale
        p = rounded(p, dtype)
        if p_ptr is not None and pid_n == 0:
            tl.store(p_ptr + first * R + tile, p, mask=inside)
    else:
        p = tl.load(p_ptr + first * R + tile, mask=inside, other=0.0)
    q_ptrs = q_ptr + offs_r[:, None] * stride_qr + offs_n[None, :] * stride_qn
    acc = dot(p, tl.load(q_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0), acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    out_ptrs = out_ptr + first * N + (rows[:, None] * N + offs_n[None, :])
    tl.store(out_ptrs, rounded(acc, dtype), mask=mask_m[:, None] & mask_n[None, :])


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    D: Tensor,
    rest: Tensor | None,
    d: Tensor | None,
    U: Tensor,
    mask: Tensor | None,
    mask_scale: float,
    h: Tensor,
    Z: Tensor | None,
    config: Gemm,
    precision: str,
) -> Launch:
    """h [M, N], and Z [M, R] where it is not None; shapes and dtypes as in the file's first lines."""
    (M, K), N, R = x.shape, weight.shape[0], D.shape[0]
    w_block = (config.BLOCK_N, config.BLOCK_K)
    x_arg, w_arg, descriptors = _operands(x, weight, w_block, config)
    arguments = {
        **{"x": x_arg, "w": w_arg, "bias_ptr": bias, "out_ptr": h, "p_ptr": Z, "q_ptr": U},
        **{"down_ptr": D, "rest_ptr": rest, "d_ptr": d, "mask_ptr": mask, "mask_scale": mask_scale},
        **{"M": M, "N": N, "K": K, "R": R, "r_a": R if rest is None else R - rest.shape[0]},
        **{"stride_xm": x.stride(0), "stride_xk": x.stride(1)},
        **{"stride_wk": weight.stride(1), "stride_wn": weight.stride(0), "stride_qr": 1, "stride_qn": R},
        **{"FORWARD": True, "DESCRIPTORS": descriptors, "PRECISION": precision},
    }
    return _launch(M, N, R, arguments, config)


def dx(G: Tensor, weight: Tensor, dZ: Tensor, D: Tensor, out: Tensor, config: Gemm, precision: str) -> Launch:
    """dx [M, K] for G [M, N], weight [N, K], dZ [M, R], D [R, K]."""
    (M, N), K, R = G.shape, weight.shape[1], D.shape[0]
    w_block = (config.BLOCK_K, config.BLOCK_N)
    x_arg, w_arg, descriptors = _operands(G, weight, w_block, config)
    arguments = {
        **{"x": x_arg, "w": w_arg, "bias_ptr": None, "out_ptr": out, "p_ptr": dZ, "q_ptr": D},
        **{"down_ptr": None, "rest_ptr": None, "d_ptr": None, "mask_ptr": None, "mask_scale": 1.0},
        **{"M": M, "N": K, "K": N, "R": R, "r_a": 0},
        **{"stride_xm": G.stride(0), "stride_xk": G.stride(1)},
        **{"stride_wk": weight.stride(0), "stride_wn": weight.stride(1), "stride_qr": K, "stride_qn": 1},
        **{"FORWARD": False, "DESCRIPTORS": descriptors, "PRECISION": precision},
    }
    return _launch(M, K, R, arguments, config)


def _operands(
    x: Tensor, weight: Tensor, w_block: tuple[int, int], config: Gemm
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, bool]:
    """Both as tensor descriptors, or both as they are."""
    if not config.descriptors:
        return x, weight, False
    x_desc = TensorDescriptor(x, list(x.shape), list(x.stride()), [config.BLOCK_M, config.BLOCK_K])
    return x_desc, TensorDescriptor(weight, list(weight.shape), list(weight.stride()), list(w_block)), True


def _launch(M: int, N: int, R: int, arguments: dict[str, Any], config: Gemm) -> Launch:
    tiles = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K}
    tiles |= {"BLOCK_R": rank_block(R), "GROUP_M": config.GROUP_M}
    grid = (cdiv(M, config.BLOCK_M) * cdiv(N, config.BLOCK_N),)
    return Launch.of(gemm_kernel, grid, arguments | tiles, config)

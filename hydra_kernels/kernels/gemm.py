"""out = X W + P Q + bias: the frozen product with the low-rank part in its accumulator, for the forward and for dx.

Forward, x [M, K], W0 [N, K]:    h = x W0^T + Z U^T + b    Z [M, R], U [N, R], b [N] in fp32
dx, G [M, N], W0 [N, K]:         dx = G W0 + dZ D          dZ [M, R], D [R, K]

Both are one kernel with M rows, N columns and inner dimension K in its own naming: for dx those are M, K and N. A
persistent configuration has as many programs as multiprocessors, which walk over all tiles: on an H200 the forward then
takes 0.8 of the time of a program a tile. Z is not summed in the K loop: those products cost more than the pass over x
that they would save, but where N is small.
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


@triton.jit
def compute_tile(
    tile, x, w, bias_ptr, out, p_ptr, q_ptr, M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_qr, stride_qn,
    FORWARD: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of out. Tiles walk down GROUP_M blocks of rows before the next column, so that those of W stay in L2."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    pid_m = first_m + tile % (GROUP_M * blocks_n) % group
    pid_n = tile % (GROUP_M * blocks_n) // group
    first, rows = pid_m.to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    offs_m, offs_n = first + rows, pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k, offs_r = tl.arange(0, BLOCK_K).to(tl.int64), tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    if not DESCRIPTORS:
        block_k = tl.full((1, 1), BLOCK_K, tl.int64)
        x_ptrs = x + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        w_ptrs = w + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if DESCRIPTORS:
            x_tile = x.load([pid_m * BLOCK_M, k])
            if FORWARD:
                w_tile = w.load([pid_n * BLOCK_N, k]).T
            else:
                w_tile = w.load([k, pid_n * BLOCK_N])
        else:
            mask_k = k + offs_k < K
            x_tile = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w_tile = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            x_ptrs += block_k * stride_xk
            w_ptrs += block_k * stride_wk
        acc = dot(x_tile, w_tile, acc, PRECISION)

    p_ptrs = p_ptr + first * R + (rows[:, None] * R + offs_r[None, :])
    q_ptrs = q_ptr + offs_r[:, None] * stride_qr + offs_n[None, :] * stride_qn
    p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
    acc = dot(p, tl.load(q_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0), acc, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    acc = rounded(acc, p_ptr.dtype.element_ty)
    if DESCRIPTORS:
        out.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc)
    else:
        out_ptrs = out + first * N + (rows[:, None] * N + offs_n[None, :])
        tl.store(out_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])


# The number of rows must not decide what is compiled: a last short batch would wait for it.
@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,  # [M, K]: a pointer, or a tensor descriptor
    w,  # W0, likewise; rows are N in the forward and K for dx
    bias_ptr,  # [N] fp32, or None
    out,  # [M, N] contiguous, written: a pointer, or a tensor descriptor
    p_ptr,  # Z or dZ [M, R] contiguous
    q_ptr,  # [R, N] with strides: U^T or D
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_qr,
    stride_qn,
    FORWARD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if PERSISTENT:
        for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
            compute_tile(
                tile, x, w, bias_ptr, out, p_ptr, q_ptr, M, N, K, R,
                stride_xm, stride_xk, stride_wk, stride_wn, stride_qr, stride_qn,
                FORWARD, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
            )  # fmt: skip
    else:
        # Not the same loop with one pass: Triton pipelines that less well.
        compute_tile(
            tl.program_id(0), x, w, bias_ptr, out, p_ptr, q_ptr, M, N, K, R,
            stride_xm, stride_xk, stride_wk, stride_wn, stride_qr, stride_qn,
            FORWARD, DESCRIPTORS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
        )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    Z: Tensor,
    U: Tensor,
    h: Tensor,
    config: Gemm,
    programs: int,
    precision: str,
) -> Launch:
    """h [M, N] for x [M, K], weight [N, K], Z [M, R], U [N, R]; so many programs where config is persistent."""
    (M, K), (N, R) = x.shape, U.shape
    arguments = {
        **_operands(x, weight, (config.BLOCK_N, config.BLOCK_K), h, config),
        **{"bias_ptr": bias, "p_ptr": Z, "q_ptr": U, "M": M, "N": N, "K": K, "R": R},
        **{"stride_xm": x.stride(0), "stride_xk": x.stride(1)},
        **{"stride_wk": weight.stride(1), "stride_wn": weight.stride(0), "stride_qr": 1, "stride_qn": R},
        **{"FORWARD": True, "PERSISTENT": config.persistent, "PRECISION": precision},
    }
    return _launch(arguments, config, programs)


def dx(
    G: Tensor, weight: Tensor, dZ: Tensor, D: Tensor, out: Tensor, config: Gemm, programs: int, precision: str
) -> Launch:
    """dx [M, K] for G [M, N], weight [N, K], dZ [M, R], D [R, K]; programs as in `forward`."""
    (M, N), (R, K) = G.shape, D.shape
    arguments = {
        **_operands(G, weight, (config.BLOCK_K, config.BLOCK_N), out, config),
        **{"bias_ptr": None, "p_ptr": dZ, "q_ptr": D, "M": M, "N": K, "K": N, "R": R},
        **{"stride_xm": G.stride(0), "stride_xk": G.stride(1)},
        **{"stride_wk": weight.stride(0), "stride_wn": weight.stride(1), "stride_qr": K, "stride_qn": 1},
        **{"FORWARD": False, "PERSISTENT": config.persistent, "PRECISION": precision},
    }
    return _launch(arguments, config, programs)


def _operands(x: Tensor, weight: Tensor, w_block: tuple[int, int], out: Tensor, config: Gemm) -> dict[str, Any]:
    """All three as tensor descriptors, or all as they are."""
    tensors = {"x": x, "w": weight, "out": out}
    if not config.descriptors:
        return {**tensors, "DESCRIPTORS": False}
    blocks = {"x": (config.BLOCK_M, config.BLOCK_K), "w": w_block, "out": (config.BLOCK_M, config.BLOCK_N)}
    described = {
        name: TensorDescriptor(t, list(t.shape), list(t.stride()), list(blocks[name])) for name, t in tensors.items()
    }
    return {**described, "DESCRIPTORS": True}


def _launch(arguments: dict[str, Any], config: Gemm, programs: int) -> Launch:
    tiles = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_K": config.BLOCK_K}
    tiles |= {"BLOCK_R": rank_block(arguments["R"]), "GROUP_M": config.GROUP_M}
    count = cdiv(arguments["M"], config.BLOCK_M) * cdiv(arguments["N"], config.BLOCK_N)
    programs = min(count, programs) if config.persistent else count
    return Launch.of(gemm_kernel, (programs,), arguments | tiles, config)

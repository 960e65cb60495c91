"""out = X W + P Q + bias: the frozen product and the low-rank part in one accumulator, for the forward and for dx.

Forward, x [M, K], W0 [N, K]:    h = x W0^T + Z U^T + b    Z [M, R], U [N, R], b [N] in fp32
dx, G [M, N], W0 [N, K]:         dx = G W0 + dZ D          dZ [M, R], D [R, K]
    under input dropout (`philox`):  dx = G W0 + input_mask * (dZ_a A_down) / (1-p) + dZ_b C

Both are one kernel. It calls the rows of its output M, the columns N and the inner dimension K; for dx, N and K are
therefore swapped. A persistent configuration starts as many programs as there are multiprocessors, and each computes
many tiles: on an H200 the forward then takes 0.8 of the time that one program for each tile takes.

The forward is `hybrid`'s, and Z comes from a pass of its own, `skinny.down`. `triton` sums Z beside h: `one_pass`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import Gemm, cdiv, rank_block
from .language import begin, dot, rounded
from .launch import Launch
from .philox import NONE, InputDropout, dropped


@triton.jit
def place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile: they are numbered down GROUP_M blocks of rows, then across, so that W's stay in L2."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * blocks_n) * GROUP_M
    group = min(blocks_m - first_m, GROUP_M)
    return first_m + tile % (GROUP_M * blocks_n) % group, tile % (GROUP_M * blocks_n) // group


@triton.jit
def offsets(pid_m, pid_n, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The first row of a tile and its rows from there on, then its rows, columns and steps of K in the whole."""
    first, rows = pid_m.to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    if WIDE:  # not always: in int64 these offsets cost registers, and two programs would no longer fit on sm_80
        rows = rows.to(tl.int64)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return first, rows, first + rows, offs_n, tl.arange(0, BLOCK_K).to(tl.int64)


@triton.jit
def pointers(x, w, offs_m, offs_n, offs_k, stride_xm, stride_xk, stride_wk, stride_wn):
    """To the first tile of x and the first of w."""
    x_ptrs = x + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    return x_ptrs, w + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn


@triton.jit
def add_low_rank(
    acc, p_ptr, q_ptr, rows, offs_n, offs_r, mask_m, mask_n, mask_r, R, stride_qr, stride_qn, PRECISION: tl.constexpr
):
    """acc + P Q over the ranks of mask_r; p_ptr points to the tile's first row."""
    p_ptrs = p_ptr + (rows[:, None] * R + offs_r[None, :])
    q_ptrs = q_ptr + offs_r[:, None].to(tl.int64) * stride_qr + offs_n[None, :] * stride_qn
    p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
    return dot(p, tl.load(q_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0), acc, PRECISION)


@triton.jit
def compute_tile(
    tile, x, w, bias_ptr, out, p_ptr, q_ptr, M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_qr, stride_qn,
    r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,
    SEQUENTIAL: tl.constexpr, FORWARD: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile of out."""
    pid_m, pid_n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    first, rows, offs_m, offs_n, offs_k = offsets(pid_m, pid_n, WIDE, BLOCK_M, BLOCK_N, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    if not DESCRIPTORS:
        block_k = tl.full((1, 1), BLOCK_K, tl.int64)
        x_ptrs, w_ptrs = pointers(x, w, offs_m, offs_n, offs_k, stride_xm, stride_xk, stride_wk, stride_wn)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if seed_ptr is not None or input_mask_ptr is not None:
        # First what the mask is on, so that it needs no accumulator of its own.
        acc = add_low_rank(
            acc, p_ptr + first * R, q_ptr, rows, offs_n, offs_r, mask_m, mask_n, offs_r < r_dropped,
            R, stride_qr, stride_qn, PRECISION,
        )  # fmt: skip
        first_n = pid_n.to(tl.int64) * BLOCK_N
        acc = dropped(acc, seed_ptr, threshold, input_mask_ptr, offs_m, first_n, mask_m, N, BLOCK_N) * input_scale
        mask_r = mask_r & (offs_r >= r_dropped)
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

    if SEQUENTIAL:
        acc = add_low_rank(
            acc, p_ptr + first * R, q_ptr, rows, offs_n, offs_r, mask_m, mask_n, mask_r,
            R, stride_qr, stride_qn, PRECISION,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    acc = rounded(acc, p_ptr.dtype.element_ty)
    if DESCRIPTORS:
        out.store([pid_m * BLOCK_M, pid_n * BLOCK_N], acc)
    else:
        out_ptrs = out + first * N + (rows[:, None] * N + offs_n[None, :])
        tl.store(out_ptrs, acc, mask=mask_m[:, None] & mask_n[None, :])


# M is not specialized: else a last, short batch would be compiled anew.
@triton.jit(do_not_specialize=["M", "threshold"])
def gemm_kernel(
    x,  # [M, K]: a pointer, or a tensor descriptor
    w,  # W0, likewise; its rows are N in the forward and K for dx
    bias_ptr,  # [N] fp32, or None
    out,  # [M, N] contiguous, written: a pointer, or a tensor descriptor
    p_ptr,  # Z or dZ [M, R] contiguous
    q_ptr,  # [R, N] with strides: U^T or D
    M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_qr, stride_qn,
    r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,  # of input dropout, for dx
    SEQUENTIAL: tl.constexpr,  # whether r_dropped < R
    FORWARD: tl.constexpr, DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # whether the rows of a tile of out span 2^31 elements
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    if PERSISTENT:
        for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
            compute_tile(
                tile, x, w, bias_ptr, out, p_ptr, q_ptr, M, N, K, R,
                stride_xm, stride_xk, stride_wk, stride_wn, stride_qr, stride_qn,
                r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,
                SEQUENTIAL, FORWARD, DESCRIPTORS, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
            )  # fmt: skip
    else:
        # Not a loop that runs once: Triton pipelines that less well.
        compute_tile(
            tl.program_id(0), x, w, bias_ptr, out, p_ptr, q_ptr, M, N, K, R,
            stride_xm, stride_xk, stride_wk, stride_wn, stride_qr, stride_qn,
            r_dropped, seed_ptr, input_mask_ptr, threshold, input_scale,
            SEQUENTIAL, FORWARD, DESCRIPTORS, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, GROUP_M,
        )  # fmt: skip


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, Z: Tensor, U: Tensor, h: Tensor,
    config: Gemm, programs: int, precision: str,
) -> Launch:  # fmt: skip
    """h [M, N] for x [M, K], weight [N, K], Z [M, R], U [N, R]. A persistent config starts at most ``programs``."""
    return _launch(
        x, weight, bias, h, Z, U, config, programs, precision, is_forward=True,
        stride_wk=weight.stride(1), stride_wn=weight.stride(0), stride_qr=1, stride_qn=U.shape[1],
    )  # fmt: skip


def dx(
    G: Tensor, weight: Tensor, dZ: Tensor, D: Tensor, out: Tensor, config: Gemm, programs: int, precision: str,
    drop: InputDropout = NONE,
) -> Launch:  # fmt: skip
    """dx [M, K] for G [M, N], weight [N, K], dZ [M, R], D [R, K]; ``programs`` as in `forward`."""
    return _launch(
        G, weight, None, out, dZ, D, config, programs, precision, drop, is_forward=False,
        stride_wk=weight.stride(0), stride_wn=weight.stride(1), stride_qr=D.shape[1], stride_qn=1,
    )  # fmt: skip


def _launch(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, p: Tensor, q: Tensor,
    config: Gemm, programs: int, precision: str, drop: InputDropout = NONE,
    *, is_forward: bool, stride_wk: int, stride_wn: int, stride_qr: int, stride_qn: int,
) -> Launch:  # fmt: skip
    """All in the kernel's naming."""
    (M, K), N, R = x.shape, out.shape[1], p.shape[1]
    BLOCK_M, BLOCK_N, BLOCK_K = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K
    w_block = (BLOCK_N, BLOCK_K) if is_forward else (BLOCK_K, BLOCK_N)
    tiles = cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    return Launch.of(
        gemm_kernel, (min(tiles, programs) if config.persistent else tiles,), config,
        x=operand(x, (BLOCK_M, BLOCK_K), config), w=operand(w, w_block, config), bias_ptr=bias,
        out=operand(out, (BLOCK_M, BLOCK_N), config), p_ptr=p, q_ptr=q,
        M=M, N=N, K=K, R=R,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wk=stride_wk, stride_wn=stride_wn,
        stride_qr=stride_qr, stride_qn=stride_qn,
        **drop._asdict(), SEQUENTIAL=drop.r_dropped < R,
        FORWARD=is_forward, DESCRIPTORS=config.descriptors, PERSISTENT=config.persistent, PRECISION=precision,
        WIDE=BLOCK_M * max(N, R) >= 2**31,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=rank_block(R), GROUP_M=config.GROUP_M,
    )  # fmt: skip


def operand(t: Tensor, block: tuple[int, int], config: Gemm) -> Tensor | TensorDescriptor:
    """t itself, or its descriptor where config loads and stores through descriptors."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block)) if config.descriptors else t

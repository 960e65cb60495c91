"""W = W0 + U D, the effective form's one weight, and what it is made of; no row of x is read.

    C = B_down W0              D = [A_down; C; C_lo]       C_lo = C - (C as rounded): r_b rows, in low precision alone
    W = W0 + s_a A_up A_down + s_b B_up (C + C_lo)         summed in fp32, rounded once
    d = [a_d, B_down b0 + b_d] in fp32                     b = b0 + s_a (A_up d_a + a_u) + s_b (B_up d_b + b_u)

Every row of W needs C, a sum over all rows of W0. So in `effective` a program owns a block of columns and walks over
W0 twice: down to sum C, which stays in its registers, and up again to write W. It finds the columns in L2 then: there
is a program for each multiprocessor, so that few columns are in use at once. W0 comes from memory once and W is written
once, in one launch. With C from `skinny.sum_rows` and D from `compose` W0 would come twice, in three launches.

`rebuild` makes W again, in the backward, from the forward's D: one tile a program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Skinny, cdiv, rank_block
from .language import dot, rounded, scalar, store
from .launch import Launch, Scales


@triton.jit
def load_tile(ptr, offs_row, offs_column, rows, columns, dtype: tl.constexpr):
    """A tile of a contiguous matrix, in dtype; 0 outside."""
    inside = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
    tile = tl.load(ptr + offs_row[:, None] * columns + offs_column[None, :], mask=inside, other=0.0)
    return tile if tile.dtype == dtype else rounded(tile.to(tl.float32), dtype)


@triton.jit
def write_tile(
    w_ptr, A_up_ptr, B_up_ptr, scale_a, scale_b, A, C, C_lo, out_ptr, offs_n, offs_k, offs_a, offs_b,
    N, K, r_a, r_b, stride_wn, stride_wk,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of W, where A, C and C_lo are the tile's columns of D; None where absent."""
    inside, dtype = (offs_n < N)[:, None] & (offs_k < K)[None, :], w_ptr.dtype.element_ty
    w = tl.load(w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=inside, other=0.0)
    w = w.to(tl.float32)
    # Each scale after its product: s_a A_up would have to be rounded.
    if A_up_ptr is not None:
        A_up = load_tile(A_up_ptr, offs_n, offs_a, N, r_a, dtype)
        w += scalar(scale_a, LOADED_A)[:, None] * dot(A_up, A, tl.zeros((BLOCK_N, BLOCK_K), tl.float32), PRECISION)
    if B_up_ptr is not None:
        B_up = load_tile(B_up_ptr, offs_n, offs_b, N, r_b, dtype)
        delta = dot(B_up, C, tl.zeros((BLOCK_N, BLOCK_K), tl.float32), PRECISION)
        if C_lo is not None:
            delta = dot(B_up, C_lo, delta, PRECISION)
        w += scalar(scale_b, LOADED_B)[:, None] * delta
    store(out_ptr + offs_n[:, None] * K + offs_k[None, :], w, inside)


@triton.jit
def write_columns(
    block, w_ptr, A_down_ptr, A_up_ptr, B_down_ptr, B_up_ptr, scale_a, scale_b, D_ptr, out_ptr,
    N, K, r_a, r_b, stride_wn, stride_wk,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, TWO_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One block of columns of D and W."""
    dtype, rows = w_ptr.dtype.element_ty, tl.arange(0, BLOCK_N).to(tl.int64)
    offs_k = tl.full((1,), block, tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_a, offs_b = tl.arange(0, BLOCK_A).to(tl.int64), tl.arange(0, BLOCK_B).to(tl.int64)
    mask_k = offs_k < K
    A = None
    C = None
    C_lo = None
    if A_down_ptr is not None:
        A = load_tile(A_down_ptr, offs_a, offs_k, r_a, K, dtype)
        if D_ptr is not None:
            D_ptrs = D_ptr + offs_a[:, None] * K + offs_k[None, :]
            tl.store(D_ptrs, A, mask=(offs_a < r_a)[:, None] & mask_k[None, :])
    if B_down_ptr is not None:
        acc = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        for n in range(0, N, BLOCK_N):
            offs_n = n + rows
            B_down = load_tile(B_down_ptr, offs_b, offs_n, r_b, N, dtype)
            w_ptrs = w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk
            w = tl.load(w_ptrs, mask=(offs_n < N)[:, None] & mask_k[None, :], other=0.0)
            acc = dot(B_down, w, acc, PRECISION)
        C, inside = rounded(acc, dtype), (offs_b < r_b)[:, None] & mask_k[None, :]
        if D_ptr is not None:
            tl.store(D_ptr + (r_a + offs_b)[:, None] * K + offs_k[None, :], C, mask=inside)
        if TWO_PARTS:
            C_lo = rounded(acc - C.to(tl.float32), dtype)
            if D_ptr is not None:
                tl.store(D_ptr + (r_a + r_b + offs_b)[:, None] * K + offs_k[None, :], C_lo, mask=inside)
    last = (tl.cdiv(N, BLOCK_N) - 1) * BLOCK_N
    for n in range(0, N, BLOCK_N):
        # Upwards: what was read last is surest to be in L2.
        write_tile(
            w_ptr, A_up_ptr, B_up_ptr, scale_a, scale_b, A, C, C_lo, out_ptr, last - n + rows, offs_k, offs_a, offs_b,
            N, K, r_a, r_b, stride_wn, stride_wk, LOADED_A, LOADED_B, PRECISION, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def write_vectors(
    bias_ptr, A_up_ptr, B_down_ptr, B_up_ptr, A_down_bias_ptr, A_up_bias_ptr, B_down_bias_ptr, B_up_bias_ptr,
    scale_a, scale_b, d_ptr, b_ptr, N, r_a, r_b,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, dtype: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """d and b. Projections are rounded to W's dtype here too: where b0 cancels W0 x, only the same ones cancel."""
    rows = tl.arange(0, BLOCK_N).to(tl.int64)
    offs_a, offs_b = tl.arange(0, BLOCK_A).to(tl.int64), tl.arange(0, BLOCK_B).to(tl.int64)
    d_a = tl.zeros((BLOCK_A,), tl.float32)
    d_b = tl.zeros((BLOCK_B,), tl.float32)
    if A_down_bias_ptr is not None:
        d_a += tl.load(A_down_bias_ptr + offs_a, mask=offs_a < r_a, other=0.0).to(tl.float32)
    if B_down_bias_ptr is not None:
        d_b += tl.load(B_down_bias_ptr + offs_b, mask=offs_b < r_b, other=0.0).to(tl.float32)
    if bias_ptr is not None and B_down_ptr is not None:
        for n in range(0, N, BLOCK_N):
            B_down = load_tile(B_down_ptr, offs_b, n + rows, r_b, N, dtype).to(tl.float32)
            b0 = tl.load(bias_ptr + n + rows, mask=n + rows < N, other=0.0).to(tl.float32)
            d_b += tl.sum(B_down * b0[None, :], 1)
    if d_ptr is not None:
        tl.store(d_ptr + offs_a, d_a, mask=offs_a < r_a)
        tl.store(d_ptr + r_a + offs_b, d_b, mask=offs_b < r_b)
    s_a, s_b = scalar(scale_a, LOADED_A), scalar(scale_b, LOADED_B)
    for n in range(0, N, BLOCK_N):
        offs_n = n + rows
        mask_n = offs_n < N
        b = tl.zeros((BLOCK_N,), tl.float32)
        if bias_ptr is not None:
            b += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if A_up_bias_ptr is not None:
            b += s_a * tl.load(A_up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if B_up_bias_ptr is not None:
            b += s_b * tl.load(B_up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if A_down_bias_ptr is not None:
            A_up = load_tile(A_up_ptr, offs_n, offs_a, N, r_a, dtype).to(tl.float32)
            b += s_a * tl.sum(A_up * d_a[None, :], 1)
        if B_up_ptr is not None and (bias_ptr is not None or B_down_bias_ptr is not None):
            B_up = load_tile(B_up_ptr, offs_n, offs_b, N, r_b, dtype).to(tl.float32)
            b += s_b * tl.sum(B_up * d_b[None, :], 1)
        store(b_ptr + offs_n, b, mask_n)


@triton.jit
def effective_kernel(
    w_ptr,  # W0 [N, K] with strides
    bias_ptr, A_down_ptr, A_up_ptr, B_down_ptr, B_up_ptr,  # None where absent
    A_down_bias_ptr, A_up_bias_ptr, B_down_bias_ptr, B_up_bias_ptr,
    scale_a, scale_b,
    D_ptr,  # [R or R + r_b, K], written, or None
    d_ptr,  # [R] fp32, written, or None
    b_ptr,  # [N], written, or None where it is 0
    out_ptr,  # W [N, K] contiguous, written
    N, K, r_a, r_b,
    stride_wn, stride_wk,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr,  # whether scale_a, scale_b are pointers
    TWO_PARTS: tl.constexpr,  # whether there is C_lo
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if b_ptr is not None:
        programs -= 1  # the last one writes the vectors
    if pid < programs:
        for block in range(pid, tl.cdiv(K, BLOCK_K), programs):
            write_columns(
                block, w_ptr, A_down_ptr, A_up_ptr, B_down_ptr, B_up_ptr, scale_a, scale_b, D_ptr, out_ptr,
                N, K, r_a, r_b, stride_wn, stride_wk,
                LOADED_A, LOADED_B, TWO_PARTS, PRECISION, BLOCK_N, BLOCK_K, BLOCK_A, BLOCK_B,
            )  # fmt: skip
    else:
        if b_ptr is not None:
            write_vectors(
                bias_ptr, A_up_ptr, B_down_ptr, B_up_ptr,
                A_down_bias_ptr, A_up_bias_ptr, B_down_bias_ptr, B_up_bias_ptr,
                scale_a, scale_b, d_ptr, b_ptr, N, r_a, r_b,
                LOADED_A, LOADED_B, w_ptr.dtype.element_ty, BLOCK_N, BLOCK_A, BLOCK_B,
            )  # fmt: skip


def effective(
    weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Tensor | None], scales: Scales,
    D: Tensor | None, d: Tensor | None, b: Tensor | None, out: Tensor,
    config: Skinny, programs: int, precision: str,
) -> Launch:  # fmt: skip
    """Writes W [N, K], b [N], and where they are not None D and d; at most ``programs`` programs write columns."""
    a = adapters
    r_a, r_b = (0 if a[name] is None else len(a[name]) for name in ("A_down", "B_down"))  # type: ignore[arg-type]
    columns = min(cdiv(weight.shape[1], config.BLOCK_COLUMNS), programs)
    return Launch.of(
        effective_kernel, (columns + (b is not None),), config,
        w_ptr=weight, bias_ptr=bias,
        A_down_ptr=a["A_down"], A_up_ptr=a["A_up"], B_down_ptr=a["B_down"], B_up_ptr=a["B_up"],
        A_down_bias_ptr=a["A_down_bias"], A_up_bias_ptr=a["A_up_bias"],
        B_down_bias_ptr=a["B_down_bias"], B_up_bias_ptr=a["B_up_bias"],
        D_ptr=D, d_ptr=d, b_ptr=b, out_ptr=out, **_of_both(weight, r_a, r_b, scales, config, precision),
    )  # fmt: skip


@triton.jit
def rebuild_kernel(
    w_ptr,  # W0 [N, K] with strides
    A_up_ptr, B_up_ptr,  # None where absent
    scale_a, scale_b,
    D_ptr,  # what `effective` wrote
    out_ptr,  # W [N, K] contiguous, written
    N, K, r_a, r_b,
    stride_wn, stride_wk,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, TWO_PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    dtype = w_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_a, offs_b = tl.arange(0, BLOCK_A).to(tl.int64), tl.arange(0, BLOCK_B).to(tl.int64)
    A = None
    C = None
    C_lo = None
    if A_up_ptr is not None:
        A = load_tile(D_ptr, offs_a, offs_k, r_a, K, dtype)
    if B_up_ptr is not None:
        C_ptr = D_ptr + tl.full((1, 1), r_a, tl.int64) * K
        C = load_tile(C_ptr, offs_b, offs_k, r_b, K, dtype)
        if TWO_PARTS:
            C_lo = load_tile(C_ptr + tl.full((1, 1), r_b, tl.int64) * K, offs_b, offs_k, r_b, K, dtype)
    write_tile(
        w_ptr, A_up_ptr, B_up_ptr, scale_a, scale_b, A, C, C_lo, out_ptr, offs_n, offs_k, offs_a, offs_b,
        N, K, r_a, r_b, stride_wn, stride_wk, LOADED_A, LOADED_B, PRECISION, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def rebuild(
    weight: Tensor, A_up: Tensor | None, B_up: Tensor | None, scales: Scales, D: Tensor, out: Tensor,
    config: Skinny, precision: str,
) -> Launch:  # fmt: skip
    """W [N, K] again, from the D that `effective` wrote."""
    (N, K), (r_a, r_b) = weight.shape, (0 if up is None else up.shape[1] for up in (A_up, B_up))
    return Launch.of(
        rebuild_kernel, (cdiv(N, config.BLOCK_ROWS), cdiv(K, config.BLOCK_COLUMNS)), config,
        w_ptr=weight, A_up_ptr=A_up, B_up_ptr=B_up, D_ptr=D, out_ptr=out,
        **_of_both(weight, r_a, r_b, scales, config, precision),
    )  # fmt: skip


def _of_both(
    weight: Tensor, r_a: int, r_b: int, scales: Scales, config: Skinny, precision: str
) -> dict[str, Any]:
    """The arguments that both kernels have."""
    (N, K), (s_a, s_b) = weight.shape, scales
    return {
        **{"scale_a": s_a, "scale_b": s_b, "N": N, "K": K, "r_a": r_a, "r_b": r_b},
        **{"stride_wn": weight.stride(0), "stride_wk": weight.stride(1)},
        **{"LOADED_A": isinstance(s_a, Tensor), "LOADED_B": isinstance(s_b, Tensor)},
        **{"TWO_PARTS": weight.dtype != torch.float32 and r_b > 0},
        # Three products in tf32 keep what one would lose: the GEMM alone rounds W to tf32.
        "PRECISION": "tf32x3" if precision == "tf32" else precision,
        **{"BLOCK_N": config.BLOCK_ROWS, "BLOCK_K": config.BLOCK_COLUMNS},
        **{"BLOCK_A": rank_block(r_a), "BLOCK_B": rank_block(r_b)},
    }

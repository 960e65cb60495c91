"""W = W0 + U D, the effective form's one weight, and what it is made of; no row of x is read.

    C = B_down W0              D = [A_down; C; C_lo]       C_lo = C - (C as rounded): r_b rows, in low precision alone
    W = W0 + s_a A_up A_down + s_b B_up C                  in one fp32 accumulator, rounded once
    d = [a_d, B_down b0 + b_d] in fp32                     b = b0 + s_a (A_up d_a + a_u) + s_b (B_up d_b + b_u)

Every row of W needs C, a sum over all rows of W0. So a program of `effective` walks over its block of columns twice:
first down all rows, to sum C, which stays in its registers, then up a range of rows, to write W. The columns are in L2
then. Where there are fewer blocks of columns than multiprocessors, several programs share one, and each sums all of C:
W0 comes from memory once all the same, in one launch. C by `skinny.sum_rows`, D by `compose` and W by `rebuild` would
be three launches, and read W0 twice.

`rebuild` makes W again, in the backward, from the forward's D: one tile a program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import Skinny, cdiv, rank_block
from .language import begin, dot, in_dtype, rounded, scalar, store
from .launch import Launch, Scales


@triton.jit
def load_tile(ptr, offs_row, offs_column, rows, columns, dtype: tl.constexpr):
    """A tile of a contiguous matrix, in dtype; 0 outside."""
    inside = (offs_row < rows)[:, None] & (offs_column < columns)[None, :]
    tile = tl.load(ptr + offs_row[:, None] * columns + offs_column[None, :], mask=inside, other=0.0)
    return in_dtype(tile, dtype)


@triton.jit
def write_tile(
    w_ptr, A_up_ptr, B_up_ptr, A, A_lo, C, C_lo, out_ptr, offs_n, offs_k, N, K, stride_wn, stride_wk,
    R_A: tl.constexpr, R_B: tl.constexpr, PRECISION: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One tile of W; A and C are s_a A_down and s_b C in its columns, with what rounding them lost, or None."""
    inside = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    dtype = w_ptr.dtype.element_ty
    w = tl.load(w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=inside, other=0.0)
    acc = w.to(tl.float32)
    if R_A > 0:
        A_up = load_tile(A_up_ptr, offs_n, tl.arange(0, BLOCK_A), N, R_A, dtype)
        acc = dot(A_up, A, acc, PRECISION)
        if A_lo is not None:
            acc = dot(A_up, A_lo, acc, PRECISION)
    if R_B > 0:
        B_up = load_tile(B_up_ptr, offs_n, tl.arange(0, BLOCK_B), N, R_B, dtype)
        acc = dot(B_up, C, acc, PRECISION)
        if C_lo is not None:
            acc = dot(B_up, C_lo, acc, PRECISION)
    store(out_ptr + offs_n[:, None] * K + offs_k[None, :], acc, inside)


@triton.jit
def write_columns(
    w_ptr, A_down_ptr, A_up_ptr, B_down_ptr, B_up_ptr, s_a, s_b, D_ptr, out_ptr, offs_k, first, last,
    N, K, stride_wn, stride_wk,
    R_A: tl.constexpr, R_B: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A block of columns of W, rows first to last; the program that has the first row writes D too."""
    dtype = w_ptr.dtype.element_ty
    offs_a, offs_b, rows = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N).to(tl.int64)
    columns = offs_k[None, :]
    of_D = (offs_k < K)[None, :] & (first == 0)
    A = None
    A_lo = None
    C = None
    C_lo = None
    if R_A > 0:
        A = load_tile(A_down_ptr, offs_a.to(tl.int64), offs_k, R_A, K, dtype)
        if D_ptr is not None:
            tl.store(D_ptr + offs_a.to(tl.int64)[:, None] * K + columns, A, mask=(offs_a < R_A)[:, None] & of_D)
        scaled = s_a[:, None] * A.to(tl.float32)
        A = rounded(scaled, dtype)
        if dtype != tl.float32:
            A_lo = rounded(scaled - A.to(tl.float32), dtype)
    if R_B > 0:
        acc = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
        for n in range(0, N, BLOCK_N):
            offs_n = n + rows
            B_down = load_tile(B_down_ptr, offs_b.to(tl.int64), offs_n, R_B, N, dtype)
            w_ptrs = w_ptr + offs_n[:, None] * stride_wn + columns * stride_wk
            w = tl.load(w_ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)
            acc = dot(B_down, w, acc, PRECISION)
        if D_ptr is not None:
            D_ptrs, inside = D_ptr + (R_A + offs_b).to(tl.int64)[:, None] * K + columns, (offs_b < R_B)[:, None] & of_D
            C = rounded(acc, dtype)
            tl.store(D_ptrs, C, mask=inside)
            if dtype != tl.float32:
                store(D_ptrs + tl.full((1, 1), R_B, tl.int64) * K, acc - C.to(tl.float32), inside)
        scaled = s_b[:, None] * acc
        C = rounded(scaled, dtype)
        if dtype != tl.float32:
            C_lo = rounded(scaled - C.to(tl.float32), dtype)
    steps = tl.cdiv(last - first, BLOCK_N)
    for step in range(0, steps):
        # Upwards: what was read last is surest to be in L2.
        offs_n = first + (steps - 1 - step) * BLOCK_N + rows
        write_tile(
            w_ptr, A_up_ptr, B_up_ptr, A, A_lo, C, C_lo, out_ptr, offs_n, offs_k, N, K, stride_wn, stride_wk,
            R_A, R_B, PRECISION, BLOCK_A, BLOCK_B,
        )  # fmt: skip


@triton.jit
def write_vectors(
    bias_ptr, A_up_ptr, B_down_ptr, B_up_ptr, A_down_bias_ptr, A_up_bias_ptr, B_down_bias_ptr, B_up_bias_ptr,
    s_a, s_b, d_ptr, b_ptr, first, last, N,
    R_A: tl.constexpr, R_B: tl.constexpr, dtype: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Rows first to last of b, which is one more column of W, and likewise d.

    Projections are rounded to W's dtype here too: where b0 cancels W0 x, it is under the same ones.
    """
    offs_a, offs_b, rows = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N).to(tl.int64)
    d_a = tl.zeros((BLOCK_A,), tl.float32)
    d_b = tl.zeros((BLOCK_B,), tl.float32)
    if A_down_bias_ptr is not None:
        d_a += tl.load(A_down_bias_ptr + offs_a, mask=offs_a < R_A, other=0.0).to(tl.float32)
    if B_down_bias_ptr is not None:
        d_b += tl.load(B_down_bias_ptr + offs_b, mask=offs_b < R_B, other=0.0).to(tl.float32)
    if bias_ptr is not None and R_B > 0:
        for n in range(0, N, BLOCK_N):
            B_down = load_tile(B_down_ptr, offs_b.to(tl.int64), n + rows, R_B, N, dtype).to(tl.float32)
            b0 = tl.load(bias_ptr + n + rows, mask=n + rows < N, other=0.0).to(tl.float32)
            d_b += tl.sum(B_down * b0[None, :], 1)
    if d_ptr is not None:
        tl.store(d_ptr + offs_a, d_a, mask=(offs_a < R_A) & (first == 0))
        tl.store(d_ptr + R_A + offs_b, d_b, mask=(offs_b < R_B) & (first == 0))
    for n in range(first, last, BLOCK_N):
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
            A_up = load_tile(A_up_ptr, offs_n, offs_a, N, R_A, dtype).to(tl.float32)
            b += s_a * tl.sum(A_up * d_a[None, :], 1)
        if R_B > 0 and (bias_ptr is not None or B_down_bias_ptr is not None):
            B_up = load_tile(B_up_ptr, offs_n, offs_b, N, R_B, dtype).to(tl.float32)
            b += s_b * tl.sum(B_up * d_b[None, :], 1)
        store(b_ptr + offs_n, b, mask_n)


@triton.jit
def effective_kernel(
    w_ptr,  # W0 [N, K] with strides
    bias_ptr, A_down_ptr, A_up_ptr, B_down_ptr, B_up_ptr,  # None where absent
    A_down_bias_ptr, A_up_bias_ptr, B_down_bias_ptr, B_up_bias_ptr,
    scale_a, scale_b,
    D_ptr,  # [R, K], in low precision [R + r_b, K], written, or None
    d_ptr,  # [R] fp32, written, or None
    b_ptr,  # [N], written, or None where it is 0
    out_ptr,  # W [N, K] contiguous, written
    N, K,
    rows_of_split,  # whole blocks
    stride_wn, stride_wk,
    R_A: tl.constexpr, R_B: tl.constexpr,  # the ranks: their rows of A_up and B_up are loaded as wide as they are
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr,  # whether scale_a, scale_b are pointers
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    block, blocks = tl.program_id(0), tl.cdiv(K, BLOCK_K)
    first = tl.program_id(1).to(tl.int64) * rows_of_split
    last = tl.minimum(first + rows_of_split, N)
    s_a, s_b = scalar(scale_a, LOADED_A), scalar(scale_b, LOADED_B)
    if block < blocks:
        offs_k = block.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        write_columns(
            w_ptr, A_down_ptr, A_up_ptr, B_down_ptr, B_up_ptr, s_a, s_b, D_ptr, out_ptr, offs_k, first, last,
            N, K, stride_wn, stride_wk, R_A, R_B, PRECISION, BLOCK_N, BLOCK_K, BLOCK_A, BLOCK_B,
        )  # fmt: skip
    else:
        if b_ptr is not None:
            write_vectors(
                bias_ptr, A_up_ptr, B_down_ptr, B_up_ptr,
                A_down_bias_ptr, A_up_bias_ptr, B_down_bias_ptr, B_up_bias_ptr,
                s_a, s_b, d_ptr, b_ptr, first, last, N,
                R_A, R_B, w_ptr.dtype.element_ty, BLOCK_N, BLOCK_A, BLOCK_B,
            )  # fmt: skip


def effective(
    weight: Tensor, bias: Tensor | None, adapters: Mapping[str, Tensor | None], scales: Scales,
    D: Tensor | None, d: Tensor | None, b: Tensor | None, out: Tensor, splits: int, config: Skinny, precision: str,
) -> Launch:  # fmt: skip
    """Writes W [N, K], b [N], and where they are not None D and d; in so many ranges of rows."""
    N, a = len(weight), adapters
    r_a, r_b = (0 if down is None else len(down) for down in (a["A_down"], a["B_down"]))
    return Launch.of(
        effective_kernel, (cdiv(weight.shape[1], config.BLOCK_COLUMNS) + (b is not None), splits), config,
        w_ptr=weight, bias_ptr=bias,
        A_down_ptr=a["A_down"], A_up_ptr=a["A_up"], B_down_ptr=a["B_down"], B_up_ptr=a["B_up"],
        A_down_bias_ptr=a["A_down_bias"], A_up_bias_ptr=a["A_up_bias"],
        B_down_bias_ptr=a["B_down_bias"], B_up_bias_ptr=a["B_up_bias"],
        D_ptr=D, d_ptr=d, b_ptr=b, out_ptr=out,
        rows_of_split=cdiv(cdiv(N, splits), config.BLOCK_ROWS) * config.BLOCK_ROWS,
        **_of_both(weight, r_a, r_b, scales, config, precision),
    )  # fmt: skip


@triton.jit
def rebuild_kernel(
    w_ptr,  # W0 [N, K] with strides
    A_up_ptr, B_up_ptr,  # None where absent
    scale_a, scale_b,
    D_ptr,  # what `effective` wrote
    out_ptr,  # W [N, K] contiguous, written
    N, K,
    stride_wn, stride_wk,
    R_A: tl.constexpr, R_B: tl.constexpr,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr,  # whether scale_a, scale_b are pointers
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    dtype = w_ptr.dtype.element_ty
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    A = None
    A_lo = None
    C = None
    C_lo = None
    if R_A > 0:
        A = load_tile(D_ptr, tl.arange(0, BLOCK_A).to(tl.int64), offs_k, R_A, K, tl.float32)
        A *= scalar(scale_a, LOADED_A)[:, None]
        if dtype != tl.float32:
            A_lo = rounded(A - rounded(A, dtype).to(tl.float32), dtype)
            A = rounded(A, dtype)
    if R_B > 0:
        offs_b, C_ptr = tl.arange(0, BLOCK_B).to(tl.int64), D_ptr + tl.full((1, 1), R_A, tl.int64) * K
        C = load_tile(C_ptr, offs_b, offs_k, R_B, K, tl.float32)
        if dtype != tl.float32:
            C += load_tile(C_ptr + tl.full((1, 1), R_B, tl.int64) * K, offs_b, offs_k, R_B, K, tl.float32)
        C *= scalar(scale_b, LOADED_B)[:, None]
        if dtype != tl.float32:
            C_lo = rounded(C - rounded(C, dtype).to(tl.float32), dtype)
            C = rounded(C, dtype)
    write_tile(
        w_ptr, A_up_ptr, B_up_ptr, A, A_lo, C, C_lo, out_ptr, offs_n, offs_k, N, K, stride_wn, stride_wk,
        R_A, R_B, PRECISION, BLOCK_A, BLOCK_B,
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


def _of_both(weight: Tensor, r_a: int, r_b: int, scales: Scales, config: Skinny, precision: str) -> dict[str, Any]:
    """The arguments that both kernels have."""
    (N, K), (s_a, s_b) = weight.shape, scales
    return {
        **{"scale_a": s_a, "scale_b": s_b, "N": N, "K": K, "R_A": r_a, "R_B": r_b},
        **{"stride_wn": weight.stride(0), "stride_wk": weight.stride(1)},
        **{"LOADED_A": isinstance(s_a, Tensor), "LOADED_B": isinstance(s_b, Tensor)},
        # Three products in tf32 keep what one would lose: the GEMM alone rounds W to tf32.
        "PRECISION": "tf32x3" if precision == "tf32" else precision,
        **{"BLOCK_N": config.BLOCK_ROWS, "BLOCK_K": config.BLOCK_COLUMNS},
        **{"BLOCK_A": rank_block(r_a), "BLOCK_B": rank_block(r_b)},
    }

"""The last kernels of a backward: `reduce` sums partial sums into gradients; dB_down takes two more, a pass over W0.

From grad_z, over P blocks of rows:   g = sum_m G [P, N], z = sum_m dZ [P, R], scales [P, R + 2]
From sum_rows, over splits of rows:   dU^T [Q, R, N], and dD [S, R, K], whose last r_b rows are T

    dA_up = s_a dU_a    dA_down = dD_a    da_u = s_a g    da_d = z_a    ds_a from scales    (b likewise)
    db0 = g + z_b B_down                  dB_down = T W0^T + z_b b0^T, T in two parts where products round it

`reduce` is one launch for all that it sums, T [r_b, K] and z_b [r_b] too: a program's number tells its job. Then
`through_weight` leaves T W0^T in partial sums over ranges of K, so that a small W0 has enough programs, and `finish`
adds them. Every sum runs in the same order each time.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import Reduce, Skinny, cdiv, rank_block
from .language import dot, leading, scalar, store, sum_of_partials
from .launch import Launch, scale_arguments


@triton.jit
def up_gradients(
    dU_ptr, scale_a, scale_b, dA_up_ptr, dB_up_ptr, pid, Q, N, r_a, r_b,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dA_up [N, r_a] and dB_up [N, r_b] at one block of the R N elements of dU^T."""
    offs, size = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), tl.full((1,), r_a + r_b, tl.int64) * N
    inside = offs < size
    dU = sum_of_partials(dU_ptr, Q, size, offs, inside, BLOCK_P)
    r, n = offs // N, offs % N
    if dA_up_ptr is not None:
        store(dA_up_ptr + n * r_a + r, scalar(scale_a, LOADED_A) * dU, inside & (r < r_a))
    if dB_up_ptr is not None:
        store(dB_up_ptr + n * r_b + r - r_a, scalar(scale_b, LOADED_B) * dU, inside & (r >= r_a))


@triton.jit
def down_gradients(
    dD_ptr, dA_down_ptr, T_ptr, pid, S, K, r_a, r_b, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dA_down [r_a, K] and T [r_b, K] at one block of the R K elements of dD."""
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    of_a, size = tl.full((1,), r_a, tl.int64) * K, tl.full((1,), r_a + r_b, tl.int64) * K
    dD = sum_of_partials(dD_ptr, S, size, offs, offs < size, BLOCK_P)
    if dA_down_ptr is not None:
        store(dA_down_ptr + offs, dD, offs < of_a)
    if T_ptr is not None:
        tl.store(T_ptr + offs - of_a, dD, mask=(offs >= of_a) & (offs < size))


@triton.jit
def gradients_of_columns(
    g_ptr, z_sums_ptr, B_down_ptr, scale_a, scale_b, dbias_ptr, dA_up_bias_ptr, dB_up_bias_ptr,
    pid, P, N, r_a, r_b,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """db0, da_u and db_u [N] at one block."""
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = offs < N
    g = sum_of_partials(g_ptr, P, N, offs, inside, BLOCK_P)
    if dA_up_bias_ptr is not None:
        store(dA_up_bias_ptr + offs, scalar(scale_a, LOADED_A) * g, inside)
    if dB_up_bias_ptr is not None:
        store(dB_up_bias_ptr + offs, scalar(scale_b, LOADED_B) * g, inside)
    if dbias_ptr is not None:
        if B_down_ptr is not None:
            for r in range(0, r_b, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
                mask_r = offs_r < r_b
                z = sum_of_partials(z_sums_ptr, P, r_a + r_b, r_a + offs_r, mask_r, BLOCK_P)
                down_ptrs = B_down_ptr + offs_r[:, None] * N + offs[None, :]
                B_down = tl.load(down_ptrs, mask=mask_r[:, None] & inside[None, :], other=0.0).to(tl.float32)
                g += tl.sum(z[:, None] * B_down, 0)
        store(dbias_ptr + offs, g, inside)


@triton.jit
def gradients_of_ranks(
    z_sums_ptr, scales_ptr, dA_down_bias_ptr, dB_down_bias_ptr, z_ptr, dscale_a_ptr, dscale_b_ptr,
    P, r_a, r_b, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """da_d [r_a], db_d and z_b [r_b], ds_a and ds_b."""
    R = r_a + r_b
    if dA_down_bias_ptr is not None or dB_down_bias_ptr is not None or z_ptr is not None:
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R).to(tl.int64)
            z = sum_of_partials(z_sums_ptr, P, R, offs_r, offs_r < R, BLOCK_P)
            if dA_down_bias_ptr is not None:
                store(dA_down_bias_ptr + offs_r, z, offs_r < r_a)
            if dB_down_bias_ptr is not None:
                store(dB_down_bias_ptr + offs_r - r_a, z, (offs_r >= r_a) & (offs_r < R))
            if z_ptr is not None:
                tl.store(z_ptr + offs_r - r_a, z, mask=(offs_r >= r_a) & (offs_r < R))
    if scales_ptr is not None:
        ds_a = tl.zeros((BLOCK_R,), tl.float32)
        ds_b = tl.zeros((BLOCK_R,), tl.float32)
        for r in range(0, R + 2, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            ds = sum_of_partials(scales_ptr, P, R + 2, offs_r, offs_r < R + 2, BLOCK_P)
            of_a = (offs_r < r_a) | (offs_r == R)
            ds_a += tl.where(of_a, ds, 0.0)
            ds_b += tl.where(of_a, 0.0, ds)
        if dscale_a_ptr is not None:
            store(dscale_a_ptr, tl.sum(ds_a, 0), None)
        if dscale_b_ptr is not None:
            store(dscale_b_ptr, tl.sum(ds_b, 0), None)


# The number of rows must not decide what is compiled: a last short batch would wait for it.
@triton.jit(do_not_specialize=["P", "Q", "S", "end_up", "end_down", "end_columns"])
def reduce_kernel(
    dU_ptr,  # partial sums, None where nothing needs them
    g_ptr,
    z_sums_ptr,
    scales_ptr,
    dD_ptr,
    B_down_ptr,  # [r_b, N], or None
    scale_a,
    scale_b,
    dA_down_ptr,  # gradients, None where not wanted
    dA_up_ptr,
    dB_up_ptr,
    dA_down_bias_ptr,
    dA_up_bias_ptr,
    dB_down_bias_ptr,
    dB_up_bias_ptr,
    dscale_a_ptr,
    dscale_b_ptr,
    dbias_ptr,
    T_ptr,  # [r_b, K] fp32, or None
    z_ptr,  # [r_b] fp32, or None
    end_up,  # the first program number after each job
    end_down,
    end_columns,
    P,
    N,
    K,
    r_a,
    r_b,
    Q,
    S,
    LOADED_A: tl.constexpr,  # whether scale_a is a pointer
    LOADED_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < end_up:
        if dU_ptr is not None:
            up_gradients(
                dU_ptr, scale_a, scale_b, dA_up_ptr, dB_up_ptr, pid, Q, N, r_a, r_b,
                LOADED_A, LOADED_B, BLOCK_E, BLOCK_P,
            )  # fmt: skip
    elif pid < end_down:
        if dD_ptr is not None:
            down_gradients(dD_ptr, dA_down_ptr, T_ptr, pid - end_up, S, K, r_a, r_b, BLOCK_E, BLOCK_P)
    elif pid < end_columns:
        if g_ptr is not None:
            gradients_of_columns(
                g_ptr, z_sums_ptr, B_down_ptr, scale_a, scale_b, dbias_ptr, dA_up_bias_ptr, dB_up_bias_ptr,
                pid - end_down, P, N, r_a, r_b, LOADED_A, LOADED_B, BLOCK_E, BLOCK_R, BLOCK_P,
            )  # fmt: skip
    else:
        gradients_of_ranks(
            z_sums_ptr, scales_ptr, dA_down_bias_ptr, dB_down_bias_ptr, z_ptr, dscale_a_ptr, dscale_b_ptr,
            P, r_a, r_b, BLOCK_R, BLOCK_P,
        )  # fmt: skip


@triton.jit
def through_weight_kernel(
    T_ptr,  # [r_b, K] fp32
    w_ptr,  # W0 [N, K] with strides
    partials_ptr,  # [splits, r_b, N] fp32, written
    N,
    K,
    r_b,
    columns_of_split,  # whole blocks
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    offs_r = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < r_b
    dtype = w_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for k in range(0, columns_of_split, BLOCK_K):
        offs_k = split * columns_of_split + k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        T_ptrs = T_ptr + offs_r[:, None] * K + offs_k[None, :]
        T = tl.load(T_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if dtype == tl.float16:
            # T is a sum over all rows and may pass 65504; tf32 has fp32's range and holds float16 exactly.
            hi = leading(T, tl.float32, "tf32")
            acc = dot(hi, w.to(tl.float32), acc, "tf32")
            acc = dot(T - hi, w.to(tl.float32), acc, "tf32")
        else:
            hi = leading(T, dtype, PRECISION)
            acc = dot(hi, w, acc, PRECISION)
            if dtype != tl.float32 or PRECISION == "tf32":
                acc = dot(leading(T - hi.to(tl.float32), dtype, PRECISION), w, acc, PRECISION)
    partials_ptrs = partials_ptr + (split * r_b + offs_r)[:, None] * N + offs_n[None, :]
    tl.store(partials_ptrs, acc, mask=mask_r[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["splits"])
def finish_kernel(
    partials_ptr,  # [splits, r_b, N] fp32
    z_ptr,  # [r_b] fp32, or None
    bias_ptr,  # b0 [N]
    dB_down_ptr,  # [r_b, N], written
    splits,
    N,
    r_b,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs, size = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), tl.full((1,), r_b, tl.int64) * N
    inside = offs < size
    dB_down = sum_of_partials(partials_ptr, splits, size, offs, inside, BLOCK_P)
    if z_ptr is not None:
        b0 = tl.load(bias_ptr + offs % N, mask=inside, other=0.0).to(tl.float32)
        dB_down += tl.load(z_ptr + offs // N, mask=inside, other=0.0) * b0
    store(dB_down_ptr + offs, dB_down, inside)


# Every gradient it writes; dx is the GEMM's.
GRADIENTS = (
    *("A_down", "A_up", "B_down", "B_up"),
    *("A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias", "scale_a", "scale_b", "bias"),
)


class Partials(NamedTuple):
    """What `grad_z` and `sum_rows` leave, in fp32; None where nothing needs it."""

    dU: Tensor | None  # [Q, R, N]: transposed
    g: Tensor | None  # [P, N]
    z_sums: Tensor | None  # [P, R]
    scales: Tensor | None  # [P, R + 2]
    dD: Tensor | None  # [S, R, K]


def reduce(
    partials: Partials,
    P: int,
    B_down: Tensor | None,
    scales: tuple[float | Tensor, float | Tensor],
    shape: tuple[int, int, int, int],
    grads: dict[str, Tensor],
    T: Tensor | None,
    z_b: Tensor | None,
    config: Reduce,
) -> Launch:
    """Fills grads, named as operands, but B_down, and T [r_b, K] and z_b [r_b] where they are not None, from P partial
    sums; shape is (N, K, r_a, r_b)."""
    N, K, r_a, r_b = shape
    wanted = {**grads, "T": T, "z_b": z_b}

    def programs(names: tuple[str, ...], size: int, block: int) -> int:
        return cdiv(size, block) if any(wanted.get(name) is not None for name in names) else 0

    counts = (
        programs(("A_up", "B_up"), N * (r_a + r_b), config.BLOCK_E),
        programs(("A_down", "T"), (r_a if T is None else r_a + r_b) * K, config.BLOCK_E),
        programs(("bias", "A_up_bias", "B_up_bias"), N, config.BLOCK_E),
        programs(("A_down_bias", "B_down_bias", "z_b", "scale_a", "scale_b"), 1, 1),
    )
    ends = list(accumulate(counts))
    arguments = {
        **{"dU_ptr": partials.dU, "g_ptr": partials.g, "z_sums_ptr": partials.z_sums, "scales_ptr": partials.scales},
        **{"dD_ptr": partials.dD, "B_down_ptr": B_down},
        **scale_arguments(scales),
        **{f"d{name}_ptr": grads.get(name) for name in GRADIENTS if name != "B_down"},
        **{"T_ptr": T, "z_ptr": z_b},
        **dict(zip(("end_up", "end_down", "end_columns"), ends, strict=False)),
        **{"P": P, "Q": _length(partials.dU), "S": _length(partials.dD)},
        **{"N": N, "K": K, "r_a": r_a, "r_b": r_b},
        **{"BLOCK_R": rank_block(r_b), "BLOCK_E": config.BLOCK_E, "BLOCK_P": config.BLOCK_P},
    }
    return Launch.of(reduce_kernel, (ends[-1],), arguments, config)


def _length(t: Tensor | None) -> int:
    return 0 if t is None else len(t)


def through_weight(T: Tensor, weight: Tensor, partials: Tensor, config: Skinny, precision: str) -> Launch:
    """Partial sums [splits, r_b, N] of T W0^T for T [r_b, K] and weight [N, K]."""
    (r_b, K), N, (splits, _, _) = T.shape, weight.shape[0], partials.shape
    arguments = {
        **{"T_ptr": T, "w_ptr": weight, "partials_ptr": partials, "N": N, "K": K, "r_b": r_b},
        **{"columns_of_split": cdiv(cdiv(K, splits), config.BLOCK_COLUMNS) * config.BLOCK_COLUMNS},
        **{"stride_wn": weight.stride(0), "stride_wk": weight.stride(1), "PRECISION": precision},
        **{"BLOCK_N": config.BLOCK_ROWS, "BLOCK_K": config.BLOCK_COLUMNS, "BLOCK_R": rank_block(r_b)},
    }
    grid = (cdiv(N, config.BLOCK_ROWS), splits, cdiv(r_b, rank_block(r_b)))
    return Launch.of(through_weight_kernel, grid, arguments, config)


def finish(partials: Tensor, z_b: Tensor | None, bias: Tensor | None, dB_down: Tensor, config: Reduce) -> Launch:
    """dB_down [r_b, N] for what `through_weight` and `reduce` wrote; z_b is None where bias is."""
    splits, r_b, N = partials.shape
    arguments = {
        **{"partials_ptr": partials, "z_ptr": z_b, "bias_ptr": bias, "dB_down_ptr": dB_down},
        **{"splits": splits, "N": N, "r_b": r_b, "BLOCK_E": config.BLOCK_E, "BLOCK_P": config.BLOCK_P},
    }
    return Launch.of(finish_kernel, (cdiv(r_b * N, config.BLOCK_E),), arguments, config)

"""The last kernels of a backward. `reduce` adds partial sums up to gradients; dB_down takes one more, over W0.

From grad_z, over P blocks of rows:   g = sum_m G [P, N], z = sum_m dZ [P, R], scales [P, R + 2]
From sum_rows, over splits of rows:   dU^T [Q, R, N], and dD [S, R, K], whose last r_b rows are T

    dA_up = s_a dU_a    dA_down = dD_a    da_u = s_a g    da_d = z_a    ds_a from scales    (b likewise)
    db0 = g + z_b B_down                  dB_down = T W0^T + z_b b0^T, T in two parts where products round it

`reduce` is one launch for all its sums, T [r_b, K] and z_b [r_b] included; the program number selects the job. Then
`through_weight` computes T W0^T in partial sums over ranges of K, so that a small W0 has enough programs too. Of the
programs that share a block of columns of dB_down, the one that ends last adds their sums up. Every sum is added in the
same order each time, whoever adds it.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import Reduce, Skinny, cdiv, rank_block
from .language import begin, dot, leading, scalar, store, sum_of_partials
from .launch import Launch, Scales


@triton.jit
def up_gradients(
    dU_ptr, scale_a, scale_b, dA_up_ptr, dB_up_ptr, pid, Q, N, r_a, r_b,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dA_up [N, r_a] and dB_up [N, r_b] from one block of the R N elements of dU^T."""
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
    """dA_down [r_a, K] and T [r_b, K] from one block of the R K elements of dD."""
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
    """One block of the N elements of db0, da_u and db_u."""
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
    z_sums_ptr, scales_ptr, dA_down_bias_ptr, dB_down_bias_ptr, z_ptr, ended_ptr, dscale_a_ptr, dscale_b_ptr,
    P, N, r_a, r_b, COUNTED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """da_d [r_a], db_d and z_b [r_b], ds_a and ds_b; and zeros for `through_weight` to count from."""
    R = r_a + r_b
    if ended_ptr is not None:
        blocks = tl.cdiv(N, COUNTED) * tl.cdiv(r_b, BLOCK_R)
        for block in range(0, blocks, BLOCK_R):
            offs = block + tl.arange(0, BLOCK_R)
            tl.store(ended_ptr + offs, tl.zeros((BLOCK_R,), tl.int32), mask=offs < blocks)
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


# The counts that follow from M are not specialized: else a last, short batch would be compiled anew.
@triton.jit(do_not_specialize=["P", "Q", "S", "end_up", "end_down", "end_columns"])
def reduce_kernel(
    dU_ptr, g_ptr, z_sums_ptr, scales_ptr, dD_ptr,  # partial sums, None where nothing needs them
    B_down_ptr,  # [r_b, N], or None
    scale_a, scale_b,
    dA_down_ptr, dA_up_ptr, dB_up_ptr,  # gradients, written, None where not wanted
    dA_down_bias_ptr, dA_up_bias_ptr, dB_down_bias_ptr, dB_up_bias_ptr,
    dscale_a_ptr, dscale_b_ptr, dbias_ptr,
    T_ptr,  # [r_b, K] fp32, written, or None
    z_ptr,  # [r_b] fp32, written, or None
    ended_ptr,  # [blocks] int32, zeros are written, or None
    end_up, end_down, end_columns,  # the first program number after each job
    P, Q, S, N, K, r_a, r_b,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr,  # whether scale_a, scale_b are pointers
    COUNTED: tl.constexpr,  # columns of dB_down for which `through_weight` has one count
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
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
            z_sums_ptr, scales_ptr, dA_down_bias_ptr, dB_down_bias_ptr, z_ptr, ended_ptr, dscale_a_ptr, dscale_b_ptr,
            P, N, r_a, r_b, COUNTED, BLOCK_R, BLOCK_P,
        )  # fmt: skip


# Partial sums that through_weight adds at a time: 64 registers a thread.
_HELD = 8192
# The gradients that a backward writes beside dx, named as operands.
GRADIENTS = (
    *("A_down", "A_up", "B_down", "B_up"),
    *("A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias", "scale_a", "scale_b", "bias"),
)


class Partials(NamedTuple):
    """What `grad_z` and `sum_rows` left, in fp32; None where nothing needs it."""

    dU: Tensor | None  # [Q, R, N]: transposed
    g: Tensor | None  # [P, N]
    z_sums: Tensor | None  # [P, R]
    scales: Tensor | None  # [P, R + 2]
    dD: Tensor | None  # [S, R, K]


def reduce(
    partials: Partials, P: int, B_down: Tensor | None, scales: Scales, shape: tuple[int, int, int, int],
    grads: dict[str, Tensor], T: Tensor | None, z_b: Tensor | None, ended: Tensor | None,
    config: Reduce, through: Skinny,
) -> Launch:  # fmt: skip
    """Fills grads (named as operands; B_down is left to `through_weight`) and, where they are not None, T [r_b, K],
    z_b [r_b] and ended, which becomes zero, from P partial sums; shape is (N, K, r_a, r_b), and through the tile of
    `through_weight`."""
    (N, K, r_a, r_b), (s_a, s_b), grad = shape, scales, grads.get
    dU, g, z_sums, scale_sums, dD = partials

    def programs(elements: int, *written: Tensor | None) -> int:
        return cdiv(elements, config.BLOCK_E) if any(t is not None for t in written) else 0

    end_up, end_down, end_columns, end = accumulate((
        programs(N * (r_a + r_b), grad("A_up"), grad("B_up")),
        programs((r_a if T is None else r_a + r_b) * K, grad("A_down"), T),
        programs(N, grad("bias"), grad("A_up_bias"), grad("B_up_bias")),
        programs(1, grad("A_down_bias"), grad("B_down_bias"), z_b, ended, grad("scale_a"), grad("scale_b")),
    ))  # fmt: skip
    return Launch.of(
        reduce_kernel, (end,), config,
        dU_ptr=dU, g_ptr=g, z_sums_ptr=z_sums, scales_ptr=scale_sums, dD_ptr=dD,
        B_down_ptr=B_down,
        scale_a=s_a, scale_b=s_b,
        dA_down_ptr=grad("A_down"), dA_up_ptr=grad("A_up"), dB_up_ptr=grad("B_up"),
        dA_down_bias_ptr=grad("A_down_bias"), dA_up_bias_ptr=grad("A_up_bias"),
        dB_down_bias_ptr=grad("B_down_bias"), dB_up_bias_ptr=grad("B_up_bias"),
        dscale_a_ptr=grad("scale_a"), dscale_b_ptr=grad("scale_b"), dbias_ptr=grad("bias"),
        T_ptr=T, z_ptr=z_b, ended_ptr=ended,
        end_up=end_up, end_down=end_down, end_columns=end_columns,
        P=P, Q=0 if dU is None else len(dU), S=0 if dD is None else len(dD), N=N, K=K, r_a=r_a, r_b=r_b,
        LOADED_A=isinstance(s_a, Tensor), LOADED_B=isinstance(s_b, Tensor),
        COUNTED=through.BLOCK_ROWS, BLOCK_R=rank_block(r_b), BLOCK_E=config.BLOCK_E, BLOCK_P=config.BLOCK_P,
    )  # fmt: skip


@triton.jit
def through_weight_kernel(
    T_ptr,  # [r_b, K] fp32
    w_ptr,  # W0 [N, K] with strides
    z_ptr,  # [r_b] fp32, or None where b0 is
    bias_ptr,  # b0 [N]
    partials_ptr,  # [splits, r_b, N] fp32, written and read
    ended_ptr,  # [blocks] int32: how many programs of each block of dB_down have ended, at first 0
    dB_down_ptr,  # [r_b, N], written
    N, K, r_b,
    columns_of_split,  # whole blocks
    stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    splits, block = tl.num_programs(1), tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
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
    inside, offs = mask_r[:, None] & mask_n[None, :], offs_r[:, None] * N + offs_n[None, :]
    tl.store(partials_ptr + split * r_b * N + offs, acc, mask=inside)
    # All threads have stored before one of them counts; whoever counts last sees what all programs before it stored.
    tl.debug_barrier()
    if tl.atomic_add(ended_ptr + block, 1, sem="acq_rel") == splits - 1:
        dB_down = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        ptrs, size = partials_ptr + offs, tl.full((1, 1), r_b, tl.int64) * N
        for p in range(0, splits, BLOCK_P):
            for further in tl.static_range(BLOCK_P):  # their loads are under way at once
                dB_down += tl.load(ptrs, mask=inside & (p + further < splits), other=0.0)
                ptrs += size
        if z_ptr is not None:
            b0 = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            dB_down += tl.load(z_ptr + offs_r, mask=mask_r, other=0.0)[:, None] * b0[None, :]
        store(dB_down_ptr + offs, dB_down, inside)


def blocks_of(r_b: int, N: int, config: Skinny) -> int:
    """How many blocks of dB_down `through_weight` computes."""
    return cdiv(N, config.BLOCK_ROWS) * cdiv(r_b, rank_block(r_b))


def through_weight(
    T: Tensor, weight: Tensor, z_b: Tensor | None, bias: Tensor | None, partials: Tensor, ended: Tensor,
    dB_down: Tensor, config: Skinny, precision: str,
) -> Launch:  # fmt: skip
    """dB_down [r_b, N] = T W0^T + z_b b0^T for T [r_b, K], weight [N, K], z_b [r_b], None where bias is.

    partials [splits, r_b, N] and ended [blocks], zeros, are written on the way."""
    (r_b, K), N, splits = T.shape, weight.shape[0], len(partials)
    BLOCK_N, BLOCK_K, BLOCK_R = config.BLOCK_ROWS, config.BLOCK_COLUMNS, rank_block(r_b)
    return Launch.of(
        through_weight_kernel, (cdiv(N, BLOCK_N), splits, cdiv(r_b, BLOCK_R)), config,
        T_ptr=T, w_ptr=weight, z_ptr=z_b, bias_ptr=bias, partials_ptr=partials, ended_ptr=ended, dB_down_ptr=dB_down,
        N=N, K=K, r_b=r_b, columns_of_split=cdiv(cdiv(K, splits), BLOCK_K) * BLOCK_K,
        stride_wn=weight.stride(0), stride_wk=weight.stride(1),
        PRECISION=precision, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_R=BLOCK_R,
        BLOCK_P=max(1, _HELD // (BLOCK_R * BLOCK_N)),
    )  # fmt: skip

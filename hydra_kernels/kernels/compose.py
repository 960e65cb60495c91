"""What a forward needs of the adapters, element by element: one launch, in which a program's number tells its job.

r_a, r_b ranks, R = r_a + r_b. From `skinny.sum_rows` over W0, in partial sums over ranges of its N rows:
    C = B_down W0 [S, r_b, K]    B_down b0 [S, r_b]

    D = [A_down; C] in x's dtype    rest = C - its rows of D    d = [a_d, B_down b0 + b_d]
    U = [s_a A_up, s_b B_up]        u = s_a a_u + s_b b_u, and b0 where wanted
"""

from __future__ import annotations

from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from .configs import Reduce, cdiv
from .language import leading, scalar, store, sum_of_partials
from .launch import Launch, scale_arguments


@triton.jit
def rows_of_C(
    C_ptr, D_ptr, rest_ptr, pid, S, K, r_a, r_b,
    PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """C in D's last r_b rows, and its rest, at one block of r_b K elements."""
    offs, size = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), tl.full((1,), r_b, tl.int64) * K
    inside = offs < size
    C = sum_of_partials(C_ptr, S, size, offs, inside, BLOCK_P)
    if rest_ptr is not None:
        hi = leading(C, D_ptr.dtype.element_ty, PRECISION).to(tl.float32)
        store(rest_ptr + offs, C - hi, inside)
        C = hi
    store(D_ptr + tl.full((1,), r_a, tl.int64) * K + offs, C, inside)


@triton.jit
def rows_of_A(A_down_ptr, D_ptr, pid, K, r_a, BLOCK_E: tl.constexpr):
    """A_down in D's first r_a rows, at one block of r_a K elements."""
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = offs < tl.full((1,), r_a, tl.int64) * K
    store(D_ptr + offs, tl.load(A_down_ptr + offs, mask=inside, other=0.0).to(tl.float32), inside)


@triton.jit
def scaled_up(
    A_up_ptr, B_up_ptr, scale_a, scale_b, U_ptr, pid, N, r_a, r_b,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """U at one block of N R elements."""
    R = r_a + r_b
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside, n, r = offs < tl.full((1,), R, tl.int64) * N, offs // R, offs % R
    U = tl.zeros((BLOCK_E,), tl.float32)
    if A_up_ptr is not None:
        A_up = tl.load(A_up_ptr + n * r_a + r, mask=inside & (r < r_a), other=0.0).to(tl.float32)
        U += A_up * scalar(scale_a, LOADED_A)
    if B_up_ptr is not None:
        B_up = tl.load(B_up_ptr + n * r_b + r - r_a, mask=inside & (r >= r_a), other=0.0).to(tl.float32)
        U += B_up * scalar(scale_b, LOADED_B)
    store(U_ptr + offs, U, inside)


@triton.jit
def up_bias(
    bias_ptr, A_up_bias_ptr, B_up_bias_ptr, scale_a, scale_b, u_ptr, pid, N,
    WITH_BIAS: tl.constexpr, LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """u at one block of N."""
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = offs < N
    u = tl.zeros((BLOCK_E,), tl.float32)
    if WITH_BIAS:
        u += tl.load(bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if A_up_bias_ptr is not None:
        u += scalar(scale_a, LOADED_A) * tl.load(A_up_bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if B_up_bias_ptr is not None:
        u += scalar(scale_b, LOADED_B) * tl.load(B_up_bias_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    store(u_ptr + offs, u, inside)


@triton.jit
def down_bias(
    A_down_bias_ptr, B_down_bias_ptr, b_sums_ptr, d_ptr, pid, S, r_a, r_b,
    BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """d at one block of R."""
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    of_b = (offs >= r_a) & (offs < r_a + r_b)
    d = tl.zeros((BLOCK_E,), tl.float32)
    if b_sums_ptr is not None:
        d += sum_of_partials(b_sums_ptr, S, r_b, offs - r_a, of_b, BLOCK_P)
    if A_down_bias_ptr is not None:
        d += tl.load(A_down_bias_ptr + offs, mask=offs < r_a, other=0.0).to(tl.float32)
    if B_down_bias_ptr is not None:
        d += tl.load(B_down_bias_ptr + offs - r_a, mask=of_b, other=0.0).to(tl.float32)
    tl.store(d_ptr + offs, d, mask=offs < r_a + r_b)


@triton.jit(do_not_specialize=["S", "end_C", "end_A", "end_U", "end_u"])
def compose_kernel(
    bias_ptr,  # b0 [N], or None
    A_down_ptr,
    A_up_ptr,
    B_up_ptr,
    A_down_bias_ptr,
    A_up_bias_ptr,
    B_down_bias_ptr,
    B_up_bias_ptr,
    scale_a,
    scale_b,
    C_ptr,  # [S, r_b, K] fp32, or None
    b_sums_ptr,  # [S, r_b] fp32, or None
    D_ptr,  # [R, K], written
    rest_ptr,  # [r_b, K], written, or None
    d_ptr,  # [R] fp32, written, or None
    U_ptr,  # [N, R], written
    u_ptr,  # [N], written, or None
    end_C,  # the first program number after each job
    end_A,
    end_U,
    end_u,
    S,
    N,
    K,
    r_a,
    r_b,
    WITH_BIAS: tl.constexpr,  # whether u includes b0
    LOADED_A: tl.constexpr,  # whether scale_a is a pointer
    LOADED_B: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < end_C:
        if C_ptr is not None:
            rows_of_C(C_ptr, D_ptr, rest_ptr, pid, S, K, r_a, r_b, PRECISION, BLOCK_E, BLOCK_P)
    elif pid < end_A:
        if A_down_ptr is not None:
            rows_of_A(A_down_ptr, D_ptr, pid - end_C, K, r_a, BLOCK_E)
    elif pid < end_U:
        scaled_up(A_up_ptr, B_up_ptr, scale_a, scale_b, U_ptr, pid - end_A, N, r_a, r_b, LOADED_A, LOADED_B, BLOCK_E)
    elif pid < end_u:
        if u_ptr is not None:
            up_bias(
                bias_ptr, A_up_bias_ptr, B_up_bias_ptr, scale_a, scale_b, u_ptr, pid - end_U, N,
                WITH_BIAS, LOADED_A, LOADED_B, BLOCK_E,
            )  # fmt: skip
    else:
        if d_ptr is not None:
            down_bias(A_down_bias_ptr, B_down_bias_ptr, b_sums_ptr, d_ptr, pid - end_u, S, r_a, r_b, BLOCK_E, BLOCK_P)


def compose(
    bias: Tensor | None,
    adapters: dict[str, Tensor | None],
    scales: tuple[float | Tensor, float | Tensor],
    C: Tensor | None,
    b_sums: Tensor | None,
    D: Tensor,
    rest: Tensor | None,
    d: Tensor | None,
    U: Tensor,
    u: Tensor | None,
    with_bias: bool,
    config: Reduce,
    precision: str,
) -> Launch:
    """Writes D [R, K], rest [r_b, K], d [R], U [N, R] and u [N]; u includes b0 where with_bias is set."""
    (R, K), N = D.shape, U.shape[0]
    r_b = 0 if C is None else C.shape[1]
    sizes = (r_b * K, (R - r_b) * K, N * R, 0 if u is None else N, 0 if d is None else R)
    *ends, programs = accumulate(cdiv(size, config.BLOCK_E) for size in sizes)
    arguments = {
        "bias_ptr": bias,
        **{f"{name}_ptr": t for name, t in adapters.items() if name != "B_down"},
        **scale_arguments(scales),
        **{"C_ptr": C, "b_sums_ptr": b_sums, "D_ptr": D, "rest_ptr": rest, "d_ptr": d, "U_ptr": U, "u_ptr": u},
        **dict(zip(("end_C", "end_A", "end_U", "end_u"), ends, strict=True)),
        **{"S": 0 if C is None else len(C), "N": N, "K": K, "r_a": R - r_b, "r_b": r_b},
        **{"WITH_BIAS": with_bias, "PRECISION": precision, "BLOCK_E": config.BLOCK_E, "BLOCK_P": config.BLOCK_P},
    }
    return Launch.of(compose_kernel, (programs,), arguments, config)

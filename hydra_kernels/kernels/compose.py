"""What a forward needs of the adapters, made element by element in one launch; the program number selects the job.

r_a, r_b are the ranks, R = r_a + r_b. `skinny.sum_rows` has left S partial sums of C = B_down W0 [r_b, K] and of
B_down b0 [r_b], each over a range of W0's N rows. From them and the adapters:

    D = [A_down; C]             [R, K] in x's dtype        rest = C - (C as rounded in D)    [r_b, K]
    stack = [D; 0; rest]        as `one_pass` reads both, in place of rest
    d = [a_d, B_down b0 + b_d]  [R] in fp32
    U = [s_a A_up, s_b B_up]    [N, R]                     u = s_a a_u + s_b b_u (+ b0)      [N]
"""

from __future__ import annotations

from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from .configs import Reduce, cdiv
from .language import begin, leading, scalar, store, sum_of_partials
from .launch import Launch, Scales


@triton.jit
def rows_of_C(
    C_ptr, D_ptr, rest_ptr, stack_ptr, rest_row, pid, S, K, r_a, r_b,
    PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One block of C's r_b K elements: into D's last r_b rows, and what rounding them lost into rest or stack."""
    offs, size = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), tl.full((1,), r_b, tl.int64) * K
    inside, rows_of_a = offs < size, tl.full((1,), r_a, tl.int64) * K
    C = sum_of_partials(C_ptr, S, size, offs, inside, BLOCK_P)
    if rest_ptr is not None or stack_ptr is not None:
        hi = leading(C, D_ptr.dtype.element_ty, PRECISION).to(tl.float32)
        if stack_ptr is not None:
            store(stack_ptr + rows_of_a + offs, hi, inside)
            store(stack_ptr + tl.full((1,), rest_row, tl.int64) * K + offs, C - hi, inside)
        else:
            store(rest_ptr + offs, C - hi, inside)
        C = hi
    store(D_ptr + rows_of_a + offs, C, inside)


@triton.jit
def rows_of_A(A_down_ptr, D_ptr, stack_ptr, pid, K, r_a, BLOCK_E: tl.constexpr):
    """One block of A_down's r_a K elements, into the first r_a rows of D and stack."""
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = offs < tl.full((1,), r_a, tl.int64) * K
    A_down = tl.load(A_down_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    store(D_ptr + offs, A_down, inside)
    if stack_ptr is not None:
        store(stack_ptr + offs, A_down, inside)


@triton.jit
def rows_of_zeros(stack_ptr, rest_row, pid, K, R, BLOCK_E: tl.constexpr):
    """One block of the zeros between D and rest."""
    offs = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E) + tl.full((1,), R, tl.int64) * K
    store(stack_ptr + offs, tl.zeros((BLOCK_E,), tl.float32), offs < tl.full((1,), rest_row, tl.int64) * K)


@triton.jit
def scaled_up(
    A_up_ptr, B_up_ptr, scale_a, scale_b, U_ptr, pid, N, r_a, r_b,
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One block of U's N R elements."""
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
    """One block of u's N elements."""
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
    """One block of d's R elements."""
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


@triton.jit(do_not_specialize=["S", "end_C", "end_A", "end_U", "end_u", "end_d"])
def compose_kernel(
    bias_ptr,  # b0 [N], or None
    A_down_ptr, A_up_ptr, B_up_ptr, A_down_bias_ptr, A_up_bias_ptr, B_down_bias_ptr, B_up_bias_ptr,  # None where absent
    scale_a, scale_b,
    C_ptr,  # [S, r_b, K] fp32, or None
    b_sums_ptr,  # [S, r_b] fp32, or None
    D_ptr,  # [R, K], written
    rest_ptr,  # [r_b, K], written, or None
    stack_ptr,  # [rest_row + r_b, K], written, or None
    d_ptr,  # [R] fp32, written, or None
    U_ptr,  # [N, R], written
    u_ptr,  # [N], written, or None
    end_C, end_A, end_U, end_u, end_d,  # the first program number after each job
    S, N, K, r_a, r_b, rest_row,
    WITH_BIAS: tl.constexpr,  # whether u includes b0
    LOADED_A: tl.constexpr, LOADED_B: tl.constexpr,  # whether scale_a, scale_b are pointers
    PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    begin(DEPENDENT)
    pid = tl.program_id(0)
    if pid < end_C:
        if C_ptr is not None:
            rows_of_C(
                C_ptr, D_ptr, rest_ptr, stack_ptr, rest_row, pid, S, K, r_a, r_b, PRECISION, BLOCK_E, BLOCK_P
            )  # fmt: skip
    elif pid < end_A:
        if A_down_ptr is not None:
            rows_of_A(A_down_ptr, D_ptr, stack_ptr, pid - end_C, K, r_a, BLOCK_E)
    elif pid < end_U:
        scaled_up(A_up_ptr, B_up_ptr, scale_a, scale_b, U_ptr, pid - end_A, N, r_a, r_b, LOADED_A, LOADED_B, BLOCK_E)
    elif pid < end_u:
        if u_ptr is not None:
            up_bias(
                bias_ptr, A_up_bias_ptr, B_up_bias_ptr, scale_a, scale_b, u_ptr, pid - end_U, N,
                WITH_BIAS, LOADED_A, LOADED_B, BLOCK_E,
            )  # fmt: skip
    elif pid < end_d:
        if d_ptr is not None:
            down_bias(A_down_bias_ptr, B_down_bias_ptr, b_sums_ptr, d_ptr, pid - end_u, S, r_a, r_b, BLOCK_E, BLOCK_P)
    else:
        if stack_ptr is not None:
            rows_of_zeros(stack_ptr, rest_row, pid - end_d, K, r_a + r_b, BLOCK_E)


def compose(
    bias: Tensor | None, adapters: dict[str, Tensor | None], scales: Scales, C: Tensor | None, b_sums: Tensor | None,
    D: Tensor, rest: Tensor | None, stack: Tensor | None, d: Tensor | None, U: Tensor, u: Tensor | None,
    with_bias: bool, config: Reduce, precision: str,
) -> Launch:  # fmt: skip
    """Writes D [R, K], d [R], U [N, R] and u [N]; rest [r_b, K] or stack, whose last r_b rows are the rest; u includes
    b0 where with_bias is set."""
    (R, K), N, (s_a, s_b), a = D.shape, U.shape[0], scales, adapters
    S, r_b = (0, 0) if C is None else C.shape[:2]
    rest_row = R if stack is None else len(stack) - r_b
    sizes = (r_b * K, (R - r_b) * K, N * R, 0 if u is None else N, 0 if d is None else R, (rest_row - R) * K)
    end_C, end_A, end_U, end_u, end_d, programs = accumulate(cdiv(size, config.BLOCK_E) for size in sizes)
    return Launch.of(
        compose_kernel, (programs,), config,
        bias_ptr=bias,
        A_down_ptr=a["A_down"], A_up_ptr=a["A_up"], B_up_ptr=a["B_up"],
        A_down_bias_ptr=a["A_down_bias"], A_up_bias_ptr=a["A_up_bias"],
        B_down_bias_ptr=a["B_down_bias"], B_up_bias_ptr=a["B_up_bias"],
        scale_a=s_a, scale_b=s_b,
        C_ptr=C, b_sums_ptr=b_sums,
        D_ptr=D, rest_ptr=rest, stack_ptr=stack, d_ptr=d, U_ptr=U, u_ptr=u,
        end_C=end_C, end_A=end_A, end_U=end_U, end_u=end_u, end_d=end_d,
        S=S, N=N, K=K, r_a=R - r_b, r_b=r_b, rest_row=rest_row,
        WITH_BIAS=with_bias, LOADED_A=isinstance(s_a, Tensor), LOADED_B=isinstance(s_b, Tensor),
        PRECISION=precision, BLOCK_E=config.BLOCK_E, BLOCK_P=config.BLOCK_P,
    )  # fmt: skip

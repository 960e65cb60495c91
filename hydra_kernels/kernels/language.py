"""What the kernels share on the device: products, rounding, scales, sums of partial sums."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

# The interpreter multiplies bfloat16 as raw bits and truncates where hardware rounds to nearest even.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def begin(DEPENDENT: tl.constexpr):
    """What every kernel does first. Under programmatic dependent launch it has started while others still run.

    It waits until they have ended and all that they wrote is there, and only then lets the next kernel start. So no
    kernel touches memory before every earlier one is done with it.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in fp32."""
    if PRECISION == "ieee" and a.dtype == tl.float32:
        # Each block is summed alone and then added: one chain of additions over the whole inner dimension errs more
        # than twice as much as cuBLAS. `acc * 0.0` and not 0, which the compiler would join into one chain again.
        return acc + tl.dot(a, b, acc * 0.0, input_precision=PRECISION)
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(v, dtype: tl.constexpr):
    """v (fp32) rounded to the nearest value of dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(dtype)


@triton.jit
def in_dtype(v, dtype: tl.constexpr):
    """v, rounded to dtype where it is of another: adapters may be fp32 over weights in low precision."""
    return v if v.dtype == dtype else rounded(v.to(tl.float32), dtype)


@triton.jit
def leading(v, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """The part of v (fp32) that a product in dtype and PRECISION keeps; it would lose v - leading(v)."""
    if dtype == tl.float32:
        if PRECISION == "tf32":
            bits = v.to(tl.int32, bitcast=True)
            v = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return v
    else:
        return rounded(v, dtype)


@triton.jit
def store(ptrs, v, mask):
    """Stores v (fp32), rounded to the dtype that ptrs point to."""
    tl.store(ptrs, rounded(v, ptrs.dtype.element_ty), mask=mask)


@triton.jit
def scalar(s, LOADED: tl.constexpr):
    """A scale in fp32, of shape [1]. s is a number, or a pointer to one where LOADED is set."""
    if LOADED:
        s = tl.load(s)
    return tl.full((1,), s, tl.float32)


@triton.jit
def scale_of_rank(scale_a, scale_b, offs_r, r_a, LOADED_A: tl.constexpr, LOADED_B: tl.constexpr):
    """s_a for the ranks of the parallel branch, s_b for those of the sequential one: fp32, shaped like offs_r."""
    return tl.where(offs_r < r_a, scalar(scale_a, LOADED_A), scalar(scale_b, LOADED_B))


@triton.jit
def sum_of_partials(ptr, P, size, offs, mask, BLOCK_P: tl.constexpr):
    """The elements at offs, summed over P arrays of `size` elements that lie one after the other."""
    total = tl.zeros((offs.shape[0],), tl.float32)
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = (offs_p < P)[:, None] & mask[None, :]
        total += tl.sum(tl.load(ptr + offs_p[:, None] * size + offs[None, :], mask=inside, other=0.0), 0)
    return total

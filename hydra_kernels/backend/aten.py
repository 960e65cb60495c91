"""Backend `aten`: both forms through ATen calls, on any device, in float64 too.

Composed form: R = r_a + r_b, and y0 never exists.
    C = B_down W0    D = [A_down; C] [R, K]    d = [a_d, B_down b0 + b_d] [R]    U = [s_a A_up, s_b B_up] [N, R]
    Z = mask * (x D^T + d) [M, R]              h = x W0^T + Z U^T + (b0 + u),  u = s_a a_u + s_b b_u
Kept form: y0 = x W0^T + b0 is kept.
    Z = mask * ([x A_down^T, y0 B_down^T] + [a_d, b_d])    h = y0 + Z U^T + u
Backward: G = dL/dh [M, N], g = sum_m G [N], dU = G^T Z, dZ = mask * (G U).
    dA_up = s_a dU_a    da_u = s_a g    ds_a = <dU_a, A_up> + a_u . g    da_d = sum_m dZ_a    (b likewise)
    dA_down = dZ_a^T x                  db0 = g + (sum_m dZ_b) B_down
    composed:  dx = G W0 + dZ D                            dB_down = (dZ_b^T x) W0^T + (sum_m dZ_b) b0^T
    kept:      dx = (G + dZ_b B_down) W0 + dZ_a A_down     dB_down = dZ_b^T y0

D and U are held transposed and contiguous, Dt [K, R] and Ut [R, N]: MKL's skinny products are up to twice as fast so.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor
from torch.nn import functional as F

from ..choice import LOW_PRECISION
from .interface import Operands, Saved


def unavailable() -> str | None:
    return None


def refusal(form: str, dtype: torch.dtype, r_b: int) -> str | None:
    if form == "composed" and r_b > 0 and dtype in LOW_PRECISION:
        return f"its composed form would round B_down W0 to {dtype} and lose accuracy that the naive layer keeps"
    return None


def forward(x: Tensor, op: Operands, needs: Set[str], form: str) -> tuple[Tensor, Saved]:
    Ut, u = _stacked_up(op, x.dtype)
    if form == "composed":
        y0 = None
        Dt, d = _composed_down(op, x.dtype)
        Z = _mask_(_affine(x, Dt, d), op)
        # The low-rank part first: the GEMM adds to it before rounding, so small updates survive low precision.
        h = _affine(Z, Ut, _sum(op.bias, u)).addmm_(x, op.weight.t())
    else:
        Dt = None
        y0 = F.linear(x, op.weight, op.bias)
        Z = _mask_(_kept_down(x, y0, op), op)
        h = torch.addmm(y0, Z, Ut)
        if u is not None:
            h += u
    reads_x = "A_down" in needs or ("B_down" in needs and form == "composed")
    return h, Saved(
        x=x if reads_x else None,
        Z=Z if not needs.isdisjoint(("A_up", "B_up", "scale_a", "scale_b")) else None,
        Dt=Dt if "x" in needs else None,
        y0=y0 if "B_down" in needs else None,
    )


def backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> dict[str, Tensor]:
    if not (G.is_contiguous() or G.t().is_contiguous()):
        G = G.contiguous()  # once, where every product would copy an expanded or strided G again
    grads = _output_side(G, op, saved.Z, needs)
    if not needs.isdisjoint(("x", "bias", "A_down", "B_down", "A_down_bias", "B_down_bias")):
        _input_side(grads, G, op, saved, needs, form)
    return {name: grads[name].to(G.dtype if name == "x" else getattr(op, name).dtype) for name in needs}


def _output_side(G: Tensor, op: Operands, Z: Tensor | None, needs: Set[str]) -> dict[str, Tensor]:
    """Gradients of the up projections, their biases and the scales, and g for b0."""
    grads: dict[str, Tensor] = {}
    if Z is not None:
        lo, hi = _columns(op, needs & {"A_up", "scale_a"}, needs & {"B_up", "scale_b"})
        dUt = Z[:, lo:hi].t() @ G
        dU_a, dU_b = dUt[: op.r_a - lo].t(), dUt[op.r_a - lo :].t()
        if "A_up" in needs:
            grads["A_up"] = _scaled(op.scale_a, dU_a).contiguous()
        if "B_up" in needs:
            grads["B_up"] = _scaled(op.scale_b, dU_b).contiguous()
        if "scale_a" in needs:
            grads["scale_a"] = _inner(dU_a, op.A_up)
        if "scale_b" in needs:
            grads["scale_b"] = _inner(dU_b, op.B_up)
    by_a, by_b = "scale_a" in needs and op.A_up_bias is not None, "scale_b" in needs and op.B_up_bias is not None
    if by_a or by_b or not needs.isdisjoint(("bias", "A_up_bias", "B_up_bias")):
        g = _column_sums(G)
        if "bias" in needs:
            grads["bias"] = g
        if "A_up_bias" in needs:
            grads["A_up_bias"] = _scaled(op.scale_a, g)
        if "B_up_bias" in needs:
            grads["B_up_bias"] = _scaled(op.scale_b, g)
        if by_a:
            grads["scale_a"] = grads["scale_a"] + _inner(g, op.A_up_bias)
        if by_b:
            grads["scale_b"] = grads["scale_b"] + _inner(g, op.B_up_bias)
    return grads


def _input_side(grads: dict[str, Tensor], G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> None:
    """Adds the gradients of x, of the down projections and their biases, and what b0 gets through the B branch."""
    r_a, dtype = op.r_a, G.dtype
    lo, hi = _columns(op, needs & {"x", "A_down", "A_down_bias"}, needs & {"x", "bias", "B_down", "B_down_bias"})
    dZ = _mask_(G @ _stacked_up(op, dtype)[0][lo:hi].t(), op, lo, hi)
    dZ_a, dZ_b = dZ[:, : r_a - lo], dZ[:, r_a - lo :]
    if "A_down_bias" in needs:
        grads["A_down_bias"] = _column_sums(dZ_a)
    if "B_down_bias" in needs:
        grads["B_down_bias"] = _column_sums(dZ_b)
    if "bias" in needs and op.B_down is not None:
        grads["bias"] = grads["bias"] + _column_sums(dZ_b) @ op.B_down.to(grads["bias"].dtype)

    if form == "composed":
        if saved.Dt is not None:
            grads["x"] = (dZ @ saved.Dt.t()).addmm_(G, op.weight)
        if saved.x is not None:
            first, last = _columns(op, needs & {"A_down"}, needs & {"B_down"})
            dD = dZ[:, first - lo : last - lo].t() @ saved.x
            if "A_down" in needs:
                grads["A_down"] = dD[:r_a]
            if "B_down" in needs:
                T = dD[r_a - first :]
                grads["B_down"] = T @ op.weight.t()
                if op.bias is not None:
                    grads["B_down"].addr_(_column_sums(dZ_b), op.bias)
        return

    if "x" in needs:
        dy0 = torch.addmm(G, dZ_b, _to(op.B_down, dtype))
        if op.A_down is None:
            grads["x"] = dy0 @ op.weight
        else:
            grads["x"] = (dZ_a @ _to(op.A_down, dtype)).addmm_(dy0, op.weight)
    if saved.x is not None:
        grads["A_down"] = dZ_a.t() @ saved.x
    if saved.y0 is not None:
        grads["B_down"] = dZ_b.t() @ saved.y0


def _stacked_up(op: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """U^T = [s_a A_up^T; s_b B_up^T] [R, N], contiguous, and u = s_a a_u + s_b b_u [N] or None."""
    rows = [_scaled(s, up).t() for s, up in ((op.scale_a, op.A_up), (op.scale_b, op.B_up)) if up is not None]
    offsets = [
        _scaled(s, bias) for s, bias in ((op.scale_a, op.A_up_bias), (op.scale_b, op.B_up_bias)) if bias is not None
    ]
    Ut = torch.cat(rows) if len(rows) > 1 else rows[0].contiguous()
    return Ut.to(dtype), sum(offsets[1:], offsets[0]).to(dtype) if offsets else None


def _composed_down(op: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """D^T = [A_down; B_down W0]^T [K, R], contiguous, and d = [a_d, B_down b0 + b_d] [R] or None."""
    columns, offsets = [], []
    if op.A_down is not None:
        columns.append(_to(op.A_down, dtype).t())
        offsets.append(_to(op.A_down_bias, dtype))
    if op.B_down is not None:
        B_down = _to(op.B_down, dtype)
        columns.append((B_down @ op.weight).t())
        c = None if op.bias is None else B_down @ op.bias
        offsets.append(_sum(c, _to(op.B_down_bias, dtype)))
    Dt = torch.cat(columns, 1) if len(columns) > 1 else columns[0].contiguous()
    if all(offset is None for offset in offsets):
        return Dt, None
    return Dt, torch.cat([Dt.new_zeros(c.shape[1]) if o is None else o for c, o in zip(columns, offsets, strict=True)])


def _kept_down(x: Tensor, y0: Tensor, op: Operands) -> Tensor:
    """[x A_down^T + a_d, y0 B_down^T + b_d] [M, R]."""
    sides = ((x, op.A_down, op.A_down_bias), (y0, op.B_down, op.B_down_bias))
    parts = [F.linear(v, _to(down, v.dtype), _to(bias, v.dtype)) for v, down, bias in sides if down is not None]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _columns(op: Operands, wants_a: object, wants_b: object) -> tuple[int, int]:
    """The range of the R columns that the wanted branches occupy: a contiguous one, empty where neither is wanted."""
    return 0 if wants_a else op.r_a, op.r_a + op.r_b if wants_b else op.r_a


def _mask_(Z: Tensor, op: Operands, lo: int = 0, hi: int | None = None) -> Tensor:
    """Applies columns lo:hi of the dropout mask to Z, in place."""
    if op.mask is not None:
        Z *= op.mask[:, lo:hi]
        if op.mask_scale != 1:
            Z *= op.mask_scale
    return Z


def _affine(v: Tensor, Wt: Tensor, bias: Tensor | None) -> Tensor:
    return v @ Wt if bias is None else torch.addmm(bias, v, Wt)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _scaled(scale: float | Tensor, t: Tensor) -> Tensor:
    return scale * t if isinstance(scale, Tensor) or scale != 1 else t


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _column_sums(t: Tensor) -> Tensor:
    return t.sum(0, dtype=_wide(t.dtype))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(_wide(a.dtype)) * b).sum()

"""Backend `aten`: both forms through ATen calls, on any device, in float64 too.

R = r_a + r_b    U = [s_a A_up, s_b B_up] [N, R]    u = s_a a_u + s_b b_u [N]    G = dL/dh [M, N]    g = sum_m G [N]
Both forms, for the bottleneck Z = [Z_a, Z_b] [M, R]:
    dU = G^T Z    dA_up = s_a dU_a    ds_a = <dU_a, A_up> + a_u . g    da_u = s_a g    (b likewise)
    dZ = mask * (G U)    da_d = sum_m dZ_a    dA_down = dZ_a^T x    db0 = g + (sum_m dZ_b) B_down
Under input dropout x' = input_mask * x stands in Z_a and dA_down for x, and input_mask * (dZ_a A_down) in dx for
dZ_a A_down. 1/(1-p) is a factor of Z_a and dZ_a. The mask is saved as booleans.

Composed form: y0 never exists, and both branches are one of rank R.
    C = B_down W0    D = [A_down; C] [R, K]    d = [a_d, B_down b0 + b_d] [R]
    Z = mask * (x D^T + d)    h = x W0^T + Z U^T + (b0 + u)
    dx = G W0 + dZ D          dB_down = (dZ_b^T x) W0^T + (sum_m dZ_b) b0^T

Kept form: y0 = x W0^T + b0 is kept, and the branches stay apart, which takes the fewest calls.
    Z_a = mask_a * (x A_down^T + a_d)    Z_b = mask_b * (y0 B_down^T + b_d)    h = y0 + Z_b U_b^T + Z_a U_a^T + u
    dx = (G + dZ_b B_down) W0 + dZ_a A_down                  dB_down = dZ_b^T y0
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor
from torch.nn import functional as F

from .interface import CPU, LOW_PRECISION, Operands, Saved, read_backwards
from .operators import accumulate_, add_, is_static
from .philox import kept


def unavailable(device: torch.device) -> str | None:
    return None


def refusal(
    form: str,
    dtype: torch.dtype,
    r_a: int,
    r_b: int,
    masked: bool = False,
    device: torch.device = CPU,
    drops_input: bool = False,
) -> str | None:
    if form == "effective":
        return "it has only the composed and the kept form"
    if form == "composed" and r_b > 0 and dtype in LOW_PRECISION:
        return f"its composed form would round B_down W0 to {dtype}, which is less exact than the naive layer"
    return None


def forward(x: Tensor, op: Operands, needs: Set[str], form: str) -> tuple[Tensor, Operands, Saved]:
    if op.input_seed is not None:
        op = op._replace(input_mask=kept(op.input_seed, op.input_p, *x.shape), input_seed=None)
    h, saved = _composed_forward(x, op, needs) if form == "composed" else _kept_forward(x, op, needs)
    return h, read_backwards(op, needs, form), saved


def backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> dict[str, Tensor]:
    (M, N), (stride_m, stride_n) = G.shape, G.stride()
    if not ((stride_n == 1 and stride_m >= N) or (stride_m == 1 and stride_n >= M)):
        G = G.contiguous()  # one copy here instead of one in every product
    grads = _composed_backward(G, op, saved, needs) if form == "composed" else _kept_backward(G, op, saved, needs)
    if not needs.isdisjoint(_FROM_G):
        _add_column_sums_of_G(grads, G, op, needs)
    for name, grad in grads.items():
        dtype = G.dtype if name in ("x", "bias") else getattr(op, name).dtype
        if grad.dtype != dtype:
            grads[name] = grad.to(dtype)
    return grads


# Up to so many rows G^T Z is as fast as (Z^T G)^T: 11 us each at 16 rows of 768. With 64 rows of 4,096 it takes 73 us
# against 29 (R = 8, an Intel Xeon).
_FEW_ROWS = 32

# Which wanted gradients need dZ_a, dZ_b, dU_a, dU_b and g.
_FROM_DZ_A, _FROM_DZ_B = ("x", "A_down", "A_down_bias"), ("x", "B_down", "B_down_bias", "bias")
_FROM_DU_A, _FROM_DU_B = ("A_up", "scale_a"), ("B_up", "scale_b")
_FROM_G = ("bias", "A_up_bias", "B_up_bias", "scale_a", "scale_b")


def _composed_forward(x: Tensor, op: Operands, needs: Set[str]) -> tuple[Tensor, Saved]:
    D, d = _stacked_down(op, x.dtype)
    Z = _masked(_affine(x, D, d) if op.input_mask is None else _apart(x, D, d, op), op, 0, None)
    return _sum_of_products(x, op, Z, _stacked_up(op, x.dtype)), (
        x if "A_down" in needs or "B_down" in needs else None,
        Z if not needs.isdisjoint(_FROM_DU_A + _FROM_DU_B) else None,
        D if "x" in needs else None,
    )


def _apart(x: Tensor, D: Tensor, d: Tensor | None, op: Operands) -> Tensor:
    """x D^T + d where the parallel branch reads x', and the sequential one x."""
    d_a, d_b = (None, None) if d is None else (d[: op.r_a], d[op.r_a :])
    Z_a = _of_dropped(x, D[: op.r_a], d_a, op)
    return torch.cat((Z_a, _affine(x, D[op.r_a :], d_b)), 1) if op.r_b else Z_a


def _of_dropped(x: Tensor, A_down: Tensor, a_d: Tensor | None, op: Operands) -> Tensor:
    """x' A_down^T + a_d."""
    Z_a = _input_scaled(_dropped(x, op) @ A_down.t(), op)
    return Z_a if a_d is None else Z_a + a_d


def _sum_of_products(x: Tensor, op: Operands, Z: Tensor, U: Tensor) -> Tensor:
    """x W0^T + Z U^T + (b0 + u)."""
    u = _up_bias(op, x.dtype)
    if op.bias is not None and x.dtype in LOW_PRECISION:
        # b0 may cancel W0 x, so the two must meet before anything is rounded, as in the naive layer.
        h = accumulate_(F.linear(x, op.weight, op.bias), Z, U.t())
        return h if u is None else add_(h, u)
    b = _sum(op.bias, u)
    # The low-rank part first: the GEMM adds to it before rounding, so small updates survive low precision.
    if b is not None and x.device.type == "cpu":
        # There a bias is a pass of its own over h: as one more column of U it costs nothing.
        h = torch.cat((Z, Z.new_ones(len(Z), 1)), 1) @ torch.cat((U, b[:, None]), 1).t()
    else:
        h = _affine(Z, U, b)
    return accumulate_(h, x, op.weight.t())


def _composed_backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str]) -> dict[str, Tensor]:
    x, Z, D = saved
    r_a = op.r_a
    grads: dict[str, Tensor] = {}
    if not needs.isdisjoint(_FROM_DU_A + _FROM_DU_B):
        lo, hi = _columns(op, _FROM_DU_A, _FROM_DU_B, needs)
        # Not a slice: batched gradients have no rule for a slice that covers the whole tensor.
        dU_a, dU_b = _up_gradients(G, Z[:, lo:hi]).split((r_a - lo, hi - r_a), 1)
        _add_up_gradients(grads, dU_a, "A_up", op.A_up, "scale_a", op.scale_a, needs)
        _add_up_gradients(grads, dU_b, "B_up", op.B_up, "scale_b", op.scale_b, needs)

    lo, hi = _columns(op, _FROM_DZ_A, _FROM_DZ_B, needs)
    if lo == hi:
        return grads
    dZ = _masked(G @ _stacked_up(op, G.dtype)[:, lo:hi], op, lo, hi)
    dZ_a, dZ_b = dZ.split((r_a - lo, hi - r_a), 1)
    if "x" in needs:
        of_D = dZ @ D if op.input_mask is None else _through_apart(dZ_a, dZ_b, D, op)
        grads["x"] = accumulate_(of_D, G, op.weight)
    if not needs.isdisjoint(("A_down", "B_down")):
        if op.input_mask is None:
            first, last = _columns(op, ("A_down",), ("B_down",), needs)
            read = dZ if (first, last) == (lo, hi) else dZ[:, first - lo : last - lo]
            dD_a, T = (read.t() @ x).split((r_a - first, last - r_a))
        else:
            dD_a = _input_scaled(dZ_a, op).t() @ _dropped(x, op) if "A_down" in needs else None
            T = dZ_b.t() @ x if "B_down" in needs else None
        if "A_down" in needs:
            grads["A_down"] = dD_a
        if "B_down" in needs:
            grads["B_down"] = T @ op.weight.t()
            if op.bias is not None:
                grads["B_down"].addr_(_column_sums(dZ_b), op.bias)
    _add_column_sums_of_dZ(grads, dZ_a, dZ_b, op, needs)
    return grads


def _through_apart(dZ_a: Tensor, dZ_b: Tensor, D: Tensor, op: Operands) -> Tensor:
    """input_mask * (dZ_a A_down) / (1-p) + dZ_b C."""
    dx = _dropped(_input_scaled(dZ_a, op) @ D[: op.r_a], op)
    return accumulate_(dx, dZ_b, D[op.r_a :]) if op.r_b else dx


def _kept_forward(x: Tensor, op: Operands, needs: Set[str]) -> tuple[Tensor, Saved]:
    dtype, Z_a = x.dtype, None
    y0 = F.linear(x, op.weight, op.bias)
    Z_b = _masked(F.linear(y0, _to(op.B_down, dtype), _to(op.B_down_bias, dtype)), op, op.r_a, None)
    U_b = _to(_scaled(op.scale_b, op.B_up), dtype)
    h = torch.addmm(y0, Z_b, U_b.t()) if "B_down" in needs else accumulate_(y0, Z_b, U_b.t())
    if op.A_down is not None:
        A_down, a_d = _to(op.A_down, dtype), _to(op.A_down_bias, dtype)
        Z_a = F.linear(x, A_down, a_d) if op.input_mask is None else _of_dropped(x, A_down, a_d, op)
        Z_a = _masked(Z_a, op, 0, op.r_a)
        h = accumulate_(h, Z_a, _to(_scaled(op.scale_a, op.A_up), dtype).t())
    u = _up_bias(op, dtype)
    return h if u is None else add_(h, u), (
        x if "A_down" in needs else None,
        Z_a if not needs.isdisjoint(_FROM_DU_A) else None,
        Z_b if not needs.isdisjoint(_FROM_DU_B) else None,
        y0 if "B_down" in needs else None,
    )


def _kept_backward(G: Tensor, op: Operands, saved: Saved, needs: Set[str]) -> dict[str, Tensor]:
    x, Z_a, Z_b, y0 = saved
    dtype, dZ_a, dZ_b = G.dtype, None, None
    grads: dict[str, Tensor] = {}
    if not needs.isdisjoint(_FROM_DU_A):
        _add_up_gradients(grads, _up_gradients(G, Z_a), "A_up", op.A_up, "scale_a", op.scale_a, needs)
    if not needs.isdisjoint(_FROM_DU_B):
        _add_up_gradients(grads, _up_gradients(G, Z_b), "B_up", op.B_up, "scale_b", op.scale_b, needs)

    if op.A_down is not None and not needs.isdisjoint(_FROM_DZ_A):
        dZ_a = _masked(G @ _to(_scaled(op.scale_a, op.A_up), dtype), op, 0, op.r_a)
    if not needs.isdisjoint(_FROM_DZ_B):
        dZ_b = _masked(G @ _to(_scaled(op.scale_b, op.B_up), dtype), op, op.r_a, None)
    if "x" in needs:
        dy0 = torch.addmm(G, dZ_b, _to(op.B_down, dtype))
        if dZ_a is None:
            grads["x"] = dy0 @ op.weight
        else:
            of_A = _dropped(_input_scaled(dZ_a, op) @ _to(op.A_down, dtype), op)
            grads["x"] = accumulate_(of_A, dy0, op.weight)
    if "A_down" in needs:
        grads["A_down"] = _input_scaled(dZ_a, op).t() @ _dropped(x, op)
    if "B_down" in needs:
        grads["B_down"] = dZ_b.t() @ y0
    _add_column_sums_of_dZ(grads, dZ_a, dZ_b, op, needs)
    return grads


def _up_gradients(G: Tensor, Z: Tensor) -> Tensor:
    """dU [N, R]. Z^T G is up to twice as fast as G^T Z, but autograd copies its transpose into U's layout."""
    few = is_static(len(G)) and len(G) <= _FEW_ROWS
    return G.t() @ Z if few else (Z.t() @ G).t()


def _add_up_gradients(
    grads: dict[str, Tensor],
    dU: Tensor,
    up_name: str,
    up: Tensor,
    scale_name: str,
    scale: float | Tensor,
    needs: Set[str],
) -> None:
    """d(up) = s dU, and <dU, up> of ds, for one branch."""
    if up_name in needs:
        grads[up_name] = _scaled(scale, _to(dU, up.dtype))
    if scale_name in needs:
        grads[scale_name] = _inner(dU, up)


def _add_column_sums_of_dZ(grads: dict[str, Tensor], dZ_a: Tensor, dZ_b: Tensor, op: Operands, needs: Set[str]) -> None:
    """da_d, db_d, and what b0 gets through the sequential branch."""
    if "A_down_bias" in needs:
        grads["A_down_bias"] = _column_sums(dZ_a)
    if "B_down_bias" in needs:
        grads["B_down_bias"] = _column_sums(dZ_b)
    if "bias" in needs and op.B_down is not None:
        sums = _column_sums(dZ_b)
        grads["bias"] = sums @ op.B_down.to(sums.dtype)


def _add_column_sums_of_G(grads: dict[str, Tensor], G: Tensor, op: Operands, needs: Set[str]) -> None:
    """da_u, db_u, a_u . g of ds_a, b_u . g of ds_b, and b0's own g."""
    ds_a = "scale_a" in needs and op.A_up_bias is not None
    ds_b = "scale_b" in needs and op.B_up_bias is not None
    if not (ds_a or ds_b) and needs.isdisjoint(("bias", "A_up_bias", "B_up_bias")):
        return
    g = _column_sums(G)
    if "bias" in needs:
        grads["bias"] = _sum(g, grads.get("bias"))
    if "A_up_bias" in needs:
        grads["A_up_bias"] = op.scale_a * g  # also by 1: no two gradients may be one tensor
    if "B_up_bias" in needs:
        grads["B_up_bias"] = op.scale_b * g
    if ds_a:
        grads["scale_a"] += _inner(g, op.A_up_bias)
    if ds_b:
        grads["scale_b"] += _inner(g, op.B_up_bias)


def _columns(op: Operands, of_a: tuple[str, ...], of_b: tuple[str, ...], needs: Set[str]) -> tuple[int, int]:
    """The range of the R columns whose branch has a wanted gradient among of_a or of_b; empty where neither has."""
    return op.r_a if needs.isdisjoint(of_a) else 0, op.r_a if needs.isdisjoint(of_b) else op.r_a + op.r_b


def _stacked_up(op: Operands, dtype: torch.dtype) -> Tensor:
    """U [N, R]."""
    parts = [_scaled(s, up) for s, up in ((op.scale_a, op.A_up), (op.scale_b, op.B_up)) if up is not None]
    return _to(torch.cat(parts, 1) if len(parts) > 1 else parts[0], dtype)


def _stacked_down(op: Operands, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """D [R, K], and d [R] or None where it is zero."""
    if op.B_down is None:
        return _to(op.A_down, dtype), _to(op.A_down_bias, dtype)
    C = op.B_down @ op.weight
    d = _sum(None if op.bias is None else op.B_down @ op.bias, op.B_down_bias)
    if op.A_down is None:
        return C, d
    if d is not None or op.A_down_bias is not None:
        d_a = C.new_zeros(op.r_a) if op.A_down_bias is None else op.A_down_bias
        d = torch.cat((d_a, C.new_zeros(op.r_b) if d is None else d))
    return torch.cat((op.A_down, C)), d


def _up_bias(op: Operands, dtype: torch.dtype) -> Tensor | None:
    """u [N], or None where it is zero."""
    u_a = None if op.A_up_bias is None else _scaled(op.scale_a, op.A_up_bias)
    u_b = None if op.B_up_bias is None else _scaled(op.scale_b, op.B_up_bias)
    return _to(_sum(u_a, u_b), dtype)


def _masked(Z: Tensor, op: Operands, lo: int, hi: int | None) -> Tensor:
    """Z under columns lo:hi of the dropout mask."""
    if op.mask is not None:
        Z = Z * op.mask[:, lo:hi]
        if not is_static(op.mask_scale) or op.mask_scale != 1:
            Z = Z * op.mask_scale
    return Z


def _dropped(v: Tensor, op: Operands) -> Tensor:
    """v [M, K] under the mask of input dropout, without 1/(1-p)."""
    return v if op.input_mask is None else v * op.input_mask


def _input_scaled(v: Tensor, op: Operands) -> Tensor:
    """v times 1/(1-p) of input dropout."""
    return v if op.input_mask is None or op.input_mask.dtype != torch.bool else v * (1 / (1 - op.input_p))


def _affine(v: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return v @ matrix.t() if bias is None else torch.addmm(bias, v, matrix.t())


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def _scaled(scale: float | Tensor, t: Tensor) -> Tensor:
    return scale * t if isinstance(scale, Tensor) or not is_static(scale) or scale != 1 else t


def _column_sums(t: Tensor) -> Tensor:
    return t.sum(0, dtype=torch.promote_types(t.dtype, torch.float32))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum()

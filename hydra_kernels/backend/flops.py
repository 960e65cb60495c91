"""What FLOP counters count of our operators: the products of a pass, two operations a multiply-add.

Each function takes its operator's arguments, and `out_val`, which counters add. See `aten` for what each form computes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .interface import FROM_DZ, FROM_Z, Saved, form_of, joined


def forward_flops(
    x: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    needs: str,
    backend: str,
    plan: str,
    out_val: object = None,
) -> int:
    op = joined(tensors, numbers)
    (M, K), N, r_a, r_b, R = x.shape, op.weight.shape[0], op.r_a, op.r_b, op.r_a + op.r_b  # type: ignore[union-attr]
    form = form_of(plan)
    of_form = {
        "composed": r_b * N * K + M * R * K + M * R * N,  # C, Z, Z U^T
        "kept": M * r_a * K + M * r_b * N + M * R * N,  # Z_a, Z_b, Z U^T
        "effective": r_b * N * K + N * R * K,  # C, U D
    }
    return 2 * (M * K * N + of_form[form])


def backward_flops(
    G: Tensor,
    saved: Saved,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    needs: str,
    backend: str,
    plan: str,
    out_val: object = None,
) -> int:
    op, wanted = joined(tensors, numbers), frozenset(needs.split(","))
    (M, N), r_a, r_b, R = G.shape, op.r_a, op.r_b, op.r_a + op.r_b
    K = next((t.shape[1] for t in (op.weight, op.A_down) if t is not None), 0)
    total, form = 0, form_of(plan)
    if not wanted.isdisjoint(FROM_Z):
        total += M * R * (N + K if form == "effective" else N)  # dU, and Z again
    if not wanted.isdisjoint(FROM_DZ):
        total += M * R * N
    if "x" in wanted:  # G W0, and dZ D; or dZ_a A_down, dZ_b B_down; or U D again
        of_form = {"composed": M * R * K, "kept": M * (r_a * K + r_b * N), "effective": N * R * K}
        total += M * N * K + of_form[form]
    if "A_down" in wanted:
        total += M * r_a * K
    if "B_down" in wanted:
        total += M * r_b * N if form == "kept" else r_b * K * (M + N)
    return 2 * total

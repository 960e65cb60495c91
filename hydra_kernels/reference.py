"""Eq. 9-12 of arXiv 2309.06922 as anyone would write them: the oracle (in float64) and the naive baseline.

Shapes: x [*, K], weight [N, K], bias [N], A_down [r_a, K], A_up [N, r_a], B_down [r_b, N], B_up [N, r_b], masks [M, r].
This module imports nothing of the package and is differentiated by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def hydra_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_down: Tensor | None,
    A_up: Tensor | None,
    B_down: Tensor | None,
    B_up: Tensor | None,
    *,
    A_down_bias: Tensor | None = None,
    A_up_bias: Tensor | None = None,
    B_down_bias: Tensor | None = None,
    B_up_bias: Tensor | None = None,
    scale_a: float | Tensor = 1.0,
    scale_b: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    mask: Tensor | None = None,
    input_dropout_p: float = 0.0,
    input_mask: Tensor | None = None,
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Hydra (Eq. 9-10): ``h = y0 + s_a A_up A_down x + s_b B_up B_down y0`` with ``y0 = W0 x + b0``; returns [*, N].

    Without B_down and B_up it is LoRA (Eq. 2), without A_down and A_up SeqLoRA (Eq. 6).

    Arguments are those of :func:`hydra_kernels.hydra_linear`. ``form`` and ``backend`` are accepted so that the two
    functions can be exchanged; there is one way to compute here, and nothing is validated. Dropout is torch's own.
    """
    y0 = F.linear(x, weight, bias)
    h = y0
    r_a = 0
    if A_down is not None and A_up is not None:
        r_a = A_down.shape[0]
        mask_a = None if mask is None else mask[:, :r_a]
        dropped = drop(x, input_dropout_p, training, input_mask)
        h = h + low_rank(dropped, A_down, A_up, A_down_bias, A_up_bias, scale_a, dropout_p, training, mask_a)
    if B_down is not None and B_up is not None:
        mask_b = None if mask is None else mask[:, r_a:]
        h = h + low_rank(y0, B_down, B_up, B_down_bias, B_up_bias, scale_b, dropout_p, training, mask_b)
    return h


def drop(x: Tensor, p: float, training: bool, mask: Tensor | None = None) -> Tensor:
    """x [*, K] with dropout of p while ``training``, or under a scaled ``mask`` [M, K], also of a wider dtype."""
    if mask is not None:
        return (x * mask.view(x.shape)).to(x.dtype)
    return F.dropout(x, p, training) if p > 0 else x


def low_rank(
    v: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """One branch: ``scale * (mask * (v down^T + down_bias) up^T + up_bias)``, v [*, fan_in] -> [*, fan_out].

    ``down`` is [r, fan_in], ``up`` [fan_out, r]; without a ``mask`` [M, r] the bottleneck has dropout of ``dropout_p``
    while ``training``. fp32 adapters over a low-precision v are cast to its dtype for the products. A scale of 1 costs
    no operation.
    """
    if down.dtype != v.dtype:
        down, up = down.to(v.dtype), up.to(v.dtype)
        down_bias = None if down_bias is None else down_bias.to(v.dtype)
        up_bias = None if up_bias is None else up_bias.to(v.dtype)
    z = F.linear(v, down, down_bias)
    if mask is not None:
        z = z * mask.view(z.shape)
    elif dropout_p > 0:
        z = F.dropout(z, dropout_p, training)
    delta = F.linear(z, up, up_bias)
    return scale * delta if isinstance(scale, Tensor) or scale != 1 else delta


def merged_parameters(
    weight: Tensor,
    bias: Tensor | None,
    A_down: Tensor | None,
    A_up: Tensor | None,
    B_down: Tensor | None,
    B_up: Tensor | None,
    *,
    A_down_bias: Tensor | None = None,
    A_up_bias: Tensor | None = None,
    B_down_bias: Tensor | None = None,
    B_up_bias: Tensor | None = None,
    scale_a: float | Tensor = 1.0,
    scale_b: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """The frozen layer that equals the adapted one (Eq. 11-12): W [N, K] and b [N], or None where every bias is absent.

    ``W = W0 + s_a A_up A_down + s_b B_up B_down W0``;
    ``b = b0 + s_a (A_up a_d + a_u) + s_b (B_up (B_down b0 + b_d) + b_u)``.
    Arguments are those of :func:`hydra_kernels.hydra_linear`. Computed in float64 for a float64 weight, else in
    float32, and rounded once, to the weight's dtype. New tensors.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    W0 = weight.to(dtype)
    W, offsets = W0.clone(), []
    if bias is not None:
        offsets.append(bias.to(dtype))
    if A_down is not None and A_up is not None:
        s, up = _in(dtype, scale_a), A_up.to(dtype)
        W += s * (up @ A_down.to(dtype))
        if A_down_bias is not None:
            offsets.append(s * (up @ A_down_bias.to(dtype)))
        if A_up_bias is not None:
            offsets.append(s * A_up_bias.to(dtype))
    if B_down is not None and B_up is not None:
        s, up, down = _in(dtype, scale_b), B_up.to(dtype), B_down.to(dtype)
        W += s * (up @ (down @ W0))
        if bias is not None:
            offsets.append(s * (up @ (down @ bias.to(dtype))))
        if B_down_bias is not None:
            offsets.append(s * (up @ B_down_bias.to(dtype)))
        if B_up_bias is not None:
            offsets.append(s * B_up_bias.to(dtype))
    b = torch.stack(offsets).sum(0).to(weight.dtype) if offsets else None
    return W.to(weight.dtype), b


def _in(dtype: torch.dtype, scale: float | Tensor) -> float | Tensor:
    return scale.to(dtype) if isinstance(scale, Tensor) else scale

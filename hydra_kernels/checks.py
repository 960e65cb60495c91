"""Every check of an argument. An error names the argument, what it was and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backend import NAMES
from .backend.interface import ARGUMENTS, FORMS, LOW_PRECISION, Operands
from .sharding import is_sharded
from .weights import Packed

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts: all but float64
_ADAPTER_DTYPES = {dtype: (dtype, torch.float32) if dtype in LOW_PRECISION else (dtype,) for dtype in DTYPES}
_A = ("A_down", "A_up", "A_down_bias", "A_up_bias", "scale_a")
_B = ("B_down", "B_up", "B_down_bias", "B_up_bias", "scale_b")


def check_call(x: Tensor, op: Operands, cast_to: torch.dtype | None) -> tuple[int, int, int, int, int]:
    """Raises unless the call is right, where ``cast_to`` is autocast's dtype or None; returns M, K, N, r_a, r_b."""
    M, K, N = _check_frozen(x, op.weight, op.bias, cast_to)
    device, dtype = x.device, cast_to or x.dtype
    dtypes = AUTOCAST_DTYPES if cast_to else _ADAPTER_DTYPES[dtype]
    r_a, r_b = _check_branch(_A, op, K, N, dtypes, device), _check_branch(_B, op, N, N, dtypes, device)
    masks = AUTOCAST_DTYPES if cast_to else (dtype,)
    _check_mask("mask", op.mask, (M, r_a + r_b), masks, device)
    _check_mask("input_mask", op.input_mask, (M, K), (torch.bool,) if op.input_p else masks, device)
    return M, K, N, r_a, r_b


def _check_mask(
    name: str, mask: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if mask is not None:
        _check_tensor(name, mask, shape, dtypes, device)
        if mask.requires_grad:
            raise ValueError(f"{name}: it requires grad, but a dropout mask gets no gradient; pass {name}.detach()")


def _check_frozen(x: Any, weight: Any, bias: Any, cast_to: torch.dtype | None) -> tuple[int, int, int]:
    """Checks x, weight and bias; returns M, K, N."""
    if isinstance(weight, Packed):
        return _check_beside_packed(x, weight, bias, cast_to)
    for name, t in (("x", x), ("weight", weight)):
        _check_plain(name, t)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    if weight.requires_grad:
        remedy = "call weight.requires_grad_(False), or train it through F.linear"
        if not weight.is_leaf:
            remedy = "it is computed from a parameter that trains, as in FSDP1: use FSDP2 (fully_shard), or detach it"
        raise ValueError(f"weight: it requires grad, but W0 is frozen and its gradient is never computed; {remedy}")
    N, K = weight.shape
    dtypes = AUTOCAST_DTYPES if cast_to else (weight.dtype,)
    served = AUTOCAST_DTYPES if cast_to else DTYPES
    if weight.dtype not in served:
        raise TypeError(f"weight: expected one of {', '.join(map(str, served))}, got {weight.dtype}")
    return _check_x_and_bias(x, bias, N, K, dtypes, weight.dtype, dtypes, weight.device)


def _check_beside_packed(x: Any, weight: Packed, bias: Any, cast_to: torch.dtype | None) -> tuple[int, int, int]:
    """`_check_frozen` over a quantised weight, which has no dtype of its own."""
    _check_plain("x", x)
    if weight.base is not None and weight.base.weight.requires_grad:
        raise ValueError("weight: it requires grad, but W0 is frozen; call weight.requires_grad_(False)")
    biases = AUTOCAST_DTYPES if cast_to else (x.dtype,)
    return _check_x_and_bias(x, bias, *weight.shape, DTYPES, None, biases, weight.device)


def _check_x_and_bias(
    x: Any,
    bias: Any,
    N: int,
    K: int,
    dtypes: Sequence[torch.dtype],
    of_weight: torch.dtype | None,
    biases: tuple[torch.dtype, ...],
    device: torch.device,
) -> tuple[int, int, int]:
    """Checks x, of one of dtypes, and bias beside a weight [N, K], whose own dtype is None where it is quantised."""
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape [*, {K}] for a weight of shape [{N}, {K}], got {list(x.shape)}")
    if x.dtype not in dtypes:
        wanted = f"one of {', '.join(map(str, dtypes))}" if of_weight is None else f"{of_weight}, the dtype of weight"
        raise TypeError(f"x: expected {wanted}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"x: expected a tensor on {device}, where weight is, got one on {x.device}")
    if bias is not None:
        _check_tensor("bias", bias, (N,), biases, device)
    M = 1
    for size in x.shape[:-1]:
        M *= size
    return M, K, N


def _check_branch(
    names: tuple[str, ...], op: Operands, fan_in: int, N: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> int:
    """Checks one branch, whose operands have these names; returns its rank, 0 where it is absent."""
    down, up, down_bias, up_bias, scale = [getattr(op, name) for name in names]
    if isinstance(scale, Tensor):
        _check_tensor(names[4], scale, (), DTYPES, device)
    else:
        check_finite(names[4], scale, "a number or a 0-dimensional tensor")
    if down is None or up is None:
        missing = names[0] if down is None else names[1]
        for name, t in zip(names, (down, up, down_bias, up_bias), strict=False):
            if t is not None:
                raise ValueError(f"{name}: it is given, but {missing} is None; a branch needs both projections")
        return 0
    _check_plain(names[0], down)
    r = down.shape[0] if down.dim() else 0
    if r == 0:
        raise ValueError(f"{names[0]}: expected shape [r >= 1, {fan_in}] or None, got {list(down.shape)}")
    _check_tensor(names[0], down, (r, fan_in), dtypes, device)
    dtypes = (down.dtype,)
    _check_tensor(names[1], up, (N, r), dtypes, device)
    if down_bias is not None:
        _check_tensor(names[2], down_bias, (r,), dtypes, device)
    if up_bias is not None:
        _check_tensor(names[3], up_bias, (N,), dtypes, device)
    return r


def _check_plain(name: str, t: Any) -> None:
    """Raises TypeError unless t is a tensor that has its elements in memory, at strides."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; pass t.values() of a jagged tensor t, and convert the "
            "result h by torch.nested.nested_tensor_from_jagged(h, t.offsets())"
        )
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {t.layout}; pass t.to_dense()")
    if not torch.compiler.is_compiling() and t._is_zerotensor():
        raise TypeError(f"{name}: expected a tensor with elements in memory, got a ZeroTensor; pass t.clone()")


def _check_tensor(
    name: str, t: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    _check_plain(name, t)
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {t.device}")


_NO_DTENSORS = {Tensor, nn.Parameter, type(None), float, int, Packed}


def refuse_sharded(x: Tensor, op: Operands) -> None:
    """Raises TypeError where an operand is a DTensor."""
    if all(type(t) in _NO_DTENSORS for t in (x, *op)):
        return
    for name, t in zip(ARGUMENTS, (x, *op), strict=True):
        if is_sharded(t):
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor; under FSDP2 call the module, which sees whole "
                "parameters; for tensor parallelism use ColwiseHydra or RowwiseHydra of hydra_kernels.parallel"
            )


def check_route(form: str, backend: str) -> None:
    """Raises ValueError for an unknown form or backend."""
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if backend not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")


def check_dropout(name: str, p: float) -> None:
    """Raises unless p is a number in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1), got {type(p).__name__}")
    if not 0 <= p < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {p}")


def check_finite(name: str, value: float, kind: str = "a number") -> None:
    """Raises unless value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected {kind}, got {type(value).__name__}")
    # Under dynamic tracing a float is symbolic, and asking whether it is finite would break the graph.
    if torch.compiler.is_compiling():
        return
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number in the range of float64, got a larger integer") from None
    if not finite:
        raise ValueError(f"{name}: expected a finite number, got {value}")

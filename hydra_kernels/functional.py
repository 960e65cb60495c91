"""hydra_linear: the one place where a call is checked, cast, flattened, given its dropout mask and its backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import extension, reference
from .backend import NAMES, TABLE
from .backend.interface import FIRST_OPTION, LOW_PRECISION, Operands
from .choice import FORMS, Choice, choose
from .function import HydraFunction, autocast_is_on
from .machine import here
from .sharding import is_sharded

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts: all but float64
_ADAPTER_DTYPES = {dtype: (dtype, torch.float32) if dtype in LOW_PRECISION else (dtype,) for dtype in DTYPES}
_OPERANDS = ("x", *Operands._fields[:-1])  # all but mask_scale
_A = ("A_down", "A_up", "A_down_bias", "A_up_bias", "scale_a")
_B = ("B_down", "B_up", "B_down_bias", "B_up_bias", "scale_b")


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
    form: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """A frozen linear layer with LoRA in parallel and SeqLoRA in sequence (Eq. 9-10 of arXiv 2309.06922).

    ``h = y0 + s_a (A_up m(A_down x + a_d) + a_u) + s_b (B_up m(B_down y0 + b_d) + b_u)`` with ``y0 = W0 x + b0`` and m
    dropout on the bottleneck. Without B_down and B_up it is LoRA, without A_down and A_up SeqLoRA.

    Args:
        x: input [*, K], at least one dimension; float64, float32, float16 or bfloat16.
        weight: W0 [N, K], frozen, of x's dtype outside autocast.
        bias: b0 [N] of weight's dtype, or None; may require grad.
        A_down, A_up: [r_a, K] and [N, r_a], both or neither; weight's dtype, or float32 over a low-precision weight.
        B_down, B_up: [r_b, N] and [N, r_b], likewise.
        A_down_bias, B_down_bias: a_d [r_a] and b_d [r_b], or None.
        A_up_bias, B_up_bias: a_u [N] and b_u [N], or None.
        scale_a, scale_b: s_a and s_b, finite numbers or 0-dimensional tensors on x's device (never read on the host).
        dropout_p: probability in [0, 1) of zeroing an element of the bottleneck while ``training``.
        mask: the dropout mask [M, r_a + r_b] itself, already scaled by 1/(1-p), with M = product of x's leading
            dimensions; wins over ``dropout_p``.
        form: "composed" saves x and the bottleneck, "kept" saves y0 too, "effective" saves x and multiplies it with
            W0 + U D, built once a pass (`native` alone, without dropout); "auto" lets `choice` decide.
        backend: a key of ``hydra_kernels.backends()`` or "auto", which is "reference" where something can follow plain
            operators alone: torch.func's transforms, forward-mode differentiation, torch.jit.trace, torch.export.

    Returns:
        h [*, N] in x's dtype, or in autocast's where that is on.

    Raises:
        ValueError, TypeError: naming the argument, before any computation.
        RuntimeError: from a backward with ``create_graph=True``.
    """
    check_route(form, backend)
    check_dropout("dropout_p", dropout_p)
    operands = (
        *(x, weight, bias, A_down, A_up, B_down, B_up),
        *(A_down_bias, A_up_bias, B_down_bias, B_up_bias, mask, scale_a, scale_b),
    )
    cast_to, sizes, native, follower = None, None, None, None
    if not torch.compiler.is_compiling() and not _in_a_dual_level():
        native = extension.load()
    if native is not None:
        sizes = native.sizes(*operands)
    if sizes is None:
        native = None
        if not isinstance(x, Tensor) and has_torch_function((x,)):
            # A stand-in for a tensor, such as torch.fx traces with, says itself what a call is.
            options = _options(operands, dropout_p, training)
            return handle_torch_function(hydra_linear, (x,), *operands[:7], **options, form=form, backend=backend)
        if not torch.compiler.is_compiling():
            _refuse_sharded(operands)
        cast_to = _autocast_dtype(x)
        sizes = _check(*operands, cast_to)
        follower = _follower(operands)
        if backend == "auto" and follower is not None:
            backend = "reference"
    (M, K, N, r_a, r_b), device, dtype = sizes, x.device, cast_to or x.dtype

    if A_down is None and B_down is None:
        return F.linear(x, weight, bias)
    if backend == "reference":
        return reference.hydra_linear(*operands[:7], **_options(operands, dropout_p, training))

    if follower == "torch.export":
        # A form chosen by M would be a bound on a batch that may be dynamic.
        both_forms = backend == "aten" or (backend == "native" and device.type == "cpu")
        form = "kept" if form == "auto" and both_forms else form
    elif follower is not None:
        raise ValueError(
            f"backend: {backend!r} cannot serve this call: {follower} can follow plain operators alone; "
            "use backend='reference'"
        )
    machine = here(device)
    masked = mask is not None or (training and dropout_p > 0)
    choice = choose(M, K, N, r_a, r_b, dtype, machine, form, backend, masked)
    reason = machine.reasons[choice.backend] or TABLE[choice.backend].refusal(
        choice.form, dtype, r_a, r_b, masked, device
    )
    if reason is not None:
        raise ValueError(f"backend: {choice.backend!r} cannot serve this call: {reason}")

    mask_scale = 1.0
    if mask is None and training and dropout_p > 0:
        mask = torch.empty(M, r_a + r_b, dtype=torch.bool, device=device).bernoulli_(1 - dropout_p)
        mask_scale = 1 / (1 - dropout_p)
    # A scale of an absent branch acts on nothing and gets no gradient.
    scale_a, scale_b = 1.0 if A_down is None else scale_a, 1.0 if B_down is None else scale_b
    op = Operands(weight, bias, *operands[3:11], mask, scale_a, scale_b, mask_scale)
    flat = x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    if native is not None and choice.backend == "native":
        h = native.apply(flat, op, choice.form)
    elif cast_to is None:
        h = _run(flat, op, choice)
    else:
        with torch.autocast(device.type, enabled=False):
            bias = None if bias is None else bias.to(dtype)
            mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
            h = _run(flat.to(dtype), op._replace(weight=weight.to(dtype), bias=bias, mask=mask), choice)
    return h if x.dim() == 2 else h.view(*x.shape[:-1], N)


def _options(operands: tuple[Any, ...], dropout_p: float, training: bool) -> dict[str, Any]:
    """The keyword arguments of a call, but those that say who serves it."""
    options = dict(zip(_OPERANDS[7:], operands[7:], strict=True))
    return {**options, "dropout_p": dropout_p, "training": training}


def _in_a_dual_level() -> bool:
    return forward_ad._current_level >= 0


def _follower(operands: tuple[object, ...]) -> str | None:
    """What looks on and can follow plain operators alone: past a kernel it would lose the operands in silence."""
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if torch.compiler._is_exporting_flag:  # is_exporting() is True under torch.compile too, in torch 2.11
        return "torch.export"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace"
    if _in_a_dual_level() and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in operands
    ):
        return "forward-mode differentiation"
    return None


def _run(x: Tensor, op: Operands, choice: Choice) -> Tensor:
    if not torch.is_grad_enabled():
        return TABLE[choice.backend].forward(x, op, frozenset(), choice.form)[0]
    *tensors, scale_a, scale_b, _ = op[FIRST_OPTION:]
    constant = not isinstance(scale_a, Tensor) and not isinstance(scale_b, Tensor)
    if constant and scale_a == scale_b == 1 and all(t is None for t in tensors):
        return HydraFunction.apply(choice, x, *op[:FIRST_OPTION])
    return HydraFunction.apply(choice, x, *op)


def _refuse_sharded(operands: tuple[object, ...]) -> None:
    for name, t in zip(_OPERANDS, operands, strict=True):
        if is_sharded(t):
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor; under FSDP2 call the module, which then sees whole "
                "parameters; for tensor parallelism use the styles of hydra_kernels.parallel"
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
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _autocast_dtype(x: object) -> torch.dtype | None:
    """The dtype in which autocast would run F.linear(x), or None where it would leave x alone."""
    if not isinstance(x, Tensor) or x.dtype not in _CAST or not autocast_is_on(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_down: Tensor | None,
    A_up: Tensor | None,
    B_down: Tensor | None,
    B_up: Tensor | None,
    A_down_bias: Tensor | None,
    A_up_bias: Tensor | None,
    B_down_bias: Tensor | None,
    B_up_bias: Tensor | None,
    mask: Tensor | None,
    scale_a: float | Tensor,
    scale_b: float | Tensor,
    cast_to: torch.dtype | None,
) -> tuple[int, int, int, int, int]:
    """Raises unless the call is right; returns M, K, N, r_a, r_b."""
    M, K, N = _check_frozen(x, weight, bias, cast_to)
    device, dtype = x.device, cast_to or x.dtype
    dtypes = _CAST if cast_to else _ADAPTER_DTYPES[dtype]
    r_a = _check_branch(_A, A_down, A_up, A_down_bias, A_up_bias, scale_a, K, N, dtypes, device)
    r_b = _check_branch(_B, B_down, B_up, B_down_bias, B_up_bias, scale_b, N, N, dtypes, device)
    if mask is not None:
        _check_tensor("mask", mask, (M, r_a + r_b), _CAST if cast_to else (dtype,), device)
        if mask.requires_grad:
            raise ValueError("mask: it requires grad, but a dropout mask gets none; pass mask.detach()")
    return M, K, N, r_a, r_b


def _check_frozen(x: Tensor, weight: Tensor, bias: Tensor | None, cast_to: torch.dtype | None) -> tuple[int, int, int]:
    """Checks x, weight and bias; returns M, K, N."""
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    if weight.requires_grad:
        remedy = "call weight.requires_grad_(False), or train it through F.linear"
        if not weight.is_leaf:
            remedy = "it is part of a parameter that trains, as FSDP1 makes it: use FSDP2 (fully_shard), or detach it"
        raise ValueError(f"weight: it requires grad, but W0 is frozen and its gradient is never computed; {remedy}")
    N, K = weight.shape
    dtypes = _CAST if cast_to else (weight.dtype,)
    if weight.dtype not in (_CAST if cast_to else DTYPES):
        raise TypeError(
            f"weight: expected one of {', '.join(map(str, _CAST if cast_to else DTYPES))}, got {weight.dtype}"
        )
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x: expected shape [*, {K}] for a weight of shape [{N}, {K}], got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise TypeError(f"x: expected {weight.dtype}, as weight has, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x: expected on {weight.device}, where weight is, got {x.device}")
    if bias is not None:
        _check_tensor("bias", bias, (N,), dtypes, weight.device)
    M = 1
    for size in x.shape[:-1]:
        M *= size
    return M, K, N


def _check_branch(
    names: tuple[str, str, str, str, str],
    down: Tensor | None,
    up: Tensor | None,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: float | Tensor,
    fan_in: int,
    N: int,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> int:
    """Checks one branch, whose arguments have these names; returns its rank, 0 where it is absent."""
    if isinstance(scale, Tensor):
        _check_tensor(names[4], scale, (), DTYPES, device)
    else:
        check_finite(names[4], scale, "a number or a 0-dimensional tensor")
    if down is None or up is None:
        missing = names[0] if down is None else names[1]
        for name, t in zip(names, (down, up, down_bias, up_bias), strict=False):
            if t is not None:
                raise ValueError(f"{name}: given, but {missing} is None; a branch needs both projections")
        return 0
    if not isinstance(down, Tensor):
        raise TypeError(f"{names[0]}: expected a Tensor, got {type(down).__name__}")
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


def _check_tensor(
    name: str, t: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name}: expected on {device}, got {t.device}")

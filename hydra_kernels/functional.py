"""hydra_linear: the one place where a call is checked, cast, flattened, given its dropout mask and its backend."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from . import extension, reference
from .autograd import HydraFunction, autocast_is_on
from .backend import TABLE
from .backend.interface import FIRST_NUMBER, FIRST_OPTION, Choice, Operands
from .backend.operators import is_static, opened
from .backend.philox import draw_seed, kept
from .checks import AUTOCAST_DTYPES, check_call, check_dropout, check_route, refuse_sharded
from .choose.choice import choose
from .choose.machine import here
from .private import a_transform_is_on, in_a_dual_level, is_exporting
from .weights import Packed


def hydra_linear(
    x: Tensor,
    weight: Tensor | Packed,
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
    """A frozen linear layer with LoRA in parallel and SeqLoRA in sequence (Eq. 9-10 of arXiv 2309.06922).

    ``h = y0 + s_a (A_up m(A_down x' + a_d) + a_u) + s_b (B_up m(B_down y0 + b_d) + b_u)`` with ``y0 = W0 x + b0``, m
    dropout on the bottleneck, and x' = x under input dropout. Without B_down and B_up it is LoRA, without A_down and
    A_up SeqLoRA.

    Args:
        x: input [*, K], at least one dimension; float64, float32, float16 or bfloat16.
        weight: W0 [N, K], frozen, of x's dtype outside autocast; or quantised, as `weights.packed` reads it from a
            layer.
        bias: b0 [N] of weight's dtype, or None; may require grad.
        A_down, A_up: [r_a, K] and [N, r_a], both or neither; weight's dtype, or float32 over a low-precision weight.
        B_down, B_up: [r_b, N] and [N, r_b], likewise.
        A_down_bias, B_down_bias: a_d [r_a] and b_d [r_b], or None.
        A_up_bias, B_up_bias: a_u [N] and b_u [N], or None.
        scale_a, scale_b: s_a and s_b, finite numbers or 0-dimensional tensors on x's device (never read on the host).
        dropout_p: probability in [0, 1) of zeroing an element of the bottleneck while ``training``.
        mask: the dropout mask [M, r_a + r_b] itself, already scaled by 1/(1-p), with M = product of x's leading
            dimensions; wins over ``dropout_p``.
        input_dropout_p: probability in [0, 1) of zeroing an element of x while ``training``, as the parallel branch
            reads it (LoRA's own dropout); W0 and the sequential branch read x as it is. The mask is made of one seed
            that torch's generator gives, the same for every backend.
        input_mask: the mask [M, K] of x itself, likewise scaled; wins over ``input_dropout_p``.
        form: "composed" saves x and the bottleneck, "kept" saves y0 too, "effective" saves x and multiplies it with
            W0 + U D, built once a pass (`native` on a CPU and `hybrid`, without dropout of either kind); "auto" lets
            `choice` decide.
        backend: a key of ``hydra_kernels.backends()`` or "auto", which is "reference" where only plain operators can be
            traced: torch.func's transforms, forward-mode differentiation, torch.jit.trace, torch.export.

    Returns:
        h [*, N] in x's dtype, or in autocast's where that is on; over a quantised weight always in x's.

    Raises:
        ValueError, TypeError: naming the argument, before any computation.
        RuntimeError: from a backward with ``create_graph=True``.
    """
    check_route(form, backend)
    check_dropout("dropout_p", dropout_p)
    check_dropout("input_dropout_p", input_dropout_p)
    op = Operands(
        cast(Tensor, weight), bias, A_down, A_up, B_down, B_up,
        A_down_bias, A_up_bias, B_down_bias, B_up_bias, mask, input_mask, None, scale_a, scale_b, 1.0, 0.0,
    )  # fmt: skip
    if not isinstance(x, Tensor) and has_torch_function((x,)):
        # A proxy for a tensor, as torch.fx traces with, records the call itself.
        options = _options(op, dropout_p, training) | {"input_dropout_p": input_dropout_p}
        return handle_torch_function(hydra_linear, (x,), x, *op[:FIRST_OPTION], **options, form=form, backend=backend)
    return applied(x, op, dropout_p, input_dropout_p, training, form, backend)


def applied(
    x: Tensor, op: Operands, dropout_p: float, input_dropout_p: float, training: bool, form: str, backend: str
) -> Tensor:
    """`hydra_linear` of operands that may have a seed of input dropout, or its mask as booleans, already."""
    if isinstance(op.weight, Packed) and _generates(x, op, training and dropout_p + input_dropout_p > 0):
        try:
            return _beside_base(x, op)
        except Exception:
            _checked_in_python(x, op, form, backend)  # if an argument is wrong, this error names it
            raise
    call = _checked_at_once(x, op, form, backend) or _checked_in_python(x, op, form, backend)
    M, K, N, r_a, r_b = call.sizes
    alone = op.A_down is None and op.B_down is None
    if isinstance(op.weight, Packed):
        if alone and _observer((x, *op)) is None:
            return op.weight.forward(x)
        op = op._replace(weight=op.weight.ready())
    elif alone:
        return F.linear(x, op.weight, op.bias)  # type: ignore[arg-type]
    if op.A_down is not None and training and input_dropout_p > 0 and not op.drops_input:
        op = op._replace(input_seed=draw_seed(x.device), input_p=input_dropout_p)
    if call.backend == "reference":
        if op.input_seed is not None:
            op = op._replace(input_mask=kept(op.input_seed, op.input_p, M, K))
        if isinstance(op.weight, Packed):
            return _naive(x, op, call.cast_to, dropout_p, training)
        return reference.hydra_linear(x, *op[:FIRST_OPTION], **_options(op, dropout_p, training))  # type: ignore[arg-type]

    device, drops = x.device, op.mask is None and training and dropout_p > 0
    choice = _choice(call, op, device, drops or op.mask is not None)
    if choice.backend == "reference":
        op = opened(op, x)
        return reference.hydra_linear(x, *op[:FIRST_OPTION], **_options(op, 0.0, training))  # type: ignore[arg-type]
    if drops:
        # Out of place: selective checkpointing may keep what is drawn. Of its input bernoulli takes the shape alone.
        mask = torch.bernoulli(torch.empty(M, r_a + r_b, dtype=torch.bool, device=device), 1 - dropout_p)
        op = op._replace(mask=mask, mask_scale=1 / (1 - dropout_p))
    # What an absent branch would have acts on nothing, and a scale of it gets no gradient.
    if op.A_down is None and (_is_scaled(op.scale_a) or op.drops_input):
        op = op._replace(scale_a=1.0, input_mask=None)
    if op.B_down is None and _is_scaled(op.scale_b):
        op = op._replace(scale_b=1.0)
    flat = x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    if call.compiled is not None and choice.backend == "native":
        h = call.compiled.apply(flat, op, choice.plan)
    elif call.cast_to is None:
        h = _run(flat, op, choice)
    else:
        with torch.autocast(device.type, enabled=False):
            h = _run(flat.to(call.cast_to), _cast(op, call.cast_to), choice)
    if isinstance(op.weight, Packed):
        h = h.to(x.dtype)
    return h if x.dim() == 2 else h.view(*x.shape[:-1], N)


# Without gradients, up to so many rows run through a quantised layer's own forward, which need not make W0 dense.
_GENERATION_ROWS = 16


def _generates(x: Tensor, op: Operands, drops: bool) -> bool:
    weight = cast(Packed, op.weight)
    if drops or not weight.own_products or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    # Any other x goes through the checks: the libraries' kernels would read beyond its end.
    ordinary = type(x) is Tensor and x.layout == torch.strided and not x.is_nested and x.dtype in AUTOCAST_DTYPES
    fits = ordinary and x.device == weight.device and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    masked = op.mask is not None or op.drops_input
    few = fits and not masked and x.numel() <= _GENERATION_ROWS * x.shape[-1]
    return few and _observer((x, *op)) is None


def _beside_base(x: Tensor, op: Operands) -> Tensor:
    """h as the base layer's own forward y0, and the branches in plain PyTorch."""
    y0 = cast(Packed, op.weight).forward(x)
    down = op.B_down if op.A_down is None else op.A_down
    if down is None:
        return y0
    # In the adapters' dtype where that is wider: of few rows a product in low precision takes a CPU longer.
    wide = torch.promote_types(down.dtype, y0.dtype)
    h = y0_wide = y0.to(wide)
    if op.A_down is not None and op.A_up is not None:
        h = h + reference.low_rank(x.to(wide), op.A_down, op.A_up, op.A_down_bias, op.A_up_bias, op.scale_a)
    if op.B_down is not None and op.B_up is not None:
        h = h + reference.low_rank(y0_wide, op.B_down, op.B_up, op.B_down_bias, op.B_up_bias, op.scale_b)
    return h.to(y0.dtype)


def _naive(x: Tensor, op: Operands, cast_to: torch.dtype | None, dropout_p: float, training: bool) -> Tensor:
    """The naive layer over a quantised weight: autograd then saves the dense one."""
    dtype = cast_to or x.dtype
    plain = _cast(op._replace(weight=cast(Packed, op.weight).dense(dtype)), dtype)
    h = reference.hydra_linear(x.to(dtype), *plain[:FIRST_OPTION], **_options(plain, dropout_p, training))  # type: ignore[arg-type]
    return h.to(x.dtype)


class Call(NamedTuple):
    """What is known of a call once it is found to be right."""

    sizes: tuple[int, int, int, int, int]  # M, K, N, r_a, r_b
    dtype: torch.dtype  # in which products run
    form: str
    backend: str
    cast_to: torch.dtype | None = None  # autocast's, where that is on
    compiled: Any = None  # the compiled part, where it has checked the call: its own autograd function then runs it


def _checked_at_once(x: Tensor, op: Operands, form: str, backend: str) -> Call | None:
    """The fast path: the compiled part checks the whole call at once. None where it cannot tell that all is right."""
    if torch.compiler.is_compiling() or in_a_dual_level() or isinstance(op.weight, Packed):
        return None
    native = extension.load()
    sizes = None if native is None else native.sizes(x, op)
    return None if sizes is None else Call(sizes, x.dtype, form, backend, compiled=native)


def _checked_in_python(x: Tensor, op: Operands, form: str, backend: str) -> Call:
    """The path of all other calls: every check in Python, with its error; autocast; what needs plain operators."""
    if not torch.compiler.is_compiling():
        refuse_sharded(x, op)
    cast_to = _autocast_dtype(x)
    if isinstance(op.weight, Packed):
        # A bias beside it may have any dtype: libraries cast it in their forward.
        cast_to = op.weight.dtype or cast_to or (x.dtype if x.dtype in AUTOCAST_DTYPES else None)
    sizes, dtype = check_call(x, op, cast_to), cast_to or x.dtype
    observer = _observer((x, *op))
    alone = op.A_down is None and op.B_down is None
    if observer is None or (alone and not isinstance(op.weight, Packed)):
        return Call(sizes, dtype, form, backend, cast_to)
    if backend in ("auto", "reference"):
        return Call(sizes, dtype, form, "reference", cast_to)
    if observer != "torch.export":
        raise ValueError(
            f"backend: {backend!r} cannot serve this call: {observer} needs plain operators; use backend='reference'"
        )
    # A form chosen by M would be a bound on a batch that may be dynamic.
    both_forms = backend == "aten" or (backend == "native" and x.device.type == "cpu")
    return Call(sizes, dtype, "kept" if form == "auto" and both_forms else form, backend, cast_to)


def _choice(call: Call, op: Operands, device: torch.device, masked: bool) -> Choice:
    """What serves the call; ValueError where the backend that the user chose cannot."""
    machine = here(device)
    (M, K, N, r_a, r_b), dtype = call.sizes, call.dtype
    rows = M if is_static(M) else None
    drops = op.drops_input and op.A_down is not None
    # Plain operators, which torch.compile may be left to fuse, would save a dense copy of a quantised W0.
    compiling = call.compiled is None and torch.compiler.is_compiling() and not isinstance(op.weight, Packed)
    masked = masked or drops
    choice = choose(
        rows, K, N, r_a, r_b, dtype, machine, call.form, call.backend, masked, _saves_x(op), compiling, drops,
        op.bias is not None,
    )  # fmt: skip
    if choice.backend == "reference":
        return choice
    reason = machine.reasons[choice.backend]
    reason = reason or TABLE[choice.backend].refusal(choice.form, dtype, r_a, r_b, masked, device, drops)
    if reason is not None:
        raise ValueError(f"backend: {choice.backend!r} cannot serve this call: {reason}")
    return choice


def _saves_x(op: Operands) -> bool:
    """False where up projections or scales train and no down projection does: their gradients read Z [M, R] alone."""
    for down in (op.A_down, op.B_down):
        if down is not None and down.requires_grad:
            return True
    others = (op.A_up, op.B_up, op.scale_a, op.scale_b)
    return not torch.is_grad_enabled() or not any(isinstance(t, Tensor) and t.requires_grad for t in others)


def _is_scaled(scale: float | Tensor) -> bool:
    """Whether it may be another number than 1."""
    return isinstance(scale, Tensor) or not is_static(scale) or scale != 1


def _run(x: Tensor, op: Operands, choice: Choice) -> Tensor:
    if isinstance(op.weight, Packed) and not torch.is_grad_enabled():
        op = op._replace(weight=op.weight.dense(x.dtype))
    if not torch.is_grad_enabled():
        return TABLE[choice.backend].forward(x, op, frozenset(), choice.plan)[0]
    scaled = _is_scaled(op.scale_a) or _is_scaled(op.scale_b)
    if not scaled and all(t is None for t in op[FIRST_OPTION:FIRST_NUMBER]):
        return HydraFunction.apply(choice, x, *op[:FIRST_OPTION])
    return HydraFunction.apply(choice, x, *op)


def _cast(op: Operands, dtype: torch.dtype) -> Operands:
    """As autocast casts the operands of F.linear; a boolean mask stays, the adapters are cast where they are used."""

    def to(t: Tensor | None) -> Tensor | None:
        return t if t is None or isinstance(t, Packed) or t.dtype == torch.bool else t.to(dtype)

    weight, bias, mask, input_mask = map(to, (op.weight, op.bias, op.mask, op.input_mask))
    return op._replace(weight=weight, bias=bias, mask=mask, input_mask=input_mask)


def _options(op: Operands, dropout_p: float, training: bool) -> dict[str, Any]:
    """The keyword arguments of a call, but those that say who serves it; input dropout as the mask that there is."""
    options = dict(zip(op._fields[FIRST_OPTION:], op[FIRST_OPTION:], strict=True))
    del options["input_seed"], options["mask_scale"], options["input_p"]
    if op.input_p:
        # Not in x's dtype: in low precision all of the branch would be wrong by the rounding of 1/(1-p).
        of: Any = (op.A_down if op.B_down is None else op.B_down) if isinstance(op.weight, Packed) else op.weight
        wide = torch.promote_types(of.dtype, torch.float32)
        options["input_mask"] = op.input_mask.to(wide) / (1 - op.input_p)  # type: ignore[union-attr]
    return {**options, "dropout_p": dropout_p, "training": training}


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast would run F.linear(x), or None where it would leave x alone."""
    if not isinstance(x, Tensor) or x.dtype not in AUTOCAST_DTYPES or not autocast_is_on(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _observer(operands: tuple[object, ...]) -> str | None:
    """What is on and needs plain operators: it cannot see into a kernel and would silently lose the operands."""
    if a_transform_is_on():
        return "a transform of torch.func"
    if is_exporting():
        return "torch.export"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace"
    if in_a_dual_level() and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in operands
    ):
        return "forward-mode differentiation"
    return None

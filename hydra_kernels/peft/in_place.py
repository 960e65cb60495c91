"""accelerate: the LoRA layers that PEFT has put into a model run on this package's kernels, in place.

Each ``lora.Linear`` of PEFT gets the class `AcceleratedLinear`, and nothing else of it changes. What serves a call
is decided in each forward, from the state that PEFT's layer is in then.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from ..adapter import one_branch
from ..autograd import autocast_is_on
from ..backend.interface import LOW_PRECISION, Operands
from ..checks import AUTOCAST_DTYPES, DTYPES
from ..functional import applied
from ..sharding import is_sharded
from ..weights import Packed, is_quantised, packed

ACCELERATED = "accelerated"


class Accelerated:
    """A mixin for PEFT's layer classes: where PEFT's forward is the plain formula of LoRA, our kernels compute it.

    `accelerate` gives the layers that PEFT has made such a class. With hooks, other classes of submodules or a variant
    of LoRA, PEFT's own forward runs, with one warning for each reason.
    """

    reasons_said: set[str]  # shared by the layers of a model
    dequantises_int8: bool

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """h [*, N] for x [*, K], as PEFT's forward."""
        names = _serving(self)
        if not names:  # the base layer alone, after PEFT has unmerged what it must
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        reason = _arguments(args, kwargs) or _altered(self, names) or _dropout(self, names)
        if reason is None:
            call = _call(self, names)
            reason = _unfit(call) or _input(self, call, x)
        if reason is not None:
            _say(self, reason)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if len(call.branches) == 1:
            down, up, down_bias, up_bias, scale = call.branches[0]
        else:
            (down, up, down_bias, up_bias), scale = one_branch(call.branches), 1.0
        # Not `hydra_linear`, whose checks of options cost host time: here there are none. All fields are given, since
        # a default would be an input of the graph under dynamic tracing.
        operands = Operands(
            call.weight, call.bias, down, up, None, None,
            down_bias, up_bias, None, None, None, None, None, scale, 1.0, 1.0, 0.0,
        )  # fmt: skip
        return applied(x, operands, 0.0, _drops(self, names[0]), True, "auto", "auto")


# "Linear" is in the names so that PEFT's "all-linear" finds the layers when another adapter is added.
class AcceleratedLinear(Accelerated, lora.Linear):
    """PEFT's ``lora.Linear``, accelerated."""


class AcceleratedTorchaoLinear(Accelerated, TorchaoLoraLinear):
    """PEFT's LoRA over torchao's weights, accelerated."""


def _accelerated(kind: type) -> type | None:
    """The class that `accelerate` gives layers of a class of PEFT's; None where it has none."""
    if kind.__module__ == "peft.tuners.lora.bnb":
        from . import in_place_bnb

        return in_place_bnb.ACCELERATED.get(kind)
    known: dict[type, type] = {lora.Linear: AcceleratedLinear, TorchaoLoraLinear: AcceleratedTorchaoLinear}
    return known.get(kind)


@dataclass
class Report:
    """Which forward the LoRA layers of a model run; it prints as a table.

    ``layers`` says of each, by its dotted name, "accelerated" or why PEFT's forward runs.
    """

    model: nn.Module = field(repr=False)
    layers: dict[str, str]

    @property
    def accelerated(self) -> list[str]:
        """The names of the accelerated layers."""
        return [name for name, said in self.layers.items() if said == ACCELERATED]

    def undo(self) -> None:
        """As `undo` of the model."""
        undo(self.model)

    def __str__(self) -> str:
        width = max(map(len, ("layer", *self.layers)))
        rows = [f"{name:<{width}}  {said}" for name, said in self.layers.items()]
        total = f"{len(self.accelerated)} of {len(self.layers)} LoRA layers are accelerated"
        return "\n".join([f"{'layer':<{width}}  forward", *rows, total])


def accelerate(model: nn.Module, *, strict: bool = False, int8: str = "keep") -> Report:
    """Makes the LoRA layers that PEFT put into a model run on this package's kernels.

    No parameter is moved, renamed, copied or cast, and every call of PEFT's and transformers' works as before: saving,
    loading, adding, switching, disabling, merging, deleting, unloading, the ``Trainer``. For layers
    that you add later, call it again.

    Args:
        model: a PeftModel, a model with ``add_adapter`` or ``inject_adapter_in_model`` behind it, or any module with
            LoRA layers of PEFT in it. Call before DDP, FSDP or torch.compile wrap it.
        strict: whether to raise where a layer would not be accelerated; nothing is changed then.
        int8: for LoRA over bitsandbytes' 8-bit layers: "keep" for PEFT's forward, whose products round x to 8 bits on a
            GPU (LLM.int8); "dequantise" for products of x as it is with the dequantised weight.

    Returns:
        The report, as `report` makes it.

    Raises:
        ValueError: for another int8; where the model has no LoRA layer of PEFT's; where ``strict`` finds a layer that
            keeps PEFT's forward, naming the reasons.
    """
    if int8 not in ("keep", "dequantise"):
        raise ValueError(f"int8: expected 'keep' or 'dequantise', got {int8!r}")
    found = _report(model, int8 == "dequantise")
    kept = {name: said for name, said in found.layers.items() if said != ACCELERATED}
    if strict and kept:
        shown = "; ".join(f"{name}: {said}" for name, said in list(kept.items())[:5])
        raise ValueError(f"strict: expected every LoRA layer to be accelerated, but {len(kept)} are not: {shown}")
    said: set[str] = set()
    for _, layer in _layers(model):
        if _unsuited(layer) is None:
            layer.__class__ = _accelerated(type(layer)) or type(layer)
            layer.reasons_said, layer.dequantises_int8 = said, int8 == "dequantise"
    for reason in dict.fromkeys(kept.values()):
        said.add(reason)
        warnings.warn(_words(reason), stacklevel=2)
    return found


def report(model: nn.Module) -> Report:
    """Says which forward each LoRA layer of a model runs in training, with its active adapters; changes nothing.

    Raises:
        ValueError: where the model has no LoRA layer of PEFT's.
    """
    return _report(model)


def undo(model: nn.Module) -> None:
    """Gives PEFT's class back to the accelerated layers of a model.

    Raises:
        ValueError: for a layer that ``fully_shard`` has given a class of its own. The model is then unchanged.
    """
    layers: list[tuple[str, Any]]
    layers = [(name, layer) for name, layer in _layers(model) if isinstance(layer, Accelerated)]
    for name, layer in layers:
        if type(layer).__bases__[0] is not Accelerated:
            raise ValueError(
                f"model: expected {name!r} to be an AcceleratedLinear, got {_name(layer)}; call undo before fully_shard"
            )
    for _, layer in layers:
        layer.__class__ = type(layer).__bases__[1]
        del layer.reasons_said, layer.dequantises_int8


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _report(model: nn.Module, int8: bool | None = None) -> Report:
    """The report; as it will be after accelerate where ``int8`` says whether 8-bit weights are dequantised then."""
    found: dict[str, str] = {}
    # FSDP2 makes whole tensors of its DTensors before a forward.
    gathers = any(c.__name__ == "FSDPModule" for module in model.modules() for c in type(module).__mro__)
    for name, layer in _layers(model):
        names = [n for n in layer.active_adapters if n in layer.lora_A]
        reason = _unsuited(layer)
        if reason is None and int8 is None and not isinstance(layer, Accelerated):
            reason = "accelerate has not been called since PEFT made the layer"
        reason = reason or _altered(layer, names) or _dropout(layer, names, training=True)
        reason = reason or _unfit(_call(layer, names, int8), gathers)
        found[name] = ACCELERATED if reason is None else reason
    if not found:
        raise ValueError("model: it has no LoRA layer of PEFT's; call get_peft_model or add_adapter first")
    return Report(model, found)


def _say(layer: Accelerated, reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in layer.reasons_said:
        layer.reasons_said.add(reason)
        warnings.warn(_words(reason), stacklevel=5)


def _words(reason: str) -> str:
    return f"accelerate: some layers run PEFT's own, slower forward, because {reason}"


def _serving(layer: Any) -> list[str]:
    """The adapters that the next forward adds to the base layer's output."""
    if layer._disable_adapters or layer.merged_adapters:
        return []
    # Not layer.lora_A: what is found through Module.__getattr__ costs host time in every forward.
    adapters: Any = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in adapters]


class Call(NamedTuple):
    """The tensors that a forward reads, beside x."""

    weight: Any  # a Tensor, Packed, or why a quantised one cannot be packed
    bias: Tensor | None
    branches: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Any]]  # down, up, their biases, the scale


def _call(layer: Any, names: Sequence[str], int8: bool | None = None) -> Call:
    modules = layer._modules
    downs, ups, scaling = modules["lora_A"]._modules, modules["lora_B"]._modules, layer.scaling
    branches = []
    for name in names:
        (down, down_bias), (up, up_bias) = _tensors(downs[name]), _tensors(ups[name])
        branches.append((down, up, down_bias, up_bias, scaling[name]))
    base = modules["base_layer"]
    if is_quantised(base):
        return Call(_packed_or_why(base, layer.dequantises_int8 if int8 is None else int8), base.bias, branches)
    return Call(*_tensors(base), branches)


def _tensors(linear: Any) -> tuple[Any, Any]:
    """Weight and bias, from where nn.Module keeps them: its __getattr__ costs host time in every forward."""
    own = linear._parameters
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return linear.weight, linear.bias  # parametrized, or a replica that nn.DataParallel made


def _packed_or_why(base: Any, int8: bool) -> Packed | str | None:
    """A quantised weight, or why it is not one that `hydra_linear` takes."""
    try:
        found = packed(base)
    except (TypeError, ValueError) as error:
        return str(error).replace("linear: ", "base_layer: ")
    if found is not None and found.format == "8bit" and not int8:
        return (
            "base_layer is 8-bit and rounds x on a GPU; accelerate(model, int8='dequantise') runs it without rounding"
        )
    return found


# --- why PEFT's forward runs ------------------------------------------------------------------------------------------


def _unsuited(layer: Any) -> str | None:
    """Why no call of a layer can be served, whatever state it is in. Such a layer keeps its class."""
    if not isinstance(layer, Accelerated) and _accelerated(type(layer)) is None:
        return f"the layer's class is {_name(layer)}, not PEFT's lora.Linear"
    if "forward" in layer.__dict__:
        return "the layer's forward was replaced, as offload and device_map do"
    if isinstance(layer.base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "base_layer belongs to nn.MultiheadAttention, which reads its weight without calling it"
    if getattr(layer, "is_target_conv_1d_layer", False):
        return "base_layer's class is Conv1D, not nn.Linear"
    return None


def _altered(layer: Any, names: Sequence[str]) -> str | None:
    """Why a call of the submodules would do more, or something else, than the formula of LoRA."""
    modules = layer._modules
    base = modules["base_layer"]
    own = type(base) is nn.Linear or getattr(type(base), "forward", None) is nn.Linear.forward or is_quantised(base)
    if not own:
        return f"base_layer's class is {_name(base)}, not nn.Linear"
    reason = _around("base_layer", base)
    downs, ups, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    for name in names:
        down, up, dropout = downs[name], ups[name], dropouts[name]
        if name in layer.lora_variant:
            return f"the adapter is not plain LoRA ({_name(layer.lora_variant[name])})"
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return f"the classes of lora_A and lora_B are {_name(down)} and {_name(up)}, not nn.Linear"
        if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
            return f"lora_dropout's class is {_name(dropout)}, not nn.Dropout"
        reason = reason or _around("lora_A", down) or _around("lora_B", up) or _around("lora_dropout", dropout)
    return reason


def _around(part: str, module: nn.Module) -> str | None:
    """Why a call of the module would do more than its class says."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{part} has hooks, which run only when it is called"
    if "forward" in module.__dict__:
        return f"the forward of {part} was replaced, as offload and device_map do"
    return None


def _unfit(call: Call, gathers: bool = False) -> str | None:
    """Why the tensors are not ones that `hydra_linear` takes; DTensors are where FSDP2 ``gathers`` them first."""
    weight = call.weight
    if isinstance(weight, str):
        return weight
    dtype = None if isinstance(weight, Packed) else weight.dtype
    if dtype is not None:
        if weight.requires_grad:
            return "the base layer's weight requires grad"
        if not (gathers or _is_plain(weight)):
            return "the base layer's weight is a DTensor"
        if dtype not in DTYPES:
            return f"the base layer's weight is {dtype}"
    for down, up, _, _, scale in call.branches:
        if not (gathers or (_is_plain(down) and _is_plain(up))):
            return "the adapter's weights are DTensors"
        if dtype is None and down.dtype not in AUTOCAST_DTYPES:
            return f"the adapter is {down.dtype} over a quantised base layer"
        if dtype not in (None, down.dtype) and not (down.dtype == torch.float32 and dtype in LOW_PRECISION):
            return f"the adapter is {down.dtype} over a base layer in {dtype}"
        if up.dtype != down.dtype:
            return f"lora_A is {down.dtype}, lora_B {up.dtype}"
        if isinstance(scale, Tensor):
            if scale.dim() or scale.device != down.device:
                return "scaling is a tensor, but not 0-dimensional and on the adapter's device"
        elif not isinstance(scale, (int, float)):
            return f"scaling's class is {_name(scale)}"
    return None


def _is_plain(t: Any) -> bool:
    return type(t) is nn.Parameter or type(t) is Tensor or not is_sharded(t)


def _dropout(layer: Any, names: Sequence[str], training: bool = False) -> str | None:
    """Why dropout on x keeps PEFT's forward: one call of `hydra_linear` has one mask."""
    for name in names:
        p = _drops(layer, name, training)
        if p and (len(names) > 1 or p >= 1):
            return f"lora_dropout={p} needs to be below 1 and to have one active adapter, not {len(names)}"
    return None


def _drops(layer: Any, name: str, training: bool = False) -> float:
    """The probability with which elements of x are dropped now, or would be in ``training`` mode."""
    dropout: Any = layer._modules["lora_dropout"]._modules[name]
    return dropout.p if type(dropout) is nn.Dropout and (training or dropout.training) else 0.0


def _arguments(args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    if not args and not kwargs:
        return None
    return f"the forward got more than x: {', '.join(kwargs) or f'{len(args)} arguments'}"


def _input(layer: Any, call: Call, x: Tensor) -> str | None:
    """Why `hydra_linear` does not take x as PEFT's forward does."""
    if not _is_plain(x):
        return "x is a DTensor"
    if x.is_nested or x.layout != torch.strided:
        return "x is a nested or a sparse tensor"
    casts = layer.cast_input_dtype_enabled or autocast_is_on(x)
    if not casts and any(branch[0].dtype != x.dtype for branch in call.branches):
        return "PEFT was told not to cast the input to the adapter's dtype"
    return None


def _name(thing: object) -> str:
    return type(thing).__qualname__

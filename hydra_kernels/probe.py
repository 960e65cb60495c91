"""check_adapters: whether the adapters of a model train, by one forward and backward that leave it as it was."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from .adapter import Adapter
from .layers import HydraLinear
from .model import plain_name
from .refusals import refuse_wrapped
from .sharding import is_sharded, tensors_in

NOT_CALLED = "was not called: the model reads its weight directly, or does not use it for these inputs"
NO_GRADIENTS = (
    "ran without gradients: under torch.no_grad, or in a checkpoint with use_reentrant=True "
    "whose inputs do not require grad"
)
NO_EFFECT = "had no effect: its output does not reach the loss, or is multiplied by 0"
DISABLED = "has its adapters disabled"
FROZEN = "is frozen: none of its adapters requires grad"


@dataclasses.dataclass(frozen=True, repr=False)
class AdapterReport:
    """What `check_adapters` found; it prints as a table.

    ``checked`` is the number of adapters, ``problems`` says by the name of a layer what is wrong with it, ``ok`` is
    whether there are none.
    """

    checked: int
    problems: dict[str, str]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        found = f"{self.checked - len(self.problems)} of {self.checked} adapters train"
        width = max(map(len, self.problems), default=0)
        return "\n".join([found, *(f"  {name:{width}}  {problem}" for name, problem in self.problems.items())])


@dataclasses.dataclass
class _Probe:
    """An adapter's parameters, and what is seen of its layer."""

    parameters: dict[str, nn.Parameter]
    ups: list[nn.Parameter]  # zero at the start of training
    layer: nn.Module
    disabled: bool
    called: bool = False
    with_gradients: bool = False
    reached: bool = False

    def watch(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        """A forward hook."""
        self.called = True
        for t in tensors_in(output):
            if t.requires_grad:
                self.with_gradients = True
                t.register_hook(self._saw)

    def _saw(self, gradient: Tensor) -> None:
        self.reached = self.reached or bool(gradient.any())

    def problem(self) -> str | None:
        """What is wrong, after the backward."""
        trained = {name: p.grad for name, p in self.parameters.items() if p.requires_grad}
        without = [name for name, gradient in trained.items() if gradient is None or not gradient.any()]
        if self.disabled:
            return DISABLED
        if not trained:
            return FROZEN
        if not without:
            return None
        if not self.called:
            return NOT_CALLED
        if not self.with_gradients:
            return NO_GRADIENTS
        return f"got no gradient: {', '.join(without)}" if self.reached else NO_EFFECT


def check_adapters(
    model: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any
) -> AdapterReport:
    """Says which adapters of model do not train: ``print(hk.check_adapters(model, **batch))``.

    It runs one forward and one backward in training mode. The up projections are random meanwhile, since at the start
    of training they are zero and no adapter has an effect. Afterwards parameters, gradients, buffers, random state and
    modes are as they were, even if the model raises. A layer that the model skips at random, or an expert that gets no
    token, may be named too: call it again, or with a larger batch.

    Args:
        model: with adapters of `inject`, of `hydra_kernels.peft` or of PEFT's LoRA. The active ones are checked. Call
            before DDP or FSDP wraps the model.
        inputs, kwargs: of the model's forward.
        loss: computes a number from the model's output; None takes its ``loss`` or, if it has none, a random sum of its
            tensors. If your loss is computed from weights, such as the output layer's, pass it.

    Returns:
        A report, which prints as a table. It has ``ok``, ``problems`` (what is wrong, by the layer's name) and
        ``checked`` (how many adapters).

    Raises:
        ValueError, TypeError: for a model without adapters, or one that is wrapped, sharded, merged, or on the meta
            device; for a parameter with a hook after its gradient, which would train it; for a loss that is no finite
            number. What the model raises is passed on.
    """
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected None or a function of the model's output, got {type(loss).__name__}")
    probes = _probes(model)
    _refuse(model, probes)
    with (
        torch.inference_mode(False),  # first: no tensor that is made here may be an inference tensor
        torch.enable_grad(),
        _modes_kept(model),
        _buffers_kept(model),
        _random_state_kept(model),
        _gradients_kept(model),
        _random([up for probe in probes.values() for up in probe.ups]),
        _uncompiled(),
        ExitStack() as hooks,
    ):
        for probe in probes.values():
            hooks.callback(probe.layer.register_forward_hook(probe.watch).remove)
        model.train()
        output = model(*_copied(inputs), **_copied(kwargs))
        total = _number(output, loss)
        if total is not None:
            total.backward()
        found = {name: problem for name, probe in probes.items() if (problem := probe.problem())}
    return AdapterReport(len(probes), found)


def _probes(model: nn.Module) -> dict[str, _Probe]:
    """The adapters by the name of their layer; where several of PEFT's are active, by their own."""
    probes: dict[str, _Probe] = {}
    for path, layer in model.named_modules():
        name = plain_name(path)
        if isinstance(layer, HydraLinear):
            if layer.merged:
                raise ValueError(f"model: {name or 'it'} is merged, so its adapters do not run; call unmerge first")
            if layer.adapters():
                probes[name or "the model"] = _Probe(*_of_adapter(layer), layer, not layer.adapters_enabled)
        elif kind := next((kind for kind in ("hydra_adapters", "lora_A") if hasattr(layer, kind)), None):
            peft_layer: Any = layer
            if peft_layer.merged_adapters:
                raise ValueError(f"model: {name} is merged, so its adapters do not run; call unmerge_adapter first")
            found = {key: own for key in peft_layer.active_adapters if (own := _of_peft(peft_layer, key)) is not None}
            for key, own in found.items():
                unique = f"{name}.{kind}.{key}" if len(found) > 1 else name
                probes[unique] = _Probe(*own, layer, peft_layer.disable_adapters)
    if not probes:
        raise ValueError("model: it has no active adapter of inject, of HydraConfig or of PEFT's LoRA; add one first")
    return probes


def _of_adapter(adapter: Adapter) -> tuple[dict[str, nn.Parameter], list[nn.Parameter]]:
    return adapter.adapters(), [p for p in (adapter.A_up, adapter.B_up) if p is not None]


def _of_peft(layer: Any, key: str) -> tuple[dict[str, nn.Parameter], list[nn.Parameter]] | None:
    """The parameters and the up projections of one adapter in a layer of PEFT, which need not be installed."""
    if hasattr(layer, "hydra_adapters"):
        return _of_adapter(layer.hydra_adapters[key]) if key in layer.hydra_adapters else None
    if key in layer.lora_A:
        pair = {"lora_A": layer.lora_A[key], "lora_B": layer.lora_B[key]}
        found = {f"{a}.{b}": p for a, module in pair.items() for b, p in module.named_parameters()}
        return found, [found["lora_B.weight"]]
    if key in layer.lora_embedding_A:  # of an embedding A is zero at the start
        down, up = layer.lora_embedding_A[key], layer.lora_embedding_B[key]
        return {"lora_embedding_A": down, "lora_embedding_B": up}, [down]
    return None


def _refuse(model: nn.Module, probes: Mapping[str, _Probe]) -> None:
    refuse_wrapped(model, "its gradients would go to other processes: check the model before it is wrapped")
    for name, probe in probes.items():
        if any(map(is_sharded, probe.layer.parameters())):
            raise ValueError(f"model: {name} is sharded over processes; check the model before it is sharded")
        if any(p.is_meta for p in probe.layer.parameters()):
            raise ValueError(f"model: {name} is on the meta device; fill or load its parameters first")
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"model: {name} has a hook that runs after its gradient, such as an optimizer's step, so this check "
                "would train it; check the model before the hook is registered"
            )


def _number(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor | None:
    """What the backward starts from; None where nothing in it requires a gradient."""
    total: Any
    if loss is not None:
        total = loss(output)
        if not isinstance(total, Tensor) or total.numel() != 1:
            shown = list(total.shape) if isinstance(total, Tensor) else type(total).__name__
            raise TypeError(f"loss: expected a function that returns a tensor of one number, got {shown}")
    else:
        total = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(total, Tensor):
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]
        if not tensors:
            raise ValueError(f"loss: expected a function, since the output, a {type(output).__name__}, has no tensor")
        g = torch.Generator().manual_seed(1)
        parts = [(t.float() * torch.randn(t.shape, generator=g).to(t.device)).sum() for t in tensors if t.requires_grad]
        if not parts:
            return None
        total = torch.stack([part.to(parts[0].device) for part in parts])
    total = total.sum()
    if not bool(total.isfinite()):
        raise ValueError(f"loss: expected a finite number for these inputs, got {total.item()}")
    return total if total.requires_grad else None


def _copied(inputs: Any) -> Any:
    """Inputs whose gradients go nowhere, and which the model may change."""
    if isinstance(inputs, Tensor):
        # A clone of a leaf is none, so that operations in place work as on the output of another layer.
        return inputs.detach().requires_grad_(inputs.requires_grad).clone()
    if type(inputs) in (list, tuple):
        return type(inputs)(map(_copied, inputs))
    return {key: _copied(value) for key, value in inputs.items()} if type(inputs) is dict else inputs


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Replaces the buffers by copies meanwhile, one for each tensor."""
    own = [(module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    try:
        for module, buffers, _ in own:
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for module, buffers, not_persistent in own:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = not_persistent


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    own = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in own:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in own:
            parameter.grad = gradient


@contextmanager
def _random(ups: list[nn.Parameter]) -> Iterator[None]:
    """Branches of about a tenth of what they read, the same in every call; torch's generators are not used."""
    own = [(parameter, parameter.data) for parameter in {id(p): p for p in ups}.values()]
    g = torch.Generator().manual_seed(0)
    try:
        for parameter, data in own:
            drawn = torch.randn(data.shape, generator=g) * (0.1 / math.sqrt(data.shape[1]))
            parameter.data = drawn.to(data.device, data.dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Of torch, on the devices of model, of Python and of NumPy, from which some models drop layers."""
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    with ExitStack() as kept:
        kept.enter_context(torch.random.fork_rng(devices=[]))
        for device in devices:
            kept.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


def _uncompiled() -> Any:
    """Compiled code does not run hooks that come later. Until the compiler is imported, nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()

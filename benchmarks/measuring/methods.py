"""The methods that benchmarks compare, each built once here, and the proof that ours and naive compute the same.

A method is full_tuning, linear_probing (whole models), frozen (one layer), or an owner and a kind: naive_, ours_,
compiled_ (naive under torch.compile, in whatever mode), peft_, autocast_ (PEFT's under autocast to bf16) or
accelerated_ (PEFT's, by `peft.accelerate`), followed by lora, seqlora or hydra.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hydra_kernels as hk
from benchmarks.measuring import timing
from benchmarks.measuring.naive import NAIVE, Frozen, Ranks
from hydra_kernels.weights import is_quantised

METHODS = (
    *("full_tuning", "linear_probing", "naive_lora", "naive_seqlora", "naive_hydra"),
    *("ours_lora", "ours_seqlora", "ours_hydra"),
)
# What a model without adapter biases is measured with besides, which PEFT has not.
OF_PEFT = ("peft_lora", "autocast_lora", "accelerated_lora")
MODEL_METHODS = (*METHODS, *OF_PEFT)
LAYER_METHODS = (
    *("frozen", "naive_hydra", "naive_lora", "naive_seqlora", "ours_hydra", "ours_lora", "ours_seqlora"),
    *("compiled_hydra", "compiled_lora", "compiled_seqlora", "peft_lora", "autocast_lora"),
)
# What every layer is compared with.
BASELINES = ("frozen", "naive_hydra", "naive_lora")
LEARNING_RATE = 1e-4
# The up projections and the biases start at zero, which would make the first gradients of the down projections zero and
# hide an error in them: a benchmark starts them here instead.
START_STD = 0.02


class Tolerance(NamedTuple):
    """The largest relative differences between naive and ours that rounding explains: of the loss, of a gradient."""

    loss: float
    gradient: float


# What rounding alone does, measured on ViT-B/32 over 30 steps: in fp32 losses differ by up to 3e-7 and gradients by up
# to 6e-6, in bf16 by 3e-3 and 8e-2. A gradient that is 0.9999 of the right one fails in fp32. In bf16 the bound catches
# a missing, wrong or strongly scaled term; a smaller error is below what rounding does to the naive layer itself, and
# it is the run in fp32 that vouches for the algebra. tf32, not measured yet, is given a quarter of bf16's.
TOLERANCES = {"fp32": Tolerance(1e-5, 2e-5), "tf32": Tolerance(2.5e-3, 5e-2), "bf16": Tolerance(1e-2, 2e-1)}
# The same for one layer, output and gradients alike: rounding gave up to 8.1e-7 in fp32 and 3.4e-3 in bf16 on shapes
# from 8x16x24 to 256x4096x4096; the rest is room for other GEMM libraries and longer sums.
LAYER_TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 8e-3}

# See _scales.
FEW_ELEMENTS = 64


OURS = {"lora": hk.LoRALinear, "seqlora": hk.SeqLoRALinear, "hydra": hk.HydraLinear}


def measured_in(mode: str, dtype: str, names: Sequence[str]) -> list[str]:
    """Those that a mode and a dtype measure: where every layer is compiled, compiled_ would be naive_ once more, and
    autocast is for eager steps over bf16.
    """
    without = ("compiled_",) if mode == "compile" else ()
    without += ("autocast_",) if (mode, dtype) != ("eager", "bf16") else ()
    return [name for name in names if not name.startswith(without)]


def widths(kind: str, ranks: Ranks) -> dict[str, int]:
    """The ranks as the arguments of our layers."""
    return ranks._asdict() if kind == "hydra" else {"r": sum(ranks)}


def start_adapters(module: nn.Module, head: str | None = None) -> None:
    """Fills the trainable parameters that are all zero, the head's apart."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            in_head = head is not None and name.startswith(f"{head}.")
            if parameter.requires_grad and not in_head and not parameter.any():
                parameter.normal_(std=START_STD)


def build(
    base: nn.Module,
    method: str,
    ranks: Mapping[str, Ranks],
    *,
    target: str,
    head: str,
    seed: int,
    adapter_bias: bool = True,
    lora_dropout: float = 0.0,
) -> nn.Module:
    """A model of ``method`` with ``base``'s weights, its head a copy of its own, ready to train.

    ``target`` is a regular expression that the whole names of the linear layers that get adapters match. All methods
    but full tuning share ``base``'s frozen Parameters: the same objects, not copies. ``lora_dropout`` is PEFT's alone.
    """
    if method not in MODEL_METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(MODEL_METHODS)}")
    if method == "full_tuning":
        return copy.deepcopy(base).requires_grad_(True).train()
    frozen = [parameter for name, parameter in base.named_parameters() if not name.startswith(f"{head}.")]
    # deepcopy takes what its memo already holds instead of copying it.
    model = copy.deepcopy(base, {id(parameter): parameter.requires_grad_(False) for parameter in frozen})
    torch.manual_seed(seed)
    owner, _, kind = method.partition("_")
    if owner == "ours":
        # As the naive adapters have it; over a quantised base as ours are by themselves, float32.
        over_packed = any(map(is_quantised, model.modules()))
        dtype = None if over_packed else next(model.get_submodule(head).parameters()).dtype
        options = {"adapter_bias": adapter_bias, "adapter_dtype": dtype, **widths(kind, ranks[kind])}
        hk.inject(model, target, method=kind, **options)
        hk.mark_only_adapters_trainable(model, keep=(head,))
    elif owner == "naive":
        names = [name for name, _ in model.named_modules() if re.fullmatch(target, name)]
        if not names:
            raise ValueError(f"target is {target!r}, which the name of no module matches")
        for name in names:
            model.set_submodule(name, NAIVE[kind](model.get_submodule(name), ranks[kind], adapter_bias))
    elif method in OF_PEFT:
        # Its import takes seconds, which only a run that measures it should pay.
        from peft import LoraConfig, inject_adapter_in_model

        r = ranks[kind].r_a
        inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, lora_dropout=lora_dropout, target_modules=target), model)
        model.get_submodule(head).requires_grad_(True)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # as get_peft_model makes them
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        if owner == "accelerated":
            from hydra_kernels.peft import accelerate

            accelerate(model, strict=True, int8="dequantise")
    start_adapters(model, head)
    return model.train()


def build_layer(
    linear: nn.Linear,
    method: str,
    ranks: Ranks,
    *,
    seed: int,
    form: str = "auto",
    backend: str = "auto",
    lora_dropout: float = 0.0,
) -> nn.Module:
    """One layer of ``method`` over ``linear``, which is frozen and shared; its adapters have no biases.

    Equal ranks, kind and seed give equal adapters, whoever's layer it is. ``form`` and ``backend`` are for ours. Over a
    low-precision base, PEFT's LoRA and ours have fp32 adapters, as PEFT makes them; all others have the base's dtype.
    ``lora_dropout`` is theirs alone.
    """
    if method not in LAYER_METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(LAYER_METHODS)}")
    linear.requires_grad_(False)
    if method == "frozen":
        return Frozen(linear, ranks)
    owner, _, kind = method.partition("_")
    torch.manual_seed(seed)
    naive = NAIVE[kind](linear, ranks, adapter_bias=False)
    start_adapters(naive)
    if owner == "compiled":
        naive.compile(fullgraph=True, dynamic=False)
    if owner in ("naive", "compiled"):
        return naive
    if owner == "ours":
        dtype = torch.promote_types(linear.weight.dtype, torch.float32) if kind == "lora" else None
        options = {"form": form, "backend": backend, "adapter_dtype": dtype}
        options |= {"input_dropout": lora_dropout} if kind == "lora" else {}
        layer = OURS[kind].from_linear(linear, **options, **widths(kind, ranks))
    else:
        # Its import takes seconds, which only a run that measures it should pay.
        from peft import LoraConfig
        from peft.tuners.lora.layer import Linear

        class UnderAutocast(Linear):
            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast(x.device.type, torch.bfloat16):
                    return super().forward(x)

        config = LoraConfig(r=ranks.r_a, lora_alpha=ranks.r_a, lora_dropout=lora_dropout)
        made = UnderAutocast if owner == "autocast" else Linear
        layer = made(linear, "default", config=config, r=ranks.r_a, lora_alpha=ranks.r_a)
        for adapter in (layer.lora_A, layer.lora_B):
            adapter.to(torch.promote_types(linear.weight.dtype, torch.float32))
    with torch.no_grad():
        for name, parameter in layer_adapters(layer).items():
            parameter.copy_(naive.get_parameter(name))
    return layer


def layer_adapters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a layer by the names that ours have."""
    return {our_name(name): p for name, p in layer.named_parameters() if p.requires_grad}


def our_name(name: str) -> str:
    """A parameter of PEFT's LoRA, of one layer or in a model, as ours calls it; any other as it is."""
    for theirs, ours in (("lora_A.default.weight", "A_down"), ("lora_B.default.weight", "A_up")):
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name


def forget(layer: nn.Module, x: Tensor) -> None:
    """Drops the gradients of a step, so that the next one writes its own instead of adding to them."""
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


def layer_results(layer: nn.Module, x: Tensor, h: Tensor) -> dict[str, Tensor | None]:
    """The output and every gradient after a forward and backward, by what they are."""
    gradients = {"x": x.grad, **{name: parameter.grad for name, parameter in layer_adapters(layer).items()}}
    return {"the output": h.detach(), **{f"the gradient of {name}": gradient for name, gradient in gradients.items()}}


def layer_step(layer: nn.Module, x: Tensor, G: Tensor) -> dict[str, Tensor | None]:
    """One forward and backward: the output and every gradient, by what they are; no gradient is left behind."""
    h = layer(x)
    h.backward(G)
    found = layer_results(layer, x, h)
    forget(layer, x)
    return found


@dataclass
class Contestant:
    """A method in training: its model, its optimizer and the loss of its latest step."""

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    # Micro-batches of a step.
    accumulation: int = 1
    # Whether it runs under autocast to bf16.
    autocast: bool = False
    loss: Tensor | None = None

    @classmethod
    def of(cls, method: str, model: nn.Module, accumulation: int = 1, capturable: bool = False) -> Contestant:
        """``capturable``: its steps can be captured in a CUDA graph; on a GPU alone."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, capturable=capturable)
        return cls(method, model, optimizer, accumulation, method.startswith("autocast_"))

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        """One step of training: what the table times. The gradients stay until the next one.

        The loss is the mean over the batch, whatever the number of its micro-batches; labels [n], or a label for each
        token [n, length].
        """
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part, right in zip(inputs.chunk(self.accumulation), labels.chunk(self.accumulation), strict=True):
            with torch.autocast(part.device.type, torch.bfloat16, enabled=self.autocast):
                logits = self.model(**{self.model.main_input_name: part}).logits
            loss = F.cross_entropy(logits.float().flatten(0, -2), right.flatten()) * (len(part) / len(inputs))
            loss.backward()
            losses.append(loss.detach())
        self.optimizer.step()
        self.loss = sum(losses)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {our_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}

    def dropouts(self) -> list[nn.Dropout]:
        """PEFT's of its adapters; the models have no dropout of their own."""
        named = self.model.named_modules()
        return [module for name, module in named if ".lora_dropout." in name and isinstance(module, nn.Dropout)]

    def held_bytes(self) -> int:
        """Bytes held between steps: the parameters, frozen ones too, and the optimizer's state; no gradients."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return timing.tensor_bytes([*self.model.parameters(), *state])


def copy_state(source: Contestant, target: Contestant) -> None:
    """Gives ``target`` the trained weights and the optimizer's state of ``source``."""
    originals = source.trainable()
    with torch.no_grad():
        for name, parameter in target.trainable().items():
            original = originals[name]
            parameter.copy_(original)
            for key, value in source.optimizer.state.get(original, {}).items():
                target.optimizer.state[parameter][key].copy_(value)


@contextlib.contextmanager
def without_dropout(contestants: Iterable[Contestant]) -> Iterator[None]:
    """Inside, PEFT's lora_dropout drops nothing, so that a step can be compared with naive's."""
    modules = [module for contestant in contestants for module in contestant.dropouts()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


class ParityError(Exception):
    """Ours and naive differ by more than rounding explains."""


class Difference(NamedTuple):
    """The largest relative differences of one step: of the loss, and of a gradient with its parameter's name."""

    loss: float
    gradient: float
    tensor: str

    def or_worse(self, other: Difference) -> Difference:
        """The larger of each: the worst of two steps."""
        return max(self, other, key=lambda step: step.gradient)._replace(loss=max(self.loss, other.loss))


def naive_of(method: str) -> str | None:
    """The naive method that computes the same, None for naive methods and those without one."""
    owner, _, kind = method.partition("_")
    return f"naive_{kind}" if owner in ("ours", "compiled", "peft", "autocast", "accelerated") else None


def start_equal(contestants: Mapping[str, Contestant]) -> None:
    """Gives ours naive's state."""
    for name, contestant in contestants.items():
        if partner := naive_of(name):
            copy_state(contestants[partner], contestant)


def settle(contestants: Mapping[str, Contestant], tolerance: Tolerance) -> dict[str, Difference]:
    """Compares ours with naive after a round and gives ours naive's state, so that the next one starts equal.

    A step that dropped elements of x has nothing to be compared with.
    """
    differences = {}
    for name, contestant in contestants.items():
        dropped = any(module.training for module in contestant.dropouts())
        if (partner := naive_of(name)) and not dropped:
            differences[name] = compare(contestant, contestants[partner], tolerance)
    start_equal(contestants)
    return differences


def compare(ours: Contestant, naive: Contestant, tolerance: Tolerance) -> Difference:
    """Compares the latest step of both, which started from equal weights on one batch; raises ParityError."""
    loss = _norm(ours.loss - naive.loss) / _norm(naive.loss)
    if not loss <= tolerance.loss:
        raise ParityError(f"{ours.method}: loss differs from {naive.method} by {loss:.2e}, allowed {tolerance.loss:g}")
    expected, found = (
        {f"the gradient of {name}": parameter.grad for name, parameter in contestant.trainable().items()}
        for contestant in (naive, ours)
    )
    gradient, tensor = worst_difference(ours.method, naive.method, found, expected, tolerance.gradient)
    return Difference(loss, gradient, tensor.removeprefix("the gradient of "))


def worst_difference(
    method: str,
    partner: str,
    found: Mapping[str, Tensor | None],
    expected: Mapping[str, Tensor | None],
    allowed: float,
) -> tuple[float, str]:
    """The largest relative difference between two methods' tensors, and which tensor it is; raises ParityError.

    A difference is the norm of (found - expected) over the norm of the expected (see ``_scales`` for small ones).
    """
    if expected.keys() != found.keys():
        odd = sorted(name.removeprefix("the gradient of ") for name in expected.keys() ^ found.keys())
        raise ParityError(f"{method} and {partner} do not train the same parameters: {odd}")
    for owner, tensors in ((partner, expected), (method, found)):
        for name, tensor in tensors.items():
            # Two gradients that are not there would agree about nothing.
            if tensor is None or not tensor.any():
                raise ParityError(f"{owner}: {name} is missing or zero")
    scales = _scales(expected)
    differences = []
    for name, tensor in expected.items():
        difference = _norm(found[name].double() - tensor.double()) / scales[name]
        if not difference <= allowed:
            raise ParityError(f"{method}: {name} differs from {partner} by {difference:.2e}, allowed {allowed:g}")
        differences.append((difference, name))
    return max(differences)


def _scales(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """What the difference of each tensor is measured by: its own norm.

    A gradient of a few elements (a down projection's bias has one a rank) is a sum over the batch that may happen to
    cancel, and what is left of it is then all rounding. It is measured by the root mean square of the norms that its
    kind has over the layers, where that is greater.
    """
    norms = {name: _norm(tensor) for name, tensor in tensors.items()}
    kinds: dict[str, list[float]] = {}
    for name, norm in norms.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(norm)
    for name, tensor in tensors.items():
        if tensor.numel() <= FEW_ELEMENTS:
            kin = kinds[name.rpartition(".")[2]]
            norms[name] = max(norms[name], math.sqrt(sum(norm * norm for norm in kin) / len(kin)))
    return norms


def _norm(tensor: Tensor) -> float:
    return tensor.double().norm().item()

"""The methods that benchmarks compare, each built once here, and the proof that ours and naive compute the same.

A method is full_tuning, linear_probing, or naive_ or ours_ followed by lora, seqlora or hydra.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hydra_kernels as hk
from benchmarks import timing

METHODS = (
    *("full_tuning", "linear_probing", "naive_lora", "naive_seqlora", "naive_hydra"),
    *("ours_lora", "ours_seqlora", "ours_hydra"),
)
LEARNING_RATE = 1e-4
# The up projections and the biases start at zero, which would make the first gradients of the down projections zero and
# hide an error in them: a benchmark starts them here instead.
START_STD = 0.02


class Ranks(NamedTuple):
    """Rank of the parallel branch (LoRA's) and of the sequential one (SeqLoRA's)."""

    r_a: int
    r_b: int


class Tolerance(NamedTuple):
    """The largest relative differences between naive and ours that rounding explains: of the loss, of a gradient."""

    loss: float
    gradient: float


# What rounding alone does, measured on ViT-B/32 over 30 steps: in fp32 losses differ by up to 3e-7 and gradients by up
# to 6e-6, in bf16 by 3e-3 and 8e-2. A gradient that is 0.9999 of the right one fails in fp32. In bf16 the bound catches
# a missing, wrong or strongly scaled term; a smaller error is below what rounding does to the naive layer itself, and
# it is the run in fp32 that vouches for the algebra.
TOLERANCES = {torch.float32: Tolerance(1e-5, 2e-5), torch.bfloat16: Tolerance(1e-2, 2e-1)}


# See _scales.
FEW_ELEMENTS = 64


class Naive(nn.Module):
    """A frozen linear layer with adapters as one writes them by hand; parameters and their names are our layer's."""

    def __init__(self, linear: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        out_features, in_features = linear.weight.shape
        for branch, rank, fan_in in (("A", ranks.r_a, in_features), ("B", ranks.r_b, out_features)):
            new = linear.weight.new_zeros
            for name, shape in (
                (f"{branch}_down", (rank, fan_in)),
                (f"{branch}_up", (out_features, rank)),
                (f"{branch}_down_bias", (rank,)),
                (f"{branch}_up_bias", (out_features,)),
            ):
                self.register_parameter(name, nn.Parameter(new(shape)) if rank else None)
            if rank:
                nn.init.normal_(self.get_parameter(f"{branch}_down"), std=1 / math.sqrt(fan_in))


class NaiveHydra(Naive):
    def forward(self, x: Tensor) -> Tensor:
        return hk.reference.hydra_linear(
            x,
            self.weight,
            self.bias,
            self.A_down,
            self.A_up,
            self.B_down,
            self.B_up,
            A_down_bias=self.A_down_bias,
            A_up_bias=self.A_up_bias,
            B_down_bias=self.B_down_bias,
            B_up_bias=self.B_up_bias,
        )


class NaiveLoRA(Naive):
    def forward(self, x: Tensor) -> Tensor:
        return hk.reference.lora_linear(
            x,
            self.weight,
            self.bias,
            self.A_down,
            self.A_up,
            A_down_bias=self.A_down_bias,
            A_up_bias=self.A_up_bias,
        )


class NaiveSeqLoRA(Naive):
    def forward(self, x: Tensor) -> Tensor:
        return hk.reference.seqlora_linear(
            x,
            self.weight,
            self.bias,
            self.B_down,
            self.B_up,
            B_down_bias=self.B_down_bias,
            B_up_bias=self.B_up_bias,
        )


NAIVE = {"lora": NaiveLoRA, "seqlora": NaiveSeqLoRA, "hydra": NaiveHydra}


def build(base: nn.Module, method: str, ranks: Mapping[str, Ranks], *, target: str, head: str, seed: int) -> nn.Module:
    """A model of ``method`` with ``base``'s weights, its head a copy of its own, ready to train.

    ``target`` ends the names of the linear layers that get adapters with biases. All methods but full tuning share
    ``base``'s frozen Parameters: the same objects, not copies.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if method == "full_tuning":
        return copy.deepcopy(base).requires_grad_(True).train()
    frozen = [parameter for name, parameter in base.named_parameters() if not name.startswith(f"{head}.")]
    # deepcopy takes what its memo already holds instead of copying it.
    model = copy.deepcopy(base, {id(parameter): parameter.requires_grad_(False) for parameter in frozen})
    torch.manual_seed(seed)
    owner, _, kind = method.partition("_")
    if owner == "ours":
        widths = ranks[kind]._asdict() if kind == "hydra" else {"r": sum(ranks[kind])}
        hk.inject(model, [target], method=kind, adapter_bias=True, **widths)
        hk.mark_only_adapters_trainable(model, keep=(head,))
    elif owner == "naive":
        names = [name for name, _ in model.named_modules() if name.endswith(target)]
        if not names:
            raise ValueError(f"target is {target!r}, which ends the name of no module")
        for name in names:
            model.set_submodule(name, NAIVE[kind](model.get_submodule(name), ranks[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith(f"{head}.") and not parameter.any():
                parameter.normal_(std=START_STD)
    return model.train()


@dataclass
class Contestant:
    """A method in training: its model, its optimizer and the loss of its latest step."""

    method: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Tensor | None = None

    @classmethod
    def of(cls, method: str, model: nn.Module) -> Contestant:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(method, model, torch.optim.AdamW(trainable, lr=LEARNING_RATE))

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of training: what the table times. The gradients stay until the next one."""
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(pixel_values=images).logits
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

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
    """The naive method that computes the same as ours, None for any other method."""
    return method.replace("ours_", "naive_") if method.startswith("ours_") else None


def settle(contestants: Mapping[str, Contestant], tolerance: Tolerance) -> dict[str, Difference]:
    """Compares ours with naive after a round and gives ours naive's state, so that the next one starts equal."""
    differences = {}
    for name, contestant in contestants.items():
        if partner := naive_of(name):
            differences[name] = compare(contestant, contestants[partner], tolerance)
            copy_state(contestants[partner], contestant)
    return differences


def compare(ours: Contestant, naive: Contestant, tolerance: Tolerance) -> Difference:
    """Compares the latest step of both, which started from equal weights on one batch; raises ParityError.

    A gradient's difference is the norm of (ours - naive) over the norm of naive's (see ``_scales`` for small ones).
    """
    loss = _norm(ours.loss - naive.loss) / _norm(naive.loss)
    if not loss <= tolerance.loss:
        raise ParityError(f"{ours.method}: loss differs from {naive.method} by {loss:.2e}, allowed {tolerance.loss:g}")
    expected, found = naive.trainable(), ours.trainable()
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())
        raise ParityError(f"{ours.method} and {naive.method} do not train the same parameters: {odd}")
    for contestant, parameters in ((naive, expected), (ours, found)):
        for name, parameter in parameters.items():
            # Two gradients that are not there would agree about nothing.
            if parameter.grad is None or not parameter.grad.any():
                raise ParityError(f"{contestant.method}: the gradient of {name} is missing or zero")
    scales = _scales(expected)
    differences = []
    for name, parameter in expected.items():
        difference = _norm(found[name].grad.double() - parameter.grad.double()) / scales[name]
        if not difference <= tolerance.gradient:
            raise ParityError(
                f"{ours.method}: the gradient of {name} differs from {naive.method} by {difference:.2e}, "
                f"allowed {tolerance.gradient:g}"
            )
        differences.append(Difference(loss, difference, name))
    return max(differences, key=lambda step: step.gradient)


def _scales(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """What the difference of each gradient is measured by: its own norm.

    A gradient of a few elements (a down projection's bias has one a rank) is a sum over the batch that may happen to
    cancel, and what is left of it is then all rounding. It is measured by the root mean square of the norms that its
    kind has over the layers, where that is greater.
    """
    norms = {name: _norm(parameter.grad) for name, parameter in parameters.items()}
    kinds: dict[str, list[float]] = {}
    for name, norm in norms.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(norm)
    for name, parameter in parameters.items():
        if parameter.numel() <= FEW_ELEMENTS:
            kin = kinds[name.rpartition(".")[2]]
            norms[name] = max(norms[name], math.sqrt(sum(norm * norm for norm in kin) / len(kin)))
    return norms


def _norm(tensor: Tensor) -> float:
    return tensor.double().norm().item()

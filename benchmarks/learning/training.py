"""One fine-tuning run on a small scale: the data, the backbone that it starts from, and the training itself.

A ViT learns five classes of the images whole, which stands in for pretraining; adapters and a new head then learn the
other five from a few images of each. Everything but the test images follows from one seed: which images, their order,
how the adapters start.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import hydra_kernels as hk
from benchmarks.measuring.images import Images
from benchmarks.measuring.methods import Ranks
from hydra_kernels.choose.choice import choose
from hydra_kernels.choose.machine import here
from hydra_kernels.model import adapted_layers

CLASSES, HEAD = 5, "classifier"
TEST_SEED = 2309  # of which images are the test's, whatever the seed of a run
# Where the paper puts adapters in its Tables 5 and 7: the second layer of each MLP, the attention's output projection.
POSITIONS = {"mlp": ("mlp.fc2",), "attention": ("attention.o_proj",), "both": ("mlp.fc2", "attention.o_proj")}
# Ranks of equal parameter counts: K = 4 N in the MLP gives 20 N, 22 N and 21 N, K = N in the attention 12 N each.
RANKS: Mapping[str, Mapping[str, Ranks]] = {
    "mlp.fc2": {"lora": Ranks(4, 0), "seqlora": Ranks(0, 11), "hydra": Ranks(3, 3)},
    "attention.o_proj": {"lora": Ranks(6, 0), "seqlora": Ranks(0, 6), "hydra": Ranks(3, 3)},
}


class Layers(NamedTuple):
    """What of a backbone is adapted: place -> ends of layers' names, their ranks, and ends that are left out."""

    positions: Mapping[str, Sequence[str]]
    ranks: Mapping[str, Mapping[str, Ranks]]
    exclude: Sequence[str] = ()


VIT = Layers(POSITIONS, RANKS)


@dataclass(frozen=True)
class Scale:
    """How large the experiment is."""

    image_size: int = 24
    patch_size: int = 8
    hidden_size: int = 96
    layers: int = 2
    shots: int = 20  # images of each class to train on, and as many to choose the learning rate by
    batch: int = 25
    steps: int = 60
    pretraining_steps: int = 500

    @property
    def rows(self) -> int:
        """Of a batch: a token a patch, and [CLS]."""
        return self.batch * ((self.image_size // self.patch_size) ** 2 + 1)


TINY = Scale(hidden_size=16, layers=1, shots=2, batch=5, steps=3, pretraining_steps=2)


class Indices(NamedTuple):
    """Which images (or texts) of the classes to be learned are whose, each [n] int64."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Split:
    """Images [n, 3, h, w] fp32 or token ids [n, tokens], and labels [n] of the classes to be learned, in 3 parts."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


Logits = Callable[[nn.Module, Tensor], Tensor]  # of a model and its inputs


class Schedule(Protocol):
    """What training reads of a scale."""

    batch: int
    steps: int


@dataclass
class Run:
    """What a fine-tuning run gave: the loss of each step, and the share of right answers."""

    losses: list[float]
    validation: float
    test: float | None
    trainable: int
    head: int
    model: nn.Module = field(repr=False)


def subset(images: Images, first: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images of the five classes from ``first`` on, enlarged, and their labels, counted from 0."""
    chosen = ((images.labels >= first) & (images.labels < first + CLASSES)).nonzero().flatten()
    pixels, labels = images.batch(chosen, size, device, torch.float32)
    return pixels, labels - first


def indices(labels: Tensor, shots: int, seed: int) -> Indices:
    """Half of each class for the test, the same for every seed; of the rest ``shots`` a class for either other part.

    ``labels`` [n], from 0 on; what the three parts leave is unused.
    """
    fixed, drawn = torch.Generator().manual_seed(TEST_SEED), torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in range(int(labels.max()) + 1):
        of_class = (labels == label).nonzero().flatten().cpu()
        shuffled = of_class[torch.randperm(len(of_class), generator=fixed)]
        test, pool = shuffled.tensor_split([len(of_class) // 2])
        if len(pool) < 2 * shots:
            raise ValueError(f"shots: class {label} has {len(pool)} examples beside the test's, expected {2 * shots}")
        order = pool[torch.randperm(len(pool), generator=drawn)]
        for part, chosen in zip(parts, (order[:shots], order[shots : 2 * shots], test), strict=True):
            part.append(chosen)
    return Indices(*(torch.cat(part) for part in parts))


def split(images: Images, scale: Scale, seed: int, device: torch.device) -> Split:
    """The second five classes: ``shots`` a class to train on, as many for validation, and the fixed test part."""
    pixels, labels = subset(images, CLASSES, scale.image_size, device)
    return Split(*((pixels[part], labels[part]) for part in indices(labels, scale.shots, seed)))


def batches(data: tuple[Tensor, Tensor], size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of each step's images: all of them in random order, then again in another."""
    per_epoch = len(data[1]) // size
    epochs = [torch.randperm(len(data[1]), generator=generator) for _ in range(-(-steps // per_epoch))]
    return [index for order in epochs for index in order[: per_epoch * size].split(size)][:steps]


def backbone(images: Images, scale: Scale, seed: int, device: torch.device) -> nn.Module:
    """A ViT that has learned the first five classes, shifted at random, with all of its weights."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=scale.image_size,
        patch_size=scale.patch_size,
        hidden_size=scale.hidden_size,
        intermediate_size=4 * scale.hidden_size,
        num_hidden_layers=scale.layers,
        num_attention_heads=max(1, scale.hidden_size // 32),
        num_labels=CLASSES,
    )
    model = ViTForImageClassification(config).to(device).train()
    data = subset(images, 0, scale.image_size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=scale.pretraining_steps)
    generator = torch.Generator().manual_seed(seed)
    for index in batches(data, min(64, len(data[1])), scale.pretraining_steps, generator):
        shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
        loss = F.cross_entropy(model(pixel_values=data[0][index].roll(shift, (2, 3))).logits, data[1][index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


class RoundedOnce(nn.Module):
    """An adapted layer whose sum is rounded once, as the fused kernels round it: the paper's equations in fp32 on
    operands that the base's dtype holds, h [*, N] rounded to x's dtype.
    """

    def __init__(self, layer: hk.HydraLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        own = {name: getattr(layer, name) for name in layer.ADAPTERS}
        adapters = {name: _held(p, x.dtype) if isinstance(p, nn.Parameter) else p for name, p in own.items()}
        bias = None if layer.bias is None else layer.bias.float()
        return hk.reference.hydra_linear(x.float(), layer.weight.float(), bias, **adapters).to(x.dtype)


def _held(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter as ``dtype`` holds it, in fp32; its gradient is not rounded."""
    return parameter + (parameter.to(dtype).float() - parameter).detach()


def round_once(model: nn.Module) -> None:
    """Puts `RoundedOnce` in place of every adapted layer."""
    for name, layer in adapted_layers(model).items():
        model.set_submodule(name, RoundedOnce(layer))


def adapt(
    base: nn.Module,
    method: str,
    position: str,
    backend: str,
    dtype: torch.dtype,
    seed: int,
    form: str = "auto",
    layers: Layers = VIT,
) -> nn.Module:
    """A copy of base with a new head and adapters with biases, fp32 ones over a low-precision base, as seed says.

    ``backend``: "reference" is the layer as anyone would write it, everything else is ours. ``method`` may be "head",
    which trains the head alone.
    """
    model = copy.deepcopy(base).to(dtype)
    torch.manual_seed(seed)
    head = model.get_submodule(HEAD)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    model.set_submodule(HEAD, head.float())
    if method == "head":
        model.requires_grad_(False)
        head.requires_grad_(True)
        return model
    for target in layers.positions[position]:
        ranks = layers.ranks[target][method]
        widths = ranks._asdict() if method == "hydra" else {"r": sum(ranks)}
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else None
        options = {"adapter_bias": True, "adapter_dtype": wide, "backend": backend, "form": form}
        hk.inject(model, [target], method=method, exclude=layers.exclude, **options, **widths)
    hk.mark_only_adapters_trainable(model, keep=[HEAD])
    return model


def route(model: nn.Module, *rows: int) -> tuple[str, str]:
    """The backend and the form that serve so many rows, of all adapted layers; which of several, in their order."""
    found = [
        choose(
            *(number, layer.in_features, layer.out_features, layer.r_a, layer.r_b, layer.weight.dtype),
            here(layer.weight.device),
            layer.form,
            layer.backend,
        )
        for layer in adapted_layers(model).values()
        for number in rows
    ]
    backends, forms = (dict.fromkeys(names) for names in zip(*(choice[:2] for choice in found), strict=True))
    return " and ".join(backends), " and ".join(forms)


def logits_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """The model's answer; the head is fp32 over a backbone of any dtype."""
    hidden = model.vit(pixel_values=pixels.to(model.dtype)).last_hidden_state
    return model.get_submodule(HEAD)(hidden[:, 0].float())


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor], logits: Logits = logits_of) -> float:
    """The share of right answers."""
    model.eval()
    with torch.no_grad():
        right = [logits(model, x).argmax(1) == y for x, y in zip(data[0].split(256), data[1].split(256), strict=True)]
    return torch.cat(right).float().mean().item()


def fine_tune(
    model: nn.Module,
    data: Split,
    scale: Schedule,
    rate: float,
    seed: int,
    reordered: bool = False,
    logits: Logits = logits_of,
    tested: bool = True,
) -> Run:
    """Trains the adapters and the head with AdamW.

    ``reordered`` takes the examples of every batch in another order, which changes the order of sums and nothing else.
    Without ``tested`` the test part is not looked at.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=scale.steps)
    losses = []
    model.train()
    for index in batches(data.train, scale.batch, scale.steps, torch.Generator().manual_seed(seed)):
        chosen = index.flip(0) if reordered else index
        loss = F.cross_entropy(logits(model, data.train[0][chosen]), data.train[1][chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    head = sum(p.numel() for name, p in parameters.items() if name.startswith(f"{HEAD}."))
    trainable = sum(p.numel() for p in parameters.values()) - head
    test = accuracy(model, data.test, logits) if tested else None
    return Run(losses, accuracy(model, data.validation, logits), test, trainable, head, model)

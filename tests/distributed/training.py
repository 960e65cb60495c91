"""A small network, its training on one process and on many, and the same network written with the tests' oracle."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import hydra_kernels as hk
from hydra_kernels.layers import HydraLinear
from hydra_kernels.parallel import keep_scales_whole
from tests import oracle
from tests.oracle import Tensors

WIDTH, HIDDEN, CLASSES, BATCH = 12, 20, 5, 16


@dataclass(frozen=True)
class Spec:
    """What is trained, and how it is spread."""

    method: str = "hydra"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    steps: int = 3
    micro_batches: int = 1
    compiler: str = ""  # a backend of torch.compile
    checkpointing: bool = False
    units: str = ""  # FSDP2 shards on its own, besides the root, every adapted "layer", every "block", or nothing
    reshard: bool = True
    mixed: bool = False  # FSDP2 computes in bfloat16 and reduces in float32
    static_graph: bool = False
    seed: int = 0

    def __str__(self) -> str:
        words = [self.method, *(f"{k}={v}" for k, v in self.options.items()), str(self.dtype).removeprefix("torch.")]
        words += [] if self.micro_batches == 1 else [f"{self.micro_batches}micro"]
        words += [w for w in (self.compiler, self.units) if w]
        flags = ("checkpointing", "mixed", "static_graph")
        return "-".join(words + [name for name in flags if getattr(self, name)] + ([] if self.reshard else ["kept"]))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class OracleLinear(nn.Module):
    """Eq. 9-10 as `tests.oracle` has them, with a layer's parameters in float64 under the same names."""

    def __init__(self, layer: HydraLinear) -> None:
        super().__init__()
        for name, p in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(p.detach().double(), p.requires_grad))
        self.scales = [s for s in (layer.scale_a, layer.scale_b) if isinstance(s, float)]

    def forward(self, x: Tensor) -> Tensor:
        return oracle.hydra({"x": x, **dict(self.named_parameters())}, *self.scales)


def build(spec: Spec, backend: str | None = None) -> Net:
    """The adapted network, no parameter of it zero, the same on every process."""
    options = spec.options if backend is None else {**spec.options, "backend": backend}
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        net = Net().to(spec.dtype)
        hk.inject(net, ["fc1", "fc2"], method=spec.method, **options)
        hk.mark_only_adapters_trainable(net, keep=["head"])
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name.endswith(("_up", "bias", "scale_a", "scale_b")):
                    p.add_(torch.randn_like(p) * 0.3)
    return net


def with_oracle(net: Net) -> Net:
    net = copy.deepcopy(net).double()
    for block in net.blocks:
        block.fc1, block.fc2 = OracleLinear(block.fc1), OracleLinear(block.fc2)
    return net


def data(spec: Spec) -> tuple[Tensor, Tensor]:
    """Inputs in the dtype that the network computes in, and targets in one that holds a loss."""
    g = torch.Generator().manual_seed(100 + spec.seed)
    x, y = torch.randn(BATCH, 3, WIDTH, generator=g), torch.randn(BATCH, 3, CLASSES, generator=g)
    return x.to(torch.bfloat16 if spec.mixed else spec.dtype), y.to(torch.promote_types(spec.dtype, torch.float32))


def train(
    net: nn.Module,
    spec: Spec,
    x: Tensor,
    y: Tensor,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    sync: Callable[[bool], Any] = lambda last: None,
    average: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensors:
    """Losses and gradients of every step, and every parameter after the last, all whole."""
    forward = net if forward is None else forward
    trained = {plain(name): p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1, momentum=0.9)
    found: Tensors = {}
    for step in range(spec.steps):
        losses = []
        for i, (rows, wanted) in enumerate(zip(x.chunk(spec.micro_batches), y.chunk(spec.micro_batches), strict=True)):
            sync(i == spec.micro_batches - 1)
            loss = (forward(rows).to(y.dtype) - wanted).square().mean() / spec.micro_batches
            loss.backward()
            losses.append(loss.detach())
        found[f"loss {step}"] = average(torch.stack(losses).sum())
        for name, p in trained.items():
            if p.grad is None:
                raise ValueError(f"{name}: it has no gradient")
            found[f"gradient {step} {name}"] = whole(p.grad).clone()
        optimizer.step()
        optimizer.zero_grad()
    return found | {plain(name): whole(p.detach()).clone() for name, p in net.named_parameters()}


def plain(name: str) -> str:
    for wrapper in ("_checkpoint_wrapped_module.", "base_model.model.", "base_layer.", "hydra_adapters.default."):
        name = name.replace(wrapper, "")
    return name


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def alone(spec: Spec, kind: str) -> Tensors:
    """Training on the whole batch in one process: "oracle", or the "naive" layer in spec's precision."""
    net = build(spec, "reference")
    x, y = data(spec)
    if kind == "oracle":
        return train(with_oracle(net), spec, x.double(), y.double())
    if not spec.mixed:
        return train(net, spec, x, y)

    def in_low_precision(rows: Tensor) -> Tensor:
        low = {name: p.bfloat16() for name, p in net.named_parameters()}
        return torch.func.functional_call(net, low, rows)

    return train(net, spec, x, y, forward=in_low_precision)


def mine(spec: Spec) -> tuple[Tensor, Tensor]:
    """This rank's share of the batch."""
    x, y = (t.chunk(dist.get_world_size())[dist.get_rank()] for t in data(spec))
    return x, y


def mean_over_ranks(t: Tensor) -> Tensor:
    t = t.clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


def ddp(spec: Spec) -> Tensors:
    net = build(spec)
    wrapped = DistributedDataParallel(net, static_graph=spec.static_graph)
    forward = torch.compile(wrapped, backend=spec.compiler) if spec.compiler else wrapped

    def sync(last: bool) -> None:
        wrapped.require_backward_grad_sync = last  # what no_sync() sets

    return train(net, spec, *mine(spec), forward=forward, sync=sync, average=mean_over_ranks)


def sharded(spec: Spec, mesh: Any = None) -> Net:
    """The network under FSDP2."""
    net = build(spec)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if spec.mixed else MixedPrecisionPolicy()
    scales = keep_scales_whole(net)
    kwargs = {"reshard_after_forward": spec.reshard, "mp_policy": policy, "mesh": mesh, "ignored_params": scales}
    for i, block in enumerate(net.blocks):
        if spec.checkpointing:
            block = net.blocks[i] = checkpoint_wrapper(block)
        for unit in units(block, spec.units):
            fully_shard(unit, **kwargs)
    fully_shard(net, **kwargs)
    return net


def units(block: nn.Module, kind: str) -> Iterator[nn.Module]:
    if kind == "layer":
        yield from (m for m in block.modules() if isinstance(m, HydraLinear))
    elif kind == "block":
        yield block


def fsdp_of_peft(spec: Spec) -> Tensors:
    """The same network with the adapters of `hydra_kernels.peft`, of the same values."""
    from peft import get_peft_model

    from hydra_kernels.peft import HydraConfig

    values = dict(build(spec).named_parameters())
    model = get_peft_model(Net().to(spec.dtype), HydraConfig(target_modules=["fc1", "fc2"], **spec.options))
    net = model.get_base_model()
    net.head.requires_grad_(True)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(values[plain(name)])
    scales = keep_scales_whole(model)
    for unit in (*net.blocks, model):
        fully_shard(unit, ignored_params=scales)
    return train(model, spec, *mine(spec), sync=model.set_requires_gradient_sync, average=mean_over_ranks)


def fsdp(spec: Spec) -> Tensors:
    net = sharded(spec)
    for name, p in net.named_parameters():
        if isinstance(p, DTensor) == name.endswith(("scale_a", "scale_b")):
            raise ValueError(f"{name}: it is sharded, or not, as it should not be")
    forward = torch.compile(net, backend=spec.compiler) if spec.compiler else net
    return train(net, spec, *mine(spec), forward=forward, sync=net.set_requires_gradient_sync, average=mean_over_ranks)


def scales_with_a_layer_left_out(spec: Spec, left_out: dict[int, tuple[int, ...]]) -> Tensors:
    """The gradients of the scales where a rank leaves blocks out of its forward, after a backward that failed."""
    net = build(spec)
    for name, p in net.named_parameters():
        p.requires_grad_(name.endswith(("scale_a", "scale_b")))
    keep_scales_whole(net)
    for i, block in enumerate(net.blocks):
        if i in left_out.get(dist.get_rank(), ()):
            block.forward = lambda x: x * 1
    h = net(mine(spec)[0].requires_grad_())
    h.register_hook(fail)
    with contextlib.suppress(ArithmeticError):
        h.sum().backward()
    for _ in range(spec.micro_batches):
        loss = net(mine(spec)[0].requires_grad_()).square().mean()
        loss.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def fail(_: Tensor) -> None:
    raise ArithmeticError

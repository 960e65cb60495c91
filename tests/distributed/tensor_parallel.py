"""One layer, or the network, under tensor parallelism; and what crosses between the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels as hk
from hydra_kernels.parallel import ColwiseHydra, RowwiseHydra, keep_scales_whole
from tests.cases import Case, operands
from tests.oracle import Tensors

from .training import Net, Spec, build, data, mean_over_ranks, train, units, whole

WHOLE = Replicate()
STYLES = {"columns": ColwiseHydra, "rows": RowwiseHydra}


@dataclass(frozen=True)
class Setting:
    """How a layer of a `Case` is spread and called."""

    style: str
    dtype: torch.dtype = torch.float64
    adapter_dtype: torch.dtype | None = None
    form: str = "auto"
    backend: str = "auto"
    input_layout: Placement = WHOLE
    output_layout: Placement = WHOLE
    local: bool = True
    train_bias: bool = False
    dropout: float = 0.0
    input_dropout: float = 0.0
    autocast: bool = False
    seed: int = 0

    def __str__(self) -> str:
        words = [self.style, str(self.dtype).removeprefix("torch."), self.form, self.backend]
        words += ["wide"] if self.adapter_dtype else []
        words += [] if self.local else ["dtensors"]
        words += ["b0"] if self.train_bias else []
        words += ["autocast"] if self.autocast else []
        words += ["dropout"] if self.dropout else []
        words += ["input"] if self.input_dropout else []
        layouts = [str(p) for p in (self.input_layout, self.output_layout)]
        return "-".join(words + ([] if layouts == ["R", "R"] else layouts))


def mesh_of(*sizes: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


def layer_of(case: Case, setting: Setting, t: Tensors) -> hk.HydraLinear:
    """A layer that holds the operands t."""
    layer = hk.HydraLinear(
        case.K,
        case.N,
        case.bias,
        r_a=case.r_a,
        r_b=case.r_b,
        **(case.constant_scales or {"learnable_scale": True}),
        adapter_bias=case.adapter_bias,
        adapter_dtype=setting.adapter_dtype,
        dropout=setting.dropout,
        input_dropout=setting.input_dropout,
        form=setting.form,
        backend=setting.backend,
        dtype=setting.dtype,
    )
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(t[name])
    if setting.train_bias:
        layer.bias.requires_grad_(True)
    return layer


def gathered(t: Tensor, mesh: DeviceMesh, layout: Placement) -> Tensor:
    t = t if isinstance(t, DTensor) else DTensor.from_local(t, mesh, [layout], run_check=False)
    return t.full_tensor().clone()  # which waits for it, where pickle would not


def one_layer(case: Case, setting: Setting) -> Tensors:
    """h and the gradient of x and of every Parameter that trains, whole."""
    mesh = mesh_of()
    t, G = operands(case, setting.dtype, setting.adapter_dtype, setting.seed)
    style = STYLES[setting.style](
        input_layouts=setting.input_layout, output_layouts=setting.output_layout, use_local_output=setting.local
    )
    layer = parallelize_module(layer_of(case, setting, t), mesh, style)
    torch.manual_seed(setting.seed if mesh.get_local_rank() == 0 else 99 + mesh.get_local_rank())
    x = distribute_tensor(t["x"], mesh, [setting.input_layout])
    G = distribute_tensor(G.bfloat16() if setting.autocast else G, mesh, [setting.output_layout])
    x, G = (x.to_local(), G.to_local()) if setting.local else (x, G)
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
        h = layer(x)
    if isinstance(h, DTensor) == setting.local:
        raise TypeError(f"use_local_output={setting.local} gave a {type(h).__name__}")
    h.backward(G)
    found = {"h": gathered(h.detach(), mesh, setting.output_layout), "x": gathered(x.grad, mesh, setting.input_layout)}
    return found | {name: whole(p.grad) for name, p in layer.named_parameters() if p.requires_grad}


PLAN = {"blocks.*.fc1": ColwiseHydra, "blocks.*.fc2": RowwiseHydra}


def parallelized(spec: Spec, mesh: DeviceMesh) -> Net:
    net = build(spec)
    parallelize_module(net, mesh, {name: style() for name, style in PLAN.items()})
    if spec.checkpointing:
        for i, block in enumerate(net.blocks):
            net.blocks[i] = checkpoint_wrapper(block)
    return net


def network(spec: Spec) -> Tensors:
    """Training of the network, the first layer of every block by columns and the second by rows."""
    net = parallelized(spec, mesh_of())
    forward = torch.compile(net, backend=spec.compiler, fullgraph=True) if spec.compiler else net
    return train(net, spec, *data(spec), forward=forward)


def on_two_dimensions(spec: Spec, mesh: DeviceMesh) -> Net:
    """The network by tensor parallelism on one dimension of 2 x 2 processes, under FSDP2 on the other."""
    net = parallelized(spec, mesh["model"])
    scales = keep_scales_whole(net, mesh["data"].get_group())
    for block in net.blocks:
        for unit in units(block, spec.units):
            fully_shard(unit, mesh=mesh["data"], ignored_params=scales)
    fully_shard(net, mesh=mesh["data"], ignored_params=scales)
    return net


def network_with_fsdp(spec: Spec) -> Tensors:
    """Training where each pair of processes holds half of the batch."""
    mesh = mesh_of(2, 2, names=("data", "model"))
    net = on_two_dimensions(spec, mesh)
    share = mesh["data"].get_local_rank()
    x, y = (t.chunk(2)[share] for t in data(spec))
    return train(net, spec, x, y, average=mean_over_ranks)


def after_an_unfinished_collective(backend: str) -> tuple[Tensor, Tensor]:
    """An adapted layer on what torch's RowwiseParallel hands on before it is there; and on the same, waited for."""
    torch.manual_seed(0)
    first, layer = nn.Linear(2048, 256).double(), hk.HydraLinear(256, 64, backend=backend, dtype=torch.float64)
    nn.init.ones_(layer.A_up)
    nn.init.ones_(layer.B_up)
    parallelize_module(first, mesh_of(), RowwiseParallel(input_layouts=WHOLE))
    x = torch.randn(512, 2048, dtype=torch.float64)
    h = layer(first(x))
    return h.detach().clone(), layer(first(x).clone()).detach().clone()


class Traffic(TorchDispatchMode):
    """Counts the bytes of each kind of collective's input on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional") and not any(
            word in str(function) for word in ("wait", "wrap")
        ):
            sent = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            name = str(function).split(".")[1].strip("_")
            self.bytes[name] += sum(t.numel() * t.element_size() for t in sent)
        return function(*args, **(kwargs or {}))


def traffic(M: int, K: int, N: int, options: dict[str, Any]) -> dict[str, Counter[str]]:
    """What a step of an MLP sends: its plain layers under torch's styles, and adapted ones under ours."""
    mesh, found = mesh_of(), {}
    for kind, plan in (
        ("plain", {"0": ColwiseParallel(), "2": RowwiseParallel()}),
        ("ours", {"0": ColwiseHydra(), "2": RowwiseHydra()}),
    ):
        mlp = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).double().requires_grad_(False)
        if kind == "ours":
            hk.inject(mlp, ["0", "2"], **options)
        parallelize_module(mlp, mesh, plan)
        with Traffic() as counted:
            mlp(torch.ones(M, K, dtype=torch.float64, requires_grad=True)).sum().backward()
        found[kind] = counted.bytes
    return found


def whole_life(spec: Spec, path: str) -> Tensors:
    """Outputs of the network merged, unmerged, saved and loaded into another, and without its adapters."""
    net, (x, _) = parallelized(spec, mesh_of()).eval(), data(spec)
    other = parallelized(replace(spec, seed=1), mesh_of()).eval()
    with torch.no_grad():
        for mine, its in zip(other.parameters(), net.parameters(), strict=True):
            if not mine.requires_grad:
                mine.copy_(its)
        found = {"other": other(x)}
        hk.merge(net)
        found["merged"] = net(x)
        hk.unmerge(net)
        found["unmerged"] = net(x)
        hk.save_adapters(net, path, include=["head"])
        dist.barrier()
        hk.load_adapters(other, path)
        found["loaded"] = other(x)
        for module in net.modules():
            if isinstance(module, hk.HydraLinear):
                module.disable_adapters()
        found["frozen"] = net(x)
    return {name: whole(h) for name, h in found.items()}


def refusals() -> dict[str, str]:
    mesh, spread = mesh_of(), parallelize_module(hk.HydraLinear(8, 8).eval(), mesh_of(), ColwiseHydra())
    merged = hk.HydraLinear(8, 8).eval()
    merged.merge()
    low = hk.HydraLinear(8, 8, dtype=torch.bfloat16, form="composed", backend="aten")
    parallelize_module(low, mesh, ColwiseHydra())
    two = mesh_of(2, 2, names=("data", "model"))
    with_fsdp = fully_shard(
        parallelize_module(hk.HydraLinear(8, 8).eval(), two["model"], RowwiseHydra()), mesh=two["data"]
    )
    calls = {
        "plain": lambda: parallelize_module(nn.Linear(8, 8), mesh, ColwiseHydra()),
        "merged": lambda: parallelize_module(merged, mesh, RowwiseHydra()),
        "twice": lambda: parallelize_module(spread, mesh, ColwiseHydra()),
        "uneven columns": lambda: parallelize_module(hk.HydraLinear(8, 6), mesh, ColwiseHydra()),
        "uneven rows": lambda: parallelize_module(hk.LoRALinear(6, 8), mesh, RowwiseHydra()),
        "mesh": lambda: RowwiseHydra()._apply(hk.HydraLinear(8, 8), two),
        "low precision": lambda: low(torch.ones(2, 8, dtype=torch.bfloat16)),
        "to_linear": spread.to_linear,
        "merge": with_fsdp.merge,
    }
    return {name: said(call) for name, call in calls.items()}


def said(call: Callable[[], Any]) -> str:
    """What the error says that the call raises."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "nothing"

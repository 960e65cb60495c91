"""Checkpoints and adapter files of sharded models."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

import hydra_kernels as hk
from tests.oracle import Tensors

from .tensor_parallel import mesh_of, on_two_dimensions, parallelized, said
from .training import Net, Spec, build, data, mine, sharded, whole


def spread(spec: Spec) -> Net:
    if spec.units == "two dimensions":
        return on_two_dimensions(spec, mesh_of(2, dist.get_world_size() // 2, names=("data", "model")))
    return parallelized(spec, mesh_of()) if spec.units == "tensor parallel" else sharded(spec)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)


def everything(net: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Every parameter of the network and every tensor of the optimizer, whole."""
    names = {p: name for name, p in net.named_parameters()}
    found = {name: whole(p.detach()) for p, name in names.items()}
    for p, state in optimizer.state.items():
        found |= {f"{names[p]} {key}": whole(value) for key, value in state.items()}
    return found


def train_and_write(spec: Spec, folder: str) -> Tensors:
    """Two steps of AdamW on this group, written as one distributed checkpoint."""
    net = spread(spec)
    optimizer = optimizer_of(net)
    x, y = data(spec) if spec.units == "tensor parallel" else mine(spec)
    for _ in range(2):
        (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model, optim = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optim": optim}, checkpoint_id=folder)
    return everything(net, optimizer)


def read_into(net: Net, folder: str, no_dist: bool = False) -> Tensors:
    optimizer = optimizer_of(net)
    model, optim = get_state_dict(net, optimizer)
    state = {"model": model, "optim": optim}
    dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    return everything(net, optimizer)


def read(spec: Spec, folder: str) -> Tensors:
    """The checkpoint in a sharded network that started elsewhere."""
    return read_into(spread(replace(spec, seed=spec.seed + 1)), folder)


def read_alone(spec: Spec, folder: str) -> Tensors:
    """The checkpoint in an unsharded network, without a process group."""
    return read_into(build(replace(spec, seed=spec.seed + 1)), folder, no_dist=True)


def save_adapters(spec: Spec, path: str) -> None:
    net = spread(spec)
    net(mine(spec)[0])  # which leaves some parameters whole
    hk.save_adapters(net, path, include=["head"])
    dist.barrier()


def load_adapters(spec: Spec, path: str) -> Tensors:
    net = spread(replace(spec, seed=spec.seed + 1))
    hk.load_adapters(net, path)
    return {name: whole(p.detach()) for name, p in net.named_parameters() if p.requires_grad}


def refusals(spec: Spec) -> dict[str, str]:
    """What a layer of a sharded network says to whoever reads its parameters past its forward."""
    net = sharded(spec).eval()
    layer = net.blocks[0].fc1
    calls = {
        "merge": layer.merge,
        "to_linear": layer.to_linear,
        "merge_and_unload": lambda: hk.merge_and_unload(net),
        "branches": lambda: layer.branches(torch.ones(1, layer.in_features, dtype=spec.dtype)),
    }
    return {name: said(call) for name, call in calls.items()}


def under_fsdp1(spec: Spec) -> str:
    """What a network says under the FSDP of old, which joins frozen and trainable parameters."""
    net = FullyShardedDataParallel(build(spec), device_id=torch.device("cpu"), use_orig_params=True)
    return said(lambda: net(mine(spec)[0]))

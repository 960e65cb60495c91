"""A model of quantised layers with Hydra adapters, trained for one step on one process or on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hydra_kernels as hk
from hydra_kernels.parallel import ColwiseHydra
from tests.oracle import Tensors
from tests.quantised import TARGETS, Net, quantised, randomised


def _model(kind: str) -> Any:
    model = Net(kind)
    hk.inject(model, TARGETS, r_a=2, r_b=3)
    hk.mark_only_adapters_trainable(model)
    return randomised(model)


def _batch() -> torch.Tensor:
    return torch.randn(4, 10, 64, generator=torch.Generator().manual_seed(5))


def _found(model: nn.Module, h: torch.Tensor) -> Tensors:
    h.square().mean().backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def gradients(kind: str) -> Tensors:
    model = _model(kind)
    return _found(model, model(_batch()))


def _mine() -> torch.Tensor:
    return _batch().chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def with_ddp(kind: str) -> Tensors:
    # DDP's first broadcast cannot view torchao's tensors.
    model = DistributedDataParallel(_model(kind), init_sync=kind != "int8")
    return _found(model, model(_mine()))


def with_fsdp2(kind: str) -> Tensors:
    """Every adapted layer a unit, then the model."""
    model = _model(kind)
    for unit in (model.one, model.two, model.three, model):
        fully_shard(unit)
    return _found(model, model(_mine()))


def alone_in(kind: str, dtype: torch.dtype) -> Tensors:
    """h, and every gradient, where all of the model but its packed numbers is in a low precision."""
    model = _model(kind)
    for name, p in model.named_parameters():
        if not name.endswith("base_layer.weight"):
            p.data = p.data.to(dtype)
    h = model(_batch().to(dtype))
    return {"h": h.detach(), **_found(model, h.float())}


def with_mixed_precision(kind: str, dtype: torch.dtype) -> list[Any]:
    """h of this rank's half of the batch and every gradient, or why there are none, in training and of few rows."""
    model = _model(kind)
    for unit in (model.one, model.two, model.three, model):
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(dtype, torch.float32))
    found: list[Any] = []
    try:
        h = model(_mine())
        found.append({"h": h.detach(), **_found(model, h.float())})
    except ValueError as error:
        found.append(str(error))
    try:
        with torch.no_grad():
            found += [model(_mine()[:, :2]) for _ in range(2)]
    except ValueError as error:
        found.append(str(error))
    return found


def exported_under_fsdp2(kind: str, folder: Path) -> list[Tensors]:
    """What `merged_tensors` and `to_lora` make of a model, whole and sharded."""
    model = _model(kind)
    found = [_exported(model, folder / "whole")]
    for unit in (model.one, model.two, model.three, model):
        fully_shard(unit)
    found.append(_exported(model, folder / "sharded"))
    return found


def _exported(model: nn.Module, folder: Path) -> Tensors:
    tensors = dict(hk.merged_tensors(model))
    hk.convert.to_lora(model, folder, bias="lora")
    torch.distributed.barrier()  # the first rank writes
    return tensors | load_file(folder / "adapter_model.safetensors")


def with_tensor_parallelism() -> str:
    """What a style says of a quantised layer."""
    layer = hk.HydraLinear.from_linear(quantised(nn.Linear(64, 64), "nf4"), r_a=2, r_b=2)
    try:
        parallelize_module(layer, init_device_mesh("cpu", (2,)), ColwiseHydra())
    except TypeError as error:
        return str(error)
    return "nothing was raised"

"""PEFT's LoRA, accelerated in place or not, trained on one process or on many."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hydra_kernels.peft import accelerate, report
from hydra_kernels.peft.in_place import AcceleratedLinear
from tests.oracle import Tensors

from .training import Net, Spec, mean_over_ranks, mine, train

SPEC = Spec(micro_batches=2)


def of_peft(in_place: bool) -> Any:
    """The network of `training` with LoRA in its blocks, nothing of it zero, the same on every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["fc1", "fc2"], init_lora_weights=False)
        model = get_peft_model(Net().double(), config)
    model.get_base_model().head.requires_grad_(True)
    if in_place:
        accelerate(model, strict=True)
    return model


def trained(kind: str, in_place: bool) -> Tensors:
    """Losses, gradients and parameters of a training under "ddp", or "fsdp2" over every layer or every block."""
    model = of_peft(in_place)
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)

        def sync(last: bool) -> None:
            wrapped.require_backward_grad_sync = last

        found = train(model, SPEC, *mine(SPEC), forward=wrapped, sync=sync, average=mean_over_ranks)
    else:
        blocks = model.get_base_model().blocks
        layers = [m for m in model.modules() if hasattr(m, "lora_A")] if kind == "fsdp2 layers" else []
        for unit in (*layers, *blocks, model):
            fully_shard(unit)
        if in_place != (len(report(model).accelerated) == 4):
            raise ValueError(f"it does not report what runs: {report(model)}")
        found = train(model, SPEC, *mine(SPEC), sync=model.set_requires_gradient_sync, average=mean_over_ranks)
    if in_place != any(isinstance(m, AcceleratedLinear) for m in model.modules()):
        raise ValueError("the layers are not what they should be")
    return found


def under_fsdp1(in_place: bool) -> tuple[Tensors, list[str]]:
    """One step under FSDP1 with PEFT's wrapping policy; and the warnings of `accelerate`."""
    model = of_peft(in_place)
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Block"  # which PEFT's policy reads
    policy = fsdp_auto_wrap_policy(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.get_base_model().head.requires_grad_(False)
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))
        h = wrapped(mine(SPEC)[0])
        h.square().mean().backward()
    grads = {
        name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
        for name, p in wrapped.named_parameters()
        if p.grad is not None
    }
    return {"h": h.detach().clone(), **grads}, [str(w.message) for w in said if "accelerate:" in str(w.message)]

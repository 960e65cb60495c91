"""Models that are spread over processes, written as LoRA, and merged tensor by tensor."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import hydra_kernels as hk
from hydra_kernels import sharding
from tests.oracle import Tensors

from .checkpoints import spread
from .training import HIDDEN, WIDTH, Net, Spec, build, mine

# Elements of the larger layer with its adapters of rank 5, and of the merged weight beside it.
LARGEST_LAYER = 2 * (WIDTH * HIDDEN + HIDDEN) + 5 * (WIDTH + HIDDEN) * 2


def alone(spec: Spec) -> Net:
    """The network on one process."""
    return build(spec)


def to_lora(spec: Spec, path: str) -> None:
    net = spread(spec)
    net(mine(spec)[0])  # FSDP2 leaves the root's parameters whole
    hk.convert.to_lora(net, path, bias="lora", modules_to_save=["head"])
    dist.barrier()


def merged(spec: Spec) -> tuple[Tensors, int]:
    """The merged tensors, and the largest number of elements of whole tensors that were there at a time."""
    net, seen, most = spread(spec), [], 0
    net(mine(spec)[0])
    gathered = sharding.gathered

    def watch(t: Tensor) -> None:
        nonlocal most
        seen.append(weakref.ref(t))
        most = max(most, sum(alive.numel() for ref in seen if (alive := ref()) is not None))

    def watched(t: Tensor) -> Tensor:
        whole = gathered(t)
        if whole is not t:
            watch(whole)
        return whole

    sharding.gathered = watched
    try:
        found = {}
        tensors = hk.merged_tensors(net)
        while (item := next(tensors, None)) is not None:
            found[item[0]] = item[1].clone()
            watch(item[1])
            del item
    finally:
        sharding.gathered = gathered
    return found, most


def lora() -> Any:
    from .lora import of_peft

    return of_peft(in_place=True)


def merged_lora() -> Tensors:
    model = lora()
    for unit in (*model.get_base_model().blocks, model):
        fully_shard(unit)
    return {name: t.clone() for name, t in hk.merged_tensors(model)}

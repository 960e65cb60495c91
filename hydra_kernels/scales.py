"""Learnable scales under FSDP2, which shards no parameter without dimensions: `keep_scales_whole`.

Users find it in `hydra_kernels.parallel`. Not imported by ``import hydra_kernels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .adapter import Adapter
from .private import at_the_end_of_the_backward, in_a_backward
from .sharding import tensors_in


def keep_scales_whole(model: nn.Module, group: dist.ProcessGroup | None = None) -> set[nn.Parameter]:
    """The learnable scales of model's adapters, PEFT's too, for the ``ignored_params`` of every ``fully_shard`` call.

    FSDP2 shards no parameter without dimensions. At the end of each backward, hooks average the gradients of the scales
    over the ranks of group, all ranks by default, as FSDP2 does those of the others. If a rank does not use a scale,
    its gradient there counts as zero. A scale that no rank uses gets no gradient. Every rank must call model itself and
    run a backward from its output, as under FSDP2. Give the scales a parameter group of their own in the optimizer,
    since torch's optimizers do not take plain tensors and DTensors in one group.

    Raises:
        ValueError: where model has no adapters.
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    if not adapters:
        raise ValueError("model: it has no adapters; call inject or get_peft_model first")
    # In an order that all ranks share; a dictionary, since a layer may be there twice.
    scales = list(dict.fromkeys(p for adapter in adapters for p in adapter.adapters().values() if p.dim() == 0))
    if scales:
        averages = _Averages(scales, group)
        for scale in scales:
            if scale.requires_grad:
                scale.register_post_accumulate_grad_hook(averages.start)
        model.register_forward_hook(torch.compiler.disable(averages.watch))
    return set(scales)


class _Averages:
    """Averages the gradients of all scales in one all-reduce at the end of a backward.

    Not each in a hook of its own: where a rank makes no use of a scale that hook never runs, and the others would wait
    for it. A gradient that comes to an output of the model starts it on every rank; one of a scale does too, for what
    the outputs do not show.
    """

    def __init__(self, scales: list[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self.scales, self.group, self.started = scales, group, False

    def watch(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook."""
        if not in_a_backward():
            self.started = False  # though the last backward may have failed half-way
        for t in tensors_in(output):
            if t.requires_grad:
                t.register_hook(self.start)

    def start(self, _: Tensor) -> None:
        """A hook of a tensor, which runs in a backward."""
        if not self.started:
            self.started = True
            at_the_end_of_the_backward(self.average)

    @torch.no_grad()
    def average(self) -> None:
        self.started = False
        grads = [torch.zeros_like(s) if s.grad is None else s.grad for s in self.scales]
        own = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        users = own[0].new_ones(len(own), dtype=torch.float32)
        missing = [i for i, scale in enumerate(self.scales) if scale.grad is None]
        users[missing] = 0
        *sums, users = summed([*own, users], self.group)
        for mine, total in zip(own, sums, strict=True):
            mine.copy_(total / dist.get_world_size(self.group))
        for i in missing:  # the host waits for the others' word only where a gradient is missing
            if users[i] > 0:
                self.scales[i].grad = grads[i]


def summed(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The sums over ranks of each, through one all-reduce in float32 or float64."""
    if not tensors:
        return []
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    packed = torch.cat([t.flatten().to(wide) for t in tensors])
    dist.all_reduce(packed, group=group)
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

"""Adapters as one writes them by hand: the paper's equations over a frozen linear layer, and autograd."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hydra_kernels as hk
from hydra_kernels.weights import dtype_of, is_quantised


class Ranks(NamedTuple):
    """Rank of the parallel branch (LoRA's) and of the sequential one (SeqLoRA's)."""

    r_a: int
    r_b: int


class Naive(nn.Module):
    """A frozen linear layer with adapters as one writes them by hand; parameters and their names are our layer's."""

    def __init__(self, linear: nn.Linear, ranks: Ranks, adapter_bias: bool = True) -> None:
        super().__init__()
        self.base: nn.Module | None = None
        if is_quantised(linear):
            self.base = linear
        else:
            self.weight, self.bias = linear.weight, linear.bias
        out_features, in_features = linear.out_features, linear.in_features
        options = {"dtype": dtype_of(linear), "device": linear.weight.device}
        for branch, rank, fan_in in (("A", ranks.r_a, in_features), ("B", ranks.r_b, out_features)):
            for name, shape in (
                (f"{branch}_down", (rank, fan_in)),
                (f"{branch}_up", (out_features, rank)),
                (f"{branch}_down_bias", (rank,)),
                (f"{branch}_up_bias", (out_features,)),
            ):
                present = rank and (adapter_bias or not name.endswith("bias"))
                self.register_parameter(name, nn.Parameter(torch.zeros(shape, **options)) if present else None)
            if rank:
                nn.init.normal_(self.get_parameter(f"{branch}_down"), std=1 / math.sqrt(fan_in))


class Frozen(Naive):
    """The layer alone. Not nn.Linear itself: torch.compile skips the forwards of torch's own modules."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class NaiveHydra(Naive):
    def forward(self, x: Tensor) -> Tensor:
        if self.base is not None:
            return self._over(self.base(x), x)
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

    def _over(self, y0: Tensor, x: Tensor) -> Tensor:
        """h where a quantised layer makes y0."""
        h = y0
        for v, down, up, *biases in (
            (x, self.A_down, self.A_up, self.A_down_bias, self.A_up_bias),
            (y0, self.B_down, self.B_up, self.B_down_bias, self.B_up_bias),
        ):
            h = h if down is None else h + hk.reference.low_rank(v, down, up, *biases)
        return h


class NaiveLoRA(NaiveHydra):
    """Whose r_b is 0."""


class NaiveSeqLoRA(NaiveHydra):
    """Whose r_a is 0."""


NAIVE = {"lora": NaiveLoRA, "seqlora": NaiveSeqLoRA, "hydra": NaiveHydra}

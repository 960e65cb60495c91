"""Quantised linear layers for the tests, and what their libraries say that their weights are."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

F32 = torch.float32
FOUR_BITS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-twice": {"quant_type": "nf4", "compress_statistics": True},
    "fp4-128": {"quant_type": "fp4", "compress_statistics": False, "blocksize": 128},
    "nf4-in-bf16": {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16},
}
KINDS = [*FOUR_BITS, "8bit", "int8"]


def quantised(linear: nn.Linear, kind: str, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """A layer of that kind made of a plain one."""
    K, N, bias = linear.in_features, linear.out_features, linear.bias
    if kind == "int8":
        made: nn.Module = nn.Linear(K, N, bias is not None, dtype=linear.weight.dtype)
        made.load_state_dict(linear.state_dict())
        quantize_(made, Int8WeightOnlyConfig())
        return made
    if kind == "8bit":
        made = bnb.nn.Linear8bitLt(K, N, bias is not None, has_fp16_weights=False)
        made.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(K, N, bias is not None, compute_dtype=compute_dtype)
        weight = linear.weight.data.clone()
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=made, **FOUR_BITS[kind])
        made.quant_storage = made.weight.quant_storage
    if bias is not None:
        made.bias = nn.Parameter(bias.data.clone())
    return made.to("cpu")


def weight_of(layer: nn.Module, dtype: torch.dtype = F32) -> Tensor:
    """W0 [N, K] in a dtype as the library itself makes it."""
    if isinstance(layer, bnb.nn.Linear4bit):
        state = layer.weight.quant_state
        kept, state.dtype = state.dtype, dtype
        dense = bnb.functional.dequantize_4bit(layer.weight, state)
        state.dtype = kept
        return dense
    if isinstance(layer, bnb.nn.Linear8bitLt):
        # Its forward on a CPU, in training mode, is a product with the dequantised weight.
        with torch.no_grad():
            y = layer.train()(torch.eye(layer.in_features, dtype=dtype))
        return (y if layer.bias is None else y - layer.bias).t()
    return layer.weight.dequantize(dtype)


class Net(nn.Module):
    """Three quantised layers of different shapes in a chain of M = 40 rows or so, and a plain head."""

    SIZES = ((64, 128), (128, 192), (192, 64))

    def __init__(self, kind: str, compute_dtype: torch.dtype | None = None, seed: int = 0, **plain) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(K, N, bias=i != 1, **plain) for i, (K, N) in enumerate(self.SIZES)]
        self.one, self.two, self.three = (quantised(layer, kind, compute_dtype) for layer in layers)
        self.head = nn.Linear(64, 10, **plain)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.gelu(self.one(x))
        return self.head(self.three(nn.functional.gelu(self.two(h)) + 0.1))


TARGETS = ["one", "two", "three"]


def randomised(model: nn.Module, seed: int = 1) -> nn.Module:
    """Nothing of the adapters is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "head" not in name and "bias" not in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    return model

"""Quantised bases of the models of Table 4: which there are, and the layers that they put in place of plain ones."""

from __future__ import annotations

import re

import torch
from torch import nn

from benchmarks.measuring.naive import Ranks

BASES = ("none", "nf4", "int8")
QUANTISED_RANKS = {"lora": Ranks(16, 0), "hydra": Ranks(8, 8)}


def quantise(network: nn.Module, base: str, target: str, dtype: torch.dtype) -> None:
    """Puts `quantised` layers in place of the linear ones whose whole names match target."""
    if base == "none":
        return
    # As transformers does: by it PEFT takes its classes for such layers.
    setattr(network, {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit"}[base], True)
    for name in [
        name for name, m in network.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(target, name)
    ]:
        network.set_submodule(name, quantised(network.get_submodule(name), base, dtype))


def quantised(plain: nn.Linear, base: str, dtype: torch.dtype) -> nn.Linear:
    """A layer of bitsandbytes with the weight and the bias of a plain one.

    "nf4" is `Linear4bit` as QLoRA has it, quantised twice and computing in dtype; "int8" is `Linear8bitLt`.
    """
    import bitsandbytes as bnb  # an optional extra, whose import takes seconds

    K, N, bias = plain.in_features, plain.out_features, plain.bias is not None
    if base == "nf4":
        layer = bnb.nn.Linear4bit(K, N, bias, dtype, compress_statistics=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(
            plain.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        )
        # On a CPU with AVX512-BF16 its eval forward fails for other sizes, which a dry run has.
        layer.support_avx512bf16_for_cpu &= K % 64 == 0 and N % 32 == 0
    else:
        layer = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = plain.bias
    layer = layer.to(plain.weight.device)  # which quantises
    if base == "int8":
        layer.init_8bit_state()  # else the first of the models that share this weight takes its scales away
    return layer

#!/usr/bin/env bash
# The first batch that a bitsandbytes Linear4bit sees decides its precision for good, and rounds its bias in place.
#
# Expected: a forward leaves the layer as it was. float32 inputs give float32 results, whatever came before.
# Versions: bitsandbytes 0.50.2, torch 2.13.0, CPU, Python 3.11. In training mode; without compute_dtype, as by default.
# Behaviour: the first float32 or bfloat16 input sets compute_dtype, once. After one bfloat16 batch (a warm-up, a sanity
#   check) every float32 input is rounded to bfloat16 before the product, and comes back labelled float32. The same
#   forward replaces the data of the float32 bias by bfloat16 data: the Parameter is the same, its dtype is another, so
#   an optimizer holds it unaware.
# Seen (2026-11-30): "float32 first: exact True, bias float32; bfloat16 first: exact False, bias bfloat16", where exact
#   means an error below 1e-5 of the output, against float64 over the same 4-bit weight.
# For our users: under our adapters, and under hydra_kernels.peft.accelerate, a training step computes in the dtype of
#   each input, and the layer's bias and settings stay as they were (hydra_kernels/weights.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "bitsandbytes==0.50.2" numpy
cat > "$folder/first.py" <<'PY'
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn


def after(first):
    torch.manual_seed(0)
    dense, layer, x = nn.Linear(64, 64), Linear4bit(64, 64, quant_type="nf4"), torch.randn(16, 64)
    layer.load_state_dict(dense.state_dict())
    layer.to("cpu").train()  # quantises
    bias, weight = layer.bias, dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    exact = nn.functional.linear(x.double(), weight.double(), dense.bias.double())
    layer(x.to(first))
    y = layer(x)
    assert y.dtype == torch.float32 and layer.bias is bias
    error = (y - exact).norm() / exact.norm()
    return f"exact {bool(error < 1e-5)}, bias {str(bias.dtype).removeprefix('torch.')}"


print(f"float32 first: {after(torch.float32)}; bfloat16 first: {after(torch.bfloat16)}")
PY
said=$("$folder/venv/bin/python" "$folder/first.py")
echo "$said"
[ "$said" = "float32 first: exact True, bias float32; bfloat16 first: exact False, bias bfloat16" ]

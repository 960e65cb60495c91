#!/usr/bin/env bash
# To train adapters over torchao's int8 weights takes more memory for weights than over the float weights themselves.
#
# Expected: Int8WeightOnlyConfig makes weights a quarter as large as float32. In the backward, which needs each weight
#   once more for the gradient of the input, they are made floats again, one layer at a time.
# Versions: torchao 0.18.0, torch 2.13.0, CPU, Python 3.11.
# Behaviour: the forward makes a float32 matrix of each int8 weight, and autograd keeps that matrix: for all layers at
#   once, until the backward comes by. Of an unquantised frozen layer it keeps the weight itself, which is there anyway.
#   So a training step holds int8 and float32 weights together, one and a quarter of the float model.
# Seen (2026-11-30), in bytes over those of the float weights: "model 0.25, and waiting for the backward 1.0; float
#   model 1.0, 0.0".
# For our users: our layers, and PEFT's LoRA under hydra_kernels.peft.accelerate, keep the int8 weights for the backward
#   and make floats of one layer at a time (hydra_kernels/weights.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "torchao==0.18.0" numpy
cat > "$folder/bytes.py" <<'PY'
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

SIZE, LAYERS = 256, 3
WHOLE = LAYERS * SIZE * SIZE * 4


def bytes_of(quantised):
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS))).requires_grad_(False)
    if quantised:
        quantize_(model, Int8WeightOnlyConfig())
    weights = [layer.weight.qdata if quantised else layer.weight for layer in model]
    owned, saved = {w.data_ptr() for w in weights}, {}

    def note(t):
        if t.shape == (SIZE, SIZE) and t.data_ptr() not in owned:
            saved[t.data_ptr()] = t
        return t

    x = torch.randn(16, SIZE, requires_grad=True)  # as behind a layer with adapters
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x)
    return sum(w.nbytes for w in weights) / WHOLE, sum(t.nbytes for t in saved.values()) / WHOLE


int8, floats = bytes_of(True), bytes_of(False)
print("model {}, and waiting for the backward {}; float model {}, {}".format(*int8, *floats))
PY
said=$("$folder/venv/bin/python" "$folder/bytes.py")
echo "$said"
[ "$said" = "model 0.25, and waiting for the backward 1.0; float model 1.0, 0.0" ]

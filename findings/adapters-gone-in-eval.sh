#!/usr/bin/env bash
# PEFT's LoRA in torch's nn.TransformerEncoderLayer trains, and is gone once the model is in eval mode.
#
# Expected: an adapter on linear1 and linear2 changes the output in training and in evaluation alike; without dropout
#   the two modes compute the same.
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, CPU, Python 3.11.
# Behaviour: in training the layer calls linear1 and linear2. In eval mode it hands their weights to one fused operator
#   where nothing that it reads requires a gradient. PEFT's layer shows the base's weight as its own, which PEFT has
#   frozen: so the operator runs, even with gradients enabled, and no adapter has an effect. Nothing warns. The loss
#   falls in training; what evaluation measures is the model without adapters.
# Seen (2026-11-30): "effect in train: True, in eval: False, warnings: 0".
# For our users: inject and HydraConfig refuse a layer whose weight is read past its forward, this one by name, with a
#   table of such classes of other libraries (hydra_kernels/refusals.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "peft==0.21.2" "transformers==5.23.0" numpy
cat > "$folder/effect.py" <<'PY'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
encoder = nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True)
config = LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)
x = torch.randn(2, 3, 8)


def effect(model):
    with_adapters = model(x)
    with model.disable_adapter():
        return bool((with_adapters - model(x)).abs().max() > 1e-2)


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = get_peft_model(encoder, config)
    print(f"effect in train: {effect(model.train())}, in eval: {effect(model.eval())}, warnings: {len(said)}")
PY
said=$("$folder/venv/bin/python" "$folder/effect.py")
echo "$said"
[ "$said" = "effect in train: True, in eval: False, warnings: 0" ]

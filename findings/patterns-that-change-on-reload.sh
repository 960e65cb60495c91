#!/usr/bin/env bash
# A saved PEFT adapter can load as another one: the order of alpha_pattern and rank_pattern counts, and is not stored.
#
# Expected: save_pretrained and from_pretrained give back the same model. Where two keys of alpha_pattern match a layer,
#   the one that the author wrote first is taken, so "this layer, then all others" is a sensible thing to write.
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0, CPU, Python 3.11.
# Behaviour: the first key does win. But save_pretrained sorts the keys of adapter_config.json: "." stands before "l".
#   After loading the general key comes first and wins for every layer. With rank_pattern the shapes of the file do not
#   fit then, which is an error; with alpha_pattern nothing is said, and the model computes something else.
# Seen (2026-11-30): "scaling [2.0, 8.0], loaded [2.0, 2.0], same output: False, warnings: 0".
# For our users: HydraConfig refuses keys of a pattern that match one layer and disagree, before the adapter is made
#   (hydra_kernels/peft/config.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "peft==0.21.2" "transformers==5.23.0" numpy
cat > "$folder/reload.py" <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer["q_proj"](x)
        return x


def scaling(model):
    return [layer["q_proj"].scaling["default"] for layer in model.base_model.model.layers]


patterns = {"layers.1.q_proj": 32, ".*q_proj": 8}
config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, alpha_pattern=patterns)
saved = get_peft_model(Model(), config).eval()
saved.save_pretrained(sys.argv[1])
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(Model(), sys.argv[1]).eval()
x = torch.randn(2, 8)
same = torch.allclose(saved(x), loaded(x), atol=1e-3)
print(f"scaling {scaling(saved)}, loaded {scaling(loaded)}, same output: {same}, warnings: {len(said)}")
PY
said=$("$folder/venv/bin/python" "$folder/reload.py" "$folder/adapter")
echo "$said"
[ "$said" = "scaling [2.0, 8.0], loaded [2.0, 2.0], same output: False, warnings: 0" ]

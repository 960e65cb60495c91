#!/usr/bin/env bash
# A LoRA on lm_head trains nothing under a fused cross entropy, and no error says so.
#
# Expected: LoraConfig(target_modules=[..., "lm_head"]) trains an adapter of lm_head, whatever makes the loss faster.
# Versions: liger-kernel 0.8.5, peft 0.21.2, transformers 5.23.0, torch 2.13.0, Triton 3.6.0 in its interpreter, CPU.
# Behaviour: the fused loss reads lm_head.weight, which PEFT's layer passes on from its base, and never calls lm_head.
#   The adapter counts as trainable and is saved, at zero. TRL 1.16's SFTTrainer has such a loss of its own: it refuses
#   a PEFT model like this in words, and does not see adapters of other libraries.
# Seen (2026-11-30): "plain: lm_head True, q_proj True; fused: lm_head False, q_proj True".
# For our users: check_adapters names such a layer (tests/test_probe.py); with SFTTrainer pass fused_lm_head=True too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "triton==3.6.0" "numpy<2.4" \
  "transformers==5.23.0" "peft==0.21.2" "liger-kernel==0.8.5"
cat > "$folder/head.py" <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

if sys.argv[1] == "fused":
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    off = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
    apply_liger_kernel_to_llama(**off, fused_linear_cross_entropy=True)
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
tokens = torch.randint(64, (2, 12))
model(input_ids=tokens, labels=tokens).loss.backward()
ups = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if "lora_B" in name}
said = (f"{layer} {next(trains for name, trains in ups.items() if layer in name)}" for layer in ("lm_head", "q_proj"))
print(f"{sys.argv[1]}: {', '.join(said)}")
PY
plain=$("$folder/venv/bin/python" "$folder/head.py" plain 2> "$folder/plain")
fused=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/head.py" fused 2> "$folder/fused")
said="$plain; $fused"
echo "$said"
[ "$said" = "plain: lm_head True, q_proj True; fused: lm_head False, q_proj True" ]

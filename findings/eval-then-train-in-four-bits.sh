#!/usr/bin/env bash
# On a CPU with AVX512-BF16, one evaluation of a 4-bit layer ends its gradients for good.
#
# Expected: eval(), a forward, train(), and training goes on: the gradient of x is W^T g before and after.
# Versions: bitsandbytes 0.50.2, torch 2.13.0, Python 3.11, on a processor with AVX512-BF16 (Sapphire Rapids; Zen 4 and
#   5 have it too). On others there is no such layout.
# Behaviour: the forward in eval mode repacks the weight in place. A later forward in training mode runs a product
#   without a derivative: the gradient of x does not come, and torch says so in a warning alone. Whatever lies before
#   the layer, such as the LoRA of all earlier layers, then trains on nothing.
# Seen (2026-11-30): "gradient of x before: True, after an evaluation: False".
# For our users: layers with our adapters train on over such a base, bit for bit as before the evaluation
#   (hydra_kernels/weights.py, tests/test_quantised.py).
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
  echo "this processor has no AVX512-BF16: nothing to see here"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "bitsandbytes==0.50.2" numpy setuptools
cat > "$folder/train.py" <<'PY'
import torch
from bitsandbytes.nn import Linear4bit

layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")


def has_gradient():
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    layer.train()(x).sum().backward()
    return x.grad is not None and bool(x.grad.any())


before = has_gradient()
with torch.no_grad():
    layer.eval()(torch.randn(8, 64, dtype=torch.bfloat16))
print(f"gradient of x before: {before}, after an evaluation: {has_gradient()}")
PY
said=$("$folder/venv/bin/python" "$folder/train.py" 2> "$folder/said")
echo "$said"
[ "$said" = "gradient of x before: True, after an evaluation: False" ]

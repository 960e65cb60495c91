#!/usr/bin/env bash
# oneDNN in torch: float32 products with a weight of 3072, 5120 or 6144 columns run at half speed, those with 4096 not.
#
# Expected: 3072 columns take as long a column as 3080 do. Powers of two are the widths to fear, and 3072 is none.
# Versions: torch 2.13.0 (oneDNN 3.12.0), x86 CPU, Python 3.11.
# Behaviour: rows that lie a multiple of 4096 bytes (1024 floats) apart share one set of the first cache. So oneDNN
#   copies a weight [K, N] into blocks, but only where N is a power of two (use_buffer_b in brgemm_matmul_utils.hpp, for
#   float32 on AVX2 and AVX-512 alike). It reads other multiples of 1024 where they lie. It always copies a weight that
#   lies transposed, so the product with a contiguous copy of the transpose is the faster one.
# Seen (2026-11-30): the last line, below. On an AMD Zen 3 these three took 1.9 to 2.2 times as long as 3080.
# For our users: torch's float32 layers do not run into this, because they take MKL's products, compiled ones too. Who
#   calls this operator for the gradient of a layer's input does, in the last layer of a ViT-B's MLP (3072 columns).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat > "$folder/wide.py" <<'PY'
import time

import torch

torch.set_num_threads(1)  # and its processor time, the least of several: other programs then count for little
product = torch.ops.mkldnn._linear_pointwise
g = torch.randn(256, 512)
weights = {}
for columns in (3072, 3080, 4096, 5120, 6144):
    w = torch.randn(512, columns)
    weights[f"{columns}"], weights[f"{columns} copied"] = w.T, w.T.contiguous()
least = dict.fromkeys(weights, float("inf"))
for _ in range(12):
    for name, weight in weights.items():
        started = time.process_time()
        product(g, weight, None, "none", [], "")
        least[name] = min(least[name], (time.process_time() - started) / len(weight))
times = {name: took / least["3080"] for name, took in least.items()}
print("a column's time over 3080's:", *(f"{name} {factor:.2f}," for name, factor in times.items()))
print("slower than 3080:", *(name for name, factor in times.items() if factor > 1.4))
PY
said=$(ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/wide.py")  # the same code on every x86 CPU
echo "$said"
[[ "$said" == *"slower than 3080: 3072 5120 6144" ]]

#!/usr/bin/env bash
# torch on a CPU: attention over short sequences in bfloat16 spends its time in the backward, several times that of plain products.
#
# Expected: scaled_dot_product_attention chooses a kernel that is at least about as fast as the plain products (its MATH
#   backend), in the backward too; and bfloat16 is not slower than float32.
# Versions: torch 2.13.0, CPU with AMX (Intel), Python 3.11.
# Behaviour: by itself it takes the flash kernel. At 50 tokens (a ViT-B/32) its bfloat16 backward takes about 5 times as
#   long as MATH's, and 4 times as long as its own in float32. Forward and backward together take 3 times as long as with
#   sdpa_kernel(SDPBackend.MATH). At 512 tokens flash is the faster one.
# Seen (2026-11-30): "slower than MATH: True, slower than float32: True" (66.7 against 12.1 and 14.8 ms, one thread).
# For our users: in a ViT-B/32 in bfloat16 it is two fifths of a training step, with any adapters; docs/recipes.md has the cure.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat > "$folder/short.py" <<'PY'
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)  # and its processor time, the least of several: other programs then count for little
EVERY = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
ways = {"chosen": (torch.bfloat16, EVERY), "MATH": (torch.bfloat16, SDPBackend.MATH), "float32": (torch.float32, EVERY)}
least = dict.fromkeys(ways, float("inf"))
for _ in range(8):
    for name, (dtype, backends) in ways.items():
        q, k, v = (torch.randn(32, 12, 50, 64, dtype=dtype, requires_grad=True) for _ in range(3))
        with sdpa_kernel(backends):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        started = time.process_time()
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        least[name] = min(least[name], 1e3 * (time.process_time() - started))
print(*(f"{name}: {ms:.1f} ms" for name, ms in least.items()))
print(*(f"slower than {name}: {least['chosen'] > 2 * least[name]}" for name in ("MATH", "float32")), sep=", ")
PY
said=$("$folder/venv/bin/python" "$folder/short.py")
echo "$said"
[[ "$said" == *"slower than MATH: True, slower than float32: True" ]]

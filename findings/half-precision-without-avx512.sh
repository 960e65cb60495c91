#!/usr/bin/env bash
# torch on a CPU without AVX-512: in bfloat16 and float16 a layer's backward takes over 30 times as long as in float32.
#
# Expected: half precision is about as fast as float32, and g @ w (the gradient of a layer's input) as x @ w.T (its
#   forward).
# Versions: torch 2.13.0, x86 CPU, Python 3.11.
# Behaviour: oneDNN takes bfloat16 only with AVX-512, and float16 only with AVX512-FP16 (or both with AVX-NE-CONVERT).
#   Elsewhere, and where torch.backends.mkldnn is off, torch runs loops of its own. For x @ w.T they are vector code on
#   all cores. For g @ w, and for any two matrices stored row by row, they are neither: they add up the elements of a
#   column of w one by one, so that more cores widen the gap. bmm is slow in either order. Copies in float32 are fast,
#   and scaled_dot_product_attention's MATH backend makes them itself.
# Seen (2026-11-30): "over 8 times: g @ w bmm - g @ w over 4 times x @ w.T: True", for both. On an AMD Zen 3 g @ w took
#   38 to 69 times as long as in float32. There autocast and torch.compile change nothing.
# For our users: docs/recipes.md says what to load on such a CPU. Reports of slow products are in torch's issue 146508.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat > "$folder/half.py" <<'PY'
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch._C._set_mkldnn_enabled(False)  # as torch.backends.mkldnn.flags(enabled=False): so that AVX-512 changes nothing
torch.set_num_threads(1)  # and its processor time, the least of several: other programs then count for little
attention = torch.nn.functional.scaled_dot_product_attention
ways = {
    "x @ w.T": lambda x, g, w, q: x @ w.T,
    "g.T @ x": lambda x, g, w, q: g.T @ x,
    "g @ w": lambda x, g, w, q: g @ w,
    "bmm": lambda x, g, w, q: torch.bmm(q, q),
    "float32 copies": lambda x, g, w, q: (g.float() @ w.float()).to(g.dtype),
    "MATH": lambda x, g, w, q: attention(q, q, q),
}
least = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tensors = [torch.randn(shape).to(dtype) for shape in ((64, 1024), (64, 1024), (1024, 1024), (4, 128, 128))]
    for name, way in ways.items():
        took = []
        for _ in range(6):
            with sdpa_kernel(SDPBackend.MATH):
                started = time.process_time()
                way(*tensors)
            took.append(time.process_time() - started)
        least[name, dtype] = min(took)
for dtype in (torch.bfloat16, torch.float16):
    times = {name: least[name, dtype] / least[name, torch.float32] for name in ways}
    print(dtype, "over float32:", *(f"{name} {factor:.1f}," for name, factor in times.items()))
    slow = [name for name in list(ways)[2:] if times[name] > 8]
    print("over 8 times:", *slow, "- g @ w over 4 times x @ w.T:", least["g @ w", dtype] > 4 * least["x @ w.T", dtype])
PY
said=$("$folder/venv/bin/python" "$folder/half.py")
echo "$said"
[ "$(grep -c "^over 8 times: g @ w bmm - g @ w over 4 times x @ w.T: True$" <<< "$said")" = 2 ]

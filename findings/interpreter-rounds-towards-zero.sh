#!/usr/bin/env bash
# Triton's interpreter rounds float32 to bfloat16 towards zero, where every compiled kernel rounds to the nearest value.
#
# Expected: the interpreter does no arithmetic in bfloat16, as its documentation says, so kernels compute in float32 and
#   round at the end. Then a test in the interpreter sees the numbers that a GPU will store.
# Versions: triton 3.6.0, torch 2.13.0, numpy 2.3.5, CPU, Python 3.11. The compiled side to PTX only, for sm_90.
# Behaviour: the interpreter cuts the lower 16 bits off, in a cast and in a store. Errors are up to twice as large, and
#   all of one sign: sums over rows drift, and a tolerance that is set in the interpreter is too wide on a GPU. The
#   compiled kernel has cvt.rn: to nearest, ties to even, as torch has.
# Seen (2026-11-30): "interpreter [1.0, 1.0078125, 3.984375], torch [1.0078125, 1.015625, 4.0]" and "cvt.rn.bf16".
# For our users: where it is interpreted, our kernels round by their bits themselves, so the tests on a CPU have a GPU's
#   numbers; a mutation truncates, and the tests must fail (hydra_kernels/kernels/language.py, tests/mutations.toml).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "triton==3.6.0" "numpy==2.3.5"
cat > "$folder/rounded.py" <<'PY'
import os
import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def rounded(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


if os.environ.get("TRITON_INTERPRET") == "1":
    x, out = torch.tensor([1.0070, 1.0150, 3.9990, 0.0]), torch.empty(4, dtype=torch.bfloat16)
    rounded[(1,)](x, out, 4)
    print(f"interpreter {out[:3].tolist()}, torch {x.bfloat16()[:3].tolist()}")
else:
    signature = {"x_ptr": "*fp32", "out_ptr": "*bf16", "SIZE": "constexpr"}
    source = ASTSource(fn=rounded, signature=signature, constexprs={"SIZE": 128})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print(*sorted(set(re.findall(r"cvt\.\w+\.bf16", ptx))))
PY
said=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/rounded.py"
  "$folder/venv/bin/python" "$folder/rounded.py")
echo "$said"
[ "$said" = "interpreter [1.0, 1.0078125, 3.984375], torch [1.0078125, 1.015625, 4.0]
cvt.rn.bf16" ]

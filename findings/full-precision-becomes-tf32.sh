#!/usr/bin/env bash
# Triton: tl.dot with input_precision="ieee" compiles to tf32 on Blackwell if one operand was cast to float32 before.
#
# Expected: "ieee" is full float32 wherever the kernel runs. It is what one asks for where tf32's 10 bits are too few.
# Versions: triton 3.6.0, Python 3.11. Compiled only, to PTX: no GPU is needed.
# Behaviour: for sm_90 the product is made of FMA instructions, and for sm_100 and sm_103 (B200, B300) too where both
#   operands are loaded as float32. With one loaded as bfloat16 and cast, from tiles of 64 rows on, it is a matrix
#   instruction of kind tf32: the other operand, float32 in memory, loses 13 of its 23 bits. With 32 rows it is not.
# Seen (2026-11-30): a line for each target, below.
# For our users: in full float32 our GEMM has tiles of 32 rows, and the compile report takes a matrix instruction there
#   for a fault (hydra_kernels/kernels/configs.py, benchmarks/compile_report.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "triton==3.6.0"
cat > "$folder/product.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(x_ptr, w_ptr, out_ptr, ROWS: tl.constexpr):
    m, k, n = tl.arange(0, ROWS), tl.arange(0, 32), tl.arange(0, 64)
    x = tl.load(x_ptr + m[:, None] * 32 + k[None, :])
    w = tl.load(w_ptr + k[:, None] * 64 + n[None, :]).to(tl.float32)
    tl.store(out_ptr + m[:, None] * 64 + n[None, :], tl.dot(x, w, input_precision="ieee"))


def instructions(arch, w, rows):
    signature = {"x_ptr": "*fp32", "w_ptr": f"*{w}", "out_ptr": "*fp32", "ROWS": "constexpr"}
    source = ASTSource(fn=product, signature=signature, constexprs={"ROWS": rows})
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    found = re.findall(r"(?:tcgen05|wgmma|mma)\S*\.(kind::\w+|tf32)", ptx)
    return "+".join(sorted(set(found))) or ("fma" if "fma.rn.f32" in ptx else "none")


for arch in (90, 100, 103):
    print(f"sm_{arch}:", *(instructions(arch, *case) for case in (("fp32", 64), ("bf16", 32), ("bf16", 64))))
PY
said=$("$folder/venv/bin/python" "$folder/product.py")
echo "$said"
[ "$said" = "sm_90: fma fma fma
sm_100: fma fma kind::tf32
sm_103: fma fma kind::tf32" ]

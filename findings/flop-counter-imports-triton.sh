#!/usr/bin/env bash
# To register a FLOP formula for an operator imports Triton.
#
# Expected: torch.utils.flop_counter is arithmetic on shapes. A library that calls its register_flop_formula when it is
#   imported pays next to nothing.
# Versions: torch 2.13.0 with Triton 3.6.0, CPU, Python 3.11.
# Behaviour: where Triton is installed, importing the module imports all of Triton, compiler bindings included.
# Seen (2026-11-30): "triton after torch: False, after flop_counter: True".
# For our users: the package hands its formulas to the counters that look on, at the call, and its import stays free of
#   Triton (hydra_kernels/backend/operators.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" "triton==3.6.0" numpy
said=$("$folder/venv/bin/python" - <<'PY'
import sys

import torch

before = "triton" in sys.modules
import torch.utils.flop_counter

print(f"triton after torch: {before}, after flop_counter: {'triton' in sys.modules}")
PY
)
echo "$said"
[ "$said" = "triton after torch: False, after flop_counter: True" ]

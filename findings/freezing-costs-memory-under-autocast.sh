#!/usr/bin/env bash
# Under autocast a frozen weight that is used three times is stored three times more; a trainable one once.
#
# Expected: to freeze a layer saves memory, or costs none. autocast keeps the low-precision copy of a float32 weight
#   until its block ends, so a layer that is called three times (shared layers, a recurrent model, several micro-batches
#   in one block) has one copy.
# Versions: torch 2.13.0, CPU, Python 3.11.
# Behaviour: autocast's cache takes only leaves that require a gradient. A frozen weight is cast anew in every call, and
#   autograd keeps each copy for the gradient of that call's input. This is how adapters are trained.
# Seen (2026-11-30): "copies of the weight that wait for the backward: trainable 1, frozen 3".
# For our users: our layers keep as many copies of a float32 W0 under autocast as a frozen nn.Linear. A base that is
#   loaded in bfloat16 needs none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat > "$folder/copies.py" <<'PY'
import torch
from torch import nn


def copies(trainable):
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.requires_grad_(trainable)
    saved = []  # holds the tensors, so that no two of them get one address

    def note(t):
        saved.append(t)
        return t

    x = torch.randn(16, 64, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(layer(layer(x)))
    return len({t.untyped_storage().data_ptr() for t in saved if t.shape == (64, 64) and t.dtype == torch.bfloat16})


print(f"copies of the weight that wait for the backward: trainable {copies(True)}, frozen {copies(False)}")
PY
said=$("$folder/venv/bin/python" "$folder/copies.py")
echo "$said"
[ "$said" = "copies of the weight that wait for the backward: trainable 1, frozen 3" ]

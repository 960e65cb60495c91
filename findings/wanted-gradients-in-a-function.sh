#!/usr/bin/env bash
# ctx.needs_input_grad in the backward of a Python autograd.Function does not tell what this backward is asked for.
#
# Expected: in `torch.autograd.grad(h, [a])`, ctx.needs_input_grad of the backward is (True, False) for the inputs a, b:
#   the documentation offers it to skip gradients that nobody needs.
# Versions: torch 2.13.0, CPU, Python 3.11.
# Behaviour: it stays what the forward saw, (True, True). The gradient of b is computed and thrown away. In C++,
#   AutogradContext::needs_input_grad answers for the backward that runs.
# Seen (2026-11-30): "forward (True, True), backward for a alone (True, True)".
# For our users: our backwards ask the engine which of their inputs it will go on to, so torch.autograd.grad(h, [A_up])
#   multiplies for A_up alone (tests/test_saved.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat > "$folder/asked.py" <<'PY'
import torch


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        said.append(ctx.needs_input_grad)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        said.append(ctx.needs_input_grad)
        return grad * b, grad * a


said = []
a, b = (torch.ones(3, requires_grad=True) for _ in range(2))
torch.autograd.grad(Product.apply(a, b).sum(), [a])
print("forward {}, backward for a alone {}".format(*said))
PY
said=$("$folder/venv/bin/python" "$folder/asked.py")
echo "$said"
[ "$said" = "forward (True, True), backward for a alone (True, True)" ]

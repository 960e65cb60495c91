#!/usr/bin/env bash
# A number that varies, under torch.compile: a product keeps it open, a tensor filled with it does not.
#
# Expected: once a Python float has changed, torch.compile makes it an input of the graph ("automatic dynamic"), so
#   ten values need two graphs, whatever the function does with the number.
# Versions: torch 2.13.0, CPU, Python 3.11.
# Behaviour: so it is for `x * scale`. For `torch.full((), scale) * x`, and for x.new_full, every value is compiled
#   anew, until the limit of recompilations ends compilation (fullgraph: an error). The pass that turns open numbers
#   into tensors knows arithmetic alone; where any other operator takes the number, it is bound to its value.
# Seen (2026-11-30): "product 2, filled 10" graphs for ten values.
# For our users: a constant scale reaches our custom operators as `ones * scale`, so that a schedule of scales compiles
#   twice and no more (tests/test_recompile.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy setuptools
cat > "$folder/count.py" <<'PY'
import torch
torch._dynamo.config.recompile_limit = 20


def product(x, scale):
    return x * scale


def filled(x, scale):
    return torch.full((), scale, device=x.device) * x


def graphs(function):
    compiled, x = torch.compile(function, backend="aot_eager", fullgraph=True), torch.ones(3)
    for i in range(10):
        scale = 0.5 + i
        torch.testing.assert_close(compiled(x, scale), x * scale)
    return len(torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__))


print(f"product {graphs(product)}, filled {graphs(filled)}")
PY
said=$("$folder/venv/bin/python" "$folder/count.py")
echo "$said"
[ "$said" = "product 2, filled 10" ]

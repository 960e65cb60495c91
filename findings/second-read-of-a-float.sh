#!/usr/bin/env bash
# torch.compile: a number that an autograd.Function reads twice compiles, until its value changes; then it is an error.
#
# Expected: what compiles goes on compiling when a number changes: torch.compile then makes the number an input of the
#   graph. So it is for plain operations.
# Versions: torch 2.13.0, CPU, Python 3.11.
# Behaviour: a number that has changed, and that is first read inside an autograd.Function, belongs to that function's
#   subgraph. The second read (the layer's next call, another layer with the same number) wants it from the whole graph
#   and fails, deep in dynamo. With dynamic=True the first call fails. One read outside, ahead of both, is the cure.
# Seen (2026-11-30): "plain: runs, twice: AssertionError, after_a_read_outside: runs".
# For our users: every backend is tested compiled, with numbers that change between steps, on three layers
#   (tests/test_compile.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "torch==2.13.0" numpy
cat > "$folder/twice.py" <<'PY'
import torch


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


def plain(x, scale):
    return x * scale * scale


def twice(x, scale):
    return Times.apply(Times.apply(x, scale), scale)


def after_a_read_outside(x, scale):
    return twice(x + 0 * scale, scale)


def outcome(function):
    compiled, x = torch.compile(function, backend="eager"), torch.ones(3, requires_grad=True)
    try:
        for scale in (0.5, 0.25):
            torch.testing.assert_close(compiled(x, scale), function(x, scale))
    except AssertionError as error:
        return "AssertionError" if scale == 0.25 and "lift_tracked_freevar_to_input" in str(error) else str(error)
    return "runs"


print(*(f"{f.__name__}: {outcome(f)}" for f in (plain, twice, after_a_read_outside)), sep=", ")
PY
said=$("$folder/venv/bin/python" "$folder/twice.py")
echo "$said"
[ "$said" = "plain: runs, twice: AssertionError, after_a_read_outside: runs" ]

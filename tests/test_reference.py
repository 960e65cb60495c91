"""The reference: against the tests' own oracle, and that it is as plain as a user would write it."""

import ast
import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels as hk
from hydra_kernels import reference

from .cases import CASES, PLAIN, operands
from .oracle import differentiate, hydra, out_of_bounds
from .test_backends import call, trainable


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hydra_equals_the_oracle(case):
    t, G = operands(case, torch.float64)
    wanted = trainable(t)
    true = differentiate(lambda t: hydra(t, **case.constant_scales), t, G, wanted)
    naive = differentiate(lambda t: call(reference.hydra_linear, t, case), t, G, wanted)
    scales = {k: torch.tensor(v, dtype=torch.float64) for k, v in case.constant_scales.items()}
    assert out_of_bounds(naive, {**scales, **t}, G, true, torch.float64) == []


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("learnable", [False, True])
def test_lora_and_seqlora_equal_the_oracle(side, learnable):
    one_branch = {"r_b": 0} if side == "A" else {"r_a": 0}
    t, G = operands(replace(PLAIN, adapter_bias=True, dropout=True, scales="learnable", **one_branch), torch.float64)
    scale_name = f"scale_{side.lower()}"
    wanted = trainable(t) if learnable else trainable(t) - {scale_name}

    def naive(t):
        absent = dict.fromkeys(f"{other}_{kind}" for other in "AB" if other != side for kind in ("down", "up"))
        present = {name: v for name, v in t.items() if not name.startswith("scale")}
        scale = t[scale_name] if learnable else t[scale_name].item()
        return reference.hydra_linear(**absent, **present, **{scale_name: scale})

    true = differentiate(hydra, t, G, wanted)
    assert out_of_bounds(differentiate(naive, t, G, wanted), t, G, true, torch.float64) == []


def test_the_signature_is_hydra_linears():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters(hk.hydra_linear) == parameters(reference.hydra_linear)


def test_it_imports_nothing_of_the_package():
    tree = ast.parse(Path(reference.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert "hydra" not in node.module
        elif isinstance(node, ast.Import):
            assert all("hydra" not in alias.name for alias in node.names)


class OperationLog(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_it_costs_no_operation_that_a_hand_written_layer_would_not():
    t, _ = operands(PLAIN, torch.float32)

    def by_hand(x, weight, bias, A_down, A_up, B_down, B_up):
        y0 = F.linear(x, weight, bias)
        return y0 + F.linear(F.linear(x, A_down), A_up) + F.linear(F.linear(y0, B_down), B_up)

    with OperationLog() as naive:
        h = call(reference.hydra_linear, t, PLAIN)
    with OperationLog() as expected:
        by_hand_h = by_hand(**t)
    assert sorted(naive.names) == sorted(expected.names)
    assert torch.equal(h, by_hand_h)


@pytest.mark.parametrize("case", [c for c in CASES if c.M], ids=str)
def test_merged_parameters_give_the_adapted_output(case):
    t, _ = operands(case, torch.float64)
    t.pop("mask", None)
    positional = [t.get(name) for name in ("weight", "bias", "A_down", "A_up", "B_down", "B_up")]
    options = {name: v for name, v in t.items() if name.endswith("_bias") or name.startswith("scale")}
    constants = {k: v for k, v in case.constant_scales.items() if k not in options}
    W, b = reference.merged_parameters(*positional, **options, **constants)
    assert (b is None) == (not case.bias and not case.adapter_bias)
    merged = F.linear(t["x"], W, b)
    torch.testing.assert_close(merged, hydra(t, **case.constant_scales), rtol=1e-12, atol=1e-12)
    assert W.data_ptr() != t["weight"].data_ptr()
    assert b is None or not case.bias or b.data_ptr() != t["bias"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_parameters_are_rounded_once(dtype):
    t, _ = operands(PLAIN, dtype)
    names = ("weight", "bias", "A_down", "A_up", "B_down", "B_up")
    W, b = reference.merged_parameters(*[t[name] for name in names])
    exact_W, exact_b = reference.merged_parameters(*[t[name].double() for name in names])
    half_ulp = torch.finfo(dtype).eps / 2
    for got, exact in ((W, exact_W), (b, exact_b)):
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= 1.001 * half_ulp * exact.abs() + 1e-6).all()

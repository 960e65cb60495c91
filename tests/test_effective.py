"""The effective form on a GPU, beyond the matrix: what is launched, how W0 + U D is rounded, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from triton.runtime.interpreter import interpreter_builder

import hydra_kernels as hk
from hydra_kernels.backend import TABLE
from hydra_kernels.backend import effective as steps
from hydra_kernels.kernels import configs, effective, reduce

from .cases import PLAIN, ROUNDING, Case, operands
from .oracle import out_of_bounds, violations
from .test_backends import BF16, F16, F32, three_ways
from .test_kernels import ALIGNED, ALL, launched, names, step

EVERYTHING = replace(ALIGNED, dropout=False)
PLAINLY = Case((40,), 48, 80, 8, 8)
BACKWARD = ["rebuild", "down", "grad_z", "sum_rows", "sum_rows", "reduce", "through_weight"]


def launches(*needs: str, case: Case = EVERYTHING) -> list[str]:
    return names(launched(set(needs), case=case, form="effective"))


def test_a_step_takes_one_and_seven_launches():
    assert names(launched(ALL, case=EVERYTHING, form="effective")) == ["effective", *BACKWARD]


@pytest.mark.parametrize(
    ("wanted", "backward"),
    [
        ("x", ["rebuild"]),
        ("A_up", ["down", "sum_rows", "reduce"]),
        ("A_down", ["grad_z", "sum_rows", "reduce"]),
        ("B_down", ["grad_z", "sum_rows", "reduce", "through_weight"]),
        ("B_down_bias", ["grad_z", "reduce"]),
        ("A_up_bias", ["grad_z", "reduce"]),
        ("scale_b", ["down", "grad_z", "reduce"]),
    ],
)
def test_nothing_is_launched_for_what_needs_no_gradient(wanted, backward):
    """dx alone needs neither Z nor dZ."""
    assert launches(wanted) == ["effective", *backward]


def test_x_is_read_by_its_gemm_and_two_passes_and_nothing_of_M_rows_is_read_before():
    t, G = operands(EVERYTHING, BF16)
    found = []
    step({name: v.to("meta") for name, v in t.items()}, G.to("meta"), found.append, arch=configs.SM90, form="effective")
    M = EVERYTHING.M
    rows = [
        [v.shape[0] for v in launch.arguments.values() if isinstance(v, torch.Tensor) and v.dim()] for launch in found
    ]
    assert [M in sizes for sizes in rows] == [False, False, True, True, True, True, False, False]


def weight_of(t: dict, dtype: torch.dtype, splits: int = 1, precision: str = "ieee", strided: bool = False):
    """What both kernels write: W, W again, D, d, b."""
    W0 = t["weight"]
    if strided:
        W0 = W0.t().contiguous().t()
    (N, K), r_a, r_b = W0.shape, len(t["A_down"]), len(t["B_down"])
    blank = [
        torch.full(s, torch.nan, dtype=dtype) for s in ((N, K), (N, K), (N,), (r_a + (1 + (dtype != F32)) * r_b, K))
    ]
    W, again, b, D = blank
    d = torch.full((r_a + r_b,), torch.nan)
    config, scales = configs.INTERPRETER.half.effective, (t["scale_a"], t["scale_b"])
    a = {f"{side}_{kind}": t.get(f"{side}_{kind}") for side in "AB" for kind in ("down", "up", "down_bias", "up_bias")}
    effective.effective(W0, t["bias"], a, scales, D, d, b, W, splits, config, precision).run()
    rebuild = configs.INTERPRETER.half.rebuild
    effective.rebuild(W0, t["A_up"], t["B_up"], scales, D, again, rebuild, precision).run()
    return W, again, D, d, b


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.7, -1.9)])
def test_the_sum_is_rounded_once(dtype, scales):
    """In all but a few elements, which lie halfway, W is what rounding the exact W0 + U D gives; the vectors too."""
    t, _ = operands(replace(PLAINLY, adapter_bias=True), dtype)
    t = {name: v * (4 if name.endswith("up") else 1) for name, v in t.items()}  # U D counts as much as W0
    t |= {"scale_a": scales[0], "scale_b": scales[1]}
    W, again, D, d, b = weight_of(t, dtype)
    e = {name: v.double() if isinstance(v, torch.Tensor) else v for name, v in t.items()}
    C = e["B_down"] @ e["weight"]
    U = torch.cat([scales[0] * e["A_up"], scales[1] * e["B_up"]], 1)
    exact = e["weight"] + U @ torch.cat([e["A_down"], C])
    assert (exact - e["weight"]).square().mean() > e["weight"].square().mean()
    for got in (W, again):
        assert (got != exact.to(dtype)).double().mean() < 0.02
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(D[:8], t["A_down"], rtol=0, atol=0)
    torch.testing.assert_close(D[8:16].double() + D[16:].double(), C, rtol=0, atol=2e-4 * C.abs().max().item())
    exact_d = torch.cat([e["A_down_bias"], e["B_down"] @ e["bias"] + e["B_down_bias"]])
    torch.testing.assert_close(d.double(), exact_d, rtol=1e-5, atol=1e-5)
    exact_b = e["bias"] + scales[0] * e["A_up_bias"] + scales[1] * e["B_up_bias"] + U @ exact_d
    torch.testing.assert_close(b.double(), exact_b, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_any_number_of_ranges_and_any_strides_of_W0_give_the_same_bits():
    t, _ = operands(replace(PLAINLY, N=93, K=41, adapter_bias=True), BF16)
    t |= {"scale_a": 0.7, "scale_b": 2.0}
    expected = weight_of(t, BF16)
    for splits, strided in ((2, False), (3, True)):
        got = weight_of(t, BF16, splits, strided=strided)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_programs_run_in_any_order(monkeypatch):
    t, G = operands(replace(PLAINLY, lead=(16,), adapter_bias=True), BF16)
    expected = step(t, G, form="effective")
    in_order = interpreter_builder.set_grid_idx

    def set_grid_idx(*index):
        dims = interpreter_builder.grid_dim
        programs = list(range(dims[0] * dims[1] * dims[2]))
        random.Random(0).shuffle(programs)
        x, rest = divmod(programs[(index[0] * dims[1] + index[1]) * dims[2] + index[2]], dims[1] * dims[2])
        in_order(x, *divmod(rest, dims[2]))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
    got = step(t, G, form="effective")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_tf32_rounds_nothing_before_the_gemm():
    """By three products, which the interpreter computes in full: the launches say so."""
    t, G = operands(EVERYTHING, F32)
    found = []
    setting = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        step({n: v.to("meta") for n, v in t.items()}, G.to("meta"), found.append, arch=configs.SM90, form="effective")
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
    by_kernel = {launch.kernel.__name__: launch.arguments.get("PRECISION") for launch in found}
    assert by_kernel["effective_kernel"] == by_kernel["rebuild_kernel"] == "tf32x3"
    assert by_kernel["down_kernel"] == by_kernel["grad_z_kernel"] == "tf32"


def test_each_multiprocessor_has_two_programs_where_there_are_rows_for_them():
    half, sizes = configs.SM90.half, ((768, 3072), (3072, 768), (4096, 4096), (4096, 14336), (100, 64), (8, 0))
    assert [configs.SM90.splits_of_effective(half, N, K) for N, K in sizes] == [3, 11, 3, 1, 1, 1]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", ROUNDING, ids=str)
def test_where_b0_cancels_low_precision_breaks_the_rule_but_not_the_bound(case, dtype):
    """So `auto` takes it for no layer with b0; whoever fixes it, gets what the rounding of W explains and no more."""
    true, naive, ours = three_ways(case, "hybrid", "effective", (dtype, dtype))
    broken = violations(ours, naive, true, dtype)
    assert {line.partition(":")[0] for line in broken} == {"h"}
    t, G = operands(case, dtype)
    assert out_of_bounds(ours, t, G, true, dtype) == []


def left(h: torch.Tensor, y0: torch.Tensor, delta: torch.Tensor) -> float:
    return (((h.double() - y0) * delta).sum() / delta.square().sum()).item()


def test_a_small_update_is_kept_as_by_the_naive_layer():
    """U D at 1e-3 of W0: W keeps about half of it in bfloat16, as much as the naive layer keeps of its product."""
    t, _ = operands(Case((96,), 128, 96, 4, 4, bias=False), BF16)
    t |= {name: t[name] * 0.003 for name in ("A_up", "B_up")}
    d = {name: v.double() for name, v in t.items()}
    y0 = d["x"] @ d["weight"].t()
    delta = d["x"] @ d["A_down"].t() @ d["A_up"].t() + y0 @ d["B_down"].t() @ d["B_up"].t()
    six = [t.get(name) for name in ("x", "weight", "bias", "A_down", "A_up", "B_down", "B_up")]
    base = torch.nn.functional.linear(t["x"], t["weight"]).double()
    ours = left(hk.hydra_linear(*six, form="effective", backend="hybrid"), base, delta)
    naive = left(hk.reference.hydra_linear(*six), base, delta)
    assert 0.8 * naive < ours < 1.3
    assert ours > 0.2


@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"input_dropout_p": 0.3}])
def test_dropout_is_refused(options):
    t, _ = operands(PLAIN, F32)
    six = [t[name] for name in ("x", "weight", "bias", "A_down", "A_up", "B_down", "B_up")]
    why = "backend: 'hybrid' cannot serve this call: the effective form does not support dropout"
    with pytest.raises(ValueError, match=why):
        hk.hydra_linear(*six, form="effective", backend="hybrid", **options)
    evaluated = hk.hydra_linear(*six, form="effective", backend="hybrid", training=False, **options)
    torch.testing.assert_close(evaluated, hk.reference.hydra_linear(*six), rtol=1e-5, atol=1e-5)


def test_ranks_that_no_program_holds_and_triton_are_refused():
    why = "its effective form supports ranks up to 64, and r_a + r_b is 65"
    assert TABLE["hybrid"].refusal("effective", BF16, 32, 33) == why
    assert TABLE["hybrid"].refusal("effective", BF16, 32, 32) is None
    assert TABLE["triton"].refusal("effective", BF16, 8, 8) == "it has only the composed form"
    assert TABLE["hybrid"].refusal("kept", BF16, 8, 8) == "it has only the composed and the effective form"


def network() -> nn.Sequential:
    """Three layers of different shapes: Hydra with every option, LoRA, SeqLoRA without b0."""
    torch.manual_seed(0)
    way = {"form": "effective", "backend": "hybrid"}
    layers = [
        hk.HydraLinear(20, 33, r_a=3, r_b=2, adapter_bias=True, learnable_scale=True, **way),
        hk.LoRALinear(33, 18, r=4, scale=0.7, **way),
        hk.SeqLoRALinear(18, 7, bias=False, r=5, **way),
    ]
    for layer in layers:
        for name, p in layer.named_parameters():
            if p.requires_grad and (name.endswith("_up") or name.endswith("bias")):
                nn.init.normal_(p, std=0.3)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])  # as the operators' opcheck
def test_a_model_of_three_layers(compiled):
    model, x = network(), torch.randn(9, 20, requires_grad=True)

    def step_of(function) -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        h = function(x)
        h.square().sum().backward()
        return [h.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    torch.compiler.reset()
    ours = step_of(torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)
    for layer in model:
        if isinstance(layer, hk.HydraLinear):
            layer.form, layer.backend = "auto", "reference"
    for got, expected in zip(ours, step_of(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_no_pass_reads_an_expanded_gradient_element_by_element():
    t, G = operands(PLAINLY, BF16)
    found = []

    def run(launch):
        found.append(launch)
        launch.run()

    expanded = G[:1, :1].expand(*G.shape)
    got = step(t, expanded, run, form="effective")
    expected = step(t, expanded.clone(memory_format=torch.contiguous_format), form="effective")
    assert all(torch.equal(got[name], v) for name, v in expected.items())
    read = {v.data_ptr() for launch in found for name, v in launch.arguments.items() if name in ("G_ptr", "x_ptr")}
    assert expanded.data_ptr() not in read


def test_no_rows_at_all():
    t, G = operands(replace(EVERYTHING, lead=(0,)), BF16)
    got = step(t, G, form="effective")
    assert got["h"].shape == (0, EVERYTHING.N)
    assert not any(got[name].any() for name in reduce.GRADIENTS)


def test_without_gradients_nothing_but_the_weight_is_made():
    t, _ = operands(replace(PLAINLY, bias=False), F32)
    found = []
    op = steps.Operands(**{name: t.get(name) for name in steps.Operands._fields[:6]})
    _, _, saved = steps.forward(t["x"], op, frozenset(), configs.INTERPRETER, found.append)
    assert saved == (None, None, None)
    assert [found[0].arguments[name] for name in ("D_ptr", "d_ptr", "b_ptr")] == [None, None, None]

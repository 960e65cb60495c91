"""What the doctors check of a backend: a call against float64, and as it is used: streams, graphs, torch.compile."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hydra_kernels as hk
from benchmarks.device.doctor_kernels import Compared, Finding, Format, device, judge, prepare, slack_of
from benchmarks.measuring import bases
from hydra_kernels import weights
from tests.cases import INPUT_P, INPUT_SEED, Case, operands
from tests.oracle import Tensors, differentiate, hydra, input_mask

FREE_BYTES = 20 << 30  # that a check of int64 offsets wants

Check = Callable[[], Finding]


def call(function: Callable[..., Tensor], case: Case, t: Tensors, **options: Any) -> Tensor:
    t = dict(t)
    if case.input_dropout == "seed" and function is hk.hydra_linear:
        del t["input_mask"]
        torch.manual_seed(INPUT_SEED)
        options["input_dropout_p"] = INPUT_P
    positional = [t.pop(name, None) for name in ("x", "weight", "bias", "A_down", "A_up", "B_down", "B_up")]
    return function(*positional, **t, **case.constant_scales, **options)


def drawn(case: Case, form: Format, seed: int = 0) -> tuple[Tensors, Tensor]:
    t, G = operands(case, form.base, form.adapters, seed)
    if case.input_dropout == "seed":
        torch.manual_seed(INPUT_SEED)
        of_device = int(torch.randint(2**63 - 1, (), device=device()))  # a GPU's generator gives another one
        t["input_mask"] = input_mask(of_device, INPUT_P, case.M, case.K).to(form.base)
    return {name: v.to(device()) for name, v in t.items()}, G.to(device())


def wanted(t: Tensors) -> set[str]:
    return set(t) - {"weight", "mask", "input_mask"}


def ours(case: Case, backend: str, t: Tensors, G: Tensor, form: str = "auto") -> Tensors:
    return differentiate(partial(call, hk.hydra_linear, case, backend=backend, form=form), t, G, wanted(t))


def against_oracle(got: Tensors, form: Format, case: Case, t: Tensors, G: Tensor) -> list[Compared]:
    doubles = {name: v.double() for name, v in t.items()}
    true = differentiate(lambda t: hydra(t, **case.constant_scales), doubles, G.double(), wanted(t))
    naive = differentiate(partial(call, hk.reference.hydra_linear, case), t, G, wanted(t))
    slack = slack_of(form, form.base)
    return [Compared(name, got[name], naive[name], value, slack) for name, value in true.items()]


def backend_check(backend: str, form: Format, case: Case, draws: int, way: str = "auto") -> Finding:
    """``way`` is the form of hydra_linear."""
    prepare(form)
    operands_of = (drawn(case, form, seed) for seed in range(draws))
    return judge([against_oracle(ours(case, backend, t, G, way), form, case, t, G) for t, G in operands_of])


def quantised_base(base: str, form: Format, case: Case) -> Finding:
    """Over bitsandbytes' weight, which its own dequantisation gives the oracle."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding("skip", reason="bitsandbytes is not installed")
    prepare(form)
    t, G = drawn(case, form)
    linear = nn.Linear(case.K, case.N, bias=False, dtype=form.base, device=device())
    linear.weight.data.copy_(t.pop("weight"))
    layer: Any = bases.quantised(linear, base, form.base)
    from bitsandbytes.functional import dequantize_4bit

    t_dense = dequantize_4bit(layer.weight, layer.weight.quant_state)
    packed = weights.packed(layer)
    got = differentiate(
        lambda t: call(hk.hydra_linear, case, {**t, "weight": packed}), t, G, wanted({**t, "weight": t_dense})
    )
    return judge([against_oracle(got, form, case, {**t, "weight": t_dense}, G)])


def same_bits(backend: str, form: Format, case: Case) -> Finding:
    prepare(form)
    t, G = drawn(case, form)
    first, second = (ours(case, backend, t, G) for _ in range(2))
    other = [name for name, v in first.items() if not torch.equal(v, second[name])]
    return Finding("fail", reason=f"other bits in the second run: {', '.join(other)}") if other else Finding("pass")


def side_stream(backend: str, form: Format, case: Case) -> Finding:
    """x and G arrive late on a stream that is not the default one: a kernel on any other stream reads NaN."""
    if device().type == "cpu":
        return Finding("skip", reason="streams need a GPU")
    prepare(form)
    t, G = drawn(case, form)
    ours(case, backend, t, G)  # compiles
    late, G_late = t | {"x": torch.full_like(t["x"], math.nan)}, torch.full_like(G, math.nan)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late["x"].copy_(t["x"])
        G_late.copy_(G)
        got = ours(case, backend, late, G_late)
    stream.synchronize()
    return judge([against_oracle(got, form, case, t, G)])


def cuda_graph(backend: str, form: Format, case: Case) -> Finding:
    """Forward and backward captured with one x and G and replayed with others."""
    if device().type == "cpu":
        return Finding("skip", reason="graphs need a GPU")
    prepare(form)
    t, G = drawn(case, form)
    other, G_other = drawn(case, form, seed=1)
    leaves = {name: v.requires_grad_(name in wanted(t)) for name, v in t.items()}
    names = sorted(wanted(t))

    def step() -> Tensors:
        h = call(hk.hydra_linear, case, leaves, backend=backend)
        return {"h": h, **dict(zip(names, torch.autograd.grad(h, [leaves[n] for n in names], G), strict=True))}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["x"].copy_(other["x"])
        G.copy_(G_other)
    graph.replay()
    got = {name: v.detach().clone() for name, v in captured.items()}
    return judge([against_oracle(got, form, case, {name: v.detach() for name, v in leaves.items()}, G)])


def no_synchronisation(backend: str, form: Format, case: Case) -> Finding:
    """torch raises where a step makes the host wait for the GPU."""
    if device().type == "cpu":
        return Finding("skip", reason="a CPU is never waited for")
    prepare(form)
    t, G = drawn(case, form)
    leaves = {name: v.requires_grad_(name in wanted(t)) for name, v in t.items()}
    names = sorted(wanted(t))

    def step() -> Tensors:
        h = call(hk.hydra_linear, case, leaves, backend=backend)
        return {"h": h.detach(), **dict(zip(names, torch.autograd.grad(h, [leaves[n] for n in names], G), strict=True))}

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return judge([against_oracle(got, form, case, {name: v.detach() for name, v in leaves.items()}, G)])


def compiled(backend: str, form: Format, case: Case) -> Finding:
    """torch.compile of the call, without a graph break; inductor, in a dry run its tracer alone."""
    prepare(form)
    t, G = drawn(case, form)
    compiler = "aot_eager" if device().type == "cpu" else "inductor"
    traced = torch.compile(partial(call, hk.hydra_linear, case, backend=backend), fullgraph=True, backend=compiler)
    return judge([against_oracle(differentiate(traced, t, G, wanted(t)), form, case, t, G)])


def int64_offsets(backend: str, form: Format, K: int, N: int, elements: int) -> Finding:
    """More than ``elements`` elements in x and dx, or in h and G. G is zero but for a few rows, which then say all."""
    if device().type == "cuda" and torch.cuda.mem_get_info()[0] < FREE_BYTES:
        return Finding("skip", reason=f"less than {FREE_BYTES >> 30} GiB of GPU memory are free")
    prepare(form)
    M = elements // max(K, N) + 100
    rows = (0, 1, M // 2, M - 70, M - 2, M - 1)
    case = Case((len(rows),), K, N, 8, 8)
    t, G = drawn(case, form)
    x = torch.ones(M, K, dtype=form.base, device=device())
    G_all = torch.zeros(M, N, dtype=form.base, device=device())
    for place, row in enumerate(rows):
        x[row], G_all[row] = t["x"][place], G[place]
    leaves = {name: v.detach().requires_grad_(name in wanted(t)) for name, v in (t | {"x": x}).items()}
    h = call(hk.hydra_linear, case, leaves, backend=backend)
    h.backward(G_all)
    got = {name: leaves[name].grad for name in wanted(t)}
    got |= {name: torch.stack([v[row] for row in rows]) for name, v in (("h", h.detach()), ("x", got["x"]))}
    return judge([against_oracle(got, form, case, t, G)])

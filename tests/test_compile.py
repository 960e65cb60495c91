"""torch.compile takes the layers without a graph break, at fixed and dynamic sizes, and computes the same.

Two routes: `aten` is traced through; `native` and the Triton backends, here over the interpreter, are operators.
"""

import json
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import hydra_kernels as hk
from hydra_kernels.backend import TABLE, operators
from hydra_kernels.backend.interface import Operands, split
from hydra_kernels.choose import machine

from .cases import PLAIN, operands
from .test_layers import trained

ROUTES = [("aten", "composed"), ("aten", "kept"), ("hybrid", "auto"), ("triton", "auto")]
ROUTES += [("hybrid", "effective")]
if hk.backends()["native"] is None:
    ROUTES += [("native", form) for form in ("composed", "kept", "effective")]
OPERATORS = [(backend, "composed" if form == "auto" else form) for backend, form in ROUTES if backend != "aten"]
EVERY_OPTION = {"adapter_bias": True, "learnable_scale": True}
OPTIONS = [{}, EVERY_OPTION, {"scale_a": 0.7}]


def slow_if(condition: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if condition else []


def often(routes: list[tuple[str, str]]) -> list:
    """hybrid is traced as triton is, and most forms as their backend's first: those are slow."""
    seen = {backend: (backend, form) for backend, form in reversed(routes)}
    return [pytest.param(*r, marks=slow_if(r[0] == "hybrid" or r != seen[r[0]])) for r in routes]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch.manual_seed(0)  # of a gradient that cancels, as a scale's may, no bound on the relative error holds


def rows(M: int, K: int = 13, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-1, 1, M * K, dtype=dtype).reshape(M, K).requires_grad_()


def step(function, layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    layer.zero_grad()
    x.grad = None
    h = function(x)
    h.float().square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"h": h.detach(), "x": x.grad, **{name: g.clone() for name, g in gradients.items()}}


def same(traced: dict[str, Tensor], eager: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    assert traced.keys() == eager.keys()
    for name, value in eager.items():
        assert value.any(), name
        torch.testing.assert_close(
            traced[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item(), msg=name
        )


# tests/test_recompile.py has scales that are numbers, and the next test dynamic sizes without options.
SHORT = [
    *((*route, {}, False) for route in ROUTES if route[1] == "composed"),
    *((*route, EVERY_OPTION, True) for route in ROUTES if route[0] != "hybrid"),
]


@pytest.mark.parametrize(
    ("backend", "form", "options", "dynamic"),
    [
        pytest.param(*case, marks=slow_if(case not in SHORT), id="-".join(map(str, case)))
        for case in ((*route, *rest) for route, *rest in product(ROUTES, OPTIONS, (False, True)))
    ],
)
def test_fullgraph_equals_eager(dynamic, backend, form, options):
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, backend=backend, **options))
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M in (7, 5):
        same(step(compiled, layer, rows(M)), step(layer, layer, rows(M)))


SCALES = (0.7, 1.0, -1.3)


# Of each backend one case: hybrid is traced as triton is.
FIRST = {("aten", "composed"): SCALES, ("triton", "auto"): SCALES, ("native", "composed"): None}


def three_layers(backend: str, form: str, options: dict[str, object]) -> nn.Sequential:
    sizes = ((13, 11), (11, 7), (7, 13))
    layers = (hk.HydraLinear(K, N, r_a=2, r_b=3, form=form, backend=backend, **options) for K, N in sizes)
    return nn.Sequential(*map(trained, layers))


@pytest.mark.parametrize(
    ("backend", "form", "options", "scales", "dynamic"),
    [
        pytest.param(
            *(*route, options, scales, dynamic),
            id="-".join(map(str, (*route, options, scales, dynamic))),
            marks=slow_if((options, scales, dynamic) != ({}, FIRST.get(route, ()), True)),
        )
        for route in ROUTES
        for options, scales in (({}, None), ({}, SCALES), ({"adapter_bias": True}, SCALES), (EVERY_OPTION, None))
        for dynamic in (True, None, False)
    ],
)
def test_three_layers_equal_eager(backend, form, options, scales, dynamic):
    """A number that torch takes for an input of one layer's autograd function must not be read by the next one's."""
    model = three_layers(backend, form, options)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for M, factor in ((7, 1.0), (5, 1.5)):  # from the second value on a number is dynamic
        for layer, scale in zip(model, scales or (), strict=False):
            layer.scale_a, layer.scale_b = factor * scale, scale
        same(step(compiled, model, rows(M)), step(model, model, rows(M)), tolerance=1e-5)


@pytest.mark.parametrize("winners", [("triton",), ("triton", "hybrid")])
def test_an_open_M_is_traced_for_the_winner_of_every_measurement(winners, tmp_path, monkeypatch):
    """One graph with triton's operators, where no measurement says otherwise; else the rule's."""
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path))
    row = {"K": 13, "N": 11, "r_a": 2, "r_b": 3, "dtype": "float32", "form": "composed"}
    row |= {"device": machine.device_name(machine.CPU), "versions": machine.versions()}
    for M, winner in zip((20, 80), winners, strict=False):
        (tmp_path / f"{M}.json").write_text(json.dumps(row | {"M": M, "backend": winner}))
    machine.forget()
    launches: list[bool] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]):
        launches.append("'triton'" in module.print_readable(print_output=False))
        return lookup_backend("aot_eager")(module, inputs)

    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for M in (10, 60):
        same(step(compiled, layer, rows(M)), step(layer, layer, rows(M)))
    machine.forget()
    assert set(launches) == {winners == ("triton",)}


# The first that uses it in a process compiles for ten seconds.
INDUCTOR = pytest.mark.xdist_group("inductor")


# torch warns of its own deprecations while inductor is imported.
@INDUCTOR
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "form", "options", "dynamic"),
    [
        pytest.param(
            *(*route, options, dynamic),
            id="-".join(map(str, (*route, options, dynamic))),
            marks=pytest.mark.slow,  # what aot_eager traces (above) inductor makes into code
        )
        for route in ROUTES
        for options, dynamic in (({}, None), ({"scale_a": 0.7, "scale_b": -1.3}, True), (EVERY_OPTION, True))
        # What is made of aten's many operators takes a minute to compile.
        if not options or (route in FIRST and ("scale_a" not in options or route[0] != "aten"))
    ],
)
def test_inductor_equals_eager(backend, form, options, dynamic, tmp_path, monkeypatch):
    # Inductor's cache does not know which operators were registered.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = three_layers(backend, form, options)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for M in (40, 30) if dynamic else (40,):
        same(step(compiled, model, rows(M)), step(model, model, rows(M)), tolerance=1e-5)


@pytest.mark.parametrize(("backend", "form"), often([("aten", "kept"), ("hybrid", "auto"), ("triton", "auto")]))
def test_under_autocast(backend, form):
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, backend=backend))

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    traced, eager = (step(f, layer, rows(7)) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run))
    assert traced["h"].dtype == torch.bfloat16
    assert traced["A_down"].dtype == torch.float32
    same(traced, eager, 2e-2)


@pytest.mark.parametrize(("backend", "form"), often([route for route in ROUTES if route[1] != "effective"]))
@pytest.mark.parametrize("dropout", ["dropout", "input_dropout"])
def test_checkpointing_recomputes_with_the_same_mask(backend, form, dropout):
    """A recomputed mask that differs would give dA_up for a bottleneck that the output never saw."""
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, backend=backend, **{dropout: 0.5}))

    def run(x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    traced = step(compiled, layer, rows(7))
    torch.manual_seed(3)
    same(traced, step(layer, layer, rows(7)))


DROPPING = [route for route in ROUTES if route[1] != "effective"]


@pytest.mark.parametrize(("backend", "form"), often([*DROPPING[1:], DROPPING[0]]))
def test_input_dropout_draws_as_in_eager_mode(backend, form):
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, backend=backend, input_dropout=0.5))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    traced, after = step(compiled, layer, rows(7)), torch.rand(())
    torch.manual_seed(3)
    same(traced, step(layer, layer, rows(7)))
    assert torch.equal(torch.rand(()), after)
    assert not torch.equal(compiled(rows(7)), compiled(rows(7)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "form", "dynamic"), [(*route, dynamic) for route, dynamic in zip(DROPPING, cycle((True, None, False)))]
)
def test_three_layers_with_input_dropout(backend, form, dynamic):
    """A probability is bound to its value: each is a graph, and where torch learns that it varies, one more."""
    model, graphs = three_layers(backend, form, {"input_dropout": 0.5, "dropout": 0.2, **EVERY_OPTION}), []

    def counted(module, inputs):
        graphs.append(module)
        return lookup_backend("aot_eager")(module, inputs)

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counted)
    for M, p in ((7, 0.5), (5, 0.3), (6, 0.3), (6, 0.0)):
        for layer in model:
            layer.input_dropout = p
        torch.manual_seed(3)
        traced = step(compiled, model, rows(M))
        torch.manual_seed(3)
        same(traced, step(model, model, rows(M)), tolerance=1e-5)
    assert dynamic is False or len(graphs) <= 5


@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_without_gradients(backend, form):
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, backend=backend))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(compiled(rows(7)), layer(rows(7)))


CASES = [
    PLAIN,
    replace(PLAIN, bias=False),
    replace(PLAIN, adapter_bias=True, scales="learnable", dropout=True, lead=(23, 3)),
    replace(PLAIN, r_a=0, scales=(0.7, -1.9)),
    replace(PLAIN, r_b=0, dropout=True),
    *(replace(PLAIN, lead=(6, 5), x_layout=layout, G_layout=layout) for layout in ("sliced", "transposed", "expanded")),
]


def checked(case: int, operator: int, permuted: bool) -> bool:
    """A dozen of 80: every case with some operator, each operator with all options and permuted adapters."""
    if CASES[case].r_b == 0 and OPERATORS[operator][0] == "native":
        return not permuted  # the one operator whose D is then an operand
    return (case == 2 and permuted) or ((case + operator) % len(OPERATORS) == 0 and permuted == (case % 2 == 1))


@pytest.mark.parametrize(
    ("case", "backend", "form", "permuted"),
    [
        pytest.param(
            *(case, *operator, permuted),
            id=f"{case}-{'-'.join(operator)}-{'permuted' if permuted else 'contiguous'}",
            marks=slow_if(not checked(i, j, permuted)),
        )
        for (i, case), (j, operator), permuted in product(enumerate(CASES), enumerate(OPERATORS), (False, True))
    ],
)
def test_operators_pass_opcheck(case, backend, form, permuted):
    """Fake outputs have the shapes, strides and dtypes of real ones, and inputs stay as they are."""
    drops = "mask" if case.dropout and backend != "native" else ""
    t, G = operands(replace(case, dropout=case.dropout and form != "effective", input_dropout=drops), torch.float32)
    mask = t.pop("mask", None)
    t = {name: v.t().contiguous().t() if permuted and v.dim() == 2 else v for name, v in t.items()}
    x, G = t.pop("x").flatten(0, -2), G.flatten(0, -2)
    names = frozenset({"x", *t} - {"weight", "input_mask"})
    fields = dict.fromkeys(Operands._fields) | {"scale_a": 1.0, "scale_b": 1.0, "mask_scale": 1 / 0.7, "input_p": 0.0}
    fields |= case.constant_scales | t | {"mask": None if mask is None else mask != 0}
    op = Operands(**fields)
    if drops and permuted:
        op = op._replace(input_mask=None, input_seed=torch.tensor(2**40 + 5), input_p=0.2)
    packed, needs = split(op), operators._listed(names)
    opcheck(torch.ops.hydra_kernels.forward.default, (x, *packed, needs, backend, form))
    _, _, saved = TABLE[backend].forward(x, op, names, form)
    opcheck(torch.ops.hydra_kernels.backward.default, (G, list(saved), *packed, needs, backend, form))


def test_the_effective_forms_operators_pass_opcheck_in_low_precision():
    """There D has C in two parts, and d is float32."""
    t, G = operands(replace(PLAIN, adapter_bias=True), torch.bfloat16)
    x = t.pop("x")
    fields = dict.fromkeys(Operands._fields) | {"scale_a": 1.0, "scale_b": 0.5, "mask_scale": 1.0, "input_p": 0.0} | t
    op, names = Operands(**fields), frozenset({"x", *t} - {"weight"})
    packed, needs = split(op), operators._listed(names)
    opcheck(torch.ops.hydra_kernels.forward.default, (x, *packed, needs, "hybrid", "effective"))
    _, _, saved = TABLE["hybrid"].forward(x, op, names, "effective")
    opcheck(torch.ops.hydra_kernels.backward.default, (G, list(saved), *packed, needs, "hybrid", "effective"))


def test_accumulate_passes_opcheck():
    opcheck(torch.ops.hydra_kernels.accumulate_.default, (torch.randn(5, 4), torch.randn(5, 3), torch.randn(4, 3).t()))


def test_up_biases_are_not_added_in_place_where_torch_traces():
    """Where a traced autograd function changes its output in place, torch 2.11 drops every gradient of it."""
    traced = []

    def backend(module, inputs):
        lines = module.print_readable(print_output=False).splitlines()
        traced.append("\n".join(line for line in lines if not line.strip().startswith("#")))
        return module.forward

    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, adapter_bias=True, backend="aten"))
    torch.compile(layer, fullgraph=True, backend=backend)(rows(5))
    assert "accumulate_" in traced[0]
    assert ".add_(" not in traced[0]
    assert "iadd" not in traced[0]


@INDUCTOR
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_accumulating_copies_nothing_under_inductor(tmp_path, monkeypatch):
    """What inductor makes of a functional addmm is a copy of its first operand, a pass over [M, N]."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer = trained(hk.HydraLinear(64, 96, r_a=2, r_b=3, form="composed", backend="aten"))
    compiled, x, G = torch.compile(layer, fullgraph=True), rows(48, 64), torch.randn(48, 96)
    compiled(x).backward(G)
    x.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        compiled(x).backward(G)
    calls = [event.name for event in profiler.events() if event.name.startswith("aten::")]
    large = [e.name for e in profiler.events() if e.name == "aten::copy_" and e.input_shapes[0] in ([48, 96], [48, 64])]
    assert calls.count("aten::addmm_") == 2
    assert not large


def models() -> dict[str, tuple[nn.Module, str, dict[str, Tensor]]]:
    """Small models of transformers, the layers to adapt, and inputs."""
    from transformers import LlamaConfig, LlamaModel, RobertaConfig, RobertaModel, ViTConfig, ViTModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 32, "max_position_embeddings": 20, **small}
    tokens = {"input_ids": torch.arange(12).reshape(2, 6) + 3}
    return {
        "vit": (ViTModel(ViTConfig(image_size=32, **small)), "fc2", {"pixel_values": torch.randn(2, 3, 32, 32)}),
        "roberta": (RobertaModel(RobertaConfig(**words)), "output.dense", tokens),
        "llama": (LlamaModel(LlamaConfig(**words)), "down_proj", {**tokens, "use_cache": False}),
    }


# transformers and torch warn of each other's deprecations.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "backend", "dynamic"),
    [
        pytest.param(*case, marks=slow_if(case != ("vit", "triton", None)))
        for case in [
            *product(("vit", "roberta", "llama"), ("aten", "triton"), (None,)),
            *(("vit", "triton", True), ("roberta", "aten", True), ("llama", "aten", True)),
        ]
    ],
)
def test_whole_models_have_no_graph_break(name, backend, dynamic):
    torch.manual_seed(0)
    model, target, inputs = models()[name]
    model.eval()
    assert len(hk.inject(model, [target], r_a=2, r_b=2, backend=backend)) >= 2
    hk.mark_only_adapters_trainable(model)
    for layer in model.modules():
        if isinstance(layer, hk.HydraLinear):
            trained(layer)

    def gradients(function) -> dict[str, Tensor]:
        model.zero_grad()
        function(**inputs).last_hidden_state.square().mul(torch.linspace(-1, 1, 16)).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    same(gradients(compiled), gradients(model), 1e-4)


@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_eager_calls_pay_for_no_operator_of_ours(backend, form):
    layer = trained(hk.HydraLinear(13, 11, r_a=2, r_b=3, form=form, backend=backend))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(layer, layer, rows(7))
    names = {event.name for event in profiler.events()}
    assert "aten::empty" in names
    assert not [name for name in names if name.startswith("hydra_kernels::")]


def test_a_tensor_without_data_launches_nothing():
    """Under FakeTensorMode, as memory estimates use it, the operators answer with shapes alone."""
    layer = hk.HydraLinear(13, 11, r_a=2, r_b=3, backend="triton")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        h = layer(mode.from_tensor(torch.randn(7, 13)))
    assert (type(h), h.shape) == (FakeTensor, (7, 11))

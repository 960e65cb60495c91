"""torch.func, forward mode, exporters, tracers, what torch does to modules: right against float64 or refused."""

from __future__ import annotations

import copy
import functools
import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import hydra_kernels as hk

from .cases import PLAIN, operands
from .oracle import hydra
from .test_reliability import NAMES, NATIVE, assert_is, layer_of, oracle_of

ROUTES = [("auto", "auto"), ("aten", "composed"), ("aten", "kept"), ("hybrid", "auto"), ("triton", "auto")]
ROUTES += [("hybrid", "effective")]
ROUTES += [("native", form) for form in ("composed", "kept", "effective")] if NATIVE else []
REFUSED = ROUTES[1:]
T64, G64 = operands(PLAIN, torch.float64)
TANGENT = {name: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)).double() for name, v in T64.items()}
ADAPTERS = ("A_down", "A_up", "B_down", "B_up")


def flat(tree) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


def along(function, *names):
    """A function of the named operands alone, and their values."""
    return lambda *v: function({**T64, **dict(zip(names, v, strict=True))}), tuple(T64[n] for n in names)


def in_dual(function, name, gradients):
    with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
        dual = {**T64, name: forward_ad.make_dual(T64[name], TANGENT[name])}
        return tuple(forward_ad.unpack_dual(function(dual)))


def a_jvp(function, *names):
    f, v = along(function, *names)
    return jvp(f, v, tuple(TANGENT[n] for n in names))


def a_vjp(function):
    f, v = along(function, "x", *ADAPTERS)
    h, pull = vjp(f, *v)
    return h, *pull(G64)


def a_loss(function, *names):
    f, v = along(function, *names)
    return (lambda *a: f(*a).square().sum()), v


def per_sample(function):
    return vmap(grad(lambda a, x: function({**T64, "A_down": a, "x": x[None]}).square().sum()), (None, 0))(
        T64["A_down"], T64["x"]
    )


def a_gradient(function):
    loss, v = a_loss(function, "x", "bias", *ADAPTERS)
    return grad(loss, argnums=tuple(range(len(v))))(*v)


def a_hessian(function):
    loss, v = a_loss(function, "B_down")
    return hessian(loss)(*v)


def a_linearization(function):
    f, v = along(function, "x")
    h, tangent_of = linearize(f, *v)
    return h, tangent_of(TANGENT["x"])


TRANSFORMS = {
    "vmap over rows": lambda f: vmap(along(f, "x")[0])(T64["x"]),
    "vmap over adapters": lambda f: vmap(along(f, "A_up")[0])(torch.stack([T64["A_up"], TANGENT["A_up"]])),
    "gradients by sample": per_sample,
    "grad": a_gradient,
    "vjp": a_vjp,
    "jacrev": lambda f: jacrev(along(f, "B_down")[0])(T64["B_down"]),
    "jacfwd": lambda f: jacfwd(along(f, "B_down")[0])(T64["B_down"]),
    "hessian": a_hessian,
    "jvp": lambda f: a_jvp(f, "x", "bias", *ADAPTERS),
    "jvp of the weight": lambda f: a_jvp(f, "weight"),
    "linearize": a_linearization,
    **{f"dual {name}": (lambda f, name=name: in_dual(f, name, True)) for name in ("x", "bias", *ADAPTERS)},
    **{f"dual {name}, no_grad": (lambda f, name=name: in_dual(f, name, False)) for name in ("x", "bias", *ADAPTERS)},
}


def ours(backend, form="auto", dtype=None):
    def function(t):
        t = {name: v.to(dtype) for name, v in t.items()} if dtype else t
        return hk.hydra_linear(*(t[name] for name in NAMES), backend=backend, form=form)

    return function


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_right(name, backend):
    got, want = flat(TRANSFORMS[name](ours(backend))), flat(TRANSFORMS[name](hydra))
    assert len(got) == len(want) > 0
    for g, w in zip(got, want, strict=True):
        assert w.any()
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("backend", "form"), REFUSED)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_backend_that_a_transform_cannot_follow_refuses(name, backend, form):
    with pytest.raises(ValueError, match=f"^backend: '{backend}' cannot serve this call: .* use backend='reference'"):
        TRANSFORMS[name](ours(backend, form, torch.float32))


@pytest.mark.parametrize(("backend", "form"), ROUTES)
def test_a_dual_level_without_tangents_changes_nothing(backend, form):
    function = ours(backend, form, torch.float32)
    with forward_ad.dual_level():
        inside = function(T64)
    assert torch.equal(inside, function(T64))


def test_a_weight_is_not_differentiated_by_torch_func_either():
    loss, v = a_loss(ours("auto"), "weight")
    with pytest.raises(ValueError, match="weight: it requires grad, but W0 is frozen"):
        grad(loss)(*v)


@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize(
    "wanted", [("x", "bias", *ADAPTERS), *((name,) for name in ("x", "bias", *ADAPTERS))], ids="+".join
)
@pytest.mark.parametrize("ranks", [{}, {"r_a": 0}, {"r_b": 0}], ids=["both", "B", "A"])
def test_aten_takes_batched_gradients(form, wanted, ranks):
    t, G = operands(replace(PLAIN, **ranks), torch.float64)
    leaves = [t[name].requires_grad_() for name in wanted if name in t]
    if not leaves:
        return
    batch = torch.stack([G, -2 * G, G.flip(0)])
    h = hk.hydra_linear(*(t.get(name) for name in NAMES), backend="aten", form=form)
    got = torch.autograd.grad(h, leaves, batch, is_grads_batched=True)
    for i, g in enumerate(batch):
        for batched, want in zip(got, torch.autograd.grad(hydra(t), leaves, g), strict=True):
            torch.testing.assert_close(batched[i], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["hybrid", "triton"])
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
def test_kernels_refuse_batched_gradients(backend):
    t, G = operands(PLAIN, torch.float32)
    h = hk.hydra_linear(t["x"].requires_grad_(), *(t[name] for name in NAMES[1:]), backend=backend)
    with pytest.raises(RuntimeError, match=f"backend '{backend}' takes no batched gradients .* use backend='aten'"):
        torch.autograd.grad(h, t["x"], G[None], is_grads_batched=True)


# Compiled


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_compiled_transform_is_right(transform):
    """Under torch.compile the gradients of torch.func.grad were zero, with no word said."""
    layer, x = layer_of().double(), torch.randn(7, 6, dtype=torch.float64)
    adapters = {name: p.detach() for name, p in layer.adapters().items()}
    true = {"weight": layer.weight, "bias": layer.bias}
    run, of_oracle = {
        "grad": (
            lambda p: grad(lambda q: functional_call(layer, q, (x,)).square().sum())(p),
            lambda p: grad(lambda q: hydra({"x": x, **true, **q}).square().sum())(p),
        ),
        "vmap": (
            lambda p: vmap(lambda v: functional_call(layer, p, (v,)))(x),
            lambda p: hydra({"x": x, **true, **p}),
        ),
        "jvp": (
            lambda p: jvp(lambda v: functional_call(layer, p, (v,)), (x,), (x,)),
            lambda p: jvp(lambda v: hydra({"x": v, **true, **p}), (x,), (x,)),
        ),
    }[transform]
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(adapters)
    for g, w in zip(flat(got), flat(of_oracle(adapters)), strict=True):
        assert w.any()
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


# Exported and traced


def stack(merged=False, **options) -> nn.Sequential:
    model = nn.Sequential(layer_of(seed=1, **options), nn.Tanh(), layer_of(K=5, N=4, seed=2, **options)).eval()
    if merged:
        hk.merge(model)
    return model


def oracle_of_stack(model, x):
    return oracle_of(model[2], oracle_of(model[0], x).tanh()).detach()


X, OTHER = torch.randn(7, 6), torch.randn(3, 6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own, when it reads the file
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_an_exported_program_is_plain_and_comes_back_from_a_file(merged, dynamic, strict):
    model = stack(merged)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,), dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    program = torch.export.load(file)
    assert "hydra" not in {str(n.target).partition(".")[0] for n in program.graph.nodes if n.op == "call_function"}
    for x in (X, OTHER) if dynamic else (X,):
        assert_is(program.module()(x), oracle_of_stack(model, x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["aten", *(["native"] if NATIVE else [])])
def test_a_fixed_backend_is_exported_for_any_batch(backend):
    model = stack(backend=backend)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for x in (X, OTHER):
        assert_is(program.module()(x), oracle_of_stack(model, x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_a_trace_passes_its_check_and_comes_back_from_a_file(merged, gradients):
    model, file = stack(merged), io.BytesIO()
    with torch.set_grad_enabled(gradients):
        torch.jit.save(torch.jit.trace(model, (X,)), file)
    file.seek(0)
    assert_is(torch.jit.load(file)(OTHER), oracle_of_stack(model, OTHER))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "backend", [backend for backend, form in ROUTES if form in ("auto", "kept") and backend != "auto"]
)
def test_a_trace_of_a_fixed_backend_is_refused(backend):
    """native under no_grad left the adapters' part of the example in the trace, as a constant."""
    with torch.no_grad(), pytest.raises(ValueError, match=r"jit\.trace needs plain operators"):
        torch.jit.trace(stack(backend=backend), (X,))


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_a_symbolic_trace_calls_hydra_linear(merged):
    model = stack(merged)
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [hk.hydra_linear] * 2
    assert_is(traced(OTHER), oracle_of_stack(model, OTHER))


# What torch does to modules


def test_functional_call_with_other_parameters():
    layer, x = layer_of(), torch.randn(7, 6)
    other = {name: torch.randn_like(p).requires_grad_() for name, p in layer.adapters().items()}
    h = functional_call(layer, other, (x,))
    h.sum().backward()
    assert_is(h, oracle_of(layer, x, **other))
    true = {name: v.detach().double().requires_grad_() for name, v in other.items()}
    oracle_of(layer, x, **true).sum().backward()
    for name, v in other.items():
        assert_is(v.grad, true[name].grad)
    assert all(p.grad is None for p in layer.parameters())


def test_an_ensemble_by_vmap():
    layers, x = [layer_of(seed=seed) for seed in range(3)], torch.randn(7, 6)
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    h = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for got, layer in zip(h, layers, strict=True):
        assert_is(got, oracle_of(layer, x))


class Doubled(nn.Module):
    def forward(self, v):
        return 2 * v


def test_a_parametrized_adapter():
    layer, x = layer_of(), torch.randn(7, 6)
    original = layer.A_down.detach().clone()
    nn.utils.parametrize.register_parametrization(layer, "A_down", Doubled())
    true = original.double().requires_grad_()
    want = oracle_of(layer, x, A_down=2 * true)
    h = layer(x)
    h.sum().backward()
    want.sum().backward()
    assert_is(h, want)
    assert_is(layer.parametrizations.A_down.original.grad, true.grad)
    layer.eval().merge()
    assert_is(layer(x), want.detach())
    for use in (layer.reset_adapters, lambda: hk.adapter_state_dict(layer), lambda: hk.save_adapters(layer, "unused")):
        with pytest.raises(ValueError, match=r"A_down is parametrized, .*remove_parametrizations\(layer, 'A_down'\)"):
            use()
    nn.utils.parametrize.remove_parametrizations(layer, "A_down")
    assert torch.equal(hk.adapter_state_dict(layer)["A_down"], 2 * original)


@pytest.mark.parametrize("flag", ["set_overwrite_module_params_on_conversion", "set_swap_module_params_on_conversion"])
def test_conversions_in_either_manner(flag):
    layer, x = layer_of(), torch.randn(7, 6)
    want = oracle_of(layer, x).detach()
    merged = copy.deepcopy(layer).eval()
    merged.merge()
    getattr(torch.__future__, flag)(True)
    try:
        for converted in (layer.double(), merged.double()):
            torch.testing.assert_close(converted(x.double()).detach(), want, rtol=1e-6, atol=1e-6)
            assert converted.weight.dtype == torch.float64
    finally:
        getattr(torch.__future__, flag)(False)


def test_swapped_adapters():
    a, b, x = layer_of(seed=1), layer_of(seed=2), torch.randn(7, 6)
    want = oracle_of(a, x, **{name: p.detach().clone() for name, p in b.adapters().items()})
    for name, p in a.adapters().items():
        torch.utils.swap_tensors(p, getattr(b, name))
    assert_is(a(x), want)


def test_a_merged_layer_that_was_emptied_and_loaded():
    layer, x = layer_of().eval(), torch.randn(7, 6)
    layer.merge()
    emptied = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    assert not emptied.merged
    assert_is(emptied(x), oracle_of(layer, x))


def test_the_moving_average_of_a_model():
    model, x = nn.Sequential(layer_of(seed=1)), torch.randn(7, 6)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    old = {name: p.detach().clone() for name, p in model[0].adapters().items()}
    model[0].load_state_dict(layer_of(seed=2).state_dict())
    average.update_parameters(model)
    mean = {name: 0.9 * old[name] + 0.1 * p.detach() for name, p in model[0].adapters().items()}
    frozen = {"weight": average.module[0].weight, "bias": average.module[0].bias}
    assert_is(average(x), oracle_of(model[0], x, **frozen, **mean))


def test_adapters_shared_by_two_layers_get_the_sum_of_their_gradients():
    a, b, x = layer_of(seed=1), layer_of(seed=2), torch.randn(7, 6)
    b.A_down = a.A_down
    (a(x) + b(x)).square().sum().backward()
    true = a.A_down.detach().double().requires_grad_()
    (oracle_of(a, x, A_down=true) + oracle_of(b, x, A_down=true)).square().sum().backward()
    torch.testing.assert_close(a.A_down.grad.double(), true.grad, rtol=1e-5, atol=1e-4)


EVERY_OPTION = {"adapter_bias": True, "learnable_scale": True}


def three_layers(backend: str, form: str, **options) -> nn.Module:
    """Of different shapes, every adapter random."""
    torch.manual_seed(0)
    layers = [
        hk.HydraLinear(K, N, r_a=2, r_b=3, backend=backend, form=form, **options) for K, N in ((6, 5), (5, 7), (7, 6))
    ]
    for layer in layers:
        for p in layer.adapters().values():
            nn.init.normal_(p)
    return nn.Sequential(*layers)


# Selective activation checkpointing


def saves(*operators):
    """A policy that keeps the outputs of these operators, or of every one."""
    must, may = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    return lambda context, op, *args, **kwargs: must if not operators or op in operators else may


ATEN = torch.ops.aten
POLICIES = {
    "products": saves(ATEN.mm.default, ATEN.addmm.default),
    "sums": saves(ATEN.add.Tensor, ATEN.mul.Tensor),
    "nothing": saves(ATEN.bmm.default),
    "everything": saves(),
}


SELECTIVE = [{}, {"adapter_bias": True, "scale_a": 0.7}, {"dropout": 0.4}, {"input_dropout": 0.4}]


@pytest.mark.parametrize(
    ("backend", "form", "options", "policy"),
    [
        pytest.param(
            *(*route, options, policy),
            # hybrid and triton are one operator a pass: what a policy keeps of it does not depend on the options.
            marks=[pytest.mark.slow] if route[0] == "hybrid" or (route[0] == "triton" and options) else [],
            id="-".join(map(str, (*route, options, policy))),
        )
        for route in REFUSED
        for options in SELECTIVE
        for policy in POLICIES
    ],
)
def test_selective_checkpointing_saves_what_its_policy_says(backend, form, options, policy):
    of_dropout = {"dropout", "input_dropout"} & options.keys()
    if of_dropout and (form == "effective" or (backend == "native" and "input_dropout" in options)):
        options = {}  # it has none
    model, x = three_layers(backend, form, **options), torch.randn(9, 6, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(function):
        torch.manual_seed(1)
        h = function(x)
        return [h.detach(), *torch.autograd.grad(h.square().sum(), leaves)]

    contexts = functools.partial(create_selective_checkpoint_contexts, POLICIES[policy])
    kept = gradients(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts))
    for got, expected in zip(kept, gradients(model), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# Compiled autograd


# torch warns of its own deprecations while it compiles, and looks at gradients that are no leaf's.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad:UserWarning")
@pytest.mark.parametrize("options", [{}, pytest.param(EVERY_OPTION, marks=pytest.mark.slow)], ids=["plain", "options"])
@pytest.mark.parametrize(
    ("backend", "form"),
    [pytest.param(*route, marks=[] if route == ("native", "kept") else [pytest.mark.slow]) for route in REFUSED],
)
def test_compiled_autograd_computes_the_same(backend, form, options):
    """It traces the backward as it runs: what that keeps must be tensors and plain values."""
    model, x = three_layers(backend, form, **options), torch.randn(9, 6)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    eager = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        traced = gradients()
    for got, expected in zip(traced, eager, strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

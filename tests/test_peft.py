"""Hydra as a PEFT method: against PEFT's own LoRA, and against the float64 oracle where LoRA has no counterpart."""

import copy
import json
import pickle
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import hydra_kernels as hk

from .oracle import differentiate, hydra, violations
from .test_layers import of_a_subclass

peft = pytest.importorskip("peft")  # an optional extra
transformers = pytest.importorskip("transformers")

from hydra_kernels.peft import HydraConfig, HydraLinearLayer  # noqa: E402
from hydra_kernels.refusals import READS_WEIGHTS_OF  # noqa: E402

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Net(nn.Module):
    """Two linear layers, one more that may be the second again, and a head that has no weight of its own."""

    def __init__(self, bias: bool = True, shared: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(7, 11, bias=bias)
        self.fc2 = nn.Linear(11, 11, bias=bias)
        self.more = nn.ModuleDict({"again": self.fc2 if shared else nn.Linear(11, 11, bias=bias)})
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(11, 3))

    def forward(self, x):
        return self.head(self.more["again"](torch.relu(self.fc2(torch.relu(self.fc1(x))))))


def net(dtype=F64, seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).to(dtype)


def randomise(model, seed=1):
    """Every trainable parameter random and non-zero, in the order of the names."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * 0.3)
    return model


def adapted(base=None, **config):
    config = {"r_a": 3, "r_b": 2, "target_modules": ["fc1", "fc2"]} | config
    return randomise(peft.get_peft_model(net() if base is None else base, HydraConfig(**config)))


def inputs(dtype=F64, seed=2):
    return torch.randn(5, 7, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(layer, name="default"):
    """What the float64 oracle takes of one adapter of a layer, apart from x."""
    adapter, base = layer.hydra_adapters[name], layer.base_layer
    own = {n: p.detach().to(F64) for n, p in adapter.named_parameters()}
    biases = {} if base.bias is None else {"bias": base.bias.detach().to(F64)}
    return {"weight": base.weight.detach().to(F64), **biases, **own}


def oracle(layer, x, names, training_scales=(1.0, 1.0)):
    """h of a layer with all of the named adapters active: the frozen part once, each adapter's branches added."""
    x = x.to(F64)
    frozen = hydra({"x": x, **{k: v for k, v in operands(layer, names[0]).items() if k in ("weight", "bias")}})
    h = frozen
    for name in names:
        adapter = layer.hydra_adapters[name]
        scales = {s: float(torch.as_tensor(getattr(adapter, s)).detach()) for s in ("scale_a", "scale_b")}
        given = {k: v for k, v in operands(layer, name).items() if not k.startswith("scale")}
        h = h + hydra({"x": x, **given}, **scales) - frozen
    return h


# --- against PEFT's own LoRA ------------------------------------------------------------------------------------------


def lora_and_ours(dtype, lora_options, hydra_options):
    """PEFT's LoRA and ours with r_b = 0, of equal weights, over one base."""
    base = net(F64)
    lora = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(target_modules=["fc1", "fc2"], **lora_options),
        autocast_adapter_dtype=False,
    )
    ours = peft.get_peft_model(
        copy.deepcopy(base),
        HydraConfig(r_b=0, target_modules=["fc1", "fc2"], **hydra_options),
        autocast_adapter_dtype=False,
    )
    randomise(lora)
    for name in ("fc1", "fc2"):
        theirs, layer = lora.get_submodule(f"base_model.model.{name}"), ours.get_submodule(f"base_model.model.{name}")
        adapter = layer.hydra_adapters["default"]
        with torch.no_grad():
            adapter.A_down.copy_(theirs.lora_A["default"].weight)
            adapter.A_up.copy_(theirs.lora_B["default"].weight)
            if adapter.A_up_bias is not None:
                adapter.A_up_bias.copy_(theirs.lora_B["default"].bias)
                adapter.A_down_bias.zero_()
            if lora_options.get("bias") == "lora_only":
                layer.base_layer.bias.copy_(theirs.base_layer.bias)
    return lora.to(dtype), ours.to(dtype)


def gradients(model, x, renamed=()):
    x = x.detach().requires_grad_()
    h = model(x)
    (h * torch.linspace(-1, 1, h.numel(), dtype=F64).reshape(h.shape).to(h.dtype)).sum().backward()
    found = {"h": h.detach(), "x": x.grad}
    for name, p in model.named_parameters():
        for old, new in renamed:
            name = name.replace(old, new)
        if p.grad is not None:
            found[name] = p.grad
    return found


OURS_AS_LORA = (
    ("hydra_adapters.default.A_up_bias", "lora_B.default.bias"),
    ("hydra_adapters.default.A_up", "lora_B.default.weight"),
    ("hydra_adapters.default.A_down", "lora_A.default.weight"),
)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lora", "ours"),
    [
        ({"r": 3, "lora_alpha": 6}, {"r_a": 3, "scale_a": 2.0}),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, {"r_a": 4, "scale_a": 3.0}),
        ({"r": 3, "lora_alpha": 3, "lora_bias": True}, {"r_a": 3, "adapter_bias": True}),
        ({"r": 2, "lora_alpha": 1, "bias": "lora_only"}, {"r_a": 2, "scale_a": 0.5, "bias": "hydra_only"}),
    ],
    ids=["scaled", "rslora", "lora_bias", "base_bias"],
)
def test_without_the_sequential_branch_it_is_pefts_lora(dtype, lora, ours):
    theirs, mine = lora_and_ours(dtype, lora, ours)
    exact, _ = lora_and_ours(F64, lora, ours)
    if dtype != F64:
        exact.load_state_dict({k: v.to(F64) for k, v in theirs.state_dict().items()})
    x = inputs(dtype)
    true, naive = gradients(exact, x.to(F64)), gradients(theirs, x)
    got = {name: g for name, g in gradients(mine, x, OURS_AS_LORA).items() if not name.endswith("weight_bias")}
    assert got.keys() == true.keys()  # but for A_down_bias, which LoRA has not
    assert len(true) >= 6
    assert violations(got, naive, true, dtype) == []


# --- against the oracle -----------------------------------------------------------------------------------------------


def several(learnable=False, **options):
    """A layer with three adapters: both branches, LoRA with biases, SeqLoRA."""
    torch.manual_seed(3)
    layer = HydraLinearLayer(
        nn.Linear(7, 11, dtype=F64), "one", {"r_a": 3, "r_b": 2, "scale_a": 0.5, "scale_b": 2.0, **options}
    )
    layer.add_adapter("two", {"r_a": 4, "r_b": 0, "scale_a": -1.5, "adapter_bias": True, **options})
    layer.add_adapter("three", {"r_a": 0, "r_b": 5, "scale_b": 0.75, "learnable_scale": True, **options})
    layer.set_adapter(["one", "two", "three"])
    layer.base_layer.requires_grad_(False)
    return randomise(layer)


@pytest.mark.parametrize("names", [["one"], ["three"], ["two", "one"], ["one", "two", "three"]], ids="+".join)
def test_adapters_that_are_active_together_add_up(names):
    layer, x = several(), inputs().requires_grad_()
    layer.set_adapter(names)
    h = layer(x)
    h.sum().backward()
    torch.testing.assert_close(h, oracle(layer, x.detach(), names), rtol=1e-13, atol=1e-13)

    exact, leaf = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    h = exact.base_layer(leaf)
    for name in names:
        h = h + exact.hydra_adapters[name].adapted(leaf, *exact.base_layer.parameters()) - exact.base_layer(leaf)
    exact.zero_grad()
    h.sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-12, atol=1e-12)
    for (name, got), want in zip(layer.named_parameters(), exact.parameters(), strict=True):
        active = any(f".{adapter}." in name for adapter in names)
        assert (got.grad is not None) == active, name
        if active:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-12, atol=1e-12)


def test_an_adapters_gradients_are_the_oracles():
    layer, x = several(), inputs()
    layer.set_adapter("one")
    G = torch.randn(5, 11, dtype=F64)
    wanted = {"x", "A_down", "A_up", "B_down", "B_up"}
    given = {"x": x, **operands(layer, "one")}
    true = differentiate(lambda t: hydra(t, 0.5, 2.0), given, G, wanted)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(G)
    torch.testing.assert_close(leaf.grad, true["x"], rtol=1e-12, atol=1e-12)
    for name, p in layer.hydra_adapters["one"].named_parameters():
        torch.testing.assert_close(p.grad, true[name], rtol=1e-12, atol=1e-12)


def test_each_adapter_has_its_own_dropout_when_several_are_active():
    eye = torch.eye(64, dtype=F64)
    layer = HydraLinearLayer(nn.Linear(64, 64, bias=False, dtype=F64), "a", {"r_a": 64, "r_b": 0, "dropout": 0.5})
    layer.add_adapter("b", {"r_a": 64, "r_b": 64, "dropout": 0.0})
    layer.add_adapter("c", {"r_a": 0, "r_b": 64, "dropout": 0.25})
    layer.set_adapter(["a", "b", "c"])
    layer.base_layer.requires_grad_(False)
    with torch.no_grad():
        layer.base_layer.weight.copy_(eye)
        for p in layer.hydra_adapters.parameters():
            p.copy_(eye)
        layer.hydra_adapters["a"].A_up.mul_(100)
        layer.hydra_adapters["c"].B_up.mul_(10_000)
    torch.manual_seed(0)
    h = layer(torch.ones(500, 64, dtype=F64))
    # 1 of the base, 1 and 1 of b, 0 or 100 / 0.5 of a, 0 or 10000 / 0.75 of c.
    dropped = {"a": h.remainder(13333 + 1 / 3).round() == 3, "c": h < 1000}
    expected = 3 + 200 * (~dropped["a"]).double() + 10_000 / 0.75 * (~dropped["c"]).double()
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-8)
    assert dropped["a"].double().mean().sub(0.5).abs() < 0.02
    assert dropped["c"].double().mean().sub(0.25).abs() < 0.02
    layer.eval()
    torch.testing.assert_close(layer(torch.ones(2, 64, dtype=F64)), torch.full((2, 64), 10_103.0, dtype=F64))


def test_each_adapter_drops_its_own_elements_of_x_when_several_are_active():
    """a and b have input dropout, b also one of the bottleneck, c none; the sequential branches read x as it is."""
    eye = torch.eye(64, dtype=F64)
    options = {"r_a": 64, "r_b": 0, "input_dropout": 0.5}
    layer = HydraLinearLayer(nn.Linear(64, 64, bias=False, dtype=F64), "a", options)
    layer.add_adapter("b", {"r_a": 64, "r_b": 64, "input_dropout": 0.2})
    layer.add_adapter("c", {"r_a": 64, "r_b": 0})
    layer.set_adapter(["a", "b", "c"])
    layer.base_layer.requires_grad_(False)
    with torch.no_grad():
        layer.base_layer.weight.copy_(eye)
        for p in layer.hydra_adapters.parameters():
            p.copy_(eye)
        layer.hydra_adapters["a"].A_up.mul_(100)
        layer.hydra_adapters["b"].A_up.mul_(10_000)
    torch.manual_seed(0)
    h = layer(torch.ones(500, 64, dtype=F64)) - 3  # of the base, of b's sequential branch, of c
    kept = {"a": h.remainder(12_500) > 100, "b": h > 10_000}
    torch.testing.assert_close(h, 200 * kept["a"].double() + 12_500 * kept["b"].double(), rtol=1e-12, atol=1e-8)
    assert kept["a"].double().mean().sub(0.5).abs() < 0.02
    assert kept["b"].double().mean().sub(0.8).abs() < 0.02
    assert (kept["a"] & kept["b"]).double().mean().sub(0.4).abs() < 0.02
    layer.eval()
    torch.testing.assert_close(layer(torch.ones(2, 64, dtype=F64)), torch.full((2, 64), 10_103.0, dtype=F64))


def test_a_layer_without_the_parallel_branch_has_no_input_dropout():
    config = HydraConfig(r_a=4, input_dropout=0.1, rank_pattern={"fc": [0, 4]})
    assert config.options("other")["input_dropout"] == 0.1
    assert config.options("fc")["input_dropout"] == 0.0


@pytest.mark.parametrize("names", [["one"], ["three", "two"], None], ids=["one", "two", "active"])
def test_merging_and_unmerging(names):
    layer, x = several(), inputs()
    want = oracle(layer, x, names or ["one", "two", "three"])
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    layer.merge(adapter_names=names)
    assert layer.merged_adapters == (names or ["one", "two", "three"])
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.base_layer(x), want, rtol=1e-12, atol=1e-12)
    assert set(layer.state_dict()) == set(before)
    layer.unmerge()
    assert not layer.merged
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merging_twice_reads_the_unmerged_weight():
    layer, x = several(), inputs()
    layer.merge(adapter_names=["one"])
    with pytest.warns(UserWarning, match="additionally merging three"):
        layer.merge(adapter_names=["three"])
    torch.testing.assert_close(layer(x), oracle(_unmerged(layer), x, ["one", "three"]), rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge(adapter_names=["one"])


def _unmerged(layer):
    layer = copy.deepcopy(layer)
    layer.unmerge()
    return layer


def test_a_merged_layer_moves_and_unmerges():
    layer = several()
    weight = layer.base_layer.weight.detach().clone()
    layer.merge()
    layer.float()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight.float())
    merged = pickle.loads(pickle.dumps(several()))
    merged.merge()
    assert torch.equal(copy.deepcopy(merged)(inputs()), merged(inputs()))


def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing():
    layer = several()
    with torch.no_grad():
        layer.hydra_adapters["two"].A_up[3, 1] = float("inf")
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="merge: expected finite weights, got infinity or NaN from one, two, three"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged
    layer.merge(safe_merge=True, adapter_names=["one"])


def test_a_checkpoint_that_is_saved_while_merged_holds_the_trained_bias(tmp_path):
    model = adapted(bias="hydra_only")
    want = model(inputs())
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(peft.PeftModel.from_pretrained(net(), tmp_path)(inputs()), want)


def test_loading_ends_a_merge():
    model = adapted()
    stored, want = copy.deepcopy(model.state_dict()), model(inputs())
    model.merge_adapter()
    model.load_state_dict(stored)
    assert not model.get_base_model().fc1.merged
    assert torch.equal(model(inputs()), want)


def test_replicas_of_data_parallel_answer_as_the_model(monkeypatch):
    """What nn.DataParallel runs on each GPU: their parameters are attributes, no longer registered."""
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",  # the only part that needs GPUs
        lambda tensors, devices, detach=False: [[t.detach().clone() for t in tensors] for _ in devices],
    )
    model = adapted()
    for replica in torch.nn.parallel.replicate(model, [0, 1]):
        assert torch.equal(replica(inputs()), model(inputs()))


def test_the_tools_for_injected_layers_name_pefts():
    model = adapted().eval()
    for tool in (hk.merge, hk.unmerge, hk.merge_and_unload, hk.adapter_state_dict, hk.mark_only_adapters_trainable):
        with pytest.raises(ValueError, match="model: its adapters are PEFT's; use PEFT's methods: merge_adapter"):
            tool(model)


def test_names_of_adapters_are_a_list():
    with pytest.raises(TypeError, match="adapter_names should be a list of strings"):
        adapted().merge_and_unload(adapter_names="default")


def test_two_layers_of_one_weight_merge_only_into_weights_of_their_own():
    base = net()
    base.more["again"].weight = base.fc2.weight
    model = adapted(base, target_modules=["fc2", "again"])
    want, weight = model(inputs()), base.fc2.base_layer.weight
    with pytest.raises(ValueError, match="merge_adapter: fc2 shares its weight with another module"):
        model.merge_adapter()
    plain = model.merge_and_unload()
    assert plain.fc2.weight is not plain.more["again"].weight
    assert weight is not plain.fc2.weight
    torch.testing.assert_close(plain(inputs()), want, rtol=1e-12, atol=1e-12)


def test_all_linear_finds_layers_that_are_adapted_already():
    model = peft.get_peft_model(net(), HydraConfig(target_modules="all-linear"))
    model.add_adapter("second", HydraConfig(target_modules="all-linear", r_a=1))
    layers = [m for m in model.modules() if isinstance(m, HydraLinearLayer)]
    assert len(layers) == 4
    assert all(layer.hydra_adapters.keys() == {"default", "second"} for layer in layers)
    assert "(second): Adapter(r_a=1, r_b=4)" in repr(model)


def test_low_precision_does_not_round_the_scales_of_joined_adapters():
    def layer(dtype):
        torch.manual_seed(0)
        made = HydraLinearLayer(nn.Linear(64, 48, bias=False), "a", {"r_a": 8, "r_b": 0, "scale_a": 1.3})
        made.add_adapter("b", {"r_a": 8, "r_b": 0, "scale_a": 0.7})
        made.set_adapter(["a", "b"])
        return randomise(made.bfloat16().to(dtype))

    low, exact = layer(torch.bfloat16), layer(torch.bfloat16).double()
    exact.load_state_dict({name: t.double() for name, t in low.state_dict().items()})
    low.merge()
    exact.merge()
    assert torch.equal(low.base_layer.weight, exact.base_layer.weight.bfloat16())


def test_biases_are_not_merged_into_a_layer_without_one():
    said = r"adapter_bias: .* not merged, since their base layers have no bias: 'fc1' and 1 more"
    with pytest.warns(UserWarning, match=said) as warned:
        model = adapted(net(bias=False), adapter_bias=True)
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="adapter_bias: .* have no bias: 'fc1'$"):
        model.add_adapter("second", HydraConfig(target_modules=["fc1"], adapter_bias=True))
    model.add_adapter("third", HydraConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match="merge: expected a bias in the base layer"):
        model.merge_adapter()
    plain = adapted(net(bias=False))
    want = plain(inputs())
    torch.testing.assert_close(plain.merge_and_unload()(inputs()), want, rtol=1e-12, atol=1e-12)


# --- in a model -------------------------------------------------------------------------------------------------------


def test_training_starts_at_the_frozen_model_and_changes_only_adapters():
    base = net()
    want = base(inputs())
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    model = peft.get_peft_model(base, HydraConfig(r_a=3, r_b=2, target_modules=["fc1", "fc2"]))
    assert torch.equal(model(inputs()), want)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if "hydra_adapters" in n}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5 * (7 + 11) + 2 * (11 - 7) + 5 * 22
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(inputs()).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(model(inputs()), want)
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_a_layer_in_two_places_is_adapted_and_unloaded_in_both(tmp_path):
    model = adapted(net(shared=True))
    inner = model.get_base_model()
    assert inner.fc2 is inner.more["again"]
    assert isinstance(inner.more["again"], HydraLinearLayer)
    want = model(inputs())
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="missing adapter keys"):  # PEFT does not see that they are the others
        again = peft.PeftModel.from_pretrained(net(shared=True), tmp_path)
    assert torch.equal(again(inputs()), want)
    plain = model.merge_and_unload()
    assert plain.fc2 is plain.more["again"]
    assert type(plain.more["again"]) is nn.Linear
    torch.testing.assert_close(plain(inputs()), want, rtol=1e-12, atol=1e-12)


def test_named_adapters_switch_disable_and_go():
    model = adapted()
    frozen = net()(inputs())
    model.add_adapter("other", HydraConfig(r_a=1, r_b=4, target_modules=["fc2"], scale_b=3.0))
    first = model(inputs())
    model.set_adapter("other")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.fc2.hydra_adapters.other.{p}" for p in ("A_down", "A_up", "B_down", "B_up")
    }
    assert torch.equal(model(inputs()), frozen)
    randomise(model, 9)
    second = model(inputs())
    assert not torch.allclose(second, first)
    with model.disable_adapter():
        assert torch.equal(model(inputs()), frozen)
    assert torch.equal(model(inputs()), second)
    model.base_model.set_adapter(["default", "other"])
    both = model(inputs())
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(inputs()), first, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    assert torch.equal(model(inputs()), first)
    model.delete_adapter("other")
    assert torch.equal(model(inputs()), first)
    assert not any("other" in name for name, _ in model.named_parameters())
    assert peft.tuners.tuners_utils.BaseTunerLayer in type(model.get_base_model().fc1).__mro__
    assert peft.get_model_status(model).trainable_params == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_trained_base_biases_are_saved_and_loaded(tmp_path):
    model = adapted(bias="hydra_only")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "hydra_adapters" not in n}
    assert trainable == {"base_model.model.fc1.base_layer.bias", "base_model.model.fc2.base_layer.bias"}
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(inputs()), model(inputs()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"adapter_bias": True, "learnable_scale": True, "scale_a": 2.0}], ids=["", "all"]
)
def test_saving_and_loading(tmp_path, options, low_cpu_mem_usage):
    model = adapted(modules_to_save=["head"], **options)
    model.add_adapter("other", HydraConfig(r_a=2, r_b=0, target_modules=["fc1"], scale_a=0.25))
    model.set_adapter("other")
    randomise(model, 5)
    second = model(inputs())
    model.set_adapter("default")
    first = model(inputs())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    again.load_adapter(tmp_path / "other", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(again(inputs()), first)
    assert not any(p.requires_grad for p in again.parameters())
    again.set_adapter("other")
    assert torch.equal(again(inputs()), second)
    trains = peft.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert {n for n, p in trains.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path), HydraConfig)


def test_heads_without_a_weight_survive_merge_and_unload():
    model = adapted(modules_to_save=["head"])
    want = model(inputs())
    plain = model.merge_and_unload()
    assert type(plain.head) is nn.Sequential
    torch.testing.assert_close(plain(inputs()), want, rtol=1e-12, atol=1e-12)


def test_an_embedding_tied_to_a_merged_weight_stays():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, tokens):
            return self.out(self.embedding(tokens))

    torch.manual_seed(0)
    base, tokens = Tied().double(), torch.arange(9)
    embedded = base.embedding.weight.detach().clone()
    model = randomise(peft.get_peft_model(base, HydraConfig(target_modules=["out"])))
    want = model(tokens)
    with pytest.raises(ValueError, match="merge_adapter: out shares its weight with another module"):
        model.merge_adapter()
    assert torch.equal(model(tokens), want)
    plain = model.merge_and_unload()
    assert torch.equal(plain.embedding.weight, embedded)
    torch.testing.assert_close(plain(tokens), want, rtol=1e-12, atol=1e-12)


def test_patterns_give_layers_ranks_and_scales_of_their_own():
    model = adapted(rank_pattern={"fc2": [0, 6]}, scale_pattern={"^fc1": [0.5, 4.0]})
    fc1, fc2 = (getattr(model.get_base_model(), name).hydra_adapters["default"] for name in ("fc1", "fc2"))
    assert (fc1.r_a, fc1.r_b, fc1.scale_a, fc1.scale_b) == (3, 2, 0.5, 4.0)
    assert (fc2.r_a, fc2.r_b, fc2.scale_a, fc2.scale_b) == (0, 6, 1.0, 1.0)


def test_patterns_that_overlap_are_refused_where_they_disagree(tmp_path):
    """PEFT takes the first match, and stores the keys sorted: the adapter would load as another one."""
    for name, wide, narrow in (("scale_pattern", [1.0, 1.0], [2.0, 2.0]), ("rank_pattern", [3, 2], [1, 1])):
        said = rf"{name}: expected one value for each layer, got .*'fc2': .*'more\.again|fc2': .* for "
        with pytest.raises(ValueError, match=said):
            HydraConfig(target_modules=["fc2"], **{name: {"fc2": wide, "more.again|fc2": narrow}})
        # Only the names of the layers tell that these overlap.
        config = HydraConfig(target_modules=["fc1", "fc2"], **{name: {"fc[23]": wide, "fc[12]": narrow}})
        base = net()
        with pytest.raises(
            ValueError, match=rf"{name}: expected one value .*'fc\[23\]'.*'fc\[12\]'.* for 'fc2'; write"
        ):
            peft.get_peft_model(base, config)
        assert type(base.fc1) is nn.Linear
        alike = adapted(**{name: {"fc2": narrow, ".*2": narrow}})
        alike.save_pretrained(tmp_path)
        assert torch.equal(peft.PeftModel.from_pretrained(net(), tmp_path)(inputs()), alike(inputs()))


def test_each_of_many_patterns_is_compiled_once(monkeypatch):
    """A checkpoint with a rank for each layer has hundreds; re keeps 512, and each key meets every layer."""
    compiled, compile_ = Counter(), re.compile
    monkeypatch.setattr(re, "compile", lambda text, *flags: (compiled.update([text]), compile_(text, *flags))[1])
    HydraConfig(rank_pattern={rf"^once\.{i}\.fc": [1, i] for i in range(520)})
    assert sum("once" in text for text in compiled) == 520
    assert set(compiled.values()) == {1}


def test_patterns_load_as_they_were_saved(tmp_path):
    model = adapted(rank_pattern={"fc2": [1, 4], "^fc1": [2, 0]}, scale_pattern={"fc2": [3.0, 1.0], "^fc1": [0.5, 4.0]})
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(inputs()), model(inputs()))


def added_by(way, dtype):
    """The layers of a small ViT of that dtype, adapted in one of PEFT's ways."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.ViTModel(transformers.ViTConfig(image_size=32, **sizes)).to(dtype)
    config = HydraConfig(target_modules=["fc1", "fc2"], learnable_scale=True, adapter_bias=True)
    if way == "add_adapter":
        base.add_adapter(config)
    elif way == "inject_adapter_in_model":
        peft.inject_adapter_in_model(config, base)
    elif way == "PeftModel.add_adapter":
        peft.get_peft_model(base, HydraConfig(target_modules=["fc1"])).add_adapter("second", config)
    else:
        peft.get_peft_model(base, config, autocast_adapter_dtype=way == "get_peft_model")
    return [m for m in base.modules() if isinstance(m, HydraLinearLayer)]


WAYS = ["get_peft_model", "PeftModel.add_adapter", "add_adapter", "inject_adapter_in_model"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
def test_adapters_are_float32_over_a_low_precision_base_whichever_way_they_are_added(way, dtype):
    layers = added_by(way, dtype)
    assert len(layers) == 2
    wide = F64 if dtype == F64 else torch.float32
    assert {p.dtype for layer in layers for p in layer.hydra_adapters.parameters()} == {wide}
    assert {layer.base_layer.weight.dtype for layer in layers} == {dtype}


def test_adapters_have_the_dtype_of_the_base_where_pefts_option_says_so(tmp_path):
    layers = added_by("get_peft_model without autocast_adapter_dtype", torch.bfloat16)
    assert {p.dtype for layer in layers for p in layer.hydra_adapters.parameters()} == {torch.bfloat16}
    options = {"target_modules": ["fc1"]}
    model = peft.get_peft_model(net(torch.bfloat16), HydraConfig(**options))
    model.add_adapter("low", HydraConfig(**options), autocast_adapter_dtype=False)
    adapters = model.get_base_model().fc1.hydra_adapters
    assert {name: adapters[name].A_down.dtype for name in adapters} == {"default": torch.float32, "low": torch.bfloat16}
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(torch.bfloat16), tmp_path, autocast_adapter_dtype=False)
    assert loaded.get_base_model().fc1.hydra_adapters["default"].B_up.dtype == torch.bfloat16


def test_pefts_helpers_take_the_layers():
    """disable_input_dtype_casting is for LoRA's own casts of x; Hydra has none, so nothing changes."""
    model = adapted()
    want = model(inputs())
    with peft.helpers.disable_input_dtype_casting(model):
        assert torch.equal(model(inputs()), want)
    with pytest.raises(TypeError, match=r"x: expected torch\.float64"):
        model(inputs(torch.float32))


def test_an_average_of_a_merged_model_is_refused_until_it_is_unmerged():
    model, other = adapted().eval(), adapted(net(seed=0)).eval()
    randomise(other, 8)
    model.merge_adapter()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(other)  # a copy of the unmerged parameters
    with pytest.raises(ValueError, match=r"it was changed while the layer is merged, .*; unmerge before"):
        average(inputs())
    average.module.unmerge_adapter()
    torch.testing.assert_close(average(inputs()), other(inputs()), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torch_jit_script_is_refused_by_name():
    with pytest.raises(TypeError, match=r"torch.jit.script cannot compile adapted layers; use torch.compile"):
        torch.jit.script(adapted().get_base_model())


def test_a_base_layer_whose_size_is_a_tensor_is_adapted():
    base = nn.Sequential(nn.Linear(torch.tensor(7), 11))
    model = peft.get_peft_model(base, HydraConfig(target_modules=["0"]))
    assert model(inputs(torch.float32)).shape == (5, 11)
    assert type(base[0].in_features) is int


def test_low_precision_bases_get_float32_adapters():
    model = peft.get_peft_model(net(torch.bfloat16), HydraConfig(target_modules=["fc1", "fc2"]))
    randomise(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layer, x = model.get_base_model().fc1, inputs(torch.bfloat16)
    h = layer(x)
    h.float().sum().backward()
    assert h.dtype == torch.bfloat16
    exact = oracle(layer, x, ["default"])
    assert (h.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    assert {p.grad.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}


def test_compiled_and_checkpointed_models_give_the_same_gradients():
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, num_labels=4
    )
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(config)
    model = peft.get_peft_model(
        base, HydraConfig(target_modules="all-linear", dropout=0.0, modules_to_save=["classifier"])
    )
    randomise(model)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def step(run):
        model.zero_grad()
        run(pixel_values=pixels, labels=torch.tensor([0, 3])).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = step(model)
    assert len(plain) == 4 * 6 + 2
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    base.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = step(model.train())
    for name, want in plain.items():
        torch.testing.assert_close(compiled[name], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(checkpointed[name], want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # at each further adapter
def test_transformers_own_adapter_methods(tmp_path):
    def vit():
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            num_labels=4,
        )
        return transformers.ViTForImageClassification(config).eval()

    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = vit()
    frozen = model(pixels).logits
    model.add_adapter(HydraConfig(target_modules=["fc1", "fc2"]), "one")
    model.add_adapter(HydraConfig(target_modules=["fc2"], r_a=0), "two")
    model.set_adapter("one")
    randomise(model)
    logits = model(pixels).logits
    assert not torch.allclose(logits, frozen)
    model.disable_adapters()
    torch.testing.assert_close(model(pixels).logits, frozen, rtol=0, atol=0)
    model.enable_adapters()
    torch.testing.assert_close(model(pixels).logits, logits, rtol=0, atol=0)
    model.set_adapter("two")
    torch.testing.assert_close(model(pixels).logits, frozen, rtol=0, atol=0)
    model.set_adapter("one")
    model.save_pretrained(tmp_path)
    again = vit()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(again.eval()(pixels).logits, logits, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    torch.testing.assert_close(model(pixels).logits, frozen, rtol=0, atol=0)
    assert not any(".one." in name for name, _ in model.named_parameters())


# --- refusals ---------------------------------------------------------------------------------------------------------


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x)


REFUSED = {
    "Conv1D": (lambda: transformers.pytorch_utils.Conv1D(5, 7), "pytorch_utils.Conv1D"),
    "Embedding": (lambda: nn.Embedding(5, 7), "Embedding"),
    "Conv2d": (lambda: nn.Conv2d(5, 7, 1), "Conv2d"),
    "Quantised": (lambda: Quantised(5, 7), "Quantised"),
    "TwoTensor": (of_a_subclass, "plain tensor as the weight of .*Linear, got TwoTensor"),
    "LoRA": (
        lambda: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(5, 5)))[0],
        "lora",
    ),
    "hooks": (lambda: _hooked(), "has hooks"),
}


def _hooked():
    linear = nn.Linear(5, 5)
    linear.register_forward_hook(lambda *_: None)
    return linear


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_linear_is_refused_by_name_before_anything_changes(kind):
    make, text = REFUSED[kind]
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "x": make()})
    with pytest.raises((TypeError, ValueError), match=f"target_modules: 'x' matches, but .*{text}"):
        peft.get_peft_model(model, HydraConfig(target_modules=["a", "x"]))
    assert type(model["a"]) is nn.Linear
    assert model["a"].weight.requires_grad


def test_torchs_attention_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    for target in ("linear1", "self_attn.out_proj"):
        with pytest.raises(TypeError, match="without calling"):
            peft.get_peft_model(model, HydraConfig(target_modules=[target]))


def wavlm():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embedding_groups": 2}
    return transformers.WavLMModel(transformers.WavLMConfig(**sizes, **convolutions))


def mamba():
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


@pytest.mark.parametrize(("make", "target"), [(wavlm, "q_proj"), (wavlm, "out_proj"), (mamba, "dt_proj")])
def test_layers_whose_weights_transformers_reads_are_refused(make, target):
    model = make()
    said = f"{target}' matches, but .* reads the layer's weight without calling the layer"
    with pytest.raises(TypeError, match=said):
        peft.get_peft_model(model, HydraConfig(target_modules=[target]))
    with pytest.raises(TypeError, match=said):
        hk.inject(model, [target])
    assert not any(isinstance(m, hk.adapter.Adapter) for m in model.modules())


def test_the_classes_said_to_read_weights_do():
    sources = [p.read_text() for p in Path(transformers.__file__).parent.glob("models/*/modeling_*.py")]
    of_transformers = {name: layers for name, layers in READS_WEIGHTS_OF.items() if "." not in name}
    for name, layers in of_transformers.items():
        source = next(s for s in sources if f"\nclass {name}(" in s).split(f"\nclass {name}(")[1].split("\nclass ")[0]
        assert all(f"self.{layer}.weight" in source for layer in layers), name


def test_what_peft_refuses_of_lora_in_a_mamba_is_refused_first():
    model = net()
    model.config = transformers.MambaConfig()
    model.out_proj = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        peft.get_peft_model(model, HydraConfig(target_modules=["fc1", "out_proj"]))
    assert type(model.fc1) is nn.Linear


def test_weighted_adapters_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"add_weighted_adapter: Hydra does not support it.*set_adapter"):
        adapted().add_weighted_adapter(["default"], [0.5], "half")


def test_layers_that_accelerate_dispatched_are_refused_with_the_way_out():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.dispatch_model(net(), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match=r"has a hook of accelerate's .*remove_hook_from_submodules"):
        peft.get_peft_model(model, HydraConfig(target_modules=["fc1"]))
    accelerate.hooks.remove_hook_from_submodules(model)
    want = model(inputs())
    assert torch.equal(peft.get_peft_model(model, HydraConfig(target_modules=["fc1"]))(inputs()), want)


def test_layers_that_accelerate_offloads_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(adapted(), execution_device="cpu")
    with pytest.raises(ValueError, match="base_layer: accelerate offloads it"):
        model(inputs())


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_what_accelerate_offloads_merges_into_what_it_loads(call):
    accelerate = pytest.importorskip("accelerate")
    want = adapted().eval()(inputs())
    model = accelerate.cpu_offload(adapted().eval(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"merge: base_layer\.weight is on the meta device and has no values"):
        model.get_base_model().fc1.merge()
    merged = getattr(model, call)() or model
    torch.testing.assert_close(merged(inputs()), want, rtol=1e-12, atol=1e-12)


def test_a_scale_pattern_that_matches_nothing_is_said():
    with pytest.warns(RuntimeWarning, match="scale_pattern: 'fc7' matches no adapted layer"):
        peft.get_peft_model(net(), HydraConfig(target_modules=["fc1"], scale_pattern={"fc7": [1.0, 2.0]}))


@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]], ids="+".join)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_the_base_layer_run_and_the_adapters_act(kind, names):
    layer, x = several(), inputs().requires_grad_()
    layer.set_adapter(names)
    layer(x).sum().backward()
    plain = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None} | {"x": x.grad}
    layer.zero_grad()
    ran = []
    getattr(layer.base_layer, f"register_{kind}_hook")(lambda *_: ran.append(kind))
    again = inputs().requires_grad_()
    with pytest.warns(
        UserWarning, match="base_layer: it has hooks, which run only if the adapters run as plain PyTorch"
    ):
        h = layer(again)
    torch.testing.assert_close(h, oracle(layer, again.detach(), names), rtol=1e-12, atol=1e-12)
    h.sum().backward()
    hooked = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None} | {"x": again.grad}
    assert ran == [kind]
    assert hooked.keys() == plain.keys()
    for name, want in plain.items():
        torch.testing.assert_close(hooked[name], want, rtol=1e-11, atol=1e-11)


def test_what_a_hook_on_the_base_layer_returns_counts():
    """The sequential branch reads it, as the rest of the model would."""
    layer, x = several(), inputs()
    layer.set_adapter(["three"])
    want = oracle(layer, x, ["three"])
    layer.base_layer.register_forward_hook(lambda module, args, y0: y0 + 1)
    biased = copy.deepcopy(layer)
    with torch.no_grad():
        biased.base_layer.bias += 1
    with pytest.warns(UserWarning, match="base_layer: it has hooks"):
        h = layer(x)
    torch.testing.assert_close(h, oracle(biased, x, ["three"]), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(h, want)


def test_dropout_acts_beside_hooks_too():
    layer = HydraLinearLayer(nn.Linear(64, 64), "one", {"r_a": 64, "r_b": 0, "dropout": 0.5})
    randomise(layer).base_layer.register_forward_hook(lambda *_: None)
    x = torch.ones(2, 64)

    def twice():
        with pytest.warns(UserWarning, match="base_layer: it has hooks"):
            return [layer(x) for _ in range(2)]

    assert not torch.equal(*twice())
    layer.eval()
    assert torch.equal(*twice())


def test_batches_of_several_adapters_are_refused():
    with pytest.raises(ValueError, match="adapter_names: expected None"):
        adapted()(inputs(), adapter_names=["default"] * 5)


def test_adapters_of_different_routes_are_not_joined():
    layer = several()
    layer.hydra_adapters["two"].form = "kept"
    with pytest.raises(ValueError, match="form, backend: expected the same"):
        layer(inputs())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r_a": -1}, "r_a: "),
        ({"r_a": 0, "r_b": 0, "rank_pattern": {"fc": [0, 0]}}, "r_a, r_b: expected 1 or more, got 0"),
        ({"dropout": 1.0}, "dropout: "),
        ({"input_dropout": 1.0}, "input_dropout: "),
        ({"input_dropout": 0.1, "r_a": 0}, "input_dropout: expected 0 with r_a = 0"),
        ({"form": "fused"}, "form: "),
        ({"bias": "lora_only"}, "bias: "),
        ({"layers_pattern": "layers"}, "layers_pattern: "),
        ({"target_modules": ".*fc", "layers_to_transform": 0}, "layers_to_transform: expected None with"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "layers_to_transform: expected None with"),
        ({"target_modules": ".*fc", "layers_pattern": "layers"}, "layers_pattern: expected None with"),
        ({"rank_pattern": {"fc": 3}}, "rank_pattern: "),
        ({"rank_pattern": {"fc": [3, -1]}}, "r_b: "),
        ({"scale_pattern": {"fc": [1.0, float("nan")]}}, "scale_b: "),
        ({"use_dora": True}, "use_dora"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_make_no_sense_or_are_lora_s_alone(options, text):
    with pytest.raises((TypeError, ValueError), match=text):
        HydraConfig(**options)


def test_single_layers_may_have_all_the_ranks():
    model = peft.get_peft_model(net(), HydraConfig(r_a=0, r_b=0, target_modules=["fc1"], rank_pattern={"fc1": [2, 0]}))
    assert [name for name, p in model.named_parameters() if p.requires_grad and "A_up" in name]


def test_unknown_entries_of_a_file_are_warned_of(tmp_path):
    """A newer version may have written them: PEFT's rule."""
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['use_dora'\]"):
        again = peft.PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(again(inputs()), model.eval()(inputs()), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"r": 8, "lora_alpha": 16}, {"lora_dropout": 0.1}], ids=str)
def test_loras_own_options_are_translated_in_the_error(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))}: HydraConfig does not have it; pass r_a and r_b for r"):
        HydraConfig(**options)


def test_under_fsdp2_it_trains_and_merging_is_refused():
    model, plain = adapted(), adapted()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in (model.get_base_model().fc1, model.get_base_model().fc2):
            torch.distributed.fsdp.fully_shard(layer)
        torch.distributed.fsdp.fully_shard(model)
        plain(inputs()).square().sum().backward()
        model(inputs()).square().sum().backward()
        for (name, p), want in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (want.grad is None), name
            if want.grad is not None:
                torch.testing.assert_close(p.grad.full_tensor(), want.grad, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="merge: the layer's parameters are sharded over processes"):
            model.get_base_model().fc1.merge()
    finally:
        torch.distributed.destroy_process_group()


def test_the_package_itself_does_not_import_peft():
    import subprocess
    import sys

    code = "import hydra_kernels, sys; sys.exit('peft' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "peft" not in hk.__all__

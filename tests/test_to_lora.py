"""Adapters as PEFT's LoRA: what `to_lora` writes PEFT loads, with the same outputs, and trains on."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hydra_kernels as hk

from .distributed import exports
from .distributed.training import Spec
from .oracle import hydra, violations

peft = pytest.importorskip("peft")  # an optional extra

from hydra_kernels.peft import HydraConfig  # noqa: E402

from .test_peft import inputs, net, randomise  # noqa: E402

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
pytestmark = [
    # PEFT takes the bias of lora_B for a sharded tensor, and says that it does not merge where the base has none.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:inject. the adapters are torch.bfloat16"),
]


def loaded(path, base=None, name="default"):
    return peft.PeftModel.from_pretrained(net() if base is None else base, path, adapter_name=name)


def ours(**options):
    """Net() with ranks that differ by layer: Hydra, LoRA, SeqLoRA and one more Hydra, nothing zero."""
    model = net(bias=False)
    hk.inject(model, ["fc1"], r_a=3, r_b=2, scale_a=0.7, scale_b=-1.5, **options)
    hk.inject(model, ["fc2"], method="lora", r=4, scale=2.0, **options)
    hk.inject(model, ["again"], method="seqlora", r=5, scale=0.5, **options)
    hk.mark_only_adapters_trainable(model)
    return randomise(model)


@pytest.mark.parametrize("options", [{}, {"learnable_scale": True}, {"adapter_bias": True}], ids=str)
def test_peft_loads_ours_with_equal_outputs(tmp_path, options):
    model = ours(**options)
    bias = "lora" if options.get("adapter_bias") else "refuse"
    assert hk.convert.to_lora(model, tmp_path, bias=bias, base_model_name_or_path="the/base") == [tmp_path]
    lora = loaded(tmp_path, net(bias=False))
    torch.testing.assert_close(lora(inputs()), model(inputs()), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(inputs()), net(bias=False)(inputs()), rtol=1e-2)
    layers = lora.get_base_model()
    assert [m.r["default"] for m in (layers.fc1, layers.fc2, layers.more["again"])] == [5, 4, 5]
    assert {m.scaling["default"] for m in (layers.fc1, layers.fc2, layers.more["again"])} == {1.0}
    assert lora.peft_config["default"].base_model_name_or_path == "the/base"
    torch.testing.assert_close(lora.unload()(inputs()), net(bias=False)(inputs()))


def test_a_bias_that_runs_through_the_sequential_branch(tmp_path):
    model = net()
    hk.inject(model, ["fc1", "fc2"], r_a=2, r_b=3)
    hk.mark_only_adapters_trainable(model)
    hk.convert.to_lora(model, tmp_path)  # untrained it changes nothing
    randomise(model)
    with pytest.raises(ValueError, match=r"bias: the adapter 'default' changes the bias of 'fc1'.*bias='lora'"):
        hk.convert.to_lora(model, tmp_path / "not written")
    assert not (tmp_path / "not written").exists()
    hk.convert.to_lora(model, tmp_path, bias="lora")
    lora = loaded(tmp_path)
    torch.testing.assert_close(lora(inputs()), model(inputs()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lora.merge_and_unload()(inputs()), model(inputs()), rtol=1e-10, atol=1e-10)


def test_merged_and_wrapped_ones_are_written_as_they_are_without(tmp_path):
    model = ours().eval()
    hk.convert.to_lora(model, tmp_path / "plain")
    hk.merge(model)
    hk.convert.to_lora(torch.compile(model, backend="eager"), tmp_path / "other")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("merged", [False, True])
def test_pefts_hydra_with_several_adapters(tmp_path, merged):
    config = HydraConfig(
        r_a=3, r_b=2, scale_b=0.5, target_modules=["fc1", "fc2", "again"], bias="hydra_only", modules_to_save=["head"],
        rank_pattern={"fc2": [1, 4], "fc1": [2, 1], "again": [0, 0]}, adapter_bias=True,
    )  # fmt: skip
    model = randomise(peft.get_peft_model(net(), config))
    model.add_adapter("second", HydraConfig(r_a=0, r_b=3, target_modules=["again"]))
    model.set_adapter("second")
    randomise(model)
    want = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        want[name] = model(inputs())
    if merged:
        model.merge_adapter(["default"])
    assert hk.convert.to_lora(model, tmp_path, bias="lora") == [tmp_path, tmp_path / "second"]
    lora = loaded(tmp_path)
    torch.testing.assert_close(lora(inputs()), want["default"], rtol=1e-10, atol=1e-10)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (said["bias"], said["modules_to_save"], said["r"]) == ("all", ["head"], 5)
    assert sorted(said["target_modules"]) == ["fc1", "fc2"]
    assert said["rank_pattern"] == said["alpha_pattern"] == {"^fc1": 3}
    lora.load_adapter(tmp_path / "second", "second")
    lora.base_model.set_adapter("second")
    torch.testing.assert_close(lora(inputs()), want["second"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("others", [0.1, 0.2])
def test_dropout_on_x_comes_along_where_it_is_one(tmp_path, others):
    model = net(bias=False)
    hk.inject(model, ["fc1"], input_dropout=0.1)
    hk.inject(model, ["fc2"], method="lora", input_dropout=others)
    hk.mark_only_adapters_trainable(model)
    hk.convert.to_lora(model, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).lora_dropout == (0.1 if others == 0.1 else 0.0)


def test_training_goes_on(tmp_path):
    model = ours()
    hk.convert.to_lora(model, tmp_path)
    lora = peft.PeftModel.from_pretrained(net(bias=False), tmp_path, is_trainable=True)
    before = lora(inputs()).square().sum()
    before.backward()
    trained = [p for p in lora.parameters() if p.requires_grad]
    assert len(trained) == 6
    assert all(p.grad.abs().max() > 0 for p in trained)
    torch.optim.SGD(trained, lr=1e-4).step()
    assert lora(inputs()).square().sum() < before


def test_what_trained_beside_the_adapters(tmp_path):
    model = net(bias=False)
    hk.inject(model, ["fc1", "fc2"], r_a=2, r_b=2)
    hk.mark_only_adapters_trainable(model, keep=["head"])
    randomise(model)
    with pytest.raises(ValueError, match=r"modules_to_save: 'head.1.weight' trains, but is not in an adapter"):
        hk.convert.to_lora(model, tmp_path)
    with pytest.raises(ValueError, match="modules_to_save: 'heads' matches no module"):
        hk.convert.to_lora(model, tmp_path, modules_to_save=["heads"])
    hk.convert.to_lora(model, tmp_path, modules_to_save=["head"])
    torch.testing.assert_close(loaded(tmp_path, net(bias=False))(inputs()), model(inputs()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", ["adapted", "all"])
def test_biases_that_trained(tmp_path, bias):
    model = net()
    hk.inject(model, ["fc1", "fc2"], method="lora", r=2)
    hk.mark_only_adapters_trainable(model, bias=bias)
    randomise(model)
    hk.convert.to_lora(model, tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["bias"] == {"adapted": "lora_only", "all": "all"}[bias]
    torch.testing.assert_close(loaded(tmp_path)(inputs()), model(inputs()), rtol=1e-10, atol=1e-10)


class Nested(nn.Module):
    """The name of one layer is the end of another's."""

    def __init__(self):
        super().__init__()
        self.fc, self.inner = nn.Linear(7, 7, dtype=F64), nn.ModuleDict({"fc": nn.Linear(7, 7, dtype=F64)})

    def forward(self, x):
        return self.inner["fc"](torch.tanh(self.fc(x)))


def test_only_the_adapted_layers_are_named(tmp_path):
    torch.manual_seed(0)
    base = Nested()
    model = copy.deepcopy(base)
    hk.inject(model, "fc", method="lora", r=2)
    hk.mark_only_adapters_trainable(model)
    randomise(model)
    hk.convert.to_lora(model, tmp_path)
    lora = loaded(tmp_path, base)
    torch.testing.assert_close(lora(inputs()), model(inputs()), rtol=1e-10, atol=1e-10)
    assert type(lora.get_base_model().inner["fc"]) is nn.Linear


@pytest.mark.parametrize("cancels", [False, True], ids=["plain", "b0 cancels W0 x"])
def test_bfloat16_by_the_rule(tmp_path, cancels):
    """What PEFT makes of it, with its adapters in float32, against Eq. 9-10 in float64 and the naive layer."""
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 80), torch.randn(64, 96)
    with torch.no_grad():
        if cancels:
            x = x * 0.02 + torch.randn(96)
            linear.bias.copy_(-(x.bfloat16().float().mean(0) @ linear.weight.bfloat16().float().t()))
    base = nn.Sequential(linear).bfloat16()
    model = copy.deepcopy(base)
    hk.inject(model, ["0"], r_a=4, r_b=4, adapter_dtype=F32)
    hk.mark_only_adapters_trainable(model)
    with torch.no_grad():
        for p in model[0].adapters().values():
            p.normal_(std=0.2)
    hk.convert.to_lora(model, tmp_path, bias="lora")
    lora, x = loaded(tmp_path, base), x.bfloat16()
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {F32}
    t = {name: p.detach().double() for name, p in model[0].named_parameters()}
    true = {"h": hydra({"x": x.double(), **t})}
    layer = model[0]
    naive = {"h": hk.reference.hydra_linear(x, layer.weight, layer.bias, *(t[n].float() for n in t if n[0] in "AB"))}
    assert violations({"h": lora(x).detach()}, {"h": naive["h"].detach()}, true, BF16) == []


def test_refusals(tmp_path):
    model = ours()
    with pytest.raises(ValueError, match="bias: expected 'refuse' or 'lora', got 'none'"):
        hk.convert.to_lora(model, tmp_path, bias="none")
    with pytest.raises(ValueError, match="it has no adapted layer"):
        hk.convert.to_lora(net(), tmp_path)
    shared = net(shared=True)
    hk.inject(shared, ["fc2", "again"])
    with pytest.raises(ValueError, match=r"model: 'fc2' and 'more.again' are the same layer"):
        hk.convert.to_lora(shared, tmp_path)
    of_peft = peft.get_peft_model(net(), HydraConfig(target_modules=["fc1"]))
    with pytest.raises(ValueError, match="modules_to_save: expected none, since PEFT's configuration has them"):
        hk.convert.to_lora(of_peft, tmp_path, modules_to_save=["head"])
    with pytest.raises(ValueError, match="model: expected adapters of rank 1 or more, got only rank 0"):
        hk.convert.to_lora(nn.Sequential(hk.LoRALinear(3, 4, r=0)), tmp_path)
    offloaded = ours().to("meta")
    with pytest.raises(ValueError, match=r"to_lora: fc1\.A_down is on the meta device"):
        hk.convert.to_lora(offloaded, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("units", ["block", "tensor parallel"])
def test_sharded_models_write_the_same_folder(groups, folder, units):
    spec = Spec(units=units, options={"r_a": 2, "r_b": 3, "learnable_scale": units == "tensor parallel"})
    hk.convert.to_lora(exports.alone(spec), folder / "one", bias="lora", modules_to_save=["head"])
    groups.run(2, exports.to_lora, spec, str(folder / "two"))
    assert (folder / "one/adapter_config.json").read_text() == (folder / "two/adapter_config.json").read_text()
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, t in one.items():
        torch.testing.assert_close(two[name], t, rtol=1e-13, atol=1e-13)

"""Checkpoints of PEFT's LoRA as Hydra: the same outputs as PEFT gives, and a refusal of what is not LoRA of linears."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

peft = pytest.importorskip("peft")  # an optional extra
transformers = pytest.importorskip("transformers")

from hydra_kernels.peft import HydraConfig, HydraLinearLayer, from_lora  # noqa: E402

from .test_peft import adapted, inputs, net, randomise  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT takes the bias of lora_B for a tensor that was sharded.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape"),
]


def saved_lora(path, base=None, **config):
    """The outputs of a random LoRA of PEFT's over net(), saved under path."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["fc1", "fc2"]} | config
    model = randomise(peft.get_peft_model(net() if base is None else base, peft.LoraConfig(**config)).eval())
    model.save_pretrained(path)
    return model, model(inputs())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"fc2": 7}},
        {"alpha_pattern": {"fc2": 3}, "rank_pattern": {"^fc1": 2}, "use_rslora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["head"]},
        {"target_modules": "all-linear", "exclude_modules": ["again"]},
        {"target_modules": r"(fc\d|.*again)"},
        {"init_lora_weights": "gaussian"},
        {"target_parameters": []},  # as PEFT writes it for every LoRA of a model with experts
    ],
    ids=lambda config: "-".join(config) or "plain",
)
def test_outputs_are_pefts(tmp_path, config):
    model, want = saved_lora(tmp_path, **config)
    with torch.no_grad():
        want.copy_(model(inputs()))
    ours = from_lora(net(), tmp_path)
    torch.testing.assert_close(ours(inputs()), want, rtol=1e-12, atol=1e-12)
    assert not ours.training
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "hydra_adapters" in name)

    ours.save_pretrained(tmp_path / "hydra")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "hydra")
    torch.testing.assert_close(again(inputs()), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again.merge_and_unload()(inputs()), want, rtol=1e-12, atol=1e-12)


def test_micas_initialisation_leaves_the_base_as_it_was(tmp_path):
    """In float32, since PEFT refuses it in float64."""
    config = peft.LoraConfig(r=3, target_modules=["fc1", "fc2"], init_lora_weights="mica")
    lora = peft.get_peft_model(net().float(), config)
    with torch.no_grad():
        for name, p in lora.named_parameters():
            if "lora_A" in name:
                p.normal_()
    lora.save_pretrained(tmp_path)
    want = lora.eval()(inputs().float())
    assert not torch.allclose(want, net().float()(inputs().float()), rtol=1e-2)
    torch.testing.assert_close(from_lora(net().float(), tmp_path)(inputs().float()), want, rtol=1e-5, atol=1e-5)


def test_training_goes_on_with_a_new_sequential_branch(tmp_path):
    lora, want = saved_lora(tmp_path, rank_pattern={"fc2": 3})
    ours = from_lora(net(), tmp_path, r_b=2, scale_b=0.5, adapter_name="mine", is_trainable=True)
    torch.testing.assert_close(ours(inputs()), want, rtol=1e-12, atol=1e-12)
    layers = [ours.get_base_model().fc1, ours.get_base_model().fc2]
    adapters = [layer.hydra_adapters["mine"] for layer in layers]
    assert [(a.r_a, a.r_b, a.scale_a, a.scale_b) for a in adapters] == [(4, 2, 1.5, 0.5), (3, 2, 2.0, 0.5)]

    ours(inputs()).square().sum().backward()
    lora(inputs()).square().sum().backward()
    for layer, name in zip(layers, ("fc1", "fc2"), strict=True):
        theirs = getattr(lora.get_base_model(), name)
        mine = layer.hydra_adapters["mine"]
        torch.testing.assert_close(mine.A_down.grad, theirs.lora_A["default"].weight.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mine.A_up.grad, theirs.lora_B["default"].weight.grad, rtol=1e-10, atol=1e-10)
        assert mine.B_up.grad.abs().max() > 0


def test_lora_dropout_is_announced_and_may_be_kept(tmp_path):
    saved_lora(tmp_path, lora_dropout=0.1)
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1, but this Hydra has none; pass input_dropout=0.1"):
        ours = from_lora(net(), tmp_path)
    assert (ours.peft_config["default"].dropout, ours.peft_config["default"].input_dropout) == (0.0, 0.0)
    for name in ("dropout", "input_dropout"):
        assert getattr(from_lora(net(), tmp_path, **{name: 0.1}).peft_config["default"], name) == 0.1


def net32():
    return net(torch.float32)


def conv1d():
    return nn.ModuleDict({"fc1": transformers.pytorch_utils.Conv1D(5, 7)})


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc1 = nn.Embedding(9, 7), nn.Linear(7, 5)

    def forward(self, tokens):
        return self.fc1(self.embedding(tokens))


@pytest.mark.parametrize(
    ("base", "config", "text"),
    [
        (net, {"use_dora": True}, "Hydra does not support use_dora"),
        (net32, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        (net32, {"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        (
            conv1d,
            {"target_modules": ["fc1"], "fan_in_fan_out": True},
            "expected LoRA of nn.Linear, got fan_in_fan_out=True, LoRA of Conv1D",
        ),
        (Embedded, {"target_modules": ["embedding", "fc1"]}, "only LoRA of linear layers, got .*lora_embedding_A"),
        (
            Embedded,
            {"target_modules": ["fc1"], "trainable_token_indices": {"embedding": [1]}},
            "trainable_token_indices",
        ),
    ],
    ids=["dora", "pissa", "olora", "conv1d", "embedding", "tokens"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning")
def test_what_hydra_has_not_is_refused_by_name(tmp_path, base, config, text):
    peft.get_peft_model(base(), peft.LoraConfig(**{"target_modules": ["fc1"]} | config)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=text):
        from_lora(base(), tmp_path)


@pytest.mark.filterwarnings("ignore:target_modules. .'head.1'. matches no module:RuntimeWarning")
def test_other_methods_and_other_models_are_refused_and_the_model_stays(tmp_path):
    adapted().save_pretrained(tmp_path / "hydra")
    with pytest.raises(ValueError, match=r"expected a LoRA checkpoint, got one of .*HYDRA"):
        from_lora(net(), tmp_path / "hydra")

    saved_lora(tmp_path / "lora", target_modules=["fc1", "fc2", "head.1"])
    others = {
        "shape": nn.ModuleDict(
            {"fc1": nn.Linear(7, 11), "fc2": nn.Linear(5, 5), "head": nn.ModuleDict({"1": nn.Linear(11, 3)})}
        ),
        "missing": nn.ModuleDict({"fc1": nn.Linear(7, 11), "fc2": nn.Linear(11, 11)}),
    }
    for model in others.values():
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="does not fit the model"):
            from_lora(model, tmp_path / "lora")
        assert not any(isinstance(m, HydraLinearLayer) for m in model.modules())
        assert not hasattr(model, "peft_config")
        assert {name: p.tolist() for name, p in model.named_parameters()} == {n: p.tolist() for n, p in before.items()}


def test_a_layer_in_two_places_is_refused(tmp_path):
    """PEFT's LoRA adapts the first place alone, so the outputs would differ."""
    saved_lora(tmp_path, base=net(shared=True))
    with pytest.raises(ValueError, match="and the file name different layers"):
        from_lora(net(shared=True), tmp_path)


def test_keys_that_the_model_has_not_are_refused(tmp_path):
    saved_lora(tmp_path, bias="all", modules_to_save=["head"])
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.fc9.bias": torch.ones(1)}, file)
    model = net()
    with pytest.raises(ValueError, match=r"fc9\.bias is not in the model"):
        from_lora(model, tmp_path)
    assert {n: p.tolist() for n, p in model.named_parameters()} == {n: p.tolist() for n, p in net().named_parameters()}
    assert all(p.requires_grad for p in model.parameters())


def state(model):
    """All that a refusal must leave: modules, values, what trains, which adapters are active."""
    kinds = {name: type(m) for name, m in model.named_modules(remove_duplicate=False)}
    parameters = {name: (p.requires_grad, p.tolist()) for name, p in model.named_parameters()}
    layers = [m.active_adapters for m in model.modules() if isinstance(m, HydraLinearLayer)]
    return kinds, parameters, layers, list(model.peft_config)


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, num_labels=4)).eval()


def test_a_second_lora_joins_the_first(tmp_path):
    _, one = saved_lora(tmp_path / "one", target_modules=["fc1", "fc2"])
    _, two = saved_lora(tmp_path / "two", target_modules=["fc2", "again"], modules_to_save=["head"], r=2)
    model = from_lora(net(), tmp_path / "one", is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert from_lora(model, tmp_path / "two", adapter_name="two") is model
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    torch.testing.assert_close(model(inputs()), one, rtol=1e-12, atol=1e-12)
    model.set_adapter("two")
    torch.testing.assert_close(model(inputs()), two, rtol=1e-12, atol=1e-12)
    before = state(model)
    with pytest.raises(ValueError, match="adapter_name: expected a new name, got 'two'"):
        from_lora(model, tmp_path / "one", adapter_name="two")
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_lora_joins_the_adapters_of_transformers_own(tmp_path):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lora = randomise(peft.get_peft_model(vit(), peft.LoraConfig(r=3, target_modules=["fc2"])).eval())
    lora.save_pretrained(tmp_path)
    model = vit()
    model.add_adapter(HydraConfig(target_modules=["fc1"]), "one")
    frozen = model(pixels).logits
    assert from_lora(model, tmp_path, adapter_name="two") is model
    torch.testing.assert_close(model(pixels).logits, lora(pixels).logits)
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".two." in name)
    model.set_adapter("one")
    assert torch.equal(model(pixels).logits, frozen)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
@pytest.mark.parametrize("kind", ["PeftModel", "its base model", "transformers"])
def test_a_second_lora_that_does_not_fit_leaves_the_first(tmp_path, kind):
    base = net if kind != "transformers" else vit
    peft.get_peft_model(
        base(), peft.LoraConfig(target_modules=["fc1", "fc2"], modules_to_save=["classifier", "head"])
    ).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.fc9.bias": torch.ones(1)}, file)
    if kind == "transformers":
        model = vit()
        model.add_adapter(HydraConfig(target_modules=["fc1"]), "one")
    else:
        model = adapted(target_modules=["fc1"])
        model = model if kind == "PeftModel" else model.get_base_model()
    before = state(model)
    with pytest.raises(ValueError, match=r"does not fit the model: .*fc9\.bias is not in the model"):
        from_lora(model, tmp_path, adapter_name="two")
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_second_lora_of_a_refused_layer_leaves_the_first(tmp_path):
    peft.get_peft_model(vit(), peft.LoraConfig(target_modules=["fc2"])).save_pretrained(tmp_path)
    model = vit()
    model.add_adapter(HydraConfig(target_modules=["fc1"]), "one")
    fc2 = next(m for name, m in model.named_modules() if name.endswith("fc2"))
    fc2.register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(ValueError, match="has hooks"):
        from_lora(model, tmp_path, adapter_name="two")
    assert state(model) == before


def test_a_folder_within_the_checkpoint(tmp_path):
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["fc1"]))
    model.add_adapter("other", peft.LoraConfig(target_modules=["fc2"]))
    model.set_adapter("other")
    want = randomise(model)(inputs())
    model.save_pretrained(tmp_path)
    ours = from_lora(net(), tmp_path, subfolder="other", revision=None, token=False)
    torch.testing.assert_close(ours(inputs()), want, rtol=1e-12, atol=1e-12)


def test_the_stored_configuration_is_hydras(tmp_path):
    saved_lora(tmp_path, rank_pattern={"fc2": 7})
    from_lora(net(), tmp_path).save_pretrained(tmp_path / "hydra")
    stored = json.loads((tmp_path / "hydra" / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["r_a"], stored["r_b"], stored["scale_a"]) == ("HYDRA", 4, 0, 1.5)
    assert stored["rank_pattern"] == {"^fc2": [7, 0]}
    config = HydraConfig.from_pretrained(tmp_path / "hydra")
    assert copy.deepcopy(config).options("fc2")["scale_a"] == 6 / 7


def test_a_pattern_is_of_one_layer_not_of_those_that_end_in_its_name(tmp_path):
    def nested():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 7), nn.Sequential(nn.Linear(7, 5))).double()

    base = nested()
    lora = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["0", "1.0"], rank_pattern={"^0": 2}))
    want = randomise(lora)(inputs())
    lora.save_pretrained(tmp_path)
    ours = from_lora(nested(), tmp_path)
    assert [ours.get_submodule(f"base_model.model.{n}").hydra_adapters["default"].r_a for n in ("0", "1.0")] == [2, 3]
    torch.testing.assert_close(ours(inputs()), want, rtol=1e-12, atol=1e-12)


# --- from_lora_config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "bias": "lora_only", "exclude_modules": ["again"]},
        {"r": 4, "rank_pattern": {"fc2": 2}, "target_modules": "all-linear", "modules_to_save": ["head"]},
        {"r": 4, "alpha_pattern": {"^fc1": 3, "again": 5}, "target_modules": r"(fc\d|.*again)"},
        {"r": 4, "rank_pattern": {"fc2": 2, "^fc1": 3}, "alpha_pattern": {"^fc1": 1, "fc2": 5}},
        {"r": 4, "rank_pattern": {"fc.": 2}, "alpha_pattern": {"fc2|again": 5}, "use_rslora": True},
        {"r": 4, "rank_pattern": {"fc1": 2, "again": 3}, "alpha_pattern": {"more.again": 5, "fc2": 1}},
    ],
    ids=str,
)
def test_from_lora_config_adapts_what_lora_adapts(options):
    options = {"target_modules": ["fc1", "fc2", "again"]} | options
    lora = peft.get_peft_model(net(), peft.LoraConfig(**options))
    config = HydraConfig.from_lora_config(peft.LoraConfig(**options))
    ours = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for name, layer in lora.get_base_model().named_modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                adapter = ours.get_base_model().get_submodule(name).hydra_adapters["default"]
                layer.lora_B["default"].weight.normal_()
                adapter.A_down.copy_(layer.lora_A["default"].weight)
                adapter.A_up.copy_(layer.lora_B["default"].weight)
    torch.testing.assert_close(ours(inputs()), lora(inputs()), rtol=1e-12, atol=1e-12)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (lora, ours)]
    assert trained[0] == trained[1] > 0
    assert type(ours.unload()) is type(net())


def test_from_lora_config_with_a_sequential_branch_starts_as_peft_starts(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["0"], rank_pattern={"0": 16}, lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    ours = HydraConfig.from_lora_config(config, r_b=4)
    assert (ours.rank_pattern, ours.scale_pattern) == ({"0": [16, 4]}, {"0": [1.0, 1.0]})
    assert (ours.scale_a, ours.scale_b, ours.input_dropout, ours.task_type) == (2.0, 2.0, 0.1, "CAUSAL_LM")
    model = peft.inject_adapter_in_model(ours, nn.Sequential(nn.Linear(300, 200)))
    adapter = model[0].hydra_adapters["default"]
    for down, fan_in in ((adapter.A_down, 300), (adapter.B_down, 200)):
        assert down.abs().max() <= fan_in**-0.5
        assert down.abs().max() > 0.99 * fan_in**-0.5
        assert abs(down.std() * (3 * fan_in) ** 0.5 - 1) < 0.05
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(300, 200)))[0].lora_A["default"].weight
    assert abs(adapter.A_down.std() / theirs.std() - 1) < 0.05
    with pytest.raises(ValueError, match="init_std: expected None with init='peft'"):
        HydraConfig(init="peft", init_std=0.1)
    with pytest.raises(ValueError, match="init: expected 'gaussian' or 'peft', got 'pissa'"):
        HydraConfig(init="pissa")
    ours.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).init == "peft"


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (peft.LoraConfig(init_lora_weights="pissa"), "init_lora_weights: expected True, PEFT's default, got 'pissa'"),
        (peft.LoraConfig(init_lora_weights="gaussian"), "init_lora_weights: expected True"),
        (peft.LoraConfig(lora_bias=True), "lora_bias: expected False"),
        (peft.LoraConfig(use_dora=True), "use_dora: Hydra does not support use_dora, got True"),
        (peft.LoraConfig(layer_replication=[(0, 2)]), "layer_replication: Hydra does not support layer_replication"),
        (peft.LoraConfig(fan_in_fan_out=True), "fan_in_fan_out: Hydra does not support fan_in_fan_out"),
        (peft.AdaLoraConfig(total_step=9), "config: expected a LoraConfig, got AdaLoraConfig"),
        (peft.IA3Config(), "config: expected a LoraConfig, got IA3Config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_from_lora_config_refuses_by_name_what_changes_the_result(config, error):
    with pytest.raises((ValueError, TypeError), match=error):
        HydraConfig.from_lora_config(config)

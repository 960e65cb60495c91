"""`merged_tensors` gives what `merge_and_unload().state_dict()` holds, and leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import hydra_kernels as hk

from .distributed import exports
from .distributed.training import Spec

peft = pytest.importorskip("peft")  # an optional extra

from hydra_kernels.peft import HydraConfig, accelerate  # noqa: E402

from .test_peft import net, randomise  # noqa: E402

BF16 = torch.bfloat16
TARGETS = ["fc1", "fc2", "again"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:inject. the adapters are torch.bfloat16"),
    pytest.mark.filterwarnings("ignore:Already following adapters were merged"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged"),
]


def check(model, want):
    """The tensors of model are those of want, bit for bit and in order, and model stays as it was."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = list(hk.merged_tensors(model))
    assert [name for name, _ in found] == list(want)
    for name, t in found:
        assert t.dtype == want[name].dtype
        assert torch.equal(t, want[name]), name
        assert not t.requires_grad
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class WithBuffers(nn.Module):
    """Adapted layers beside what a state_dict holds besides, and holds not."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(7).to(dtype)
        self.net = net(dtype)
        self.bare = nn.Linear(7, 5, bias=False, dtype=dtype)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("lost", torch.arange(3.0), persistent=False)


def ours(dtype):
    model = WithBuffers(dtype)
    hk.inject(model, ["fc1", "bare"], r_a=3, r_b=2, scale_a=0.5, adapter_bias=True)
    model.net.fc2 = hk.LoRALinear.from_linear(model.net.fc2, r=0)
    hk.inject(model, ["again"], method="seqlora", r=2, learnable_scale=True)
    hk.mark_only_adapters_trainable(model)
    return randomise(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16], ids=str)
def test_ours(dtype):
    model = ours(dtype)
    want = hk.merge_and_unload(copy.deepcopy(model)).state_dict()
    assert "bare.bias" in want
    assert "lost" not in want
    assert not torch.equal(want["net.fc1.bias"], model.net.fc1.bias)
    check(model, want)
    hk.merge(model.eval())
    check(model, want)
    layer = model.net.fc1
    check(layer, layer.to_linear().state_dict())


def test_names_are_those_without_wrappers():
    model = ours(torch.float64)
    want = hk.merge_and_unload(copy.deepcopy(model)).state_dict()
    model.net.more = checkpoint_wrapper(model.net.more)
    check(torch.compile(model, backend="eager"), want)


def of_pefts_hydra(dtype):
    config = HydraConfig(r_a=3, r_b=2, target_modules=TARGETS, modules_to_save=["head"], rank_pattern={"fc2": [0, 0]})
    model = peft.get_peft_model(net(dtype), config)
    model.add_adapter("second", HydraConfig(r_a=1, r_b=2, scale_b=-0.5, adapter_bias=True, target_modules=["fc1"]))
    model.base_model.set_adapter(["default", "second"])
    return randomise(model)


def of_pefts_lora(dtype, **options):
    config = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": TARGETS, "modules_to_save": ["head"]}
    model = peft.get_peft_model(net(dtype), peft.LoraConfig(**config | options))
    model.add_adapter("second", peft.LoraConfig(r=2, lora_bias=True, target_modules=["fc1"], init_lora_weights=False))
    return randomise(model)


@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
@pytest.mark.parametrize("make", [of_pefts_hydra, of_pefts_lora])
def test_pefts(make, dtype):
    model = make(dtype)
    want = copy.deepcopy(model).merge_and_unload().state_dict()
    plain = net(dtype).state_dict()
    assert want.keys() == plain.keys()
    assert not torch.equal(want["fc1.weight"], plain["fc1.weight"])
    assert not torch.equal(want["head.1.weight"], plain["head.1.weight"])
    check(model, want)
    model.merge_adapter(["default"])
    check(model, copy.deepcopy(model).merge_and_unload().state_dict())


def test_accelerated_lora_and_what_is_not_active():
    model = of_pefts_lora(torch.float32)
    want = copy.deepcopy(model).merge_and_unload().state_dict()
    accelerate(model, strict=True)
    check(model, want)
    model.set_adapter("second")  # without a head of its own
    want = copy.deepcopy(model).merge_and_unload().state_dict()
    assert torch.equal(want["head.1.weight"], net(torch.float32).state_dict()["head.1.weight"])
    check(model, want)
    check(model.get_base_model(), want)


def test_several_active_loras_are_added():
    model = of_pefts_lora(torch.float64)
    model.base_model.set_adapter(["default", "second"])
    want = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, t in hk.merged_tensors(model):
        torch.testing.assert_close(t, want[name], rtol=1e-13, atol=1e-13)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 7), nn.Linear(7, 9, bias=False)
        self.head.weight = self.embedding.weight.requires_grad_(False)


def test_a_tied_weight_comes_as_two():
    model = Tied()
    hk.inject(model, ["head"], method="lora", r=2)
    nn.init.normal_(model.head.A_up)
    with pytest.warns(UserWarning, match="'head' is shared by embedding and head; .* tie_word_embeddings=False"):
        found = dict(hk.merged_tensors(model))
    assert torch.equal(found["embedding.weight"], model.embedding.weight)
    assert torch.equal(found["head.weight"], model.head.to_linear().weight)


def test_a_layer_in_two_places_comes_under_both_names():
    model = net(shared=True)
    hk.inject(model, ["fc2", "again"], r_a=2, r_b=2)
    hk.mark_only_adapters_trainable(model)
    check(randomise(model), hk.merge_and_unload(copy.deepcopy(model)).state_dict())


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer")
def test_refusals():
    with pytest.raises(ValueError, match="it has no adapted layer"):
        hk.merged_tensors(net())
    with pytest.raises(ValueError, match=r"merged_tensors: .* is on the meta device"):
        hk.merged_tensors(ours(torch.float64).to("meta"))
    dora = peft.get_peft_model(net(), peft.LoraConfig(use_dora=True, target_modules=["fc1"]))
    with pytest.raises(ValueError, match=r"merged_tensors cannot merge 'fc1' \(DoraLinearVariant"):
        hk.merged_tensors(dora)
    embedded = peft.get_peft_model(nn.Sequential(nn.Embedding(4, 5)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="merged_tensors cannot merge '0', a Embedding"):
        hk.merged_tensors(embedded)
    conv = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["0"], fan_in_fan_out=True),
        nn.Sequential(pytest.importorskip("transformers").pytorch_utils.Conv1D(4, 5)),
    )
    with pytest.raises(ValueError, match=r"merged_tensors cannot merge '0' \(Linear"):
        hk.merged_tensors(conv)
    for config in (
        peft.LoraConfig(lora_bias=True, target_modules=["fc1"]),
        HydraConfig(adapter_bias=True, target_modules=["fc1"]),
    ):
        with pytest.warns(UserWarning, match="bias"):
            model = peft.get_peft_model(net(bias=False), config)
        with pytest.raises(ValueError, match="expected a bias in the base layer of 'fc1'"):
            hk.merged_tensors(model)
    tokens = peft.get_peft_model(
        nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 5)),
        peft.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [1]}),
    )
    with pytest.raises(ValueError, match=r"merged_tensors cannot merge '.*0', a TrainableTokensWrapper"):
        hk.merged_tensors(tokens)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("units", ["block", "tensor parallel", pytest.param("layer", marks=pytest.mark.slow)])
def test_sharded_models_give_the_whole_tensors_with_one_layer_in_memory(groups, units):
    spec = Spec(units=units, options={"r_a": 2, "r_b": 3, "scale_b": 0.5})
    want = hk.merge_and_unload(exports.alone(spec)).state_dict()
    for found, most in groups.run(2, exports.merged, spec):
        assert list(found) == list(want)
        for name, t in want.items():
            torch.testing.assert_close(found[name], t, rtol=1e-13, atol=1e-13)
        assert most <= exports.LARGEST_LAYER


@pytest.mark.xdist_group("processes")
def test_pefts_lora_under_fsdp2(groups):
    want = exports.lora().merge_and_unload().state_dict()
    for found in groups.run(2, exports.merged_lora):
        assert list(found) == list(want)
        for name, t in want.items():
            torch.testing.assert_close(found[name], t, rtol=1e-13, atol=1e-13)

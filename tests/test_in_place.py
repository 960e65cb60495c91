"""`accelerate`: PEFT's LoRA on this package's kernels, held against PEFT's own forward."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .oracle import errors, median_violations, violations

peft = pytest.importorskip("peft")  # an optional extra
transformers = pytest.importorskip("transformers")

from peft.tuners import lora  # noqa: E402

import hydra_kernels as hk  # noqa: E402
from hydra_kernels.backend.philox import draw_seed, kept  # noqa: E402
from hydra_kernels.peft import AcceleratedLinear, accelerate, in_place, report, undo  # noqa: E402

from .distributed import lora as distributed  # noqa: E402
from .test_peft import gradients, inputs, net  # noqa: E402

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
pytestmark = [
    pytest.mark.filterwarnings("error:accelerate:UserWarning"),  # but where a test expects one
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TARGETS = ["fc1", "fc2", "again"]


def of_peft(dtype=F64, base=None, others=(), **config):
    """A LoRA of PEFT's, nothing of it zero; ``others`` are the configurations of further adapters."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS} | config
    model = peft.get_peft_model(net(dtype) if base is None else base, peft.LoraConfig(**config))
    for i, other in enumerate(others):
        model.add_adapter(f"other{i}", peft.LoraConfig(**{"target_modules": TARGETS} | other))
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * 0.3)
    return model


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, lora.Linear)]


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that our kernels serve."""
    served = []

    def applied(*args):
        served.append(args)
        return original(*args)

    original = in_place.applied
    monkeypatch.setattr(in_place, "applied", applied)
    return served


# --- outputs and gradients --------------------------------------------------------------------------------------------

CONFIGS = {
    "scaled": {},
    "rslora": {"r": 4, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "base biases": {"bias": "lora_only"},
    "patterns": {"rank_pattern": {"fc2": 5}, "alpha_pattern": {"^fc1": 2, "again": 7}},
    "modules_to_save": {"modules_to_save": ["head"]},
    "several": {"others": [{"r": 2, "lora_alpha": 5}, {"r": 5, "lora_bias": True, "target_modules": ["fc1"]}]},
}


def prepared(name, dtype):
    model = of_peft(dtype, **CONFIGS[name])
    if name == "several":
        model.base_model.set_adapter(["default", "other0", "other1"])
    return model


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_are_pefts(name, dtype, calls):
    theirs = prepared(name, dtype)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    accelerate(ours, strict=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    draws = []
    for seed in range(1 if dtype == F64 else 5):
        x, found = inputs(dtype, seed), []
        for model in (ours, theirs, exact):
            model.zero_grad()
            found.append(gradients(model, x.double() if model is exact else x))
        draws.append(found)
        assert found[0].keys() == found[2].keys()
        assert len(found[2]) >= 2 + 2 * 3
    assert len(calls) == 3 * len(draws)
    assert median_violations(draws, dtype) == []


def wide(seed, bias=True, cancels=False):
    """A layer of PEFT's over bfloat16 with float32 adapters, and x. Where b0 ``cancels`` it leaves little of W0 x."""
    g = torch.Generator().manual_seed(seed)
    base = nn.Linear(96, 80, bias)
    x = torch.randn(64, 96, generator=g)
    with torch.no_grad():
        base.weight.copy_(torch.randn(80, 96, generator=g) / 10)
        if bias:
            base.bias.copy_(torch.randn(80, generator=g))
        if cancels:
            x = x * 0.02 + torch.randn(96, generator=g)
            base.bias.copy_(-(x.bfloat16().float().mean(0) @ base.weight.bfloat16().float().t()))
    model = peft.get_peft_model(nn.Sequential(base).bfloat16(), peft.LoraConfig(r=8, target_modules=["0"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {F32}
    return model, x.bfloat16()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("kind", ["bias", "no bias", "b0 cancels W0 x"])
def test_bfloat16_errs_at_most_twice_as_much_as_peft_under_autocast(kind, autocast):
    """Against float64, without any slack: the median over draws of the ratio of both errors."""
    ratios = {}
    for seed in range(5):
        theirs, x = wide(seed, bias=kind != "no bias", cancels=kind.startswith("b0"))
        true = gradients(copy.deepcopy(theirs).double(), x.double())
        with torch.autocast("cpu", BF16):
            naive = gradients(theirs, x)
        theirs.zero_grad()
        accelerate(theirs, strict=True)
        with torch.autocast("cpu", BF16, enabled=autocast):
            got = gradients(theirs, x)
        assert got.keys() == true.keys()
        assert got["h"].dtype == naive["h"].dtype == BF16
        for key, want in true.items():
            for part, e, n in zip(("max", "rms"), errors(got[key], want), errors(naive[key], want), strict=True):
                ratios.setdefault((key, part), []).append(e / n)
    medians = {key: sorted(values)[2] for key, values in ratios.items()}
    assert len(medians) == 8
    assert {key: ratio for key, ratio in medians.items() if not ratio <= 2} == {}


def test_float32_under_autocast_is_pefts():
    theirs, x = of_peft(F32), inputs(F32)
    ours = copy.deepcopy(theirs)
    accelerate(ours, strict=True)
    true = gradients(copy.deepcopy(theirs).double(), x.double())
    with torch.autocast("cpu", BF16):
        naive, got = gradients(theirs, x), gradients(ours, x)
    assert got["h"].dtype == naive["h"].dtype
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in naive.items()}
    assert violations(got, naive, true, BF16) == []


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_over_bfloat16_x_itself_is_saved_and_no_copy(autocast):
    """Beside x nothing of its size; PEFT saves a float32 copy, or under autocast a bfloat16 one."""
    saved, (theirs, x) = {}, wide(0)
    ours = copy.deepcopy(theirs)
    accelerate(ours, strict=True)
    for name, model in (("theirs", theirs), ("ours", ours)):
        own, kept = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}, {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", BF16, enabled=autocast):
            h = model(x)
        saved[name] = sum(size for storage, size in kept.items() if storage not in own)
        del h
    assert saved["theirs"] >= x.nbytes * (1 if autocast else 2)
    assert saved["ours"] < x.nbytes / 3


# --- what PEFT's users call -------------------------------------------------------------------------------------------


def saved_and_loaded(model, path):
    model.save_pretrained(path)
    return peft.PeftModel.from_pretrained(net(), path)


def joined_by_another(model, path):
    torch.manual_seed(5)
    model.add_adapter("new", peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    model.set_adapter("new")


def loaded_beside(model, path):
    of_peft(r=2, lora_alpha=1).save_pretrained(path)
    model.load_adapter(path, "new")
    model.set_adapter("new")


def frozen(model, path):
    model.base_model.disable_adapter_layers()


def merged(model, path):
    model.merge_adapter()


def merged_and_unmerged(model, path):
    model.merge_adapter()
    model.unmerge_adapter()


def merged_and_disabled(model, path):
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def unloaded(model, path):
    return model.merge_and_unload()


def removed(model, path):
    return model.unload()


def deleted(model, path):
    joined_by_another(model, path)
    model.delete_adapter("default")


def rescaled(model, path):
    for layer in layers_of(model):
        layer.set_scale("default", 3.0)


def weighted(model, path):
    joined_by_another(model, path)
    model.add_weighted_adapter(["default", "new"], [0.5, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")


def swapped(model, path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    of_peft(r=5, lora_alpha=2).save_pretrained(path)
    prepare_model_for_compiled_hotswap(model, target_rank=6)  # makes tensors of the scales
    hotswap_adapter(model, path, "default")
    assert isinstance(layers_of(model)[0].scaling["default"], torch.Tensor)


VERBS = [
    saved_and_loaded, joined_by_another, loaded_beside, frozen, merged, merged_and_unmerged, merged_and_disabled,
    unloaded, removed, deleted, rescaled, weighted, swapped,
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_every_call_of_pefts_works_before_and_after(verb, tmp_path, calls):
    x, plain = inputs(), of_peft()
    before, after = copy.deepcopy(plain), copy.deepcopy(plain)
    want = verb(plain, tmp_path / "plain") or plain
    accelerate(after, strict=True)
    after = verb(after, tmp_path / "after") or after
    before = verb(before, tmp_path / "before") or before
    if layers_of(before):
        accelerate(before, strict=True)
    accelerates = verb not in (saved_and_loaded, frozen, merged, merged_and_disabled, unloaded, removed)
    for model in (after, before):
        served = len(calls)
        torch.testing.assert_close(model(x), want(x), rtol=1e-12, atol=1e-12)
        assert model.state_dict().keys() == want.state_dict().keys()
        for (name, p), q in zip(model.named_parameters(), want.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=name)
            assert p.requires_grad == q.requires_grad, name
        reads_adapters = accelerates or (verb is saved_and_loaded and model is before)
        assert len(calls) - served == (3 if reads_adapters else 0)


def test_all_linear_finds_the_accelerated_layers_for_a_second_adapter():
    model = of_peft()
    accelerate(model, strict=True)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    assert all("second" in layer.lora_A for layer in layers_of(model))
    said = report(model).layers
    assert said["base_model.model.fc1"] == "accelerated"
    assert said["base_model.model.head.1"] == "accelerate has not been called since PEFT made the layer"
    model.set_adapter("second")
    assert accelerate(model, strict=True).accelerated == list(said)


def bert():
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize("way", ["add_adapter", "inject_adapter_in_model"])
def test_other_ways_of_adding_adapters(way, tmp_path, calls):
    config = peft.LoraConfig(r=2, target_modules=["query", "output.dense"], init_lora_weights=False)
    model, tokens = bert(), torch.arange(8).reshape(2, 4)
    torch.manual_seed(1)
    if way == "add_adapter":
        model.add_adapter(config)
    else:
        model = peft.inject_adapter_in_model(config, model)
    model.eval()
    want = model(tokens).last_hidden_state
    accelerate(model, strict=True)
    torch.testing.assert_close(model(tokens).last_hidden_state, want, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3
    if way == "add_adapter":
        model.save_pretrained(tmp_path)
        other = bert()
        other.load_adapter(tmp_path)
        torch.testing.assert_close(other(tokens).last_hidden_state, want, rtol=1e-5, atol=1e-5)
        model.disable_adapters()
        torch.testing.assert_close(model(tokens).last_hidden_state, bert()(tokens).last_hidden_state)
        assert len(calls) == 3


# --- where PEFT's forward runs ----------------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hook_on(part):
    def change(layer):
        module = layer.base_layer if part == "base_layer" else getattr(layer, part)["default"]
        module.register_forward_hook(lambda module, args, output: output * 3)

    return change


def pre_hook(layer):
    layer.lora_A["default"].register_forward_pre_hook(lambda module, args: (args[0] * 3,))


def backward_hook(layer):
    layer.base_layer.register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 3,))


def own_forward(layer):
    down = layer.lora_A["default"]
    down.forward = lambda x: 3 * nn.Linear.forward(down, x)


def own_forward_of_the_base(layer):
    base = layer.base_layer
    base.forward = lambda x: 3 * nn.Linear.forward(base, x)


def another_class(layer):
    layer.lora_B["default"].__class__ = Doubled


def another_base(layer):
    layer.base_layer.__class__ = Doubled


def another_dropout(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


def trained_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def other_dtype(layer):
    layer.lora_A["default"].to(F32)
    layer.lora_B["default"].to(F32)


def vector_of_scales(layer):
    layer.scaling["default"] = torch.full((1,), 2.0, dtype=F64)


CHANGES = [
    (hook_on("base_layer"), "base_layer has hooks"),
    (hook_on("lora_A"), "lora_A has hooks"),
    (hook_on("lora_B"), "lora_B has hooks"),
    (hook_on("lora_dropout"), "lora_dropout has hooks"),
    (pre_hook, "lora_A has hooks"),
    (backward_hook, "base_layer has hooks"),
    (own_forward, "the forward of lora_A was replaced"),
    (own_forward_of_the_base, "the forward of base_layer was replaced"),
    (another_class, "the classes of lora_A and lora_B are Linear and Doubled, not nn.Linear"),
    (another_base, "base_layer's class is Doubled, not nn.Linear"),
    (another_dropout, "lora_dropout's class is AlphaDropout, not nn.Dropout"),
    (trained_base, "the base layer's weight requires grad"),
    (other_dtype, "the adapter is torch.float32 over a base layer in torch.float64"),
    (vector_of_scales, "scaling is a tensor, but not 0-dimensional"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[reason for _, reason in CHANGES])
def test_pefts_forward_runs_with_one_warning_a_reason(change, reason, calls):
    theirs, x = of_peft(), inputs()
    ours = copy.deepcopy(theirs)
    accelerate(ours, strict=True)
    for model in (theirs, ours):
        for layer in layers_of(model)[:2]:
            change(layer)
    want = gradients(theirs, x)
    said = f"accelerate: some layers run PEFT's own, slower forward, because {reason}"
    with pytest.warns(UserWarning, match=said) as warned:
        got = gradients(ours, x)
    assert len(warned) == 1
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1  # the third layer's
    assert gradients(ours, x).keys() == want.keys()  # without another warning
    assert [said.startswith(reason) for said in report(ours).layers.values()] == [True, True, False]
    with pytest.raises(
        ValueError, match=f"strict: expected every LoRA layer .* 2 are not: base_model.model.fc1: {reason}"
    ):
        accelerate(ours, strict=True)


def test_a_dora_adapter_that_is_added_later(calls):
    ours, x = of_peft(), inputs()
    accelerate(ours, strict=True)
    want = ours(x)
    ours.add_adapter("dora", peft.LoraConfig(r=2, use_dora=True, target_modules=TARGETS, init_lora_weights=False))
    torch.testing.assert_close(ours(x), want)
    assert len(calls) == 6
    ours.set_adapter("dora")
    plain = copy.deepcopy(ours)
    undo(plain)
    with pytest.warns(UserWarning, match="the adapter is not plain LoRA .DoraLinearVariant"):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)
    assert len(calls) == 6


class Masked(nn.Module):
    """In place of PEFT's dropout: the mask that `hydra_linear` makes of its next seed."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        keep = kept(draw_seed(x.device), self.p, x.shape[:-1].numel(), x.shape[-1])
        return x * keep.view(x.shape) / (1 - self.p)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_dropout_on_x_is_pefts_with_the_same_masks(dtype, calls):
    theirs, x = of_peft(dtype, lora_dropout=0.4), inputs(dtype)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    accelerate(ours, strict=True)
    for model in (theirs, exact):
        for layer in layers_of(model):
            layer.lora_dropout["default"] = Masked(0.4)
    draws = []
    for seed in range(5):
        x, found = inputs(dtype, seed), []
        for model, x_, autocast in ((ours, x, False), (theirs, x, dtype == BF16), (exact, x.double(), False)):
            torch.manual_seed(seed)
            model.zero_grad()
            with torch.autocast("cpu", BF16, enabled=autocast):
                found.append(gradients(model, x_))
        draws.append(found)
    assert len(calls) == 3 * len(draws)
    assert median_violations(draws, dtype) == []
    assert not torch.equal(ours(x), ours(x))
    assert torch.equal(ours.eval()(x), ours(x))


def test_dropout_of_several_adapters_keeps_pefts_forward_in_training(calls):
    ours, x = of_peft(lora_dropout=0.4, others=[{"r": 2}]), inputs()
    ours.base_model.set_adapter(["default", "other0"])
    plain = copy.deepcopy(ours)
    reason = "lora_dropout=0.4 needs to be below 1 and to have one active adapter, not 2"
    with pytest.warns(UserWarning, match=reason) as warned:
        found = accelerate(ours)
    assert len(warned) == 1
    assert set(found.layers.values()) == {reason}
    torch.manual_seed(3)
    dropped = ours(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, plain(x))
    assert not calls
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


def test_a_batch_of_several_adapters_is_pefts(calls):
    ours = of_peft(others=[{"r": 2, "init_lora_weights": False}]).eval()
    plain, x = copy.deepcopy(ours), inputs()
    accelerate(ours, strict=True)
    names = ["default", "other0", "__base__", "other0", "default"]
    with pytest.warns(UserWarning, match="got more than x: adapter_names") as warned:
        torch.testing.assert_close(ours(x, adapter_names=names), plain(x, adapter_names=names))
    assert len(warned) == 1
    assert not calls


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_weights_that_are_offloaded(calls):
    ours, x = of_peft(F32), inputs(F32)
    want = ours(x)
    accelerate(ours, strict=True)
    pytest.importorskip("accelerate").cpu_offload(ours, execution_device=torch.device("cpu"))
    assert layers_of(ours)[0].base_layer.weight.is_meta
    with pytest.warns(UserWarning, match="the forward of base_layer was replaced, as offload and device_map do"):
        torch.testing.assert_close(ours(x), want)
    assert not calls


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_tensors_that_only_nn_linear_takes(layout):
    ours = of_peft(base=nn.Sequential(nn.Linear(7, 5, dtype=F64)), target_modules=["0"])
    plain = copy.deepcopy(ours)
    accelerate(ours, strict=True)
    x = torch.nested.nested_tensor([torch.ones(2, 7, dtype=F64), torch.ones(3, 7, dtype=F64)], layout=layout)
    with pytest.warns(UserWarning, match="x is a nested or a sparse tensor"):
        h = ours(x)
    for got, want in zip(h.unbind(), plain(x).unbind(), strict=True):
        torch.testing.assert_close(got, want)


def test_casting_that_peft_is_told_to_leave_out():
    from peft.helpers import disable_input_dtype_casting

    ours, x = wide(0)
    accelerate(ours, strict=True)
    with disable_input_dtype_casting(ours):
        with torch.autocast("cpu", BF16):
            ours(x)
        with pytest.warns(UserWarning, match="told not to cast"), pytest.raises(RuntimeError, match="same dtype"):
            ours(x)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_layers_that_are_no_linear_ones_are_left_alone():
    base = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 7),
            "conv": transformers.pytorch_utils.Conv1D(5, 7),
            "attention": nn.MultiheadAttention(8, 2),
            "fc": nn.Linear(7, 5),
            "moved": nn.Linear(7, 5),
        }
    )
    targets = [*base, "attention"]
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), base)
    model["moved"].forward = model["moved"].forward  # as accelerate's hooks do
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.warns(UserWarning, match="PEFT's own, slower forward") as warned:
        found = accelerate(model)
    assert len(warned) == 5
    assert found.accelerated == ["fc"]
    assert "base_layer's class is Conv1D, not nn.Linear" in found.layers["conv"]
    assert "nn.MultiheadAttention, which reads its weight" in found.layers["attention.base_layer.out_proj"]
    assert {n for n, m in model.named_modules() if type(m) is not before[n]} == {"fc"}
    assert str(found).splitlines()[-1] == "1 of 6 LoRA layers are accelerated"
    assert f"\nfc{' ' * 29}accelerated\n" in str(found)
    with pytest.raises(ValueError, match="model: it has no LoRA layer of PEFT's"):
        accelerate(nn.Linear(3, 4))


# --- in place ---------------------------------------------------------------------------------------------------------


def test_nothing_but_the_class_changes_and_undo_takes_it_back():
    model = of_peft()
    parameters = dict(model.named_parameters())
    layers, states = layers_of(model), [set(layer.__dict__) for layer in layers_of(model)]
    found = accelerate(model, strict=True)
    assert found.accelerated == [f"base_model.model.{name}" for name in ("fc1", "fc2", "more.again")]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert layers_of(model) == layers
    assert {type(layer) for layer in layers} == {AcceleratedLinear}
    assert accelerate(model, strict=True).layers == report(model).layers == found.layers
    found.undo()
    assert {type(layer) for layer in layers} == {lora.Linear}
    assert [set(layer.__dict__) for layer in layers] == states
    assert not report(model).accelerated
    undo(model)


def test_strict_changes_nothing():
    model = of_peft()
    hook_on("lora_A")(layers_of(model)[1])
    with pytest.raises(ValueError, match=r"1 are not: base_model\.model\.fc2: lora_A has hooks"):
        accelerate(model, strict=True)
    assert {type(layer) for layer in layers_of(model)} == {lora.Linear}


def test_copies_and_pickles(tmp_path):
    model, x = of_peft(), inputs()
    accelerate(model, strict=True)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(x), model(x))
        assert {type(layer) for layer in layers_of(other)} == {AcceleratedLinear}
        with torch.no_grad():
            layers_of(other)[0].lora_A["default"].weight.zero_()
        assert not torch.equal(other(x), model(x))
        undo(other)
        assert {type(layer) for layer in layers_of(model)} == {AcceleratedLinear}


def test_replicas_of_data_parallel(monkeypatch, calls):
    """What nn.DataParallel runs on each GPU: their parameters are attributes, no longer registered."""
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",  # the only part that needs GPUs
        lambda tensors, devices, detach=False: [[t.detach().clone() for t in tensors] for _ in devices],
    )
    model = of_peft()
    accelerate(model, strict=True)
    for replica in torch.nn.parallel.replicate(model, [0, 1]):
        assert torch.equal(replica(inputs()), model(inputs()))
    assert len(calls) == 2 * 6


class Tripled(nn.Module):
    def forward(self, weight):
        return 3 * weight


def test_a_parametrized_base_layer(calls):
    model, x = of_peft(), inputs()
    accelerate(model, strict=True)
    for layer in layers_of(model):
        torch.nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Tripled())
    plain = copy.deepcopy(model)
    undo(plain)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("scaled", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("scaled", None), ("several", None), ("several", True))
        ),
    ],
)
def test_compiled(name, dynamic, calls):
    torch._dynamo.reset()
    model = prepared(name, F64)
    want = gradients(copy.deepcopy(model), inputs())
    accelerate(model, strict=True)
    got = gradients(torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic), inputs())
    for key, value in want.items():
        torch.testing.assert_close(got[f"_orig_mod.{key}" if "." in key else key], value, rtol=1e-11, atol=1e-11)


def test_checkpointing_saves_less_and_gives_the_same_gradients(calls):
    model, x = of_peft(), inputs()
    accelerate(model, strict=True)
    want = gradients(model, x)
    model.zero_grad()
    got = gradients(Checkpointed(model), x)
    assert len(calls) == 3 + 2 * 3
    assert all(torch.equal(got[name.replace("base_model", "model.base_model", 1)], g) for name, g in want.items())


class Checkpointed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=False)


def train(folder, in_place, steps=4, resume=None, dropout=0.0, checkpointing=True):
    """Losses and parameters of a Trainer's training of a small Llama, with checkpointing and accumulation."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout),
    )
    if in_place:
        accelerate(model, strict=True)
    tokens = torch.randint(0, 40, (16, 6), generator=torch.Generator().manual_seed(1))
    arguments = transformers.TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        activation_checkpointing=checkpointing,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": t, "labels": t} for t in tokens])
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_the_trainer_trains_and_resumes_bit_for_bit(tmp_path, calls):
    pefts_losses, _ = train(tmp_path / "peft", in_place=False)
    losses, want = train(tmp_path / "ours", in_place=True)
    assert len(calls) == 4 * 2 * 2 * 14  # steps, micro-batches, forwards, layers
    torch.testing.assert_close(losses, pefts_losses, rtol=1e-5, atol=1e-5)
    resumed, got = train(tmp_path / "ours", in_place=True, resume=str(tmp_path / "ours" / "checkpoint-2"))
    assert resumed == losses
    assert len(want) == 2 * 14
    assert all(torch.equal(got[name], p) for name, p in want.items())
    # A checkpoint of the accelerated model goes on without it.
    plain, _ = train(tmp_path / "ours", in_place=False, resume=str(tmp_path / "ours" / "checkpoint-2"))
    torch.testing.assert_close(plain, losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_trainer_draws_the_same_masks_again(tmp_path, calls):
    losses, want = train(tmp_path, in_place=True, dropout=0.2)
    assert len(calls) == 4 * 2 * 2 * 14
    resumed, got = train(tmp_path, in_place=True, dropout=0.2, resume=str(tmp_path / "checkpoint-2"))
    assert resumed == losses
    assert all(torch.equal(got[name], p) for name, p in want.items())
    without, _ = train(tmp_path / "without", in_place=True, dropout=0.2, checkpointing=False)
    torch.testing.assert_close(without, losses, rtol=1e-6, atol=1e-6)
    assert losses != train(tmp_path / "plain", in_place=True)[0]


# --- many processes ---------------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2 blocks", pytest.param("fsdp2 layers", marks=pytest.mark.slow)])
def test_two_processes_train_as_they_do_with_pefts_forward(groups, kind):
    want, got = groups.run(2, distributed.trained, kind, False), groups.run(2, distributed.trained, kind, True)
    assert len([name for name in want[0] if name.startswith("gradient 2") and "lora_" in name]) == 2 * 4
    for theirs, ours in zip(want, got, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.xdist_group("processes")
def test_fsdp1_with_pefts_wrapping_policy_runs_pefts_forward_and_says_so(groups):
    for (theirs, silence), (ours, said) in zip(
        groups.run(2, distributed.under_fsdp1, False), groups.run(2, distributed.under_fsdp1, True), strict=True
    ):
        assert not silence
        assert len(said) == 1
        assert "lora_A and lora_B are FullyShardedDataParallel" in said[0]
        assert ours.keys() == theirs.keys()
        assert len(ours) > 1
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("accelerated", [False, True])
def test_tools_for_other_adapters_name_pefts_lora(accelerated, tmp_path):
    """None says that adapters are missing."""
    model = of_peft()
    if accelerated:
        accelerate(model)
    tools = (hk.merge, hk.merge_and_unload, hk.adapter_state_dict, lambda m: hk.convert.to_lora(m, tmp_path / "lora"))
    for tool in tools:
        with pytest.raises(ValueError, match="model: its adapters are PEFT's; use PEFT's methods: merge_adapter"):
            tool(model)
    with pytest.raises(ValueError, match=r"model: its adapters are PEFT's LoRA; use peft\.optimizers'"):
        hk.parameter_groups(model, 1e-3)

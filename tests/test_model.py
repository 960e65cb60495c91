"""Adapters in whole models: what inject takes, refuses, freezes and leaves alone; merging a model; what trains."""

import copy
import weakref

import pytest
import torch
from torch import nn

import hydra_kernels as hk

from .test_layers import trained


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.mlp["fc2"](torch.relu(self.mlp["fc1"](self.query(x)))))


class Model(nn.Module):
    """An embedding tied with the output layer, two blocks, of which the last is used twice, and a classifier."""

    def __init__(self, width: int = 8, vocabulary: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.shared = self.blocks[1]
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.classifier = nn.Linear(width, 3)

    def forward(self, tokens):
        h = self.embedding(tokens)
        for block in (*self.blocks, self.shared):
            h = block(h)
        return self.lm_head(h), self.classifier(h)


TOKENS = torch.arange(10).reshape(2, 5)


def adapt(model, *targets, **options):
    names = hk.inject(model, targets or ["fc2"], **options)
    for i, name in enumerate(names):
        trained(model.get_submodule(name), seed=i)
    return names


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["fc2"], (), ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "shared.mlp.fc2"]),
        (["mlp.fc2", "classifier"], (), ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2", "shared.mlp.fc2", "classifier"]),
        (["fc2"], ["blocks.0.mlp.fc2"], ["blocks.1.mlp.fc2", "shared.mlp.fc2"]),
        (r"blocks\.\d+\.mlp\.fc[12]", r".*0.*fc1", ["blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        ("classifier", (), ["classifier"]),
    ],
)
def test_inject_takes_suffixes_and_regular_expressions(targets, exclude, expected, products_by_aten):
    model = Model()
    before = model(TOKENS)
    assert hk.inject(model, targets, exclude=exclude, r_a=2, r_b=3) == expected
    adapted = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, hk.HydraLinear)}
    assert adapted >= set(expected)
    assert all(model.get_submodule(name).r_b == 3 for name in expected)
    assert sum(isinstance(m, hk.HydraLinear) for _, m in model.named_modules(remove_duplicate=False)) == len(adapted)
    assert all(torch.equal(a, b) for a, b in zip(model(TOKENS), before, strict=True))


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ("hydra", {"r_a": 2, "r_b": 1}, hk.HydraLinear),
        ("lora", {"r": 2, "scale": 0.5}, hk.LoRALinear),
        ("seqlora", {"r": 3, "dropout": 0.1}, hk.SeqLoRALinear),
    ],
)
def test_inject_keeps_the_parameters_and_freezes_only_what_it_wraps(method, options, kind):
    model = Model()
    parameters = dict(model.named_parameters())
    names = hk.inject(model, ["fc1"], method, **options)
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer) is kind
        assert layer.weight is parameters[name.replace("shared", "blocks.1") + ".weight"]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"blocks.{i}.mlp.fc1.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


def test_a_shared_layer_is_adapted_once_in_every_place():
    model = Model()
    adapt(model)
    assert model.shared.mlp["fc2"] is model.blocks[1].mlp["fc2"]
    total = len([m for m in model.modules() if isinstance(m, hk.HydraLinear)])
    assert total == 2
    other = Model()
    other.a = other.b = nn.Linear(8, 8)
    assert hk.inject(other, ["a", "b"]) == ["a", "b"]
    assert other.a is other.b
    assert isinstance(other.a, hk.HydraLinear)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["fc3"],), ValueError, r"target_modules: \['fc3'\] matches no module; near names: .*fc"),
        (
            ("fc2",),
            ValueError,
            r"'fc2' matches no module; a string is .* whole name, so pass \['fc2'\]; near names: .*fc2",
        ),
        ((["fc2", "fc3"],), ValueError, r"target_modules: \['fc3'\] matches no module; near names: .*fc"),
        ((["fc2"], "hydra", ["fc1", "fc4"]), ValueError, r"exclude: \['fc4'\] matches no module; near names: .*fc"),
        (
            (["fc2"], "hydra", ["blocks.0.mlp.fc2", "fc2"]),
            ValueError,
            "exclude=.* excludes every module that .* matches",
        ),
        ((["gate"],), ValueError, r"\['gate'\] matches no module; near names: .*fc1"),
        ((["mlp"],), TypeError, "'blocks.0.mlp' matches, but .*; name the layers in it: fc1, fc2"),
        ((["c2"],), ValueError, "matches no module"),
        (([],), ValueError, "matches no module"),
        ((["fc2"], "hydra", ["fc3"]), ValueError, r"exclude: \['fc3'\] matches no module; near names: .*fc"),
        ((["fc2"], "dora"), ValueError, "method: expected one of hydra, lora, seqlora, got 'dora'"),
        ((["fc2", "norm"],), TypeError, "target_modules: 'blocks.0.norm' matches, but .*LayerNorm"),
        ((["fc2", "embedding"],), TypeError, "target_modules: 'embedding' matches, but .*Embedding"),
        ((".*",), TypeError, "target_modules: 'embedding' matches"),
    ],
)
def test_a_refused_inject_changes_nothing(arguments, error, message):
    model = Model()
    printed, trainable = repr(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        hk.inject(model, *arguments)
    assert repr(model) == printed
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("hydra", {"r": 4}, TypeError, "r: hydra has two branches; pass r_a and r_b"),
        ("lora", {"r_b": 4}, TypeError, "r_b: lora has one branch; pass r "),
        ("seqlora", {"scale_b": 2.0}, TypeError, "scale_b: seqlora has one branch; pass r "),
        ("lora", {"r": 0}, ValueError, "r: expected 1 or more, got 0"),
        ("hydra", {"r_a": 0, "r_b": 0}, ValueError, "r_a, r_b: expected 1 or more, got 0"),
        ("hydra", {"r_a": -1}, ValueError, "r_a: expected an integer >= 0, got -1"),
        ("seqlora", {"dropout": 1.0}, ValueError, "dropout: expected a number in"),
        ("hydra", {"adapter_dtype": torch.bfloat16}, ValueError, "adapter_dtype: expected None"),
        ("hydra", {"device": "cpu"}, TypeError, "device"),
    ],
)
def test_a_wrong_option_changes_nothing(method, options, error, message):
    model = Model()
    with pytest.raises(error, match=message):
        hk.inject(model, ["fc1", "fc2"], method, **options)
    assert not [m for m in model.modules() if isinstance(m, hk.HydraLinear)]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_adapters_are_said_once_with_the_way_out(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype)
    with pytest.warns(UserWarning, match="^inject: ") as said:
        hk.inject(model, ["0", "1"], r_a=1, r_b=1)
    (warning,) = said
    assert f"the adapters are {dtype}, like the base" in str(warning.message)
    assert f"pass adapter_dtype=torch.float32, or adapter_dtype={dtype} to keep this dtype" in str(warning.message)
    assert warning.filename == __file__
    assert model[0].A_down.dtype == dtype
    hk.inject(model, ["2"], r_a=1, r_b=1, adapter_dtype=torch.float32)  # a warning would be an error here
    assert model[2].A_down.dtype == torch.float32
    for given in (torch.float32, dtype):
        hk.inject(nn.Sequential(nn.Linear(4, 4)).to(dtype), ["0"], adapter_dtype=given)


def test_where_the_note_is_an_error_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16())
    with pytest.raises(UserWarning, match=r"pass adapter_dtype=torch\.float32"):
        hk.inject(model, ["0", "1"])
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert all(p.requires_grad for p in model.parameters())


def test_generators_serve_as_targets_and_exclusions():
    model = Model()
    assert hk.inject(model, (n for n in ["fc1", "fc2"]), exclude=(n for n in ["fc1"])) == [
        "blocks.0.mlp.fc2",
        "blocks.1.mlp.fc2",
        "shared.mlp.fc2",
    ]
    with pytest.raises(ValueError, match=r"target_modules: \['fc9'\] matches no module; near names: "):
        hk.inject(Model(), (n for n in ["fc9"]))
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        hk.inject(Model(), "(")


def test_a_linear_whose_size_is_a_tensor_is_adapted_with_the_others():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(torch.tensor(4), 3))
    assert hk.inject(model, ["0", "1"]) == ["0", "1"]
    assert model(torch.randn(2, 4)).shape == (2, 3)


def test_an_option_that_fits_only_some_dtypes_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).double())
    with pytest.raises(ValueError, match="adapter_dtype"):
        hk.inject(model, ["0", "1"], adapter_dtype=torch.float32)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("model", "targets", "name"),
    [
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), ["linear1", "linear2"], "TransformerEncoderLayer"),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)), ["out_proj"], "MultiheadAttention"),
    ],
)
def test_modules_that_read_weights_past_the_forward_are_refused(model, targets, name):
    model = model()
    with pytest.raises(TypeError, match=f"matches, but .*{name}"):
        hk.inject(model, targets)
    assert not [m for m in model.modules() if isinstance(m, hk.HydraLinear)]


def test_adapting_twice_is_refused_by_name():
    model = Model()
    hk.inject(model, ["fc2"])
    with pytest.raises(TypeError, match=r"'blocks.0.mlp.fc2' matches, but .*HydraLinear, which is already adapted"):
        hk.inject(model, ["fc1", "fc2"])
    assert isinstance(model.blocks[0].mlp["fc1"], nn.Linear)


def test_a_tied_trained_embedding_is_warned_of():
    model = Model()
    with pytest.warns(UserWarning, match="the weight of 'lm_head' is also the embedding 'embedding'"):
        hk.inject(model, ["lm_head"])
    assert model.lm_head.weight is model.embedding.weight
    frozen = Model()
    frozen.embedding.weight.requires_grad_(False)
    hk.inject(frozen, ["lm_head"])  # nothing trained is frozen; a warning would be an error here


@pytest.mark.parametrize(
    ("bias", "keep", "expected"),
    [
        ("none", (), set()),
        ("none", ["classifier"], {"classifier.weight", "classifier.bias"}),
        ("none", "classifier.bias", {"classifier.bias"}),
        ("none", ["blocks.0.norm"], {"blocks.0.norm.weight", "blocks.0.norm.bias"}),
        ("adapted", (), {"blocks.0.mlp.fc2.bias", "blocks.1.mlp.fc2.bias"}),
        ("all", (), None),
    ],
)
def test_mark_only_adapters_trainable(bias, keep, expected):
    model = Model()
    adapt(model)
    hk.mark_only_adapters_trainable(model, bias=bias, keep=keep)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {n for n, _ in model.named_parameters() if n.rsplit(".", 1)[-1] in hk.HydraLinear.ADAPTERS}
    if expected is None:
        expected = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert len(adapters) == 8
    assert trainable == adapters | expected


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (adapt, {"bias": "some"}, "bias: expected one of none, adapted, all, got 'some'"),
        (
            adapt,
            {"keep": ["clasifier"]},
            "keep: 'clasifier' matches no module or parameter of the model; near .*classifier",
        ),
        (adapt, {"keep": ["blocks.0.mlp"]}, "keep: 'blocks.0.mlp.fc2.weight' is the frozen weight of an adapted layer"),
        (lambda model: None, {}, "model: it has no adapted layer"),
    ],
)
def test_mark_only_adapters_trainable_refuses(prepare, options, message):
    model = Model()
    prepare(model)
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        hk.mark_only_adapters_trainable(model, **options)
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_merge_and_unmerge_a_model():
    model = Model().double().eval()
    adapt(model)
    before, parameters = model(TOKENS), state(model)
    hk.merge(model)
    assert all(m.merged for m in model.modules() if isinstance(m, hk.HydraLinear))
    for merged, adapted in zip(model(TOKENS), before, strict=True):
        torch.testing.assert_close(merged, adapted, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(p, parameters[n]) for n, p in state(model).items())
    hk.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(model(TOKENS), before, strict=True))


def test_merging_a_model_of_which_one_layer_trains_changes_nothing():
    model = Model().eval()
    adapt(model)
    model.blocks[1].train()
    with pytest.raises(ValueError, match=r"merge: blocks.1.mlp.fc2 is in training mode"):
        hk.merge(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, hk.HydraLinear))


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("method", ["hydra", "lora", "seqlora"])
def test_merge_and_unload_leaves_plain_linear_layers(method, merged_before):
    model = Model().double().eval()
    options = {"r_a": 2, "r_b": 3} if method == "hydra" else {"r": 3}
    adapt(model, "fc1", "fc2", method=method, adapter_bias=True, **options)
    before = model(TOKENS)
    if merged_before:
        hk.merge(model)
    assert hk.merge_and_unload(model) is model
    assert not [m for m in model.modules() if isinstance(m, hk.HydraLinear)]
    assert type(model.blocks[0].mlp["fc2"]) is nn.Linear
    assert model.shared.mlp["fc2"] is model.blocks[1].mlp["fc2"]
    assert state(model).keys() == state(Model()).keys()
    for plain, adapted in zip(model(TOKENS), before, strict=True):
        torch.testing.assert_close(plain, adapted, rtol=1e-11, atol=1e-11)


def test_merge_and_unload_frees_each_old_weight_before_the_next_merge(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    hk.inject(model, r"\d")
    old = [weakref.ref(layer.weight) for layer in model]
    alive = []
    to_linear = hk.HydraLinear.to_linear

    def counting(layer):
        alive.append(sum(weight() is not None for weight in old))
        return to_linear(layer)

    monkeypatch.setattr(hk.HydraLinear, "to_linear", counting)
    hk.merge_and_unload(model)
    assert alive == [4, 3, 2, 1]


def test_merge_and_unload_spares_a_tied_embedding():
    model = Model()
    model.embedding.weight.requires_grad_(False)
    adapt(model, "lm_head")
    embedding = model.embedding.weight.clone()
    hk.merge_and_unload(model)
    assert torch.equal(model.embedding.weight, embedding)
    assert not torch.equal(model.lm_head.weight, embedding)


def test_tools_without_an_adapted_layer_say_so():
    for tool in (hk.merge, hk.unmerge, hk.merge_and_unload, hk.adapter_state_dict):
        with pytest.raises(ValueError, match="model: it has no adapted layer; call inject first"):
            tool(Model())


def test_merge_and_unload_of_a_bare_layer_returns_the_linear():
    layer = trained(hk.HydraLinear(13, 11, dtype=torch.float64)).eval()
    x = torch.randn(3, 13, dtype=torch.float64)
    linear = hk.merge_and_unload(layer)
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-12, atol=1e-12)


def test_print_trainable_parameters_counts_shared_ones_once(capsys):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 5))
    hk.inject(model, ["0"], r_a=1, r_b=1)
    hk.mark_only_adapters_trainable(model)
    model.append(model[0])
    hk.print_trainable_parameters(model)
    # 110 + 55 frozen; A 10 + 10, B 10 + 10
    assert capsys.readouterr().out == "trainable parameters: 40 of 205 (19.5122 %)\n"


def test_naive_and_ours_train_alike():
    """Fifty steps of Adam in float64, our backward against autograd's on the same model."""
    torch.manual_seed(0)
    ours = Model().double()
    adapt(ours, "fc1", "fc2", "query", adapter_bias=True, learnable_scale=True)
    hk.mark_only_adapters_trainable(ours, keep=["classifier"])
    naive = copy.deepcopy(ours)
    for module in naive.modules():
        if isinstance(module, hk.HydraLinear):
            module.backend = "reference"
    losses = []
    for model in (ours, naive):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            language, classes = model(TOKENS)
            loss = language.square().mean() + torch.nn.functional.cross_entropy(
                classes.flatten(0, 1), torch.arange(10) % 3
            )
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < 0.7 * losses[0][0]

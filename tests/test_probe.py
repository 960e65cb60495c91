"""check_adapters: it names the adapters that would train nothing, no other, and leaves the model as it was."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hydra_kernels as hk
from hydra_kernels import probe

from .test_layers import trained


class Net(nn.Module):
    """Layers that train, and beside them one for each way not to."""

    def __init__(self, dead: str = "", width: int = 6) -> None:
        super().__init__()
        self.dead = dead
        self.embedding = nn.Embedding(9, width)
        self.norm = nn.BatchNorm1d(width)
        self.first, self.second, self.lm_head = (nn.Linear(width, n) for n in (width, width, 9))
        self.lm_head.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, tokens, fail=False):
        if self.dead == "replaced":
            self.register_buffer("late", torch.ones(1), persistent=False)
            self.steps = self.steps + 1
        else:
            self.steps += 1
        x = self.norm(self.embedding(tokens).flatten(0, 1))
        x = x + self.run(self.first, x)
        if fail:
            random.random(), numpy.random.rand(), torch.rand(1)
            raise KeyError("from the model")
        h = self.run(self.second, x) if self.dead == "second" else self.second(x)
        return {"logits": self.lm_head(nn.functional.dropout(x + h, 0.1, self.training))}

    def run(self, layer, x):
        """What the model makes of the layer whose adapter is dead."""
        if self.dead == "skipped":
            return x
        if self.dead == "read":
            return nn.functional.linear(x, layer.weight, layer.bias)
        if self.dead == "unused":
            return layer(x).detach()
        if self.dead == "zeroed":
            return 0 * layer(x)
        if self.dead == "no_grad":
            with torch.no_grad():
                return layer(x)
        if self.training and self.dead in ("reentrant", "checkpoint"):
            x = x.detach() if self.dead == "reentrant" else x
            return checkpoint(layer, x, use_reentrant=self.dead == "reentrant")
        return layer.forward(x) if self.dead == "called past hooks" else layer(x)


TOKENS = torch.arange(12).reshape(3, 4) % 9
TARGETS = ["first", "second", "lm_head"]


def net(dead: str = "", **options) -> Net:
    torch.manual_seed(0)
    model = Net(dead)
    model.requires_grad_(False)
    hk.inject(model, TARGETS, **options)
    return model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize(
    ("dead", "reason"),
    [
        ("skipped", probe.NOT_CALLED),
        ("read", probe.NOT_CALLED),
        ("unused", probe.NO_EFFECT),
        ("zeroed", probe.NO_EFFECT),
        ("no_grad", probe.NO_GRADIENTS),
        ("reentrant", probe.NO_GRADIENTS),
    ],
)
def test_what_trains_nothing_is_named_with_its_reason(dead, reason):
    report = hk.check_adapters(net(dead).eval(), TOKENS)  # in training mode all the same
    assert (report.problems, report.checked, report.ok) == ({"first": reason}, 3, False)
    assert str(report) == f"2 of 3 adapters train\n  first  {reason}"


@pytest.mark.parametrize("dead", ["", "checkpoint", "called past hooks", "replaced"])
@pytest.mark.parametrize(
    "options",
    [
        {"r_a": 2, "r_b": 1, "adapter_bias": True, "learnable_scale": True, "dropout": 0.1, "input_dropout": 0.1},
        {"method": "lora", "r": 2},
        {"method": "seqlora", "r": 2, "scale": 0.25},
    ],
    ids=["hydra", "lora", "seqlora"],
)
def test_what_trains_is_not_named(dead, options):
    model = net(dead, **options)
    report = hk.check_adapters(model.eval(), tokens=TOKENS)
    assert report.problems == {}
    assert report.ok
    assert str(report) == "3 of 3 adapters train"


def test_states_of_a_layer_that_keep_it_from_training_are_named():
    model = net()
    model.first.disable_adapters()
    for p in model.second.adapters().values():
        p.requires_grad_(False)
    model.lm_head.scale_a = 0.0
    assert hk.check_adapters(model, TOKENS).problems == {
        "first": probe.DISABLED,
        "second": probe.FROZEN,
        "lm_head": "got no gradient: A_down, A_up",
    }
    some = net()
    some.first.A_down.requires_grad_(False)  # as LoRA-FA has it
    assert hk.check_adapters(some, TOKENS).ok


def test_the_loss_decides_what_has_an_effect():
    model = net()
    assert hk.check_adapters(model, TOKENS, loss=lambda out: out["logits"].square().mean()).ok
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))

    def fused(_):
        return nn.functional.linear(hidden.pop(), model.lm_head.weight).logsumexp(-1).mean()

    assert hk.check_adapters(model, TOKENS, loss=fused).problems == {"lm_head": probe.NO_EFFECT}
    own = nn.ModuleDict({"used": nn.Linear(4, 4), "aside": nn.Linear(4, 4)})
    hk.inject(own, ["used", "aside"])
    own.forward = lambda x: {"loss": own["used"](x).square().mean(), "aside": own["aside"](x)}
    assert hk.check_adapters(own, torch.randn(3, 4)).problems == {"aside": probe.NO_EFFECT}


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: (t, t.data_ptr(), t.tolist(), t.requires_grad, t.grad, t._version) for name, t in tensors.items()},
        {name: None if p.grad is None else p.grad.tolist() for name, p in model.named_parameters()},
        {name: (module.training, dict(module._forward_hooks)) for name, module in model.named_modules()},
        set(model._non_persistent_buffers_set),
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, numpy.ndarray) else part for part in numpy.random.get_state()],
    )


def same(a, b):
    """By identity for tensors, else by value."""
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, (dict, list, tuple)):
        pairs = a.items() if isinstance(a, dict) else enumerate(a)
        return type(a) is type(b) and len(a) == len(b) and all(same(v, b[k]) for k, v in pairs)
    return a == b


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("dead", ["", "replaced"])
def test_the_model_is_left_as_it_was(dead, raises):
    model = net(dead, learnable_scale=True)
    for layer in (model.first, model.second):
        trained(layer)
    model.norm.requires_grad_()
    model(TOKENS)["logits"].square().sum().backward()
    model.eval()
    model.second.train()
    model.norm.bias.grad = None
    model._buffers.pop("late", None)
    model._non_persistent_buffers_set.clear()
    x = TOKENS.clone()
    before = state(model)
    if raises:
        with pytest.raises(KeyError, match="from the model"):
            hk.check_adapters(model, x, fail=True)
    else:
        assert hk.check_adapters(model, x).ok
    assert same(state(model), before)
    assert torch.equal(x, TOKENS)


def test_inputs_keep_their_values_and_get_no_gradients():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    hk.inject(model, ["1"])
    x = torch.randn(5, 4, requires_grad=True)
    y = 2 * x
    values = y.tolist()
    with torch.inference_mode():
        assert hk.check_adapters(model, y).ok
    assert y.tolist() == values
    assert x.grad is None
    y.sum().backward()  # the graph behind it is not used up


def test_a_compiled_model_is_checked_eagerly():
    model = net("unused")
    compiled = torch.compile(model, backend="eager")
    compiled(TOKENS)
    # In compiled code hooks that come later do not run: the layer would seem not to be called.
    assert hk.check_adapters(compiled, TOKENS).problems == {"first": probe.NO_EFFECT}


def merged():
    model = net().eval()
    model.second.merge()
    return model


def stepping():
    model = net()
    model.first.A_up.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))
    return model


@pytest.mark.parametrize(
    ("make", "loss", "error", "message"),
    [
        (lambda: nn.Linear(4, 4), None, ValueError, "model: it has no active adapter of inject"),
        (merged, None, ValueError, "model: second is merged, so its adapters do not run; call unmerge first"),
        (stepping, None, ValueError, "model: first.A_up has a hook that runs after its gradient"),
        (lambda: net().to("meta"), None, ValueError, "model: first is on the meta device"),
        (net, 0.5, TypeError, "loss: expected None or a function of the model's output, got float"),
        (net, lambda out: 1.0, TypeError, "loss: expected a function that returns a tensor of one number, got float"),
        (net, lambda out: out["logits"], TypeError, r"a tensor of one number, got \[12, 9\]"),
        (net, lambda out: out["logits"].sum() / 0, ValueError, "loss: expected a finite number for these inputs"),
    ],
)
def test_what_cannot_be_checked_is_refused(make, loss, error, message):
    model = make()
    before = state(model) if not next(model.parameters()).is_meta else None
    with pytest.raises(error, match=message):
        hk.check_adapters(model, TOKENS, loss=loss)
    assert before is None or same(state(model), before)


def test_an_output_without_a_tensor_needs_a_loss():
    model = net()
    model.forward = lambda tokens: "text"
    with pytest.raises(ValueError, match="loss: expected a function, since the output, a str, has no tensor"):
        hk.check_adapters(model, TOKENS)


def test_a_layer_alone_and_one_in_two_places():
    assert hk.check_adapters(hk.HydraLinear(5, 4), torch.randn(3, 5)).checked == 1
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    hk.inject(model, ["0", "2"])
    assert hk.check_adapters(model, torch.randn(3, 4)).checked == 1


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    from hydra_kernels.peft import HydraConfig

    model = peft.get_peft_model(Net("read"), HydraConfig(target_modules=["first", "second"]))
    model.add_adapter("more", HydraConfig(r_a=0, target_modules=["second"]))
    model.add_adapter("idle", HydraConfig(target_modules=["first", "second"]))
    where = "base_model.model."
    assert hk.check_adapters(model, TOKENS).problems == {f"{where}first": probe.NOT_CALLED}
    model.base_model.set_adapter(["default", "more"])
    report = hk.check_adapters(model, TOKENS)
    assert (report.problems, report.checked) == ({f"{where}first": probe.NOT_CALLED}, 3)
    model.get_base_model().second.hydra_adapters["more"].B_up.requires_grad_(False)
    model.get_base_model().second.hydra_adapters["more"].B_down.requires_grad_(False)
    frozen = {f"{where}second.hydra_adapters.more": probe.FROZEN}
    assert hk.check_adapters(model, TOKENS).problems == {f"{where}first": probe.NOT_CALLED} | frozen
    with model.disable_adapter():
        assert set(hk.check_adapters(model, TOKENS).problems.values()) == {probe.DISABLED}
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="first is merged, so its adapters do not run; call unmerge_adapter first"):
        hk.check_adapters(model, TOKENS)


@pytest.mark.filterwarnings("ignore:accelerate. some layers run PEFT's own:UserWarning")
@pytest.mark.parametrize("accelerated", [False, True])
def test_adapters_of_pefts_lora(accelerated):
    peft = pytest.importorskip("peft")
    from hydra_kernels.peft import accelerate

    config = peft.LoraConfig(r=3, target_modules=["first", "second", "embedding"], lora_bias=False)
    model = peft.get_peft_model(Net("read"), config)
    model.add_adapter("more", peft.LoraConfig(r=2, lora_bias=True, target_modules=["second"]))
    if accelerated:
        accelerate(model)
    before = state(model)
    where = "base_model.model."
    report = hk.check_adapters(model, TOKENS)
    assert (report.problems, report.checked) == ({f"{where}first": probe.NOT_CALLED}, 3)
    assert same(state(model), before)
    model.base_model.set_adapter(["default", "more"])
    second = model.get_base_model().second
    second.lora_B["more"].requires_grad_(False)
    second.lora_A["more"].requires_grad_(False)
    report = hk.check_adapters(model, TOKENS)
    assert report.problems == {f"{where}first": probe.NOT_CALLED, f"{where}second.lora_A.more": probe.FROZEN}
    second.scaling["default"] = 0.0
    assert f"{where}second.lora_A.default" in hk.check_adapters(model, TOKENS).problems
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged, so its adapters do not run; call unmerge_adapter first"):
        hk.check_adapters(model, TOKENS)

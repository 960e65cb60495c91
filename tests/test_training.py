"""Parameter groups: LoRA+ trains up projections faster, LoRA-FA them alone."""

import pytest
import torch
from torch import nn

import hydra_kernels as hk

UP = ("A_up", "B_up", "A_up_bias", "B_up_bias")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 3))
    hk.inject(model, ["0", "2"], r_a=2, r_b=2, adapter_bias=True, learnable_scale=True)
    hk.mark_only_adapters_trainable(model, keep=["3"])
    return model


def names(model: nn.Module, group: dict) -> set[str]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {name_of[id(p)] for p in group["params"]}


def test_up_projections_get_a_rate_of_their_own():
    model = net()
    rest, up = hk.parameter_groups(model, 1e-3, up_ratio=16)
    assert (rest["lr"], up["lr"]) == (1e-3, 16e-3)
    assert names(model, up) == {f"{layer}.{name}" for layer in (0, 2) for name in UP}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names(model, rest) == trained - names(model, up)
    assert {"0.A_down", "2.scale_b", "3.weight"} <= names(model, rest)
    assert len(rest["params"]) + len(up["params"]) == len(trained)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([rest, up], lr=0.1)
    # Once without effect of the down projections, once with.
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        optimizer.step()
    for name, p in model.named_parameters():
        lr = 0.0 if gradients[name] is None else 16e-3 if name[2:] in UP else 1e-3
        want = before[name] - (0 if lr == 0 else lr * gradients[name])
        torch.testing.assert_close(p, want, rtol=1e-6, atol=1e-9)


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of what the backward keeps beside the parameters."""
    parameters, kept = {p.data_ptr() for p in model.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        h = model(x)
    assert h.requires_grad
    return sum(t.numel() * t.element_size() for pointer, t in kept.items() if pointer not in parameters)


def test_down_projections_are_frozen_and_nothing_is_kept_for_them():
    model = nn.Sequential(nn.Linear(64, 64))
    hk.inject(model, ["0"], r_a=2, r_b=2, backend="aten", form="composed")
    hk.mark_only_adapters_trainable(model)
    x = torch.randn(500, 64)
    assert saved_bytes(model, x) >= x.numel() * 4
    [up] = hk.parameter_groups(model, 1e-3, up_ratio=2, freeze_down=True)
    assert (names(model, up), up["lr"]) == ({"0.A_up", "0.B_up"}, 2e-3)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"0.A_up", "0.B_up"}
    assert saved_bytes(model, x) < x.numel()
    assert hk.check_adapters(model, x).ok


def test_the_active_adapters_of_peft():
    peft = pytest.importorskip("peft")
    from hydra_kernels.peft import HydraConfig

    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), HydraConfig(target_modules=["0"]))
    model.add_adapter("idle", HydraConfig(target_modules=["0"]))
    rest, up = hk.parameter_groups(model, 1.0, up_ratio=4)
    where = "base_model.model.0.hydra_adapters.default"
    assert names(model, rest) == {f"{where}.A_down", f"{where}.B_down"}
    assert names(model, up) == {f"{where}.A_up", f"{where}.B_up"}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1.0,), {}, ValueError, "lr: expected a number >= 0, got -1.0"),
        (("fast",), {}, TypeError, "lr: expected a number, got str"),
        ((1.0,), {"up_ratio": -2.0}, ValueError, "up_ratio: expected a number >= 0, got -2.0"),
        ((1.0,), {"up_ratio": float("nan")}, ValueError, "up_ratio: expected a finite number"),
    ],
)
def test_wrong_arguments_freeze_nothing(arguments, options, error, message):
    model = net()
    with pytest.raises(error, match=message):
        hk.parameter_groups(model, *arguments, freeze_down=True, **options)
    assert model[0].A_down.requires_grad


def test_a_model_in_which_nothing_trains_is_refused():
    model = net().requires_grad_(False)
    for frozen in (model, nn.Linear(3, 4)):
        with pytest.raises(ValueError, match="model: it has no up projection that trains; call inject"):
            hk.parameter_groups(frozen, 1e-3)

"""What a module owes its users: parameters, initialisation, loading, merging, copying, moving."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import hydra_kernels as hk

from .oracle import hydra

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
KINDS = [
    pytest.param(lambda *a, **o: hk.HydraLinear(*a, r_a=3, r_b=5, **o), id="hydra"),
    pytest.param(lambda *a, **o: hk.LoRALinear(*a, r=3, **o), id="lora"),
    pytest.param(lambda *a, **o: hk.SeqLoRALinear(*a, r=5, **o), id="seqlora"),
]
ALL_OPTIONS = {"adapter_bias": True, "learnable_scale": True}


def trained(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer with every adapter random and non-zero, as after training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.adapters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=F64) * 0.3)
    return layer


def oracle_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    operands = {name: p.detach().to(F64) for name, p in layer.named_parameters()}
    scales = {name: getattr(layer, name) for name in ("scale_a", "scale_b") if name not in operands}
    return hydra({"x": x.to(F64), **operands}, **scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_training_starts_at_exactly_the_frozen_layer(kind, dtype, bias, products_by_aten):
    layer = kind(13, 11, bias, dtype=dtype, **ALL_OPTIONS)
    x = torch.randn(2, 7, 13, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS, {"scale": 0.7}, {"bias": False, **ALL_OPTIONS}], ids=str)
def test_forward_is_the_formula(kind, options):
    options = dict(options)
    scale = options.pop("scale", None)
    layer = kind(13, 11, dtype=F64, **options)
    if scale is not None:
        r = max(layer.r_a, layer.r_b)
        layer = {
            (3, 5): lambda: hk.HydraLinear(13, 11, r_a=3, r_b=5, scale_a=scale, scale_b=-scale, dtype=F64),
            (3, 0): lambda: hk.LoRALinear(13, 11, r=r, scale=scale, dtype=F64),
            (0, 5): lambda: hk.SeqLoRALinear(13, 11, r=r, scale=scale, dtype=F64),
        }[layer.r_a, layer.r_b]()
    trained(layer)
    x = torch.randn(7, 13, dtype=F64)
    torch.testing.assert_close(layer(x), oracle_output(layer, x), rtol=1e-12, atol=1e-12)


def test_parameters_have_the_papers_names_shapes_and_roles():
    layer = hk.HydraLinear(13, 11, r_a=3, r_b=5, **ALL_OPTIONS)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": (11, 13),
        "bias": (11,),
        "A_down": (3, 13),
        "A_up": (11, 3),
        "B_down": (5, 11),
        "B_up": (11, 5),
        "A_down_bias": (3,),
        "A_up_bias": (11,),
        "B_down_bias": (5,),
        "B_up_bias": (11,),
        "scale_a": (),
        "scale_b": (),
    }
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"weight", "bias"}
    assert set(layer.adapters()) == set(shapes) - {"weight", "bias"}

    lora, seqlora = hk.LoRALinear(13, 11, r=3, scale=0.5), hk.SeqLoRALinear(13, 11, r=5, scale=0.5)
    assert (lora.B_down, lora.B_up, lora.A_down_bias, lora.scale_a) == (None, None, None, 0.5)
    assert (seqlora.A_down, seqlora.A_up, seqlora.B_up_bias, seqlora.scale_b) == (None, None, None, 0.5)
    assert set(lora.state_dict()) == {"weight", "bias", "A_down", "A_up"}
    assert set(seqlora.state_dict()) == {"weight", "bias", "B_down", "B_up"}


def test_learnable_scales_start_at_their_values():
    layer = hk.HydraLinear(4, 4, scale_a=0.25, scale_b=-3.0, learnable_scale=True)
    assert (layer.scale_a.item(), layer.scale_b.item()) == (0.25, -3.0)


def test_down_projections_are_gaussian_with_one_over_sqrt_fan_in():
    torch.manual_seed(0)
    layer = hk.HydraLinear(1024, 256, r_a=32, r_b=32)
    for down, fan_in in ((layer.A_down, 1024), (layer.B_down, 256)):
        normalised = down.detach() * fan_in**0.5
        n = normalised.numel()
        assert abs(normalised.mean().item()) < 5 / n**0.5
        assert abs(normalised.std().item() - 1) < 5 / (2 * n) ** 0.5
        assert abs(normalised.pow(4).mean().item() - 3) < 5 * (96 / n) ** 0.5  # a uniform draw has 1.8
    assert not layer.A_up.any()
    assert not layer.B_up.any()
    narrow = hk.HydraLinear(1024, 256, r_a=32, r_b=32, init_std=0.02)
    assert abs(narrow.A_down.std().item() - 0.02) < 0.001
    assert abs(narrow.B_down.std().item() - 0.02) < 0.001


def test_base_is_drawn_as_nn_linear_draws_it():
    torch.manual_seed(0)
    linear = nn.Linear(13, 11)
    torch.manual_seed(0)
    layer = hk.HydraLinear(13, 11)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)


def test_reset_adapters_returns_to_the_start_and_spares_the_base(products_by_aten):
    layer = trained(hk.HydraLinear(13, 11, scale_a=0.5, **ALL_OPTIONS))
    weight = layer.weight.clone()
    layer.reset_adapters()
    x = torch.randn(3, 13)
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))
    assert layer.scale_a.item() == 0.5
    layer.reset_parameters()
    assert not torch.equal(layer.weight, weight)


def test_no_ranks_is_the_frozen_layer():
    layer = hk.HydraLinear(13, 11, r_a=0, r_b=0, **ALL_OPTIONS)
    x = torch.randn(5, 13)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.adapters() == {}


@pytest.mark.parametrize("base", [BF16, F16], ids=str)
def test_fp32_adapters_over_a_low_precision_base(base):
    layer = trained(hk.HydraLinear(13, 11, dtype=base, adapter_dtype=F32, **ALL_OPTIONS))
    h = layer(torch.randn(7, 13, dtype=base))
    h.sum().backward()
    assert h.dtype == layer.weight.dtype == base
    assert {p.dtype for p in layer.adapters().values()} == {F32}
    assert {p.grad.dtype for p in layer.adapters().values()} == {F32}


def test_an_nn_linear_state_dict_loads(products_by_aten):
    linear, layer = nn.Linear(13, 11), hk.HydraLinear(13, 11)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert missing == ["A_down", "A_up", "B_down", "B_up"]
    assert unexpected == []
    x = torch.randn(3, 13)
    assert torch.equal(layer(x), linear(x))


def test_dropout_acts_in_training_only():
    layer = trained(hk.HydraLinear(13, 11, dropout=0.5))
    x = torch.randn(64, 13)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x).double(), oracle_output(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), layer(x))


class Scaled(nn.Linear):
    """A subclass that keeps nn.Linear's forward."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_from_linear_takes_the_same_parameters_and_freezes_them():
    for linear in (nn.Linear(13, 11), nn.Linear(13, 11, bias=False), Scaled(13, 11).to(BF16), nn.Linear(13, 11).eval()):
        layer = hk.HydraLinear.from_linear(linear, r_a=2, r_b=3, dropout=0.1)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert not any(p.requires_grad for p in linear.parameters())
        assert (layer.r_a, layer.r_b, layer.dropout, layer.training) == (2, 3, 0.1, linear.training)
        assert {(p.dtype, p.device) for p in layer.adapters().values()} == {(linear.weight.dtype, linear.weight.device)}
        assert layer.A_down.any()
    assert isinstance(hk.LoRALinear.from_linear(nn.Linear(3, 4), r=2, scale=0.5), hk.LoRALinear)
    assert hk.SeqLoRALinear.from_linear(nn.Linear(3, 4), r=2, scale=0.5).scale_b == 0.5


def hooked(register):
    linear = nn.Linear(3, 4)
    getattr(linear, register)(lambda *args: None)
    return linear


def of_a_subclass():
    """As torchao's quantize_ leaves a layer: the class is nn.Linear, the weight a tensor subclass."""
    linear = nn.Linear(3, 4)
    linear.weight = nn.Parameter(TwoTensor(torch.ones(4, 3), torch.ones(4, 3)))
    return linear


def patched():
    linear = nn.Linear(3, 4)
    linear.forward = lambda x: x
    return linear


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.Conv1d(3, 4, 1), "torch.nn.modules.conv.Conv1d"),
        (lambda: nn.Bilinear(3, 3, 4), "Bilinear"),
        (lambda: Doubled(3, 4), "Doubled"),
        (lambda: hk.LoRALinear(3, 4), "LoRALinear, which is already adapted"),
        (lambda: torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 4)), "ParametrizedLinear"),
        (lambda: hooked("register_forward_hook"), "has hooks"),
        (lambda: hooked("register_forward_pre_hook"), "has hooks"),
        (lambda: hooked("register_full_backward_hook"), "has hooks"),
        (lambda: hooked("register_full_backward_pre_hook"), "has hooks"),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, "belongs to nn.MultiheadAttention"),
        (patched, "expected the forward of nn.Linear"),
        (of_a_subclass, "expected a plain tensor as the weight of torch.nn.modules.linear.Linear, got TwoTensor"),
        (lambda: nn.Linear(3, 4).weight, "Parameter"),
    ],
)
def test_from_linear_refuses_by_name(make, name):
    linear = make()
    parameters = list(linear.parameters()) if isinstance(linear, nn.Module) else []
    trainable = [p.requires_grad for p in parameters]
    with pytest.raises((TypeError, ValueError), match=f"linear: .*{name}"):
        hk.HydraLinear.from_linear(linear)
    assert [p.requires_grad for p in parameters] == trainable


def test_fake_and_meta_weights_are_plain():
    with FakeTensorMode():
        assert isinstance(hk.HydraLinear.from_linear(nn.Linear(3, 4)).A_up, FakeTensor)
    assert hk.HydraLinear.from_linear(nn.Linear(3, 4, device="meta")).A_up.is_meta


def test_a_linear_whose_sizes_are_tensors_is_adapted():
    linear = nn.Linear(torch.tensor(3), torch.tensor(4))
    layer = hk.HydraLinear.from_linear(linear, r_a=2, r_b=1)
    assert [(type(n), n) for n in (layer.in_features, layer.out_features)] == [(int, 3), (int, 4)]
    x = torch.randn(5, 3)
    torch.testing.assert_close(trained(layer)(x).double(), oracle_output(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "options"])
def test_merge_is_a_mode(kind, bias, options):
    layer = trained(kind(13, 11, bias, dtype=F64, **options)).eval()
    x = torch.randn(5, 13, dtype=F64, requires_grad=True)
    state = copy.deepcopy(layer.state_dict())
    adapted = layer(x)
    (dx,) = torch.autograd.grad(adapted.sum(), x)

    layer.merge()
    assert layer.merged
    merged = layer(x)
    torch.testing.assert_close(merged, adapted, rtol=1e-12, atol=1e-12)
    assert not torch.equal(merged, F.linear(x, layer.weight, layer.bias))
    merged.sum().backward()
    torch.testing.assert_close(x.grad, dx, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in layer.parameters())
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())

    held = layer.merged_weight
    layer.merge()
    assert layer.merged_weight is held
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer(x), adapted)


def test_merging_in_training_mode_is_refused():
    layer = hk.HydraLinear(3, 4)
    with pytest.raises(ValueError, match=r"merge: .*training mode"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize(
    "end",
    [
        lambda layer: layer.train(),
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.reset_adapters(),
        lambda layer: layer.unmerge(),
    ],
    ids=["train", "load_state_dict", "reset_adapters", "unmerge"],
)
def test_what_ends_a_merge(end):
    layer = trained(hk.HydraLinear(3, 4)).eval()
    layer.merge()
    end(layer)
    assert not layer.merged
    assert list(layer.buffers()) == []


def change_by_average(layer):
    other = trained(copy.deepcopy(layer), seed=7)
    average = torch.optim.swa_utils.AveragedModel(nn.Sequential(layer))
    average.update_parameters(nn.Sequential(layer))  # copies
    average.update_parameters(nn.Sequential(other))  # averages
    return average.module[0]


def change_by_a_step(layer):
    optimizer = torch.optim.SGD(layer.adapters().values(), lr=0.1)
    for p in layer.adapters().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return layer


def change_a_copy(layer):
    return change_by_a_step(pickle.loads(pickle.dumps(copy.deepcopy(layer))))


@pytest.mark.parametrize("change", [change_by_average, change_by_a_step, change_a_copy])
def test_a_merged_layer_whose_parameters_changed_refuses_to_answer_with_the_old_ones(change):
    layer, x = trained(hk.HydraLinear(3, 4, dtype=F64)).eval(), torch.randn(5, 3, dtype=F64)
    layer.merge()
    assert list(layer.buffers()) == []  # with buffers of its own the average fails in torch's pairs of buffers
    changed = change(layer)
    with pytest.raises(ValueError, match=r"A_down: it was changed while the layer is merged, .*; unmerge before"):
        changed(x)
    changed.merge()
    torch.testing.assert_close(changed(x), oracle_output(changed, x), rtol=1e-12, atol=1e-12)
    changed.unmerge()
    torch.testing.assert_close(changed(x), oracle_output(changed, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("harmless", "tolerance"),
    [
        (copy.deepcopy, 1e-6),
        (lambda layer: pickle.loads(pickle.dumps(layer)), 1e-6),
        (lambda layer: layer.double(), 1e-6),
        (lambda layer: layer.to("cpu").requires_grad_(False), 1e-6),
        (lambda layer: layer.half().double(), 2e-3),  # two roundings to half
    ],
    ids=["deepcopy", "pickle", "double", "frozen", "half and back"],
)
def test_a_merged_layer_that_is_copied_or_moved_stays_merged(harmless, tolerance):
    layer, x = trained(hk.HydraLinear(3, 4)).eval(), torch.randn(5, 3, dtype=F64)
    layer.merge()
    before = oracle_output(layer, x)
    moved = harmless(layer).double()
    assert moved.merged
    assert moved.merged_weight.dtype == moved.merged_bias.dtype == F64
    torch.testing.assert_close(moved(x), before, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moved.to("meta").merged_weight, torch.empty(4, 3, dtype=F64, device="meta"))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_merged_layer_that_was_changed_is_as_outdated(copied):
    layer, x = trained(hk.HydraLinear(3, 4)).eval(), torch.randn(5, 3)
    layer.merge()
    with torch.no_grad():
        layer.A_up.add_(1)
    with pytest.raises(ValueError, match="A_up: it was changed while the layer is merged"):
        copied(layer)(x)


def test_replicas_of_data_parallel_have_the_weights_of_their_own_device(monkeypatch):
    """A merged weight stays on the first GPU, where a replica's x is not."""
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",  # the only part that needs GPUs
        lambda tensors, devices, detach=False: [[t.detach().clone() for t in tensors] for _ in devices],
    )
    layer, x = trained(hk.HydraLinear(3, 4, dtype=F64)).eval(), torch.randn(5, 3, dtype=F64)
    layer.merge()
    for replica in torch.nn.parallel.replicate(layer, [0, 1]):
        assert replica.merged_weight is None
        torch.testing.assert_close(replica(x), layer(x), rtol=1e-12, atol=1e-12)
    assert layer.merged


def test_a_merge_made_in_inference_mode_serves_a_backward():
    layer = trained(hk.HydraLinear(3, 4)).eval()
    with torch.inference_mode():
        layer.merge()
    x = torch.randn(5, 3, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.merged_weight.sum(0).expand(5, 3))


@pytest.mark.parametrize("form", ["composed", "kept"])
def test_without_gradients_the_output_is_the_same(form):
    layer = trained(hk.HydraLinear(13, 11, form=form, **ALL_OPTIONS))
    x = torch.randn(5, 13)
    expected = layer(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            h = layer(x)
        assert not h.requires_grad
        torch.testing.assert_close(h, expected, rtol=1e-6, atol=1e-6)


def test_a_merged_layer_stays_merged_in_eval():
    layer = trained(hk.HydraLinear(3, 4)).eval()
    layer.merge()
    assert layer.eval().merged


def test_loading_new_adapters_while_merged_is_not_forgotten():
    layer, other = trained(hk.HydraLinear(3, 4)).eval(), trained(hk.HydraLinear(3, 4), seed=1).eval()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(layer(x), other(x))


def test_a_shared_weight_is_not_changed_by_merging():
    linear = nn.Linear(13, 11)
    layer = trained(hk.HydraLinear.from_linear(linear)).eval()
    x = torch.randn(3, 13)
    before = linear(x)
    layer.merge()
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("merged", [False, True])
def test_branches_and_disabled_adapters_answer_from_w0(merged):
    layer = trained(hk.HydraLinear(13, 11, dtype=F64, **ALL_OPTIONS)).eval()
    x = torch.randn(2, 5, 13, dtype=F64)
    h = layer(x)
    if merged:
        layer.merge()
    branches = layer.branches(x)
    assert branches._fields == ("pretrained", "parallel", "sequential")
    assert torch.equal(branches.pretrained, F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(sum(branches), h, rtol=1e-12, atol=1e-12)
    parallel = layer.scale_a * F.linear(F.linear(x, layer.A_down, layer.A_down_bias), layer.A_up, layer.A_up_bias)
    torch.testing.assert_close(branches.parallel, parallel, rtol=1e-12, atol=1e-12)

    layer.disable_adapters()
    assert torch.equal(layer(x), branches.pretrained)
    assert torch.equal(sum(layer.branches(x)), branches.pretrained)
    layer.enable_adapters()
    torch.testing.assert_close(layer(x), h, rtol=1e-12, atol=1e-12)


def test_absent_branches_are_zero():
    x = torch.randn(5, 3)
    lora, seqlora = trained(hk.LoRALinear(3, 4)).branches(x), trained(hk.SeqLoRALinear(3, 4)).branches(x)
    assert lora.parallel.any()
    assert seqlora.sequential.any()
    assert torch.equal(lora.sequential, torch.zeros(5, 4))
    assert torch.equal(seqlora.parallel, torch.zeros(5, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_is_a_plain_frozen_linear(kind, dtype, bias):
    layer = trained(kind(13, 11, bias, dtype=dtype, adapter_bias=True)).eval()
    x = torch.randn(5, 13, dtype=dtype)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert not any(p.requires_grad for p in linear.parameters())
    assert (linear.in_features, linear.out_features, linear.training) == (13, 11, False)
    assert layer.train().to_linear().training
    layer.eval()
    layer.merge()
    assert torch.equal(linear(x), layer(x))
    assert linear.weight.data_ptr() not in (layer.weight.data_ptr(), layer.merged_weight.data_ptr())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("merged", [False, True])
def test_copies_answer_alike_and_are_independent(duplicate, merged):
    layer = trained(hk.HydraLinear(13, 11, dropout=0.1, **ALL_OPTIONS)).eval()
    if merged:
        layer.merge()
    twin = duplicate(layer)
    x = torch.randn(5, 13)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    trained(twin, seed=9).unmerge()
    assert not torch.equal(twin(x), layer(x))


def test_to_and_half_move_everything():
    layer = trained(hk.HydraLinear(13, 11, **ALL_OPTIONS))
    x = torch.randn(5, 13)
    doubled = copy.deepcopy(layer).to(F64)
    torch.testing.assert_close(doubled(x.double()), oracle_output(layer, x), rtol=1e-12, atol=1e-12)
    half = copy.deepcopy(layer).half()
    assert {p.dtype for p in half.parameters()} == {F16}
    assert half(x.half()).dtype == F16


def test_meta_device_then_materialised(products_by_aten):
    layer = hk.HydraLinear(13, 11, device="meta", **ALL_OPTIONS)
    assert layer(torch.empty(2, 13, device="meta")).shape == (2, 11)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(5, 13)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.scale_a.item() == 1
    assert isinstance(hk.HydraLinear.from_linear(nn.Linear(3, 4, device="meta")).A_down, nn.Parameter)


def test_repr_tells_what_differs_from_the_defaults():
    assert repr(hk.HydraLinear(3, 4, False)) == "HydraLinear(in_features=3, out_features=4, bias=False, r_a=4, r_b=4)"
    layer = hk.SeqLoRALinear(3, 4, r=2, scale=0.5, dropout=0.1, adapter_bias=True, form="kept", backend="aten")
    assert repr(layer.eval()) == (
        "SeqLoRALinear(in_features=3, out_features=4, bias=True, r_a=0, r_b=2, scale_b=0.5, dropout=0.1, "
        "adapter_bias=True, form=kept, backend=aten)"
    )
    layer.merge()
    assert repr(layer).endswith("merged=True)")
    assert "scale_a=learnable" in repr(hk.HydraLinear(3, 4, learnable_scale=True))
    changed = hk.HydraLinear(3, 4)
    changed.scale_b = 0.25
    changed.disable_adapters()
    assert repr(changed).endswith("scale_b=0.25, adapters_enabled=False)")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_trains_the_adapters_and_nothing_else(kind):
    layer = trained(kind(13, 11, **ALL_OPTIONS))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(torch.randn(5, 13)).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in layer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(layer.adapters())

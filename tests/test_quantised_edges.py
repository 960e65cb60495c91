"""Adapters over quantised bases beside plain training: after generation, merged, followed, hooked, counted."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")  # an optional extra, with torchao
pytest.importorskip("torchao")
peft = pytest.importorskip("peft")

import hydra_kernels as hk  # noqa: E402
from hydra_kernels import weights  # noqa: E402
from hydra_kernels.peft import HydraConfig, accelerate  # noqa: E402

from .oracle import errors  # noqa: E402
from .quantised import FOUR_BITS, TARGETS, Net, bnb, quantised, randomised, weight_of  # noqa: E402
from .test_quantised import of_ours, same, step  # noqa: E402
from .test_quantised_models import of_peft  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16


def of_hydra(kind, compute_dtype=None):
    """Of PEFT, with an adapter of both branches."""
    config = HydraConfig(r_a=2, r_b=3, target_modules=TARGETS)
    return randomised(peft.get_peft_model(Net(kind, compute_dtype), config))


DOORS = {"inject": of_ours, "HydraConfig": of_hydra}


# --- the layout that bitsandbytes gives a weight in an eval forward, on a CPU with AVX512-BF16 -----------------------


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_a_weight_that_the_library_has_repacked(kind, saved):
    """Also where its own undoing, in a state_dict, came before ours; rows of very different sizes tell blocks apart."""
    linear = nn.Linear(256, 64)
    linear.weight.data *= torch.logspace(-3, 3, 64)[:, None]
    layer = quantised(linear, kind)
    dense = weight_of(layer)
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    if saved:
        layer.state_dict()
    # Its layout rounds the blocks' sizes to bfloat16; double quantisation then rounds them beside the largest.
    bound = 1e-2 * (dense.abs().max() if FOUR_BITS[kind]["compress_statistics"] else dense.abs())
    assert ((weights.packed(layer).value() - dense).abs() <= bound).all()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["nf4", pytest.param("nf4-twice", marks=pytest.mark.slow)])
def test_saving_after_generation(door, kind):
    model, x = DOORS[door](kind), torch.randn(2, 20, 64)
    before, state = step(model, x), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.eval()(x[:, :3])
    same(model.state_dict(), state)
    same(step(model.train(), x), before)


@pytest.mark.parametrize("kind", ["nf4", "nf4-twice"])
def test_pefts_layers_save_and_train_on_after_generation(kind):
    """What is saved is what was loaded, bit for bit: not what the library's layout has rounded."""
    model, x = of_peft(kind), torch.randn(2, 20, 64)
    accelerate(model, strict=True)
    before, state = step(model, x), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.eval()(x[:, :3])
    same(model.state_dict(), state)
    same(step(model.train(), x), before)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("nf4-twice", marks=pytest.mark.slow)])
def test_training_after_inference_mode(kind):
    model, x = of_ours(kind), torch.randn(2, 20, 64)
    before = step(model, x)
    model.eval()
    with torch.inference_mode():
        model(x[:, :3])
        model(x)
    same(step(model.train(), x), before)


@pytest.mark.parametrize("door", DOORS)
def test_the_base_alone_after_generation(door):
    """Adapters off, x has its gradient, and the base layer keeps its numbers, its bias's dtype and its settings."""
    model, x = DOORS[door]("nf4").eval(), torch.randn(20, 64, requires_grad=True)
    layer = model.get_submodule(next(n for n, _ in model.named_modules() if n.endswith("one")))
    base, dense = layer.base_layer, weight_of(copy.deepcopy(layer.base_layer))
    layer.disable_adapters() if door == "inject" else layer.enable_adapters(False)
    with torch.no_grad():
        layer(torch.randn(3, 64, dtype=BF16))
        assert layer(torch.randn(0, 64)).shape == (0, 128)  # bitsandbytes itself ends the process there
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))
    assert torch.equal(weights.packed(base).value(), dense)
    assert (base.bias.dtype, base.compute_dtype) == (F32, None)


# --- generation and training agree ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", pytest.param("nf4-twice", marks=pytest.mark.slow)])
def test_generation_reads_x_at_its_strides(kind):
    layer, x = of_ours(kind).eval().one, torch.randn(64, 3).t()
    h = layer(x)
    with torch.no_grad():
        assert errors(layer(x), h.double())[0] < 2e-2


def test_adapters_of_low_precision_do_not_round_what_the_base_gives():
    layer, x = of_ours("int8").one, torch.randn(3, 64)
    layer.to(BF16)
    layer.base_layer.to(F32)
    h = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), h, rtol=1e-5, atol=1e-5)


def test_over_torchao_h_has_xs_dtype_under_autocast():
    """As its own forward has it."""
    layer, x = of_ours("int8").one, torch.randn(3, 64)
    with torch.autocast("cpu", BF16):
        h = layer(x)
        with torch.no_grad():
            few = layer(x)
        assert h.dtype == few.dtype == layer.base_layer(x).dtype == F32
    assert errors(few, h.double())[0] < 2e-2


@pytest.mark.filterwarnings("ignore:bitsandbytes.*does not record its original dtype")
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_forward_mode_differentiation(kind, few):
    """bitsandbytes' own forward has no tangents, and says so of none."""
    layer = of_ours(kind).two
    if not few:
        layer.disable_adapters()
    plain, (x, v) = layer.to_linear(), torch.randn(2, 3, 128)
    weight = plain.weight if few else weight_of(copy.deepcopy(layer.base_layer))
    with torch.set_grad_enabled(not few):
        got = torch.func.jvp(layer, (x,), (v,))[1]
    torch.testing.assert_close(got, v @ weight.t())


# --- merged layers of PEFT's Hydra ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:bitsandbytes.*does not record its original dtype")
@pytest.mark.parametrize("kind", ["nf4", "8bit", "int8"])
def test_a_merged_layer_keeps_its_base(kind, tmp_path):
    """What is saved, exported and merged elsewhere is made of W0, as of an unmerged layer."""
    model, x = of_hydra(kind).eval(), torch.randn(2, 20, 64)
    tensors, state, h = dict(hk.merged_tensors(model)), copy.deepcopy(model.state_dict()), model(x)
    low = model.base_model.model.one(x.to(BF16))
    lora = {}
    hk.convert.to_lora(model, tmp_path / "before", bias="lora")
    with pytest.warns(UserWarning, match="a merged layer also holds a dense weight"):
        model.merge_adapter()
    hk.convert.to_lora(model, tmp_path / "after", bias="lora")
    same(dict(hk.merged_tensors(model)), tensors)
    assert errors(model.base_model.model.one(x.to(BF16)), low.double())[1] < 1e-2
    assert model.state_dict().keys() == state.keys()
    if kind != "int8":  # torchao's tensors have no equal
        same(model.state_dict(), state)
    moved = copy.deepcopy(model).to(BF16)
    assert moved.base_model.model.one.merged_weight.dtype == BF16
    plain = copy.deepcopy(model).unload()
    assert type(plain.one) is nn.Linear
    torch.testing.assert_close(plain(x), h)
    model.load_state_dict(model.state_dict(), strict=False)  # it unmerges
    assert torch.equal(model(x), h)
    for name in ("before", "after"):
        lora[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert lora["before"] == lora["after"]


@pytest.mark.parametrize("door", DOORS)
def test_a_plain_layer_whose_dtype_is_not_known_says_so(door):
    """LLM.int8's layers keep none but their bias's."""
    model = DOORS[door]("8bit").to(BF16).eval()
    with pytest.warns(
        UserWarning, match=r"does not record its original dtype, so the plain layer is in torch.float32; .*cast it"
    ) as said:
        plain = hk.merge_and_unload(model) if door == "inject" else model.merge_and_unload()
    assert len(said) == 1
    assert (plain.one.weight.dtype, plain.two.weight.dtype) == (BF16, F32)
    assert plain.to(BF16)(torch.randn(20, 64, dtype=BF16)).dtype == BF16


# --- what else reads a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_hooks_on_the_base_layer_run(kind):
    model, x = of_ours(kind), torch.randn(2, 20, 64)
    expected, seen = step(model, x), []
    model.two.base_layer.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="base_layer: it has hooks"):
        got = step(model, x)
    assert all(errors(got[name], value.double())[0] < 5e-6 for name, value in expected.items())
    with pytest.warns(UserWarning, match="base_layer: it has hooks"), torch.no_grad():
        model(x[:, :3])
    assert len(seen) == 2


def test_packed_numbers_that_a_cast_has_destroyed_are_refused():
    """`quant_storage` in a floating dtype: bitsandbytes lets Module.to convert them as if they were the weights."""
    model = of_ours("nf4-in-bf16").half()
    with pytest.raises(ValueError, match=r"weight: a cast from torch.bfloat16 to torch.float16 has destroyed"):
        model(torch.randn(20, 64, dtype=torch.float16))


def test_a_tracer_that_hides_the_scales_of_eight_bits_is_told_of():
    """torch.export in its non-strict mode calls the layer with another tensor as its weight."""
    model, x = of_ours("8bit").eval(), torch.randn(2, 20, 64)
    with pytest.raises(ValueError, match=r"the scales of bitsandbytes.* are lost, .* pass strict=True"):
        torch.export.export(model, (x,), strict=False)
    exported = torch.export.export(model, (x,), strict=True).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_a_subclass_with_a_forward_of_its_own_is_refused(kind):
    layer = quantised(nn.Linear(64, 64), kind)
    layer.__class__ = type("Scaled", (type(layer),), {"forward": lambda self, x: 2 * type(layer).forward(self, x)})
    with pytest.raises(TypeError, match=r"expected the forward of nn.Linear, got another one"):
        hk.HydraLinear.from_linear(layer)
    layer.__class__ = type("Named", (type(layer).__base__,), {})
    assert hk.HydraLinear.from_linear(layer).base_layer is layer


def test_a_weight_that_is_to_train_is_refused():
    model = of_ours("int8").requires_grad_(True)
    with pytest.raises(ValueError, match="weight: it requires grad, but W0 is frozen"):
        model(torch.randn(20, 64))


@pytest.mark.parametrize("kind", ["nf4", "nf4-in-bf16", "8bit", "int8"])
def test_parameters_are_counted_as_those_they_stand_for(kind, capsys):
    hk.print_trainable_parameters(of_ours(kind))
    assert capsys.readouterr().out.startswith("trainable parameters: 4,490 of 49,738 ")


@pytest.mark.parametrize("door", DOORS)
def test_the_base_layer_of_an_adapted_layer_is_not_adapted_again(door):
    with pytest.raises(
        TypeError, match=r"base_layer' matches, but .* reads the layer's weight without calling the layer"
    ):
        hk.inject(DOORS[door]("nf4"), ["base_layer"])

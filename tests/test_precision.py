"""Training as people do it: scaled losses, checkpointed activations, accumulated gradients, models of today."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import hydra_kernels as hk

from .oracle import median_violations
from .test_layers import trained

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def naive_twin(model: nn.Module) -> nn.Module:
    """A copy whose layers run the reference."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, hk.HydraLinear):
            module.backend = "reference"
    return twin


def double_twin(model: nn.Module) -> nn.Module:
    return naive_twin(model).double()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stack(dtype=F32, **options) -> nn.Sequential:
    """Two adapted layers around a nonlinearity, every adapter trained."""
    torch.manual_seed(0)
    layers = (
        trained(hk.HydraLinear(24, 32, r_a=3, r_b=2, dtype=dtype, **options), seed=1),
        trained(hk.HydraLinear(32, 16, r_a=2, r_b=4, dtype=dtype, **options), seed=2),
    )
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def loss_of(model, x):
    return model(x).float().square().mean()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, F32], ids=["base dtype", "fp32 adapters"])
def test_low_precision_stacks_are_as_good_as_naive_ones(dtype, adapter_dtype):
    """For the median of many batches: behind a rounded h a gradient of two elements errs by chance."""
    model = stack(dtype, adapter_dtype=adapter_dtype, adapter_bias=True, learnable_scale=True)
    twins = double_twin(model), naive_twin(model), model
    draws = []
    for seed in range(15):
        x = torch.randn(40, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
        results = []
        for twin in twins:
            twin.zero_grad()
            leaf = x.to(twin[0].weight.dtype, copy=True).requires_grad_()
            (64 * twin(leaf).double().square().mean()).backward()
            results.append({"x": leaf.grad, **gradients(twin)})
        true, naive, ours = results
        assert {name: g.dtype for name, g in ours.items()} == {name: g.dtype for name, g in naive.items()}
        draws.append((ours, naive, true))
    assert median_violations(draws, dtype) == []


def test_grad_scaler_with_fp16_autocast_trains_as_the_naive_layer_does():
    model = stack()
    histories = []
    for twin in (model, naive_twin(model)):
        x = torch.randn(64, 24, generator=torch.Generator().manual_seed(3))
        optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        histories.append([])
        for _ in range(20):
            optimizer.zero_grad()
            with torch.autocast("cpu", F16):
                loss = loss_of(twin, x)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            histories[-1].append(loss.item())
        assert scaler.get_scale() == 2.0**10
    assert histories[0] == pytest.approx(histories[1], rel=2e-3)
    assert histories[0][-1] < 0.8 * histories[0][0]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen_input", [False, True], ids=["x needs grad", "frozen embedding before"])
def test_activation_checkpointing_changes_no_bit(use_reentrant, dropout, frozen_input):
    model = stack(dropout=dropout)
    embedding = nn.Embedding(10, 24).requires_grad_(not frozen_input)
    tokens = torch.arange(10).repeat(3)

    def run(checkpointed):
        model.zero_grad()
        torch.manual_seed(7)
        x = embedding(tokens)
        if checkpointed and use_reentrant and frozen_input:
            x.requires_grad_()  # the reentrant mode gives no gradients otherwise, as for any layer
        h = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        h.square().mean().backward()
        return gradients(model)

    plain, checkpointed = run(False), run(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 8
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_accumulated_gradients_are_the_whole_batchs():
    model = stack(F64)
    x = torch.randn(30, 24, dtype=F64)
    model(x).square().sum().backward()
    whole = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    for part in x.split(7):
        model(part).square().sum().backward()
    assert whole.keys() == gradients(model).keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-11, atol=1e-11)


def test_dx_under_dropout_uses_the_same_mask_as_the_weights_do():
    """With the mask fixed by the seed h is linear in x, so that dx is known from h alone, whatever autograd says."""
    for form in ("composed", "kept"):
        layer = trained(hk.HydraLinear(6, 5, r_a=4, r_b=4, dropout=0.5, form=form, dtype=F64))
        x = torch.randn(7, 6, dtype=F64)
        G = torch.randn(7, 5, dtype=F64)

        def h(x, layer=layer):
            torch.manual_seed(11)
            return layer(x)

        leaf = x.clone().requires_grad_()
        h(leaf).backward(G)
        expected = torch.zeros_like(x)
        zero = h(torch.zeros_like(x))
        for m in range(7):
            for k in range(6):
                unit = torch.zeros_like(x)
                unit[m, k] = 1
                expected[m, k] = ((h(unit) - zero) * G).sum()
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-11, atol=1e-11)
        frozen = G @ layer.weight
        assert (leaf.grad - frozen).norm() > 0.1 * frozen.norm()


MODELS = {
    "vit": (
        lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=16, num_labels=3)),
        ["mlp.fc2", "attention.q_proj"],
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)},
    ),
    "clip": (
        lambda: CLIPModel(
            CLIPConfig(
                text_config={**SMALL, "vocab_size": 50, "max_position_embeddings": 8},
                vision_config={**SMALL, "image_size": 32, "patch_size": 16},
                projection_dim=16,
            )
        ),
        r".*(text|vision)_model.*(fc2|v_proj)",
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": torch.randint(2, 49, (2, 8))},
    ),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, vocab_size=50, max_position_embeddings=20)),
        ["query", "output.dense"],
        lambda: {"input_ids": torch.randint(3, 49, (2, 9))},
    ),
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=50, tie_word_embeddings=True)),
        r".*\.layers\.\d+\..*(_proj)",
        lambda: {"input_ids": torch.randint(0, 50, (2, 9))},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["hydra", "lora", "seqlora"])
def test_models_of_transformers(name, method):
    """Adapted where people adapt them: identity at the start, the naive layer's gradients, merged as before."""
    make, targets, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in inputs().items()}

    def output(model):
        out = model(**batch)
        return out.logits_per_image if name == "clip" else out.logits

    before = output(model)
    options = {"r_a": 2, "r_b": 3} if method == "hydra" else {"r": 3}
    names = hk.inject(model, targets, method, **options)
    assert len(names) >= 4
    hk.mark_only_adapters_trainable(model)
    assert torch.equal(output(model), before)

    for i, layer_name in enumerate(names):
        trained(model.get_submodule(layer_name), seed=i)
    twin = naive_twin(model)
    for each in (model, twin):
        output(each).square().sum().backward()
    ours, naive = gradients(model), gradients(twin)
    assert ours.keys() == naive.keys() == {f"{n}.{a}" for n in names for a in model.get_submodule(n).adapters()}
    for key, grad in ours.items():
        assert grad.any(), key
        torch.testing.assert_close(grad, naive[key], rtol=1e-8, atol=1e-10 * naive[key].abs().max().item())

    adapted = output(model)
    assert not torch.allclose(adapted, before)
    hk.merge_and_unload(model)
    torch.testing.assert_close(output(model), adapted, rtol=1e-9, atol=1e-9)

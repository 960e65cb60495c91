"""Converted checkpoints compute what the code that trained them computed, and what does not fit changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hydra_kernels as hk
from hydra_kernels import convert

WIDTH, HIDDEN, CLASSES = 6, 10, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)


class Mlp(nn.Module):
    """The second linear layer has the name that each code base gives it."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.add_module(second, nn.Linear(HIDDEN, WIDTH))


class Block(nn.Module):
    def __init__(self, second: str) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(), Mlp(second)

    def forward(self, x):
        linears = list(self.mlp.children())
        x = x + self.attn.proj(x)
        return x + linears[1](torch.tanh(linears[0](x)))


class Model(nn.Module):
    def __init__(self, second: str = "fc2", biased: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(second), Block(second)])
        self.head = nn.Linear(WIDTH, CLASSES)
        if not biased:
            for block in self.blocks:
                block.mlp.get_submodule(second).bias = None
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model_of(second: str = "fc2", **options) -> Model:
    torch.manual_seed(0)
    return Model(second, **options)


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def branch(prefix: str, fan_in: int, r: int, generator, names=("down_proj", "up_proj"), biased: bool = True) -> dict:
    down, up = names
    tensors = {f"{prefix}.{down}.weight": (r, fan_in), f"{prefix}.{up}.weight": (WIDTH, r)}
    tensors |= {f"{prefix}.{down}.bias": (r,), f"{prefix}.{up}.bias": (WIDTH,)} if biased else {}
    return {key: random(generator, *shape) for key, shape in tensors.items()}


def vtab1k(r_a: int = 2, r_b: int = 3) -> dict:
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for i in (0, 1):
        r = r_a + i  # the second block's rank is another
        tensors |= branch(f"blocks.{i}.mlp.hydra_mlp_par", HIDDEN, r, g)
        tensors |= branch(f"blocks.{i}.mlp.hydra_mlp_seq", WIDTH, r_b, g)
        tensors |= branch(f"blocks.{i}.attn.hydra_proj_par", WIDTH, r, g)
        tensors |= branch(f"blocks.{i}.attn.hydra_proj_seq", WIDTH, r_b, g)
    return {**tensors, "head.weight": random(g, CLASSES, WIDTH), "head.bias": random(g, CLASSES)}


def elevater(learnable: bool) -> dict:
    g = torch.Generator().manual_seed(2)
    tensors = {}
    for i in (0, 1):
        for side, fan_in in (("par", HIDDEN), ("seq", WIDTH)):
            prefix = f"backbone.blocks.{i}.mlp.ad_lin.adapter_{side}"
            tensors |= branch(prefix, fan_in, 2, g)
            tensors |= {f"{prefix}.scale": random(g, 1)} if learnable else {}
    return tensors


def nlu() -> dict:
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for i in (0, 1):
        for side, fan_in, r in (("par", HIDDEN, 4), ("seq", WIDTH, 8)):
            tensors |= branch(f"blocks.{i}.mlp.hydra_{side}", fan_in, r, g, ("hydra_A", "hydra_B"), biased=False)
    return tensors


def loralib(**ranks: int) -> dict:
    g = torch.Generator().manual_seed(4)
    tensors = {}
    for name, r in (ranks or {"blocks_0_mlp_fc2": 2, "blocks_1_mlp_fc2": 5}).items():
        name = name.replace("_", ".")
        tensors |= {f"{name}.lora_A": random(g, r, HIDDEN), f"{name}.lora_B": random(g, WIDTH, r)}
    return tensors


def their_branch(v, tensors, prefix, scale, names=("down_proj", "up_proj"), mask=None):
    """scale * up(dropout(down(v))), as their source says."""
    down, up = (f"{prefix}.{name}" for name in names)
    z = v @ tensors[f"{down}.weight"].T
    if f"{down}.bias" in tensors:
        z = z + tensors[f"{down}.bias"]
    delta = (z if mask is None else z * mask) @ tensors[f"{up}.weight"].T
    if f"{up}.bias" in tensors:
        delta = delta + tensors[f"{up}.bias"]
    return delta * tensors.get(f"{prefix}.scale", scale)


def their_linear(x, linear, tensors, parallel, sequential, scale=1.0, names=("down_proj", "up_proj")):
    y0 = F.linear(x, linear.weight, linear.bias)
    par = their_branch(x, tensors, parallel, scale, names)
    return y0 + par + their_branch(y0, tensors, sequential, scale, names)


def their_vtab1k(model, tensors, x, scale):
    for i, block in enumerate(model.blocks):
        attn, mlp = f"blocks.{i}.attn.hydra_proj_", f"blocks.{i}.mlp.hydra_mlp_"
        x = x + their_linear(x, block.attn.proj, tensors, f"{attn}par", f"{attn}seq", scale)
        hidden = torch.tanh(block.mlp.fc1(x))
        x = x + their_linear(hidden, block.mlp.fc2, tensors, f"{mlp}par", f"{mlp}seq", scale)
    return F.linear(x, tensors["head.weight"], tensors["head.bias"])


def their_mlp_only(model, second, x, adapted):
    """The model where ``adapted(i, hidden, linear)`` stands in place of the second linear layer of the i-th block."""
    for i, block in enumerate(model.blocks):
        x = x + block.attn.proj(x)
        x = x + adapted(i, torch.tanh(block.mlp.fc1(x)), block.mlp.get_submodule(second))
    return model.head(x)


def gradients(h, wanted):
    seed = torch.Generator().manual_seed(9)
    return torch.autograd.grad(h, wanted, random(seed, *h.shape))


X = random(torch.Generator().manual_seed(5), 4, 7, WIDTH)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


# Our name of each of the authors' tensors.
OURS = {
    f"{side}.{theirs}": f"{letter}_{ours}"
    for side, letter in (("par", "A"), ("seq", "B"))
    for theirs, ours in (
        ("down_proj.weight", "down"),
        ("down_proj.bias", "down_bias"),
        ("up_proj.weight", "up"),
        ("up_proj.bias", "up_bias"),
        ("hydra_A.weight", "down"),
        ("hydra_B.weight", "up"),
    )
} | {"par.scale": "scale_a", "seq.scale": "scale_b"}


def our_parameter(model, key, linears):
    """Our Parameter for one of their keys; linears: the beginning of a branch's name -> the adapted layer's name."""
    owner, side, rest = re.fullmatch(r"(.+)_(par|seq)\.(.+)", key).groups()
    (branch_name,) = [name for name in linears if owner.endswith(name)]
    layer = model.get_submodule(owner.removesuffix(branch_name) + linears[branch_name])
    return getattr(layer, OURS[f"{side}.{rest}"])


VIT = {"mlp.hydra_mlp": "mlp.fc2", "attn.hydra_proj": "attn.proj"}


def leaves(tensors):
    return {key: t.clone().requires_grad_() for key, t in tensors.items()}


def test_vtab1k_is_their_formula_with_every_gradient():
    tensors = leaves(vtab1k())
    model = model_of()
    names = convert.load(model, convert.from_authors(vtab1k(), scale=0.3, include=["head"]))
    assert names == [f"blocks.{i}.{linear}" for i in (0, 1) for linear in ("attn.proj", "mlp.fc2")]
    assert [(model.get_submodule(n).r_a, model.get_submodule(n).r_b) for n in names] == [(2, 3), (2, 3), (3, 3), (3, 3)]
    ours, theirs = model(X), their_vtab1k(model_of(), tensors, X, 0.3)
    same([ours], [theirs])
    parameters = [
        model.get_parameter(key) if key.startswith("head") else our_parameter(model, key, VIT) for key in tensors
    ]
    same(gradients(ours, parameters), gradients(theirs, list(tensors.values())))


def test_their_dropout_is_the_bottlenecks():
    tensors, model = vtab1k(), model_of()
    convert.load(model, convert.from_authors(tensors, scale=0.3, include=["head"]), dropout=0.4)
    layer, x = model.blocks[0].mlp.fc2, random(torch.Generator().manual_seed(6), 50, HIDDEN)
    torch.manual_seed(7)
    ours = layer(x)
    torch.manual_seed(7)
    mask = torch.empty(50, 5, dtype=torch.bool).bernoulli_(0.6).double() / 0.6
    assert 60 < (mask == 0).sum() < 140  # of 250
    y0, prefix = F.linear(x, layer.weight, layer.bias), "blocks.0.mlp.hydra_mlp_"
    theirs = y0 + their_branch(x, tensors, f"{prefix}par", 0.3, mask=mask[:, :2])
    same([ours], [theirs + their_branch(y0, tensors, f"{prefix}seq", 0.3, mask=mask[:, 2:])])


@pytest.mark.parametrize("learnable", [False, True])
def test_elevater_is_their_formula_with_every_gradient(learnable):
    tensors, model = leaves(elevater(learnable)), model_of("c_proj")
    checkpoint = convert.from_authors(
        elevater(learnable), scale=None if learnable else 1.5, rename=lambda name: name.removeprefix("backbone.")
    )
    assert convert.load(model, checkpoint) == ["blocks.0.mlp.c_proj", "blocks.1.mlp.c_proj"]

    def adapted(i, x, linear):
        prefix = f"backbone.blocks.{i}.mlp.ad_lin.adapter_"
        return their_linear(x, linear, tensors, f"{prefix}par", f"{prefix}seq", 1.5)

    ours, theirs = model(X), their_mlp_only(model_of("c_proj"), "c_proj", X, adapted)
    same([ours], [theirs])
    clip = {"mlp.ad_lin.adapter": "mlp.c_proj"}
    parameters = [our_parameter(model, key.removeprefix("backbone."), clip) for key in tensors]
    ours_, theirs_ = gradients(ours, parameters), gradients(theirs, list(tensors.values()))
    same([g.reshape(t.shape) for g, t in zip(ours_, theirs_, strict=True)], theirs_)


def test_nlu_is_their_formula_with_every_gradient():
    tensors, model = leaves(nlu()), model_of("dense", biased=False)
    convert.load(model, convert.from_authors(nlu()))

    def adapted(i, x, linear):
        prefix, names = f"blocks.{i}.mlp.hydra_", ("hydra_A", "hydra_B")
        return their_linear(x, linear, tensors, f"{prefix}par", f"{prefix}seq", names=names)

    ours, theirs = model(X), their_mlp_only(model_of("dense", biased=False), "dense", X, adapted)
    same([ours], [theirs])
    parameters = [our_parameter(model, key, {"mlp.hydra": "mlp.dense"}) for key in tensors]
    same(gradients(ours, parameters), gradients(theirs, list(tensors.values())))


def test_loralib_is_its_formula_with_every_gradient():
    tensors, model = leaves(loralib()), model_of()
    names = convert.load(model, convert.from_loralib(loralib(), alpha=8))
    assert [type(model.get_submodule(name)) for name in names] == [hk.LoRALinear] * 2

    def adapted(i, x, linear):
        A, B = (tensors[f"blocks.{i}.mlp.fc2.lora_{side}"] for side in "AB")
        return F.linear(x, linear.weight, linear.bias) + x @ A.T @ B.T * (8 / A.shape[0])

    ours, theirs = model(X), their_mlp_only(model_of(), "fc2", X, adapted)
    same([ours], [theirs])
    parameters = [getattr(model.blocks[i].mlp.fc2, name) for i in (0, 1) for name in ("A_down", "A_up")]
    same(gradients(ours, parameters), gradients(theirs, list(tensors.values())))


def test_what_is_loaded_is_saved_loaded_and_merged_as_any_other(tmp_path):
    model, other = model_of(), model_of()
    convert.load(model, convert.from_authors(vtab1k(), scale=0.3, include=["head"]))
    hk.mark_only_adapters_trainable(model, keep=["head"])
    hk.save_adapters(model, tmp_path / "a.safetensors", include=["head"])
    theirs = their_vtab1k(model_of(), vtab1k(), X, 0.3)
    fresh = convert.from_authors({k: torch.zeros_like(t) for k, t in vtab1k().items()}, scale=0.3, include=["head"])
    convert.load(other, fresh)
    hk.load_adapters(other, tmp_path / "a.safetensors")
    same([other(X)], [theirs])
    same([hk.merge_and_unload(other.eval())(X)], [theirs])


def test_copies_have_the_layers_dtype():
    model = model_of().bfloat16()
    convert.load(model, convert.from_loralib(loralib(), alpha=1), adapter_dtype=torch.float32)
    A_down = model.blocks[0].mlp.fc2.A_down
    assert A_down.dtype == torch.float32
    assert torch.equal(A_down, loralib()["blocks.0.mlp.fc2.lora_A"].float())


def without(key):
    return lambda tensors: tensors.pop(key)


def put(key, *shape, dtype=torch.float64):
    return lambda tensors: tensors.update({key: torch.ones(shape, dtype=dtype)})


PAR = "blocks.1.mlp.hydra_mlp_par"
AUTHORS = [
    (without(f"{PAR}.up_proj.weight"), "up projection of the parallel branch of 'blocks.1.mlp.fc2' is missing"),
    (without(f"{PAR}.down_proj.bias"), "A_down_bias of 'blocks.1.mlp.fc2' is missing; expected all of"),
    (lambda t: [t.pop(k) for k in list(t) if "1.mlp.hydra_mlp_seq" in k], "sequential branch of 'blocks.1.mlp.fc2'"),
    (put(f"{PAR}.up_proj.weight", WIDTH, 9), r"A_up of 'blocks.1.mlp.fc2': expected shape \[6, 3\], .*got \[6, 9\]"),
    (put(f"{PAR}.down_proj.weight", 3), r"A_down of 'blocks.1.mlp.fc2': expected a matrix, got \[3\]"),
    (put(f"{PAR}.down_proj.weight", 0, HIDDEN), r"A_down of .*: expected a matrix, got \[0, 10\]"),
    (put("blocks.1.mlp.hydra_mlp_seq.down_proj.weight", 3, 7), r"B_down of .*expected shape \[3, 6\], .*got \[3, 7\]"),
    (put(f"{PAR}.scale", 1), "scale_b of 'blocks.1.mlp.fc2' is missing"),
    (put(f"{PAR}.scale", 2), r"scale_a of 'blocks.1.mlp.fc2': expected one number, got \[2\]"),
    (put(f"{PAR}.up_proj.weight", WIDTH, 3, dtype=torch.int8), "A_up of .* expected a floating dtype, got torch.int8"),
    (
        put("blocks.1.mlp.hydra_mlp_pra.up_proj.weight", 2),
        "keys of a branch .*, got 'blocks.1.mlp.hydra_mlp_pra.up_proj.weight'",
    ),
    (lambda t: t.update(acc=0.9), "expected a Tensor under 'acc', got float"),
    (
        put("norm.weight", WIDTH),
        "expected keys of a branch of the authors' code, got 'norm.weight'; to copy other",
    ),
    (
        put("head.weight", CLASSES, 9),
        r"include: expected shape \[3, 6\] for 'head.weight', as in the model, got \[3, 9\]",
    ),
    (put("head.extra", 1), "include: the model has no 'head.extra'; near names: head"),
    (
        lambda t: [t.update({k.replace("s.1", "s.7"): t.pop(k)}) for k in list(t) if ".1." in k],
        "model: it has no layer 'blocks.7.mlp.fc2'; near names: blocks; or pass rename",
    ),
    (
        put(f"{PAR}.down_proj.weight", 3, 11),
        "expected 'blocks.1.mlp.fc2' to have 11 inputs and 6 outputs, as in the checkpoint, got 10 and 6",
    ),
]


def refused(model, match, convert_, **options):
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=match):
        convert.load(model, convert_(), **options)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (p, requires_grad) in before.items():
        assert torch.equal(after[name], p)
        assert after[name].requires_grad == requires_grad


@pytest.mark.parametrize(("change", "match"), AUTHORS, ids=[match[:50] for _, match in AUTHORS])
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, match):
    tensors = vtab1k()
    change(tensors)
    refused(model_of(), match, lambda: convert.from_authors(tensors, scale=0.1, include=["head"]))


LORALIB = [
    (without("blocks.1.mlp.fc2.lora_A"), "down projection of the parallel branch of 'blocks.1.mlp.fc2' is missing"),
    (without("blocks.1.mlp.fc2.lora_B"), "up projection of the parallel branch of 'blocks.1.mlp.fc2' is missing"),
    (put("blocks.1.mlp.fc2.lora_A", 10, HIDDEN), r"of its MergedLinear, .* \(lora_A \[10, 10\], lora_B \[6, 5\]\)"),
    (put("blocks.1.mlp.fc2.lora_A", 7, HIDDEN), r"A_up of .*: expected shape \[6, 7\], .*got \[6, 5\]"),
    (put("blocks.1.mlp.fc2.lora_A.default.weight", 2, 2), "is PEFT's, not loralib's; use hydra_kernels.peft.from_lora"),
    (put("blocks.1.mlp.fc2.lora_E", 2), "loralib's lora_A or lora_B, got 'blocks.1.mlp.fc2.lora_E'"),
]


@pytest.mark.parametrize(("change", "match"), LORALIB, ids=[match[:50] for _, match in LORALIB])
def test_a_loralib_checkpoint_that_does_not_fit_changes_nothing(change, match):
    tensors = loralib()
    change(tensors)
    refused(model_of(), match, lambda: convert.from_loralib(tensors, alpha=1))


def test_scales_and_alpha_are_neither_guessed_nor_given_twice():
    with pytest.raises(
        ValueError, match=r"scale: expected a number, since the checkpoint has none for 'blocks.0.mlp.fc2'"
    ):
        convert.from_authors(vtab1k(), include=["head"])
    with pytest.raises(ValueError, match=r"scale: expected None, since the checkpoint holds those .*, got 1.0"):
        convert.from_authors(elevater(True), scale=1.0)
    with pytest.raises(ValueError, match="scale: expected a finite number, got nan"):
        convert.from_authors(nlu(), scale=float("nan"))
    with pytest.raises(TypeError, match="alpha: expected a number, got str"):
        convert.from_loralib(loralib(), alpha="8")
    with pytest.raises(ValueError, match="expected keys of a branch of the authors' code, got none"):
        convert.from_authors({}, scale=1.0)


def test_a_weight_that_loralib_may_have_merged_is_refused():
    tensors = {**loralib(), "blocks.0.mlp.fc2.weight": torch.ones(WIDTH, HIDDEN)}
    with pytest.raises(ValueError, match=r"include: 'blocks.0.mlp.fc2.weight' may contain the adapters already"):
        convert.from_loralib(tensors, alpha=1, include=["weight"])


def test_two_names_are_not_renamed_to_one():
    with pytest.raises(ValueError, match=r"rename: expected a new name for each name, got 'x' for 2 of them"):
        convert.from_loralib(loralib(), alpha=1, rename=lambda name: "x")


def test_options_that_the_checkpoint_fixes_and_wrong_models_are_refused():
    checkpoint = convert.from_loralib(loralib(), alpha=1)
    refused(model_of(), "scale: the checkpoint sets this option; leave it out", lambda: checkpoint, scale=2.0)
    refused(model_of(), "dropout: expected a number in", lambda: checkpoint, dropout=1.0)
    shared = model_of()
    shared.blocks[1].mlp.fc2 = shared.blocks[0].mlp.fc2
    refused(shared, "'blocks.0.mlp.fc2' and 'blocks.1.mlp.fc2' are the same layer", lambda: checkpoint)
    embedding = model_of()
    embedding.blocks[1].mlp.fc2 = nn.Embedding(WIDTH, HIDDEN)
    refused(embedding, r"model: 'blocks.1.mlp.fc2' matches, but .*Embedding", lambda: checkpoint)
    refused(
        nn.Linear(HIDDEN, WIDTH),
        "it has no layer ''",
        lambda: convert.from_loralib({"lora_A": torch.ones(2, HIDDEN), "lora_B": torch.ones(WIDTH, 2)}, alpha=1),
    )
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp\.fc2' is on the meta device"):
        convert.load(model_of().to("meta"), checkpoint)


def test_a_sharded_model_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        linear = (model := model_of()).blocks[1].mlp.fc2
        linear.weight = nn.Parameter(distribute_tensor(linear.weight, init_device_mesh("cpu", (1,))))
        refused(model, r"model: 'blocks\.1\.mlp\.fc2' is sharded", lambda: convert.from_loralib(loralib(), alpha=1))
    finally:
        torch.distributed.destroy_process_group()

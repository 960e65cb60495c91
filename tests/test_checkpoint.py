"""Adapter files: what is saved comes back whole; a file that does not fit says why and changes nothing."""

import json
import os
import random
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hydra_kernels as hk
from hydra_kernels.checkpoint import KEY

from .test_layers import trained
from .test_model import TOKENS, Model, state

OPTIONS = {"adapter_bias": True, "learnable_scale": True, "r_a": 2, "r_b": 3}


def adapted(seed=0, method="hydra", targets=("fc1", "fc2"), **options):
    torch.manual_seed(0)
    model = Model().eval()
    names = hk.inject(model, targets, method, **(options or OPTIONS))
    for i, name in enumerate(dict.fromkeys(names)):
        trained(model.get_submodule(name), seed=100 * seed + i)
    return model


def test_adapter_state_dict_names_every_adapter_once():
    model = adapted()
    expected = {f"blocks.{b}.mlp.fc{f}.{a}" for b in (0, 1) for f in (1, 2) for a in hk.HydraLinear.ADAPTERS}
    stored = hk.adapter_state_dict(model)
    assert stored.keys() == expected
    assert all(torch.equal(v, model.get_parameter(k)) and not v.requires_grad for k, v in stored.items())
    assert set(hk.adapter_state_dict(hk.LoRALinear(3, 4))) == {"A_down", "A_up"}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("hydra", OPTIONS),
        ("hydra", {"r_a": 2, "r_b": 0, "scale_a": 0.3}),
        ("lora", {"r": 2, "scale": 0.5, "dropout": 0.1}),
        ("seqlora", {"r": 3}),
    ],
)
def test_what_is_saved_comes_back(tmp_path, method, options, merged):
    source, target = adapted(1, method, **options), adapted(2, method, **options)
    before = target(TOKENS)
    if merged:
        hk.merge(source)
        hk.merge(target)
    hk.save_adapters(source, tmp_path / "adapters.safetensors")
    hk.load_adapters(target, tmp_path / "adapters.safetensors")
    hk.unmerge(source)
    for loaded, saved, old in zip(target(TOKENS), source(TOKENS), before, strict=True):
        assert torch.equal(loaded, saved)
        assert not torch.equal(loaded, old)


@pytest.mark.parametrize(
    ("method", "targets", "options", "call"),
    [
        ("hydra", ("fc1", "fc2"), {"r_a": 2, "r_b": 3}, "(model, ['fc1', 'fc2'], method='hydra', r_a=2, r_b=3)"),
        (
            "hydra",
            ("fc2",),
            {**OPTIONS, "r_a": 0},
            "(model, ['fc2'], method='hydra', r_a=0, r_b=3, learnable_scale=True, adapter_bias=True)",
        ),
        (
            "hydra",
            ("fc2",),
            {"scale_a": 0.5, "scale_b": 2.0},
            "(model, ['fc2'], method='hydra', r_a=4, r_b=4, scale_a=0.5, scale_b=2.0)",
        ),
        (
            "lora",
            ("fc2", "query"),
            {"r": 2, "scale": 0.5, "dropout": 0.1, "input_dropout": 0.05},
            "(model, ['fc2', 'query'], method='lora', r=2, scale=0.5, dropout=0.1, input_dropout=0.05)",
        ),
        ("seqlora", ("blocks.1.mlp.fc2",), {"r": 3}, r"(model, 'blocks\\.1\\.mlp\\.fc2', method='seqlora', r=3)"),
    ],
)
def test_a_plain_model_is_told_the_call_that_makes_the_layers_of_the_file(tmp_path, method, targets, options, call):
    source, path = adapted(1, method, targets, **options), tmp_path / "a.safetensors"
    hk.save_adapters(source, path)
    torch.manual_seed(0)
    plain = Model().eval()
    with pytest.raises(ValueError, match=r"model: it has no adapted layer to load .* into; ") as error:
        hk.load_adapters(plain, path)
    said = str(error.value).partition("first call ")[2]
    assert said == f"hk.inject{call}"
    eval(said, {"hk": hk, "model": plain})
    hk.load_adapters(plain, path)
    assert all(torch.equal(a, b) for a, b in zip(plain(TOKENS), source(TOKENS), strict=True))


def test_a_plain_model_is_told_each_call_where_there_are_several_and_a_layer_how_it_is_made(tmp_path):
    source, path = adapted(1, targets=("fc1",), r_a=2, r_b=3), tmp_path / "a.safetensors"
    hk.inject(source, ["fc2", "query"], "lora", r=5)
    hk.save_adapters(source, path)
    calls = r"hk.inject\(model, \['fc2', 'query'\], method='lora', r=5\); "
    calls += r"hk.inject\(model, \['fc1'\], method='hydra', r_a=2, r_b=3\)"
    with pytest.raises(ValueError, match=calls):
        hk.load_adapters(Model(), path)
    hk.save_adapters(hk.SeqLoRALinear(3, 4, r=2), path)
    with pytest.raises(ValueError, match=r"first call hk.SeqLoRALinear.from_linear\(model, r=2\)"):
        hk.load_adapters(torch.nn.Linear(3, 4), path)


def test_the_file_holds_the_adapters_and_says_what_they_are(tmp_path):
    model = adapted(0, "lora", r=2, scale=0.5, dropout=0.25, input_dropout=0.05)
    hk.save_adapters(model, tmp_path / "a", include=["classifier"])
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert set(file.keys()) == set(hk.adapter_state_dict(model)) | {"classifier.weight", "classifier.bias"}
        description = json.loads(file.metadata()[KEY])
    assert description["include"] == ["classifier"]
    assert description["layers"]["blocks.0.mlp.fc1"] == {
        "method": "LoRALinear",
        "in_features": 8,
        "out_features": 16,
        "r_a": 2,
        "r_b": 0,
        "scale_a": 0.5,
        "scale_b": 1.0,
        "adapter_bias": False,
        "dropout": 0.25,
        "input_dropout": 0.05,
    }


def test_included_parameters_come_back(tmp_path):
    source, target = adapted(1), adapted(2)
    with torch.no_grad():
        source.classifier.weight.fill_(7)
    hk.save_adapters(source, tmp_path / "a", include="classifier")
    hk.load_adapters(target, tmp_path / "a")
    assert target.classifier.weight.eq(7).all()
    assert torch.equal(target(TOKENS)[1], source(TOKENS)[1])
    with pytest.raises(ValueError, match="include: 'clasifier' matches no module or parameter"):
        hk.save_adapters(source, tmp_path / "b", include=["clasifier"])
    assert not (tmp_path / "b").exists()


def test_tied_and_shared_tensors_are_stored_once(tmp_path):
    source, target = adapted(1), adapted(2)
    with torch.no_grad():
        source.embedding.weight.fill_(3)
    hk.save_adapters(source, tmp_path / "a", include=["lm_head", "embedding", "shared"])
    hk.load_adapters(target, tmp_path / "a")
    assert target.lm_head.weight is target.embedding.weight
    assert target.embedding.weight.eq(3).all()


def test_the_meta_device_is_refused(tmp_path):
    hk.save_adapters(adapted(1), tmp_path / "a")
    with pytest.raises(ValueError, match="is on the meta device"):
        hk.load_adapters(adapted(2).to("meta"), tmp_path / "a")


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    hk.save_adapters(adapted(1), tmp_path / "a")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
    with pytest.raises(
        FileNotFoundError, match=r"path: expected a file in a folder that exists, but .*missing does not"
    ):
        hk.save_adapters(adapted(1), tmp_path / "missing" / "a")


def test_loading_keeps_the_models_dtype(tmp_path):
    source, target = adapted(1), adapted(2).double()
    hk.save_adapters(source, tmp_path / "a")
    hk.load_adapters(target, tmp_path / "a")
    assert {v.dtype for v in hk.adapter_state_dict(target).values()} == {torch.float64}
    assert all(
        torch.equal(v, hk.adapter_state_dict(source)[k].double()) for k, v in hk.adapter_state_dict(target).items()
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: adapted(0, r_a=2, r_b=3), "adapter_bias is True in the file, False in the model"),
        (lambda: adapted(0, **{**OPTIONS, "r_b": 4}), "blocks.0.mlp.fc1: r_b is 3 in the file, 4 in the model"),
        (lambda: adapted(0, **{**OPTIONS, "learnable_scale": False}), "scale_a is 'learnable' in the file, 1.0 in the"),
        (lambda: adapted(0, "lora", r=2), "method is 'HydraLinear' in the file, 'LoRALinear' in the model"),
        (lambda: adapted(0, targets=["fc2"], **OPTIONS), "layer 'blocks.0.mlp.fc1' is not in the model"),
        (lambda: adapted(0, targets=["fc1", "fc2", "query"], **OPTIONS), "layer 'blocks.0.query' is not in the file"),
    ],
)
def test_another_model_is_refused_and_unchanged(tmp_path, target, message):
    hk.save_adapters(adapted(1), tmp_path / "a")
    model = target()
    model.eval()
    hk.merge(model)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        hk.load_adapters(model, tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert all(layer.merged for layer in model.modules() if isinstance(layer, hk.HydraLinear))


def test_saving_and_loading_without_adapters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model: it has no adapted layer"):
        hk.save_adapters(Model(), tmp_path / "a")
    assert os.listdir(tmp_path) == []
    hk.save_adapters(adapted(1), tmp_path / "a")
    with pytest.raises(ValueError, match="model: it has no adapted layer"):
        hk.load_adapters(Model(), tmp_path / "a")


def rewritten(path, change):
    """The file with its tensors or metadata changed."""
    with safe_open(path, framework="pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    description = json.loads(metadata[KEY])
    change(tensors, description)
    save_file(tensors, path, metadata={KEY: json.dumps(description)})


def drop(tensors, description):
    del tensors["blocks.0.mlp.fc1.A_up"]


def add(tensors, description):
    tensors["blocks.0.mlp.fc1.C_up"] = torch.zeros(1)


def reshape(tensors, description):
    tensors["blocks.0.mlp.fc1.A_up"] = torch.zeros(2, 16)


def another_format(tensors, description):
    description["format"] = 2


def no_layers(tensors, description):
    description["layers"] = [1, 2]


def hostile_include(tensors, description):
    description["include"] = ["blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "blocks.0.mlp.fc1.A_up: missing in the file"),
        (add, "blocks.0.mlp.fc1.C_up: missing in the model"),
        (reshape, r"blocks.0.mlp.fc1.A_up: \[2, 16\] in the file, \[16, 2\] in the model"),
        (another_format, "is not in format 1"),
        (no_layers, "is not in format 1"),
        (hostile_include, "blocks.0.mlp.fc1.weight: missing in the file"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, change, message):
    model = adapted(1)
    hk.save_adapters(model, tmp_path / "a")
    rewritten(tmp_path / "a", change)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        hk.load_adapters(model, tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a")
    with pytest.raises(ValueError, match="was not written by save_adapters"):
        hk.load_adapters(adapted(), tmp_path / "a")
    save_file({"w": torch.ones(2)}, tmp_path / "a", metadata={KEY: "[" * 100_000})
    with pytest.raises(ValueError, match="is not JSON"):
        hk.load_adapters(adapted(), tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        hk.load_adapters(adapted(), tmp_path / "missing")


def test_truncated_and_hostile_files_are_refused_with_a_reason(tmp_path):
    """1,600 damaged files, seeded: each raises ValueError and changes nothing, or was damaged in the values only."""
    model = adapted(1)
    path = tmp_path / "a"
    hk.save_adapters(model, path)
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    before = state(model)
    draw = random.Random(0)
    refused = 0
    for i in range(1600):
        content = bytearray(whole)
        if i % 4 == 0:
            del content[draw.randrange(len(content)) :]
        elif i % 4 == 1:
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(8 + header)] = draw.randrange(256)
        elif i % 4 == 2:
            content[:8] = struct.pack("<Q", draw.choice([0, 1, header - 1, header + 1, 2**31, 2**63, 2**64 - 1]))
        else:
            start = draw.randrange(8 + header)
            content[start : start + draw.randint(1, 40)] = draw.randbytes(draw.randint(0, 40))
        path.write_bytes(content)
        said = ""
        try:
            hk.load_adapters(model, path)
        except ValueError as error:
            said = str(error)
        if said:
            refused += str(path) in said
            assert all(torch.equal(v, before[k]) for k, v in state(model).items())
        else:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(before[name])
    assert refused > 1560


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    hk.save_adapters(adapted(1), path)
    old = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        hk.save_adapters(adapted(2), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a"]

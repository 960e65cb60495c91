"""Table 4's models: sizes and ranks, what they learn from, accumulation, checkpointing, and the page of results."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import render, table4
from benchmarks.measuring import methods, models, timing
from benchmarks.measuring.methods import Contestant, Ranks
from benchmarks.measuring.models import MODELS, Size
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.table4_settings import QUANTISED_METHODS
from benchmarks.rendering import models as render_models
from benchmarks.rendering.steps_chart import MEMORY, models_chart
from benchmarks.rendering.tables import Stored

from .test_render import ENVIRONMENT, table4_row

CPU = torch.device("cpu")
OTHERS = [option for option in MODELS if option != table4.DEFAULT_MODEL]
# Parameters without the head, as published, and how many layers are adapted: (GPU, CPU). Of Llama 3 8B a layer has
# 218,112,000; here are four of them, 1,024 words and the last norm.
PUBLISHED = {
    "vit-b/32": (87_455_232, 12, 12),
    "vit-l/16": (303_301_632, 24, 4),
    "roberta-base": (124_055_040, 12, 6),
    "llama": (4 * 218_112_000 + 1024 * 4096 + 4096, 4 * 7, 2 * 7),
}


def network_of(option: str, size: Size | None = None) -> nn.Module:
    model = MODELS[option]
    torch.manual_seed(0)
    return models.build(model, size or model.dry).train()


def source_of(option: str, network: nn.Module):
    return models.source(network, MODELS[option].dry, None, CPU, torch.float32)


def contestants_of(option: str, *names: str, accumulation: int = 1) -> dict[str, Contestant]:
    model, base = MODELS[option], network_of(option)
    same = {"target": model.target, "head": model.head, "seed": 1, "adapter_bias": model.adapter_bias}
    made = {name: Contestant.of(name, methods.build(base, name, model.ranks, **same), accumulation) for name in names}
    methods.start_equal(made)
    return made


def adapted(network: nn.Module, target: str) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in network.named_modules() if re.fullmatch(target, name)]


@pytest.mark.parametrize("option", MODELS)
def test_sizes_are_those_published_and_smaller_ones_say_so(option):
    model = MODELS[option]
    parameters, on_gpu, on_cpu = PUBLISHED[option]
    with torch.device("meta"):
        large, small = (models.build(model, size) for size in (model.gpu, model.cpu))
    sizes = [
        sum(p.numel() for name, p in network.named_parameters() if not name.startswith(f"{model.head}."))
        for network in (large, small)
    ]
    assert sizes[0] == parameters
    assert ("smaller" in model.cpu.name) == (sizes[1] < sizes[0])
    assert "smaller" not in model.gpu.name
    for network, count in ((large, on_gpu), (small, on_cpu)):
        found = adapted(network, model.target)
        assert len(found) == count
        assert all(type(module) is nn.Linear for _, module in found)
        assert not [name for name, module in network.named_modules() if isinstance(module, nn.Dropout) and module.p]
        # Of Llama every linear layer but the head, of the others the MLPs' last one, which alone narrows so.
        others = [m for name, m in network.named_modules() if isinstance(m, nn.Linear) and name not in dict(found)]
        if option == "llama":
            assert [m.out_features for m in others] == [1024]
        else:
            assert all(m.in_features == 4 * m.out_features for _, m in found)
            assert not [m for m in others if m.in_features == 4 * m.out_features]
    assert model.size(torch.device("cuda"), dry=False) is model.gpu
    assert model.size(CPU, dry=False) is model.cpu
    assert model.size(torch.device("cuda"), dry=True) is model.size(CPU, dry=True) is model.dry


@pytest.mark.parametrize("option", OTHERS)
def test_ranks_are_those_of_equal_parameters(option):
    model = MODELS[option]
    hydra = model.ranks["hydra"]
    assert hydra == {"vit-l/16": Ranks(8, 8), "roberta-base": Ranks(4, 8), "llama": Ranks(16, 16)}[option]
    for size in (model.gpu, model.cpu, model.dry):
        with torch.device("meta"):
            shapes = [m.weight.shape for _, m in adapted(models.build(model, size), model.target)]
        parallel, sequential = sum(N + K for N, K in shapes), sum(N + N for N, K in shapes)
        wanted = hydra.r_a * parallel + hydra.r_b * sequential
        assert model.ranks["lora"] == Ranks(min(range(1, 100), key=lambda r: abs(r * parallel - wanted)), 0)
        assert model.ranks["seqlora"] == Ranks(0, min(range(1, 100), key=lambda r: abs(r * sequential - wanted)))


def test_tokens_are_followed_by_the_next_or_sorted_into_classes():
    following = models.Tokens(50, 6, None, CPU)
    batches = list(following.batches(4, 10, seed=1))
    assert [tuple(tokens.shape) for tokens, _ in batches] == [(4, 6), (4, 6), (2, 6)]
    for tokens, labels in batches:
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        assert min(tokens.min(), labels.min()) >= 2
        assert max(tokens.max(), labels.max()) < 50
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, following.batches(4, 10, seed=1), strict=True))
    assert not torch.equal(batches[0][0], next(following.batches(4, 10, seed=2))[0])
    assert not torch.equal(batches[0][0], batches[1][0])
    [(tokens, labels)] = models.Tokens(50, 6, 3, CPU).batches(64, 64, seed=1)
    assert tokens.shape == (64, 6)
    assert tokens.min() == 2
    assert sorted(set(labels.tolist())) == [0, 1, 2]


@pytest.mark.parametrize("option", MODELS)
def test_the_loss_is_the_networks_own(option):
    [contestant] = contestants_of(option, "linear_probing").values()
    inputs, labels = next(source_of(option, contestant.model).batches(6, 6, seed=3))
    # transformers' language models shift labels themselves: they get the whole sequence, and lose its first token.
    whole = torch.cat([inputs, labels[:, -1:]], dim=1) if option == "llama" else inputs
    with torch.no_grad():
        right = whole if option == "llama" else labels
        expected = contestant.model(**{contestant.model.main_input_name: whole, "labels": right}).loss
    contestant.step(inputs, labels)
    torch.testing.assert_close(contestant.loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("option", MODELS)
@pytest.mark.parametrize(("accumulation", "sizes"), [(4, [3, 3, 3, 1]), (5, [2] * 5)])
def test_micro_batches_give_the_gradients_of_the_whole_batch(option, accumulation, sizes):
    [contestant] = contestants_of(option, "naive_hydra", accumulation=accumulation).values()
    inputs, labels = next(source_of(option, contestant.model).batches(10, 10, seed=3))
    logits = contestant.model(inputs).logits
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    trained = contestant.trainable()
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    seen = []
    handle = contestant.model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(len(named[module.main_input_name])), with_kwargs=True
    )
    contestant.step(inputs, labels)
    handle.remove()
    assert seen == sizes
    torch.testing.assert_close(contestant.loss, loss.detach(), rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        error = (trained[name].grad - gradient).double().norm() / gradient.double().norm()
        assert error < 1e-5, name


def test_a_second_step_starts_from_gradients_of_zero():
    contestant = contestants_of("roberta-base", "naive_lora", accumulation=2)["naive_lora"]
    contestant.optimizer.param_groups[0]["lr"] = 0.0
    contestant.optimizer.param_groups[0]["weight_decay"] = 0.0
    batch = next(source_of("roberta-base", contestant.model).batches(4, 4, seed=3))
    contestant.step(*batch)
    first = {name: p.grad.clone() for name, p in contestant.trainable().items()}
    contestant.step(*batch)
    for name, parameter in contestant.trainable().items():
        torch.testing.assert_close(parameter.grad, first[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("option", MODELS)
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_step_recomputes_its_activations_where_asked(option, checkpointing, tmp_path, monkeypatch):
    measure, seen = table4.measure, {}

    def spy(contestants, batches, settings, progress):
        contestant = contestants["ours_hydra"]
        calls = []
        for name, module in contestant.model.named_modules():
            if re.fullmatch(settings.model.target, name):
                # Before it: the recomputation stops within the last layer, as soon as it has what it needs.
                module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        source = models.source(contestant.model, settings.size, None, CPU, torch.float32)
        contestant.step(*next(source.batches(2, 2, seed=0)))
        seen["calls"], seen["layers"] = len(calls), len(set(calls))
        # Ours alone has made a step: it starts again as naive does.
        contestant.optimizer.state.clear()
        methods.start_equal(contestants)
        return measure(contestants, batches, settings, progress)

    monkeypatch.setattr(table4, "measure", spy)
    arguments = ["--dry", "--model", option, "--device", "cpu", "--steps", "1", "--batch-size", "4"]
    arguments += ["--methods", "naive_hydra,ours_hydra", "--out", str(tmp_path), "--accumulation", "2"]
    assert table4.main([*arguments, *(["--checkpointing"] if checkpointing else [])]) == 0
    assert seen["layers"] > 0
    # A step of two micro-batches, each of which runs every layer once, or once more for the backward.
    assert seen["calls"] == 2 * (2 if checkpointing else 1) * seen["layers"]
    [path] = tmp_path.glob("*.json")
    _, rows = timing.read_result(path, Table4Row)
    assert {(row["accumulation"], row["checkpointing"]) for row in rows} == {(2, checkpointing)}


def test_checkpointing_keeps_the_layers_inputs_alone():
    saved = {}
    for checkpointing in (False, True):
        network = network_of("llama")
        if checkpointing:
            models.checkpoint_activations(network)
        model = MODELS["llama"]
        network = methods.build(network, "naive_lora", model.ranks, target=model.target, head=model.head, seed=1)
        inputs, hidden = torch.randint(2, 100, (4, 16)), []

        def run(network=network, inputs=inputs, hidden=hidden):
            hidden.append(network.model(inputs)[0])

        saved[checkpointing] = timing.saved_bytes(run, network.parameters())
    # The input of each of the two layers and of the last norm, [4, 16, 32], and that norm's factors, [4, 16, 1].
    assert saved[True] == 4 * (3 * 4 * 16 * 32 + 4 * 16)
    assert saved[False] > 10 * saved[True]
    assert not network.get_input_embeddings()(inputs).requires_grad


def test_of_micro_batches_one_is_saved_at_a_time_and_no_more_than_the_peak():
    saved: dict[str, list[int]] = {"naive_hydra": [], "ours_hydra": []}
    for accumulation in (1, 4):
        for name, contestant in contestants_of("llama", *saved, accumulation=accumulation).items():
            batch = next(source_of("llama", contestant.model).batches(8, 8, seed=3))
            step = partial(contestant.step, *batch)
            saved[name].append(timing.saved_bytes(step, contestant.model.parameters()))
            # The batch is there before the step: that alone is not above what is held.
            assert saved[name][-1] <= timing.peak_bytes(step, CPU) + timing.tensor_bytes(batch)
    for whole, part in saved.values():
        # What does not grow with the batch, positions and masks, is less than a tenth of it.
        assert whole / 4 <= part < 1.1 * whole / 4


def test_pefts_lora_is_naive_lora_in_a_model_without_adapter_biases():
    model, base = MODELS["llama"], network_of("llama").bfloat16()
    same = {"target": model.target, "head": model.head, "seed": 1, "adapter_bias": False}
    made = {
        name: Contestant.of(name, methods.build(base, name, model.ranks, **same))
        for name in ("naive_lora", "peft_lora", "accelerated_lora")
    }
    methods.start_equal(made)
    trainable = {name: contestant.trainable() for name, contestant in made.items()}
    for name in ("peft_lora", "accelerated_lora"):
        assert trainable[name].keys() == trainable["naive_lora"].keys()
        of_adapters = [p.dtype for key, p in trainable[name].items() if not key.startswith(model.head)]
        assert of_adapters == [torch.float32] * (2 * 7 * 2)  # as get_peft_model makes them
    [batch] = source_of("llama", base).batches(4, 4, seed=3)
    for _ in range(2):
        for contestant in made.values():
            contestant.step(*batch)
        differences = methods.settle(made, methods.TOLERANCES["bf16"])
        assert differences["peft_lora"].gradient < 0.1
        assert differences["accelerated_lora"].gradient < 0.1
    layers = [type(m).__name__ for m in made["accelerated_lora"].model.modules()]
    assert layers.count("AcceleratedLinear") == 2 * 7
    with pytest.raises(ValueError, match="PEFT's LoRA has no adapter biases"):
        table4.settings_of(["--dry", "--device", "cpu", "--methods", "naive_lora,peft_lora"])


def test_a_step_with_lora_dropout_is_proved_without_it():
    """What drops elements of x computes something else than naive: it is compared only where nothing is dropped."""
    model, base = MODELS["llama"], network_of("llama")
    same = {"target": model.target, "head": model.head, "seed": 1, "adapter_bias": False, "lora_dropout": 0.25}
    names = ("naive_lora", "peft_lora", "accelerated_lora")
    made = {name: Contestant.of(name, methods.build(base, name, model.ranks, **same)) for name in names}
    methods.start_equal(made)
    assert [len(contestant.dropouts()) for contestant in made.values()] == [0, 2 * 7, 2 * 7]
    [batch] = source_of("llama", base).batches(4, 4, seed=3)
    tolerance = methods.TOLERANCES["fp32"]
    with methods.without_dropout(made.values()):
        for contestant in made.values():
            contestant.step(*batch)
        assert methods.settle(made, tolerance).keys() == set(names[1:])
    for contestant in made.values():
        contestant.step(*batch)
    for name in names[1:]:
        assert all(module.training and module.p == 0.25 for module in made[name].dropouts())
        with pytest.raises(methods.ParityError):
            methods.compare(made[name], made["naive_lora"], tolerance)
    assert methods.settle(made, tolerance) == {}
    equal = made["naive_lora"].trainable()
    assert all(torch.equal(p, equal[key]) for name in names[1:] for key, p in made[name].trainable().items())


def test_pefts_lora_runs_under_autocast_where_it_is_called_so():
    base, model = network_of("llama").bfloat16(), MODELS["llama"]
    same = {"target": model.target, "head": model.head, "seed": 1, "adapter_bias": False}
    [batch] = source_of("llama", base).batches(4, 4, seed=3)
    seen = {}
    for name in ("peft_lora", "autocast_lora"):
        contestant = Contestant.of(name, methods.build(base, name, model.ranks, **same))
        down = contestant.model.get_submodule("model.layers.0.mlp.up_proj.lora_A.default")
        down.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
        contestant.step(*batch)
    assert seen == {"peft_lora": torch.float32, "autocast_lora": torch.bfloat16}


@pytest.mark.parametrize("wrong", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_peft_script_with_every_option(wrong, tmp_path, monkeypatch, capsys):
    build = methods.build

    def build_wrong(base, method, *args, **kwargs):
        model = build(base, method, *args, **kwargs)
        if method == "accelerated_lora":
            adapter = model.get_parameter("model.layers.1.mlp.up_proj.lora_A.default.weight")
            adapter.register_hook(lambda gradient: 0.5 * gradient)
        return model

    if wrong:
        monkeypatch.setattr(methods, "build", build_wrong)
    arguments = ["--dry", "--model", "llama", "--device", "cpu", "--steps", "2", "--batch-size", "4", "--dtype", "bf16"]
    arguments += ["--peft", "--lora-dropout", "0.25", "--checkpointing", "--ranks", "lora=8", "--out", str(tmp_path)]
    assert table4.main(arguments) == wrong
    if wrong:
        assert "accelerated_lora: the gradient of model.layers.1.mlp.up_proj.A_down" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        return
    path = tmp_path / "table4-llama-peft-dry-cpu-bf16-checkpointing-lora8-dropout0.25.json"
    _, rows = timing.read_result(path, Table4Row)
    assert [row["method"] for row in rows] == ["naive_lora", "peft_lora", "autocast_lora", "accelerated_lora"]
    assert {(row["lora_dropout"], row["checkpointing"], tuple(row["ranks"])) for row in rows} == {(0.25, True, (8, 0))}
    assert all(row["parity"]["gradient"] < 0.1 for row in rows[1:])
    assert all(len(row["step_seconds"]) == 2 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-dropout", "1", "--peft"], "lora-dropout is 1, expected at least 0 and less than 1"),
        (["--lora-dropout", "0.1"], "lora-dropout: it is PEFT's"),
        (["--lora-dropout", "0.1", "--peft", "--mode", "compile"], "lora-dropout: it is PEFT's"),
        (["--methods", "naive_lora,autocast_lora"], "autocast_lora is autocast to bf16"),
        (["--peft", "--dtype", "tf32"], "peft: expected one of fp32, bf16"),
    ],
)
def test_options_of_a_peft_script_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        table4.settings_of(["--dry", "--device", "cpu", "--model", "llama", *options])


@pytest.mark.parametrize("base", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_run_over_a_quantised_base(base, tmp_path, capsys):
    """Every step is held against a layer written by hand over the same packed weights; then tokens are timed."""
    pytest.importorskip("bitsandbytes")
    arguments = ["--dry", "--device", "cpu", "--model", "llama", "--base", base, "--dtype", "fp32", "--steps", "1"]
    assert table4.main([*arguments, "--batch-size", "2", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    _, rows = timing.read_result(tmp_path / f"table4-llama-{base}-dry-cpu-fp32.json", Table4Row)
    assert [row["method"] for row in rows] == list(QUANTISED_METHODS["fp32"])
    assert all(row["base"] == base and len(row["token_seconds"]) == table4.TOKENS for row in rows)
    assert all(row["parity"]["gradient"] < 2e-5 for row in rows if not row["method"].startswith("naive"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model", "vit-b/32", "--base", "nf4"],
            "base: nf4 has methods of its own, for models without adapter biases",
        ),
        (["--model", "llama", "--base", "nf4", "--peft"], "base: nf4 has methods of its own"),
        (
            ["--model", "llama", "--base", "int8", "--dtype", "tf32"],
            "base: expected one of fp32, bf16 as dtype, got tf32",
        ),
    ],
)
def test_options_of_a_quantised_base_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        table4.settings_of(["--dry", "--device", "cpu", *options])


@pytest.mark.parametrize("option", OTHERS)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_ours_is_naive_in_every_model(option, dtype, tmp_path, capsys):
    arguments = ["--dry", "--model", option, "--device", "cpu", "--dtype", dtype, "--steps", "2", "--batch-size", "4"]
    assert table4.main([*arguments, "--accumulation", "2", "--checkpointing", "--out", str(tmp_path)]) == 0
    name = f"table4-{option.replace('/', '-')}-dry-cpu-{dtype}-accumulation2-checkpointing.json"
    _, rows = timing.read_result(tmp_path / name, Table4Row)
    assert [row["method"] for row in rows] == list(methods.METHODS)
    model = MODELS[option]
    for row in rows:
        kind = row["method"].partition("_")[2]
        assert row["ranks"] == (list(model.ranks[kind]) if kind in model.ranks else None)
        assert (row["model"], row["weights"], row["batch"]) == (model.dry.name, "random", 4)
        assert (row["image_size"], row["sequence"]) == ((64, None) if option == "vit-l/16" else (None, 16))
        assert row["paper_ratio"] is None
        assert row["paper_sec_per_epoch"] is None
        # The peak is what is held between steps, and what a step adds to it.
        assert 0 < row["held_bytes"] < row["peak_bytes"]
        if row["method"].startswith("ours_"):
            assert 0 < row["parity"]["gradient"] < row["parity"]["allowed"]["gradient"]
    printed = capsys.readouterr().out
    assert "(paper" not in printed
    flat = " ".join(printed.split())
    assert "batch 4 in 2 micro-batches, activation checkpointing" in flat
    assert "Projected from 2 steps" in flat
    assert ("random tokens in sequences of 16" in flat) == (option != "vit-l/16")


def test_a_wrong_gradient_of_any_layer_ends_a_run_of_llama(tmp_path, monkeypatch, capsys):
    build = methods.build

    def build_wrong(base, method, *args, **kwargs):
        model = build(base, method, *args, **kwargs)
        if method == "ours_hydra":
            model.get_parameter("model.layers.0.self_attn.k_proj.B_up").register_hook(lambda gradient: 0.999 * gradient)
        return model

    monkeypatch.setattr(methods, "build", build_wrong)
    arguments = ["--dry", "--model", "llama", "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    assert table4.main([*arguments, "--methods", "naive_hydra,ours_hydra", "--out", str(tmp_path / "out")]) == 1
    assert "ours_hydra: the gradient of model.layers.0.self_attn.k_proj.B_up differs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_run_has_a_file_of_its_own_and_the_papers_keeps_its_name():
    def name(*arguments: str) -> str:
        return table4.file_name(table4.settings_of(["--device", "cpu", *arguments])[0])

    assert name() == "table4-cpu-fp32.json"
    assert name("--mode", "compile", "--dtype", "bf16") == "table4-cpu-bf16-compile.json"
    assert name("--accumulation", "4") == "table4-cpu-fp32-accumulation4.json"
    assert name("--model", "llama", "--checkpointing") == "table4-llama-cpu-fp32-checkpointing.json"
    assert name("--model", "vit-l/16", "--mode", "compile", "--accumulation", "2", "--checkpointing") == (
        "table4-vit-l-16-cpu-fp32-compile-accumulation2-checkpointing.json"
    )
    assert name("--model", "llama", "--peft") == "table4-llama-peft-cpu-fp32.json"
    assert name("--model", "llama", "--peft", "--ranks", "lora=32", "--lora-dropout", "0.05") == (
        "table4-llama-peft-cpu-fp32-lora32-dropout0.05.json"
    )


def stored_runs(path: Path) -> list[Stored]:
    """ViT-B/32 as in the README, with accumulation, and RoBERTa of two methods, each with memory of its own."""
    memory = {"held_bytes": 100e6, "saved_bytes": 20e6, "peak_bytes": 150e6}
    roberta = {"model": "RoBERTa-base", "sequence": 512, "image_size": None, "data": "random tokens", "batch": 16}
    return [
        Stored(path, ENVIRONMENT, [table4_row("naive_lora", **{**memory, "held_bytes": None}, batch=32)]),
        Stored(path, ENVIRONMENT, [table4_row("naive_lora", **memory, accumulation=4, batch=32)]),
        Stored(
            path,
            ENVIRONMENT,
            [
                table4_row("naive_hydra", **{**memory, "peak_bytes": 170e6}, **roberta, checkpointing=True),
                table4_row("ours_hydra", **{**memory, "saved_bytes": 30e6}, **roberta, checkpointing=True),
            ],
        ),
    ]


def test_the_block_has_the_tables_that_are_not_the_papers_with_their_memory(tmp_path):
    text = render_models.models_block(stored_runs(tmp_path))
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("**")] == [
        "**ViT-B/32, fp32, eager, batch 32 in 4 micro-batches**",
        "**RoBERTa-base, fp32, eager, batch 16, activation checkpointing**",
    ]
    tables = [line.split(" | ") for line in lines if line.startswith("| ")]
    memory = [[line[0].strip("| "), *line[-3:]] for line in tables if not line[0].startswith(("| method", "| ---"))]
    assert memory == [
        ["naive LoRA", "100", "20", "150 |"],
        ["naive Hydra", "100", "20", "170 |"],
        ["our Hydra", "100", "30", "150 |"],
    ]
    assert tables[0][-3:] == ["held (MB)", "saved (MB)", "peak (MB) |"]
    assert "random tokens in sequences of 512" in text
    assert "rojected" not in text
    assert render_models.models_block(stored_runs(tmp_path)[:1]) == "Of other models nothing was measured yet."


def test_what_all_micro_batches_saved_together_is_not_shown(tmp_path):
    """Of a run that was measured so: more is saved than a step holds above the parameters."""
    memory = {"held_bytes": 100e6, "peak_bytes": 150e6, "model": "RoBERTa-base"}

    def shown(saved: float, **changes) -> tuple[list[str], str]:
        # Linear probing alone gives nothing away: the run is judged as a whole.
        rows = [
            table4_row("linear_probing", **{**memory, **changes}, saved_bytes=10e6),
            table4_row("naive_lora", **{**memory, **changes}, saved_bytes=saved),
        ]
        text = render_models.models_block([Stored(tmp_path, ENVIRONMENT, rows)])
        return re.findall(r"\| 100 \| (\S+) \| 150 \|", text), text

    figures, text = shown(51e6, accumulation=4)
    assert figures == ["-", "-"]
    assert "What is saved is not shown: this run added up all micro-batches" in text
    figures, text = shown(50e6, accumulation=4)
    assert figures == ["10", "50"]
    assert "What is saved is not shown" not in text
    assert shown(51e6, accumulation=1)[0] == ["10", "51"]


def test_the_chart_has_a_group_a_run_and_the_stored_bytes(tmp_path):
    figure = models_chart(stored_runs(tmp_path))
    memory = figure.axes[2]
    values = {name: [] for _, name in MEMORY}
    for dots in memory.collections:
        if dots.get_label() in values:
            values[dots.get_label()] += [x for x, _ in dots.get_offsets().tolist()]
    assert values == {
        "parameters and optimizer": [100.0] * 3,
        "saved for the backward": [20.0, 20.0, 20.0, 30.0],
        "peak": [150.0, 150.0, 170.0, 150.0],
    }
    headings = [text.get_text() for text in figure.texts if "eager" in text.get_text()]
    assert headings == [
        "ViT-B/32, fp32, eager, batch 32",
        "ViT-B/32, fp32, eager, batch 32 in 4 micro-batches",
        "RoBERTa-base, fp32, eager, batch 16, activation checkpointing",
    ]


def test_the_papers_table_stands_by_itself_and_the_page_links_the_chart(tmp_path):
    for number, stored in enumerate(stored_runs(tmp_path)):
        rows = [{**row, "held_bytes": None} for row in stored.rows]
        timing.write_result(tmp_path / "results" / f"table4-{number}.json", ENVIRONMENT, rows, Table4Row)
    (tmp_path / "README.md").touch()
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    markers = ("measured:table4", "measured:models")
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in markers), encoding="utf-8")
    options = ["--root", str(tmp_path), "--results", str(tmp_path / "results")]
    assert render.main(options) == 0
    papers, others = page.read_text(encoding="utf-8").split("<!-- /measured:table4 -->")
    assert "micro-batches" not in papers
    assert "RoBERTa" not in papers
    assert "| naive LoRA" in papers
    assert "![models](../results/models.svg)" in others
    assert (tmp_path / "results" / "models.svg").read_text(encoding="utf-8").count("RoBERTa-base") == 1
    assert render.main([*options, "--check"]) == 0


def test_the_page_describes_the_models_as_they_are():
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| `") and line.count("|") == 6]
    lines = [line for line in lines if "--model" not in line[0]]
    assert [line[0] for line in lines] == [f"| `{option}`" for option in MODELS]
    for line, model in zip(lines, MODELS.values(), strict=True):
        ranks = ("+".join(str(r) for r in model.ranks[kind] if r) for kind in ("hydra", "lora", "seqlora"))
        assert line[-1] == f"{', '.join(ranks)} |"
        for cell, size in zip(line[1:3], (model.gpu, model.cpu), strict=True):
            assert re.search(rf"\b{size.batch} (images|sequences)", cell)
            assert size.length is None or f"{size.length:,}" in cell or "sequences" in line[1]
        with torch.device("meta"):
            large, small = (models.build(model, size).config for size in (model.gpu, model.cpu))
        assert f"{large.num_hidden_layers} layers of {large.hidden_size}/{large.intermediate_size}" in line[1]
        assert "the same" in line[2] or f"{small.num_hidden_layers} " in line[2]

"""The benchmark's own honesty: its data, its arithmetic, its memory figures, and that parity fails when it must."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import render, table4
from benchmarks.measuring import images, methods, models, table4_settings, timing
from benchmarks.measuring.methods import Contestant, ParityError, Ranks
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.timing import Environment
from benchmarks.rendering import table4 as render_table4
from benchmarks.rendering.tables import Stored

from .emulated import emulate_graphs

CPU = torch.device("cpu")
VIT = models.MODELS["vit-b/32"]
FP32 = methods.TOLERANCES["fp32"]
RANKS = {"lora": Ranks(4, 0), "seqlora": Ranks(0, 11), "hydra": Ranks(3, 2)}
PAIRS = [("naive_lora", "ours_lora"), ("naive_seqlora", "ours_seqlora"), ("naive_hydra", "ours_hydra")]


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return models.build(VIT, VIT.dry)


def contestants_of(base: nn.Module, *names: str) -> dict[str, Contestant]:
    made = {
        name: Contestant.of(name, methods.build(base, name, RANKS, target=VIT.target, head="classifier", seed=1))
        for name in names
    }
    for name, contestant in made.items():
        if partner := methods.naive_of(name):
            methods.copy_state(made[partner], contestant)
    return made


def batches_of(count: int, size: int = 8):
    pictures = images.digits()
    for indices in images.index_batches(len(pictures.labels), size, count * size, seed=2):
        yield pictures.batch(indices, 224, CPU, torch.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 11])
def test_quartiles_and_paired_ratios_are_numpys(count):
    draw = np.random.default_rng(count)
    times, baseline = draw.uniform(1, 2, count), draw.uniform(1, 2, count)
    assert timing.quartiles(times.tolist()) == pytest.approx(np.percentile(times, [25, 50, 75]))
    expected = np.percentile(times / baseline, [25, 50, 75])
    assert timing.paired_ratios(times.tolist(), baseline.tolist()) == pytest.approx(expected)


def test_statistics_of_nothing_or_of_unpaired_rounds_are_refused():
    with pytest.raises(ValueError, match="empty"):
        timing.quartiles([])
    with pytest.raises(ValueError, match="2 rounds and baseline 1"):
        timing.paired_ratios([1.0, 2.0], [1.0])


def test_rounds_are_shuffled_complete_and_repeatable():
    names = ["a", "b", "c", "d"]
    rounds = list(timing.shuffled_rounds(names, 200, seed=3))
    assert all(sorted(order) == names for order in rounds)
    assert rounds == list(timing.shuffled_rounds(names, 200, seed=3))
    assert rounds != list(timing.shuffled_rounds(names, 200, seed=4))
    for place in range(4):
        counts = [sum(order[place] == name for order in rounds) for name in names]
        # 50 expected, standard deviation 6.1.
        assert min(counts) > 25, (place, counts)


def test_a_round_gives_every_method_the_same_batch_in_the_given_order():
    seen = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step(self, pixels, labels):
            seen.append((self.name, pixels, labels))

    players = {name: Recorder(name) for name in ("a", "b", "c")}
    for order in timing.shuffled_rounds(list(players), 5, seed=0):
        seen.clear()
        batch = (torch.randn(2), torch.randn(2))
        seconds = table4.play_round(players, order, batch, CPU)
        assert [name for name, _, _ in seen] == order == list(seconds)
        assert all(pixels is batch[0] and labels is batch[1] for _, pixels, labels in seen)
        assert all(taken > 0 for taken in seconds.values())


def test_saved_bytes_match_a_count_by_hand():
    x = torch.randn(5, 7, requires_grad=True)
    weight = nn.Parameter(torch.randn(3, 7))

    def run():
        # Saved: x (5*7) and weight for the product; the sigmoid's output (5*3), once, though its square saves it again.
        out = torch.sigmoid(x @ weight.t())
        (out * out).sum().backward()

    assert timing.saved_bytes(run, [weight]) == 4 * (5 * 7 + 5 * 3)
    assert timing.saved_bytes(run, []) == 4 * (5 * 7 + 5 * 3 + 3 * 7)


def test_saved_bytes_count_the_whole_storage_behind_a_saved_view():
    whole = torch.randn(100)
    weight = nn.Parameter(torch.randn(10))
    assert timing.saved_bytes(lambda: (whole[:10] * weight).sum().backward(), [weight]) == 400


def test_saved_bytes_are_those_of_the_largest_micro_batch():
    weight = nn.Parameter(torch.randn(3, 7))
    parts = [torch.randn(rows, 7) for rows in (4, 6, 2)]

    def run():
        for x in parts:
            torch.sigmoid(x @ weight.t()).sum().backward()

    # Of six rows x (7) and the sigmoid's output (3).
    assert timing.saved_bytes(run, [weight]) == 4 * 6 * (7 + 3)
    # Two graphs that live at one time count together, a graph that is dropped unused no longer.
    both = []
    assert timing.saved_bytes(lambda: both.extend(torch.sigmoid(x @ weight.t()) for x in parts[:2]), [weight]) == (
        4 * (4 + 6) * (7 + 3)
    )
    assert timing.saved_bytes(lambda: [torch.sigmoid(x @ weight.t()) is None for x in parts], [weight]) == 4 * 6 * 10


def test_the_peak_on_a_cpu_matches_a_count_by_hand():
    kept = []

    def run():
        first, second = torch.empty(1000), torch.empty(2000)
        del first
        third = torch.empty(1500)
        kept.append(torch.empty(10))
        del second, third
        kept.append(torch.empty(20))

    # At most 2000 + 1500 + 10 floats at once.
    assert timing.peak_bytes(run, CPU) == 4 * 3510
    assert len(kept) == 2


def test_the_peak_needs_an_allocation_to_speak_of():
    with pytest.raises(RuntimeError, match="no allocation"):
        timing.peak_bytes(lambda: None, CPU)


def test_held_bytes_are_parameters_and_adams_state():
    model = nn.Linear(7, 3)
    model.weight.requires_grad_(False)
    contestant = Contestant.of("naive_lora", model)
    model(torch.randn(2, 7)).sum().backward()
    assert contestant.held_bytes() == 4 * (7 * 3 + 3)
    contestant.optimizer.step()
    # The bias has two moments and a step count of 4 bytes.
    assert contestant.held_bytes() == 4 * (7 * 3 + 3) + 4 * (2 * 3) + 4


def test_methods_share_the_frozen_backbone_and_train_what_the_paper_trains(base):
    made = contestants_of(base, *methods.METHODS)
    K, N, layers = 64, 32, 2
    sizes = {
        "lora": 4 * (K + 1) + N * (4 + 1),
        "seqlora": 11 * (N + 1) + N * (11 + 1),
        "hydra": 3 * (K + 1) + N * (3 + 1) + 2 * (N + 1) + N * (2 + 1),
    }
    whole = sum(parameter.numel() for parameter in base.parameters())
    head = 10 * N + 10
    backbone = {name: parameter for name, parameter in base.named_parameters() if not name.startswith("classifier")}
    for name, contestant in made.items():
        own = dict(contestant.model.named_parameters())
        shared = [own[key] is parameter for key, parameter in backbone.items()]
        assert not any(shared) if name == "full_tuning" else all(shared)
        trained = sum(parameter.numel() for parameter in contestant.trainable().values())
        adapters = layers * sizes.get(name.partition("_")[2], 0)
        assert trained == (whole if name == "full_tuning" else adapters + head), name
        assert own["classifier.weight"] is not base.classifier.weight
        assert torch.equal(own["classifier.weight"], base.classifier.weight)


@pytest.mark.parametrize("kind", ["lora", "seqlora", "hydra"])
def test_naive_is_the_papers_algebra(kind):
    torch.manual_seed(5)
    linear = nn.Linear(6, 4, dtype=torch.float64)
    layer = methods.NAIVE[kind](linear, RANKS[kind])
    assert layer.weight is linear.weight
    for name, parameter in layer.named_parameters():
        if name[:2] in ("A_", "B_"):
            nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y0 = x @ linear.weight.t() + linear.bias
    expected = y0
    if kind != "seqlora":
        expected = expected + (x @ layer.A_down.t() + layer.A_down_bias) @ layer.A_up.t() + layer.A_up_bias
    if kind != "lora":
        expected = expected + (y0 @ layer.B_down.t() + layer.B_down_bias) @ layer.B_up.t() + layer.B_up_bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_build_refuses_an_unknown_method_and_a_target_that_is_not_there(base):
    with pytest.raises(ValueError, match="'adalora'"):
        methods.build(base, "adalora", RANKS, target=VIT.target, head="classifier", seed=0)
    with pytest.raises(ValueError, match=r"mlp.*fc9"):
        methods.build(base, "naive_lora", RANKS, target=r".*\.mlp\.fc9", head="classifier", seed=0)


@pytest.mark.parametrize("pair", PAIRS)
def test_ours_passes_and_every_round_starts_equal(base, pair):
    made = contestants_of(base, *pair)
    naive, ours = (made[name] for name in pair)
    for batch in batches_of(3):
        for contestant in made.values():
            contestant.step(*batch)
        difference = methods.settle(made, FP32)[ours.method]
        assert difference.gradient < FP32.gradient
        assert difference.tensor in naive.trainable()
        for name, parameter in naive.trainable().items():
            twin = ours.trainable()[name]
            assert twin is not parameter
            assert torch.equal(twin, parameter)
            state, twin_state = naive.optimizer.state[parameter], ours.optimizer.state[twin]
            assert state.keys() == twin_state.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(state[key], twin_state[key]) for key in state)


@pytest.mark.parametrize("pair", PAIRS)
def test_parity_fails_for_any_one_wrong_gradient_from_the_first_step_on(base, pair):
    made = contestants_of(base, *pair)
    batch = next(batches_of(1))
    for contestant in made.values():
        contestant.step(*batch)
    naive, ours = (made[name] for name in pair)
    for victim, parameter in ours.trainable().items():
        right = parameter.grad
        for factor in (0.99, 0.9999, 1.01, -1.0, float("nan")):
            parameter.grad = right * factor
            with pytest.raises(ParityError, match=rf"{pair[1]}: the gradient of {victim} differs from {pair[0]}"):
                methods.compare(ours, naive, FP32)
        for nothing in (torch.zeros_like(right), None):
            parameter.grad = nothing
            with pytest.raises(ParityError, match=rf"{pair[1]}: the gradient of {victim} is missing or zero"):
                methods.compare(ours, naive, FP32)
        parameter.grad = right
    methods.compare(ours, naive, FP32)
    # Two equal gradients of zero prove nothing.
    for contestant in made.values():
        contestant.trainable()["vit.layers.0.mlp.fc2." + ("B" if "seq" in pair[0] else "A") + "_down"].grad.zero_()
    with pytest.raises(ParityError, match=rf"{pair[0]}: the gradient of vit\.layers\.0\S+ is missing or zero"):
        methods.compare(ours, naive, FP32)


def test_parity_fails_for_another_loss_and_for_other_parameters(base):
    made = contestants_of(base, "naive_hydra", "ours_hydra")
    batch = next(batches_of(1))
    for contestant in made.values():
        contestant.step(*batch)
    ours, naive = made["ours_hydra"], made["naive_hydra"]
    right = ours.loss
    for loss in (right * (1 + 3e-5), right * float("nan")):
        ours.loss = loss
        with pytest.raises(ParityError, match="ours_hydra: loss differs"):
            methods.compare(ours, naive, FP32)
    ours.loss = right
    methods.compare(ours, naive, FP32)
    ours.model.classifier.bias.requires_grad_(False)
    with pytest.raises(ParityError, match=r"not train the same parameters: \['classifier\.bias'\]"):
        methods.compare(ours, naive, FP32)


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, in which CIFAR-10 was pickled."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, value):
        raw = value if isinstance(value, bytes) else value.encode("ascii")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_python2_string


def python2_pickle(value) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    # The module's name in numpy 1, with which the published files were written.
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.fixture
def cifar(tmp_path):
    """Both distributions of the same 5 x 4 images under tmp_path, and what they hold."""
    draw = np.random.default_rng(6)
    pixels = draw.integers(0, 256, (5, 4, 3072), dtype=np.uint8)
    labels = draw.integers(0, 10, (5, 4), dtype=np.uint8)
    python, binary = tmp_path / "py" / "cifar-10-batches-py", tmp_path / "bin" / "cifar-10-batches-bin"
    python.mkdir(parents=True)
    binary.mkdir(parents=True)
    for number in range(5):
        batch = {b"data": pixels[number], b"labels": labels[number].tolist(), b"batch_label": b"training batch"}
        (python / f"data_batch_{number + 1}").write_bytes(python2_pickle(batch))
        records = np.concatenate([labels[number][:, None], pixels[number]], axis=1)
        (binary / f"data_batch_{number + 1}.bin").write_bytes(records.tobytes())
    return python, binary, torch.from_numpy(pixels.reshape(20, 3, 32, 32)), torch.from_numpy(labels.reshape(20)).long()


def test_both_distributions_of_cifar10_are_read_back_equal(cifar):
    python, binary, pixels, labels = cifar
    for folder in (python, python.parent, binary, binary.parent):
        read = images.cifar10(folder, images_per_file=4)
        assert read.name == "CIFAR-10"
        assert torch.equal(read.pixels, pixels)
        assert torch.equal(read.labels, labels)


def test_arrays_pickled_by_todays_python_are_read_too(cifar):
    python, _, pixels, _ = cifar
    batch = {b"data": pixels[:4].reshape(4, 3072).numpy(), b"labels": [1, 2, 3, 4]}
    (python / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=4))
    assert torch.equal(images.cifar10(python, images_per_file=4).pixels, pixels)


def test_a_pickle_that_calls_anything_else_is_refused_and_not_run(cifar, tmp_path):
    python, *_ = cifar
    marker = tmp_path / "was_run"

    class Foreign:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    content = pickle.dumps({b"data": Foreign(), b"labels": []}, protocol=4)
    (python / "data_batch_3").write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_3.*posix\.mkdir|data_batch_3.*nt\.mkdir"):
        images.cifar10(python, images_per_file=4)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "the pickle would not have done anything: the test proves nothing"


def test_missing_and_damaged_folders_are_named(cifar, tmp_path):
    python, binary, *_ = cifar
    with pytest.raises(ValueError, match="holds no CIFAR-10"):
        images.cifar10(tmp_path)
    with pytest.raises(ValueError, match=r"expected uint8 \(10000, 3072\)"):
        images.cifar10(python)
    name = binary / "data_batch_2.bin"
    content = name.read_bytes()
    name.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 12291 bytes"):
        images.cifar10(binary, images_per_file=4)
    name.write_bytes(content[3073:])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin holds pixels uint8 \(3, 3072\)"):
        images.cifar10(binary, images_per_file=4)
    name.write_bytes(bytes([10]) + content[1:])
    with pytest.raises(ValueError, match=r"data_batch_2\.bin holds labels"):
        images.cifar10(binary, images_per_file=4)
    name.unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_2\.bin"):
        images.cifar10(binary, images_per_file=4)
    cut = python / "data_batch_5"
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(ValueError, match="data_batch_5 is not a CIFAR-10 batch"):
        images.cifar10(python, images_per_file=4)


def test_digits_are_real_and_enlarged_and_normalised():
    pictures = images.load(None)
    assert pictures.pixels.shape == (1797, 3, 8, 8)
    assert sorted(set(pictures.labels.tolist())) == list(range(10))
    pixels, labels = pictures.batch(torch.tensor([0, 5]), 224, CPU, torch.float32)
    assert pixels.shape == (2, 3, 224, 224)
    assert pixels.min().item() == pytest.approx(-1, abs=1e-6)
    assert 0.9 < pixels.max() <= 1 + 1e-6
    assert labels.tolist() == [0, 5]
    # A corner of the enlarged image is the corner of the small one.
    assert pixels[0, 0, 0, 0] == pictures.pixels[0, 0, 0, 0] / 127.5 - 1


def test_an_epoch_shows_every_image_once_and_ends_exactly():
    batches = list(images.index_batches(images=10, batch_size=4, total=20, seed=1))
    assert [len(batch) for batch in batches] == [4] * 5
    order = torch.cat(batches)
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()
    assert [len(batch) for batch in images.index_batches(100, 8, 20, seed=1)] == [8, 8, 4]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert table4.main(["--dry", "--steps", "3", "--batch-size", "4", "--out", str(out)]) == 0
    return out / "table4-dry-cpu-fp32.json"


def test_the_command_stores_what_it_measured(dry_run):
    environment, rows = timing.read_result(dry_run, Table4Row)
    assert environment["torch"] == torch.__version__
    assert [row["method"] for row in rows] == list(methods.METHODS)
    naive_lora = rows[2]
    for row in rows:
        assert row["dry"]
        assert row["projected"]
        assert row["data"] == "digits"
        assert row["steps"] == len(row["step_seconds"]) == 3
        epochs = np.percentile(np.array(row["step_seconds"]) * 50_000 / 4, [25, 50, 75])
        assert [row["q1"], row["sec_per_epoch"], row["q3"]] == pytest.approx(epochs, rel=1e-3)
        ratios = np.array(row["step_seconds"]) / np.array(naive_lora["step_seconds"])
        expected = np.percentile(ratios, [25, 50, 75])
        assert [row["ratio_q1"], row["ratio"], row["ratio_q3"]] == pytest.approx(expected, rel=1e-3)
        assert (row["parity"] is not None) == row["method"].startswith("ours_")
        if row["parity"]:
            assert row["parity"]["gradient"] < row["parity"]["allowed"]["gradient"] == FP32.gradient
    assert rows[-1]["paper_ratio"] == pytest.approx(1.034, abs=5e-4)
    assert sorted(dry_run.parent.iterdir()) == [dry_run]


@pytest.mark.slow
def test_in_mode_compile_whole_models_are_compiled_before_anything_is_measured(tmp_path, monkeypatch):
    measure, seen = table4.measure, []

    def spy(contestants, *arguments):
        assert all(contestant.model._compiled_call_impl is not None for contestant in contestants.values())
        naive, ours = contestants.values()
        for name, parameter in naive.trainable().items():
            assert torch.equal(parameter, ours.trainable()[name]), name
        seen.append(counters["stats"]["unique_graphs"])
        measured = measure(contestants, *arguments)
        seen.append(counters["stats"]["unique_graphs"])
        return measured

    monkeypatch.setattr(table4, "measure", spy)
    counters.clear()
    arguments = ["--dry", "--mode", "compile", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    assert table4.main([*arguments, "--methods", "naive_hydra,ours_hydra", "--out", str(tmp_path)]) == 0
    assert seen == [2, 2]
    _, rows = timing.read_result(tmp_path / "table4-dry-cpu-fp32-compile.json", Table4Row)
    assert [(row["mode"], row["dry"], row["steps"]) for row in rows] == [("compile", True, 2)] * 2
    assert 0 < rows[1]["parity"]["gradient"] < FP32.gradient


def test_a_dry_run_in_mode_graph_goes_through_on_a_cpu_and_says_so(tmp_path):
    arguments = ["--dry", "--mode", "graph", "--steps", "2", "--batch-size", "4", "--methods", "naive_hydra,ours_hydra"]
    assert table4.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    _, rows = timing.read_result(tmp_path / "table4-dry-cpu-fp32-graph.json", Table4Row)
    assert [(row["mode"], row["dry"], row["steps"]) for row in rows] == [("graph", True, 2)] * 2
    assert 0 < rows[1]["parity"]["gradient"] < FP32.gradient


def test_replays_of_a_step_train_as_eager_steps_do(base, monkeypatch):
    emulate_graphs(monkeypatch)
    made = contestants_of(base, "naive_hydra", "ours_hydra")
    naive, ours = made.values()
    first, *others = batches_of(4)
    replayed = table4.Replayed(ours, first, torch.device("cuda"))
    naive.step(*first)
    methods.start_equal(made)
    losses = []
    for batch in others:
        naive.step(*batch)
        replayed.step(*batch)
        losses.append(ours.loss.item())
        methods.settle(made, FP32)
    assert len(set(losses)) == len(others)


def test_a_mode_of_one_batch_size_needs_an_epoch_of_whole_batches(tmp_path, capsys):
    for mode in ("compile", "graph"):
        assert table4.main(["--dry", "--full", "--mode", mode, "--batch-size", "128", "--out", str(tmp_path)]) == 1
        assert "batch-size is 128, which leaves the epoch a smaller last batch" in capsys.readouterr().err
    assert table4.settings_of(["--dry", "--full", "--mode", "graph", "--batch-size", "125"])[0].steps == 400


def test_mode_graph_without_a_gpu_is_for_dry_runs(tmp_path, capsys):
    assert table4.main(["--device", "cpu", "--mode", "graph", "--out", str(tmp_path)]) == 1
    assert "mode is 'graph': it needs a GPU" in capsys.readouterr().err


def test_a_parity_failure_ends_the_command_with_nothing_printed_or_stored(tmp_path, monkeypatch, capsys):
    build = methods.build

    def build_wrong(base, method, *args, **kwargs):
        model = build(base, method, *args, **kwargs)
        if method == "ours_hydra":
            model.get_parameter("vit.layers.1.mlp.fc2.B_down").register_hook(lambda gradient: gradient * 0.99)
        return model

    monkeypatch.setattr(methods, "build", build_wrong)
    assert table4.main(["--dry", "--steps", "1", "--batch-size", "4", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "ours_hydra: the gradient of vit.layers.1.mlp.fc2.B_down differs from naive_hydra by" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_bf16_runs_and_its_bound_still_catches_a_wrong_gradient(base):
    made = contestants_of(base.to(torch.bfloat16), "naive_hydra", "ours_hydra")
    pixels, labels = next(batches_of(1))
    for contestant in made.values():
        contestant.step(pixels.bfloat16(), labels)
    tolerance = methods.TOLERANCES["bf16"]
    ours, naive = made["ours_hydra"], made["naive_hydra"]
    methods.compare(ours, naive, tolerance)
    for parameter in ours.trainable().values():
        right = parameter.grad
        # A bias of a few elements is measured by its kind over the layers: 0.7 of a small one may pass.
        for factor in (0.0, -1.0) if parameter.numel() <= methods.FEW_ELEMENTS else (0.0, -1.0, 0.7):
            parameter.grad = factor * right
            with pytest.raises(ParityError):
                methods.compare(ours, naive, tolerance)
        parameter.grad = right


def test_a_whole_epoch_is_summed_and_its_last_batch_is_what_is_left(tmp_path, monkeypatch):
    for module in (table4, table4_settings):
        monkeypatch.setattr(module, "EPOCH", 22)
    arguments = ["--dry", "--full", "--batch-size", "8", "--methods", "naive_lora", "--out", str(tmp_path)]
    assert table4.main(arguments) == 0
    _, [row] = timing.read_result(tmp_path / "table4-dry-cpu-fp32.json", Table4Row)
    taken = np.array(row["step_seconds"])
    assert row["steps"] == len(taken) == 3
    assert row["sec_per_epoch"] == pytest.approx(taken.sum(), rel=1e-3)
    expected = np.percentile(taken * 22 / np.array([8, 8, 6]), [25, 75])
    assert [row["q1"], row["q3"]] == pytest.approx(expected, rel=1e-3)
    # A batch below the paper's stays a projection of it, whole epoch or not.
    assert row["projected"]


def test_the_time_limit_stops_after_a_counted_round(tmp_path, capsys):
    arguments = ["--dry", "--steps", "50", "--batch-size", "2", "--methods", "naive_lora", "--time-limit", "0"]
    assert table4.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "Stopped by the time limit after 1 counted rounds" in capsys.readouterr().err
    _, [row] = timing.read_result(tmp_path / "table4-dry-cpu-fp32.json", Table4Row)
    assert row["steps"] == 1


def test_a_local_checkpoint_is_used_and_named(base, tmp_path):
    with torch.no_grad():
        base.vit.layers[0].mlp.fc1.bias.fill_(0.5)
    base.save_pretrained(tmp_path / "tiny-vit")
    loaded = models.build(VIT, VIT.dry, tmp_path / "tiny-vit")
    for name, parameter in base.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "ours_lora"], "ours_lora needs naive_lora"),
        (["--methods", "naive_lora,qlora"], "'qlora'"),
        (["--ranks", "hydra=3"], "'hydra=3'"),
        (["--ranks", "lora=0"], "'lora=0'"),
        (["--steps", "0"], "steps is 0"),
        (["--batch-size", "-1"], "batch-size is -1"),
        (["--accumulation", "0"], "accumulation is 0"),
        (["--accumulation", "3", "--batch-size", "8"], "accumulation is 3, expected a divisor of the batch, 8"),
        (["--model", "llama", "--data", "some_folder"], "data is some_folder, but the model reads text"),
        (["--model", "llama", "--checkpoint", "some_folder"], "checkpoint is some_folder, which only a ViT reads"),
        (["--full", "--steps", "3"], "steps is 3"),
        (["--device", "tpu"], "'tpu'"),
        (["--data", "no_such_folder"], "no_such_folder"),
        (["--checkpoint", "no_such_folder"], "no_such_folder"),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path, capsys):
    assert table4.main(["--dry", "--out", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ranks_are_read_by_kind_and_the_others_keep_their_default():
    assert table4_settings.ranks_option("hydra=2+8,seqlora=5", VIT.ranks) == {
        "lora": Ranks(4, 0),
        "seqlora": Ranks(0, 5),
        "hydra": Ranks(2, 8),
    }


@pytest.fixture
def published(dry_run, tmp_path):
    """A folder of results as if the dry run had been a real one, and a page with markers."""
    environment, rows = timing.read_result(dry_run, Table4Row)
    results = tmp_path / "results"
    rows = [{**row, "dry": False, "model": models.PAPER_MODEL} for row in rows]
    timing.write_result(results / "table4-cpu-fp32.json", environment, rows, Table4Row)
    (tmp_path / "README.md").touch()
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    markers = "before\n<!-- measured:table4 -->\nold\n<!-- /measured:table4 -->\nafter\n"
    page.write_text(f"{markers}<!-- measured:models -->\n<!-- /measured:models -->\n", encoding="utf-8")
    return page, results, environment, rows


def test_render_writes_between_the_markers_and_check_sees_what_is_stale(published, capsys):
    page, results, environment, rows = published
    arguments = ["--root", str(page.parents[1]), "--results", str(results)]
    assert render.main([*arguments, "--check"]) == 1
    assert "old" in page.read_text(encoding="utf-8")
    assert render.main(arguments) == 0
    text, after = page.read_text(encoding="utf-8").split("\n<!-- /measured:table4 -->\n")
    assert text.startswith("before\n<!-- measured:table4 -->\n**fp32, eager, batch 4**\n\n| method |")
    assert after.startswith("after\n")
    assert "old" not in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + len(rows)
    for fact in ("Machine 1", environment["date"][:10], "digits", "projected"):
        assert fact in text
    assert f"| our Hydra 3+3 | {rows[-1]['trainable'] / 1e6:#.3g} |" in text
    over_own = np.median(np.array(rows[-1]["step_seconds"]) / np.array(rows[4]["step_seconds"]))
    mark = " ▲" if over_own > 1 else ""
    assert text.split("| our Hydra 3+3 |")[1].split(" | ")[5].startswith(f"{over_own:.2f}{mark} (")
    assert render.main([*arguments, "--check"]) == 0
    changed = [{**row, "ratio": 2.5} for row in rows]
    timing.write_result(results / "table4-cpu-fp32.json", environment, changed, Table4Row)
    assert render.main([*arguments, "--check"]) == 1


def test_only_a_whole_epoch_stands_beside_the_papers_seconds(published):
    *_, environment, rows = published
    file = Stored(None, environment, rows)
    assert "119.37" not in render_table4.table4_markdown(file, rows)
    whole = [{**row, "projected": False} for row in rows]
    text = render_table4.table4_markdown(file, whole)
    assert "119.37" in text
    assert "projected" not in text


def test_render_refuses_dry_rows_and_bad_files(dry_run, published, capsys):
    page, results, environment, rows = published
    before = page.read_text(encoding="utf-8")
    arguments = ["--root", str(page.parents[1]), "--results", str(results)]
    (results / "table4-dry.json").write_text(dry_run.read_text(encoding="utf-8"), encoding="utf-8")
    assert render.main(arguments) == 2
    assert "table4-dry.json is from a dry run" in capsys.readouterr().err
    (results / "table4-dry.json").write_text("{}", encoding="utf-8")
    assert render.main(arguments) == 2
    assert "table4-dry.json is not a stored result" in capsys.readouterr().err
    lacking = {key: value for key, value in rows[0].items() if key != "peak_bytes"}
    stored = json.dumps({"environment": environment, "rows": [lacking]})
    (results / "table4-dry.json").write_text(stored, encoding="utf-8")
    assert render.main(arguments) == 2
    assert "missing ['peak_bytes']" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == before


def test_render_needs_its_markers(published, capsys):
    page, results, *_ = published
    page.write_text("<!-- /measured:table4 -->\n<!-- measured:table4 -->\n", encoding="utf-8")
    assert render.main(["--root", str(page.parents[1]), "--results", str(results)]) == 2
    assert "needs one" in capsys.readouterr().err


def test_a_result_that_is_incomplete_or_not_a_number_is_not_written(published, tmp_path):
    *_, environment, rows = published
    path = tmp_path / "new" / "table4.json"
    for bad in ([], [{**rows[0], "ratio": float("nan")}], [{**rows[0], "guess": 1}]):
        with pytest.raises(ValueError, match=r"no rows|JSON compliant|unknown \['guess'\]"):
            timing.write_result(path, environment, bad, Table4Row)
    with pytest.raises(ValueError, match=r"missing \['commit'\]"):
        timing.write_result(path, {k: v for k, v in environment.items() if k != "commit"}, rows, Table4Row)
    assert not path.parent.exists()


def test_the_environment_says_who_ran_and_nothing_about_where():
    environment = timing.environment(CPU)
    assert environment.keys() == Environment.__annotations__.keys()
    assert environment["device"]
    assert environment["driver"] is None
    text = json.dumps(environment)
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text

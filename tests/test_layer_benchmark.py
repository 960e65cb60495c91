"""The layer benchmark's honesty: its ranks, its pairs and rounds, its arithmetic, its losses, and parity that fails."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import layer, render, sweep
from benchmarks.layer import Bench, Contestant
from benchmarks.measuring import methods, modes, passes, shapes, timing
from benchmarks.measuring.methods import ParityError, Ranks
from benchmarks.measuring.passes import Inputs, Pass, Replay
from benchmarks.measuring.rows import LayerRow, SweepRow
from benchmarks.measuring.shapes import Entry, Shape, deadlines
from benchmarks.rendering import goals
from benchmarks.rendering import layer as render_layer
from benchmarks.rendering.tables import Stored

from .emulated import emulate_graphs

CPU = torch.device("cpu")
SMALL = Shape(5, 11, 7)
RANKS = {"hydra": Ranks(3, 2), "lora": Ranks(4, 0), "seqlora": Ranks(0, 3)}
ADAPTED = [name for name in methods.LAYER_METHODS if methods.naive_of(name) and not name.startswith("compiled")]


def settings_of(*arguments: str) -> layer.Settings:
    return layer.settings_of(["--device", "cpu", "--dry", *arguments])[0]


def step(method: str, linear: nn.Linear, x: torch.Tensor, G: torch.Tensor) -> dict[str, torch.Tensor]:
    made = methods.build_layer(linear, method, RANKS[method.rpartition("_")[2]], seed=3)
    return methods.layer_step(made, x, G)


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    return nn.Linear(11, 7, dtype=torch.float64), x, torch.randn(5, 7, dtype=torch.float64)


@pytest.mark.parametrize("method", ADAPTED)
def test_the_same_seed_gives_every_owner_the_function_of_the_naive_layer(method, problem):
    """PEFT's and ours: in float64 nothing but the weights could make a difference."""
    found, expected = step(method, *problem), step(methods.naive_of(method), *problem)
    assert expected.keys() >= {"the output", "the gradient of x"}
    assert len(expected) == (6 if method.endswith("hydra") else 4)
    worst, _ = methods.worst_difference(method, "naive", found, expected, 1e-13)
    assert worst < 1e-13
    frozen = problem[0](problem[1])
    assert (expected["the output"] - frozen).norm() > 1e-3 * frozen.norm()


def test_a_difference_of_one_in_a_hundred_thousand_is_no_parity(problem):
    linear, x, G = problem
    single = (linear.float(), x.detach().float().requires_grad_(), G.float())
    allowed = methods.LAYER_TOLERANCES[torch.float32]
    expected = step("naive_hydra", *single)
    methods.worst_difference("ours_hydra", "naive_hydra", step("ours_hydra", *single), expected, allowed)
    for name in expected:
        found = step("ours_hydra", *single)
        found[name] *= 1 - 1e-5
        with pytest.raises(ParityError, match=f"{name} differs from naive_hydra"):
            methods.worst_difference("ours_hydra", "naive_hydra", found, expected, allowed)
        with pytest.raises(ParityError, match=f"{name} is missing or zero"):
            methods.worst_difference("ours_hydra", "naive_hydra", {**found, name: None}, expected, allowed)


@pytest.mark.parametrize(
    ("mode", "method", "parameter"),
    [
        ("eager", "ours_hydra", "B_down"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("eager", "ours_hydra", "A_up"),
                ("eager", "ours_lora", "A_down"),
                ("eager", "ours_seqlora", "B_up"),
                ("compile", "ours_seqlora", "B_down"),
            )
        ),
        ("eager", "peft_lora", "lora_B.default.weight"),
        ("graph", "ours_hydra", "A_down"),
    ],
)
def test_a_gradient_scaled_by_099_ends_the_run_before_anything_is_timed(
    mode, method, parameter, tmp_path, monkeypatch, capsys
):
    build, played = methods.build_layer, []

    def build_wrong(linear, name, *args, **kwargs):
        made = build(linear, name, *args, **kwargs)
        if name == method:
            made.get_parameter(parameter).register_hook(lambda gradient: gradient * 0.99)
        return made

    monkeypatch.setattr(layer, "play", lambda *_: played.append(1))
    monkeypatch.setattr(methods, "build_layer", build_wrong)
    # Not even asked for, the naive layer is what the method is compared with.
    arguments = ["--device", "cpu", "--dry", "--mode", mode, "--methods", f"frozen,{method}"]
    assert layer.main([*arguments, "--out", str(tmp_path / "o")]) == 1
    printed = capsys.readouterr()
    assert f"{method}: the gradient of" in printed.err
    assert f"differs from {methods.naive_of(method)} by 1.00e-02" in printed.err
    assert printed.out == ""
    assert not played
    assert not (tmp_path / "o").exists()


def test_equal_parameters_are_the_design_s_at_fc2():
    fc2 = Shape(6400, 3072, 768)
    assert shapes.trainable(fc2, Ranks(8, 8)) == 43_008
    near = shapes.equal_parameters(fc2, Ranks(8, 8))
    assert near == {"lora": Ranks(11, 0), "seqlora": Ranks(0, 28)}
    assert [shapes.trainable(fc2, ranks) for ranks in near.values()] == [42_240, 43_008]


@pytest.mark.parametrize("shape", [*shapes.CPU_SHAPES, *shapes.CUDA_SHAPES, *shapes.DRY_SHAPES, SMALL], ids=str)
@pytest.mark.parametrize("hydra", [Ranks(2, 2), Ranks(4, 8), Ranks(8, 8), Ranks(1, 32), Ranks(0, 1)], ids=str)
def test_no_other_rank_comes_nearer_to_hydras_parameters(shape, hydra):
    wanted = shapes.trainable(shape, hydra)
    for kind, ranks in shapes.equal_parameters(shape, hydra).items():
        distances = {
            r: abs(shapes.trainable(shape, Ranks(r, 0) if kind == "lora" else Ranks(0, r)) - wanted)
            for r in range(1, 200)
        }
        assert distances[sum(ranks)] == min(distances.values())


@pytest.mark.parametrize("method", [*ADAPTED, "naive_hydra", "naive_lora", "naive_seqlora", "frozen"])
def test_the_count_of_trainable_parameters_is_the_layers(method):
    ranks = RANKS.get(method.rpartition("_")[2], Ranks(0, 0))
    made = methods.build_layer(nn.Linear(11, 7), method, ranks, seed=0)
    counted = sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad)
    assert counted == shapes.trainable(SMALL, ranks)


def test_a_rank_that_is_equal_in_both_ways_is_measured_once():
    names = methods.measured_in("eager", "fp32", methods.LAYER_METHODS)
    assert set(methods.LAYER_METHODS) - set(names) == {"autocast_lora"}
    square = shapes.entries_of(Shape(64, 768, 768), Ranks(8, 8), names)
    assert [entry.method for entry in square] == names
    assert {entry.pair for entry in square[1:]} == {"both"}
    entries = shapes.entries_of(Shape(64, 3072, 768), Ranks(8, 8), ["frozen", "naive_hydra", "naive_lora", "peft_lora"])
    assert entries == [
        Entry("frozen", Ranks(0, 0), None),
        Entry("naive_hydra", Ranks(8, 8), "both"),
        Entry("naive_lora", Ranks(16, 0), "rank"),
        Entry("naive_lora", Ranks(11, 0), "parameters"),
        Entry("peft_lora", Ranks(16, 0), "rank"),
    ]
    assert [entry.names() for entry in entries[2:4]] == [("naive_lora",), ("naive_lora@parameters",)]
    assert square[2].names() == ("naive_lora", "naive_lora@parameters")


def test_with_lora_dropout_pefts_layer_and_ours_drop_and_are_proved_without_it(tmp_path):
    arguments = ["--dtype", "bf16", "--lora-dropout", "0.25", "--dry", "--rounds", "3", "--device", "cpu"]
    arguments += ["--methods", "naive_lora,ours_lora,peft_lora,autocast_lora", "--out", str(tmp_path)]
    assert layer.main(arguments) == 0
    _, rows = timing.read_result(tmp_path / "layer-dry-cpu-bf16-dropout0.25.json", LayerRow)
    assert {row["dropout"] for row in rows} == {0.25}
    assert all(row["parity"]["difference"] < 8e-3 for row in rows if not row["method"].startswith("naive"))
    settings, _ = layer.settings_of(arguments)
    bench = Bench(settings.shapes[0], settings)
    for method in ("ours_lora", "peft_lora", "autocast_lora"):
        made = bench.prepare(Entry(method, Ranks(16, 0), "rank"))
        dropped, expected = made.passes[0].step(), bench.expected("naive_lora", Ranks(16, 0))
        with pytest.raises(methods.ParityError):
            methods.worst_difference(method, "naive_lora", dropped, expected, 8e-3)
    for options, message in ((["0.1", "--mode", "compile"], "mode eager"), (["1"], "less than 1")):
        with pytest.raises(ValueError, match=f"lora-dropout.*{message}"):
            layer.settings_of(["--dry", "--device", "cpu", "--lora-dropout", *options])


def contestant(name: str, forward: np.ndarray, backward: np.ndarray) -> Contestant:
    samples = list(zip(forward.tolist(), backward.tolist(), strict=True))
    entry = Entry(name, RANKS.get(name.rpartition("_")[2], Ranks(0, 0)), None if name == "frozen" else "both")
    return Contestant(entry, nn.Identity(), samples=samples)


def test_ratios_are_of_paired_rounds():
    draw = np.random.default_rng(1)
    # Rounds that differ tenfold, as on a busy machine: only pairs know that ours takes 0.9 of naive.
    forward, backward = draw.uniform(1, 10, 21), draw.uniform(1, 10, 21)
    rivals = {
        "frozen": contestant("frozen", draw.uniform(1, 10, 21), draw.uniform(1, 10, 21)),
        "naive_hydra": contestant("naive_hydra", forward, backward),
        "compiled_lora": contestant("compiled_lora", forward[::-1], backward[::-1]),
    }
    ours = contestant("ours_hydra", 0.9 * forward, 0.9 * backward)
    settings = settings_of()
    for phase, taken in (("forward", forward), ("backward", backward), ("step", forward + backward)):
        row = layer.row_of(SMALL, RANKS["hydra"], ours.entry, ours, rivals, phase, settings)
        assert row["over"].keys() == rivals.keys()
        assert row["over"]["naive_hydra"] == [0.9, 0.9, 0.9]
        assert row["over"]["compiled_lora"] == pytest.approx(
            np.percentile(0.9 * taken / taken[::-1], [25, 50, 75]), abs=5e-5
        )
        assert [row["q1_us"], row["median_us"], row["q3_us"]] == pytest.approx(
            np.percentile(0.9e6 * taken, [25, 50, 75]), abs=5e-4
        )
        assert row["runs"] == 21
    lora = contestant("ours_lora", forward, backward)
    row = layer.row_of(SMALL, RANKS["hydra"], lora.entry, lora, rivals, "step", settings)
    assert row["over"].keys() == {"frozen", "naive_hydra", "compiled_lora"}
    naive = rivals["naive_hydra"]
    row = layer.row_of(SMALL, RANKS["hydra"], naive.entry, naive, rivals, "step", settings)
    assert row["over"].keys() == {"frozen", "naive_hydra"}


def test_a_sample_takes_cold_inputs_in_turn_and_times_fresh_gradients(monkeypatch):
    bench = Bench(SMALL, settings_of())
    # 5*(11+7) floats are 360 bytes: as many copies as are ever taken. Large inputs need no more than two.
    assert len(bench.inputs.buffers) == 64
    assert timing.cold_copies(1 << 30, CPU) == 2
    assert 9 * timing.cold_copies(1 << 20, CPU) > 9 * 2 * timing.CPU_L2_BYTES / (1 << 20) - 9
    made = bench.build("ours_hydra", RANKS["hydra"])
    seen = []

    def record(module, arguments):
        x = arguments[0]
        gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
        assert all(gradient is None for gradient in gradients)
        seen.append(x.data_ptr())

    made.register_forward_pre_hook(record)
    laps = iter([[1.0, 10.0, 500.0, 2.0, 20.0, 700.0, 6.0, 60.0]])
    monkeypatch.setattr(timing.Stopwatch, "laps", lambda self: next(laps))
    assert bench.sample([Pass(made, x, G) for x, G in bench.inputs.buffers], 3) == (3.0, 30.0)
    assert len(set(seen)) == 3
    assert all(x.grad is None for x, _ in bench.inputs.buffers)


def test_laps_are_the_time_between_marks(monkeypatch):
    clock = iter([1.0, 1.5, 4.0])
    watch = timing.Stopwatch(CPU)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    for _ in range(3):
        watch.mark()
    assert watch.laps() == [0.5, 2.5]


def test_a_sample_of_a_tiny_shape_lasts_two_milliseconds(monkeypatch):
    bench = Bench(SMALL, settings_of())
    monkeypatch.setattr(Bench, "sample", lambda self, passes, calls: (1e-4, 2e-4))
    assert bench.prepare(Entry("frozen", Ranks(0, 0), None)).calls == math.ceil(2e-3 / 3e-4) == 7
    monkeypatch.setattr(Bench, "sample", lambda self, passes, calls: (1.0, 2.0))
    assert bench.prepare(Entry("frozen", Ranks(0, 0), None)).calls == 1


def test_rounds_are_interleaved_and_stop_at_the_deadline(monkeypatch):
    bench = Bench(SMALL, settings_of("--rounds", "40"))
    order = []
    monkeypatch.setattr(Bench, "sample", lambda self, passes, calls: order.append(passes) or (1.0, 1.0))
    contestants = {name: Contestant(Entry(name, Ranks(0, 0), None), nn.Identity(), passes=name) for name in "abcd"}
    layer.play(bench, contestants, math.inf)
    rounds = [order[place : place + 4] for place in range(0, 160, 4)]
    assert len(order) == 160
    assert all(sorted(names) == ["a", "b", "c", "d"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 10
    assert all(len(made.samples) == 40 for made in contestants.values())
    layer.play(bench, contestants, 0.0)
    assert len(order) == 160 + 4 * layer.MIN_ROUNDS


def test_what_small_shapes_leave_over_goes_to_the_large(monkeypatch):
    monkeypatch.setattr(layer.time, "perf_counter", lambda: 20.0)
    large, small = Shape(6400, 768, 768), Shape(64, 768, 768)
    (first, share), (last, rest) = deadlines([large, small], 120.0)
    assert (first, last) == (small, large)
    weights = [math.prod(shape) + 2**32 for shape in (small, large)]
    assert share() == pytest.approx(20 + 100 * weights[0] / sum(weights))
    assert rest() == 120.0
    monkeypatch.setattr(layer.time, "perf_counter", lambda: 130.0)
    assert rest() == 130.0


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert layer.main(["--device", "cpu", "--dry", "--out", str(out)]) == 0
    return out / "layer-dry-cpu-fp32.json"


def test_the_command_stores_every_phase_of_every_method(dry_run):
    environment, rows = timing.read_result(dry_run, LayerRow)
    assert environment["torch"] == torch.__version__
    wanted = [
        (*shape, *entry.ranks, entry.method, entry.pair, phase)
        for shape in shapes.DRY_SHAPES
        for entry in shapes.entries_of(shape, Ranks(8, 8), methods.measured_in("eager", "fp32", methods.LAYER_METHODS))
        for phase in layer.PHASES
    ]
    keys = ("M", "K", "N", "r_a", "r_b", "method", "pair", "phase")
    assert [tuple(row[key] for key in keys) for row in rows] == wanted
    for row in rows:
        assert row["unavailable"] is None, row["unavailable"]
        assert (row["dry"], row["runs"], row["mode"], row["dropout"]) == (True, 3, "eager", 0.0)
        assert 0 < row["q1_us"] <= row["median_us"] <= row["q3_us"]
        assert (row["parity"] is None) == (row["method"] == "frozen" or row["method"].startswith("naive_"))
        if row["parity"]:
            assert row["parity"]["difference"] <= row["parity"]["allowed"] == 4e-6
        assert {"frozen", "naive_hydra", "naive_lora"} <= row["over"].keys()
        assert (row["form"] is not None) == row["method"].startswith("ours_")
        x = 4 * row["M"] * row["K"]
        if row["method"] == "frozen":
            assert row["saved_bytes"] == 0
            # h and dx at the least.
            assert row["peak_bytes"] >= x + 4 * row["M"] * row["N"]
        elif row["method"] == "ours_hydra":
            # So small a shape runs in the kept form: x, Z [M, 16] and y0 [M, N].
            assert row["form"] == "kept"
            assert row["saved_bytes"] == x + 4 * row["M"] * (16 + row["N"])
        else:
            assert row["saved_bytes"] > 0


def test_the_tables_show_what_is_stored(dry_run):
    environment, rows = timing.read_result(dry_run, LayerRow)
    rivals, compiled, frozen = render_layer.layer_tables(rows)
    assert [line[0] for line in rivals.cells] == ["256 x 24 x 16", "16 x 16 x 24", *MEANS]
    # What most readers would swap comes first.
    assert rivals.headings[1] == "our LoRA / PEFT LoRA"
    over = {row["method"]: row["over"] for row in rows if row["phase"] == "step" and row["M"] == 256}
    for table, heading, method, rival in (
        (rivals, "our LoRA / PEFT LoRA", "ours_lora", "peft_lora"),
        (rivals, "our Hydra / naive SeqLoRA", "ours_hydra", "naive_seqlora"),
        (compiled, "our Hydra / compiled SeqLoRA", "ours_hydra", "compiled_seqlora"),
    ):
        ratio = over[method][rival][1]
        shown = dict(zip(table.headings, table.cells[0], strict=True))[heading]
        assert shown == f"{ratio:.2f}{' ▲' if ratio > 1 else ''}"
    line = dict(zip(frozen.headings, frozen.cells[0], strict=True))
    assert line["our Hydra"] == f"{over['ours_hydra']['frozen'][1]:.2f}"
    [ours] = [r for r in rows if r["method"] == "ours_hydra" and r["phase"] == "step" and r["M"] == 256]
    assert line["our Hydra saved / x"] == f"{ours['saved_bytes'] / (4 * 256 * 24):.2f}"
    assert frozen.cells[2][-2:] == ["-", "-"]
    assert render_layer.layer_markdown(Stored(dry_run, environment, rows), rows).count("\n| ") == 3 * (2 + 4)


def test_a_column_that_no_shape_measured_is_left_out(fair):
    _, rows = fair
    left = [row for row in rows if not row["method"].startswith("compiled_")]
    for row in left:
        row["over"] = {name: ratio for name, ratio in row["over"].items() if not name.startswith(("compiled_", "peft"))}
    rivals, frozen = render_layer.layer_tables(left)
    assert rivals.headings[1] == "our LoRA / naive LoRA"
    assert not any("PEFT" in heading for heading in rivals.headings)
    assert "compiled Hydra" not in frozen.headings


@pytest.fixture
def fair(dry_run):
    """The rows of the dry run, with every ratio 0.5 and every saved byte that of x: no loss and no goal missed."""
    environment, rows = timing.read_result(dry_run, LayerRow)
    for row in rows:
        row["over"] = {name: [0.4, 0.5, 0.6] for name in row["over"]}
        row["saved_bytes"], row["dry"] = 4 * row["M"] * row["K"], False
        row["backend"] = row["backend"] and "aten"  # whose goals these tests know
        # So small a shape runs in the kept form, which has no goal.
        if row["method"] == "ours_hydra":
            row["form"] = "composed"
    return environment, rows


# The lines of the two means.
MEANS = ("geometric mean, M >= 256", "geometric mean, M <= 64")


def find(rows, method: str, M: int, pair: str = "both"):
    [row] = [r for r in rows if (r["method"], r["phase"], r["M"], r["pair"]) == (method, "step", M, pair)]
    return row


def missed(rows) -> list[tuple[str, str, str]]:
    where = {"device": "A Processor", "capability": "AVX512"}
    told = goals.layer_goals(where, rows)
    return [(goal.what, f"{goal.figure:.3f}", f"{goal.limit:.3g}") for goal in told if goal.missed]


def test_every_slower_step_has_its_mark_and_every_goal_its_line(fair):
    _, rows = fair
    marks = lambda: [  # noqa: E731
        (table.headings[place], line[0], cell)
        for table in render_layer.layer_tables(rows)
        for line in table.cells
        for place, cell in enumerate(line)
        if "▲" in cell
    ]
    assert marks() == []
    assert missed(rows) == []
    find(rows, "ours_hydra", 16)["over"]["naive_seqlora"] = [0.99, 1.002, 1.1]
    find(rows, "ours_hydra", 16)["over"]["naive_seqlora@parameters"] = [0.99, 1.013, 1.1]
    find(rows, "ours_hydra", 16)["over"]["frozen"] = [2.0, 2.0, 2.0]
    find(rows, "ours_lora", 256, "rank")["over"]["peft_lora"] = [0.1, 1.5, 1.75]
    find(rows, "ours_lora", 256, "rank")["over"]["compiled_lora"] = [0.1, 2.0, 2.5]
    # A mean of one shape is that shape's.
    small, large = (("16 x 16 x 24", MEANS[1]), ("256 x 24 x 16", MEANS[0]))
    assert marks() == [
        ("our LoRA / PEFT LoRA", large[0], "1.50 ▲"),
        ("our Hydra / naive SeqLoRA", small[0], "1.00 ▲"),
        ("our LoRA / PEFT LoRA", large[1], "1.50 ▲"),
        ("our Hydra / naive SeqLoRA", small[1], "1.00 ▲"),
        ("our LoRA / compiled LoRA", large[0], "2.00 ▲"),
        ("our LoRA / compiled LoRA", large[1], "2.00 ▲"),
    ]
    # Of equal parameters the means alone, in a note.
    assert render_layer.layer_notes(rows)[-1] == (
        "Our Hydra over rivals of equal parameters: naive LoRA 0.50 (M >= 256), 0.50 (M <= 64); naive SeqLoRA 0.50 "
        "(M >= 256), 1.01 ▲ (M <= 64)."
    )
    assert missed(rows) == []
    find(rows, "ours_hydra", 256)["over"]["naive_hydra"] = [0.8, 0.81, 0.9]
    find(rows, "ours_seqlora", 256, "rank")["saved_bytes"] += 10**6
    find(rows, "ours_hydra", 256)["saved_bytes"] = 10**6
    assert missed(rows) == [
        ("our Hydra 8+8 over naive Hydra, geometric mean, M >= 256", "0.810", "0.8"),
        ("our Hydra 8+8, saved over x at 256 x 24 x 16", f"{10**6 / (4 * 256 * 24):.3f}", "1.74"),
    ]


def test_goals_are_only_for_what_they_were_set_for(fair):
    _, rows = fair
    for row in rows:
        row["over"] = {name: [0.99, 0.99, 0.99] for name in row["over"]}
    assert [limit for *_, limit in missed(rows)] == ["0.8", "0.95"]
    for key, other in (("dtype", "bf16"), ("device", "cuda"), ("backend", "reference")):
        changed = [{**row, key: other, "saved_bytes": 0} for row in copy.deepcopy(rows)]
        assert missed(changed) == []


def test_geometric_means_are_over_large_and_small_m_apart():
    rows = [
        {"M": M, "over": {"naive_hydra": [0.0, ratio, 9.0]}}
        for M, ratio in [(6400, 0.5), (256, 0.72), (255, 7.0), (65, 9.0), (64, 2.0), (16, 0.125), (1, 4.0)]
    ]
    steps = [{"ours_hydra": row} for row in rows] + [{"naive_lora": rows[0]}]
    means = render_layer.layer_means(steps, "ours_hydra", "naive_hydra")
    assert means == pytest.approx({"M >= 256": 0.6, "M <= 64": 1.0}, rel=1e-12)
    assert render_layer.layer_means(steps, "ours_hydra", "naive_lora") == {}


def test_the_page_gets_both_blocks_and_dry_rows_are_refused(fair, dry_run, tmp_path, capsys):
    environment, rows = fair
    (tmp_path / "README.md").touch()
    page, results = tmp_path / "docs" / "results.md", tmp_path / "results"
    page.parent.mkdir()
    arguments = ["--root", str(tmp_path), "--results", str(results)]
    plain, marked = "before\n\nafter\n", "before\n<!-- measured:layer -->\noutdated\n<!-- /measured:layer -->\nafter\n"
    page.write_text(plain, encoding="utf-8")
    assert render.main([*arguments, "--check"]) == 0
    page.write_text(marked, encoding="utf-8")
    # What is not stored is not shown.
    assert render.main(arguments) == 0
    assert page.read_text(encoding="utf-8") == marked.replace("outdated", "Not measured yet.")
    page.write_text(marked, encoding="utf-8")
    timing.write_result(results / "layer-cpu-fp32.json", environment, rows, LayerRow)
    assert render.main([*arguments, "--check"]) == 1
    assert page.read_text(encoding="utf-8") == marked
    assert render.main(arguments) == 0
    text = page.read_text(encoding="utf-8")
    heading = "**fp32, eager, ours: aten**\n\nA step of ours over a rival's, Hydra 8+8:\n"
    assert text.startswith(f"before\n<!-- measured:layer -->\n{heading}")
    assert text.endswith("<!-- /measured:layer -->\nafter\n")
    assert "outdated" not in text
    assert "| geometric mean, M >= 256 | 0.50 |" in text
    assert "▲" not in text
    assert render.main([*arguments, "--check"]) == 0
    page.write_text(plain, encoding="utf-8")
    assert render.main(arguments) == 2
    assert "docs/results.md needs one <!-- measured:layer -->" in capsys.readouterr().err
    page.write_text(marked, encoding="utf-8")
    (results / dry_run.name).write_text(dry_run.read_text(encoding="utf-8"), encoding="utf-8")
    assert render.main(arguments) == 2
    assert f"{dry_run.name} is from a dry run" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == marked


def test_a_rival_that_cannot_run_is_stored_and_printed_with_its_reason(tmp_path, monkeypatch, capsys):
    build = methods.build_layer

    def without_compiler(linear, name, *args, **kwargs):
        if name.startswith("compiled_"):
            raise RuntimeError("No working C++ compiler found")
        return build(linear, name, *args, **kwargs)

    monkeypatch.setattr(methods, "build_layer", without_compiler)
    monkeypatch.setitem(sys.modules, "peft", None)
    names = "frozen,naive_lora,ours_lora,compiled_lora,peft_lora"
    arguments = ["--device", "cpu", "--dry", "--shape", "5,11,7", "--ranks", "2+1", "--methods", names]
    assert layer.main([*arguments, "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not measured: compiled LoRA 3: RuntimeError: No working C++ compiler found" in printed
    assert "Not measured: PEFT LoRA 3: ModuleNotFoundError: import of peft halted" in printed
    _, rows = timing.read_result(tmp_path / "layer-dry-cpu-fp32.json", LayerRow)
    missing = [row for row in rows if row["unavailable"]]
    assert {row["method"] for row in missing} == {"compiled_lora", "peft_lora"}
    assert all(row["median_us"] is None and row["runs"] == 0 and not row["over"] for row in missing)
    assert all("compiled_lora" not in row["over"] for row in rows)


def test_ours_has_no_excuse(tmp_path, monkeypatch):
    def broken(linear, name, *args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(methods, "build_layer", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer.main(["--device", "cpu", "--dry", "--methods", "ours_lora", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_in_mode_compile_every_layer_is_compiled_and_the_compiled_rivals_are_left_out(monkeypatch):
    play, found = layer.play, {}

    def spy(bench, contestants, deadline):
        found.update(contestants)
        before = counters["stats"]["unique_graphs"]
        play(bench, contestants, deadline)
        # All was compiled before anything was timed: 5 entries, naive LoRA at two ranks.
        assert (before, counters["stats"]["unique_graphs"]) == (5, 5)

    monkeypatch.setattr(layer, "play", spy)
    names = "frozen,naive_hydra,naive_lora,ours_hydra,compiled_hydra,compiled_lora"
    settings = settings_of("--shape", "5,11,7", "--ranks", "8+8", "--methods", names)
    counters.clear()
    with Progress(disable=True) as progress:
        rows = layer.run(dataclasses.replace(settings, mode="compile"), progress)
    assert list(found) == ["frozen", "naive_hydra", "naive_lora", "naive_lora@parameters", "ours_hydra"]
    for made in found.values():
        assert made.layer._compiled_call_impl is not None
        assert {one.layer for one in made.passes} == {made.layer}
    assert len(rows) == 3 * len(found)
    for row in rows:
        assert (row["mode"], row["runs"], row["unavailable"]) == ("compile", 3, None)
        # Every compiled layer, frozen and naive too, against an eager one.
        assert 0 <= row["parity"]["difference"] <= row["parity"]["allowed"] == 4e-6
        assert row["saved_bytes"] > 0 or row["method"] == "frozen"


def test_a_dry_run_in_mode_graph_goes_through_on_a_cpu_and_says_so(tmp_path):
    names = "frozen,naive_lora,ours_lora,compiled_lora,peft_lora"
    arguments = ["--device", "cpu", "--dry", "--mode", "graph", "--shape", "5,11,7", "--ranks", "3+2"]
    assert layer.main([*arguments, "--methods", names, "--out", str(tmp_path)]) == 0
    _, rows = timing.read_result(tmp_path / "layer-dry-cpu-fp32-graph.json", LayerRow)
    assert {row["method"] for row in rows} == set(names.split(","))
    for row in rows:
        assert (row["mode"], row["dry"], row["runs"], row["unavailable"]) == ("graph", True, 3, None)
        assert row["parity"]["difference"] <= row["parity"]["allowed"]


def test_parity_in_mode_graph_is_that_of_the_replays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Replay, "backward", lambda self: None)
    arguments = ["--device", "cpu", "--dry", "--mode", "graph", "--methods", "frozen"]
    assert layer.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "frozen: the gradient of x is missing or zero" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["frozen", "naive_hydra", *ADAPTED])
def test_a_replay_computes_anew_where_its_capture_wrote(method, monkeypatch):
    emulate_graphs(monkeypatch)
    made = methods.build_layer(nn.Linear(11, 7), method, RANKS.get(method.rpartition("_")[2], Ranks(0, 0)), seed=3)
    inputs = Inputs(*SMALL, torch.float32, CPU, seed=1)
    inputs.buffers = inputs.buffers[:3]
    replays = passes.captured(made, inputs, modes.Recorder(torch.device("cuda")))
    assert [one.x for one in replays] == [x for x, _ in inputs.buffers]
    with torch.no_grad():
        for tensor in (*made.parameters(), *(tensor for buffer in inputs.buffers for tensor in buffer)):
            tensor += 0.5
    replays[2].forward()
    replays[2].backward()
    replays[1].forward()
    replays[1].backward()
    found = replays[0].step()
    expected = methods.layer_step(made, *inputs.buffers[0])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    # A replay writes its gradients again, adding nothing.
    replays[0].forward()
    replays[0].backward()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_run_leaves_torch_as_it_was():
    limit = torch._dynamo.config.recompile_limit
    with modes.isolated(CPU):
        assert torch._dynamo.config.recompile_limit == modes.VARIANTS > limit
    assert torch._dynamo.config.recompile_limit == limit


def test_a_mode_is_refused_where_it_cannot_run(tmp_path, capsys):
    assert layer.main(["--device", "cpu", "--mode", "graph", "--out", str(tmp_path)]) == 1
    assert "mode is 'graph': it needs a GPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match="mode is 'graph': it needs a GPU"):
        dataclasses.replace(settings_of("--mode", "graph"), dry=False)
    with pytest.raises(ValueError, match="mode is 'jit', expected one of eager, compile, graph"):
        dataclasses.replace(settings_of(), mode="jit")
    assert settings_of("--mode", "compile").methods == tuple(
        name for name in methods.LAYER_METHODS if not name.startswith(("compiled_", "autocast_"))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "compile", "--methods", "ours_lora,compiled_lora"], "'compiled_lora', in mode compile"),
        (["--methods", "ours_lora,qlora"], "'qlora'"),
        (["--ranks", "8"], "'8'"),
        (["--ranks", "0+0"], "'0+0'"),
        (["--ranks", "8+x"], "'8+x'"),
        (["--shape", "3,4"], "'3,4'"),
        (["--shape", "0,4,5"], "'0,4,5'"),
        (["--rounds", "0"], "rounds is 0"),
        (["--device", "tpu"], "'tpu'"),
        (["--backend", "fast"], "'fast'"),
    ],
)
def test_bad_options_are_named(arguments, message, tmp_path, capsys):
    assert layer.main(["--dry", "--out", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # pytest-benchmark in a process of its own
def test_the_cases_run_under_pytest_benchmark_too(tmp_path):
    every = {parameter.id for parameter in layer.pytest_cases()}
    assert {
        f"{shape}-{method}" for shape in shapes.CPU_SHAPES for method in layer.settings_of([])[0].methods
    } <= every or (torch.cuda.is_available())
    root, stored = Path(layer.__file__).parent.parent, tmp_path / "stored.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/layer.py", "--benchmark-only", "-p", "no:xdist"]
    command += ["-k", "16x3072x768-ours_hydra", f"--benchmark-json={stored}"]
    # Without the outer run's variables: under xdist pytest-benchmark would measure nothing.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=root, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(stored.read_text(encoding="utf-8"))["benchmarks"]
    assert sorted(case["params"]["phase"] for case in measured) == ["backward", "forward", "step"]
    assert all(case["stats"]["median"] > 0 and case["extra_info"]["saved_bytes"] > 0 for case in measured)


def sweep_rows(ratios: dict[int, float], K: int = 400, N: int = 800, chosen: str = "kept") -> list[SweepRow]:
    return [{"M": M, "K": K, "N": N, "over": [0.0, ratio, 9.0], "chosen": chosen} for M, ratio in ratios.items()]


def test_composed_starts_to_win_where_the_ratio_crosses_one():
    # log 2 above and log 2 below: the geometric middle of 100 and 400.
    assert sweep.crossing(sweep_rows({50: 3.0, 100: 2.0, 400: 0.5, 800: 0.4})) == pytest.approx(200 / 400)
    # A win that is lost again at larger M is none.
    assert sweep.crossing(sweep_rows({50: 0.9, 100: 1.25, 400: 0.8})) == pytest.approx(200 / 400)
    assert sweep.crossing(sweep_rows({50: 0.9, 100: 0.8})) == 50 / 400
    assert sweep.crossing(sweep_rows({50: 0.9, 100: 1.0})) is None


def test_the_loss_of_a_rule_is_over_the_better_form():
    rows = sweep_rows({50: 1.25, 100: 0.8, 200: 0.5})
    assert [sweep.loss(row, "kept") for row in rows] == [1.0, 1.25, 2.0]
    assert [sweep.loss(row, "composed") for row in rows] == [1.25, 1.0, 1.0]
    assert sweep.mean_loss(rows, 0.25) == 1.0
    assert sweep.mean_loss(rows, 0.5) == pytest.approx(1.25 ** (1 / 3))
    assert sweep.mean_loss(rows, 0.125) == pytest.approx(1.25 ** (1 / 3))
    assert sweep.mean_loss(rows, math.inf) == pytest.approx(2.5 ** (1 / 3))
    assert sweep.best_threshold(rows) == 0.25
    assert sweep.best_threshold(sweep_rows({50: 1.25, 100: 1.1})) == math.inf
    first, last = sweep.verdicts(rows)
    assert "from M = 0.177 K on" in first
    assert "at most 2.000, at M = 200" in first
    assert "the rule loses 35.72% in the geometric mean" in last
    assert "the best threshold alone among those measured, 0.25, 0.00%" in last


def test_the_sweep_times_both_forms_of_the_same_layer(tmp_path, monkeypatch, capsys):
    play, seen = layer.play, []

    def spy(bench, contestants, deadline):
        seen.append({name: made.layer.form for name, made in contestants.items()})
        play(bench, contestants, deadline)

    monkeypatch.setattr(layer, "play", spy)
    assert sweep.main(["--device", "cpu", "--dry", "--weight", "24,16", "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "K x N = 24 x 16: composed wins" in printed
    _, rows = timing.read_result(tmp_path / "sweep-dry-cpu-fp32.json", SweepRow)
    assert [row["M"] for row in rows] == [3, 6, 9, 12, 18, 24]
    assert seen == [{"composed": "composed", "kept": "kept"}] * 6
    assert [row["chosen"] for row in rows] == ["kept"] * 6
    assert all(row["dry"] and row["runs"] == 3 and row["over"][0] <= row["over"][1] <= row["over"][2] for row in rows)


def test_the_sweep_ends_with_a_wrong_gradient(tmp_path, monkeypatch, capsys):
    build = methods.build_layer

    def build_wrong(linear, name, *args, form="auto", **kwargs):
        made = build(linear, name, *args, form=form, **kwargs)
        if form == "kept":
            made.B_down.register_hook(lambda gradient: gradient * 0.99)
        return made

    monkeypatch.setattr(methods, "build_layer", build_wrong)
    assert sweep.main(["--device", "cpu", "--dry", "--out", str(tmp_path)]) == 1
    assert "ours_hydra: the gradient of B_down differs from naive_hydra" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_sweep_needs_a_sequential_branch(tmp_path, capsys):
    assert sweep.main(["--dry", "--ranks", "8+0", "--out", str(tmp_path)]) == 1
    assert "'8+0'" in capsys.readouterr().err

"""`benchmarks.candidates`: what each way runs, that it is proved before it is timed, and what its rows say."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import candidates, doctor, layer, roofline
from benchmarks.candidates import ADAPTERS, NEEDS, QUESTIONS, RANKS, Question
from benchmarks.device import compilation, jobs
from benchmarks.device.run import Settings
from benchmarks.layer import Bench, Contestant
from benchmarks.measuring import methods, modes, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import CandidateRow
from benchmarks.measuring.shapes import HEADLINE, Entry, Shape, has_bias
from benchmarks.rendering.candidates import candidates_table
from hydra_kernels.backend import effective, native
from hydra_kernels.backend import triton as steps
from hydra_kernels.backend.interface import without_options
from hydra_kernels.kernels import configs
from hydra_kernels.kernels.launch import Launch

from .test_gpu_run import kind_of

TINY, R16 = Shape(32, 32, 16), Ranks(8, 8)
# What tells a way from the others, and what it must not run.
KERNELS = {
    "hybrid": ({"down"}, {"one_pass", "effective"}),
    "hybrid_once": ({"one_pass"}, {"down", "effective"}),
    "triton": ({"one_pass", "gemm"}, {"down", "effective"}),
    "effective": ({"effective", "rebuild", "down"}, {"one_pass", "compose"}),
}


def bench_of(shape: Shape = TINY) -> tuple[Bench, list[torch.Tensor]]:
    settings, _ = layer.settings_of(
        ["--dtype", "bf16", "--mode", "graph", "--shape", ",".join(map(str, shape)), "--dry"]
    )
    bench = Bench(shape, settings)
    held = bench.build("naive_hydra", R16)
    return bench, [bench.linear.weight, bench.linear.bias, *(getattr(held, name).detach() for name in ADAPTERS)]


def launched_by(run: Callable[[Launch], None], monkeypatch) -> None:
    """The kernels' backends do that with each launch, also where one backend calls the other."""

    def instead(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: function(*(a for a in arguments if a is not run), run=run)

    for module in (steps, effective):
        for name in ("forward", "backward"):
            monkeypatch.setattr(module, name, instead(getattr(module, name)))


@pytest.fixture
def untimed(monkeypatch) -> None:
    """One step and no more: the interpreter's take long, and their time is nobody's."""
    monkeypatch.setattr(modes, "WARM_UPS", 1)
    monkeypatch.setattr(Bench, "sample", lambda bench, passes, calls: (1.0, 2.0))


@pytest.mark.parametrize("name", KERNELS)
def test_a_way_runs_the_kernels_that_it_is_named_for_and_is_proved(name, untimed, monkeypatch):
    launched: list[Launch] = []
    launched_by(lambda launch: launched.append(launch) or launch.run(), monkeypatch)
    bench, operands = bench_of()
    made = candidates.prepared(bench, name, R16, without_options(*operands), modes.Recorder(bench.device))
    names = {launch.kernel.__name__.removesuffix("_kernel") for launch in launched}
    wanted, unwanted = KERNELS[name]
    assert wanted <= names
    assert names.isdisjoint(unwanted)
    assert 0 < made.parity["difference"] <= made.parity["allowed"] == methods.LAYER_TOLERANCES[torch.bfloat16]
    assert len(made.passes) == len(bench.inputs.buffers)


def test_the_sweep_is_asked_of_native_and_of_no_other_way(monkeypatch):
    plans = []
    monkeypatch.setattr(native, "forward", lambda x, op, needs, plan: plans.append(("forward", plan)) or (x, op, ()))
    monkeypatch.setattr(native, "backward", lambda G, op, saved, needs, plan: plans.append(("backward", plan)) or {})
    for name in ("native", "native_sweep"):
        forward, backward = candidates.ways(torch.device("cpu"))[name]
        _, *left = forward(torch.zeros(1, 1), without_options(*[None] * 6))
        backward(torch.zeros(1, 1), *left)
    assert plans == [
        *(("forward", "composed"), ("backward", "composed")),
        *(("forward", "composed sweep"), ("backward", "composed sweep")),
    ]


@pytest.mark.parametrize("wrong", ["the output", "the gradient of B_down"])
def test_a_way_that_is_wrong_is_not_timed(wrong, untimed, monkeypatch):
    bench, operands = bench_of()
    leaves = dict(zip(("weight", "bias", *ADAPTERS), operands, strict=True))

    def forward(x, op):
        h = methods.NAIVE["hydra"].forward(SimpleNamespace(base=None, A_down_bias=None, A_up_bias=None, B_down_bias=None, B_up_bias=None, **leaves), x)  # fmt: skip # noqa: E501
        return h * (1.05 if wrong == "the output" else 1.0), op, (x,)

    def backward(G, op, saved):
        expected = bench.expected("naive_hydra", R16)
        grads = {name: expected[f"the gradient of {name}"] for name in ("x", *ADAPTERS)}
        return grads | ({"B_down": 1.05 * grads["B_down"]} if wrong != "the output" else {})

    monkeypatch.setattr(candidates, "ways", lambda device: {"native": (forward, backward)})
    with pytest.raises(methods.ParityError, match=f"native: {wrong} differs"):
        candidates.prepared(bench, "native", R16, without_options(*operands), modes.Recorder(bench.device))


def test_a_row_holds_the_paired_rounds_and_the_prediction_of_its_step():
    made = {
        "frozen": [(1e-4, 1e-4), (1e-4, 3e-4), (2e-4, 2e-4)],
        "hybrid": [(2e-4, 2e-4), (2e-4, 6e-4), (2e-4, 2e-4)],
        "triton": [(1e-4, 2e-4), (2e-4, 2e-4), (1e-4, 1e-4)],
    }
    contestants = {
        name: Contestant(Entry(name, R16, None), torch.nn.Identity(), samples=samples) for name, samples in made.items()
    }
    predicted = {"frozen": 100.0, "hybrid": 150.0, "triton": 120.0}
    settings = bench_of()[0].settings
    question = Question("A", ("hybrid", "triton"))
    rows = {
        phase: candidates.row_of(question, TINY, R16, "triton", phase, contestants, predicted, settings)
        for phase in layer.PHASES
    }
    step = rows["step"]
    assert (step["median_us"], step["instead_of"], step["predicted_us"]) == (300.0, "hybrid", 120.0)
    assert step["over"] == {"frozen": [0.75, 1.0, 1.25], "hybrid": [0.5, 0.5, 0.625]}
    assert step["predicted_over"] == {"frozen": 1.2, "hybrid": 0.8}
    assert rows["forward"]["over"]["hybrid"] == [0.5, 0.5, 0.75]
    assert rows["backward"]["median_us"] == 200.0
    assert rows["forward"]["predicted_us"] is rows["backward"]["predicted_over"] is None
    table = candidates_table(list(rows.values()))
    line = ["32 x 32 x 16", "16", "triton", "100.0", "200.0", "300.0", "120.0", "0.500", "0.500 to 0.625", "0.800"]
    assert (table.title, table.cells, table.bold) == ("A", [[*line, "1.000", "1.200"]], [True])


def test_every_question_is_asked_at_every_rank_and_shape_and_the_sweeps_last(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(candidates, "measure", lambda question, shape, ranks, *_: asked.append((question.name, shape, ranks)) or [])  # fmt: skip # noqa: E501
    monkeypatch.setattr(candidates, "candidates_table", lambda rows: "")
    monkeypatch.setattr(modes, "isolated", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(doctor, "sweeps", lambda: True)
    monkeypatch.setattr(steps, "tiles_of", lambda device: configs.SM90)
    settings = Settings(False, time.monotonic() + 60, tmp_path)
    list(candidates.parts(settings))
    once, every = [shape for shape in HEADLINE if shape.N <= 1024], list(HEADLINE)
    of = {question.name[0] + str(len(question.ways[1])): question.name for question in QUESTIONS}
    one, hybrid, form, early, sweep = of.values()
    shapes = {one: every, hybrid: once, form: every, early: every, sweep: every}
    expected = [(name, s, r) for r in RANKS for name in (one, hybrid, form, early) for s in shapes[name]]
    assert asked == expected + [(sweep, s, r) for r in RANKS for s in every]
    assert [sum(ranks) for ranks in RANKS] == [16, 32]
    assert len(once) == 2
    asked.clear()
    monkeypatch.setattr(doctor, "sweeps", lambda: False)
    monkeypatch.setattr(steps, "tiles_of", lambda device: configs.INTERPRETER)
    list(candidates.parts(settings))
    assert asked == [what for what in expected if what[0] != early]
    told = capsys.readouterr().out
    assert "C is left out" in told
    assert "D is left out" in told


@pytest.mark.parametrize("differs", [None, "h", "B_up"])
def test_early_launches_that_change_a_bit_are_not_timed(differs):
    values = {name: torch.ones(2) for name in ("h", "x", *ADAPTERS)}
    other = {name: value + 2.0**-23 if name == differs else value.clone() for name, value in values.items()}
    one, early = (SimpleNamespace(h=found.pop("h"), grads=found) for found in (values, other))
    with pytest.raises(RuntimeError, match=f"race: other bits in {differs}") if differs else contextlib.nullcontext():
        candidates.refuse_races(one, early)


def test_what_is_compiled_before_it_is_all_that_its_ways_launch(monkeypatch):
    """On an H100 and an H200, recorded over tensors without data."""
    found: list[Launch] = []
    monkeypatch.setattr(compilation, "compilation", kind_of)
    planned = set(jobs.candidate_jobs())
    monkeypatch.setattr(steps, "tiles_of", lambda device: configs.SM90)
    launched_by(found.append, monkeypatch)
    for question, ranks, shape in ((q, r, s) for q in QUESTIONS[:-1] for r in RANKS for s in HEADLINE if q.at(s)):
        t = roofline.operands_of(shape, ranks, torch.bfloat16)
        if not has_bias(shape):
            t["bias"] = None
        op = without_options(*(t[name] for name in ("weight", "bias", *ADAPTERS)))
        for name in question.ways:
            forward, backward = candidates.ways(torch.device("cuda"))[name]
            _, *left = forward(t["x"].detach(), op)
            backward(torch.empty(shape.M, shape.N, dtype=torch.bfloat16, device="meta"), *left)
    assert {repr(kind_of(launch, 90)) for launch in found} == planned
    assert any(launch.options.get("launch_pdl") for launch in found)
    assert {"x", *ADAPTERS} == NEEDS


def test_the_command_stores_rows_of_the_schema(untimed, monkeypatch, tmp_path, capsys):
    """Of native's question, whose kernels on a CPU are fast."""
    if "native" not in doctor.tested():
        pytest.skip("the compiled part is not built")
    if not torch.cuda.is_available():
        assert candidates.main([]) == 2
        assert "it needs a GPU, or --dry" in capsys.readouterr().err
    monkeypatch.setattr(candidates, "QUESTIONS", QUESTIONS[-1:])
    monkeypatch.setattr(candidates, "DRY_SHAPE", TINY)
    monkeypatch.setattr(layer, "play", lambda bench, made, end: [c.samples.append((1e-3, 1e-3)) for c in made.values()])
    assert candidates.main(["--dry", "--out", str(tmp_path)]) == 0
    rows = timing.read_result(tmp_path / "candidates-dry-cpu.json", CandidateRow)[1]
    assert [(row["way"], row["phase"]) for row in rows] == [
        (way, phase) for way in ("frozen", "native", "native_sweep") for phase in layer.PHASES
    ]
    predicted = {row["method"]: row for row in roofline.predict(TINY, R16, "bf16", candidates.MODEL)}
    for row in rows:
        if row["phase"] == "step":
            assert row["predicted_us"] == pytest.approx(predicted[row["way"]]["predicted_us"], abs=1e-3)

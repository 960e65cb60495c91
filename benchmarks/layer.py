"""What one adapted layer costs beside the frozen one and its rivals. ``python -m benchmarks.layer``

Every round takes one sample of every method in a new random order; ratios are medians of paired rounds. Inputs and
output gradients come from buffers in turn, so that none is hot from the call before. Before anything is timed, every
method's output and gradients are compared with the naive layer's from identical weights: a difference beyond rounding
ends the run, and nothing is printed or stored. In mode compile every layer is compiled; in mode graph a forward and a
backward are replays of CUDA graphs, but memory is that of eager steps: what a graph holds, it holds for good.

The same cases under pytest-benchmark, one at a time: ``pytest benchmarks/layer.py --benchmark-only -k 64x768x768``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import hydra_kernels as hk
from benchmarks.measuring import methods, modes, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.modes import DTYPES, device_option
from benchmarks.measuring.passes import Inputs, Pass, captured
from benchmarks.measuring.rows import LayerRow
from benchmarks.measuring.shapes import (
    CPU_SHAPES,
    CUDA_SHAPES,
    DRY_SHAPES,
    Entry,
    Shape,
    deadlines,
    entries_of,
    ranks_option,
    shape_option,
    trainable,
)
from benchmarks.rendering import goals
from benchmarks.rendering.layer import LEGEND, layer_notes, layer_tables
from benchmarks.rendering.tables import environment_note, show
from benchmarks.rendering.verdicts import is_rival
from hydra_kernels.backend.interface import FORMS
from hydra_kernels.choose.choice import choose
from hydra_kernels.choose.machine import here

PHASES = ("forward", "backward", "step")
# A sample of a small shape is the mean of as many calls as last this long, in seconds: clocks and scheduler hide less.
SAMPLE_SECONDS = 2e-3
# The profiler that measures the peak slows a tiny step by less than this.
PROFILER_SLOWDOWN = 50
MIN_ROUNDS = 3


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: str
    mode: str
    shapes: tuple[Shape, ...]
    ranks: tuple[Ranks, ...]
    methods: tuple[str, ...]
    backend: str
    form: str  # of ours too
    bias: bool  # whether the frozen layer has b0
    lora_dropout: float  # of PEFT's LoRA and ours
    rounds: int
    time_limit: float  # seconds within which all shapes are measured, except MIN_ROUNDS of each
    seed: int
    dry: bool

    def __post_init__(self) -> None:
        modes.check(self.mode, self.device, self.dry)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora-dropout is {self.lora_dropout:g}, expected at least 0 and less than 1")
        if self.lora_dropout and self.mode != "eager":
            raise ValueError(f"lora-dropout: it is measured in mode eager, not in {self.mode}")


@dataclass
class Contestant:
    """A layer ready to be timed, with what was found before: ``samples`` has (forward, backward) seconds a round."""

    entry: Entry
    layer: nn.Module
    # One for each of the bench's inputs.
    passes: Sequence[Pass] = ()
    saved_bytes: int = 0
    peak_bytes: int = 0
    parity: dict[str, float | str] | None = None
    calls: int = 1
    samples: list[tuple[float, float]] = field(default_factory=list)

    def seconds(self, phase: str) -> list[float]:
        return [{"forward": f, "backward": b, "step": f + b}[phase] for f, b in self.samples]


class Bench:
    """One shape: its frozen layer, its inputs, and the naive layers' results, which every other method must give."""

    def __init__(self, shape: Shape, settings: Settings) -> None:
        self.settings, self.device, dtype = settings, settings.device, DTYPES[settings.dtype]
        torch.manual_seed(settings.seed)
        self.linear = nn.Linear(shape.K, shape.N, settings.bias, device=self.device, dtype=dtype)
        self.inputs = Inputs(*shape, dtype, self.device, settings.seed, settings.mode)
        self.allowed = methods.LAYER_TOLERANCES[dtype]
        self._expected: dict[tuple[str, Ranks], Mapping[str, Tensor | None]] = {}

    def build(self, method: str, ranks: Ranks, form: str = "auto") -> nn.Module:
        seed, backend, dropout = self.settings.seed, self.settings.backend, self.settings.lora_dropout
        options = {"seed": seed, "form": form, "backend": backend, "lora_dropout": dropout}
        return methods.build_layer(self.linear, method, ranks, **options)

    def expected(self, method: str, ranks: Ranks) -> Mapping[str, Tensor | None]:
        """What the eager layer gives from the same weights and inputs."""
        if (method, ranks) not in self._expected:
            self._expected[method, ranks] = methods.layer_step(self.build(method, ranks), *self.inputs.buffers[0])
        return self._expected[method, ranks]

    def prepare(self, entry: Entry, form: str = "auto") -> Contestant | str:
        """A contestant whose sums are proved and whose memory is measured, or why its library cannot run it here."""
        mode, found = self.settings.mode, {}
        try:
            layer = self.build(entry.method, entry.ranks, form)
            if mode == "compile":
                layer.compile(fullgraph=True, dynamic=False)
            contestant = Contestant(entry, layer, [Pass(layer, x, G) for x, G in self.inputs.buffers])
            step = contestant.passes[0].step
            if mode == "compile" or entry.method.startswith("compiled_"):
                step()  # compiles, which must not happen under the hooks that count what is saved
            contestant.saved_bytes = timing.saved_bytes(lambda: found.update(step()), layer.parameters())
            start = time.perf_counter()
            contestant.peak_bytes = timing.peak_bytes(step, self.device)
            small = time.perf_counter() - start < PROFILER_SLOWDOWN * SAMPLE_SECONDS
            if mode == "graph":
                contestant.passes = captured(layer, self.inputs, modes.Recorder(self.device))
                found = contestant.passes[0].step()
            if self.settings.lora_dropout:
                layer.eval()
                found = contestant.passes[0].step()
                layer.train()
        except (ImportError, RuntimeError) as error:
            if entry.method.partition("_")[0] not in ("compiled", "peft", "autocast"):
                raise
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        partner = methods.naive_of(entry.method) or entry.method
        if partner == entry.method and mode == "eager":
            self._expected[partner, entry.ranks] = found
        else:
            expected = self.expected(partner, entry.ranks)
            worst, tensor = methods.worst_difference(entry.method, partner, found, expected, self.allowed)
            contestant.parity = {"difference": worst, "tensor": tensor, "allowed": self.allowed}
        if small:
            fastest = min(sum(self.sample(contestant.passes, 1)) for _ in range(5))
            contestant.calls = max(1, math.ceil(SAMPLE_SECONDS / fastest))
        return contestant

    def sample(self, passes: Sequence[Pass], calls: int) -> tuple[float, float]:
        """Mean seconds of a forward and of a backward over some calls, each with the next inputs and no gradients."""
        watch = timing.Stopwatch(self.device)
        if self.settings.mode == "graph":
            modes.head_start(self.device, calls)
        for _ in range(calls):
            next_pass = passes[self.inputs.turn()]
            watch.mark()
            next_pass.forward()
            watch.mark()
            next_pass.backward()
            watch.mark()
            next_pass.forget()
        laps = watch.laps()
        # Every third lap lies between two calls.
        return sum(laps[0::3]) / calls, sum(laps[1::3]) / calls


def play(bench: Bench, contestants: Mapping[str, Contestant], deadline: float) -> None:
    """Rounds of one sample of every contestant in shuffled order, until the settings' rounds or the deadline."""
    settings = bench.settings
    for number, order in enumerate(timing.shuffled_rounds(list(contestants), settings.rounds, settings.seed)):
        started = time.perf_counter()
        for name in order:
            contestant = contestants[name]
            contestant.samples.append(bench.sample(contestant.passes, contestant.calls))
        now = time.perf_counter()
        if number + 1 >= MIN_ROUNDS and 2 * now - started > deadline:
            break


def measure(shape: Shape, hydra: Ranks, settings: Settings, deadline: float) -> list[LayerRow]:
    """The rows of one shape: every phase of every method."""
    bench = Bench(shape, settings)
    entries = entries_of(shape, hydra, methods.measured_in(settings.mode, settings.dtype, settings.methods))
    prepared = {entry.names()[0]: bench.prepare(entry, settings.form) for entry in entries}
    contestants = {name: made for name, made in prepared.items() if isinstance(made, Contestant)}
    play(bench, contestants, deadline)
    rivals = {name: contestant for contestant in contestants.values() for name in contestant.entry.names()}
    return [
        row_of(shape, hydra, entry, made, rivals, phase, settings)
        for entry, made in zip(entries, prepared.values(), strict=True)
        for phase in PHASES
    ]


def row_of(
    shape: Shape,
    hydra: Ranks,
    entry: Entry,
    made: Contestant | str,
    rivals: Mapping[str, Contestant],
    phase: str,
    settings: Settings,
) -> LayerRow:
    ran = isinstance(made, Contestant)
    seconds = made.seconds(phase) if ran else []
    micro = timing.quartiles([taken * 1e6 for taken in seconds]) if ran else None
    over = {
        name: timing.paired_ratios(seconds, rival.seconds(phase))
        for name, rival in rivals.items()
        if ran and (name in methods.BASELINES or is_rival(name, entry.method))
    }
    ours = entry.method.startswith("ours_")
    machine, dtype, drops = here(settings.device), DTYPES[settings.dtype], settings.lora_dropout > 0
    drops &= entry.method == "ours_lora"
    options = {"backend": settings.backend, "form": settings.form, "masked": drops, "drops_input": drops}
    options["has_bias"] = settings.bias
    choice = choose(*shape, *entry.ranks, dtype, machine, **options) if ours else None
    return LayerRow(
        **shape._asdict(),
        **entry.ranks._asdict(),
        hydra=list(hydra),
        device=settings.device.type,
        pair=entry.pair,
        dtype=settings.dtype,
        mode=settings.mode,
        phase=phase,
        method=entry.method,
        backend=choice and choice.backend,
        form=choice and (choice.plan if choice.backward == "sweep" else choice.form),
        median_us=micro and round(micro.median, 3),
        q1_us=micro and round(micro.q1, 3),
        q3_us=micro and round(micro.q3, 3),
        floor_us=None,
        runs=len(seconds),
        calls=made.calls if ran else 0,
        dropout=settings.lora_dropout,
        bias=settings.bias,
        trainable=trainable(shape, entry.ranks),
        over={name: [round(ratio, 4) for ratio in ratios] for name, ratios in over.items()},
        saved_bytes=made.saved_bytes if ran else None,
        peak_bytes=made.peak_bytes if ran else None,
        parity=made.parity if ran else None,
        unavailable=None if ran else made,
        dry=settings.dry,
    )


def run(settings: Settings, progress: Progress) -> list[LayerRow]:
    """Measures every shape with every pair of ranks; rows in the order of the settings."""
    end = time.perf_counter() + settings.time_limit
    cases = len(settings.shapes) * len(settings.ranks)
    bar = progress.add_task("shapes", total=cases)
    rows: dict[tuple[Shape, Ranks], list[LayerRow]] = {}
    for shape, share in deadlines(settings.shapes, end):
        finish, start = share(), time.perf_counter()
        for number, hydra in enumerate(settings.ranks):
            deadline = start + (finish - start) * (number + 1) / len(settings.ranks)
            # A compiled forward is specialised for a shape: each starts afresh.
            with modes.isolated(settings.device):
                rows[shape, hydra] = measure(shape, hydra, settings, deadline)
            progress.advance(bar)
            if not progress.console.is_terminal:
                taken, runs = time.perf_counter() - start, rows[shape, hydra][0]["runs"]
                progress.console.print(f"{shape} {hydra.r_a}+{hydra.r_b}: {runs} rounds, {taken:.1f} s")
    return [row for hydra in settings.ranks for shape in settings.shapes for row in rows[shape, hydra]]


def settings_of(arguments: Sequence[str] | None) -> tuple[Settings, Path]:
    """The command line as settings and the folder for the results; ValueError names a bad option."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--shape", action="append", metavar="M,K,N", help="may be repeated")
    parser.add_argument("--ranks", action="append", metavar="A+B", help="of Hydra's branches; may be repeated")
    parser.add_argument("--methods", help="with commas between; every one without it")
    parser.add_argument("--backend", default="auto", help="of ours")
    parser.add_argument("--form", choices=FORMS, default="auto", help="of ours")
    parser.add_argument("--no-bias", action="store_true", help="a frozen layer without b0, as language models have")
    parser.add_argument("--lora-dropout", type=float, default=0.0, help="of PEFT's LoRA and ours")
    parser.add_argument("--rounds", type=int, help="at most so many a shape: 100, in a dry run 3")
    parser.add_argument("--mode", choices=modes.MODES, default="eager")
    parser.add_argument("--time-limit", type=float, default=430.0, help="seconds for all shapes; each gets 3 rounds")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to see that everything runs")
    options = parser.parse_args(arguments)
    device = device_option(options.device)
    measurable = methods.measured_in(options.mode, options.dtype, methods.LAYER_METHODS)
    names = options.methods.split(",") if options.methods is not None else measurable
    for name in names:
        if name not in measurable:
            raise ValueError(f"methods: {name!r}, in mode {options.mode} expected some of {','.join(measurable)}")
    usable = hk.backends()
    if options.backend != "auto" and (options.backend not in usable or usable[options.backend]):
        reason = usable.get(options.backend) or f"expected auto or one of {', '.join(usable)}"
        raise ValueError(f"backend is {options.backend!r}: {reason}")
    rounds = options.rounds if options.rounds is not None else 3 if options.dry else 100
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected 1 or more")
    default_shapes = DRY_SHAPES if options.dry else CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    settings = Settings(
        device=device,
        dtype=options.dtype,
        mode=options.mode,
        shapes=tuple(dict.fromkeys(map(shape_option, options.shape))) if options.shape else default_shapes,
        ranks=tuple(dict.fromkeys(map(ranks_option, options.ranks or ["8+8"]))),
        methods=tuple(name for name in measurable if name in names),
        backend=options.backend,
        form=options.form,
        bias=not options.no_bias,
        lora_dropout=options.lora_dropout,
        rounds=rounds,
        time_limit=options.time_limit,
        seed=options.seed,
        dry=options.dry,
    )
    return settings, options.out


def main(arguments: Sequence[str] | None = None) -> int:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        settings, out = settings_of(arguments)
        environment = timing.environment(settings.device)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            rows = run(settings, progress)
    except (OSError, ValueError, methods.ParityError) as error:
        print(f"layer: {error}", file=sys.stderr)
        return 1
    name = modes.file_name("layer", settings.device, settings.dtype, settings.mode, settings.dry)
    path = out / name.replace(".json", f"-dropout{settings.lora_dropout:g}.json" if settings.lora_dropout else ".json")
    timing.write_result(path, environment, rows, LayerRow)
    wanted = goals.goal_tables(goals.layer_goals(environment, rows))
    show(
        200,
        [*layer_tables(rows), *wanted, environment_note(environment), LEGEND, *layer_notes(rows), f"Stored: {path}"],
    )
    return 0


def pytest_cases() -> list[object]:
    """Every default shape of this machine with every method, as parameters of `test_layer`."""
    shapes = CUDA_SHAPES if torch.cuda.is_available() else CPU_SHAPES
    return [
        pytest.param(shape, entry, id=f"{shape}-{entry.names()[0]}")
        for shape in shapes
        for entry in entries_of(shape, Ranks(8, 8), settings_of([])[0].methods)
    ]


# torch.compile warns of torch's own deprecations while it is imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("shape", "entry"), pytest_cases())
def test_layer(benchmark, shape: Shape, entry: Entry, phase: str) -> None:
    settings, _ = settings_of(["--methods", entry.method])
    torch.compiler.reset()
    bench = Bench(shape, settings)
    contestant = bench.prepare(entry)
    if isinstance(contestant, str):
        pytest.skip(contestant)

    def next_call() -> tuple[tuple[Pass], dict[str, object]]:
        next_pass = contestant.passes[bench.inputs.turn()]
        next_pass.forget()
        if phase == "backward":
            next_pass.forward()
        return (next_pass,), {}

    def call(next_pass: Pass) -> None:
        if phase != "backward":
            next_pass.forward()
        if phase != "forward":
            next_pass.backward()
        timing.synchronize(settings.device)

    rounds = max(MIN_ROUNDS, min(settings.rounds, math.ceil(0.5 / sum(bench.sample(contestant.passes, 1)))))
    benchmark.extra_info.update(saved_bytes=contestant.saved_bytes, peak_bytes=contestant.peak_bytes)
    benchmark.pedantic(call, setup=next_call, rounds=rounds, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())

"""All that a GPU which runs this code should do, stage by stage. ``python -m benchmarks.gpu``

doctor: each kernel and each backend compiled and compared with float64. ceilings: what the card reaches. tune: the
winners that later stages run. layer, table4, host: the benchmarks of these names.

Every stage runs in a process of its own, which stores what it has after each of its parts: a stage that crashes, hangs
or runs out of time costs the part it was at, and nothing after it. It needs the source tree alone, from its root, and
neither sets nor resets anything on the GPU. ``--dry-run`` goes through every stage with tiny shapes on the CPU, in
Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from rich.console import Console
from rich.progress import Progress

import hydra_kernels as hk
from benchmarks import ceilings, doctor, host, layer, roofline, table4
from benchmarks.device.isolated import ROOT, CheckRow, Isolated, line_of
from benchmarks.measuring import methods, models, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import CeilingRow, HostRow, LayerRow, Table4Row
from benchmarks.measuring.shapes import CUDA_SHAPES, DRY_SHAPES, Shape
from benchmarks.rendering.tables import show
from hydra_kernels.backend import TABLE
from hydra_kernels.choose.tune import Tuned

# Seconds that a stage may take after the end of its time to finish the part that it is at.
GRACE = 15.0
# And then to end its own processes.
TERMINATION = 2.0
# Seconds a check may take; the first of a process starts torch and CUDA as well.
CHECK_LIMIT = 90.0
# Those of the goals: ViT-B/32 fc2, ViT-L fc2, and a language model's layers.
HEADLINE = (Shape(6400, 3072, 768), Shape(25216, 4096, 1024), Shape(8192, 4096, 4096), Shape(8192, 14336, 4096))
RANKS = ("2+2", "4+8", "16+16", "32+32")
# A compiled rival takes seconds to compile at every shape.
ALL_BUT_COMPILED = ",".join(name for name in methods.LAYER_METHODS if not name.startswith("compiled_"))
OURS_AND_RIVALS = "naive_lora,naive_seqlora,naive_hydra,ours_hydra"
ALL = ",".join(methods.METHODS)
OURS_ALONE = ("hybrid", "triton", "native")  # each is measured beside what `auto` runs


class Settings(NamedTuple):
    dry: bool
    deadline: float  # in time.monotonic()
    out: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def path(self, stage: str) -> Path:
        return self.out / f"{stage}-{'dry-' if self.dry else ''}{self.device.type}.json"


class Part(NamedTuple):
    """Rows of a stage that are ready, and how many checks or measurements among them failed."""

    rows: Sequence[Any]
    failures: int = 0


# One shape, its winner, medians of a step, and what failed there.
TuneRow = TypedDict("TuneRow", {**Tuned.__annotations__, "dry": bool})


class Stage(NamedTuple):
    """``run`` yields parts; their rows are stored together, of ``schema``. ``seconds`` is its share of the time."""

    name: str
    run: Callable[[Settings], Iterator[Part]]
    schema: type
    seconds: float


def check_kernels_and_backends(settings: Settings) -> Iterator[Part]:
    """Each kernel and each backend against float64."""
    cores = len(os.sched_getaffinity(0))
    # Compilers keep a core each busy, the GPU has memory for more than these.
    jobs = min(16, cores)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    environment |= {"TRITON_INTERPRET": "1"} if settings.dry else {}
    # Inductor's workers outlive their process and hold its output open, which Python 3.12.3 waits for.
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

    def command(group: str, checks: Sequence[str]) -> list[str]:
        dry = ["--dry"] if settings.dry else []
        return [sys.executable, "-m", "benchmarks.doctor", *dry, group, *checks]

    isolated = Isolated(command, environment, CHECK_LIMIT, jobs, settings.deadline, settings.dry, doctor.START_OVER)
    groups = {group: list(checks) for group, checks in doctor.groups(settings.dry).items()}
    rows = isolated.run(groups, lambda row: print(line_of(row), flush=True))
    count = {status: sum(row["status"] == status for row in rows) for status in ("pass", "fail", "skip")}
    print(f"doctor: {count['pass']} passed, {count['fail']} failed, {count['skip']} cannot run here")
    for row in rows:
        if row["status"] == "fail":
            print(line_of(row))
    yield Part(rows, count["fail"])


def attempts(
    settings: Settings, tasks: Sequence[tuple[str, Callable[[], Sequence[Any]]]], failures_of: Callable[[Any], int]
) -> Iterator[Part]:
    """Each task's rows; one that raises is told, counts as failed and does not stop the next; late ones are skipped."""
    for name, run in tasks:
        if settings.left() <= 0:
            print(f"{name}: skipped, the time was over", flush=True)
            continue
        start = time.monotonic()
        try:
            rows = run()
        except Exception:  # the tasks after it must run whatever this one's library raises
            traceback.print_exc()
            yield Part([], 1)
            continue
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        yield Part(rows, sum(map(failures_of, rows)))


def measure_ceilings(settings: Settings) -> Iterator[Part]:
    rows = ceilings.measure(settings.device, settings.dry)
    show(140, [ceilings.table(rows)])
    yield Part(rows)


def tune(settings: Settings) -> Iterator[Part]:
    """The shapes of the layer benchmark in bf16, then Table 4's own layer; later stages run the winners."""
    first, others = (DRY_SHAPES[:1], DRY_SHAPES[1:]) if settings.dry else (HEADLINE, _headline_first()[len(HEADLINE) :])
    fc2 = Shape(64, 64, 32) if settings.dry else Shape(table4.PAPER_BATCH * 50, 3072, 768)
    jobs = [(shape, Ranks(8, 8), torch.bfloat16) for shape in first]
    jobs += [
        (fc2, ranks, of)
        for of in (torch.bfloat16, torch.float32)
        for ranks in models.MODELS[table4.DEFAULT_MODEL].ranks.values()
    ]
    jobs += [(shape, Ranks(8, 8), torch.bfloat16) for shape in others]

    def measured(shape: Shape, ranks: Ranks, dtype: torch.dtype) -> Sequence[TuneRow]:
        rounds = 2 if settings.dry else 20
        found = hk.tune([(*shape, *ranks)], dtype=dtype, device=settings.device, rounds=rounds)
        return [TuneRow(**row._asdict(), dry=settings.dry) for row in found]

    tasks = [
        (f"tune {shape} {ranks.r_a}+{ranks.r_b}", partial(measured, shape, ranks, of)) for shape, ranks, of in jobs
    ]
    yield from attempts(settings, tasks, lambda row: len(row["failed"]))


def measure_layers(settings: Settings) -> Iterator[Part]:
    """bf16 in CUDA graphs first, where the goals are; compiled rivals at the headline shapes alone."""
    headline = DRY_SHAPES[:1] if settings.dry else HEADLINE
    others = DRY_SHAPES[1:] if settings.dry else tuple(_headline_first()[len(HEADLINE) :])
    kernels = [
        name
        for name in OURS_ALONE
        if TABLE[name].unavailable(settings.device) is None
        and TABLE[name].refusal("composed", torch.bfloat16, 8, 8, device=settings.device) is None
    ]
    ours = f"frozen,{OURS_AND_RIVALS}"
    # Mode, shapes, ranks, methods, backend of ours, and seconds of rounds for each shape.
    parts = [
        ("graph", headline, ["8+8"], ALL_BUT_COMPILED, "auto", 4),
        *(("graph", headline, ["8+8"], ours, backend, 3) for backend in kernels),
        ("graph", headline, ["8+8"], ",".join(methods.LAYER_METHODS), "auto", 6),
        ("eager", headline, ["8+8"], ALL_BUT_COMPILED, "auto", 3),
        ("graph", others, ["8+8"], ALL_BUT_COMPILED, "auto", 2),
        ("graph", headline, RANKS[:1] if settings.dry else RANKS, ours, "auto", 6),
        ("compile", headline, ["8+8"], ours, "auto", 3),
    ]
    rates = _ceilings(settings)

    def measured(
        mode: str, shape: Shape, ranks: Sequence[str], names: str, backend: str, seconds: float
    ) -> list[LayerRow]:
        arguments = ["--device", settings.device.type, "--dtype", "bf16", "--mode", mode, "--methods", names]
        arguments += ["--backend", backend, "--time-limit", str(seconds), "--shape", ",".join(map(str, shape))]
        arguments += [text for pair in ranks for text in ("--ranks", pair)]
        options, _ = layer.settings_of([*arguments, *_dry(settings)])
        rows = layer.run(options, _silent())
        for row in rows:
            if rates is not None and row["phase"] == "step":
                pair = Ranks(row["r_a"], row["r_b"])
                row["floor_us"] = round(roofline.floor_us(shape, pair, row["dtype"], *rates), 3)
        return rows

    tasks = [
        (f"layer {mode} {shape} {' '.join(ranks)} {backend}", partial(measured, mode, shape, ranks, names, backend, s))
        for mode, shapes, ranks, names, backend, s in parts
        for shape in shapes
    ]
    yield from attempts(settings, tasks, lambda row: 0)


def measure_host(settings: Settings) -> Iterator[Part]:
    usable = ["aten", *(name for name in OURS_ALONE if TABLE[name].unavailable(settings.device) is None)]
    tasks = [
        (f"host {name}", partial(host.measure, settings.device, [name], 3 if settings.dry else 60, settings.dry))
        for name in usable
    ]
    yield from attempts(settings, tasks, lambda row: 0)


def measure_table4(settings: Settings) -> Iterator[Part]:
    """The paper's table in bf16, tf32 and fp32; compiled, only ours beside the naive methods."""
    parts = [
        *(("bf16", "graph", ALL), ("bf16", "eager", ALL), ("fp32", "eager", ALL), ("tf32", "eager", ALL)),
        *(("bf16", "compile", OURS_AND_RIVALS), ("tf32", "graph", ALL), ("fp32", "graph", ALL)),
        *(("tf32", "compile", OURS_AND_RIVALS), ("fp32", "compile", OURS_AND_RIVALS)),
    ]

    def measured(dtype: str, mode: str, names: str) -> Sequence[Table4Row]:
        if settings.dry and mode == "compile":
            dtype = "fp32"  # on a CPU what inductor (torch 2.13) makes of the naive Hydra in bf16 is no valid C++
        arguments = ["--device", settings.device.type, "--dtype", dtype, "--mode", mode, "--methods", names]
        arguments += ["--batch-size", "2", "--steps", "1"] if settings.dry else ["--steps", "20"]
        options, _ = table4.settings_of([*arguments, *_dry(settings)])
        return table4.run(options, _silent())

    tasks = [(f"table4 {dtype} {mode}", partial(measured, dtype, mode, names)) for dtype, mode, names in parts]
    yield from attempts(settings, tasks, lambda row: 0)


def _headline_first() -> list[Shape]:
    return [*HEADLINE, *(shape for shape in CUDA_SHAPES if shape not in HEADLINE)]


def _ceilings(settings: Settings) -> tuple[float, float] | None:
    """TFLOP/s of bf16 products and GB/s of a copy, where that stage has stored them."""
    try:
        _, rows = timing.read_result(settings.path("ceilings"), CeilingRow)
    except ValueError as error:
        print(f"no floors: {error}", file=sys.stderr)
        return None
    found = {(row["what"], row["dtype"]): row["value"] for row in rows}
    return found["product", "bf16"], found["copy", "bf16"]


def _dry(settings: Settings) -> list[str]:
    return ["--dry"] if settings.dry else []


def _silent() -> Progress:
    return Progress(console=Console(quiet=True))


STAGES = (
    Stage("doctor", check_kernels_and_backends, CheckRow, 150),
    Stage("ceilings", measure_ceilings, CeilingRow, 20),
    Stage("tune", tune, TuneRow, 70),
    Stage("host", measure_host, HostRow, 25),
    Stage("layer", measure_layers, LayerRow, 130),
    Stage("table4", measure_table4, Table4Row, 110),
)


def run_stage(stage: Stage, settings: Settings) -> int:
    """Runs a stage here and stores its rows after each part; how many of its checks or measurements failed."""
    rows: list[Any] = []
    failures, environment = 0, timing.environment(settings.device)
    for part in stage.run(settings):
        rows += part.rows
        failures += part.failures
        if rows:
            timing.write_result(settings.path(stage.name), environment, rows, stage.schema)
    return failures


def run_stages(
    selected: Sequence[Stage],
    settings: Settings,
    command: Callable[[Stage, float], list[str]],
    environment: Mapping[str, str],
) -> int:
    """A process for each stage, one after the other, whatever becomes of those before; how many of them failed.

    ``command`` runs one stage within so many seconds. What a stage leaves of its time is there for the later ones.
    """
    failed = 0
    for place, stage in enumerate(selected):
        spared = sum(later.seconds for later in selected[place + 1 :])
        seconds = max(min(stage.seconds, settings.left()), settings.left() - spared)
        if settings.left() <= 0:
            print(f"{stage.name}: skipped, the time was over", flush=True)
            failed += 1
            continue
        start = time.monotonic()
        process = subprocess.Popen(command(stage, seconds), env=environment, cwd=ROOT, start_new_session=True)
        try:
            status = str(process.wait(timeout=seconds + GRACE))
        except subprocess.TimeoutExpired:
            status = f"killed, {seconds + GRACE:.0f} s were over"
        finally:
            if process.poll() is None:
                # It may end what it started in sessions of their own; then its whole session, compilers included.
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(TERMINATION)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        failed += status != "0"
        verdict = "ok" if status == "0" else f"FAILED ({status})"
        print(f"{stage.name}: {verdict}, {time.monotonic() - start:.0f} s, {settings.path(stage.name)}", flush=True)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=8.6, help="for all stages")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to see that everything runs")
    parser.add_argument("--here", action="store_true", help="in this process, not in one for each stage")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu: torch finds no GPU here; --dry-run needs none", file=sys.stderr)
        return 2
    # As an exception it ends the processes below this one too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: terminated"))
    settings = Settings(options.dry_run, time.monotonic() + 60 * options.minutes, options.out.resolve())
    selected = [stage for stage in STAGES if stage.name in options.stage]
    if options.here:
        return int(sum(run_stage(stage, settings) for stage in selected) > 0)

    def command(stage: Stage, seconds: float) -> list[str]:
        dry = ["--dry-run"] if settings.dry else []
        own = ["--stage", stage.name, "--minutes", str(seconds / 60), "--out", str(settings.out)]
        return [sys.executable, "-m", "benchmarks.gpu", "--here", *own, *dry]

    # The profiler that measures peak memory on a CPU would print two lines a step.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"KINETO_LOG_LEVEL": "99"}
    environment |= {"TRITON_INTERPRET": "1"} if settings.dry else {}
    with tempfile.TemporaryDirectory() as tuned:
        return int(run_stages(selected, settings, command, environment | {"HYDRA_KERNELS_CACHE": tuned}) > 0)


if __name__ == "__main__":
    sys.exit(main())

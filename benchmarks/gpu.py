"""All that a GPU which runs this code should do, in eight minutes, what counts first. ``python -m benchmarks.gpu``

doctor: every backend and form against float64, quickly. table4: the paper's model. layer: the four shapes of the goals.
host: the host's time of an eager step. llama: Table 4 of a language model, with PEFT's LoRA. all-checks: each kernel
and each backend against float64. tune: the fastest backend for each shape. shapes: other ranks, shapes and backends.

Each stage has a limit of time, which counts the start of its process and the compilation before it. Where the time is
short, the last stages go without. It needs the source tree alone, from its root, and neither sets nor resets anything
on the GPU. ``--dry-run`` goes through every stage with tiny shapes on the CPU, in Triton's interpreter.

``--stage candidates`` runs by itself alone: kernels that nothing selects yet beside those of today, with predictions.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import hydra_kernels as hk
from benchmarks import candidates, ceilings, doctor, host, layer, roofline, table4
from benchmarks.device import jobs, run
from benchmarks.device.compilation import Job, Step, tell_compilations
from benchmarks.device.isolated import ROOT, CheckRow, Isolated, line_of
from benchmarks.device.run import Part, Settings, Stage, attempts, plan_of, run_stage, run_stages
from benchmarks.measuring import methods, models, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import CandidateRow, CeilingRow, HostRow, LayerRow, Table4Row, TuneRow
from benchmarks.measuring.shapes import (
    DRY_SHAPES,
    GOALS_RANKS,
    HEADLINE,
    OTHER_RANKS,
    OTHER_SHAPES,
    PAPERS_FC2,
    Shape,
    has_bias,
)  # fmt: skip
from benchmarks.rendering.run import summary
from benchmarks.rendering.tables import show
from hydra_kernels.backend import TABLE
from hydra_kernels.kernels.language import INTERPRETED
from tests.cases import Case

MINUTES = 8.0
# Of a dry run, which nothing hurries.
DRY_MINUTES = 60.0
# Seconds for csrc, before the first stage.
BUILD_LIMIT = 60.0
# Seconds a check may take; the first of a process starts torch and CUDA as well.
CHECK_LIMIT = 90.0
ALL_BUT_COMPILED = tuple(name for name in methods.LAYER_METHODS if not name.startswith("compiled_"))
OURS_AND_RIVALS = ("frozen", "naive_lora", "naive_seqlora", "naive_hydra", "ours_hydra")
OURS_ALONE = ("hybrid", "triton", "native")  # each is measured beside what `auto` runs
PAPERS = models.MODELS[table4.DEFAULT_MODEL]


def check(settings: Settings, quick: bool) -> Iterator[Part]:
    """Each kernel and each backend against float64, groups of checks in processes side by side."""
    cores = len(os.sched_getaffinity(0))
    # Compilers keep a core each busy, the GPU has memory for more than these.
    processes = min(16, cores)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": str(max(1, cores // processes))}
    environment |= {"TRITON_INTERPRET": "1"} if settings.dry else {}
    # Inductor's workers outlive their process and hold its output open, which Python 3.12.3 waits for.
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    options = [*(["--dry"] if settings.dry else []), *(["--quick"] if quick else [])]
    options += ["--log", str(settings.log)] if settings.log else []

    def command(group: str, checks: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "benchmarks.doctor", *options, group, *checks]

    isolated = Isolated(
        command, environment, CHECK_LIMIT, processes, settings.deadline, settings.dry, doctor.START_OVER
    )
    made = (doctor.quick if quick else doctor.groups)(settings.dry)
    rows = isolated.run({group: list(checks) for group, checks in made.items()}, lambda row: print(line_of(row)))
    count = {status: sum(row["status"] == status for row in rows) for status in ("pass", "fail", "skip")}
    print(f"{count['pass']} passed, {count['fail']} failed, {count['skip']} cannot run here")
    for row in rows:
        if row["status"] == "fail":
            print(line_of(row))
    yield Part("doctor-quick" if quick else "doctor", rows, count["fail"])


def quick_jobs() -> Mapping[str, Job]:
    formats = [(name, doctor.FORMATS[name]) for name in doctor.QUICK_FORMATS]
    found = [
        Step(case, name, fused, trainable_bias=True)
        for fused, (name, form) in itertools.product((True, False), formats)
        for case in doctor.quick_cases(form, dry=False)
    ]
    found += [
        Step(doctor.served(case, "hybrid", form, "effective"), name, False, trainable_bias=True, form="effective")
        for name, form in formats
        for case in doctor.quick_cases(form, dry=False)
    ]
    return jobs.jobs_of(found)


def all_jobs() -> Mapping[str, Job]:
    """Those of the backends' steps; kernels that are checked alone are compiled by the processes that check them."""
    cases = (*doctor.SMALL, *doctor.REAL)
    made = itertools.product(
        doctor.FORMATS.items(), ((True, "composed"), (False, "composed"), (False, "effective")), cases
    )
    return jobs.jobs_of(
        Step(
            doctor.served(case, "hybrid", form, way) if way == "effective" else case,
            *(name.partition("+")[0], fused, form.adapters, True, way),
        )
        for (name, form), (fused, way), case in made
    )


def measure_table4(settings: Settings, file: str, model: str, runs: Sequence[tuple[str, str, str]], names: str) -> (
    Iterator[Part]
):  # fmt: skip
    """Table 4 of a model in each (dtype, mode, base): what is left of the time goes to those that have not run."""

    def measured(place: int, dtype: str, mode: str, base: str) -> Sequence[Table4Row]:
        arguments = ["--model", model, "--device", settings.device.type, "--dtype", dtype, "--mode", mode]
        arguments += ["--methods", names] if base == "none" else ["--base", base]
        arguments += _dry(settings)
        arguments += ["--batch-size", "2", "--steps", "1"] if settings.dry else ["--steps", "20"]
        # Half of its share is for building the models, their graphs and the uncounted rounds.
        arguments += ["--time-limit", str(settings.left() / (len(runs) - place) / 2)]
        options, _ = table4.settings_of(arguments)
        return table4.run(options, _silent())

    tasks = [
        (f"{file} {dtype} {mode} {base}", partial(measured, place, dtype, mode, base))
        for place, (dtype, mode, base) in enumerate(runs)
    ]
    yield from attempts(settings, file, tasks)


def measure_llama(settings: Settings) -> Iterator[Part]:
    names = methods.MODEL_METHODS if importlib.util.find_spec("peft") else methods.METHODS
    # A 4-bit base is PEFT's beside ours.
    has_both = importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("peft")
    runs = [("bf16", "eager", base) for base in ("none", *(["nf4"] if has_both else []))]
    yield from measure_table4(settings, "table4-llama", "llama", runs, ",".join(names))


def layers(
    settings: Settings, mode: str, shape: Shape, ranks: Ranks, names: Sequence[str], backend: str, seconds: float
) -> list[LayerRow]:
    """One shape of the layer benchmark in bf16, with the floor of each step where the ceilings are known."""
    arguments = ["--device", settings.device.type, "--dtype", "bf16", "--mode", mode]
    arguments += ["--methods", ",".join(methods.measured_in(mode, "bf16", names)), "--backend", backend]
    arguments += ["--time-limit", str(seconds), "--shape", ",".join(map(str, shape))]
    arguments += ["--ranks", f"{ranks.r_a}+{ranks.r_b}", *([] if has_bias(shape) else ["--no-bias"])]
    options, _ = layer.settings_of([*arguments, *_dry(settings)])
    rows, rates = layer.run(options, _silent()), _ceilings(settings)
    for row in rows:
        if rates is not None and row["phase"] == "step":
            floor = roofline.floor_us(shape, Ranks(row["r_a"], row["r_b"]), row["dtype"], *rates)
            row["floor_us"] = round(floor, 3)
    return rows


def measure_headline(settings: Settings) -> Iterator[Part]:
    """The ceilings, then the shapes of the goals beside every rival: replayed from CUDA graphs, then eager."""
    found = ceilings.measure(settings.device, settings.dry)
    show(140, [ceilings.table(found)])
    yield Part("ceilings", found)
    tasks = [
        (f"layer {mode} {shape}", partial(layers, settings, mode, shape, GOALS_RANKS, names, "auto", seconds))
        for mode, names, seconds in (("graph", methods.LAYER_METHODS, 4), ("eager", ALL_BUT_COMPILED, 2))
        for shape in (DRY_SHAPES[:1] if settings.dry else HEADLINE)
    ]
    yield from attempts(settings, "layer", tasks)


def measure_others(settings: Settings) -> Iterator[Part]:
    """In CUDA graphs: the goals' other rank, other shapes, other ranks, and each backend by itself."""
    headline, others = (DRY_SHAPES[:1], DRY_SHAPES[1:]) if settings.dry else (HEADLINE, OTHER_SHAPES)
    kernels = [name for name in OURS_ALONE if _serves(name, settings)]
    ranks = OTHER_RANKS[:2] if settings.dry else OTHER_RANKS
    parts = [
        *((shape, ranks[0], OURS_AND_RIVALS, "auto") for shape in headline),
        *((shape, GOALS_RANKS, ALL_BUT_COMPILED, "auto") for shape in others),
        *((shape, pair, OURS_AND_RIVALS, "auto") for pair in ranks[1:] for shape in headline),
        *((shape, GOALS_RANKS, OURS_AND_RIVALS, name) for name in kernels for shape in headline),
    ]
    tasks = [
        (f"layer graph {shape} {pair.r_a}+{pair.r_b} {backend}", partial(
            layers, settings, "graph", shape, pair, names, backend, 2
        ))
        for shape, pair, names, backend in parts
    ]  # fmt: skip
    yield from attempts(settings, "layer-shapes", tasks)


def measure_host(settings: Settings) -> Iterator[Part]:
    usable = ["aten", *(name for name in OURS_ALONE if TABLE[name].unavailable(settings.device) is None)]
    tasks = [
        (f"host {name}", partial(host.measure, settings.device, [name], 3 if settings.dry else 60, settings.dry))
        for name in reversed(usable)
    ]
    yield from attempts(settings, "host", tasks)


def host_jobs() -> Mapping[str, Job]:
    shapes = itertools.product(host.SHAPES, (True, False))
    return jobs.jobs_of(Step(Case((M,), K, N, *host.RANKS["hydra"]), "bf16", fused) for (M, K, N), fused in shapes)


def tune(settings: Settings) -> Iterator[Part]:
    """The shapes of the goals, then Table 4's own layer, then the others; `shapes` runs the winners."""
    first, others = (DRY_SHAPES[:1], DRY_SHAPES[1:]) if settings.dry else (HEADLINE, OTHER_SHAPES)
    fc2 = Shape(64, 64, 32) if settings.dry else PAPERS_FC2
    wanted = [(shape, GOALS_RANKS, torch.bfloat16) for shape in first]
    wanted += [(fc2, ranks, of) for of in (torch.bfloat16, torch.float32) for ranks in PAPERS.ranks.values()]
    wanted += [(shape, GOALS_RANKS, torch.bfloat16) for shape in others]

    def measured(shape: Shape, ranks: Ranks, dtype: torch.dtype) -> Sequence[TuneRow]:
        rounds = 2 if settings.dry else 20
        found = hk.tune([(*shape, *ranks)], dtype=dtype, device=settings.device, rounds=rounds)
        return [TuneRow(**row._asdict(), dry=settings.dry) for row in found]

    tasks = [
        (f"tune {shape} {ranks.r_a}+{ranks.r_b}", partial(measured, shape, ranks, of)) for shape, ranks, of in wanted
    ]
    yield from attempts(settings, "tune", tasks, lambda row: len(row["failed"]))


def _serves(name: str, settings: Settings) -> bool:
    refusal = TABLE[name].refusal("composed", torch.bfloat16, *GOALS_RANKS, device=settings.device)
    return TABLE[name].unavailable(settings.device) is None and refusal is None


def _ceilings(settings: Settings) -> tuple[float, float] | None:
    """TFLOP/s of bf16 products and GB/s of a copy, where they are stored."""
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


PAPERS_RUNS = tuple(itertools.product(("bf16", "tf32"), ("graph", "eager"), ("none",)))
# In the order of what counts. Their limits, compiling on 16 cores and the build with them, end within MINUTES.
STAGES = (
    Stage("doctor", partial(check, quick=True), {"doctor-quick": CheckRow}, quick_jobs, 35),
    Stage(
        "table4",
        partial(
            measure_table4,
            file="table4",
            model=table4.DEFAULT_MODEL,
            runs=PAPERS_RUNS,
            names=",".join(methods.METHODS),
        ),
        {"table4": Table4Row},
        jobs.table4_jobs,
        54,
    ),
    Stage("layer", measure_headline, {"ceilings": CeilingRow, "layer": LayerRow}, jobs.headline_jobs, 53),
    Stage("host", measure_host, {"host": HostRow}, host_jobs, 10),
    Stage("llama", measure_llama, {"table4-llama": Table4Row}, jobs.llama_jobs, 30),
    Stage("all-checks", partial(check, quick=False), {"doctor": CheckRow}, all_jobs, 21),
    Stage("tune", tune, {"tune": TuneRow}, jobs.tune_jobs, 12),
    Stage("shapes", measure_others, {"layer-shapes": LayerRow}, jobs.other_jobs, 14),
)
# Run where it is named, and in a dry run.
CANDIDATES = Stage("candidates", candidates.parts, {candidates.FILE: CandidateRow}, jobs.candidate_jobs, 60)


def build(limit: float) -> None:
    """Compiles csrc for this GPU; what it leaves undone, `native` says itself."""
    start, command = time.monotonic(), [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = str(process.wait(timeout=limit))
    except subprocess.TimeoutExpired:
        status = f"ended after {limit:.0f} s"
    finally:
        run.end(process)
    made = "built" if status == "0" else f"NOT BUILT ({status})"
    print(f"csrc: {made}, {time.monotonic() - start:.0f} s", flush=True)


def parser() -> argparse.ArgumentParser:
    names = [stage.name for stage in (*STAGES, CANDIDATES)]
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    made.add_argument("--stage", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    made.add_argument("--minutes", type=float, help="for everything, 8 without it; the last stages go without")
    made.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    made.add_argument("--plan", action="store_true", help="say what would run and be compiled, and end")
    made.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="that compile")
    made.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to see that everything runs")
    made.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a stage's own process
    made.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    # What importing took counts, as far as a process knows that of itself.
    minutes = options.minutes if options.minutes is not None else DRY_MINUTES if options.dry_run else MINUTES
    deadline = time.monotonic() - time.process_time() + 60 * minutes
    if not (options.dry_run or options.plan or torch.cuda.is_available()):
        print("gpu: torch finds no GPU here; --dry-run and --plan need none", file=sys.stderr)
        return 2
    every = (*STAGES, CANDIDATES)
    wanted = options.stage or [stage.name for stage in (every if options.dry_run else STAGES)]
    selected = [stage for stage in every if stage.name in wanted]
    settings = Settings(options.dry_run, deadline, options.out.resolve(), options.log)
    # As an exception it ends the processes below this one too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: terminated"))
    if options.here:
        return run_here(selected[0], settings)
    if INTERPRETED.value:
        print("gpu: TRITON_INTERPRET is set, and the interpreter compiles nothing: unset it", file=sys.stderr)
        return 2
    plan = plan_of(selected, options.cores)
    run.announce(plan, BUILD_LIMIT)
    if options.plan:
        return 0
    if not settings.dry:
        build(min(BUILD_LIMIT, max(0.0, settings.left())))
    # Beside what a run of the usual stages stored there.
    began, file = timing.now(), "run-candidates" if selected == [CANDIDATES] else "run"
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = settings._replace(log=Path(folder) / "compiled")
            told, variables = partial(command_of, settings), environment_of(settings, folder)
            rows = run_stages(plan, settings, told, variables, file)
    finally:
        for line in summary(settings.path, {s.name: s.files for s in STAGES}, began) if file == "run" else ():
            print(line, flush=True)
    return int(any(row["status"] != "ok" for row in rows))


def run_here(stage: Stage, settings: Settings) -> int:
    seconds = run.wait_for_the_clock()
    if seconds is None:
        return 1
    if settings.log is not None and not settings.dry:
        tell_compilations(settings.log)
    return int(run_stage(stage, settings._replace(deadline=time.monotonic() + seconds)) > 0)


def command_of(settings: Settings, stage: Stage) -> list[str]:
    own = ["--stage", stage.name, "--out", str(settings.out), "--log", str(settings.log)]
    return [sys.executable, "-m", "benchmarks.gpu", "--here", *own, *(["--dry-run"] if settings.dry else [])]


def environment_of(settings: Settings, folder: str) -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found |= {"TRITON_INTERPRET": "1"} if settings.dry else {}
    # The profiler that measures peak memory on a CPU would print two lines a step.
    found |= {"KINETO_LOG_LEVEL": "99", "HYDRA_KERNELS_CACHE": str(Path(folder) / "tuned")}
    # One cache for all processes: inductor would give each of its own another.
    found.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    return found


if __name__ == "__main__":
    sys.exit(main())

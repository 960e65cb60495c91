"""A run of stages, each in a process of its own, within one limit of time: what counts first runs first.

Before a stage's clock starts, all kernels it needs that the plan knows are compiled in parallel processes, while the
stage's own process starts torch and waits. A stage stores what it has after each of its parts: one that crashes, hangs
or runs out of time, or a run that is cut off, loses the part it was at and nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.device.compilation import START, Job, compile_all, count_of, seconds_for, told
from benchmarks.device.isolated import ROOT
from benchmarks.measuring import timing
from benchmarks.measuring.rows import StageRow

# Seconds that a stage may take after the end of its time to finish the part that it is at.
GRACE = 10.0
# And then to end its own processes.
TERMINATION = 2.0
# A stage that would have less than this to measure does not start.
LEAST = 3.0


class Settings(NamedTuple):
    dry: bool
    deadline: float  # in time.monotonic()
    out: Path
    # Where processes tell what Triton compiled after the clock had started.
    log: Path | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def path(self, file: str) -> Path:
        return self.out / f"{file}-{'dry-' if self.dry else ''}{self.device.type}.json"


class Part(NamedTuple):
    """Rows of one of the stage's files that are ready, and how many checks or measurements among them failed."""

    file: str
    rows: Sequence[Any]
    failures: int = 0


class Stage(NamedTuple):
    """``run`` yields parts; the rows of a file are stored together, of the schema that ``files`` names.

    ``seconds`` is what it may take once its process has started and ``jobs`` are compiled.
    """

    name: str
    run: Callable[[Settings], Iterator[Part]]
    files: Mapping[str, type]
    jobs: Callable[[], Mapping[str, Job]]
    seconds: float


class Planned(NamedTuple):
    """A stage with the jobs that no earlier one has, on a machine's cores."""

    stage: Stage
    jobs: Mapping[str, Job]
    cores: int

    @property
    def ahead(self) -> float:
        """Seconds before the clock: for compiling, and for the process that starts meanwhile."""
        return max(START, seconds_for(self.jobs.values(), self.cores))

    @property
    def limit(self) -> float:
        return self.ahead + self.stage.seconds


def plan_of(selected: Sequence[Stage], cores: int) -> list[Planned]:
    """The stages in their order, each with what is compiled for it: what several need, for the first."""
    known: set[str] = set()
    found = []
    for stage in selected:
        jobs = {name: job for name, job in stage.jobs().items() if name not in known}
        known |= jobs.keys()
        found.append(Planned(stage, jobs, cores))
    return found


def attempts(
    settings: Settings, file: str, tasks: Sequence[tuple[str, Callable[[], Sequence[Any]]]],
    failures_of: Callable[[Any], int] = lambda row: 0,
) -> Iterator[Part]:  # fmt: skip
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
            yield Part(file, [], 1)
            continue
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        yield Part(file, rows, sum(map(failures_of, rows)))


def run_stage(stage: Stage, settings: Settings) -> int:
    """Runs a stage here and stores the rows of a file after each part; how many checks or measurements failed."""
    rows: dict[str, list[Any]] = {file: [] for file in stage.files}
    failures, environment = 0, timing.environment(settings.device)
    for part in stage.run(settings):
        rows[part.file] += part.rows
        failures += part.failures
        if part.rows:
            timing.write_result(settings.path(part.file), environment, rows[part.file], stage.files[part.file])
    return failures


def run_stages(
    plan: Sequence[Planned],
    settings: Settings,
    command: Callable[[Stage], list[str]],
    environment: Mapping[str, str],
    file: str = "run",
) -> list[StageRow]:
    """A process for each stage, one after the other, whatever becomes of those before; each row is stored at once.

    ``command`` starts one that reads from its input how many seconds it has. What a stage leaves of its time is there
    for the later ones; where the time is short, the last ones get none.
    """
    rows: list[StageRow] = []
    about = timing.environment(settings.device)
    for place, planned in enumerate(plan):
        spare = settings.left() - sum(later.limit for later in plan[place:])
        seconds = min(planned.stage.seconds + max(0.0, spare), settings.left() - planned.ahead)
        if seconds < LEAST:
            row = _row(planned, "skipped", settings)
            print(f"{planned.stage.name}: skipped, the time was over", flush=True)
        else:
            row = _run_one(planned, settings, seconds, command(planned.stage), environment)
        rows.append(row)
        timing.write_result(settings.path(file), about, rows, StageRow)
    return rows


def _run_one(
    planned: Planned, settings: Settings, seconds: float, command: Sequence[str], environment: Mapping[str, str]
) -> StageRow:
    start, name, before = time.monotonic(), planned.stage.name, len(told(settings.log)) if settings.log else 0
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, start_new_session=True, stdin=subprocess.PIPE, text=True
    )
    try:
        if planned.jobs and not settings.dry:
            made = compile_all(planned.jobs, planned.cores, start + planned.ahead, environment)
            failed = [row for row in made if row["status"] == "fail"]
            compiled, ahead = len(made) - len(failed), time.monotonic() - start
            print(f"{name}: compiled {compiled} of {len(made)} ahead in {ahead:.0f} s", flush=True)
            for row in failed:
                print(f"{name}: {row['check']} was not compiled ahead: {row['reason']}", flush=True)
        else:
            compiled, ahead = 0, 0.0
        try:
            process.stdin.write(f"{seconds}\n")
            process.stdin.close()
            status = str(process.wait(timeout=max(0.0, start + planned.ahead - time.monotonic()) + seconds + GRACE))
        except BrokenPipeError:
            status = str(process.wait())  # it ended before it could read
        except subprocess.TimeoutExpired:
            status = f"killed, {seconds + GRACE:.0f} s were over"
    finally:
        end(process)
    late = told(settings.log)[before:] if settings.log else []
    verdict = "ok" if status == "0" else f"FAILED ({status})"
    taken = time.monotonic() - start
    print(f"{name}: {verdict}, {taken:.0f} s; compiled after the clock had started: {len(late)}", flush=True)
    if late:
        print(f"{name}: compiled late: {', '.join(sorted(set(late)))}", flush=True)
    return _row(planned, verdict, settings, taken, compiled, ahead, late)


def end(process: subprocess.Popen[Any]) -> None:
    """Ends what still runs: it may end what it started in sessions of their own; then its whole session, compilers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(TERMINATION)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _row(
    planned: Planned, status: str, settings: Settings, seconds: float = 0.0, compiled: int = 0, ahead: float = 0.0,
    late: Sequence[str] = (),
) -> StageRow:  # fmt: skip
    return StageRow(
        stage=planned.stage.name,
        status=status,
        seconds=round(seconds, 1),
        limit=planned.limit,
        planned=len(planned.jobs),
        compiled=compiled,
        compile_seconds=round(ahead, 1),
        late=list(late),
        dry=settings.dry,
    )


def announce(plan: Sequence[Planned], build: float) -> None:
    """What runs, in which order and how long, and what will be compiled before each."""
    print(f"csrc: at most {build:.0f} s")
    for planned in plan:
        jobs = planned.jobs.values()
        print(f"{planned.stage.name}: at most {planned.limit:.0f} s; compiled before: {count_of(jobs)}", flush=True)
    total = build + sum(planned.limit for planned in plan)
    print(f"in all: at most {total:.0f} s; {sum(len(planned.jobs) for planned in plan)} compiled ahead", flush=True)


def wait_for_the_clock() -> float | None:
    """In a stage's process: the seconds that it has, once its kernels are compiled; None where the run has ended."""
    line = sys.stdin.readline()
    return float(line) if line.strip() else None

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import isolated, stages, timing
from benchmarks.isolated import ROOT, CheckRow
from benchmarks.rows import CeilingRow, HostRow, LayerRow, Table4Row
from benchmarks.stages import Part, Settings, TuneRow

# Seconds that a stage may take after the end of its time to finish the part that it is at.
GRACE = 15.0
# And then to end its own processes.
TERMINATION = 2.0


class Stage(NamedTuple):
    """``run`` yields parts; their rows are stored together, of ``schema``. ``seconds`` is its share of the time."""

    name: str
    run: Callable[[Settings], Iterator[Part]]
    schema: type
    seconds: float


STAGES = (
    Stage("doctor", isolated.check_kernels_and_backends, CheckRow, 150),
    Stage("ceilings", stages.measure_ceilings, CeilingRow, 20),
    Stage("tune", stages.tune, TuneRow, 70),
    Stage("host", stages.measure_host, HostRow, 25),
    Stage("layer", stages.measure_layers, LayerRow, 130),
    Stage("table4", stages.measure_table4, Table4Row, 110),
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

"""Equal learning, and the paper's claim at our scale. ``python -m benchmarks.learn``

Equal: each method fine-tunes from equal seeds as written by hand, the same with the images of each batch in another
order (which is rounding alone), and in each form of ours: ours must differ from naive by no more than naive from
itself. Hydra does so over a bf16 backbone too: naive, ours, and with a sum that is rounded once.
Claim: Hydra against LoRA and SeqLoRA of equal parameter counts in the MLP, in the attention and in both, each at the
learning rate that the same small search chose for it on validation images, over seeds that the search did not see.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.learning import training
from benchmarks.learning.training import TINY, Scale
from benchmarks.measuring import images, timing
from benchmarks.measuring.modes import DTYPES
from benchmarks.measuring.rows import LearnRow
from benchmarks.rendering import learn as render_learn
from hydra_kernels.choose.machine import here

KINDS = ("lora", "seqlora", "hydra")
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
EQUAL_RATE = 1e-2
# Seeds of the search are counted from here, far from those of the final runs.
SEARCH = 1000


@dataclass(frozen=True)
class Settings:
    device: torch.device
    data: Path | None
    seeds: int
    search_seeds: int
    scale: Scale
    workers: int
    dry: bool


@dataclass(frozen=True)
class Job:
    """One fine-tuning run, still to be made."""

    experiment: str
    position: str
    owner: str
    kind: str
    dtype: str
    rate: float
    seed: int
    backend: str = "auto"
    form: str = "auto"


def routes(kind: str, device: torch.device) -> list[tuple[str, str]]:
    """Every (backend, form) of a CPU to train in fp32: `native`'s where it is built, else the two that `aten` has."""
    if device.type != "cpu":
        return [("auto", "auto")]
    backend = "native" if here(device).reasons["native"] is None else "aten"
    forms = ["composed"] if kind == "lora" else ["kept", "composed"]
    return [(backend, form) for form in (*forms, *(["effective"] if backend == "native" else []))]


def equal_jobs(settings: Settings) -> Iterator[Job]:
    for seed in range(settings.seeds):
        for kind in KINDS:
            for owner in ("naive", "again"):
                yield Job("equal", "both", owner, kind, "fp32", EQUAL_RATE, seed)
            for route in routes(kind, settings.device):
                yield Job("equal", "both", "ours", kind, "fp32", EQUAL_RATE, seed, *route)
        for owner in ("naive", "ours", "once"):
            yield Job("equal", "both", owner, "hydra", "bf16", EQUAL_RATE, seed)


def search_jobs(settings: Settings) -> Iterator[Job]:
    for position in training.POSITIONS:
        for kind in KINDS:
            for rate in RATES:
                for seed in range(settings.search_seeds):
                    yield Job("search", position, "ours", kind, "fp32", rate, SEARCH + seed)


def claim_jobs(searched: Sequence[LearnRow], settings: Settings) -> Iterator[Job]:
    """The final runs, each method in each place at its best rate."""
    for position in training.POSITIONS:
        for kind in KINDS:
            rate = best_rate(searched, position, kind)
            for seed in range(settings.seeds):
                yield Job("claim", position, "ours", kind, "fp32", rate, seed)


def best_rate(rows: Sequence[LearnRow], position: str, kind: str) -> float:
    """That of the highest mean accuracy on validation images, to a millionth; of equal ones the lowest."""
    found = [r for r in rows if (r["experiment"], r["position"], r["method"]) == ("search", position, f"ours_{kind}")]
    rates = sorted({r["rate"] for r in found})
    means = {rate: round(statistics.mean(r["validation"] for r in found if r["rate"] == rate), 6) for rate in rates}
    return max(rates, key=lambda rate: (means[rate], -rate))


def run(settings: Settings, progress: Progress) -> list[LearnRow]:
    """Trains the backbone and makes every run of both experiments."""
    pictures = images.load(settings.data)
    base = training.backbone(pictures, settings.scale, 0, settings.device)
    spawn = get_context("spawn")  # torch's threads don't survive a fork
    one = partial(_row, base=base, pictures=pictures, settings=settings)

    with spawn.Pool(settings.workers, torch.set_num_threads, (1,)) if settings.workers > 1 else nullcontext() as pool:

        def made(jobs: Iterator[Job], name: str) -> list[LearnRow]:
            waiting = list(jobs)
            bar = progress.add_task(name, total=len(waiting))
            rows = []
            for row in pool.imap(one, waiting) if pool else map(one, waiting):
                rows.append(row)
                progress.advance(bar)
            return rows

        equal = made(equal_jobs(settings), "equal")
        searched = made(search_jobs(settings), "search")
        return [*equal, *searched, *made(claim_jobs(searched, settings), "claim")]


def _row(job: Job, base: torch.nn.Module, pictures: images.Images, settings: Settings) -> LearnRow:
    data = training.split(pictures, settings.scale, job.seed, settings.device)
    backend = job.backend if job.owner == "ours" else "reference"
    model = training.adapt(base, job.kind, job.position, backend, DTYPES[job.dtype], job.seed, job.form)
    ran = training.route(model, settings.scale) if job.owner == "ours" else (None, None)
    if job.owner == "once":
        training.round_once(model)
    run = training.fine_tune(model, data, settings.scale, job.rate, job.seed, reordered=job.owner == "again")
    return LearnRow(
        experiment=job.experiment,
        data=pictures.name,
        position=job.position,
        method=f"{job.owner}_{job.kind}",
        backend=ran[0],
        form=ran[1],
        trainable=run.trainable,
        head=run.head,
        dtype=job.dtype,
        rate=job.rate,
        seed=job.seed,
        images=len(data.train[1]),
        tested=len(data.test[1]),
        losses=[round(loss, 9) for loss in run.losses] if job.experiment == "equal" else [],
        validation=round(run.validation, 6),
        test=round(run.test, 6),
        dry=settings.dry,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learn", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; scikit-learn's digits by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=10, help="of the final runs (default: 10)")
    parser.add_argument("--search-seeds", type=int, default=5, help="of each learning rate (default: 5)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a process each (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result (default: out)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and two seeds: does it run at all")
    options = parser.parse_args(arguments)
    settings = Settings(
        device=torch.device(options.device),
        data=options.data,
        seeds=2 if options.dry_run else options.seeds,
        search_seeds=1 if options.dry_run else options.search_seeds,
        scale=TINY if options.dry_run else Scale(),
        workers=options.workers,
        dry=options.dry_run,
    )
    torch.set_num_threads(1)  # the models are too small for more
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        for name in ("seeds", "search_seeds", "workers"):
            if getattr(settings, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(settings, name)}")
        with Progress(*columns, console=console) as progress:
            rows = run(settings, progress)
    except ValueError as error:
        print(f"learn: {error}", file=sys.stderr)
        return 2
    environment = timing.environment(settings.device)
    path = options.out / f"learn-{settings.device.type}-{rows[0]['data'].lower()}.json"
    timing.write_result(path, environment, rows, LearnRow)
    console.print(render_learn.learn_markdown(environment, rows), markup=False, soft_wrap=True)
    console.print(f"Stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

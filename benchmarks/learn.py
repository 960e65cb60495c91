"""Equal learning, and the paper's claim at our scale. ``python -m benchmarks.learn``

Equal: each method fine-tunes from equal seeds as written by hand, the same with the images of each batch in another
order (which is rounding alone), and in each form of ours: ours must differ from naive by no more than naive from
itself. Hydra does so over a bf16 backbone too: naive, ours, and with a sum that is rounded once.
Claim: Hydra against LoRA and SeqLoRA of equal parameter counts in the MLP, in the attention and in both, each at the
learning rate that the same small search chose for it on validation images, over seeds that the search did not see.
``--backbone minilm`` asks the claim of a pretrained model that learns to sort texts: in the MLP, beside a head alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.learning import minilm, texts, training
from benchmarks.learning.minilm import TINY_TEXT, TextScale
from benchmarks.learning.record import Record
from benchmarks.learning.training import TINY, Layers, Logits, Scale, Split
from benchmarks.measuring import images, timing
from benchmarks.measuring.modes import DTYPES
from benchmarks.measuring.rows import LearnRow
from benchmarks.rendering.learn import learn_markdown
from benchmarks.rendering.pretrained import pretrained_markdown
from benchmarks.rendering.tables import Stored
from hydra_kernels.choose.machine import here

KINDS = ("lora", "seqlora", "hydra")
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
EQUAL_RATE = 1e-2
# Seeds of the search are counted from here, far from those of the final runs.
SEARCH = 1000


class Plan(NamedTuple):
    """What is asked of a backbone: the claim of each (place, kind), with the rates to choose from; and equality."""

    rates: Mapping[tuple[str, str], Sequence[float]]
    equal: bool


PLANS = {
    "vit": Plan({(place, kind): RATES for place in training.POSITIONS for kind in KINDS}, equal=True),
    # 3e-2 was tried for LoRA, and lets it diverge. A head alone learns from larger steps.
    "minilm": Plan({**{("mlp", kind): (1e-3, 3e-3, 1e-2) for kind in KINDS}, ("none", "head"): RATES}, equal=False),
}


@dataclass(frozen=True)
class Settings:
    device: torch.device
    data: Path | None
    seeds: int
    search_seeds: int
    scale: Scale | TextScale
    workers: int
    dry: bool
    backbone: str = "vit"
    minutes: float | None = None

    @property
    def plan(self) -> Plan:
        return PLANS[self.backbone]


@dataclass(frozen=True)
class Task:
    """What adapters learn, and in which backbone."""

    data: str
    base: torch.nn.Module
    layers: Layers
    split: Callable[[int], Split]  # of a seed
    head_split: Callable[[int], Split]  # the same, of what a head alone reads
    logits: Logits
    rows: Callable[[Split], Sequence[int]]  # that a layer is given, at least and at most


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
    for (position, kind), rates in settings.plan.rates.items():
        for rate in rates:
            for seed in range(settings.search_seeds):
                yield Job("search", position, "ours", kind, "fp32", rate, SEARCH + seed)


def claim_jobs(searched: Sequence[LearnRow], settings: Settings) -> Iterator[Job]:
    """The final runs, each method in each place at its best rate."""
    for position, kind in settings.plan.rates:
        rate = best_rate(searched, position, kind)
        for seed in range(settings.seeds):
            yield Job("claim", position, "ours", kind, "fp32", rate, seed)


def best_rate(rows: Sequence[LearnRow], position: str, kind: str) -> float:
    """That of the highest mean accuracy on validation images, to a millionth; of equal ones the lowest."""
    found = [r for r in rows if (r["experiment"], r["position"], r["method"]) == ("search", position, f"ours_{kind}")]
    rates = sorted({r["rate"] for r in found})
    means = {rate: round(statistics.mean(r["validation"] for r in found if r["rate"] == rate), 6) for rate in rates}
    return max(rates, key=lambda rate: (means[rate], -rate))


def image_task(settings: Settings) -> Task:
    """Trains the backbone."""
    pictures, scale, device = images.load(settings.data), settings.scale, settings.device
    split = partial(_split_images, pictures, scale, device)
    return Task(
        data=pictures.name,
        base=training.backbone(pictures, scale, 0, device),
        layers=training.VIT,
        split=split,
        head_split=split,
        logits=training.logits_of,
        rows=partial(_rows_of_images, scale),
    )


def _split_images(pictures: images.Images, scale: Scale, device: torch.device, seed: int) -> Split:
    return training.split(pictures, scale, seed, device)


def _rows_of_images(scale: Scale, data: Split) -> Sequence[int]:
    return (scale.rows,)


def text_task(settings: Settings) -> Task:
    """Loads the backbone, or makes the random one of a dry run."""
    sorted_texts, scale = texts.definitions(), settings.scale
    base, ids = (minilm.stand_in if settings.dry else minilm.pretrained)(sorted_texts, scale)
    labels = torch.tensor(sorted_texts.labels, device=settings.device)
    base, ids = base.to(settings.device), ids.to(settings.device)
    return Task(
        data="definitions",
        base=base,
        layers=minilm.LAYERS,
        split=partial(minilm.split, ids, ids, labels, scale),
        head_split=partial(minilm.split, minilm.features(base, ids), ids, labels, scale),
        logits=minilm.logits_of,
        rows=partial(_rows_of_texts, scale),
    )


def _rows_of_texts(scale: TextScale, data: Split) -> Sequence[int]:
    return minilm.rows_of(data.train[0], scale.batch)


TASKS = {"vit": image_task, "minilm": text_task}


class UnfinishedError(Exception):
    """The minutes are over; what was made is kept."""


def run(settings: Settings, progress: Progress, out: Path) -> list[LearnRow]:
    """Makes every run of the backbone's plan that the record in ``out`` lacks; UnfinishedError where time is short."""
    end = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    task = TASKS[settings.backbone](settings)
    record = Record(out / f"learn-{settings.device.type}-{task.data.lower()}.jsonl", Job, about(settings))
    spawn = get_context("spawn")  # torch's threads don't survive a fork
    one = partial(_row, task=task, settings=settings)

    with spawn.Pool(settings.workers, torch.set_num_threads, (1,)) if settings.workers > 1 else nullcontext() as pool:

        def made(jobs: Iterator[Job], name: str) -> list[LearnRow]:
            wanted = list(jobs)
            waiting = [job for job in wanted if job not in record.rows]
            bar = progress.add_task(name, total=len(wanted), completed=len(wanted) - len(waiting))
            for first in range(0, len(waiting), settings.workers):
                if end is not None and time.monotonic() > end:
                    raise UnfinishedError(f"{len(waiting) - first} runs of {name} are left: the same command goes on")
                batch = waiting[first : first + settings.workers]
                for job, row in zip(batch, pool.map(one, batch, 1) if pool else map(one, batch), strict=True):
                    record.add(job, row)
                    progress.advance(bar)
            return [record.rows[job] for job in wanted]

        equal = made(equal_jobs(settings), "equal") if settings.plan.equal else []
        searched = made(search_jobs(settings), "search")
        rows = [*equal, *searched, *made(claim_jobs(searched, settings), "claim")]
    record.remove()
    return rows


def about(settings: Settings) -> dict[str, object]:
    """What all runs of one record have in common."""
    environment = timing.environment(settings.device)
    kept = {key: environment[key] for key in ("commit", "torch", "transformers", "device")}
    return {**kept, "scale": repr(settings.scale), "data": str(settings.data), "dry": settings.dry}


def _row(job: Job, task: Task, settings: Settings) -> LearnRow:
    data = (task.head_split if job.kind == "head" else task.split)(job.seed)
    backend = job.backend if job.owner == "ours" else "reference"
    dtype = DTYPES[job.dtype]
    model = training.adapt(task.base, job.kind, job.position, backend, dtype, job.seed, job.form, task.layers)
    ran = job.owner == "ours" and job.kind != "head"
    backend, form = training.route(model, *task.rows(data)) if ran else (None, None)
    if job.owner == "once":
        training.round_once(model)
    again = job.owner == "again"
    searching = job.experiment == "search"
    run = training.fine_tune(model, data, settings.scale, job.rate, job.seed, again, task.logits, not searching)
    return LearnRow(
        experiment=job.experiment,
        data=task.data,
        position=job.position,
        method=f"{job.owner}_{job.kind}",
        backend=backend,
        form=form,
        trainable=run.trainable,
        head=run.head,
        dtype=job.dtype,
        rate=job.rate,
        seed=job.seed,
        images=len(data.train[1]),
        tested=len(data.test[1]),
        losses=[] if searching else [round(loss, 9) for loss in run.losses],
        validation=round(run.validation, 6),
        test=None if run.test is None else round(run.test, 6),
        dry=settings.dry,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learn", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=list(PLANS), default="vit", help="what is adapted (default: vit)")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10, for vit; scikit-learn's digits by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=10, help="of the final runs (default: 10)")
    parser.add_argument("--search-seeds", type=int, default=5, help="of each learning rate (default: 5)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a process each (default: 1)")
    parser.add_argument("--minutes", type=float, help="then no run starts any more; the same command goes on")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result (default: out)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and two seeds: does it run at all")
    options = parser.parse_args(arguments)
    scales = {"vit": (Scale(), TINY), "minilm": (TextScale(), TINY_TEXT)}[options.backbone]
    settings = Settings(
        device=torch.device(options.device),
        data=options.data,
        seeds=2 if options.dry_run else options.seeds,
        search_seeds=1 if options.dry_run else options.search_seeds,
        scale=scales[options.dry_run],
        workers=options.workers,
        dry=options.dry_run,
        backbone=options.backbone,
        minutes=options.minutes,
    )
    torch.set_num_threads(1)  # the models are too small for more
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        for name in ("seeds", "search_seeds", "workers"):
            if getattr(settings, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(settings, name)}")
        if settings.data is not None and settings.backbone != "vit":
            raise ValueError(f"data: images are for the backbone vit, got {settings.data} for {settings.backbone}")
        with Progress(*columns, console=console) as progress:
            rows = run(settings, progress, options.out)
    except ValueError as error:
        print(f"learn: {error}", file=sys.stderr)
        return 2
    except UnfinishedError as left:
        print(f"learn: {left}", file=sys.stderr)
        return 3
    environment = timing.environment(settings.device)
    path = options.out / f"learn-{settings.device.type}-{rows[0]['data'].lower()}.json"
    timing.write_result(path, environment, rows, LearnRow)
    written = learn_markdown if settings.plan.equal else pretrained_markdown
    console.print(written(Stored(path, environment, rows)), markup=False, soft_wrap=True)
    console.print(f"Stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

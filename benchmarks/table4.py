"""The paper's Table 4: what a training step of ViT-B/32 costs with each method. ``python -m benchmarks.table4``

Every round gives all methods the same batch, in a new random order, and every round starts ours from the weights and
the optimizer state of naive. After it their losses and gradients are compared: a difference beyond rounding ends the
run, and nothing is printed or stored. The batch is on the device, enlarged, before the clock starts. In mode compile
the forward of the whole model is compiled; in mode graph a step, optimizer and all, is the replay of one CUDA graph,
but memory is that of eager steps: what a graph holds, it holds for good.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks import images, methods, modes, render, timing
from benchmarks.methods import Contestant, Difference, Ranks
from benchmarks.timing import Table4Row

EPOCH_IMAGES = 50_000
PAPER_BATCH = 128
# arXiv 2309.06922, Table 4, seconds an epoch on an RTX 3090, by the last word of our method's name.
PAPER_SECONDS = {"full_tuning": 148.95, "lora": 115.44, "seqlora": 112.19, "hydra": 119.37}
# With adapter biases these give the paper's parameter counts: 0.21 M for SeqLoRA and Hydra, 0.19 M of 0.22 M for LoRA.
PAPER_RANKS = {"lora": Ranks(4, 0), "seqlora": Ranks(0, 11), "hydra": Ranks(3, 3)}
TARGET, HEAD = "mlp.fc2", "classifier"
# fp32 is multiplied in full, tf32 is fp32 multiplied as a GPU does with that setting.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# Rounds before the counted ones: in the first the saved bytes are counted, in the second the peak is measured.
UNCOUNTED_ROUNDS = 2


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: str
    mode: str
    batch_size: int
    steps: int
    methods: tuple[str, ...]
    ranks: Mapping[str, Ranks]
    data: Path | None
    checkpoint: Path | None
    seed: int
    full: bool
    dry: bool
    # Seconds after which no further round starts, None for no limit.
    time_limit: float | None

    def __post_init__(self) -> None:
        modes.check(self.mode, self.device, self.dry)
        if self.mode != "eager" and self.full and EPOCH_IMAGES % self.batch_size:
            raise ValueError(
                f"batch-size is {self.batch_size}, which leaves the epoch a smaller last batch, but a model has one "
                f"batch size in mode {self.mode}: expected a divisor of {EPOCH_IMAGES:,}"
            )


@dataclass
class Measured:
    """What the rounds gave, by method; ``images`` and each list of ``seconds`` have one entry a counted round."""

    images: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    parity: dict[str, Difference] = field(default_factory=dict)


def vit(checkpoint: Path | None, dry: bool) -> nn.Module:
    """ViT-B/32 with 10 classes: random weights, or a local checkpoint's; a dry run gets a tiny one."""
    if checkpoint is None:
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return ViTForImageClassification(ViTConfig(patch_size=32, num_labels=10, **(small if dry else {})))
    if not checkpoint.is_dir():
        raise ValueError(f"checkpoint: {checkpoint} is no local folder")
    # A head of another number of classes is replaced by a new one, as fine-tuning does.
    return ViTForImageClassification.from_pretrained(
        checkpoint, local_files_only=True, num_labels=10, ignore_mismatched_sizes=True, dtype=torch.float32
    )


def model_name(config: ViTConfig) -> str:
    if (config.hidden_size, config.num_hidden_layers, config.patch_size) == (768, 12, 32):
        return "ViT-B/32"
    return f"ViT {config.num_hidden_layers}x{config.hidden_size}/{config.patch_size}"


class Replayed:
    """A contestant whose step copies the batch to where its CUDA graph reads it, which counts, and replays that."""

    def __init__(self, contestant: Contestant, batch: tuple[Tensor, Tensor], device: torch.device) -> None:
        self._batch = tuple(tensor.clone() for tensor in batch)
        step = partial(contestant.step, *self._batch)
        recorder = modes.Recorder(device)
        recorder.warm_up(step)
        # Where there are none, the captured backward writes gradients; else every replay would add to them.
        contestant.optimizer.zero_grad(set_to_none=True)
        self._replay = recorder.capture(step)

    def step(self, images: Tensor, labels: Tensor) -> None:
        for read, new in zip(self._batch, (images, labels), strict=True):
            read.copy_(new)
        self._replay()


def play_round(
    players: Mapping[str, Contestant | Replayed],
    order: Sequence[str],
    batch: tuple[Tensor, Tensor],
    device: torch.device,
) -> dict[str, float]:
    """One step of every method on the same batch; seconds by method."""
    return {name: timing.seconds(partial(players[name].step, *batch), device) for name in order}


def measure(
    contestants: Mapping[str, Contestant],
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Settings,
    progress: Progress,
) -> Measured:
    """Plays the uncounted rounds, in which memory is measured, and then counted ones until the batches end."""
    device, tolerance = settings.device, methods.TOLERANCES[settings.dtype]
    measured, players = Measured(seconds={name: [] for name in contestants}), contestants
    started = time.perf_counter()
    rounds = UNCOUNTED_ROUNDS + settings.steps
    bar = progress.add_task("rounds", total=rounds)
    for number, order in enumerate(timing.shuffled_rounds(list(contestants), rounds, settings.seed)):
        round_started = time.perf_counter()
        batch = next(batches)
        if number == 0:
            for name in order:
                step, parameters = partial(contestants[name].step, *batch), contestants[name].model.parameters()
                measured.saved[name] = timing.saved_bytes(step, parameters)
        elif number == 1:
            for name in order:
                contestants[name].optimizer.zero_grad(set_to_none=True)
                above = timing.peak_bytes(partial(contestants[name].step, *batch), device)
                measured.peak[name] = contestants[name].held_bytes() + above
        else:
            measured.images.append(len(batch[1]))
            for name, taken in play_round(players, order, batch, device).items():
                measured.seconds[name].append(taken)
        for name, difference in methods.settle(contestants, tolerance).items():
            measured.parity[name] = difference.or_worse(measured.parity.get(name, difference))
        if settings.mode == "graph" and number + 1 == UNCOUNTED_ROUNDS:
            players = {name: Replayed(contestant, batch, device) for name, contestant in contestants.items()}
            methods.start_equal(contestants)  # after the steps that warmed up
        progress.advance(bar)
        last_round = time.perf_counter() - round_started
        if not progress.console.is_terminal:
            progress.console.print(f"round {number + 1} of {rounds}: {last_round:.1f} s")
        next_end = time.perf_counter() - started + last_round
        late = settings.time_limit is not None and next_end > settings.time_limit
        if late and measured.images and number + 1 < rounds:
            progress.console.print(f"Stopped by the time limit after {len(measured.images)} counted rounds.")
            break
    return measured


def rows_of(
    measured: Measured, contestants: Mapping[str, Contestant], data: str, settings: Settings
) -> list[Table4Row]:
    """The table's rows, in the order of the methods."""
    tolerance = methods.TOLERANCES[settings.dtype]
    config = next(iter(contestants.values())).model.config
    model = model_name(config)
    whole_epoch = sum(measured.images) == EPOCH_IMAGES
    rows = []
    for name, contestant in contestants.items():
        seconds = measured.seconds[name]
        # An epoch at the pace of each step, so that a last batch of fewer images counts as what it is.
        epochs = [taken * EPOCH_IMAGES / count for taken, count in zip(seconds, measured.images, strict=True)]
        pace = timing.quartiles(epochs)
        ratio = timing.paired_ratios(seconds, measured.seconds["naive_lora"]) if "naive_lora" in contestants else None
        parameters = contestant.trainable()
        head = sum(parameter.numel() for key, parameter in parameters.items() if key.startswith(f"{HEAD}."))
        kind = name.rpartition("_")[2]
        paper = PAPER_SECONDS.get(name if name == "full_tuning" else kind)
        parity = measured.parity.get(name)
        rows.append(
            Table4Row(
                model=model,
                weights="random" if settings.checkpoint is None else settings.checkpoint.name,
                batch=settings.batch_size,
                image_size=config.image_size,
                data=data,
                dtype=settings.dtype,
                mode=settings.mode,
                method=name,
                ranks=list(settings.ranks[kind]) if kind in settings.ranks else None,
                trainable=sum(parameter.numel() for parameter in parameters.values()) - head,
                head=head,
                sec_per_epoch=sum(seconds) if whole_epoch else pace.median,
                q1=pace.q1,
                q3=pace.q3,
                projected=not (whole_epoch and settings.batch_size >= PAPER_BATCH and model == "ViT-B/32"),
                paper_sec_per_epoch=paper,
                steps=len(seconds),
                step_seconds=[round(taken, 6) for taken in seconds],
                ratio=ratio and ratio.median,
                ratio_q1=ratio and ratio.q1,
                ratio_q3=ratio and ratio.q3,
                paper_ratio=paper and paper / PAPER_SECONDS["lora"],
                saved_bytes=measured.saved[name],
                peak_bytes=measured.peak[name],
                parity=parity and {**parity._asdict(), "allowed": tolerance._asdict()},
                dry=settings.dry,
            )
        )
    return rows


def run(settings: Settings, progress: Progress) -> list[Table4Row]:
    """Builds every method from the same weights and measures them; ValueError on bad input, ParityError on bad sums."""
    with modes.isolated(settings.device), modes.fp32_products("tf32" if settings.dtype == "tf32" else "ieee"):
        return contest(settings, progress)


def contest(settings: Settings, progress: Progress) -> list[Table4Row]:
    """What `run` does, in a call of its own, at whose end all that it built is let go."""
    dtype = DTYPES[settings.dtype]
    torch.manual_seed(settings.seed)
    pictures = images.load(settings.data)
    base = vit(settings.checkpoint, settings.dry).to(settings.device, dtype)
    contestants = {
        name: Contestant.of(
            name,
            methods.build(base, name, settings.ranks, target=TARGET, head=HEAD, seed=settings.seed),
            capturable=settings.mode == "graph" and settings.device.type == "cuda",
        )
        for name in settings.methods
    }
    methods.start_equal(contestants)
    size = settings.batch_size

    def draw(total: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in images.index_batches(len(pictures.labels), size, total, seed):
            yield pictures.batch(indices, base.config.image_size, settings.device, dtype)

    if settings.mode == "compile":
        [batch] = draw(size, settings.seed + 2)
        for contestant in contestants.values():
            contestant.model.compile(fullgraph=True, dynamic=False)
            # Compiles, which must happen neither under the hooks that count what is saved nor under the clock.
            contestant.step(*batch)
        methods.settle(contestants, methods.TOLERANCES[settings.dtype])
    counted = EPOCH_IMAGES if settings.full else size * settings.steps
    # The uncounted rounds draw batches of their own: a full epoch shows every image of CIFAR-10 exactly once.
    batches = itertools.chain(draw(UNCOUNTED_ROUNDS * size, settings.seed + 1), draw(counted, settings.seed))
    measured = measure(contestants, batches, settings, progress)
    return rows_of(measured, contestants, pictures.name, settings)


def ranks_option(text: str) -> dict[str, Ranks]:
    """``hydra=3+3,lora=4`` as ranks by kind; a kind that is not named keeps its default."""
    ranks = dict(PAPER_RANKS)
    for item in text.split(","):
        kind, _, widths = item.partition("=")
        parts = widths.split("+")
        if kind not in ranks or len(parts) != (2 if kind == "hydra" else 1) or not all(map(str.isdecimal, parts)):
            raise ValueError(f"ranks: {item!r}, expected hydra=A+B, lora=R or seqlora=R")
        first, last = int(parts[0]), int(parts[-1])
        if min(first, last) < 1:
            raise ValueError(f"ranks: {item!r}, expected ranks of 1 and more")
        ranks[kind] = Ranks(first if kind != "seqlora" else 0, last if kind != "lora" else 0)
    return ranks


def methods_option(text: str) -> tuple[str, ...]:
    """Names with commas between, as a tuple in the table's order; ours come with the naive they are compared with."""
    names = text.split(",")
    for name in names:
        if name not in methods.METHODS:
            raise ValueError(f"methods: {name!r}, expected some of {','.join(methods.METHODS)}")
        if (partner := methods.naive_of(name)) and partner not in names:
            raise ValueError(f"methods: {name} needs {partner}, which every step of it is compared with")
    return tuple(name for name in methods.METHODS if name in names)


def settings_of(arguments: Sequence[str] | None) -> tuple[Settings, Path]:
    """The command line as settings and the folder for the results; ValueError names a bad option."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table4", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the whole model")
    parser.add_argument("--mode", choices=modes.MODES, default="eager")
    parser.add_argument("--batch-size", type=int, help="128 on a GPU, the paper's; 32 on a CPU")
    parser.add_argument("--steps", type=int, help="counted rounds: 50 on a GPU, 10 on a CPU")
    parser.add_argument("--methods", default=",".join(methods.METHODS))
    parser.add_argument("--ranks", default="hydra=3+3,lora=4,seqlora=11")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 as distributed; scikit-learn's digits without it")
    parser.add_argument("--checkpoint", type=Path, help="local folder of a ViT checkpoint; random weights without it")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON and the chart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="a whole epoch of 50,000 images with every method")
    parser.add_argument(
        "--dry", action="store_true", help="a tiny model, to see that everything runs; publishes nothing"
    )
    parser.add_argument(
        "--time-limit", type=float, help="seconds after which no round starts: on a CPU 230 unless --full"
    )
    options = parser.parse_args(arguments)
    if options.full and options.steps is not None:
        raise ValueError(f"steps is {options.steps}, but --full sets them: a whole epoch")
    device = modes.device_option(options.device)
    on_cpu = device.type == "cpu"
    batch_size = options.batch_size if options.batch_size is not None else 32 if on_cpu else PAPER_BATCH
    steps = options.steps if options.steps is not None else 10 if on_cpu else 50
    for name, value in (("batch-size", batch_size), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    settings = Settings(
        device=device,
        dtype=options.dtype,
        mode=options.mode,
        batch_size=batch_size,
        steps=math.ceil(EPOCH_IMAGES / batch_size) if options.full else steps,
        methods=methods_option(options.methods),
        ranks=ranks_option(options.ranks),
        data=options.data,
        checkpoint=options.checkpoint,
        seed=options.seed,
        full=options.full,
        dry=options.dry,
        time_limit=230.0 if options.time_limit is None and on_cpu and not options.full else options.time_limit,
    )
    return settings, options.out


def main(arguments: Sequence[str] | None = None) -> int:
    console = Console(stderr=True)
    try:
        settings, out = settings_of(arguments)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        environment = timing.environment(settings.device)
        with Progress(*columns, console=console) as progress:
            rows = run(settings, progress)
    except (OSError, ValueError, methods.ParityError) as error:
        print(f"table4: {error}", file=sys.stderr)
        return 1
    path = out / modes.file_name("table4", settings.device, settings.dtype, settings.mode, settings.dry)
    timing.write_result(path, environment, rows, Table4Row)
    render.table4_chart(environment, rows, path.with_suffix(".png"))
    # Without a terminal rich assumes 80 columns, which would break every cell.
    report = Console(width=None if sys.stdout.isatty() else 170)
    report.print(render.table4_terminal(rows))
    for note in render.table4_notes(environment, rows):
        report.print(note, highlight=False)
    report.print(f"Stored: {path} and {path.with_suffix('.png').name}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The paper's Table 4, of ViT-B/32 and of models of today: what a step costs. ``python -m benchmarks.table4``

Every round gives all methods the same batch, in a new random order, and every round starts ours from the weights and
the optimizer state of naive. After it their losses and gradients are compared: a difference beyond rounding ends the
run, and nothing is printed or stored. The batch is on the device, enlarged, before the clock starts. In mode compile
the forward of the whole model is compiled; in mode graph a step, optimizer and all, is the replay of one CUDA graph,
but memory is that of eager steps: what a graph holds, it holds for good.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from benchmarks.measuring import bases, methods, models, modes, timing
from benchmarks.measuring.methods import Contestant, Difference
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.table4_settings import DEFAULT_MODEL, DTYPES, EPOCH, Settings, file_name, settings_of
from benchmarks.rendering import goals
from benchmarks.rendering.table4 import LEGEND, table4_notes, table4_table
from benchmarks.rendering.tables import environment_note, show

PAPER_BATCH = 128
# arXiv 2309.06922, Table 4, seconds an epoch on an RTX 3090, by the last word of our method's name.
PAPER_SECONDS = {"full_tuning": 148.95, "lora": 115.44, "seqlora": 112.19, "hydra": 119.37}
# Rounds before the counted ones: in the first the saved bytes are counted, in the second the peak is measured.
UNCOUNTED_ROUNDS = 2
# Tokens that are generated over a quantised base, one at a time.
TOKENS = 50


@dataclass
class Measured:
    """What the rounds gave, by method; ``samples`` and each list of ``seconds`` have one entry a counted round."""

    samples: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    parity: dict[str, Difference] = field(default_factory=dict)


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

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        for read, new in zip(self._batch, (inputs, labels), strict=True):
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
    if settings.lora_dropout:
        batch = next(batches)
        with methods.without_dropout(contestants.values()):
            play_round(contestants, list(contestants), batch, device)
            measured.parity = methods.settle(contestants, tolerance)
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
                measured.held[name] = contestants[name].held_bytes()
                measured.peak[name] = measured.held[name] + above
        else:
            measured.samples.append(len(batch[1]))
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
        if late and measured.samples and number + 1 < rounds:
            progress.console.print(f"Stopped by the time limit after {len(measured.samples)} counted rounds.")
            break
    return measured


def generate(contestants: Mapping[str, Contestant], token: Tensor, settings: Settings) -> dict[str, list[float]]:
    """Seconds of a forward of one token without gradients, of every method in turn, in a new order each time."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    players = {name: contestant.model.eval() for name, contestant in contestants.items()}
    with torch.no_grad():
        for number, order in enumerate(timing.shuffled_rounds(list(players), TOKENS + 1, settings.seed)):
            for name in order:
                with torch.autocast(settings.device.type, torch.bfloat16, enabled=contestants[name].autocast):
                    taken = timing.seconds(partial(players[name], token), settings.device)
                if number:  # the first lays out weights
                    found[name].append(round(taken, 6))
    for model in players.values():
        model.train()
    return found


def rows_of(
    measured: Measured, contestants: Mapping[str, Contestant], data: str, settings: Settings
) -> list[Table4Row]:
    """The table's rows, in the order of the methods."""
    tolerance = methods.TOLERANCES[settings.dtype]
    network = next(iter(contestants.values())).model
    model = models.name_of(settings.size, network, settings.checkpoint)
    as_the_paper = settings.model is models.MODELS[DEFAULT_MODEL] and not (
        settings.accumulation > 1 or settings.checkpointing
    )
    whole_epoch = sum(measured.samples) == EPOCH
    the_papers = as_the_paper and model == models.PAPER_MODEL and settings.batch_size >= PAPER_BATCH
    rows = []
    for name, contestant in contestants.items():
        seconds = measured.seconds[name]
        # An epoch at the pace of each step, so that a last batch of fewer images counts as what it is.
        epochs = [taken * EPOCH / count for taken, count in zip(seconds, measured.samples, strict=True)]
        pace = timing.quartiles(epochs)
        ratio = timing.paired_ratios(seconds, measured.seconds["naive_lora"]) if "naive_lora" in contestants else None
        parameters = contestant.trainable()
        head = sum(
            parameter.numel() for key, parameter in parameters.items() if key.startswith(f"{settings.model.head}.")
        )
        kind = name.rpartition("_")[2]
        paper = PAPER_SECONDS.get(name if name == "full_tuning" else kind) if as_the_paper else None
        parity = measured.parity.get(name)
        rows.append(
            Table4Row(
                model=model,
                weights="random" if settings.checkpoint is None else settings.checkpoint.name,
                batch=settings.batch_size,
                accumulation=settings.accumulation,
                checkpointing=settings.checkpointing,
                image_size=network.config.image_size if settings.size.length is None else None,
                sequence=settings.size.length,
                data=data,
                dtype=settings.dtype,
                mode=settings.mode,
                method=name,
                ranks=list(settings.ranks[kind]) if kind in settings.ranks else None,
                base=settings.base,
                lora_dropout=settings.lora_dropout,
                trainable=sum(parameter.numel() for parameter in parameters.values()) - head,
                head=head,
                sec_per_epoch=sum(seconds) if whole_epoch else pace.median,
                q1=pace.q1,
                q3=pace.q3,
                projected=not (whole_epoch and the_papers),
                paper_sec_per_epoch=paper,
                steps=len(seconds),
                step_seconds=[round(taken, 6) for taken in seconds],
                token_seconds=measured.tokens.get(name),
                ratio=ratio and ratio.median,
                ratio_q1=ratio and ratio.q1,
                ratio_q3=ratio and ratio.q3,
                paper_ratio=paper and paper / PAPER_SECONDS["lora"],
                held_bytes=measured.held[name],
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
    model = settings.model
    base = models.build(model, settings.size, settings.checkpoint).to(settings.device, dtype)
    bases.quantise(base, settings.base, model.target, dtype)
    source = models.source(base, settings.size, settings.data, settings.device, dtype)
    if settings.checkpointing:
        models.checkpoint_activations(base, dropout=settings.lora_dropout > 0)
    contestants = {
        name: Contestant.of(
            name,
            methods.build(
                base,
                name,
                settings.ranks,
                target=model.target,
                head=model.head,
                seed=settings.seed,
                adapter_bias=model.adapter_bias,
                lora_dropout=settings.lora_dropout,
            ),
            settings.accumulation,
            capturable=settings.mode == "graph" and settings.device.type == "cuda",
        )
        for name in settings.methods
    }
    methods.start_equal(contestants)
    size = settings.batch_size

    if settings.mode == "compile":
        [batch] = source.batches(size, size, settings.seed + 2)
        for contestant in contestants.values():
            contestant.model.compile(fullgraph=True, dynamic=False)
            # Compiles, which must happen neither under the hooks that count what is saved nor under the clock.
            contestant.step(*batch)
        methods.settle(contestants, methods.TOLERANCES[settings.dtype])
    counted = EPOCH if settings.full else size * settings.steps
    # The uncounted rounds draw batches of their own: a full epoch shows every image of CIFAR-10 exactly once.
    uncounted = source.batches(size, (UNCOUNTED_ROUNDS + (settings.lora_dropout > 0)) * size, settings.seed + 1)
    batches = itertools.chain(uncounted, source.batches(size, counted, settings.seed))
    measured = measure(contestants, batches, settings, progress)
    if settings.base != "none":
        [(tokens, _)] = source.batches(1, 1, settings.seed + 3)
        measured.tokens = generate(contestants, tokens[:, :1], settings)
    return rows_of(measured, contestants, source.name, settings)


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
    path = out / file_name(settings)
    timing.write_result(path, environment, rows, Table4Row)
    wanted = goals.goal_tables(goals.table4_goals(environment, rows))
    show(
        170,
        [table4_table(rows), *wanted, environment_note(environment), LEGEND, *table4_notes(rows), f"Stored: {path}"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

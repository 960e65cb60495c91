"""The README's one table: a training step of ours, its time and its memory, over PEFT's LoRA and over plain PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.rows import LayerRow, Table4Row
from benchmarks.rendering.layer import LARGE, SMALL, first_run, in_size, layer_means, layer_steps
from benchmarks.rendering.models import runs
from benchmarks.rendering.table4 import batch_of
from benchmarks.rendering.tables import Stored, Table, is_gpu, label
from benchmarks.rendering.verdicts import SLOWER, marked

HEADINGS = ("step of ours", "time over PEFT's LoRA", "time over plain PyTorch", "peak memory over plain PyTorch")
# PEFT scripts that have a line: (base, dtype, rank, lora_dropout, activation checkpointing).
SCRIPTS = (("none", "bf16", 16, 0.05, True), ("nf4", "bf16", 16, 0.0, True), ("none", "fp32", 16, 0.0, False))
# How the name of a model begins, and the dtypes in which its methods have a line.
MODELS = (("ViT-B/32", ("fp32",), ("hydra",)),)
ON = {"cpu": "a CPU", "cuda": "a GPU"}
MODES = {"eager": "eager", "compile": "`torch.compile`", "graph": "CUDA graphs"}
# (device, dtype, mode, sizes) of the layers that have a line, all of LoRA: it is what PEFT has too.
LAYERS = (
    *(("cpu", "fp32", "eager", LARGE), ("cpu", "fp32", "eager", SMALL), ("cpu", "bf16", "eager", LARGE)),
    ("cuda", "bf16", "graph", LARGE),
)


def summary(
    table4: Sequence[Stored], cpu: Sequence[Stored], gpu: Sequence[Stored], quantised: Sequence[Stored] = ()
) -> str:
    """A line for the first run of each that was measured, and where they were measured."""
    cells = [*accelerated_lines([*table4, *quantised]), *model_lines(table4), *layer_lines([*cpu, *gpu])]
    places = dict.fromkeys(place_of(files[0]) for files in (table4, quantised, cpu, gpu) if files)
    table = Table("", HEADINGS, cells).markdown()
    return (
        f"{table}\n\nTimes: medians of paired steps, of layers their geometric means. Below 1 ours needs less, "
        f"{SLOWER.strip()}: it needs more. {'; '.join(places)}. [All results](docs/results.md), with quartiles and "
        "conditions."
    )


def place_of(file: Stored) -> str:
    device, date = file.environment["device"], file.environment["date"][:10]
    threads = "" if is_gpu(file.environment) else f", {file.environment['threads']} threads"
    return f"{device}{threads}, {date}"


def model_lines(table4: Sequence[Stored]) -> Iterator[list[str]]:
    """Whole steps of Table 4, of the first run of each model and dtype that has a Hydra; PEFT is not measured there."""
    found = [(run, {row["method"]: row for row in run[1]}) for run in runs(table4)]
    for start, dtypes, kinds in MODELS:
        for dtype in dtypes:
            fitting = [(r, by) for r, by in found if r[1][0]["model"].startswith(start) and r[1][0]["dtype"] == dtype]
            for (_, _, kernels), by_method in [(r, by) for r, by in fitting if "ours_hydra" in by][:1]:
                for kind in kinds:
                    ours, naive = (by_method.get(f"{owner}_{kind}") for owner in ("ours", "naive"))
                    if ours is not None and naive is not None:
                        yield model_line(ours, naive, None, kernels.remark())


def accelerated_lines(table4: Sequence[Stored]) -> Iterator[list[str]]:
    """Whole steps of a PEFT LoRA model that `hydra_kernels.peft.accelerate` has taken."""
    names = ("accelerated_lora", "naive_lora", "peft_lora")
    found = [({row["method"]: row for row in rows}, kernels) for _, rows, kernels in runs(table4)]
    for wanted in SCRIPTS:
        for by_method, kernels in found:
            if by_method.keys() >= set(names) and script_of(by_method["peft_lora"]) == wanted:
                yield model_line(*(by_method[name] for name in names), kernels.remark())
                break


def script_of(row: Table4Row) -> tuple[str, str, int, float, bool]:
    return row["base"], row["dtype"], sum(row["ranks"] or ()), row["lora_dropout"], row["checkpointing"]


def model_line(ours: Table4Row, naive: Table4Row, peft: Table4Row | None, remark: str) -> list[str]:
    # Naive has no dropout on x: what drops is held against PEFT alone.
    plain = None if ours["lora_dropout"] else naive
    over = [
        "-" if row is None else marked(timing.paired_ratios(ours["step_seconds"], row["step_seconds"]).median, ".2f")
        for row in (peft, plain)
    ]
    base = "" if ours["base"] == "none" else f" over {ours['base'].upper()}"
    about = f"{ours['model']}; {method(label(ours))}{base}, {ours['dtype']}, {batch_of(ours)}{remark}"
    return [about, *over, "-" if plain is None else marked(ours["peak_bytes"] / plain["peak_bytes"], ".2f")]


def layer_lines(files: Sequence[Stored]) -> Iterator[list[str]]:
    """Geometric means over the shapes of a size, of the first run in each dtype and mode."""
    for device, dtype, mode, sizes in LAYERS:
        for file, rows in first_run(files, device, dtype, mode):
            _, steps = next(layer_steps(rows))
            made = [step for step in steps if in_size(step, sizes) and {"ours_lora", "naive_lora"} <= step.keys()]
            if not made:
                continue
            over = (layer_means(made, "ours_lora", rival).get(sizes) for rival in ("peft_lora", "naive_lora"))
            shapes = f"{len(made)} shape{'s' if len(made) > 1 else ''}"
            about = f"one layer on {ON[device]}, {shapes} of {sizes} rows; "
            about += f"{method(label(made[0]['ours_lora']))}, {rows[0]['dtype']}, {MODES[mode]}{file.kernels.remark()}"
            yield [about, *(marked(ratio, ".2f") for ratio in (*over, memory_of(made)))]


def memory_of(made: Sequence[Mapping[str, LayerRow]]) -> float:
    pairs = ((step["ours_lora"], step["naive_lora"]) for step in made)
    return statistics.geometric_mean(ours["peak_bytes"] / naive["peak_bytes"] for ours, naive in pairs)


def method(name: str) -> str:
    return name.removeprefix("our ")

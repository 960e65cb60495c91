"""The README's one table: a training step of ours, its time and its memory, over PEFT's LoRA and over plain PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.rows import LayerRow
from benchmarks.rendering.layer import LARGE, SMALL, in_size, layer_groups, layer_means, layer_steps
from benchmarks.rendering.models import runs
from benchmarks.rendering.table4 import batch_of
from benchmarks.rendering.tables import Stored, Table, is_gpu, label
from benchmarks.rendering.verdicts import SLOWER, marked

HEADINGS = ("step of ours", "time over PEFT's LoRA", "time over plain PyTorch", "peak memory over plain PyTorch")
# How the name of a model begins, and the methods that have a line.
MODELS = (("ViT-B/32", ("lora", "hydra")), ("Llama", ("lora", "hydra")))
ON = {"cpu": "a CPU", "cuda": "a GPU"}
MODES = {"eager": "eager", "compile": "`torch.compile`", "graph": "CUDA graphs"}
# (device, mode, sizes) of the layers that have a line, all of LoRA: it is what PEFT has too.
LAYERS = (("cpu", "eager", LARGE), ("cpu", "eager", SMALL), ("cpu", "compile", SMALL), ("cuda", "graph", LARGE))


def summary(table4: Sequence[Stored], cpu: Sequence[Stored], gpu: Sequence[Stored]) -> str:
    """A line for the first run of each that was measured, and where they were measured."""
    cells = [*model_lines(table4), *layer_lines([*cpu, *gpu])]
    places = dict.fromkeys(place_of(files[0]) for files in (table4, cpu, gpu) if files)
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
    """Whole steps of Table 4; PEFT is not measured there."""
    found = list(runs(table4))
    for start, kinds in MODELS:
        for _, rows, kernels in [run for run in found if run[1][0]["model"].startswith(start)][:1]:
            by_method = {row["method"]: row for row in rows}
            for kind in kinds:
                ours, naive = (by_method.get(f"{owner}_{kind}") for owner in ("ours", "naive"))
                if ours is None or naive is None:
                    continue
                time = timing.paired_ratios(ours["step_seconds"], naive["step_seconds"]).median
                memory = ours["peak_bytes"] / naive["peak_bytes"]
                about = f"{ours['model']}; {method(label(ours))}, {ours['dtype']}, {batch_of(ours)}{kernels.remark()}"
                yield [about, "-", marked(time, ".2f"), marked(memory, ".2f")]


def layer_lines(files: Sequence[Stored]) -> Iterator[list[str]]:
    """Geometric means over the shapes of a size, of the first run in each mode."""
    found = [(file, rows) for file in files for rows in layer_groups(file.rows)]
    for device, mode, sizes in LAYERS:
        for file, rows in [run for run in found if (run[1][0]["device"], run[1][0]["mode"]) == (device, mode)][:1]:
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

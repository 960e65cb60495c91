"""The README's bullets and its one table: a training step of ours over PEFT's LoRA and over plain PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.rows import LayerRow, Table4Row
from benchmarks.rendering.kernels import Kernels
from benchmarks.rendering.layer import LARGE, SMALL, first_run, in_size, layer_means, layer_steps
from benchmarks.rendering.models import runs
from benchmarks.rendering.table4 import batch_of
from benchmarks.rendering.tables import Stored, Table, is_gpu, label
from benchmarks.rendering.verdicts import SLOWER, marked

HEADINGS = ("step of ours", "time over PEFT's LoRA", "time over plain PyTorch", "peak memory over plain PyTorch")
# PEFT scripts: (base, dtype, rank, lora_dropout, activation checkpointing). Of the first, time and memory have a bullet
# each; the others have a line.
BULLETS = ("none", "bf16", 16, 0.05, True)
SCRIPTS = (("nf4", "bf16", 16, 0.0, True), ("none", "fp32", 16, 0.0, False))
SCRIPT = ("accelerated_lora", "peft_lora")
# How the name of a model begins, and the dtypes in which its methods have a line.
MODELS = (("ViT-B/32", ("fp32",), ("lora", "hydra")),)
MODES = {"eager": "eager", "compile": "`torch.compile`", "graph": "CUDA graphs"}
# (dtype, mode, sizes) of the layers that have a line, and of the one that has a bullet; all of LoRA: it is what PEFT
# has too.
CPU_LAYERS = (("fp32", "eager", LARGE), ("fp32", "eager", SMALL), ("bf16", "eager", LARGE))
GPU_LAYER = ("bf16", "graph", LARGE)


def summary(
    table4: Sequence[Stored], cpu: Sequence[Stored], gpu: Sequence[Stored], quantised: Sequence[Stored] = ()
) -> str:
    """A bullet or a line for the first run of each that was measured, and where they were measured. A GPU comes last:
    not every reader has one.
    """
    scripts = [*table4, *quantised]
    cells = [*accelerated_lines(scripts), *model_lines(table4), *layer_lines(cpu)]
    places = dict.fromkeys(place_of(files[0]) for files in (table4, quantised, cpu, gpu) if files)
    note = (
        f"Times: medians of paired steps, of layers their geometric means. Below 1 ours needs less, {SLOWER.strip()}: "
        f"it needs more. {'; '.join(places)}. [All results](docs/results.md), with quartiles and conditions."
    )
    parts = ["\n".join(script_bullets(table4)), Table("", HEADINGS, cells).markdown(), *gpu_bullets(gpu), note]
    return "\n\n".join(part for part in parts if part)


def script_bullets(table4: Sequence[Stored]) -> Iterator[str]:
    """Time and memory of one PEFT script on a CPU, over PEFT's own."""
    on_cpu = [file for file in table4 if not is_gpu(file.environment)]
    for by_method, _ in scripts_of(on_cpu, BULLETS)[:1]:
        ours, script = (by_method[name] for name in SCRIPT)
        time = marked(timing.paired_ratios(ours["step_seconds"], script["step_seconds"]).median)
        memory = marked(ours["peak_bytes"] / script["peak_bytes"])
        about = f"{ours['model']}, {ours['dtype']}, rank {sum(ours['ranks'] or ())}, {batch_of(ours)}"
        yield f"- **CPU**: a training step of a PEFT LoRA model, accelerated, takes {time} of PEFT's time ({about})."
        yield f"- **Memory**: the peak of that step is {memory} of PEFT's."


def gpu_bullets(gpu: Sequence[Stored]) -> Iterator[str]:
    for file, made in layers_of(gpu, "cuda", *GPU_LAYER):
        means = [layer_means(made, "ours_lora", rival).get(LARGE) for rival in ("peft_lora", "naive_lora")]
        dtype, mode, sizes = GPU_LAYER
        yield (
            f"- **GPU**{file.kernels.remark()}: a step of one layer takes {marked(means[0])} of PEFT's time, "
            f"{marked(means[1])} of plain PyTorch's ({method(label(made[0]['ours_lora']))}, {dtype}, {MODES[mode]}, "
            f"{shapes_of(made, sizes)})."
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
    for wanted in SCRIPTS:
        for by_method, kernels in scripts_of(table4, wanted)[:1]:
            ours, peft = (by_method[name] for name in SCRIPT)
            yield model_line(ours, by_method["naive_lora"], peft, kernels.remark())


def scripts_of(
    table4: Sequence[Stored], wanted: tuple[str, str, int, float, bool]
) -> list[tuple[dict[str, Table4Row], Kernels]]:
    """The runs of that script, by method."""
    found = [({row["method"]: row for row in rows}, kernels) for _, rows, kernels in runs(table4)]
    return [
        (by, kernels)
        for by, kernels in found
        if by.keys() >= {*SCRIPT, "naive_lora"} and script_of(by["peft_lora"]) == wanted
    ]


def script_of(row: Table4Row) -> tuple[str, str, int, float, bool]:
    return row["base"], row["dtype"], sum(row["ranks"] or ()), row["lora_dropout"], row["checkpointing"]


def model_line(ours: Table4Row, naive: Table4Row, peft: Table4Row | None, remark: str) -> list[str]:
    # Naive has no dropout on x: what drops is held against PEFT alone.
    plain = None if ours["lora_dropout"] else naive
    over = [
        "-" if row is None else marked(timing.paired_ratios(ours["step_seconds"], row["step_seconds"]).median)
        for row in (peft, plain)
    ]
    base = "" if ours["base"] == "none" else f" over {ours['base'].upper()}"
    about = f"{ours['model']}; {method(label(ours))}{base}, {ours['dtype']}, {batch_of(ours)}{remark}"
    return [about, *over, "-" if plain is None else marked(ours["peak_bytes"] / plain["peak_bytes"])]


def layer_lines(files: Sequence[Stored]) -> Iterator[list[str]]:
    """Geometric means over the shapes of a size, of the first run in each dtype and mode."""
    for dtype, mode, sizes in CPU_LAYERS:
        for _, made in layers_of(files, "cpu", dtype, mode, sizes):
            over = (layer_means(made, "ours_lora", rival).get(sizes) for rival in ("peft_lora", "naive_lora"))
            ran = f"{method(label(made[0]['ours_lora']))}, {dtype}, {MODES[mode]}"
            about = f"one layer on a CPU, {shapes_of(made, sizes)}; {ran}"
            yield [about, *(marked(ratio) for ratio in (*over, memory_of(made)))]


def layers_of(
    files: Sequence[Stored], device: str, dtype: str, mode: str, sizes: str
) -> Iterator[tuple[Stored, list[dict[str, LayerRow]]]]:
    """The steps of a size of the first such run that has our LoRA and naive LoRA."""
    for file, rows in first_run(files, device, dtype, mode):
        _, steps = next(layer_steps(rows))
        made = [step for step in steps if in_size(step, sizes) and {"ours_lora", "naive_lora"} <= step.keys()]
        if made:
            yield file, made


def shapes_of(made: Sequence[Mapping[str, LayerRow]], sizes: str) -> str:
    return f"{len(made)} shape{'s' if len(made) > 1 else ''} of {sizes} rows"


def memory_of(made: Sequence[Mapping[str, LayerRow]]) -> float:
    pairs = ((step["ours_lora"], step["naive_lora"]) for step in made)
    return statistics.geometric_mean(ours["peak_bytes"] / naive["peak_bytes"] for ours, naive in pairs)


def method(name: str) -> str:
    return name.removeprefix("our ")

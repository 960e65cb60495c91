"""The README's picture: a training step of our LoRA over PEFT's and over plain PyTorch's, a line a layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.measuring.rows import LayerRow
from benchmarks.measuring.shapes import layer_name
from benchmarks.rendering.layer import first_run, layer_steps
from benchmarks.rendering.pictures import OWNERS, SLOW, DotPlot, Group, Panel, dots, figures
from benchmarks.rendering.tables import Stored, is_gpu
from benchmarks.rendering.verdicts import loses

# (device, dtype, mode) of the groups, and how they are called; a GPU's last.
GROUPS = (
    (("cpu", "fp32", "eager"), "CPU, float32"),
    (("cpu", "bf16", "eager"), "CPU, bfloat16"),
    (("cuda", "bf16", "graph"), "GPU, bfloat16, CUDA graphs"),
)
METHOD = "ours_lora"
REMARK = """Left of the line at 1.0 ours is faster. Dots: medians of paired training steps of one layer (forward and
backward), rank 16. Thin lines: quartiles."""
PANELS = {"peft_lora": "time over PEFT's LoRA", "naive_lora": "time over plain PyTorch's LoRA"}


def overview_runs(files: Sequence[Stored]) -> Iterator[tuple[str, list[Mapping[str, LayerRow]]]]:
    """The heading of each group, and its shapes where our LoRA was measured beside one of the rivals."""
    for wanted, name in GROUPS:
        for file, rows in first_run(files, *wanted):
            _, steps = next(layer_steps(rows), ("", []))
            made = [step for step in steps if METHOD in step and PANELS.keys() & step[METHOD]["over"].keys()]
            threads = "" if is_gpu(file.environment) else f", {file.environment['threads']} threads"
            if made:
                yield f"{name}{file.kernels.remark()}: {file.environment['device']}{threads}", made


def line_of(row: LayerRow) -> tuple[str, str]:
    return layer_name(row["K"], row["N"]), f"{row['M']:,} rows"


def overview_chart(cpu: Sequence[Stored], gpu: Sequence[Stored]) -> Figure:
    found = list(overview_runs([*cpu, *gpu]))
    groups = [Group(heading, [line_of(step[METHOD]) for step in made]) for heading, made in found]
    plot = DotPlot(groups, [Panel(title, figures=28) for title in PANELS.values()], 172, REMARK)
    for axes, rival in zip(plot.axes, PANELS, strict=True):
        for places, (_, made) in zip(plot.places, found, strict=True):
            over = {y: step[METHOD]["over"].get(rival) for y, step in zip(places, made, strict=True)}
            ratios = {y: ratio for y, ratio in over.items() if ratio is not None}
            slower = [loses(ratio) for ratio in ratios.values()]
            dots(axes, list(ratios), list(ratios.values()), OWNERS["ours"], slower)
            figures(axes, list(ratios), [f"{median:.2f}" for _, median, _ in ratios.values()], slower)
        plot.at_one(axes)
    plot.same_range(plot.axes)
    plot.legend([OWNERS["ours"], SLOW])
    return plot.figure

"""The picture of a layer benchmark: a step of each method over the frozen layer's, a line a shape, a panel a kind."""

from __future__ import annotations

from matplotlib.figure import Figure

from benchmarks.measuring.rows import LayerRow
from benchmarks.measuring.shapes import layer_name
from benchmarks.rendering.layer import layer_groups, layer_steps
from benchmarks.rendering.pictures import OWNERS, SLOW, DotPlot, Group, Panel, dots
from benchmarks.rendering.tables import KINDS, Stored, what_ran

REMARK = """Time of a training step (forward and backward) over the frozen layer's, which is 1.0; less is better.
LoRA and SeqLoRA have the rank r_a + r_b of Hydra. Dots: medians of paired steps, thin lines: quartiles."""
# What PEFT drops, plain PyTorch does not: there it is no rival.
DROPPED = "\nPlain PyTorch drops nothing, and is no rival here."


def rivals_of(row: LayerRow) -> list[str]:
    """Whom our LoRA, SeqLoRA or Hydra stands beside in its panel."""
    kind = row["method"].partition("_")[2]
    owners = [owner for owner in OWNERS if owner != "ours" and not (row["dropout"] and owner in ("naive", "compiled"))]
    return [f"{owner}_{kind}" for owner in owners]


def is_slower(row: LayerRow) -> bool:
    """Whether ours is slower than any other in its panel."""
    return row["method"].startswith("ours_") and any(
        row["over"][name][1] > 1 for name in rivals_of(row) if name in row["over"]
    )


def layer_chart(stored: Stored) -> Figure:
    """Every dtype, mode, dropout and Hydra of one file, under headings that tell them apart."""
    device = stored.environment["device"]
    found = [
        (f"Hydra {ranks}, {what_ran(rows)}; {device}{stored.kernels.remark()}", steps)
        for rows in layer_groups(stored.rows)
        for ranks, steps in layer_steps(rows)
    ]
    every = [row for _, steps in found for made in steps for row in made.values() if "frozen" in row["over"]]
    kinds = [kind for kind in KINDS if any(row["method"] == f"ours_{kind}" for row in every)] or list(KINDS)
    groups = [Group(heading, [line_of(made) for made in steps]) for heading, steps in found]
    remark = REMARK + (DROPPED if any(row["dropout"] for row in every) else "")
    plot = DotPlot(groups, [Panel(KINDS[kind]) for kind in kinds], 172, remark)
    drawn = {}
    for axes, kind in zip(plot.axes, kinds, strict=True):
        for places, (_, steps) in zip(plot.places, found, strict=True):
            for owner, mark in OWNERS.items():
                rows = {y: made.get(f"{owner}_{kind}") for y, made in zip(places, steps, strict=True)}
                measured = {y: row for y, row in rows.items() if row is not None and "frozen" in row["over"]}
                slower = [is_slower(row) for row in measured.values()]
                dots(axes, list(measured), [row["over"]["frozen"] for row in measured.values()], mark, slower)
                drawn |= {owner: mark} if measured else {}
        plot.at_one(axes)
    plot.same_range(plot.axes)
    ours = [drawn[owner] for owner in OWNERS if owner in drawn]
    plot.legend([*ours, *([SLOW] if any(map(is_slower, every)) else [])])
    return plot.figure


def line_of(made: dict[str, LayerRow]) -> tuple[str, str]:
    row = next(iter(made.values()))
    return layer_name(row["K"], row["N"]), f"{row['M']:,} rows"

"""The pictures of whole training steps: time as ratios, quartiles and the paper's beside, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.accelerated import is_script
from benchmarks.rendering.kernels import Kernels
from benchmarks.rendering.models import runs
from benchmarks.rendering.palette import INK, MUTED, SLOWER
from benchmarks.rendering.pictures import (
    ABOVE,
    LINE,
    OWNERS,
    SLOW,
    DotPlot,
    Group,
    Mark,
    Panel,
    dots,
    figures,
)
from benchmarks.rendering.table4 import MEGA, over_rivals, run_of, table4_groups
from benchmarks.rendering.tables import KINDS, Stored, label
from benchmarks.rendering.verdicts import loses

# The range of a ratio's axis; an arrow stands at the edge for what lies outside.
LOW, HIGH = 0.8, 1.2
LEFT, RIGHT = Mark("below the axis", "", "<"), Mark("above the axis", "", ">")
# (key, name) of the memory that a method needs.
MEMORY = (
    ("held_bytes", "parameters and optimizer"),
    ("saved_bytes", "saved for the backward"),
    ("peak_bytes", "peak"),
)
PAPER = Mark("the paper's", MUTED, "x")
SHAPES = {
    "held_bytes": Mark("", INK, "|"),
    "saved_bytes": Mark("", INK, "o", filled=False),
    "peak_bytes": Mark("", INK, "o"),
}
REMARK = (
    "Left of the line at 1.0 a method is faster. Dots: medians of paired steps; thin lines: quartiles; arrows: off the "
    "axis.\nRivals: of our Hydra all methods of plain PyTorch, of our LoRA and SeqLoRA the same method."
)


def mark_of(method: str) -> Mark:
    return OWNERS.get(method.partition("_")[0], OWNERS["naive"])


def draw_ratios(
    axes: Axes, places: dict[float, Sequence[float]], marks: Sequence[Mark], slower: Sequence[bool]
) -> None:
    """Dots within the axis, arrows at its edges."""
    for (place, ratio), mark, slow in zip(places.items(), marks, slower, strict=True):
        if LOW <= ratio[1] <= HIGH:
            dots(axes, [place], [ratio], mark, [slow])
        else:
            edge, arrow = (LOW, LEFT) if ratio[1] < LOW else (HIGH, RIGHT)
            colour = SLOWER if slow else mark.colour
            axes.scatter([edge], [place], s=26, marker=arrow.shape, color=colour, label=arrow.name, clip_on=False)


def draw_times(axes: Axes, places: Sequence[float], rows: Sequence[Table4Row]) -> None:
    """Steps over naive LoRA's, and the paper's where it has them."""
    known = [(y, row) for y, row in zip(places, rows, strict=True) if row["ratio"] is not None]
    ratios = {y: (row["ratio_q1"], row["ratio"], row["ratio_q3"]) for y, row in known}
    slower = [row["method"].startswith("ours_") and loses(ratios[y]) for y, row in known]
    draw_ratios(axes, ratios, [mark_of(row["method"]) for _, row in known], slower)
    papers = {y: row["paper_ratio"] for y, row in known if row["paper_ratio"] is not None}
    inside = {y: ratio for y, ratio in papers.items() if LOW <= ratio <= HIGH}
    axes.scatter(list(inside.values()), list(inside), s=22, marker="x", color=MUTED, label=PAPER.name, zorder=4)
    texts = [f"{row['ratio']:.2f}" + (f" ({papers[y]:.2f})" if y in papers else "") for y, row in known]
    figures(axes, list(ratios), texts, slower)


def draw_rivals(axes: Axes, places: Sequence[float], rows: Sequence[Table4Row]) -> None:
    """Ours over the rival that it comes nearest to, or loses most to, and which that is."""
    over = over_rivals(rows)
    fastest = {
        y: max(over[row["method"]].items(), key=lambda item: item[1].median)
        for y, row in zip(places, rows, strict=True)
        if over[row["method"]]
    }
    slower = [loses(ratio) for _, ratio in fastest.values()]
    draw_ratios(axes, {y: ratio for y, (_, ratio) in fastest.items()}, [OWNERS["ours"]] * len(fastest), slower)
    names = {row["method"]: label(row) for row in rows} | {f"naive_{kind}": name for kind, name in KINDS.items()}
    figures(axes, list(fastest), [f"{ratio.median:.2f} {names[name]}" for name, ratio in fastest.values()], slower)


def draw_memory(axes: Axes, places: Sequence[float], rows: Sequence[Table4Row]) -> None:
    for key, name in MEMORY:
        known = {y: row[key] / MEGA for y, row in zip(places, rows, strict=True) if row[key] is not None}
        dots(axes, list(known), [(value, value, value) for value in known.values()], SHAPES[key]._replace(name=name))
    figures(axes, places, [f"{row['peak_bytes'] / MEGA:.0f}" for row in rows])


def steps_figure(found: Sequence[tuple[Environment, Sequence[Table4Row], Kernels]]) -> Figure:
    """A group a run, a line a method."""
    groups = [
        Group(run_of(rows[0]) + kernels.remark(), [(label(row), "") for row in rows]) for _, rows, kernels in found
    ]
    rows = [row for _, run, _ in found for row in run]
    devices = ", ".join(dict.fromkeys(environment["device"] for environment, _, _ in found))
    paper = any(row["paper_ratio"] is not None for row in rows)
    panels = [
        Panel("time over naive LoRA's" + (" (paper's)" if paper else ""), 1.0, 68 if paper else 30),
        Panel("ours over its fastest rival", 0.9, 72),
        Panel("memory (MB), peak", 0.8, 26),
    ]
    plot = DotPlot(groups, panels, 102, f"{REMARK} {devices}.", ABOVE + LINE)
    times, rivals, memory = plot.axes
    for places, (_, run, _) in zip(plot.places, found, strict=True):
        draw_times(times, places, run)
        draw_rivals(rivals, places, run)
        draw_memory(memory, places, run)
    for axes in (times, rivals):
        plot.at_one(axes)
        axes.set(xlim=(LOW, HIGH), xticks=[0.8, 0.9, 1.0, 1.1, 1.2])
    most = max(row["peak_bytes"] for row in rows) / MEGA
    memory.locator_params(axis="x", nbins=3)
    memory.set_xlim(-0.04 * most, 1.05 * most)
    plot.legend([OWNERS["naive"], OWNERS["ours"], SLOW, *([PAPER] if paper else [])])
    plot.legend([SHAPES[key]._replace(name=name) for key, name in MEMORY], line=1)
    return plot.figure


def table4_chart(stored: Stored) -> Figure:
    """The paper's Table 4, each dtype and mode of one file."""
    return steps_figure([(stored.environment, rows, stored.kernels) for rows in table4_groups(stored.rows)])


def models_chart(stored: Sequence[Stored]) -> Figure:
    """Every run of all files, but for PEFT scripts."""
    return steps_figure([run for run in runs(stored) if not is_script(run[1])])

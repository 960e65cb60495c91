"""What every picture has in common: its width, its letters and its card; and the dot plot, a line a thing measured."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch
from matplotlib.transforms import blended_transform_factory

from benchmarks.rendering.palette import BORDER, CARD, COMPILED, GRID, INK, MUTED, NAIVE, OURS, PEFT, SLOWER

POINTS = 72.0
# All lengths are in points. 600 of them are 800 pixels: the width of a page.
WIDTH, MARGIN, LINE, LETTERS = 600.0, 14.0, 16.0, 9.0
# Above the lines of a dot plot: its legend and the panels' titles. Below: the numbers of the axes, and a remark.
ABOVE, BELOW = 46.0, 24.0
# In lines, before the heading of a further group.
GAP = 0.4
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": LETTERS,
    "figure.facecolor": "none",
    "font.size": LETTERS,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": LETTERS,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "picture",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


class Mark(NamedTuple):
    """How a method is drawn."""

    name: str
    colour: str
    shape: str
    filled: bool = True


# By the owner of a method.
OWNERS = {
    "peft": Mark("PEFT", PEFT, "s"),
    "autocast": Mark("PEFT under autocast", PEFT, "s", filled=False),
    "naive": Mark("plain PyTorch", NAIVE, "o", filled=False),
    "compiled": Mark("plain PyTorch, compiled", COMPILED, "D"),
    "ours": Mark("ours", OURS, "o"),
}
SLOW = Mark("ours, slower", SLOWER, "o")


class Group(NamedTuple):
    """Lines of a dot plot under one heading, each its name and what stands beside it."""

    heading: str
    lines: Sequence[tuple[str, str]]


class Panel(NamedTuple):
    """A column of a dot plot: its title, its share of the width, and the room for figures beside it."""

    title: str
    share: float = 1.0
    figures: float = 0.0


def svg(draw: Callable[..., Figure], *given: object) -> str:
    """What ``draw`` draws, on its card, as text; equal figures give equal text."""
    with rc_context(STYLE), io.StringIO() as text:
        figure = draw(*given)
        settle(figure)
        width, height = figure.get_size_inches()
        card = FancyBboxPatch(
            (0.01, 0.01), width - 0.02, height - 0.02, "round,pad=0,rounding_size=0.08",
            transform=figure.dpi_scale_trans, facecolor=CARD, edgecolor=BORDER, linewidth=0.8, zorder=-1,
        )  # fmt: skip
        card.set_in_layout(False)
        figure.add_artist(card)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return text.getvalue()


def settle(figure: Figure) -> None:
    """Puts its parts in their places, rounded: the last digits of a layout's solver differ from run to run."""
    figure.set_dpi(POINTS)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        axes.set_position([round(value, 4) for value in axes.get_position().bounds])


def canvas(height: float) -> Figure:
    """An empty picture of the page's width, ``height`` points high, whose parts find their places themselves."""
    figure = Figure(figsize=(WIDTH / POINTS, height / POINTS))
    edge = (MARGIN / 2 / WIDTH, MARGIN / 2 / height)
    figure.set_layout_engine("constrained", rect=(*edge, 1 - 2 * edge[0], 1 - 2 * edge[1]))
    return figure


def legend_above(figure: Figure, ncols: int) -> None:
    """One legend for all panels, clear of what they show; a name that several have stands once."""
    named = {
        name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=ncols, columnspacing=1.4)


class DotPlot:
    """Panels over the same lines: ``axes`` has the panels, ``places`` the heights of each group's lines."""

    def __init__(
        self, groups: Sequence[Group], panels: Sequence[Panel], names: float, remark: str = "", above: float = ABOVE
    ) -> None:
        # A run that was cut off at its start has no lines.
        count = max(1.0, sum(1 + len(group.lines) for group in groups) + GAP * (len(groups) - 1))
        below = BELOW + LINE * remark.count("\n") + (LINE if remark else 0)
        high = LINE * count + above + below
        self.figure = Figure(figsize=(WIDTH / POINTS, high / POINTS))
        free = WIDTH - 2 * MARGIN - names - sum(panel.figures for panel in panels) - MARGIN * (len(panels) - 1)
        self.axes: list[Axes] = []
        left = MARGIN + names
        for panel in panels:
            wide = free * panel.share / sum(other.share for other in panels)
            axes = self.figure.add_axes((left / WIDTH, below / high, wide / WIDTH, LINE * count / high))
            axes.set(ylim=(count - 0.5, -0.5), yticks=[])
            axes.set_title(panel.title, loc="left", fontweight="bold")
            axes.spines["left"].set_visible(False)
            axes.locator_params(axis="x", nbins=5)
            self.axes.append(axes)
            left += wide + panel.figures + MARGIN
        self.places: list[list[float]] = []
        place = 0.0
        for group in groups:
            lines = [place + 1 + number for number in range(len(group.lines))]
            self.write(
                MARGIN, place, group.heading, fontweight="bold", bbox={"facecolor": CARD, "linewidth": 0, "pad": 1}
            )
            for y, (name, more) in zip(lines, group.lines, strict=True):
                self.write(MARGIN, y, name)
                self.write(MARGIN + names - 6, y, more, ha="right", color=MUTED)
            for axes in self.axes:
                axes.hlines(lines, 0, 1, color=GRID, linewidth=0.5, zorder=0, transform=axes.get_yaxis_transform())
            self.places.append(lines)
            place += 1 + len(group.lines) + GAP
        self.figure.text(MARGIN / WIDTH, 9 / high, remark, color=MUTED, va="bottom", linespacing=1.3)

    def write(self, x: float, place: float, text: str, **look: Any) -> None:
        """Text ``x`` points from the left, at the height of a line, over all panels."""
        y = self.axes[0].get_position().y1 - LINE * (place + 0.5) / (self.figure.get_size_inches()[1] * POINTS)
        self.figure.text(x / WIDTH, y, text, va="center_baseline", **look)

    def legend(self, marks: Sequence[Mark], line: int = 0) -> None:
        """Above all panels, clear of what they show; a further one on the next line."""
        handles = [
            Line2D(
                [], [], linestyle="none", marker=mark.shape, markersize=5, label=mark.name, color=mark.colour,
                markerfacecolor=mark.colour if mark.filled else CARD,
            )
            for mark in marks
        ]  # fmt: skip
        high = self.figure.get_size_inches()[1] * POINTS
        self.figure.legend(
            handles=handles, ncols=len(handles), borderaxespad=0, borderpad=0, handletextpad=0.2, columnspacing=1.4,
            loc="upper left", bbox_to_anchor=(MARGIN / WIDTH, 1 - (10 + LINE * line) / high),
        )  # fmt: skip

    def at_one(self, axes: Axes) -> None:
        """The line where two take as long, beside every group."""
        for lines in self.places:
            axes.vlines(1.0, lines[0] - 0.5, lines[-1] + 0.5, color=INK, linewidth=1.0, zorder=1)

    def same_range(self, axes: Sequence[Axes]) -> None:
        """The widest of their ranges for each of these panels."""
        ranges = [each.get_xlim() for each in axes]
        for each in axes:
            each.set_xlim(min(low for low, _ in ranges), max(high for _, high in ranges))


def dots(
    axes: Axes, places: Sequence[float], ratios: Sequence[Sequence[float]], mark: Mark, slower: Sequence[bool] = ()
) -> None:
    """A dot at each median, a thin line from quartile to quartile; [q1, median, q3] each. Slower ones are red."""
    colours = [SLOWER if slow else mark.colour for slow in slower or [False] * len(ratios)]
    axes.hlines(places, [q1 for q1, _, _ in ratios], [q3 for _, _, q3 in ratios], color=colours, linewidth=1.2)
    medians = [median for _, median, _ in ratios]
    dotted = axes.scatter(medians, places, s=26, marker=mark.shape, color=colours, zorder=3, label=mark.name)
    if not mark.filled:
        dotted.set_facecolor(CARD)


def figures(axes: Axes, places: Sequence[float], texts: Sequence[str], slower: Sequence[bool] = ()) -> None:
    """Figures beside a panel, on the lines of their dots."""
    beside = blended_transform_factory(axes.transAxes, axes.transData)
    for place, text, slow in zip(places, texts, slower or [False] * len(texts), strict=True):
        axes.annotate(
            text, (1, place), xycoords=beside, xytext=(7, 0), textcoords="offset points", va="center_baseline",
            color=SLOWER if slow else INK,
        )  # fmt: skip

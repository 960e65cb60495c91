"""The picture of equal learning: how far loss curves are from plain PyTorch's, step by step."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.measuring.rows import LearnRow
from benchmarks.rendering.learn import RESOLUTION, of
from benchmarks.rendering.palette import COMPILED, MUTED, OURS
from benchmarks.rendering.pictures import canvas, legend_above
from benchmarks.rendering.tables import KINDS, Stored

LINES = {"composed": "-", "kept": "--", "effective": ":"}


def differences(pairs: Sequence[tuple[LearnRow, LearnRow]]) -> list[float]:
    """The root mean square of the pairs' distances of losses, at each step; where all are equal nan: a gap."""
    steps = zip(*([(a - b) ** 2 for a, b in zip(x["losses"], y["losses"], strict=True)] for x, y in pairs), strict=True)
    return [math.sqrt(statistics.mean(step)) or math.nan for step in steps]


def learn_chart(stored: Stored) -> Figure:
    """Of each kind in fp32: another seed, the images of each batch in another order, and every form of ours."""
    figure = canvas(250)
    for axes, (kind, name) in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS.items(), strict=True):
        exact = {"experiment": "equal", "dtype": "fp32"}
        naive, again, every = (
            of(stored.rows, **exact, method=f"{owner}_{kind}") for owner in ("naive", "again", "ours")
        )
        drawn = [
            ("plain PyTorch, another seed", MUTED, "-", list(itertools.pairwise(naive))),
            ("plain PyTorch, batches in another order", COMPILED, "-", list(zip(naive, again, strict=True))),
        ]
        for form in dict.fromkeys(row["form"] for row in every):
            ours = [row for row in every if row["form"] == form]
            drawn.append((f"ours, {form}", OURS, LINES[form], list(zip(naive, ours, strict=True))))
        for label, colour, line, pairs in drawn:
            axes.plot(differences(pairs), color=colour, linestyle=line, linewidth=1.4, label=label)
        axes.set(xlabel="step", yscale="log", ylim=(RESOLUTION, 1))
        axes.set_title(name, loc="left", fontweight="bold")
    figure.axes[0].set_ylabel("loss, difference from plain PyTorch")
    legend_above(figure, 3)
    return figure

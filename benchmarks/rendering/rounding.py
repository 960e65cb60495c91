"""How much of small updates bf16 keeps, as a table and a chart."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.measuring.rows import RoundingRow
from benchmarks.rendering.palette import CARD, COMPILED, NAIVE, OURS, PEFT
from benchmarks.rendering.pictures import canvas, legend_above
from benchmarks.rendering.tables import Stored, Table

# Colour, shape and size in the picture.
MARKS = {
    **{"reference": (NAIVE, "o", 9.0), "aten": (OURS, "o", 5.0), "native": (OURS, "s", 9.0)},
    **{"hybrid": (COMPILED, "^", 5.0), "triton": (PEFT, "D", 4.0)},
}
# The naive layer, and what each of ours is called in the plot.
NAMES = {"reference": "naive", "aten": "aten", "native": "native", "hybrid": "hybrid", "triton": "triton"}


def rounding_markdown(file: Stored) -> str:
    """The shares by the size of the update, each backend with a bias b0 and without, and what was not measured."""
    rows: Sequence[RoundingRow] = file.rows
    columns = list(dict.fromkeys((row["backend"], row["bias"]) for row in rows))
    shares = {(row["backend"], row["bias"], row["ratio"]): row for row in rows}
    cells = [
        [f"{ratio:g}", *(f"{shares[(*column, ratio)]['kept']:.2f}" for column in columns)]
        for ratio in dict.fromkeys(row["ratio"] for row in rows)
    ]
    first = rows[0]
    interpreted = [NAMES[name] for name in dict.fromkeys(row["backend"] for row in rows if row["interpreted"])]
    missing = [name for backend, name in NAMES.items() if backend not in {row["backend"] for row in rows}]
    note = (
        f"{file.origin(link=True)} bf16, M={first['M']}, K={first['K']}, N={first['N']}, ranks "
        f"{first['r_a']}+{first['r_b']}, medians over seeds."
    )
    note += f" In Triton's interpreter: {', '.join(interpreted)}." if interpreted else ""
    note += f" Not measured: {', '.join(missing)}, which has no bf16 on this device." if missing else ""
    headings = ["adapters' signal over the frozen output"]
    headings += [f"{NAMES[name]}{'' if bias else ', no b0'}" for name, bias in columns]
    return f"{Table('', headings, cells).markdown()}\n\n{note}"


def rounding_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(rounding_markdown(result) for result in stored)


def rounding_chart(stored: Stored) -> Figure:
    """The share kept by the size of the update: layers with a bias, and without. Marks within marks coincide."""
    figure = canvas(220)
    for axes, bias in zip(figure.subplots(1, 2, sharey=True), (True, False), strict=True):
        for backend in dict.fromkeys(row["backend"] for row in stored.rows):
            own = [row for row in stored.rows if (row["backend"], row["bias"]) == (backend, bias)]
            x, (colour, shape, size) = [row["ratio"] for row in own], MARKS[backend]
            look = {"color": colour, "marker": shape, "markersize": size, "label": NAMES[backend]}
            axes.plot(x, [row["kept"] for row in own], linewidth=1.2, markerfacecolor=CARD, **look)
            axes.fill_between(
                x, [row["q1"] for row in own], [row["q3"] for row in own], color=colour, alpha=0.15, linewidth=0
            )
        axes.set(xscale="log", xlabel="adapters' signal over the frozen output", ylim=(0, 1.2))
        axes.set_title(f"with{'' if bias else 'out'} a bias b0", loc="left", fontweight="bold")
    figure.axes[0].set_ylabel("share of the signal kept in bf16")
    legend_above(figure, len(NAMES))
    return figure

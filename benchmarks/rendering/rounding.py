"""How much of small updates bf16 keeps, as a table and a chart."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.measuring.rows import RoundingRow
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.tables import Stored, Table, environment_note, svg

# The naive layer, and what each of ours is called in the plot.
NAMES = {"reference": "naive", "aten": "aten", "native": "native", "hybrid": "hybrid", "triton": "triton"}


def rounding_markdown(environment: Environment, rows: Sequence[RoundingRow]) -> str:
    """The shares by the size of the update, each backend with a bias b0 and without, and what was not measured."""
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
        f"{environment_note(environment)} bf16, M={first['M']}, K={first['K']}, N={first['N']}, ranks "
        f"{first['r_a']}+{first['r_b']}, medians over seeds."
    )
    note += f" In Triton's interpreter: {', '.join(interpreted)}." if interpreted else ""
    note += f" Not measured: {', '.join(missing)}, which has no bf16 on this device." if missing else ""
    headings = ["adapters' signal over the frozen output"]
    headings += [f"{NAMES[name]}{'' if bias else ', no b0'}" for name, bias in columns]
    return f"{Table('', headings, cells).markdown()}\n\n{note}"


def rounding_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(rounding_markdown(result.environment, result.rows) for result in stored)


def rounding_chart(environment: Environment, rows: Sequence[RoundingRow]) -> str:
    """The share kept by the size of the update: layers with a bias, and without."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axis, bias in zip(figure.subplots(1, 2, sharey=True), (True, False), strict=True):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            own = [row for row in rows if (row["backend"], row["bias"]) == (backend, bias)]
            x = [row["ratio"] for row in own]
            axis.plot(x, [row["kept"] for row in own], marker="o", label=NAMES[backend])
            axis.fill_between(x, [row["q1"] for row in own], [row["q3"] for row in own], alpha=0.2)
        axis.set(title=f"with{'' if bias else 'out'} a bias b0", xscale="log", xlabel="|delta| / |y0|", ylim=(0, 1.2))
    figure.axes[0].set_ylabel("share of delta kept in bf16")
    figure.axes[0].legend()
    return svg(figure, "rounding")

"""What directions the trained branches use, as a table and the paper's Fig. 3 and 4."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.measuring.rows import SubspaceRow
from benchmarks.rendering.learn import mean_and_spread
from benchmarks.rendering.palette import COMPILED, MARKS, NAIVE, OURS
from benchmarks.rendering.pictures import canvas
from benchmarks.rendering.tables import Stored, Table

BRANCHES = ("pretrained", "parallel", "sequential")
BRANCH_MARKS = {"pretrained": (NAIVE, "o"), "parallel": (OURS, "D"), "sequential": (COMPILED, "^")}
CLASSES = MARKS
MATRICES = {"A": "A_down", "BW0": "B_down W0", "random": "random B_down W0"}


def subspace_table(rows: Sequence[SubspaceRow]) -> str:
    """Per layer: similarity to the top directions of W0, and the branches' likeness to the frozen one; each beside what
    random adapters have."""
    headings = ["layer", "A with W0", "random A", "B W0 with W0", "random B"]
    headings += ["CKA parallel, frozen", "random adapters", "CKA sequential, frozen", "random adapters"]
    cells = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if row["layer"] == layer]
        line = [layer]
        for of, by_chance_of, names in (
            ("similarity", "random_similarity", ("A", "BW0")),
            ("cka", "random_cka", BRANCHES[1:]),
        ):
            for name in names:
                line.append(_spread([row[of][name] for row in own]))  # type: ignore[literal-required]
                line.append(_spread([v for row in own for v in row[by_chance_of][name]]))  # type: ignore[literal-required]
        cells.append(line)
    return Table("", headings, cells).markdown()


def _spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {spread:.2f}"


def subspace_sentence(rows: Sequence[SubspaceRow]) -> str:
    """The table in the mean, and in how many layers and seeds it holds."""
    count, first = len(rows), rows[0]
    parts = []
    for matrix, name in (("A", "A"), ("BW0", "B W0")):
        own = statistics.mean(row["similarity"][matrix] for row in rows)
        random = statistics.mean(v for row in rows for v in row["random_similarity"][matrix])
        above = sum(row["similarity"][matrix] > max(row["random_similarity"][matrix]) for row in rows)
        parts.append(
            f"of {name} {own:.2f}, of a random {name[0]} {random:.2f} ({own - random:.2f} and {own / random:.2f} times "
            f"above; above every random draw in {above} of {count} layers and seeds)"
        )
    means = [
        statistics.mean(values)
        for branch in BRANCHES[1:]
        for values in ([row["cka"][branch] for row in rows], [v for row in rows for v in row["random_cka"][branch]])
    ]
    ordered = sum(row["cka"]["sequential"] > row["cka"]["parallel"] for row in rows)
    return (
        f"Similarity of all directions with the top {first['top']} of W0's {first['N']}, in the mean: "
        f"{'; '.join(parts)}. CKA with the frozen branch: parallel {means[0]:.2f}, of random adapters {means[1]:.2f}; "
        f"sequential {means[2]:.2f}, of random adapters {means[3]:.2f}; the sequential branch is the more alike in "
        f"{ordered} of {count} layers and seeds."
    )


def subspace_markdown(file: Stored) -> str:
    """The table, what it says, and what a reader must know beside it."""
    rows, first = file.rows, file.rows[0]
    accuracies = {row["seed"]: row["accuracy"] for row in rows}
    note = (
        f"{file.origin(link=True)} {first['data']}, {len(accuracies)} seeds at learning rate {first['rate']:g}, "
        f"test accuracy {mean_and_spread(list(accuracies.values()))} %; mean ± standard deviation over seeds, and over "
        f"{len(first['random_cka']['parallel'])} random draws of each seed."
    )
    return f"{subspace_table(rows)}\n\n{subspace_sentence(rows)}\n\n{note}"


def subspace_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(subspace_markdown(result) for result in stored)


def subspace_chart(stored: Stored) -> Figure:
    """Fig. 3 of the last layer, i against j as in the paper, and Fig. 4: the three branches, and their classes."""
    [shown] = [row for row in stored.rows if row["matrices"]]
    figure = canvas(400)
    places = figure.subplot_mosaic([["A"] * 2 + ["BW0"] * 2 + ["random"] * 2, ["branches"] * 3 + ["classes"] * 3])
    for matrix, name in MATRICES.items():
        values, axes = shown["matrices"][matrix], places[matrix]
        # A cell's middle is its i and j, which count from 1.
        extent = (0.5, len(values[0]) + 0.5, 0.5, len(values) + 0.5)
        image = axes.imshow(
            values,
            aspect="auto",
            vmin=0,
            vmax=1,
            cmap="viridis",
            origin="lower",
            extent=extent,
            interpolation="nearest",
        )
        axes.set(xlabel="j, directions of W0", ylabel="i", yticks=range(1, len(values) + 1))
        axes.set_title(f"{name} with W0 (Eq. 14)", loc="left", fontweight="bold")
        axes.grid(visible=False)
    figure.colorbar(image, ax=[places[matrix] for matrix in MATRICES], label="similarity", pad=0.01)
    for branch, (colour, shape) in BRANCH_MARKS.items():
        x, y = zip(*shown["tsne"][branch], strict=True)
        places["branches"].scatter(x, y, s=9, color=colour, marker=shape, label=branch, linewidths=0)
        for name, colour in zip(sorted(set(shown["labels"])), CLASSES, strict=False):
            own = [place for place, label in zip(shown["tsne"][branch], shown["labels"], strict=True) if label == name]
            places["classes"].scatter(
                *zip(*own, strict=True), s=9, color=colour, linewidths=0, label=name if branch == BRANCHES[0] else None
            )
    for place, title in (("branches", f"[CLS] outputs of {shown['layer']}, t-SNE"), ("classes", "the same by class")):
        places[place].set(xticks=[], yticks=[])
        places[place].set_title(title, loc="left", fontweight="bold")
        places[place].legend(
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=5,
            handletextpad=0.1,
            columnspacing=1.2,
            markerscale=1.5,
        )
    return figure

"""What the fine-tuning runs say, for the documentation: equal learning, and the paper's claim."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.rows import LearnRow
from benchmarks.tables import KINDS, Stored, environment_note, markdown, svg
from benchmarks.timing import Environment

COLOURS = {"naive": "tab:blue", "again": "tab:orange", "ours": "tab:green"}
OWNERS = {"naive": "naive", "again": "naive, batches in another order", "ours": "ours"}
PLACES = {"mlp": "MLP", "attention": "attention", "both": "both"}


def sign_flip_p(differences: Sequence[float]) -> float:
    """The share of sign patterns under which the mean difference is at least as far from 0: an exact paired test."""
    observed = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(total >= observed * (1 - 1e-12) for total in sums) / len(patterns)


def of(rows: Sequence[LearnRow], **wanted: object) -> list[LearnRow]:
    """The rows with those values, by seed."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]  # type: ignore[literal-required]
    return sorted(found, key=lambda row: row["seed"])


def mean_and_spread(values: Sequence[float], percent: bool = True) -> str:
    factor = 100 if percent else 1
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{factor * statistics.mean(values):.2f} ± {factor * spread:.2f}"


def curve_distance(first: LearnRow, second: LearnRow) -> float:
    """Root mean square difference of two loss curves."""
    return math.sqrt(statistics.mean((a - b) ** 2 for a, b in zip(first["losses"], second["losses"], strict=True)))


def equal_table(rows: Sequence[LearnRow]) -> str:
    """Ours beside naive, beside naive with another order of sums, and beside naive of other seeds; fp32."""
    headings = ["method", "test accuracy naive (%)", "ours (%)", "ours - naive (points)", "p"]
    headings += ["loss curves: ours from naive", "naive from itself", "naive of two seeds"]
    cells = []
    for kind, name in KINDS.items():
        runs = [of(rows, experiment="equal", dtype="fp32", method=f"{owner}_{kind}") for owner in OWNERS]
        gaps, noise = ([b["test"] - a["test"] for a, b in zip(runs[0], other, strict=True)] for other in runs[:0:-1])
        further = [abs(gap) - abs(other) for gap, other in zip(gaps, noise, strict=True)]
        to_ours, to_again = (
            [curve_distance(a, b) for a, b in zip(runs[0], other, strict=True)] for other in runs[:0:-1]
        )
        to_others = [curve_distance(a, b) for a, b in itertools.pairwise(runs[0])]
        cells.append(
            [
                name,
                *(mean_and_spread([row["test"] for row in run]) for run in (runs[0], runs[-1])),
                mean_and_spread(gaps),
                f"{sign_flip_p(further):.2f}",
                *(f"{statistics.median(distances):.1e}" for distances in (to_ours, to_again, to_others)),
            ]
        )
    return markdown(headings, cells)


def bf16_table(rows: Sequence[LearnRow]) -> str:
    """Hydra over a bf16 backbone, naive and ours, beside the same run in fp32."""
    exact = of(rows, experiment="equal", dtype="fp32", method="naive_hydra")
    runs = {owner: of(rows, experiment="equal", dtype="bf16", method=f"{owner}_hydra") for owner in ("naive", "ours")}
    gaps = [b["test"] - a["test"] for a, b in zip(runs["naive"], runs["ours"], strict=True)]
    cells = [["naive, fp32", mean_and_spread([row["test"] for row in exact]), "-", "-", "-"]]
    for owner, run in runs.items():
        distances = [curve_distance(a, b) for a, b in zip(exact, run, strict=True)]
        against = [mean_and_spread(gaps), f"{sign_flip_p(gaps):.2f}"] if owner == "ours" else ["-", "-"]
        accuracy = mean_and_spread([row["test"] for row in run])
        cells.append([f"{owner}, bf16", accuracy, f"{statistics.median(distances):.1e}", *against])
    return markdown(["Hydra", "test accuracy (%)", "loss curve from fp32's", "ours - naive (points)", "p"], cells)


def claim_table(rows: Sequence[LearnRow]) -> str:
    """Hydra against LoRA and SeqLoRA of equal parameters, in each place, paired by seed."""
    headings = ["adapters in", "method", "trainable", "learning rate", "test accuracy (%)", "Hydra - it (points)", "p"]
    cells = []
    for position, place in PLACES.items():
        hydra = of(rows, experiment="claim", position=position, method="ours_hydra")
        for kind, name in KINDS.items():
            runs = of(rows, experiment="claim", position=position, method=f"ours_{kind}")
            gaps = [ours["test"] - theirs["test"] for ours, theirs in zip(hydra, runs, strict=True)]
            cells.append(
                [
                    place,
                    name,
                    f"{runs[0]['trainable']:,}",
                    f"{runs[0]['rate']:g}",
                    mean_and_spread([row["test"] for row in runs]),
                    *(["-", "-"] if kind == "hydra" else [mean_and_spread(gaps), f"{sign_flip_p(gaps):.3f}"]),
                ]
            )
    return markdown(headings, cells)


def claim_sentence(rows: Sequence[LearnRow]) -> str:
    """Where Hydra won, where it lost, and where the seeds cannot tell, at p < 0.05."""
    won: list[str] = []
    lost: list[str] = []
    open_: list[str] = []
    for position, place in PLACES.items():
        hydra = of(rows, experiment="claim", position=position, method="ours_hydra")
        for kind in ("lora", "seqlora"):
            rival = of(rows, experiment="claim", position=position, method=f"ours_{kind}")
            gaps = [ours["test"] - theirs["test"] for ours, theirs in zip(hydra, rival, strict=True)]
            told = won if sum(gaps) > 0 else lost
            (told if sign_flip_p(gaps) < 0.05 else open_).append(f"{KINDS[kind]} in {place}")
    parts = [
        f"{verdict} {', '.join(where)}"
        for verdict, where in (("Hydra wins against", won), ("loses to", lost), ("cannot be told from", open_))
        if where
    ]
    return f"At p < 0.05 over these seeds: {'; '.join(parts)}."


def learn_markdown(environment: Environment, rows: Sequence[LearnRow]) -> str:
    """Both tables and what a reader must know beside them."""
    first = rows[0]
    seeds = len({row["seed"] for row in of(rows, experiment="equal")})
    notes = (
        f"{environment_note(environment)} {first['data']}: a ViT that has learned classes 0 to 4 learns classes 5 to 9 "
        f"from {first['images']} images and is tested on {first['tested']}; {seeds} seeds, each with images, order and "
        "start of its own; mean ± standard deviation over them."
    )
    return "\n\n".join(
        [
            "**Equal learning.** Loss curves: median over seeds of the root mean square difference. p: exact sign-flip "
            "test that ours is further from naive, in test accuracy, than naive is from itself when the images of each "
            "batch come in another order.",
            equal_table(rows),
            "**In bf16**, fp32 adapters over a bf16 backbone; p: exact sign-flip test of the paired differences.",
            bf16_table(rows),
            "**The paper's claim.** p: exact sign-flip test of the paired differences.",
            claim_table(rows),
            claim_sentence(rows),
            notes,
        ]
    )


def learn_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(learn_markdown(result.environment, result.rows) for result in stored)


def learn_chart(environment: Environment, rows: Sequence[LearnRow]) -> str:
    """The loss curves of the first seeds, naive and ours upon each other."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axis, (kind, name) in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS.items(), strict=True):
        for owner, width in (("naive", 4.0), ("again", 2.0), ("ours", 0.9)):
            for row in of(rows, experiment="equal", dtype="fp32", method=f"{owner}_{kind}")[:3]:
                label = OWNERS[owner] if row["seed"] == 0 else None
                axis.plot(
                    row["losses"], color=COLOURS[owner], linewidth=width, alpha=0.35 if width > 1 else 1, label=label
                )
        axis.set(title=name, xlabel="step", yscale="log")
    figure.axes[0].set_ylabel("loss")
    figure.axes[0].legend(fontsize=8)
    return svg(figure, "learn")

"""What the fine-tuning runs of a pretrained model say, for the documentation: the paper's claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.measuring.rows import LearnRow
from benchmarks.rendering.learn import SIGNIFICANT, comparisons, mean_and_spread, methods, of, search_table, verdicts
from benchmarks.rendering.tables import KINDS, Stored, Table, digits


def is_pretrained(row: LearnRow) -> bool:
    """Of the backbone minilm, whose texts no other has."""
    return row["data"] == "definitions"


def pretrained_table(rows: Sequence[LearnRow]) -> str:
    """Each method's final runs, and Hydra's paired with them by seed; the head alone is no rival of the paper."""
    told = {(c.position, c.kind): c for c in comparisons(rows)}
    hydra = of(rows, experiment="claim", method="ours_hydra")
    cells = []
    for position, kind in methods(rows):
        runs = of(rows, experiment="claim", position=position, method=f"ours_{kind}")
        gaps = [a["test"] - b["test"] for a, b in zip(hydra, runs, strict=True)]
        end = statistics.mean(statistics.mean(row["losses"][-10:]) for row in runs)
        c = told.get((position, kind))
        cells.append(
            [
                KINDS.get(kind, "head alone"),
                f"{runs[0]['trainable']:,}",
                f"{runs[0]['rate']:g}",
                digits(end),
                mean_and_spread([row["test"] for row in runs]),
                "-" if kind == "hydra" else mean_and_spread(gaps, 2),
                *(["-"] * 2 if c is None else [digits(c.p), digits(c.corrected)]),
            ]
        )
    headings = ["method", "trained in adapters", "learning rate", "loss of the last ten steps", "test accuracy (%)"]
    return Table("", [*headings, "Hydra - it (points)", "p", "p, corrected"], cells).markdown()


def pretrained_sentence(rows: Sequence[LearnRow]) -> str:
    """Whom Hydra beats, and to whom it loses, or cannot be told from."""
    says = {"won": "learns better than", "lost": "learns worse than", "open": "cannot be told from"}
    told = verdicts(rows, place=False)
    parts = [f"{words} {told[verdict].replace(', ', ' and ')}" for verdict, words in says.items() if verdict in told]
    return f"At corrected p < {SIGNIFICANT:g} Hydra {', and '.join(parts)}."


def pretrained_markdown(file: Stored) -> str:
    """The answer, the tables, and what a reader must know beside them."""
    rows = file.rows
    claim = of(rows, experiment="claim")
    first = claim[0]
    seeds, searched = (len({row["seed"] for row in of(rows, experiment=name)}) for name in ("claim", "search"))
    return "\n\n".join(
        [
            pretrained_sentence(rows),
            pretrained_table(rows),
            f"Mean ± standard deviation over {seeds} seeds, each with training texts, order and start of its own: "
            f"{first['images']} texts, {len(first['losses'])} steps, tested on {first['tested']:,} others, the same "
            f"for every seed. p: exact sign-flip test of the differences, paired by seed; corrected: for "
            f"{len(comparisons(rows))} comparisons (Holm). The head alone shows what the adapters add.",
            f"**The search.** Validation accuracy (%) at each learning rate, mean ± standard error over {searched} "
            "other seeds; the chosen rate is bold.",
            search_table(rows),
            file.origin(link=True),
        ]
    )


def pretrained_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(pretrained_markdown(result) for result in stored)

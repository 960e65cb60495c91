"""Table 4, for the pages and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.models import PAPER_MODEL
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.timing import Environment, Quartiles
from benchmarks.rendering.tables import (
    MODES,
    Stored,
    Table,
    digits,
    groups,
    headed,
    label,
    megabytes,
    or_dash,
    what_ran,
)
from benchmarks.rendering.verdicts import is_rival, with_quartiles

MEGA = 1e6
# What the tables mean, for the terminal; the pages say it once, above them.
LEGEND = (
    "Ratios: medians of paired steps, with quartiles. Held: parameters and optimizer state; saved: kept for the "
    "backward; peak: the most that a step needs, what is held included."
)
UNKNOWN_SAVED = "What is saved is not shown: this run added up all micro-batches, of which one is kept at a time."
RIVALS = {"naive_lora": "over naive LoRA", "naive_seqlora": "over naive SeqLoRA", "naive_hydra": "over naive Hydra"}
MEMORY = {"held_bytes": "held (MB)", "saved_bytes": "saved (MB)", "peak_bytes": "peak (MB)"}


def over_rivals(rows: Sequence[Table4Row]) -> dict[str, dict[str, Quartiles]]:
    """Every method's steps over its rivals', by method, of the paired rounds; only ours have rivals."""
    steps = {row["method"]: row["step_seconds"] for row in rows}
    return {
        method: {name: timing.paired_ratios(taken, steps[name]) for name in steps if is_rival(name, method)}
        for method, taken in steps.items()
    }


def table4_table(rows: Sequence[Table4Row]) -> Table:
    """The paper's seconds appear only beside whole epochs of its model and batch."""
    row = rows[0]
    projected, paper = (any(row[key] for row in rows) for key in ("projected", "paper_ratio"))
    headings = ["method", "trainable (M)", f"epoch{', projected' if projected else ''} (s)"]
    headings += [] if projected else ["paper's epoch (s)"]
    headings += [*RIVALS.values(), *MEMORY.values()]
    if paper:
        headings.insert(headings.index(RIVALS["naive_lora"]) + 1, "the paper's, over LoRA")
    over, cells = over_rivals(rows), []
    for row in rows:
        line = [label(row), digits(row["trainable"] / MEGA), digits(row["sec_per_epoch"])]
        line += [] if projected else [or_dash(row["paper_sec_per_epoch"], ".2f")]
        line.append(over_lora(row))
        line += [or_dash(row["paper_ratio"], ".2f")] if paper else []
        for rival in list(RIVALS)[1:]:
            found = over[row["method"]].get(rival)
            line.append("-" if found is None else with_quartiles(found, mark=True))
        cells.append([*line, *(megabytes(row[key]) for key in MEMORY)])  # type: ignore[literal-required]
    title = f"Table 4: {row['model']}, {row['dtype']}, {row['mode']}, {batch_of(row)}"
    return Table(title, headings, cells, [row["method"].startswith("ours_") for row in rows])


def over_lora(row: Table4Row) -> str:
    """Every method's steps over naive LoRA's, as stored; only ours has the mark."""
    if row["ratio"] is None or row["method"] == "naive_lora":
        return "-" if row["ratio"] is None else "1"
    return with_quartiles((row["ratio_q1"], row["ratio"], row["ratio_q3"]), row["method"].startswith("ours_"))


def table4_notes(rows: Sequence[Table4Row]) -> list[str]:
    """What a reader must know beside the figures: the run, and what was proved."""
    row = rows[0]
    samples = "images" if row["sequence"] is None else "sequences"
    epoch = f"Projected from {row['steps']} steps to an epoch" if row["projected"] else "One whole epoch"
    notes = [
        f"{row['weights'].capitalize()} weights, {data_of(row)}. {epoch} of 50,000 {samples}. The head's "
        f"{digits(row['head'] / MEGA)} M parameters are trained too."
    ]
    if any(row["saved_bytes"] is None for row in rows):
        notes.append(UNKNOWN_SAVED)
    notes += [MODES[row["mode"]]] if row["mode"] in MODES else []
    proofs = [row["parity"] for row in rows if row["parity"]]
    if proofs:
        worst = max(proofs, key=lambda proof: proof["gradient"])
        notes.append(
            f"Losses within {max(p['loss'] for p in proofs):.1e} of naive's (allowed {worst['allowed']['loss']:g}), "
            f"gradients within {worst['gradient']:.1e} (allowed {worst['allowed']['gradient']:g})."
        )
    return notes


def data_of(row: Table4Row) -> str:
    """What was learned from, and how large one of it is."""
    if row["sequence"] is None:
        return f"{row['data']} at {row['image_size']}x{row['image_size']}"
    return f"{row['data']} in sequences of {row['sequence']}"


def batch_of(row: Table4Row) -> str:
    """The batch of a step, and the options of the run."""
    parts = [f"batch {row['batch']}"]
    if row["accumulation"] > 1:
        parts[0] += f" in {row['accumulation']} micro-batches"
    parts += ["activation checkpointing"] if row["checkpointing"] else []
    return ", ".join(parts + ([f"lora_dropout {row['lora_dropout']:g}"] if row["lora_dropout"] else []))


def title(environment: Environment, row: Table4Row) -> str:
    return f"{run_of(row)}; {environment['device']}"


def run_of(row: Table4Row) -> str:
    base = "" if row["base"] == "none" else f", {row['base']} base"
    return f"{row['model']}{base}, {row['dtype']}, {row['mode']}, {batch_of(row)}"


def table4_markdown(file: Stored, rows: Sequence[Table4Row]) -> str:
    return "\n\n".join([table4_table(rows).markdown(), " ".join([file.origin(), *table4_notes(rows)])])


def is_papers(row: Table4Row) -> bool:
    """Whether the run is the paper's Table 4: its model, and each step as one batch whose activations are kept."""
    return row["model"] == PAPER_MODEL and row["accumulation"] == 1 and not row["checkpointing"]


def table4_block(stored: Sequence[Stored]) -> str:
    return headed(
        (f"{what_ran(group)}, {batch_of(group[0])}", file, table4_markdown(file, group))
        for file in stored
        for group in table4_groups(file.rows)
    )


def table4_groups(rows: Sequence[Table4Row]) -> list[list[Table4Row]]:
    """The rows of each dtype and mode."""
    return groups(rows, by=("dtype", "mode"), same=("method",))

"""Table 4 of all models for the documentation: each run's own table, and the memory of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.measuring.methods import MODEL_METHODS
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.accelerated import is_script
from benchmarks.rendering.kernels import Kernels
from benchmarks.rendering.table4 import MEGA, is_papers, table4_markdown, title
from benchmarks.rendering.tables import Stored, Table, groups, label, or_dash

UNKNOWN = "not recorded, or added up over all micro-batches though one is kept at a time"
# (key, name) of the memory that a method needs.
MEMORY = (
    ("held_bytes", "parameters and optimizer"),
    ("saved_bytes", "saved for the backward"),
    ("peak_bytes", "peak"),
)


def runs(stored: Sequence[Stored]) -> Iterator[tuple[Environment, list[Table4Row], Kernels]]:
    """The rows of each model, dtype, mode and option, with what is said of its kernels; of one repeated, a run more."""
    by = ("model", "dtype", "mode", "batch", "accumulation", "checkpointing", "lora_dropout")
    for file in stored:
        for group in groups(file.rows, by=by, same=("method",)):
            yield file.environment, without_sums(group), file.kernels


def without_sums(rows: list[Table4Row]) -> list[Table4Row]:
    """A run's rows, without what is saved where that was added up over micro-batches: more than a step's own peak."""
    summed = any(
        row["accumulation"] > 1 and row["saved_bytes"] > row["peak_bytes"] - (row["held_bytes"] or 0) for row in rows
    )
    return [{**row, "saved_bytes": None} for row in rows] if summed else rows


def memory_table(found: Sequence[tuple[Environment, list[Table4Row], Kernels]]) -> Table:
    """A line a run, a column a method: parameters and optimizer, saved and peak, in MB."""
    used = [name for name in MODEL_METHODS if any(row["method"] == name for _, rows, _ in found for row in rows)]
    cells = []
    for environment, rows, _ in found:
        by_method = {row["method"]: row for row in rows}
        line = [title(environment, rows[0])]
        for name in used:
            row = by_method.get(name)
            figures = [] if row is None else [or_dash(row[key] and row[key] / MEGA, ".0f") for key, _ in MEMORY]
            line.append(" / ".join(figures) or "-")
        cells.append(line)
    return Table("Memory", ["run", *(label({"method": name, "ranks": None}).rstrip() for name in used)], cells)


def models_block(stored: Sequence[Stored]) -> str:
    """The memory of every run; the tables of those that are not the paper's Table 4. Not of PEFT scripts."""
    found = [run for run in runs(stored) if not is_script(run[1])]
    unknown = any(row[key] is None for _, rows, _ in found for row in rows for key, _ in MEMORY)
    parts = [
        f"Memory in MB: {' / '.join(name for _, name in MEMORY)}, which is parameters, optimizer state and the most "
        f"that a step holds above them.{f' A dash: {UNKNOWN}.' if unknown else ''}",
        memory_table(found).markdown(),
    ]
    for environment, rows, kernels in found:
        if not is_papers(rows[0]):
            parts += [
                f"**{title(environment, rows[0])}**",
                table4_markdown(environment, rows, kernels.caption),
            ]
    return "\n\n".join(parts)

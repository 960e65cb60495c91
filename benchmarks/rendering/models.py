"""Table 4 of other models for the documentation: each run's own table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.accelerated import is_script
from benchmarks.rendering.kernels import Kernels
from benchmarks.rendering.table4 import is_papers, run_of, table4_markdown
from benchmarks.rendering.tables import Stored, groups, headed


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


def models_block(stored: Sequence[Stored]) -> str:
    """The tables of the runs that are not the paper's Table 4, each under its name. Not of PEFT scripts."""
    found = ((file, rows) for file in stored for _, rows, _ in runs([file]))
    shown = [(file, rows) for file, rows in found if not (is_script(rows) or is_papers(rows[0]))]
    return (
        headed((run_of(rows[0]), file, table4_markdown(file, rows)) for file, rows in shown)
        or "Of other models nothing was measured yet."
    )

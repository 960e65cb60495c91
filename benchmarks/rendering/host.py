"""Host time for the README and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.measuring.rows import HostRow
from benchmarks.rendering import tables
from benchmarks.rendering.tables import Stored

# What our Hydra should take at most over the naive one, by backend.
GOALS = {"native": 0.70, "aten": 1.05}
HEADINGS = ["M x K x N", "method", "us (quartiles)", "over frozen", "over naive LoRA", "over naive Hydra", "goal"]


def verdict(row: HostRow) -> str:
    """Whether our Hydra keeps its goal over the naive one; a dash where none was set."""
    goal = GOALS.get(row["backend"])
    if goal is None:
        return "-"
    return f"{goal:.2f} {'met' if row['over']['naive_hydra'][1] <= goal else 'MISSED'}"


def host_cells(rows: Sequence[HostRow]) -> list[list[str]]:
    cells = []
    for row in rows:
        line = [f"{row['M']} x {row['K']} x {row['N']}", tables.label(row)]
        line[1] += f", {row['backend']}" if row["backend"] else ""
        line.append(f"{row['host_us']:.1f} ({row['q1_us']:.1f} to {row['q3_us']:.1f})")
        line += [f"{row['over'][rival][1]:.3f}" for rival in ("frozen", "naive_lora", "naive_hydra")]
        cells.append([*line, verdict(row)])
    return cells


def host_terminal(rows: Sequence[HostRow]) -> Table:
    title = f"Host time of an eager step, {rows[0]['device']}, {rows[0]['dtype']}"
    return tables.terminal(title, HEADINGS, host_cells(rows), bold=[row["backend"] is not None for row in rows])


def host_block(stored: Sequence[Stored]) -> str:
    parts = []
    for _, environment, rows in stored:
        parts.append(tables.markdown(HEADINGS, host_cells(rows)))
        parts.append(f"{tables.environment_note(environment)} Medians of paired rounds.")
    return "\n\n".join(parts)

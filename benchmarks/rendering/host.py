"""Host time, for the pages and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.rows import HostRow
from benchmarks.rendering.tables import Stored, Table, environment_note, label
from benchmarks.rendering.verdicts import marked

RIVALS = {"naive_lora": "over naive LoRA", "naive_hydra": "over naive Hydra"}


def host_table(rows: Sequence[HostRow]) -> Table:
    """A line a method at each shape, with the mark where ours is over a rival."""
    cells = []
    for row in rows:
        line = [f"{row['M']} x {row['K']} x {row['N']}", label(row) + (f", {row['backend']}" if row["backend"] else "")]
        line.append(f"{row['host_us']:.1f} ({row['q1_us']:.1f} to {row['q3_us']:.1f})")
        line.append(f"{row['over']['frozen'][1]:.3f}")
        ratios = [row["over"][rival][1] for rival in RIVALS]
        cells.append([*line, *(marked(ratio) if row["backend"] else f"{ratio:.3f}" for ratio in ratios)])
    headings = ["M x K x N", "method", "us (quartiles)", "over frozen", *RIVALS.values()]
    title = f"Host time of an eager step, {rows[0]['device']}, {rows[0]['dtype']}"
    return Table(title, headings, cells, [row["backend"] is not None for row in rows], left=2)


def host_block(stored: Sequence[Stored]) -> str:
    return "\n\n".join(
        f"{host_table(file.rows).markdown()}\n\n{file.kernels.caption}{environment_note(file.environment)} "
        "Medians of paired rounds."
        for file in stored
    )

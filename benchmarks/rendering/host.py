"""Host time, for the pages and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.rows import HostRow
from benchmarks.rendering.tables import Stored, Table, digits, label
from benchmarks.rendering.verdicts import with_quartiles

RIVALS = {"naive_lora": "over naive LoRA", "naive_hydra": "over naive Hydra"}


def host_table(rows: Sequence[HostRow]) -> Table:
    """A line a method at each shape, with the mark where ours is over a rival."""
    cells = []
    for row in rows:
        line = [f"{row['M']} x {row['K']} x {row['N']}", label(row) + (f", {row['backend']}" if row["backend"] else "")]
        line += [digits(row["host_us"]), f"{row['over']['frozen'][1]:.2f}"]
        ratios = {rival: row["over"][rival] for rival in RIVALS}
        itself = {name: name == row["method"] for name in RIVALS}
        cells.append(
            [*line, *("1" if itself[r] else with_quartiles(over, bool(row["backend"])) for r, over in ratios.items())]
        )
    headings = ["M x K x N", "method", "step (us)", "over frozen", *RIVALS.values()]
    title = f"Host time of an eager step, {rows[0]['device']}, {rows[0]['dtype']}"
    return Table(title, headings, cells, [row["backend"] is not None for row in rows], left=2)


def host_block(stored: Sequence[Stored]) -> str:
    return "\n\n".join(
        f"{host_table(file.rows).markdown()}\n\n{file.origin()} {file.rows[0]['dtype']}, {file.rows[0]['runs']} rounds."
        for file in stored
    )

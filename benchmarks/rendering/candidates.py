"""What nothing selects yet beside what runs today: measured steps, each with what was predicted of it."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.rows import CandidateRow
from benchmarks.rendering.tables import Stored, Table, environment_note

HEADINGS = ("M x K x N", "R", "way", "forward, us", "backward, us", "step, us", "predicted, us")
HEADINGS += ("over today's", "quartiles", "predicted", "over frozen", "predicted")


def candidates_table(rows: Sequence[CandidateRow]) -> Table:
    """A line a way, of one question; the candidates stand out."""
    found: dict[tuple[object, ...], dict[str, CandidateRow]] = {}
    for row in rows:
        key = row["M"], row["K"], row["N"], row["r_a"] + row["r_b"], row["way"]
        found.setdefault(key, {})[row["phase"]] = row
    cells, bold = [], []
    for (M, K, N, R, way), of in found.items():
        step, today = of["step"], of["step"]["instead_of"]
        low, middle, high = step["over"][today]
        line = [f"{M} x {K} x {N}", str(R), str(way)]
        line += [f"{of[phase]['median_us']:.1f}" for phase in ("forward", "backward", "step")]
        line += [f"{step['predicted_us']:.1f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        line += [f"{step['predicted_over'][today]:.3f}"]
        line += [f"{step['over']['frozen'][1]:.3f}", f"{step['predicted_over']['frozen']:.3f}"]
        cells.append(line)
        bold.append(way not in ("frozen", today))
    return Table(rows[0]["question"], HEADINGS, cells, bold, left=3)


def candidates_block(stored: Sequence[Stored]) -> str:
    """A table a question, and where it was measured."""
    parts = []
    for file in stored:
        questions = dict.fromkeys(row["question"] for row in file.rows)
        for question in questions:
            table = candidates_table([row for row in file.rows if row["question"] == question])
            parts.append(f"**{question}**\n\n{table.markdown()}")
        parts.append(f"{file.kernels.caption}{environment_note(file.environment)}")
    return "\n\n".join(parts)

"""What a run on a GPU says besides times: its stages, its checks, the card's ceilings, and what won where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.rendering.kernels import Kernels
from benchmarks.rendering.tables import Stored, Table, digits, or_dash


def run_block(stored: Sequence[Stored]) -> str:
    """A line a stage."""

    def table(rows: Sequence[Any]) -> str:
        cells = []
        for row in rows:
            taken = f"{row['seconds']:.0f} of {row['limit']:.0f}"
            ahead, later = f"{row['compiled']} of {row['planned']}", str(len(row["late"]))
            cells.append([row["stage"], row["status"], taken, f"{row['compile_seconds']:.0f}", ahead, later])
        headings = ["stage", "status", "seconds, of its limit", "of them compiling", "compiled ahead", "compiled later"]
        return Table("", headings, cells, left=2).markdown()

    return _each(stored, table)


def doctor_block(stored: Sequence[Stored]) -> str:
    """A line a group of checks, and what failed."""

    def table(rows: Sequence[Any]) -> str:
        counts: dict[str, Counter[str]] = {}
        for row in rows:
            counts.setdefault(row["group"], Counter())[row["status"]] += 1
        cells = [
            [group, *(str(found[status]) for status in ("pass", "fail", "skip"))] for group, found in counts.items()
        ]
        failed = [
            f"- {row['group']}, {row['check']}: {row['reason'] or row['what']}, error {or_dash(row['error'], '.2e')}, "
            f"allowed {or_dash(row['allowed'], '.2e')}"
            for row in rows
            if row["status"] == "fail"
        ]
        lines = "\n".join(failed) or "Nothing failed."
        return f"{Table('', ['group', 'passed', 'failed', 'cannot run here'], cells).markdown()}\n\n{lines}"

    return _each(stored, table)


def ceilings_block(stored: Sequence[Stored]) -> str:
    def table(rows: Sequence[Any]) -> str:
        units = list(dict.fromkeys(row["unit"] for row in rows))
        cells = [
            [row["what"], row["dtype"], *(digits(row["value"]) if row["unit"] == unit else "-" for unit in units)]
            for row in rows
        ]
        return Table("", ["what", "dtype", *units], cells, left=2).markdown()

    # None of our kernels runs there.
    return _each([file._replace(kernels=Kernels()) for file in stored], table)


def tune_block(stored: Sequence[Stored]) -> str:
    """A line a shape: the winner, then the other candidates, the fastest first."""

    def table(rows: Sequence[Any]) -> str:
        cells = []
        for row in rows:
            winner = f"{row['backend']} {row['form']}"
            by_time = sorted(row["us"].items(), key=lambda item: (item[0] != winner, item[1]))
            shape = f"{row['M']} x {row['K']} x {row['N']}"
            alone = {row["without_bias"]: " (without b0 alone)"}
            others = ", ".join(f"{name} {digits(us)}{alone.get(name, '')}" for name, us in by_time[1:])
            failed = ", ".join(row["failed"])
            cells.append([shape, f"{row['r_a']}+{row['r_b']}", row["dtype"], *by_time[0][:1], digits(by_time[0][1])])
            cells[-1] += [others or "-", failed or "-"]
        headings = ["M x K x N", "ranks", "dtype", "won", "us", "others, us", "wrong"]
        return Table("", headings, cells, left=4).markdown()

    return _each(stored, table)


def _each(stored: Sequence[Stored], table: Callable[[Sequence[Any]], str]) -> str:
    parts = [f"{table(file.rows)}\n\n{file.origin(link=True)}" for file in stored]
    if len(parts) == 1:
        return parts[0]
    return "\n\n".join(f"**{file.path.stem}**\n\n{part}" for file, part in zip(stored, parts, strict=True))

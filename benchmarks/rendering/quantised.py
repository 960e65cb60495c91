"""Whole steps over quantised bases: PEFT's LoRA accelerated, and our Hydra, over PEFT's own, a line each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.rows import Table4Row
from benchmarks.rendering.accelerated import AUTOCAST, OURS, SCRIPT, conditions, found_against_hand
from benchmarks.rendering.table4 import table4_groups
from benchmarks.rendering.tables import Stored, Table, digits, label, megabytes
from benchmarks.rendering.verdicts import with_quartiles

METHODS = (OURS, "ours_hydra")
HEADINGS = ("base", "checkpointing", "method", "PEFT's step (s)", "over PEFT", "over PEFT under autocast")
HEADINGS += ("one token, over PEFT", "peak, PEFT (MB)", "peak, under autocast (MB)", "peak, ours (MB)")


def lines_of(by_method: Mapping[str, Table4Row]) -> Iterator[list[str]]:
    """A line for each of ours, beside PEFT's LoRA; none where that was not measured."""
    script, autocast = by_method.get(SCRIPT), by_method.get(AUTOCAST)
    for name in METHODS:
        if script is None or name not in by_method:
            continue
        row = by_method[name]
        over = [
            over_rival(row, rival, of)
            for rival, of in ((script, "step_seconds"), (autocast, "step_seconds"), (script, "token_seconds"))
        ]
        pace = digits(timing.quartiles(script["step_seconds"]).median)
        about = [row["base"], "yes" if row["checkpointing"] else "no", label(row)]
        peaks = [megabytes(of and of["peak_bytes"]) for of in (script, autocast, row)]
        yield [*about, pace, *over, *peaks]


def over_rival(ours: Table4Row, rival: Table4Row | None, of: str) -> str:
    """Ours over a rival's, of samples taken together."""
    if rival is None or ours[of] is None or rival[of] is None:  # type: ignore[literal-required]
        return "-"
    return with_quartiles(timing.paired_ratios(ours[of], rival[of]), True)  # type: ignore[literal-required]


def quantised_block(stored: Sequence[Stored]) -> str:
    """One table of all runs; under it what they have in common."""
    found = [(file, group) for file in stored for group in table4_groups(file.rows)]
    found.sort(key=lambda run: (run[1][0]["base"], run[1][0]["checkpointing"]))
    cells = [line for _, group in found for line in lines_of({row["method"]: row for row in group})]
    rows = [row for _, group in found for row in group]
    note = " ".join([*conditions(found), found_against_hand(rows)])
    return "\n\n".join([Table("Over quantised bases", HEADINGS, cells, left=3).markdown(), note])

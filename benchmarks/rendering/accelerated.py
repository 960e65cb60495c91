"""Whole steps of a PEFT LoRA script beside the same script accelerated: a line a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measuring import timing
from benchmarks.measuring.rows import Table4Row
from benchmarks.rendering.table4 import table4_groups
from benchmarks.rendering.tables import Stored, Table, digits, megabytes, origins
from benchmarks.rendering.verdicts import with_quartiles

SCRIPT, AUTOCAST, OURS = "peft_lora", "autocast_lora", "accelerated_lora"
OPTIONS = ("dtype", "rank", "lora_dropout", "checkpointing")
HEADINGS = (*OPTIONS, "PEFT's step (s)", "accelerated over PEFT", "over PEFT under autocast")
HEADINGS += ("peak, PEFT (MB)", "peak, under autocast (MB)", "peak, accelerated (MB)")


def is_script(rows: Sequence[Table4Row]) -> bool:
    """Whether a run is of a PEFT script alone, and of no method that PEFT has not."""
    found = {row["method"] for row in rows}
    return {SCRIPT, OURS} <= found and "ours_hydra" not in found


def options_of(row: Table4Row) -> list[str]:
    """What tells the runs of a table apart."""
    return [
        row["dtype"],
        str(sum(row["ranks"] or ())),
        f"{row['lora_dropout']:g}",
        "yes" if row["checkpointing"] else "no",
    ]


def line_of(by_method: Mapping[str, Table4Row]) -> list[str]:
    ours, script = by_method[OURS], by_method[SCRIPT]
    line = [*options_of(script), digits(timing.quartiles(script["step_seconds"]).median)]
    for name in (SCRIPT, AUTOCAST):
        rival = by_method.get(name)
        taken = rival and timing.paired_ratios(ours["step_seconds"], rival["step_seconds"])
        line.append("-" if taken is None else with_quartiles(taken, True))
    for name in (SCRIPT, AUTOCAST, OURS):
        line.append(megabytes(by_method[name]["peak_bytes"] if name in by_method else None))
    return line


def conditions(found: Sequence[tuple[Stored, Sequence[Table4Row]]]) -> list[str]:
    """What all runs of a table have in common, each once: where and when, and what a step was."""
    what = dict.fromkeys(
        f"{row['model']}, {row['weights']} weights, batch {row['batch']}, sequences of {row['sequence']} random "
        f"tokens; {row['steps']} rounds."
        for _, (row, *_) in found
    )
    return [origins([file for file, _ in found]), *what]


def found_against_hand(rows: Sequence[Table4Row]) -> str:
    """The largest difference of a gradient that was found, in each dtype."""
    proofs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["parity"]:
            proofs.setdefault(row["dtype"], []).append(row["parity"])
    worst = [
        f"{max(proof['gradient'] for proof in of):.1e} in {dtype} (allowed {of[0]['allowed']['gradient']:g})"
        for dtype, of in proofs.items()
    ]
    return f"Gradients against those of a layer written by hand: within {', '.join(worst)}."


def accelerated_block(stored: Sequence[Stored]) -> str:
    """One table of all runs, those without dropout first; under it what they have in common."""
    found = [(file, group) for file in stored for group in table4_groups(file.rows) if is_script(group)]
    by_methods = [{row["method"]: row for row in group} for _, group in found]
    by_methods.sort(key=lambda by: tuple(by[SCRIPT][of] for of in ("dtype", "lora_dropout", "checkpointing", "ranks")))  # type: ignore[literal-required]
    ours = [by[OURS] for by in by_methods]
    table = Table("PEFT's LoRA, accelerated", HEADINGS, [line_of(by) for by in by_methods], left=len(OPTIONS))
    return "\n\n".join([table.markdown(), " ".join([*conditions(found), found_against_hand(ours)])])

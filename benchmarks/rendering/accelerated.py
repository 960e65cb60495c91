"""Whole steps of a PEFT LoRA script beside the same script accelerated: a line a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.rows import Table4Row
from benchmarks.rendering.table4 import MEGA, batch_of, table4_groups
from benchmarks.rendering.tables import Stored, Table, commit_note
from benchmarks.rendering.verdicts import with_quartiles

SCRIPT, AUTOCAST, OURS = "peft_lora", "autocast_lora", "accelerated_lora"
HEADINGS = ("run", "PEFT, s/step", "accelerated over PEFT (quartiles)", "over PEFT under autocast (quartiles)")
HEADINGS += ("peak of PEFT (MB)", "of PEFT under autocast", "accelerated")


def is_script(rows: Sequence[Table4Row]) -> bool:
    """Whether a run is of a PEFT script alone, and of no method that PEFT has not."""
    found = {row["method"] for row in rows}
    return {SCRIPT, OURS} <= found and "ours_hydra" not in found


def line_of(by_method: Mapping[str, Table4Row]) -> list[str]:
    ours, script = by_method[OURS], by_method[SCRIPT]
    line = [f"{script['dtype']}, r {sum(script['ranks'] or ())}, {batch_of(script)}"]
    line.append(f"{timing.quartiles(script['step_seconds']).median:.3f}")
    for name in (SCRIPT, AUTOCAST):
        rival = by_method.get(name)
        taken = rival and timing.paired_ratios(ours["step_seconds"], rival["step_seconds"])
        line.append("-" if taken is None else with_quartiles(taken, True))
    for name in (SCRIPT, AUTOCAST, OURS):
        line.append(f"{by_method[name]['peak_bytes'] / MEGA:.0f}" if name in by_method else "-")
    return line


def accelerated_block(stored: Sequence[Stored]) -> str:
    """One table of all runs, under it what they have in common and the commits; the worst difference that was found."""
    found = [(file, group) for file in stored for group in table4_groups(file.rows) if is_script(group)]
    cells = [line_of({row["method"]: row for row in group}) for _, group in found]
    first = found[0][1][0]
    made = dict.fromkeys(f"{file.environment['device']}, {file.environment['threads']} threads" for file, _ in found)
    when = dict.fromkeys(f"{commit_note(file.environment)}" for file, _ in found)
    proofs = [row["parity"] for _, group in found for row in group if row["parity"] and row["method"] == OURS]
    worst = [
        f"{max(proof['gradient'] for proof in of):.1e} (allowed {limit:g})"
        for limit in sorted({proof["allowed"]["gradient"] for proof in proofs})
        for of in [[proof for proof in proofs if proof["allowed"]["gradient"] == limit]]
    ]
    note = (
        f"{'; '.join(made)}. {'; '.join(when)}. {first['model']}, {first['weights']} weights, adapters in all linear "
        f"layers but the head, random tokens in sequences of {first['sequence']}; {first['steps']} rounds of all "
        "methods in shuffled order, medians of paired steps. Peak: parameters, optimizer state and the step's peak "
        "above them. Losses and gradients of a step without dropout were compared with a layer written by hand: the "
        f"largest difference of a gradient is {', in bf16 '.join(worst)}."
    )
    return "\n\n".join([Table("PEFT's LoRA, accelerated", HEADINGS, cells).markdown(), note])

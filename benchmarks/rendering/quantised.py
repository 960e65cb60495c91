"""Whole steps over quantised bases: PEFT's LoRA, the same accelerated, and our Hydra, a line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.rows import Table4Row
from benchmarks.rendering.accelerated import AUTOCAST, OURS, SCRIPT
from benchmarks.rendering.table4 import MEGA, batch_of, table4_groups
from benchmarks.rendering.tables import Stored, Table, commit_note, label
from benchmarks.rendering.verdicts import with_quartiles

METHODS = (SCRIPT, AUTOCAST, OURS, "ours_hydra")
HEADINGS = ("run", "method", "s/step", "over PEFT (quartiles)", "over PEFT under autocast (quartiles)", "peak (MB)")
HEADINGS += ("a token, over PEFT (quartiles)",)


def lines_of(by_method: Mapping[str, Table4Row]) -> list[list[str]]:
    lines = []
    for name in METHODS:
        if name not in by_method:
            continue
        row, rivals = by_method[name], [by_method.get(rival) for rival in (SCRIPT, AUTOCAST)]
        of_peft = name in (SCRIPT, AUTOCAST)
        over = [
            "-" if rival is None or of_peft else with_quartiles(paired(row, rival, "step_seconds"), True)
            for rival in rivals
        ]
        tokens = rivals[0] is None or of_peft or row["token_seconds"] is None
        token = "-" if tokens else with_quartiles(paired(row, rivals[0], "token_seconds"), True)
        pace = f"{timing.quartiles(row['step_seconds']).median:.3f}"
        about = f"{row['base']}, {row['dtype']}, {batch_of(row)}"
        lines.append([about, label(row), pace, *over, f"{row['peak_bytes'] / MEGA:.0f}", token])
    return lines


def paired(ours: Table4Row, rival: Table4Row, of: str) -> timing.Quartiles:
    """Ours over a rival's, of samples taken together."""
    return timing.paired_ratios(ours[of], rival[of])  # type: ignore[literal-required]


def quantised_block(stored: Sequence[Stored]) -> str:
    """One table of all runs; under it what they have in common."""
    found = [(file, group) for file in stored for group in table4_groups(file.rows)]
    cells = [line for _, group in found for line in lines_of({row["method"]: row for row in group})]
    first = found[0][1][0]
    made = dict.fromkeys(f"{file.environment['device']}, {file.environment['threads']} threads" for file, _ in found)
    when = dict.fromkeys(commit_note(file.environment) for file, _ in found)
    proofs = [row["parity"] for _, group in found for row in group if row["parity"]]
    worst = max(proof["gradient"] for proof in proofs)
    note = (
        f"{'; '.join(made)}. {'; '.join(when)}. {first['model']}, random weights, all linear layers but the head "
        "quantised by bitsandbytes: nf4 twice (its own quantisation too), int8 without LLM.int8's rounding of "
        f"activations. Random tokens in sequences of {first['sequence']}; {first['steps']} rounds of all methods in "
        "shuffled order, medians of paired steps. Peak: packed weights, other parameters, optimizer state and the "
        "step's peak above them. A token: a forward of one token without gradients. Losses and gradients were compared "
        f"with a layer written by hand over the same base: the largest difference of a gradient is {worst:.1e}."
    )
    return "\n\n".join([Table("Over quantised bases", HEADINGS, cells, left=2).markdown(), note])

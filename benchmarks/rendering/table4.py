"""Table 4, for the pages and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.methods import naive_of
from benchmarks.measuring.models import PAPER_MODEL
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.timing import Environment, Quartiles
from benchmarks.rendering.tables import MODES, Stored, Table, environment_note, groups, headed, label, or_dash
from benchmarks.rendering.verdicts import is_rival, with_quartiles

MEGA = 1e6
UNKNOWN_SAVED = "not shown, as this run added up all micro-batches, of which one is kept at a time"


def over_rivals(rows: Sequence[Table4Row]) -> dict[str, dict[str, Quartiles]]:
    """Every method's steps over its rivals', by method, of the paired rounds; only ours have rivals."""
    steps = {row["method"]: row["step_seconds"] for row in rows}
    return {
        method: {name: timing.paired_ratios(taken, steps[name]) for name in steps if is_rival(name, method)}
        for method, taken in steps.items()
    }


def table4_table(rows: Sequence[Table4Row]) -> Table:
    """The paper's seconds appear only beside whole epochs of its model and batch."""
    row = rows[0]
    projected, paper = (any(row[key] for row in rows) for key in ("projected", "paper_ratio"))
    headings = ["method", "trainable (M)", "head (M)", f"sec/epoch{', projected' if projected else ''} (quartiles)"]
    headings += [] if projected else ["paper's sec/epoch"]
    headings += [
        "over naive LoRA (quartiles)",
        *(["over LoRA, the paper's"] if paper else []),
        "over naive SeqLoRA (quartiles)",
    ]
    headings += ["over its naive (quartiles)", "saved (MB)", "peak (MB)"]
    over, cells = over_rivals(rows), []
    for row in rows:
        ours = row["method"].startswith("ours_")
        line = [label(row), f"{row['trainable'] / MEGA:.3f}", f"{row['head'] / MEGA:.3f}"]
        line.append(f"{row['sec_per_epoch']:.1f} ({row['q1']:.1f} to {row['q3']:.1f})")
        line += [] if projected else [or_dash(row["paper_sec_per_epoch"], ".2f")]
        ratio = (row["ratio_q1"], row["ratio"], row["ratio_q3"])
        line.append("-" if row["ratio"] is None else with_quartiles(ratio, ours))
        line += [or_dash(row["paper_ratio"], ".3f")] if paper else []
        for rival in ("naive_seqlora", naive_of(row["method"]) or ""):
            found = over[row["method"]].get(rival)
            line.append("-" if found is None else with_quartiles(found, ours))
        line += [or_dash(row[key] and row[key] / MEGA, ".1f") for key in ("saved_bytes", "peak_bytes")]
        cells.append(line)
    title = f"Table 4: {row['model']}, {row['dtype']}, {row['mode']}, {batch_of(row)}"
    return Table(title, headings, cells, [row["method"].startswith("ours_") for row in rows])


def table4_notes(environment: Environment, rows: Sequence[Table4Row]) -> list[str]:
    """What a reader must know beside the figures: the run, what they mean and what was proved; then how often our Hydra
    was the faster.
    """
    row = rows[0]
    samples = "images" if row["sequence"] is None else "sequences"
    if row["projected"]:
        epoch = f"sec/epoch is projected to 50,000 {samples} from {row['steps']} steps of {row['batch']} {samples}"
        if any(row["paper_ratio"] is not None for row in rows):
            epoch += ", so only the ratios stand beside the paper's"
    else:
        epoch = f"sec/epoch is one whole epoch of 50,000 images in batches of {row['batch']}"
    saved = "kept for the backward" if all(row["saved_bytes"] is not None for row in rows) else UNKNOWN_SAVED
    note = (
        f"{environment_note(environment)} {row['model']}, {row['weights']} weights, {data_of(row)}, {row['dtype']}, "
        f"{MODES[row['mode']]}, {batch_of(row)}, {row['steps']} rounds of all methods in shuffled order; {epoch}. "
        f"Ratios: medians of paired steps. Saved: {saved}. Peak: parameters, optimizer state and the step's peak "
        "above them."
    )
    proofs = [row["parity"] for row in rows if row["parity"]]
    if proofs:
        worst = max(proofs, key=lambda proof: proof["gradient"])
        note += (
            f" Ours against naive, every step from equal weights: losses within {max(p['loss'] for p in proofs):.1e} "
            f"(allowed {worst['allowed']['loss']:g}), gradients within {worst['gradient']:.1e} "
            f"(allowed {worst['allowed']['gradient']:g})."
        )
    return [note, *rounds_won({row["method"]: row for row in rows})]


def rounds_won(by_method: Mapping[str, Table4Row]) -> list[str]:
    """In how many rounds our Hydra was faster than each naive method, in one sentence; none where it did not run."""
    ours, parts = by_method.get("ours_hydra"), []
    for name in ("naive_lora", "naive_seqlora", "naive_hydra"):
        if ours is not None and (rival := by_method.get(name)) is not None:
            pairs = zip(ours["step_seconds"], rival["step_seconds"], strict=True)
            parts.append(f"{label(rival)} in {sum(a < b for a, b in pairs)}")
    if not parts:
        return []
    return [f"Of {len(ours['step_seconds'])} rounds {label(ours)} was faster than {', than '.join(parts)}."]


def data_of(row: Table4Row) -> str:
    """What was learned from, and how large one of it is."""
    if row["sequence"] is None:
        return f"{row['data']} at {row['image_size']}x{row['image_size']}"
    return f"{row['data']} in sequences of {row['sequence']}"


def batch_of(row: Table4Row) -> str:
    """The batch of a step, and the options of the run."""
    parts = [f"batch {row['batch']}"]
    if row["accumulation"] > 1:
        parts[0] += f" in {row['accumulation']} micro-batches"
    parts += ["activation checkpointing"] if row["checkpointing"] else []
    return ", ".join(parts + ([f"lora_dropout {row['lora_dropout']:g}"] if row["lora_dropout"] else []))


def title(environment: Environment, row: Table4Row) -> str:
    return f"{run_of(row)}; {environment['device']}"


def run_of(row: Table4Row) -> str:
    base = "" if row["base"] == "none" else f", {row['base']} base"
    return f"{row['model']}{base}, {row['dtype']}, {row['mode']}, {batch_of(row)}"


def table4_markdown(environment: Environment, rows: Sequence[Table4Row], kernels: str = "") -> str:
    return "\n\n".join([table4_table(rows).markdown(), kernels + " ".join(table4_notes(environment, rows))])


def is_papers(row: Table4Row) -> bool:
    """Whether the run is the paper's Table 4: its model, and each step as one batch whose activations are kept."""
    return row["model"] == PAPER_MODEL and row["accumulation"] == 1 and not row["checkpointing"]


def table4_block(stored: Sequence[Stored]) -> str:
    return headed(
        (file.environment, group, table4_markdown(file.environment, group, file.kernels.caption))
        for file in stored
        for group in table4_groups(file.rows)
    )


def table4_groups(rows: Sequence[Table4Row]) -> list[list[Table4Row]]:
    """The rows of each dtype and mode."""
    return groups(rows, by=("dtype", "mode"), same=("method",))

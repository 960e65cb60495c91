"""Table 4 for the README and the terminal, and its chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import timing
from benchmarks.methods import naive_of
from benchmarks.models import PAPER_MODEL
from benchmarks.rows import Table4Row
from benchmarks.tables import MODES, Stored, environment_note, groups, headed, label, markdown, or_dash, terminal
from benchmarks.timing import Environment

COLOURS = {"naive": "tab:blue", "ours": "tab:green"}
MEGA = 1e6


def over_their_naive(rows: Sequence[Table4Row]) -> dict[str, float]:
    """Ours over the naive method that computes the same, by method: the median of the paired steps."""
    steps = {row["method"]: row["step_seconds"] for row in rows}
    pairs = {name: naive for name in steps if (naive := naive_of(name))}
    return {name: timing.paired_ratios(steps[name], steps[naive]).median for name, naive in pairs.items()}


def table4_cells(rows: Sequence[Table4Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of Table 4. The paper's seconds appear only beside whole epochs of its model and batch."""
    projected = any(row["projected"] for row in rows)
    headings = ["method", "trainable (M)", "head (M)", f"sec/epoch{', projected' if projected else ''} (quartiles)"]
    headings += [] if projected else ["paper's sec/epoch"]
    paper = any(row["paper_ratio"] is not None for row in rows)
    headings += ["over naive LoRA (quartiles)", *(["paper's"] if paper else []), "over its naive"]
    headings += ["saved (MB)", "peak (MB)"]
    over_naive = over_their_naive(rows)
    cells = []
    for row in rows:
        line = [label(row), f"{row['trainable'] / MEGA:.3f}", f"{row['head'] / MEGA:.3f}"]
        line.append(f"{row['sec_per_epoch']:.1f} ({row['q1']:.1f} to {row['q3']:.1f})")
        line += [] if projected else [or_dash(row["paper_sec_per_epoch"], ".2f")]
        quartiles = "" if row["ratio"] is None else f" ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"
        line.append(or_dash(row["ratio"], ".3f") + quartiles)
        line += [or_dash(row["paper_ratio"], ".3f")] if paper else []
        line.append(or_dash(over_naive.get(row["method"]), ".3f"))
        line += [f"{row['saved_bytes'] / MEGA:.1f}", f"{row['peak_bytes'] / MEGA:.1f}"]
        cells.append(line)
    return headings, cells


def table4_notes(environment: Environment, rows: Sequence[Table4Row]) -> list[str]:
    """What a reader must know beside the figures: the run, what they mean, how ours stands, and what was proved."""
    row = rows[0]
    samples = "images" if row["sequence"] is None else "sequences"
    if row["projected"]:
        epoch = f"sec/epoch is projected to 50,000 {samples} from {row['steps']} steps of {row['batch']} {samples}"
        if any(row["paper_ratio"] is not None for row in rows):
            epoch += ", so only the ratios stand beside the paper's"
    else:
        epoch = f"sec/epoch is one whole epoch of 50,000 images in batches of {row['batch']}"
    notes = [
        environment_note(environment),
        f"{row['model']}, {row['weights']} weights, {data_of(row)}, {row['dtype']}, {MODES[row['mode']]}, "
        f"{batch_of(row)}, {row['steps']} rounds of all methods in shuffled order; {epoch}. Saved: kept for the "
        "backward. Peak: parameters, optimizer state and the step's peak above them.",
    ]
    by_method = {row["method"]: row for row in rows}
    if ours := by_method.get("ours_hydra"):
        rivals = [by_method[name] for name in ("naive_lora", "naive_seqlora", "naive_hydra") if name in by_method]
        ratios = [_against(ours, rival) for rival in rivals]
        notes.append(f"A step of {label(ours)} over {', '.join(ratios)} (medians of paired steps).")
    proofs = [row["parity"] for row in rows if row["parity"]]
    if proofs:
        worst = max(proofs, key=lambda proof: proof["gradient"])
        notes.append(
            f"Ours against naive, every step from equal weights: losses within {max(p['loss'] for p in proofs):.1e} "
            f"(allowed {worst['allowed']['loss']:g}), gradients within {worst['gradient']:.1e} "
            f"(allowed {worst['allowed']['gradient']:g})."
        )
    return notes


def data_of(row: Table4Row) -> str:
    """What was learned from, and how large one of it is."""
    if row["sequence"] is None:
        return f"{row['data']} at {row['image_size']}x{row['image_size']}"
    return f"{row['data']} in sequences of {row['sequence']}"


def batch_of(row: Table4Row) -> str:
    """The batch of a step, and how it was run where not all at once."""
    parts = [f"batch {row['batch']}"]
    if row["accumulation"] > 1:
        parts[0] += f" in {row['accumulation']} micro-batches"
    return ", ".join(parts + (["activation checkpointing"] if row["checkpointing"] else []))


def _against(ours: Table4Row, rival: Table4Row) -> str:
    ratio = timing.paired_ratios(ours["step_seconds"], rival["step_seconds"]).median
    found = f"{label(rival)} {ratio:.3f}"
    theirs, others = ours["paper_sec_per_epoch"], rival["paper_sec_per_epoch"]
    return found if theirs is None or others is None else f"{found} (paper {theirs / others:.3f})"


def table4_terminal(rows: Sequence[Table4Row]) -> Table:
    headings, cells = table4_cells(rows)
    title = f"Table 4: {rows[0]['model']}, {rows[0]['dtype']}, {rows[0]['mode']}, {batch_of(rows[0])}"
    return terminal(title, headings, cells, bold=[row["method"].startswith("ours_") for row in rows])


def table4_markdown(environment: Environment, rows: Sequence[Table4Row]) -> str:
    return f"{markdown(*table4_cells(rows))}\n\n{' '.join(table4_notes(environment, rows))}"


def is_papers(row: Table4Row) -> bool:
    """Whether the run is the paper's Table 4: its model, and each step as one batch whose activations are kept."""
    return row["model"] == PAPER_MODEL and row["accumulation"] == 1 and not row["checkpointing"]


def table4_block(stored: Sequence[Stored]) -> str:
    return headed(
        (environment, group, table4_markdown(environment, group))
        for _, environment, rows in stored
        for group in groups(rows, by=("dtype", "mode"), same=("method",))
    )


def table4_chart(environment: Environment, rows: Sequence[Table4Row], path: Path) -> None:
    """Times and memory as bars from zero, with ratios to naive LoRA: red where ours loses to it or to its own naive."""
    figure = Figure(figsize=(12, 0.6 * len(rows) + 2), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True)
    places, over_naive = list(range(len(rows))), over_their_naive(rows)
    seconds = [row["sec_per_epoch"] for row in rows]
    # A whole epoch's sum may lie outside the quartiles of its steps: a whisker then has no length on that side.
    whiskers = [
        [max(0.0, row["sec_per_epoch"] - row["q1"]) for row in rows],
        [max(0.0, row["q3"] - row["sec_per_epoch"]) for row in rows],
    ]
    colours = [COLOURS.get(row["method"].partition("_")[0], "tab:gray") for row in rows]
    times.barh(places, seconds, xerr=whiskers, color=colours, capsize=3)
    for place, row in zip(places, rows, strict=True):
        if row["ratio"] is not None:
            loses = row["method"] in over_naive and max(row["ratio"], over_naive[row["method"]]) > 1
            text = f" {row['ratio']:.3f}" + ("" if row["paper_ratio"] is None else f" (paper {row['paper_ratio']:.3f})")
            times.text(
                max(row["sec_per_epoch"], row["q3"]), place, text, va="center", color="red" if loses else "black"
            )
    times.set_yticks(places, [label(row) for row in rows])
    times.invert_yaxis()
    times.set_xlim(0, 1.45 * max(max(row["sec_per_epoch"], row["q3"]) for row in rows))
    epoch = "sec/epoch, projected" if rows[0]["projected"] else "sec/epoch"
    times.set_xlabel(f"{epoch}; the ratio to naive LoRA, red where ours loses to it or to its own naive")
    for offset, key, colour, name in (
        (-0.2, "peak_bytes", "tab:purple", "peak"),
        (0.2, "saved_bytes", "tab:orange", "saved for backward"),
    ):
        bars = memory.barh(
            [place + offset for place in places], [row[key] / MEGA for row in rows], 0.4, color=colour, label=name
        )
        memory.bar_label(bars, fmt=" %.0f")
    memory.margins(x=0.15)
    memory.set_xlabel("memory (MB)")
    figure.legend(loc="outside lower right", ncols=2)
    first = rows[0]
    figure.suptitle(
        f"{first['model']}, {first['dtype']}, {first['mode']}, {batch_of(first)}, {first['data']}: "
        f"{environment['device']}, {environment['date'][:10]}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)

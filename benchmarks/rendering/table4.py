"""Table 4 for the README and the terminal, and its chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.measuring import timing
from benchmarks.measuring.methods import naive_of
from benchmarks.measuring.models import PAPER_MODEL
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.timing import Environment, Quartiles
from benchmarks.rendering import verdicts
from benchmarks.rendering.tables import (
    MODES,
    Stored,
    environment_note,
    groups,
    headed,
    is_gpu,
    label,
    markdown,
    or_dash,
    svg,
    terminal,
)
from benchmarks.rendering.verdicts import is_rival, with_quartiles

COLOURS = {"naive": "tab:blue", "ours": "tab:green"}
MEGA = 1e6
UNKNOWN_SAVED = "not shown, as this run added up all micro-batches, of which one is kept at a time"


# What a step of our Hydra should be at most over a rival's; set for the paper's model, held against every model.
CPU_GOALS = {"naive_lora": 0.98, "naive_seqlora": 0.98}
GPU_GOALS = {"naive_lora": 0.95, "naive_seqlora": 0.97}


def over_rivals(rows: Sequence[Table4Row]) -> dict[str, dict[str, Quartiles]]:
    """Every method's steps over its rivals', by method, of the paired rounds; only ours have rivals."""
    steps = {row["method"]: row["step_seconds"] for row in rows}
    return {
        method: {name: timing.paired_ratios(taken, steps[name]) for name in steps if is_rival(name, method)}
        for method, taken in steps.items()
    }


def table4_cells(rows: Sequence[Table4Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of Table 4. The paper's seconds appear only beside whole epochs of its model and batch."""
    projected = any(row["projected"] for row in rows)
    headings = ["method", "trainable (M)", "head (M)", f"sec/epoch{', projected' if projected else ''} (quartiles)"]
    headings += [] if projected else ["paper's sec/epoch"]
    paper = any(row["paper_ratio"] is not None for row in rows)
    headings += ["over naive LoRA (quartiles)", *(["paper's"] if paper else []), "over its naive (quartiles)"]
    headings += ["saved (MB)", "peak (MB)"]
    over, cells = over_rivals(rows), []
    for row in rows:
        line = [label(row), f"{row['trainable'] / MEGA:.3f}", f"{row['head'] / MEGA:.3f}"]
        line.append(f"{row['sec_per_epoch']:.1f} ({row['q1']:.1f} to {row['q3']:.1f})")
        line += [] if projected else [or_dash(row["paper_sec_per_epoch"], ".2f")]
        ratio = (row["ratio_q1"], row["ratio"], row["ratio_q3"])
        line.append("-" if row["ratio"] is None else with_quartiles(ratio))
        line += [or_dash(row["paper_ratio"], ".3f")] if paper else []
        over_naive = over[row["method"]].get(naive_of(row["method"]) or "")
        line.append("-" if over_naive is None else with_quartiles(over_naive))
        line += [or_dash(row[key] and row[key] / MEGA, ".1f") for key in ("saved_bytes", "peak_bytes")]
        cells.append(line)
    return headings, cells


def table4_notes(environment: Environment, rows: Sequence[Table4Row]) -> list[str]:
    """What a reader must know beside the figures: the run, what they mean and what was proved, in one; then how our
    Hydra stands, every loss and every missed goal.
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
    by_method = {row["method"]: row for row in rows}
    standing = table4_standing(by_method, goals_of(environment))
    return [note, *(f"{line}." for line in (*standing, *table4_losses(by_method, goals_of(environment))))]


def goals_of(environment: Environment) -> dict[str, float]:
    return GPU_GOALS if is_gpu(environment) else CPU_GOALS


def table4_standing(by_method: Mapping[str, Table4Row], goals: Mapping[str, float]) -> list[str]:
    """Our Hydra over each naive method: a line each with its quartiles, goal and rounds, and the paper's ratio."""
    ours, lines = by_method.get("ours_hydra"), []
    for name in ("naive_lora", "naive_seqlora", "naive_hydra"):
        rival = by_method.get(name)
        if ours is None or rival is None:
            continue
        taken, others = ours["step_seconds"], rival["step_seconds"]
        faster = sum(a < b for a, b in zip(taken, others, strict=True))
        ratio = with_quartiles(timing.paired_ratios(taken, others), goals.get(name))
        line = f"{label(ours)} over {label(rival)} {ratio}, faster in {faster} of {len(taken)} rounds"
        if ours["paper_sec_per_epoch"] is not None and rival["paper_sec_per_epoch"] is not None:
            line += f"; paper {ours['paper_sec_per_epoch'] / rival['paper_sec_per_epoch']:.3f}"
        lines.append(line)
    return lines


def table4_losses(by_method: Mapping[str, Table4Row], goals: Mapping[str, float]) -> list[str]:
    """One line for each of ours that is slower than a rival, and one a goal that our Hydra misses."""
    over = over_rivals(list(by_method.values()))
    if not any(over.values()):
        return []
    labels = {name: label(row) for name, row in by_method.items()}
    found = {labels[ours]: {labels[name]: ratio for name, ratio in rivals.items()} for ours, rivals in over.items()}
    lines = verdicts.losses(found)
    for name, ratio in over.get("ours_hydra", {}).items():
        if name in goals:
            lines += verdicts.missed(f"{labels['ours_hydra']} over {labels[name]}", ratio.median, goals[name])
    return verdicts.verdict(lines)


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


def table4_terminal(rows: Sequence[Table4Row]) -> Table:
    headings, cells = table4_cells(rows)
    title = f"Table 4: {rows[0]['model']}, {rows[0]['dtype']}, {rows[0]['mode']}, {batch_of(rows[0])}"
    return terminal(title, headings, cells, bold=[row["method"].startswith("ours_") for row in rows])


def table4_markdown(environment: Environment, rows: Sequence[Table4Row]) -> str:
    first, *others = table4_notes(environment, rows)
    return "\n\n".join([markdown(*table4_cells(rows)), first, "\n".join(f"- {note}" for note in others)]).rstrip()


def is_papers(row: Table4Row) -> bool:
    """Whether the run is the paper's Table 4: its model, and each step as one batch whose activations are kept."""
    return row["model"] == PAPER_MODEL and row["accumulation"] == 1 and not row["checkpointing"]


def table4_block(stored: Sequence[Stored]) -> str:
    return headed(
        (environment, group, table4_markdown(environment, group))
        for _, environment, rows in stored
        for group in table4_groups(rows)
    )


def table4_groups(rows: Sequence[Table4Row]) -> list[list[Table4Row]]:
    """The rows of each dtype and mode."""
    return groups(rows, by=("dtype", "mode"), same=("method",))


def table4_chart(environment: Environment, rows: Sequence[Table4Row]) -> str:
    """Times and memory of each dtype and mode as bars from zero, as SVG; the ratio to naive LoRA red where ours loses
    to any rival. Equal rows give equal text.
    """
    made = table4_groups(rows)
    figure = Figure(figsize=(12, sum(0.6 * len(group) + 2 for group in made)), layout="constrained")
    pairs = figure.subplots(len(made), 2, squeeze=False, sharey="row", height_ratios=[len(group) for group in made])
    for (times, memory), group in zip(pairs, made, strict=True):
        draw_times(times, group)
        draw_memory(memory, group)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower right", ncols=2)
    figure.suptitle(f"{environment['device']}, {environment['date'][:10]}")
    return svg(figure, "table4")


def draw_times(axes: Axes, rows: Sequence[Table4Row]) -> None:
    places, over = list(range(len(rows))), over_rivals(rows)
    # A whole epoch's sum may lie outside the quartiles of its steps: a whisker then has no length on that side.
    whiskers = [
        [max(0.0, row["sec_per_epoch"] - row["q1"]) for row in rows],
        [max(0.0, row["q3"] - row["sec_per_epoch"]) for row in rows],
    ]
    colours = [COLOURS.get(row["method"].partition("_")[0], "tab:gray") for row in rows]
    axes.barh(places, [row["sec_per_epoch"] for row in rows], xerr=whiskers, color=colours, capsize=3)
    for place, row in zip(places, rows, strict=True):
        if row["ratio"] is not None:
            colour = "red" if any(map(verdicts.loses, over[row["method"]].values())) else "black"
            text = f" {row['ratio']:.3f}" + ("" if row["paper_ratio"] is None else f" (paper {row['paper_ratio']:.3f})")
            axes.text(max(row["sec_per_epoch"], row["q3"]), place, text, va="center", color=colour)
    axes.set_yticks(places, [label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * max(max(row["sec_per_epoch"], row["q3"]) for row in rows))
    axes.set_title(f"{rows[0]['model']}, {rows[0]['dtype']}, {rows[0]['mode']}, {batch_of(rows[0])}", fontsize=10)
    epoch = "sec/epoch, projected" if rows[0]["projected"] else "sec/epoch"
    axes.set_xlabel(f"{epoch}; ratio to naive LoRA, red: ours loses to a rival")


def draw_memory(axes: Axes, rows: Sequence[Table4Row]) -> None:
    for offset, key, colour, name in (
        (-0.2, "peak_bytes", "tab:purple", "peak"),
        (0.2, "saved_bytes", "tab:orange", "saved for backward"),
    ):
        places = [place + offset for place in range(len(rows))]
        axes.bar_label(axes.barh(places, [row[key] / MEGA for row in rows], 0.4, color=colour, label=name), fmt=" %.0f")
    axes.margins(x=0.15)
    axes.set_xlabel("memory (MB)")

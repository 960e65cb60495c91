"""The layer benchmark for the README and the terminal: tables, every loss and missed goal beside them, and a chart."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.measuring.rows import LayerRow
from benchmarks.measuring.shapes import Shape
from benchmarks.measuring.timing import Environment
from benchmarks.rendering import verdicts
from benchmarks.rendering.tables import (
    MODES,
    Stored,
    environment_note,
    groups,
    headed,
    label,
    markdown,
    or_dash,
    terminal,
    what_ran,
)
from benchmarks.rendering.verdicts import is_rival, loses, with_quartiles

BYTES = {"fp32": 4, "bf16": 2}
# Bytes that a GPU's fast loads take at a time: a row that is no multiple of them is read by slower kernels.
ALIGNED = 16
# The layer table's ratios of a step: (heading, method, over what).
LAYER_RATIOS = (
    ("naive Hydra / frozen", "naive_hydra", "frozen"),
    ("naive LoRA / frozen", "naive_lora", "frozen"),
    ("compiled Hydra / frozen", "compiled_hydra", "frozen"),
    ("PEFT LoRA / frozen", "peft_lora", "frozen"),
    ("our Hydra / frozen", "ours_hydra", "frozen"),
    ("ours / naive Hydra", "ours_hydra", "naive_hydra"),
    ("ours / naive LoRA, equal R", "ours_hydra", "naive_lora"),
    ("ours / naive LoRA, equal parameters", "ours_hydra", "naive_lora@parameters"),
    ("ours / naive SeqLoRA, equal parameters", "ours_hydra", "naive_seqlora@parameters"),
)
LARGE, SMALL = "M >= 256", "M <= 64"
# What our Hydra's geometric means should be at most in fp32 on a CPU, by (mode, backend) and (sizes, over what).
COMPILED_GOALS = {(LARGE, "naive_hydra"): 0.95, (SMALL, "naive_hydra"): 0.95}
LAYER_GOALS = {
    ("eager", "aten"): {(LARGE, "naive_hydra"): 0.80, (LARGE, "naive_lora"): 1.00, (SMALL, "naive_hydra"): 0.95},
    ("eager", "native"): {
        (LARGE, "naive_hydra"): 0.76,
        (LARGE, "naive_lora"): 0.93,
        (LARGE, "frozen"): 1.06,
        (SMALL, "naive_hydra"): 0.87,
    },
    ("compile", "aten"): COMPILED_GOALS,
    ("compile", "native"): COMPILED_GOALS,
}
# What our Hydra of R <= 16 should be at most on a GPU (Hopper) in bf16 and CUDA graphs, by shape and what it is over.
VIT_GOALS = {"naive_hydra": 0.65, "naive_lora@parameters": 0.80, "naive_seqlora@parameters": 0.85}
SQUARE_GOALS = {"naive_hydra": 0.78, "naive_lora@parameters": 0.92, "naive_seqlora@parameters": 0.92}
GPU_GOALS = {
    Shape(6400, 3072, 768): {"frozen": 1.15, **VIT_GOALS},
    Shape(25216, 3072, 768): {"frozen": 1.10, **VIT_GOALS},
    Shape(25216, 4096, 1024): {"frozen": 1.10, **VIT_GOALS},
    Shape(8192, 4096, 4096): {"frozen": 1.05, **SQUARE_GOALS},
    Shape(8192, 14336, 4096): {"frozen": 1.04, "naive_hydra": 0.90},
}
# The bars of the chart at each shape: (method, name, colour).
BARS = (
    ("naive_lora", "naive LoRA of equal R", "tab:cyan"),
    ("naive_hydra", "naive Hydra", "tab:blue"),
    ("compiled_hydra", "compiled Hydra", "tab:orange"),
    ("ours_hydra", "our Hydra", "tab:green"),
)


def layer_groups(rows: Sequence[LayerRow]) -> list[list[LayerRow]]:
    """The rows of each device, dtype and mode; a group more where such a run was repeated, with another backend say."""
    same = ("M", "K", "N", "hydra", "r_a", "r_b", "pair", "phase", "method")
    return groups(rows, by=("device", "dtype", "mode"), same=same)


def layer_steps(rows: Sequence[LayerRow]) -> Iterator[tuple[str, list[dict[str, LayerRow]]]]:
    """The measured steps of each Hydra: its ranks, and for each shape the row by method or method@parameters."""
    tables: dict[tuple[int, ...], dict[tuple[int, ...], dict[str, LayerRow]]] = {}
    for row in rows:
        if row["phase"] == "step" and row["unavailable"] is None:
            shapes = tables.setdefault(tuple(row["hydra"]), {})
            name = f"{row['method']}@parameters" if row["pair"] == "parameters" else row["method"]
            shapes.setdefault((row["M"], row["K"], row["N"]), {})[name] = row
    for ranks, shapes in tables.items():
        yield "+".join(map(str, ranks)), list(shapes.values())


def layer_means(steps: Sequence[Mapping[str, LayerRow]], method: str, rival: str) -> dict[str, float]:
    """Geometric means, over large and small M, of the median ratios of a step of one method over another."""
    means = {}
    for sizes, belongs in ((LARGE, lambda M: M >= 256), (SMALL, lambda M: M <= 64)):
        found = [made[method] for made in steps if method in made and belongs(made[method]["M"])]
        ratios = [row["over"][rival][1] for row in found if rival in row["over"]]
        if ratios:
            means[sizes] = statistics.geometric_mean(ratios)
    return means


def layer_goals(steps: Sequence[Mapping[str, LayerRow]]) -> dict[tuple[str, str], float]:
    """The goals of our Hydra's means; none where another device, dtype, mode or backend ran."""
    ours = next((made["ours_hydra"] for made in steps if "ours_hydra" in made), None)
    if ours is None or (ours["device"], ours["dtype"]) != ("cpu", "fp32"):
        return {}
    return LAYER_GOALS.get((ours["mode"], ours["backend"]), {})


def shape_goals(made: Mapping[str, LayerRow]) -> dict[str, float]:
    """The goals of our Hydra at one shape, by what it is over; none where another device, dtype, mode or rank ran."""
    ours = made.get("ours_hydra")
    if ours is None or (ours["device"], ours["dtype"], ours["mode"]) != ("cuda", "bf16", "graph"):
        return {}
    return GPU_GOALS.get((ours["M"], ours["K"], ours["N"]), {}) if sum(ours["hydra"]) <= 16 else {}


def saved_over_x(row: LayerRow) -> tuple[float, float | None]:
    """Bytes kept for the backward over x's, and how many they may be: a goal of the forms without y0."""
    goal = (
        1.01 + (row["r_a"] + row["r_b"]) * (1 / row["K"] + 1 / row["M"])
        if row["form"] in ("composed", "effective")
        else None
    )
    return row["saved_bytes"] / (row["M"] * row["K"] * BYTES[row["dtype"]]), goal


def layer_cells(steps: Sequence[Mapping[str, LayerRow]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of one layer table: a line a shape, then the geometric means, goals beside the figures."""
    headings = ["M x K x N", *(heading for heading, *_ in LAYER_RATIOS), "naive Hydra saved / x", "ours saved / x"]
    floors = [floor_share(made.get("ours_hydra")) for made in steps]
    headings += ["floor / our Hydra"] if any(floors) else []
    goals, cells = layer_goals(steps), []
    for made, floor in zip(steps, floors, strict=True):
        first = next(iter(made.values()))
        line = [f"{first['M']} x {first['K']} x {first['N']}"]
        for _, method, rival in LAYER_RATIOS:
            ratio = made[method]["over"].get(rival) if method in made else None
            goal = shape_goals(made).get(rival) if method == "ours_hydra" and ratio else None
            over = f" over {rival_label(made, rival)}" if rival.endswith("@parameters") and goal else ""
            line.append(beside(ratio and ratio[1], goal, ".2f", over))
        for method in ("naive_hydra", "ours_hydra"):
            line.append(beside(*saved_over_x(made[method]), ".3f") if method in made else "-")
        cells.append(line + ([or_dash(floor, ".0%")] if any(floors) else []))
    for sizes in (LARGE, SMALL):
        line = [f"geometric mean, {sizes}"]
        for _, method, rival in LAYER_RATIOS:
            goal = goals.get((sizes, rival)) if method == "ours_hydra" else None
            line.append(beside(layer_means(steps, method, rival).get(sizes), goal, ".2f"))
        cells.append(line + ["-"] * (len(headings) - len(line)))
    return headings, cells


def floor_share(row: LayerRow | None) -> float | None:
    """The predicted floor over the measured time; None on a CPU and in the kept form, which have no floor."""
    if row is None or row["floor_us"] is None or row["form"] != "composed":
        return None
    return row["floor_us"] / row["median_us"]


def beside(figure: float | None, goal: float | None, form: str, over: str = "") -> str:
    return or_dash(figure, ".3f") + ("" if goal is None else f" (goal {goal:{form}}{over})")


def layer_losses(steps: Sequence[Mapping[str, LayerRow]]) -> list[str]:
    """One line a shape at which a step of ours is slower than a rival's, and one a goal that is missed."""
    lines, missed = [], []
    for made in steps:
        found: dict[str, dict[str, list[float]]] = {}
        for row in made.values():
            shape = f"{row['M']} x {row['K']} x {row['N']}"
            for name, ratio in row["over"].items():
                if is_rival(name, row["method"]):
                    # Of equal rank and of equal parameters may be one and the same: one loss.
                    found.setdefault(label(row), {})[rival_label(made, name)] = ratio
            saved, goal = saved_over_x(row)
            if goal is not None:
                missed += verdicts.missed(f"{label(row)} saves", saved, goal, f" times x at {shape}", ".3f")
        for name, goal in shape_goals(made).items():
            if ratio := made["ours_hydra"]["over"].get(name):
                against = f"{label(made['ours_hydra'])} over {rival_label(made, name)}"
                missed += verdicts.missed(against, ratio[1], goal, f" at {shape}")
        lines += verdicts.losses(found, f" at {shape}")
    for (sizes, rival), goal in layer_goals(steps).items():
        mean = layer_means(steps, "ours_hydra", rival).get(sizes)
        if mean is not None:
            name = rival.replace("_", " ").replace("hydra", "Hydra").replace("lora", "LoRA of equal R")
            missed += verdicts.missed(f"our Hydra over {name}", mean, goal, f" at {sizes}")
    return verdicts.verdict([*lines, *missed], "at every shape ")


def handicapped(steps: Sequence[Mapping[str, LayerRow]]) -> list[str]:
    """One line a shape at which a GPU takes longer for LoRA of equal parameters than for LoRA of equal R, whose rank is
    higher: where ours stands against the second is what a reader should know.
    """
    lines = []
    for made in steps:
        few, many, ours = (made.get(name) for name in ("naive_lora@parameters", "naive_lora", "ours_hydra"))
        if few is None or many is None or ours is None or few["device"] != "cuda" or few["r_a"] >= many["r_a"]:
            continue
        width, ratio = few["r_a"] * BYTES[few["dtype"]], ours["over"].get("naive_lora")
        if width % ALIGNED and few["median_us"] > many["median_us"] and ratio:
            lines.append(
                f"HANDICAPPED RIVAL at {few['M']} x {few['K']} x {few['N']}: {label(few)}, of equal parameters, takes "
                f"{few['median_us']:.0f} us, {label(many)} {many['median_us']:.0f} us: the first's rows of {width} "
                f"bytes (of Z, of A_up) are no multiple of {ALIGNED}; {label(ours)} over {label(many)} "
                f"{with_quartiles(ratio)}{', a LOSS' if loses(ratio) else ''}"
            )
    return lines


def rival_label(made: Mapping[str, LayerRow], name: str) -> str:
    return label(made.get(name) or made[name.removesuffix("@parameters")])


def layer_notes(environment: Environment, rows: Sequence[LayerRow]) -> list[str]:
    """What a reader must know beside the figures: the run, what was not measured, what was proved, every loss."""
    row, runs = rows[0], [row["runs"] for row in rows if row["unavailable"] is None]
    notes = [
        f"{environment_note(environment)} {row['dtype']}, {MODES[row['mode']]}, x requires grad, no dropout, no "
        f"adapter biases; {min(runs, default=0)} to {max(runs, default=0)} rounds of all methods in shuffled order, "
        "medians of paired steps (forward and backward), inputs cold in L2. Saved: kept for the backward."
    ]
    proofs = [row["parity"] for row in rows if row["parity"]]
    if proofs:
        notes[0] += (
            f" Output and every gradient against the naive layer's from equal weights: within "
            f"{max(proof['difference'] for proof in proofs):.1e} (allowed {proofs[0]['allowed']:g})."
        )
    if any(floor_share(row) for row in rows if row["method"] == "ours_hydra"):
        notes[0] += (
            " Floor: the least that a step in the composed form can take by its bytes and operations at this card's "
            "measured ceilings, were nothing left in L2 between kernels; a weight that stays there can lead past 100%."
        )
    reasons = [f"Not measured: {label(row)}: {row['unavailable']}" for row in rows if row["unavailable"]]
    notes += dict.fromkeys(reasons)
    for ranks, steps in layer_steps(rows):
        notes += [f"Hydra {ranks}: {line}." for line in (*layer_losses(steps), *handicapped(steps))]
    return notes


def layer_terminal(rows: Sequence[LayerRow]) -> Iterator[Table]:
    for ranks, steps in layer_steps(rows):
        headings, cells = layer_cells(steps)
        title = f"Layer, {rows[0]['dtype']}, {rows[0]['mode']}, Hydra {ranks} beside LoRA and SeqLoRA: ratios of a step"
        yield terminal(title, headings, cells, bold=[place >= len(steps) for place in range(len(cells))])


def layer_markdown(environment: Environment, rows: Sequence[LayerRow]) -> str:
    tables = [
        f"Hydra {ranks}, ratios of a step:\n\n{markdown(*layer_cells(steps))}" for ranks, steps in layer_steps(rows)
    ]
    first, *others = layer_notes(environment, rows)
    return "\n\n".join([*tables, first, "\n".join(f"- {note}" for note in others)])


def layer_block(stored: Sequence[Stored]) -> str:
    return headed(
        (environment, group, layer_markdown(environment, group))
        for _, environment, rows in stored
        for group in layer_groups(rows)
    )


def layer_chart(environment: Environment, rows: Sequence[LayerRow]) -> str:
    """Steps over the frozen layer's as SVG, a panel for each dtype, mode and Hydra; equal rows give equal text."""
    panels = [(what_ran(group), ranks, steps) for group in layer_groups(rows) for ranks, steps in layer_steps(group)]
    with rc_context({"svg.hashsalt": "layer", "svg.fonttype": "none"}), io.StringIO() as text:
        figure = Figure(figsize=(12, 4 * len(panels)), layout="constrained")
        axes_of = figure.subplots(len(panels), squeeze=False)[:, 0]
        for axes, (ran, ranks, steps) in zip(axes_of, panels, strict=True):
            for number, (method, name, colour) in enumerate(BARS):
                found = {
                    place: made[method]["over"]["frozen"]
                    for place, made in enumerate(steps)
                    if method in made and "frozen" in made[method]["over"]
                }
                if not found:
                    continue
                places = [place + 0.2 * (number - 1.5) for place in found]
                whiskers = [[m - q1 for q1, m, _ in found.values()], [q3 - m for _, m, q3 in found.values()]]
                heights = [ratio for _, ratio, _ in found.values()]
                axes.bar(places, heights, 0.2, yerr=whiskers, color=colour, label=name)
            axes.axhline(1.0, color="black", linewidth=1)
            shapes = [next(iter(made.values())) for made in steps]
            axes.set_xticks(range(len(shapes)), [f"{s['M']} x\n{s['K']} x\n{s['N']}" for s in shapes])
            axes.set_ylabel("step over the frozen layer's")
            axes.set_title(f"Hydra {ranks}, {ran}; {environment['device']}")
            axes.legend()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return text.getvalue()

"""Turns stored results into what people read: the README's tables, the terminal's, and a chart.

``python -m benchmarks.render`` rewrites the README between its markers from ``benchmarks/results``; with ``--check`` it
changes nothing and exits with 1 where the README is stale.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import timing
from benchmarks.methods import naive_of
from benchmarks.timing import Environment, LayerRow, Table4Row

OWNERS = {"ours": "our", "peft": "PEFT"}
KINDS = {"lora": "LoRA", "seqlora": "SeqLoRA", "hydra": "Hydra"}
COLOURS = {"naive": "tab:blue", "ours": "tab:green"}
MEGA = 1e6
BYTES = {"fp32": 4, "bf16": 2}
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
# What our Hydra's geometric means should be at most in fp32 on a CPU, by backend, sizes and what they are over.
LAYER_GOALS = {
    "aten": {(LARGE, "naive_hydra"): 0.80, (LARGE, "naive_lora"): 1.00, (SMALL, "naive_hydra"): 0.95},
    "native": {
        (LARGE, "naive_hydra"): 0.76,
        (LARGE, "naive_lora"): 0.93,
        (LARGE, "frozen"): 1.06,
        (SMALL, "naive_hydra"): 0.87,
    },
}


def label(row: Table4Row | LayerRow) -> str:
    """A method and its ranks as a reader knows them: "our Hydra 3+3", "naive LoRA 4", "full tuning"."""
    owner, _, kind = row["method"].partition("_")
    if kind not in KINDS:
        return row["method"].replace("_", " ")
    ranks = (row["ranks"] or []) if "ranks" in row else [row["r_a"], row["r_b"]]
    return f"{OWNERS.get(owner, owner)} {KINDS[kind]} {'+'.join(str(rank) for rank in ranks if rank)}"


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
    headings += ["over naive LoRA (quartiles)", "paper's", "over its naive", "saved (MB)", "peak (MB)"]
    over_naive = over_their_naive(rows)
    cells = []
    for row in rows:
        line = [label(row), f"{row['trainable'] / MEGA:.3f}", f"{row['head'] / MEGA:.3f}"]
        line.append(f"{row['sec_per_epoch']:.1f} ({row['q1']:.1f} to {row['q3']:.1f})")
        line += [] if projected else [_or_dash(row["paper_sec_per_epoch"], ".2f")]
        quartiles = "" if row["ratio"] is None else f" ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"
        line.append(_or_dash(row["ratio"], ".3f") + quartiles)
        line.append(_or_dash(row["paper_ratio"], ".3f"))
        line.append(_or_dash(over_naive.get(row["method"]), ".3f"))
        line += [f"{row['saved_bytes'] / MEGA:.1f}", f"{row['peak_bytes'] / MEGA:.1f}"]
        cells.append(line)
    return headings, cells


def environment_note(environment: Environment) -> str:
    commit = "no commit" if environment["commit"] is None else f"commit {environment['commit'][:12]}"
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment[name]]
    driver = f", driver {environment['driver']}" if environment["driver"] else f", {environment['threads']} threads"
    return (
        f"{environment['device']} ({environment['capability']}{driver}); {environment['date'][:10]}; {commit}"
        f"{' with local changes' if environment['dirty'] else ''}; {', '.join(versions)}, "
        f"Python {environment['python']}."
    )


def table4_notes(environment: Environment, rows: Sequence[Table4Row]) -> list[str]:
    """What a reader must know beside the figures: the run, what they mean, how ours stands, and what was proved."""
    row = rows[0]
    if row["projected"]:
        epoch = (
            f"sec/epoch is projected to 50,000 images from {row['steps']} steps of {row['batch']} images, so only the "
            "ratios stand beside the paper's"
        )
    else:
        epoch = f"sec/epoch is one whole epoch of 50,000 images in batches of {row['batch']}"
    notes = [
        environment_note(environment),
        f"{row['model']}, {row['weights']} weights, {row['data']} at {row['image_size']}x{row['image_size']}, "
        f"{row['dtype']}, {row['mode']}, batch {row['batch']}, {row['steps']} rounds of all methods in shuffled order; "
        f"{epoch}. Saved: kept for the backward. Peak: parameters, optimizer state and the step's peak above them.",
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


def _against(ours: Table4Row, rival: Table4Row) -> str:
    ratio = timing.paired_ratios(ours["step_seconds"], rival["step_seconds"]).median
    paper = (ours["paper_sec_per_epoch"] or 0) / (rival["paper_sec_per_epoch"] or 1)
    return f"{label(rival)} {ratio:.3f} (paper {paper:.3f})"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table4_terminal(rows: Sequence[Table4Row]) -> Table:
    headings, cells = table4_cells(rows)
    title = f"Table 4: {rows[0]['model']}, {rows[0]['dtype']}, batch {rows[0]['batch']}"
    return terminal(title, headings, cells, bold=[row["method"].startswith("ours_") for row in rows])


def terminal(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]], bold: Sequence[bool]) -> Table:
    table = Table(title=title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for line, stands_out in zip(cells, bold, strict=True):
        table.add_row(*line, style="bold" if stands_out else None)
    return table


def markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table4_markdown(environment: Environment, rows: Sequence[Table4Row]) -> str:
    return f"{markdown(*table4_cells(rows))}\n\n{' '.join(table4_notes(environment, rows))}"


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
        f"{first['model']}, {first['dtype']}, batch {first['batch']}, {first['data']}: "
        f"{environment['device']}, {environment['date'][:10]}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def is_rival(name: str, method: str) -> bool:
    """Whether ours must not be slower than the other: our Hydra than any, our LoRA and SeqLoRA than their own kind."""
    owner, _, kind = method.partition("_")
    return (
        owner == "ours" and not name.startswith(("ours_", "frozen")) and (kind == "hydra" or name.endswith(f"_{kind}"))
    )


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
    """The goals of our Hydra's means; none where another device, dtype or backend ran."""
    ours = next((made["ours_hydra"] for made in steps if "ours_hydra" in made), None)
    if ours is None or (ours["device"], ours["dtype"]) != ("cpu", "fp32"):
        return {}
    return LAYER_GOALS.get(ours["backend"], {})


def saved_over_x(row: LayerRow) -> tuple[float, float | None]:
    """Bytes kept for the backward over x's, and how many they may be: a goal of our composed form alone."""
    goal = 1.01 + (row["r_a"] + row["r_b"]) * (1 / row["K"] + 1 / row["M"]) if row["form"] == "composed" else None
    return row["saved_bytes"] / (row["M"] * row["K"] * BYTES[row["dtype"]]), goal


def layer_cells(steps: Sequence[Mapping[str, LayerRow]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of one layer table: a line a shape, then the geometric means beside their goals."""
    headings = ["M x K x N", *(heading for heading, *_ in LAYER_RATIOS), "naive Hydra saved / x", "ours saved / x"]
    goals, cells = layer_goals(steps), []
    for made in steps:
        first = next(iter(made.values()))
        line = [f"{first['M']} x {first['K']} x {first['N']}"]
        for _, method, rival in LAYER_RATIOS:
            ratio = made[method]["over"].get(rival) if method in made else None
            line.append("-" if ratio is None else f"{ratio[1]:.3f}")
        for method in ("naive_hydra", "ours_hydra"):
            saved, goal = saved_over_x(made[method]) if method in made else (None, None)
            line.append(_or_dash(saved, ".3f") + ("" if goal is None else f" (goal {goal:.3f})"))
        cells.append(line)
    for sizes in (LARGE, SMALL):
        line = [f"geometric mean, {sizes}"]
        for _, method, rival in LAYER_RATIOS:
            goal = goals.get((sizes, rival)) if method == "ours_hydra" else None
            mean = _or_dash(layer_means(steps, method, rival).get(sizes), ".3f")
            line.append(mean + ("" if goal is None else f" (goal {goal:.2f})"))
        cells.append([*line, "-", "-"])
    return headings, cells


def layer_losses(steps: Sequence[Mapping[str, LayerRow]]) -> list[str]:
    """One line a shape at which a step of ours is slower than a rival's, and one a goal that is missed."""
    lines, missed = [], []
    for made in steps:
        slower = {}
        for row in made.values():
            shape = f"{row['M']} x {row['K']} x {row['N']}"
            for name, (q1, ratio, q3) in row["over"].items():
                if is_rival(name, row["method"]) and ratio > 1:
                    rival = made.get(name) or made[name.removesuffix("@parameters")]
                    # Of equal rank and of equal parameters may be one and the same: one loss.
                    slower.setdefault(label(row), {})[label(rival)] = f"{ratio:.3f} ({q1:.3f} to {q3:.3f})"
            saved, goal = saved_over_x(row)
            if goal is not None and saved > goal:
                missed.append(f"GOAL MISSED: {label(row)} saves {saved:.3f} times x at {shape}, goal {goal:.3f}")
        for ours, rivals in slower.items():
            against = ", ".join(f"{rival} {ratio}" for rival, ratio in rivals.items())
            lines.append(f"LOSS at {shape}: {ours} over {against}")
    for (sizes, rival), goal in layer_goals(steps).items():
        mean = layer_means(steps, "ours_hydra", rival).get(sizes)
        if mean is not None and mean > goal:
            name = rival.replace("_", " ").replace("hydra", "Hydra").replace("lora", "LoRA of equal R")
            missed.append(f"GOAL MISSED: our Hydra over {name} {mean:.3f} at {sizes}, goal {goal:.2f}")
    return lines + missed or ["No loss: at every shape ours is no slower than any rival, and no goal is missed"]


def layer_notes(environment: Environment, rows: Sequence[LayerRow]) -> list[str]:
    """What a reader must know beside the figures: the run, what was not measured, what was proved, every loss."""
    row, runs = rows[0], [row["runs"] for row in rows if row["unavailable"] is None]
    notes = [
        f"{environment_note(environment)} {row['dtype']}, {row['mode']}, x requires grad, no dropout, no adapter "
        f"biases; {min(runs, default=0)} to {max(runs, default=0)} rounds of all methods in shuffled order, medians of "
        "paired steps (forward and backward), inputs cold in L2. Saved: kept for the backward."
    ]
    proofs = [row["parity"] for row in rows if row["parity"]]
    if proofs:
        notes[0] += (
            f" Output and every gradient against the naive layer's from equal weights: within "
            f"{max(proof['difference'] for proof in proofs):.1e} (allowed {proofs[0]['allowed']:g})."
        )
    reasons = [f"Not measured: {label(row)}: {row['unavailable']}" for row in rows if row["unavailable"]]
    notes += dict.fromkeys(reasons)
    for ranks, steps in layer_steps(rows):
        notes += [f"Hydra {ranks}: {line}." for line in layer_losses(steps)]
    return notes


def layer_terminal(rows: Sequence[LayerRow]) -> Iterator[Table]:
    for ranks, steps in layer_steps(rows):
        headings, cells = layer_cells(steps)
        title = f"Layer, {rows[0]['dtype']}, Hydra {ranks} beside LoRA and SeqLoRA: ratios of a step"
        yield terminal(title, headings, cells, bold=[place >= len(steps) for place in range(len(cells))])


def layer_markdown(environment: Environment, rows: Sequence[LayerRow]) -> str:
    tables = [
        f"Hydra {ranks}, ratios of a step:\n\n{markdown(*layer_cells(steps))}" for ranks, steps in layer_steps(rows)
    ]
    first, *others = layer_notes(environment, rows)
    return "\n\n".join([*tables, first, "\n".join(f"- {note}" for note in others)])


def stored_block(
    results: Path, name: str, schema: type, to_markdown: Callable[[Environment, Sequence[Any]], str]
) -> str | None:
    """The README's block of one benchmark: every stored result in the order of the file names, None without any."""
    blocks = []
    for path in sorted(results.glob(f"{name}*.json")):
        environment, rows = timing.read_result(path, schema)
        if any(row["dry"] for row in rows):
            raise ValueError(f"{path} is from a dry run: its figures mean nothing and are not published")
        blocks.append(to_markdown(environment, rows))
    return "\n\n".join(blocks) or None


def rendered(text: str, results: Path) -> str:
    """The README's text with every block anew. A block needs both its markers and its results, or neither."""
    for name, schema, to_markdown in (("table4", Table4Row, table4_markdown), ("layer", LayerRow, layer_markdown)):
        block, marked = stored_block(results, name, schema, to_markdown), f"measured:{name} -->" in text
        if block is None and marked:
            raise ValueError(f"README has markers for {name}, but {results} holds no {name}*.json")
        if block is not None:
            text = replace_block(text, name, block)
    return text


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between its one pair of markers for ``name``."""
    opening, closing = f"<!-- measured:{name} -->", f"<!-- /measured:{name} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"README needs one {opening} and, after it, one {closing}")
    before, rest = text.split(opening)
    return f"{before}{opening}\n{block}\n{closing}{rest.split(closing)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where the README is stale")
    parser.add_argument("--readme", type=Path, default=root / "README.md")
    parser.add_argument("--results", type=Path, default=root / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    try:
        current = options.readme.read_text(encoding="utf-8")
        fresh = rendered(current, options.results)
    except (OSError, ValueError) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    if options.check:
        if fresh != current:
            print(f"{options.readme.name} is stale: run python -m benchmarks.render", file=sys.stderr)
        return int(fresh != current)
    options.readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Turns stored results into what people read: the README's tables, the terminal's, and a chart.

``python -m benchmarks.render`` rewrites the README between its markers from ``benchmarks/results``; with ``--check`` it
changes nothing and exits with 1 where the README is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import timing
from benchmarks.methods import naive_of
from benchmarks.timing import Environment, Table4Row

KINDS = {"lora": "LoRA", "seqlora": "SeqLoRA", "hydra": "Hydra"}
COLOURS = {"naive": "tab:blue", "ours": "tab:green"}
MEGA = 1e6


def label(row: Table4Row) -> str:
    """A method and its ranks as a reader knows them: "our Hydra 3+3", "naive LoRA 4", "full tuning"."""
    owner, _, kind = row["method"].partition("_")
    if kind not in KINDS:
        return row["method"].replace("_", " ")
    ranks = "+".join(str(rank) for rank in row["ranks"] or [] if rank)
    return f"{'our' if owner == 'ours' else owner} {KINDS[kind]} {ranks}"


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
    commit = "no commit" if environment["commit"] is None else f"commit {environment['commit'][:12]}"
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment[name]]
    driver = f", driver {environment['driver']}" if environment["driver"] else f", {environment['threads']} threads"
    notes = [
        f"{environment['device']} ({environment['capability']}{driver}); {environment['date'][:10]}; {commit}"
        f"{' with local changes' if environment['dirty'] else ''}; {', '.join(versions)}, "
        f"Python {environment['python']}.",
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
    table = Table(title=f"Table 4: {rows[0]['model']}, {rows[0]['dtype']}, batch {rows[0]['batch']}")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row, line in zip(rows, cells, strict=True):
        table.add_row(*line, style="bold" if row["method"].startswith("ours_") else None)
    return table


def table4_markdown(environment: Environment, rows: Sequence[Table4Row]) -> str:
    headings, cells = table4_cells(rows)
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{' '.join(table4_notes(environment, rows))}"


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


def table4_block(results: Path) -> str:
    """The README's block: every stored Table 4, in the order of the file names."""
    blocks = []
    for path in sorted(results.glob("table4*.json")):
        environment, rows = timing.read_result(path, Table4Row)
        if any(row["dry"] for row in rows):
            raise ValueError(f"{path} is from a dry run: its figures mean nothing and are not published")
        blocks.append(table4_markdown(environment, rows))
    if not blocks:
        raise ValueError(f"results: {results} holds no table4*.json")
    return "\n\n".join(blocks)


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
        rendered = replace_block(current, "table4", table4_block(options.results))
    except (OSError, ValueError) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    if options.check:
        if rendered != current:
            print(f"{options.readme.name} is stale: run python -m benchmarks.render", file=sys.stderr)
        return int(rendered != current)
    options.readme.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The layer benchmark: its tables, what must stand beside them, and its chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.measuring.rows import LayerRow
from benchmarks.rendering.tables import MODES, Stored, Table, groups, headed, label, or_dash, what_ran
from benchmarks.rendering.verdicts import marked
from hydra_kernels.backend.interface import form_of

BYTES = {"fp32": 4, "bf16": 2}
# Bytes that a GPU's fast loads take at a time: a row that is no multiple of them is read by slower kernels.
ALIGNED = 16
# What the tables mean, for the terminal; the pages say it once, above them.
LEGEND = (
    "A step is a forward and a backward, x requires grad, no adapter biases, inputs cold in L2. Ratios: medians of "
    "paired steps. LoRA and SeqLoRA are of Hydra's R. Saved: kept for the backward. Floor: the least that a step in "
    "the composed form can take by its bytes and operations at this card's measured ceilings, were nothing left in L2 "
    "between kernels; a weight that stays there can lead past 100%."
)
# A step of ours over its rivals: (heading, method, over what).
RIVALS = (
    ("our LoRA / PEFT LoRA", "ours_lora", "peft_lora"),
    ("our LoRA / PEFT LoRA under autocast", "ours_lora", "autocast_lora"),
    ("our LoRA / naive LoRA", "ours_lora", "naive_lora"),
    ("our SeqLoRA / naive SeqLoRA", "ours_seqlora", "naive_seqlora"),
    ("our Hydra / naive Hydra", "ours_hydra", "naive_hydra"),
    ("our Hydra / PEFT LoRA", "ours_hydra", "peft_lora"),
    ("our Hydra / naive LoRA", "ours_hydra", "naive_lora"),
    ("our Hydra / naive SeqLoRA", "ours_hydra", "naive_seqlora"),
)
COMPILED_RIVALS = (
    ("our LoRA / compiled LoRA", "ours_lora", "compiled_lora"),
    ("our SeqLoRA / compiled SeqLoRA", "ours_seqlora", "compiled_seqlora"),
    ("our Hydra / compiled Hydra", "ours_hydra", "compiled_hydra"),
    ("our Hydra / compiled LoRA", "ours_hydra", "compiled_lora"),
    ("our Hydra / compiled SeqLoRA", "ours_hydra", "compiled_seqlora"),
)
EQUAL_PARAMETERS = {"LoRA": "naive_lora@parameters", "SeqLoRA": "naive_seqlora@parameters"}
OVER_FROZEN = (
    ("naive LoRA", "naive_lora", "frozen"),
    ("PEFT LoRA", "peft_lora", "frozen"),
    ("PEFT LoRA under autocast", "autocast_lora", "frozen"),
    ("our LoRA", "ours_lora", "frozen"),
    ("naive Hydra", "naive_hydra", "frozen"),
    ("compiled Hydra", "compiled_hydra", "frozen"),
    ("our Hydra", "ours_hydra", "frozen"),
)
LARGE, SMALL = "M >= 256", "M <= 64"


def layer_groups(rows: Sequence[LayerRow]) -> list[list[LayerRow]]:
    """The rows of each device, dtype, mode and dropout; a group more where such a run was repeated, say with another
    backend.
    """
    same = ("M", "K", "N", "hydra", "r_a", "r_b", "pair", "phase", "method")
    return groups(rows, by=("device", "dtype", "mode", "dropout"), same=same)


def first_run(files: Iterable[Stored], device: str, dtype: str, mode: str) -> list[tuple[Stored, list[LayerRow]]]:
    """The first run without dropout in that dtype and mode, and its file; empty where there is none."""
    found = ((file, rows) for file in files for rows in layer_groups(file.rows) if not rows[0]["dropout"])
    wanted = (device, dtype, mode)
    return [run for run in found if tuple(run[1][0][key] for key in ("device", "dtype", "mode")) == wanted][:1]


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


def in_size(made: Mapping[str, LayerRow], sizes: str) -> bool:
    M = next(iter(made.values()))["M"]
    return M >= 256 if sizes == LARGE else M <= 64


def layer_means(steps: Sequence[Mapping[str, LayerRow]], method: str, rival: str) -> dict[str, float]:
    """Geometric means, over large and small M, of the median ratios of a step of one method over another."""
    means = {}
    for sizes in (LARGE, SMALL):
        rows = [made[method] for made in steps if method in made and in_size(made, sizes)]
        ratios = [row["over"][rival][1] for row in rows if rival in row["over"]]
        if ratios:
            means[sizes] = statistics.geometric_mean(ratios)
    return means


def saved_over_x(row: LayerRow) -> float:
    """Bytes kept for the backward over x's."""
    return row["saved_bytes"] / (row["M"] * row["K"] * BYTES[row["dtype"]])


def floor_share(row: LayerRow | None) -> float | None:
    """The predicted floor over the measured time; None on a CPU and in the kept form, which have no floor."""
    if row is None or row["floor_us"] is None or form_of(row["form"]) != "composed":
        return None
    return row["floor_us"] / row["median_us"]


def shape_of(made: Mapping[str, LayerRow]) -> str:
    row = next(iter(made.values()))
    return f"{row['M']} x {row['K']} x {row['N']}"


def ratio_table(title: str, steps: Sequence[Mapping[str, LayerRow]], columns: Sequence[tuple[str, str, str]]) -> Table:
    """A line a shape, then the geometric means; a column for each ratio that was measured at any shape."""
    columns = [(h, method, rival) for h, method, rival in columns if layer_means(steps, method, rival)]
    sizes = [size for size in (LARGE, SMALL) if any(in_size(made, size) for made in steps)]
    cells = [[shape_of(made)] for made in steps] + [[f"geometric mean, {size}"] for size in sizes]
    for _, method, rival in columns:
        ratios = [made[method]["over"].get(rival) if method in made else None for made in steps]
        means = layer_means(steps, method, rival)
        figures = [*(ratio and ratio[1] for ratio in ratios), *(means.get(size) for size in sizes)]
        for line, figure in zip(cells, figures, strict=True):
            # No layer with adapters can be as fast as the frozen one: no mark there.
            line.append(or_dash(figure, ".2f") if rival == "frozen" else marked(figure))
    bold = [place >= len(steps) for place in range(len(cells))]
    return Table(title, ["M x K x N", *(heading for heading, *_ in columns)], cells, bold)


def frozen_table(title: str, steps: Sequence[Mapping[str, LayerRow]]) -> Table:
    """Every method's step over the frozen layer's, what Hydra saves, and on a GPU how near the floor is."""
    table = ratio_table(title, steps, OVER_FROZEN)
    saved = {
        f"{name} saved / x": [or_dash(saved_over_x(made[method]) if method in made else None, ".2f") for made in steps]
        for name, method in (("naive Hydra", "naive_hydra"), ("our Hydra", "ours_hydra"))
    }
    floors = [or_dash(floor_share(made.get("ours_hydra")), ".0%") for made in steps]
    more = {name: column for name, column in (saved | {"floor / our Hydra": floors}).items() if {*column} != {"-"}}
    blank = ["-"] * (len(table.cells) - len(steps))
    cells = table.cells
    for column in more.values():
        cells = [[*line, figure] for line, figure in zip(cells, [*column, *blank], strict=True)]
    return table._replace(headings=[*table.headings, *more], cells=cells)


def layer_tables(rows: Sequence[LayerRow], further: bool = False) -> Iterator[Table]:
    """Of each Hydra: ours over its rivals, over those under torch.compile, and every method over the frozen layer. A
    ``further`` run of what another has shown: the rivals under torch.compile alone, where it has some.
    """
    for ranks, steps in layer_steps(rows):
        what = f"A step of ours over a rival's{{}}, Hydra {ranks}"
        compiled = ratio_table(what.format(" under `torch.compile`"), steps, COMPILED_RIVALS)
        frozen = frozen_table("A step over the frozen layer's", steps)
        if any("saved" in heading for heading in frozen.headings):
            frozen = frozen._replace(title=f"{frozen.title}, and the saved bytes of Hydra {ranks} over those of x")
        tables = [ratio_table(what.format(""), steps, RIVALS), compiled, frozen]
        shown = [compiled] if further and len(compiled.headings) > 1 else tables
        yield from (table for table in shown if len(table.headings) > 1)


def equal_parameters(steps: Sequence[Mapping[str, LayerRow]]) -> list[str]:
    """Our Hydra's means over LoRA and SeqLoRA of as many parameters, and where LoRA is no fair rival."""
    means = {name: layer_means(steps, "ours_hydra", rival) for name, rival in EQUAL_PARAMETERS.items()}
    told = [
        f"naive {name} {', '.join(f'{marked(ratio)} ({sizes})' for sizes, ratio in found.items())}"
        for name, found in means.items()
        if found
    ]
    return [f"Our Hydra over rivals of equal parameters: {'; '.join(told)}."] * bool(told) + handicapped(steps)


def handicapped(steps: Sequence[Mapping[str, LayerRow]]) -> list[str]:
    """Where a GPU takes longer for LoRA of equal parameters than for LoRA of equal R, whose rank is higher: what ours
    gains over the first says little there.
    """
    places = []
    for made in steps:
        few, many = made.get("naive_lora@parameters"), made.get("naive_lora")
        if few is None or many is None or few["device"] != "cuda" or few["r_a"] >= many["r_a"]:
            continue
        if few["r_a"] * BYTES[few["dtype"]] % ALIGNED and few["median_us"] > many["median_us"]:
            places.append(f"{label(few)} at {shape_of(made)}")
    if not places:
        return []
    return [
        f"Of these {', '.join(places)} {'is' if len(places) == 1 else 'are'} slower than LoRA of Hydra's R: rows of "
        f"such ranks are no multiple of {ALIGNED} bytes. The table is the fairer comparison."
    ]


def layer_notes(rows: Sequence[LayerRow]) -> list[str]:
    """What a reader must know beside the figures: the run, what was proved, what was not measured."""
    return [*run_notes(rows), *(note for _, steps in layer_steps(rows) for note in equal_parameters(steps))]


def run_notes(rows: Sequence[LayerRow]) -> list[str]:
    row, runs = rows[0], [row["runs"] for row in rows if row["unavailable"] is None]
    fewest, most = min(runs, default=0), max(runs, default=0)
    rounds = f"{most}" if fewest == most else f"{fewest} to {most}"
    dropped = f", lora_dropout {row['dropout']:g} in PEFT's LoRA and ours alone" if row["dropout"] else ""
    notes = [f"{rounds} rounds{dropped}.", *([MODES[row["mode"]]] if row["mode"] in MODES else [])]
    without = dict.fromkeys(shape_of({"": row}) for row in rows if not row["bias"])
    notes += [f"Without b0: {', '.join(without)}."] if without else []
    proofs = [row["parity"] for row in rows if row["parity"]]
    if proofs:
        notes.append(
            f"Output and gradients within "
            f"{max(proof['difference'] for proof in proofs):.1e} of naive's (allowed {proofs[0]['allowed']:g})."
        )
    reasons = (f"Not measured: {label(row)}: {row['unavailable']}." for row in rows if row["unavailable"])
    return [*notes, *dict.fromkeys(reasons)]


def layer_markdown(file: Stored, rows: Sequence[LayerRow], further: bool = False) -> str:
    return with_caption(layer_tables(rows, further), file, run_notes(rows) if further else layer_notes(rows))


def with_caption(tables: Iterable[Table], file: Stored, notes: Sequence[str]) -> str:
    texts = [f"{table.title}:\n\n{table.markdown()}" for table in tables]
    return "\n\n".join([*texts, " ".join([file.origin(), *notes])])


def backend_of(rows: Sequence[LayerRow]) -> str | None:
    """The backend of a run that measured our Hydra alone, with one backend."""
    ours = {row["method"] for row in rows if row["backend"]}
    backends = {row["backend"] for row in rows if row["backend"]}
    return backends.pop() if ours == {"ours_hydra"} and len(backends) == 1 else None


def backend_tables(runs: Sequence[Sequence[LayerRow]]) -> Iterator[Table]:
    """Runs of one backend each, side by side: our Hydra over naive Hydra and naive LoRA."""
    by_ranks: dict[str, list[tuple[str | None, list[dict[str, LayerRow]]]]] = {}
    for rows in runs:
        for ranks, steps in layer_steps(rows):
            by_ranks.setdefault(ranks, []).append((backend_of(rows), steps))
    for ranks, found in by_ranks.items():
        tables = [
            ratio_table("", steps, [(f"{backend} / {name}", "ours_hydra", rival)])
            for name, rival in (("naive Hydra", "naive_hydra"), ("naive LoRA", "naive_lora"))
            for backend, steps in found
        ]
        lines = list(dict.fromkeys(line[0] for table in tables for line in table.cells))
        lines.sort(key=lambda line: line.startswith("geometric"))
        figures = [{line[0]: line[1:] for line in table.cells} for table in tables]
        cells = [[line, *(cell for of in figures for cell in of.get(line, ["-"]))] for line in lines]
        headings = ["M x K x N", *(heading for table in tables for heading in table.headings[1:])]
        yield Table(f"Which backend is the fastest? Our Hydra {ranks} by each", headings, cells)


def layer_block(stored: Sequence[Stored]) -> str:
    """A run's tables; runs of one file that differ in the backend of our Hydra alone have one together."""
    made = []
    for file in stored:
        alike: dict[tuple[str, str, float], list[list[LayerRow]]] = {}
        for rows in layer_groups(file.rows):
            alike.setdefault((rows[0]["dtype"], rows[0]["mode"], rows[0]["dropout"]), []).append(rows)
        for runs in alike.values():
            single = [rows for rows in runs if backend_of(rows)]
            single = single if len(single) > 1 else []
            mixed = [rows for rows in runs if not any(rows is other for other in single)]
            for place, rows in enumerate(mixed):
                made.append((what_ran(rows), file, layer_markdown(file, rows, further=place > 0)))
            if single:
                rows = [row for run in single for row in run]
                made.append((what_ran(rows), file, with_caption(backend_tables(single), file, run_notes(rows))))
    return headed(made)

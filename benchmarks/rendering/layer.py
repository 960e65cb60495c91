"""The layer benchmark: its tables, what must stand beside them, and its chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.measuring.rows import LayerRow
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.tables import (
    MODES,
    Stored,
    Table,
    environment_note,
    groups,
    headed,
    label,
    or_dash,
)
from benchmarks.rendering.verdicts import marked
from hydra_kernels.backend.interface import form_of

BYTES = {"fp32": 4, "bf16": 2}
# Bytes that a GPU's fast loads take at a time: a row that is no multiple of them is read by slower kernels.
ALIGNED = 16
# A step of ours over its rivals: (heading, method, over what). LoRA and SeqLoRA are of Hydra's R where not said else.
RIVALS = (
    ("our LoRA / PEFT LoRA", "ours_lora", "peft_lora"),
    ("our LoRA / PEFT LoRA under autocast", "ours_lora", "autocast_lora"),
    ("our LoRA / naive LoRA", "ours_lora", "naive_lora"),
    ("our SeqLoRA / naive SeqLoRA", "ours_seqlora", "naive_seqlora"),
    ("our Hydra / naive Hydra", "ours_hydra", "naive_hydra"),
    ("our Hydra / PEFT LoRA", "ours_hydra", "peft_lora"),
    ("our Hydra / naive LoRA", "ours_hydra", "naive_lora"),
    ("our Hydra / naive LoRA, equal parameters", "ours_hydra", "naive_lora@parameters"),
    ("our Hydra / naive SeqLoRA", "ours_hydra", "naive_seqlora"),
    ("our Hydra / naive SeqLoRA, equal parameters", "ours_hydra", "naive_seqlora@parameters"),
)
COMPILED_RIVALS = (
    ("our LoRA / compiled LoRA", "ours_lora", "compiled_lora"),
    ("our SeqLoRA / compiled SeqLoRA", "ours_seqlora", "compiled_seqlora"),
    ("our Hydra / compiled Hydra", "ours_hydra", "compiled_hydra"),
    ("our Hydra / compiled LoRA", "ours_hydra", "compiled_lora"),
    ("our Hydra / compiled SeqLoRA", "ours_hydra", "compiled_seqlora"),
)
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
            line.append(or_dash(figure, ".3f") if rival == "frozen" else marked(figure))
    bold = [place >= len(steps) for place in range(len(cells))]
    return Table(title, ["M x K x N", *(heading for heading, *_ in columns)], cells, bold)


def frozen_table(title: str, steps: Sequence[Mapping[str, LayerRow]]) -> Table:
    """Every method's step over the frozen layer's, what is saved, and on a GPU how near the floor is."""
    table = ratio_table(title, steps, OVER_FROZEN)
    floors = [floor_share(made.get("ours_hydra")) for made in steps]
    more = {
        f"{name} saved / x": [or_dash(saved_over_x(made[method]) if method in made else None, ".3f") for made in steps]
        for name, method in (("naive Hydra", "naive_hydra"), ("our Hydra", "ours_hydra"))
    }
    more |= {"floor / our Hydra": [or_dash(floor, ".0%") for floor in floors]} if any(floors) else {}
    blank = ["-"] * (len(table.cells) - len(steps))
    beside = zip(*([*column, *blank] for column in more.values()), strict=True)
    cells = [[*line, *figures] for line, figures in zip(table.cells, beside, strict=True)]
    return table._replace(headings=[*table.headings, *more], cells=cells)


def layer_tables(rows: Sequence[LayerRow]) -> Iterator[Table]:
    """Of each Hydra: ours over its rivals, over those under torch.compile, and every method over the frozen layer."""
    for ranks, steps in layer_steps(rows):
        what = f"{rows[0]['dtype']}, {rows[0]['mode']}, Hydra {ranks}"
        found = [
            ratio_table(f"{what}: a step of ours over a rival's", steps, RIVALS),
            ratio_table(f"{what}: a step of ours over that of a rival under torch.compile", steps, COMPILED_RIVALS),
        ]
        yield from (table for table in found if len(table.headings) > 1)
        yield frozen_table(f"{what}: a step over the frozen layer's, and bytes saved for the backward over x's", steps)


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
            times = f"{few['median_us']:.0f} us, {label(many)} only {many['median_us']:.0f} us"
            places.append(f"at {shape_of(made)} {label(few)} takes {times}")
    if not places:
        return []
    return [
        f"Naive LoRA of equal parameters is a slow rival where its rows are no multiple of {ALIGNED} bytes: "
        f"{'; '.join(places)}. Read the column of naive LoRA of equal R there."
    ]


def layer_notes(environment: Environment, rows: Sequence[LayerRow]) -> list[str]:
    """What a reader must know beside the figures: the run, what was proved, what was not measured."""
    row, runs = rows[0], [row["runs"] for row in rows if row["unavailable"] is None]
    dropped = f"lora_dropout {row['dropout']:g} in PEFT's LoRA and ours alone" if row["dropout"] else "no dropout"
    notes = [
        f"{environment_note(environment)} {row['dtype']}, {MODES[row['mode']]}, x requires grad, {dropped}, no "
        f"adapter biases; {min(runs, default=0)} to {max(runs, default=0)} rounds of all methods in shuffled order, "
        "medians of paired steps (forward and backward), inputs cold in L2. Saved: kept for the backward."
    ]
    without = dict.fromkeys(shape_of({"": row}) for row in rows if not row["bias"])
    notes[0] += f" Without b0: {', '.join(without)}." if without else ""
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
    return [*notes, *(line for _, steps in layer_steps(rows) for line in handicapped(steps))]


def layer_markdown(environment: Environment, rows: Sequence[LayerRow], kernels: str = "") -> str:
    first, *others = layer_notes(environment, rows)
    tables = [f"{table.title}:\n\n{table.markdown()}" for table in layer_tables(rows)]
    return "\n\n".join([*tables, kernels + first, "\n".join(f"- {note}" for note in others)]).rstrip()


def layer_block(stored: Sequence[Stored]) -> str:
    return headed(
        (file.environment, group, layer_markdown(file.environment, group, file.kernels.caption))
        for file in stored
        for group in layer_groups(file.rows)
    )

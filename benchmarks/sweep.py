"""Where the composed form starts to beat the kept one, over M. ``python -m benchmarks.sweep``

Times a step of our Hydra in both forms, paired and in shuffled order, and judges the rule of
`hydra_kernels.choose.choice` by it: what its form costs over the better one. Both forms are first compared with the
naive layer (`benchmarks.layer`).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import layer
from benchmarks.layer import Bench, Settings
from benchmarks.measuring import methods, modes, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import SweepRow
from benchmarks.measuring.shapes import Entry, Shape, deadlines, ranks_option, shape_option
from benchmarks.rendering.tables import Table, environment_note, show
from hydra_kernels.choose.choice import choose
from hydra_kernels.choose.machine import here

# M over K. Composing reads W0 [N, K] twice more and spares passes over [M, N], so that N plays no part.
FRACTIONS = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
# By (K, N); at 128 x 128 host time decides, up to many times K.
WEIGHTS = {
    (128, 128): (1, 2, 4, 8, 16),
    **dict.fromkeys(((1024, 1024), (3072, 768), (768, 3072), (4096, 4096)), FRACTIONS),
}
DRY_WEIGHTS = dict.fromkeys(((24, 16), (16, 24)), FRACTIONS)
FORMS = ("composed", "kept")
Weight = tuple[int, int]


def measure(shape: Shape, ranks: Ranks, settings: Settings, deadline: float) -> SweepRow:
    bench = Bench(shape, settings)
    entry = Entry("ours_hydra", ranks, "both")
    # "ours" fails loudly where it cannot run, so this is a contestant.
    forms = {form: bench.prepare(entry, form) for form in FORMS}
    layer.play(bench, forms, deadline)
    seconds = {form: contestant.seconds("step") for form, contestant in forms.items()}
    composed, kept = (timing.quartiles(seconds[form]).median * 1e6 for form in FORMS)
    choice = choose(*shape, *ranks, modes.DTYPES[settings.dtype], here(settings.device), backend=settings.backend)
    return SweepRow(
        **shape._asdict(),
        **ranks._asdict(),
        device=settings.device.type,
        dtype=settings.dtype,
        mode=settings.mode,
        backend=choice.backend,
        composed_us=round(composed, 3),
        kept_us=round(kept, 3),
        over=[round(ratio, 4) for ratio in timing.paired_ratios(seconds["composed"], seconds["kept"])],
        runs=len(seconds["kept"]),
        chosen=choice.form,
        dry=settings.dry,
    )


def by_weight(rows: Sequence[SweepRow]) -> dict[Weight, list[SweepRow]]:
    """The rows of each (K, N), in rising M."""
    groups: dict[Weight, list[SweepRow]] = {}
    for row in sorted(rows, key=lambda row: row["M"]):
        groups.setdefault((row["K"], row["N"]), []).append(row)
    return groups


def fraction(row: SweepRow) -> float:
    return row["M"] / row["K"]


def crossing(rows: Sequence[SweepRow]) -> float | None:
    """M / K from which composed is the faster at every larger M measured; None where it never is.

    Between the last M at which it was not and the next one, the logarithms of ratio and M are joined by a line; where
    composed wins everywhere, the smallest fraction measured.
    """
    slower = [place for place, row in enumerate(rows) if row["over"][1] >= 1]
    if not slower:
        return fraction(rows[0])
    if slower[-1] == len(rows) - 1:
        return None
    before, after = rows[slower[-1]], rows[slower[-1] + 1]
    high, low = math.log(before["over"][1]), math.log(after["over"][1])
    return fraction(before) * (fraction(after) / fraction(before)) ** (high / (high - low))


def loss(row: SweepRow, form: str) -> float:
    """The time of a form over that of the better one, from the paired rounds: 1 where it is the better."""
    ratio = row["over"][1]
    return max(1.0, ratio if form == "composed" else 1 / ratio)


def mean_loss(rows: Sequence[SweepRow], threshold: float) -> float:
    """The geometric mean loss of the rule: composed from M >= threshold * K on."""
    losses = [loss(row, "composed" if fraction(row) >= threshold else "kept") for row in rows]
    return math.exp(sum(map(math.log, losses)) / len(losses))


def best_threshold(rows: Sequence[SweepRow]) -> float:
    """The fraction among those measured that loses least over all rows; infinity: always kept."""
    return min([*sorted({fraction(row) for row in rows}), math.inf], key=lambda threshold: mean_loss(rows, threshold))


def verdicts(rows: Sequence[SweepRow]) -> list[str]:
    """What the measurement says of the package's rule: for each (K, N), and of all."""
    lines = []
    for (K, N), group in by_weight(rows).items():
        start = crossing(group)
        found = f"from M = {start:.3f} K on" if start is not None else "nowhere to the end of what was measured"
        worst = max(group, key=lambda row: loss(row, row["chosen"]))
        cost = loss(worst, worst["chosen"])
        at = f"at most {cost:.3f}, at M = {worst['M']}" if cost > 1 else "1 everywhere"
        lines.append(f"K x N = {K} x {N}: composed wins {found}; the rule's form over the better one: {at}.")
    chosen = math.exp(sum(math.log(loss(row, row["chosen"])) for row in rows) / len(rows))
    best = best_threshold(rows)
    named = "never composed" if math.isinf(best) else f"{best:.4g}"
    lines.append(
        f"All: the rule loses {chosen - 1:.2%} in the geometric mean, the best threshold alone among those measured, "
        f"{named}, {mean_loss(rows, best) - 1:.2%}."
    )
    return lines


def table(rows: Sequence[SweepRow]) -> Table:
    headings = [
        "K x N",
        "M",
        "M / K",
        "composed (us)",
        "kept (us)",
        "composed / kept (quartiles)",
        "rule",
        "loss",
    ]
    cells = []
    for (K, N), group in by_weight(rows).items():
        for row in group:
            q1, ratio, q3 = row["over"]
            line = [f"{K} x {N}", str(row["M"]), f"{fraction(row):.4g}"]
            line += [f"{row['composed_us']:.0f}", f"{row['kept_us']:.0f}", f"{ratio:.3f} ({q1:.3f} to {q3:.3f})"]
            cells.append([*line, row["chosen"], f"{loss(row, row['chosen']):.3f}"])
    title = f"Composed against kept, Hydra {rows[0]['r_a']}+{rows[0]['r_b']}, {rows[0]['dtype']}: a step"
    return Table(title, headings, cells, [float(line[-1]) > 1 for line in cells])


def run(settings: Settings, console: Console) -> list[SweepRow]:
    """Every shape with the first pair of ranks, in the order of the settings."""
    end, rows = time.perf_counter() + settings.time_limit, {}
    for shape, share in deadlines(settings.shapes, end):
        rows[shape] = measure(shape, settings.ranks[0], settings, share())
        console.print(f"{shape}: {rows[shape]['runs']} rounds", highlight=False)
    return [rows[shape] for shape in settings.shapes]


def settings_of(arguments: Sequence[str] | None) -> tuple[Settings, Path]:
    """The command line as settings and the folder for the results; ValueError names a bad option."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32"], default="fp32", help="in bf16 the composed form is refused")
    parser.add_argument("--weight", action="append", metavar="K,N", help="may be repeated")
    parser.add_argument("--ranks", default="8+8", metavar="A+B")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, help="at most so many a shape: 50, in a dry run 3")
    parser.add_argument("--time-limit", type=float, default=200.0, help="seconds for all shapes; each gets 3 rounds")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="tiny shapes, to see that everything runs")
    options = parser.parse_args(arguments)
    ranks = ranks_option(options.ranks)
    if ranks.r_b == 0:
        raise ValueError(f"ranks is {options.ranks!r}: without a sequential branch there is only one form")
    weights = [shape_option(f"1,{text}")[1:] for text in options.weight or []]
    parts = dict.fromkeys(weights, FRACTIONS) or (DRY_WEIGHTS if options.dry else WEIGHTS)
    sizes = [Shape(max(1, round(part * K)), K, N) for (K, N), fractions in parts.items() for part in fractions]
    forwarded = ["--device", options.device, "--dtype", options.dtype, "--backend", options.backend]
    forwarded += ["--ranks", options.ranks, "--time-limit", str(options.time_limit), "--seed", str(options.seed)]
    forwarded += ["--rounds", str(options.rounds if options.rounds is not None else 3 if options.dry else 50)]
    forwarded += [*(["--dry"] if options.dry else []), "--methods", "ours_hydra", "--out", str(options.out)]
    for shape in dict.fromkeys(sizes):
        forwarded += ["--shape", ",".join(map(str, shape))]
    # The options that both have are checked in one place.
    return layer.settings_of(forwarded)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        settings, out = settings_of(arguments)
        environment = timing.environment(settings.device)
        rows = run(settings, Console(stderr=True))
    except (OSError, ValueError, methods.ParityError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 1
    path = out / f"sweep-{'dry-' if settings.dry else ''}{settings.device.type}-{settings.dtype}.json"
    timing.write_result(path, environment, rows, SweepRow)
    show(140, [table(rows), environment_note(environment), *verdicts(rows), f"Stored: {path}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the fine-tuning runs say, for the documentation: equal learning, and the paper's claim."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.learning.significance import further_p, holm, sign_flip_p
from benchmarks.measuring.rows import LearnRow
from benchmarks.rendering.tables import KINDS, Stored, Table, digits

OWNERS = ("naive", "again", "ours")
PLACES = {"mlp": "MLP", "attention": "attention", "both": "both"}
BACKBONES = {"definitions": "a pretrained MiniLM"}  # by their data; others are trained on the spot
SIGNIFICANT = 0.05
RESOLUTION = 1e-9  # of a stored loss: a smaller distance of two curves is not told from none


def of(rows: Sequence[LearnRow], **wanted: object) -> list[LearnRow]:
    """The rows with those values, by seed."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]  # type: ignore[literal-required]
    return sorted(found, key=lambda row: row["seed"])


def mean_and_spread(values: Sequence[float], places: int = 1) -> str:
    """Shares in percent; with two places their differences, in points."""
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    mean = round(100 * statistics.mean(values), places) + 0.0  # a rounded -0.0 loses its sign
    return f"{mean:.{places}f} ± {100 * spread:.{places}f}"


def curve_distance(first: LearnRow, second: LearnRow) -> float:
    """Root mean square difference of two loss curves."""
    return math.sqrt(statistics.mean((a - b) ** 2 for a, b in zip(first["losses"], second["losses"], strict=True)))


def ratios(far: Sequence[float], near: Sequence[float]) -> list[float]:
    """far over near, of distances of loss curves, pair by pair; what is below RESOLUTION, 0 too, counts as that."""
    return [max(a, RESOLUTION) / max(b, RESOLUTION) for a, b in zip(far, near, strict=True)]


class Equality(NamedTuple):
    """One form of ours beside naive over the seeds: distances of loss curves, gaps of test accuracy (shares)."""

    name: str
    route: str
    naive: list[float]
    to_ours: list[float]
    to_itself: list[float]
    to_others: list[float]
    gaps: list[float]
    own_gaps: list[float]
    other_gaps: list[float]

    @property
    def ratios(self) -> list[float]:
        return ratios(self.to_ours, self.to_itself)

    @property
    def p(self) -> float:
        return further_p([math.log(ratio) for ratio in self.ratios])


def equalities(rows: Sequence[LearnRow]) -> list[Equality]:
    """Every form of every kind, fp32: from naive by seed, beside naive from itself, and from the next seed's naive."""
    found = []
    for kind, name in KINDS.items():
        exact = {"experiment": "equal", "dtype": "fp32"}
        naive, again, every = (of(rows, **exact, method=f"{owner}_{kind}") for owner in OWNERS)
        for backend, form in dict.fromkeys((row["backend"], row["form"]) for row in every):
            ours = of(every, backend=backend, form=form)
            pairs = [list(zip(naive, other, strict=True)) for other in (ours, again)]
            pairs.append(list(itertools.pairwise(naive)))
            distances = [[curve_distance(a, b) for a, b in pair] for pair in pairs]
            gaps = [[abs(a["test"] - b["test"]) for a, b in pair] for pair in pairs]
            tests = [row["test"] for row in naive]
            found.append(Equality(name, f"{backend}, {form}", tests, *distances, *gaps))
    return found


def equal_table(rows: Sequence[LearnRow]) -> str:
    """Ours beside naive, beside naive with another order of sums, and beside naive of other seeds; fp32."""
    headings = ["method", "ours", "loss curves: ours from naive", "naive from itself", "two seeds"]
    headings += ["ratio of the first two, median", "largest", "p", "accuracy of naive (%)"]
    headings += ["largest gap, ours - naive (points)", "naive - itself", "two seeds, median"]
    cells = [
        [
            e.name,
            e.route,
            *(f"{statistics.median(distances):.1e}" for distances in (e.to_ours, e.to_itself, e.to_others)),
            f"{statistics.median(e.ratios):.2f}",
            f"{max(e.ratios):.2f}",
            digits(e.p),
            mean_and_spread(e.naive),
            *(f"{100 * gap:.2f}" for gap in (max(e.gaps), max(e.own_gaps), statistics.median(e.other_gaps))),
        ]
        for e in equalities(rows)
    ]
    return Table("", headings, cells).markdown()


def equal_sentence(rows: Sequence[LearnRow]) -> str:
    """Which forms are further from naive than rounding in another order puts it, and how far that is at most."""
    every = equalities(rows)
    further = [
        f"{e.name} {e.route.split(', ')[1]} ({statistics.median(e.ratios):.2f} times in the median, p = {digits(e.p)})"
        for e in every
        if e.p < SIGNIFICANT
    ]
    farthest, nearest = max(max(e.to_ours) for e in every), min(min(e.to_others) for e in every)
    told = f"further from naive than naive from itself: {', '.join(further)}" if further else "no form further"
    return (
        f"At p < {SIGNIFICANT:g} the test finds {told}. The largest distance of any run of ours from its naive one is "
        f"{farthest:.1e}; the smallest of two seeds, {nearest:.1e}, is {digits(nearest / max(farthest, RESOLUTION))} "
        "times larger: the first is rounding."
    )


def bf16_table(rows: Sequence[LearnRow]) -> str:
    """Hydra over a bf16 backbone: naive, ours, and a sum that is rounded once, beside the same run in fp32."""
    exact = of(rows, experiment="equal", dtype="fp32", method="naive_hydra")
    naive, ours, once = (
        of(rows, experiment="equal", dtype="bf16", method=f"{owner}_hydra") for owner in ("naive", "ours", "once")
    )
    from_exact = {
        id(run): [curve_distance(a, b) for a, b in zip(exact, run, strict=True)] for run in (naive, ours, once)
    }
    names = [(naive, "naive, bf16"), (ours, f"ours, bf16 ({ours[0]['backend']}, {ours[0]['form']})")]
    cells = [["naive, fp32", mean_and_spread([row["test"] for row in exact]), *["-"] * 5]]
    for run, name in [*names, (once, "rounded once, bf16")]:
        line = [name, mean_and_spread([row["test"] for row in run]), f"{statistics.median(from_exact[id(run)]):.1e}"]
        if run is naive:
            cells.append([*line, *["-"] * 4])
            continue
        gaps = [b["test"] - a["test"] for a, b in zip(naive, run, strict=True)]
        over = ratios(from_exact[id(run)], from_exact[id(naive)])
        line += [mean_and_spread(gaps, 2), digits(sign_flip_p(gaps)), f"{statistics.median(over):.2f}"]
        cells.append([*line, digits(sign_flip_p([math.log(ratio) for ratio in over]))])
    headings = ["Hydra", "test accuracy (%)", "loss curve from fp32's", "it - naive bf16 (points)", "p"]
    return Table("", [*headings, "loss curve's distance over naive bf16's", "p"], cells).markdown()


class Comparison(NamedTuple):
    """Hydra against one rival in one place: differences of test accuracy (shares) by seed, and what they say."""

    position: str
    kind: str
    gaps: list[float]
    p: float
    corrected: float

    @property
    def verdict(self) -> str:
        if self.corrected >= SIGNIFICANT:
            return "open"
        return "won" if sum(self.gaps) > 0 else "lost"


def methods(rows: Sequence[LearnRow]) -> list[tuple[str, str]]:
    """(position, kind) of the final runs, place by place; the head alone stands first."""
    found = {(row["position"], row["method"].removeprefix("ours_")) for row in of(rows, experiment="claim")}
    every = [("none", "head"), *itertools.product(PLACES, KINDS)]
    return [method for method in every if method in found]


def comparisons(rows: Sequence[LearnRow]) -> list[Comparison]:
    """Hydra against either rival in every place, p corrected for how many they are."""
    found = []
    for position, kind in methods(rows):
        if kind not in ("lora", "seqlora"):
            continue
        hydra, rival = (
            of(rows, experiment="claim", position=position, method=f"ours_{name}") for name in ("hydra", kind)
        )
        gaps = [a["test"] - b["test"] for a, b in zip(hydra, rival, strict=True)]
        found.append(Comparison(position, kind, gaps, sign_flip_p(gaps), math.nan))
    return [c._replace(corrected=p) for c, p in zip(found, holm([c.p for c in found]), strict=True)]


def claim_table(rows: Sequence[LearnRow]) -> str:
    """Hydra against LoRA and SeqLoRA of equal parameters, in each place, paired by seed."""
    headings = ["adapters in", "method", "trainable", "learning rate", "test accuracy (%)", "Hydra - it (points)"]
    told = {(c.position, c.kind): c for c in comparisons(rows)}
    cells = []
    for (position, place), (kind, name) in itertools.product(PLACES.items(), KINDS.items()):
        runs = of(rows, experiment="claim", position=position, method=f"ours_{kind}")
        line = [place, name, f"{runs[0]['trainable']:,}", f"{runs[0]['rate']:g}"]
        line.append(mean_and_spread([row["test"] for row in runs]))
        c = told.get((position, kind))
        line += ["-"] * 3 if c is None else [mean_and_spread(c.gaps, 2), digits(c.p), digits(c.corrected)]
        cells.append(line)
    return Table("", [*headings, "p", "p, corrected"], cells).markdown()


def verdicts(rows: Sequence[LearnRow], place: bool = True) -> dict[str, str]:
    """Verdict ("won", "lost", "open") -> the rivals and places of which it is true; absent where of none."""
    found: dict[str, list[str]] = {}
    for c in comparisons(rows):
        found.setdefault(c.verdict, []).append(f"{KINDS[c.kind]} in {PLACES[c.position]}" if place else KINDS[c.kind])
    return {verdict: ", ".join(where) for verdict, where in found.items()}


def claim_sentence(rows: Sequence[LearnRow]) -> str:
    """Where Hydra won, where it lost, and where the seeds cannot tell."""
    told = verdicts(rows)
    says = {"won": "Hydra wins against", "lost": "Hydra loses to", "open": "Hydra cannot be told from"}
    parts = [f"{words} {told[verdict]}" for verdict, words in says.items() if verdict in told]
    return f"At corrected p < {SIGNIFICANT:g}: {'; '.join(parts)}."


def search_table(rows: Sequence[LearnRow]) -> str:
    """Validation accuracy at every rate of the search, the chosen one bold."""
    searched = of(rows, experiment="search")
    rates = sorted({row["rate"] for row in searched})
    cells = []
    for position, kind in methods(rows):
        method = {"position": position, "method": f"ours_{kind}"}
        [chosen] = {row["rate"] for row in of(rows, experiment="claim", **method)}
        line = [PLACES.get(position, "-"), KINDS.get(kind, "head alone")]
        for rate in rates:
            values = [100 * row["validation"] for row in of(searched, rate=rate, **method)]
            if not values:
                line.append("-")
                continue
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            mark = "**" if rate == chosen else ""
            line.append(f"{mark}{statistics.mean(values):.1f} ± {error:.1f}{mark}")
        cells.append(line)
    return Table("", ["adapters in", "method", *(f"{rate:g}" for rate in rates)], cells).markdown()


def claim_block(stored: Sequence[Stored]) -> str:
    """Where Hydra wins, and where it does not: a line of each backbone."""
    lines, missed = [], 0
    for result in stored:
        told, every = verdicts(result.rows), comparisons(result.rows)
        says = {"lost": "it loses to", "open": "it cannot be told from", "won": "it wins against"}
        won = sum(c.verdict == "won" for c in every)
        missed += len(every) - won
        data = result.rows[0]["data"]
        seeds = len({row["seed"] for row in of(result.rows, experiment="claim")})
        parts = "; ".join(f"{words} {told[verdict]}" for verdict, words in says.items() if verdict in told)
        where = f"{BACKBONES.get(data, 'a small ViT')} ({data}, {seeds} seeds)"
        lines.append(f"- {where}: it wins {won} of {len(every)} comparisons: {parts}.")
    always = "does not always learn" if missed else "learned"
    lead = f"Hydra {always} better than LoRA and SeqLoRA of as many parameters ([Equal learning](learning.md)):"
    return "\n".join([lead, "", *lines])


def learn_markdown(file: Stored) -> str:
    """The tables and what a reader must know beside them."""
    rows, first = file.rows, file.rows[0]
    seeds, searched = (len({r["seed"] for r in of(rows, experiment=name)}) for name in ("equal", "search"))
    notes = (
        f"{file.origin(link=True)} {first['data']}: a ViT that has learned classes 0 to 4 learns classes 5 to 9 "
        f"from {first['images']} images in {len(first['losses'])} steps and is tested on {first['tested']}, the same "
        f"for every seed; {seeds} seeds, each with images, order and start of its own; mean ± standard deviation over "
        "them."
    )
    return "\n\n".join(
        [
            "**Equal learning.** Loss curves: medians over seeds of the root mean square difference; the ratio is "
            "taken seed by seed. p: exact one-sided sign-flip test of its logarithm, that ours is further from naive "
            "than naive is from itself when the images of each batch come in another order.",
            equal_table(rows),
            equal_sentence(rows),
            "**In bf16**, fp32 adapters over a bf16 backbone. p: exact sign-flip tests of the paired differences, of "
            "accuracies and of the logarithms of distances.",
            bf16_table(rows),
            "**The paper's claim.** p: exact sign-flip test of the paired differences; corrected: for six comparisons "
            "(Holm).",
            claim_table(rows),
            claim_sentence(rows),
            f"**The search.** Validation accuracy (%) at each learning rate, mean ± standard error over {searched} "
            "seeds; the chosen rate is bold.",
            search_table(rows),
            notes,
        ]
    )


def learn_block(stored: Sequence[Stored]) -> str:
    """What stands between the markers."""
    return "\n\n".join(learn_markdown(result) for result in stored)

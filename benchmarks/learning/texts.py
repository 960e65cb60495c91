"""Texts to sort: definitions of English nouns from WordNet 3.0, each of one kind of thing. They lie beside this file.

How they came there: ``python -m benchmarks.learning.texts /usr/share/wordnet/data.noun`` (Debian's wordnet-base).
"""

from __future__ import annotations

import csv
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("definitions.csv")
# WordNet's files of nouns by their number, lexnames(5WN).
KINDS = dict(
    enumerate(
        (
            *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event"),
            *("feeling", "food", "group", "location", "motive", "object", "person", "phenomenon", "plant"),
            *("possession", "process", "quantity", "relation", "shape", "state", "substance", "time"),
        ),
        start=3,
    )
)
LEAST, TAKEN, SEED = 1000, 200, 2309  # definitions that a kind has, and how many of them are drawn


class Texts(NamedTuple):
    """Texts to sort, and which of the kinds each is: its place in ``kinds``."""

    texts: list[str]
    labels: list[int]
    kinds: list[str]


def definitions(file: Path = FILE) -> Texts:
    """The definitions, kind by kind."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    kinds = sorted({row["label"] for row in rows})
    return Texts([row["text"] for row in rows], [kinds.index(row["label"]) for row in rows], kinds)


def drawn(lines: Iterable[str], least: int = LEAST, taken: int = TAKEN) -> list[tuple[str, str]]:
    """(definition, kind) of ``taken`` definitions of every kind that has ``least``, from WordNet's data.noun.

    What defines words of two kinds is left out. What follows a definition are examples of its use, in quotes.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        if line.startswith("  "):
            continue  # the licence
        synset, _, gloss = line.partition(" | ")
        found[gloss.partition('; "')[0].strip()].add(KINDS[int(synset.split()[1])])
    by_kind: dict[str, list[str]] = defaultdict(list)
    for definition, kinds in sorted(found.items()):
        if len(kinds) == 1:
            by_kind[kinds.pop()].append(definition)
    generator = random.Random(SEED)
    large = [kind for kind in sorted(by_kind) if len(by_kind[kind]) >= least]
    return [(definition, kind) for kind in large for definition in generator.sample(by_kind[kind], taken)]


if __name__ == "__main__":
    with FILE.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows(drawn(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()))

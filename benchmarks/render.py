"""Turns stored results into what people read: the tables and charts of the README and of ``docs``.

``python -m benchmarks.render`` rewrites these pages between their markers and the charts beside the results from
``benchmarks/results``; with ``--check`` it changes nothing and exits with 1 where one of them is stale.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import timing
from benchmarks.measuring.rows import HostRow, LayerRow, LearnRow, RooflineRow, RoundingRow, SubspaceRow, Table4Row
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.host import host_block
from benchmarks.rendering.layer import (
    layer_block,
    layer_cells,
    layer_chart,
    layer_losses,
    layer_markdown,
    layer_means,
    layer_notes,
    layer_steps,
    layer_terminal,
)
from benchmarks.rendering.learn import claim_block, learn_block, learn_chart
from benchmarks.rendering.models import models_block, models_chart
from benchmarks.rendering.roofline import roofline_block
from benchmarks.rendering.rounding import rounding_block, rounding_chart
from benchmarks.rendering.subspaces import subspace_block, subspace_chart
from benchmarks.rendering.summary import summary
from benchmarks.rendering.table4 import (
    is_papers,
    table4_block,
    table4_chart,
    table4_markdown,
    table4_notes,
    table4_terminal,
)
from benchmarks.rendering.tables import Stored, environment_note, terminal

# The benchmarks print what the README shows: one place to take it from.
__all__ = [
    "environment_note",
    "layer_cells",
    "layer_losses",
    "layer_markdown",
    "layer_means",
    "layer_notes",
    "layer_steps",
    "layer_terminal",
    "main",
    "table4_markdown",
    "table4_notes",
    "table4_terminal",
    "terminal",
]


README, LEARNING, GPU = "README.md", "docs/learning.md", "docs/gpu.md"
# The README's first figures, of three blocks' rows; a README may do without.
SUMMARY = "measured:summary"


class Block(NamedTuple):
    """What stands between the markers of one page: rows of all FILES*.json, and the charts of them.

    A schema is either measured or predicted, so that nothing predicted can be read as measured.
    """

    marker: str
    files: str
    schema: type
    to_markdown: Callable[[Sequence[Stored]], str]
    chart: Callable[[Environment, Sequence[Any]], str] | None = None
    page: str = README
    # Which rows of the files, where not all.
    rows: Callable[[Any], bool] = lambda row: True
    # One chart of all files, called as the block.
    overview: Callable[[Sequence[Stored]], str] | None = None


BLOCKS = (
    Block("measured:table4", "table4", Table4Row, table4_block, table4_chart, rows=is_papers),
    Block("measured:models", "table4", Table4Row, models_block, page="docs/models.md", overview=models_chart),
    Block("measured:learn", "learn", LearnRow, learn_block, learn_chart, page=LEARNING),
    Block("measured:claim", "learn", LearnRow, claim_block),
    Block("measured:rounding", "rounding", RoundingRow, rounding_block, rounding_chart, page=LEARNING),
    Block("measured:subspaces", "subspaces", SubspaceRow, subspace_block, subspace_chart, page=LEARNING),
    Block("measured:layer", "layer", LayerRow, layer_block, layer_chart, rows=lambda row: row["device"] == "cpu"),
    Block("measured:gpu", "layer", LayerRow, layer_block, layer_chart, GPU, lambda row: row["device"] == "cuda"),
    Block("measured:host", "host", HostRow, host_block),
    Block("predicted:roofline", "predicted", RooflineRow, roofline_block),
)


def stored_results(results: Path, block: Block) -> list[Stored]:
    """Every stored result of one block in the order of the file names; a ValueError where one is from a dry run."""
    found = []
    for path in sorted(results.glob(f"{block.files}*.json"), key=lambda path: path.stem):
        stored = Stored(path, *timing.read_result(path, block.schema))
        if any(row.get("dry") for row in stored.rows):
            raise ValueError(f"{path} is from a dry run: its figures mean nothing and are not published")
        if rows := [row for row in stored.rows if block.rows(row)]:
            found.append(stored._replace(rows=rows))
    return found


def rendered(root: Path, results: Path) -> dict[Path, str]:
    """The pages under ``root`` and the charts as they should be.

    A block needs both its markers and its results, or neither. A page that is not there has no markers.
    """
    pages = {block.page: root / block.page for block in BLOCKS}
    texts = {page: path.read_text(encoding="utf-8") for page, path in pages.items() if page == README or path.exists()}
    for page, text in texts.items():
        known = [SUMMARY] * (page == README) + [block.marker for block in BLOCKS if block.page == page]
        for marker in re.findall(r"<!-- /?((?:measured|predicted):\w+) -->", text):
            if marker not in known:
                raise ValueError(f"{page} has markers for {marker}, expected {', '.join(known)}")
    drawn: dict[Path, str] = {}
    found: dict[str, list[Stored]] = {}
    for block in BLOCKS:
        stored, text = stored_results(results, block), texts.get(block.page, "")
        found[block.marker] = stored
        if not stored and f"{block.marker} -->" in text:
            raise ValueError(
                f"{block.page} has markers for {block.marker.partition(':')[2]}, but {results} holds no "
                f"{block.files}*.json"
            )
        if stored:
            charts: dict[Path, str] = {}
            for path, environment, rows in stored if block.chart else ():
                charts[path.with_suffix(".svg")] = block.chart(environment, rows)
            if block.overview:
                charts[results / f"{block.marker.partition(':')[2]}.svg"] = block.overview(stored)
            links = [
                f"![{chart.stem}]({Path(os.path.relpath(chart, pages[block.page].parent)).as_posix()})"
                for chart in charts
            ]
            content = "\n\n".join([block.to_markdown(stored), *links])
            texts[block.page] = replace_block(text, block.page, block.marker, content)
            drawn |= charts
    if f"{SUMMARY} -->" in texts[README]:
        content = summary(*(found.get(f"measured:{name}", []) for name in ("table4", "layer", "gpu")))
        texts[README] = replace_block(texts[README], README, SUMMARY, content)
    return {**{pages[page]: text for page, text in texts.items()}, **drawn}


def replace_block(text: str, page: str, marker: str, content: str) -> str:
    """The page's ``text`` with ``content`` between its one pair of markers."""
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"{page} needs one {opening} and, after it, one {closing}")
    before, rest = text.split(opening)
    return f"{before}{opening}\n{content}\n{closing}{rest.split(closing)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something is stale")
    parser.add_argument("--root", type=Path, default=root, help="folder of README.md and docs")
    parser.add_argument("--results", type=Path, default=root / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    try:
        fresh = rendered(options.root, options.results)
    except (OSError, ValueError) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    stale = [path for path, text in fresh.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path.name} is stale: run python -m benchmarks.render", file=sys.stderr)
        else:
            path.write_text(fresh[path], encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())

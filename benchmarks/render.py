"""Turns stored results into what people read: the README's tables and charts.

``python -m benchmarks.render`` rewrites the README between its markers and the charts beside the results from
``benchmarks/results``; with ``--check`` it changes nothing and exits with 1 where one of them is stale.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import timing
from benchmarks.render_host import host_block
from benchmarks.render_layer import (
    is_rival,
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
from benchmarks.render_roofline import RooflineRow, roofline_block
from benchmarks.render_table4 import table4_block, table4_chart, table4_markdown, table4_notes, table4_terminal
from benchmarks.tables import Stored, environment_note, terminal
from benchmarks.timing import Environment, HostRow, LayerRow, Table4Row

# The benchmarks print what the README shows: one place to take it from.
__all__ = [
    "environment_note",
    "is_rival",
    "layer_cells",
    "layer_losses",
    "layer_markdown",
    "layer_means",
    "layer_notes",
    "layer_steps",
    "layer_terminal",
    "main",
    "table4_chart",
    "table4_markdown",
    "table4_notes",
    "table4_terminal",
    "terminal",
]


class Block(NamedTuple):
    """What stands between the README's markers: all of FILES*.json, and a chart of each file where there is one.

    A schema belongs to one block, so that nothing predicted can be read as measured.
    """

    marker: str
    files: str
    schema: type
    to_markdown: Callable[[Sequence[Stored]], str]
    chart: Callable[[Environment, Sequence[LayerRow]], str] | None = None


BLOCKS = (
    Block("measured:table4", "table4", Table4Row, table4_block),
    Block("measured:layer", "layer", LayerRow, layer_block, layer_chart),
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
        found.append(stored)
    return found


def rendered(readme: Path, results: Path) -> dict[Path, str]:
    """The README and the charts as they should be. A block needs both its markers and its results, or neither."""
    text, charts = readme.read_text(encoding="utf-8"), {}
    known = [block.marker for block in BLOCKS]
    for marker in re.findall(r"<!-- /?((?:measured|predicted):\w+) -->", text):
        if marker not in known:
            raise ValueError(f"README has markers for {marker}, expected {', '.join(known)}")
    for block in BLOCKS:
        stored = stored_results(results, block)
        if not stored and f"{block.marker} -->" in text:
            raise ValueError(
                f"README has markers for {block.marker.partition(':')[2]}, but {results} holds no {block.files}*.json"
            )
        if stored:
            parts = [block.to_markdown(stored)]
            for path, environment, rows in stored if block.chart else ():
                chart = path.with_suffix(".svg")
                charts[chart] = block.chart(environment, rows)
                parts.append(f"![{chart.stem}]({Path(os.path.relpath(chart, readme.parent)).as_posix()})")
            text = replace_block(text, block.marker, "\n\n".join(parts))
    return {readme: text, **charts}


def replace_block(text: str, marker: str, block: str) -> str:
    """``text`` with ``block`` between its one pair of markers."""
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"README needs one {opening} and, after it, one {closing}")
    before, rest = text.split(opening)
    return f"{before}{opening}\n{block}\n{closing}{rest.split(closing)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something is stale")
    parser.add_argument("--readme", type=Path, default=root / "README.md")
    parser.add_argument("--results", type=Path, default=root / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    try:
        fresh = rendered(options.readme, options.results)
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

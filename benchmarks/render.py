"""Turns stored results into what people read: the tables and charts of the README, ``docs`` and ``GOALS.md``.

``python -m benchmarks.render`` rewrites these pages between their markers and the charts beside the results from
``benchmarks/results``; with ``--check`` it changes nothing and exits with 1 where one of them is stale. ``--take out``
first takes over what `benchmarks.gpu` stored there, be it of half a run. A page says where nothing was measured.

The files of one processor stand in ``benchmarks/results``; those of a further one in a folder of its own there, under
the same names. Tables of further processors stand below the first's. What the README shows is the first's alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.device.isolated import CheckRow
from benchmarks.measuring import timing
from benchmarks.measuring.rows import (
    CandidateRow,
    CeilingRow,
    HostRow,
    LayerRow,
    LearnRow,
    RooflineRow,
    RoundingRow,
    StageRow,
    SubspaceRow,
    Table4Row,
    TuneRow,
)
from benchmarks.rendering import kernels, pictures
from benchmarks.rendering.accelerated import accelerated_block
from benchmarks.rendering.candidates import candidates_block
from benchmarks.rendering.device import ceilings_block, doctor_block, run_block, tune_block
from benchmarks.rendering.goals import goals_block
from benchmarks.rendering.host import host_block
from benchmarks.rendering.layer import layer_block
from benchmarks.rendering.layer_chart import layer_chart
from benchmarks.rendering.learn import claim_block, learn_block
from benchmarks.rendering.learn_chart import learn_chart
from benchmarks.rendering.machines import machines_block, with_machines
from benchmarks.rendering.models import models_block
from benchmarks.rendering.overview import overview_chart
from benchmarks.rendering.pretrained import is_pretrained, pretrained_block
from benchmarks.rendering.quantised import quantised_block
from benchmarks.rendering.roofline import roofline_block
from benchmarks.rendering.rounding import rounding_block, rounding_chart
from benchmarks.rendering.steps_chart import models_chart, table4_chart
from benchmarks.rendering.subspaces import subspace_block, subspace_chart
from benchmarks.rendering.summary import summary
from benchmarks.rendering.table4 import is_papers, table4_block
from benchmarks.rendering.tables import Stored, by_device, is_gpu

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS, LEARNING, GOALS = "README.md", "docs/results.md", "docs/learning.md", "benchmarks/GOALS.md"
GPU, NOTES = "docs/gpu.md", "benchmarks/NOTES.md"
NOTHING = "Not measured yet."


class Block(NamedTuple):
    """What stands between the markers of one page: rows of all FILES*.json, and the charts of them.

    A schema is either measured or predicted, so that nothing predicted can be read as measured.
    """

    marker: str
    files: str
    schema: type
    to_markdown: Callable[[Sequence[Stored]], str]
    chart: Callable[[Stored], Figure] | None = None
    page: str = RESULTS
    # Which rows of the files, where not all.
    rows: Callable[[Any], bool] = lambda row: True
    # One chart of all the first processor's files, called as the block.
    overview: Callable[[Sequence[Stored]], Figure] | None = None
    # Whether each device has a part of its own, where there are several. Elsewhere the headings name it, or none
    # measured.
    parted: bool = True


class Digest(NamedTuple):
    """What a page says of several blocks' rows, by their markers. A page may do without."""

    marker: str
    page: str
    of: tuple[str, ...]
    to_markdown: Callable[..., str]


class Picture(NamedTuple):
    """What a page shows of several blocks' rows, by their markers; the page itself has the link."""

    name: str
    of: tuple[str, ...]
    chart: Callable[..., Figure]


BLOCKS = (
    Block("measured:table4", "table4", Table4Row, table4_block, table4_chart, rows=is_papers, parted=False),
    Block(
        "measured:models",
        "table4",
        Table4Row,
        models_block,
        overview=models_chart,
        rows=lambda row: row["base"] == "none",
        parted=False,
    ),
    Block("measured:accelerated", "table4-llama-peft", Table4Row, accelerated_block),
    Block("measured:quantised", "table4-", Table4Row, quantised_block, rows=lambda row: row["base"] != "none"),
    Block(
        "measured:layer",
        "layer",
        LayerRow,
        layer_block,
        layer_chart,
        rows=lambda row: row["device"] == "cpu",
        parted=False,
    ),
    Block(
        "measured:gpu",
        "layer",
        LayerRow,
        layer_block,
        layer_chart,
        rows=lambda row: row["device"] == "cuda",
        parted=False,
    ),
    Block("measured:host", "host", HostRow, host_block),
    Block("measured:claim", "learn", LearnRow, claim_block),
    Block("measured:pretrained", "learn", LearnRow, pretrained_block, page=LEARNING, rows=is_pretrained),
    Block(
        "measured:learn",
        "learn",
        LearnRow,
        learn_block,
        learn_chart,
        page=LEARNING,
        rows=lambda row: not is_pretrained(row),
    ),
    Block("measured:rounding", "rounding", RoundingRow, rounding_block, rounding_chart, page=LEARNING),
    Block("measured:subspaces", "subspaces", SubspaceRow, subspace_block, subspace_chart, page=LEARNING),
    Block("measured:run", "run", StageRow, run_block, page=GPU),
    Block("measured:doctor", "doctor", CheckRow, doctor_block, page=GPU),
    Block("measured:ceilings", "ceilings", CeilingRow, ceilings_block, page=GPU),
    Block("measured:tune", "tune", TuneRow, tune_block, page=GPU),
    Block("measured:candidates", "candidates", CandidateRow, candidates_block, page=NOTES),
    Block("predicted:roofline", "predicted", RooflineRow, roofline_block, parted=False),
)
STEPS = ("measured:models", "measured:layer", "measured:gpu")
MEASURED = tuple(block.marker for block in BLOCKS if block.marker.startswith("measured:"))
DIGESTS = (
    Digest("measured:machines", RESULTS, MEASURED, machines_block),
    Digest("measured:summary", README, (*STEPS, "measured:quantised"), summary),
    Digest("measured:goals", GOALS, (*STEPS, "measured:host", "measured:quantised"), goals_block),
)
# Of the README.
PICTURES = (Picture("overview.svg", ("measured:layer", "measured:gpu"), overview_chart),)


def stored_results(results: Path, block: Block) -> list[Stored]:
    """Every stored result of one block in the order of the file names, further processors' last; a ValueError where
    one is from a dry run.
    """
    found = []
    paths = [path for folder in ("", "*/") for path in results.glob(f"{folder}{block.files}*.json")]
    for path in sorted(paths, key=lambda path: (path.parent, path.stem)):
        stored = Stored(path, *timing.read_result(path, block.schema))
        refuse_dry(path, stored.rows)
        if rows := [row for row in stored.rows if block.rows(row)]:
            found.append(stored._replace(rows=rows))
    return found


def refuse_dry(path: Path, rows: Sequence[Any]) -> None:
    if any(row.get("dry") for row in rows):
        raise ValueError(f"{path} is from a dry run: its figures mean nothing and are not published")


def refuse_mixed(files: Sequence[Stored]) -> None:
    """A ValueError where a folder has results of two processors: which of them is the first would be chance."""
    owners: dict[Path, Stored] = {}
    for file in files:
        if is_gpu(file.environment):
            continue
        owner = owners.setdefault(file.path.parent, file)
        one, other = owner.environment["device"], file.environment["device"]
        if one != other:
            raise ValueError(
                f"{file.path} is of {other}, {owner.path.name} beside it of {one}: a further processor has a folder of "
                "its own in the results"
            )


def of_first(files: Sequence[Stored], results: Path) -> list[Stored]:
    """Those of the first processor, and of every GPU beside it."""
    return [file for file in files if file.path.parent == results]


def with_kernels(found: Mapping[str, list[Stored]], digests: Mapping[str, str]) -> dict[str, list[Stored]]:
    """The results, those of a GPU with what their captions say of its kernels."""
    today = kernels.here(ROOT)

    def of_kernels(file: Stored) -> Stored:
        commit = file.environment["commit"]
        return file._replace(kernels=kernels.compared(digests.get(commit or ""), today))

    return {
        marker: [of_kernels(file) if is_gpu(file.environment) else file for file in files]
        for marker, files in found.items()
    }


def rendered(root: Path, results: Path) -> dict[Path, str]:
    """The pages under ``root``, the charts, and the record of the GPU's kernels as they should be.

    Results need the markers of their block; markers without results get a sentence. A page that is not there has none.
    """
    pages = {part.page: root / part.page for part in (*BLOCKS, *DIGESTS)}
    texts = {page: path.read_text(encoding="utf-8") for page, path in pages.items() if page == README or path.exists()}
    for page, text in texts.items():
        known = [part.marker for part in (*DIGESTS, *BLOCKS) if part.page == page]
        for marker in re.findall(r"<!-- /?((?:measured|predicted):\w+) -->", text):
            if marker not in known:
                raise ValueError(f"{page} has markers for {marker}, expected {', '.join(known)}")
    found = {block.marker: stored_results(results, block) for block in BLOCKS}
    refuse_mixed([file for marker, files in found.items() if marker.startswith("measured:") for file in files])
    commits = {file.environment["commit"] for files in found.values() for file in files if is_gpu(file.environment)}
    digests = kernels.recorded(ROOT, results, sorted(commit for commit in commits if commit))
    found = with_machines(with_kernels(found, digests))
    drawn: dict[Path, str] = {results / kernels.RECORD: json.dumps(digests, indent=1) + "\n"} if digests else {}
    for block in BLOCKS:
        stored, text = found[block.marker], texts.get(block.page, "")
        if not stored and f"{block.marker} -->" in text:
            texts[block.page] = replace_block(text, block.page, block.marker, NOTHING)
        if stored:
            charts: dict[Path, str] = {}
            for file in stored if block.chart else ():
                charts[file.path.with_suffix(".svg")] = pictures.svg(block.chart, file)
            if block.overview and (first := of_first(stored, results)):
                charts[results / f"{block.marker.partition(':')[2]}.svg"] = pictures.svg(block.overview, first)
            links = [
                f"![{chart.relative_to(results).with_suffix('').as_posix()}]"
                f"({Path(os.path.relpath(chart, pages[block.page].parent)).as_posix()})"
                for chart in charts
            ]
            told = by_device(stored, block.to_markdown) if block.parted else block.to_markdown(stored)
            content = "\n\n".join([told, *links])
            texts[block.page] = replace_block(text, block.page, block.marker, content)
            drawn |= charts
    for picture in PICTURES:
        given = [of_first(found.get(marker, []), results) for marker in picture.of]
        if any(given):
            drawn[results / picture.name] = pictures.svg(picture.chart, *given)
    for part in DIGESTS:
        if f"{part.marker} -->" in texts.get(part.page, ""):
            given = [found.get(marker, []) for marker in part.of]
            given = [of_first(files, results) for files in given] if part.page == README else given
            content = part.to_markdown(*given)
            texts[part.page] = replace_block(texts[part.page], part.page, part.marker, content)
    return {**{pages[page]: text for page, text in texts.items()}, **drawn}


def replace_block(text: str, page: str, marker: str, content: str) -> str:
    """The page's ``text`` with ``content`` between its one pair of markers."""
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"{page} needs one {opening} and, after it, one {closing}")
    before, rest = text.split(opening)
    return f"{before}{opening}\n{content}\n{closing}{rest.split(closing)[1]}"


def take(folder: Path, results: Path) -> list[str]:
    """Copies the GPU's results of a run to the others, and gives their names; ValueError before any is copied."""
    found = sorted(folder.glob("*-cuda.json"))
    if not found:
        raise ValueError(f"{folder} holds no results of a GPU, *-cuda.json")
    for path in found:
        schemas = {block.schema for block in BLOCKS if path.stem.startswith(block.files)}
        if len(schemas) != 1:
            raise ValueError(f"{path} is of no benchmark that has a page")
        refuse_dry(path, timing.read_result(path, schemas.pop())[1])
    for path in found:
        shutil.copyfile(path, results / path.name)
    return [path.name for path in found]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--take", type=Path, metavar="FOLDER", help="take over what a run of benchmarks.gpu left there")
    options = parser.parse_args(arguments)
    try:
        if options.take is not None:
            print(f"taken over: {', '.join(take(options.take, options.results))}")
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

"""Every table, for the pages and for the terminal alike; how a method is called, and who measured."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.measuring.rows import HostRow, LayerRow, Table4Row
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.kernels import Kernels

OWNERS = {"ours": "our", "peft": "PEFT", "autocast": "PEFT under autocast", "accelerated": "accelerated PEFT"}
KINDS = {"lora": "LoRA", "seqlora": "SeqLoRA", "hydra": "Hydra"}
# What a caption says of a mode.
MODES = {
    "compile": "Every method under torch.compile.",
    "graph": "CUDA graphs replayed, saved bytes counted in eager mode.",
}

Row = TypeVar("Row", bound=Mapping[str, Any])


class Stored(NamedTuple):
    """One file of results, for a GPU's what is said of its kernels, and the number of the machine on the pages."""

    path: Path
    environment: Environment
    rows: list[Any]
    kernels: Kernels = Kernels()
    # None in the terminal.
    machine: int | None = None

    def where(self, link: bool = False) -> str:
        """Which kernels ran on which machine. ``link``: from a page other than the one that lists the machines."""
        machine = machine_note(self.environment) if self.machine is None else f"Machine {self.machine}"
        linked = link and self.machine is not None
        return self.kernels.caption + (f"[{machine}](results.md#machines-and-versions)" if linked else machine)

    def origin(self, link: bool = False) -> str:
        """The first words of every caption: where, when, and which commit."""
        return f"{self.where(link)}; {commit_note(self.environment)}."


def origins(files: Sequence[Stored]) -> str:
    """The origins of several files, each machine and day once."""
    commits: dict[str, dict[str, None]] = {}
    for file in files:
        date, _, commit = commit_note(file.environment).partition("; ")
        commits.setdefault(f"{file.where()}; {date}", {})[commit] = None
    return " ".join(f"{day}; {', '.join(names)}." for day, names in commits.items())


class Table(NamedTuple):
    """``left`` columns of text, then figures. In the terminal the lines of ``bold`` stand out."""

    title: str
    headings: Sequence[str]
    cells: Sequence[Sequence[str]]
    bold: Sequence[bool] = ()
    left: int = 1

    def markdown(self) -> str:
        marks = ["---" if place < self.left else "---:" for place in range(len(self.headings))]
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.headings, marks, *self.cells))

    def terminal(self) -> RichTable:
        table = RichTable(title=self.title)
        for place, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if place < self.left else "right")
        for line, stands_out in zip(self.cells, self.bold or [False] * len(self.cells), strict=True):
            table.add_row(*map(Text, line), style="bold" if stands_out else None)
        return table


def show(width: int, parts: Iterable[Table | str]) -> None:
    """Prints tables and lines. Where there is no terminal rich assumes 80 columns, which would break every cell."""
    console = Console(width=None if sys.stdout.isatty() else width)
    for part in parts:
        console.print(part.terminal() if isinstance(part, Table) else part, highlight=False, markup=False)


def label(row: Table4Row | LayerRow | HostRow) -> str:
    """A method and its ranks as a reader knows them: "our Hydra 3+3", "naive LoRA 4", "full tuning"."""
    owner, _, kind = row["method"].partition("_")
    if kind not in KINDS:
        return row["method"].replace("_", " ")
    ranks = (row["ranks"] or []) if "ranks" in row else [row["r_a"], row["r_b"]]
    return f"{OWNERS.get(owner, owner)} {KINDS[kind]} {'+'.join(str(rank) for rank in ranks if rank)}"


def or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def digits(value: float) -> str:
    """Three significant digits: how the pages round all that is no ratio, no share and no memory."""
    exponent = math.floor(math.log10(abs(value))) if value else 0
    rounded = round(value, 2 - exponent)
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}" if value else "0"


def megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def commit_note(environment: Environment) -> str:
    commit = "no commit" if environment["commit"] is None else f"commit {environment['commit'][:12]}"
    return f"{environment['date'][:10]}; {commit}{' with local changes' if environment['dirty'] else ''}"


def is_gpu(environment: Environment) -> bool:
    """A GPU's capability is a number, a CPU's the name of its vectors."""
    return environment["capability"][:1].isdigit()


def environment_note(environment: Environment) -> str:
    """For the terminal; the pages name each machine once."""
    return f"{machine_note(environment)}; {commit_note(environment)}."


def machine_note(environment: Environment) -> str:
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment[name]]
    threads = f"{environment['threads']} thread{'' if environment['threads'] == 1 else 's'}"
    more = f"driver {environment['driver']}" if environment["driver"] else threads
    return (
        f"{environment['device']} ({environment['capability']}, {more}); {', '.join(versions)}, "
        f"Python {environment['python']}"
    )


def groups(rows: Sequence[Row], by: Sequence[str], same: Sequence[str]) -> list[list[Row]]:
    """The rows equal in ``by``, in the order of the file. One equal in ``same`` too is of a further run, and begins a
    new group, to which what follows belongs.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    seen: Counter[tuple[str, ...]] = Counter()
    latest: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        run = tuple(str(row[key]) for key in by)
        cell = (*run, *(str(row[key]) for key in same))
        latest[run] = max(latest[run], seen[cell])
        found.setdefault((*run, str(latest[run])), []).append(row)
        seen[cell] = latest[run] + 1
    return list(found.values())


def what_ran(rows: Sequence[Mapping[str, Any]]) -> str:
    """What tells measured groups of one device apart: dtype, mode, and every backend that ran ours."""
    backends = dict.fromkeys(row["backend"] for row in rows if row.get("backend"))
    dropped = f", lora_dropout {rows[0]['dropout']:g}" if rows[0].get("dropout") else ""
    return f"{rows[0]['dtype']}, {rows[0]['mode']}{dropped}{', ours: ' if backends else ''}{', '.join(backends)}"


def headed(made: Iterable[tuple[str, Stored, str]]) -> str:
    """Texts, each of one file and under its heading, which names the device where there are several."""
    found = list(made)
    devices = {file.environment["device"] for _, file, _ in found}
    names = [f"; {file.environment['device']}" if len(devices) > 1 else "" for _, file, _ in found]
    return "\n\n".join(f"**{heading}{name}**\n\n{text}" for (heading, _, text), name in zip(found, names, strict=True))


def by_device(stored: Sequence[Stored], to_markdown: Callable[[Sequence[Stored]], str]) -> str:
    """What is said of each device's results, under its name where there are several."""
    devices: dict[str, list[Stored]] = {}
    for file in stored:
        devices.setdefault(file.environment["device"], []).append(file)
    if len(devices) == 1:
        return to_markdown(stored)
    return "\n\n".join(f"**{device}**\n\n{to_markdown(files)}" for device, files in devices.items())

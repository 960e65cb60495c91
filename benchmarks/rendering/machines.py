"""Who measured: every machine and its versions once, under a number that the captions of all pages use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.rendering.tables import Stored, machine_note

NOTHING = "Nothing was measured yet."


def with_machines(found: Mapping[str, list[Stored]]) -> dict[str, list[Stored]]:
    """The results of every block, each with its machine's number. What is predicted was measured by none."""
    measured = [file for marker, files in found.items() if marker.startswith("measured:") for file in files]
    notes = list(dict.fromkeys(machine_note(file.environment) for file in measured))
    numbers = {note: place for place, note in enumerate(notes, start=1)}
    return {
        marker: [file._replace(machine=numbers.get(machine_note(file.environment))) for file in files]
        for marker, files in found.items()
    }


def machines_block(*found: Sequence[Stored]) -> str:
    """A line a machine."""
    notes = {file.machine: machine_note(file.environment) for files in found for file in files}
    return "\n".join(f"- **Machine {number}**: {note}." for number, note in notes.items()) or NOTHING

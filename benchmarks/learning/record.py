"""Runs that are kept as they are made, so that a long benchmark can stop and go on later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

Job = TypeVar("Job")


class Record(Generic[Job]):
    """A file of one JSON line a run, behind a first line that says what they are runs of."""

    def __init__(self, path: Path, job: type[Job], of: Mapping[str, Any]) -> None:
        """Reads what an earlier call left in ``path``; a ValueError where that is of anything but ``of``."""
        self.path = path
        self.rows: dict[Job, Any] = {}
        if path.exists():
            first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if first != of:
                differing = sorted(key for key in first.keys() | of.keys() if first.get(key) != of.get(key))
                raise ValueError(f"{path} has runs of another {', '.join(differing)}: remove it, or set another --out")
            self.rows = {job(**line["job"]): line["row"] for line in lines}
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(of)

    def add(self, job: Job, row: Any) -> None:
        self.rows[job] = row
        self._append({"job": asdict(job), "row": row})  # type: ignore[call-overload]

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def remove(self) -> None:
        self.path.unlink()

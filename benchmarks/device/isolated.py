"""Groups of the doctor's checks in processes of their own: a hang or an illegal address costs the check it struck."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

ROOT = Path(__file__).resolve().parents[2]
EXIT_LIMIT = 5.0


class CheckRow(TypedDict):
    """One check. ``error`` and ``allowed`` are those of ``what``, the output nearest to or furthest past its limit."""

    group: str
    check: str
    # "pass", "fail" or "skip": it cannot run here, for the reason given.
    status: str
    error: float | None
    allowed: float | None
    what: str | None
    reason: str | None
    seconds: float
    dry: bool


class Isolated(NamedTuple):
    """How groups of checks run in processes: ``command`` for a group and the checks left of it prints a JSON line each.

    A process that ends, or is silent for ``limit`` seconds, fails the check that it was at; a new one takes the rest.
    """

    command: Callable[[str, Sequence[str]], list[str]]
    environment: Mapping[str, str]
    limit: float
    jobs: int
    # In time.monotonic(): what has not begun by then fails.
    deadline: float
    dry: bool
    # The exit status by which a process says that it cannot run what is left, and a new one must.
    start_over: int

    def run(self, groups: Mapping[str, Sequence[str]], report: Callable[[CheckRow], None]) -> list[CheckRow]:
        """A row for every check, in the order of the groups; each is reported when it is known."""
        found: dict[tuple[str, str], CheckRow] = {}

        def add(row: CheckRow) -> None:
            found[row["group"], row["check"]] = row
            report(row)

        asyncio.run(self._all(groups, add))
        return [found[group, check] for group, checks in groups.items() for check in checks]

    async def _all(self, groups: Mapping[str, Sequence[str]], add: Callable[[CheckRow], None]) -> None:
        free = asyncio.Semaphore(self.jobs)

        async def one(group: str, checks: Sequence[str]) -> None:
            async with free:
                await self._group(group, list(checks), add)

        await asyncio.gather(*(one(group, checks) for group, checks in groups.items()))

    async def _group(self, group: str, left: list[str], add: Callable[[CheckRow], None]) -> None:
        """Runs processes until no check is left; each takes at least one away."""
        while left:
            if time.monotonic() >= self.deadline:
                for check in left:
                    add(self._failed(group, check, "not run: the time was over", 0.0))
                return
            start, before = time.monotonic(), len(left)
            reason = await self._process(group, left, add)
            if reason is not None or (left and len(left) == before):
                reason = reason or "the process gave it no result"
                add(self._failed(group, left.pop(0), reason, time.monotonic() - start))

    async def _process(self, group: str, left: list[str], add: Callable[[CheckRow], None]) -> str | None:
        """Takes from ``left`` what one process reports. Why it failed at the next, None where that has not begun."""
        with tempfile.TemporaryFile() as complaints:
            process = await asyncio.create_subprocess_exec(
                *self.command(group, left),
                stdout=asyncio.subprocess.PIPE,
                stderr=complaints,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )
            try:
                while left and (line := await asyncio.wait_for(process.stdout.readline(), self._patience())):
                    row = self._row(group, line, left)
                    if row is not None:
                        left.remove(row["check"])
                        add(row)
                await asyncio.wait_for(process.wait(), self._patience() if left else EXIT_LIMIT)
            except asyncio.TimeoutError:
                return f"no result within {self._patience():.0f} s: killed" if left else None
            finally:
                if process.returncode is None:
                    # The whole session: a compiler that it started must not outlive it.
                    os.killpg(process.pid, signal.SIGKILL)
                    await process.wait()
            if not left or process.returncode == self.start_over:
                return None
            return _death(process.returncode, _last_line(complaints))

    def _patience(self) -> float:
        return max(0.0, min(self.limit, self.deadline - time.monotonic()))

    def _row(self, group: str, line: bytes, left: Sequence[str]) -> CheckRow | None:
        """The row that a line holds; None where a library printed it."""
        try:
            found = json.loads(line)
        except ValueError:
            return None
        if not isinstance(found, dict) or found.get("check") not in left:
            return None
        return CheckRow(group=group, **found, dry=self.dry)

    def _failed(self, group: str, check: str, reason: str, seconds: float) -> CheckRow:
        return CheckRow(
            group=group,
            check=check,
            status="fail",
            error=None,
            allowed=None,
            what=None,
            reason=reason,
            seconds=seconds,
            dry=self.dry,
        )


def _death(status: int, complaint: str) -> str:
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"the process ended, {how}{': ' if complaint else ''}{complaint}"


def _last_line(file: Any) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 4096))
    lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def line_of(row: CheckRow) -> str:
    """A check as the terminal shows it."""
    if row["error"] is not None:
        figures = f"{row['error']:.2e} of {row['allowed']:.2e} allowed ({row['what']})"
    else:
        figures = ": ".join(filter(None, (row["what"], row["reason"])))
    return f"{row['status'].upper():4}  {row['group']:19}  {row['check']:50}  {row['seconds']:5.1f} s  {figures}"

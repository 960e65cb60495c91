"""Groups of local processes that run one function after another for the tests.

One process imports torch, which takes seconds, and forks the members of every group. A member that fails answers with
its traceback; a group that hangs or fails is killed, and the next call forks a new one. Members end in an order that
gloo bears (`worker` says why), and how one ends after its last answer fails nothing.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
STARTS_WITHIN = 60.0  # seconds, on a machine that is busy with other tests
ANSWERS_WITHIN = 120.0
ENDS_WITHIN = 10.0


class FailedError(AssertionError):
    """A member of a group raised, died or hung."""


class Groups:
    """Runs module-level functions ``function(*arguments)`` on the ranks of process groups, with gloo."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hk")
        self._listener = Listener(str(Path(self._folder.name, "server")), "AF_UNIX")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.distributed.worker", self._folder.name]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment)
        self._server = self._accept(self._listener)
        self._members: dict[int, list[tuple[int, Connection]]] = {}

    def run(
        self, world: int, function: Callable[..., Any], *arguments: Any, within: float = ANSWERS_WITHIN
    ) -> list[Any]:
        """What function(*arguments) returned on every rank of a group of that size, in the order of ranks."""
        if world not in self._members:
            self._members[world] = self._fork(world)
        members = self._members[world]
        for _, connection in members:
            with contextlib.suppress(ConnectionError):  # it died, which its answer will tell
                connection.send_bytes(pickle.dumps((function, arguments)))
        answers, errors = [], {}
        for rank, (_, connection) in enumerate(members):
            try:
                # Where one rank failed, the others wait for it in vain.
                answered = connection.poll(1.0 if errors else within)
                worked, answer = pickle.loads(connection.recv_bytes()) if answered else (False, "no answer")
            except (EOFError, ConnectionError):  # the latter where it had not read its task
                worked, answer = False, "it died"
            if worked:
                answers.append(answer)
            else:
                errors.setdefault(answer, []).append(rank)
        if errors:
            self._kill(world)
            raise FailedError("\n".join(f"ranks {ranks} of {world}: {error}" for error, ranks in errors.items()))
        return answers

    def end(self, world: int) -> None:
        """Lets the members of a group end it together; those that do not, or that fail to, are killed in silence."""
        members = self._members[world]
        for _, connection in members:
            with contextlib.suppress(OSError):  # it died
                connection.send_bytes(pickle.dumps(None))
        latest = time.monotonic() + ENDS_WITHIN
        for _, connection in members:
            connection.poll(max(0.0, latest - time.monotonic()))  # whose end closes it
        self._kill(world)

    def close(self) -> None:
        for world in list(self._members):
            self.end(world)
        self._server.close()
        self._process.wait(STARTS_WITHIN)
        self._listener.close()
        self._folder.cleanup()

    def _fork(self, world: int) -> list[tuple[int, Connection]]:
        address = str(Path(self._folder.name, f"group{world}"))
        with Listener(address, "AF_UNIX", backlog=world) as listener:
            self._server.send_bytes(pickle.dumps((world, address)))
            members: dict[int, tuple[int, Connection]] = {}
            while len(members) < world:
                connection = self._accept(listener)
                rank, process = pickle.loads(connection.recv_bytes())
                members[rank] = process, connection
        return [members[rank] for rank in range(world)]

    def _accept(self, listener: Listener) -> Connection:
        listener._listener._socket.settimeout(STARTS_WITHIN)  # type: ignore[attr-defined]
        return listener.accept()

    def _kill(self, world: int) -> None:
        for process, connection in self._members.pop(world):
            with contextlib.suppress(ProcessLookupError):  # it died by itself
                os.kill(process, signal.SIGKILL)
            connection.close()


@pytest.fixture(scope="session")
def groups() -> Iterator[Groups]:
    groups = Groups()
    yield groups
    groups.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for files that the processes exchange."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)

"""`python -m tests.mutate`: puts each defect of mutations.toml into a copy of the sources; the tests must turn red.

A defect that the tests survive is a hole in the tests, and exit status 1. Only failing tests count as caught: sources
that no longer import do not, nor does a defect whose text is no longer in its file. The tests are those of `make test`;
a group that needs a slow one says so with `-m slow`.

First the tests of every file run without a defect. That proves them sound, and says how long each takes: with a defect
one case of each test comes first and cheap cases come before dear ones, so that most defects are caught in seconds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tomllib

ROOT = Path(__file__).parent.parent
SOURCES = ("hydra_kernels", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml", "Makefile", "constraints.txt")
SOURCES += ("MANIFEST.in", "LICENSE")
TIMEOUT = 3600  # seconds a run of tests may take without a defect
TESTS_FAILED = 1  # pytest's exit status; 2 and more mean that no test ran
# What the tests import beside the mutated sources: once, in the process that all runs are forked from.
LIBRARIES = ["torch", "torch._dynamo", "torch.distributed.tensor", "pytest", "hypothesis", "safetensors.torch", "peft"]
LIBRARIES += ["triton.runtime.interpreter", "transformers", "matplotlib.pyplot", "rich.table"]
SERVER = multiprocessing.get_context("forkserver")
CATALOGUE = "tests/mutations.toml"


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


def parsed(text: str) -> list[Mutation]:
    groups = tomllib.loads(text)["group"]
    return [Mutation(n, g["file"], *texts, g["tests"]) for g in groups for n, texts in g["mutations"].items()]


def read() -> list[Mutation]:
    return parsed((ROOT / CATALOGUE).read_text())


class Selection(NamedTuple):
    """What a group's `tests` says: files, and the values of pytest's -k and -m."""

    files: tuple[str, ...]
    names: str
    marks: str

    @classmethod
    def of(cls, tests: str) -> Selection:
        parser = argparse.ArgumentParser()
        parser.add_argument("files", nargs="+")
        parser.add_argument("-k", default="")
        parser.add_argument("-m", default="not slow")
        found = parser.parse_args(shlex.split(tests))
        return cls(tuple(found.files), found.k, found.m)

    @property
    def arguments(self) -> list[str]:
        return [*self.files, "-m", self.marks, *(["-k", self.names] if self.names else [])]


def union(selections: Sequence[Selection]) -> list[Selection]:
    """Selections of one file each that together run every test of these, each once."""
    names: dict[tuple[str, str], set[str]] = {}
    for selection in selections:
        for file in selection.files:
            names.setdefault((file, selection.marks), set()).add(selection.names)
    return [
        Selection((file,), "" if "" in some else " or ".join(f"({name})" for name in sorted(some)), marks)
        for (file, marks), some in names.items()
    ]


class Order:
    """A plugin of pytest: how long tests took in an earlier run decides when they run."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.took: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """By the place among the cases of its own test, in an order that mixes them, times what the case takes."""
        mixed = random.Random(0).sample(items, len(items))
        places: dict[str, int] = {}
        keys = {}
        for item in mixed:
            test = item.nodeid.partition("[")[0]
            places[test] = places.get(test, 0) + 1
            keys[item] = places[test] * self.seconds.get(item.nodeid, 0.0)
        items.sort(key=keys.__getitem__)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration


class Run(NamedTuple):
    """A run of tests: pytest's exit status, what it printed, and the seconds of each test."""

    status: int
    output: str
    took: dict[str, float]


def run_tests(folder: Path, selection: Selection, seconds: dict[str, float] | None = None) -> Run:
    """Runs tests of the sources in folder, in a process of its own with the libraries imported.

    With the seconds that tests took without a defect they are ordered by them, and end after four times as long: a
    defect that makes them hang is caught.
    """
    of_these = [took for test, took in (seconds or {}).items() if test.partition("::")[0] in selection.files]
    process = SERVER.Process(target=_run_pytest, args=(folder, selection, seconds))
    process.start()
    process.join(TIMEOUT if seconds is None else 60 + 4 * sum(of_these))
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    # What hangs and what crashes is caught too.
    status = TESTS_FAILED if process.exitcode < 0 else process.exitcode
    took = _output(folder, process.pid).with_suffix(".json")
    return Run(
        status,
        _output(folder, process.pid).read_text(errors="replace"),
        json.loads(took.read_text()) if took.exists() else {},
    )


def _output(folder: Path, process: int) -> Path:
    return folder / f"output-{process}.txt"


def _run_pytest(folder: Path, selection: Selection, seconds: dict[str, float] | None) -> None:
    os.setsid()
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    sys.dont_write_bytecode = True
    output = _output(folder, os.getpid())
    with output.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    import pytest

    order = Order(seconds or {})
    # Plain assertions: plugins that are imported already can't be rewritten, and nobody reads the messages.
    options = ["-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0"]
    status = pytest.main([*options, *selection.arguments], plugins=[order])
    output.with_suffix(".json").write_text(json.dumps(order.took))
    os._exit(status)


def build_native(folder: Path) -> bool:
    """Compiles a folder's C++ sources for the CPU; whether they compile."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {**os.environ, "HYDRA_BUILD": "cpp", "MAX_JOBS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True).returncode == 0


def copy_sources(folder: Path, built: Path | None) -> None:
    """With what was compiled in the folder ``built``: files keep their times, so ninja compiles only what changes."""
    if built is not None and (built / "build" / "cpp").exists():
        shutil.copytree(built / "build" / "cpp", folder / "build" / "cpp")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, folder / name)


def is_compiled(mutation: Mutation) -> bool:
    """Whether it is in the compiled part; the tests of what only GPUs run compile that themselves."""
    return mutation.file.startswith("csrc/") and not mutation.file.startswith(("csrc/cuda/", "csrc/gpu"))


def verdict(mutation: Mutation, built: Path, seconds: dict[str, float]) -> str:
    """ "caught", or what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder, built if is_compiled(mutation) else None)
        path = folder / mutation.file
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return f"STALE: its text occurs {text.count(mutation.old)} times in {mutation.file}"
        path.write_text(text.replace(mutation.old, mutation.new))
        if is_compiled(mutation) and not build_native(folder):
            return "BROKEN: it does not compile"
        status = run_tests(folder, Selection.of(mutation.tests), seconds).status
    return {0: "SURVIVED", TESTS_FAILED: "caught"}.get(status, f"BROKEN: pytest ended with status {status}")


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def touched(mutations: list[Mutation], revision: str) -> list[Mutation]:
    """Those that what differs from a revision can let slip: their file, their tests, or they themselves changed.

    What all tests share (cases, oracle, settings) counts as the tests of every mutation.
    """
    files = set(git("diff", "--name-only", revision).split())
    before = set(parsed(git("show", f"{revision}:{CATALOGUE}"))) if CATALOGUE in files else set(mutations)
    helpers = {f for f in files if f.startswith("tests/") and f.endswith(".py") and "/test_" not in f}
    if helpers - {"tests/mutate.py", "tests/sanitize.py", "tests/soak.py"}:
        return mutations
    return [m for m in mutations if m not in before or m.file in files or files & set(Selection.of(m.tests).files)]


def sound(folder: Path, chosen: list[Mutation], pool: ThreadPoolExecutor) -> dict[str, float] | None:
    """The seconds of every test that the mutations name, all run without a mutation; None where one fails."""
    selections = union([Selection.of(m.tests) for m in chosen])
    seconds: dict[str, float] = {}
    for selection, run in zip(selections, pool.map(lambda s: run_tests(folder, s), selections), strict=True):
        if run.status != 0:
            print(f"the tests fail without any mutation: {shlex.join(selection.arguments)}\n{run.output[-6000:]}")
            return None
        seconds |= run.took
    return seconds


def commit() -> str:
    changed = "-changed" if git("status", "--porcelain", "--untracked-files=no") else ""
    return git("rev-parse", "HEAD").strip() + changed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of the mutations to run; all by default")
    parser.add_argument(
        "--changed", metavar="REVISION", help="only those whose file, or whose tests, differ from this revision"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no mutation later than this; which tests' mutations come first then changes with every commit",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--out", type=Path, help="store the summary as JSON")
    arguments = parser.parse_args()
    chosen = [m for m in read() if not arguments.names or any(part in m.name for part in arguments.names)]
    if not chosen:
        parser.error(f"no mutation's name contains {' or '.join(arguments.names)}")
    if arguments.changed:
        every, chosen = len(chosen), touched(chosen, arguments.changed)
        print(f"{len(chosen)} of {every} mutations: what differs from {arguments.changed} touches them", flush=True)
    batches = [chosen]
    if arguments.minutes < float("inf"):
        # Then even the tests without a defect would take too long: those of one selection after the other.
        batches = [[m for m in chosen if m.tests == tests] for tests in sorted({m.tests for m in chosen})]
        random.Random(commit()).shuffle(batches)

    start = time.monotonic()
    # Read while the libraries are imported: one thread a run, kernels in the interpreter.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    SERVER.set_forkserver_preload(LIBRARIES)
    said: dict[str, str] = {}
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = Path(scratch, "sources")
        folder.mkdir()
        copy_sources(folder, ROOT)
        if any(map(is_compiled, chosen)) and not build_native(folder):
            print("the compiled part does not compile without any mutation")
            return 1

        def judge(mutation: Mutation, seconds: dict[str, float]) -> None:
            began = time.monotonic()
            if began - start > 60 * arguments.minutes:
                return
            answer = verdict(mutation, folder, seconds)
            key = f"{mutation.file}: {mutation.name}"
            said[key], took[key] = answer, time.monotonic() - began
            print(f"{answer:8s} {took[key]:4.0f} s  {key}", flush=True)

        for batch in batches:
            if time.monotonic() - start > 60 * arguments.minutes:
                break
            seconds = sound(folder, batch, pool)
            if seconds is None:
                return 1
            print(f"{len(seconds)} tests pass without a mutation, {time.monotonic() - start:.0f} s", flush=True)
            list(pool.map(judge, batch, [seconds] * len(batch)))
    missed = {name: answer for name, answer in said.items() if answer != "caught"}
    slowest = sorted(took, key=took.__getitem__, reverse=True)[:10]
    print("slowest:", *(f"  {took[name]:4.0f} s  {name}" for name in slowest), sep="\n")
    if len(said) < len(chosen):
        print(f"{len(chosen) - len(said)} mutations were not run: the {arguments.minutes:g} minutes were over")
    print(f"{len(said) - len(missed)} of {len(said)} mutations caught in {time.monotonic() - start:.0f} s")
    for name, answer in missed.items():
        print(f"{answer}: {name}")
    if arguments.out:
        summary = {
            "commit": commit(),
            "mutations": len(chosen),
            "run": len(said),
            "caught": len(said) - len(missed),
            "missed": missed,
            "seconds": round(time.monotonic() - start),
            "jobs": arguments.jobs,
        }
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

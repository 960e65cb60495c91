"""`python -m tests.mutate`: puts each defect of mutations.toml into a copy of the sources; the tests must turn red.

A defect that the tests survive is a hole in the tests, and exit status 1. Only failing tests count as caught: sources
that no longer import do not, nor does a defect whose text is no longer in its file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).parent.parent
SOURCES = ("hydra_kernels", "csrc", "tests", "benchmarks", "setup.py", "pyproject.toml")
TIMEOUT = 300  # seconds a run of tests may take; a defect that makes them hang is caught
TESTS_FAILED = 1  # pytest's exit status; 2 and more mean that no test ran
# What the tests import beside the mutated sources: once, in the process that all runs are forked from.
LIBRARIES = ["torch", "torch._dynamo", "torch.distributed.tensor", "pytest", "hypothesis", "safetensors.torch", "peft"]
SERVER = multiprocessing.get_context("forkserver")


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str


def read() -> list[Mutation]:
    groups = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text())["group"]
    return [Mutation(n, g["file"], *texts, g["tests"]) for g in groups for n, texts in g["mutations"].items()]


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit status for the sources in folder, in a process of its own with the libraries imported, and what it
    printed."""
    process = SERVER.Process(target=_run_pytest, args=(folder, tests))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    # What hangs and what crashes is caught too.
    status = TESTS_FAILED if process.exitcode < 0 else process.exitcode
    return status, _output(folder, process.pid).read_text(errors="replace")


def _output(folder: Path, process: int) -> Path:
    return folder / f"output-{process}.txt"


def _run_pytest(folder: Path, tests: list[str]) -> None:
    os.setsid()
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    sys.dont_write_bytecode = True
    with _output(folder, os.getpid()).open("w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    import pytest

    # Plain assertions: plugins that are imported already can't be rewritten, and nobody reads the messages.
    os._exit(pytest.main(["-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))


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


def verdict(mutation: Mutation, built: Path) -> str:
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
        status, _ = run_tests(folder, shlex.split(mutation.tests))
    return {0: "SURVIVED", TESTS_FAILED: "caught"}.get(status, f"BROKEN: pytest ended with status {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of the mutations to run; all by default")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts alone: every N-th mutation")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    arguments = parser.parse_args()
    chosen = [m for m in read() if not arguments.names or any(part in m.name for part in arguments.names)]
    part, parts = map(int, arguments.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    if not chosen:
        parser.error(f"no mutation's name contains {' or '.join(arguments.names)}")

    start = time.monotonic()
    missed = 0
    # Read while the libraries are imported: one thread a run, kernels in the interpreter.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    SERVER.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(arguments.jobs) as pool:
        folder = Path(scratch, "sources")
        folder.mkdir()
        copy_sources(folder, ROOT)
        if any(map(is_compiled, chosen)) and not build_native(folder):
            print("the compiled part does not compile without any mutation")
            return 1
        sound = sorted({m.tests for m in chosen})
        runs = pool.map(lambda tests: run_tests(folder, shlex.split(tests)), sound)
        for tests, (status, output) in zip(sound, runs, strict=True):
            if status != 0:
                print(f"the tests fail without any mutation: {tests}\n{output[-6000:]}")
                return 1
        for mutation, said in zip(chosen, pool.map(partial(verdict, built=folder), chosen), strict=True):
            missed += said != "caught"
            print(f"{said:8s} {mutation.file}: {mutation.name}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations caught in {time.monotonic() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

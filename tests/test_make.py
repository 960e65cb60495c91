"""`make test` with another torch: it has an environment and a copy of the sources, so a compiled part, of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Stands for python3 and for the environments' python: notes where it is called, and with what.
PYTHON = """#!/bin/sh
echo "$PWD|$*" >> {log}
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "setup.py "*) echo '{{}}' > hydra_kernels/_native.json ;;
esac
"""
SOURCES = {
    "setup.py": "",
    "pyproject.toml": "",
    ".gitignore": "build/\n.venv*/\n_native.json\n",
    "hydra_kernels/a.py": "old",
    "tests/gone.py": "",
    "csrc/a.cpp": "",
}
pytestmark = pytest.mark.skipif(not all(map(shutil.which, ("make", "git"))), reason="no make, or no git")


@pytest.fixture
def make(tmp_path):
    """Runs make in a small repository; what Python was called with by folder."""
    log, python, repository = tmp_path / "log", tmp_path / "python3", tmp_path / "repository"
    for name, text in SOURCES.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, repository)
    subprocess.run(["git", "init", "--quiet"], cwd=repository, check=True)
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, list[str]]]:
        log.write_text("")
        command = ["make", f"PYTHON={python}", "TORCH_SOURCE=", *arguments]
        # Without what a make that runs these tests, as that of another torch does, would hand down.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
        calls: dict[str, list[str]] = {}
        for line in log.read_text().splitlines():
            folder, _, call = line.partition("|")
            calls.setdefault(str(Path(folder).relative_to(repository)), []).append(call)
        return done, calls

    return repository, run


def pins(path: Path) -> dict[str, str]:
    return dict(line.split("==") for line in path.read_text().splitlines() if "==" in line)


@pytest.mark.parametrize("torch", ["newest", "oldest"])
def test_another_torch_has_an_environment_and_a_copy_of_its_own(make, torch):
    repository, run = make
    done, calls = run("test")
    assert done.returncode == 0, done.stderr
    assert calls.keys() == {"."}
    record = repository / "hydra_kernels/_native.json"
    record.write_text(json.dumps("of the pinned torch"))

    done, calls = run("test", f"TORCH={torch}", "ARGS=-k dropout")
    assert done.returncode == 0, done.stderr
    copy = f"build/{torch}"
    assert calls.keys() == {copy}
    assert calls[copy][0] == f"-m venv ../../.venv-{torch}"
    assert "setup.py --quiet build_ext --inplace" in calls[copy]
    assert calls[copy][-1].startswith("-m pytest ")
    assert calls[copy][-1].endswith("-k dropout")
    assert json.loads(record.read_text()) == "of the pinned torch"
    assert json.loads((repository / copy / "hydra_kernels/_native.json").read_text()) == {}

    before, after = pins(repository / "constraints.txt"), pins(repository / copy / "build/constraints.txt")
    installs = [call for call in calls[copy] if "pip install" in call]
    assert installs
    assert all("-c build/constraints.txt" in call for call in installs)
    if torch == "newest":
        assert before.keys() - after.keys() == {"torch", "triton", "numpy"}
    else:
        assert after["torch"] == "2.11.0"
    assert {name for name in after if after[name] != before[name]} <= {"torch", "setuptools"}


def test_the_copy_follows_the_sources(make):
    repository, run = make
    run("test", "TORCH=newest")
    (repository / "hydra_kernels/a.py").write_text("new")
    (repository / "tests/gone.py").unlink()
    done, calls = run("test", "TORCH=newest")
    assert done.returncode == 0, done.stderr
    assert (repository / "build/newest/hydra_kernels/a.py").read_text() == "new"
    assert not (repository / "build/newest/tests/gone.py").exists()
    assert not [call for call in calls["build/newest"] if "pip install" in call]  # what is there stays


def test_another_name_is_refused(make):
    done, calls = make[1]("test", "TORCH=2.12")
    assert done.returncode != 0
    assert "TORCH is 2.12: expected newest or oldest" in done.stderr
    assert not calls

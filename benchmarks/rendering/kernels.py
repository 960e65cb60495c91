"""Whether a stored GPU result ran the GPU kernels that this tree holds.

A digest stands for the sources of the kernels. Those of the commits that results name are recorded beside the results,
so that a tree without its history renders the same pages.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

SOURCES = ("hydra_kernels/kernels", "hydra_kernels/backend", "csrc/cuda")
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")
RECORD = "kernels.json"


class Kernels(NamedTuple):
    """What is said of a result that ran others than today's: in a few words, and at the start of its caption."""

    short: str = ""
    caption: str = ""

    def remark(self) -> str:
        return f" ({self.short})" if self.short else ""


def digest(blobs: Iterable[tuple[str, str]]) -> str:
    """Of paths and the hashes that git gives their contents."""
    lines = sorted(f"{path} {blob}" for path, blob in blobs if path.endswith(SUFFIXES))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def here(root: Path) -> str:
    """The digest of the tree's own sources, committed or not."""
    files = [path for source in SOURCES for path in (root / source).rglob("*") if path.is_file()]
    contents = ((path.relative_to(root).as_posix(), path.read_bytes()) for path in files)
    return digest((path, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()) for path, data in contents)


def at(root: Path, commit: str) -> str | None:
    """The digest at a commit; None where git or that commit is not at hand."""
    command = ["git", "-C", str(root), "ls-tree", "-r", "--full-tree", commit, "--", *SOURCES]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    # "MODE blob HASH\tPATH"
    return digest((path, about.split()[2]) for about, _, path in (line.partition("\t") for line in listed.splitlines()))


def recorded(root: Path, results: Path, commits: Iterable[str]) -> dict[str, str]:
    """The digests of the record, and of those commits that it lacks and git knows."""
    path = results / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = {commit: at(root, commit) for commit in commits if commit not in known}
    return known | {commit: found for commit, found in missing.items() if found is not None}


def compared(known: str | None, today: str) -> Kernels:
    """The kernels of a GPU result, whose digest may be known, beside those of today."""
    if known == today:
        return Kernels()
    if known is None:
        return Kernels("kernels unknown", "**Whether it ran the kernels of today is not known.** ")
    return Kernels("older kernels", "**Measured with older kernels.** ")

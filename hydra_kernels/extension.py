"""The compiled part, `hydra_kernels._native`: the only place that loads it, or says why it is not there.

setup.py leaves a record beside the binary (`_native.json`). A binary that was built for another torch, or from other
sources than those in csrc beside the package, is never loaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.machinery
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent
REBUILD = "rebuild it in the source folder: pip install --no-build-isolation -e ."


def load() -> ModuleType | None:
    """`_native`, loaded at the first call, or None; `why_not` then says why."""
    return _found().module


def why_not(mode: str = "cpp") -> str | None:
    """Why `load` gives None, in one sentence; for mode "cuda" also why what it gives has no CUDA kernels."""
    found = _found()
    if found.module is None or mode == "cpp" or found.record["mode"] == mode:
        return found.reason
    return f"the compiled part has no CUDA kernels: {_first_line(found.record['why_not'][mode])}"


def why_not_on(capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels do not run on such a device: no code for its major version, no PTX that is no newer."""
    device, targets = 10 * capability[0] + capability[1], record()["architectures"]
    for kind, number in (target.split("_") for target in targets):
        version, suffix = int(number.rstrip("af")), number.lstrip("0123456789")
        same_major = version // 10 == capability[0] or (kind == "compute" and not suffix)
        if version == device or (version < device and suffix != "a" and same_major):
            return None
    at = f"{capability[0]}.{capability[1]}"
    return f"its kernels were built for {', '.join(targets)}, and this GPU has compute capability {at}; {REBUILD}"


def record() -> dict[str, Any]:
    """What setup.py says it built; empty where it says nothing."""
    return _found().record


def source_hash(csrc: Path, mode: str) -> str:
    """Of every source and header that a mode is built from. setup.py, which must not import torch for it, runs this."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh") and (mode == "cuda" or path.parent.name != "cuda"):
            digest.update(f"{path.relative_to(csrc).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class _Found(NamedTuple):
    module: ModuleType | None
    reason: str | None
    record: dict[str, Any]


@functools.cache
def _found() -> _Found:
    import torch  # before `_native`, which then shares its libraries, libgomp too

    path = FOLDER / "_native.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["mode"] == "none":
            return _Found(None, f"the compiled part was not built: {_first_line(record['why_not']['cpp'])}", record)
        built_for, sources, binary = record["torch"], record["sources"], FOLDER / record["file"]
        if record["mode"] == "cpp":
            _first_line(record["why_not"]["cuda"])
    except FileNotFoundError:
        return _Found(None, f"the compiled part was never built; {REBUILD}", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return _Found(None, f"the record of the compiled part is damaged ({path}: {error!r}); {REBUILD}", {})

    csrc = FOLDER.parent / "csrc"
    if built_for != torch.__version__:
        reason = f"the compiled part was built for torch {built_for}, and this is torch {torch.__version__}"
    elif (FOLDER.parent / "setup.py").exists() and csrc.is_dir() and source_hash(csrc, record["mode"]) != sources:
        reason = "the sources in csrc have changed since the compiled part was built"
    elif binary.name.removeprefix("_native") not in importlib.machinery.EXTENSION_SUFFIXES:
        reason = f"the compiled part was built for another Python ({binary.name})"
    elif not binary.exists():
        reason = f"the file of the compiled part is missing ({binary.name})"
    else:
        try:
            return _Found(importlib.import_module(f"{__package__}._native"), None, record)
        except Exception as error:  # whatever its loading raises is a reason, not the end of the package
            reason = f"the compiled part does not load ({_first_line(f'{type(error).__name__}: {error}')})"
    return _Found(None, f"{reason}; {REBUILD}", record)


def _first_line(reason: str) -> str:
    return reason.partition("\n")[0]

"""What a device is and what was measured on it: what a choice depends on besides the call."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import extension
from ..backend import TABLE
from ..backend.interface import BACKWARDS, FORMS, LIBRARIES, LOW_PRECISION
from ..backend.interface import CPU as CPU
from ..backend.native import no_sweep
from ..version import VERSION
from .choice import DATA, Cpu, Key, Machine, Measured


def here(device: torch.device, measured: bool = True) -> Machine:
    """The machine of a device, found once in a process and again after `tune`; without measurements if not measured."""
    tf32 = device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    machine = _here(device, tf32, torch.get_num_threads())
    return machine if measured else machine._replace(measured=())


# So torch.compile runs it instead of tracing it. torch.compiler.assume_constant_result sets the same, but imports the
# compiler, which the package does not do.
here._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _here(device: torch.device, tf32: bool, threads: int) -> Machine:
    capability = torch.cuda.get_device_capability(device) if is_nvidia(device) else None
    reasons = {name: backend.unavailable(device) for name, backend in TABLE.items()}
    name = device_name(device)
    rows = [row for row in DATA["measured"] if row["device"] == name]
    measured = table([*rows, *cached(name)], tf32)
    if capability is None:
        return Machine(name, None, reasons, measured, cpu() if device.type == "cpu" else None)
    return Machine(name, capability, reasons, measured, backward=fixed_backward(), no_sweep=no_sweep(capability))


def cpu() -> Cpu | None:
    """This processor; None without the compiled part. ValueError where ``$HYDRA_KERNELS_PRODUCTS`` is no library."""
    library = os.environ.get("HYDRA_KERNELS_PRODUCTS") or "auto"
    if library not in ("auto", *LIBRARIES):
        raise ValueError(f"$HYDRA_KERNELS_PRODUCTS: expected one of auto, {', '.join(LIBRARIES)}, got {library!r}")
    native, name = extension.load(), cpu_name()
    if native is None:
        return None
    vendor = next((vendor for vendor in ("AMD", "Intel") if vendor in name), "")
    widened = tuple(dtype for dtype in LOW_PRECISION if native.widened(dtype == torch.float16))
    return Cpu(vendor, native.matrix_units(), native.onednn(), library, widened, native.instructions())


def fixed_backward() -> str:
    """How `native`'s backward reads x and G on a GPU: ``$HYDRA_KERNELS_BACKWARD``. ValueError for another word."""
    backward = os.environ.get("HYDRA_KERNELS_BACKWARD") or "auto"
    if backward not in ("auto", *BACKWARDS):
        raise ValueError(f"$HYDRA_KERNELS_BACKWARD: expected one of auto, {', '.join(BACKWARDS)}, got {backward!r}")
    return backward


def forget() -> None:
    """Makes the next call read the measurements again."""
    _here.cache_clear()


def is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where `tune` stores what it measured: ``$HYDRA_KERNELS_CACHE``, else hydra_kernels in the user's cache folder."""
    if folder := os.environ.get("HYDRA_KERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hydra_kernels"


def versions() -> dict[str, str | None]:
    """What a measurement depends on besides the device: where one of these differs, it does not count."""
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    found = {"hydra_kernels": VERSION, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton}
    # The processor on a GPU too: the host's speed decides small layers.
    return found | {"native": extension.record().get("sources"), "cpu": cpu_name()}


def cached(name: str) -> list[dict[str, Any]]:
    """The user's measurements on the device of this name, with these versions. It warns of damaged files."""
    rows, now = [], versions()
    for path in sorted(cache_folder().glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            table([row], tf32=False)
            current = row["device"] == name and row["versions"] == now
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"hydra_kernels: {path} is not a measurement of hk.tune; delete it ({error!r})", stacklevel=2)
            continue
        if current:
            rows.append(row)
    return rows


def table(rows: Iterable[Mapping[str, Any]], tf32: bool) -> list[tuple[Key, tuple[Measured, ...]]]:
    """Stored measurements as `choice` reads them. float32 counts in the precision that is set; later rows win."""
    found: dict[Key, dict[int, Measured]] = {}
    for row in rows:
        dtype = torch.float32 if row["dtype"] == "tf32" else getattr(torch, row["dtype"])
        M, K, N, r_a, r_b = (int(row[key]) for key in ("M", "K", "N", "r_a", "r_b"))
        library, names = row.get("library", "aten"), (row.get("without_bias") or "").split()
        without_bias = (names[0], names[1]) if names else None
        for backend, form in filter(None, ((row["backend"], row["form"]), without_bias)):
            if backend not in TABLE or form not in FORMS[1:] or library not in LIBRARIES:
                raise ValueError(f"unknown backend {backend!r}, form {form!r} or library {library!r}")
        if dtype == torch.float32 and (row["dtype"] == "tf32") != tf32:
            continue
        found.setdefault((K, N, r_a, r_b, dtype), {})[M] = Measured(
            M, row["backend"], row["form"], library, without_bias
        )
    return [(key, tuple(by_M[M] for M in sorted(by_M))) for key, by_M in found.items()]

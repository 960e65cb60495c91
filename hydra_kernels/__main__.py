"""`python -m hydra_kernels`: what this machine and this installation are, for a bug report. Plain text; never fails."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from . import __version__, extension
from .backend import backends
from .choose.machine import cache_folder, cpu_name

PACKAGES = ("triton", "numpy", "safetensors", "peft", "transformers", "accelerate")
# Names, or their beginnings, of what changes results or speed; no key of a service begins so.
VARIABLES = (
    *("HYDRA_", "TRITON_", "TORCH", "PYTORCH_", "CUDA_", "CUBLAS_", "OMP_", "MKL_", "KMP_", "GOMP_"),
    *("ATEN_CPU_CAPABILITY", "NVIDIA_TF32_OVERRIDE", "NVIDIA_VISIBLE_DEVICES"),
)


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def system() -> Iterator[str]:
    yield platform.platform()
    if sys.platform == "linux":
        yield platform.freedesktop_os_release().get("PRETTY_NAME", "a distribution without a name")


def versions() -> Iterator[str]:
    yield f"Python {platform.python_version()} ({sys.executable})"
    yield f"torch {torch.__version__}, git {torch.version.git_version}"
    for name in PACKAGES:
        yield f"{name} {version(name)}"


def cpu() -> Iterator[str]:
    yield f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "all"
    yield f"{os.cpu_count()} cores, usable here: {usable}; interop threads: {torch.get_num_interop_threads()}"


def _built_for() -> str:
    if torch.version.cuda or torch.version.hip:
        return f"built for {'CUDA' if torch.version.cuda else 'HIP'} {torch.version.cuda or torch.version.hip}"
    return "built for the CPU"


def gpus() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield f"none that torch can use ({_built_for()})"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
    if torch.cuda.is_available():
        yield f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
        for line in done.stdout.splitlines() or [done.stderr.strip() or done.stdout.strip() or "nothing"]:
            yield f"nvidia-smi: {line}"
    else:
        yield "nvidia-smi: not found"


def compiled_part() -> Iterator[str]:
    reason = extension.why_not()
    yield "loaded" if reason is None else f"not loaded: {reason}"
    yield from described(extension.record())


def described(record: Mapping[str, object]) -> Iterator[str]:
    """What setup.py recorded, a line a fact; a compiler's last words are several lines."""
    for key, value in record.items():
        facts = value.items() if isinstance(value, dict) else [("", value)]
        for name, fact in facts:
            text = " ".join(map(str, fact)) if isinstance(fact, list) else str(fact)
            yield f"{f'{key} {name}'.strip().replace('_', ' ')}: {text}"


def backend_reasons() -> Iterator[str]:
    for name, reason in backends().items():
        yield f"{name}: {reason or 'usable'}"


def variables() -> Iterator[str]:
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    yield from (f"{name}={value}" for name, value in found.items())
    if not found:
        yield "none that changes results or speed"


def measurements() -> Iterator[str]:
    folder = cache_folder()
    yield f"{len(list(folder.glob('*.json')))} in {folder}"


def report() -> Iterator[str]:
    yield f"hydra_kernels {__version__} in {Path(__file__).parent}"
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "system": system,
        "versions": versions,
        "CPU": cpu,
        "GPU": gpus,
        "compiled part": compiled_part,
        "backends": backend_reasons,
        "environment variables": variables,
        "measurements": measurements,
    }
    for title, part in parts.items():
        yield f"{title}:"
        try:
            for line in part():
                yield "  " + line.replace("\n", "\n    ")
        except Exception as error:  # a report of what is broken must get past what is broken
            yield f"  failed: {type(error).__name__}: {error}"


if __name__ == "__main__":
    encoding = sys.stdout.encoding or "utf-8"
    for line in report():
        print(line.encode(encoding, "replace").decode(encoding))

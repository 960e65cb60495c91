"""The CUDA kernels as a library of the host, and their launchers called on tensors in frames of NaN."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
SOURCES, HOST = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_on_host"
FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-DCUDA_ON_HOST", "-Wno-unknown-pragmas")
FRAME = 256  # bytes of NaN around every buffer
# Set by tests/sanitize.py, which runs these tests with the sanitizer's runtime loaded: address or thread.
SANITIZER = os.environ.get("CUDA_ON_HOST_SANITIZER")
BUILDS = {
    None: ("g++", "-O2"),
    "address": ("g++", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("g++", "-O1", "-fsanitize=thread"),
}
Tensors = dict[str, Tensor]

_log = logging.getLogger(__name__)


class Framed(NamedTuple):
    """A tensor and the bytes that it lies in, 0xff around it: NaN in every type."""

    t: Tensor
    buffer: Tensor
    start: int
    size: int


def framed(t: Tensor, stride: int | None = None, offset: int = 0) -> Framed:
    """A copy of t, `offset` elements after a line of 64 bytes, its rows `stride` elements apart."""
    rows, width, of = t.shape[0] if t.dim() == 2 else 1, t.shape[-1] if t.dim() else 1, t.element_size()
    strides = (stride or width, 1) if t.dim() == 2 else t.stride()
    size = ((rows - 1) * (stride or width) + width if t.dim() == 2 else t.numel()) * of if t.numel() else 0
    buffer = torch.full((2 * FRAME + size + 128,), 0xFF, dtype=torch.uint8)
    start = FRAME + -(buffer.data_ptr() + FRAME) % 64 + offset * of
    made = buffer[start : start + size].view(t.dtype).as_strided(t.shape, strides)
    made.copy_(t)
    return Framed(made, buffer, start, size)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Framed:
    return framed(torch.full(shape, torch.nan, dtype=dtype))


def cuda_headers() -> Path | None:
    """The folder of cuda_bf16.h: the toolkit's, or that of NVIDIA's packages from PyPI."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *(Path(p) / "nvidia" / "cu13" for p in sys.path)]
    return next((p / "include" for p in places if (p / "include" / "cuda_bf16.h").is_file()), None)


def compiled(compiler: str, headers: Path, flags: tuple[str, ...]) -> Path:
    """The library of all kernels for the host, in a temporary folder named by what went into it."""
    files = sorted([*SOURCES.iterdir(), *HOST.glob("*.h")])
    key = hashlib.sha256(repr((compiler, flags, [(f.name, f.read_bytes()) for f in files])).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"hydra_kernels-cuda_on_host-{key}"
    library = folder / "kernels.so"
    if not library.exists():
        _log.info("compiling the CUDA kernels for the host: %s", library)
        folder.mkdir(exist_ok=True)
        common = [compiler, *flags, "-isystem", str(headers), f"-I{HOST}"]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:

            def compile_one(source: Path) -> str:
                made = f"{scratch}/{source.stem}.o"
                subprocess.run([*common, "-x", "c++", "-c", str(source), "-o", made], check=True)
                return made

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cu"))))
            subprocess.run([*common, "-shared", *objects, "-o", f"{scratch}/kernels.so"], check=True)
            os.replace(f"{scratch}/kernels.so", library)
    return library


@cache
def library() -> ctypes.CDLL:
    compiler, *flags = BUILDS[SANITIZER]
    headers = cuda_headers()
    if shutil.which(compiler) is None or headers is None:
        pytest.skip("no cuda_bf16.h was found" if headers is None else f"no {compiler} was found")
    return ctypes.CDLL(str(compiled(compiler, headers, (*flags, *FLAGS))))


def count(name: str, *sizes: int) -> int:
    """One of kernels.h's numbers of parts."""
    function = getattr(library(), f"hydra_{name}")
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, sizes))


@contextmanager
def only_these(*buffers: Framed) -> Iterator[None]:
    """AddressSanitizer reports what touches a frame."""
    if SANITIZER == "address":
        for _, buffer, start, size in buffers:
            for first, bytes_ in ((0, start), (start + size, buffer.numel() - start - size)):
                address = ctypes.c_void_p(buffer.data_ptr() + first)
                library().__asan_poison_memory_region(address, ctypes.c_size_t(bytes_))
    yield
    if SANITIZER == "address":
        for buffer in buffers:
            address = ctypes.c_void_p(buffer.buffer.data_ptr())
            library().__asan_unpoison_memory_region(address, ctypes.c_size_t(buffer.buffer.numel()))


@cache
def structure(name: str) -> type[ctypes.Structure]:
    """The struct of kernels.h."""
    body = re.search(rf"struct {name} {{(.*?)}};", (SOURCES / "kernels.h").read_text(), re.DOTALL)
    kinds = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float, "HydraType": ctypes.c_int32}
    fields = re.findall(r"^ *(?:const )?(\w+)(\*?) (\w+);", body[1], re.MULTILINE)
    return type(
        name, (ctypes.Structure,), {"_fields_": [(f, ctypes.c_void_p if p else kinds[k]) for k, p, f in fields]}
    )


def call(
    kernel: str, inputs: dict[str, Framed], outputs: dict[str, Framed], status: int = 0, **values: float
) -> Tensors:
    """Runs a launcher. Inputs must come back unchanged, and so must what lies around outputs."""
    arguments = structure("Hydra" + "".join(map(str.title, kernel.split("_"))) + "Arguments")()
    pointers = {f"{name}_ptr": framed.t.data_ptr() for name, framed in {**inputs, **outputs}.items()}
    for name, value in {**pointers, **values}.items():
        if not hasattr(arguments, name):
            raise TypeError(f"{kernel} has no argument {name}")
        setattr(arguments, name, value)
    before = {name: framed.buffer.clone() for name, framed in inputs.items()}
    with only_these(*inputs.values(), *outputs.values()):
        got = getattr(library(), f"hydra_{kernel}")(ctypes.byref(arguments), None)
    assert got == status
    for name, framed in inputs.items():
        assert torch.equal(framed.buffer, before[name]), f"{name} was changed"
    for name, (_, buffer, start, size) in outputs.items():
        assert (torch.cat((buffer[:start], buffer[start + size :])) == 0xFF).all(), f"written beside {name}"
    return {name: framed.t for name, framed in outputs.items()}

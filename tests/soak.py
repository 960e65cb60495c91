"""`python -m tests.soak --steps 20000`: thousands of training steps in one process, whose memory must stay flat.

Resident memory sees what C++ holds, allocated blocks every small Python object, the collector every live tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice, pairwise, product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import hydra_kernels as hk

M, WIDTH, R = 1024, 32, 16
FILE_EVERY = 240  # steps: safetensors 0.8 itself keeps two small objects for each tensor that it reads
BOTTLENECK = M * R * 4  # bytes of one [M, R] tensor
RANKS = {"hydra": {"r_a": R // 2, "r_b": R // 2}, "lora": {"r": R}, "seqlora": {"r": R}}


class Memory(NamedTuple):
    """Bytes, blocks and tensors that a process holds."""

    resident: int
    blocks: int
    tensors: int


class Job(NamedTuple):
    """A model, what trains it, and whether under autocast."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    autocast: bool


def jobs() -> list[Job]:
    """Small models of every method, backend, form and option that is to be trained."""
    backends = ["aten"] + (["native"] if hk.backends()["native"] is None else [])
    made = []
    for method, backend, dropout, autocast in product(RANKS, backends, (0.0, 0.2), (False, True)):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        chosen = "auto" if autocast else backend
        hk.inject(model, ["0", "2"], method, dropout=dropout, backend=chosen, **RANKS[method])
        made.append(Job(model, torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters())), autocast))
    return made


def step(job: Job, x: torch.Tensor) -> None:
    """Two accumulated backwards and an update, a merge and unmerge."""
    model = job.model.train()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16) if job.autocast else contextlib.nullcontext():
            loss = model(x).square().mean()
        loss.backward()
    job.optimizer.step()
    job.optimizer.zero_grad()
    hk.merge(model.eval())
    with torch.no_grad():
        model(x)
    hk.unmerge(model)


def memory() -> Memory:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # Asking some objects for their class runs code of theirs, which may warn.
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    return Memory(resident, sys.getallocatedblocks(), tensors)


def growth(steps: int, leak: Callable[[], object] = lambda: None) -> Memory:
    """What the process holds more after half of ``steps`` steps, warmed up: the lesser of two halves, since a late
    warm-up falls into one and a leak into both. ``leak`` is run after each step."""
    torch.manual_seed(0)
    work, x = jobs(), torch.randn(M, WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapters.safetensors")
        for job in work * 3:
            step(job, x)
            hk.save_adapters(job.model, path)
            hk.load_adapters(job.model, path)
        memory()
        marks = [memory()]
        for _ in range(2):
            for i, job in enumerate(islice(cycle(work), steps // 2)):
                step(job, x)
                if i % FILE_EVERY == 0:
                    hk.save_adapters(job.model, path)
                    hk.load_adapters(job.model, path)
                leak()
            marks.append(memory())
    halves = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(marks)]
    return Memory(*map(min, zip(*halves, strict=True)))


def leaks(grown: Memory, steps: int) -> list[str]:
    """What grew by half of what a single object a step would add, or a quarter of an [M, R] tensor, which may find room
    in memory that was freed before."""
    allowed = Memory(steps // 2 * BOTTLENECK // 4, steps // 4, steps // 4)
    pairs = zip(Memory._fields, grown, allowed, strict=True)
    return [f"{name} grew by {g}, allowed {a}" for name, g, a in pairs if g > a]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20000)
    steps = parser.parse_args().steps
    start = time.monotonic()
    grown = growth(steps)
    found = leaks(grown, steps)
    print(f"{steps} steps in {time.monotonic() - start:.0f} s: {grown}; {'; '.join(found) or 'flat'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""What every benchmark shares: who ran it (environment), how its figures are stored, and how they are measured.

Times are in seconds and memory in bytes unless a name says otherwise.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from hydra_kernels.choose.machine import cpu_name

# Above the L2 of any CPU core today, the L2 caches of two cores together.
CPU_L2_BYTES = 8 << 20


class Environment(TypedDict):
    """Where, when and with what a result was measured. ``dirty``: tracked files differed from the commit."""

    device: str
    capability: str
    driver: str | None
    threads: int
    torch: str
    triton: str | None
    transformers: str | None
    python: str
    commit: str | None
    dirty: bool | None
    date: str


class Quartiles(NamedTuple):
    q1: float
    median: float
    q3: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Quartiles with linear interpolation between the two nearest values (numpy's default)."""
    if not values:
        raise ValueError("values is empty: there are no quartiles of nothing")
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def paired_ratios(times: Sequence[float], baseline: Sequence[float]) -> Quartiles:
    """Quartiles of times[i] / baseline[i], the two measured in the same round: what slows a whole round cancels."""
    if len(times) != len(baseline):
        raise ValueError(f"times has {len(times)} rounds and baseline {len(baseline)}: only paired rounds have a ratio")
    return quartiles([t / b for t, b in zip(times, baseline, strict=True)])


def shuffled_rounds(names: Sequence[str], rounds: int, seed: int) -> Iterator[list[str]]:
    """The names in a new random order for every round, so that no method always runs after the same one."""
    draw = random.Random(seed)
    for _ in range(rounds):
        yield draw.sample(list(names), len(names))


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


class Stopwatch:
    """Marks moments in the device's own time without waiting for it, so that its queue stays full."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        synchronize(device)

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from each mark to the next."""
        if self._cuda:
            torch.cuda.synchronize()
            return [first.elapsed_time(second) / 1e3 for first, second in itertools.pairwise(self._marks)]
        return [second - first for first, second in itertools.pairwise(self._marks)]


def cold_copies(bytes_each: int, device: torch.device) -> int:
    """How many inputs to take in turn so that none is left in the L2 cache when its turn comes again: 2 to 64."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else CPU_L2_BYTES
    return min(64, max(2, math.ceil(2 * l2 / bytes_each)))


def saved_bytes(run: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """The most bytes that autograd keeps for the backward at one time during ``run``: whole storages, each once, the
    parameters' not counted. Of micro-batches, each of which is let go before the next, that is the largest.

    A saved view keeps its whole storage alive, so the storage is what counts. A tensor that a Function hides on its
    ``ctx`` instead of saving it is not seen here; the peak shows it.
    """
    parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    users: Counter[int] = Counter()
    held = most = 0

    class Kept:
        """What the graph keeps in place of a tensor, for as long as it would have kept that."""

        def __init__(self, tensor: Tensor) -> None:
            nonlocal held, most
            # Detached: an output that kept itself would form a cycle and outlive the measurement.
            self.tensor = tensor.detach()
            storage = tensor.untyped_storage()
            self.address, self.bytes = storage.data_ptr(), storage.nbytes()
            if self.address not in parameter_storages and not users[self.address]:
                held += self.bytes
                most = max(most, held)
            users[self.address] += 1

        def __del__(self) -> None:
            nonlocal held
            users[self.address] -= 1
            if self.address not in parameter_storages and not users[self.address]:
                held -= self.bytes

    with saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return most


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``run`` holds at any moment above what was allocated when it started.

    CUDA: the caching allocator's ``max_memory_allocated``. CPU: the running sum over every allocation and release that
    the profiler sees in torch's allocator. It sees neither the scratch that a GEMM library takes from the system itself
    nor the release of what was allocated before the start.
    """
    if device.type == "cuda":
        synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The profiler's public events fold allocations into operators, which loses their order: the raw ones are needed.
    raw = profiler.profiler.kineto_results.events()
    allocations = sorted((event for event in raw if event.name() == "[memory]"), key=lambda event: event.start_ns())
    if not allocations:
        raise RuntimeError("the profiler reported no allocation: the peak is not known")
    return max(0, *itertools.accumulate(event.nbytes() for event in allocations))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def now() -> str:
    """The time in UTC as results have it; later ones sort behind earlier ones."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment(device: torch.device) -> Environment:
    """The machine, the versions, the commit and the time (UTC) that a result is published with."""
    cuda = device.type == "cuda"
    # A source tree without its history is told by whoever copied it.
    commit = os.environ.get("HYDRA_COMMIT") or _output("git", "rev-parse", "HEAD")
    if cuda:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:
        capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "capability": capability,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")) if commit else None,
        "date": now(),
    }


def write_result(path: Path, environment: Environment, rows: Sequence[Mapping[str, Any]], schema: type) -> None:
    """One JSON object, ``{"environment": ..., "rows": [...]}``, a line a row, of the TypedDict ``schema`` each.

    A write that does not finish leaves nothing under ``path``.
    """
    _check(environment, rows, schema, where=str(path))
    lines = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    text = f'{{"environment": {json.dumps(environment, allow_nan=False)},\n"rows": [\n{lines}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def read_result(path: Path, schema: type) -> tuple[Environment, list[dict[str, Any]]]:
    """(environment, rows) of a stored result, or a ValueError that names the file and what is wrong with it."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        environment, rows = stored["environment"], stored["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a stored result: {error!r}") from error
    _check(environment, rows, schema, where=str(path))
    return environment, rows


def _check(environment: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], schema: type, where: str) -> None:
    if not rows:
        raise ValueError(f"{where} has no rows")
    for record, kind in [(environment, Environment), *((row, schema) for row in rows)]:
        expected = set(kind.__annotations__)
        if expected != record.keys():
            missing, unknown = sorted(expected - record.keys()), sorted(record.keys() - expected)
            raise ValueError(f"{where} is no {kind.__name__}: missing {missing}, unknown {unknown}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""In what mode the same calls are made: as they are, under torch.compile, or replayed from CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("eager", "compile", "graph")
# Before a capture, so that libraries have allocated, kernels are compiled and an optimizer has its state.
WARM_UPS = 3
# A call: about 50 microseconds, longer than the host takes to queue two replays and their events.
HEAD_START_CYCLES = 100_000
# Every model of Table 4 has the same forward, of which torch compiles 8 variants and then raises.
VARIANTS = 64


def device_option(text: str) -> torch.device:
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device is {text!r}, expected cpu or cuda")
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {text!r}, but torch sees no GPU here")
    return torch.device(text)


def check(mode: str, device: torch.device, dry: bool) -> None:
    """Raises ValueError for a mode that there is not, here or at all; a dry run has every mode on every device."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "graph" and device.type != "cuda" and not dry:
        raise ValueError("mode is 'graph': it needs a GPU")


def file_name(benchmark: str, device: torch.device, dtype: str, mode: str, dry: bool) -> str:
    return f"{benchmark}-{'dry-' if dry else ''}{device.type}-{dtype}{'' if mode == 'eager' else f'-{mode}'}.json"


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Leaves no compiled code behind, nor the memory of what its body has dropped; compiled code of before is gone."""
    torch.compiler.reset()
    try:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            yield
    finally:
        torch.compiler.reset()
        # A compiled module refers to itself.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Sets how torch multiplies fp32 on a GPU, and then torch's default."""
    # By the older of torch's two settings: parts of inductor refuse the newer one.
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one of all warm-ups and captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Recorder:
    """Captures calls as CUDA graphs that share one memory pool.

    A tensor that a capture made and that nothing refers to any more lends its memory to the captures after it: what a
    replay needs of another's must be replayed just before it. Not on a GPU, in a dry run, a replay is the call itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def warm_up(self, run: Callable[[], object]) -> None:
        if self._pool is None:
            for _ in range(WARM_UPS):
                run()
            return
        side, current = _side_stream(self._device), torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(side)

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """What replays ``run``, which is not executed now."""
        if self._pool is None:
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=_side_stream(self._device)):
            run()
        return graph.replay


def head_start(device: torch.device, calls: int) -> None:
    """Occupies a GPU while the replays of a sample are queued: one shorter than its launch would be timed as that."""
    if device.type == "cuda":
        torch.cuda._sleep(HEAD_START_CYCLES * calls)

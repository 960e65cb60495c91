"""One forward and backward of a layer as the layer benchmark times them, as calls or as replays of CUDA graphs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measuring import methods, timing
from benchmarks.measuring.modes import Recorder

MOST_CAPTURED = 8


class Inputs:
    """x [M, K], which requires grad, and G = dL/dh [M, N], in enough buffers that none is still in the L2 cache.

    In mode graph each buffer is captured, which takes tens of milliseconds: few are, and small inputs stay in L2.
    """

    def __init__(
        self, M: int, K: int, N: int, dtype: torch.dtype, device: torch.device, seed: int, mode: str = "eager"
    ) -> None:
        draw = torch.Generator(device).manual_seed(seed)
        new = partial(torch.randn, device=device, dtype=dtype, generator=draw)
        copies = timing.cold_copies(M * (K + N) * dtype.itemsize, device)
        copies = min(copies, MOST_CAPTURED) if mode == "graph" else copies
        self.buffers = [(new(M, K).requires_grad_(), new(M, N)) for _ in range(copies)]
        self._turn = 0

    def turn(self) -> int:
        """Which buffer is next."""
        self._turn = (self._turn + 1) % len(self.buffers)
        return self._turn


class Pass:
    """A forward and a backward of a layer on one buffer; ``forget`` comes after every backward."""

    def __init__(self, layer: nn.Module, x: Tensor, G: Tensor) -> None:
        self.layer, self.x, self.G = layer, x, G
        self.h: Tensor | None = None

    def forward(self) -> None:
        self.h = self.layer(self.x)

    def backward(self) -> None:
        self.h.backward(self.G)

    def forget(self) -> None:
        """Drops the output and the gradients, so that the next backward writes its own instead of adding to them."""
        self.h = None
        methods.forget(self.layer, self.x)

    def step(self) -> dict[str, Tensor | None]:
        """Forward and backward, what they gave, by what it is, and nothing left behind."""
        self.forward()
        self.backward()
        found = methods.layer_results(self.layer, self.x, self.h)
        self.forget()
        return found


class Replay(Pass):
    """A pass as two CUDA graphs. Until it is told to forget, its output and gradients are what its replays write."""

    def __init__(self, layer: nn.Module, x: Tensor, G: Tensor, recorder: Recorder) -> None:
        super().__init__(layer, x, G)
        self._replay_forward = recorder.capture(super().forward)
        self._replay_backward = recorder.capture(super().backward)

    def forward(self) -> None:
        self._replay_forward()

    def backward(self) -> None:
        self._replay_backward()


def captured(layer: nn.Module, inputs: Inputs, recorder: Recorder) -> list[Replay]:
    """The replays of a layer, one for each buffer. The first has not forgotten: its ``step`` gives what it writes."""
    recorder.warm_up(Pass(layer, *inputs.buffers[0]).step)
    replays: list[Replay] = []
    for x, G in reversed(inputs.buffers):
        if replays:
            # What it made lends its memory to the next, as it would among eager calls.
            replays[-1].forget()
        replays.append(Replay(layer, x, G, recorder))
    return replays[::-1]

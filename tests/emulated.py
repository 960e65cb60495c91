"""CUDA graphs emulated on the CPU: what a capture runs is recorded, and a replay writes where the capture wrote."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measuring import modes


class EmulatedGraph(TorchDispatchMode):
    """A context that records every operator. Unlike a GPU's capture it executes them too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


def emulate_graphs(monkeypatch) -> None:
    """Lets ``modes.Recorder`` for a GPU work on the CPU's tensors."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: graph)
    for name in ("Stream", "stream", "current_stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    # Not the cached one: the mock must not outlive the test.
    monkeypatch.setattr(modes, "_side_stream", modes._side_stream.__wrapped__)
